"""Input conversion: images and edge maps of every accepted kind give the same tensor, all others one clear error."""

import io
import re
import sys
import tempfile
import warnings
from pathlib import Path
from subprocess import run

import numpy as np
import pytest
import torch
from neighbors import require
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode

from trace_fast import instances, propagate, seeds
from trace_fast.io.images import (
    MAX_PIXELS,
    convert_edges,
    error_context,
    fit_resolution,
    read_edge_map,
    read_image,
    resize,
)
from trace_fast.io.visualize import overlay, panel, write_png

HEIGHT, WIDTH = 20, 31


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


def channels_first(pixels):
    return torch.from_numpy(pixels.astype(np.float32) / 255).permute(2, 0, 1)[None]


def assert_is(image, expected, atol=2.0**-23):
    """By default up to one rounding of a number near 1, far below the step of 16 bits."""
    assert image.dtype == torch.float32
    assert image.is_contiguous()
    torch.testing.assert_close(image, expected, rtol=0, atol=atol)


class TestArrays:
    def test_uint8(self, pixels):
        assert_is(read_image(pixels), channels_first(pixels))

    def test_uint16(self, pixels):
        assert_is(read_image(pixels.astype(np.uint16) * 257), channels_first(pixels))

    @pytest.mark.parametrize(("dtype", "atol"), [("float16", 5e-4), ("float32", 2.0**-23), ("float64", 2.0**-23)])
    def test_float(self, pixels, dtype, atol):
        assert_is(read_image((pixels / 255).astype(dtype)), channels_first(pixels), atol)

    def test_gray_is_repeated(self, pixels):
        gray = pixels[..., :1]
        expected = channels_first(gray).repeat(1, 3, 1, 1)
        assert_is(read_image(gray), expected)
        assert_is(read_image(gray[..., 0]), expected)

    def test_alpha_is_flattened_on_white(self):
        rgba = np.zeros((HEIGHT, WIDTH, 4), np.float32)
        rgba[..., 0], rgba[..., 3] = 1, 0.25
        expected = torch.tensor([1, 0.75, 0.75]).reshape(1, 3, 1, 1).expand(1, 3, HEIGHT, WIDTH)
        assert_is(read_image(rgba), expected)

    @pytest.mark.parametrize(
        "view",
        [
            lambda x: x[::-1, ::-1],
            lambda x: np.repeat(x, 2, axis=1)[:, ::2],
            np.asfortranarray,
            lambda x: x.astype(">u2") * 257,
            lambda x: (x / 255).astype(">f4"),
        ],
        ids=["flipped", "strided", "fortran", "big-endian uint16", "big-endian float32"],
    )
    def test_memory_layouts(self, pixels, view):
        image = view(pixels)
        expected = pixels[::-1, ::-1] if image.strides[0] < 0 else pixels
        assert_is(read_image(image), channels_first(expected.copy()))

    def test_read_only_array_is_read_without_a_warning(self, pixels):
        pixels.flags.writeable = False
        assert_is(read_image(pixels), channels_first(pixels))

    def test_memory_is_never_shared(self, pixels):
        for image in (np.float32(pixels / 255), channels_first(pixels)):
            read_image(image).fill_(0)
            assert image.max() > 0

    def test_rounding_is_clamped(self):
        image = np.full((HEIGHT, WIDTH), 1 + 2e-7, np.float32)
        image[0] = -2e-7
        values = read_image(image)
        assert (values.min(), values.max()) == (0, 1)

    @pytest.mark.parametrize(
        "dtype", ["bool", "int8", "int16", "int32", "int64", "uint32", "complex64", "object", "str"]
    )
    def test_other_dtypes(self, dtype):
        with pytest.raises(TypeError, match=r"^edges: image must be an array of uint8, .* float64, got \S+"):
            read_image(np.zeros((HEIGHT, WIDTH, 3), dtype))

    @pytest.mark.parametrize(
        "shape", [(), (0,), (HEIGHT,), (HEIGHT, WIDTH, 2), (HEIGHT, WIDTH, 5), (1, HEIGHT, WIDTH, 3), (1,) * 5]
    )
    def test_other_shapes(self, shape):
        with pytest.raises(
            ValueError, match=r"^edges: image must be an array \(H, W\) or .* got shape " + re.escape(f"{shape}")
        ):
            read_image(np.zeros(shape, np.uint8))

    def test_channels_first_array(self):
        with pytest.raises(ValueError, match=r"got shape \(3, 20, 31\); an array is channels last"):
            read_image(np.zeros((3, HEIGHT, WIDTH), np.uint8))

    @pytest.mark.parametrize("shape", [(0, 0, 3), (0, WIDTH), (15, WIDTH), (HEIGHT, 15, 3), (1, 1)])
    def test_small_images(self, shape):
        with pytest.raises(ValueError, match=f"must be at least 16 pixels high and wide, got {shape[0]} x {shape[1]}$"):
            read_image(np.zeros(shape, np.uint8))

    def test_smallest_image(self):
        assert read_image(np.zeros((16, 17), np.uint8)).shape == (1, 3, 16, 17)

    def test_absurdly_large_image(self):
        image = np.broadcast_to(np.uint8(0), (MAX_PIXELS // 1000 + 1, 1000))  # one byte of memory
        with pytest.raises(ValueError, match="must have at most 178956970 pixels, got 178957 x 1000"):
            read_image(image)

    @pytest.mark.parametrize(
        ("value", "limits"),
        [
            (np.nan, "from nan to nan"),
            (np.inf, "from 0 to inf"),
            (-np.inf, "from -inf to 0"),
            (1.01, "to 1.01"),
            (-0.5, "from -0.5"),
        ],
    )
    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    def test_values(self, value, limits, dtype):
        image = np.zeros((HEIGHT, WIDTH, 3), dtype)
        image[3, 7, 1] = value
        with pytest.raises(ValueError, match=r"must be finite and in \[0, 1\] as a float, got values .*" + limits):
            read_image(image)

    def test_values_beyond_float32(self):
        with pytest.raises(ValueError, match="got values from 0 to inf"):
            read_image(np.eye(HEIGHT, WIDTH) * 1e300)


class TestTensors:
    @pytest.mark.parametrize("batch", [None, 1, 3])
    def test_uint8(self, pixels, batch):
        image = torch.from_numpy(pixels).permute(2, 0, 1)
        if batch:
            image = torch.stack([image] * batch)
        assert_is(read_image(image), channels_first(pixels).repeat(batch or 1, 1, 1, 1))

    def test_uint16(self, pixels):
        image = torch.from_numpy(pixels.astype(np.uint16) * 257).permute(2, 0, 1)
        assert_is(read_image(image), channels_first(pixels))

    @pytest.mark.parametrize(
        ("dtype", "atol"),
        [(torch.float16, 5e-4), (torch.bfloat16, 4e-3), (torch.float32, 2.0**-23), (torch.float64, 2.0**-23)],
    )
    def test_float(self, pixels, dtype, atol):
        assert_is(read_image(channels_first(pixels).to(dtype)), channels_first(pixels), atol)

    def test_two_dimensions_are_a_gray_image(self, pixels):
        gray = torch.from_numpy(pixels[..., 0])
        expected = channels_first(pixels[..., :1]).repeat(1, 3, 1, 1)
        assert_is(read_image(gray), expected)
        assert_is(read_image(gray[None]), expected)

    def test_alpha_is_flattened_on_white(self):
        rgba = torch.zeros(2, 4, HEIGHT, WIDTH, dtype=torch.uint8)
        rgba[1, 3] = 51
        transparent, translucent = read_image(rgba)
        assert_is(transparent, torch.ones(3, HEIGHT, WIDTH))
        assert_is(translucent, torch.full((3, HEIGHT, WIDTH), 0.8))

    def test_view(self, pixels):
        image = torch.from_numpy(np.repeat(pixels, 2, axis=0)).permute(2, 0, 1)[:, ::2]
        assert_is(read_image(image), channels_first(pixels))

    @pytest.mark.gpu
    def test_stays_on_its_device(self, pixels):
        image = read_image(torch.from_numpy(pixels).permute(2, 0, 1).cuda())
        assert image.device.type == "cuda"
        assert_is(image.cpu(), channels_first(pixels))

    @pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.int64, torch.uint32, torch.complex64])
    def test_other_dtypes(self, dtype):
        with pytest.raises(TypeError, match=rf"^edges: image must be a tensor of uint8, .* got {dtype}"):
            read_image(torch.zeros(3, HEIGHT, WIDTH, dtype=dtype))

    @pytest.mark.parametrize("shape", [(), (7,), (2, HEIGHT, WIDTH), (2, 5, HEIGHT, WIDTH), (1, 1, 3, HEIGHT, WIDTH)])
    def test_other_shapes(self, shape):
        with pytest.raises(
            ValueError, match=r"^edges: image must be a tensor .* got shape " + re.escape(f"{shape}") + "$"
        ):
            read_image(torch.zeros(shape))

    @pytest.mark.parametrize("shape", [(HEIGHT, WIDTH, 3), (2, HEIGHT, WIDTH, 4)])
    def test_channels_last_tensor(self, shape):
        with pytest.raises(ValueError, match=r"a tensor is channels first$"):
            read_image(torch.zeros(shape))

    def test_empty_batch(self):
        with pytest.raises(ValueError, match=r"must hold at least one image, got shape \(0, 3, 20, 31\)"):
            read_image(torch.zeros(0, 3, HEIGHT, WIDTH))

    @pytest.mark.parametrize("shape", [(3, 0, 0), (1, 3, 15, WIDTH), (HEIGHT, 2)])
    def test_small_images(self, shape):
        with pytest.raises(ValueError, match=f"at least 16 pixels high and wide, got {shape[-2]} x {shape[-1]}$"):
            read_image(torch.zeros(shape))

    def test_absurdly_large_image(self):
        with pytest.raises(ValueError, match="must have at most 178956970 pixels, got 20000 x 10000"):
            read_image(torch.zeros(1, 1, 1).expand(3, 20_000, 10_000))

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.1, 255.0])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
    def test_values(self, value, dtype):
        image = torch.zeros(2, 3, HEIGHT, WIDTH, dtype=dtype)
        image[1, 2, 19, 30] = value
        with pytest.raises(ValueError, match=r"must be finite and in \[0, 1\] as a float, got values"):
            read_image(image)


