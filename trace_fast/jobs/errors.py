"""Errors that a user, a file or the machine may cause, and their text."""

from __future__ import annotations

import re

import torch
from safetensors import SafetensorError

__all__ = ["FAILURES", "describe", "escape_controls", "is_out_of_memory"]

# reported in one line, without a traceback
FAILURES = (
    ArithmeticError,
    AttributeError,  # a network whose configuration does not fit its code, as the next
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    SafetensorError,
    TypeError,
    ValueError,
)
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
ADDRESS = re.compile(r" (?:object )?at 0x[0-9a-fA-F]+")


def describe(error: BaseException) -> str:
    """Return the message of an error, or its name where it has none, as a MemoryError.

    Args:
        error: any. Addresses of memory in the text of another library are left out, so that equal errors have equal
            messages.

    Example:
        >>> describe(ValueError("cannot identify <_io.BytesIO object at 0x7f3a>"))
        'cannot identify <_io.BytesIO>'
    """
    text, kind = ADDRESS.sub("", str(error)), type(error).__name__
    return f"{kind}: {text}" if isinstance(error, LookupError) else text or kind  # a key alone says little


def escape_controls(text: str) -> str:
    r"""Return a text whose control characters, but line feeds and tabs, are written as escapes.

    A name in a file may hold sequences that a terminal obeys.

    Args:
        text: any.

    Example:
        >>> print(escape_controls(chr(27) + "[2J.png"))
        \x1b[2J.png
    """
    return CONTROL.sub(lambda match: repr(match[0])[1:-1], text)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory is full, which is no fault of an image.

    Args:
        error: any.

    Example:
        >>> is_out_of_memory(MemoryError()), is_out_of_memory(ValueError("no image"))
        (True, False)
    """
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)
