"""Adapters of other packages: known by the name or the class that is registered."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
from toys import ToyConv
from workshop import Workshop

from ebm_prior.errors import CheckpointError, UnknownBackboneError
from ebm_prior.model.energy import EnergyConfig, JointEnergy
from ebm_prior.model.prior import EBMPrior
from ebm_prior.storage.checkpoint import backbone_record, load_backbone, load_prior, save_backbone, save_prior

SMALL = EnergyConfig(channels=4, hidden=8, joint=8)


def package(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module `name.model` with a class Net, which the package exports as Net and as Renamed; Net is returned."""
    (folder / name).mkdir(parents=True)
    (folder / name / "model.py").write_text("from toys import ToyConv\n\nclass Net(ToyConv):\n    pass\n")
    (folder / name / "__init__.py").write_text(f"from {name}.model import Net\n\nRenamed = Net\n")
    monkeypatch.syspath_prepend(folder)
    return importlib.import_module(name).Net


def register(folder: Path, point: str, monkeypatch: pytest.MonkeyPatch) -> None:
    info = folder / "third-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: third\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[ebm_prior.backbones]\n{point}\n")
    monkeypatch.syspath_prepend(folder)


@pytest.mark.parametrize("exported", ["model:Net", "Net", "Renamed"])
def test_what_was_saved_before_its_class_was_registered_is_found(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exported: str
) -> None:
    name = f"third_{exported.replace(':', '_').lower()}"
    kind = package(tmp_path / "code", name, monkeypatch)
    file, prior_file = tmp_path / "b.safetensors", tmp_path / "p.safetensors"
    backbone = kind().eval().requires_grad_(False)
    save_backbone(backbone, file)
    save_prior(EBMPrior(backbone, JointEnergy(backbone.groups, SMALL)), prior_file, checkpoint=str(file))
    with pytest.raises(UnknownBackboneError, match=f"'{name}.model:Net'.*register your class"):
        load_backbone(None, file)

    register(tmp_path / "info", f"mine = {name}{'.' if ':' in exported else ':'}{exported}", monkeypatch)
    for adapter in (None, "mine"):
        assert type(load_backbone(adapter, file)) is kind
    assert type(load_prior(prior_file).backbone) is kind
    with pytest.raises(CheckpointError, match="not 'toy'"):
        load_backbone("toy", file)
    save_backbone(backbone, file)
    assert type(load_backbone("mine", file)) is kind
    if exported != "Renamed":  # by a name that is not the class's own it is found, but not named
        assert backbone_record(file)["adapter"] == "mine"


def test_only_the_very_class_that_is_registered_has_the_name(workshop: Workshop, tmp_path: Path) -> None:
    path, namesake = tmp_path / "b.safetensors", type("ToyConv", (ToyConv,), {"__module__": "elsewhere"})
    save_backbone(namesake(), path)
    assert backbone_record(path)["adapter"] == "elsewhere:ToyConv"
