"""The picture of two-dimensional latents: what is drawn of a chain, and where."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from ebm_prior.data.images import ImageSource, from_array
from ebm_prior.errors import ConfigurationError
from ebm_prior.experiments.latents_2d import config_2d, picture_2d, train_2d, transition
from ebm_prior.model.energy import EnergyConfig
from ebm_prior.model.samplers import SamplerConfig
from ebm_prior.pictures.grids import scatters


@pytest.fixture(scope="module")
def pictures() -> ImageSource:
    return from_array(np.random.default_rng(0).random((40, 8, 8)).astype(np.float32), np.arange(40) % 4)


def test_the_chain_starts_in_the_gaussian_prior_and_is_kept_every_ten_steps(pictures: ImageSource) -> None:
    energy = EnergyConfig(hidden=6, vector_layers=1, joint=0, standardize=False)
    config = replace(config_2d(iterations=3), batch_size=8, energy=energy, energy_from=0.0)
    prior = train_2d(pictures, config, width=4)
    shown = transition(prior, pictures, SamplerConfig(proposals=1, steps=20, step_size=0.5), n=30)
    assert shown.steps == [0, 10, 20]
    assert [z.shape for z in shown.chain[0]] == [(30, 2), (30, 2)]
    eps = prior.backbone.standardize(shown.chain[0])
    assert abs(float(torch.cat(eps).std()) - 1) < 0.3
    assert not torch.equal(shown.chain[0][0], shown.chain[1][0])
    page = picture_2d(shown)
    assert page.width > 3 * 190
    assert page.height > 2 * 190


def test_points_are_where_they_belong() -> None:
    """In the square around the mean, (0, 0), that reaches 5 % beyond the farthest point: x to the right, y upwards."""
    points = torch.tensor([[4.0, 2.0], [-4.0, -2.0]])
    page = scatters([("one", [("red", points)]), ("two", [("blue", torch.zeros(3, 2))])], columns=2, side=100)
    found = [(x, y) for x in range(page.width) for y in range(page.height) if page.getpixel((x, y)) == (255, 0, 0)]
    assert 2 < len(found) < 24
    right = np.mean([(x, y) for x, y in found if x > 70], axis=0)
    assert right == pytest.approx([20 + 50 * (1 + 1 / 1.05), 40 + 50 * (1 - 0.5 / 1.05)], abs=1)
    with pytest.raises(ConfigurationError):
        scatters([], columns=1)
