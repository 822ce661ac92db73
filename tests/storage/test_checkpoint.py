"""Weights on disk: what is written comes back, what is damaged or foreign is refused with a stated error."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from toys import LinearGaussian, ToyConv
from workshop import Workshop

from ebm_prior.errors import BackboneMismatchError, CheckpointError, OutputError, UnknownBackboneError
from ebm_prior.model.energy import EnergyConfig, JointEnergy
from ebm_prior.model.prior import EBMPrior
from ebm_prior.model.samplers import SamplerConfig
from ebm_prior.storage.checkpoint import (
    BACKBONE_KEY,
    PRIOR_KEY,
    backbone_record,
    load_backbone,
    load_prior,
    prior_record,
    save_backbone,
    save_prior,
)
from ebm_prior.storage.weights import fingerprint

SMALL = EnergyConfig(channels=4, hidden=8, joint=8)


def some_prior(workshop: Workshop, seed: int = 0) -> EBMPrior:
    backbone = load_backbone(None, workshop.backbone)
    energy = JointEnergy(backbone.groups, SMALL)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in energy.state_dict().values():
            tensor.copy_(1 + 0.1 * torch.randn(tensor.shape, generator=generator))
    sampler = SamplerConfig(proposals=3, kernel="langevin", steps=2, step_size=0.01)
    rest: dict[str, Any] = {"sampler": sampler, "record": {"a": [1]}}
    return EBMPrior(backbone, energy, tau=0.7, ceiling=2.5, regime="refiner", target="published", **rest)


@pytest.fixture
def prior_file(workshop: Workshop, tmp_path: Path) -> Path:
    path = tmp_path / "prior.safetensors"
    save_prior(some_prior(workshop), path, checkpoint=str(workshop.backbone))
    return path


def rewrite(path: Path, key: str, change: Any) -> None:
    """Pass the record and the tensors of a file through `change(record, tensors)`, as another program might."""
    with safe_open(path, framework="pt") as file:
        record = json.loads(file.metadata()[key])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    record.pop("sha256", None)
    change(record, tensors)
    save_file(tensors, path, metadata={key: json.dumps(record, sort_keys=True)})


def test_a_prior_comes_back(workshop: Workshop, prior_file: Path) -> None:
    prior, again = some_prior(workshop), load_prior(prior_file)
    for name in ("tau", "ceiling", "regime", "target", "sampler", "record"):
        assert getattr(again, name) == getattr(prior, name)
    assert again.energy.config == SMALL
    first, second = (p.sample(5, seed=3) for p in (prior, again))
    assert torch.equal(first.images, second.images)
    assert not any(p.requires_grad for p in [*again.energy.parameters(), *again.backbone.parameters()])
    assert fingerprint(again.backbone) == prior_record(prior_file)["backbone"]["fingerprint"]


def test_files_of_before_there_were_bounds_and_ceilings_have_none(prior_file: Path) -> None:
    rewrite(prior_file, PRIOR_KEY, lambda record, _: (record.pop("ceiling"), record["energy"].pop("bound")))
    prior = load_prior(prior_file)
    assert prior.ceiling == math.inf
    assert prior.energy.config.bound == 0


def test_a_prior_without_a_ceiling_comes_back(workshop: Workshop, tmp_path: Path) -> None:
    prior = some_prior(workshop)
    prior.ceiling = math.inf
    save_prior(prior, tmp_path / "prior.safetensors", checkpoint=str(workshop.backbone))
    assert load_prior(tmp_path / "prior.safetensors").ceiling == math.inf


def test_equal_priors_give_equal_bytes(workshop: Workshop, tmp_path: Path) -> None:
    a, b, c = (tmp_path / f"{name}.safetensors" for name in "abc")
    for path, seed in ((a, 0), (b, 0), (c, 1)):
        save_prior(some_prior(workshop, seed), path, checkpoint="x")
    assert a.read_bytes() == b.read_bytes() != c.read_bytes()


def test_a_truncated_prior_is_refused(prior_file: Path) -> None:
    data = prior_file.read_bytes()
    for kept in (0, 1, 7, 8, 9, 200, len(data) // 2, len(data) - 1):
        prior_file.write_bytes(data[:kept])
        with pytest.raises(CheckpointError, match=r"prior\.safetensors is damaged"):
            load_prior(prior_file)


def test_no_flipped_bit_changes_a_prior_unnoticed(workshop: Workshop, prior_file: Path) -> None:
    data, true = prior_file.read_bytes(), prior_record(prior_file)
    weights = {name: t.clone() for name, t in some_prior(workshop).energy.state_dict().items()}
    backbone = load_backbone(None, workshop.backbone)
    header = int.from_bytes(data[:8], "little")
    places = [*range(0, 8 + header, 11), *range(8 + header, len(data), len(data) // 40), len(data) - 1]
    refused = 0
    for place in places:
        for bit in (0, 6):
            damaged = bytearray(data)
            damaged[place] ^= 1 << bit
            prior_file.write_bytes(bytes(damaged))
            try:
                again = load_prior(prior_file, backbone)
            except (CheckpointError, BackboneMismatchError):
                refused += 1
            else:  # the flip hit the checksum's own name
                assert {k: v for k, v in prior_record(prior_file).items() if k in true} == true
                assert all(torch.equal(t, weights[name]) for name, t in again.energy.state_dict().items())
    assert refused >= 2 * len(places) - 2


def test_a_flipped_bit_in_a_backbone_is_noticed(workshop: Workshop, tmp_path: Path) -> None:
    data = bytearray(workshop.backbone.read_bytes())
    data[-100] ^= 1
    path = tmp_path / "b.safetensors"
    path.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match="damaged"):
        load_backbone(None, path)


def test_files_of_another_kind(workshop: Workshop, prior_file: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="but not an ebm-prior file"):
        load_prior(workshop.backbone)
    with pytest.raises(CheckpointError, match="but not a backbone"):
        load_backbone(None, prior_file)
    with pytest.raises(CheckpointError, match=r"expected an ebm-prior file.*found nothing there"):
        load_prior(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="found a folder there"):
        load_prior(tmp_path / "empty")
    plain = tmp_path / "plain.safetensors"
    save_file({"a": torch.zeros(1)}, plain)
    with pytest.raises(CheckpointError, match="no key 'ebm_prior'"):
        load_prior(plain)


def test_a_newer_format_says_update(prior_file: Path) -> None:
    rewrite(prior_file, PRIOR_KEY, lambda record, _: record.update(format=2, library="9.0"))
    for read in (prior_record, load_prior):
        with pytest.raises(CheckpointError, match=r"format 2.*ebm-prior 9\.0.*update"):
            read(prior_file)


def test_a_backbone_of_a_newer_format_says_update(workshop: Workshop, tmp_path: Path) -> None:
    path = tmp_path / "b.safetensors"
    path.write_bytes(workshop.backbone.read_bytes())
    rewrite(path, BACKBONE_KEY, lambda record, _: record.update(format=2, library="9.0"))
    with pytest.raises(CheckpointError, match="update"):
        load_backbone(None, path)


def test_a_record_without_a_part_is_refused(prior_file: Path) -> None:
    whole = prior_file.read_bytes()
    parts = ["backbone", "energy", "tau", "regime", "target", "sampler", "record"]
    parts += [f"backbone.{key}" for key in ("adapter", "checkpoint", "fingerprint", "groups", "parameters")]
    for part in parts:
        prior_file.write_bytes(whole)
        *above, key = part.split(".")
        rewrite(prior_file, PRIOR_KEY, lambda record, _, a=above, k=key: (record[a[0]] if a else record).pop(k))
        for read in (prior_record, load_prior):
            with pytest.raises(CheckpointError, match=f"expected the entries {part} too"):
                read(prior_file)


@pytest.mark.parametrize(
    "change",
    [
        lambda record, _: record.update(tau="much"),
        lambda record, _: record.update(tau=float("nan")),
        lambda record, _: record.update(ceiling="high"),
        lambda record, _: record.update(ceiling=float("nan")),
        lambda record, _: record.update(regime="perfect"),
        lambda record, _: record["energy"].update(bound=-1.0),
        lambda record, _: record.update(target="other"),
        lambda record, _: record["energy"].update(channels="4"),
        lambda record, _: record["energy"].update(channels=-4),
        lambda record, _: record["sampler"].update(kernel="magic"),
        lambda record, _: record["sampler"].update(unknown=1),
        lambda record, _: record.update(backbone=[]),
    ],
)
def test_nonsense_in_the_record_is_refused(prior_file: Path, change: Any) -> None:
    rewrite(prior_file, PRIOR_KEY, change)
    with pytest.raises(CheckpointError, match=r"prior\.safetensors"):
        load_prior(prior_file)


def test_heads_with_nan_missing_or_misshapen_are_named(prior_file: Path) -> None:
    data = prior_file.read_bytes()
    name = "joint.1.weight"
    for change, message in (
        (lambda tensors: tensors[name].fill_(float("nan")), f"NaN.*{name}"),
        (lambda tensors: tensors.pop(name), f"missing: {name}"),
        (lambda tensors: tensors.update({name: torch.zeros(3)}), rf"{name} expected \(8, 24\), found \(3,\)"),
        (lambda tensors: tensors.update(extra=torch.zeros(3)), "unexpected: extra"),
    ):
        prior_file.write_bytes(data)
        rewrite(prior_file, PRIOR_KEY, lambda _, tensors, change=change: change(tensors))
        with pytest.raises(CheckpointError, match=message):
            load_prior(prior_file)


def test_another_backbone_is_refused_unless_forced(workshop: Workshop, prior_file: Path) -> None:
    other = ToyConv(seed=1).eval().requires_grad_(False)
    with pytest.raises(BackboneMismatchError, match="--force"):
        load_prior(prior_file, other)
    assert load_prior(prior_file, other, force=True).backbone is other
    for force in (False, True):  # other groups cannot be forced
        with pytest.raises(BackboneMismatchError, match="latent groups"):
            load_prior(prior_file, LinearGaussian(), force=force)


def test_a_backbone_that_moved_is_asked_for(workshop: Workshop, tmp_path: Path) -> None:
    moved, path = tmp_path / "elsewhere.safetensors", tmp_path / "prior.safetensors"
    save_prior(some_prior(workshop), path, checkpoint=str(tmp_path / "gone.safetensors"))
    moved.write_bytes(workshop.backbone.read_bytes())
    with pytest.raises(CheckpointError, match=r"gone\.safetensors, where there is nothing.*--ckpt"):
        load_prior(path)
    assert isinstance(load_prior(path, checkpoint=moved).backbone, ToyConv)


# Backbones.


def test_a_backbone_comes_back_in_its_own_form(workshop: Workshop, tmp_path: Path) -> None:
    backbone, path = ToyConv(width=6, seed=3), tmp_path / "b.safetensors"
    save_backbone(backbone, path, record={"data": {"name": "x"}})
    for name in ("toy", None):
        again = load_backbone(name, path)
        assert type(again) is ToyConv
        assert again.architecture == backbone.architecture
        assert fingerprint(again) == fingerprint(backbone)
        assert not again.training
        assert not any(p.requires_grad for p in again.parameters())
    assert backbone_record(path)["adapter"] == "toy"
    assert backbone_record(path)["record"] == {"data": {"name": "x"}}
    assert load_backbone(None, path, dtype=torch.float64).dense.weight.dtype == torch.float64


def test_half_precision_halves_the_file_and_loads_as_float32(workshop: Workshop, tmp_path: Path) -> None:
    backbone = ToyConv(width=32)
    whole, half = tmp_path / "whole.safetensors", tmp_path / "half.safetensors"
    save_backbone(backbone, whole)
    save_backbone(backbone, half, dtype=torch.float16)
    assert half.stat().st_size < 0.6 * whole.stat().st_size
    again = load_backbone(None, half)
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    for mine, rounded in zip(backbone.parameters(), again.parameters(), strict=True):
        assert torch.equal(mine.half().float(), rounded)


def test_float64_weights_come_back_unrounded(workshop: Workshop, tmp_path: Path) -> None:
    file, prior_file = tmp_path / "b.safetensors", tmp_path / "p.safetensors"
    backbone = ToyConv().double().eval().requires_grad_(False)
    energy = JointEnergy(backbone.groups, SMALL).double()
    with torch.no_grad():
        for number, tensor in enumerate([*backbone.parameters(), *energy.parameters()]):
            tensor.copy_(1 / (3 + number + torch.arange(tensor.numel()).reshape(tensor.shape)).double())
    save_backbone(backbone, file)
    save_prior(EBMPrior(backbone, energy), prior_file, checkpoint=str(file))
    again = load_prior(prior_file, dtype=torch.float64)
    for module, mine in ((again.backbone, backbone), (again.energy, energy)):
        for (name, tensor), expected in zip(module.state_dict().items(), mine.state_dict().values(), strict=True):
            assert torch.equal(tensor, expected), name
    single = load_prior(prior_file)
    assert {p.dtype for p in [*single.backbone.parameters(), *single.energy.parameters()]} == {torch.float32}


def test_shared_weights_can_be_saved(workshop: Workshop, tmp_path: Path) -> None:
    backbone = ToyConv()
    backbone.conv_posterior.bias = backbone.conv_prior.bias
    save_backbone(backbone, tmp_path / "b.safetensors")
    assert fingerprint(load_backbone(None, tmp_path / "b.safetensors")) == fingerprint(backbone)


def test_the_fingerprint_names_the_weights_not_their_precision() -> None:
    backbone = ToyConv()
    before = fingerprint(backbone)
    assert fingerprint(ToyConv()) == before
    assert fingerprint(backbone.double()) == before
    with torch.no_grad():
        next(backbone.parameters()).view(-1)[0] += 1e-6
    assert fingerprint(backbone) != before


def test_errors_of_loading_a_backbone(workshop: Workshop, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no backbone at .*absent"):
        load_backbone("toy", tmp_path / "absent")
    with pytest.raises(CheckpointError, match="use --backbone toy"):
        load_backbone("linear", workshop.backbone)
    foreign = tmp_path / "weights.pt"
    torch.save({}, foreign)
    with pytest.raises(CheckpointError, match="--backbone NAME"):
        load_backbone(None, foreign)
    with pytest.raises(CheckpointError, match="reads no foreign checkpoint format"):
        load_backbone("toy", foreign)
    with pytest.raises(UnknownBackboneError, match=r"'nonesuch'.*toy"):
        load_backbone("nonesuch", foreign)
    with pytest.raises(UnknownBackboneError, match=r"cannot be imported.*toys_nowhere"):
        load_backbone("broken", foreign)


@pytest.mark.parametrize(
    "architecture", [{"depth": 3}, {"width": "wide"}, {"width": -1}, {"width": 16}, {"width": 1 << 62}, [8], None]
)
def test_an_architecture_that_does_not_fit_is_refused(workshop: Workshop, tmp_path: Path, architecture: Any) -> None:
    path = tmp_path / "b.safetensors"
    path.write_bytes(workshop.backbone.read_bytes())
    rewrite(path, BACKBONE_KEY, lambda record, _: record.update(architecture=architecture))
    with pytest.raises(CheckpointError, match=r"b\.safetensors"):
        load_backbone(None, path)


def test_a_backbone_with_nan_is_refused(workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "b.safetensors"
    path.write_bytes(workshop.backbone.read_bytes())
    rewrite(path, BACKBONE_KEY, lambda _, tensors: tensors["head.1.weight"][0].fill_(float("inf")))
    with pytest.raises(CheckpointError, match=r"NaN or infinity in head\.1\.weight"):
        load_backbone(None, path)
    broken = ToyConv()
    torch.nn.init.constant_(broken.dense.weight, float("nan"))
    monkeypatch.setattr(ToyConv, "load_official", lambda path: broken)
    with pytest.raises(CheckpointError, match=r"NaN or infinity in dense\.weight"):
        load_backbone("toy", tmp_path)


@pytest.mark.parametrize("dtype", [torch.float16, None])
def test_weights_that_would_not_load_are_not_written(tmp_path: Path, dtype: torch.dtype | None) -> None:
    backbone, path = ToyConv(), tmp_path / "b.safetensors"
    torch.nn.init.constant_(backbone.dense.weight, 1e5 if dtype else float("nan"))  # float16 ends at 65,504
    with pytest.raises(CheckpointError, match=r"infinity in dense\.weight; nothing was written: use float32"):
        save_backbone(backbone, path, dtype=dtype)
    assert not path.exists()


def test_names_too_long_for_the_system_are_places_where_nothing_is(workshop: Workshop, prior_file: Path) -> None:
    long = "x" * 300
    for suffix in ("", ".safetensors"):
        with pytest.raises(CheckpointError, match="no backbone at x"):
            load_backbone("toy", long + suffix)
    with pytest.raises(CheckpointError, match="found nothing there"):
        load_prior(long)
    with pytest.raises(CheckpointError, match="where there is nothing"):
        load_prior(prior_file, checkpoint=long)
    assert "no backbone at x" in workshop.error("fit", "--ckpt", long, "--data", workshop.images)


# Writing.


def test_an_interrupted_write_leaves_the_earlier_file(
    workshop: Workshop, prior_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = prior_file.read_bytes()

    class Killed(BaseException):
        pass

    def killed(*_: object) -> None:
        raise Killed

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(Killed):
        save_prior(some_prior(workshop, seed=1), prior_file, checkpoint="x")
    assert prior_file.read_bytes() == before
    assert list(prior_file.parent.iterdir()) == [prior_file]


def test_a_full_disk_leaves_the_earlier_file(
    workshop: Workshop, prior_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = prior_file.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match=r"cannot write .*prior\.safetensors: No space left on device"):
        save_prior(some_prior(workshop, seed=1), prior_file, checkpoint="x")
    assert prior_file.read_bytes() == before
    assert list(prior_file.parent.iterdir()) == [prior_file]


def test_a_place_that_cannot_be_written(workshop: Workshop, prior_file: Path) -> None:
    for path in (prior_file / "under" / "a_file", prior_file.parent):
        with pytest.raises(OutputError, match="cannot write"):
            save_prior(some_prior(workshop), path, checkpoint="x")
