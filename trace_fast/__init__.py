"""Instance edges from the self-attention of diffusion models."""

from importlib.metadata import version

from trace_fast._backend import backends
from trace_fast.backbones import models
from trace_fast.tracer import TraceOutput, Tracer, edges

__all__ = ["TraceOutput", "Tracer", "__version__", "backends", "edges", "models"]

__version__ = version("trace_fast")
