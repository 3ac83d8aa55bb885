"""Models from a name, a folder or a repository of the hub."""

from trace_fast.backbones.loading.backbone import load_backbone
from trace_fast.backbones.loading.hub import checkpoint_errors, hub_errors
from trace_fast.backbones.loading.memory import OFFLOADS
from trace_fast.backbones.loading.sources import Kind, Source, fetch_student, find_source, has_student

__all__ = [
    "OFFLOADS",
    "Kind",
    "Source",
    "checkpoint_errors",
    "fetch_student",
    "find_source",
    "has_student",
    "hub_errors",
    "load_backbone",
]
