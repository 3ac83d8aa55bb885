"""Drawn scenes of objects that occlude one another, with exact instance maps: training data without annotations.

A scene is composed of textures, outlines, shading and a camera; each is a module with a table of its parts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trace_fast.training.scenes.dataset import (
    IGNORED,
    SceneFile,
    ScenesConfig,
    list_scenes,
    load_photos,
    read_scene,
    write_scenes,
)

if TYPE_CHECKING:
    from trace_fast.training.scenes.scene import Scene, draw_scene

__all__ = [
    "IGNORED",
    "Scene",
    "SceneFile",
    "ScenesConfig",
    "draw_scene",
    "list_scenes",
    "load_photos",
    "read_scene",
    "write_scenes",
]


def __getattr__(name: str) -> Any:
    """Import what draws when it is asked for: reading scenes does not need it, nor do the commands' help texts."""
    if name not in ("Scene", "draw_scene"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from trace_fast.training.scenes import scene

    return getattr(scene, name)
