"""Command-line options out of configuration dataclasses: defaults and help live there alone, never repeated.

A configuration is resolved from, later ones winning: the dataclass's defaults or a preset, a JSON file (--config), the
options given. Nested dataclasses become options with a prefix: --energy-channels, --sampler-steps.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import Field, fields, is_dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import click

from ebm_prior.errors import ConfigurationError

Config = TypeVar("Config")
Command = TypeVar("Command", bound=Callable[..., Any])


def config_options(kind: type[Any], *, skip: tuple[str, ...] = ("seed",)) -> Callable[[Command], Command]:
    """Decorate a command with an option for every field of a configuration dataclass that has a help text."""

    def decorate(command: Command) -> Command:
        for name, option_type, entry, default in reversed(list(_leaves(kind, skip))):
            multiple = option_type[1] if isinstance(option_type, tuple) else 1
            click.option(
                f"--{name.replace('_', '-')}/--no-{name.replace('_', '-')}"
                if option_type is bool
                else f"--{name.replace('_', '-')}",
                name,
                type=None if option_type is bool else option_type[0] if multiple > 1 else option_type,
                nargs=multiple,
                default=None,
                help=f"{entry.metadata['help']}  [default: {_spelled(default)}]",
            )(command)
        return command

    return decorate


def resolve(base: Config, given: Mapping[str, Any], file: Path | None = None) -> Config:
    """`base` with the values of the JSON `file` and of the options `given` (None: not given) put in."""
    values: dict[str, Any] = {}
    if file is not None:
        try:
            values = json.loads(file.read_text())
        except (OSError, ValueError) as error:
            raise ConfigurationError(f"--config {file} cannot be read as JSON: {error}") from error
        if not isinstance(values, dict):
            raise ConfigurationError(f"--config {file}: expected a JSON object, found {type(values).__name__}")
        values = values.get("config", values)  # a run's config.json can be given as it stands
    known = {name for name, *_ in _leaves(type(base), ())}
    resolved: Config = _put(
        _put(base, values), _nested(base, {k: v for k, v in given.items() if v is not None and k in known})
    )
    return resolved


def _leaves(kind: type[Any], skip: tuple[str, ...], prefix: str = "") -> Iterator[tuple[str, Any, Field[Any], Any]]:
    hints = get_type_hints(kind)
    blank = kind()
    for entry in fields(kind):
        hint, default = _not_none(hints[entry.name]), getattr(blank, entry.name)
        if is_dataclass(hint) and isinstance(hint, type):
            yield from _leaves(hint, skip, f"{prefix}{entry.name}_")
        elif "help" in entry.metadata and entry.name not in skip:
            yield prefix + entry.name, _click_type(hint), entry, default


def _not_none(hint: Any) -> Any:
    if get_origin(hint) in (Union, UnionType):
        return next(option for option in get_args(hint) if option is not type(None))
    return hint


def _click_type(hint: Any) -> Any:
    if get_origin(hint) is Literal:
        return click.Choice(get_args(hint))
    if get_origin(hint) is tuple:
        return get_args(hint)[0], len(get_args(hint))
    return hint


def _spelled(default: Any) -> str:
    return " ".join(str(v) for v in default) if isinstance(default, tuple) else str(default)


def _nested(base: Any, flat: Mapping[str, Any]) -> dict[str, Any]:
    """{"energy_channels": 64} -> {"energy": {"channels": 64}}."""
    result: dict[str, Any] = {}
    hints = get_type_hints(type(base))
    names = {entry.name: is_dataclass(_not_none(hints[entry.name])) for entry in fields(base)}
    for key, value in flat.items():
        owner = next(
            (n for n, nested in names.items() if nested and key.startswith(f"{n}_") and key not in names), None
        )
        if owner is None:
            result[key] = value
        else:
            result.setdefault(owner, {})[key[len(owner) + 1 :]] = value
    return result


def _put(base: Any, values: Mapping[str, Any]) -> Any:
    hints = get_type_hints(type(base))
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise ConfigurationError(f"unknown settings {', '.join(unknown)}; {type(base).__name__} has {', '.join(hints)}")
    new: dict[str, Any] = {}
    for name, value in values.items():
        hint = _not_none(hints[name])
        if is_dataclass(hint) and isinstance(hint, type) and isinstance(value, Mapping):
            current = getattr(base, name)
            new[name] = _put(hint() if current is None else current, value)
        else:
            new[name] = tuple(value) if get_origin(hint) is tuple else value
    try:
        return replace(base, **new)
    except TypeError as error:
        raise ConfigurationError(f"{type(base).__name__}: a setting has the wrong type: {error}") from error
