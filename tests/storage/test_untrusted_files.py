"""Files from strangers: nothing in them is imported or run."""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from toys import ToyConv

from ebm_prior.errors import CheckpointError, UnknownBackboneError
from ebm_prior.storage.checkpoint import load_backbone, save_backbone


@pytest.mark.usefixtures("workshop")
def test_what_a_file_names_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lurking.py").write_text("from toys import ToyConv\n")
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "b.safetensors"
    save_backbone(type("ToyConv", (ToyConv,), {"__module__": "lurking"})(), path)
    for name in (None, "toy"):
        with pytest.raises(UnknownBackboneError, match="lurking"):
            load_backbone(name, path)
    assert "lurking" not in sys.modules


class Attack:
    """Unpickling this makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


LAYOUTS = {
    "nvae": ("nvae", "evil.pt", [""]),
    "hvae": ("hvae", "run", ["model_class_name.pt", "model_kwargs.pt", "model_state_dict.pt"]),
    "biva": ("biva", "run", ["hyperparameters.p", "config.json", "model.pth"]),
    "own form": (None, "evil.safetensors", [""]),
    "unknown": (None, "evil.pt", [""]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("write", [lambda attack, file: file.write_bytes(pickle.dumps(attack)), torch.save])
def test_no_checkpoint_runs_code(tmp_path: Path, layout: str, write: Callable[[Attack, Path], object]) -> None:
    adapter, name, parts = LAYOUTS[layout]
    marker, path = tmp_path / "marker", tmp_path / name
    for part in parts:
        file = path / part if part else path
        file.parent.mkdir(exist_ok=True)
        write(Attack(marker), file)
    with pytest.raises(CheckpointError, match="could run code|found a damaged file" if adapter else None):
        load_backbone(adapter, path)
    assert not marker.exists()
    pickle.loads(pickle.dumps(Attack(marker)))
    assert marker.exists()  # the attack would have worked
