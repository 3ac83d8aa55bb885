"""Pictures of edges, masks and KL curves, and that files are written whole or not at all."""

import base64
import colorsys
import io
import os
import re
import sys
import zlib
from dataclasses import replace
from subprocess import run

import numpy as np
import pytest
import torch
from PIL import Image

from trace_fast import Detector, TraceOutput, Tracer
from trace_fast.io.notebook import format_html
from trace_fast.io.visualize import draw_masks, grid, overlay, panel, plot_curve, show, write_picture, write_png

HEIGHT, WIDTH = 20, 31
TIMESTEPS = (0, *range(99, 1000, 100))


@pytest.fixture
def edges():
    return np.random.default_rng(0).random((HEIGHT, WIDTH), dtype=np.float32)


@pytest.fixture
def levels():
    """Levels of 8 bits; edges of level / 255 are far from where rounding changes."""
    return np.random.default_rng(4).integers(0, 256, (HEIGHT, WIDTH), dtype=np.uint8)


@pytest.fixture
def photo():
    return np.random.default_rng(1).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


def as_png(picture, **options):
    """Bytes of a PNG file at the compression level that is fast, or with other options."""
    file = io.BytesIO()
    picture.save(file, format="PNG", **({"compress_level": 3} | options))
    return file.getvalue()


def make_output(kl, timestep, timesteps=TIMESTEPS):
    count = len(timestep)
    return TraceOutput(
        edges=torch.zeros(count, 1, HEIGHT, WIDTH),
        timestep=torch.tensor(timestep),
        timesteps=torch.tensor(timesteps),
        kl=kl,
        abdiv=None,
        model="mini",
        noising="inversion",
        size=(128, 128),
    )


class TestWritePng:
    @pytest.mark.parametrize(("bits", "mode"), [(8, "L"), (16, "I;16")])
    def test_levels_come_back(self, edges, tmp_path, bits, mode):
        edges[0, :2] = 0, 1
        write_png(tmp_path / "x.png", edges, bits)
        with Image.open(tmp_path / "x.png") as picture:
            assert (picture.format, picture.mode, picture.size) == ("PNG", mode, (WIDTH, HEIGHT))
            written = np.array(picture).astype(np.float64)
        # rounded to the nearest level
        np.testing.assert_allclose(written, edges.astype(np.float64) * (2**bits - 1), rtol=0, atol=0.501)
        assert written[0, :2].tolist() == [0, 2**bits - 1]

    def test_compression(self, levels, tmp_path):
        write_png(tmp_path / "x.png", levels / 255)
        content = as_png(Image.fromarray(levels), compress_level=1, compress_type=zlib.Z_RLE)
        assert (tmp_path / "x.png").read_bytes() == content

    def test_path_may_be_a_string_and_is_replaced(self, levels, tmp_path):
        path = str(tmp_path / "x.PNG")
        for values in (np.zeros((HEIGHT, WIDTH)), levels / 255):
            write_png(path, values)
        with Image.open(path) as picture:
            np.testing.assert_array_equal(np.array(picture), levels)
        assert os.listdir(tmp_path) == ["x.PNG"]

    def test_permissions_are_those_of_any_new_file(self, edges, tmp_path):
        (tmp_path / "plain").touch()
        write_png(tmp_path / "x.png", edges)
        assert (tmp_path / "x.png").stat().st_mode == (tmp_path / "plain").stat().st_mode

    @pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
    def test_a_failed_write_leaves_the_file_of_before(self, edges, tmp_path, monkeypatch, error):
        def fail(self, file, **_):
            file.write(b"half a file")
            raise error

        write_png(tmp_path / "old.png", edges)
        before = (tmp_path / "old.png").read_bytes()
        monkeypatch.setattr(Image.Image, "save", fail)
        for name in ("old.png", "new.png"):
            with pytest.raises(type(error)):
                write_png(tmp_path / name, edges)
        assert os.listdir(tmp_path) == ["old.png"]
        assert (tmp_path / "old.png").read_bytes() == before

    def test_a_folder_of_that_name_is_kept(self, edges, tmp_path):
        (tmp_path / "x.png").mkdir()
        with pytest.raises(OSError, match=r"x\.png"):
            write_png(tmp_path / "x.png", edges)
        assert os.listdir(tmp_path) == ["x.png"]

    def test_missing_folder(self, edges, tmp_path):
        with pytest.raises(
            FileNotFoundError, match=r"^write_png: path must be in an existing folder, got '.*/no/x\.png'"
        ):
            write_png(tmp_path / "no" / "x.png", edges)

    @pytest.mark.parametrize("bits", [1, 24, "8", None])
    def test_other_bits(self, edges, tmp_path, bits):
        with pytest.raises(ValueError, match=f"^write_png: bits must be 8 or 16, got {bits!r}$"):
            write_png(tmp_path / "x.png", edges, bits)

    def test_other_ending(self, edges, tmp_path):
        with pytest.raises(ValueError, match=r"^write_png: path must end in \.png, got '.*x\.jpg'$"):
            write_png(tmp_path / "x.jpg", edges)

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.1, 2.0])
    def test_refused_edges_leave_no_file(self, edges, tmp_path, value):
        edges[3, 4] = value
        with pytest.raises(ValueError, match=r"^write_png: edges must be finite and in \[0, 1\], got values from"):
            write_png(tmp_path / "x.png", edges)
        assert os.listdir(tmp_path) == []


