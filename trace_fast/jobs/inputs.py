"""The inputs of a job: pictures and shards from files, folders, patterns and lists; the rest is counted and named."""

from __future__ import annotations

import glob
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from trace_fast.io.folders import describe_left_out, is_litter, is_picture, walk_folder

__all__ = ["SHARD_SUFFIXES", "InputFile", "Inputs", "list_inputs", "name_file", "name_results", "read_stamp"]

# files that hold many images
SHARD_SUFFIXES = (".tar", ".parquet")
LIST_SUFFIX = ".txt"
VIDEO_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv")
# a path has lost one of the slashes
ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


@dataclass(frozen=True)
class InputFile:
    """A picture, or a shard.

    Attributes:
        name: where its results go: the path below the folder that was given, with its ending.
        path: of the file.
    """

    name: str
    path: Path

    @property
    def is_shard(self) -> bool:
        """Whether the file holds many images."""
        return self.path.suffix.lower() in SHARD_SUFFIXES


@dataclass
class Inputs:
    """The files that a job reads, and what is left out.

    Attributes:
        files: pictures and shards, each once, those of a folder sorted by name.
        left_out: a line for each folder of which something is left out, with the reasons.
    """

    files: list[InputFile] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def list_inputs(op: str, inputs: Iterable[str | Path], output: Path | None = None, recursive: bool = False) -> Inputs:
    """List the pictures and shards among inputs.

    Args:
        op: name of the calling function, for messages.
        inputs: each is a file, which is taken whatever its ending; a folder, of which pictures and shards are taken; a
            pattern such as "photos/*/*.jpg", whose files keep the folders below its fixed part; or a list, a file
            ending in .txt with one input a line, relative to the working directory.
        output: a folder that is left out, where it lies in one of the inputs.
        recursive: read the subfolders of folders, too, whose names the results keep. Linked ones are not read.

    Raises:
        ValueError: an input is an address or a video, or a folder, a pattern or a list has no pictures and shards.
        OSError: an input cannot be read.

    Example:
        >>> [file.name for file in list_inputs("edges", ["photos/one.jpg"]).files]
        ['one.jpg']
    """
    listed = Inputs()
    for source in inputs:
        _list_input(op, str(source), output, recursive, listed)
    listed.files = list({os.path.abspath(file.path): file for file in listed.files}.values())
    return listed


def _list_input(op: str, source: str, output: Path | None, recursive: bool, listed: Inputs) -> None:
    """Add the files of one input to those listed."""
    path = Path(source)
    if ADDRESS.match(source):
        address = re.sub("(?<=:)/+", "//", source, count=1)  # a path has lost one of them
        raise ValueError(
            f"{op}: inputs must be files of this machine, got the address {address!r}; download it, or mount its "
            "store, or let an engine that reads it call trace_fast.BatchEdges"
        )
    if path.suffix.lower() in VIDEO_SUFFIXES:
        raise ValueError(
            f"{op}: inputs must be images, got the video {source!r}; write its frames first, such as by: ffmpeg -i "
            f"{source} frames/%06d.jpg"
        )
    if os.path.isdir(path):
        listed.files += _list_folder(op, path, output, recursive, listed.left_out)
    elif glob.has_magic(source) and not os.path.exists(path):
        files = [InputFile(name, Path(match)) for name, match in _match_pattern(source)]
        if not files:
            raise ValueError(f"{op}: inputs must be existing files, got the pattern {source!r}, which no file has")
        listed.files += files
    elif path.suffix.lower() == LIST_SUFFIX:
        lines = path.read_bytes().decode("utf-8-sig", "surrogateescape").split("\n")
        sources = [line.strip() for line in lines if line.strip()]
        if not sources:
            raise ValueError(f"{op}: inputs must be lists with a path in each line, got none in {source!r}")
        for line in sources:
            if "\0" in line:
                raise ValueError(f"{op}: inputs must be lists in UTF-8, got a zero byte in {source!r}")
            if line.lower().endswith(LIST_SUFFIX):
                raise ValueError(
                    f"{op}: inputs must be lists of images and shards, got the list {line!r} in {source!r}"
                )
            _list_input(op, line, output, recursive, listed)
    else:
        listed.files.append(InputFile(path.name, path))


