"""Convolutions whose kernels are trained by direction and length."""

import pytest
import torch
from torch.testing import assert_close

from trace_fast.decoder import make_decoder
from trace_fast.training.standardization import fold_kernels, standardize_kernels


@pytest.fixture
def decoder():
    torch.manual_seed(0)
    return make_decoder("unet", (3, 5), columns=6, channels=4)


def test_kernels_have_mean_zero_and_their_length(decoder):
    lengths = [
        x.weight.sub(x.weight.mean((1, 2, 3), keepdim=True)).flatten(1).norm(dim=1) for x in decoder.standardized()
    ]
    standardize_kernels(decoder)
    for convolution, length in zip(decoder.standardized(), lengths, strict=True):
        kernels = convolution.weight.flatten(1)
        assert_close(kernels.mean(1), torch.zeros(len(kernels)), rtol=0, atol=1e-6)
        assert_close(kernels.norm(dim=1), length, rtol=1e-4, atol=0)


def test_folded_it_gives_the_same_and_can_be_trained_on(decoder):
    standardize_kernels(decoder)
    readout, photo = torch.randn(1, 15, 6), torch.rand(1, 3, 32, 48)
    expected = decoder(readout, photo)
    again = make_decoder("unet", (3, 5), columns=6, channels=4)
    again.load_state_dict(fold_kernels(decoder).state_dict())
    assert_close(again(readout, photo), expected)
    standardize_kernels(again)
    assert_close(again(readout, photo), expected, rtol=1e-3, atol=1e-4)
    assert any(
        "original1" in name for name, _ in decoder.named_parameters()
    )  # the one that is trained is left as it is


def test_the_variance_is_kept_through_a_new_decoder(decoder):
    wide = make_decoder("unet", (3, 5), columns=6, channels=16)
    standardize_kernels(wide)
    features = torch.rand(2, 3, 64, 96) * 2 - 1
    for level in wide.down:
        features = level(features)
        assert 0.1 < features.std() < 3


@pytest.mark.parametrize("name", ["conv", "pixels"])
def test_other_decoders_stay_as_they_are(name):
    decoder = make_decoder(name, (4, 6))
    before = {name: id(parameter) for name, parameter in decoder.named_parameters()}
    standardize_kernels(decoder)
    assert {name: id(parameter) for name, parameter in decoder.named_parameters()} == before
