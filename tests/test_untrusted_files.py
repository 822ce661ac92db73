"""Files from strangers: nothing in them is imported or run."""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from toys import ToyConv

from ebm_prior.checkpoint import (
    load_backbone,
    save_backbone,
)
from ebm_prior.errors import CheckpointError, UnknownBackboneError


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


@pytest.mark.parametrize("name", ["evil.pt", "evil.safetensors", "folder"])
@pytest.mark.parametrize("adapter", ["toy", "hvae", None])
def test_no_checkpoint_runs_code(tmp_path: Path, name: str, adapter: str | None) -> None:
    marker, path = tmp_path / "marker", tmp_path / name
    files = [path]
    if name == "folder":
        path.mkdir()
        files = [path / f"model_{part}.pt" for part in ("class_name", "kwargs", "state_dict")]
    for plain in (True, False):
        for file in files:
            if plain:
                file.write_bytes(pickle.dumps(Attack(marker)))
            else:
                torch.save(Attack(marker), file)
        with pytest.raises(CheckpointError):
            load_backbone(adapter, path)
        assert not marker.exists()
    pickle.loads(pickle.dumps(Attack(marker)))
    assert marker.exists()  # the attack would have worked
