"""A run directory: resolved configuration, metrics.jsonl, pictures, resume state. Kill it at any moment and resume.

Randomness of iteration t comes from (seed, t) alone, so the state holds no generators, and a resumed run repeats the
very numbers of an uninterrupted one.
"""

from __future__ import annotations

import io
import json
import pickle
import platform
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import ebm_prior
from ebm_prior.errors import CheckpointError, ConfigurationError, OutputError
from ebm_prior.files import append_line, write_atomically


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
        record = directory / "config.json"
        normal = json.loads(json.dumps({"config": config, "inputs": inputs}, sort_keys=True))
        if record.exists() and resume:
            self._check_same(record, normal)
            return
        if directory.exists() and any(directory.iterdir()):
            if not overwrite:
                raise OutputError(
                    f"{directory} is not empty: pass --resume to go on, --overwrite to start anew, or another --out"
                )
            if not record.exists():
                raise OutputError(f"{directory} is not a run of ebm-prior (no config.json): it will not be overwritten")
            shutil.rmtree(directory)
        versions = {"ebm_prior": ebm_prior.__version__, "torch": torch.__version__, "python": platform.python_version()}
        text = json.dumps({**normal, "versions": versions}, indent=2, sort_keys=True) + "\n"
        write_atomically(record, text.encode())

    def _check_same(self, record: Path, now: Mapping[str, Any]) -> None:
        try:
            before = json.loads(record.read_text())
            pairs = [
                (key, before[part].get(key), now[part].get(key)) for part in now for key in {*before[part], *now[part]}
            ]
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{record} cannot be read ({error}); start anew with --overwrite") from error
        changed = sorted(f"{key}: {old!r} before, {new!r} now" for key, old, new in pairs if old != new)
        if changed:
            raise ConfigurationError(
                f"cannot resume {self.directory}, which was begun with others: {'; '.join(changed)}"
            )

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl; it must have the key "iteration"."""
        append_line(self.directory / "metrics.jsonl", json.dumps(metrics))

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; a last line that a kill cut short is left out."""
        path = self.directory / "metrics.jsonl"
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        return [json.loads(line) for line in lines]

    def save_state(self, state: Mapping[str, Any]) -> None:
        """Write the resume state (tensors and plain values, with "iteration"), atomically."""
        buffer = io.BytesIO()
        torch.save(dict(state), buffer)
        write_atomically(self.directory / "state.pt", buffer.getvalue())

    def load_state(self) -> dict[str, Any] | None:
        """The resume state, or None at the start. Metrics written after it are dropped: they will come again."""
        path = self.directory / "state.pt"
        if not path.exists():
            return None
        try:
            state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise CheckpointError(f"{path} is damaged ({error}); start anew with --overwrite") from error
        kept = [line for line in self.metrics() if line["iteration"] <= state["iteration"]]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        write_atomically(self.directory / "metrics.jsonl", text.encode())
        return state
