"""Which implementation serves an op on a device.

TRACE_FAST_BACKEND=reference|native|triton forces one for every op; what is forced and missing raises, and nothing falls
back silently: `backends()` shows who serves.
"""

import importlib.util
import os

try:
    from trace_fast import _C

    _build_error = None
except ImportError as error:  # the extension is not built: the reference serves if it is asked for
    _build_error = error
_CUDA = _build_error is None and _C.has_cuda()

__all__ = ["OPS", "Backends", "backends", "choose"]

# what serves on a GPU: kernels of Triton, or of the native core where it has been built with them; ops that are not
# listed run on the CPU alone
_ON_CUDA = {
    "attention_map": "triton",
    "accumulate_attention": "triton",
    "accumulate_resized": "triton",
    "resize_attention": "triton",
    "readout": "triton",
    "step_kl": "triton",
    "abdiv": "triton",
    "step_kl_abdiv": "triton",
    "label_regions": "native",
    "flood_fill": "native",
    "random_walk": "native",
    "merge_masks": "native",
}
OPS = tuple(_ON_CUDA)


class Backends(dict[str, dict[str, str]]):
    """Implementation by op and device; prints as a table."""

    def __str__(self) -> str:
        rows = [("op", "cpu", "cuda"), *((op, row["cpu"], row["cuda"]) for op, row in self.items())]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def backends() -> Backends:
    """Implementation that serves each op on each kind of device, under the present TRACE_FAST_BACKEND.

    Returns:
        {op: {"cpu" | "cuda": "native (<instruction set>)" | "native (cuda)" | "triton" | "triton (interpreted)" |
        "reference" | "unavailable"}}; print it for a table. It says who would serve on a GPU also where there is none.

    Raises:
        ValueError: TRACE_FAST_BACKEND is none of reference, native, triton.
    """

    def describe(op: str, device: str) -> str:
        try:
            choice = choose(op, device)
        except RuntimeError:
            return "unavailable"
        if choice == "native":
            return f"native ({_C.instruction_set() if device == 'cpu' else device})"
        return "triton (interpreted)" if choice == "triton" and device == "cpu" else choice

    return Backends({op: {device: describe(op, device) for device in ("cpu", "cuda")} for op in OPS})


def choose(op: str, device: str) -> str:
    """The implementation of `op` on a type of device: "native", "triton" or "reference".

    Raises:
        ValueError: TRACE_FAST_BACKEND is none of reference, native, triton.
        RuntimeError: the choice is not available; the message says what would make it so.
    """
    forced = os.environ.get("TRACE_FAST_BACKEND", "")
    if forced not in ("", "reference", "native", "triton"):
        raise ValueError(f"{op}: TRACE_FAST_BACKEND must be reference, native or triton, got {forced}")
    choice = forced or _best(op, device)
    if choice == "native":
        if device != "cpu" and not (device == "cuda" and _ON_CUDA[op] == "native"):
            raise RuntimeError(f"{op}: there is no native kernel on {device}; unset TRACE_FAST_BACKEND")
        if _build_error is not None:
            raise RuntimeError(
                f"{op}: the native core is not built ({_build_error}); "
                "run `pip install .` again or set TRACE_FAST_BACKEND=reference"
            )
        if device == "cuda" and not _CUDA:
            raise RuntimeError(
                f"{op}: the native core is built without CUDA; "
                "build it with TRACE_FAST_CUDA=1 or set TRACE_FAST_BACKEND=reference"
            )
    elif choice == "triton":
        if _ON_CUDA.get(op) != "triton":
            raise RuntimeError(f"{op}: there is no triton kernel; unset TRACE_FAST_BACKEND")
        if not _has_triton():
            raise RuntimeError(
                f"{op}: triton is not installed; run `pip install triton` or set TRACE_FAST_BACKEND=reference"
            )
        if device != "cuda" and not (device == "cpu" and _interprets()):
            raise RuntimeError(
                f"{op}: there is no triton kernel on {device}; unset TRACE_FAST_BACKEND, "
                "or set TRITON_INTERPRET=1 before Python starts to have kernels interpreted on the cpu"
            )
    return choice


def _best(op: str, device: str) -> str:
    """What serves unless something is forced; other devices are served by the reference."""
    if device == "cuda":
        return "reference" if _ON_CUDA[op] == "native" and not _CUDA else _ON_CUDA[op]
    return "native" if device == "cpu" else "reference"


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _interprets() -> bool:
    """Whether Triton kernels run in numpy; decided when they are defined."""
    from trace_fast.kernels.launch import INTERPRETED

    return INTERPRETED
