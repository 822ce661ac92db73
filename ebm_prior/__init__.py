"""A joint energy-based prior for pretrained hierarchical VAEs: better samples and scores, no retraining of the VAE.

    from ebm_prior import FitConfig, fit, load_backbone, open_images
    backbone = load_backbone("nvae", "nvae_cifar.pt")
    prior = fit(backbone, open_images("cifar10"), FitConfig())
    images = prior.sample(64, seed=0).images

Fitting: fit, FitConfig. Priors: EBMPrior, SamplerConfig, load_prior, save_prior, evaluate. Backbones: load_backbone,
save_backbone. Images: open_images, from_dataset, interpolate. Your own VAE: Backbone, Gaussian, LatentGroup, Posterior,
PosteriorDraw, ImageDistribution, check_backbone. Every error is an EbmPriorError.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ebm_prior.api import evaluate as evaluate
    from ebm_prior.api import fit as fit
    from ebm_prior.data.images import from_dataset as from_dataset
    from ebm_prior.data.images import open_images as open_images
    from ebm_prior.errors import EbmPriorError as EbmPriorError
    from ebm_prior.model.backbone import Backbone as Backbone
    from ebm_prior.model.backbone import Gaussian as Gaussian
    from ebm_prior.model.backbone import ImageDistribution as ImageDistribution
    from ebm_prior.model.backbone import LatentGroup as LatentGroup
    from ebm_prior.model.backbone import Posterior as Posterior
    from ebm_prior.model.backbone import PosteriorDraw as PosteriorDraw
    from ebm_prior.model.interpolation import interpolate as interpolate
    from ebm_prior.model.prior import EBMPrior as EBMPrior
    from ebm_prior.model.samplers import SamplerConfig as SamplerConfig
    from ebm_prior.storage.checkpoint import load_backbone as load_backbone
    from ebm_prior.storage.checkpoint import load_prior as load_prior
    from ebm_prior.storage.checkpoint import save_backbone as save_backbone
    from ebm_prior.storage.checkpoint import save_prior as save_prior
    from ebm_prior.testing import check_backbone as check_backbone
    from ebm_prior.training.fit_config import FitConfig as FitConfig

# In a source checkout `backbones/` and `checkpoints/` lie beside this package (setup.cfg installs them inside it).
if (Path(__file__).parent.parent / "setup.cfg").exists():
    __path__.append(str(Path(__file__).parent.parent))

__version__ = "0.2.0"

# Where each public name lives. They are imported when they are first used, so that `import ebm_prior` stays light.
# There is no __all__, for with it help(ebm_prior) would be 2,000 lines: all classes with all that torch gives them.
# EBMPrior is taken from where its save and load are set.
_PLACES = {
    "fit": "api",
    "FitConfig": "training.fit_config",
    "EBMPrior": "storage.checkpoint",
    "SamplerConfig": "model.samplers",
    "interpolate": "model.interpolation",
    "load_backbone": "storage.checkpoint",
    "save_backbone": "storage.checkpoint",
    "load_prior": "storage.checkpoint",
    "save_prior": "storage.checkpoint",
    "open_images": "data.images",
    "from_dataset": "data.images",
    "evaluate": "api",
    "check_backbone": "testing",
    "EbmPriorError": "errors",
    "Backbone": "model.backbone",
    "Gaussian": "model.backbone",
    "ImageDistribution": "model.backbone",
    "LatentGroup": "model.backbone",
    "Posterior": "model.backbone",
    "PosteriorDraw": "model.backbone",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'ebm_prior' has no attribute {name!r}")
    return getattr(import_module(f"ebm_prior.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACES})
