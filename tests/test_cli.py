"""The command line, run on a small model with random weights: files, messages on stderr, exit status."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

import trace_fast
from trace_fast import cli
from trace_fast.backbones.mini import Mini, MiniConfig
from trace_fast.io import visualize
from trace_fast.io.images import read_image


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    torch.manual_seed(0)
    network = Mini(MiniConfig(dim=16, depth=1, heads=2))
    for parameter in network.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    folder = tmp_path_factory.mktemp("model")
    save_file(network.state_dict(), folder / "model.safetensors")
    config = {"family": "mini", "architecture": network.config.to_dict(), "tracing": {"size": [16, 24]}}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.fixture
def call(model, tmp_path, monkeypatch):
    """Run a command inside an empty folder; `edges` with the small model."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        if arguments[0] == "edges" and "--model" not in arguments:
            arguments = (*arguments, "--model", model, "--device", "cpu")
        return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])

    return call


def make_photo(path, height=20, width=31, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def read(path):
    with Image.open(path) as picture:
        return np.array(picture)


def files(folder):
    """Return the names in a folder, but not those that begin with a dot: the manifest."""
    return sorted(name for name in os.listdir(folder) if not name.startswith("."))


class TestEdges:
    def test_one_file(self, call, tmp_path, model):
        photo = make_photo(tmp_path / "a photo.jpg")
        result = call("edges", photo, "-o", "out")
        assert (result.exit_code, result.stdout, result.stderr) == (0, "1 of 1 written to out\n", "")
        assert files("out") == ["a photo.png"]
        expected = trace_fast.Tracer.from_pretrained(model, device="cpu")(photo).edges[0, 0].double()
        np.testing.assert_allclose(read("out/a photo.png") / 255, expected, rtol=0, atol=0.5 / 255 + 1e-6)

    def test_files_and_folders(self, call, tmp_path):
        make_photo(tmp_path / "in" / "b.PNG", 17, 40)
        make_photo(tmp_path / "in" / "a.webp", 40, 17)
        make_photo(tmp_path / "in" / "deeper" / "d.png")
        make_photo(tmp_path / "in" / ".hidden.png")
        (tmp_path / "in" / "notes.txt").write_text("no image")
        make_photo(tmp_path / "c.bmp")
        result = call("edges", "in", "c.bmp", "-o", tmp_path / "out" / "deeper")
        assert result.exit_code == 0, result.output
        assert files("out/deeper") == ["a.png", "b.png", "c.png"]
        assert read("out/deeper/a.png").shape == (40, 17)
        assert "3 of 3 written" in result.stdout

    def test_a_file_named_twice_is_done_once(self, call, tmp_path):
        make_photo(tmp_path / "in" / "a.png")
        result = call("edges", "in", "in/a.png", tmp_path / "in" / "a.png", "-o", "out")
        assert (result.exit_code, result.stdout) == (0, "1 of 1 written to out\n")

    def test_overlay_and_curve(self, call, tmp_path):
        photo = make_photo(tmp_path / "a.png")
        options = ("--overlay", "--overlay-format", "png", "--curve", "--bits", 16, "--timestep", 299)
        result = call("edges", photo, "-o", "out", *options)
        assert result.exit_code == 0, result.output
        assert files("out") == ["a.png", "a_curve.png", "a_overlay.png"]
        assert read("out/a.png").dtype == np.uint16
        overlay = read("out/a_overlay.png").astype(int)
        expected = np.array(visualize.overlay(photo, read("out/a.png") / 65535)).astype(int)
        assert np.abs(overlay - expected).max() <= 1

    def test_a_photo_that_changed_is_done_again(self, call, tmp_path):
        for seed in (0, 1):
            make_photo(tmp_path / "a.png", 20 + seed, seed=seed)
            assert call("edges", "a.png", "-o", "out").exit_code == 0
        assert files("out") == ["a.png"]
        assert read("out/a.png").shape == (21, 31)

    @pytest.mark.parametrize(
        "options", [("--timestep", "iep"), ("--timestep", 499), ("--noising", "gaussian"), ("--size", "8x40")]
    )
    def test_options_change_the_edges(self, call, tmp_path, options):
        make_photo(tmp_path / "a.png")
        for folder, extra in (("one", ("--timestep", 0)), ("two", options)):
            assert call("edges", "a.png", "-o", folder, "--bits", 16, *extra).exit_code == 0
        assert (tmp_path / "one" / "a.png").read_bytes() != (tmp_path / "two" / "a.png").read_bytes()

    def test_offloaded_weights_give_the_same(self, call, tmp_path):
        make_photo(tmp_path / "a.png")
        for folder, *extra in (["one"], ["two", "--offload", "model"], ["three", "--offload", "sequential"]):
            assert call("edges", "a.png", "-o", folder, "--bits", 16, *extra).exit_code == 0
        one, two, three = (read(tmp_path / name / "a.png").astype(int) for name in ("one", "two", "three"))
        assert abs(one - two).max() <= 1 and abs(one - three).max() <= 1

    def test_seed_decides_the_noise(self, call, tmp_path):
        make_photo(tmp_path / "a.png")
        for folder, seed in (("one", 1), ("same", 1), ("two", 2)):
            options = ("--noising", "gaussian", "--timestep", 499, "--bits", 16, "--seed", seed)
            assert call("edges", "a.png", "-o", folder, *options).exit_code == 0
        one, same, two = ((tmp_path / name / "a.png").read_bytes() for name in ("one", "same", "two"))
        assert one == same != two


class TestOneFile:
    def test_the_same_bytes_as_in_a_folder(self, call, tmp_path):
        make_photo(tmp_path / "in" / "a.jpg")
        options = ("in", "--overlay", "--bits", 16)
        assert call("edges", *options, "-o", "out").exit_code == 0
        result = call("edges", *options, "-o", "new/e.PNG")
        assert (result.exit_code, result.stdout) == (0, "1 of 1 written to new/e.PNG\n")
        assert sorted(os.listdir("new")) == ["e.PNG", "e_overlay.jpg"]
        assert (tmp_path / "new" / "e.PNG").read_bytes() == (tmp_path / "out" / "a.png").read_bytes()
        assert (tmp_path / "new" / "e_overlay.jpg").read_bytes() == (tmp_path / "out" / "a_overlay.jpg").read_bytes()

    def test_overwrite(self, call, tmp_path):
        make_photo(tmp_path / "a.png")
        (tmp_path / "e.png").write_text("of before")
        (tmp_path / "e.png").chmod(0o600)
        assert call("edges", "a.png", "-o", "e.png", "--overwrite").exit_code == 0
        assert read("e.png").shape == (20, 31) and (tmp_path / "e.png").stat().st_mode & 0o777 == 0o600

    def test_a_name_that_is_too_long_and_a_missing_image(self, call, tmp_path):
        (tmp_path / "e.png").touch()
        for photo, output in (("e.png", f"{'a' * 300}.png"), ("missing.png", "e.png")):
            result = call("edges", photo, "-o", output)
            assert result.exit_code == 2 and result.stderr.startswith("trace-fast: ")
            assert isinstance(result.exception, SystemExit)

    def test_a_bad_image_leaves_nothing(self, call, tmp_path):
        (tmp_path / "a.png").write_text("no image")
        result = call("edges", "a.png", "-o", "e.png")
        assert (result.exit_code, result.stdout) == (1, "0 of 1 written to e.png\n")
        assert os.listdir(tmp_path) == ["a.png"]

    def test_a_folder_of_that_name_is_a_folder(self, call, tmp_path):
        make_photo(tmp_path / "a.jpg")
        (tmp_path / "e.png").mkdir()
        assert call("edges", "a.jpg", "-o", "e.png").exit_code == 0
        assert files("e.png") == ["a.png"]

    def test_masks(self, tmp_path, monkeypatch):
        """The results of segment; label maps and edge maps are found by the name of the photo."""
        monkeypatch.chdir(tmp_path)
        make_photo(tmp_path / "a.jpg")
        for folder in ("edges", "labels"):
            (tmp_path / folder).mkdir()
            Image.fromarray(np.tile(np.uint8([0, 200]), (20, 16))[:, :31]).save(f"{folder}/a.png")
        for output in ("m.png", "out"):
            options = ("--edges", "edges", "--masks", "labels", "--coco", f"{output}.json", "-o", output)
            result = CliRunner().invoke(cli.app, ["segment", "a.jpg", *options])
            assert result.exit_code == 0, result.output
        assert (tmp_path / "m.png").read_bytes() == (tmp_path / "out" / "a.png").read_bytes()
        assert (tmp_path / "m.png.json").read_bytes() == (tmp_path / "out.json").read_bytes()


class TestBadImages:
    def test_the_others_are_done(self, call, tmp_path):
        make_photo(tmp_path / "in" / "a.png")
        make_photo(tmp_path / "in" / "small.png", 20, 9)
        (tmp_path / "in" / "text.jpg").write_text("no image")
        cut = make_photo(tmp_path / "in" / "cut.jpg")
        cut.write_bytes(cut.read_bytes()[:-300])
        make_photo(tmp_path / "in" / "z.png")
        result = call("edges", "missing.png", "in", "-o", "out")
        assert result.exit_code == 1
        assert files("out") == ["a.png", "z.png"]
        assert result.stdout == "2 of 6 written to out\n"
        lines = result.stderr.splitlines()
        for line, name, reason in zip(
            lines,
            ["missing.png", "in/cut.jpg", "in/small.png", "in/text.jpg"],
            ["must be an existing file", "readable to its end", "at least 16 pixels", "must be an image file"],
            strict=True,
        ):
            assert line.startswith(f"trace-fast: {name}: edges: image must be ")
            assert reason in line

    def test_a_failure_inside_the_network_is_that_images_failure(self, call, tmp_path, monkeypatch):
        def fail_on_tall(self, image, *, real=trace_fast.Tracer.__call__, **options):
            if image.shape[2] > 30:
                raise RuntimeError("out of memory")
            return real(self, image, **options)

        make_photo(tmp_path / "in" / "tall.png", 40, 20)
        make_photo(tmp_path / "in" / "wide.png", 20, 40)
        monkeypatch.setattr(trace_fast.Tracer, "__call__", fail_on_tall)
        result = call("edges", "in", "-o", "out")
        assert (result.exit_code, result.stderr) == (1, "trace-fast: in/tall.png: out of memory\n")
        assert files("out") == ["wide.png"]

    def test_earlier_results_of_a_bad_image_stay(self, call, tmp_path):
        photo = make_photo(tmp_path / "a.png")
        assert call("edges", photo, "-o", "out").exit_code == 0
        photo.write_bytes(b"")
        assert call("edges", photo, "-o", "out").exit_code == 1
        assert read("out/a.png").shape == (20, 31)


class TestRefusals:
    """Exit status 2, one line on stderr, and nothing written."""

    @pytest.fixture
    def refuse(self, call, tmp_path):
        make_photo(tmp_path / "a.png")

        def refuse(*arguments):
            before = files(tmp_path)
            result = call("edges", *arguments)
            assert result.exit_code == 2, result.output
            assert result.stdout == ""
            assert files(tmp_path) == before
            return result.stderr

        return refuse

    @pytest.mark.parametrize("other", ["a.jpg", "A.jpg"])
    def test_two_images_of_one_name(self, refuse, tmp_path, other):
        make_photo(tmp_path / "one" / "a.jpg")
        make_photo(tmp_path / "two" / other)
        error = refuse("one", "two", "-o", "out")
        assert error == (
            f"trace-fast: 'one/a.jpg' and 'two/{other}' would both be written to 'out/{other}.png': "
            "rename one, or give each its own --output\n"
        )

    @pytest.mark.parametrize("folder", [".", "../{name}", "link"])
    def test_a_result_in_the_place_of_an_image(self, refuse, tmp_path, folder):
        (tmp_path / "link").symlink_to(tmp_path)
        before = (tmp_path / "a.png").read_bytes()
        error = refuse("a.png", "-o", folder.format(name=tmp_path.name))
        assert "would replace the input 'a.png': choose another folder with --output" in error
        assert (tmp_path / "a.png").read_bytes() == before

    def test_folder_without_images(self, refuse, tmp_path):
        (tmp_path / "empty").mkdir()
        assert refuse("a.png", "empty", "-o", "out") == (
            "trace-fast: edges: inputs must hold images or shards, got none in the folder 'empty'\n"
        )

    def test_unknown_model(self, refuse):
        error = refuse("a.png", "-o", "out", "--model", "sd9")
        assert error.startswith("trace-fast: load: model must be one of ")
        assert error.endswith("got 'sd9'\n")
        assert error.count("\n") == 1

    @pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
    def test_missing_device(self, refuse, model):
        for device in ("cuda", "potato"):
            error = refuse("a.png", "-o", "out", "--model", model, "--device", device)
            assert error.startswith("trace-fast: ")

    @pytest.mark.parametrize("folder", ["a.png/deeper", "/dev/null/x"])
    def test_output_that_is_no_folder(self, refuse, folder):
        error = refuse("a.png", "-o", folder)
        assert error.startswith(f"trace-fast: the folder '{folder}' cannot be written to: ")
        assert error.count("\n") == 1

    @pytest.mark.parametrize("options", [(), ("--overwrite",)])
    def test_a_file_that_is_the_image(self, refuse, tmp_path, options):
        before = (tmp_path / "a.png").read_bytes()
        error = refuse("a.png", "-o", f"../{tmp_path.name}/a.png", *options)
        assert error == f"trace-fast: '../{tmp_path.name}/a.png' is the image itself: choose another --output\n"
        assert (tmp_path / "a.png").read_bytes() == before

    @pytest.mark.parametrize("name", ["e.png", "e_overlay.jpg"])
    def test_a_file_that_exists(self, refuse, tmp_path, name):
        (tmp_path / name).write_text("mine")
        error = refuse("a.png", "-o", "e.png", "--overlay")
        assert error == f"trace-fast: '{name}' exists: choose another --output, or replace it by --overwrite\n"
        assert (tmp_path / name).read_text() == "mine"

    def test_a_file_of_another_format(self, refuse):
        assert refuse("a.png", "-o", "e.jpg") == "trace-fast: --output must be a folder, or end in .png, got 'e.jpg'\n"

    def test_a_file_for_several_images(self, refuse, tmp_path):
        make_photo(tmp_path / "b.png")
        (tmp_path / "c.tar").write_bytes(b"")
        for inputs in (("a.png", "b.png"), ("c.tar",)):
            error = refuse(*inputs, "-o", "e.png")
            assert error == "trace-fast: --output must be a folder for several images or a shard, got 'e.png'\n"

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
    def test_output_without_permission(self, refuse, tmp_path):
        (tmp_path / "out").mkdir(mode=0o500)
        assert "cannot be written to: Permission denied" in refuse("a.png", "-o", "out")

    @pytest.mark.parametrize("timestep", ["ipe", "1000", "-1", "9.5", ""])
    def test_timestep(self, refuse, timestep):
        error = refuse("a.png", "-o", "out", "--timestep", timestep)
        assert error == f"trace-fast: --timestep must be iep or an integer from 0 to 999, got {timestep!r}\n"

    @pytest.mark.parametrize("size", ["512", "0x16", "16x-8", "16 x 8", "16x8x3", ""])
    def test_size(self, refuse, size):
        error = refuse("a.png", "-o", "out", "--size", size)
        assert error == f"trace-fast: --size must be height and width in pixels, such as 512x768, got {size!r}\n"

    def test_a_size_of_too_many_pixels(self, refuse):
        error = refuse("a.png", "-o", "out", "--size", "40000x40000")
        assert error == "trace-fast: --size must be at most 178956970 pixels, got 40000x40000\n"
        assert "must be height and width in pixels" in refuse("a.png", "-o", "out", "--size", "9" * 5000 + "x16")

    def test_a_size_that_the_model_does_not_take(self, refuse):
        error = refuse("a.png", "-o", "out", "--size", "16x9")
        assert error == "trace-fast: mini: size must be positive multiples of 4 pixels, got (16, 9)\n"

    @pytest.mark.parametrize(
        "option",
        [("--bits", "12"), ("--noising", "salt"), ("--seed", "x"), ("--offload", "cpu"), ("--nonsense",)],
    )
    def test_other_options(self, refuse, option):
        assert option[0] in refuse("a.png", "-o", "out", *option)

    def test_missing_arguments(self, refuse):
        assert "--output" in refuse("a.png")
        assert "IN" in refuse("-o", "out")

    def test_curve_without_matplotlib(self, refuse, monkeypatch):
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        error = refuse("a.png", "-o", "out", "--curve")
        assert error == "trace-fast: --curve: matplotlib must be installed: pip install 'trace_fast[eval]'\n"


@pytest.mark.slow
def test_ctrl_c_leaves_whole_files_only(model, tmp_path):
    for index in range(300):
        make_photo(tmp_path / "in" / f"{index:03}.png", seed=index)
    # a shell that runs the tests in the background has them ignore Ctrl-C
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "from trace_fast.cli import main; main()"
    )
    command = [sys.executable, "-c", code, "edges", "in", "-o", "out", "--model", model]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 300
        while not (tmp_path / "out" / "000.png").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode not in (0, 2)
    assert "Traceback" not in error
    written = files(tmp_path / "out")
    assert 0 < len(written) < 300
    for name in written:  # no temporary file among them, and each is readable to its end
        assert name[:3].isdigit()
        assert read_image(tmp_path / "out" / name).shape == (1, 3, 20, 31)


