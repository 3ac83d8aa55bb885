"""Networks whose self-attention TRACE reads, one file per family."""

from trace_fast.backbones.base import Backbone, Settings
from trace_fast.backbones.loading import Kind, Source, fetch_student, find_source, has_student, load_backbone
from trace_fast.backbones.registry import models
from trace_fast.backbones.wrap import wrap_encoder, wrap_pipeline

__all__ = [
    "Backbone",
    "Kind",
    "Settings",
    "Source",
    "fetch_student",
    "find_source",
    "has_student",
    "load_backbone",
    "models",
    "wrap_encoder",
    "wrap_pipeline",
]