class TestPictures:
    @pytest.mark.parametrize("mode", ["L", "RGB", "CMYK", "YCbCr", "HSV", "1", "P", "RGBX"])
    def test_opaque_modes_are_converted_by_pillow(self, pixels, mode):
        picture = Image.fromarray(pixels).convert(mode)
        assert_is(read_image(picture), channels_first(np.array(picture.convert("RGB"))))

    @pytest.mark.parametrize("mode", ["RGBA", "LA", "RGBa", "La", "PA"])
    def test_alpha_modes_are_flattened_on_white(self, mode):
        picture = Image.new("LA", (WIDTH, HEIGHT), (0, 255))
        picture.paste((0, 0), (0, 0, 10, HEIGHT))
        picture = picture.convert("RGBA").convert(mode) if mode in ("RGBa", "PA") else picture.convert(mode)
        expected = torch.zeros(1, 3, HEIGHT, WIDTH)
        expected[..., :10] = 1
        assert_is(read_image(picture), expected)

    @pytest.mark.parametrize("mode", ["P", "L", "RGB"])
    def test_transparent_color_is_white(self, mode, tmp_path):
        picture = Image.new(mode, (WIDTH, HEIGHT))
        if mode == "P":
            picture.putpalette([0, 0, 0, 10, 20, 30])
        picture.paste(1 if mode != "RGB" else (10, 20, 30), (0, 0, 10, HEIGHT))
        picture.save(tmp_path / "x.png", transparency=0 if mode != "RGB" else (0, 0, 0))
        image = read_image(tmp_path / "x.png")
        assert (image[..., 10:] > 0.999).all()
        assert (image[..., :10] < 0.5).all()

    @pytest.mark.parametrize("mode", ["I;16", "I;16B", "I"])
    def test_deep_gray_is_divided_by_65535(self, mode):
        gray = np.linspace(0, 65535, HEIGHT * WIDTH).astype(np.uint16).reshape(HEIGHT, WIDTH)
        little = Image.fromarray(gray)
        big = Image.frombytes("I;16B", (WIDTH, HEIGHT), gray.astype(">u2").tobytes())
        picture = {"I;16": little, "I;16B": big, "I": little.convert("I")}[mode]
        assert picture.mode == mode
        expected = torch.from_numpy(gray.astype(np.float32) / 65535).repeat(1, 3, 1, 1)
        assert_is(read_image(picture), expected)

    def test_mode_i_beyond_16_bits(self):
        with pytest.raises(ValueError, match=r"must be in \[0, 65535\] in mode I, got values from 70000 to 70000"):
            read_image(Image.new("I", (WIDTH, HEIGHT), 70_000))

    def test_mode_f_is_a_float_image(self):
        assert_is(read_image(Image.new("F", (WIDTH, HEIGHT), 0.25)), torch.full((1, 3, HEIGHT, WIDTH), 0.25))
        with pytest.raises(ValueError, match=r"must be finite and in \[0, 1\] as a float, got values from 255 to 255"):
            read_image(Image.new("F", (WIDTH, HEIGHT), 255))

    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_exif_orientation(self, pixels, orientation):
        # how the EXIF standard stores each orientation: row 0 and column 0 of the file are ...
        stored = {
            1: pixels,  # top, left
            2: pixels[:, ::-1],  # top, right
            3: pixels[::-1, ::-1],  # bottom, right
            4: pixels[::-1],  # bottom, left
            5: pixels.transpose(1, 0, 2),  # left, top
            6: pixels.transpose(1, 0, 2)[::-1],  # right, top
            7: pixels.transpose(1, 0, 2)[::-1, ::-1],  # right, bottom
            8: pixels.transpose(1, 0, 2)[:, ::-1],  # left, bottom
        }[orientation]
        exif = Image.Exif()
        exif[0x0112] = orientation
        file = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(stored)).save(file, "PNG", exif=exif)
        assert_is(read_image(Image.open(file)), channels_first(pixels))

    @pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\x08\0\0\0\x05\0"])
    def test_damaged_exif_is_ignored(self, pixels, exif):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", exif=exif)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of the damage
            assert read_image(Image.open(file)).shape == (1, 3, HEIGHT, WIDTH)

    def test_the_picture_is_not_changed(self, pixels):
        picture = Image.fromarray(pixels)
        read_image(picture).zero_()
        np.testing.assert_array_equal(np.array(picture), pixels)

    def test_small_picture(self):
        with pytest.raises(ValueError, match="at least 16 pixels high and wide, got 20 x 15 in a PIL image"):
            read_image(Image.new("L", (15, 20)))

    def test_closed_picture(self, pixels):
        picture = Image.fromarray(pixels)
        picture.close()
        with pytest.raises(ValueError, match="must be readable to its end, got a PIL image: "):
            read_image(picture)


