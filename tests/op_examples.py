"""The ops as tests go through them: arguments from the examples of their documentation, and their Triton kernels."""

import doctest
import importlib
import importlib.util
import pkgutil
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_map_only

from trace_fast import _C, ops, reference
from trace_fast.ops.dispatch import CUDA_BACKENDS

# by what runs them on a GPU
TRITON_OPS = [op for op in ops.__all__ if CUDA_BACKENDS[op] == "triton"]
NATIVE_OPS = [op for op in ops.__all__ if CUDA_BACKENDS[op] == "native"]
COPIED_OPS = [op for op in ops.__all__ if CUDA_BACKENDS[op] == "cpu"]
CPU_OPS = [op for op in ops.__all__ if CUDA_BACKENDS[op] == "unavailable"]

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton, which is for Linux")
# the instruction sets of this machine, slowest first; all but the fastest are slow tests
INSTRUCTION_SETS = [
    *(pytest.param(name, marks=pytest.mark.slow) for name in _C.instruction_sets()[:-1]),
    _C.instruction_sets()[-1],
]
NATIVE = [
    *(pytest.param(f"native-{name}", marks=pytest.mark.slow) for name in _C.instruction_sets()[:-1]),
    f"native-{_C.instruction_sets()[-1]}",
]
TRITON = pytest.param("triton", marks=[needs_triton, pytest.mark.slow])  # slow where it is interpreted
# for what does not depend on the instruction set, such as shapes
EACH_BACKEND = pytest.mark.parametrize("device", ["native-baseline", TRITON], indirect=True)


def example(op: str, device: torch.device | str = "cpu") -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return new arguments of an op, positional and by keyword: those of the example in its documentation."""
    calls = []

    def record(*arguments: Any, **options: Any) -> Any:
        calls.append(tree_map_only(torch.Tensor, lambda tensor: tensor.to(device, copy=True), (arguments, options)))
        return getattr(reference, op)(*arguments, **options)

    names = {"torch": torch, op: record}
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        for line in doctest.DocTestParser().get_examples(getattr(reference, op).__doc__):
            exec(line.source, names)
    return calls[0]


def kernel_modules() -> list[ModuleType]:
    """Return the modules of Triton kernels: those of `trace_fast.kernels` that are named like a module of ops."""
    names = [f"trace_fast.kernels.{module.name}" for module in pkgutil.iter_modules(ops.__path__)]
    return [importlib.import_module(name) for name in names if importlib.util.find_spec(name)]


def kernel_names() -> set[str]:
    """Return the names of all Triton kernels, without `_kernel`."""
    names = [name for module in kernel_modules() for name in vars(module)]
    return {name.removesuffix("_kernel") for name in names if name.endswith("_kernel")}
