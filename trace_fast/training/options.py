"""Options of a training run. Each is declared once, as a dataclass field with its help text and bounds.

The check of its value, its line in the docstring, its command-line option and the comparison with the run that is
resumed all follow from that field.
"""

from __future__ import annotations

import dataclasses
import json
import math
import textwrap
import types
import typing
from typing import Any, TypeVar

from trace_fast.ops import checks

__all__ = ["check_options", "document_options", "get_value_types", "option", "to_json"]

Config = TypeVar("Config")


def option(
    default: Any = dataclasses.MISSING,
    *,
    help: str,
    least: float | None = None,
    most: float | None = None,
    choices: tuple[str, ...] | None = None,
    fixed: bool = True,
) -> Any:
    """Return a dataclass field with a help text and bounds.

    Args:
        default: the value, or a type whose empty instance it is; without one, the option is required.
        help: full sentences.
        least: smallest value of a number; required for integers.
        most: largest value of a number.
        choices: the strings that are accepted.
        fixed: whether a resumed run must have the value of the run before.

    Example:
        >>> @dataclasses.dataclass
        ... class Config:
        ...     rank: int = option(64, help="The rank of the adapters.", least=1)
        >>> Config().rank
        64
    """
    metadata = {"help": help, "least": least, "most": most, "choices": choices, "fixed": fixed}
    if isinstance(default, type):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def document_options(config: type[Config]) -> type[Config]:
    """Insert the options of a dataclass and their help texts into its docstring, before "Raises"; for a decorator."""
    lines = [f"{field.name}: {field.metadata['help']}" for field in _fields(config)]
    wrapped = [textwrap.fill(line, 120, initial_indent=" " * 8, subsequent_indent=" " * 12) for line in lines]
    summary, raises, rest = f"{config.__doc__}".partition("    Raises:\n")
    config.__doc__ = summary + "\n".join(["    Attributes:", *wrapped, "", raises]) + rest
    return config


def get_value_types(config: type[Any]) -> dict[str, tuple[Any, bool]]:
    """Return, for every field of a dataclass, its type without None, and whether None is a value, too."""
    value_types = {}
    for name, hint in typing.get_type_hints(config).items():
        members = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
        others = tuple(member for member in members if member is not types.NoneType)
        value_types[name] = typing.Union[others], len(others) < len(members)  # noqa: UP007 (of a tuple)
    return value_types


def check_options(op: str, config: Any) -> None:
    """Check the numbers and the choices among the options of a dataclass.

    Args:
        op: named in errors.
        config: instance of the dataclass.

    Raises:
        TypeError: a value is not a number where it must be one.
        ValueError: a number is not finite or out of bounds, or a string is not one of the choices.
    """
    value_types = get_value_types(type(config))
    for field in _fields(config):
        value, (value_type, optional) = getattr(config, field.name), value_types[field.name]
        least, most, choices = (field.metadata[name] for name in ("least", "most", "choices"))
        if value is None and optional:
            continue
        if choices is not None:
            checks.choice(op, field.name, value, *choices)
        elif value_type is int:
            checks.integer(op, field.name, value, least)
        if value_type in (int, float):
            checks.number(op, field.name, value, least, most)
            if not math.isfinite(value):
                raise ValueError(f"{op}: {field.name} must be finite, got {value}")


def to_json(config: Any, replaced: dict[str, Any]) -> str:
    """Return the options that a resumed run must share with the run before, as JSON.

    Args:
        config: instance of a dataclass.
        replaced: values that replace those of the instance, by name.
    """
    values = dataclasses.asdict(config)
    fixed = {field.name: values[field.name] for field in _fields(config) if field.metadata["fixed"]}
    return json.dumps(fixed | replaced)


def _fields(config: Any) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(config)
