"""Jobs over many images: what they read, continue and refuse; threads and processes do not change their bytes."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from trace_fast.api import load
from trace_fast.cli import app
from trace_fast.io.claims import CLAIM, claim_folder, make_stage
from trace_fast.io.images import read_image, resize, restore_edges
from trace_fast.jobs.inputs import list_inputs, name_results
from trace_fast.jobs.manifest import MANIFEST, Manifest, open_manifest
from trace_fast.jobs.parts import Part, find_device, find_part
from trace_fast.jobs.shards import TarWriter
from trace_fast.jobs.tasks import read_photo
from trace_fast.masks.rle import decode_mask

SIZE = ("--size", "16x24", "--device", "cpu")


def make_photo(path, seed=0, height=20, width=31):
    """Write a photo of noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def make_tar(path, contents):
    """Write a tar file of bytes by name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in contents.items():
            member = tarfile.TarInfo(name)
            member.size, member.mtime = len(content), 1_700_000_000
            archive.addfile(member, io.BytesIO(content))
    return path


def read_tar(path):
    """Return the contents of the members of a tar file by name."""
    with tarfile.open(path) as archive:
        return {member.name: archive.extractfile(member).read() for member in archive}


def list_tree(folder):
    """Return the contents of all files by name, but those that begin with a dot."""
    files = {path.relative_to(folder).as_posix(): path for path in Path(folder).rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in sorted(files.items()) if not path.name.startswith(".")}


@pytest.fixture
def call(tmp_path, monkeypatch):
    """Run a command inside an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(command, *words):
        return CliRunner().invoke(app, [command, *map(str, words), "-o", "out", *SIZE])

    return call


