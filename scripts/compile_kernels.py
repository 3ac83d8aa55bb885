"""Compile every Triton kernel and tile configuration for sm_80 and sm_90, without a GPU, and tabulate their resources.

`python scripts/compile_kernels.py` writes benchmarks/results/kernels.json: registers a thread, bytes spilled to
local memory and shared memory of a program, as ptxas reports them, and how busy its hottest loop keeps a scheduler. The
launchers themselves run, so that the shipped kernels are compiled: only the last step, the launch, is left out.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from workload import EXTRA

from trace_fast.kernels import attention, divergence
from trace_fast.kernels.launch import Config

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results" / "kernels.json"
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
ARCHITECTURES = (80, 90)
CHANNELS = (40, 64, 72, 80, 128, 160, 256)
TOKENS, HEADS, COLUMNS, OTHERS = 1024, 8, 9, 333

# why a configuration that spills stays; the first that applies
REASONS = (
    (lambda row: not row["shipped"], "a tuning candidate, not shipped"),
    (
        lambda row: row["dtype"] == "float32",
        "a product of float32 is three of tf32, whose operands a thread holds twice, as leading and trailing halves; "
        "heads this wide leave no room even in the smallest tile, and networks on a GPU run in half precision",
    ),
)


class Absent:
    """A stand-in for the driver of a GPU that is not there."""

    def __init__(self, architecture: int):
        self.target = GPUTarget("cuda", architecture, 32)

    def get_current_target(self) -> GPUTarget:
        """Return the target of the compiler."""
        return self.target

    def get_current_device(self) -> int:
        """Return one device for each architecture, since compiled kernels are cached by device."""
        return self.target.arch

    def get_current_stream(self, _: int) -> int:
        """Return a stream, on which nothing is launched."""
        return 0


@contextlib.contextmanager
def compiling(architecture: int) -> Iterator[dict[str, Any]]:
    """Compile the launches inside for an architecture, without running them; yield the kernels by name."""
    compiled: dict[str, Any] = {}
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        compiled[self.fn.__name__.removesuffix("_kernel")] = run(self, *args, grid=grid, warmup=True, **options)

    driver.set_active(Absent(architecture))
    JITFunction.run = compile_only
    try:
        yield compiled
    finally:
        JITFunction.run = run


def resources(kernel: Any, architecture: int) -> dict[str, int]:
    """Return registers, spilled bytes, shared memory and hottest loop of a compiled kernel."""
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(kernel.asm["ptx"])
        suffix = "a" if architecture == 90 else ""
        command = [TOOLS / "ptxas", "-v", f"--gpu-name=sm_{architecture}{suffix}", source, "-o", binary]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        command = [TOOLS / "nvdisasm", "-c", "-novliw", binary]
        code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    stores, loads = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report).groups()
    registers = re.search(r"Used (\d+) registers", report).group(1)
    spilled = int(stores) + int(loads)
    return {"registers": int(registers), "spilled": spilled, "shared": kernel.metadata.shared, **hottest_loop(code)}


def hottest_loop(code: str) -> dict[str, int]:
    """Count the instructions of a warp in one pass of the loop with the most exponentials or logarithms, and those.

    The special-function unit takes 8 clocks of a scheduler for one of a warp's, so that a loop is bound by 8 * special
    or by issued, whichever is more.
    """
    labels, instructions = {}, []
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            instructions.append(instruction[1])
    loops = []
    for index, instruction in enumerate(instructions):
        branch = re.search(r"BRA.*`\((\.L_x_\d+)\)", instruction)
        if branch and labels.get(branch[1], index + 1) <= index:
            body = instructions[labels[branch[1]] : index + 1]
            loops.append((sum("MUFU.EX2" in x or "MUFU.LG2" in x for x in body), -len(body)))
    special, length = max(loops, default=(0, 0))
    return {"issued": -length, "special": special} if special else {}


class Case(NamedTuple):
    """One kernel to compile: its row of the table, its configuration, and the launcher to call."""

    row: dict[str, Any]
    config: Config
    launch: Callable[[], Any]
    picked: bool = True  # for a shape of this size


def cases() -> Iterator[Case]:
    """Yield every kernel, dtype of the features or maps, head size and configuration."""
    for channels, dtype in itertools.product(CHANNELS, (torch.bfloat16, torch.float32)):
        yield from attention_cases(dtype, HEADS, TOKENS, channels)
    for dtype in (torch.float32, torch.bfloat16):
        maps, masses = torch.empty(1, TOKENS, TOKENS, dtype=dtype), (torch.empty(16), torch.empty(16))
        for config in divergence.CONFIGS[dtype.itemsize]:
            launch = functools.partial(divergence.measure_divergence, maps, maps, (32, 32), config)
            yield Case({"kernel": "divergence", "dtype": name(dtype), "shipped": True}, config, launch)
        yield Case({"kernel": "finish", "dtype": name(dtype), "shipped": True}, divergence.FINISH, launch)
        launch = functools.partial(
            attention.accumulate_resized, maps, torch.empty(1, 256, 256), (16, 16), (32, 32), 0.1, masses
        )
        yield Case({"kernel": "accumulate_resized", "dtype": name(dtype), "shipped": True}, attention.RESIZED, launch)


def attention_cases(dtype: torch.dtype, heads: int, tokens: int, channels: int, device: str = "cpu") -> Iterator[Case]:
    """Yield the attention kernels at one shape, in every configuration that is shipped or to be tried for it."""
    query, key = torch.randn(2, 1, tokens, heads, channels, device=device).to(dtype).transpose(2, 3)
    x = attention.Features(query, key, channels**-0.5)
    values, grad = torch.randn(tokens, COLUMNS, device=device), torch.randn(1, tokens, COLUMNS, device=device)
    parts, lse = torch.randn(1, heads, tokens, COLUMNS, device=device), torch.randn(1, heads, tokens, device=device)
    statistics, total = torch.stack([lse, lse.exp()]), torch.zeros(1, tokens, tokens, device=device)
    backward = functools.partial(attention.readout_backward, grad, query, key, values, parts, lse, channels**-0.5)
    others = torch.randn(1, heads, OTHERS, channels, device=device).to(dtype)
    add = functools.partial(attention.add_probabilities, total, x)
    launchers = (
        ("row_statistics", {}, x.row_grid, functools.partial(attention.row_statistics, x)),
        ("exclude_keys", {}, x.row_grid, functools.partial(attention.exclude_keys, x, lse, others)),
        ("add_probabilities", {}, x.tile_grid, functools.partial(add, statistics, 1.0)),
        ("add_probabilities", {"lse": True}, x.tile_grid, functools.partial(add, lse[None], 1.0)),
        ("readout", {}, x.row_grid, functools.partial(attention.readout, query, key, values, channels**-0.5)),
        ("readout_keys", {}, x.column_grid, backward),
        ("readout_queries", {}, x.row_grid, backward),
    )
    for kernel, variant, grid, launch in launchers:
        shipped = attention.candidates(kernel, dtype.itemsize, x.wide + x.tail)
        extra = EXTRA.get(kernel, ()) if dtype.itemsize == 2 and channels <= 80 and not variant else ()
        for config in dict.fromkeys((*shipped, *extra)):
            row = {"kernel": kernel, **variant, "dtype": name(dtype), "channels": channels}
            row["shipped"] = config in shipped
            yield Case(row, config, launch, config == x.pick(kernel, grid))


@contextlib.contextmanager
def only(kernel: str, config: Config) -> Iterator[None]:
    """Let an attention kernel pick this configuration alone."""
    pick = attention.Features.pick
    attention.Features.pick = lambda self, name, grid: config if name == kernel else pick(self, name, grid)
    try:
        yield
    finally:
        attention.Features.pick = pick


def name(dtype: torch.dtype) -> str:
    """Return the name of a dtype, such as bfloat16."""
    return str(dtype).removeprefix("torch.")


def compile_case(case: Case, architecture: int) -> Any:
    """Compile the kernel of a case."""
    with only(case.row["kernel"], case.config), compiling(architecture) as compiled:
        case.launch()
    return compiled[case.row["kernel"]]


def tabulate(selected: Iterable[Case], architectures: Sequence[int] = ARCHITECTURES) -> list[dict[str, Any]]:
    """Return a row for each case and architecture."""
    rows = []
    for architecture, case in tqdm(list(itertools.product(architectures, selected)), unit="kernel", disable=None):
        taken = resources(compile_case(case, architecture), architecture)
        row = {**case.row, "sm": architecture, "tile": list(case.config), **taken}
        if taken["spilled"]:
            row["reason"] = next((why for applies, why in REASONS if applies(row)), "")  # tests ask for one
        rows.append(row)
    return rows


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--output", type=Path, default=RESULTS)
    output = parser.parse_args().output
    rows = tabulate(cases())
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    columns = "tile is rows, columns, warps, stages and, where not 0, n: one exponential in n is a polynomial; lse: "
    columns += "the log-sum-exps of the rows are given"
    part = output.with_suffix(".part")
    part.write_text(f'{{"triton": "{triton.__version__}", "columns": "{columns}", "kernels": [\n  {lines}\n]}}\n')
    os.replace(part, output)
    for row in rows:
        if row["spilled"]:
            print("spills:", row)


if __name__ == "__main__":
    main()
