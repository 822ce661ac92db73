"""The heads: f = 0 before training, the paper's sizes, gradients everywhere, and standardised inputs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys import ToyConv

from ebm_prior.compute.randomness import derived_generator
from ebm_prior.errors import ConfigurationError
from ebm_prior.model.backbone import LatentGroup
from ebm_prior.model.energy import EnergyConfig, Head, JointEnergy
from ebm_prior.training.objectives import nce_loss

PAPER = EnergyConfig(channels=64, hidden=200, vector_layers=2, joint=0, activation="leaky_relu", conditional=False)
SMALL = EnergyConfig(channels=3, hidden=5, joint=4, conditional=False)
GROUPS = [
    LatentGroup("top", (6,)),
    LatentGroup("point", (2, 1, 1)),
    LatentGroup("small", (3, 5, 5)),
    LatentGroup("blocks_0/map", (2, 8, 8)),
    LatentGroup("wide", (2, 7, 20)),
]


def latents(groups: list[LatentGroup], n: int = 4, seed: int = 0) -> list[Tensor]:
    generator = derived_generator(40, seed)
    return [torch.randn(n, *group.shape, generator=generator) for group in groups]


def layers(head: Head, kind: type[nn.Module]) -> list[nn.Module]:
    return [module for module in head.modules() if isinstance(module, kind)]


def numbers(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_a_map_of_any_side_has_zero_energy_at_first() -> None:
    for side in range(1, 65):
        z = torch.randn(2, 2, side, side, generator=derived_generator(41, side))
        head = Head((2, side, side), SMALL)
        assert torch.equal(head(z), torch.zeros(2)), side
        assert head.features(z).shape == (2, 5), side
        assert (head.features(z) != 0).all(), side  # it is the last layer alone that is zero


def test_other_shapes_have_zero_energy_at_first() -> None:
    for shape in ((1,), (7,), (400,), (3, 7, 20), (1, 1, 9)):
        assert torch.equal(Head(shape, SMALL)(torch.randn(3, *shape)), torch.zeros(3)), shape


@pytest.mark.parametrize("joint", [0, 4])
@pytest.mark.parametrize("mode", [True, False])
def test_the_joint_energy_is_zero_at_first(joint: int, mode: bool) -> None:
    energy = JointEnergy(GROUPS, replace(SMALL, joint=joint, dropout=0.5)).train(mode)
    z = latents(GROUPS)
    assert torch.equal(energy(z), torch.zeros(4))
    assert torch.equal(energy.terms(z), torch.zeros(4, 5 + bool(joint)))


# Table 12 for a group of 20 channels with 64 convolution channels and linear layers of 200.
#   convolutions: 20·64·16 + 64 = 20,544, then 64·64·16 + 64 = 65,600 each, down to 64 × 4 × 4 = 1,024 features
#   linear:       1,024·200 + 200 = 205,000, then 200·200 + 200 = 40,200 each; last 200 + 1 = 201
TABLE_12 = {
    8: (1, 20_544 + 205_000 + 201),
    16: (2, 20_544 + 65_600 + 205_000 + 40_200 + 201),
    32: (3, 20_544 + 2 * 65_600 + 205_000 + 2 * 40_200 + 201),
    64: (4, 20_544 + 3 * 65_600 + 205_000 + 3 * 40_200 + 201),
    128: (5, 20_544 + 4 * 65_600 + 205_000 + 4 * 40_200 + 201),
}


@pytest.mark.parametrize("side", TABLE_12)
def test_depths_and_sizes_are_the_papers(side: int) -> None:
    depth, parameters = TABLE_12[side]
    head = Head((20, side, side), PAPER)
    assert len(layers(head, nn.Conv2d)) == depth
    assert len(layers(head, nn.Linear)) == depth + 1  # with the last, to one number
    assert numbers(head) == parameters
    slopes = layers(head, nn.LeakyReLU)
    assert len(slopes) == 2 * depth
    assert all(slope.negative_slope == 0.2 for slope in slopes)


def test_sizes_of_vector_and_joint_heads() -> None:
    assert numbers(Head((20,), PAPER)) == 20 * 200 + 200 + 40_200 + 201
    assert numbers(Head((20, 4, 4), PAPER)) == 320 * 200 + 200 + 201  # no convolution, one linear layer
    joint = JointEnergy(GROUPS, SMALL)
    alone = JointEnergy(GROUPS, replace(SMALL, joint=0))
    assert numbers(joint) - numbers(alone) == (5 * 5) * 4 + 4 + 4 + 1


def test_terms_sum_to_the_energy_and_each_head_sees_its_group_alone() -> None:
    torch.manual_seed(0)
    energy = JointEnergy(GROUPS, SMALL).eval()
    for parameter in energy.parameters():
        nn.init.normal_(parameter, std=0.5)
    z = latents(GROUPS)
    terms = energy.terms(z)
    torch.testing.assert_close(terms.sum(1), energy(z))
    assert (terms.std(0) > 0).all()
    for index, group in enumerate(latents(GROUPS, seed=1)):
        changed = energy.terms([group if k == index else same for k, same in enumerate(z)]) != terms
        expected = [k in (index, len(GROUPS)) for k in range(len(GROUPS) + 1)]  # its own term and the joint one
        assert changed.any(0).tolist() == expected


def test_scaling_multiplies_f_with_the_joint_head() -> None:
    energy = JointEnergy(GROUPS, SMALL)
    for parameter in energy.parameters():
        nn.init.normal_(parameter, std=0.3)
    before = energy.terms(latents(GROUPS))
    energy.scale(-0.5)
    torch.testing.assert_close(energy.terms(latents(GROUPS)), -0.5 * before)


def test_a_conditional_head_sees_where_its_group_lies_in_its_own_prior_too() -> None:
    """z1 | z2 of the toy: the head's input is z1, then (z1 − mean)/std; at the top, where that says nothing new, z2."""
    backbone = ToyConv().double().eval()
    eps = backbone.standard_normal(3, generator=torch.Generator().manual_seed(0))
    z = backbone.reparameterize(eps)
    for conditional in (False, True):
        energy = JointEnergy(backbone.groups, replace(SMALL, conditional=conditional)).double()
        seen = energy.inputs(z, eps)
        assert torch.equal(seen[0], z[0])
        for z_i, eps_i, seen_i in zip(z[1:], eps[1:], seen[1:], strict=True):
            assert torch.equal(seen_i, torch.cat([z_i, eps_i], dim=1) if conditional else z_i)
        assert energy(seen).shape == (3,)


