"""Decoders of the student: the readout of a map that is never stored equals that of the map, and old folders load."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from trace_fast import Detector, reference
from trace_fast import decoder as module
from trace_fast.backbones import load_backbone
from trace_fast.decoder import (
    AttentionReadout,
    BoundaryReadout,
    ConvDecoder,
    PixelDecoder,
    ReplicatePadConv,
    UNetDecoder,
    cut_windows,
    dct_basis,
    fold_kernel_columns,
    make_decoder,
    resample_values,
    spread_values,
    upgrade_student,
)
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
    """Return query and key of every block; logits are `peak` times standard normal."""
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
    """Return the readout of all blocks."""
    readout = AttentionReadout(values, grids)
    for index, (query, key) in enumerate(pairs):
        readout.on_attention(index, query, key)
    return readout.result()


def aggregated_map(grids, pairs):
    """Return the paper's map, (B, N, N) over the finest grid."""
    finest = max(grids, key=math.prod)
    maps = [
        reference.resize_attention(reference.attention_map(query, key), grid, finest)
        for grid, (query, key) in zip(grids, pairs, strict=True)
    ]
    return torch.stack(maps).mean(0)


def convolve(decoder, attention):
    """Return the paper's decoder as it is defined: a convolution over an image of N channels."""
    kernel = decoder.values.view(1, -1, 3, 3)
    return F.conv2d(attention.mT.unflatten(2, decoder.grid), kernel, decoder.bias, padding=1)


@pytest.fixture
def exact(monkeypatch):
    """Compute readouts with the reference, which takes float64."""
    monkeypatch.setattr(module, "ops", reference)


@pytest.mark.parametrize("peak", [3.0, 20.0])
def test_folded_columns_are_the_convolution_over_the_map(grids, peak, exact):
    decoder, pairs = conv_decoder(grids), features(grids, peak=peak)
    logits = decoder(read(decoder.values, grids, pairs), None)
    expected = convolve(decoder, aggregated_map(grids, pairs))
    assert logits.shape == (2, 1, *decoder.grid)
    assert_close(logits, expected, rtol=0, atol=1e-12)


