"""What pretraining can do on request: each option against the formula that it stands for."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from small_pretrainings import SMALL, losses
from torch import Tensor
from toys import LinearGaussian, ToyConv

from ebm_prior.data.images import ImageSource, from_array
from ebm_prior.errors import ConfigurationError
from ebm_prior.model.backbone import LatentGroup
from ebm_prior.reports.summaries import pretrain_summary
from ebm_prior.storage.weights import fingerprint
from ebm_prior.training import pretrain as stage
from ebm_prior.training.pretrain import Elbo, balance, pretrain
from ebm_prior.training.pretrain_config import PretrainConfig


def steps(kind: type[torch.optim.Optimizer], monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, Tensor, Tensor]]:
    """Of every step that an optimizer of this kind takes: the rate, the first weights' gradient and their move."""
    taken: list[tuple[float, Tensor, Tensor]] = []
    true_step = kind.step

    def step(self: Any, *arguments: Any) -> Any:
        weights = self.param_groups[0]["params"][0]
        before, gradient = weights.detach().clone(), weights.grad.clone()
        found = true_step(self, *arguments)
        taken.append((self.param_groups[0]["lr"], gradient, weights.detach() - before))
        return found

    monkeypatch.setattr(kind, "step", step)
    return taken


def test_adamax_divides_by_the_largest_gradient(images: ImageSource, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the first step: lr·g/(|g| + epsilon), with the weight decay in g."""
    taken = steps(torch.optim.Adamax, monkeypatch)
    backbone = ToyConv()
    with torch.no_grad():
        backbone.dense.weight *= 100  # so that a small decay counts
    start = backbone.dense.weight.detach().clone()
    options: dict[str, Any] = {"learning_rate": 1e-2, "weight_decay": 0.5, "epsilon": 1e-3}
    pretrain(backbone, images, PretrainConfig(**SMALL | {"iterations": 1}, optimizer="adamax", **options))
    rate, gradient, move = taken[0]
    g = gradient + 0.5 * start
    torch.testing.assert_close(move, -rate * g / (g.abs() + 1e-3), atol=1e-6, rtol=1e-3)


def test_adamw_decays_the_weights_beside_the_gradient(images: ImageSource, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the first step: lr·g/(|g| + epsilon) + lr·decay·w."""
    taken = steps(torch.optim.AdamW, monkeypatch)
    backbone = ToyConv()
    start = backbone.dense.weight.detach().clone()
    options: dict[str, Any] = {"learning_rate": 1e-2, "weight_decay": 0.5, "epsilon": 1e-3, "betas": (0.9, 0.8)}
    pretrain(backbone, images, PretrainConfig(**SMALL | {"iterations": 1}, optimizer="adamw", **options))
    rate, g, move = taken[0]
    torch.testing.assert_close(move, -rate * (g / (g.abs() + 1e-3) + 0.5 * start), atol=1e-6, rtol=1e-3)


def test_the_optimizer_forgets_as_fast_as_asked(images: ImageSource, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps of Adam, whose moments are averages with these decay rates, corrected for their start at 0."""
    taken = steps(torch.optim.Adam, monkeypatch)
    pretrain(ToyConv(), images, PretrainConfig(**SMALL | {"iterations": 2}, betas=(0.5, 0.25), decay=False))
    (rate, g, _), (_, h, move) = taken
    first, second = (0.25 * g + 0.5 * h) / 0.75, (0.1875 * g**2 + 0.75 * h**2) / 0.9375
    torch.testing.assert_close(move, -rate * first / (second.sqrt() + 1e-8), atol=1e-6, rtol=1e-3)


def test_steps_with_a_huge_gradient_are_left_out(images: ImageSource, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights and their average stay, the schedule goes on: the next small gradient has its own rate."""
    norms = iter([3.0, 8.0, 2.0, 7.9] * 2)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(next(norms)))
    taken = steps(torch.optim.Adam, monkeypatch)
    seen: list[Tensor] = []
    pretrain(
        ToyConv(),
        images,
        PretrainConfig(**SMALL | {"checkpoint_every": 1}, gradient_skip=8.0),
        on_evaluate=lambda found: seen.append(found["backbone"].dense.weight.detach().clone()),
    )
    cosine = [1e-3 * (1 + math.cos(math.pi * t / 8)) for t in range(8)]
    assert [rate for rate, *_ in taken] == pytest.approx([cosine[t] for t in (0, 2, 3, 4, 6, 7)])
    still = [bool((seen[t] == seen[t - 1]).all()) for t in range(1, 8)]
    assert still == [t % 4 == 1 for t in range(1, 8)]


def test_the_rate_rises_while_it_falls(images: ImageSource, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = steps(torch.optim.Adam, monkeypatch)
    pretrain(ToyConv(), images, PretrainConfig(**SMALL, learning_rate=2.0e-3, rate_warmup=0.5))
    cosine = [1e-3 * (1 + math.cos(math.pi * t / 8)) for t in range(8)]
    assert [rate for rate, *_ in taken] == pytest.approx(
        [c * rise for c, rise in zip(cosine, [0.25, 0.5, 0.75, 1, 1, 1, 1, 1], strict=True)]
    )


def test_the_rate_stays_on_request(images: ImageSource, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = steps(torch.optim.Adamax, monkeypatch)
    config = PretrainConfig(**SMALL, optimizer="adamax", learning_rate=2.0e-3, decay=False)
    pretrain(ToyConv(), images, config)
    assert [rate for rate, *_ in taken] == 8 * [2e-3]


def test_free_nats_can_be_each_images_own(images: ImageSource, monkeypatch: pytest.MonkeyPatch) -> None:
    """As BIVA has them: Σ_i mean_b max(KL_ib, free nats), at least as much as of the batch's mean."""
    config = PretrainConfig(iterations=2, batch_size=16, kl_warmup=0.0, free_nats=3.0, free_nats_per="image")
    for loss, log_p, kl in losses(config, images, monkeypatch):
        assert ((kl < 3).any(0) & (kl > 3).any(0)).any()  # of one group, some images are below and some above
        assert loss == pytest.approx(float(kl.clamp(min=3.0).sum(1).mean() - log_p.mean()), rel=1e-5)


def test_balance_charges_what_carries_more_and_spares_large_scales() -> None:
    shapes = [(4,), (3, 2, 2), (3, 2, 2), (3, 4, 4)]
    groups = [LatentGroup(f"z{i}", shape) for i, shape in enumerate(shapes)]
    kl = torch.tensor([[1.0, -2.0, 3.0, 8.0], [3.0, 2.0, 5.0, 8.0]], requires_grad=True)
    # mean |KL| = 2, 2, 4, 8, over 1 position for 1 group, 4 for 2 groups (twice), 16 for 1 group
    expected = torch.tensor([2.01 / 1, 2.01 / 2, 4.01 / 2, 8.01 / 16])
    found = balance(kl, groups)
    torch.testing.assert_close(found, expected / expected.mean())
    assert not found.requires_grad


def test_the_loss_is_balanced_while_beta_rises(images: ImageSource, monkeypatch: pytest.MonkeyPatch) -> None:
    groups = ToyConv().groups
    found = losses(PretrainConfig(**SMALL, kl_balance=True), images, monkeypatch)
    for (loss, log_p, kl), beta in zip(found, [0.25, 0.5, 0.75, 1, 1, 1, 1, 1], strict=True):
        weight = balance(kl, groups) if beta < 1 else torch.ones(3)
        assert loss == pytest.approx(float(beta * (weight * kl.mean(0)).sum() - log_p.mean()), rel=1e-5)


class Regularised(ToyConv):
    def regularization(self) -> Tensor:
        return self.dense.weight.square().sum()


def test_what_the_adapter_regularises_is_added(images: ImageSource, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an even gradient: with λ large, the weights that it pulls at fall, and the others do not follow."""
    plain = pretrain(Regularised(), images, PretrainConfig(**SMALL))
    pulled = pretrain(Regularised(), images, PretrainConfig(**SMALL, regularization=1e4))
    assert pulled.regularization() < plain.regularization()
    moved = (pulled.dense.weight - Regularised().dense.weight).abs()
    assert moved.min() > 5e-3  # eight steps of Adam, all one way
    assert not ToyConv().regularization()
    with pytest.raises(ConfigurationError, match="ToyConv has nothing to regularise"):
        pretrain(ToyConv(), images, PretrainConfig(**SMALL, regularization=0.1))


def test_flip_mirrors_half_of_the_images() -> None:
    backbone = LinearGaussian()
    pixels = torch.rand(400, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    source, order = from_array(pixels.numpy()), torch.arange(400)
    seen = stage._observed(backbone, source, order, torch.Generator().manual_seed(0), flip=True)
    mirrored = (seen == pixels.flip(3)).flatten(1).all(1)
    assert (mirrored ^ (seen == pixels).flatten(1).all(1)).all()
    assert 160 < int(mirrored.sum()) < 240
    assert torch.equal(stage._observed(backbone, source, order, torch.Generator()), pixels)


def test_training_mirrors_and_evaluation_does_not(images: ImageSource, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    true = stage._observed

    def spy(*arguments: Any, flip: bool = False) -> Tensor:
        asked.append(flip)
        return true(*arguments, flip=flip)

    monkeypatch.setattr(stage, "_observed", spy)
    pretrain(ToyConv(), images, PretrainConfig(**SMALL | {"iterations": 1}, flip=True), validation=images)
    assert asked[:2] == [True, True]  # where the data initialise, and the first step
    assert not any(asked[2:])


def test_channels_last_is_the_same_training_in_another_layout(images: ImageSource) -> None:
    config = PretrainConfig(**SMALL)
    plain = pretrain(ToyConv(), images, config)
    backbone = ToyConv()
    kept = pretrain(backbone, images, PretrainConfig(**SMALL, channels_last=True))
    for trained in (backbone, kept):
        assert trained.conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert fingerprint(kept) == fingerprint(copy.deepcopy(kept).to(memory_format=torch.contiguous_format))
    for name, weight in plain.state_dict().items():
        torch.testing.assert_close(kept.state_dict()[name], weight, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    "settings",
    [
        *({"optimizer": "sgd"}, {"rate_warmup": 2.0}, {"weight_decay": -1.0}),
        *({"epsilon": 0.0}, {"free_nats_per": "group"}),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=f"{next(iter(settings))}.*found"):
        PretrainConfig(**settings)
    with pytest.raises(ConfigurationError, match="regularization must be finite"):
        PretrainConfig(regularization=math.inf)


def test_bits_per_dimension_are_shown_where_they_mean_something() -> None:
    elbo = Elbo(-12 * math.log(2) * 3.5, -20.0, [1.0, 2.0])
    assert elbo.bits_per_dimension((3, 2, 2)) == pytest.approx(3.5)
    result = {"test_elbo": elbo._asdict(), "parameters": 7, "cpu_seconds": 60, "backbone": "b.safetensors"}
    assert "ELBO -29.11 nats, 3.500 bits per dimension (" in pretrain_summary(result | {"bits_per_dimension": 3.5})
    assert "ELBO -29.11 nats (" in pretrain_summary(result | {"bits_per_dimension": None})
