"""Instance edges from the self-attention of diffusion models."""

from importlib.metadata import version

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
