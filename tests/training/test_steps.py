"""Pieces of a gradient step: the schedule of the rate, the moving average, and what counts as a divergence."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from ebm_prior.errors import DivergenceError
from ebm_prior.training.steps import (
    MovingAverage,
    require_finite,
    require_gap,
    require_typical,
    scheduled_rate,
    set_learning_rate,
)


def test_the_schedule_is_a_warm_up_times_a_cosine() -> None:
    for t in range(10):
        rise, fall = min(1, (t + 1) / 4), 0.5 * (1 + math.cos(math.pi * t / 10))
        assert scheduled_rate(0.3, t, 10, warmup=4, decay=True) == pytest.approx(0.3 * rise * fall)
        assert scheduled_rate(0.3, t, 10, warmup=4, decay=False) == pytest.approx(0.3 * rise)
        assert scheduled_rate(0.3, t, 10, warmup=0, decay=False) == 0.3


def test_groups_with_a_peak_of_their_own() -> None:
    plain, peaked = (nn.Parameter(torch.zeros(1)) for _ in range(2))
    optimizer = torch.optim.Adam([{"params": [plain]}, {"params": [peaked], "peak": 0.1}])
    set_learning_rate(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.05]


def test_an_average_with_buffers_is_that_of_torch() -> None:
    """Of numbers of batches, too, which are whole."""
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    decay = torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
    theirs = torch.optim.swa_utils.AveragedModel(network, multi_avg_fn=decay, use_buffers=True)
    ours = copy.deepcopy(network)
    averaging = MovingAverage(ours, network)
    for step in range(4):
        network(torch.randn(8, 3, generator=torch.Generator().manual_seed(step)))
        with torch.no_grad():
            network[0].weight.add_(0.1)
        theirs.update_parameters(network)
        averaging.update(0.9, settled=step > 0)
    expected = theirs.module.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in ours.state_dict().items())


def test_what_is_a_divergence() -> None:
    one, inf, nan = torch.tensor(1.0), torch.tensor(math.inf), math.nan
    require_finite("the loss", 3, one, one.double())
    with pytest.raises(DivergenceError, match="the loss is not finite at iteration 3"):
        require_finite("the loss", 3, one, inf)
    require_gap(-9.0, 10.0)
    with pytest.raises(DivergenceError, match="gap between posterior and prior latents is -11 nats, above 10"):
        require_gap(-11.0, 10.0)
    require_typical(1.1, 1.2, 3, "limit 1.2")
    for norm in (1.3, nan):
        with pytest.raises(DivergenceError, match=f"left the typical set at iteration 3: ‖ε‖/√D {norm}, limit 1.2"):
            require_typical(norm, 1.2, 3, "limit 1.2")
