"""Instance edges from the self-attention of diffusion models.

`edges` returns the edges of an image in one call. `load` returns the model that finds them: a `Detector`, the
one-step student, or a `Tracer`, the search over timesteps. `ControlNetAnnotator` makes pictures of them for a
ControlNet. `propagate`, `instances` and `seeds` turn edges into masks, regions and prompts. `distill` and `pretrain`
train models; `evaluate` scores edges and masks. `ops` are the kernels, with an eager twin of each in `reference`;
`backends` shows which implementation runs them.

    >>> import trace_fast
    >>> edges = trace_fast.edges("photo.jpg")  # doctest: +SKIP
"""

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from trace_fast import io, masks, ops, reference
from trace_fast.annotator import ControlNetAnnotator
from trace_fast.api import edges, load
from trace_fast.backbones import models
from trace_fast.detector import Detector
from trace_fast.masks.propagation import Seeds, instances, propagate, seeds
from trace_fast.ops.dispatch import backends
from trace_fast.tracer import TraceOutput, Tracer

if TYPE_CHECKING:
    from trace_fast import evaluation, training
    from trace_fast.evaluation import evaluate
    from trace_fast.training.distillation import DistillConfig, distill
    from trace_fast.training.mini import PretrainConfig, pretrain

__all__ = [
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
    "training",
]

__version__ = version("trace_fast")

# imported when they are asked for, since they take longer; a name without a module is a subpackage
_LAZY = {
    "DistillConfig": "trace_fast.training.distillation",
    "PretrainConfig": "trace_fast.training.mini",
    "distill": "trace_fast.training.distillation",
    "evaluate": "trace_fast.evaluation",
    "evaluation": "",
    "pretrain": "trace_fast.training.mini",
    "training": "",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'trace_fast' has no attribute {name!r}")
    module = importlib.import_module(_LAZY[name] or f"trace_fast.{name}")
    return getattr(module, name) if _LAZY[name] else module


def __dir__() -> list[str]:
    return __all__
