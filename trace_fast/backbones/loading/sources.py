"""Which kind of model a name, a folder or a repository is: decided here alone."""

from __future__ import annotations

import enum
import os
import re
import warnings
from dataclasses import dataclass
from pathlib import Path

from trace_fast.backbones.loading.hub import Files, hub_errors
from trace_fast.backbones.registry import EMBEDDED, MODELS, embedded_models
from trace_fast.extras import require

__all__ = [
    "ADAPTER",
    "CONFIG",
    "DECODER",
    "EMPTY_PROMPT",
    "Kind",
    "Source",
    "fetch_student",
    "find_repository",
    "find_source",
    "has_student",
]

# files of a student
CONFIG, DECODER, ADAPTER = "config.json", "decoder.safetensors", "lora.safetensors"
EMPTY_PROMPT = "null_text.safetensors"
# as the hub has them: ./folder and models/my--model can only be folders
REPOSITORY = re.compile(r"(?!.*(?:--|\.\.))\b[\w.-]+\b/\b[\w.-]{1,96}\b", re.ASCII)


class Kind(enum.Enum):
    """Kinds of model, by what their files are."""

    NETWORK = "a network of this package"
    PIPELINE = "a pipeline of diffusers"
    ENCODER = "an encoder of transformers or timm"
    STUDENT = "a student without its base model"
    UNKNOWN = "none of these"


@dataclass(frozen=True)
class Source:
    """Where a model is and what it is.

    Attributes:
        name: the model, as the caller named it.
        kind: what is there. A repository that cannot be asked counts as a pipeline, whose loading says why.
        files: its folder or repository.
        student: folder or repository of its student, which may be the model itself; None without one.
    """

    name: str
    kind: Kind
    files: Files
    student: str | None = None


def find_source(model: str | Path, *, revision: str | None = None, local_files_only: bool = False) -> Source:
    """Find out what a model is: by its name, its folder, or the config.json of its repository.

    Args:
        model: a string is a name of `models()`, else a folder, else a repository of the hub (owner/name); a path is
            always a folder.
        revision: branch, tag or commit of the repository.
        local_files_only: never ask the hub.

    Returns:
        The source, of kind `Kind.UNKNOWN` where there is nothing that can be loaded. No weights are read.

    Example:
        >>> find_source("mini").kind
        <Kind.NETWORK: 'a network of this package'>
    """
    name, is_embedded = str(model), model in embedded_models()
    if is_embedded or (isinstance(model, str) and model in MODELS):
        if os.path.isdir(name):
            warnings.warn(
                f"load: model {name!r} is taken as the name of a model, not as the folder; './{name}' is the folder",
                stacklevel=2,
            )
        if is_embedded:
            return folder_source(name, EMBEDDED / name)
        kind = Kind.ENCODER if MODELS[name].encoder else Kind.PIPELINE
        return Source(name, kind, Files(MODELS[name].repository, revision, local_files_only))
    if os.path.isdir(model):
        return folder_source(name, Path(model))
    files = Files(name, revision, local_files_only)
    if not is_repository(model):
        return Source(name, Kind.UNKNOWN, files)
    kind = read_kind(files) or Kind.PIPELINE
    return Source(name, kind, files, name if kind is Kind.STUDENT else None)


def is_repository(model: str | Path) -> bool:
    """Return whether a model can only be a repository of the hub: neither a known name nor a folder or file."""
    known = model in embedded_models() or model in MODELS or os.path.exists(model)
    return isinstance(model, str) and not known and REPOSITORY.fullmatch(model) is not None


def find_repository(model: str) -> str | None:
    """Return the repository of the hub that a model is loaded from; None for a folder and a model of this package.

    Args:
        model: see `find_source`.

    Example:
        >>> find_repository("dinov2-b"), find_repository("mini")
        ('facebook/dinov2-base', None)
    """
    if model in MODELS:
        return MODELS[model].repository
    return model if is_repository(model) else None


def folder_source(name: str, folder: Path) -> Source:
    """Return what a folder holds."""
    files = Files(str(folder))
    kind = read_kind(files)
    if kind is Kind.STUDENT or (folder / DECODER).is_file():
        return Source(name, Kind.STUDENT, files, str(folder))
    student = str(folder / "student") if (folder / "student" / DECODER).is_file() else None
    if kind is None and (folder / "model_index.json").is_file():
        kind = Kind.PIPELINE
    elif kind is None and (folder / CONFIG).is_file():
        kind = Kind.NETWORK  # damaged, which is reported when it is loaded
    return Source(name, kind or (Kind.STUDENT if student else Kind.UNKNOWN), files, student)


def read_kind(files: Files) -> Kind | None:
    """Return the kind that a config.json speaks of; None where it is missing, damaged or of another library."""
    try:
        config = files.read_json(CONFIG)
    except (OSError, ValueError, ImportError):  # reported when the model is loaded
        return None
    if "family" in config:
        return Kind.NETWORK
    if not config.keys().isdisjoint(("model_type", "architecture")):
        return Kind.ENCODER
    return Kind.STUDENT if {"base", "decoder"} <= config.keys() else None


def has_student(model: str | Path) -> bool:
    """Return whether a model has a student or is one; see `find_source`."""
    return find_source(model).student is not None


def fetch_student(model: str | Path, *, revision: str | None = None, local_files_only: bool = False) -> Path:
    """Return the folder with the files of a student, downloaded where the model is a repository of the hub.

    Args:
        model: see `find_source`.
        revision: branch, tag or commit of the repository.
        local_files_only: never ask the hub.

    Raises:
        ValueError: there is no such model, or it has no student.
        RuntimeError: the repository is gated, or the hub cannot be reached.
    """
    if is_repository(model):
        name = str(model)
        require("load", "huggingface_hub")
        with hub_errors(name, name):
            from huggingface_hub import snapshot_download

            options = Files(name, revision, local_files_only).hub_options
            return Path(snapshot_download(name, allow_patterns=[CONFIG, DECODER, ADAPTER, EMPTY_PROMPT], **options))
    student = find_source(model).student
    if student is None:
        raise ValueError(
            "load: model must be a name, a folder or a repository of the hub (owner/name) that has a student, got "
            f"{str(model)!r} without {DECODER}"
        )
    return Path(student)
