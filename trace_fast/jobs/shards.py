"""Shards: tar files of webdataset and parquet files, read image by image and written with the same bytes each time."""

from __future__ import annotations

import functools
import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

from trace_fast.extras import require
from trace_fast.io.archives import list_pictures
from trace_fast.jobs.inputs import name_results

if TYPE_CHECKING:
    from trace_fast.jobs.tasks import Result, Task

__all__ = ["EdgeShards", "get_content", "import_arrow", "list_images", "open_shard_writer"]

Image = tuple[str, "Path | bytes | Exception"]

# columns of parquet files: of images, by the first that is there, and of their names
IMAGE_COLUMNS = ("image", "bytes", "jpg", "jpeg", "png", "webp")
KEY_COLUMNS = ("key", "__key__", "id")
ROWS = 64  # of a row group, whose images are in memory at a time


class ShardWriter(Protocol):
    """Writes results to an open shard, in order."""

    def add(self, result: Result) -> None:
        """Add a result."""
        ...


def import_arrow(op: str) -> Any:
    """Import pyarrow and its parquet, or explain how to install it."""
    require(op, "pyarrow")
    import pyarrow
    import pyarrow.parquet

    return pyarrow


def list_images(task: Task, path: Path, left_out: Counter[str]) -> Iterator[Image]:
    """Yield the name and the bytes of each image of a shard, in order.

    Args:
        task: for messages, and for the kinds of its results.
        path: of a tar or parquet file.
        left_out: to which members of a tar file that are no pictures are added; see `list_pictures`.

    Raises:
        ValueError: the shard is damaged.
        OSError: the file cannot be read.
    """
    if path.suffix.lower() == ".tar":
        yield from _list_members(task, path, left_out)
    else:
        yield from _list_rows(task, path)


@contextmanager
def refuse_damaged(subject: str, path: Path) -> Iterator[None]:
    """Refuse a shard that is not what its ending says; libraries fail in many ways on damaged bytes.

    Args:
        subject: function and argument, for the message.
        path: of the shard.

    Raises:
        ValueError: the block raised an error of the file.
    """
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        kind = path.suffix.lower().removeprefix(".")
        raise ValueError(f"{subject} must be complete {kind} files, got '{path}': {error}") from error


def _list_members(task: Task, path: Path, left_out: Counter[str]) -> Iterator[Image]:
    """Yield the pictures of a tar file; other members, such as captions, are not read."""
    with refuse_damaged(f"{task.op}: inputs", path), tarfile.open(path, "r:") as archive:
        pictures, others = list_pictures(archive)
        left_out += others
        for member, name in zip(pictures.values(), name_results([*pictures], task.file_kinds), strict=True):
            opened = archive.extractfile(member)
            assert opened is not None  # of a file
            yield name, opened.read()


def _list_rows(task: Task, path: Path) -> Iterator[Image]:
    """Yield the images of the rows of a parquet file."""
    arrow, subject = import_arrow(task.op), f"{task.op}: inputs"
    with refuse_damaged(subject, path):
        schema = arrow.parquet.read_schema(path)
    image, key = _choose_columns(task.op, schema, path)
    columns = [image] if key is None else [image, key]
    with refuse_damaged(subject, path), arrow.parquet.ParquetFile(path) as file:
        row = 0
        for batch in file.iter_batches(batch_size=ROWS, columns=columns):
            cells = batch.column(image).to_pylist()
            keys = [None] * len(cells) if key is None else batch.column(key).to_pylist()
            for cell, name in zip(cells, keys, strict=True):
                yield str(row if name is None else name), get_content(cell)
                row += 1


def get_content(cell: Any) -> bytes | Path | Exception:
    """Return the image in a cell: its bytes or the path of its file, or the reason why there is none.

    Args:
        cell: bytes, a path, or a record of them as datasets of Hugging Face have it.
    """
    content = cell
    if isinstance(cell, dict):
        content = cell.get("path") if cell.get("bytes") is None else cell["bytes"]
    if isinstance(content, str):
        # a pipe or a device would let the job wait without an end
        missing = FileNotFoundError(f"edges: image must be an existing file, got {content!r}")
        return Path(content) if os.path.isfile(content) else missing
    if isinstance(content, bytes):
        return content
    return TypeError(
        "edges: image must be bytes, a path, or a record with bytes or a path, which Image(decode=False) of datasets "
        f"gives, got {type(content).__name__}"
    )


def _choose_columns(op: str, schema: Any, path: Path) -> tuple[str, str | None]:
    """Return the columns of images and of their names, None without such a column."""
    image = next((name for name in IMAGE_COLUMNS if name in schema.names), None)
    if image is None:
        raise ValueError(
            f"{op}: inputs must be parquet files with a column {' or '.join(IMAGE_COLUMNS)}, got "
            f"{', '.join(schema.names)} in '{path}'"
        )
    return image, next((name for name in KEY_COLUMNS if name in schema.names), None)


