"""Checks of the records in files against the types and ranges that this version writes.

A check takes a value and the name of its place in the record; it returns the value or raises InvalidError. Larger
checks are built from smaller ones: `fields(required={"tau": number(0, 1000)})`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

from ebm_prior.errors import CheckpointError, ConfigurationError, few, shown
from ebm_prior.model.energy import MOST_GROUPS, EnergyConfig
from ebm_prior.model.prior import CEILING_LIMIT, TAU_LIMIT, Regime, Target
from ebm_prior.model.samplers import SamplerConfig
from ebm_prior.settings import of_plain

Check = Callable[[Any, str], Any]
"""(value, name of its place) -> the value, typed. Raises InvalidError."""


class InvalidError(ValueError):
    """A value in a record is not of the type or range that its place has; the message names place and value."""

    def __init__(self, where: str, expected: str, found: Any) -> None:
        super().__init__(f"{where or 'its record'}: expected {expected}, found {shown(found)}")


def number(low: float = -math.inf, high: float = math.inf, *, or_none: bool = False) -> Check:
    """A number in [low, high], which NaN is not; a whole one, too."""
    bounds = f" from {low:g} to {high:g}" if math.isfinite(low) or math.isfinite(high) else ""

    def check(value: Any, where: str) -> Any:
        if or_none and value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            raise InvalidError(where, f"a number{bounds}{' or null' * or_none}", value)
        return value

    return check


def measured(value: Any, where: str) -> Any:
    """A measured number, which may be NaN or infinite."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InvalidError(where, "a number", value)
    return value


def whole(low: int = 0, high: int = 2**53) -> Check:
    """A whole number in [low, high]."""

    def check(value: Any, where: str) -> Any:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise InvalidError(where, f"a whole number from {low:,} to {high:,}", value)
        return value

    return check


def text(pattern: str = r"[^\0]{1,4096}", expected: str = "a text of 1 to 4,096 characters") -> Check:
    """A text that matches the pattern as a whole."""
    compiled = re.compile(pattern, re.DOTALL)

    def check(value: Any, where: str) -> Any:
        if not isinstance(value, str) or not compiled.fullmatch(value):
            raise InvalidError(where, expected, value)
        return value

    return check


def one_of(*options: str) -> Check:
    """A text that is one of `options`."""

    def check(value: Any, where: str) -> Any:
        if value not in options:
            raise InvalidError(where, few(options, separator=" or "), value)
        return value

    return check


def flag(value: Any, where: str) -> Any:
    """True or false."""
    if not isinstance(value, bool):
        raise InvalidError(where, "true or false", value)
    return value


def anything(value: Any, where: str) -> Any:
    """Any plain value."""
    return value


def optional(check: Check) -> Check:
    """A value that passes `check`, or null."""
    return lambda value, where: None if value is None else check(value, where)


def either(first: Check, second: Check) -> Check:
    """A value that passes at least one of two checks."""

    def check(value: Any, where: str) -> Any:
        try:
            return first(value, where)
        except InvalidError:
            return second(value, where)

    return check


def listed(entry: Check, least: int = 0, most: int = 100_000) -> Check:
    """A list of `least` to `most` entries."""

    def check(value: Any, where: str) -> Any:
        if not isinstance(value, (list, tuple)) or not least <= len(value) <= most:
            raise InvalidError(where, f"a list of {least:,} to {most:,} entries", value)
        return [entry(each, f"{where}[{index}]") for index, each in enumerate(value)]

    return check


def mapping(entry: Check) -> Check:
    """An object in which every value passes `entry`."""

    def check(value: Any, where: str) -> Any:
        if not isinstance(value, Mapping):
            raise InvalidError(where, "an object", value)
        return {key: entry(each, f"{where}.{key}" if where else key) for key, each in value.items()}

    return check


def fields(required: Mapping[str, Check], given: Mapping[str, Check] | None = None) -> Check:
    """An object with all `required` entries. Entries in `given` are checked if present; others are not checked."""
    rest = given or {}

    def check(value: Any, where: str) -> Any:
        if not isinstance(value, Mapping):
            raise InvalidError(where, "an object", value)
        prefix = f"{where}." if where else ""
        if lacking := [f"{prefix}{key}" for key in required if key not in value]:
            raise InvalidError(where, f"the entries {few(lacking)} too", list(value))
        checked = {key: entry(value[key], prefix + key) for key, entry in required.items()}
        checked |= {key: entry(value[key], prefix + key) for key, entry in rest.items() if key in value}
        return {**value, **checked}

    return check


