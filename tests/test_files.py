"""trace_fast.io.files: a file that is replaced keeps its permissions."""

from __future__ import annotations

import os
import stat

import pytest

from trace_fast.io.files import write_atomically


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