class TestFiles:
    @pytest.mark.parametrize("ending", ["png", "bmp", "tif", "webp", "ppm"])
    @pytest.mark.parametrize("path_type", [str, Path])
    def test_lossless_files(self, pixels, tmp_path, ending, path_type):
        path = tmp_path / f"name with spaces, ünïcode.{ending}"
        Image.fromarray(pixels).save(path, lossless=True)
        assert_is(read_image(path_type(path)), channels_first(pixels))

    def test_cmyk_jpeg(self, tmp_path):
        Image.new("CMYK", (WIDTH, HEIGHT), (0, 255, 255, 0)).save(tmp_path / "x.jpg")
        image = read_image(tmp_path / "x.jpg")
        assert (image[:, 0] > 0.95).all()
        assert (image[:, 1:] < 0.05).all()

    def test_first_frame_of_an_animation(self, tmp_path):
        frames = [Image.new("RGB", (WIDTH, HEIGHT), color) for color in ("red", "blue")]
        frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
        assert read_image(tmp_path / "x.gif")[0, :, 3, 4].tolist() == pytest.approx([1, 0, 0])

    def test_missing_file(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"^edges: image must be an existing file, got '.*no\.png'$"):
            read_image(tmp_path / "no.png")

    def test_folder(self, tmp_path):
        with pytest.raises(ValueError, match=r"^edges: image must be a file, got the folder '"):
            read_image(tmp_path)

    @pytest.mark.parametrize("content", [b"", b"plain text", b"\0" * 1000])
    def test_other_file(self, tmp_path, content):
        (tmp_path / "x.jpg").write_bytes(content)
        with pytest.raises(ValueError, match=r"must be an image file, got '.*x\.jpg', which Pillow cannot read"):
            read_image(tmp_path / "x.jpg")

    @pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tif", "bmp"])
    def test_truncated_files_are_named(self, pixels, tmp_path, ending):
        path = tmp_path / f"cut.{ending}"
        Image.fromarray(pixels).save(path)
        whole = path.read_bytes()
        for size in range(4, len(whole) // 2, len(whole) // 40):
            path.write_bytes(whole[:size])
            with pytest.raises(ValueError, match=rf"^edges: image must be .*cut\.{ending}'"):
                read_image(path)

    def test_damaged_files_are_read_or_named(self, pixels, tmp_path):
        path, generator = tmp_path / "bad.png", np.random.default_rng(1)
        Image.fromarray(pixels).save(path)
        whole = np.frombuffer(path.read_bytes(), np.uint8)
        for _ in range(100):
            damaged = whole.copy()
            damaged[generator.integers(8, len(whole), 5)] = generator.integers(0, 256, 5)
            path.write_bytes(damaged.tobytes())
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow warns of sizes
                try:
                    assert read_image(path).isfinite().all()
                except ValueError as error:
                    assert re.match(r"edges: image must .*bad\.png'", str(error))  # noqa: PT017

    def test_decompression_bomb(self, tmp_path, monkeypatch):
        Image.new("L", (400, 300)).save(tmp_path / "bomb.png")
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
        with pytest.raises(ValueError, match=r"^edges: image must have at most .* pixels, got more in '.*bomb\.png'"):
            read_image(tmp_path / "bomb.png")

    def test_limit_is_pillows(self):
        assert MAX_PIXELS == 2 * Image.MAX_IMAGE_PIXELS

    def test_small_file(self, tmp_path):
        Image.new("L", (40, 9)).save(tmp_path / "x.png")
        with pytest.raises(ValueError, match=r"at least 16 pixels high and wide, got 9 x 40 in '.*x\.png'"):
            read_image(tmp_path / "x.png")


@pytest.mark.parametrize("kind", ["meta", "fake"])
def test_tensors_without_values(kind):
    image = torch.zeros(3, HEIGHT, WIDTH)
    image = image.to("meta") if kind == "meta" else FakeTensorMode().from_tensor(image)
    with pytest.raises(
        ValueError, match=r"^edges: image must have values, got a tensor of the meta device or of a fake"
    ):
        read_image(image)
    with pytest.raises(ValueError, match=r"^overlay: edges must have values, got a tensor of the meta device or of a"):
        read_edge_map("overlay", image[0])


@pytest.mark.parametrize("image", [None, 3, b"x.png", {}, object(), [np.zeros((20, 20))]])
def test_other_kinds(image):
    with pytest.raises(TypeError, match=rf"must be a path, a PIL image, .* got {type(image).__name__}$"):
        read_image(image)


@pytest.mark.parametrize("image", [[], ()])
def test_empty_list(image):
    with pytest.raises(ValueError, match=rf"must hold at least one image, got an empty {type(image).__name__}$"):
        read_image(image)


class TestConvertEdges:
    @pytest.fixture
    def edges(self):
        return torch.rand(1, 1, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0))

    @pytest.fixture
    def batch(self):
        return torch.rand(3, 1, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0))

    @pytest.mark.parametrize("image", ["x.png", Image.new("L", (WIDTH, HEIGHT)), np.zeros((HEIGHT, WIDTH, 3))])
    def test_everything_but_a_tensor_gives_an_array(self, edges, image):
        array = convert_edges(edges, image)
        assert (type(array), array.dtype, array.shape) == (np.ndarray, np.float32, (HEIGHT, WIDTH))
        np.testing.assert_array_equal(array, edges[0, 0])

    @pytest.mark.parametrize("shape", [(HEIGHT, WIDTH), (3, HEIGHT, WIDTH), (1, 3, HEIGHT, WIDTH)])
    def test_a_tensor_gives_a_tensor(self, edges, shape):
        assert_is(convert_edges(edges, torch.zeros(shape)), edges)

    def test_a_batch_gives_a_batch(self, batch):
        image = torch.zeros(3, 3, HEIGHT, WIDTH)
        assert_is(convert_edges(batch, image), batch)
        np.testing.assert_array_equal(convert_edges(batch, image, "np"), batch[:, 0])
        pictures = convert_edges(batch, image, "pil")
        assert [picture.size for picture in pictures] == [(WIDTH, HEIGHT)] * 3
        # rounded to the nearest level
        np.testing.assert_allclose(np.array(pictures[2], dtype=float), batch[2, 0].double() * 255, rtol=0, atol=0.501)

    def test_a_batch_of_one_is_a_batch(self, edges):
        image = torch.zeros(1, 3, HEIGHT, WIDTH)
        assert convert_edges(edges, image, "np").shape == (1, HEIGHT, WIDTH)
        assert len(convert_edges(edges, image, "pil")) == 1
        assert convert_edges(edges, image[0], "np").shape == (HEIGHT, WIDTH)

    def test_overrides(self, edges):
        assert_is(convert_edges(edges, "x.png", "pt"), edges)
        picture = convert_edges(edges, torch.zeros(3, HEIGHT, WIDTH), "pil")
        assert (picture.mode, picture.size) == ("L", (WIDTH, HEIGHT))

    @pytest.mark.parametrize("output_type", ["np", "pil"])
    def test_what_is_no_number_does_not_leave(self, output_type):
        edges = torch.rand(2, 1, HEIGHT, WIDTH)
        edges[1, 0, 2, 3] = float("nan")
        with pytest.raises(RuntimeError, match=r"^edges: edges must be finite, got NaN; load the model with dtype="):
            convert_edges(edges, edges, output_type)

    def test_half_precision_and_gradients(self, edges):
        assert convert_edges(edges.half().requires_grad_(), "x.png").dtype == np.float32

    @pytest.mark.gpu
    def test_returns_to_the_device_of_the_image(self, edges):
        assert convert_edges(edges, torch.zeros(3, HEIGHT, WIDTH, device="cuda")).device.type == "cuda"
        assert convert_edges(edges.cuda(), torch.zeros(3, HEIGHT, WIDTH)).device.type == "cpu"
        assert isinstance(convert_edges(edges.cuda(), "x.png"), np.ndarray)

    def test_unknown_output_type(self, edges):
        with pytest.raises(
            ValueError, match=r"^edges: output_type must be 'np' or 'pt' or 'pil' or None, got 'numpy'$"
        ):
            convert_edges(edges, "x.png", "numpy")
        with pytest.raises(ValueError, match=r"^edges: output_type must be 'np' or .*, got array"):
            convert_edges(edges, "x.png", np.zeros(3))


