"""Energies of one's own: what a module must be, and that it goes wherever the built-in heads go."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_fits import STAGE, small
from torch import Tensor, nn
from workshop import Workshop

from ebm_prior import EBMPrior, EbmPriorError, fit, load_prior
from ebm_prior.data.images import ImageSource
from ebm_prior.model.backbone import Backbone
from ebm_prior.model.energy import EnergyConfig, zero_linear
from ebm_prior.model.own_energy import OwnEnergy, energy_of
from ebm_prior.storage.checkpoint import prior_record


class Flat(nn.Module):
    """All groups as one vector, through one hidden layer."""

    def __init__(self, groups: tuple[tuple[str, tuple[int, ...]], ...], width: int = 6) -> None:
        super().__init__()
        self.architecture = {"width": width}
        self.hidden = nn.Linear(sum(torch.Size(shape).numel() for _, shape in groups), width)
        self.last = zero_linear(width)

    def forward(self, inputs: list[Tensor]) -> Tensor:
        joined = torch.cat([z.flatten(1) for z in inputs], dim=1)
        value: Tensor = self.last(self.hidden(joined).tanh()).squeeze(1)
        return value


class Forgetful(Flat):
    """Whose architecture is not what it was built with."""

    def __init__(self, groups: tuple[tuple[str, tuple[int, ...]], ...], width: int = 6) -> None:
        super().__init__(groups, width)
        self.architecture = {}


@pytest.fixture
def registered(tmp_path: Path) -> Iterator[None]:
    module = tmp_path / "installed" / "own_energies_of_tests.py"
    module.parent.mkdir()
    module.write_text("")
    sys.modules["own_energies_of_tests"] = sys.modules[__name__]
    info = module.parent / "own-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: own\nVersion: 1.0\n")
    points = "".join(f"{kind.lower()} = own_energies_of_tests:{kind}\n" for kind in ("Flat", "Forgetful"))
    (info / "entry_points.txt").write_text(f"[ebm_prior.energies]\n{points}")
    sys.path.insert(0, str(module.parent))
    yield
    sys.path.remove(str(module.parent))
    del sys.modules["own_energies_of_tests"]


CONFIG = small(iterations=8)
FITS = {
    "one ratio": CONFIG,
    "stages": replace(CONFIG, ratios="staged", stage=STAGE),
    "maximum likelihood": replace(CONFIG, objective="mle"),
    "conditional": replace(CONFIG, energy=EnergyConfig(conditional=True)),
}


@pytest.mark.parametrize("kind", FITS)
def test_it_is_fitted_as_heads_are(backbone: Backbone, images: ImageSource, kind: str) -> None:
    groups = [(name, shape) for name, shape in backbone.groups]
    if kind == "conditional":
        groups[1:] = [(name, (2 * shape[0], *shape[1:])) for name, shape in groups[1:]]
    torch.manual_seed(0)
    own = Flat(tuple(groups))
    before = own.last.weight.clone()
    prior = fit(backbone, images, FITS[kind], energy=own)
    assert isinstance(prior.energy, OwnEnergy)
    assert torch.equal(own.last.weight, before)  # a copy was trained
    assert prior.energy.terms(prior.energy.inputs(*[backbone.sample(3)] * 2)).shape == (3, 1)
    assert torch.isfinite(prior.sample(3).images).all()


def test_it_is_a_function_of_standardised_latents_times_a_factor(backbone: Backbone) -> None:
    torch.manual_seed(0)
    own = Flat(backbone.groups)
    energy = energy_of(backbone.groups, EnergyConfig(), own)
    nn.init.ones_(energy.module.last.weight)
    z = backbone.sample(5)
    f = energy(z)
    energy.scale(0.5)
    energy.add(2.0)
    assert torch.allclose(energy(z), 0.5 * f + 2)
    energy.standardize(energy.moments(z))
    axes = [[0, *range(2, x.dim())] for x in z]
    seen = [
        (x - x.mean(each, keepdim=True)) / x.std(each, correction=0, keepdim=True)
        for x, each in zip(z, axes, strict=True)
    ]
    assert torch.allclose(energy(z), 0.5 * energy.module(seen) + 2, atol=1e-5)


def test_a_file_names_its_class(registered: None, backbone: Backbone, images: ImageSource, tmp_path: Path) -> None:
    prior = fit(backbone, images, CONFIG, energy=Flat(backbone.groups, width=5))
    prior.save(tmp_path / "own.safetensors")
    assert prior_record(tmp_path / "own.safetensors")["own_energy"] == {"name": "flat", "architecture": {"width": 5}}
    loaded = load_prior(tmp_path / "own.safetensors")
    z = backbone.sample(3)
    assert torch.equal(loaded.f(z), prior.f(z))
    fit(backbone, images, CONFIG).save(tmp_path / "heads.safetensors")
    assert "own_energy" not in prior_record(tmp_path / "heads.safetensors")


def test_a_file_whose_energy_is_not_installed(
    backbone: Backbone, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    prior = EBMPrior(backbone, energy_of(backbone.groups, EnergyConfig(), Flat(backbone.groups)))
    with pytest.raises(EbmPriorError, match=r"not registered.*under the entry-point group 'ebm_prior.energies'"):
        prior.save(tmp_path / "own.safetensors")
    assert not (tmp_path / "own.safetensors").exists()
    request.getfixturevalue("registered")
    prior.save(tmp_path / "own.safetensors")
    path = sys.path.pop(0)
    try:
        with pytest.raises(EbmPriorError, match="no energy is registered as 'flat'"):
            load_prior(tmp_path / "own.safetensors")
    finally:
        sys.path.insert(0, path)


def test_an_energy_that_no_file_could_bring_back_is_not_saved(
    registered: None, backbone: Backbone, tmp_path: Path
) -> None:
    prior = EBMPrior(backbone, energy_of(backbone.groups, EnergyConfig(), Forgetful(backbone.groups, width=4)))
    with pytest.raises(EbmPriorError, match=r"is not what Forgetful\(groups, \*\*\{\}\) builds"):
        prior.save(tmp_path / "own.safetensors")


def test_by_the_command_line(registered: None, workshop: Workshop, fit_words: list[object], tmp_path: Path) -> None:
    words = list(fit_words)
    for option in ("--energy-channels", "--energy-hidden", "--energy-joint"):
        assert "without heads: leave out" in workshop.run(*words, "--energy", "flat", code=2).stderr
        at = words.index(option)
        del words[at : at + 2]
    result = workshop.run(*words, "--energy", "flat", "--out", tmp_path / "run", "--json")
    assert json.loads(result.stdout)["parameters"]["heads"] == 6 * (4 + 2 + 48) + 6 + 6 + 1
    assert json.loads((tmp_path / "run" / "config.json").read_text())["inputs"]["energy"] == "flat"
    first = (tmp_path / "run" / "prior.safetensors").read_bytes()
    workshop.run("sample", tmp_path / "run", "-n", 4, "--out", tmp_path / "drawn.png")
    workshop.run("info", tmp_path / "run")
    workshop.run(*words, "--energy", "flat", "--out", tmp_path / "run", "--overwrite")
    assert (tmp_path / "run" / "prior.safetensors").read_bytes() == first
    assert "no energy is registered as 'flatt'" in workshop.error(*words, "--energy", "flatt", "--out", tmp_path / "no")


class Biased(Flat):
    def forward(self, inputs: list[Tensor]) -> Tensor:
        return super().forward(inputs) + 1


class Columns(Flat):
    def forward(self, inputs: list[Tensor]) -> Tensor:
        return super().forward(inputs)[:, None]


class Weightless(nn.Module):
    def forward(self, inputs: list[Tensor]) -> Tensor:
        return inputs[0].new_zeros(len(inputs[0]))


@pytest.mark.parametrize(
    ("energy", "said"),
    [
        (lambda groups: Biased(groups), r"Biased must return 0 before training.*\[1.0, 1.0, 1.0\]"),
        (
            lambda groups: Columns(groups),
            r"must return f of shape \(B,\), here \(3,\), found a float32 tensor",
        ),
        (lambda groups: Flat(groups[:2]), r"must take a list of one tensor per latent group.*it raised RuntimeError"),
        (lambda groups: Weightless(), "with weights to learn, found none in a Weightless"),
        (lambda groups: Flat, r"found the class Flat, Flat\(backbone.groups\) makes one"),
        (lambda groups: "flat", "expected a torch module, found the text 'flat'"),
        (lambda groups: energy_of(groups, EnergyConfig()), r"are made from the settings: FitConfig\(energy=…\)"),
    ],
    ids=["not 0", "columns", "too few inputs", "no weights", "a class", "a name", "heads"],
)
def test_what_is_no_energy_is_refused(backbone: Backbone, images: ImageSource, energy: object, said: str) -> None:
    with pytest.raises(EbmPriorError, match=said):
        fit(backbone, images, CONFIG, energy=energy(backbone.groups))  # type: ignore[operator]
