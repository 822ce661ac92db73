"""A joint energy-based prior for pretrained hierarchical VAEs. See README.md."""

from pathlib import Path

from ebm_prior.model.backbone import Backbone, Gaussian, ImageDistribution, LatentGroup, Posterior, PosteriorDraw

# In a source checkout `backbones/` and `checkpoints/` lie beside this package (setup.cfg installs them inside it).
if (Path(__file__).parent.parent / "setup.cfg").exists():
    __path__.append(str(Path(__file__).parent.parent))

__version__ = "0.1.0"

__all__ = ["Backbone", "Gaussian", "ImageDistribution", "LatentGroup", "Posterior", "PosteriorDraw"]
