"""The quick part of the contract kit: a fit looks at an adapter from outside before it begins, and at no other."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import broken_adapters as bad
import numpy as np
import pytest
import torch
from own_images import Own
from third_party import BottomUpVAE, DeepVAE, PlainVAE
from tiny_nvae import tiny
from toys import LinearGaussian, ToyConv
from workshop import SMALL_FIT, Workshop

from ebm_prior import api, fit
from ebm_prior.data.images import from_array
from ebm_prior.errors import ContractError
from ebm_prior.model.backbone import Backbone, Gaussian
from ebm_prior.testing import prior_path
from ebm_prior.testing.contract import check_backbone, check_foreign

STDS = {0.0: "not positive, found 0:", -1.0: "not positive, found -1:", 1e-30: "too small, found 1e-30:"}


def of_std(value: float, group: int) -> Backbone:
    backbone = bad.OfStd().eval()
    backbone.value, backbone.broken = value, group
    return backbone


def pictures(backbone: Backbone) -> Own:
    return Own(torch.rand(40, *backbone.image_shape, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("group", [0, 1])
@pytest.mark.parametrize("value", STDS)
def test_a_std_that_is_none(value: float, group: int) -> None:
    backbone = of_std(value, group)
    message = (
        rf"OfStd does not keep the backbone contract:\s.*prior std of group '{['z2', 'z1'][group]}' is {STDS[value]}"
    )
    with pytest.raises(ContractError, match=message) as error:
        fit(backbone, pictures(backbone), SMALL_FIT)
    assert "\n" not in str(error.value)
    with pytest.raises(ContractError, match=message):
        check_backbone(backbone)


def test_a_std_too_small_beside_its_mean_names_the_precision() -> None:
    for dtype, std in ((torch.float32, 1e-10), (torch.float64, 1e-18)):
        prior = Gaussian(torch.ones(1, 1, dtype=dtype), torch.full((1, 1), std, dtype=dtype))
        (said,) = prior_path._std("z", prior, torch.ones(1, 1, dtype=dtype))
        assert f"keeps nothing of ε in {str(dtype).removeprefix('torch.')}. " in said


@pytest.mark.parametrize("std", [1e-4, 1.5])
def test_a_std_that_is_one(std: float) -> None:
    check_foreign(of_std(std, 0), pictures(LinearGaussian()))


@pytest.mark.parametrize("value", STDS)
def test_the_command(value: float, workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    top_down = LinearGaussian.top_down

    def wrong(self: LinearGaussian, draw: Any, batch_size: int) -> Any:
        def given(index: int, prior: Any, context: Any) -> Any:
            return draw(index, prior._replace(std=torch.full_like(prior.std, value)) if index else prior, context)

        return top_down(self, given, batch_size)

    monkeypatch.setattr(LinearGaussian, "top_down", wrong)
    images, out = tmp_path / "images.npy", tmp_path / "run"
    np.save(images, np.random.default_rng(0).integers(0, 256, (40, 2, 2), dtype=np.uint8))
    said = workshop.error("fit", "--ckpt", workshop.folder / "linear.safetensors", "--data", images, "--out", out)
    assert f"the prior std of group 'z1' is {STDS[value]}" in said
    assert not out.exists()


QUICKLY = [
    (bad.WrongOrder, "met group 'z2' before 'z1'"),
    (bad.NeverDrawn, "ended without drawing 'z1'"),
    (bad.LogStd, "is it a log standard deviation"),
    (bad.GlobalNoise, "the prior path draws noise of its own"),
    (bad.StateLeftBehind, "encode leaves state behind"),
    (bad.MeanInMinusOneToOne, r"likelihood.mean lies in \[.*GaussianPixels: clip=True"),
    (bad.LogProbPerPixel, "sum over pixels"),
    (bad.ObserveIgnoresGenerator, "observe ignores its generator"),
    (bad.ComputesInFloat64, "likelihood.mean has dtype torch.float64"),
    (bad.SameNames, "names of the latent groups are not unique"),
]


@pytest.mark.parametrize(("broken", "message"), QUICKLY, ids=[broken.__name__ for broken, _ in QUICKLY])
def test_other_mistakes_that_it_finds(broken: type[Backbone], message: str) -> None:
    backbone = broken().eval()
    with pytest.raises(ContractError, match=message):
        check_foreign(backbone, pictures(backbone))


@pytest.mark.parametrize("build", [LinearGaussian, ToyConv, DeepVAE, PlainVAE, BottomUpVAE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_good_ones_pass_and_are_put_back(build: Callable[[], Backbone], dtype: torch.dtype) -> None:
    if build is LinearGaussian and dtype is torch.bfloat16:
        pytest.skip("its linear solve knows no bfloat16")
    torch.manual_seed(0)
    backbone, passes = build().eval().to(dtype), 0
    state = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    random, top_down = torch.get_rng_state(), backbone.top_down

    def counted(*given: Any) -> Any:
        nonlocal passes
        passes += 1
        return top_down(*given)

    backbone.top_down = counted  # type: ignore[method-assign]
    begun = time.process_time()
    check_foreign(backbone, pictures(backbone))
    assert time.process_time() - begun < 2
    assert passes <= 10
    assert torch.equal(random, torch.get_rng_state())
    assert all(parameter.requires_grad for parameter in backbone.parameters())
    assert all(torch.equal(tensor, state[name]) for name, tensor in backbone.state_dict().items())


def test_adapters_that_come_with_it_are_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = tiny()
    monkeypatch.setattr(type(backbone), "top_down", None)
    images = Own(torch.rand(2, *backbone.image_shape))
    check_foreign(backbone, images)
    assert images.asked == []


def test_a_fit_looks_once(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[Backbone] = []
    monkeypatch.setattr(api, "check_foreign", lambda backbone, images: looked.append(backbone))
    backbone = ToyConv().eval()
    fit(backbone, from_array(torch.rand(40, 8, 8).numpy()), SMALL_FIT)
    assert looked == [backbone]
