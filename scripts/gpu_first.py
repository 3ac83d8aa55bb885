"""First contact with a GPU, without building anything: `python scripts/gpu_first.py check`, then `time`.

`check` compares every Triton kernel and tile with float64, the most important first. `time` times the same kernels and
tiles over the floors of the GPU at hand. Both print what is expected, and what it means if it is otherwise, and write
benchmarks/results/gpu-check.json and gpu-time.json, from which `scripts/tables.py` makes a table; what is not begun
when --seconds have passed is left out. `wheels` names the packages that the benchmarks of backbones need beside torch
and Triton. --rehearse takes the CPU for a GPU: small shapes, kernels interpreted, times that mean nothing.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import importlib.util
import itertools
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
if __name__ == "__main__":  # decided before anything imports triton
    os.environ["TRITON_INTERPRET"] = "1" if "--rehearse" in sys.argv else "0"
    os.environ["TRACE_FAST_BACKEND"] = "triton"

import torch  # noqa: E402
import triton  # noqa: E402
from torch import Tensor  # noqa: E402

import trace_fast  # noqa: E402

if importlib.util.find_spec("trace_fast.kernels") is None:  # the package is not installed
    source = importlib.util.spec_from_file_location(
        "trace_fast.kernels", ROOT / "kernels/jit/__init__.py", submodule_search_locations=[str(ROOT / "kernels/jit")]
    )
    assert source is not None
    assert source.loader is not None
    sys.modules[source.name] = trace_fast.kernels = importlib.util.module_from_spec(source)  # type: ignore[attr-defined]
    source.loader.exec_module(sys.modules[source.name])

from ceilings import event_times, measured  # noqa: E402
from workload import EXTRA, SHAPES, Shape  # noqa: E402

from trace_fast import ops, reference  # noqa: E402
from trace_fast.kernels import attention, divergence  # noqa: E402

# what a failure means, and where to look
MEANING = {
    "map": "a wrong product or tile: run the other tiles below, then compute-sanitizer on this shape",
    "lse": "the one-pass capture must not be used: flash's statistics differ from those of our logits",
    "tile": "take this tile out of CONFIGS",
    "readout": "students would be trained and read wrongly: readout_kernel, or the gradient that is off",
    "divergence": "scores and steps are wrong, or not the same in every run: the order of partial sums",
    "resized": "find_neighbor rounds differently on the device",
    "graph": "a launch is on another stream, or a graph holds memory that was freed",
}
HALF = torch.bfloat16
Check = tuple[str, str, Callable[[], tuple[bool, str]]]  # kind, what, whether it is right and figures


def shapes(rehearsed: bool) -> list[tuple[str, Shape]]:
    """Return the shapes of the backbones, each once; small ones for a rehearsal."""
    distinct = {shape[1:]: (model, shape) for model, group in SHAPES.items() for shape in group if shape.tokens >= 256}
    if not rehearsed:
        return list(distinct.values())
    return [(model, Shape(1, 2, 40, shape.channels)) for model, shape in distinct.values() if shape.channels <= 72][:2]


def features(shape: Shape, device: str, dtype: torch.dtype = HALF, batch: int = 1) -> tuple[Tensor, Tensor]:
    """Return queries and keys whose logits have a deviation of 3."""
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, batch, shape.tokens, shape.heads, shape.channels, generator=generator)
    return (3 * query).to(device, dtype).transpose(1, 2), key.to(device, dtype).transpose(1, 2)


def check_map(shape: Shape, device: str, dtype: torch.dtype = HALF, batch: int = 1, cut: int = 0) -> tuple[bool, str]:
    """Compare 64 rows of a map with float64; `cut` takes the first channels away, so that rows start anywhere."""
    query, key = (x[..., cut:] for x in features(shape._replace(channels=shape.channels + cut), device, dtype, batch))
    rows, scale = torch.linspace(0, shape.tokens - 1, 64, device=device).long(), shape.channels**-0.5
    exact, eager = (
        (query[:, :, rows].to(precision) @ key.to(precision).mT * scale).softmax(-1).mean(1)
        for precision in (torch.float64, torch.float32)
    )
    result = ops.attention_map(query, key)
    error, allowed = ((x.double() - exact).abs().max().item() for x in (result[:, rows], eager))
    off = (result.sum(-1) - 1).abs().max().item()
    return (
        error < 2 * allowed + 2e-7 and off < 1e-4,
        f"error {error:.1e}, eager's {allowed:.1e}, rows off 1 by {off:.1e}",
    )


def check_lse(shape: Shape, device: str) -> tuple[bool, str]:
    """Compare the row statistics with the log-sum-exps of torch's flash attention."""
    query, key = features(shape, device)
    top, mass = attention.row_statistics(attention.Features(query, key, shape.channels**-0.5))
    own = (top + mass.log2()) / attention.LOG2E.value
    if device == "cuda":
        other = torch.ops.aten._scaled_dot_product_flash_attention(query, key, key)[1]
    else:
        other = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, key)[1]
    difference = (own - other).abs().max().item()
    return difference < 1e-3, f"largest difference {difference:.1e}"


