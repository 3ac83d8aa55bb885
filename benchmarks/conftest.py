"""How a provider is timed, and the facts beside the times: machine, threads, versions, backends, memory.

Run `pytest benchmarks --benchmark-only`; add `--benchmark-json=benchmarks/results/<name>.json` to keep the figures.
"""

import ctypes
import importlib.metadata
import os
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import trace_fast
from trace_fast import _C

# seconds and rounds that a provider is timed for, about; a slower one takes several times as long at most
SECONDS, ROUNDS = 2.0, 7


def pytest_benchmark_update_machine_info(config, machine_info):
    for name in ("node", "release"):  # they identify one machine
        del machine_info[name]
    machine_info["cpu"].pop("flags", None)
    machine_info["threads"] = torch.get_num_threads()
    machine_info["cores"] = os.cpu_count()
    machine_info["instruction_set"] = _C.instruction_set()
    machine_info["backends"] = trace_fast.backends()
    machine_info["versions"] = {name: importlib.metadata.version(name) for name in ("trace_fast", "torch", "numpy")}
    if torch.cuda.is_available():
        from ceilings import measured

        machine_info["gpu"] = torch.cuda.get_device_name()
        machine_info["ceilings"] = vars(measured())
        machine_info["versions"]["triton"] = importlib.metadata.version("triton")


def pytest_benchmark_update_commit_info(config, commit_info):
    # where there is no git history
    commit_info["id"] = os.environ.get("TRACE_FAST_COMMIT", commit_info["id"])


def pytest_benchmark_update_json(config, benchmarks, output_json):
    for case in output_json["benchmarks"]:  # thousands of samples, which no table needs
        case["stats"].pop("data", None)


def peak_memory(call: Callable[[], object]) -> int | None:
    """Return the bytes of resident memory that one call adds at its peak, with outputs; None without /proc."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not reset.exists():
        return None

    def read(field: str) -> int:
        line = next(line for line in status.read_text().splitlines() if line.startswith(field))
        return int(line.split()[1]) * 1024

    # memory that the allocator holds would hide the needs of a call
    ctypes.CDLL(None).malloc_trim(0)
    reset.write_text("5")
    before = read("VmRSS")
    call()
    return read("VmHWM") - before


def device_memory(call: Callable[[], object]) -> int:
    """Return the bytes of GPU memory that one call adds at its peak, with outputs."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@pytest.fixture
def measure(benchmark, request) -> Callable[..., None]:
    """Time `call`, which has been verified, as `provider` of a group; `work` holds numbers of a call, such as bytes.

    On a GPU the times are from the clock of the GPU, with the cache flushed before each call; with `graph`, of a CUDA
    graph, and beside them those of calls from Python. `once`: time a call of minutes once.
    """

    def measure(
        group: str,
        provider: str,
        call: Callable[[], object],
        *,
        device: str = "cpu",
        once: bool = False,
        graph: bool = False,
        **work: float,
    ) -> None:
        benchmark.group = group
        if once and not request.config.getoption("benchmark_disable"):
            benchmark.extra_info.update(provider=provider, peak_memory=None)
            benchmark.pedantic(call, rounds=1)
            return
        call()
        if request.config.getoption("benchmark_disable"):
            benchmark(call)
            return
        if device == "cuda":
            from ceilings import event_times, replay

            called = statistics.median(event_times(call))
            try:
                again = replay(call) if graph else call
            except RuntimeError as error:  # some providers cannot be recorded, which their times state
                again, graph = call, False
                warnings.warn(f"{provider} is not timed as a graph: {error}", stacklevel=2)
            quartiles = statistics.quantiles(event_times(again), n=4)
            work.update(seconds=quartiles[1], spread=quartiles[2] - quartiles[0], called=called, graph=graph)
            benchmark.extra_info.update(provider=provider, peak_memory=device_memory(call), **work)
            benchmark.pedantic(lambda: None, rounds=1)  # pytest-benchmark must run something; its times are not used
            return
        memory = peak_memory(call)
        start = time.perf_counter()
        call()
        seconds = time.perf_counter() - start
        slow = seconds > SECONDS
        rounds = max(1, int(5 * SECONDS / seconds)) if slow else max(ROUNDS, min(500, int(SECONDS / seconds)))
        benchmark.extra_info.update(provider=provider, peak_memory=memory, **work)
        benchmark.pedantic(call, rounds=rounds, warmup_rounds=0 if slow else 2)

    return measure


def pytest_terminal_summary(terminalreporter, config):
    session = getattr(config, "_benchmarksession", None)
    if session is None or not session.benchmarks:
        return
    groups: dict[str, list] = {}
    for case in session.benchmarks:
        groups.setdefault(case.group, []).append(case)
    write = terminalreporter.write_line
    write("")
    write(f"{torch.get_num_threads()} threads, {_C.instruction_set()}; memory is what one call adds at its peak")
    for group, cases in groups.items():
        times = {case: case.extra_info.get("seconds", case.stats.median) for case in cases}
        slowest = next((times[case] for case in cases if case.extra_info["provider"] == "eager"), None)
        write("")
        columns = f"{'median ms':>10} {'IQR ms':>8} {'eager /':>8} {'floor':>6} {'GB/s':>7} {'GFLOP/s':>8} {'MiB':>7}"
        write(f"{group:44} {columns}")
        for case in sorted(cases, key=times.get):
            median, info = times[case], case.extra_info
            spread = info.get("spread", case.stats.iqr)
            ratio = f"{slowest / median:.1f}" if slowest else ""
            floor = f"{median / info['floor']:.2f}" if "floor" in info else ""
            bandwidth = f"{info['bytes'] / median / 1e9:.1f}" if "bytes" in info else ""
            flops = f"{info['flop'] / median / 1e9:.0f}" if "flop" in info else ""
            memory = "" if info["peak_memory"] is None else f"{info['peak_memory'] / 2**20:.1f}"
            numbers = f"{median * 1e3:>10.3f} {spread * 1e3:>8.3f} {ratio:>8} {floor:>6} {bandwidth:>7} {flops:>8}"
            write(f"  {info['provider']:42} {numbers} {memory:>7}")
