"""Results as columns of a declared schema: rows of parquet files, and batches of engines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from trace_fast.jobs.shards import import_arrow

if TYPE_CHECKING:
    from trace_fast.jobs.tasks import Result, Task

__all__ = ["make_schema", "make_table"]


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
