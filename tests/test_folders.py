"""trace_fast.io.folders: what operating systems leave in folders is skipped everywhere, and the rest is counted."""

from __future__ import annotations

import errno
import io
import os
import re
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from trace_fast.cli import app
from trace_fast.evaluation.data import open_dataset
from trace_fast.evaluation.run import check_photos
from trace_fast.io.archives import list_pictures
from trace_fast.io.folders import describe_left_out, is_litter, is_picture
from trace_fast.jobs.inputs import list_inputs
from trace_fast.training.data import list_photos
from trace_fast.training.scenes.dataset import list_scenes

LITTER = ("._a.jpg", "._a.png", ".DS_Store", "Thumbs.db", "desktop.ini", ".hidden.png", "__MACOSX/a.png")


def litter(folder):
    for name in LITTER:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"\0\5\x16\7")


@pytest.fixture
def photos(tmp_path):
    """Return a folder of one photo, amid litter."""
    folder = tmp_path / "photos"
    litter(folder)
    Image.fromarray(np.eye(48, 64, dtype=np.uint8) * 255).save(folder / "a.jpg")
    return folder


@pytest.mark.parametrize("name", LITTER)
def test_litter(name):
    assert is_litter(name) and not is_picture(name) and not is_picture(f"folder/{name}")


def test_pictures():
    assert is_picture("./folder/a.JPG") and is_picture("a.b.png") and not is_litter("a._b")
    assert not is_picture("a.txt") and not is_picture("a")


def test_edges_and_segment(photos):
    assert [file.path for file in list_inputs("edges", [photos]).files] == [photos / "a.jpg"]


@pytest.mark.usefixtures("no_heif")
def test_training_counts_what_it_leaves_out(photos, caplog):
    (photos / "more").mkdir()
    shutil.copy(photos / "a.jpg", photos / "more" / "b.heic")
    (photos / "notes").write_text("")
    (photos / "more" / "c.jpg").symlink_to("nowhere")
    with tarfile.open(photos / "more.tar", "w") as archive:
        archive.add(photos / "a.jpg", "d.txt")
        archive.add(photos / "._a.jpg", "._d.txt")
    assert [photo.name for photo in list_photos(photos)] == ["a.jpg"]
    assert caplog.messages == [
        f"left out of '{photos}': 3 files of other formats (.heic, .txt, no ending): pip install 'trace_fast[heif]', "
        "or convert HEIC to JPEG or PNG; 1 that is no file, such as a link to nothing"
    ]
    (photos / "a.jpg").unlink()
    with pytest.raises(ValueError, match=r"got none in .*: left out 3 files of other formats"):
        list_photos(photos)


@pytest.mark.usefixtures("no_heif")
def test_members_of_any_name_and_kind(tmp_path):
    def add(archive, name, **attributes):
        member = tarfile.TarInfo(name)
        for attribute, value in attributes.items():
            setattr(member, attribute, value)
        archive.addfile(member, io.BytesIO(b"123456789"[: member.size]))

    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        names = ("../up.png", "/abs/a.png", "./b/../../c.png", "d.png", f"{'e' * 300}.png", "d.png")
        for size, name in enumerate(names):
            add(archive, name, size=size)
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
            add(archive, "link.png", type=kind, linkname="d.png")
        # as if it had ten gigabytes
        holes = {"GNU.sparse.map": "0,3", "GNU.sparse.size": str(10**10), "GNU.sparse.name": "f.png"}
        add(archive, "f.png", size=3, pax_headers={"GNU.sparse.major": "0", "GNU.sparse.minor": "1", **holes})
        for name in ("d.HEIC", "d.json", "...json", "..", "README"):
            add(archive, name)
    with tarfile.open(tmp_path / "a.tar", "r:") as archive:
        pictures, left_out = list_pictures(archive)
    sizes = {name: member.size for name, member in pictures.items()}
    assert sizes == {"up.png": 0, "abs/a.png": 1, "b/c.png": 2, "d.png": 5, f"{'e' * 300}.png": 4}
    assert left_out == {"no file": 5, ".heic": 1, ".json": 1, "no ending": 2}
    assert describe_left_out([], left_out) == (
        "4 files of other formats (.heic, .json, no ending): pip install 'trace_fast[heif]', or convert HEIC to JPEG "
        "or PNG; 5 that are no file, such as a link to nothing"
    )


def test_training(photos):
    with tarfile.open(photos / "more.tar", "w") as archive:
        archive.add(photos / "a.jpg", "./b.jpg")
        archive.add(photos / "._a.jpg", "./._b.jpg")
        archive.add(photos / "._a.jpg", "__MACOSX/b.jpg")
    shutil.copy(photos / "._a.jpg", photos / "._more.tar")
    assert [photo.name for photo in list_photos(photos)] == ["a.jpg", "more.tar/b.jpg"]


