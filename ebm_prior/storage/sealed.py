"""Checksums of the files that a run reads back: the resume state, the metrics, and the record of its settings.

- state.pt: torch does not verify the checksums of its zip file. So the zip's comment, which torch.load and other
  readers ignore, holds the SHA-256 of everything before it.
- metrics.jsonl: each line ends in its own CRC-32, `"crc32": "9ae0daaf"}`, which is one more column for readers of JSON
  lines. It is in the same line, so that a kill cannot separate the two.
- config.json: the SHA-256 of all other entries, under "sha256".

Files of version 0.1.0 have no such checksums and are still read; their state is verified by the zip's CRC-32.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ebm_prior.errors import CheckpointError
from ebm_prior.plain import NotPlainError, parse_json
from ebm_prior.storage.records import InvalidError, fields, whole

_SEAL = re.compile(rb"ebm-prior state (\d{3}) sha256 ([0-9a-f]{64})")
_SEAL_LENGTH = len(b"ebm-prior state 001 sha256 ") + 64
_FORMAT = b"001"
_END = b"PK\5\6"  # of a zip file: 22 bytes, of which the last two are the length of the comment that follows
_LINE_END = re.compile(r', "crc32": "([0-9a-f]{8})"\}')
_LINE_END_LENGTH = len(', "crc32": "00000000"}')
_METRICS = fields({"iteration": whole()})
_ADVICE = "copy it again where you have it, or start anew with --overwrite"


def state_bytes(state: Mapping[str, Any]) -> memoryview:
    """The bytes of a state.pt: the output of torch.save with the checksum."""
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    buffer.seek(-2, io.SEEK_END)
    buffer.write(_SEAL_LENGTH.to_bytes(2, "little"))
    buffer.write(b"ebm-prior state %s sha256 %s" % (_FORMAT, hashlib.sha256(buffer.getbuffer()).hexdigest().encode()))
    return buffer.getbuffer()


def read_state(path: Path) -> tuple[dict[str, Any], bool]:
    """The state in a file of `state_bytes`, and whether the file has a checksum (files of version 0.1.0 have none).

    Raises CheckpointError for a damaged file and for one of another kind.
    """
    try:
        sealed = _require_whole(path)
        state = torch.load(path, weights_only=True, map_location="cpu")
        if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
            raise TypeError(f"expected an object with names, found {type(state).__name__}")
        _METRICS(state, "")
    except CheckpointError:
        raise
    except Exception as error:  # a damaged archive or pickle can raise nearly anything
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        raise CheckpointError(f"{path} is damaged or no resume state ({reason}); {_ADVICE}") from error
    return state, sealed


def _require_whole(path: Path) -> bool:
    """Verify the checksum of the file; returns whether it has one."""
    with path.open("rb") as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(max(0, size - _SEAL_LENGTH - 22))
        tail = file.read()
        if tail[-22:-18] == _END and tail[-2:] == b"\0\0":
            with zipfile.ZipFile(path) as archive:
                if (damaged := archive.testzip()) is not None:
                    raise zipfile.BadZipFile(f"its part {damaged} does not match its checksum")
            return False
        found = _SEAL.fullmatch(tail[-_SEAL_LENGTH:])
        if found is None:
            raise zipfile.BadZipFile("its checksum is not there")
        if found[1] != _FORMAT:
            raise CheckpointError(
                f"{path} is a resume state of format {int(found[1])}, this version reads {int(_FORMAT)}: go on with "
                "the version of ebm-prior that wrote it, or start anew with --overwrite"
            )
        digest, left = hashlib.sha256(), size - _SEAL_LENGTH
        file.seek(0)
        while piece := file.read(min(2**20, left)):
            digest.update(piece)
            left -= len(piece)
        if digest.hexdigest().encode() != found[2]:
            raise zipfile.BadZipFile("its content does not match its checksum")
    return True


def sealed_line(metrics: Mapping[str, Any]) -> str:
    """One line of metrics.jsonl, with its checksum; `metrics` has at least the iteration."""
    text = json.dumps(metrics)
    return f'{text[:-1]}, "crc32": "{zlib.crc32(text.encode()):08x}"}}'


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, none where there is no file; a last line that a kill cut short is left out.

    Either every line has a checksum or, as in files of version 0.1.0, none has. Raises CheckpointError for a line that
    is broken or lacks its iteration.
    """
    try:
        lines = path.read_bytes().decode().split("\n")[:-1] if path.exists() else []
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); remove the broken line and use --resume") from error
    seals = [_LINE_END.fullmatch(line[-_LINE_END_LENGTH:]) for line in lines]
    pairs = enumerate(zip(lines, seals, strict=True), start=1)
    return [_line(line, seal, any(seals), f"{path} is damaged in line {number}") for number, (line, seal) in pairs]


def _line(line: str, seal: re.Match[str] | None, expected: bool, where: str) -> dict[str, Any]:
    text = line if seal is None else line[:-_LINE_END_LENGTH] + "}"
    try:
        if expected and seal is None:
            raise NotPlainError("it has no checksum, as others have")
        if seal is not None and f"{zlib.crc32(text.encode()):08x}" != seal[1]:
            raise NotPlainError("it does not match its checksum")
        metrics: dict[str, Any] = _METRICS(parse_json(text), "")
    except (NotPlainError, InvalidError) as error:
        raise CheckpointError(f"{where} ({error}); remove the broken line and use --resume") from error
    return metrics


def sealed_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """Plain values with the checksum of them under "sha256"."""
    return {**record, "sha256": _digest(record)}


def opened_record(record: Mapping[str, Any], path: Path, advice: str) -> dict[str, Any]:
    """The inverse of `sealed_record`; a record without a checksum is as it is. Raises CheckpointError."""
    plain = {key: value for key, value in record.items() if key != "sha256"}
    if "sha256" in record and record["sha256"] != _digest(plain):
        raise CheckpointError(f"{path} cannot be read (its content does not match its checksum); {advice}")
    return plain


def _digest(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