def propagate_all(edges):
    return propagate(np.ones((1, HEIGHT, WIDTH), bool), edges, threshold=0.5, min_area=1)


READERS = {
    "read_edge_map": lambda edges: read_edge_map("read_edge_map", edges),
    "write_png": lambda edges: written_bytes(edges),
    "overlay": lambda edges: overlay(np.zeros((HEIGHT, WIDTH)), edges).tobytes(),
    "propagate": propagate_all,
    "instances": lambda edges: instances(edges, threshold=0.5)[0],
    "seeds": lambda edges: seeds(edges, 3, threshold=0.5).points,
}
# these take edges as they take any image
IMAGE_READERS = {
    "read_image": read_image,
    "panel": lambda edges: panel([edges], [""]).tobytes(),
}


def written_bytes(edges):
    with tempfile.TemporaryDirectory() as folder:
        write_png(f"{folder}/x.png", edges)
        return Path(folder, "x.png").read_bytes()


def with_value(value, dtype=np.float32):
    """Edges that divide an image, and one pixel of a given value."""
    edges = np.zeros((HEIGHT, WIDTH), dtype)
    edges[:, 12] = 1
    edges[3, 12] = value
    return edges


class TestEdgeMaps:
    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    @pytest.mark.parametrize("read", [*READERS.values(), *IMAGE_READERS.values()], ids=[*READERS, *IMAGE_READERS])
    def test_rounding_is_clamped_everywhere(self, read, dtype):
        expected = read(with_value(1, dtype))
        for value in (1 + 5e-5, 1 + 1e-7):
            result = read(with_value(value, dtype))
            assert result == expected if isinstance(result, bytes) else np.array_equal(result, expected)
        expected = read(with_value(0, dtype))
        result = read(with_value(-5e-5, dtype))
        assert result == expected if isinstance(result, bytes) else np.array_equal(result, expected)

    @pytest.mark.parametrize(
        ("value", "limits"),
        [
            (1.01, "0 to 1.01"),
            (1 + 2e-4, "0 to 1.0002"),
            (-0.5, "-0.5 to 1"),
            (np.nan, "nan to nan"),
            (np.inf, "0 to inf"),
        ],
    )
    @pytest.mark.parametrize("name", [*READERS, *IMAGE_READERS])
    def test_values_outside_are_refused_everywhere(self, name, value, limits):
        requirement = "edges: image" if name in IMAGE_READERS else f"{name}: edges"
        with pytest.raises(
            ValueError, match=rf"^{requirement} must be finite and in \[0, 1\].*, got values from {limits}"
        ):
            (READERS | IMAGE_READERS)[name](with_value(value))

    @pytest.mark.parametrize("dtype", ["bool", "uint8", "int64", "complex64", "object"])
    @pytest.mark.parametrize("name", READERS)
    def test_dtypes_are_refused_everywhere(self, name, dtype):
        message = f"^{name}: edges must be float16, bfloat16, float32 or float64, got {dtype}; trace_fast.ev"
        with pytest.raises(TypeError, match=message):
            READERS[name](with_value(1).astype(dtype))
        if dtype != "object":
            with pytest.raises(TypeError, match=message):
                READERS[name](torch.from_numpy(with_value(1).astype(dtype)))

    @pytest.mark.parametrize("other", [[[0.5]], "edges.png", None, Image.new("F", (WIDTH, HEIGHT))])
    @pytest.mark.parametrize("name", READERS)
    def test_types_are_refused_everywhere(self, name, other):
        with pytest.raises(
            TypeError, match=f"^{name}: edges must be an array or a tensor, got {type(other).__name__}; trace_fast.ev"
        ):
            READERS[name](other)

    @pytest.mark.parametrize("shape", [(), (5,), (0, 5), (3, 0, 5), (1, 3, 4, 5), (1, 1, 1, 4, 5)])
    @pytest.mark.parametrize("name", READERS)
    def test_shapes_are_refused_everywhere(self, name, shape):
        with pytest.raises(
            ValueError,
            match=rf"^{name}: edges must be \(H, W\), \(B, H, W\) or \(B, 1, H, W\) and not empty, got shape "
            + re.escape(f"{shape}")
            + "$",
        ):
            READERS[name](np.zeros(shape, np.float32))

    @pytest.mark.parametrize("name", [name for name in READERS if name != "overlay"])
    def test_a_batch_is_refused_where_one_image_is_needed(self, name):
        with pytest.raises(ValueError, match=f"^{name}: edges must be of one image, got 3$"):
            READERS[name](torch.zeros(3, 1, HEIGHT, WIDTH))

    @pytest.mark.parametrize(
        "convert",
        [
            lambda edges: edges[None],
            lambda edges: edges[None, None],
            lambda edges: edges.astype(">f8"),
            lambda edges: edges.astype(np.float16),
            lambda edges: edges[::-1, ::-1].copy()[::-1, ::-1],
            lambda edges: np.asfortranarray(edges),
            torch.from_numpy,
            lambda edges: torch.from_numpy(edges)[None, None].bfloat16().requires_grad_(),
        ],
    )
    @pytest.mark.parametrize("name", READERS)
    def test_shapes_and_layouts(self, name, convert):
        edges = with_value(0.25)  # in every dtype exactly
        result, expected = READERS[name](convert(edges)), READERS[name](edges)
        assert result == expected if isinstance(result, bytes) else np.array_equal(result, expected)

    def test_edges_are_not_changed_and_memory_is_not_shared(self):
        for edges in (with_value(0.25), torch.from_numpy(with_value(0.25))):
            read_edge_map("overlay", edges).fill_(0)
            assert edges.max() == 1

    @pytest.mark.gpu
    def test_edges_stay_on_their_device(self):
        assert read_edge_map("overlay", torch.zeros(1, 1, 4, 5, device="cuda")).device.type == "cuda"


