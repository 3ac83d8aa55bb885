"""Find the edges of all images of parquet files: `python examples/dataset_job.py images/ edges/`.

This is the loop of an engine for data sets, batch by batch. It needs the extra data: pip install 'trace_fast[data]'. On
one machine, `trace-fast edges images/ -o edges/` does more: it continues a job that was interrupted.
"""

import sys
from pathlib import Path

import pyarrow.parquet as parquet

import trace_fast


def main(source: str, target: str, column: str = "bytes", rows: int = 64) -> None:
    """Write a parquet file of edges for each one of images; a row whose image cannot be read has an error."""
    find_edges = trace_fast.BatchEdges("mini", image=column)  # picklable: engines send it to other processes
    Path(target).mkdir(parents=True, exist_ok=True)
    paths = sorted(Path(source).glob("*.parquet"))
    if not paths:
        sys.exit(f"no parquet files in the folder '{source}'")
    for path in paths:
        failed = 0
        with parquet.ParquetWriter(Path(target) / path.name, find_edges.schema) as writer:
            for batch in parquet.ParquetFile(path).iter_batches(rows):
                table = find_edges({name: batch.column(name) for name in batch.schema.names})
                failed += len(table) - table.column("error").null_count
                writer.write_table(table)
        print(f"{path.name}: {failed} images failed")


if __name__ == "__main__":
    main(*sys.argv[1:])
