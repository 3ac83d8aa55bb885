"""Drawn scenes of objects that occlude one another, with exact instance maps: training data without annotations.

A scene is composed of textures, outlines, shading and a camera; each is a module with a table of its parts.
"""

from trace_fast.training.scenes.dataset import (
    SceneFile,
    ScenesConfig,
    list_scenes,
    load_photos,
    read_scene,
    write_scenes,
)
from trace_fast.training.scenes.scene import IGNORED, Scene, draw_scene

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
