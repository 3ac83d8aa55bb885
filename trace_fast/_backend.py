"""Which implementation serves an op on a device.

TRACE_FAST_BACKEND=reference|native forces one for every op; what is forced and missing raises, and nothing falls back
silently: `backends()` shows who serves.
"""

import os

try:
    from trace_fast import _C

    _build_error = None
except ImportError as error:  # the extension is not built: the reference serves if it is asked for
    _build_error = error

__all__ = ["Backends", "backends", "choose"]

# devices with a kernel of our own, by op
_NATIVE: dict[str, tuple[str, ...]] = {
    "attention_map": ("cpu",),
    "accumulate_attention": ("cpu",),
    "resize_attention": (),
    "step_kl": ("cpu",),
    "abdiv": ("cpu",),
    "step_kl_abdiv": ("cpu",),
}


class Backends(dict[str, dict[str, str]]):
    """Implementation by op and device; prints as a table."""

    def __str__(self) -> str:
        rows = [("op", "cpu", "cuda"), *((op, row["cpu"], row["cuda"]) for op, row in self.items())]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def backends() -> Backends:
    """Implementation that serves each op on each kind of device, under the present TRACE_FAST_BACKEND.

    Returns:
        {op: {"cpu" | "cuda": "native (<instruction set>)" | "reference" | "unavailable"}}; print it for a table.

    Raises:
        ValueError: TRACE_FAST_BACKEND is neither reference nor native.
    """

    def describe(op: str, device: str) -> str:
        try:
            choice = choose(op, device)
        except RuntimeError:
            return "unavailable"
        return f"native ({_C.instruction_set()})" if choice == "native" else choice

    return Backends({op: {device: describe(op, device) for device in ("cpu", "cuda")} for op in _NATIVE})


def choose(op: str, device: str) -> str:
    """The implementation of `op` on a type of device: "native" or "reference".

    Raises:
        ValueError: TRACE_FAST_BACKEND is neither reference nor native.
        RuntimeError: the choice is not available.
    """
    forced = os.environ.get("TRACE_FAST_BACKEND", "")
    if forced not in ("", "reference", "native"):
        raise ValueError(f"{op}: TRACE_FAST_BACKEND must be reference or native, got {forced}")
    exists = device in _NATIVE[op]
    if forced == "reference" or not (forced or exists):
        return "reference"
    if not exists:
        raise RuntimeError(f"{op}: there is no native kernel on {device}; unset TRACE_FAST_BACKEND")
    if _build_error is not None:
        raise RuntimeError(
            f"{op}: the native core is not built ({_build_error}); "
            "run `pip install .` again or set TRACE_FAST_BACKEND=reference"
        )
    return "native"
