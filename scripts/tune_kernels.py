"""Time every tile configuration of the Triton kernels on the present GPU: `python scripts/tune_kernels.py`.

Writes benchmarks/results/tuning-<gpu>.json and prints, for each kernel and head size, the shipped tile beside the best.
Copy the best into CONFIGS of kernels/jit/attention.py or divergence.py by hand, where it wins by more than the spread.
"""

from __future__ import annotations

import functools
import json
import os
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from ceilings import event_times, measured
from compile_kernels import Case, attention_cases, only
from tqdm import tqdm
from workload import SHAPES

from trace_fast.kernels import divergence

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"


def shapes() -> list[tuple[int, int, int]]:
    """Return heads, tokens and channels of the backbones, each once, from the most work to the least."""
    distinct = {shape[1:] for shapes in SHAPES.values() for shape in shapes if shape.tokens >= 256}
    return sorted(distinct, key=lambda shape: -shape[0] * shape[1] ** 2)


def time_case(case: Case) -> dict[str, float]:
    """Return median and spread of a configuration of an attention kernel."""
    with only(case.row["kernel"], case.config):
        return time_call(case.launch)


def time_call(call: Callable[[], object]) -> dict[str, float]:
    """Return median and spread of a call, in milliseconds."""
    low, median, high = statistics.quantiles(event_times(call, milliseconds=40), n=4)
    return {"median_ms": median * 1e3, "spread_ms": (high - low) * 1e3}


def time_divergence(side: int, device: str = "cuda") -> list[dict[str, Any]]:
    """Return a row for each tile of the divergence, on maps of side x side tokens."""
    tokens = side**2
    previous, current = torch.rand(2, 1, tokens, tokens, device=device).softmax(-1)
    picked = divergence.pick_tile(current, side, side)
    shape = {"kernel": "divergence", "dtype": "float32", "heads": 1, "tokens": tokens, "channels": 0}
    rows = []
    for config in divergence.CONFIGS[4]:
        times = time_call(functools.partial(divergence.measure_divergence, previous, current, (side, side), config))
        rows.append({**shape, "shipped": True, "tile": list(config), "picked": config == picked, **times})
    return rows


def main() -> None:
    """Time every configuration of every shape; print and write the results."""
    rows: list[dict[str, Any]] = []
    try:
        for heads, tokens, channels in tqdm(shapes(), unit="shape", disable=None):
            timed = []
            for case in attention_cases(torch.bfloat16, heads, tokens, channels, "cuda"):
                row = {**case.row, "heads": heads, "tokens": tokens, "tile": list(case.config)}
                timed.append({**row, "picked": case.picked, **time_case(case)})
            rows += timed  # whole shapes
        for side in (32, 64):
            rows += time_divergence(side)
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
