from dataclasses import replace
from statistics import NormalDist

import pytest
import torch

from ebm_prior.errors import ConfigurationError, DataError
from ebm_prior.evaluation.gauge import GaugeConfig, gauge_auc
from ebm_prior.model.backbone import LatentGroup
from ebm_prior.model.energy import EnergyConfig

SMALL = GaugeConfig(
    energy=EnergyConfig(channels=8, hidden=32, joint=32, activation="leaky_relu", conditional=False, dropout=0.2),
    iterations=100,
)
GROUPS = [LatentGroup("top", (4,)), LatentGroup("map", (2, 8, 8))]


def noise(n, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, *group.shape, generator=generator) for group in GROUPS]


def test_two_gaussians_have_their_known_auc():
    distance = 0.8
    posterior = noise(2000, 0)
    posterior[0][:, 1] += distance
    found = gauge_auc(posterior, noise(2000, 1), GROUPS, config=SMALL)
    expected = NormalDist().cdf(distance / 2**0.5)  # .714, which no classifier can beat but by chance
    assert found.per_group["top"] == pytest.approx(expected, abs=0.025)
    assert found.overall == pytest.approx(expected, abs=0.025)
    assert found.per_group["map"] == pytest.approx(0.5, abs=0.025)


def test_equal_distributions_are_not_told_apart():
    found = gauge_auc(noise(2000, 0), noise(2000, 1), GROUPS, config=SMALL)
    for area in (found.overall, *found.per_group.values()):
        assert area == pytest.approx(0.5, abs=0.025)


def test_scores_are_held_out():
    # 128 numbers and 40 latents: anything can be learned by heart, and nothing be known of the others.
    short = replace(SMALL, iterations=50)
    areas = [gauge_auc(noise(40, 2 * s), noise(40, 2 * s + 1), GROUPS, config=short).overall for s in range(3)]
    assert sum(areas) / 3 == pytest.approx(0.5, abs=0.12)


def test_relations_between_groups_are_seen_by_the_whole_alone():
    posterior = noise(2000, 0)
    posterior[1][:, 0] = 0.9 * posterior[0][:, 0, None, None] + 0.1**0.5 * posterior[1][:, 0]
    prior = noise(2000, 1)
    prior[1][:, 0] = (
        0.9 * torch.randn(2000, 1, 1, generator=torch.Generator().manual_seed(2)) + 0.1**0.5 * prior[1][:, 0]
    )
    found = gauge_auc(posterior, prior, GROUPS, config=SMALL)
    assert found.overall > 0.65
    assert max(found.per_group.values()) < 0.53


def test_spatial_structure_is_seen():
    posterior = noise(1500, 0)
    posterior[1] = posterior[1] + 0.5 * posterior[1].roll(1, 3)
    posterior[1] /= posterior[1].std()
    found = gauge_auc(posterior, noise(1500, 1), GROUPS, config=SMALL)
    assert found.per_group["map"] > 0.7
    assert found.overall > 0.7


def test_result_depends_on_the_seed_alone_and_states_its_budget():
    before = torch.get_rng_state()
    short = replace(SMALL, iterations=30)
    first = gauge_auc(noise(200, 0), noise(150, 1), GROUPS, config=short)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(1)
    assert gauge_auc(noise(200, 0), noise(150, 1), GROUPS, config=short) == first
    assert "200 posterior and 150 prior latents, 2 folds, at most 30 iterations of 256 + 256" in first.budget


def test_a_single_group_is_its_own_whole():
    posterior, prior = [noise(300, 0)[0] + 1], [noise(300, 1)[0]]
    found = gauge_auc(posterior, prior, GROUPS[:1], config=SMALL)
    assert found.per_group == {"top": found.overall}
    assert found.overall > 0.8


def test_latents_that_do_not_fit_are_refused():
    good = noise(100, 0)
    with pytest.raises(DataError, match="prior: expected one"):
        gauge_auc(good, good[::-1], GROUPS)
    with pytest.raises(DataError, match="at least 40 latents, found 30"):
        gauge_auc(noise(30, 0), good, GROUPS)
    broken = noise(100, 0)
    broken[1][3, 0, 0, 0] = torch.nan
    with pytest.raises(DataError, match="map hold NaN"):
        gauge_auc(good, broken, GROUPS)
    with pytest.raises(ConfigurationError, match="folds"):
        GaugeConfig(folds=1)
    with pytest.raises(ConfigurationError, match="iterations"):
        GaugeConfig(iterations=0)
    with pytest.raises(ConfigurationError, match="seed"):
        GaugeConfig(seed=-1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_networks_are_where_they_are_wanted_and_latents_stay():
    posterior, prior, seen = noise(300, 0), noise(300, 1), set()
    posterior[0] += 1
    hook = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, inputs: seen.update(x.device.type for x in inputs if isinstance(x, torch.Tensor))
    )
    try:
        found = gauge_auc(posterior, prior, GROUPS, config=SMALL, device=torch.device("cuda"))
    finally:
        hook.remove()
    assert seen == {"cuda"}
    assert found.overall == pytest.approx(gauge_auc(posterior, prior, GROUPS, config=SMALL).overall, abs=0.03)
