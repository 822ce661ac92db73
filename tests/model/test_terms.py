"""The terms of an image's log posterior: they add up to L^{>0} on the same draws, and carry the groups' names."""

from __future__ import annotations

import doctest
import inspect
import math
from unittest import mock

import pytest
import torch
from own_images import Own
from small_priors import bent
from torch import Tensor, nn
from toys import ToyConv

from ebm_prior.errors import ConfigurationError, RegimeError
from ebm_prior.model.energy import EnergyConfig, zero_linear
from ebm_prior.model.own_energy import energy_of
from ebm_prior.model.prior import EBMPrior
from ebm_prior.model.scores import Form
from ebm_prior.model.terms import CEILING, ENERGY, LIKELIHOOD, ImageTerms

GROUPS = ("dense", "point", "conv")


@pytest.fixture(scope="module")
def toy() -> EBMPrior:
    return bent(ToyConv().double().eval())


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    return torch.rand(70, 1, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("ceiling", [math.inf, 0.2])
def test_the_terms_add_up_to_the_bound(toy: EBMPrior, pictures: Tensor, ceiling: float) -> None:
    prior = EBMPrior(toy.backbone, toy.energy, tau=0.7, ceiling=ceiling)
    forms = [Form(0, mode="elbo"), Form(0, mode="elbo", energy=False), Form(0, mode="prior")]
    bound, plain, alone = prior.scores(pictures, forms, draws=3, seed=9).values()
    terms = prior.terms(pictures, draws=3, seed=9)
    log_p, energy = [f"log p({g})" for g in GROUPS], [f"f({g})" for g in (*GROUPS, "joint")]
    energy += [CEILING] * (ceiling < math.inf)
    assert list(terms) == [LIKELIHOOD, *log_p, *(f"-log q({g})" for g in GROUPS), *energy]
    torch.testing.assert_close(torch.stack(list(terms.values())).sum(0), bound)
    torch.testing.assert_close(torch.stack([terms[name] for name in terms if name not in energy]).sum(0), plain)
    torch.testing.assert_close(torch.stack([terms[name] for name in log_p + energy]).sum(0), alone)
    if ceiling < math.inf:
        assert float(terms[CEILING].min()) < 0


def test_terms_depend_neither_on_chunks_nor_on_the_other_images(toy: EBMPrior, pictures: Tensor) -> None:
    whole = toy.terms(pictures, draws=2, seed=5)
    chunked = toy.terms(pictures, draws=2, seed=5, chunk=64)
    last = toy.terms(pictures[64:], draws=2, seed=5, first=64)
    other = toy.terms(pictures, draws=2, seed=6)
    for name, term in whole.items():
        assert term.shape == (70,)
        torch.testing.assert_close(chunked[name], term)
        torch.testing.assert_close(last[name], term[64:])
        assert not torch.equal(other[name], term)
    assert {name: len(term) for name, term in toy.terms(pictures[:0]).items()} == dict.fromkeys(whole, 0)


def test_scores_and_terms_share_the_passes(toy: EBMPrior, pictures: Tensor) -> None:
    """They are equal in bits to those found one by one, and the scores' own traversals of the network suffice."""
    forms = [Form(0, mode="elbo"), Form(0, mode="iw", energy=False)]
    scores, terms = toy.scores_and_terms(pictures, forms, draws=3, seed=9, chunk=64)
    for name, term in toy.terms(pictures, draws=3, seed=9, chunk=64).items():
        assert torch.equal(terms[name], term)
    with mock.patch.object(ToyConv, "top_down", autospec=True, side_effect=ToyConv.top_down) as traversed:
        alone = toy.scores(pictures, forms, draws=3, seed=9, chunk=64)
        calls = traversed.call_count
        toy.scores_and_terms(pictures, forms, draws=3, seed=9, chunk=64)
        assert traversed.call_count == 2 * calls
    for form in forms:
        assert torch.equal(scores[form], alone[form])


class Unsplit(nn.Module):
    """An energy that is no sum over groups."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), zero_linear(5))

    def forward(self, inputs: list[Tensor]) -> Tensor:
        value: Tensor = self.layers(torch.cat([each.flatten(1) for each in inputs[:2]], dim=1)).squeeze(1)
        return value


def test_an_energy_that_is_no_sum_is_one_term(pictures: Tensor) -> None:
    backbone = ToyConv().double().eval()
    energy = energy_of(backbone.groups, EnergyConfig(conditional=False), Unsplit())
    with torch.no_grad():
        for parameter in energy.parameters():
            parameter.add_(0.3)
    prior, form = EBMPrior(backbone, energy), Form(0, mode="elbo")
    terms = prior.terms(pictures, draws=1)
    assert [name for name in terms if name.startswith(ENERGY)] == [ENERGY]
    torch.testing.assert_close(torch.stack(list(terms.values())).sum(0), prior.scores(pictures, form, draws=1)[form])
    assert float(terms[ENERGY].std()) > 0


def test_what_has_no_terms_is_refused(toy: EBMPrior, pictures: Tensor) -> None:
    with pytest.raises(RegimeError, match="terms"):
        EBMPrior(toy.backbone, toy.energy, regime="refiner").terms(pictures)
    with pytest.raises(ConfigurationError, match="draws"):
        toy.terms(pictures, draws=0)
    with pytest.raises(ConfigurationError, match="images"):
        toy.terms(pictures[:, :, :4])


def test_its_example_runs(toy: EBMPrior, pictures: Tensor) -> None:
    text = inspect.getdoc(ImageTerms.terms) or ""
    example = doctest.DocTestParser().get_doctest(text, {"prior": toy, "images": Own(pictures)}, "terms", None, 0)
    said: list[str] = []
    doctest.DocTestRunner().run(example, out=said.append)
    assert example.examples
    assert not said, "".join(said)
