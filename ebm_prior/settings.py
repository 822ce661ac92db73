"""Configuration dataclasses: checks of their values, JSON files of settings, and settings as words of a command."""

from __future__ import annotations

import contextlib
import math
import numbers
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import Field, field, fields, is_dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from ebm_prior.errors import ConfigurationError, SettingError, few, shown
from ebm_prior.plain import printable, read_json

Config = TypeVar("Config")
Value = TypeVar("Value")


def setting(default: Value, help: str) -> Value:
    """A field of a configuration dataclass: its default, and the help of its command-line option."""
    return field(default=default, metadata={"help": help})


def later_setting(default: Value, help: str) -> Value:
    """A `setting` that earlier versions did not have; `recorded` leaves it out at its default."""
    return field(default=default, metadata={"help": help, "later": True})


def recorded(config: Any) -> dict[str, Any]:
    """A configuration as plain values for a file, nested ones too. Files keep their bytes where nothing new is set."""
    values = ((entry, getattr(config, entry.name)) for entry in fields(config))
    return {
        entry.name: recorded(value) if is_dataclass(value) else value
        for entry, value in values
        if not ("later" in entry.metadata and value == entry.default)
    }


def resolve(base: Config, given: Mapping[str, Any], file: Path | Mapping[str, Any] | None = None) -> Config:
    """A copy of the configuration `base`, changed first by the settings in `file` and then by those in `given`.

    Args:
        base: the configuration to start from.
        given: values by the name of their option. None means that the option was not given; names that are no settings
            of `base` are ignored.
        file: the path of a JSON file of settings, or the settings read from it.

    Raises:
        ConfigurationError: for a file that cannot be read, an unknown setting in it, or a value of the wrong kind.
    """
    values = read_settings(file) if isinstance(file, Path) else file or {}
    known = {name for name, *_ in every_setting(type(base), ())}
    chosen = {name: value for name, value in given.items() if value is not None and name in known}
    resolved: Config = _replaced(_replaced(base, values), _by_dataclass(base, chosen))
    return resolved


def of_plain(kind: type[Config], values: Mapping[str, Any]) -> Config:
    """A configuration of the dataclass `kind` from plain values, e.g. of a file; missing ones have their defaults.

    Raises ConfigurationError for an unknown setting, and for a value of another type or out of its range.
    """
    made: Config = _replaced(kind(), values)
    return made


def read_settings(file: Path | None) -> dict[str, Any]:
    """The settings in a JSON file or in the config.json of a run; an empty dictionary if `file` is None.

    Raises ConfigurationError for a file that cannot be read.
    """
    if file is None:
        return {}
    advice = "give a JSON object of settings, or a run's config.json"
    values = read_json(file, "settings for --config", error=ConfigurationError, advice=advice)
    if not isinstance(values, dict):
        raise ConfigurationError(f"--config {file}: expected a JSON object, found {type(values).__name__}")
    values = values.get("config", values)
    if not isinstance(values, dict):
        raise ConfigurationError(f"--config {file}: expected an object of settings, found {shown(values)}")
    return values


def read_parts(file: Path | None, **kinds: type[Any]) -> dict[str, dict[str, Any]]:
    """The settings in a file, divided among the configuration dataclasses of a command: name of dataclass -> settings.

    kinds: the dataclasses by their names. A setting goes to the dataclass that has a field of that name; an object
    under the name of a dataclass holds settings of that dataclass, as in {"sampler": {"steps": 20}}. Raises
    ConfigurationError for a file that cannot be read and for a setting that no dataclass has.
    """
    parts: dict[str, dict[str, Any]] = {name: {} for name in kinds}
    owners = {entry.name: name for name, kind in kinds.items() for entry in fields(kind)}
    unknown = []
    for key, value in read_settings(file).items():
        if key in owners:
            parts[owners[key]][key] = value
        elif key in kinds and isinstance(value, dict):
            parts[key] |= value
        else:
            unknown.append(printable(key)[:80])
    if unknown:
        raise ConfigurationError(f"--config {file}: unknown settings {few(unknown)}; known are {few(owners)}")
    return parts