def test_gradients_are_those_of_the_convolution_over_the_map(grids, exact):
    decoder, pairs = conv_decoder(grids), features(grids)
    inputs = [decoder.values, decoder.bias, *(x for pair in pairs for x in pair)]
    grad = torch.randn(2, 1, *decoder.grid, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad(decoder(read(decoder.values, grids, pairs), None), inputs, grad)
    expected = torch.autograd.grad(convolve(decoder, aggregated_map(grids, pairs)), inputs, grad)
    assert max(float(x.abs().max()) for x in expected) > 0.1
    for gradient, truth in zip(gradients, expected, strict=True):
        assert_close(gradient, truth, rtol=0, atol=1e-12)


def test_joint_attention_counts_as_its_image_part_with_rows_divided_by_their_sums(exact):
    grid, text = (3, 5), 4
    (image,), (text_pair,) = features([grid]), features([(1, text)])
    decoder = conv_decoder([grid])
    query, key = image[0], torch.cat([text_pair[1], image[1]], 2)
    joint = (query @ key.mT * CHANNELS**-0.5).softmax(-1)[..., text:]
    assert joint.sum(-1).mean() < 0.95  # some attention goes to the text
    attention = (joint / joint.sum(-1, keepdim=True)).mean(1)
    logits = decoder(read(decoder.values, [grid], [image]), None)
    expected = convolve(decoder, attention)
    assert_close(logits, expected, rtol=0, atol=1e-12)
    grad = torch.randn(logits.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    inputs = [*image, decoder.values]
    *of_joint, of_text = torch.autograd.grad(expected, [*inputs, text_pair[1]], grad)
    for gradient, truth in zip(torch.autograd.grad(logits, inputs, grad), of_joint, strict=True):
        assert_close(gradient, truth, rtol=0, atol=1e-12)
    assert of_text.abs().max() < 1e-12


def test_the_readout_of_any_values_is_the_map_times_the_values(grids, exact):
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

    results = differentiate(module.ops, torch.float32, device)
    expected = differentiate(reference, torch.float64, "cpu")
    eager = differentiate(reference, torch.float32, "cpu")
    assert results[0].dtype == torch.float32 and results[0].device == device
    # in the gradients of query and key, the terms of a row cancel: they are as large as the largest factor
    largest = float(values.abs().max() * grad.abs().max())
    for result, truth, plain in zip(results, expected, eager, strict=True):
        assert_no_worse(result, truth, plain, magnitude=largest)


def test_a_block_that_is_captured_twice_counts_once(exact):
    grids = GRIDS["UNet"]
    pairs = features(grids)
    values = torch.randn(96, 4, dtype=torch.float64)
    readout = AttentionReadout(values, grids)
    # the backward pass under gradient checkpointing does so
    for index in (0, 0, 1, 2, 1, 3, 4, 4, 4):
        readout.on_attention(index, *pairs[index])
    assert torch.equal(readout.result(), read(values, grids, pairs))


def test_a_block_that_was_not_captured_is_an_error(exact):
    grids = GRIDS["UNet"]
    readout = AttentionReadout(torch.randn(96, 4, dtype=torch.float64), grids)
    readout.on_attention(0, *features(grids)[0])
    with pytest.raises(KeyError):
        readout.result()


def test_spread_values_by_hand():
    # one row of two tokens, resized to four: they take 1, 3/4, 1/4, 0 of the first, in sum 2
    values = torch.tensor([[8.0], [16.0], [24.0], [40.0]])
    expected = torch.tensor([[8 + 12 + 6], [4 + 18 + 40]]) / 2
    assert_close(spread_values(values, (1, 2), (1, 4)), expected)
    assert_close(spread_values(values, (2, 1), (4, 1)), expected)
    assert spread_values(values, (1, 4), (1, 4)) is values


def test_constant_values_stay_constant():
    for size, target in (((2, 3), (8, 12)), ((3, 5), (7, 9)), ((1, 1), (2, 3))):
        spread = spread_values(torch.full((math.prod(target), 2), 3.5, dtype=torch.float64), size, target)
        assert_close(spread, torch.full_like(spread, 3.5), rtol=0, atol=1e-13)  # rows of the map sum to 1


def test_fold_kernel_columns_by_hand():
    first, second = torch.arange(1.0, 10), torch.arange(10.0, 100, 10)
    columns = torch.stack([first, second])[None]  # column 3 r + c: right of the center is 5, below it 7, above it 1
    assert_close(fold_kernel_columns(columns, (1, 2)), torch.tensor([[[[5.0 + 60, 50 + 4]]]]))
    assert_close(fold_kernel_columns(columns, (2, 1)), torch.tensor([[[[5.0 + 80], [50 + 2]]]]))
    corner = torch.zeros(1, 4, 9)
    corner[0, 3] = second  # the token below and on the right: itself, and the outputs whose kernel covers it
    assert_close(fold_kernel_columns(corner, (2, 2)), torch.tensor([[[[90.0, 80], [60, 50]]]]))


@pytest.mark.parametrize("grid", [(16, 16), (8, 12), (4, 6), (2, 9), (9, 2), (17, 1)], ids=str)
def test_the_cosine_basis_is_orthogonal_without_the_constant(grid):
    columns = dct_basis(grid, 16).double()
    assert columns.shape == (math.prod(grid), 16)
    products = columns.mT @ columns
    lengths = products.diagonal()
    assert lengths.min() > 0.2 * math.prod(grid)
    assert_close(products, torch.diag(lengths), rtol=0, atol=1e-4)
    assert_close(columns.sum(0), torch.zeros(16).double(), rtol=0, atol=1e-4)


def test_the_cosine_basis_goes_from_low_to_high_frequency():
    columns = dct_basis((32, 48), 16).unflatten(0, (32, 48))
    changes = [(column.diff(dim=d) < 0).diff(dim=d).sum(d).max() for column in columns.unbind(-1) for d in (0, 1)]
    extrema = torch.stack(changes).view(16, 2).sum(1)  # one fewer than half periods, per axis
    assert extrema.diff().min() >= -1 and extrema[-1] > extrema[0]
    assert not torch.equal(columns[..., 0], columns[..., 1])


class TestPixelDecoder:
    @pytest.fixture
    def decoder(self):
        torch.manual_seed(0)
        return PixelDecoder((3, 5), columns=6, channels=4)

    @pytest.mark.parametrize("detail", [1, 2, 3])
    def test_logits_have_the_size_of_the_image(self, detail):
        decoder = PixelDecoder((3, 5), columns=6, channels=4, detail=detail)
        assert decoder.photo_size((480, 640), (24, 40)) == (24 * detail, 40 * detail)
        readout, image = torch.randn(2, 15, 6), torch.rand(2, 3, 24 * detail, 40 * detail)
        assert decoder(readout, image).shape == (2, 1, 24 * detail, 40 * detail)

    def test_it_depends_on_both_the_map_and_the_image(self, decoder):
        readout, image = torch.randn(1, 15, 6), torch.rand(1, 3, 48, 80)
        logits = decoder(readout, image)
        assert (logits - decoder(readout + 1, image)).abs().max() > 1e-5
        change = (decoder(readout, image.index_fill(3, torch.tensor([0]), 0.5)) - logits).abs()
        assert change[..., :5].max() > 1e-5 and change[..., 40:].max() < 1e-7  # near the changed column alone

    def test_a_constant_image_has_no_edge_at_its_border(self, decoder):
        readout, image = torch.randn(1, 1, 6).expand(1, 15, 6), torch.full((1, 3, 48, 80), 0.7)
        logits = decoder(readout, image)
        assert_close(logits, logits[..., 24:25, 40:41].expand_as(logits))


def check_windows(decoder, readout):
    """Require that a window of the whole changes nothing, and one of a part takes another part of attention."""
    photo = torch.rand(1, 3, 48, 80)
    whole, part = torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.tensor([[0.5, 0.0, 1.0, 0.5]])
    logits = decoder(readout, photo)
    assert_close(decoder(readout, photo, whole), logits, rtol=1e-4, atol=1e-4)
    assert (decoder(readout, photo, part) - logits).abs().max() > 1e-3


class TestUNetDecoder:
    @pytest.fixture
    def decoder(self):
        torch.manual_seed(0)
        decoder = UNetDecoder((3, 5), columns=6, channels=4)
        torch.nn.init.normal_(decoder.tokens[2].weight, std=0.1)  # zero in a new decoder
        return decoder

    @pytest.mark.parametrize(
        ("photo", "size", "expected"),
        [
            ((480, 640), (128, 128), (192, 256)),
            ((640, 427), (128, 128), (256, 176)),
            ((30, 3000), (128, 96), (16, 256)),
            ((8, 8), (64, 96), (192, 192)),
        ],
    )
    def test_it_sees_the_photo_at_its_own_shape(self, decoder, photo, size, expected):
        assert decoder.photo_size(photo, size) == expected

    def test_it_sees_the_photo_at_a_multiple_of_its_size(self):
        assert UNetDecoder((3, 5), columns=6, channels=4, detail=2.5).photo_size((480, 640), (128, 128)) == (240, 320)

    @pytest.mark.parametrize("size", [(16, 16), (48, 80), (34, 50), (176, 32)])
    def test_logits_have_the_size_of_the_photo(self, decoder, size):
        assert decoder(torch.randn(2, 15, 6), torch.rand(2, 3, *size)).shape == (2, 1, *size)

    def test_it_depends_on_both_the_map_and_the_photo(self, decoder):
        readout, photo = torch.randn(1, 15, 6), torch.rand(1, 3, 48, 80)
        logits = decoder(readout, photo)
        assert (logits - decoder(readout + 1, photo)).abs().max() > 1e-5
        assert (logits - decoder(readout, photo.flip(2))).abs().max() > 1e-3

    def test_a_new_one_does_not_depend_on_attention(self):
        decoder, photo = UNetDecoder((3, 5), columns=6, channels=4), torch.rand(1, 3, 48, 80)
        assert_close(decoder(torch.randn(1, 15, 6), photo), decoder(None, photo))

    def test_attention_is_that_of_the_window(self, decoder):
        check_windows(decoder, torch.randn(1, 15, 6))

    def test_few_pixels_are_edges_at_first(self, decoder):
        probability = decoder(None, torch.rand(2, 3, 64, 96)).sigmoid()
        assert 0.01 < probability.mean() < 0.3


class TestUNetWithAbdiv:
    """The unet at whose output the edge probability of the map joins."""

    @pytest.fixture
    def decoder(self):
        torch.manual_seed(0)
        return UNetDecoder((3, 5), channels=4, abdiv=0.35)

    def test_it_is_the_weighted_geometric_mean(self, decoder):
        photo, boundary = torch.rand(1, 3, 48, 80), torch.rand(1, 15, 1)
        edges = decoder(boundary, photo).sigmoid()
        alone = decoder(None, photo).sigmoid()
        enlarged = F.interpolate(boundary.view(1, 1, 3, 5), (48, 80), mode="bilinear")
        assert_close(edges, alone**0.65 * enlarged**0.35, rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize("value", [0.0, 1.0])
    @pytest.mark.parametrize("bias", [-200.0, 200.0])
    def test_certain_attention_and_certain_photos_give_finite_logits(self, decoder, value, bias):
        torch.nn.init.constant_(decoder.head.bias, bias)
        assert decoder(torch.full((1, 15, 1), value), torch.rand(1, 3, 16, 32)).isfinite().all()

    def test_attention_is_that_of_the_window(self, decoder):
        check_windows(decoder, torch.rand(1, 15, 1))

    def test_it_reads_no_features(self, decoder):
        assert decoder.options() == {"name": "unet", "columns": 0, "channels": 4, "detail": 2, "abdiv": 0.35}
        assert decoder.values.shape == (15, 0) and not hasattr(decoder, "tokens")
        assert resample_values(decoder.values, (3, 5), (6, 10)).shape == (60, 0)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"abdiv": 1.5}, "abdiv must be from 0 to 1, got 1.5"),
            ({"abdiv": 0.5, "columns": 4}, "columns must be 0 where abdiv is given, got 4"),
            ({"columns": 0}, "columns must be at least 1, got 0"),
            ({"detail": 0.5}, "detail must be at least 1, got 0.5"),
        ],
    )
    def test_refused_options(self, options, message):
        with pytest.raises(ValueError, match=f"decoder unet: {message}"):
            UNetDecoder((3, 5), **options)