class TestWritePicture:
    @pytest.mark.parametrize(("name", "image_format"), [("x.png", "PNG"), ("x.JPG", "JPEG"), ("x.webp", "WEBP")])
    def test_format_follows_the_ending(self, photo, tmp_path, name, image_format):
        write_picture(tmp_path / name, Image.fromarray(photo))
        with Image.open(tmp_path / name) as picture:
            assert (picture.format, picture.size) == (image_format, (WIDTH, HEIGHT))

    def test_compression(self, photo, tmp_path):
        write_picture(tmp_path / "x.png", Image.fromarray(photo))
        assert (tmp_path / "x.png").read_bytes() == as_png(Image.fromarray(photo))

    @pytest.mark.parametrize("name", ["x", "x.docx"])
    def test_other_endings(self, photo, tmp_path, name):
        with pytest.raises(
            ValueError, match=f"^write_picture: path must have the ending of an image format, .*{name}'$"
        ):
            write_picture(tmp_path / name, Image.fromarray(photo))

    def test_a_failed_write_leaves_nothing(self, tmp_path):
        with pytest.raises(OSError, match="mode RGBA as JPEG"):
            write_picture(tmp_path / "x.jpg", Image.new("RGBA", (WIDTH, HEIGHT)))
        assert os.listdir(tmp_path) == []


class TestOverlay:
    def test_strong_edges_are_magenta_and_the_rest_is_the_dimmed_photo(self, photo):
        edges = np.zeros((HEIGHT, WIDTH), np.float32)
        edges[:, 7] = 1
        drawn = np.array(overlay(photo, edges))
        assert drawn.shape == (HEIGHT, WIDTH, 3)
        assert (drawn[:, 7] == (255, 0, 153)).all()
        rest = np.arange(WIDTH) != 7
        dimmed = 0.375 * (photo + photo.mean(axis=2, keepdims=True))
        np.testing.assert_allclose(drawn[:, rest], dimmed[:, rest], atol=0.51)

    def test_opacity_is_the_strength(self):
        picture = overlay(np.full((HEIGHT, WIDTH), 1.0), np.full((HEIGHT, WIDTH), 0.5))
        assert picture.getpixel((3, 4)) == (223, 96, 172)  # halfway between gray 191 and magenta

    @pytest.mark.parametrize("background", [0, 90, 255])
    def test_edges_stand_out_on_any_gray_level(self, background):
        edges = np.eye(HEIGHT, WIDTH)
        drawn = np.array(overlay(np.full((HEIGHT, WIDTH, 3), background, np.uint8), edges)).astype(int)
        assert np.abs(drawn[0, 0] - drawn[0, 5]).max() >= 150

    def test_kinds_of_images(self, photo, edges, tmp_path):
        Image.fromarray(photo).save(tmp_path / "x.png")
        expected = np.array(overlay(photo, edges))
        chw = torch.from_numpy(photo).permute(2, 0, 1)
        for image in (tmp_path / "x.png", Image.fromarray(photo), chw):
            picture = overlay(image, torch.from_numpy(edges)[None, None])
            assert (picture.mode, picture.size) == ("RGB", (WIDTH, HEIGHT))
            assert_same_picture(picture, expected)

    @pytest.mark.parametrize("count", [1, 3])
    def test_a_batch_gives_a_list(self, count):
        images, edges = torch.rand(count, 3, HEIGHT, WIDTH), torch.rand(count, 1, HEIGHT, WIDTH)
        pictures = overlay(images, edges)
        assert len(pictures) == count
        for picture, image, edge in zip(pictures, images, edges, strict=True):
            assert_same_picture(picture, overlay(image, edge))

    @pytest.mark.parametrize(
        ("shape", "size"),
        [((WIDTH, HEIGHT), "1 of 31 x 20"), ((2, HEIGHT, WIDTH), "2 of 20 x 31"), ((1, 1), "1 of 1 x 1")],
    )
    def test_edges_of_another_image(self, photo, shape, size):
        with pytest.raises(ValueError, match=f"^overlay: edges must be of .* 1 of 20 x 31, got {size}$"):
            overlay(photo, np.zeros(shape))


