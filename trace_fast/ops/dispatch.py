"""The registry of ops: which implementation runs an op on a device, and where its documentation comes from.

TRACE_FAST_BACKEND=reference|native|triton forces one implementation for every op. A forced implementation that is
missing raises, and nothing falls back silently: `backends()` shows which implementation runs.
"""

import functools
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import Tensor

from trace_fast import reference

if TYPE_CHECKING:
    from torch._library.custom_ops import CustomOpDef

try:
    from trace_fast import _C

    _build_error = None
except ImportError as error:  # the extension is not built: the reference can still be asked for
    _build_error = error

__all__ = [
    "CUDA_BACKENDS",
    "LEAST_CAPABILITY",
    "Backends",
    "backends",
    "choose",
    "count_threads",
    "custom_op",
    "for_core",
    "get_capability",
    "has_cuda",
    "register",
]

Op = TypeVar("Op", bound=Callable[..., Any])

LEAST_CAPABILITY = 8.0  # the compute capability from which a GPU has bfloat16, and Triton's kernels run on it

# by op, what runs on a GPU; filled by `register`
CUDA_BACKENDS: dict[str, str] = {}


def register(*, cuda: Literal["triton", "native", "cpu", "unavailable"]) -> Callable[[Op], Op]:
    """Declare an op: the decorator of each function in `trace_fast.ops`.

    The op bears the name of a function in `trace_fast.reference`, whose documentation it takes over. Its own docstring
    holds what it adds, in sections after a first paragraph that is not taken over: dtypes (Note) and errors (Raises).

    Args:
        cuda: what runs on a GPU: "triton", "native" (the kernels in csrc/cuda, or as "cpu" where they do not run),
            "cpu" (the native core on the CPU, on copies) or "unavailable" (the op runs on the CPU alone).

    Returns:
        A decorator that returns the function itself.
    """

    def declare(op: Op) -> Op:
        CUDA_BACKENDS[op.__name__] = cuda
        specification = getattr(reference, op.__name__).__doc__
        if op.__doc__ and specification:  # python -OO has neither
            description, heading, example = inspect.cleandoc(specification).partition("Example:\n")
            additions = inspect.cleandoc(op.__doc__).partition("\n\n")[2]
            op.__doc__ = f"{description}{additions}\n\n{heading}{example}\n"
        return op

    return declare


@functools.cache
def has_cuda() -> bool:
    """Return whether the native core's kernels for a GPU run here, as found out once: they may not even be built."""
    return _build_error is None and torch.cuda.is_available() and _C.has_cuda()


def for_core(tensor: Tensor) -> Tensor:
    """Return a contiguous tensor where the native core computes: a GPU if its kernels run there, or else the CPU."""
    return (tensor if has_cuda() else tensor.cpu()).contiguous()


def custom_op(name: str, *, mutates_args: tuple[str, ...] = ()) -> "Callable[[Callable[..., Any]], CustomOpDef]":
    """Return a decorator that makes a function an op of torch, as `torch.library.custom_op` does.

    The first call of an op of torch's own decorator imports the compiler, which takes longer than a forward pass. Here
    the function runs as it is until something else has imported the compiler, which must not look into it.

    Args:
        name: "trace_fast::<op>".
        mutates_args: arguments that the op writes to.
    """

    def decorate(function: Callable[..., Any]) -> "CustomOpDef":
        disabled = None

        def run(*arguments: Any) -> Any:
            nonlocal disabled
            if "torch._dynamo" not in sys.modules:
                return function(*arguments)
            if disabled is None:
                disabled = torch.compiler.disable(function)
            return disabled(*arguments)

        op = torch.library.custom_op(name, function, mutates_args=mutates_args)
        torch.library.impl(name, ("cpu", "cuda"), run)
        return op

    return decorate


_started = False  # whether threads may wait for work, which torch and the native core share


def count_threads() -> int:
    """Return the number of threads for a call of the native core: that of torch, whose threads it uses."""
    global _started
    threads = torch.get_num_threads()
    _started |= threads > 1
    return threads


def _stay_alone() -> None:
    """Compute on one thread from now on: a forked process has none of the other threads, and would wait for them."""
    if _started:
        torch.set_num_threads(1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_stay_alone)