def test_errors_name_the_image_of_a_list():
    with pytest.raises(FileNotFoundError) as caught, error_context(7):
        read_image("missing.png")
    assert caught.value.__notes__ == ["image 7 of the list, counted from 0"]


class TestChannelOrder:
    @pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
    def test_arrays_and_tensors(self, pixels, dtype):
        values = pixels.astype(dtype) * {"uint8": 1, "uint16": 257, "float32": 1 / 255}[np.dtype(dtype).name]
        values = values.astype(dtype)
        planes = torch.from_numpy(values).permute(2, 0, 1)
        for image in (values, planes, planes[None]):
            expected = read_image(image).flip(1)
            assert not torch.equal(expected, read_image(image))
            assert torch.equal(read_image(image, "bgr"), expected)

    def test_as_opencv_reads_a_file(self, pixels, tmp_path):
        cv2 = pytest.importorskip("cv2")
        path = str(tmp_path / "a.png")
        Image.fromarray(pixels).save(path)
        assert torch.equal(read_image(cv2.imread(path), "bgr"), read_image(path))
        rgba = np.dstack([pixels, np.full((HEIGHT, WIDTH), 100, np.uint8)])
        Image.fromarray(rgba).save(path)
        assert torch.equal(read_image(cv2.imread(path, cv2.IMREAD_UNCHANGED), "bgr"), read_image(path))

    def test_what_states_its_order_or_has_none(self, pixels, tmp_path):
        path = tmp_path / "a.png"
        Image.fromarray(pixels).save(path)
        for image in (path, Image.fromarray(pixels), pixels[..., 0], pixels[..., :1], torch.from_numpy(pixels[..., 0])):
            assert torch.equal(read_image(image, "bgr"), read_image(image))

    @pytest.mark.parametrize("order", ["BGR", "", None, 1])
    def test_refusal(self, pixels, order):
        with pytest.raises(ValueError, match=f"edges: channel_order must be 'rgb' or 'bgr', got {order!r}"):
            read_image(pixels, order)