def assert_same_picture(picture, other):
    """Equal pictures, where a color may be rounded to the next level."""
    picture, other = np.array(picture).astype(int), np.array(other).astype(int)
    assert picture.shape == other.shape and np.abs(picture - other).max() <= 1


def draw_whole(photo, masks):
    """Draw masks as `draw_masks` does, but each over the whole photo."""
    picture = torch.from_numpy(photo).permute(2, 0, 1).float() / 255
    picture = (picture + picture.mean(dim=0, keepdim=True)) / 2
    for index in sorted(range(len(masks)), key=lambda k: -masks[k].sum()):
        mask = torch.from_numpy(masks[index])
        color = torch.tensor(colorsys.hsv_to_rgb(index * 0.618034 % 1, 0.75, 0.95))[:, None, None]
        inside = -torch.nn.functional.max_pool2d(-mask[None].float(), 3, 1, 1)[0] > 0
        picture = torch.where(mask, torch.lerp(picture, color, 0.55), picture)
        picture = torch.where(mask & ~inside, torch.ones(()), picture)
    return picture.mul(255).round().byte().permute(1, 2, 0).numpy()


class TestDrawMasks:
    @pytest.fixture
    def masks(self):
        """Boxes, one at each border, the whole photo, scattered pixels, a single pixel, and no pixel."""
        masks = np.zeros((9, HEIGHT, WIDTH), bool)
        for mask, box in zip(
            masks,
            (np.s_[3:9, 5:12], np.s_[:4, 2:20], np.s_[9:, 25:], np.s_[:], np.s_[5:6, :], np.s_[4:17, :7]),
            strict=False,
        ):
            mask[box] = True
        masks[7] = np.random.default_rng(2).random((HEIGHT, WIDTH)) < 0.6
        masks[8, 11, 13] = True
        return masks

    def test_each_mask_has_a_color_and_an_outline(self, photo, masks):
        picture = draw_masks(photo, masks)
        assert (picture.mode, picture.size) == ("RGB", (WIDTH, HEIGHT))
        assert_same_picture(picture, draw_whole(photo, masks))

    @pytest.mark.parametrize("count", [0, 1, 6])
    def test_random_masks(self, count):
        random = np.random.default_rng(count)
        for height, width in ((16, 16), (17, 33), (48, 21)):
            masks = random.random((count, height, width)) < random.random((count, 1, 1))
            photo = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
            assert_same_picture(draw_masks(photo, masks), draw_whole(photo, masks))

    @pytest.mark.parametrize(
        "convert",
        [
            torch.from_numpy,
            lambda x: x[:, ::-1, ::-1].copy()[:, ::-1, ::-1],
            lambda x: np.frombuffer(x.tobytes(), bool).reshape(x.shape),  # read-only
            lambda x: (x * np.uint8(255)).view(bool),
            np.asfortranarray,
        ],
    )
    def test_memory_layouts_of_masks(self, photo, masks, convert):
        assert_same_picture(draw_masks(photo, convert(masks)), draw_masks(photo, masks))

    def test_arguments_are_not_changed(self, photo, masks):
        image, stack = torch.rand(3, HEIGHT, WIDTH), torch.from_numpy(masks)
        before = image.clone(), stack.clone()
        draw_masks(image, stack)
        assert torch.equal(image, before[0]) and torch.equal(stack, before[1])

    @pytest.mark.parametrize("convert", [np.asarray, torch.from_numpy])
    def test_other_dtypes(self, photo, convert):
        with pytest.raises(TypeError, match=r"^draw_masks: masks must be bool, got float64$"):
            draw_masks(photo, convert(np.zeros((1, HEIGHT, WIDTH))))

    @pytest.mark.parametrize("shape", [(HEIGHT, WIDTH), (2, WIDTH, HEIGHT), (1, 1, HEIGHT, WIDTH)])
    def test_other_shapes(self, photo, shape):
        with pytest.raises(ValueError, match=r"^draw_masks: masks must be \(M, H, W\) of the image, 1 of 20 x 31, got"):
            draw_masks(photo, np.zeros(shape, bool))


