"""The public functions `fit` and `evaluate`: one call each, on images in any form, without files."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from ebm_prior.compute.isolation import isolated
from ebm_prior.compute.parallel import ALONE, Processes
from ebm_prior.data.forms import as_images
from ebm_prior.data.source import ImageSource
from ebm_prior.errors import ConfigurationError, described
from ebm_prior.evaluation.classifier import bundled_classifier, load_classifier
from ebm_prior.evaluation.evaluate import EvalConfig, Reference
from ebm_prior.evaluation.evaluate import evaluate as measured
from ebm_prior.evaluation.roles import add_refiner, with_steps
from ebm_prior.interfaces import SILENT, Callback, Images, Progress, Recorder
from ebm_prior.model.arguments import require_backbone
from ebm_prior.model.backbone import Backbone
from ebm_prior.model.prior import EBMPrior
from ebm_prior.settings import configured
from ebm_prior.testing.contract import check_foreign
from ebm_prior.training import fit as trainer
from ebm_prior.training.fit_config import FitConfig


@isolated(grad=True)
def fit(
    backbone: Backbone,
    images: Any,
    config: FitConfig | Mapping[str, Any] | None = None,
    *,
    energy: nn.Module | None = None,
    run: Recorder | None = None,
    progress: Progress = SILENT,
    on_evaluate: Callback | None = None,
    processes: Processes = ALONE,
) -> EBMPrior:
    """Train an energy-based prior p_α(z) ∝ exp(f(z)) p_β(z) on a frozen backbone (Eqs. 6, 10, 17; §5.2).

    Args:
        backbone: a pretrained hierarchical VAE in eval mode, from `load_backbone` or of an adapter of your own.
        images: training images (N, C, H, W) of the backbone's shape, uint8 or float in [0, 1]: a tensor, an array, a
            torch or Hugging Face data set (read lazily; items may be pairs or dictionaries), or `open_images(…)`.
        config: a FitConfig, or a dictionary of the settings that differ from the defaults: {"iterations": 500}.
        energy: a torch module of your own for f, from a list of (B, *group.shape) to (B,) nats, which must be 0 before
            training (`ebm_prior.model.own_energy`). None: the built-in heads.
        run: stores state and metrics, so that the fit can be resumed; a refiner that follows begins anew then.
        progress: shows the progress. on_evaluate: is called at each evaluation with {"iteration", "prior", …}.
        processes: several processes that share the parts of a batch.

    Returns:
        The prior with the best held-out gain, with a record of its training. Where one density ratio saturates, or the
        setting `refine` asks for it, a refiner is fitted too; it draws the samples if they are nearer to held-out ones.

    Raises:
        ConfigurationError: for arguments that make no sense.
        ContractError: for an adapter of your own that breaks the contract, as far as ten passes tell.
        DataError: for images that are not the backbone's, not in [0, 1], or not finite.
        DivergenceError: where training diverges a second time; the error's `kept` is the best prior before that.

    >>> prior = fit(backbone, images, {"iterations": 4, "batch_size": 16})
    >>> tuple(prior.sample(2, seed=1).images.shape)
    (2, 1, 8, 8)
    """
    require_backbone(backbone)
    settings = configured(FitConfig, config)
    source = as_images(images, backbone.image_shape)
    if not backbone.training:  # which is a mistake that the trainer names
        check_foreign(backbone, source)
    told: dict[str, Any] = {"progress": progress, "on_evaluate": on_evaluate, "processes": processes}

    def part(backbone: Backbone, config: FitConfig, run: Recorder | None = None) -> EBMPrior:
        fitted = trainer.fit(backbone, source, config, energy=energy, run=run, **told)
        if isinstance(source, ImageSource):
            fitted.record["data"]["fingerprint"] = source.fingerprint()  # by which `evaluate` recognises them
        return with_steps(fitted, source, config, processes, progress)

    prior = part(backbone, settings, run)
    add_refiner(prior, source, settings, partial(part, prior.backbone), processes, progress)
    return prior


@isolated(grad=True)
def evaluate(
    prior: EBMPrior,
    test_images: Any,
    train_images: Any = None,
    config: EvalConfig | Mapping[str, Any] | None = None,
    *,
    classifier: str | Path | None = None,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Measure how much closer a prior is to data and posterior than the backbone's own (as `ebm-prior eval` does).

    Args:
        prior: from `fit` or `load_prior`.
        test_images: images (N, C, H, W) that training has not seen, in any form that `fit` takes.
        train_images: other images of the same kind, for the floor of the distance to reconstructions; None takes 0.
        config: an EvalConfig, or a dictionary of the settings that differ from the defaults: {"samples": 2000}.
        classifier: the file of the classifier that gives the features of distances; None: the bundled one.
        progress: shows the progress.

    Returns:
        Plain numbers, ready for JSON: fd_*, fdrec_*, kid_* of "backbone", "prior" and "reconstruction", gap_closed*
        (shares), gain_nats with ess_fraction, auc_* of posterior against prior latents. "held_out": whether the test
        images are other images than those of the training; None where that is not known.

    Raises:
        ConfigurationError: for arguments that make no sense.
        DataError: for images that are not the backbone's, too few, or of a shape that no bundled network takes.

    >>> result = evaluate(prior, images, config={"samples": 32, "auc": False}, classifier=classifier)
    >>> sorted(result)[:4]
    ['acceptance', 'beyond_limit', 'data', 'ess_fraction']
    """
    if not isinstance(prior, EBMPrior):
        raise ConfigurationError(f"expected a prior, found {described(prior)}: fit or load_prior gives one")
    shape, settings = prior.backbone.image_shape, configured(EvalConfig, config)
    test = as_images(test_images, shape, name="test images")
    train = None if train_images is None else as_images(train_images, shape, name="training images")
    network = bundled_classifier(shape, test.name) if classifier is None else load_classifier(Path(classifier))
    device = next(prior.backbone.parameters()).device
    progress.stage("held-out images and backbone samples")
    reference = Reference(prior.backbone, test, network.to(device), settings, training_images=train)
    return {"held_out": _held_out(prior, test), **measured(prior, reference, progress=progress)}


def _held_out(prior: EBMPrior, images: Images) -> bool | None:
    """Whether a prior was trained on other images; None where it does not say on which."""
    trained_on = (prior.record.get("data") or {}).get("fingerprint")
    known = trained_on is not None and isinstance(images, ImageSource)
    return trained_on != images.fingerprint() if known else None  # type: ignore[attr-defined]