def check_tiles(shape: Shape, device: str) -> tuple[bool, str]:
    """Compare every tile of both passes with the one that is picked."""
    query, key = features(shape, device)
    x = attention.Features(query, key, shape.channels**-0.5)
    statistics, wrong, count = attention.row_statistics(x), [], 0
    expected = query.new_zeros((1, shape.tokens, shape.tokens), dtype=torch.float32)
    attention.add_probabilities(expected, x, statistics, 1.0)
    for kernel in ("row_statistics", "add_probabilities"):
        for config in dict.fromkeys((*attention.candidates(kernel, 2, x.wide + x.tail), *EXTRA[kernel])):
            count += 1
            total = torch.zeros_like(expected)
            try:
                used = attention.row_statistics(x, config) if kernel == "row_statistics" else statistics
                attention.add_probabilities(total, x, used, 1.0, config if kernel == "add_probabilities" else None)
                right = bool((total - expected).abs().max() < 1e-6 + 1e-5 * expected.max())
            except Exception as error:  # a candidate may need more than the GPU has
                wrong.append(f"{kernel} {tuple(config)}: {type(error).__name__}")
            else:
                wrong += [] if right else [f"{kernel} {tuple(config)}"]
    return not wrong, f"{count} tiles{'; wrong: ' if wrong else ''}{', '.join(wrong)}"


def check_readout(shape: Shape, device: str, dtype: torch.dtype) -> tuple[bool, str]:
    """Compare a readout and its gradients with float64."""
    inputs = [x.detach().requires_grad_() for x in features(shape, device, dtype)]
    inputs.append(torch.randn(shape.tokens, 9, device=device, requires_grad=True))
    exact = [x.detach().double().requires_grad_() for x in inputs]
    results = []
    for op, arguments in ((ops.readout, inputs), (reference.readout, exact)):
        out = op(*arguments)
        grad = torch.linspace(-1, 1, out.numel(), device=device, dtype=out.dtype).view_as(out)
        results.append((out, *torch.autograd.grad(out, arguments, grad)))
    errors = [((one.double() - two).norm() / two.norm()).item() for one, two in zip(*results, strict=True)]
    bound = 1e-4 if dtype == torch.float32 else 2e-2
    return max(errors) < bound, "relative errors " + " ".join(f"{error:.1e}" for error in errors)


