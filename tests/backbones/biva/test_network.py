"""BIVA: architectures published and small, what cannot be built, the contract, and the passes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ebm_prior.backbones.biva.adapter import BIVA
from ebm_prior.backbones.biva.stages import GatedBlock
from tiny_biva import STAGES, initialised, tiny

from ebm_prior.errors import ConfigurationError
from ebm_prior.testing.contract import check_backbone

# The published configurations, as a person writes them.


def published(filters: int, down: tuple[int, ...], latents: list[dict[str, int]]) -> list[dict[str, Any]]:
    """Stages of three blocks, kernels 5 at the image and 3 above, stride 2 at the end of the stages `down`."""
    stages = []
    for i, latent in enumerate(latents):
        block = {"filters": filters, "kernel": 5} if i == 0 else {"filters": filters}
        stages.append({"blocks": [block, block, {**block, "stride": 2 if i in down else 1}], "latent": latent})
    return stages


MNIST: dict[str, Any] = {
    "image_shape": [1, 28, 28],
    "likelihood": "bernoulli",
    "stages": published(64, (0, 5), [{"features": n} for n in (48, 40, 32, 24, 16, 8)]),
}
KERNELS = [16] * 10 + [8] * 4 + [4]
CIFAR10: dict[str, Any] = {
    "image_shape": [3, 32, 32],
    "likelihood": "logistic_mixture",
    "stages": published(96, (0, 10, 14), [{"features": 38 - 2 * i, "kernel": k} for i, k in enumerate(KERNELS)]),
}
# Options, parameters, state-dict entries, groups, latent dimensions.
PUBLISHED = {
    "MNIST": (MNIST, 31_550_946, 825, 11, 328),
    "MNIST, VAE": ({**MNIST, "kind": "vae"}, 17_804_706, 505, 6, 168),
    "MNIST, LVAE": ({**MNIST, "kind": "lvae"}, 16_524_450, 549, 6, 168),
    "CIFAR-10": (CIFAR10, 102_948_560, 2005, 29, 156_320),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_architectures_have_the_published_size(name: str) -> None:
    options, parameters, entries, groups, dimensions = PUBLISHED[name]
    with torch.device("meta"):
        model = BIVA(**options)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert len(model.network.state_dict()) == entries
    assert len(model.groups) == groups
    assert sum(torch.Size(group.shape).numel() for group in model.groups) == dimensions


def test_groups_are_named_after_stage_and_side() -> None:
    assert [group.name for group in tiny().groups] == ["z3", "z2_td", "z2_bu", "z1_td", "z1_bu"]
    assert [group.shape for group in tiny().groups] == [(3,), (3,), (3,), (2, 4, 4), (2, 4, 4)]
    assert [group.name for group in tiny(kind="lvae").groups] == ["z3", "z2", "z1"]


# The contract, by which they are also rebuilt from JSON: small networks, whose densities can be formed whole.


def wide_image(kind: str) -> dict[str, Any]:
    """Maps in every stage, more channels in than filters, even kernels, stride 2 first in the bottom stage."""
    stages = [
        {
            "blocks": [{"filters": 3, "kernel": 2, "stride": 2}, {"filters": 2, "kernel": 1}, {"filters": 3}],
            "latent": {"features": 4, "kernel": 2},
        },
        {"blocks": [{"filters": 3}] * 2 + [{"filters": 3, "stride": 2}], "latent": {"features": 1, "kernel": 3}},
        {"blocks": [{"filters": 3}] * 3, "latent": {"features": 5, "kernel": 1}},
    ]
    return {"image_shape": [3, 8, 8], "likelihood": "logistic_mixture", "components": 2, "stages": stages, "kind": kind}


CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "lvae": {"kind": "lvae"},
    "vae": {"kind": "vae"},
    "no skips": {"skips": False},
    "lvae without skips": {"kind": "lvae", "skips": False},
    "log variance bounded, ReLU": {"log_variance": "tanh", "activation": "ReLU"},
    "log variance free": {"log_variance": "none"},
    "colours": wide_image("biva"),
    "colours, lvae": wide_image("lvae"),
    "colours, vae": wide_image("vae"),
    "one stage": {"stages": STAGES[:1]},
    "one stage of vae": {"stages": [{**STAGES[0], "latent": {"features": 3}}], "kind": "vae"},
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_keeps_the_backbone_contract(name: str) -> None:
    torch.manual_seed(0)
    report = check_backbone(initialised(tiny(**CONFIGURATIONS[name])))
    assert not report.skipped


# What cannot be built.


def stages(number: int, **changes: Any) -> list[dict[str, Any]]:
    return [{**stage, **changes} if i == number else stage for i, stage in enumerate(STAGES)]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown option": ({"stage": 3}, "Architecture: expected options among .*'init_std'.*stage"),
    "not square": ({"image_shape": [1, 8, 4]}, "square"),
    "no shape": ({"image_shape": 8}, "square"),
    "side": ({"image_shape": [1, 6, 6]}, "strides divide, found size 3, stride 2"),
    "fraction": ({"image_shape": [1, 8.0, 8.0]}, "image_shape: expected an integer from 1"),
    "likelihood": ({"likelihood": "beta"}, "likelihood: expected one of"),
    "colours": ({"likelihood": "logistic_mixture"}, "3 colours"),
    "components": ({"components": 0}, "components: expected an integer from 1"),
    "kind": ({"kind": "hvae"}, r"kind: expected one of \['biva', 'lvae', 'vae'\], found 'hvae'"),
    "log variance": ({"log_variance": None}, "log_variance: expected one of"),
    "log variance of another type": ({"log_variance": []}, "log_variance: expected one of"),
    "activation": ({"activation": "elu"}, "activation: expected one of .*'ELU'"),
    "dropout": ({"q_dropout": 1}, "dropout rates"),
    "dropout of another type": ({"p_dropout": "half"}, "dropout rates"),
    "skips": ({"skips": 1}, "skips: expected true or false"),
    "initial scale": ({"init_std": 0}, "init_std: expected a number"),
    "no stages": ({"stages": []}, "at least one stage"),
    "stages of another type": ({"stages": {}}, "at least one stage"),
    "stage": ({"stages": [[]]}, "StageSpec: expected options among"),
    "no latent": ({"stages": [{"blocks": [{"filters": 4}]}]}, "missing 1 required positional argument: 'latent'"),
    "no blocks": ({"stages": stages(0, blocks=[])}, "at least one block"),
    "block": ({"stages": stages(0, blocks=[{"filter": 4}])}, "Block: expected options among"),
    "huge block": ({"stages": stages(0, blocks=[{"filters": 10**9}])}, "Block.filters: expected an integer from 1"),
    "many blocks": ({"stages": stages(0, blocks=[{"filters": 4}] * 5000)}, "blocks in all: expected"),
    "latent": ({"stages": stages(0, latent={"features": 2, "kernel": 0})}, "Latent.kernel: expected an integer from 1"),
    "widths that do not meet": ({"stages": stages(1, blocks=[{"filters": 5}])}, "as many filters as the last block"),
    "widths that merge cannot join": (
        {"stages": stages(1, blocks=[{"filters": 4}, {"filters": 5}])},
        "first and last block must have as many filters, .* found 4 and 5",
    ),
    "skips of another size": (
        {"stages": stages(1, blocks=[{"filters": 4, "stride": 2}, {"filters": 4}, {"filters": 4}])},
        "turn in the queue",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_built_is_refused(case: str) -> None:
    options, message = REFUSED[case]
    with pytest.raises(ConfigurationError, match=message):
        tiny(**options)


def test_without_skips_only_merging_has_an_auxiliary_input() -> None:
    with_skips, without = (set(tiny(skips=skips).network.state_dict()) for skips in (True, False))
    assert without < with_skips
    auxiliary = {key.split(".")[2] for key in without if "aux_op" in key}
    assert auxiliary == {"q_td_convs", "merge"}
    assert {key.split(".")[2] for key in with_skips - without} == {"q_bu_convs", "p_convs"}


# The parts.


def block(in_channels: int, aux_shape: tuple[int, int, int] | None = None, stride: int = 1) -> GatedBlock:
    options = {"activation": F.elu, "residual": True, "transposed": False, "aux_shape": aux_shape}
    return GatedBlock((in_channels, 6, 6), 3, 3, stride, **options).double().eval()


@pytest.mark.parametrize(("in_channels", "kept"), [(2, 0), (3, 3), (4, 3)])
def test_a_shortcut_cuts_channels_and_never_adds_them(in_channels: int, kept: int) -> None:
    x = torch.randn(2, in_channels, 6, 6, dtype=torch.float64)
    silent = block(in_channels)
    with torch.no_grad():
        silent.conv2.conv.weight_g.zero_()
    expected = x[:, :kept] if kept else torch.zeros(2, 3, 6, 6, dtype=torch.float64)
    assert torch.equal(silent(x), expected)


def test_every_auxiliary_input_has_a_layer() -> None:
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    for aux_shape, kernel in {(3, 6, 6): 1, (5, 6, 6): 1, (3, 12, 12): 3, (3, 3, 3): 3}.items():
        made = block(3, aux_shape)
        aux = torch.randn(2, *aux_shape, dtype=torch.float64)
        assert made.aux_op.conv().shape[2:] == (kernel, kernel)
        assert not torch.allclose(made(x, aux), made(x, -aux))


def test_the_skips_are_a_queue_as_long_as_the_top_stage() -> None:
    """Two blocks at the top, one in each stage below: the last one is offered what the top's second block made."""
    torch.manual_seed(0)
    model = initialised(tiny())
    seen: list[tuple[torch.Tensor | None, torch.Tensor]] = []
    for stage in reversed(model.network.bottom_up):
        for part in stage.p_convs.blocks:
            part.register_forward_hook(lambda _, inputs, y: seen.append((inputs[1], y)))
    model.likelihood(model.transform(model.standard_normal(2)).features)
    offered, made = zip(*seen, strict=True)
    assert offered[:2] == (None, None)
    assert offered[2] is made[0]
    assert offered[3] is made[1]