class Backends(dict[str, dict[str, str]]):
    """Implementation by op and device; prints as a table."""

    def __str__(self) -> str:
        rows = [("op", "cpu", "cuda"), *((op, row["cpu"], row["cuda"]) for op, row in self.items())]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def backends() -> Backends:
    """Return which implementation runs each op on each kind of device, under the present TRACE_FAST_BACKEND.

    Returns:
        {op: {"cpu" | "cuda": "native (<instruction set>)" | "native (cuda)" | "native (cpu)" | "triton" |
        "triton (interpreted)" | "reference" | "unavailable"}}; "native (cpu)" of a GPU copies its tensors to the CPU
        and back, and "reference" is what a GPU before compute capability 8.0 has in the place of "triton". Print it for
        a table. The column of a GPU is that of the current one, and filled in even where there is none.

    Raises:
        ValueError: TRACE_FAST_BACKEND is none of reference, native, triton.

    Example:
        >>> backends()["thin"]["cuda"]
        'unavailable'
    """

    def describe(op: str, device: str) -> str:
        try:
            backend = choose(op, device)
        except RuntimeError:
            return "unavailable"
        if backend == "native":
            if device == "cuda" and (CUDA_BACKENDS[op] == "cpu" or not has_cuda()):
                return "native (cpu)"
            return f"native ({_C.instruction_set() if device == 'cpu' else device})"
        return "triton (interpreted)" if backend == "triton" and device == "cpu" else backend

    return Backends({op: {device: describe(op, device) for device in ("cpu", "cuda")} for op in sorted(CUDA_BACKENDS)})


def choose(op: str, device: torch.device | str) -> str:
    """Return the implementation of `op` on a device: "native", "triton" or "reference".

    An op asks once per call and hands the answer on to its kernel.

    Raises:
        ValueError: TRACE_FAST_BACKEND is none of reference, native, triton.
        RuntimeError: the implementation is not available; the message names the command or variable that helps.
    """
    forced = os.environ.get("TRACE_FAST_BACKEND", "")
    if forced not in ("", "reference", "native", "triton"):
        raise ValueError(f"{op}: TRACE_FAST_BACKEND must be reference, native or triton, got {forced}")
    on_cuda, device = CUDA_BACKENDS[op], torch.device(device)
    if on_cuda == "unavailable" and device.type != "cpu":
        raise RuntimeError(f"{op}: there is no kernel on {device.type}; move the tensors to the cpu")
    if on_cuda == "cpu" and device.type == "cuda":
        device = torch.device("cpu")
    if forced:
        backend = forced
    elif device.type == "cpu":
        backend = "native"
    elif device.type == "cuda" and (on_cuda != "triton" or get_capability(device) >= LEAST_CAPABILITY):
        backend = on_cuda
    else:
        backend = "reference"
    if backend == "native":
        _check_native(op, device.type)
    elif backend == "triton":
        _check_triton(op, device)
    return backend


def get_capability(device: torch.device) -> float:
    """Return the compute capability of a GPU, such as 9.0; `LEAST_CAPABILITY` where there is no GPU."""
    if not torch.cuda.is_available():
        return LEAST_CAPABILITY
    properties = torch.cuda.get_device_properties(device)
    return properties.major + properties.minor / 10


def _check_native(op: str, device: str) -> None:
    """Raise RuntimeError if the native core cannot compute `op` on a type of device."""
    if device != "cpu" and not (device == "cuda" and CUDA_BACKENDS[op] == "native"):
        raise RuntimeError(f"{op}: there is no native kernel on {device}; unset TRACE_FAST_BACKEND")
    if _build_error is not None:
        raise RuntimeError(
            f"{op}: the native core is not built ({_build_error}); "
            "run `pip install .` again or set TRACE_FAST_BACKEND=reference"
        )


def _check_triton(op: str, device: torch.device) -> None:
    """Raise RuntimeError if Triton cannot compute `op` on a device."""
    if CUDA_BACKENDS[op] != "triton":
        raise RuntimeError(f"{op}: there is no triton kernel; unset TRACE_FAST_BACKEND")
    if not _has_triton():
        raise RuntimeError(
            f"{op}: triton is not installed; run `pip install triton` or set TRACE_FAST_BACKEND=reference"
        )
    if device.type != "cuda" and not (device.type == "cpu" and _interprets()):
        raise RuntimeError(
            f"{op}: there is no triton kernel on {device.type}; unset TRACE_FAST_BACKEND, "
            "or set TRITON_INTERPRET=1 before Python starts to have kernels interpreted on the cpu"
        )
    if device.type == "cuda" and get_capability(device) < LEAST_CAPABILITY:
        raise RuntimeError(
            f"{op}: triton needs a GPU of compute capability {LEAST_CAPABILITY} or above, got "
            f"{get_capability(device)}; unset TRACE_FAST_BACKEND"
        )


def _has_triton() -> bool:
    """Return whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def _interprets() -> bool:
    """Return whether Triton kernels run in numpy; this is decided when they are defined."""
    from trace_fast.kernels.launch import INTERPRETED

    return INTERPRETED
