"""Decoders of the student: what they read without a map is what they would read from the map itself."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from trace_fast import decoder as module
from trace_fast import reference
from trace_fast.decoder import ConvDecoder, PixelDecoder, Taps, fold_taps, make_decoder, spread_values, waves
from trace_fast.testing import assert_no_worse, random_features

# (h, w) of each block, in the order of a network
GRIDS = {
    "one token": [(1, 1)],
    "one block": [(3, 7)],
    "blocks of one grid": [(5, 4)] * 3,
    "UNet": [(8, 12), (4, 6), (2, 3), (4, 6), (8, 12)],
    "odd sizes": [(7, 9), (4, 5), (3, 5), (7, 9)],
    "coarse first": [(2, 3), (3, 5), (7, 11)],
}
HEADS, CHANNELS = 3, 8


@pytest.fixture(params=GRIDS.values(), ids=GRIDS)
def grids(request):
    return request.param


def features(grids, batch=2, dtype=torch.float64, peak=3.0):
    """Query and key of every block, logits `peak` times standard normal."""
    pairs = []
    for index, (height, width) in enumerate(grids):
        query, key = random_features(batch, HEADS, height * width, CHANNELS, seed=index)
        pairs.append([(x * factor).to(dtype).requires_grad_() for x, factor in ((query, peak / 20), (key, 1))])
    return pairs


def conv_decoder(grids, dtype=torch.float64):
    torch.manual_seed(3)
    decoder = ConvDecoder(max(grids, key=math.prod)).to(dtype)
    decoder.bias.data.fill_(0.7)
    return decoder


def read(values, grids, pairs):
    """What `Taps` reads from blocks."""
    taps = Taps(values, grids)
    for index, (query, key) in enumerate(pairs):
        taps.hear(index, query, key)
    return taps.total()


def aggregated_map(grids, pairs):
    """The paper's map, (B, N, N) over the finest grid."""
    finest = max(grids, key=math.prod)
    maps = [
        reference.resize_attention(reference.attention_map(query, key), grid, finest)
        for grid, (query, key) in zip(grids, pairs, strict=True)
    ]
    return torch.stack(maps).mean(0)


def convolve(decoder, attention):
    """The paper's decoder as it is told: a convolution over a picture of N channels."""
    kernel = decoder.values.view(1, -1, 3, 3)
    return F.conv2d(attention.mT.unflatten(2, decoder.grid), kernel, decoder.bias, padding=1)


@pytest.fixture
def exact(monkeypatch):
    """Read with the reference, which takes float64."""
    monkeypatch.setattr(module, "ops", reference)


@pytest.mark.parametrize("peak", [3.0, 20.0])
def test_folded_columns_are_the_convolution_over_the_map(grids, peak, exact):
    decoder, pairs = conv_decoder(grids), features(grids, peak=peak)
    found = decoder(read(decoder.values, grids, pairs), None)
    expected = convolve(decoder, aggregated_map(grids, pairs))
    assert found.shape == (2, 1, *decoder.grid)
    assert_close(found, expected, rtol=0, atol=1e-12)


def test_gradients_are_those_of_the_convolution_over_the_map(grids, exact):
    decoder, pairs = conv_decoder(grids), features(grids)
    inputs = [decoder.values, decoder.bias, *(x for pair in pairs for x in pair)]
    grad = torch.randn(2, 1, *decoder.grid, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad(decoder(read(decoder.values, grids, pairs), None), inputs, grad)
    expected = torch.autograd.grad(convolve(decoder, aggregated_map(grids, pairs)), inputs, grad)
    assert max(float(x.abs().max()) for x in expected) > 0.1
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, rtol=0, atol=1e-12)