def maps(height: int, width: int, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the maps of two timesteps."""
    logits = 3 * torch.randn(2, height * width, height * width, device=device)
    return logits.softmax(-1).to(dtype), (logits + 0.2 * torch.randn_like(logits)).softmax(-1).to(dtype)


def check_divergence(height: int, width: int, device: str, dtype: torch.dtype) -> tuple[bool, str]:
    """Compare the divergences of every tile with float64, and two runs with each other."""
    previous, current = maps(height, width, device, dtype)
    exact = reference.step_kl_abdiv(previous.double(), current.double(), height, width)
    worst, same = 0.0, True
    for config in divergence.CONFIGS[dtype.itemsize]:
        first, second = (divergence.measure_divergence(previous, current, (height, width), config) for _ in range(2))
        worst = max(worst, *((one - two).abs().max().item() for one, two in zip(first, exact, strict=True)))
        same &= all(torch.equal(one, two) for one, two in zip(first, second, strict=True))
    return worst < 1e-4 and same, f"error {worst:.1e}, the same bits twice: {same}"


def check_resized(side: int, target: int, device: str) -> tuple[bool, str]:
    """Compare a resized map with float64."""
    coarse = torch.randn(1, side**2, side**2, device=device).softmax(-1)
    sizes = (side, side), (target, target)
    exact = reference.resize_attention(coarse.double(), *sizes)
    error = (ops.resize_attention(coarse, *sizes) - exact).abs().max().item()
    return error < 1e-5 * exact.max().item(), f"error {error:.1e}"


def check_graph(shape: Shape) -> tuple[bool, str]:
    """Compare a map from another stream and one from a CUDA graph with an ordinary one, bit for bit."""
    query, key = features(shape, "cuda")
    expected, side = ops.attention_map(query, key), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(10**7)
        streamed = ops.attention_map(query * 1, key * 1)
    torch.cuda.current_stream().wait_stream(side)
    total, graph = torch.zeros_like(expected), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.accumulate_attention(total, query, key, 1.0)
    total.zero_()
    graph.replay()
    same = torch.equal(streamed, expected), torch.equal(total, expected)
    return all(same), f"stream {same[0]}, graph {same[1]}"


def checks(device: str, rehearsed: bool) -> Iterator[Check]:
    """Yield the checks, the most important first."""
    models = shapes(rehearsed)
    for model, shape in models:
        yield "map", f"map of {model}, {shape[1:]}", functools.partial(check_map, shape, device)
        yield "lse", f"flash's log-sum-exp is ours, {shape[1:]}", functools.partial(check_lse, shape, device)
    heads, tokens, channels = (2, 24, 40) if rehearsed else (4, 1000, 40)
    shape = Shape(1, heads, tokens, channels)
    others: dict[str, dict[str, Any]] = {
        "float16": {"dtype": torch.float16},
        "three images": {"batch": 3},
        "rows that start anywhere": {"cut": 1},
        "float32": {"dtype": torch.float32},
    }
    yield "map", "map of one token", functools.partial(check_map, Shape(1, 1, 1, 8), device)
    yield "map", "map that no tile divides", functools.partial(check_map, Shape(1, 5, 51, 13), device)
    for name, options in others.items():
        yield "map", f"map, {name}", functools.partial(check_map, shape, device, **options)
    for size, dtype in itertools.product((40, 72) if rehearsed else (40, 64, 72, 128, 160), (HALF, torch.float32)):
        call = functools.partial(check_readout, shape._replace(channels=size), device, dtype)
        yield "readout", f"readout and gradients, {size} channels, {dtype}", call
    # two segments of rows, in a rehearsal with few columns, since the interpreter takes minutes for many keys
    grids = ((17, 3 if rehearsed else 23, torch.float32), (32, 32, HALF), (64, 64, torch.float32))
    for height, width, dtype in grids[:1] if rehearsed else grids:
        call = functools.partial(check_divergence, height, width, device, dtype)
        yield "divergence", f"divergence, {height} x {width}, {dtype}", call
    for side in (4,) if rehearsed else (8, 16, 32):
        yield "resized", f"resized, {side}", functools.partial(check_resized, side, 6 if rehearsed else 64, device)
    if device == "cuda":
        yield "graph", "another stream, and a CUDA graph", functools.partial(check_graph, shape)
    for model, shape in models:
        yield "tile", f"every tile, {model}, {shape[1:]}", functools.partial(check_tiles, shape, device)


def run_checks(device: str, rehearsed: bool, end: float, rows: list[dict[str, Any]]) -> None:
    """Run the checks until the time is over; print them and add them to rows."""
    for kind, what, call in checks(device, rehearsed):
        if time.monotonic() > end:
            print(f"left out: {what}")
            continue
        try:
            right, figures = call()
        except Exception as error:  # the next check may tell more
            right, figures = False, f"{type(error).__name__}: {str(error).strip()[:300]}"
        print(f"{'right' if right else 'WRONG'}  {what}: {figures}", flush=True)
        if not right:
            print(f"       it means: {MEANING[kind]}", flush=True)
        rows.append({"kind": kind, "what": what, "right": right, "figures": figures})


def seconds(call: Callable[[], object], rehearsed: bool) -> float:
    """Return the median time of a call."""
    if rehearsed:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    times = sorted(event_times(call, milliseconds=40))
    return times[len(times) // 2]


def timings(device: str, rehearsed: bool) -> Iterator[tuple[str, str, float, Callable[[], object], bool]]:
    """Yield what is timed: name, what is expected, its floor in seconds, the call, and whether it is what ships."""
    rates = SimpleNamespace(attention=lambda *_, **__: 1.0, traffic=lambda _: 1.0) if rehearsed else measured()
    for model, shape in shapes(rehearsed):
        query, key = features(shape, device)
        x = attention.Features(query, key, shape.channels**-0.5)
        statistics, floor = attention.row_statistics(x), rates.attention(shape, 1)
        total = query.new_zeros((1, shape.tokens, shape.tokens), dtype=torch.float32)
        passes: tuple[tuple[str, str, float, Any, Callable[[Any], object]], ...] = (
            ("row_statistics", "1.1 floors", floor, x.row_grid, functools.partial(attention.row_statistics, x)),
            (
                "add_probabilities",
                "1.7 to 2.1 floors, more where the level-two cache binds (128 channels)",
                rates.attention(shape, 1, adds_map=True),
                x.tile_grid,
                lambda config, x=x, s=statistics, t=total: attention.add_probabilities(t, x, s, 1.0, config),
            ),
        )
        for kernel, expected, least, grid, launch in passes:
            picked = x.pick(kernel, grid)
            for config in dict.fromkeys((picked, *attention.candidates(kernel, 2, x.wide + x.tail), *EXTRA[kernel])):
                name = f"{kernel}, {model}, {shape[1:]}, tile {tuple(config)}"
                yield name, expected, least, functools.partial(launch, config), config == picked
        values = torch.randn(shape.tokens, 9, device=device)
        yield (
            f"readout, {model}, {shape[1:]}",
            "1.0 to 1.3 floors",
            floor,
            (lambda q=query, k=key, v=values: ops.readout(q, k, v)),
            True,
        )
        sdpa = functools.partial(torch.nn.functional.scaled_dot_product_attention, query, key, key)
        yield (
            f"scaled_dot_product_attention, {model}, {shape[1:]}",
            "what the readout is compared with",
            floor,
            sdpa,
            True,
        )
    side = 6 if rehearsed else 64
    previous, current = (x[:1] for x in maps(side, side, device, torch.float32))
    traffic = rates.traffic(2 * previous.nbytes)
    yield "copy of a map", "1 floor", traffic, lambda: previous.clone(), True
    for config in divergence.CONFIGS[4]:
        call = functools.partial(divergence.measure_divergence, previous, current, (side, side), config)
        yield f"step_kl_abdiv, tile {tuple(config)}", "1.2 floors for the best tile", traffic, call, True
    for coarse in (3,) if rehearsed else (8, 16, 32):
        small = torch.randn(1, coarse**2, coarse**2, device=device).softmax(-1)
        resize = functools.partial(ops.accumulate_resized, previous, small, (coarse, coarse), (side, side), 0.1)
        yield f"accumulate_resized, {coarse}", "1.3 floors", traffic, resize, True


def run_timings(device: str, rehearsed: bool, end: float, rows: list[dict[str, Any]]) -> None:
    """Time what there is until the time is over; print it and add it to rows."""
    for what, expected, floor, call, ships in timings(device, rehearsed):
        if time.monotonic() > end:
            print(f"left out: {what}")
            continue
        try:
            taken = seconds(call, rehearsed)
        except Exception as error:  # a candidate may need more than the GPU has
            print(f"{what}: {type(error).__name__}: {str(error).strip()[:300]}", flush=True)
            continue
        mark = "" if ships else "  (a candidate)"
        print(f"{what}: {taken * 1e6:.1f} us, {taken / floor:.2f} floors; expected {expected}{mark}", flush=True)
        rows.append({"what": what, "expected": expected, "floor": floor, "seconds": taken, "ships": ships})


def wheels(names: tuple[str, ...] = ("diffusers", "pytest", "pytest-benchmark", "tqdm", "safetensors")) -> list[str]:
    """Return "name==version" of packages and all that they need, as installed here, without torch, Triton and numpy."""
    from packaging.requirements import Requirement

    pending, versions = list(names), dict[str, str]()
    while pending:
        name = re.sub(r"[-_.]+", "-", pending.pop()).lower()
        if name in versions or name in ("torch", "triton", "numpy"):
            continue
        versions[name] = importlib.metadata.version(name)
        for line in importlib.metadata.requires(name) or ():
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                pending.append(requirement.name)
    return sorted(f"{name}=={version}" for name, version in versions.items())


def main() -> int:
    """Run one of the actions; return 1 if a check failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("check", "time", "wheels"))
    parser.add_argument("--seconds", type=float, default=200, help="begin nothing new after this time")
    parser.add_argument("--rehearse", action="store_true", help="take the CPU for a GPU")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the results")
    options = parser.parse_args()
    if options.action == "wheels":
        print("\n".join(wheels()))
        return 0
    device, end = "cpu" if options.rehearse else "cuda", time.monotonic() + options.seconds
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    name = "a rehearsal on the CPU" if options.rehearse else torch.cuda.get_device_name()
    print(name, versions, flush=True)
    torch.manual_seed(0)
    run = run_checks if options.action == "check" else run_timings
    rows: list[dict[str, Any]] = []
    try:
        run(device, options.rehearse, end, rows)
    finally:  # Ctrl-C, too, leaves what there is
        results = {"gpu": name, "versions": versions, "commit": os.environ.get("TRACE_FAST_COMMIT", ""), "rows": rows}
        (options.output / f"gpu-{options.action}.json").write_text(json.dumps(results, indent=1) + "\n")
    wrong = [row["what"] for row in rows if not row.get("right", True)]
    print(f"{len(rows)} done" + (f", wrong: {'; '.join(wrong)}" if wrong else ""))
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
