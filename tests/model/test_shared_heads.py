"""Heads that many groups of one shape share: small, told apart, and no change where groups are few."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ebm_prior.backbones.vdvae.adapter import VDVAE
from ebm_prior.backbones.vdvae.published import PUBLISHED
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_vdvae import seeded
from torch import Tensor, nn
from workshop import SMALL_FIT

from ebm_prior.api import fit
from ebm_prior.evaluation.gauge import GaugeConfig, gauge_auc
from ebm_prior.model.backbone import LatentGroup
from ebm_prior.model.energy import MOST_GROUPS, EnergyConfig, JointEnergy
from ebm_prior.model.prior import EBMPrior
from ebm_prior.model.samplers import SamplerConfig
from ebm_prior.runs.describe import head_parameters, parameters
from ebm_prior.storage.checkpoint import PRIOR_KEY, load_prior, save_backbone, save_prior
from ebm_prior.training.fit_config import paper_preset

CONFIG = EnergyConfig(channels=3, hidden=5, joint=4, own_heads=2)
GROUPS = [
    LatentGroup("top", (6,)),
    *(LatentGroup(f"vector{k}", (4,)) for k in range(3)),
    *(LatentGroup(f"point{k}", (2, 1, 1)) for k in range(2)),
    *(LatentGroup(f"map{k}", (2, 8, 8)) for k in range(4)),
]
FEW = {"particles": 12, "held_out": 8}  # draws of a stage
SHARING = {"vector": [1, 2, 3], "map": [6, 7, 8, 9]}


def bent(groups: list[LatentGroup], config: EnergyConfig) -> JointEnergy:
    energy, generator = JointEnergy(groups, config).eval(), torch.Generator().manual_seed(0)
    for parameter in energy.parameters():
        nn.init.normal_(parameter, std=0.5, generator=generator)
    return energy


def latents(seed: int = 0, n: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, *group.shape, generator=generator) for group in GROUPS]


@pytest.mark.parametrize(
    ("name", "total"),
    [("cifar10", 39_145_700), ("imagenet32", 119_280_868), ("imagenet64", 125_005_860), ("ffhq256", 114_874_852)],
)
def test_the_default_adds_little_to_a_published_vdvae(name: str, total: int) -> None:
    with torch.device("meta"):
        backbone = VDVAE(data_set=name, **PUBLISHED[name])
        energy = JointEnergy(backbone.groups, EnergyConfig())
    found = parameters(backbone, EnergyConfig())
    assert found["backbone"] == total
    print(f"{name}: {found['heads']:,} of {total:,}, {found['ratio']:.2%}")
    assert found["ratio"] <= 0.1
    own = {group.name for group in backbone.groups if isinstance(energy.heads[group.name].body, nn.Sequential)}
    shapes = [group.shape for group in backbone.groups]
    assert own == {group.name for group in backbone.groups if shapes.count(group.shape) <= 8}


def test_few_groups_have_heads_of_their_own() -> None:
    for config in (EnergyConfig(channels=3, hidden=5), replace(CONFIG, own_heads=MOST_GROUPS)):
        assert len(JointEnergy(GROUPS, config).shared) == 0
    assert paper_preset().energy.own_heads == MOST_GROUPS


def test_shared_heads_are_zero_at_first_and_have_all_gradients_soon() -> None:
    energy = JointEnergy(GROUPS, CONFIG)
    assert list(energy.shared) == ["4", "2x8x8"]
    assert torch.equal(energy.terms(latents()), torch.zeros(4, len(GROUPS) + 1))
    optimizer = torch.optim.SGD(energy.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (energy(latents())).square().add(energy(latents(1))).sum().backward()
        optimizer.step()
    assert all((parameter.grad != 0).any() for parameter in energy.parameters())


def test_each_head_sees_its_group_alone_and_is_told_which() -> None:
    energy, z = bent(GROUPS, CONFIG), latents()
    terms = energy.terms(z)
    torch.testing.assert_close(terms.sum(1), energy(z))
    for index, group in enumerate(latents(1)):
        changed = energy.terms([group if k == index else same for k, same in enumerate(z)]) != terms
        assert changed.any(0).tolist() == [k in (index, len(GROUPS)) for k in range(len(GROUPS) + 1)]
    for members in SHARING.values():
        same = [z[members[0]] if k in members else each for k, each in enumerate(z)]
        heads = [energy._heads()[k] for k in members]
        features = torch.stack([head.features(same[k]) for k, head in zip(members, heads, strict=True)])  # type: ignore[operator]
        assert all((a != b).any() for i, a in enumerate(features) for b in features[:i])


def test_each_group_keeps_its_own_standardisation() -> None:
    energy = JointEnergy(GROUPS, CONFIG)
    z = [(1 + k) * group + k for k, group in enumerate(latents(n=5_000))]
    energy.standardize(energy.moments(z))
    assert energy.spread(z) == pytest.approx(1, abs=1e-3)


def test_scaling_multiplies_f_and_adding_moves_it() -> None:
    energy, z = bent(GROUPS, CONFIG), latents()
    before = energy(z)
    energy.scale(-0.5)
    torch.testing.assert_close(energy(z), -0.5 * before)
    energy.add(2.0)
    torch.testing.assert_close(energy(z), 2 - 0.5 * before)


def test_a_copy_shares_nothing_with_its_original() -> None:
    energy, z = bent(GROUPS, CONFIG), latents()
    before = energy(z)
    other = copy.deepcopy(energy).double()
    torch.testing.assert_close(other([group.double() for group in z]).float(), before)
    for parameter in other.parameters():
        nn.init.zeros_(parameter)
    assert torch.equal(energy(z), before)
    assert {name for name, _ in other.named_parameters()} == set(energy.state_dict()) - {
        name for name, _ in energy.named_buffers()
    }


@pytest.fixture(scope="module")
def deep() -> VDVAE:
    """Ten groups of one side below one of another."""
    backbone = seeded(enc_blocks="4,4d4,1", dec_blocks="1,4m1,4x9", custom_width_str="", no_bias_above=4)
    return backbone.requires_grad_(False)


def test_a_prior_with_shared_heads_is_saved_and_read(deep: VDVAE, tmp_path: Path) -> None:
    save_backbone(deep, tmp_path / "deep.safetensors")
    prior = EBMPrior(deep, bent(list(deep.groups), EnergyConfig(channels=3, hidden=5, joint=4)))
    prior.sampler = SamplerConfig(proposals=2, steps=1)
    file = tmp_path / "prior.safetensors"
    save_prior(prior, file, checkpoint="deep.safetensors")
    again = load_prior(file)
    assert again.energy.config == prior.energy.config
    assert torch.equal(again.sample(3).images, prior.sample(3).images)
    counts = head_parameters(file)
    assert sum(counts.values()) == sum(p.numel() for p in prior.energy.parameters())
    assert counts["shared"] > counts["z1"] == 5 + 5 + 5 + 1
    with safe_open(file, framework="pt") as opened:
        assert "shared.2x4x4.1.weight" in opened.keys()  # noqa: SIM118


def test_a_file_from_before_there_were_shared_heads_has_a_head_for_each_group(deep: VDVAE, tmp_path: Path) -> None:
    save_backbone(deep, tmp_path / "deep.safetensors")
    energy = bent(list(deep.groups), EnergyConfig(channels=3, hidden=5, joint=4, own_heads=MOST_GROUPS))
    file, before = tmp_path / "prior.safetensors", tmp_path / "before.safetensors"
    save_prior(EBMPrior(deep, energy), file, checkpoint="deep.safetensors")
    with safe_open(file, framework="pt") as opened:
        record = json.loads(opened.metadata()[PRIOR_KEY])
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    del record["energy"]["own_heads"], record["sha256"]
    save_file(tensors, before, metadata={PRIOR_KEY: json.dumps(record)})
    again = load_prior(before)
    z = deep.sample(3)
    assert torch.equal(again.f(z), load_prior(file).f(z))
    save_prior(again, before, checkpoint="deep.safetensors")
    assert before.read_bytes() == file.read_bytes()


def test_shared_heads_are_fitted_in_stages(deep: VDVAE) -> None:
    images = torch.rand(120, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    prior = fit(deep, images, SMALL_FIT | {"iterations": 8, "ratios": "staged", "stage": FEW})
    assert len(prior.energy.shared) == 1
    assert (prior.f(deep.sample(4)) != 0).all()
    assert (prior.energy.heads["z1"].body.gain != 0).any()  # type: ignore[union-attr, operator]


def test_shared_heads_learn_groupwise_ratios(deep: VDVAE) -> None:
    """Each group has its own last layer, which is tempered and levelled by itself."""
    images = torch.rand(120, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    prior = fit(deep, images, SMALL_FIT | {"iterations": 8, "ratios": "groupwise", "learning_rate": 1e-2})
    assert len(prior.energy.shared) == 1
    assert [group["name"] for group in prior.record["groups"]] == [group.name for group in deep.groups]
    assert prior.sampler.by_group
    drawn = prior.sample(4)
    assert drawn.images.isfinite().all()
    torch.testing.assert_close(deep.reparameterize(drawn.eps)[-1], drawn.z[-1])


def test_a_gauge_tells_groups_that_would_share_a_head() -> None:
    groups = [LatentGroup(f"g{k}", (2,)) for k in range(10)]
    generator = torch.Generator().manual_seed(0)
    posterior, prior = ([torch.randn(300, 2, generator=generator) for _ in groups] for _ in range(2))
    posterior[3] += 2
    config = GaugeConfig(iterations=30, folds=2)
    found = gauge_auc(posterior, prior, groups, config=config)
    assert found.per_group["g3"] > 0.9
    assert found.overall > 0.8
