"""Passes: device, precision, checkpointing and compilation of a backbone, and the options that say them."""

from __future__ import annotations

import click
import pytest
import tiny_nvae
import torch
from click.testing import CliRunner
from toys import ToyConv

from ebm_prior.cli.preflight import for_samples
from ebm_prior.cli.shared import PASSES, PLACE
from ebm_prior.errors import ConfigurationError
from ebm_prior.model.energy import EnergyConfig, JointEnergy
from ebm_prior.model.passes import PLAIN, Passes
from ebm_prior.model.prior import EBMPrior
from ebm_prior.model.samplers import SamplerConfig
from ebm_prior.storage.weights import fingerprint


def test_nothing_asked_for_is_the_backbone_itself() -> None:
    backbone = ToyConv().eval()
    assert PLAIN.apply(backbone) is backbone
    assert Passes(dtype=torch.float64).place(backbone) is backbone
    assert next(backbone.parameters()).dtype == torch.float64


def test_lower_precision_is_of_the_cells_alone_and_stays_when_asked_for_again() -> None:
    passes = Passes(dtype=torch.bfloat16, checkpointing=True)
    backbone = passes.place(tiny_nvae.trained_tiny().double()).eval()
    computed = passes.apply(backbone)
    assert (computed.precision, next(computed.parameters()).dtype) == ("bf16", torch.float32)
    assert fingerprint(computed) == fingerprint(backbone)
    eps = backbone.standard_normal(2, generator=torch.Generator().manual_seed(0))
    again = passes.apply(computed)
    assert all(map(torch.equal, again.reparameterize(eps), computed.reparameterize(eps)))


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        (Passes(checkpointing=True), "no checkpointing"),
        (Passes(compiled=True), "nothing to compile"),
        (Passes(dtype=torch.bfloat16), "no cells that run in"),
    ],
)
def test_what_an_adapter_does_not_have_is_refused(passes: Passes, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        passes.apply(ToyConv().eval())


def test_memory_is_measured_as_the_backbone_will_be_computed_but_not_compiled() -> None:
    backbone = tiny_nvae.trained_tiny().eval()
    prior = EBMPrior(backbone, JointEnergy(backbone.groups, EnergyConfig(channels=4, hidden=8, joint=0)))
    sampler = SamplerConfig(proposals=1, steps=1)
    whole = for_samples(prior, 8, 64, sampler).bytes
    assert for_samples(prior, 8, 64, sampler, Passes(checkpointing=True, compiled=True)).bytes < whole


def test_options_become_one_argument() -> None:
    found: list[Passes] = []

    @click.command()
    @PASSES
    def fast(passes: Passes) -> None:
        found.append(passes)

    @click.command()
    @PLACE
    def plain(passes: Passes) -> None:
        found.append(passes)

    runner = CliRunner()
    assert runner.invoke(fast, ["--precision", "bf16", "--checkpointing", "--compile"]).exit_code == 0
    assert runner.invoke(plain, ["--precision", "float64"]).exit_code == 0
    assert found == [Passes(dtype=torch.bfloat16, checkpointing=True, compiled=True), Passes(dtype=torch.float64)]
    assert "--compile" not in runner.invoke(plain, ["--help"]).stdout
    failed = runner.invoke(plain, ["--device", "nowhere"])
    assert isinstance(failed.exception, ConfigurationError)
    assert "--device nowhere cannot be used" in str(failed.exception)
