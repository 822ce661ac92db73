"""Files from strangers: nothing in them is imported or run."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from exploits import Exploit
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


@pytest.mark.parametrize("file", ["evil.safetensors", "evil.pt"])
@pytest.mark.parametrize("write", [lambda attack, file: file.write_bytes(pickle.dumps(attack)), torch.save])
def test_no_checkpoint_of_unsaid_format_runs_code(
    tmp_path: Path, file: str, write: Callable[[Exploit, Path], object]
) -> None:
    attack = Exploit(tmp_path / "run")
    write(attack, tmp_path / file)
    with pytest.raises(CheckpointError):
        load_backbone(None, tmp_path / file)
    assert not (tmp_path / "run").exists()
    pickle.loads(pickle.dumps(attack))
    assert (tmp_path / "run").exists()  # the attack would have worked