def test_gradients_reach_every_parameter_after_one_step() -> None:
    """At f = 0 only the last layers see a gradient; once they have moved, every single weight does."""
    torch.manual_seed(1)
    energy = JointEnergy(GROUPS, SMALL)
    optimizer = torch.optim.SGD(energy.parameters(), lr=1.0)
    z_q, z_p = latents(GROUPS, 64), [0.5 * z + 1 for z in latents(GROUPS, 64, seed=1)]

    def step() -> dict[str, Tensor]:
        optimizer.zero_grad()
        nce_loss(energy(z_q), energy(z_p)).backward()
        optimizer.step()
        return {name: p.grad for name, p in energy.named_parameters() if p.grad is not None}

    first, second = step(), step()
    assert len(second) == len(list(energy.parameters()))
    moved = {name.rpartition(".")[0] for name, gradient in first.items() if gradient.any()}
    assert moved == {*(f"heads.{group.name.replace('.', '/')}.last" for group in GROUPS), "joint.4"}
    assert all((gradient != 0).all() for gradient in second.values())


def test_inputs_are_standardised_per_dimension_of_a_vector_and_per_channel_of_a_map() -> None:
    groups = [LatentGroup("vector", (3,)), LatentGroup("map", (2, 8, 8))]
    energy = JointEnergy(groups, SMALL)
    vector, image = latents(groups, 500)
    vector = vector * torch.tensor([0.1, 1.0, 10.0]) + torch.tensor([5.0, 0.0, -5.0])
    image = image * torch.tensor([2.0, 0.5])[:, None, None] + torch.linspace(-1, 1, 8)
    energy.standardize(energy.moments([vector, image]))
    for z, head, axes in zip((vector, image), energy.heads.values(), ([0], [0, 2, 3]), strict=True):
        seen: list[Tensor] = []
        head.body.register_forward_pre_hook(lambda module, inputs, seen=seen: seen.append(inputs[0]))
        head(z)
        torch.testing.assert_close(seen[0].mean(axes), torch.zeros(z.shape[1]), atol=1e-5, rtol=0)
        torch.testing.assert_close(seen[0].std(axes, unbiased=False), torch.ones(z.shape[1]), atol=1e-5, rtol=0)
        assert head.shift.shape == head.scale.shape == (z.shape[1], *[1] * (z.dim() - 2))


def test_a_dimension_that_never_varies_stays_finite_and_scaling_travels_with_the_state() -> None:
    energy, other = (JointEnergy([LatentGroup("z", (2,))], SMALL) for _ in range(2))
    z = torch.cat([torch.randn(50, 1), torch.full((50, 1), 3.0)], dim=1)
    energy.standardize(energy.moments([z]))
    assert torch.isfinite(energy.heads["z"].features(z)).all()
    other.load_state_dict(energy.state_dict())
    assert torch.equal(energy.heads["z"].features(z), other.heads["z"].features(z))


@pytest.mark.parametrize(
    "settings",
    [{"channels": 0}, {"hidden": 0}, {"vector_layers": 0}, {"joint": -1}, {"dropout": 1.0}, {"dropout": -0.1}],
)
def test_sizes_that_make_no_sense_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=f"{next(iter(settings))} must be (from [01] to|in)"):
        EnergyConfig(**settings)


def some_energy(bound: float) -> JointEnergy:
    """Heads with random weights everywhere, the same for any bound."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        energy = JointEnergy(GROUPS, replace(SMALL, bound=bound))
        for parameter in energy.parameters():
            nn.init.normal_(parameter, std=0.3)
    return energy


def test_far_out_a_bounded_energy_is_constant() -> None:
    """An unbounded one goes on growing: that is what chains find."""
    z = latents(GROUPS)
    for bound, grows in ((2.0, False), (0.0, True)):
        far, farther = (some_energy(bound)([factor * group for group in z]) for factor in (1e5, 1e6))
        assert (bool((farther - far).abs().max() > 1e3), torch.equal(farther, far)) == (grows, not grows)


def test_near_zero_bounds_change_nothing() -> None:
    z = [1e-3 * group for group in latents(GROUPS)]
    torch.testing.assert_close(some_energy(2.0)(z), some_energy(0.0)(z), rtol=1e-5, atol=1e-5)


def test_bounds_are_in_units_of_the_posterior() -> None:
    z = latents(GROUPS)
    energy, scaled = some_energy(2.0), some_energy(2.0)
    for head in scaled._heads():
        head.scale.fill_(50.0)
    torch.testing.assert_close(scaled([50.0 * group for group in z]), energy(z), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bound", [-1.0, float("inf"), float("nan")])
def test_impossible_bounds(bound: float) -> None:
    with pytest.raises(ConfigurationError, match="bound"):
        EnergyConfig(bound=bound)
