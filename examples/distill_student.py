"""Train a student on your own photographs: `python examples/distill_student.py photos/ run/`.

The folder needs at least 7 photographs, of which 6 are for the preview alone; a useful student needs thousands. A run
that was interrupted is continued by the same command. This needs the extra train: pip install 'trace_fast[train]'.
"""

import logging
import sys
import time
from pathlib import Path

import trace_fast
from trace_fast import DistillConfig


def main(photos: str, folder: str, model: str = "mini", epochs: str = "10") -> None:
    """Distill a student of a model, and write edges of one photograph by the search and by the student."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")  # what the run does, and how far it is
    config = DistillConfig(images=Path(photos), output=Path(folder), model=model, epochs=float(epochs))
    student = trace_fast.load(trace_fast.distill(config))
    teacher = trace_fast.load(model, stage=1)
    photo = min(path for path in Path(photos).iterdir() if path.suffix.lower() in (".jpg", ".png"))
    pictures = []
    for edge_model in (teacher, student):
        started = time.perf_counter()
        edges = trace_fast.edges(photo, model=edge_model)
        print(f"{type(edge_model).__name__}: {time.perf_counter() - started:.2f} s")
        pictures.append(trace_fast.show(photo, edges))
    trace_fast.io.grid(pictures, columns=1).save(Path(folder) / "comparison.png")


if __name__ == "__main__":
    main(*sys.argv[1:])
