"""Instance edges from the self-attention of diffusion models.

`edges` returns the edges of an image in one call. `load` returns the model that finds them: a `Detector`, the
one-step student, or a `Tracer`, the search over timesteps. `ControlNetAnnotator` makes pictures of them for a
ControlNet, and `BatchEdges` works on columns of images for engines of data sets. `propagate`, `instances` and `seeds`
turn edges into masks, regions and prompts, and `show` draws them. `distill` and `pretrain` train models; `evaluate`
scores edges and masks. `ops` are the kernels, with an eager twin of each in `reference`; `backends` shows which
implementation runs them.

    >>> import trace_fast
    >>> edges = trace_fast.edges("photo.jpg")  # doctest: +SKIP
"""

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trace_fast import evaluation, io, masks, ops, reference, training
    from trace_fast.annotator import ControlNetAnnotator
    from trace_fast.api import edges, load
    from trace_fast.backbones import models
    from trace_fast.detector import Detector
    from trace_fast.evaluation import evaluate
    from trace_fast.io.visualize import show
    from trace_fast.jobs.columns import BatchEdges
    from trace_fast.masks.propagation import Seeds, instances, propagate, seeds
    from trace_fast.ops.dispatch import backends
    from trace_fast.tracer import TraceOutput, Tracer
    from trace_fast.training.distillation import DistillConfig, distill
    from trace_fast.training.mini import PretrainConfig, pretrain

__all__ = [
    "BatchEdges",
    "ControlNetAnnotator",
    "Detector",
    "DistillConfig",
    "PretrainConfig",
    "Seeds",
    "TraceOutput",
    "Tracer",
    "__version__",
    "backends",
    "distill",
    "edges",
    "evaluate",
    "evaluation",
    "instances",
    "io",
    "load",
    "masks",
    "models",
    "ops",
    "pretrain",
    "propagate",
    "reference",
    "seeds",
    "show",
    "training",
]

__version__ = version("trace_fast")

# the module of each name, imported when it is asked for: importing the package alone is instant, and loads no torch,
# so that a program can still set how torch's threads wait; a subpackage has no module
_LAZY = {
    "BatchEdges": "jobs.columns",
    "ControlNetAnnotator": "annotator",
    "Detector": "detector",
    "DistillConfig": "training.distillation",
    "PretrainConfig": "training.mini",
    "Seeds": "masks.propagation",
    "TraceOutput": "tracer",
    "Tracer": "tracer",
    "backends": "ops.dispatch",
    "distill": "training.distillation",
    "edges": "api",
    "evaluate": "evaluation",
    "evaluation": "",
    "instances": "masks.propagation",
    "io": "",
    "load": "api",
    "masks": "",
    "models": "backbones",
    "ops": "",
    "pretrain": "training.mini",
    "propagate": "masks.propagation",
    "reference": "",
    "seeds": "masks.propagation",
    "show": "io.visualize",
    "training": "",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'trace_fast' has no attribute {name!r}")
    module = importlib.import_module(f"trace_fast.{_LAZY[name] or name}")
    return getattr(module, name) if _LAZY[name] else module


def __dir__() -> list[str]:
    return __all__
