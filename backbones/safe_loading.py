"""Safe reading of other people's checkpoint files: no code of a file runs, and errors say what is wrong with it.

A pickle can name any function of any installed package. `torch.load(weights_only=True)` accepts only a fixed list of
names, with those of `foreign_values` mapped to functions of ours. `load_pickle` maps a fixed list of names to words.
The result must then consist of plain values or tensors, so that a strange file fails here and not in a network.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from ebm_prior.backbones.foreign_values import STAND_INS
from torch import Tensor

from ebm_prior.errors import CheckpointError, few
from ebm_prior.storage.weights import FLOATS, require_finite

PLAIN = (str, int, float, bool, type(None))
LARGEST_RECORD = 100_000  # bytes, or values: an architecture has some hundreds


def load_file(path: Path, content: str) -> Any:
    """The content of a torch file. `content` says what the file should hold, for the error message.

    Harmless values are read or skipped (`foreign_values`); any other name that torch does not know is refused. If the
    format allows it the tensors are memory-mapped, so that unused ones take no memory.
    """
    _require_file(path, content)
    zipped = zipfile.is_zipfile(path)
    try:
        if zipped:
            _require_whole(path)
        with warnings.catch_warnings(), _stand_ins_alone():
            # official files are older than torch's present pickle protocol
            warnings.filterwarnings("ignore", message="Detected pickle protocol")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # a damaged archive or pickle can raise nearly anything
        raise _refusal(path, content, error) from error


@contextlib.contextmanager
def _stand_ins_alone() -> Iterator[None]:
    """Inside the block torch allows its own names and the stand-ins, but no others that this process declared safe."""
    declared = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals([(stand_in, name) for name, stand_in in STAND_INS.items()])
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(declared)


def _require_whole(path: Path) -> None:
    """Verify the checksums in a zip file, which torch does not do; a flipped bit would change a weight.

    torch compresses nothing, so entries that claim to be larger than the file are refused before they are unpacked.
    """
    with zipfile.ZipFile(path) as archive:
        if sum(entry.file_size for entry in archive.infolist()) > os.path.getsize(path):
            raise zipfile.BadZipFile("entries larger than the file")
        if (damaged := archive.testzip()) is not None:
            raise zipfile.BadZipFile(damaged)


def _require_file(path: Path, content: str) -> None:
    if not os.path.isfile(path):  # Path's own raises where a name is too long for the system
        raise CheckpointError(f"expected {content} in {path}, found no such file; copy the whole folder of the run")


def _refusal(path: Path, content: str, error: Exception) -> CheckpointError:
    refused = re.search(r"GLOBAL (\S+)", str(error))
    found = (
        f"the name {refused[1][:200]}, refused because loading it could run code. Numbers, texts, lists, dicts, paths, "
        "numpy's numbers and argparse's Namespace may stand beside the weights: save the file again without the entry "
        "that holds anything else, where it comes from, or get it from its source"
        if refused
        else f"a damaged file or another format ({type(error).__name__}); copy it again from its source"
    )
    return CheckpointError(f"expected {content} in {path}, found {found}")


def load_plain(path: Path, content: str) -> Any:
    """Strings, numbers, booleans and None in lists and dicts with string keys; tuples become lists."""
    return _plain(load_file(path, content), path)


def load_pickle(path: Path, content: str, words: Mapping[str, str]) -> Any:
    """Plain values, as `load_plain`, from an ordinary pickle file.

    `words`: a word for each class or function ("module.name") that the file may name. The word takes the place of
    what is named, which is neither imported nor called; no other name may occur.
    """
    data = _small_file(path, content)
    try:
        for instruction, argument, _ in pickletools.genops(data):
            if "PUT" in instruction.name and isinstance(argument, int) and argument > len(data):
                raise pickle.UnpicklingError(f"memo entry {argument}")  # all entries up to it would be allocated
        return _plain(_Wordbook(data, words).load(), path)
    except CheckpointError:
        raise
    except Exception as error:
        raise _refusal(path, content, error) from error


class _Wordbook(pickle.Unpickler):
    """An unpickler that replaces each allowed name by a word, which can neither be called nor be given attributes."""

    def __init__(self, data: bytes, words: Mapping[str, str]) -> None:
        super().__init__(io.BytesIO(data))
        self.words = words

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full not in self.words:
            raise pickle.UnpicklingError(f"GLOBAL {full}")
        return self.words[full]


def load_json(path: Path, content: str) -> dict[str, Any]:
    """A JSON object."""
    data = _small_file(path, content)
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise _refusal(path, content, error) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"expected {content} in {path}, a JSON object, found {type(value).__name__}")
    return value


def _small_file(path: Path, content: str) -> bytes:
    _require_file(path, content)
    size = os.path.getsize(path)
    if size > LARGEST_RECORD:
        raise CheckpointError(f"expected {content} in {path}, at most {LARGEST_RECORD} bytes of it, found {size}")
    return path.read_bytes()


def _plain(value: Any, path: Path) -> Any:
    left = itertools.count(LARGEST_RECORD, -1)

    def copied(value: Any) -> Any:
        if next(left) == 0:  # entries that refer to each other can stand for more than memory holds
            raise CheckpointError(f"expected plain values in {path}, found too many")
        if isinstance(value, (list, tuple)):
            return [copied(v) for v in value]
        if isinstance(value, dict) and all(isinstance(key, str) for key in value):
            return {key: copied(v) for key, v in value.items()}
        if isinstance(value, PLAIN) and not (isinstance(value, int) and abs(value) >= 2**63):  # not even printable
            return value
        raise CheckpointError(
            f"expected plain values in {path}, found {type(value).__name__}; this is not the file it claims"
        )

    try:
        return copied(value)
    except RecursionError as error:
        raise CheckpointError(f"expected plain values in {path}, found entries that contain themselves") from error


def tensors_of(state: Any, path: Path, content: str) -> dict[str, Tensor]:
    """`state`, from the file at `path`, as a state dict: dense tensors by name, the floating-point ones finite."""
    if not isinstance(state, dict):
        raise CheckpointError(
            f"expected {content} in {path}, tensors by name, found something else than a dict of dense tensors: "
            f"{_kind(state)}"
        )
    wrong = [f"{str(key)[:100]} ({_kind(v)})" for key, v in state.items() if not (isinstance(key, str) and _sound(v))]
    if wrong:
        raise CheckpointError(
            f"expected {content} in {path}, found something else than a dict of dense tensors of numbers: {few(wrong)}"
        )
    sizes = [value.numel() * value.element_size() for value in state.values()]
    if sum(sizes) > 4 * os.path.getsize(path):  # a few tensors under many names each, or one number repeated
        raise CheckpointError(
            f"expected {content} in {path}, found tensors of {sum(sizes)} bytes in a file of {os.path.getsize(path)}: "
            "they are one another's copies; save them again as contiguous tensors"
        )
    require_finite(state, path)
    return dict(state)


def _sound(value: object) -> bool:
    """Whether a value is a tensor in memory with a number at each place, of a type in which weights are stored."""
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.device.type != "cpu":
        return False
    return not value.is_quantized and (value.dtype in FLOATS or not value.is_floating_point())


def _kind(value: object) -> str:
    if isinstance(value, dict):
        return f"a dict of {few([str(key) for key in value])}" if value else "an empty dict"
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype}, {value.layout}, on {value.device}"
    return type(value).__name__