def test_joint_attention_is_read_as_its_image_part_with_rows_divided_by_their_sums(exact):
    grid, text = (3, 5), 4
    (image,), (words,) = features([grid]), features([(1, text)])
    decoder = conv_decoder([grid])
    query, key = image[0], torch.cat([words[1], image[1]], 2)
    joint = (query @ key.mT * CHANNELS**-0.5).softmax(-1)[..., text:]
    assert joint.sum(-1).mean() < 0.95  # text takes its part
    attention = (joint / joint.sum(-1, keepdim=True)).mean(1)
    found = decoder(read(decoder.values, [grid], [image]), None)
    expected = convolve(decoder, attention)
    assert_close(found, expected, rtol=0, atol=1e-12)
    grad = torch.randn(found.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    inputs = [*image, decoder.values]
    *of_joint, of_words = torch.autograd.grad(expected, [*inputs, words[1]], grad)
    for one, other in zip(torch.autograd.grad(found, inputs, grad), of_joint, strict=True):
        assert_close(one, other, rtol=0, atol=1e-12)
    assert of_words.abs().max() < 1e-12  # no text, no gradient of it


def test_any_linear_reading_of_the_map_is_the_map_times_its_columns(grids, exact):
    pairs = features(grids)
    values = torch.randn(math.prod(max(grids, key=math.prod)), 5, dtype=torch.float64)
    assert_close(read(values, grids, pairs), aggregated_map(grids, pairs) @ values, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["one block", "UNet", "odd sizes"])
def test_no_worse_than_eager(name, device, tiles):
    tiles(32, 32)
    grids = GRIDS[name]
    tokens = math.prod(max(grids, key=math.prod))
    values, grad = torch.randn(2, tokens, 9, generator=torch.Generator().manual_seed(2))
    pairs = features(grids, dtype=torch.float32)

    def differentiate(read_by, dtype, device):
        inputs = [x.detach().to(device, dtype).requires_grad_() for x in (values, *(x for p in pairs for x in p))]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "ops", read_by)
            out = read(inputs[0], grids, list(zip(inputs[1::2], inputs[2::2], strict=True)))
        return out.detach(), *torch.autograd.grad(out, inputs, grad.to(out).expand_as(out))

    found = differentiate(module.ops, torch.float32, device)
    expected = differentiate(reference, torch.float64, "cpu")
    eager = differentiate(reference, torch.float32, "cpu")
    assert found[0].dtype == torch.float32 and found[0].device == device
    # sums of a row cancel in the gradients of query and key: what they sum is as large as the largest of the numbers
    largest = float(values.abs().max() * grad.abs().max())
    for result, truth, plain in zip(found, expected, eager, strict=True):
        assert_no_worse(result, truth, plain, magnitude=largest)


def test_a_block_that_is_heard_twice_counts_once(exact):
    grids = GRIDS["UNet"]
    pairs = features(grids)
    values = torch.randn(96, 4, dtype=torch.float64)
    taps = Taps(values, grids)
    for index in (0, 0, 1, 2, 1, 3, 4, 4, 4):  # as the way back does under checkpointing
        taps.hear(index, *pairs[index])
    assert torch.equal(taps.total(), read(values, grids, pairs))


def test_a_block_that_was_not_heard_is_no_zero(exact):
    grids = GRIDS["UNet"]
    taps = Taps(torch.randn(96, 4, dtype=torch.float64), grids)
    taps.hear(0, *features(grids)[0])
    with pytest.raises(KeyError):
        taps.total()


def test_spread_values_by_hand():
    # one row of two cells, carried to four: interpolation puts 1, 3/4, 1/4, 0 of the first there; its mass is 2
    values = torch.tensor([[8.0], [16.0], [24.0], [40.0]])
    expected = torch.tensor([[8 + 12 + 6], [4 + 18 + 40]]) / 2
    assert_close(spread_values(values, (1, 2), (1, 4)), expected)
    assert_close(spread_values(values, (2, 1), (4, 1)), expected)
    assert spread_values(values, (1, 4), (1, 4)) is values


def test_values_that_are_all_the_same_stay_so():
    for size, target in (((2, 3), (8, 12)), ((3, 5), (7, 9)), ((1, 1), (2, 3))):
        spread = spread_values(torch.full((math.prod(target), 2), 3.5, dtype=torch.float64), size, target)
        assert_close(spread, torch.full_like(spread, 3.5), rtol=0, atol=1e-13)  # rows of the map sum to 1


def test_fold_taps_by_hand():
    here, there = torch.arange(1.0, 10), torch.arange(10.0, 100, 10)
    taps = torch.stack([here, there])[None]  # 3 r + c: right of the middle is 5, below it 7, above it 1
    assert_close(fold_taps(taps, (1, 2)), torch.tensor([[[[5.0 + 60, 50 + 4]]]]))
    assert_close(fold_taps(taps, (2, 1)), torch.tensor([[[[5.0 + 80], [50 + 2]]]]))
    four = torch.zeros(1, 4, 9)
    four[0, 3] = there  # the corner below, on the right; only its own middle and what sees it count
    assert_close(fold_taps(four, (2, 2)), torch.tensor([[[[90.0, 80], [60, 50]]]]))


