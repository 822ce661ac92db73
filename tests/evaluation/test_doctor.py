"""The doctor's numbers against closed forms and known diseases, and what it says of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from toys import GaussianImage, LinearGaussian, ToyConv
from workshop import Workshop

from ebm_prior.data.images import ImageSource, from_array
from ebm_prior.errors import ConfigurationError, DataError
from ebm_prior.evaluation.doctor import DoctorConfig, examine, verdict
from ebm_prior.evaluation.gauge import GaugeConfig
from ebm_prior.model.backbone import Backbone, Draw, Gaussian, LatentGroup, PosteriorDraw
from ebm_prior.model.energy import EnergyConfig
from ebm_prior.reports.findings import doctor_card

GAUGE = GaugeConfig(
    energy=EnergyConfig(channels=4, hidden=16, joint=8, conditional=False), iterations=30, batch_size=64
)
CONFIG = DoctorConfig(samples=600, gauge=GAUGE)


def drawn(backbone: LinearGaussian, n: int) -> ImageSource:
    """Images of the model itself: its exact posterior's aggregate is then its prior."""
    generator = torch.Generator().manual_seed(0)
    images = backbone.decode(backbone.sample(n, generator=generator)).sample(generator=generator)
    return from_array(images.detach().clamp(0, 1).numpy(), name="own")


@pytest.fixture(scope="module")
def healthy() -> dict[str, Any]:
    backbone = LinearGaussian().eval()
    return examine(backbone, drawn(backbone, 600), CONFIG)


class Collapsed(LinearGaussian):
    """z2 is not inferred: its posterior is its prior. z1 is inferred as if it were two standard deviations higher."""

    def encode(self, images: Tensor, noise: Sequence[Tensor]) -> PosteriorDraw:
        inner = super().encode(images, noise)

        def conditional(index: int, prior: Any, context: Any) -> tuple[Tensor, Tensor]:
            if index == 0:
                z = (prior.mean + prior.std * noise[0]).expand(len(images), -1)
                return z, prior.log_prob(z)
            z, log_q = inner._conditional(index, prior, context)
            return z + 2 * prior.std, log_q

        return PosteriorDraw(conditional)


def test_a_model_of_its_own_images_has_no_hole(healthy: dict[str, Any]) -> None:
    assert healthy["worth_a_head"] == []
    assert "No prior hole" in healthy["verdict"]
    for row in healthy["groups"]:
        assert row["eps_mean_rms"] < 0.15
        assert row["eps_variance"] == pytest.approx(1, abs=0.12)
        assert row["auc"] < 0.53
    assert [row["units"] for row in healthy["groups"]] == [2, 3]
    assert healthy["groups"][0]["std_low"] == healthy["groups"][0]["std_high"] == 1


def test_kl_is_the_exact_posteriors(healthy: dict[str, Any]) -> None:
    """log q − log p of an exact posterior is E[log p(x|z)] − log p(x), summed over the groups."""
    backbone = LinearGaussian().eval()
    images = drawn(backbone, 600).batch(range(600))
    with torch.no_grad():
        posterior = backbone.infer(images, generator=torch.Generator().manual_seed(3))
        expected = (backbone.likelihood(posterior.features).log_prob(images) - backbone.evidence(images)).mean()
    assert sum(row["kl_nats"] for row in healthy["groups"]) == pytest.approx(float(expected), abs=0.15)


def test_diseases_are_named() -> None:
    backbone = Collapsed().eval()
    found = examine(backbone, drawn(backbone, 600), CONFIG)
    top, bottom = found["groups"]
    assert top["kl_nats"] == pytest.approx(0, abs=1e-6)
    assert top["active_units"] == 0
    assert bottom["active_units"] > 0
    assert bottom["eps_mean_rms"] == pytest.approx(2, abs=0.2)
    assert bottom["auc"] > 0.9
    assert found["worth_a_head"] == ["z1"]
    assert "Worth a head: z1 " in found["verdict"]
    assert "Nearly silent (KL below 0.1 nats): z2." in found["verdict"]


def test_numbers_that_are_not_finite_are_counted() -> None:
    backbone = LinearGaussian().eval()
    images = drawn(backbone, 200)
    with torch.no_grad():
        backbone.b[0] = float("nan")
    found = examine(backbone, images, CONFIG)
    assert found["not_finite"]["weights"] == 1
    assert found["not_finite"]["prior draws"] == 200
    assert found["verdict"].startswith("Broken")
    assert "1 in weights" in doctor_card(found)


def test_dropout_and_batch_norm_are_seen() -> None:
    backbone = ToyConv()
    backbone.extra = nn.Sequential(nn.BatchNorm2d(2), nn.Dropout(0.3))
    backbone.extra[0].running_var.copy_(torch.tensor([0.5, 4.0]))
    backbone.eval()
    source = from_array(np.random.default_rng(0).integers(0, 255, (60, 8, 8), dtype=np.uint8))
    small = DoctorConfig(samples=60, gauge=GaugeConfig(energy=GAUGE.energy, iterations=2, batch_size=8))
    found = examine(backbone, source, small)
    assert (found["batch_norms"], found["dropout_layers"], found["dropout_largest"]) == (1, 1, 0.3)
    assert found["running_variance"] == [0.5, 4.0]
    assert not found["training_mode"]
    assert examine(backbone, source, small) == found  # the same call, the same numbers
    backbone.extra.train()
    assert "training mode" in examine(backbone, source, small)["verdict"]


