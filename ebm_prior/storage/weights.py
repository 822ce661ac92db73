"""Weights on disk: safetensors with one metadata key of sorted JSON; checks and fingerprints of weights.

One key, because several are written in random order and equal runs would give unequal bytes. Nothing here unpickles.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ebm_prior.errors import CheckpointError
from ebm_prior.storage.atomic import write_atomically


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], key: str, record: Mapping[str, Any]) -> None:
    """Write tensors and the record as one safetensors file, atomically. Equal content gives equal bytes."""
    # Cloned, for safetensors refuses tensors that share memory, as tied weights do.
    plain = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in sorted(tensors.items())
    }
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
            record = json.loads((file.metadata() or {}).get(key, "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is damaged or not a safetensors file ({error}); expected {what}. Copy or make it again"
        ) from error
    if not isinstance(record, dict):
        raise CheckpointError(f"{path} is a safetensors file, but not {what}: its metadata has no key {key!r}")
    written = record.pop("sha256", None)
    if written is not None and written != _digest(tensors, record):
        raise CheckpointError(f"{path} is damaged: its content is not what its checksum says. Copy or make it again")
    return tensors, record


def _digest(tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> str:
    """SHA-256 over the record and the tensors: safetensors itself notices no flipped bit."""
    normal = json.loads(json.dumps(record))
    digest = hashlib.sha256(json.dumps(normal, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def listed(names: Sequence[str], *, separator: str = ", ") -> str:
    """At most ten names, and how many more there are: a network can have thousands."""
    more = [f"and {len(names) - 10} more"] if len(names) > 10 else []
    return separator.join([*names[:10], *more])


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
    problems = [f"missing: {key} {tuple(expected[key].shape)}" for key in expected if key not in found]
    problems += [f"unexpected: {key} {tuple(found[key].shape)}" for key in found if key not in expected]
    for key in [key for key in expected if key in found]:
        wanted, got = expected[key], found[key]
        if wanted.shape != got.shape:
            problems.append(f"mis-shaped: {key} expected {tuple(wanted.shape)}, found {tuple(got.shape)}")
        elif wanted.is_floating_point() != got.is_floating_point():
            problems.append(f"of another type: {key} expected {wanted.dtype}, found {got.dtype}")
    if problems:
        raise CheckpointError(
            f"the weights in {path} do not fit the {architecture}: {listed(problems, separator='; ')}"
        )


def require_finite(
    tensors: Mapping[str, Tensor], where: str | Path, advice: str = "the file is broken: copy or make it again"
) -> None:
    """Raise CheckpointError that names the floating-point tensors with NaN or infinity. `where`: what holds them."""
    broken = [key for key, t in tensors.items() if t.is_floating_point() and not bool(t.isfinite().all())]
    if broken:
        raise CheckpointError(
            f"expected finite weights in {where}, found NaN or infinity in {', '.join(broken[:5])}; {advice}"
        )


def load_strictly(module: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Load a state dict with every missing, unexpected, mis-shaped and not finite key named: CheckpointError."""
    check_state(tensors, module.state_dict(), path)
    require_finite(tensors, path)
    module.load_state_dict(dict(tensors))


def fingerprint(module: nn.Module) -> str:
    """SHA-256 over the sorted (name, shape, dtype, bytes) of the state dict: which weights these are.

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