def config(kind: type[Any], **before: Any) -> Check:
    """The settings of a configuration dataclass, checked by that class; missing settings have their defaults.

    before: settings of which older files say nothing, with the values that these files were written for.
    """

    def check(value: Any, where: str) -> Any:
        if not isinstance(value, Mapping):
            raise InvalidError(where, "an object of settings", value)
        try:
            return asdict(of_plain(kind, {**before, **value}))
        except ConfigurationError as error:
            raise InvalidError(where, f"settings that fit together ({error})", dict(value)) from error

    return check


GROUP_NAME = text(r"[^\0.]{1,200}", "a name without dots of 1 to 200 characters")
SIDES = listed(whole(1, 2**24), 1, 3)


def group(value: Any, where: str) -> Any:
    """A latent group: its name, and the shape of a draw."""
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise InvalidError(where, "a name and a shape", value)
    name, shape = GROUP_NAME(value[0], f"{where}[0]"), SIDES(value[1], f"{where}[1]")
    if math.prod(shape) > 2**32:
        raise InvalidError(where, "a shape of at most 2^32 numbers", shape)
    return [name, shape]


ROLE = {
    "energy": config(EnergyConfig, own_heads=MOST_GROUPS),
    "tau": number(0, TAU_LIMIT),
    "regime": one_of(*get_args(Regime)),
    "target": one_of(*get_args(Target)),
    "sampler": config(SamplerConfig),
    "record": fields({}),
}
GIVEN = {
    "ceiling": number(-CEILING_LIMIT, CEILING_LIMIT, or_none=True),  # not in files of before there was one
    "own_energy": fields({"name": text(), "architecture": fields({})}),  # in files of an energy of one's own
}
PRIOR_RECORD = fields(
    {
        "format": whole(1, 1),
        "library": text(),
        "backbone": fields(
            {
                "adapter": text(),
                "checkpoint": text(),
                "fingerprint": text(r"[0-9a-f]{64}", "64 hexadecimal digits"),
                "groups": listed(group, 1, MOST_GROUPS),
                "parameters": whole(1),
            }
        ),
        **ROLE,
    },
    {**GIVEN, "refiner": fields(ROLE, GIVEN)},
)
"""The record of a prior file. Its entries `record`, about the training of a role, are not checked."""

GAIN = fields({"nats": measured, "ess_fraction": measured, "tau": measured})
READJUSTMENT = fields(
    {"iterations": whole(), "batch_size": whole(), "temperature": number(), "seed": whole(0, 10**300)}
)
FIT_SUMMARY = fields(
    {
        "config": fields({"objective": text()}),
        "data": fields({"name": text()}),
        "iterations": whole(),
        "best_iteration": whole(),
        "held_out": fields({"tempered": GAIN}),
    },
    {"bn_readjust": READJUSTMENT},
)
"""The training record that `fit` of every version has written; commands show one line of it."""
GROUP_RATIO = fields(
    {
        "name": text(),
        **dict.fromkeys(("tau", "gain", "log_z", "log_z_error", "ess_fraction"), measured),
    }
)
FIT_RECORD = fields(
    {
        "config": fields({"objective": text(), "ratios": text()}),
        "data": fields({"name": text()}),
        "iterations": whole(),
        "best_iteration": whole(),
        "rollbacks": whole(),
        "held_out": fields({"plain": GAIN, "tempered": GAIN}),
        "saturated": optional(fields({"iteration": whole(), "ess_fraction": measured})),
        "stages": optional(listed(anything)),
    },
    {"narrow": flag, "bn_readjust": READJUSTMENT, "groups": listed(GROUP_RATIO)},
)
"""The training record that this version's `fit` writes."""

BACKBONE_RECORD = fields(
    {"format": whole(1, 1), "adapter": text(), "architecture": fields({}), "record": fields({})}, {"library": text()}
)
"""The record of a backbone file in the own form. Its entry `record`, about the training, is not checked."""


def keeps_to(check: Check, value: Any) -> bool:
    """Whether the value passes `check`."""
    try:
        check(value, "")
    except InvalidError:
        return False
    return True


def checked(check: Check, value: Any, path: str | Path, advice: str) -> Any:
    """A record of the file at `path` after `check`. Raises CheckpointError with the `advice` where it does not pass."""
    try:
        return check(value, "")
    except InvalidError as error:
        raise CheckpointError(f"{path}: {error}; {advice}") from error