@contextmanager
def open_shard_writer(task: Task, suffix: str, file: BinaryIO) -> Iterator[ShardWriter]:
    """Write a shard of results; its bytes depend on the results and the settings alone.

    Args:
        task: whose results they are.
        suffix: ".tar" or ".parquet".
        file: to write to.

    Yields:
        The writer.
    """
    if suffix == ".tar":
        settings = json.dumps({"trace_fast": task.settings}, sort_keys=True)
        # a comment is what every program that reads tar files skips
        with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT, pax_headers={"comment": settings}) as tar:
            yield TarWriter(tar)
            is_empty = not tar.getmembers()
        if is_empty:  # Python reads no tar file that has a comment alone
            file.seek(0)
            file.truncate()
            file.write(bytes(tarfile.RECORDSIZE))
    else:
        from trace_fast.jobs.columns import make_schema, make_table

        arrow = import_arrow(task.op)
        with arrow.parquet.ParquetWriter(file, make_schema(task)) as parquet:
            writer = ParquetWriter(lambda results: parquet.write_table(make_table(task, results)))
            yield writer
            writer.flush()


class EdgeShards:
    """The edge files in shards of results, as `trace-fast edges` writes them, by the keys of their images.

    Args:
        op: name of the calling function, for messages.
        paths: of tar and parquet files.

    Raises:
        ValueError: a shard is damaged, or has no edges.
        RuntimeError: there is a parquet file, and pyarrow is not installed.
    """

    def __init__(self, op: str, paths: Iterable[Path]):
        self.op = op
        # the shard, and where in it: offset and length in bytes, or row group and row
        self.positions: dict[str, tuple[Path, int, int]] = {}
        for path in paths:
            index = self._index_members if path.suffix.lower() == ".tar" else self._index_rows
            self.positions |= {key: (path, first, second) for key, first, second in index(path)}

    def _index_members(self, path: Path) -> Iterator[tuple[str, int, int]]:
        """Yield the key, offset and length of each edge file of a tar file."""
        with refuse_damaged(f"{self.op}: maps", path), tarfile.open(path, "r:") as archive:
            pictures, _ = list_pictures(archive)
        for name, member in pictures.items():
            if name.endswith(".png"):
                yield name.removesuffix(".png"), member.offset_data, member.size

    def _index_rows(self, path: Path) -> Iterator[tuple[str, int, int]]:
        """Yield the key, row group and row of each row of a parquet file."""
        arrow, subject = import_arrow(self.op), f"{self.op}: maps"
        with refuse_damaged(subject, path):
            schema = arrow.parquet.read_schema(path)
        if missing := {"key", "edges"} - set(schema.names):
            raise ValueError(f"{self.op}: maps must have columns key and edges, got '{path}' without {missing}")
        with refuse_damaged(subject, path), arrow.parquet.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                keys = file.read_row_group(group, ["key"])["key"].to_pylist()
                yield from ((key, group, row) for row, key in enumerate(keys))

    def read(self, key: str) -> bytes:
        """Return the edge file of an image.

        Args:
            key: of the image.

        Raises:
            ValueError: no shard has the image, or it could not be read when its edges were to be found.
            OSError: the shard cannot be read.
        """
        if key not in self.positions:
            raise ValueError(f"{self.op}: maps must have the edges of every image, got none of the key '{key}'")
        path, first, second = self.positions[key]
        if path.suffix.lower() == ".tar":
            with open(path, "rb") as file:
                file.seek(first)
                return file.read(second)
        content = self._read_rows(path, first)[second]
        if content is None:
            raise ValueError(f"{self.op}: maps must be of images that were read, got an error for '{key}' in '{path}'")
        return content

    @functools.lru_cache(maxsize=4)  # noqa: B019 (as long as a command)
    def _read_rows(self, path: Path, group: int) -> list[bytes | None]:
        """Return the edge files of a row group, of which several threads read rows in order."""
        arrow = import_arrow(self.op)
        with refuse_damaged(f"{self.op}: maps", path), arrow.parquet.ParquetFile(path) as file:
            rows: list[bytes | None] = file.read_row_group(group, ["edges"])["edges"].to_pylist()
            return rows


class TarWriter:
    """Adds the files of each result to a tar file, and a JSON file of what else is known."""

    def __init__(self, archive: tarfile.TarFile):
        self.archive = archive

    def add(self, result: Result) -> None:
        """Add a result."""
        known = {name: getattr(result, name) for name in ("height", "width", "timestep", "error")}
        content = json.dumps({"key": result.name, **known}, sort_keys=True).encode()
        for kind, data in {**result.files, "json": content}.items():
            # of no time, user or permission but the default
            member = tarfile.TarInfo(f"{result.name}.{kind}")
            member.size = len(data)
            self.archive.addfile(member, io.BytesIO(data))


class ParquetWriter:
    """Writes results in row groups of one size."""

    def __init__(self, write: Any):
        self.write = write
        self.results: list[Result] = []

    def add(self, result: Result) -> None:
        """Add a result."""
        self.results.append(result)
        if len(self.results) == ROWS:
            self.flush()

    def flush(self) -> None:
        """Write the results that wait."""
        if self.results:
            self.write(self.results)
        self.results = []