def configured(kind: type[Config], given: Config | Mapping[str, Any] | None) -> Config:
    """An instance of `kind` from any form in which Python callers give settings.

    given: an instance, a dictionary of the values that differ from the defaults, or None for the defaults. A dictionary
    may be nested or flat: {"energy": {"channels": 64}} or {"energy_channels": 64}. Raises ConfigurationError for
    unknown names and for values of the wrong kind.
    """
    if given is None:
        return kind()
    if isinstance(given, kind):
        return given
    if not isinstance(given, Mapping):
        found = f"the class {given.__name__}" if isinstance(given, type) else f"a {type(given).__name__}"
        raise ConfigurationError(
            f"expected the settings as {kind.__name__}(…) or as a dictionary, found {found}; None takes the defaults"
        )
    return _replaced(kind(), _by_dataclass(kind, {str(name): value for name, value in given.items()}))  # type: ignore[no-any-return]


def settings(config: Any, prefix: str = "") -> dict[str, Any]:
    """Every setting of a configuration, nested ones too, by the name of its option: {"energy_channels": 64}."""
    flat: dict[str, Any] = {}
    for entry in fields(config):
        value = getattr(config, entry.name)
        if is_dataclass(value):
            flat |= settings(value, f"{prefix}{entry.name}_")
        else:
            flat[prefix + entry.name] = value
    return flat


def as_words(config: Any, base: Any) -> list[str]:
    """The options that turn `base` into `config`, as words of a command, e.g. ["--energy-channels", "64"]."""
    before, words = settings(base), list[str]()
    for name, value in settings(config).items():
        if value != before.get(name):
            option = name.replace("_", "-")
            words += (
                [f"--{'' if value else 'no-'}{option}"]
                if isinstance(value, bool)
                else [f"--{option}", *spelled(value).split()]
            )
    return words


def every_setting(
    kind: type[Any], skip: tuple[str, ...], prefix: str = "", blank: Any = None
) -> Iterator[tuple[str, Any, Field[Any], Any]]:
    """Name, type, field and default of every setting of a configuration dataclass that has a help text.

    skip: names of fields to leave out, also in nested dataclasses.  prefix: put before every name.  blank: the instance
    that holds the default values; None means `kind()`, so that defaults of `kind` replace those of nested dataclasses.
    """
    hints = get_type_hints(kind)
    blank = kind() if blank is None else blank
    for entry in fields(kind):
        hint, default = _not_none(hints[entry.name]), getattr(blank, entry.name)
        if entry.name in skip:
            continue
        if is_dataclass(hint) and isinstance(hint, type):
            yield from every_setting(hint, skip, f"{prefix}{entry.name}_", default)
        elif "help" in entry.metadata:
            yield prefix + entry.name, hint, entry, default


def _not_none(hint: Any) -> Any:
    if get_origin(hint) in (Union, UnionType):
        return next(option for option in get_args(hint) if option is not type(None))
    return hint


def spelled(default: Any) -> str:
    """A value as it is typed on the command line; the parts of a tuple with spaces between them."""
    return " ".join(str(v) for v in default) if isinstance(default, tuple) else str(default)


def _by_dataclass(base: Any, flat: Mapping[str, Any]) -> dict[str, Any]:
    """{"energy_channels": 64} -> {"energy": {"channels": 64}}, to any depth."""
    result: dict[str, Any] = {}
    kind = base if isinstance(base, type) else type(base)
    hints = {name: _not_none(hint) for name, hint in get_type_hints(kind).items()}
    owned: dict[str, dict[str, Any]] = {}
    for key, value in flat.items():
        owner = next((n for n, h in hints.items() if is_dataclass(h) and key.startswith(f"{n}_")), None)
        if owner is None or key in hints:
            result[key] = value
        else:
            owned.setdefault(owner, {})[key[len(owner) + 1 :]] = value
    return result | {owner: _by_dataclass(hints[owner], part) for owner, part in owned.items()}


def _replaced(base: Any, values: Mapping[str, Any]) -> Any:
    """A copy of the dataclass `base` with `values`, checked against its types; mappings set nested dataclasses."""
    hints = get_type_hints(type(base))
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise ConfigurationError(
            f"unknown settings {few(printable(name)[:80] for name in unknown)}; {_near(unknown, hints, base)}"
        )
    new: dict[str, Any] = {}
    for name, value in values.items():
        hint = _not_none(hints[name])
        if is_dataclass(hint) and isinstance(hint, type) and isinstance(value, Mapping):
            current = getattr(base, name)
            with within(name):
                new[name] = _replaced(hint() if current is None else current, value)
        else:
            new[name] = _require_kind(name, value, hints[name])
    return replace(base, **new)