class TestPanel:
    def test_pictures_stand_side_by_side_at_one_height(self, photo, edges):
        wide = np.zeros((40, 120, 3), np.uint8)
        sheet = panel([photo, edges, wide], ["", "", ""], height=60)
        gap, widths = 5, [93, 93, 180]
        assert (sheet.mode, sheet.size) == ("RGB", (sum(widths) + 2 * gap, 60))
        assert np.array(sheet)[:, 93:98].min() == 255
        assert np.array(sheet)[:, -180:].max() == 0

    def test_height_is_that_of_the_first_image(self, photo):
        np.testing.assert_array_equal(np.array(panel([photo], [""])), photo)

    def test_titles_are_above_their_pictures(self):
        black = np.zeros((100, 150), np.uint8)
        sheet = np.array(panel([black, black], ["photo", ""]))
        top = len(sheet) - 100
        assert 15 <= top <= 40
        assert sheet[:top, :150].min() < 128
        assert sheet[:top, 150:].min() == 255
        assert sheet[top:, :150].max() == 0

    def test_a_long_title_is_not_cut(self):
        black = np.zeros((100, 20), np.uint8)
        sheet = panel([black], ["a title wider than its picture"])
        assert sheet.width > 60
        columns = np.array(sheet.convert("L"))[:-100].min(axis=0)
        assert columns[0] > 128 or columns[-1] > 128

    def test_errors(self, photo):
        with pytest.raises(ValueError, match=r"^panel: titles must be one for each image, got 1 for 2 images"):
            panel([photo, photo], ["one"])
        with pytest.raises(ValueError, match=r"^panel: titles must be one for each image, got 0 for 0 images"):
            panel([], [])
        with pytest.raises(ValueError, match=r"^panel: height must be at least 1, got 0"):
            panel([photo], [""], height=0)
        with pytest.raises(ValueError, match=r"^panel: images must be single images, got a batch of 2"):
            panel([torch.zeros(2, 3, HEIGHT, WIDTH)], [""])


class TestGrid:
    def test_places_by_hand(self):
        pictures = [
            Image.new("RGB", size, color) for size, color in (((4, 2), "red"), ((3, 5), "lime"), ((2, 2), "blue"))
        ]
        sheet = np.array(grid(pictures, 2, gap=1))
        assert sheet.shape == (5 + 1 + 2, 4 + 1 + 4, 3)
        expected = np.full_like(sheet, 255)
        expected[:2, :4], expected[:5, 5:8], expected[6:, :2] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
        assert np.array_equal(sheet, expected)

    @pytest.mark.parametrize(("count", "columns"), [(0, 2), (1, 0)])
    def test_nothing_to_place(self, count, columns):
        with pytest.raises(ValueError, match=f"grid: pictures must be in at least 1 column, got {count} pictures in"):
            grid([Image.new("RGB", (2, 3))] * count, columns)


@pytest.fixture
def kl():
    return torch.rand(3, 10, generator=torch.Generator().manual_seed(0)) / 10


