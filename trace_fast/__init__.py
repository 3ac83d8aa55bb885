"""Instance edges from the self-attention of diffusion models."""

import importlib
from importlib.metadata import version
from types import ModuleType

from trace_fast._backend import backends
from trace_fast.api import edges
from trace_fast.backbones import models
from trace_fast.detector import Detector
from trace_fast.propagation import Seeds, instances, propagate, seeds
from trace_fast.tracer import TraceOutput, Tracer

__all__ = [
    "Detector",
    "Seeds",
    "TraceOutput",
    "Tracer",
    "__version__",
    "backends",
    "edges",
    "instances",
    "models",
    "propagate",
    "seeds",
]

__version__ = version("trace_fast")


def __getattr__(name: str) -> ModuleType:
    """Modules that take longer to import, when they are asked for."""
    if name in ("annotate", "distill", "evaluation", "export", "pretrain"):
        return importlib.import_module(f"trace_fast.{name}")
    raise AttributeError(f"module 'trace_fast' has no attribute {name!r}")
