"""Commands whose options are the fields of a configuration: see `trace_fast.training.options`."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from trace_fast.cli.common import open_folder, parse_size, parse_timestep, refuse, refuse_failures
from trace_fast.training.options import get_value_types

__all__ = ["take_options"]


def take_options(config: type[Any], positional: str | None = None) -> Callable[[Callable[[Any], None]], Any]:
    """Return a decorator that turns a function of a configuration into a command with an option for each field.

    Args:
        config: a dataclass of `trace_fast.training.options.option`, with a field `output`.
        positional: the field that is an argument, not an option.
    """
    fields = {field.name: field for field in dataclasses.fields(config)}
    value_types = get_value_types(config)
    parameters = [
        _make_parameter(field, *value_types[name], positional=name == positional) for name, field in fields.items()
    ]

    def decorate(run: Callable[[Any], None]) -> Any:
        def command(**values: Any) -> None:
            for name, value in values.items():
                values[name] = _parse(name, value_types[name][0], value)
            open_folder(values["output"])
            with refuse_failures():
                run(config(**values))

        command.__doc__ = run.__doc__
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return command

    return decorate


def _make_parameter(
    field: dataclasses.Field[Any], value_type: Any, optional: bool, *, positional: bool
) -> inspect.Parameter:
    """Return the parameter from which typer makes the option of a field."""
    help, least, most, choices = (field.metadata[name] for name in ("help", "least", "most", "choices"))
    help = re.sub("`(\\w+_\\w+)`", lambda name: _write_flag(name[1]), help)  # fields that Python users know by name
    flag, default = _write_flag(field.name), field.default
    metavar = "DIR" if value_type is Path else None
    if choices is not None:
        value_type = Literal[choices]
    elif value_type == tuple[int, int]:
        value_type, metavar = str, "HxW"
    elif value_type == str | int:
        value_type, metavar = str, "iep|INT"
    elif value_type == dict[str, float]:
        value_type, metavar, default = str, "NAME=NUMBER,...", ""
    annotation = value_type | None if optional else value_type
    if positional:
        info: Any = typer.Argument(metavar=metavar, help=help)
    else:
        flags = (flag, "-o") if field.name == "output" else (flag,)
        info = typer.Option(*flags, metavar=metavar, help=help, min=least, max=most)
    return inspect.Parameter(
        field.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if default is dataclasses.MISSING else default,
        annotation=Annotated[annotation, info],
    )


def _write_flag(name: str) -> str:
    """Return the option of a field."""
    return f"--{name.replace('_', '-')}"


def _parse(name: str, value_type: Any, value: Any) -> Any:
    """Return the value of a field from that of its option."""
    flag = name.replace("_", "-")
    if value_type == tuple[int, int]:
        return parse_size(value, flag)
    if value_type == str | int:
        return parse_timestep(value, flag)
    if value_type == dict[str, float]:
        try:
            pairs = [pair.split("=") for pair in value.split(",") if pair]
            return {key.strip(): float(number) if "." in number else int(number) for key, number in pairs}
        except ValueError:
            refuse(f"--{flag} must be pairs such as columns=8,channels=4, got {value!r}")
    return value