@pytest.mark.parametrize("grid", [(16, 16), (8, 12), (4, 6), (2, 9), (9, 2), (17, 1)], ids=str)
def test_waves_are_orthogonal_and_none_is_constant(grid):
    columns = waves(grid, 16).double()
    assert columns.shape == (math.prod(grid), 16)
    products = columns.mT @ columns
    lengths = products.diagonal()
    assert lengths.min() > 0.2 * math.prod(grid)
    assert_close(products, torch.diag(lengths), rtol=0, atol=1e-4)
    assert_close(columns.sum(0), torch.zeros(16).double(), rtol=0, atol=1e-4)


def test_waves_are_from_long_to_short():
    columns = waves((32, 48), 16).unflatten(0, (32, 48))
    changes = [(column.diff(dim=d) < 0).diff(dim=d).sum(d).max() for column in columns.unbind(-1) for d in (0, 1)]
    turns = torch.stack(changes).view(16, 2).sum(1)  # half-waves but one an axis
    assert turns.diff().min() >= -1 and turns[-1] > turns[0]
    assert not torch.equal(columns[..., 0], columns[..., 1])


class TestPixelDecoder:
    @pytest.fixture
    def decoder(self):
        torch.manual_seed(0)
        return PixelDecoder((3, 5), columns=6, channels=4)

    @pytest.mark.parametrize("detail", [1, 2, 3])
    def test_logits_are_as_fine_as_the_photograph(self, detail):
        decoder = PixelDecoder((3, 5), columns=6, channels=4, detail=detail)
        taps, photograph = torch.randn(2, 15, 6), torch.rand(2, 3, 24 * detail, 40 * detail)
        assert decoder(taps, photograph).shape == (2, 1, 24 * detail, 40 * detail)

    def test_it_sees_both_the_map_and_the_photograph(self, decoder):
        taps, photograph = torch.randn(1, 15, 6), torch.rand(1, 3, 48, 80)
        base = decoder(taps, photograph)
        assert not torch.equal(base, decoder(taps + 1, photograph))
        changed = decoder(taps, photograph.index_fill(3, torch.tensor([0]), 0.5)) - base
        assert changed[..., :5].abs().max() > 0 and not changed[..., 40:].any()  # where a pixel was changed

    def test_a_plain_picture_has_no_edge_at_its_border(self, decoder):
        taps, photograph = torch.randn(1, 1, 6).expand(1, 15, 6), torch.full((1, 3, 48, 80), 0.7)
        found = decoder(taps, photograph)
        assert_close(found, found[..., 24:25, 40:41].expand_as(found))


@pytest.mark.parametrize("kernel", [3, 5])
def test_a_picture_goes_on_beyond_its_border(kernel):
    convolution = module.Around(3, 4, kernel).double()
    picture = torch.rand(2, 3, 6, 9, generator=torch.Generator().manual_seed(0)).double()
    padded = torch.from_numpy(np.pad(picture.numpy(), [(0, 0), (0, 0), *[(kernel // 2,) * 2] * 2], mode="edge"))
    assert_close(convolution(picture), F.conv2d(padded, convolution.weight, convolution.bias))


class TestMakeDecoder:
    def test_its_options_make_it_again(self):
        for made in (ConvDecoder((4, 6)), PixelDecoder((4, 6), columns=8, channels=4, detail=1)):
            again = make_decoder(grid=(4, 6), **made.options())
            again.load_state_dict(made.state_dict())
            assert type(again) is type(made) and again.options() == made.options() and again.detail == made.detail

    def test_the_papers_has_nine_numbers_a_token_and_one(self):
        assert sum(x.numel() for x in make_decoder("conv", (64, 64)).parameters()) == 36_865

    def test_an_unknown_name(self):
        with pytest.raises(ValueError, match="decoder must be one of conv, pixels, got 'cnn'"):
            make_decoder("cnn", (4, 6))

    def test_an_unknown_option(self):
        with pytest.raises(ValueError, match=r"decoder conv does not know these options: .*'columns'"):
            make_decoder("conv", (4, 6), columns=4)

    @pytest.mark.parametrize(("grid", "columns", "most"), [((4, 6), 24, 23), ((16, 16), 65, 64)])
    def test_columns_that_cannot_be_read(self, grid, columns, most):
        make_decoder("pixels", grid, columns=most)
        with pytest.raises(ValueError, match=f"decoder pixels: columns must be from 1 to {most}, got {columns}"):
            make_decoder("pixels", grid, columns=columns)
