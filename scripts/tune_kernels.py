"""Time every tile configuration of the attention kernels on the present GPU: `python scripts/tune_kernels.py`.

Writes benchmarks/results/tuning-<gpu>.json and prints, for each kernel and head size, the shipped tile beside the best.
Copy the best into CONFIGS of kernels/jit/attention.py by hand, where it wins by more than the spread.
"""

from __future__ import annotations

import json
import os
import re
import statistics
from pathlib import Path
from typing import Any

import torch
import triton
from ceilings import event_times, measured
from compile_kernels import Case, attention_cases, only
from tqdm import tqdm
from workload import SHAPES

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"


def shapes() -> list[tuple[int, int, int]]:
    """Return heads, tokens and channels of the backbones, each once, from the most work to the least."""
    distinct = {shape[1:] for shapes in SHAPES.values() for shape in shapes if shape.tokens >= 256}
    return sorted(distinct, key=lambda shape: -shape[0] * shape[1] ** 2)


def time_case(case: Case) -> tuple[float, float]:
    """Return median and spread of a configuration, in milliseconds."""
    with only(case.row["kernel"], case.config):
        times = event_times(case.launch, milliseconds=40)
    low, median, high = statistics.quantiles(times, n=4)
    return median * 1e3, (high - low) * 1e3


def main() -> None:
    """Time every configuration of every shape; print and write the results."""
    rows: list[dict[str, Any]] = []
    try:
        for heads, tokens, channels in tqdm(shapes(), unit="shape", disable=None):
            timed = []
            for case in attention_cases(torch.bfloat16, heads, tokens, channels, "cuda"):
                median, spread = time_case(case)
                row = {**case.row, "heads": heads, "tokens": tokens, "tile": list(case.config)}
                timed.append({**row, "picked": case.picked, "median_ms": median, "spread_ms": spread})
            rows += timed  # whole shapes
    finally:
        report(rows)


def report(rows: list[dict[str, Any]]) -> None:
    """Print the shipped configurations beside the best, and write all."""

    def identity(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["kernel"], row.get("lse", False), row["heads"], row["tokens"], row["channels"]

    for key in dict.fromkeys(map(identity, rows)):
        group = [row for row in rows if identity(row) == key]
        best, picked = min(group, key=lambda row: row["median_ms"]), next(row for row in group if row["picked"])
        mark = "" if best is picked else f"  best {best['tile']} {best['median_ms']:.3f} +- {best['spread_ms']:.3f}"
        print(f"{key!s:52} shipped {picked['tile']} {picked['median_ms']:.3f} +- {picked['spread_ms']:.3f}{mark}")
    gpu = torch.cuda.get_device_name()
    machine = {"gpu": gpu, "torch": torch.__version__, "triton": triton.__version__, "ceilings": vars(measured())}
    path = RESULTS / f"tuning-{re.sub('[^a-z0-9]+', '-', gpu.lower())}.json"
    part = path.with_suffix(".part")
    part.write_text(json.dumps({**machine, "kernels": rows}, indent=1) + "\n")
    os.replace(part, path)


if __name__ == "__main__":
    main()
