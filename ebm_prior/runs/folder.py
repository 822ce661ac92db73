"""A run directory: resolved configuration, metrics.jsonl, pictures, resume state. Kill it at any moment and resume."""

from __future__ import annotations

import io
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import ebm_prior
from ebm_prior.data.images import ImageSource
from ebm_prior.errors import CheckpointError, ConfigurationError, OutputError
from ebm_prior.model.backbone import Backbone
from ebm_prior.storage.atomic import append_line, without_nan, write_atomically


class Run:
    """One run directory. `config` and `inputs` (JSON-able) make the run; a resume with other ones is refused."""

    def __init__(
        self,
        directory: Path,
        config: Mapping[str, Any],
        inputs: Mapping[str, Any],
        *,
        resume: bool = False,
        overwrite: bool = False,
    ) -> None:
        self.directory = directory
        normal = json.loads(json.dumps({"config": config, "inputs": inputs}, sort_keys=True))
        try:
            self._begin(normal, resume=resume, overwrite=overwrite)
            for name in ("config.json", "metrics.jsonl", "state.pt"):
                for rest in directory.glob(f".{name}.*"):  # of a write that a kill cut short (see write_atomically)
                    rest.unlink()
        except OSError as error:  # most often a folder of somebody else's
            raise OutputError(f"cannot use {directory}: {error.strerror or error}; choose another --out") from error

    def _begin(self, normal: Mapping[str, Any], *, resume: bool, overwrite: bool) -> None:
        directory, record = self.directory, self.directory / "config.json"
        if record.exists() and resume:
            self._check_same(record, normal)
            return
        if directory.exists() and not directory.is_dir():
            raise OutputError(f"{directory} is a file; a run needs a folder: choose another --out")
        if directory.exists() and any(not path.name.startswith(".") for path in directory.iterdir()):
            if not _is_run(record):
                raise OutputError(f"{directory} is not empty and not a run of ebm-prior: choose another --out")
            if not overwrite:
                raise OutputError(
                    f"{directory} holds a run: pass --resume to go on, --overwrite to start anew, or another --out"
                )
            # Only what would mix with the new run goes. A result stands until the new one replaces it.
            for path in (directory / "state.pt", directory / "metrics.jsonl", *directory.glob("samples-*.png")):
                path.unlink(missing_ok=True)
        versions = {"ebm_prior": ebm_prior.__version__, "torch": torch.__version__, "python": platform.python_version()}
        text = json.dumps({**normal, "versions": versions}, indent=2, sort_keys=True) + "\n"
        write_atomically(record, text.encode())

    def _check_same(self, record: Path, now: Mapping[str, Any]) -> None:
        try:
            before = json.loads(record.read_text())
            old, new = ({k: v for part in now for k, v in _flat(run[part]).items()} for run in (before, now))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{record} cannot be read ({error}); choose another --out") from error
        if old.get("images", 0) == new.get("images"):  # the same pixels: what they are called, and where, is no matter
            old, new = ({k: v for k, v in values.items() if k != "data"} for values in (old, new))
        names = sorted({*old, *new})
        changed = [f"{k}: {old.get(k)!r} before, {new.get(k)!r} now" for k in names if old.get(k) != new.get(k)]
        if changed:
            raise ConfigurationError(
                f"cannot resume {self.directory}, which was begun with other settings: {'; '.join(changed)}. Give the "
                "same again (threads: by OMP_NUM_THREADS), or another --out"
            )

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl; it must have the key "iteration"."""
        append_line(self.directory / "metrics.jsonl", json.dumps(without_nan(metrics)))

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; a last line that a kill cut short is left out."""
        return read_metrics(self.directory / "metrics.jsonl")

    def save_state(self, state: Mapping[str, Any]) -> None:
        """Write the resume state (tensors and plain values, with "iteration"), atomically."""
        buffer = io.BytesIO()
        torch.save(dict(state), buffer)
        write_atomically(self.directory / "state.pt", buffer.getvalue())

    def load_state(self) -> dict[str, Any] | None:
        """The resume state, or None at the start. Metrics written after it are dropped: they will come again."""
        path = self.directory / "state.pt"
        state: dict[str, Any] | None = None
        if path.exists():
            try:
                state = dict(torch.load(path, weights_only=True, map_location="cpu"))
                if not isinstance(state["iteration"], int):
                    raise TypeError(f"iteration {state['iteration']!r}")
            except Exception as error:  # a damaged archive or pickle can raise nearly anything
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
                raise CheckpointError(f"{path} is damaged ({reason}); start anew with --overwrite") from error
        reached = state["iteration"] if state else 0
        kept = [line for line in self.metrics() if line["iteration"] <= reached]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        write_atomically(self.directory / "metrics.jsonl", text.encode())
        return state


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, none where there is no file; a last line that a kill cut short is left out.

    Raises CheckpointError for another line that is broken.
    """
    try:
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        return [dict(json.loads(line)) for line in lines]
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); remove the broken line and use --resume") from error


def _is_run(record: Path) -> bool:
    """Whether this config.json is ours: other programs use the name, too."""
    try:
        return {"config", "inputs", "versions"} <= set(json.loads(record.read_text()))
    except (OSError, ValueError, TypeError):
        return False


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"energy": {"channels": 4}} -> {"energy.channels": 4}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def run_inputs(backbone: Backbone, images: ImageSource) -> dict[str, Any]:
    """What makes a run beside its settings; a resume with another of these would give other bytes."""
    return {
        "precision": backbone.precision,
        "data": images.name,
        "images": images.fingerprint(),
        "device": next(backbone.parameters()).device.type,
        "threads": torch.get_num_threads(),  # the order of sums in a matrix product depends on it
    }
