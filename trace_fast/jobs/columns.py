"""Results as columns of a declared schema: rows of parquet files, and batches of engines."""

from __future__ import annotations

import functools
import json
import pickle
from collections.abc import Sequence
from typing import Any

from trace_fast.jobs.finder import EdgeFinder
from trace_fast.jobs.pipeline import compute_results
from trace_fast.jobs.segments import SegmentTask
from trace_fast.jobs.shards import get_content, import_arrow
from trace_fast.jobs.tasks import EdgesTask, Result, Task

__all__ = ["BatchEdges", "make_schema", "make_table"]


def name_columns(task: Task) -> dict[str, str]:
    """Return the column of each kind of file."""
    return {kind: kind.split(".")[0] if "." in kind else task.column for kind in task.file_kinds}


def make_schema(task: Task) -> Any:
    """Return the schema of results, whose types do not depend on the results: some columns of a table may be empty.

    Args:
        task: whose results they are; its settings are in the metadata.

    Returns:
        A pyarrow.Schema.

    Raises:
        RuntimeError: pyarrow is not installed.
    """
    arrow = import_arrow(task.op)
    mask = arrow.struct([("counts", arrow.string()), ("score", arrow.float32()), ("area", arrow.int64())])
    columns = [("key", arrow.string()), ("height", arrow.int32()), ("width", arrow.int32())]
    columns += [(column, arrow.binary()) for column in name_columns(task).values()]
    columns += [("masks", arrow.list_(mask))] if task.has_masks else []
    columns += [("timestep", arrow.int32()), ("error", arrow.string())]
    columns += [(name, arrow.string()) for name in ("model", "revision", "weights", "version")]
    return arrow.schema(columns, {"trace_fast": json.dumps(task.settings, sort_keys=True)})


def make_table(task: Task, results: Sequence[Result]) -> Any:
    """Return results as a pyarrow.Table of `make_schema`, a row each, in order.

    Args:
        task: whose results they are.
        results: of images, and of images that failed.
    """
    schema = make_schema(task)
    columns: dict[str, list[Any]] = {
        "key": [result.name for result in results],
        **{name: [getattr(result, name) for result in results] for name in ("height", "width", "timestep", "error")},
        **{column: [result.files.get(kind) for result in results] for kind, column in name_columns(task).items()},
        **{name: [task.settings.get(name)] * len(results) for name in ("model", "revision", "weights", "version")},
    }
    if task.has_masks:
        columns["masks"] = [result.masks for result in results]
    return import_arrow(task.op).Table.from_pydict({name: columns[name] for name in schema.names}, schema=schema)


class BatchEdges:
    """Find the edges, or the masks, of batches of images in columns, as engines for data sets have them.

    It is called with a batch by `ray.data.Dataset.map_batches`, `datasets.Dataset.map`, Spark's `mapInPandas` and plain
    loops alike. It holds its options alone: the weights are loaded in the process that it runs in, once.
    Results do not depend on batches; they have the bytes of the files of `trace-fast edges`.

    Args:
        model: a name, a repository of the hub or a folder; see `trace_fast.load`.
        image: column of images: bytes, paths, or records of these, as of `datasets.Image(decode=False)`.
        key: column of their names, which the results keep; without such a column they have none.
        masks: find masks, as `trace-fast segment` does, in place of edges; this needs pycocotools.
        workers: threads, see `trace-fast edges`; None is the number that torch has, or for a GPU or a large model that
            of processor cores, at most 4.
        bits: of each pixel of the edges, 8 or 16.
        max_side: of the longer side of images, in pixels; larger ones are reduced before anything else.
        grid: edges at the size of the decoder's output, see `trace_fast.Detector.grid_edges`.
        threshold: of masks; see `trace_fast.instances`.
        top: largest number of masks; see `trace-fast segment`.
        finder_options: what chooses the model beside its name: stage, device, size, dtype, revision, seed, timestep,
            noising, and batch_size, the images of each pass; see `trace_fast.jobs.finder.EdgeFinder`.

    Example:
        >>> find = BatchEdges("mini", device="cpu", size=(96, 128))
        >>> table = find({"key": ["a"], "bytes": [Path("photo.jpg").read_bytes()]})  # doctest: +SKIP
        >>> table.column_names  # doctest: +SKIP
        ['key', 'height', 'width', 'edges', 'timestep', 'error', 'model', 'revision', 'weights', 'version']
    """

    def __init__(
        self,
        model: str = "mini",
        image: str = "bytes",
        key: str = "key",
        *,
        masks: bool = False,
        workers: int | None = None,
        bits: int = 8,
        max_side: int | None = None,
        grid: bool = False,
        threshold: float | None = None,
        top: int | None = None,
        **finder_options: Any,
    ):
        finder = EdgeFinder(model, **finder_options)
        self.image, self.key, self.workers = image, key, workers
        task: Task
        if masks:
            task = SegmentTask(finder, threshold=threshold, top=top, max_side=max_side, has_masks=True)
        else:
            task = EdgesTask(finder, bits, max_side=max_side, grid=grid)
        self._task = pickle.dumps(task)

    @property
    def schema(self) -> Any:
        """The pyarrow.Schema of all tables that are returned, whatever the images are; the model is loaded for it."""
        return make_schema(load_task(self._task))

    def __call__(self, batch: Any) -> Any:
        """Return the results of a batch, a row for each of its rows, in order.

        Args:
            batch: columns by their names: a dictionary of lists or arrays, a pandas.DataFrame or a pyarrow.Table.

        Returns:
            A pyarrow.Table with the columns key, height and width in pixels, edges (a PNG file) or labels (a PNG file)
            and masks (records with COCO's RLE, score and area), timestep, error, model, revision, weights (a hash) and
            version. A row has an error where its image cannot be read.

        Raises:
            ValueError: there is no column of images.
            MemoryError, RuntimeError: memory is full, which is no fault of an image; or pyarrow is not installed.
        """
        names = batch.column_names if hasattr(batch, "column_names") else list(batch)
        if self.image not in names:
            raise ValueError(f"BatchEdges: image must be a column, got {self.image!r} and columns {', '.join(names)}")
        cells = list_cells(batch[self.image])
        keys = list_cells(batch[self.key]) if self.key in names else [None] * len(cells)
        task = load_task(self._task)
        images = ((str(index), get_content(cell)) for index, cell in enumerate(cells))
        results = list(compute_results(task, images, self.workers, raise_memory=True))
        table = make_table(task, results)
        column = import_arrow("BatchEdges").array([None if name is None else str(name) for name in keys], "string")
        return table.set_column(0, table.schema.field(0), column)


def list_cells(column: Any) -> list[Any]:
    """Return the cells of a column of any kind of batch as a list."""
    if hasattr(column, "to_pylist"):
        return column.to_pylist()
    return column.tolist() if hasattr(column, "tolist") else list(column)


@functools.lru_cache(maxsize=2)
def load_task(task: bytes) -> Any:
    """Return a task that was pickled: a process that receives it again and again loads its model once."""
    return pickle.loads(task)