class TestPlotCurve:
    def peak(self, curve):
        return TIMESTEPS[1:][curve.argmax()]

    def test_curve_and_its_peak(self, kl):
        peak = self.peak(kl[0])
        (axes,) = plot_curve(make_output(kl[:1], [peak])).axes
        curve, dot, vertical = axes.lines
        assert curve.get_xydata().tolist() == [list(point) for point in zip(TIMESTEPS[1:], kl[0].tolist(), strict=True)]
        assert (dot.get_xdata(), dot.get_ydata()) == ([peak], [kl[0].max().item()])
        assert list(vertical.get_xdata()) == [peak, peak]
        assert [text.get_text() for text in axes.get_legend().get_texts()] == [f"t* = {peak}"]
        assert axes.get_title() == "mini, inversion"

    def test_another_timestep_than_the_peak_is_named(self, kl):
        (axes,) = plot_curve(make_output(kl[:1], [0])).axes
        assert list(axes.lines[2].get_xdata()) == [0, 0]
        names = [text.get_text() for text in axes.get_legend().get_texts()]
        assert names == [f"t* = {self.peak(kl[0])}", "read at 0"]

    def test_a_batch_has_a_line_for_each_image(self, kl):
        peaks = [self.peak(curve) for curve in kl]
        (axes,) = plot_curve(make_output(kl, peaks)).axes
        names = [text.get_text() for text in axes.get_legend().get_texts()]
        assert names == [f"image {index}, t* = {peak}" for index, peak in enumerate(peaks)]

    def test_a_large_batch_has_no_legend(self, kl):
        (axes,) = plot_curve(make_output(kl.repeat(4, 1), [99] * 12)).axes
        assert axes.get_legend() is None

    @pytest.mark.parametrize(("name", "start"), [("x.png", b"\x89PNG"), ("x.pdf", b"%PDF"), ("x.svg", b"<?xml")])
    def test_files(self, kl, tmp_path, name, start):
        plot_curve(make_output(kl[:1], [499]), tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(start)
        assert os.listdir(tmp_path) == [name]

    def test_unknown_ending_leaves_nothing(self, kl, tmp_path):
        with pytest.raises(ValueError, match="docx"):
            plot_curve(make_output(kl[:1], [499]), tmp_path / "x.docx")
        assert os.listdir(tmp_path) == []

    def test_missing_folder(self, kl, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"^plot_curve: path must be in an existing folder"):
            plot_curve(make_output(kl[:1], [499]), tmp_path / "no" / "x.png")

    def test_no_curve(self):
        with pytest.raises(
            ValueError, match=r"^plot_curve: output must have a KL curve, got kl=None; trace with return_kl"
        ):
            plot_curve(make_output(None, [499]))

    def test_matplotlib_missing(self, kl, monkeypatch):
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        with pytest.raises(RuntimeError, match=r"^plot_curve: matplotlib must be installed"):
            plot_curve(make_output(kl[:1], [499]))

    @pytest.mark.slow
    def test_libraries_are_imported_late_and_pyplot_never(self):
        code = (
            "import sys, torch, trace_fast.io.visualize as a; from types import SimpleNamespace as N;"
            "loaded = {'matplotlib', 'PIL'} & set(sys.modules);"
            "a.plot_curve(N(kl=torch.rand(1, 1), timestep=torch.tensor([99]), timesteps=torch.tensor([0, 99]),"
            " model='m', noising='n'));"
            "sys.exit(bool(loaded) or 'matplotlib.pyplot' in sys.modules)"
        )
        assert run([sys.executable, "-c", code], check=False).returncode == 0


class TestShow:
    def test_pictures_side_by_side(self, photo, edges):
        masks = np.zeros((2, HEIGHT, WIDTH), bool)
        masks[0, :9], masks[1, 9:, :7] = True, True
        picture = show(photo, edges, masks)
        parts = [photo, edges, overlay(photo, edges), draw_masks(photo, masks)]
        assert picture == panel(parts, ["image", "edges", "overlay", "masks"])
        assert show(photo, masks=masks) == panel([parts[0], parts[3]], ["image", "masks"])
        assert show(photo) == panel([photo], ["image"])

    def test_a_large_image_is_reduced(self):
        picture = show(np.zeros((800, 400, 3), np.uint8), np.zeros((800, 400), np.float32))
        assert picture.height == 320 + 2 * 16 and picture.width == 3 * 160 + 2 * 8

    def test_other_sizes(self, photo):
        with pytest.raises(ValueError, match="edges must be of the image's number and size"):
            show(photo, np.zeros((HEIGHT, WIDTH + 1), np.float32))


class TestPlotOutput:
    def test_a_row_for_each_image(self, kl):
        output = replace(make_output(kl, [499, 99, 99]), edges=torch.rand(3, 1, 24, 40), abdiv=torch.rand(3, 6, 10))
        axes = [axes for axes in output.plot().axes if axes.get_title() or axes.get_xlabel()]
        titles = ("edges, timestep {}", "ABDiv, nats, timestep {}", "")
        assert [axes.get_title() for axes in axes] == [title.format(t) for t in (499, 99, 99) for title in titles]
        np.testing.assert_array_equal(axes[6].images[0].get_array(), output.edges[2, 0])
        assert axes[0].images[0].get_clim() == (0, 1)
        np.testing.assert_allclose(axes[5].lines[0].get_ydata(), kl[1])

    def test_edges_alone(self):
        figure = replace(make_output(None, [0]), edges=torch.rand(1, 1, 24, 40)).plot()
        assert [axes.get_title() for axes in figure.axes if axes.get_title()] == ["edges, timestep 0"]

    def test_matplotlib_missing(self, kl, monkeypatch):
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        with pytest.raises(RuntimeError, match=r"^plot: matplotlib must be installed"):
            make_output(kl[:1], [499]).plot()


class TestNotebook:
    def test_an_output(self, kl):
        output = replace(make_output(kl, [499, 99, 99]), edges=torch.rand(3, 1, 24, 40), abdiv=torch.rand(3, 6, 10))
        text = output._repr_html_()
        captions = re.findall("<figcaption>(.*?)</figcaption>", text)
        assert captions == ["edges 0", "edges 1", "edges 2", "ABDiv 0", "ABDiv 1", "ABDiv 2"]
        pictures = [base64.b64decode(data) for data in re.findall('src="data:image/png;base64,(.*?)"', text)]
        sizes = []
        for data in pictures:
            with Image.open(io.BytesIO(data)) as picture:
                sizes.append(picture.size)
                assert picture.getextrema()[1] > 200
        assert sizes == 6 * [(320, 192)]
        assert "<th>images</th><td>3 of 24 x 40</td>" in text and "<th>timestep read</th><td>[499, 99, 99]</td>" in text

    def test_a_large_batch_without_a_curve(self):
        text = replace(make_output(None, 9 * [0]), edges=torch.rand(9, 1, 24, 40))._repr_html_()
        assert text.count("<img") == 4 and "<th>KL" not in text

    def test_models(self):
        for model in (Tracer.from_pretrained("mini", device="cpu"), Detector.from_pretrained("mini", device="cpu")):
            text = model._repr_html_()
            assert text.startswith(f"<b>{type(model).__name__}</b>")
            assert "<th>model</th><td>mini</td>" in text and f"<td>{model.size}</td>" in text

    def test_names_are_escaped(self):
        text = format_html("a & b", {"model": "<script>", "none": None}, {"<x>": Image.new("L", (4, 3))})
        assert "<script>" not in text and "&lt;script&gt;" in text and "&lt;x&gt;" in text and "a &amp; b" in text
        assert "none" not in text


def test_defaults_of_torch_do_not_matter(photo, edges, tmp_path, request):
    masks = np.random.default_rng(3).random((3, HEIGHT, WIDTH)) < 0.5

    def make_picture():
        write_png(tmp_path / "x.png", edges)
        pictures = overlay(photo, edges), draw_masks(photo, masks), panel([photo, edges], ["", ""])
        return [(tmp_path / "x.png").read_bytes(), *(picture.tobytes() for picture in pictures)]

    before = make_picture()
    request.getfixturevalue("odd_defaults")
    assert make_picture() == before