@pytest.mark.parametrize("truth", ["inst/a.png", "inst/a/1.png"])
def test_evaluate(photos, tmp_path, truth):
    photos.rename(tmp_path / "images")
    path = tmp_path / truth
    litter(path.parent)
    litter(tmp_path / "inst")
    Image.fromarray(np.eye(48, 64, dtype=np.uint8)).save(path)
    dataset = open_dataset(tmp_path)
    good, problems, notes = check_photos(dataset.photos, [])
    assert ([photo.name for photo in good], problems, notes) == (["a"], [], [])
    assert (dataset.problems, dataset.notes) == ([], [])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_evaluate_waits_for_no_pipe(photos, tmp_path):
    photos.rename(tmp_path / "images")
    os.mkfifo(tmp_path / "images" / "b.jpg")
    (tmp_path / "inst").mkdir()
    Image.fromarray(np.eye(48, 64, dtype=np.uint8)).save(tmp_path / "inst" / "a.png")
    dataset = open_dataset(tmp_path)
    assert [photo.name for photo in dataset.photos] == ["a"]
    assert dataset.notes == [f"left out of {tmp_path / 'images'}: 1 that is no file, such as a link to nothing"]


def test_scenes(tmp_path):
    for folder in ("images", "inst"):
        litter(tmp_path / folder)
    Image.new("RGB", (64, 48)).save(tmp_path / "images" / "000000.jpg")
    Image.new("L", (64, 48)).save(tmp_path / "inst" / "000000.png")
    shutil.copy(tmp_path / "images" / "._a.jpg", tmp_path / "images" / "._000000.jpg")
    shutil.copy(tmp_path / "images" / "._a.jpg", tmp_path / "inst" / "._000000.png")
    assert [scene.image.name for scene in list_scenes(tmp_path)] == ["000000.jpg"]


@pytest.mark.usefixtures("no_heif")
def test_what_is_left_out_is_counted(photos):
    assert describe_left_out(photos.iterdir()) == ""
    (photos / "notes.txt").touch()
    assert describe_left_out(photos.iterdir()) == "1 file of another format (.txt)"
    (photos / "b.HEIC").touch()
    (photos / "README").touch()
    (photos / "more").mkdir()
    (photos / "lost.jpg").symlink_to("nothing")
    expected = (
        "3 files of other formats (.heic, .txt, no ending): pip install 'trace_fast[heif]', or convert HEIC to JPEG or "
        "PNG; 1 subfolder, not read; 1 that is no file, such as a link to nothing"
    )
    assert describe_left_out(photos.iterdir()) == expected
    listed = list_inputs("edges", [photos])
    assert [file.path for file in listed.files] == [photos / "a.jpg"]
    assert listed.left_out == [f"left out of '{photos}': {expected}"]
    (photos / "a.jpg").unlink()
    result = CliRunner().invoke(app, ["edges", str(photos), "-o", str(photos / "out")])
    assert result.exit_code == 2
    assert result.stderr == (
        f"trace-fast: edges: inputs must hold images or shards, got none in the folder '{photos}': left out "
        f"{expected}; --recursive reads subfolders\n"
    )


@pytest.fixture
def forbid(monkeypatch):
    """Return a function that lets a function of os fail for a path, since root may read everything."""

    def forbid(name, forbidden):
        function = getattr(os, name)

        def call(path, *arguments, **options):
            if Path(path) == forbidden:
                raise PermissionError(errno.EACCES, "Permission denied", path)
            return function(path, *arguments, **options)

        monkeypatch.setattr(os, name, call)

    return forbid


@pytest.mark.parametrize("list_all", [lambda folder: list_inputs("edges", [folder], recursive=True), list_photos])
def test_subfolders_that_cannot_be_read_are_counted(photos, forbid, list_all, caplog):
    for name in ("open", "closed"):
        (photos / name).mkdir()
        shutil.copy(photos / "a.jpg", photos / name)
    forbid("scandir", photos / "closed")
    listed = list_all(photos)
    assert sorted(file.name for file in getattr(listed, "files", listed)) == ["a.jpg", "open/a.jpg"]
    assert "1 subfolder, not read" in "".join(getattr(listed, "left_out", caplog.messages))
    forbid("scandir", photos)
    with pytest.raises(PermissionError, match=re.escape(str(photos))):
        list_all(photos)


def test_links_to_what_may_not_be_read_are_counted(photos, forbid):
    (photos / "lost.jpg").symlink_to("elsewhere")
    forbid("stat", photos / "lost.jpg")
    assert describe_left_out(photos.iterdir()) == "1 that is no file, such as a link to nothing"
