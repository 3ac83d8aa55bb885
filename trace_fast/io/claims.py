"""Claims of output folders: two runs that write to one folder would replace each other's files."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

msvcrt: Any = None
fcntl: Any = None
try:
    import fcntl
except ImportError:  # Windows
    import msvcrt

__all__ = ["CLAIM", "claim_folder", "list_claims", "make_stage", "remove_parts", "remove_stages"]

CLAIM = ".trace-fast.lock"  # has the number of the process that writes to its folder
ATTEMPTS = 10  # to lock a file that others remove meanwhile
# behind the content of the file: a byte that is locked on Windows cannot be read by others
LOCKED_BYTE = 1 << 30
# names that `write_atomically` gives to files that are not complete, and for how many seconds none is left alone
PART = re.compile(r"\.[0-9a-f]{16}\.part")
STALE = 600
STAGE = ".trace-fast-stage"  # begins the names of folders, see `make_stage`

# folders that this process has claimed: its own locks do not keep its other threads out
_claimed: set[str] = set()
_guard = threading.Lock()


@contextmanager
def claim_folder(folder: str | os.PathLike[str], op: str, part: int = 0) -> Iterator[None]:
    """Let no other run that claims a folder write to it until the block ends.

    The operating system ends the claim of a process that is killed. A folder on a file system without locks is claimed
    within this process alone. Incomplete files that killed runs left in the folder, and in its direct subfolders, are
    removed once they are ten minutes old.

    Args:
        folder: it exists.
        op: name of the calling function, for the message.
        part: of the folder, from 0: processes that share one claim a part each.

    Raises:
        RuntimeError: another run has claimed the folder.
        OSError: the folder cannot be written to.

    Example:
        >>> Path("out").mkdir(exist_ok=True)
        >>> with claim_folder("out", "edges"):
        ...     Path("out", "a.txt").write_text("complete")
        8
    """
    path = Path(folder, _name_claim(part))
    name, owner = os.path.join(os.path.realpath(folder), path.name), os.getpid()
    with _guard:
        if name in _claimed:
            raise RuntimeError(_describe_refusal(op, folder, str(owner)))
        file = _open_locked(path, op)
        _claimed.add(name)
    try:
        remove_parts(Path(folder))
        yield
    finally:
        # a forked process has a copy of this block, but not the claim
        if os.getpid() == owner:
            with _guard:
                _claimed.discard(name)
                # before the lock ends, so that nobody else has locked this file; Windows removes no file that is open
                with contextlib.suppress(OSError):
                    os.unlink(path)
                os.close(file)


def list_claims(folder: str | os.PathLike[str]) -> list[int]:
    """Return the parts above 0 of a folder that are claimed, and those that were when their process was killed.

    Args:
        folder: it exists.

    Example:
        >>> list_claims(".")
        []
    """
    stem, ending = _name_claim("*").split("*")
    numbers = (path.name.removeprefix(stem).removesuffix(ending) for path in Path(folder).glob(_name_claim("*")))
    return sorted(int(number) for number in numbers if number.isdecimal())


def _name_claim(part: int | str) -> str:
    """Return the name of the file of a claim; the first part has no number."""
    return CLAIM if part == 0 else CLAIM.replace(".lock", f"-{part}.lock")


def _describe_refusal(op: str, folder: str | os.PathLike[str], process: str) -> str:
    writer = f"process {process} writes" if process else "another process writes"
    return (
        f"{op}: output must be a folder that no other run writes to, got '{os.fspath(folder)}', to which {writer}; "
        "wait for its end or choose another folder"
    )


def _open_locked(path: Path, op: str) -> int:
    """Return the open file of the claim, locked."""
    folder = path.parent
    for _ in range(ATTEMPTS):
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if not _lock(file):
                raise RuntimeError(_describe_refusal(op, folder, os.read(file, 20).decode("ascii", "replace").strip()))
            # the run that had the claim before may have removed the file
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file), os.stat(path)):
                    _write_number(file)
                    return file
        except BaseException:
            os.close(file)
            raise
        os.close(file)
    raise RuntimeError(_describe_refusal(op, folder, ""))


def _write_number(file: int) -> None:
    """Write the number of this process, for the message of others; a full disk is no reason to stop."""
    with contextlib.suppress(OSError):
        os.ftruncate(file, 0)
        os.write(file, str(os.getpid()).encode())


def _lock(file: int) -> bool:
    """Lock an open file; return whether no other process has locked it."""
    try:
        if fcntl is not None:
            # a lock of the process, which its forked workers do not inherit
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            os.lseek(file, LOCKED_BYTE, os.SEEK_SET)
            try:
                msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
            finally:
                os.lseek(file, 0, os.SEEK_SET)
    except OSError as error:
        # others are of file systems without locks
        return error.errno not in (errno.EACCES, errno.EAGAIN, errno.EDEADLK)
    return True


def remove_parts(folder: Path) -> None:
    """Remove the incomplete files of runs that were killed; those of a run at work are younger.

    Args:
        folder: whose files, and those of its direct subfolders, are looked at.

    Example:
        >>> remove_parts(Path("."))
    """
    newest = time.time() - STALE
    for pattern in (".*.part", "*/.*.part"):
        for path in folder.glob(pattern):
            # others may remove it, too
            with contextlib.suppress(OSError):
                if PART.fullmatch(path.name) and path.stat().st_mtime < newest:
                    path.unlink()


def make_stage(folder: Path, part: int) -> Path:
    """Make a folder inside a claimed folder, and return it.

    Processes that may live longer than their run write to it, and the run that has the claim moves the complete files:
    what such a process writes later has no effect on the files of the next run.

    Args:
        folder: it exists.
        part: of the folder; see `claim_folder`.
    """
    return Path(tempfile.mkdtemp(prefix=f"{STAGE}-{part}-", dir=folder))


def remove_stages(folder: Path, part: int | str) -> None:
    """Remove the folders that `make_stage` has made, with the files that were not moved.

    Args:
        folder: in which they are.
        part: of the folder; "*" is all parts, none of which another run may have claimed.
    """
    for stage in folder.glob(f"{STAGE}-{part}-*"):
        # a process that still writes to it makes this fail
        shutil.rmtree(stage, ignore_errors=True)
