"""The manifest of a folder of results: which settings they have and which inputs are done, so that a run continues."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NoReturn

from trace_fast.io.claims import claim_folder, list_claims, remove_stages
from trace_fast.io.files import write_atomically
from trace_fast.jobs.parts import ALONE, Part
from trace_fast.training.state import require_same

__all__ = ["MANIFEST", "Manifest", "open_manifest"]

MANIFEST = ".trace-fast.jsonl"  # one line of settings, and one for each input that is done
HASH = "hash"  # of a line


class Manifest:
    """The record of a folder of results.

    A line is added when an input is done, and the file is written in order at the end. Each line has a hash of its
    content: an incomplete one, which a process that is killed may leave, and a damaged one do not count. Processes that
    share a folder have a file each.

    Args:
        folder: of the results; it exists.
        settings: what the results depend on beside their inputs, for JSON.
        op: name of the calling function, for messages.
        targets: names of the files that will be written.
        part: of this process.
        overwrite: forget what was done before.

    Raises:
        ValueError: the folder holds results of other settings, or of an unknown origin.
        OSError: the folder cannot be read or written to.
    """

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, Any],
        op: str,
        targets: Iterable[str] = (),
        part: Part = ALONE,
        overwrite: bool = False,
    ):
        self.folder, self.op, self.part = folder, op, part
        self.path = folder / name_manifest(part.index)
        self.settings = {"settings": settings}
        self.records: dict[str, dict[str, Any]] = {}
        self._own: set[str] = set()
        if not overwrite:
            if os.path.lexists(self.path):
                self._read(self.path)
            elif not self._list_others():
                for path in (folder / name for name in targets):
                    if os.path.exists(path):
                        self._refuse_origin(path)
        self._rewrite()
        # other parts may begin at the same time: of any two, one reads the settings of the other
        self._others = self._list_others()
        if not overwrite:
            self._read_others()
        self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND)

    def _list_others(self) -> list[Path]:
        """Return the files of other parts."""
        return sorted(path for path in self.folder.glob(name_manifest("*")) if path != self.path)

    def _read_others(self) -> None:
        """Read the files of other parts, and leave no own one where they are refused."""
        try:
            for path in self._others:
                self._read(path)
        except BaseException:
            if not self._own:
                self.path.unlink()
            raise

    def _read(self, path: Path) -> None:
        """Read the complete lines of a file, and refuse one of other settings."""
        first, *lines = path.read_bytes().split(b"\n")[:-1] or [b""]
        # where nothing was done, nothing depends on the settings; but another part may be at work
        if lines or path != self.path:
            if (settings := read_line(first)) is None:
                self._refuse_origin(path)
            content = "results of the same model and options, or --overwrite must be given"
            require_same(self.op, "output", content, json.dumps(settings), json.dumps(self.settings), path)
        records = {record["name"]: record for line in lines if (record := read_line(line)) is not None}
        self.records |= records
        if path == self.path:
            self._own |= records.keys()

    def _refuse_origin(self, path: Path) -> NoReturn:
        """Refuse a file that no run has written."""
        raise ValueError(
            f"{self.op}: output must be a folder whose files this command has written, got '{path}', which "
            "is from elsewhere or damaged; --overwrite replaces it"
        )

    def _rewrite(self) -> None:
        """Write the settings and the records of this process, in order."""
        with write_atomically(self.path, self.op) as file:
            file.write(make_line(self.settings))
            for name in sorted(self._own):
                file.write(make_line(self.records[name]))

    def find(self, name: str, stamp: list[int], files: Iterable[str]) -> dict[str, Any] | None:
        """Return the record of an input that is done; None where it has changed, or a file of its results is gone.

        Args:
            name: of the input.
            stamp: of the input, see `trace_fast.jobs.inputs.read_stamp`.
            files: names of the files of its results, in the folder.
        """
        record = self.records.get(name)
        if record is None or record["stamp"] != stamp:
            return None
        return record if all(os.path.isfile(self.folder / file) for file in files) else None

    def add(self, name: str, stamp: list[int], **content: Any) -> None:
        """Record that an input is done; its results are complete.

        Args:
            name: of the input.
            stamp: of the input, from before it was read.
            content: what else later runs must know, for JSON.

        Raises:
            OSError: the disk is full.
        """
        record = {"name": name, "stamp": stamp, **content}
        line = make_line(record)
        if os.write(self._file, line) != len(line):
            raise OSError(f"{self.op}: the disk must have room for the manifest, got too little in '{self.folder}'")
        self.records[name] = record
        self._own.add(name)

    def close(self) -> None:
        """Write the file in order; one process alone adds what others have recorded in earlier runs."""
        os.close(self._file)
        if self.part.count == 1:
            self._own |= self.records.keys()
        if self._own:
            self._rewrite()
        else:
            self.path.unlink()
        if self.part.count == 1:
            for path in self._others:
                path.unlink(missing_ok=True)


def make_line(content: Mapping[str, Any]) -> bytes:
    """Return a line of a manifest: JSON, with a hash of the content."""
    return f"{json.dumps({**content, HASH: hash_content(content)}, sort_keys=True)}\n".encode()


def read_line(line: bytes) -> dict[str, Any] | None:
    """Return the content of a line of a manifest; None where it is not as it was written."""
    try:
        content = json.loads(line)
        return content if content.pop(HASH) == hash_content(content) else None
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError):  # another kind of JSON, or none
        return None


def hash_content(content: Mapping[str, Any]) -> str:
    """Return a hash of what a line holds."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def name_manifest(index: int | str) -> str:
    """Return the name of the file of a part; the first has no number."""
    return MANIFEST if index == 0 else MANIFEST.replace(".jsonl", f"{index if index == '*' else f'-{index}'}.jsonl")


@contextmanager
def open_manifest(
    folder: Path,
    settings: Mapping[str, Any],
    op: str,
    targets: Iterable[str] = (),
    part: Part = ALONE,
    overwrite: bool = False,
) -> Iterator[Manifest]:
    """Claim a folder of results and open its manifest; see `Manifest`.

    Raises:
        RuntimeError: another run writes to the folder.
    """
    with ExitStack() as claims:
        claims.enter_context(claim_folder(folder, op, part.index))
        if part.count == 1:  # it replaces the files of all parts
            for index in list_claims(folder):
                claims.enter_context(claim_folder(folder, op, index))
        stages = "*" if part.count == 1 else part.index
        remove_stages(folder, stages)
        # those of this run, too, and what processes of an earlier one have written meanwhile
        claims.callback(remove_stages, folder, stages)
        manifest = Manifest(folder, settings, op, targets, part, overwrite)
        try:
            yield manifest
        finally:
            manifest.close()
