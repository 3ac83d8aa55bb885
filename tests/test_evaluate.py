"""`trace_fast.evaluate` and its command as a whole: files, resumption after a kill, faults reported before counting."""

import csv
import json
import os
import re
import subprocess
import sys
import tarfile
import time
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy import ndimage
from tiny import embedded, student
from typer.testing import CliRunner

pytest.importorskip("skimage", reason="needs scikit-image: pip install 'trace_fast[eval]'")
pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'trace_fast[eval]'")

import trace_fast
from trace_fast import cli
from trace_fast.evaluation import (
    Method,
    api,
    count_edges,
    evaluate,
    find_contours,
    methods,
    open_dataset,
    open_method,
    report,
    run,
    score_edges,
)

REPORT = {"report.json", "report.csv", "report.md", "images.csv", "curves.png"}


def make_photo(folder, name, seed=0, height=40, width=56, ending="png"):
    """Write a photograph of a few rectangles, its label map, and a blurred map of the contours."""
    random = np.random.default_rng(seed)
    labels = np.zeros((height, width), np.uint8)
    for label in (1, 2, 3):
        top, left = random.integers(2, height // 2), random.integers(2, width // 2)
        labels[top : top + random.integers(8, 18), left : left + random.integers(8, 26)] = label
    colors = random.integers(40, 256, (4, 3))
    pixels = (colors[labels] + random.normal(0, 9, (height, width, 3))).clip(0, 255).astype(np.uint8)
    lines = np.float32(find_contours(labels).lines[0])
    strength = ndimage.gaussian_filter(lines, 1) * 2.5 + random.random(labels.shape) / 9
    pictures = {"images": pixels, "inst": labels, "maps": np.uint8(255 * (strength / strength.max()))}
    for kind, picture in pictures.items():
        (folder / kind).mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(folder / kind / f"{name}.{ending if kind == 'images' else 'png'}")


def write_shard(path, photos):
    """Write a tar or parquet file of photographs."""
    if path.suffix == ".tar":
        with tarfile.open(path, "w") as archive:
            for photo in photos:
                archive.add(photo, photo.name)
        return
    import pyarrow.parquet

    columns = {"key": [photo.stem for photo in photos], "bytes": [photo.read_bytes() for photo in photos]}
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


@pytest.fixture
def call(tmp_path, monkeypatch):
    """Run the command inside an empty folder; few resamples, as scores have tests of their own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(api, "RESAMPLES", 20)

    def call(*arguments):
        words = ["evaluate", *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", ["trace-fast", *words])
        return CliRunner().invoke(cli.app, words)

    return call


@pytest.fixture
def counted(monkeypatch):
    """Collect the sizes of maps that are counted, not read from files of an earlier run."""
    sizes = []

    def spy(edges, *arguments, real=run.count_edges, **options):
        sizes.append(edges.shape)
        return real(edges, *arguments, **options)

    monkeypatch.setattr(run, "count_edges", spy)
    return sizes


@pytest.fixture
def no_pictures(monkeypatch):
    """Leave curves and sheets out, which take most of the time of a small run."""
    monkeypatch.setattr(report, "plot_curves", lambda scores, path: path.touch())
    monkeypatch.setattr(report, "contact_sheet", lambda *arguments, **options: Image.new("RGB", (2, 2)))


@pytest.fixture
def data(tmp_path):
    for index in range(8):
        make_photo(tmp_path / "data", f"p{index}", index)
    return tmp_path / "data"


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def count_files(folder):
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.glob("counts/*/*.npz")}


class TestReport:
    @pytest.mark.slow
    def test_every_file(self, call, data, tmp_path):
        specs = ("sobel", "edges of Canny=canny", "HED=maps:data/maps")
        arguments = ("--data", "data", "-o", "some/out", *(word for spec in specs for word in ("--method", spec)))
        result = call(*arguments)
        assert (result.exit_code, result.stderr) == (0, "")
        out = tmp_path / "some" / "out"
        sheets = {"sheet_sobel.png", "sheet_edges_of_Canny.png", "sheet_HED.png"}
        assert set(files(out)) == REPORT | sheets | {"differences.md"}
        assert len(list((out / "counts").iterdir())) == 3 and len(list(out.glob("counts/*/*"))) == 24

        command = (
            "trace-fast evaluate --data data -o some/out --method sobel --method 'edges of Canny=canny' "
            "--method HED=maps:data/maps"
        )
        table = (out / "report.md").read_text()
        assert table.endswith(f"\n\n8 images; `{command}`.\n")
        assert result.stdout.startswith(table.replace(f"; `{command}`", ""))
        head, rule, *rows = [line.split(" | ") for line in table.splitlines()[:5]]
        assert {len(row) for row in (head, rule, *rows)} == {11}

        report = json.loads((out / "report.json").read_text())
        assert (report["command"], report["distance"], report["notes"]) == (command, 0.0075, [])
        names = list(report["methods"])
        assert set(names) == {"sobel", "edges of Canny", "HED"} and names[-1] == "HED"
        assert [row[0].removeprefix("| ") for row in rows] == names
        for row, figures in zip(rows, report["methods"].values(), strict=True):
            assert float(row[1]) == pytest.approx(figures["ods"], abs=0.0006)
            assert figures["images"] == 8 and 0.2 < figures["ods"] <= figures["ois"] + 0.01
            assert figures["by"]["side"]["touching"][1] + figures["by"]["side"]["background"][1] > 0
        assert list(report["differences"]) == ["edges of Canny", "HED"]
        for name, difference in report["differences"].items():
            assert difference["ods"][0] == report["methods"][name]["ods"] - report["methods"]["sobel"]["ods"]
        assert "Difference to sobel, " in (out / "differences.md").read_text()
        assert {len(curve["recall"]) for curve in report["curves"].values()} == {99}

        with open(out / "report.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        assert [row["method"] for row in rows] == names
        for row in rows:
            assert float(row["ods"]) == pytest.approx(report["methods"][row["method"]]["ods"], abs=1e-12)
        with open(out / "images.csv", newline="") as file:
            images = list(csv.DictReader(file))
        assert [row["image"] for row in images] == [f"p{index}" for index in range(8)]
        photos = open_dataset(data).photos
        for name, spec in zip(("sobel", "HED"), (specs[0], specs[2]), strict=True):
            method = open_method(spec)
            scores = score_edges([count_edges(method.edges(photo), photo.contours()) for photo in photos])
            assert report["methods"][name]["ods"] == pytest.approx(scores.ods, abs=1e-9)
            assert [float(row[name]) for row in images] == pytest.approx(scores.f_per_image, abs=1e-9)
        for name in ("curves.png", *sheets):
            with Image.open(out / name) as picture:
                assert picture.format == "PNG" and min(picture.size) > 300
                assert len(picture.convert("RGB").getcolors(10**7)) > 50

    @pytest.mark.slow
    def test_a_second_run_computes_nothing_and_writes_the_same(self, call, data, tmp_path, counted, monkeypatch):
        arguments = ("--data", data, "-o", "out", "--method", "sobel")
        assert call(*arguments).exit_code == 0
        assert len(counted) == 8
        before, times = files(tmp_path / "out"), count_files(tmp_path / "out")
        traced = []
        real = methods._read_luminance
        monkeypatch.setattr(methods, "_read_luminance", lambda photo: traced.append(photo.name) or real(photo))
        assert call(*arguments).exit_code == 0
        assert files(tmp_path / "out") == before
        assert len(counted) == 8 and count_files(tmp_path / "out") == times
        assert len(traced) == 6  # of the sheet

    @pytest.mark.usefixtures("no_pictures")
    def test_settings_have_counts_of_their_own(self, call, data, counted):
        lines, maps = "m=lines:data/maps", "m=maps:data/maps"
        for number, more in (
            (8, ("--method", lines)),
            (16, ("--method", lines, "--distance", 0.02)),
            (16, ("--method", lines)),
            (24, ("--method", maps)),
            (32, ("--method", maps, "--suppression", "hessian")),
            (32, ("--method", lines, "--suppression", "hessian")),  # lines are scored as they are
            (32, ("--method", maps, "--suppression", "bsds")),
            (40, ("--method", maps, "--ignore", 2)),
        ):
            assert call("--data", data, "-o", "out", *more).exit_code == 0
            assert len(counted) == number

    @pytest.mark.usefixtures("no_pictures")
    def test_suppression_reaches_scores_and_report(self, call, data, tmp_path):
        photos, method = open_dataset(data).photos, open_method(f"m=maps:{data / 'maps'}")
        ods = set()
        for suppression in ("bsds", "hessian"):
            counts = [count_edges(method.edges(photo), photo.contours(), suppression=suppression) for photo in photos]
            arguments = ("--data", data, "-o", "out", "--method", "m=maps:data/maps", "--suppression", suppression)
            assert call(*arguments).exit_code == 0
            report = json.loads((tmp_path / "out" / "report.json").read_text())
            assert report["suppression"] == suppression
            assert report["methods"]["m"]["ods"] == pytest.approx(score_edges(counts).ods, abs=1e-9)
            ods.add(round(report["methods"]["m"]["ods"], 6))
        assert len(ods) == 2

    @pytest.mark.parametrize("ending", ["tar", "parquet"])
    @pytest.mark.usefixtures("no_pictures")
    def test_maps_in_shards_have_the_scores_of_files(self, call, data, tmp_path, ending):
        if ending == "parquet":
            pytest.importorskip("pyarrow", reason="needs pyarrow: pip install 'trace_fast[data]'")
        paths = sorted((data / "images").iterdir())
        (tmp_path / "shards").mkdir()
        for name, half in (("a", paths[:5]), ("b", paths[5:])):
            write_shard(tmp_path / f"{name}.{ending}", half)
        arguments = ["edges", tmp_path / f"a.{ending}", tmp_path / f"b.{ending}", "-o", tmp_path / "shards"]
        size = ["--size", "16x24", "--device", "cpu"]
        assert CliRunner().invoke(cli.app, [*map(str, arguments), *size]).exit_code == 0
        arguments = ["edges", data / "images", "-o", tmp_path / "files"]
        assert CliRunner().invoke(cli.app, [*map(str, arguments), *size]).exit_code == 0
        (tmp_path / "shards" / f"._a.{ending}").write_bytes(b"\0\5\x16\7")  # of macOS
        words = [word for name in ("files", "shards") for word in ("--method", f"{name}=maps:{name}")]
        assert call("--data", data, "-o", "out", *words).exit_code == 0
        scores = json.loads((tmp_path / "out" / "report.json").read_text())["methods"]
        assert scores["files"]["ods"] > 0 and {**scores["files"]} == {**scores["shards"]}
        result = call("--data", data, "-o", "out", "--method", f"half=maps:shards/a.{ending}")
        assert result.exit_code == 2 and "p5: " in result.stderr and "p4: " not in result.stderr
        assert f"shards/a.{ending} cannot be read: evaluate: maps must have the edges of every image" in result.stderr

    @pytest.mark.parametrize("ending", ["tar", "parquet"])
    def test_damaged_shards_of_maps_are_named(self, call, data, tmp_path, ending):
        if ending == "parquet":
            arrow = pytest.importorskip("pyarrow", reason="needs pyarrow: pip install 'trace_fast[data]'")
            import pyarrow.parquet

            keys = arrow.py_buffer(b"\xff"), arrow.array([0, 1], arrow.int32()).buffers()[1]
            keys = arrow.Array.from_buffers(arrow.string(), 1, [None, keys[1], keys[0]])
            pyarrow.parquet.write_table(arrow.table({"key": keys, "edges": [b""]}), tmp_path / "a.parquet")
        else:
            member = tarfile.TarInfo("p0.png")
            member.pax_headers = {"GNU.sparse.major": "0", "GNU.sparse.map": "x", "GNU.sparse.size": "9"}
            with tarfile.open(tmp_path / "a.tar", "w") as archive:
                archive.addfile(member)
        result = call("--data", data, "-o", "out", "--method", f"m=maps:a.{ending}")
        assert result.exit_code == 2
        assert f"evaluate: maps must be complete {ending} files, got 'a.{ending}': " in result.stderr

    @pytest.mark.usefixtures("no_pictures")
    def test_limit_and_images_without_truth(self, call, data, tmp_path):
        (data / "inst" / "p0.png").unlink()
        Image.new("L", (56, 40)).save(data / "inst" / "p1.png")
        result = call("--data", data, "-o", "out", "--method", "sobel", "--limit", 3)
        assert result.exit_code == 0
        notes = [f"p0: no ground truth in {data / 'inst'}", "p1: no contour in its ground truth"]
        assert result.stderr == "".join(f"trace-fast: {note}\n" for note in notes)
        report = json.loads((tmp_path / "out" / "report.json").read_text())
        assert report["notes"] == notes and report["methods"]["sobel"]["images"] == 2

    @pytest.mark.usefixtures("no_pictures")
    def test_maps_without_photographs(self, call, data, tmp_path):
        os.rename(data / "images", tmp_path / "images")
        assert call("--data", data, "-o", "out", "--method", "m=maps:data/maps").exit_code == 0
        result = call("--data", data, "-o", "out", "--method", "m=maps:data/maps", "--method", "sobel")
        assert result.exit_code == 2
        assert "got 8 problems;" in result.stderr and "\n  p7: sobel needs its image\n" in result.stderr

    @pytest.mark.usefixtures("no_pictures")
    def test_the_embedded_model(self, call, tmp_path):
        make_photo(tmp_path / "data", "a", height=20, width=31)
        result = call("--data", "data", "-o", "out", "--method", "mini@0", "--device", "cpu")
        assert (result.exit_code, result.stderr) == (0, "")
        assert set(files(tmp_path / "out")) == REPORT | {"sheet_mini_0.png"}
        report = json.loads((tmp_path / "out" / "report.json").read_text())
        assert 0 < report["methods"]["mini@0"]["ods"] <= 1


class TestResumption:
    @pytest.mark.slow
    @pytest.mark.usefixtures("no_pictures")
    def test_after_a_kill(self, call, tmp_path, counted, monkeypatch):
        for index in range(12):
            make_photo(tmp_path / "data", f"p{index:02}", index)
        arguments = ("--data", "../data", "-o", "out", "--method", "sobel", "--method", "m=maps:../data/maps")
        code = (
            "import time; from trace_fast.evaluation import methods; real = methods._read_luminance;"
            "methods._read_luminance = lambda photo: time.sleep(0.3) or real(photo);"
            "from trace_fast.cli import main; main()"
        )
        killed, whole = tmp_path / "killed", tmp_path / "whole"
        killed.mkdir(), whole.mkdir()
        process = subprocess.Popen(
            [sys.executable, "-c", code, "evaluate", *arguments], cwd=killed, stderr=subprocess.PIPE, text=True
        )
        try:
            deadline = time.monotonic() + 300
            while len(count_files(killed / "out")) < 3 and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.01)
        finally:
            process.kill()  # SIGKILL
            _, error = process.communicate()
        finished = count_files(killed / "out")
        assert 3 <= len(finished) < 12, error
        assert not REPORT & set(os.listdir(killed / "out"))

        monkeypatch.chdir(killed)
        assert call(*arguments).exit_code == 0
        assert len(counted) == 24 - len(finished)
        times = count_files(killed / "out")
        assert {name: times[name] for name in finished} == finished
        monkeypatch.chdir(whole)
        assert call(*arguments).exit_code == 0
        assert files(killed / "out") == files(whole / "out")

    @pytest.mark.usefixtures("no_pictures")
    @pytest.mark.parametrize("damage", ["cut", "text", "empty"])
    def test_with_a_damaged_file(self, call, data, tmp_path, counted, damage):
        arguments = ("--data", data, "-o", "out", "--method", "m=lines:data/maps")
        assert call(*arguments).exit_code == 0
        before = files(tmp_path / "out")
        (path,) = (tmp_path / "out").glob("counts/*/p3.npz")
        content, times = path.read_bytes(), count_files(tmp_path / "out")
        path.write_bytes({"cut": content[:-50], "text": b"no counts", "empty": b""}[damage])
        counted.clear()
        result = call(*arguments)
        assert result.exit_code == 0 and len(counted) == 1
        assert result.stderr.startswith(f"trace-fast: {path.relative_to(tmp_path)} is damaged and computed again: ")
        assert result.stdout.startswith("| method |")
        assert path.read_bytes() == content and files(tmp_path / "out") == before
        after = count_files(tmp_path / "out")
        assert [name for name in times if after[name] != times[name]] == [str(path.relative_to(tmp_path / "out"))]

    @pytest.mark.usefixtures("no_pictures")
    @pytest.mark.parametrize("folder", ["maps", "inst"])
    def test_with_a_changed_file(self, call, data, tmp_path, counted, folder):
        arguments = ("--data", data, "-o", "out", "--method", "m=lines:data/maps")
        assert call(*arguments).exit_code == 0
        before = json.loads((tmp_path / "out" / "report.json").read_text())
        os.replace(data / folder / "p5.png", data / folder / "p2.png")
        Image.new("L", (56, 40), 1).save(data / folder / "p5.png")
        counted.clear()
        result = call(*arguments)
        assert (result.exit_code, len(counted)) == (0, 2 if folder == "maps" else 1)  # no contour is left in p5
        after = json.loads((tmp_path / "out" / "report.json").read_text())
        assert before["methods"]["m"]["ods"] > after["methods"]["m"]["ods"]

    @pytest.mark.usefixtures("no_pictures")
    @pytest.mark.parametrize(
        ("level", "changed"),
        [("@0", "model.safetensors"), ("", "student/lora.safetensors"), ("", "student/decoder.safetensors")],
    )
    def test_with_a_model_that_was_trained_further(self, call, tmp_path, counted, level, changed):
        make_photo(tmp_path / "data", "a", height=20, width=31)
        model = embedded(tmp_path / "model")
        student(model / "student", model, (32, 48))
        arguments = ("--data", "data", "-o", "out", "--method", f"m={model}{level}", "--device", "cpu")
        for _ in range(2):
            assert call(*arguments).exit_code == 0
        assert len(counted) == 1
        save_file({name: 1.1 * values for name, values in load_file(model / changed).items()}, model / changed)
        assert call(*arguments).exit_code == 0
        assert len(counted) == 2

    @pytest.mark.slow
    def test_with_a_student_that_was_changed_in_part(self, call, tmp_path, counted):
        make_photo(tmp_path / "data", "a", height=20, width=31)
        model = embedded(tmp_path / "model")
        folder = student(model / "student", model, (32, 48))
        arguments = ("--data", "data", "-o", "out", "--method", f"m={model}", "--device", "cpu")
        assert call(*arguments).exit_code == 0
        decoder = load_file(folder / "decoder.safetensors")
        decoder["values"][-1] *= 3
        save_file(decoder, folder / "decoder.safetensors")
        assert call(*arguments).exit_code == 0
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "timestep": 500}))
        assert call(*arguments).exit_code == 0
        assert len(counted) == 3


class TestBadData:
    @pytest.mark.usefixtures("no_pictures")
    def test_all_problems_are_listed_before_any_counting(self, call, tmp_path, counted):
        data = tmp_path / "data"
        names = ["good", "fine", "missing", "size", "text", "cut", "rgb", "photo"]
        names += ["truth", "other", "void", "new", "twice"]
        for seed, name in enumerate(names):
            make_photo(data, name, seed, ending="jpg" if name == "photo" else "png")
        maps, inst, images = data / "maps", data / "inst", data / "images"
        (maps / "missing.png").unlink()
        Image.new("L", (40, 56)).save(maps / "size.png")
        (maps / "text.png").write_text("no picture")
        for path in (maps / "cut.png", images / "photo.jpg", inst / "truth.png"):
            path.write_bytes(path.read_bytes()[:-100])
        Image.new("RGB", (56, 40)).save(maps / "rgb.png")
        Image.fromarray(np.eye(40, 57, dtype=np.uint8)).save(inst / "other.png")
        Image.new("L", (56, 40)).save(inst / "void.png")
        (inst / "new.png").unlink()
        Image.new("RGB", (56, 40)).save(images / "twice.bmp")
        Image.new("L", (56, 40)).save(inst / "lost.png")

        arguments = ("--data", "data", "-o", "out", "--method", "m=maps:data/maps", "--method", "sobel")
        result = call(*arguments)
        assert (result.exit_code, result.stdout) == (2, "")
        assert counted == [] and files(tmp_path / "out") == {} and not (tmp_path / "out" / "counts").exists()
        lines = result.stderr.splitlines()
        notes = ["new: no ground truth in data/inst", "void: no contour in its ground truth"]
        assert lines[:2] == [f"trace-fast: {note}" for note in notes]
        assert lines[2] == (
            "trace-fast: evaluate: data must be free of problems, got 11 problems; skip_bad leaves these images out:"
        )
        expected = [
            r"twice: 2 image files of that name",
            r"lost: no image in data/images",
            r"cut: data/maps/cut\.png cannot be read: .*truncated.*",
            r"missing: data/maps/missing\.png cannot be read: .*No such file.*",
            r"other: data/images/other\.png has size \(40, 56\), the ground truth \(40, 57\)",
            r"other: data/maps/other\.png has size \(40, 56\), the ground truth \(40, 57\)",
            r"photo: data/images/photo\.jpg cannot be read: .*truncated.*",
            r"rgb: data/maps/rgb\.png cannot be read: maps must be of one channel with 8 or 16 bits, got mode RGB",
            r"size: data/maps/size\.png has size \(56, 40\), the ground truth \(40, 56\)",
            r"text: data/maps/text\.png cannot be read: read_map: path must be an image file, got .*",
            r"truth: ground truth data/inst/truth\.png cannot be read: .*",
        ]
        assert len(lines) == 3 + len(expected)
        for line, pattern in zip(lines[3:], expected, strict=True):
            assert re.fullmatch(f"  {pattern}", line)

        result = call(*arguments, "--skip-bad")
        assert result.exit_code == 0
        assert len(counted) == 4  # two methods on what is good and fine
        report = json.loads((tmp_path / "out" / "report.json").read_text())
        assert report["methods"]["m"]["images"] == 2
        assert report["notes"] == notes + [line[2:] for line in lines[3:]]

    def test_nothing_is_left(self, call, tmp_path):
        make_photo(tmp_path / "data", "a")
        Image.new("L", (56, 40)).save(tmp_path / "data" / "inst" / "a.png")
        for extra in ((), ("--skip-bad",)):
            result = call("--data", "data", "-o", "out", "--method", "sobel", *extra)
            assert result.exit_code == 2
            assert result.stderr == (
                "trace-fast: a: no contour in its ground truth\n"
                "trace-fast: evaluate: data must hold an image with contours, got none in 'data'\n"
            )

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("--method", "sobbel"), r"trace-fast: load: model must be one of .* got 'sobbel'"),
            (
                ("--method", "x=maps:no"),
                r"trace-fast: evaluate: method x must name a folder of maps, or a tar or parquet file, got 'no'",
            ),
            (("--method", "mini@x"), r"trace-fast: evaluate: timestep of method mini@x must be iep or an integer.*'x'"),
            (
                ("--method", "sobel", "--method", "sobel=canny"),
                r"trace-fast: evaluate: methods must have different names, such as NAME=SPEC, got sobel, sobel",
            ),
            (
                ("--method", "a b=sobel", "--method", "a/b=canny"),  # of one sheet
                r"trace-fast: evaluate: methods must have different names, such as NAME=SPEC, got a b, a/b",
            ),
            (
                ("--method", "sobel", "--data", "nowhere"),
                r"trace-fast: evaluate: data must hold ground truth, got no inst or .* in 'nowhere'",
            ),
            (
                ("--method", "sobel", "--truth", "nowhere"),
                r"trace-fast: evaluate: data must hold ground truth, got no nowhere in 'data'",
            ),
            (("--method", "sobel", "-o", "data/inst/a.png"), r"trace-fast: the folder '.*' cannot be written to: .*"),
            (
                ("--method", "sobel", "--truth", "bad.json"),
                r"trace-fast: read_annotations: path must be a JSON file, got 'bad.json': .*",
            ),
        ],
    )
    def test_refusals_are_one_line(self, call, tmp_path, counted, arguments, message):
        make_photo(tmp_path / "data", "a")
        (tmp_path / "bad.json").write_text("{")
        result = call("--data", "data", "-o", "out", *arguments)
        assert (result.exit_code, result.stdout, counted) == (2, "", [])
        assert re.fullmatch(message + "\n", result.stderr)

    @pytest.mark.parametrize("missing", ["--data", "--output"])
    def test_missing_options(self, call, missing):
        options = {"--data": "data", "--output": "out", "--method": "sobel"}
        del options[missing]
        result = call(*(word for pair in options.items() for word in pair))
        assert result.exit_code == 2 and missing in result.stderr


class TestCall:
    """`trace_fast.evaluate` in Python."""

    @pytest.fixture(autouse=True)
    def few_resamples(self, monkeypatch):
        monkeypatch.setattr(api, "RESAMPLES", 20)

    def test_it_is_public(self):
        assert trace_fast.evaluate is evaluate
        assert set(trace_fast.evaluation.__all__) <= set(dir(trace_fast.evaluation))

    def test_equals_the_command(self, call, data, tmp_path):
        assert call("--data", data, "-o", "out", "--method", "sobel", "--method", "m=maps:data/maps").exit_code == 0
        result = evaluate(data, {"sobel": "sobel", "m": f"maps:{data / 'maps'}"})
        assert not list(tmp_path.glob("*.npz"))
        result.save("again", command=json.loads((tmp_path / "out" / "report.json").read_text())["command"])
        assert files(tmp_path / "again") == files(tmp_path / "out")
        assert not (tmp_path / "again" / "counts").exists()

    def test_the_report(self, data, tmp_path):
        constant = Method("constant", "1", lambda photo: np.full((40, 56), 0.5, np.float32))
        (data / "inst" / "p0.png").unlink()
        result = evaluate(data, ["sobel", constant], limit=4)
        assert list(result.edges) == ["sobel", "constant"] and (result.masks, result.panoptic) == ({}, {})
        assert result.edges["sobel"].ods > result.edges["constant"].ods
        assert [photo.name for photo in result.photos] == ["p1", "p2", "p3", "p4"]
        assert result.notes == [f"p0: no ground truth in {data / 'inst'}"]
        assert result.parameters is None and result.edges["sobel"].images == 4
        lines = str(result).splitlines()
        assert lines[0].startswith("| method | ODS |") and "4 images." in lines
        assert [line.split(" | ")[0] for line in lines[2:4]] == ["| constant", "| sobel"]  # the best last
        assert repr(result) == "Report(edges=['sobel', 'constant'], masks=[], panoptic=[])"

    def test_a_call_continues_where_another_was_interrupted(self, data, tmp_path, counted):
        sobel = open_method("sobel")

        def fail(photo):
            if photo.name == "p5":
                raise KeyboardInterrupt
            return sobel.edges(photo)

        with pytest.raises(KeyboardInterrupt):
            evaluate(data, replace(sobel, edges=fail), cache=tmp_path / "cache")
        finished = len(count_files(tmp_path / "cache"))
        assert 0 < finished < 8
        counted.clear()
        evaluate(data, sobel, cache=tmp_path / "cache")
        assert len(counted) == 8 - finished

    def test_a_model_in_memory(self, data, tmp_path):
        folder = embedded(tmp_path / "plain")
        tracer = trace_fast.Tracer.from_pretrained(folder, device="cpu")
        result = evaluate(data, {"memory": tracer, "file": str(folder)}, device="cpu", limit=2)
        assert result.edges["memory"].f_per_image.tolist() == result.edges["file"].f_per_image.tolist()
        assert list(evaluate(data, tracer, limit=1).edges) == [str(folder)]

    def test_a_table_of_pandas(self, data):
        pandas = pytest.importorskip("pandas", reason="needs pandas")
        result = evaluate(data, ["sobel", f"m=maps:{data / 'maps'}"])
        table = result.to_pandas()
        assert isinstance(table, pandas.DataFrame)
        assert list(table.index) == [("edges", "sobel"), ("edges", "m")]
        for name, scores in result.edges.items():
            row = table.loc[("edges", name)]
            assert row["ods"] == scores.ods and row["images"] == 8
            assert (row["ap_low"], row["ap_high"]) == scores.intervals["ap"]
        assert report.Report().to_pandas().empty

    def test_without_pandas(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "pandas", None)
        with pytest.raises(RuntimeError, match=r"^to_pandas: pandas must be installed"):
            report.Report().to_pandas()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({}, "methods must be given, or results, got none"),
            (
                {"methods": "sobel", "table": "rows", "baseline": "x.json"},
                "table must be 'backbones' or",
            ),
            ({"methods": "sobel", "table": "backbones"}, "table and baseline must be given together, got 'backbones' "),
            ({"methods": "sobel", "baseline": "x.json"}, "table and baseline must be given together, got None and 'x"),
            ({"table": "backbones", "baseline": "x.json"}, "methods must be given for a table, got none"),
            ({"table": "components", "baseline": "x.json"}, "methods must be one MODEL without .*, got none"),
            (
                {"methods": ["mini", "sobel"], "table": "components", "baseline": "x.json"},
                "methods must be one MODEL without a timestep .*, got mini, sobel",
            ),
            ({"methods": "sobel", "suppression": "none"}, "suppression must be 'bsds' or 'hessian', got 'none'"),
            ({"methods": "sobel", "limit": 0}, "limit must be at least 1 or None, got 0"),
            ({"methods": "sobel", "threshold": 0}, r"threshold must be above 0 and at most 1, got \[0\]"),
            ({"methods": "sobel", "threshold": [0.5, 1.5]}, r"threshold must be above 0 and at most 1, got \[0.5, 1.5"),
            ({"methods": "sobel", "threshold": [0.5, 0.6]}, "threshold must be one, or one for each of 1 methods, got"),
            ({"results": ["a/x.json", "b/x.json"]}, "results must have different names, such as NAME=FILE, got x tw"),
            (
                {"methods": "sobel", "results": "b/x.json", "table": "backbones", "baseline": "a/x.json"},
                "results must have other names than the baseline, got x",
            ),
        ],
    )
    def test_refused_arguments(self, tmp_path, options, message):
        with pytest.raises(ValueError, match=f"^evaluate: {message}"):
            evaluate(tmp_path, **options)
