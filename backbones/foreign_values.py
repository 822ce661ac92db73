"""Stand-ins for the values beside the weights in other people's files, so that reading a file runs no foreign code.

Each allowed name in a pickle is mapped to a function or class of this module, which only stores its arguments. So no
code of numpy, pathlib or argparse is called with the contents of a file, and any other name is refused.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

NUMBERS = {"b1": "?", "i1": "b", "i2": "h", "i4": "i", "i8": "q", "u1": "B", "u2": "H", "u4": "I", "u8": "Q"} | {
    "f2": "e",
    "f4": "f",
    "f8": "d",
}
"""numpy's types of numbers, by the letters of `struct`."""


class Skipped:
    """A value that is not read: an array, a random generator's state, a date."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass

    def __repr__(self) -> str:
        return "a value that is not read"


class Arguments:
    """An argparse.Namespace: its attributes, by name, as `vars` gives them."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
            raise ValueError("expected attributes by name")
        self.__dict__.update(state)


class NumberType:
    """A numpy.dtype: the letters of a number, and the order of its bytes."""

    def __init__(self, code: Any = None, *_: Any) -> None:
        self.code, self.order = code, "<"

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, tuple) and len(state) > 1 and state[1] == ">":
            self.order = ">"


def _number(kind: Any = None, data: Any = None, *_: Any) -> Any:
    """A numpy scalar as Python's number, where its bytes are one."""
    letters = NUMBERS.get(kind.code) if isinstance(kind, NumberType) and isinstance(kind.code, str) else None
    if letters is None or not isinstance(data, bytes) or len(data) != struct.calcsize(f"={letters}"):
        return Skipped()
    return struct.unpack(kind.order + letters, data)[0]


def _path(*parts: Any) -> Any:
    """A path as its text."""
    texts = [part for part in parts if isinstance(part, str)]
    first = texts.pop(0) if texts and texts[0] == "/" else ""
    return first + "/".join(texts)


def _dict(*_: Any) -> dict[Any, Any]:
    """A stand-in for a new defaultdict; its factory is not kept."""
    return {}


def _list(*_: Any) -> list[Any]:
    """A stand-in for a new deque."""
    return []


def _factory(*_: Any) -> Skipped:
    """A stand-in for the builtin type that a defaultdict names as its factory; it makes nothing."""
    return Skipped()


STAND_INS: dict[str, Callable[..., Any]] = {
    "argparse.Namespace": Arguments,
    "types.SimpleNamespace": Arguments,
    "collections.defaultdict": _dict,
    "collections.deque": _list,
    "numpy.dtype": NumberType,
    "numpy.ndarray": Skipped,
    **{f"numpy.{core}.multiarray.scalar": _number for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray._reconstruct": Skipped for core in ("core", "_core")},
    **{
        f"pathlib.{local}{pure}{kind}Path": _path
        for local in ("", "_local.")
        for pure in ("", "Pure")
        for kind in ("", "Posix", "Windows")
    },
    **{f"builtins.{kind}": _factory for kind in ("int", "float", "str", "bool", "list", "dict", "tuple")},
    **{f"datetime.{kind}": Skipped for kind in ("date", "datetime", "time", "timedelta", "timezone")},
}
"""The stand-in for each name that a file may contain beside torch's own."""
