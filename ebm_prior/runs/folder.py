"""A run directory: resolved configuration, metrics.jsonl, pictures, resume state. Kill it at any moment and resume.

metrics.jsonl has the evaluations. They depend only on the run, so equal runs write equal lines even if they are killed
and resumed. progress.jsonl has numbers of single steps at intervals of time, for users who watch. These differ between
equal runs, so they are in another file.
"""

from __future__ import annotations

import json
import logging
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import ebm_prior
from ebm_prior.data.images import ImageSource
from ebm_prior.errors import CheckpointError, ConfigurationError, OutputError, few, shown
from ebm_prior.model.backbone import Backbone
from ebm_prior.plain import read_json
from ebm_prior.storage.atomic import append_line, without_nan, write_atomically
from ebm_prior.storage.lock import Hold
from ebm_prior.storage.records import InvalidError, fields
from ebm_prior.storage.sealed import opened_record, read_lines, read_state, sealed_line, sealed_record, state_bytes

RUN_RECORD = fields({"config": fields({}), "inputs": fields({})}, {"versions": fields({})})
REMARKS = logging.getLogger("ebm_prior")

METRICS, PROGRESS = "metrics.jsonl", "progress.jsonl"
BOARD = "tensorboard"  # the folder of a run that TensorBoard reads


class Run:
    """One run directory. `config` and `inputs` (plain values) define the run; a resume with other ones is refused.

    The folder is locked as long as this object exists. Raises OutputError where another process has locked it.
    """

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
        if directory.exists() and not directory.is_dir():
            raise OutputError(f"{directory} is a file; a run needs a folder: choose another --out")
        self._hold = Hold(directory, advice="go on with --resume")
        try:
            self._begin(normal, resume=resume, overwrite=overwrite)
            for name in ("config.json", METRICS, PROGRESS, "state.pt"):
                for rest in directory.glob(f".{name}.*"):  # of a write that a kill cut short (see write_atomically)
                    rest.unlink()
        except BaseException as error:
            self._hold.leave()
            if isinstance(error, OSError):  # most often a folder of somebody else's
                reason = error.strerror or error
                raise OutputError(f"cannot use {directory}: {reason}; choose another --out") from error
            raise

    def __getstate__(self) -> dict[str, Any]:
        """The state to pickle for the other processes of a run. They do not write, so the lock is left out."""
        return {"directory": self.directory}

    def _begin(self, normal: Mapping[str, Any], *, resume: bool, overwrite: bool) -> None:
        directory, record = self.directory, self.directory / "config.json"
        if record.exists() and resume:
            if self._check_same(record, normal):
                self._record(normal)
            return
        if directory.exists() and any(not path.name.startswith(".") for path in directory.iterdir()):
            if not _is_run(record):
                raise OutputError(f"{directory} is not empty and not a run of ebm-prior: choose another --out")
            if not overwrite:
                raise OutputError(
                    f"{directory} holds a run: pass --resume to go on, --overwrite to start anew, or another --out"
                )
            # Only files that would mix with those of the new run are removed. A result stays until a new one replaces
            # it.
            old = ("state.pt", METRICS, PROGRESS, "samples-*.png", f"{BOARD}/events.out.tfevents.*")
            for path in (path for name in old for path in directory.glob(name)):
                path.unlink(missing_ok=True)
        self._record(normal)

    def _record(self, normal: Mapping[str, Any]) -> None:
        versions = {"ebm_prior": ebm_prior.__version__, "torch": torch.__version__, "python": platform.python_version()}
        text = json.dumps(sealed_record({**normal, "versions": versions}), indent=2, sort_keys=True) + "\n"
        write_atomically(self.directory / "config.json", text.encode())

    def _check_same(self, record: Path, now: Mapping[str, Any]) -> bool:
        """Whether `now` has settings that the run's record lacks. Raises ConfigurationError where one has changed."""
        before = read_run_record(record)
        old, new = ({k: v for part in now for k, v in _flat(run[part]).items()} for run in (before, now))
        if old.get("images", 0) == new.get("images"):  # the same pixels; their name and place do not matter
            old, new = ({k: v for k, v in values.items() if k != "data"} for values in (old, new))
        later = _flat(now["config"]).keys() - old.keys()  # settings that the version did not have which began the run
        differing = [k for k in sorted({*old, *new} - later) if old.get(k) != new.get(k)]
        changed = [f"{k}: {shown(old.get(k))} before, {shown(new.get(k))} now" for k in differing]
        if changed:
            raise ConfigurationError(
                f"cannot resume {self.directory}, which was begun with other settings: {few(changed, separator='; ')}. "
                "Give the same again (threads: by OMP_NUM_THREADS), or another --out"
            )
        return bool(later)

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl; it must have the key "iteration"."""
        append_line(self.directory / METRICS, sealed_line(without_nan(metrics)))

    def note(self, shown: Mapping[str, Any]) -> None:
        """Append one line to progress.jsonl; it must have the key "iteration"."""
        append_line(self.directory / PROGRESS, sealed_line(without_nan(shown)))

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; a last line that a kill cut short is left out."""
        return read_lines(self.directory / METRICS)

    def save_state(self, state: Mapping[str, Any]) -> None:
        """Write the resume state (tensors and plain values, with "iteration"), atomically."""
        self._hold.require()
        write_atomically(self.directory / "state.pt", state_bytes(state))

    def load_state(self) -> dict[str, Any] | None:
        """The resume state, or None at the start. Metrics written after it are dropped: they will come again."""
        path = self.directory / "state.pt"
        state, sealed = read_state(path) if path.exists() else (None, True)
        if not sealed:
            REMARKS.warning("%s has no checksum of its own (version 0.1.0 wrote none): its parts' CRC-32 hold", path)
        reached = state["iteration"] if state else 0
        for lines in (self.directory / METRICS, self.directory / PROGRESS):
            if lines.exists() or lines.name == METRICS:
                kept = [line for line in read_lines(lines) if line["iteration"] <= reached]
                write_atomically(lines, "".join(sealed_line(line) + "\n" for line in kept).encode())
        return state


def read_run_record(path: Path) -> dict[str, Any]:
    """A run's config.json: settings, inputs and versions. Raises CheckpointError."""
    advice = "choose another --out"
    try:
        record: dict[str, Any] = RUN_RECORD(read_json(path, "a run's record", advice=advice), "")
    except InvalidError as error:
        raise CheckpointError(f"{path} cannot be read as a run's record ({error}); {advice}") from error
    return opened_record(record, path, advice)


def _is_run(record: Path) -> bool:
    """Whether this config.json is ours: other programs use the name, too."""
    try:
        return {"config", "inputs", "versions"} <= set(read_json(record, "a run's record"))
    except (CheckpointError, TypeError):
        return False


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"energy": {"channels": 4}} -> {"energy.channels": 4}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def run_inputs(backbone: Backbone, images: ImageSource) -> dict[str, Any]:
    """The inputs of a run other than its settings. A resume with other inputs would give other results."""
    return {
        "precision": backbone.precision,
        "data": images.name,
        "images": images.fingerprint(),
        "device": next(backbone.parameters()).device.type,
        "threads": torch.get_num_threads(),  # the order of sums in a matrix product depends on it
    }