class TestInputs:
    def names(self, *inputs, **options):
        return [file.name for file in list_inputs("edges", inputs, **options).files]

    @pytest.fixture(autouse=True)
    def photos(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        for name in ("in/b.jpg", "in/a.png", "in/deep/er/c.webp", "in/deep/d.jpg", "in/.trash/e.jpg", "f.jpg"):
            make_photo(tmp_path / name)
        (tmp_path / "in" / "notes.md").write_text("")
        make_tar(tmp_path / "in" / "deep" / "more.tar", {})

    def test_folders(self):
        assert self.names("in") == ["a.png", "b.jpg"]
        everything = ["a.png", "b.jpg", "deep/d.jpg", "deep/er/c.webp", "deep/more.tar"]
        assert self.names("in", recursive=True) == everything
        assert self.names("in", "f.jpg", Path("in/a.png")) == ["a.png", "b.jpg", "f.jpg"]

    def test_the_output_folder_and_linked_folders_are_left_out(self, tmp_path):
        make_photo(tmp_path / "in" / "out" / "a.png")
        (tmp_path / "in" / "link").symlink_to(tmp_path / "in" / "deep")
        listed = list_inputs("edges", ["in"], Path("in/out"), recursive=True)
        assert [file.name for file in listed.files if file.name.startswith(("out", "link"))] == []
        assert listed.left_out == ["left out of 'in': 1 file of another format (.md); 1 subfolder, not read"]

    def test_patterns_keep_the_folders_below_their_fixed_part(self):
        assert self.names("in/*.jpg") == ["b.jpg"]
        assert self.names("in/*/*.jpg") == ["deep/d.jpg"]
        assert self.names("**/*.webp") == ["in/deep/er/c.webp"]
        with pytest.raises(ValueError, match=r"got the pattern 'in/\*.bmp', which no file has"):
            self.names("in/*.bmp")

    def test_lists(self, tmp_path):
        (tmp_path / "list.txt").write_text("f.jpg\n\n  in/deep/d.jpg\nin/*.png\n")
        assert self.names("list.txt") == ["f.jpg", "d.jpg", "a.png"]
        (tmp_path / "list.txt").write_text("list.txt\n")
        with pytest.raises(ValueError, match=r"got the list 'list\.txt' in 'list\.txt'"):
            self.names("list.txt")
        (tmp_path / "list.txt").write_text("\n")
        with pytest.raises(ValueError, match=r"got none in 'list\.txt'"):
            self.names("list.txt")
        (tmp_path / "list.txt").write_bytes("f.jpg\r\na\u2028\r\x1c.jpg\n".encode("utf-8-sig"))
        assert self.names("list.txt") == ["f.jpg", "a\u2028\r\x1c.jpg"]
        for content in (b"f.jpg\nin/\0.png", b"\0/in.png", "f.jpg\n".encode("utf-16")):
            (tmp_path / "list.txt").write_bytes(content)
            with pytest.raises(ValueError, match=r"must be lists in UTF-8, got a zero byte in 'list\.txt'"):
                self.names("list.txt")

    @pytest.mark.parametrize(
        ("source", "reason"),
        [
            ("https://x.org/a.jpg", "got the address 'https://x.org/a.jpg'; download it"),
            ("s3://bucket/a.tar", "BatchEdges"),
            ("a.MP4", "by: ffmpeg -i a.MP4"),
        ],
    )
    def test_addresses_and_videos_are_refused_with_the_way(self, source, reason):
        for typed in (source, Path(source)):
            with pytest.raises(ValueError, match=reason):
                self.names(typed)

    def test_names_of_results(self):
        names = ["a.jpg", "a.png", "A.webp", "b.jpg", "deep/a.jpg", "c.jpg", "c_overlay.png"]
        assert name_results(names, ["png"]) == ["a.jpg", "a.png", "A.webp", "b", "deep/a", "c", "c_overlay"]
        assert name_results(names, ["png", "overlay.png"])[-2:] == ["c.jpg", "c_overlay.png"]


class TestManifest:
    SETTINGS = {"model": "mini", "bits": 8}  # noqa: RUF012 (not changed)

    def test_records_survive_a_process_that_is_killed(self, tmp_path):
        manifest = Manifest(tmp_path, self.SETTINGS, "edges")
        for name in ("b", "a"):
            (tmp_path / name).touch()
            manifest.add(name, [1, 2], images=1)
        with open(tmp_path / MANIFEST, "ab") as file:
            file.write(b'{"name": "c", "sta')  # the process is killed
        manifest = Manifest(tmp_path, self.SETTINGS, "edges")
        assert manifest.find("a", [1, 2], ["a"]) == {"name": "a", "stamp": [1, 2], "images": 1}
        assert manifest.find("a", [1, 3], ["a"]) is None
        assert manifest.find("a", [1, 2], ["gone"]) is None
        assert manifest.find("c", [1, 2], []) is None
        manifest.close()
        names = [json.loads(line).get("name") for line in (tmp_path / MANIFEST).read_text().splitlines()]
        assert names == [None, "a", "b"]

    def test_other_settings_are_refused(self, tmp_path):
        with open_manifest(tmp_path, self.SETTINGS, "edges") as manifest:
            manifest.add("image", [1, 2])
        with pytest.raises(ValueError, match=r"--overwrite must be given, got settings\.bits 8 instead of 16"):
            Manifest(tmp_path, {**self.SETTINGS, "bits": 16}, "edges")
        Manifest(tmp_path, {**self.SETTINGS, "bits": 16}, "edges", overwrite=True).close()

    def test_a_run_that_did_nothing_leaves_nothing_and_binds_no_other(self, tmp_path):
        Manifest(tmp_path, self.SETTINGS, "edges").close()
        assert not list(tmp_path.iterdir())
        Manifest(tmp_path, self.SETTINGS, "edges")  # as if killed
        Manifest(tmp_path, {**self.SETTINGS, "bits": 16}, "edges").close()

    def test_files_of_other_origin_are_refused(self, tmp_path):
        (tmp_path / "a.png").touch()
        with pytest.raises(ValueError, match=r"got '.*a.png', which is from elsewhere or damaged; --overwrite"):
            Manifest(tmp_path, self.SETTINGS, "edges", ["b.png", "a.png"])
        with open_manifest(tmp_path, self.SETTINGS, "edges", ["a.png"], overwrite=True) as manifest:
            manifest.add("a", [1, 2])
        Manifest(tmp_path, self.SETTINGS, "edges", ["a.png"]).close()

    def test_processes_that_share_a_folder(self, tmp_path):
        for index in (0, 1):
            with open_manifest(tmp_path, self.SETTINGS, "edges", part=Part(index, 2)) as manifest:
                manifest.add(f"image {index}", [1, 2])
        assert sorted(path.name for path in tmp_path.iterdir()) == [".trace-fast-1.jsonl", MANIFEST]
        with open_manifest(tmp_path, self.SETTINGS, "edges") as manifest:
            assert all(manifest.find(f"image {index}", [1, 2], []) for index in (0, 1))
        assert [path.name for path in tmp_path.iterdir()] == [MANIFEST]
        with open_manifest(tmp_path, self.SETTINGS, "edges") as manifest:
            assert manifest.find("image 1", [1, 2], [])

    @pytest.mark.parametrize(
        "damage",
        [
            lambda line: b"",
            lambda line: line[:20],
            lambda line: b"\0" * len(line),
            lambda line: b"[1]",
            lambda line: b"[" * 100_000,
            lambda line: b'{"name": "a"}',
            lambda line: line.replace(b'"images": 1', b'"images": -5'),
            lambda line: line.replace(b'"images": 1', b'"images": NaN'),
            lambda line: line.replace(b'"name": "a"', b'"name": ["a"]'),
        ],
    )
    def test_damaged_lines_do_not_count(self, tmp_path, damage):
        with open_manifest(tmp_path, self.SETTINGS, "edges") as manifest:
            for name in ("a", "b"):
                manifest.add(name, [1, 2], images=1, failures=0)
        content = (tmp_path / MANIFEST).read_bytes()
        settings, first, second, _ = content.split(b"\n")
        (tmp_path / MANIFEST).write_bytes(b"\n".join((settings, damage(first), second, b"")))
        with open_manifest(tmp_path, self.SETTINGS, "edges") as manifest:
            assert manifest.find("a", [1, 2], []) is None
            assert manifest.find("b", [1, 2], []) == {"name": "b", "stamp": [1, 2], "images": 1, "failures": 0}
            manifest.add("a", [1, 2], images=1, failures=0)
        assert (tmp_path / MANIFEST).read_bytes() == content

    @pytest.mark.parametrize("settings", [b"", b"\xff\xfe", b"[1]", b"{}", b'{"settings": {}, "hash": "0"}'])
    def test_damaged_settings_are_refused(self, tmp_path, settings):
        (tmp_path / MANIFEST).write_bytes(settings + b'\n{"name": "a"}\n')
        with pytest.raises(ValueError, match=r"\.trace-fast\.jsonl', which is from elsewhere or damaged; --overwrite"):
            Manifest(tmp_path, self.SETTINGS, "edges")
        Manifest(tmp_path, self.SETTINGS, "edges", overwrite=True).close()

    def test_parts_that_begin_with_other_settings_are_refused(self, tmp_path):
        with open_manifest(tmp_path, self.SETTINGS, "edges", part=Part(1, 2)):  # has done nothing yet
            for part in (Part(0, 2), Part()):
                with pytest.raises(ValueError, match=r"got settings\.bits 8 instead of 16"):
                    Manifest(tmp_path, {**self.SETTINGS, "bits": 16}, "edges", part=part)
            assert [path.name for path in tmp_path.glob("*.jsonl")] == [".trace-fast-1.jsonl"]

    def test_parts_that_begin_at_the_same_time(self, tmp_path, monkeypatch):
        rewrite, others = Manifest._rewrite, []

        def rewrite_late(manifest):
            if not others:
                others.append(None)
                others.append(Manifest(tmp_path, {**self.SETTINGS, "bits": 16}, "edges", part=Part(1, 2)))
            rewrite(manifest)

        monkeypatch.setattr(Manifest, "_rewrite", rewrite_late)
        with pytest.raises(ValueError, match=r"got settings\.bits 16 instead of 8"):
            Manifest(tmp_path, self.SETTINGS, "edges", part=Part(0, 2))
        others[1].close()
        assert not list(tmp_path.iterdir())

    def test_a_run_of_all_parts_is_alone(self, tmp_path):
        with (
            open_manifest(tmp_path, self.SETTINGS, "edges", part=Part(11, 12)),
            pytest.raises(RuntimeError, match="no other run writes to"),
            open_manifest(tmp_path, self.SETTINGS, "edges", overwrite=True),
        ):
            pass
        with open_manifest(tmp_path, self.SETTINGS, "edges"):
            assert [path.name for path in tmp_path.glob("*.lock")] == [CLAIM]

    def test_stages_of_earlier_runs_are_removed_and_those_of_other_parts_are_not(self, tmp_path):
        stages = [make_stage(tmp_path, index) for index in (0, 0, 1, 10)]
        (stages[0] / "a.tar").touch()
        with open_manifest(tmp_path, self.SETTINGS, "edges", part=Part(0, 12)):
            assert {*tmp_path.glob(".trace-fast-stage*")} == {*stages[2:]}
        with open_manifest(tmp_path, self.SETTINGS, "edges"):
            assert not list(tmp_path.glob(".trace-fast-stage*"))
            make_stage(tmp_path, 0)
        assert not list(tmp_path.iterdir())

    def test_names_that_are_too_long_are_those_of_no_file(self, tmp_path):
        name = "a" * 300
        manifest = Manifest(tmp_path, self.SETTINGS, "edges", [name])
        manifest.add("a", [1, 2])
        assert manifest.find("a", [1, 2], [name]) is None

    def test_each_part_has_a_claim(self, tmp_path):
        with claim_folder(tmp_path, "edges", 1), claim_folder(tmp_path, "edges"):
            for part in (0, 1):
                with pytest.raises(RuntimeError, match="no other run writes to"), claim_folder(tmp_path, "edges", part):
                    pass

    def test_the_part_of_a_process(self):
        assert find_part({}) == Part(0, 1)
        assert find_part({"RANK": "2", "WORLD_SIZE": "3", "SLURM_PROCID": "0"}) == Part(2, 3)
        assert find_part({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}) == Part(1, 2)
        # in a script of sbatch one process runs, whatever the number of tasks
        assert find_part({"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}) == Part(0, 1)
        assert find_part({"RANK": "", "WORLD_SIZE": "2"}) == Part(0, 1)

    def test_the_gpu_of_a_process(self):
        assert [find_device(4, {"LOCAL_RANK": str(rank), "SLURM_LOCALID": "0"}) for rank in (0, 3, 6)] == [
            "cuda:0",
            "cuda:3",
            "cuda:2",
        ]
        assert find_device(4, {"SLURM_LOCALID": "1"}) == "cuda:1"
        for gpus, environment in ((4, {}), (4, {"LOCAL_RANK": ""}), (1, {"LOCAL_RANK": "0"}), (0, {"LOCAL_RANK": "1"})):
            assert find_device(gpus, environment) is None

    def test_processes_of_torchrun_share_the_gpus(self, call, tmp_path, monkeypatch):
        """Ask for a model on the second of two GPUs that are not there."""
        make_photo(tmp_path / "in" / "a.jpg")
        monkeypatch.setenv("LOCAL_RANK", "1")
        monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
        for words in ((), ("--device", "cuda")):
            result = CliRunner().invoke(app, ["edges", "in", "-o", "out", *words])
            assert result.exit_code == 2 and "device must be present, got 'cuda:1'" in result.stderr
        assert call("edges", "in").exit_code == 0  # on the CPU, which it names


class TestPictures:
    @pytest.fixture(autouse=True)
    def photos(self, tmp_path):
        for index in range(6):
            make_photo(tmp_path / "in" / f"{index}.jpg", index)

    def test_what_is_done_is_skipped(self, call, tmp_path):
        assert call("edges", "in").stdout == "6 of 6 written to out\n"
        times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir() if path.suffix == ".png"}
        make_photo(tmp_path / "in" / "2.jpg", 9)
        (tmp_path / "out" / "4.png").unlink()
        before = list_tree("out")
        result = call("edges", "in")
        assert (result.exit_code, result.stdout) == (0, "6 of 6 written to out, 4 of them by an earlier run\n")
        again = {path.stem for path, changed in times.items() if path.stat().st_mtime_ns != changed}
        assert again == {"2", "4"}
        after = list_tree("out")
        assert {name for name in after if after[name] != before.get(name)} == {"2.png", "4.png"}

    @pytest.mark.parametrize(
        ("option", "difference"),
        [
            (("--bits", "16"), "settings.bits 8 instead of 16"),
            (("--stage", "1"), "settings.stage 2 instead of 1"),
            (("--overlay",), "settings.overlay None instead of jpg"),
        ],
    )
    def test_other_options_are_refused(self, call, option, difference):
        assert call("edges", "in").exit_code == 0
        before = list_tree("out")
        result = call("edges", "in", *option)
        assert result.exit_code == 2 and difference in result.stderr
        assert list_tree("out") == before
        assert call("edges", "in", *option, "--overwrite").exit_code == 0
        assert call("edges", "in", *option).stdout.endswith("6 of them by an earlier run\n")

    def test_other_weights_are_refused(self, call, monkeypatch):
        from trace_fast import Detector

        assert call("edges", "in").exit_code == 0
        monkeypatch.setattr(Detector, "hash_weights", lambda self: "others")
        result = call("edges", "in")
        assert result.exit_code == 2 and "instead of others" in result.stderr

    def test_failures_are_tried_again(self, call, tmp_path):
        (tmp_path / "in" / "3.jpg").write_bytes(b"")
        for earlier in ("", ", 5 of them by an earlier run"):
            result = call("edges", "in")
            assert (result.exit_code, result.stdout) == (1, f"5 of 6 written to out{earlier}\n")
            assert result.stderr.startswith("trace-fast: in/3.jpg: edges: image must be an image file")
        make_photo(tmp_path / "in" / "3.jpg")
        assert call("edges", "in").exit_code == 0

    def test_folders_and_clashes(self, call, tmp_path):
        make_photo(tmp_path / "in" / "deep" / "0.jpg")
        make_photo(tmp_path / "in" / "0.png")
        result = call("edges", "in", "--recursive", "--overlay")
        assert result.exit_code == 0, result.output
        names = list(list_tree("out"))
        assert names[:4] == ["0.jpg.png", "0.jpg_overlay.jpg", "0.png.png", "0.png_overlay.jpg"]
        assert names[-2:] == ["deep/0.png", "deep/0_overlay.jpg"]
        assert call("edges", "in", "--recursive", "--overlay").stdout.endswith("8 of them by an earlier run\n")

    @pytest.mark.parametrize("batch_size", [1, 4])
    def test_threads_and_parts_give_the_same_bytes(self, call, tmp_path, batch_size):
        trees, common = [], ("edges", "in", "--overlay", "--batch-size", batch_size)
        for options in ([("--workers", 1)], [("--workers", 3)], [("--part", "0/2"), ("--part", "1/2", "--workers", 2)]):
            for words in options:
                assert call(*common, *words).exit_code == 0
            trees.append(list_tree("out"))
            assert call(*common).stdout == "6 of 6 written to out, 6 of them by an earlier run\n"
            assert call("edges", "in", "--overlay", "--batch-size", 5).exit_code == 2  # edges may differ
            (tmp_path / "out").rename(tmp_path / f"out-{len(trees)}")
        assert trees[0] == trees[1] == trees[2] and len(trees[0]) == 12

    def test_parts_of_torchrun(self, call, monkeypatch):
        for rank, count in ((1, 3), (0, 6)):
            monkeypatch.setenv("WORLD_SIZE", "2")
            monkeypatch.setenv("RANK", str(rank))
            assert call("edges", "in").stdout == "3 of 3 written to out\n"
            assert len(list_tree("out")) == count

    def test_a_bad_image_does_not_end_the_other_processes_of_torchrun(self, call, tmp_path, monkeypatch):
        (tmp_path / "in" / "3.jpg").write_bytes(b"")
        assert call("edges", "in").exit_code == 1
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
        result = call("edges", "in")
        assert result.exit_code == 0 and "in/3.jpg: edges: image must be" in result.stderr

    @pytest.mark.parametrize("part", ["1", "2/2", "-1/2", "a/b"])
    def test_parts_that_do_not_exist(self, call, part):
        result = call("edges", "in", "--part", part)
        assert result.exit_code == 2 and result.stderr.startswith("trace-fast: --part must be ")

    def test_coco_results_of_a_run_that_is_continued(self, call, tmp_path):
        pytest.importorskip("pycocotools", reason="needs pycocotools: pip install 'trace_fast[eval]'")
        words = ("segment", "in", "--coco", "all.json", "--top", 3, "--min-area", 4)
        assert call(*words).exit_code == 0
        whole = (tmp_path / "all.json").read_bytes()
        assert {record["image_id"] for record in json.loads(whole)} == set(range(6))
        (tmp_path / "out" / "2.png").unlink()
        (tmp_path / "all.json").unlink()
        assert call(*words).stdout.endswith("5 of them by an earlier run\n")
        assert (tmp_path / "all.json").read_bytes() == whole

    def test_masks_that_changed_are_done_again(self, call, tmp_path):
        for index in range(6):
            path = tmp_path / "masks" / f"{index}.png"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(np.eye(20, 31, dtype=np.uint8)).save(path)
        words = ("segment", "in", "--masks", "masks")
        assert call(*words).exit_code == 0
        Image.fromarray(np.ones((20, 31), np.uint8)).save(tmp_path / "masks" / "3.png")
        assert call(*words).stdout.endswith("5 of them by an earlier run\n")


class TestTars:
    @pytest.fixture
    def photos(self, tmp_path):
        return [make_photo(tmp_path / f"{index}.jpg", index).read_bytes() for index in range(4)]

    def test_one_for_each(self, call, tmp_path, photos):
        first = {"x/0.jpg": photos[0], "x/0.txt": b"a caption", "x/1.jpg": photos[1][:200], "x/2.jpg": photos[2]}
        make_tar(tmp_path / "in" / "a.tar", first)
        make_tar(tmp_path / "in" / "b.tar", {"./3.jpg": photos[3], "3.png": photos[3]})
        assert call("edges", *(tmp_path / f"{index}.jpg" for index in range(4))).exit_code == 0
        plain = list_tree("out")
        (tmp_path / "out").rename(tmp_path / "plain")
        result = call("edges", "in")
        assert (result.exit_code, result.stdout) == (1, "4 of 5 written to out\n")
        assert "in/a.tar/x/1: edges: image must be readable to its end" in result.stderr
        members = read_tar("out/a.tar")
        assert list(members) == ["x/0.png", "x/0.json", "x/1.json", "x/2.png", "x/2.json"]
        assert members["x/0.png"] == plain["0.png"] and members["x/2.png"] == plain["2.png"]
        known = json.loads(members["x/0.json"])
        assert known == {"key": "x/0", "height": 20, "width": 31, "timestep": 0, "error": None}
        assert json.loads(members["x/1.json"])["error"].startswith("edges: image must be readable to its end")
        assert [name for name in read_tar("out/b.tar") if "json" not in name] == ["3.jpg.png", "3.png.png"]
        with tarfile.open("out/a.tar") as archive:
            assert {member.mtime for member in archive} == {0}
            assert json.loads(archive.pax_headers["comment"])["trace_fast"]["model"] == "mini"

    @pytest.mark.usefixtures("no_heif")
    def test_members_that_would_lead_out_of_a_folder_or_are_no_pictures(self, call, tmp_path, photos):
        names = ("../a.jpg", "/b.jpg", "c.jpg", "c.jpg", "c.heic", "c.json")
        with tarfile.open(tmp_path / "a.tar", "w") as archive:
            for name, photo in zip(names, [*photos, b"", b""], strict=True):
                member = tarfile.TarInfo(name)
                member.size = len(photo)
                archive.addfile(member, io.BytesIO(photo))
        result = call("edges", "a.tar")
        assert (result.exit_code, result.stdout) == (0, "3 of 3 written to out\n")
        assert result.stderr == (
            "trace-fast: left out of tar files: 2 files of other formats (.heic, .json): pip install "
            "'trace_fast[heif]', or convert HEIC to JPEG or PNG\n"
        )
        members = read_tar("out/a.tar")
        assert [name for name in members if "json" not in name] == ["a.png", "b.png", "c.png"]
        assert call("edges", tmp_path / "3.jpg").exit_code == 0
        assert members["c.png"] == (tmp_path / "out" / "3.png").read_bytes()  # of the last of its name

    def test_names_do_not_reach_the_terminal_as_they_are(self, call, tmp_path):
        name = "a\x1b]0;title\x07\x9b2J\r.jpg"
        make_tar(tmp_path / "a.tar", {name: b""})
        result = call("edges", "a.tar")
        assert result.stderr.startswith(r"trace-fast: a.tar/a\x1b]0;title\x07\x9b2J\r: edges: image must be")
        assert json.loads(read_tar("out/a.tar")[f"{name[:-4]}.json"])["key"] == name[:-4]
        (tmp_path / "list.txt").write_text(f"{name[:-4]}.mp4")
        result = call("edges", "list.txt")
        assert result.exit_code == 2 and "\x1b" not in result.stderr and r"\x9b2J" in result.stderr

    def test_one_without_pictures(self, call, tmp_path):
        make_tar(tmp_path / "a.tar", {"a.txt": b"a caption"})
        result = call("edges", "a.tar")
        assert (result.exit_code, result.stdout) == (0, "0 of 0 written to out\n")
        assert result.stderr == "trace-fast: left out of tar files: 1 file of another format (.txt)\n"
        assert read_tar("out/a.tar") == {}

    def test_the_same_bytes_each_time(self, call, tmp_path, photos):
        make_tar(tmp_path / "in.tar", {f"{index}.jpg": photo for index, photo in enumerate(photos)})
        contents = set()
        for workers in (1, 2, 3):
            assert call("edges", "in.tar", "--overwrite", "--overlay", "--workers", workers).exit_code == 0
            contents.add((tmp_path / "out" / "in.tar").read_bytes())
        assert len(contents) == 1

    def test_what_is_done_is_skipped_with_its_failures(self, call, tmp_path, photos):
        make_tar(tmp_path / "in" / "a.tar", {"0.jpg": photos[0], "1.jpg": b""})
        make_tar(tmp_path / "in" / "b.tar", {"2.jpg": photos[2]})
        assert call("edges", "in").exit_code == 1
        changed = (tmp_path / "out" / "a.tar").stat().st_mtime_ns
        (tmp_path / "out" / "b.tar").unlink()
        result = call("edges", "in")
        assert (result.exit_code, result.stdout) == (1, "2 of 3 written to out, 2 of them by an earlier run\n")
        assert (tmp_path / "out" / "a.tar").stat().st_mtime_ns == changed

    def test_a_damaged_one(self, call, tmp_path, photos):
        whole = make_tar(tmp_path / "in" / "a.tar", {f"{index}.jpg": photo for index, photo in enumerate(photos)})
        make_tar(tmp_path / "in" / "b.tar", {"0.jpg": photos[0]})
        whole.write_bytes(whole.read_bytes()[:1500])
        result = call("edges", "in")
        assert result.exit_code == 1
        assert "trace-fast: in/a.tar: not written: edges: inputs must be complete tar files" in result.stderr
        assert list(list_tree("out")) == ["b.tar"]
        assert not list((tmp_path / "out").glob(".*.part"))

    def test_full_memory_fails_the_shard(self, call, tmp_path, photos, monkeypatch):
        from trace_fast.jobs.tasks import EdgesTask

        def fail(self, names, photos, real=EdgesTask.compute):
            if "1" in names:
                raise MemoryError
            return real(self, names, photos)

        make_tar(tmp_path / "in" / "a.tar", {f"{index}.jpg": photo for index, photo in enumerate(photos)})
        make_tar(tmp_path / "in" / "b.tar", {"0.jpg": photos[0]})
        monkeypatch.setattr(EdgesTask, "compute", fail)
        result = call("edges", "in")
        assert (result.exit_code, result.stderr) == (1, "trace-fast: in/a.tar: not written: MemoryError\n")
        assert list(list_tree("out")) == ["b.tar"]

    def test_a_full_disk_fails_the_shard(self, call, tmp_path, photos, monkeypatch):
        def fail(self, result, real=TarWriter.add):
            if result.name == "1":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            real(self, result)

        make_tar(tmp_path / "in" / "a.tar", {f"{index}.jpg": photo for index, photo in enumerate(photos)})
        make_tar(tmp_path / "in" / "b.tar", {"0.jpg": photos[0]})
        with monkeypatch.context() as patch:
            patch.setattr(TarWriter, "add", fail)
            result = call("edges", "in")
        assert result.exit_code == 1 and "in/a.tar: not written: [Errno 28] edges: the disk must have" in result.stderr
        assert list(list_tree("out")) == ["b.tar"] and not list((tmp_path / "out").glob(".*.part"))
        assert call("edges", "in").stdout == "5 of 5 written to out, 1 of them by an earlier run\n"

    def test_two_commands_at_a_time(self, call, tmp_path, photos):
        make_tar(tmp_path / "in" / "a.tar", {"0.jpg": photos[0]})
        assert call("edges", "in").exit_code == 0
        expected = list_tree("out")
        (tmp_path / "out" / "a.tar").unlink()
        with claim_folder(tmp_path / "out", "edges"):
            result = call("edges", "in")
            assert result.exit_code == 2 and "output must be a folder that no other run writes to" in result.stderr
            assert list_tree("out") == {}
        assert call("edges", "in").exit_code == 0 and list_tree("out") == expected

    def test_segment(self, call, tmp_path, photos):
        make_tar(tmp_path / "a.tar", {"0.jpg": photos[0]})
        assert call("segment", "a.tar").exit_code == 0
        assert Image.open(io.BytesIO(read_tar("out/a.tar")["0.png"])).mode == "P"
        result = call("segment", "a.tar", "--coco", "all.json")
        assert (result.exit_code, result.stderr) == (2, "trace-fast: --coco needs pictures, got the shard 'a.tar'\n")


class TestParquet:
    @pytest.fixture
    def arrow(self):
        return pytest.importorskip("pyarrow", reason="needs pyarrow: pip install 'trace_fast[data]'")

    @pytest.fixture
    def photos(self, tmp_path):
        return [make_photo(tmp_path / f"{index}.jpg", index).read_bytes() for index in range(4)]

    def write(self, arrow, path, columns):
        import pyarrow.parquet  # noqa: F401

        path.parent.mkdir(parents=True, exist_ok=True)
        arrow.parquet.write_table(arrow.table(columns), path)

    def test_one_for_each(self, call, tmp_path, arrow, photos):
        assert call("edges", *(tmp_path / f"{index}.jpg" for index in range(4))).exit_code == 0
        plain = list_tree("out")
        (tmp_path / "out").rename(tmp_path / "plain")
        cells = [{"bytes": photo, "path": None} for photo in photos]
        self.write(arrow, tmp_path / "in" / "a.parquet", {"id": [5, 6], "image": cells[:2], "label": [1, 2]})
        self.write(arrow, tmp_path / "in" / "b.parquet", {"bytes": [photos[2], b"", None, photos[3]]})
        self.write(arrow, tmp_path / "in" / "c.parquet", {"bytes": [b"", b""]})
        contents = set()
        for workers in (1, 2):
            result = call("edges", "in", "--workers", workers, "--overwrite")
            assert (result.exit_code, result.stdout) == (1, "4 of 8 written to out\n")
            contents.add(tuple(list_tree("out").items()))
        assert len(contents) == 1
        # of the same types, though a column of the third has no values
        first, second, third = (arrow.parquet.read_table(f"out/{name}.parquet") for name in "abc")
        assert first.schema.equals(second.schema, check_metadata=True)
        assert second.schema.equals(third.schema, check_metadata=True)
        assert first["key"].to_pylist() == ["5", "6"] and first["edges"].to_pylist() == [plain["0.png"], plain["1.png"]]
        assert second["key"].to_pylist() == ["0", "1", "2", "3"]
        assert second["edges"].to_pylist() == [plain["2.png"], None, None, plain["3.png"]]
        assert second["error"].to_pylist()[2].startswith("edges: image must be bytes, a path, or a record with bytes")
        assert third["error"].null_count == 0 and third["edges"].null_count == 2
        assert json.loads(first.schema.metadata[b"trace_fast"])["command"] == "edges"
        assert call("edges", "in").stdout == "4 of 8 written to out, 8 of them by an earlier run\n"

    def test_masks(self, call, tmp_path, arrow, photos):
        pytest.importorskip("pycocotools", reason="needs pycocotools: pip install 'trace_fast[eval]'")
        self.write(arrow, tmp_path / "a.parquet", {"jpg": [photos[0]]})
        assert call("segment", "a.parquet", "--top", 3, "--min-area", 4).exit_code == 0
        (row,) = arrow.parquet.read_table("out/a.parquet").to_pylist()
        assert row["masks"] and row["labels"]
        for record in row["masks"]:
            mask = decode_mask(record["counts"].encode(), row["height"], row["width"])
            assert mask.shape == (20, 31) and mask.sum() == record["area"] and 0 < record["score"] <= 1

    def test_damaged_files_and_columns(self, call, tmp_path, arrow, photos):
        (tmp_path / "in").mkdir()
        (tmp_path / "in" / "a.parquet").write_bytes(b"PAR1")
        self.write(arrow, tmp_path / "in" / "b.parquet", {"picture": [photos[0]]})
        result = call("edges", "in")
        assert result.exit_code == 1 and list_tree("out") == {}
        assert "in/a.parquet: not written: edges: inputs must be complete parquet files" in result.stderr
        assert "with a column image or bytes or jpg or jpeg or png or webp, got picture in" in result.stderr

    def test_cells_that_are_damaged_or_name_no_picture(self, call, tmp_path, arrow, photos):
        os.mkfifo(tmp_path / "pipe.png")
        paths = ["0.jpg", "pipe.png", "missing.png", "a\0.png", "a" * 300, "/dev/zero"]
        self.write(arrow, tmp_path / "in" / "a.parquet", {"image": [{"bytes": None, "path": path} for path in paths]})
        text = arrow.Array.from_buffers(
            arrow.string(), 1, [None, arrow.array([0, 1], arrow.int32()).buffers()[1], arrow.py_buffer(b"\xff")]
        )
        self.write(arrow, tmp_path / "in" / "b.parquet", {"bytes": [photos[0]], "key": text})
        times = arrow.array([2**62], arrow.timestamp("us"))
        self.write(arrow, tmp_path / "in" / "c.parquet", {"bytes": [photos[0]], "key": times})
        result = call("edges", "in")
        assert (result.exit_code, result.stdout) == (1, "1 of 8 written to out\n")
        for name in ("b", "c"):
            reason = "not written: edges: inputs must be complete parquet files, got "
            assert f"in/{name}.parquet: {reason}'in/{name}.parquet'" in result.stderr
        first, *others = arrow.parquet.read_table("out/a.parquet")["error"].to_pylist()
        assert first is None
        assert others == [f"edges: image must be an existing file, got {path!r}" for path in paths[1:]]

    def test_without_pyarrow(self, call, tmp_path, monkeypatch):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        (tmp_path / "a.parquet").write_bytes(b"PAR1")
        result = call("edges", "a.parquet")
        assert result.exit_code == 1
        assert (
            "a.parquet: not written: edges: pyarrow must be installed: pip install 'trace_fast[data]'" in result.stderr
        )


@pytest.mark.slow
def test_a_command_that_is_killed_is_continued(tmp_path):
    for index in range(60):
        make_photo(tmp_path / "in" / f"{index:02}.png", index)
    photos = {f"{index}.png": (tmp_path / "in" / f"{index:02}.png").read_bytes() for index in range(20)}
    for name in "ab":
        make_tar(tmp_path / "in" / f"{name}.tar", photos)
    program = [sys.executable, "-m", "trace_fast", "edges", "in", *SIZE, "--workers", "2", "-o"]
    subprocess.run([*program, "whole"], cwd=tmp_path, check=True, stdout=subprocess.DEVNULL)
    expected = list_tree(tmp_path / "whole")
    assert len(expected) == 62
    times = {}
    for marker in ("05.png", "40.png", "a.tar"):
        process = subprocess.Popen([*program, "out"], cwd=tmp_path, stdout=subprocess.DEVNULL)
        try:
            while not (tmp_path / "out" / marker).exists() and process.poll() is None:
                time.sleep(0.005)
            process.send_signal(signal.SIGKILL)
        finally:
            process.kill()
            process.wait()
        for name, content in list_tree(tmp_path / "out").items():
            assert content == expected[name]
        lines = (tmp_path / "out" / MANIFEST).read_bytes().split(b"\n")[1:-1]
        done = [json.loads(line)["name"] for line in lines]
        # a shard of results is not written again
        assert all((tmp_path / "out" / name).stat().st_mtime_ns == changed for name, changed in times.items())
        times = {name: os.stat(tmp_path / "out" / name).st_mtime_ns for name in done}
    subprocess.run([*program, "out"], cwd=tmp_path, check=True, stdout=subprocess.DEVNULL)
    assert list_tree(tmp_path / "out") == expected
    assert all((tmp_path / "out" / name).stat().st_mtime_ns == changed for name, changed in times.items())
    assert read_image(tmp_path / "out" / "00.png").shape == (1, 3, 20, 31)


class TestReducedImages:
    @pytest.fixture
    def rotated(self, tmp_path):
        """Write a large JPEG file that lies on its side, of few details."""
        small = Image.fromarray(np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8))
        exif = Image.Exif()
        exif[0x0112] = 6
        path = tmp_path / "a.jpg"
        small.resize((960, 640), Image.Resampling.BICUBIC).save(path, exif=exif, quality=95)
        return path

    def test_the_longer_side(self, rotated, monkeypatch):
        scales = []
        monkeypatch.setattr(
            "trace_fast.jobs.tasks.read_image",
            lambda picture: [scales.append(picture.size), read_image(picture)][1],
        )
        whole = read_image(rotated)
        assert whole.shape == (1, 3, 960, 640)
        for content in (rotated, rotated.read_bytes()):
            photo = read_photo(content, 231)
            assert (photo.height, photo.width, photo.pixels.shape) == (231, 154, (1, 3, 231, 154))
            assert (photo.pixels - resize(whole, (231, 154))).abs().max() < 0.03
        # decoded at a quarter of its sides
        assert scales == [(240, 160)] * 2
        assert read_photo(rotated, 1000).pixels.shape == whole.shape
        assert read_photo(make_photo(rotated.with_suffix(".png")), 17).pixels.shape == (1, 3, 11, 17)

    def test_what_the_model_sees(self, rotated):
        photo = read_photo(rotated, view_size=lambda height, width: (height // 4 - 3, width // 4 - 3))
        assert (photo.height, photo.width, photo.pixels.shape) == (960, 640, (1, 3, 240, 160))

    def test_a_missing_file(self, tmp_path):
        for max_side in (None, 100):
            with pytest.raises(FileNotFoundError, match=r"missing\.jpg"):
                read_photo(tmp_path / "missing.jpg", max_side)

    def test_edges_on_the_grid(self, call, rotated):
        assert call("edges", rotated, "--grid", "--bits", 16).exit_code == 0
        with Image.open("out/a.png") as picture:
            grid = np.asarray(picture) / 65535
        model = load("mini", device="cpu", size=(16, 24))
        expected = model.edges(read_image(rotated))[0, 0]
        assert grid.size < expected.numel() / 50
        assert (restore_edges(grid, (960, 640)) - expected).abs().mean() < 0.005
        whole = model.grid_edges(read_image(rotated))
        np.testing.assert_allclose(restore_edges(whole, (960, 640)), expected, atol=0.003)

    def test_refusals(self, call, rotated):
        result = call("edges", rotated, "--grid", "--overlay")
        assert result.exit_code == 2 and result.stderr.startswith("trace-fast: --grid must be without --overlay")
        result = call("edges", rotated, "--grid", "--stage", 1)
        assert result.exit_code == 2
        assert "edges: grid and batches must be of a student, got the search of mini" in result.stderr

    def test_segment(self, call, rotated):
        assert call("segment", rotated, "--max-side", 60).exit_code == 0
        with Image.open("out/a.png") as picture:
            assert picture.size == (40, 60)
