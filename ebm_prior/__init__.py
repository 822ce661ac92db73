"""A joint energy-based prior for pretrained hierarchical VAEs: better samples and scores, no retraining of the VAE.

    from ebm_prior import FitConfig, fit, load_backbone, open_images
    backbone = load_backbone("nvae", "nvae_cifar.pt")
    prior = fit(backbone, open_images("cifar10"), FitConfig())
    images = prior.sample(64, seed=0).images

Fitting: fit, FitConfig. Priors: EBMPrior, SamplerConfig, load_prior, save_prior, evaluate. Backbones: load_backbone,
save_backbone. Images: open_images, from_dataset. Your own VAE: Backbone, Gaussian, LatentGroup, Posterior,
PosteriorDraw, ImageDistribution, check_backbone. Every error is an EbmPriorError.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ebm_prior.data.images import from_dataset, open_images
    from ebm_prior.errors import EbmPriorError
    from ebm_prior.evaluation.evaluate import evaluate
    from ebm_prior.model.backbone import (
        Backbone,
        Gaussian,
        ImageDistribution,
        LatentGroup,
        Posterior,
        PosteriorDraw,
    )
    from ebm_prior.model.prior import EBMPrior
    from ebm_prior.model.samplers import SamplerConfig
    from ebm_prior.storage.checkpoint import load_backbone, load_prior, save_backbone, save_prior
    from ebm_prior.testing import check_backbone
    from ebm_prior.training.fit import fit
    from ebm_prior.training.fit_config import FitConfig

# In a source checkout `backbones/` and `checkpoints/` lie beside this package (setup.cfg installs them inside it).
if (Path(__file__).parent.parent / "setup.cfg").exists():
    __path__.append(str(Path(__file__).parent.parent))

__version__ = "0.1.0"

# Where each public name lives. They are imported when they are first used, so that `import ebm_prior` stays light.
_PLACES = {
    "fit": "training.fit",
    "FitConfig": "training.fit_config",
    "EBMPrior": "model.prior",
    "SamplerConfig": "model.samplers",
    "load_backbone": "storage.checkpoint",
    "save_backbone": "storage.checkpoint",
    "load_prior": "storage.checkpoint",
    "save_prior": "storage.checkpoint",
    "open_images": "data.images",
    "from_dataset": "data.images",
    "evaluate": "evaluation.evaluate",
    "check_backbone": "testing",
    "EbmPriorError": "errors",
    "Backbone": "model.backbone",
    "Gaussian": "model.backbone",
    "ImageDistribution": "model.backbone",
    "LatentGroup": "model.backbone",
    "Posterior": "model.backbone",
    "PosteriorDraw": "model.backbone",
}

__all__ = [
    "Backbone",
    "EBMPrior",
    "EbmPriorError",
    "FitConfig",
    "Gaussian",
    "ImageDistribution",
    "LatentGroup",
    "Posterior",
    "PosteriorDraw",
    "SamplerConfig",
    "check_backbone",
    "evaluate",
    "fit",
    "from_dataset",
    "load_backbone",
    "load_prior",
    "open_images",
    "save_backbone",
    "save_prior",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'ebm_prior' has no attribute {name!r}")
    return getattr(import_module(f"ebm_prior.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
