"""Capture on full-size networks, on the CPU: its correctness, and what it costs.

    python scripts/full_size.py ["SD1.5 @512" ...]

Networks of the published configurations with random weights, which prove wiring and cost, never quality. Of one call of
the network at one timestep it measures whether the output is the same bit for bit while query and key are read; by how
much it differs, as a share of its largest number, where blocks attend and make their maps at once; by how much rows of
the mean map differ from a sum of 1; by how much the maps of the first, the middle and the last block differ from a
softmax in float64; and how long the call takes with that capture and without. A model that does not fit in memory is
left out, and named. Writes benchmarks/results/full-size-cpu.json after every model; models that are not asked for stay.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path
from typing import Any

import diffusers
import psutil
import torch
from memory import MODELS, make_tracer
from torch import Tensor
from tqdm import tqdm

from trace_fast.attention import MeanAttention
from trace_fast.io.files import write_atomically

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
DTYPES = {"SD3.5-L @1024": torch.bfloat16}  # others are float32
DEFAULT = ("SD1.5 @512", "PixArt @1024", "SDXL @1024", "SD3.5-L @1024")
ROWS = 64  # of a map that are compared with the reference


@torch.no_grad()
def measure(name: str) -> dict[str, Any]:
    """Return the facts of one model."""
    dtype = DTYPES.get(name, torch.float32)
    weights = {row["model"]: row["weights"] for row in json.loads((RESULTS / "memory.json").read_text())["models"]}
    needed, free = 1.25 * weights[name] * dtype.itemsize / 2, psutil.virtual_memory().available  # listed in bfloat16
    if needed > free:
        return {"model": name, "left_out": f"needs {needed / 2**30:.0f} GiB, and {free / 2**30:.0f} GiB are free"}
    tracer = make_tracer(name, "cpu", dtype)
    backbone = tracer.backbone
    grids = backbone.read_grids()
    latent = torch.randn(backbone.encode(torch.rand(1, 3, *backbone.settings.size)).shape).to(dtype)
    timestep = torch.tensor([99])
    total = torch.empty(1, *[max(height * width for height, width in grids)] * 2)
    mean = MeanAttention(total, grids)
    mean.clear()
    checked, errors = {0, len(grids) // 2, len(grids) - 1}, []

    def check(index: int, query: Tensor, key: Tensor, *_: Tensor | None) -> None:
        if index not in checked:
            return
        height, width = grids[index]
        attention = torch.zeros(1, height * width, height * width)
        MeanAttention(attention, [grids[index]]).on_attention(0, query, key)
        scores = query[:, :, :ROWS].double() @ key.double().mT * query.shape[-1] ** -0.5
        errors.append(float((attention[:, :ROWS] - scores.softmax(-1).mean(1)).abs().max()))

    def forward() -> Tensor:
        return backbone.predict(latent, timestep)

    def captured() -> Tensor:
        with backbone.capture(mean.on_attention, attend=mean.attend):
            return forward()

    plain, plain_seconds = clock(forward)
    attended, captured_seconds = clock(captured)
    with backbone.capture(check):
        read = forward()
    rows = mean.finish().sum(-1)
    return {
        "model": name,
        "dtype": str(dtype).removeprefix("torch."),
        "parameters": sum(parameter.numel() for parameter in backbone.network.parameters()),
        "blocks": len(grids),
        "bit_equal": torch.equal(read, plain),
        "attended_within": float((attended - plain).abs().max() / plain.abs().max()),
        "rows_sum_to_1_within": float((rows - 1).abs().max()),
        "maps_within": max(errors),
        "forward_seconds": round(plain_seconds, 2),
        "capture_over_forward": round(captured_seconds / plain_seconds, 3),
        "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 1),
    }


def clock(call: Any) -> tuple[Tensor, float]:
    """Return the result of a call, and the CPU seconds that it took."""
    started = time.process_time()
    result = call()
    return result, time.process_time() - started


def main() -> None:
    """Measure, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"One of {', '.join(MODELS)}.")
    models = parser.parse_args().models or DEFAULT
    if unknown := set(models) - set(MODELS):
        parser.error(f"MODEL must be one of {', '.join(MODELS)}, got {', '.join(sorted(unknown))}")
    diffusers.utils.logging.set_verbosity_error()
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__, "threads": torch.get_num_threads()}
    path = RESULTS / "full-size-cpu.json"
    rows = {row["model"]: row for row in json.loads(path.read_text())["models"]}
    for name in tqdm(models, unit="model", disable=None):
        rows[name] = {**measure(name), **versions}
        print(json.dumps(rows[name]))
        with write_atomically(path, "full_size") as file:
            file.write((json.dumps({"models": list(rows.values())}, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