@pytest.mark.parametrize(
    ("name", "std"),
    [("softplus", math.sqrt(1 + math.e)), ("tanh", math.exp(math.tanh(1) / 2)), ("none", math.exp(0.5))],
)
def test_the_std_of_an_output_of_one(name: str, std: float) -> None:
    model = tiny(log_variance=name).double().eval()
    for key, parameter in model.named_parameters():
        if "px2z" in key and key.endswith(("weight_g", "bias")):
            torch.nn.init.constant_(parameter, 1.0 if key.endswith("bias") else 0.0)
    top, *below = model.transform(model.standard_normal(2)).priors
    assert (top.std == 1).all()
    for prior in below:
        torch.testing.assert_close(prior.std, torch.full_like(prior.std, std))


# The passes.


@pytest.mark.parametrize("kind", ["biva", "lvae", "vae"])
def test_what_a_pass_met_can_be_used_again(kind: str) -> None:
    """Features and posteriors are values: no pass, and no use of them, changes what they lead to."""
    torch.manual_seed(0)
    model = initialised(tiny(kind=kind)).double()
    eps, other, noise = (model.standard_normal(3) for _ in range(3))
    images = torch.rand(3, 1, 8, 8, dtype=torch.float64).round()
    features, draw = model.transform(eps).features, model.encode(images, noise)
    first, drawn = model.likelihood(features).mean, model.trace(draw, 3).z
    model.likelihood(model.transform(other).features)
    model.infer(1 - images, noise=other)
    assert torch.equal(model.likelihood(features).mean, first)
    assert all(map(torch.equal, model.trace(draw, 3).z, drawn))
    # The same upper groups, twice, above other lower ones: the queue of skips that they fill is not used up.
    for lower in (other, noise, other):
        z = model.reparameterize([*eps[:-1], lower[-1]])
        assert all(map(torch.equal, z[:-1], model.reparameterize(eps)[:-1]))
    assert not torch.equal(model.decode(z).mean, first)
    assert torch.equal(model.decode(model.reparameterize(eps)).mean, first)


def test_both_sides_of_a_stage_are_independent_given_what_is_above() -> None:
    torch.manual_seed(0)
    model = initialised(tiny()).double()
    eps = model.standard_normal(2)
    moved = [e + 1 if group.name == "z2_td" else e for e, group in zip(eps, model.groups, strict=True)]
    before, after = model.transform(eps).priors, model.transform(moved).priors
    changed = [not torch.equal(a.mean, b.mean) for a, b in zip(before, after, strict=True)]
    assert changed == [False, False, False, True, True]


def test_observations() -> None:
    torch.manual_seed(0)
    grey, colours = torch.rand(2, 1, 8, 8), torch.rand(2, 3, 8, 8)
    binary = tiny().observe(grey)
    assert set(binary.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(tiny().observe(binary), binary)
    assert torch.equal(tiny(**wide_image("vae")).observe(colours), colours)
