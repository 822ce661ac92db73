"""A prior on the bundled BIVA: standardised inputs of its heads, chains from extreme ε, draws."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import pytest
import torch
from ebm_prior.backbones.biva.adapter import BIVA
from small_fits import small
from torch import Tensor

from ebm_prior.data.images import ImageSource, open_images
from ebm_prior.errors import DivergenceError
from ebm_prior.evaluation.classifier import bundled_classifier
from ebm_prior.evaluation.evaluate import EvalConfig, Reference, evaluate
from ebm_prior.model.energy import Head
from ebm_prior.model.prior import EBMPrior
from ebm_prior.model.samplers import KERNELS, run_chain, start
from ebm_prior.runs.describe import list_backbones
from ebm_prior.storage.checkpoint import load_backbone, load_prior, prior_record, save_prior
from ebm_prior.testing.contract import check_backbone
from ebm_prior.training.fit import fit
from ebm_prior.training.objectives import gain

NAME = "biva_fashion_mnist"
PRIOR = Path(str(resources.files("ebm_prior.checkpoints"))) / f"{NAME}_prior.safetensors"


@pytest.fixture(scope="module")
def prior() -> EBMPrior:
    return load_prior(PRIOR)


@pytest.fixture(scope="module")
def images() -> ImageSource:
    return open_images("fashion-mnist-subset")


def posterior_latents(prior: EBMPrior, images: ImageSource, n: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = prior.backbone.observe(images.batch(range(n)), generator=generator)
    with torch.no_grad():
        return prior.backbone.draw_posterior(x, generator=generator)


def test_the_bundled_prior_finds_its_backbone_by_name_and_is_none_itself(prior: EBMPrior) -> None:
    assert prior_record(PRIOR)["backbone"]["checkpoint"] == NAME
    assert isinstance(prior.backbone, BIVA)
    rows = [(row["name"], row["adapter"], row["data"]) for row in list_backbones()["bundled"]]
    assert (NAME, "biva", "fashion-mnist/train") in rows
    assert not [name for name, *_ in rows if name.endswith("_prior")]


def test_the_bundled_biva_has_four_stages_and_mixes_vectors_with_maps(prior: EBMPrior) -> None:
    assert len(prior.backbone.architecture["stages"]) >= 4
    assert {len(group.shape) for group in prior.backbone.groups} == {1, 3}


def test_the_bundled_biva_keeps_the_backbone_contract() -> None:
    assert not check_backbone(load_backbone(None, NAME)).skipped


def test_the_bundled_prior_beats_the_backbones_on_held_out_latents(prior: EBMPrior) -> None:
    """By the gain in nats on images that it never saw, and by where its draws lie: between p_β and the posterior."""
    latents = posterior_latents(prior, open_images("fashion-mnist-subset", split="test"), 500)
    with torch.no_grad():
        before = prior.backbone.sample(2_000, generator=torch.Generator().manual_seed(1))
        after = prior.sample(64, seed=1)
        f_q, f_p, f_drawn = (prior.f(z) for z in (latents, before, after.z))
    assert after.images.isfinite().all()
    found = gain(f_q, f_p)
    assert found.nats > 0.3
    assert found.ess_fraction > 0.04
    assert float(f_drawn.mean() - f_p.mean()) > 0.5 * float(f_q.mean() - f_p.mean())


@pytest.mark.long
def test_the_bundled_prior_closes_most_of_the_gap(prior: EBMPrior) -> None:
    """What README.md says of 10,000 images, on the 2,000 that come with the package."""
    test = open_images("fashion-mnist-subset", split="test")
    config = EvalConfig(samples=len(test))
    reference = Reference(
        prior.backbone,
        test,
        bundled_classifier((1, 28, 28), "fashion-mnist"),
        config,
        training_images=open_images("fashion-mnist-subset"),
    )
    result = evaluate(prior, reference)
    assert result["gap_closed"] > 0.6
    assert result["gap_closed_rec"] > 0.8
    assert result["gain_nats"] > 1
    assert result["auc_after"] < 0.6 < result["auc_before"]


# Standardised inputs.


def standardised(prior: EBMPrior, latents: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Mean and std of what each head's network is given for these latents, per dimension or per channel."""
    found: list[tuple[Tensor, Tensor]] = []
    hooks = []
    for head in prior.energy.heads.values():
        assert isinstance(head, Head)

        def look(_: object, inputs: tuple[Tensor]) -> None:
            axes = [axis for axis in range(inputs[0].dim()) if axis != 1]
            found.append((inputs[0].mean(axes), inputs[0].std(axes)))

        hooks.append(head.body.register_forward_pre_hook(look))
    prior.f(latents)
    for hook in hooks:
        hook.remove()
    return found


def test_heads_see_standardised_latents_by_constants_that_the_file_holds(
    prior: EBMPrior, images: ImageSource, tmp_path: Path
) -> None:
    """σ ≥ 1 has these latents far from unit scale; the constants are the posterior's, and travel with the file."""
    latents = posterior_latents(prior, images, 1_000)
    assert max(float(z.std()) for z in latents) > 1.2
    fitted = fit(prior.backbone, images.subset(range(500)), small(iterations=1))
    save_prior(fitted, tmp_path / "prior.safetensors", checkpoint=NAME)
    for one in (prior, load_prior(tmp_path / "prior.safetensors")):
        for mean, std in standardised(one, latents):
            torch.testing.assert_close(mean, torch.zeros_like(mean), atol=0.25, rtol=0)  # 5 to 6 standard errors
            torch.testing.assert_close(std, torch.ones_like(std), atol=0.25, rtol=0)


# Far from typical ε.


def test_every_std_below_the_top_is_above_one(prior: EBMPrior) -> None:
    top, *below = prior.backbone.transform(prior.backbone.standard_normal(64)).priors
    assert (top.std == 1).all()
    assert min(float(p.std.min()) for p in below) > 1


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("scale", [3, 10, 100])
def test_chains_from_extreme_eps_stay_finite_or_are_reported(prior: EBMPrior, kernel: str, scale: float) -> None:
    """Never a silent NaN: a chain returns finite ε, z and f, or the run ends in a DivergenceError."""
    generator = torch.Generator().manual_seed(0)
    eps = [scale * e for e in prior.backbone.standard_normal(16, generator=generator)]
    step_size = torch.full((16,), 0.15 if kernel == "pcn-langevin" else 1e-3)
    try:
        state, acceptance, size = run_chain(
            KERNELS[kernel], start(prior.potential, eps), prior.potential, 5, step_size=step_size, generator=generator
        )
    except DivergenceError:
        assert scale > 3  # chains from where draws may lie are no divergence
        return
    assert scale < 100  # where the backbone overflows for all
    everything = [*state.eps, *prior.backbone.reparameterize(state.eps), state.value, acceptance, size]
    assert all(bool(part.isfinite().all()) for part in everything)