class TestFitResolution:
    def test_by_hand(self):
        assert fit_resolution(480, 640, 512) == (512, 704)  # 682.7 is nearer to 704 than to 640
        assert fit_resolution(640, 480, 512) == (704, 512)
        assert fit_resolution(100, 100, 1) == (64, 64)

    def test_sizes_are_those_of_annotators(self):
        processor = require("controlnet_aux.util")
        random = np.random.default_rng(0)
        for height, width, resolution in random.integers([40, 40, 64], [500, 500, 400], (30, 3)).tolist():
            resized = processor.resize_image(np.zeros((height, width, 3), np.uint8), resolution)
            assert resized.shape[:2] == fit_resolution(height, width, resolution)


class TestResize:
    def test_size_and_range(self):
        image = torch.rand(2, 3, 31, 17)
        for size in [(1, 1), (2, 3), (16, 24), (64, 96), (31, 18)]:
            resized = resize(image, size)
            assert resized.shape == (2, 3, *size)
            assert resized.min() >= -1e-6
            assert resized.max() <= 1 + 1e-6

    def test_same_size_is_the_same_image(self):
        image = torch.rand(1, 3, 24, 40)
        assert resize(image, (24, 40)) is image

    def test_reduction_is_antialiased(self):
        stripes = torch.tensor([0.0, 1.0]).repeat(1, 1, 32, 20)
        assert_is(resize(stripes, (16, 10))[..., 1:-1].contiguous(), torch.full((1, 1, 16, 8), 0.5), 1e-6)

    def test_constant_stays_constant(self):
        assert_is(resize(torch.full((1, 3, 20, 31), 0.3), (7, 50)), torch.full((1, 3, 7, 50), 0.3), 1e-6)

    def test_errors(self):
        with pytest.raises(ValueError, match=r"^resize: image must be \(B, C, H, W\), got shape \(3, 20, 31\)$"):
            resize(torch.zeros(3, 20, 31), (5, 6))
        for size in [(5,), (0, 6), (5, 6, 7)]:
            with pytest.raises(ValueError, match=r"^resize: size must be \(height, width\), both at least 1, got \("):
                resize(torch.zeros(1, 3, 20, 31), size)
        with pytest.raises(ValueError, match=rf"^resize: size must be at most {MAX_PIXELS} pixels, got 10+ x 6$"):
            resize(torch.zeros(1, 3, 20, 31), (10**30, 6))


@pytest.mark.slow
def test_import_leaves_pillow_alone():
    code = "import sys, trace_fast.io.images as _; sys.exit('PIL' in sys.modules)"
    assert run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("change", [lambda x: x.to("meta"), lambda x: x.to_sparse()], ids=["meta", "sparse"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_tensors_without_values_and_sparse_ones_are_refused(change, dtype):
    with pytest.raises(ValueError, match=r"edges: image must (have values|be dense)"):
        read_image(change(torch.zeros(3, 16, 24, dtype=dtype)))
    with pytest.raises(ValueError, match=r"overlay: edges must (have values|be dense)"):
        read_edge_map("overlay", change(torch.zeros(16, 24)))


def test_edges_of_too_many_pixels_are_refused_before_they_are_copied():
    with pytest.raises(ValueError, match=r"overlay: edges must have at most .* pixels, got shape"):
        read_edge_map("overlay", torch.zeros(1).expand(10**9, 10**9))