def test_what_is_said_follows_the_auc() -> None:
    def said(overall: float, *groups: float, high: float = 0.52) -> str:
        rows = [{"group": f"g{i}", "auc": auc, "kl_nats": 1.0} for i, auc in enumerate(groups)]
        result = {"not_finite": {}, "groups": rows, "auc": overall, "training_mode": False}
        result["null"] = {"low": 0.48, "high": high}
        return str(verdict(result)["verdict"])

    assert "an energy can fill" in said(0.7, 0.6, 0.5)
    assert "Worth a head: g0 (AUC up to 0.600 alone)." in said(0.7, 0.6, 0.5)
    assert "Worth a head: g0 " in said(0.484, 0.6, 0.5)
    assert "No prior hole" in said(0.484, 0.6, 0.5, high=0.61)
    assert "two samples of the prior itself give 0.480 to 0.610" in said(0.62, 0.5, high=0.61)
    assert "blunt" in said(0.484, 0.6, 0.5, high=0.61)
    assert "blunt" not in said(0.5, 0.5)
    assert "goes on in stages" in said(0.99, 0.98)
    assert "which the joint head sees" in said(0.6, 0.5, 0.5)
    assert "No prior hole" in said(0.51, 0.5)


class Deep(Backbone):
    """An untrained network of 32 groups: whatever the image, its posterior is its prior."""

    image_shape = (1, 4, 4)

    def __init__(self, shift: float = 0.0) -> None:
        super().__init__()
        self.architecture: dict[str, Any] = {}
        self.groups = tuple(LatentGroup(f"z{i}", (2,)) for i in range(32, 0, -1))
        self.scale, self.shift = nn.Parameter(torch.ones(())), shift

    def top_down(self, draw: Draw, batch_size: int) -> Tensor:
        z = self.scale.new_zeros(batch_size, 2)
        for index in range(32):
            z = draw(index, Gaussian(0.5 * z, torch.ones_like(z) * self.scale), None)
        return z

    def encode(self, images: Tensor, noise: Sequence[Tensor]) -> PosteriorDraw:
        def conditional(index: int, prior: Gaussian, context: Any) -> tuple[Tensor, Tensor]:
            mean = prior.mean + (self.shift if index == 3 else 0) * prior.std
            z = mean + prior.std * noise[index]
            return z, Gaussian(mean, prior.std).log_prob(z)

        return PosteriorDraw(conditional)

    def likelihood(self, features: Tensor) -> GaussianImage:
        return GaussianImage(features.mean(1)[:, None, None, None].sigmoid().expand(-1, 1, 4, 4), 0.1)


def deep(shift: float, pairs: int) -> dict[str, Any]:
    source = from_array(np.random.default_rng(0).integers(0, 255, (40, 4, 4), dtype=np.uint8))
    energy = EnergyConfig(channels=4, hidden=8, vector_layers=1, joint=4, conditional=False)
    gauge = GaugeConfig(energy, iterations=6, batch_size=16, learning_rate=2e-2, evaluate_every=3)
    return examine(Deep(shift).eval(), source, DoctorConfig(samples=40, gauge=gauge, pairs=pairs))


def test_chance_among_many_groups_is_no_hole() -> None:
    """Of 32 AUCs over 40 images some are far above .5, whatever is measured."""
    found = deep(0.0, 3)
    assert max(row["auc"] for row in found["groups"]) > 0.53  # which was once the limit
    assert found["worth_a_head"] == []
    assert found["verdict"].startswith("No prior hole in sight")
    assert found["null"]["low"] < 0.5 < found["null"]["high"]
    assert f"{found['null']['low']:.3f} to {found['null']['high']:.3f} (3 pairs" in doctor_card(found)


def test_a_hole_among_many_groups_is_found() -> None:
    """Three standard deviations in z29, of which z28 inherits half."""
    found = deep(3.0, 1)
    assert found["worth_a_head"] == ["z29", "z28"]
    assert "Worth a head: z29, z28 " in found["verdict"]


def test_too_little_is_refused() -> None:
    backbone = LinearGaussian().eval()
    with pytest.raises(DataError, match="at least 40 images"):
        examine(backbone, drawn(backbone, 20), CONFIG)
    with pytest.raises(ConfigurationError, match="samples must be 40 or more, found"):
        DoctorConfig(samples=10)


def test_the_command(workshop: Workshop) -> None:
    words = ["doctor", "--ckpt", workshop.backbone, "--data-root", workshop.data_root, "--gauge-iterations", 2]
    result = json.loads(workshop.run(*words, "--json").stdout)
    assert result["data"] == "mnist/test"
    assert [row["group"] for row in result["groups"]] == ["dense", "point", "conv"]
    text = workshop.run(*words).stdout
    assert "60 images of mnist/test" in text
    assert "prior hole" in text
