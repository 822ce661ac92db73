"""Local hidden layers: they begin with each place and its neighbours, and hand sums over places to the last layer."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ebm_prior.compute.randomness import derived_generator
from ebm_prior.errors import ConfigurationError
from ebm_prior.model.energy import EnergyConfig, Head, hidden_layers
from ebm_prior.model.layers import SharedBody
from ebm_prior.settings import of_plain, recorded
from ebm_prior.training.objectives import nce_loss

LOCAL = EnergyConfig(channels=3, hidden=5, joint=4, groupwise=True, local=True)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=derived_generator(60, seed))


@pytest.mark.parametrize("side", range(1, 34))
def test_a_map_of_any_side_has_zero_energy_at_first(side: int) -> None:
    head, z = Head((2, side, side), LOCAL), noise(4, 2, side, side)
    assert torch.equal(head(z), torch.zeros(4))
    convolutions = sum(isinstance(layer, nn.Conv2d) for layer in head.body.modules())
    assert head.features(z).shape == (4, 5 + 3 * convolutions)
    assert bool(convolutions) == (side >= 3)


def test_the_sums_are_those_of_each_convolutions_units() -> None:
    body, x = hidden_layers((2, 16, 16), LOCAL), noise(4, 2, 16, 16)
    convolutions = [layer for layer in body if isinstance(layer, nn.Conv2d)]
    assert [layer.kernel_size for layer in convolutions] == [(3, 3), (4, 4), (4, 4)]
    units = list(itertools.accumulate(convolutions, lambda x, layer: F.silu(layer(x)), initial=x))[1:]
    found = body(x)
    torch.testing.assert_close(found[:, 5:], torch.cat([each.sum((2, 3)) for each in units], dim=1))
    linear = next(layer for layer in body if isinstance(layer, nn.Linear))
    torch.testing.assert_close(found[:, :5], F.silu(linear(units[-1].flatten(1))))


def test_groups_that_share_them_change_the_first_units_before_they_are_summed() -> None:
    layers, x = hidden_layers((2, 8, 8), LOCAL), noise(4, 2, 8, 8)
    shared = SharedBody(layers)
    assert torch.equal(shared(x), layers(x))
    nn.init.constant_(shared.offset, 0.5)
    nn.init.constant_(shared.gain, 2.0)
    convolution = layers[0]
    assert isinstance(convolution, nn.Conv2d)
    torch.testing.assert_close(shared(x)[:, 5:8], F.silu(3 * convolution(x) + 0.5).sum((2, 3)))


def test_what_is_small_at_each_place_is_learned_soon() -> None:
    """Posterior latents have 8 % more variance everywhere: 1,024 places tell it, and no single one does."""
    found = {}
    for local in (True, False):
        torch.manual_seed(0)
        head = Head((1, 32, 32), replace(LOCAL, channels=8, local=local))
        optimizer = torch.optim.AdamW(head.parameters(), lr=2e-3)
        losses = []
        for step in range(60):
            f_q, f_p = (head(factor * noise(64, 1, 32, 32, seed=2 * step + k)) for k, factor in enumerate((1.04, 1.0)))
            loss = nce_loss(f_q, f_p)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        found[local] = sum(losses[-20:]) / 20
    assert found[True] < 1.3 < 1.36 < found[False]  # 2 log 2 = 1.386 is f = 0


def test_files_from_before_there_were_local_heads_have_none() -> None:
    record = recorded(replace(LOCAL, local=False))
    assert "local" not in record
    assert recorded(LOCAL)["local"]
    before = Head((2, 8, 8), of_plain(EnergyConfig, record))
    assert before.last.in_features == 5
    assert list(before.body.state_dict()) == ["0.weight", "0.bias", "3.weight", "3.bias"]


def test_only_groupwise_heads_can_be_local() -> None:
    with pytest.raises(ConfigurationError, match="local must be off unless groupwise is on"):
        EnergyConfig(local=True)