def test_demo_writes_to_its_folder_and_prints_where(call, monkeypatch):
    from trace_fast import demo

    monkeypatch.setattr(demo, "run", lambda output: output / "panel.png")
    result = call("demo", "-o", "some/folder")
    assert (result.exit_code, result.stdout) == (0, f"{os.path.join('some', 'folder', 'panel.png')}\n")
    assert os.path.isdir("some/folder")


def test_demo_reports_a_missing_package(call, monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage", None)
    result = call("demo", "-o", "out")
    assert result.exit_code == 2
    assert result.stderr == "trace-fast: demo: scikit-image must be installed: pip install 'trace_fast[eval]'\n"


def test_backends_prints_the_table(call):
    result = call("backends")
    assert (result.exit_code, result.stdout) == (0, f"{trace_fast.backends()}\n")


def test_backends_refuses_a_wrong_choice(call, monkeypatch):
    monkeypatch.setenv("TRACE_FAST_BACKEND", "abacus")
    result = call("backends")
    assert result.exit_code == 2
    assert "TRACE_FAST_BACKEND must be" in result.stderr


def test_version(call):
    result = call("--version")
    assert (result.exit_code, result.stdout) == (0, f"trace-fast {trace_fast.__version__}\n")


def test_help_names_every_command(call):
    for result in (call("--help"), call("-h")):
        assert result.exit_code == 0
        for command in ("edges", "demo", "backends"):
            assert command in result.stdout
    assert "--timestep" in call("edges", "--help").stdout


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_is_whole_in_80_columns(call, command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert "…" not in call(command, "--help").stdout


def test_help_keeps_patterns_and_has_flags_for_fields(call):
    assert "'photos/*/*.jpg'" in call("edges", "--help").stdout
    assert "labels_student" not in call("distill", "--help").stdout


def test_help_says_what_the_exit_status_means(call):
    text = " ".join(call("--help").stdout.split())
    assert "Exit status: 0 all is well, 1 some images failed and the others are done, 2 the command was refused" in text


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
@pytest.mark.parametrize(
    ("words", "completions"),
    [
        ("trace-fast s", {"segment", "scenes"}),
        ("trace-fast edges --over", {"--overlay", "--overlay-format", "--overwrite"}),
        ("trace-fast edges --model pix", {"pixart", "pixart-512"}),
    ],
)
def test_completion(monkeypatch, shell, words, completions):
    monkeypatch.setenv("_TRACE_FAST_COMPLETE", f"complete_{shell}")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(words.count(" ")))
    monkeypatch.setenv("_TYPER_COMPLETE_ARGS", words)
    monkeypatch.setenv("_TYPER_COMPLETE_FISH_ACTION", "get-args")
    result = CliRunner().invoke(cli.app, prog_name="trace-fast")
    assert set(re.findall(r"[\w-]+", result.stdout)) >= completions


@pytest.mark.slow
def test_help_loads_nothing_heavy():
    code = (
        "import sys; from trace_fast.cli import app; sys.argv = ['trace-fast', '--help'];"
        "app(standalone_mode=False);"
        "sys.exit(bool({'PIL', 'matplotlib', 'diffusers', 'triton'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, stdout=subprocess.DEVNULL).returncode == 0