def _near(unknown: Sequence[str], known: Iterable[str], base: Any) -> str:
    """The part of a message that lists the known settings, with those spelled like the unknown ones first."""
    like = [name for wrong in unknown for name in get_close_matches(wrong, list(known), cutoff=0.5)]
    meant = f" (did you mean {like[0]}?)" if like else ""
    return f"{type(base).__name__} has {few(dict.fromkeys([*like, *known]))}{meant}"


def _require_kind(name: str, value: Any, hint: Any) -> Any:
    """The value of the setting `name` as an instance of its type `hint`. Raises SettingError where it is of another.

    A list becomes a tuple, and a number of NumPy one of Python.
    """
    wanted = _not_none(hint)
    if value is None and wanted is not hint:
        return None
    try:
        return _of_kind(value, wanted)
    except TypeError:
        raise SettingError(name, f"must be {_described(wanted)}, found {shown(value)}") from None


def _of_kind(value: Any, hint: Any) -> Any:
    """See `_require_kind`; raises TypeError."""
    if get_origin(hint) is Literal and isinstance(value, str) and value in get_args(hint):
        return str(value)
    if get_origin(hint) is tuple and isinstance(value, (list, tuple)) and len(value) == len(get_args(hint)):
        return tuple(map(_of_kind, value, get_args(hint)))
    if isinstance(value, bool) and hint is not bool:  # which Python counts as a number
        raise TypeError
    if hint is int and isinstance(value, numbers.Integral):
        return int(value)
    if hint is float and isinstance(value, numbers.Real):
        try:
            return float(value)
        except OverflowError:  # a whole number of hundreds of digits
            return -math.inf if value < 0 else math.inf
    if type(value) is not hint:
        raise TypeError
    return value


def _described(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return " or ".join(get_args(hint))
    if get_origin(hint) is tuple:
        return f"{len(get_args(hint))} numbers"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    return names.get(hint, "an object of settings")


def require(config: Any, name: str, right: bool, expected: str, *, found: Any = None) -> None:
    """Raise SettingError unless the field `name` of `config` is `right`; `found`: its value, or the part that is wrong.

    expected: in words that follow the name, "must be positive".
    """
    if not right:
        raise SettingError(name, f"{expected}, found {getattr(config, name) if found is None else found}")


def require_positive(config: Any, *names: str) -> None:
    """Raise SettingError unless all fields of `config` with these names are positive finite numbers."""
    for name in names:
        value = getattr(config, name)
        expected = "must be positive and finite" if isinstance(value, float) else "must be positive"
        require(config, name, 0 < value < math.inf, expected)


def require_not_negative(config: Any, *names: str) -> None:
    """Raise SettingError unless all fields of `config` with these names are finite numbers of 0 or more."""
    for name in names:
        require(config, name, 0 <= getattr(config, name) < math.inf, "must be finite and not negative")


def require_counts(config: Any, *names: str, most: int) -> None:
    """Raise SettingError unless all fields of `config` with these names are from 1 to `most`."""
    for name in names:
        require(config, name, 1 <= getattr(config, name) <= most, f"must be from 1 to {most:,}")


def require_shares(config: Any, *names: str, open: bool = False) -> None:
    """Raise SettingError unless all fields of `config` with these names, or their parts, are in [0, 1].

    open: 1 itself is none of them.
    """
    for name in names:
        value = getattr(config, name)
        for part in value if isinstance(value, tuple) else (value,):
            right = 0 <= part < 1 if open else 0 <= part <= 1
            require(config, name, right, f"must be in [0, 1{')' if open else ']'}", found=part)


def require_seed(config: Any) -> None:
    """Raise SettingError where the seed of a configuration is negative, which `derived_seed` does not accept."""
    require(config, "seed", config.seed >= 0, "must not be negative")


@contextlib.contextmanager
def within(name: str) -> Iterator[None]:
    """Inside, a SettingError is of a part of the field `name`, whose name comes first: energy_channels."""
    try:
        yield
    except SettingError as error:
        raise SettingError(f"{name}_{error.name}", error.says) from error


def require_kinds(config: Any) -> None:
    """Raise SettingError where a field of a configuration dataclass has a value of another kind: "64" for 64.

    Values that mean the same are stored as the field's own type: (0.9, 0.99) for [0.9, 0.99], 5 for np.int64(5).
    """
    hints = get_type_hints(type(config))
    for entry in fields(config):
        value = getattr(config, entry.name)
        kept = _require_kind(entry.name, value, hints[entry.name])
        if kept is not value:
            object.__setattr__(config, entry.name, kept)  # the dataclass is frozen
