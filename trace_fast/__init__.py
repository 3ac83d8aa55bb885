"""Instance edges from the self-attention of diffusion models."""

from importlib.metadata import version

from trace_fast._backend import backends
from trace_fast.backbones import models
from trace_fast.propagation import Seeds, instances, propagate, seeds
from trace_fast.tracer import TraceOutput, Tracer, edges

__all__ = [
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