def _match_pattern(pattern: str) -> Iterator[tuple[str, str]]:
    """Yield the name and the path of each file that a pattern matches, in order."""
    parts = PurePosixPath(Path(pattern).as_posix()).parts
    fixed = next(index for index, part in enumerate(parts) if glob.has_magic(part))
    root = os.path.join(*parts[:fixed]) if fixed else "."
    for match in sorted(glob.glob(pattern, recursive=True)):
        name = Path(os.path.relpath(match, root)).as_posix()
        if not is_litter(name) and os.path.isfile(match):
            yield name, match


def _list_folder(op: str, folder: Path, output: Path | None, recursive: bool, left_out: list[str]) -> list[InputFile]:
    """Return the pictures and shards of a folder, sorted by name."""
    own = None if output is None else os.path.realpath(output)
    files: list[InputFile] = []
    others: set[Path] = set()
    for here, folders, names in walk_folder(folder, others):
        if not recursive:
            others |= {here / name for name in folders}
            folders.clear()
        folders[:] = [name for name in folders if os.path.realpath(here / name) != own]
        for name in names:
            path = here / name
            if (is_picture(name) or path.suffix.lower() in SHARD_SUFFIXES) and os.path.isfile(path):
                files.append(InputFile(path.relative_to(folder).as_posix(), path))
            else:
                others.add(path)
    reasons = describe_left_out(others)
    if not files:
        hint = "; --recursive reads subfolders" if not recursive and any(map(os.path.isdir, others)) else ""
        reasons = f": left out {reasons}{hint}" if reasons else ""
        raise ValueError(f"{op}: inputs must hold images or shards, got none in the folder '{folder}'{reasons}")
    if reasons:
        left_out.append(f"left out of '{folder}': {reasons}")
    return sorted(files, key=lambda file: file.name)


def name_results(names: Sequence[str], file_kinds: Sequence[str]) -> list[str]:
    """Return the name of the results of each image, without the ending of the image where that is enough.

    The images a.jpg and a.png have the results a.jpg and a.png, so that no result replaces another; b.jpg has b.

    Args:
        names: of images, with their endings.
        file_kinds: of the files of results, see `name_file`.

    Returns:
        A name for each image, in the same order.

    Example:
        >>> name_results(["a.jpg", "a.png", "more/b.jpg"], ["png"])
        ['a.jpg', 'a.png', 'more/b']
    """
    stems = [PurePosixPath(name).with_suffix("").as_posix() for name in names]
    # some file systems do not distinguish upper case from lower
    files = Counter(name_file(stem, kind).casefold() for stem in stems for kind in file_kinds)
    alone = (all(files[name_file(stem, kind).casefold()] == 1 for kind in file_kinds) for stem in stems)
    return [stem if single else name for stem, name, single in zip(stems, names, alone, strict=True)]


def name_file(result: str, kind: str) -> str:
    """Return the name of a file of results.

    Args:
        result: name of the results of an image.
        kind: ending of the file, which may have a word before it: "png", "overlay.jpg".

    Example:
        >>> name_file("more/b", "png"), name_file("more/b", "overlay.jpg")
        ('more/b.png', 'more/b_overlay.jpg')
    """
    return f"{result}_{kind}" if "." in kind else f"{result}.{kind}"


def read_stamp(paths: Iterable[Path]) -> list[int]:
    """Return the size in bytes and the time of the last change of each file, by which a replaced one is noticed.

    Args:
        paths: of the files; 0 stands for one that is missing, which is reported when it is read.

    Example:
        >>> read_stamp([Path("missing.jpg")])
        [0, 0]
    """
    stamp = []
    for path in paths:
        try:
            state = path.stat()
            stamp += [state.st_size, state.st_mtime_ns]
        except OSError:
            stamp += [0, 0]
    return stamp
