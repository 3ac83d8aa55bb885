"""Tensors that many calls need and none changes, made and copied to their device once."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

__all__ = ["cache_constants"]

Parameters = ParamSpec("Parameters")
Constants = TypeVar("Constants", Tensor, tuple[Tensor, Tensor])

# a CUDA graph reads constants at the addresses that they had while it was captured, and may be replayed at any time
_CAPTURED: dict[int, Tensor | tuple[Tensor, Tensor]] = {}


def cache_constants(
    maxsize: int,
) -> Callable[[Callable[Parameters, Constants]], Callable[Parameters, Constants]]:
    """Keep what the last calls of a function returned, as `functools.lru_cache` does.

    What is asked for while a CUDA graph is captured is never freed.

    Args:
        maxsize: number of calls.

    Returns:
        A decorator of a function whose arguments can be hashed.
    """

    def decorate(function: Callable[Parameters, Constants]) -> Callable[Parameters, Constants]:
        cached = functools.lru_cache(maxsize)(function)

        @functools.wraps(function)
        def get(*arguments: Parameters.args, **options: Parameters.kwargs) -> Constants:
            constants = cached(*arguments, **options)  # type: ignore[arg-type]
            if not torch.compiler.is_compiling() and is_capturing():
                _CAPTURED[id(constants)] = constants
            return constants

        return get

    return decorate


def is_capturing() -> bool:
    """Return whether a CUDA graph is captured on the current stream."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