class TestBoundaryReadout:
    GRIDS = ((2, 3), (4, 6), (2, 3))

    def test_it_is_the_edge_probability_of_the_mean_map(self):
        blocks = [random_features(2, 3, h * w, 8, seed) for seed, (h, w) in enumerate(self.GRIDS)]
        readout = BoundaryReadout(self.GRIDS, 0.5)
        for index, (query, key) in enumerate(blocks):
            readout.on_attention(index, query.requires_grad_(), key)
        maps = [reference.attention_map(query.double(), key.double()) for query, key in blocks]
        mean = sum(reference.resize_attention(x, grid, (4, 6)) for x, grid in zip(maps, self.GRIDS, strict=True)) / 3
        expected = 1 - torch.exp(-reference.abdiv(mean, 4, 6) / 0.5)
        result = readout.result()
        assert result.shape == (2, 24, 1) and not result.requires_grad
        assert_close(result[..., 0].double(), expected.detach().flatten(1), rtol=1e-3, atol=1e-5)

    def test_nothing_was_captured(self):
        with pytest.raises(KeyError):
            BoundaryReadout([(2, 3)], 0.5).result()


class TestCutWindows:
    def test_the_whole_is_interpolated(self):
        features, like = torch.randn(2, 3, 4, 6), torch.empty(2, 1, 11, 15)
        whole = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(2, 4)
        assert_close(cut_windows(features, like, whole), cut_windows(features, like, None), rtol=1e-4, atol=1e-5)

    def test_a_part_is_a_part_of_the_whole(self):
        features = torch.randn(1, 2, 4, 6)
        whole = cut_windows(features, torch.empty(1, 1, 32, 48), None)
        windows = torch.tensor([[0.25, 0.5, 0.75, 1.0]])
        part = cut_windows(features, torch.empty(1, 1, 16, 24), windows)
        assert_close(part, whole[..., 8:24, 24:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kernel", [3, 5])
def test_a_convolution_repeats_border_pixels(kernel):
    convolution = ReplicatePadConv(3, 4, kernel).double()
    image = torch.rand(2, 3, 6, 9, generator=torch.Generator().manual_seed(0)).double()
    padded = torch.from_numpy(np.pad(image.numpy(), [(0, 0), (0, 0), *[(kernel // 2,) * 2] * 2], mode="edge"))
    assert_close(convolution(image), F.conv2d(padded, convolution.weight, convolution.bias))


def test_resampled_values_by_hand():
    values = torch.tensor([[0.0, 4.0], [8.0, 12.0]])
    assert_close(resample_values(values, (1, 2), (1, 4))[:, 0], torch.tensor([0.0, 2, 6, 8]))
    assert_close(resample_values(values, (2, 1), (4, 1))[:, 1], torch.tensor([4.0, 6, 10, 12]))
    assert resample_values(values, (1, 2), (1, 2)) is values


class TestMakeDecoder:
    def test_its_options_make_it_again(self):
        for decoder in (
            ConvDecoder((4, 6)),
            PixelDecoder((4, 6), columns=8, channels=4, detail=1),
            UNetDecoder((4, 6), columns=8, channels=4, detail=1),
            UNetDecoder((4, 6), channels=4, abdiv=0.25),
        ):
            again = make_decoder(grid=(4, 6), **decoder.options())
            again.load_state_dict(decoder.state_dict())
            assert type(again) is type(decoder)
            assert again.options() == decoder.options()

    def test_the_papers_decoder_has_nine_parameters_per_token_and_one(self):
        assert sum(x.numel() for x in make_decoder("conv", (64, 64)).parameters()) == 36_865

    def test_an_unknown_name(self):
        with pytest.raises(ValueError, match="student: decoder must be 'conv' or 'pixels' or 'unet', got 'cnn'"):
            make_decoder("cnn", (4, 6))

    def test_an_unknown_option(self):
        with pytest.raises(ValueError, match=r"decoder conv does not have these options: .*'columns'"):
            make_decoder("conv", (4, 6), columns=4)

    @pytest.mark.parametrize(("grid", "columns", "most"), [((4, 6), 24, 23), ((16, 16), 65, 64)])
    def test_too_many_columns(self, grid, columns, most):
        make_decoder("pixels", grid, columns=most)
        with pytest.raises(ValueError, match=f"decoder pixels: columns must be from 1 to {most}, got {columns}"):
            make_decoder("pixels", grid, columns=columns)


class TestUpgrade:
    """Folders of earlier formats."""

    @pytest.fixture
    def student(self, tmp_path):
        """Return a student with the paper's decoder, and write it in format 1."""
        backbone = load_backbone("mini", device=torch.device("cpu"), size=(48, 64))
        decoder = make_decoder("conv", backbone.finest_grid())
        config = {"format": 3, "base": {"model": "mini"}, "size": [48, 64], "timestep": 20, "decoder": {"name": "conv"}}
        detector = Detector(backbone, decoder, timestep=20, config=config)
        detector.save_pretrained(tmp_path)
        del config["format"], config["timestep"]
        (tmp_path / "config.json").write_text(json.dumps(config | {"level": 20}))
        return detector

    def test_the_first_format_gives_the_same_edges(self, student, tmp_path):
        image = torch.rand(1, 3, 40, 56, generator=torch.Generator().manual_seed(0))
        detector = Detector.from_pretrained(tmp_path, device="cpu")
        assert detector.timestep == 20
        assert_close(detector.edges(image), student.edges(image), rtol=0, atol=1e-6)
        detector.save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        assert config["format"] == 3 and config["timestep"] == 20 and "level" not in config

    @pytest.mark.parametrize("version", [1, 2])
    def test_the_decoder_with_another_activation(self, version):
        with pytest.raises(ValueError, match=f"its format must be 3, got {version}, in which"):
            upgrade_student({"format": version, "decoder": {"name": "pixels"}}, {})

    @pytest.mark.parametrize("version", [0, 4, "2", 1.5, None])
    def test_an_unknown_format(self, version):
        with pytest.raises(ValueError, match=f"its format must be 1 to 3, got {version!r}; install a newer trace_fast"):
            upgrade_student({"format": version}, {})
