"""Interpolation: it ends at reconstructions, and every code on the way is as typical as the ends."""

from __future__ import annotations

import pytest
import torch
from ebm_prior.backbones.vdvae.adapter import VDVAE
from tiny_vdvae import FIXTURES, needs_fixtures
from torch import Tensor
from toys import ToyConv

from ebm_prior.compute.randomness import BlockGenerator, Purpose, derived_seed
from ebm_prior.errors import ConfigurationError
from ebm_prior.model.backbone import Backbone, Trace
from ebm_prior.model.interpolation import great_circle, interpolate


def images(backbone: Backbone, n: int) -> Tensor:
    dtype = next(backbone.parameters()).dtype
    return torch.rand(n, *backbone.image_shape, generator=torch.Generator().manual_seed(5), dtype=dtype)


def keeps_its_promises(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ends are reconstructions; norms of ε on the way lie on a line between theirs, and T_β makes z of them."""
    seen: list[list[Tensor]] = []
    transform = Backbone.transform

    def watched(self: Backbone, eps: list[Tensor], *, temperature: float = 1.0) -> Trace:
        seen.append(list(eps))
        return transform(self, eps, temperature=temperature)

    both = images(backbone, 4)
    monkeypatch.setattr(Backbone, "transform", watched)
    found = interpolate(backbone, both[:2], both[2:], steps=5, seed=3)
    assert found.shape == (2, 5, *backbone.image_shape)
    assert 0 <= found.min() <= found.max() <= 1
    generator = BlockGenerator(derived_seed(3, Purpose.PICTURE_POSTERIOR), 0, 4)
    with torch.no_grad():
        posterior = backbone.infer(backbone.observe(both, generator=generator), generator=generator)
        means = backbone.likelihood(posterior.features).mean
    torch.testing.assert_close(found[:, 0], means[:2], atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(found[:, 4], means[2:], atol=2e-5, rtol=2e-5)
    for group in range(len(backbone.groups)):
        norms = [eps[group].flatten(1).norm(dim=1) for eps in seen]
        torch.testing.assert_close(norms[2], (norms[0] + norms[4]) / 2)


def test_a_toy_keeps_its_promises(monkeypatch: pytest.MonkeyPatch) -> None:
    keeps_its_promises(ToyConv().double().eval(), monkeypatch)


@needs_fixtures
def test_a_vdvae_keeps_its_promises(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = VDVAE.load_official(FIXTURES / "cifar10-mini" / "model.th", data_set="cifar10")
    keeps_its_promises(backbone.requires_grad_(False), monkeypatch)


def test_what_cannot_be_interpolated_is_said() -> None:
    backbone = ToyConv().double().eval()
    both = images(backbone, 3)
    with pytest.raises(ConfigurationError, match="as many images"):
        interpolate(backbone, both[:1], both[1:])
    with pytest.raises(ConfigurationError, match="2 or more"):
        interpolate(backbone, both, both, steps=1)
    with pytest.raises(ConfigurationError, match="expected a backbone"):
        interpolate("hvae", both, both)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match=r"\[0, 1\]"):
        interpolate(backbone, both, 300 * both)


def test_great_circles_keep_to_the_shell() -> None:
    a, b = torch.randn(2, 5, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(great_circle(a, b, 0.0), a)
    torch.testing.assert_close(great_circle(a, b, 1.0), b)
    middle = great_circle(a, b, 0.5)
    norms = [e.flatten(1).norm(dim=1) for e in (a, middle, b)]
    torch.testing.assert_close(norms[1], (norms[0] + norms[2]) / 2)
    angle = [torch.nn.functional.cosine_similarity(x.flatten(1), middle.flatten(1)) for x in (a, b)]
    torch.testing.assert_close(angle[0], angle[1])
    torch.testing.assert_close(great_circle(a, 2 * a, 0.5), 1.5 * a)  # parallel: no circle, a straight line
