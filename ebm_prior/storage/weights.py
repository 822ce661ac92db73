"""Weights on disk: safetensors with one metadata key of sorted JSON; checks and fingerprints of weights.

There is only one key, because safetensors writes several in random order, so that equal runs would give different
files. Nothing here unpickles.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ebm_prior.errors import CheckpointError, ConfigurationError, described, few
from ebm_prior.plain import NotPlainError, parse_json, printable
from ebm_prior.storage.atomic import write_atomically

Module = TypeVar("Module", bound=nn.Module)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Types of the numbers in which weights can be stored."""
KINDS = {  # safetensors' names of the types that are written and read
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def require_path(name: str, path: object) -> None:
    """Raise ConfigurationError unless the argument called `name` can be the path of a file."""
    if not isinstance(path, (str, os.PathLike)) or not str(path).strip():
        raise ConfigurationError(f"{name}: expected the path of a file, found {described(path)}")


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], key: str, record: Mapping[str, Any]) -> None:
    """Write tensors and the record as one safetensors file, atomically. Equal content gives equal bytes.

    Raises CheckpointError for what `read_tensors` would refuse.
    """
    # Cloned, for safetensors refuses tensors that share memory, as tied weights do.
    plain = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in sorted(tensors.items())
    }
    if odd := [f"{name} ({tensor.dtype})" for name, tensor in plain.items() if tensor.dtype not in KINDS.values()]:
        raise CheckpointError(
            f"cannot write {path}: expected tensors of ordinary numbers, found {few(odd)}; convert them"
        )
    try:
        parse_json(json.dumps(record, sort_keys=True), finite=False)
    except (NotPlainError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"cannot write {path}: expected a record of plain values that can be read again ({error}); change it"
        ) from error
    record = {**record, "sha256": _digest(plain, record)}
    write_atomically(path, save(plain, metadata={key: json.dumps(record, sort_keys=True)}))


