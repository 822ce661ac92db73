"""Strict reading of JSON files, and printing of text from files without the escape sequences that a terminal obeys."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ebm_prior.errors import CheckpointError, EbmPriorError

LARGEST = 2**26  # bytes of a JSON file: configurations and results have some thousands
DEEPEST = 64  # lists and objects within each other: our own have fewer than ten
LONGEST = 300  # digits of a whole number: one of 310 is no floating-point number


class NotPlainError(ValueError):
    """Text is not the JSON that this project reads; the message says why."""


def parse_json(text: str, *, finite: bool = True) -> Any:
    """The value of a JSON text. Stricter than Python's reader: no key twice, no huge numbers, no deep nesting.

    `finite`: also refuse NaN and infinities, which Python writes although the JSON standard has none. Raises
    NotPlainError.
    """

    def unusual(name: str) -> float:
        if finite:
            raise NotPlainError(f"{name} is no JSON number")
        return float(name)

    def fraction(digits: str) -> float:
        value = float(digits)
        if not math.isfinite(value):
            raise NotPlainError(f"the number {digits[:20]}… is too large")
        return value

    def whole(digits: str) -> int:
        if len(digits) > LONGEST:
            raise NotPlainError(f"a whole number of {len(digits)} digits is too large")
        return int(digits)

    hooks: dict[str, Any] = {"parse_constant": unusual, "parse_float": fraction, "parse_int": whole}
    try:
        value = json.loads(text, object_pairs_hook=_each_once, **hooks)
    except RecursionError as error:
        raise NotPlainError(f"lists or objects lie within each other more than {DEEPEST} deep") from error
    except NotPlainError:
        raise
    except ValueError as error:  # Python's text has the place: line and column
        raise NotPlainError(str(error)) from error
    _require_plain(value)
    return value


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise NotPlainError(f"the key {next(n for n in names if names.count(n) > 1)!r} occurs twice")
    return found


def _require_plain(value: Any) -> None:
    """Refuse nesting deeper than DEEPEST and text that cannot be written. Not recursive: files can nest deep."""
    level, depth = [value], 0
    while level:
        if depth > DEEPEST:
            raise NotPlainError(f"lists or objects lie within each other more than {DEEPEST} deep")
        texts = [entry for entry in level if isinstance(entry, str)]
        texts += [key for entry in level if isinstance(entry, dict) for key in entry]
        for text in texts:
            if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
                raise NotPlainError(f"the text {printable(text)[:40]!r} has half a character (a lone surrogate)")
        inner = [entry for entry in level if isinstance(entry, (dict, list))]
        level = [each for entry in inner for each in (entry.values() if isinstance(entry, dict) else entry)]
        depth += 1


def read_json(
    path: str | Path, what: str, *, error: type[EbmPriorError] = CheckpointError, advice: str = "make it again"
) -> Any:
    """The value in a JSON file, UTF-8 with or without a byte-order mark.

    `what` names the expected content in messages, `advice` says what to do. Raises `error`.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(LARGEST + 1)
        if len(content) > LARGEST:
            raise NotPlainError(f"more than {LARGEST // 2**20} MiB")
        return parse_json(content.decode("utf-8-sig"))
    except UnicodeDecodeError as reason:
        raise error(f"{path} cannot be read as UTF-8 ({reason}); expected {what}: {advice}") from reason
    except OSError as reason:
        raise error(f"{path} cannot be read ({reason.strerror or reason}); expected {what}: {advice}") from reason
    except ValueError as reason:  # NotPlainError, or a path with a NUL
        raise error(f"{path} cannot be read as JSON ({reason}); expected {what}: {advice}") from reason


def printable(text: str) -> str:
    """A text with every invisible character spelled out: escape sequences, line ends, lone surrogates.

    Text from files passes through this function before it is printed, because a terminal obeys escape sequences.
    """
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else _spelled_out(letter) for letter in text)


def _spelled_out(letter: str) -> str:
    code = ord(letter)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 65536 else f"\\U{code:08x}"


def all_printable(value: Any) -> Any:
    """Plain values with every text in them, keys too, made `printable`."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, Mapping):
        return {all_printable(key): all_printable(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [all_printable(entry) for entry in value]
    return value
