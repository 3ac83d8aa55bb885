"""Networks that TRACE can read, one file per family."""

from __future__ import annotations

import json
from pathlib import Path

from trace_fast.backbones.base import Backbone, Settings
from trace_fast.backbones.mini import MiniBackbone

__all__ = ["Backbone", "Settings", "load_backbone", "models"]

FAMILIES = {"mini": MiniBackbone}
WEIGHTS = Path(__file__).parent.parent / "weights"  # the embedded models, one folder each


def models() -> tuple[str, ...]:
    """Names that `edges(model=...)` knows."""
    return tuple(sorted(path.parent.name for path in WEIGHTS.glob("*/config.json")))


def load_backbone(model: str | Path) -> Backbone:
    """Read a backbone from a known name or a local folder of config.json and model.safetensors.

    Raises:
        ValueError: the name is unknown, or the folder's configuration or weights are damaged or do not fit each other.
    """
    folder = WEIGHTS / model if model in models() else Path(model)
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"load: model must be one of {', '.join(models())}, or a folder with config.json and model.safetensors, "
            f"got {str(model)!r}"
        )
    try:
        config = json.loads((folder / "config.json").read_text())
        if config["family"] not in FAMILIES:
            raise ValueError(f"family must be one of {', '.join(FAMILIES)}, got {config['family']!r}")
        return FAMILIES[config["family"]].from_folder(folder, config)
    except (KeyError, TypeError, ValueError, OSError, RuntimeError) as error:
        raise ValueError(f"load: model must be a folder of matching files, got {str(folder)!r}: {error}") from error
