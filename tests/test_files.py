"""trace_fast.io.files: permissions are kept, a full disk is named, and equal content has equal bytes."""

from __future__ import annotations

import errno
import io
import os
import shutil
import stat

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load, save

from trace_fast.io.files import write_atomically, write_tensors


def read_mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.skipif(os.name == "nt", reason="permissions are those of POSIX")
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664])
def test_permissions_are_kept(tmp_path, mode):
    path = tmp_path / "state.safetensors"
    path.write_bytes(b"old")
    path.chmod(mode)
    with write_atomically(path, "distill") as file:
        (part,) = tmp_path.glob(".*.part")
        assert read_mode(part) == 0o600
        file.write(b"new")
    assert (path.read_bytes(), read_mode(path)) == (b"new", mode)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(os.name == "nt", reason="permissions are those of POSIX")
def test_new_files_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        with write_atomically(tmp_path / "a", "distill") as file:
            file.write(b"new")
    finally:
        os.umask(before)
    assert read_mode(tmp_path / "a") == 0o640


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_named(tmp_path, number):
    with (
        pytest.raises(OSError, match=r"distill: the disk must have room for a.png, got .* in the folder") as refusal,
        write_atomically(tmp_path / "a.png", "distill"),
    ):
        raise OSError(number, os.strerror(number))
    assert (refusal.value.errno, refusal.value.filename) == (number, str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_disappears_is_named(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    with pytest.raises(FileNotFoundError, match="out"), write_atomically(folder / "a.png", "distill"):
        shutil.rmtree(folder)


def test_tensors_follow_from_their_content(tmp_path):
    tensors = {"b": torch.arange(3), "a": torch.rand(2, 3), "c": torch.zeros(0, 2, dtype=torch.bool)}
    metadata = {f"name {index}": "value \N{LATIN SMALL LETTER E WITH ACUTE}" * index for index in range(12)}
    files = [io.BytesIO() for _ in range(2)]
    write_tensors(files[0], tensors, metadata)
    write_tensors(files[1], tensors, dict(reversed(metadata.items())))
    content = files[0].getvalue()
    assert content == files[1].getvalue()
    stored = load(content)
    assert stored.keys() == tensors.keys() and all(torch.equal(stored[name], tensors[name]) for name in tensors)
    (tmp_path / "a").write_bytes(content)
    with safe_open(tmp_path / "a", "pt") as file:
        assert file.metadata() == metadata
    # aligned as those of safetensors itself
    assert int.from_bytes(content[:8], "little") % 8 == 0 and len(content) % 8 == len(save(tensors, metadata)) % 8
