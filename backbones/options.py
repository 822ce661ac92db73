"""Reading options: keyword arguments from JSON into records, and the records of other people's files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any, TypeVar

from ebm_prior.errors import ConfigurationError, few, shown

LARGEST_COUNT = 4096  # of anything in an architecture: a damaged file must neither hang nor overflow

Record = TypeVar("Record")


def record(kind: type[Record], options: Any) -> Record:
    """The dataclass `kind` from its JSON form. Raises ConfigurationError for unknown and missing options."""
    known = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    if not isinstance(options, Mapping):
        raise ConfigurationError(f"{kind.__name__}: expected options among {known}, found {shown(options)}")
    try:
        return kind(**options)
    except TypeError as error:
        raise ConfigurationError(
            f"{kind.__name__}: expected options among {known}, found {shown(dict(options))}: {error}"
        ) from error


def require_count(where: str, value: object, *, least: int = 1) -> None:
    """An integer that a network can have of something; `where` names it in the ConfigurationError."""
    if type(value) is not int or not least <= value <= LARGEST_COUNT:
        raise ConfigurationError(f"{where}: expected an integer from {least} to {LARGEST_COUNT}, found {shown(value)}")


def require_flag(where: str, value: object) -> None:
    """True or false, and no text or number that would count as either; `where` names it in the ConfigurationError."""
    if type(value) is not bool:
        raise ConfigurationError(f"{where}: expected true or false, found {shown(value)}")


def require_number(where: str, value: object, least: float, most: float) -> None:
    """A number in a range, of which true and false are none; `where` names it in the ConfigurationError."""
    if type(value) not in (int, float) or not least <= value <= most:  # type: ignore[operator]
        raise ConfigurationError(f"{where}: expected a number from {least:g} to {most:g}, found {shown(value)}")


def require_choice(where: str, value: object, choices: Iterable[str]) -> None:
    """One of the texts; `where` names it in the ConfigurationError."""
    if not isinstance(value, str) or value not in choices:
        raise ConfigurationError(f"{where}: expected one of {sorted(choices)}, found {shown(value)}")


def require_list(where: str, value: object, *, of: str) -> None:
    """A list that is neither empty nor longer than any network; `of` names one entry, `where` the list."""
    if not isinstance(value, (list, tuple)) or not value:
        raise ConfigurationError(f"{where}: expected a list of at least one {of}, found {shown(value)}")
    if len(value) > LARGEST_COUNT:
        raise ConfigurationError(
            f"{where}: the number of {of}s in all: expected at most {LARGEST_COUNT}, found {len(value)}"
        )


def require_option_counts(options: Any, *names: str, least: int = 1) -> None:
    """`require_count` of the named fields of a record."""
    for name in names:
        require_count(f"{type(options).__name__}.{name}", getattr(options, name), least=least)


_REQUIRED = object()


def take(config: dict[str, Any], key: str, kind: type | tuple[type, ...], default: Any = _REQUIRED) -> Any:
    """Take the value of `key` out of a foreign record; ConfigurationError where it is absent or no `kind`."""
    value = config.pop(key, default)
    if value is _REQUIRED:
        raise ConfigurationError(f"expected the option {key}, found only {few(sorted(config))}")
    if not isinstance(value, kind):
        raise ConfigurationError(f"{key}: expected {kind}, found {shown(value)}")
    return value


def require_nothing_left(config: Mapping[str, Any], where: str) -> None:
    """A foreign record from which everything known has been taken must be empty."""
    if config:
        raise ConfigurationError(
            f"found the {where} options {shown(dict(config))}, which this adapter does not support"
        )