def read_tensors(path: str | Path, key: str, what: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file of `write_tensors`: its tensors (on the CPU) and its record.

    `what` names the expected kind in messages, e.g. "a prior". Raises CheckpointError for a missing, truncated or
    corrupt file, and for a safetensors file of another kind.
    """
    path = Path(path)
    if not os.path.isfile(path):  # Path's own raises where a name is too long for the system
        raise CheckpointError(
            f"expected {what} at {path}, found {'a folder' if os.path.isdir(path) else 'nothing'} there"
        )
    try:
        with safe_open(path, framework="pt") as file:
            record = parse_json((file.metadata() or {}).get(key, "null"), finite=False)
            kinds = {name: str(file.get_slice(name).get_dtype()) for name in file.keys()}  # noqa: SIM118 (not a dict)
            if odd := [f"{printable(name)} ({kind})" for name, kind in kinds.items() if kind not in KINDS]:
                raise NotPlainError(f"tensors of numbers that this version does not know: {few(odd)}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is damaged or not a safetensors file ({error}); expected {what}. Copy or make it again"
        ) from error
    if not isinstance(record, dict):
        raise CheckpointError(f"{path} is a safetensors file, but not {what}: its metadata has no key {key!r}")
    written = record.pop("sha256", None)
    if written is not None and written != _digest(tensors, record):
        raise CheckpointError(f"{path} is damaged: its content does not match its checksum. Copy or make it again")
    return tensors, record


def _digest(tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> str:
    """SHA-256 over the record and the tensors: safetensors itself notices no flipped bit."""
    normal = json.loads(json.dumps(record))
    digest = hashlib.sha256(json.dumps(normal, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_state(
    found: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    path: Path,
    *,
    architecture: str = "architecture recorded with them",
) -> None:
    """Names, shapes and kinds of `found` must be those of `expected`; CheckpointError names up to ten that are not.

    `architecture`: in words, where `expected` comes from.
    """
    common = [key for key in expected if key in found]
    pairs = {key: (expected[key], found[key]) for key in common}
    problems = {
        "missing": [f"{key} {tuple(expected[key].shape)}" for key in expected if key not in found],
        "unexpected": [f"{printable(key)} {tuple(found[key].shape)}" for key in found if key not in expected],
        "mis-shaped": [
            f"{key} expected {tuple(wanted.shape)}, found {tuple(got.shape)}"
            for key, (wanted, got) in pairs.items()
            if wanted.shape != got.shape
        ],
        "of another type": [
            f"{key} expected {wanted.dtype}, found {got.dtype}"
            for key, (wanted, got) in pairs.items()
            if wanted.shape == got.shape and not _same_kind(wanted.dtype, got.dtype)
        ],
    }
    kinds = [kind for kind, names in problems.items() if names]
    if kinds:
        most = 10 // len(kinds)
        listed = "; ".join(f"{kind}: {few(problems[kind], most=most)}" for kind in kinds)
        raise CheckpointError(
            f"the weights in {path} do not fit the {architecture}: {listed}. Give the weights and the record of one run"
        )


def _same_kind(wanted: torch.dtype, got: torch.dtype) -> bool:
    """Whether numbers of type `got` can be copied into `wanted`: floats of 16 bits or more into floats."""
    return got in FLOATS if wanted.is_floating_point else not (got.is_floating_point or got.is_complex)


def require_finite(
    tensors: Mapping[str, Tensor], where: str | Path, advice: str = "the file is broken: copy or make it again"
) -> None:
    """Raise CheckpointError that names the floating-point tensors with NaN or infinity. `where`: what holds them."""
    broken = [key for key, t in tensors.items() if t.dtype in FLOATS and not bool(t.isfinite().all())]
    if broken:
        raise CheckpointError(f"expected finite weights in {where}, found NaN or infinity in {few(broken)}; {advice}")


def load_strictly(module: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Load a state dict. CheckpointError names the keys that are missing, unexpected, mis-shaped or not finite."""
    check_state(tensors, module.state_dict(), path)
    require_finite(tensors, path)
    module.load_state_dict(dict(tensors))


def build_strictly(build: Callable[[], Module], tensors: Mapping[str, Tensor], path: Path) -> Module:
    """The module that `build` makes, with the weights `tensors`. No memory is allocated before the two are compared.

    The module is built on the device meta, compared with the tensors, and then holds copies of them. Its numbers are
    float64 where the file has float64, else float32. Raises CheckpointError where they do not fit or `build` fails.
    """
    try:
        with torch.device("meta"):
            module = build()
    except Exception as error:  # sizes that no number holds, among others
        raise CheckpointError(
            f"{path} describes a network that cannot be built: {str(error).splitlines()[:1]}"
        ) from error
    check_state(tensors, module.state_dict(), path)
    require_finite(tensors, path)
    wide = torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors.values()) else torch.float32
    # Copies: views of a file lie at any address, and sums round differently where a vector register does not fit.
    kinds = {name: wide if tensor.is_floating_point() else tensor.dtype for name, tensor in tensors.items()}
    given = {name: tensor.to(kinds[name], copy=True) for name, tensor in tensors.items()}
    module.load_state_dict(given, assign=True)
    return module


def fingerprint(module: nn.Module) -> str:
    """The identity of a module's weights: SHA-256 over the sorted (name, shape, dtype, bytes) of its state dict.

    Floating-point tensors are hashed as float32, so that a network run in float64 has the fingerprint of its file.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        plain = tensor.detach().cpu().contiguous()
        plain = plain.float() if plain.is_floating_point() else plain
        digest.update(f"{name} {tuple(plain.shape)} {plain.dtype} ".encode())
        digest.update(plain.numpy().tobytes())
    return digest.hexdigest()


def count_parameters(module: nn.Module) -> int:
    """Number of trainable scalars (frozen ones included)."""
    return sum(parameter.numel() for parameter in module.parameters())
