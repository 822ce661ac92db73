"""Two-dimensional latents (§5.1, Fig. 2): a two-layer model of two digits, its posterior codes, and the prior's chain.

The chain starts in the Gaussian prior and should end on the modes of the posterior, in both layers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from ebm_prior.compute.randomness import Purpose, derived_generator
from ebm_prior.data.images import ImageSource
from ebm_prior.interfaces import SILENT, Progress
from ebm_prior.model.drawing import draw
from ebm_prior.model.energy import EnergyConfig
from ebm_prior.model.prior import EBMPrior
from ebm_prior.model.samplers import ChainState, SamplerConfig
from ebm_prior.pictures.grids import scatters
from ebm_prior.pictures.sheets import page
from ebm_prior.storage.registry import adapter, build
from ebm_prior.training.joint import train_jointly
from ebm_prior.training.joint_config import JointConfig
from ebm_prior.training.joint_loss import potential

PICTURE_EVERY = 10  # steps of the chain between its pictures
POSTERIOR, CHAIN = "orange", "royalblue"  # the paper's colours


class Transition(NamedTuple):
    """The points of Fig. 2, per latent group in generation order."""

    posterior: list[Tensor]  # codes of images by the inference network, (N, 2)
    steps: list[int]
    chain: list[list[Tensor]]  # at each of the steps, (N, 2)


def config_2d(*, iterations: int = 2_000, seed: int = 0) -> JointConfig:
    """K = 40 steps from the Gaussian prior at every iteration, as in §5.1.

    The energy takes part from the start. A hierarchical VAE alone would make z_2 Gaussian, so that f_2 learns nothing.
    """
    return JointConfig(
        iterations=iterations,
        evaluate_every=iterations,
        energy=EnergyConfig(hidden=64, vector_layers=2, joint=0, activation="leaky_relu", standardize=False),
        energy_learning_rate=3e-4,
        energy_from=0.0,
        prior_chain=SamplerConfig(proposals=1, kernel="pcn-langevin", steps=40, step_size=0.15),
        seed=seed,
    )


def train_2d(
    images: ImageSource, config: JointConfig, *, width: int = 8, sigma: float = 0.3, progress: Progress = SILENT
) -> EBMPrior:
    """Train a model of two layers with two latents each, jointly, on the CPU. progress: gets every step."""
    network = {"image_shape": list(images.shape), "latents": [2, 2], "width": width, "sigma": sigma}
    return train_jointly(build(adapter("shallow"), network, seed=config.seed), images, config, progress=progress)


def transition(
    prior: EBMPrior, images: ImageSource, sampler: SamplerConfig, *, n: int = 500, seed: int = 0
) -> Transition:
    """Posterior codes of n images, and n chains every `PICTURE_EVERY` steps from their start."""
    backbone = prior.backbone
    generator = derived_generator(seed, Purpose.LATENTS_2D)
    steps: list[int] = [0]
    chain: list[list[Tensor]] = []

    def propose() -> list[Tensor]:
        start = backbone.standard_normal(n, generator=generator)
        chain.append(backbone.reparameterize(start))
        return start

    def keep(step: int, state: ChainState, info: object) -> None:
        if (step + 1) % PICTURE_EVERY == 0:
            steps.append(step + 1)
            chain.append(backbone.reparameterize(state.eps))

    with torch.no_grad():
        draw(potential(backbone, prior.energy, "eps"), propose, sampler, generator, callback=keep)
        x = images.batch(torch.randperm(len(images), generator=generator)[:n])
        posterior = backbone.draw_posterior(backbone.observe(x, generator=generator), generator=generator)
    return Transition(posterior, steps, chain)


def picture_2d(shown: Transition) -> Image.Image:
    """A row of panels per layer, the top one first, and a column per step: posterior orange, chain blue."""
    layers = len(shown.posterior)
    panels = [
        (
            f"z_{layers - layer}, step {step}",
            [(POSTERIOR, shown.posterior[layer]), (CHAIN, latents[layer])],
        )
        for layer in range(layers)
        for step, latents in zip(shown.steps, shown.chain, strict=True)
    ]
    caption = (
        f"Orange: codes of {len(shown.posterior[0])} images. Blue: as many chains, which start at the Gaussian prior "
        "(step 0). Where the prior is learned, blue ends where orange is. One row per layer, the top one first."
    )
    return page("Posterior codes and chains of the prior", [[scatters(panels, columns=len(shown.steps))]], caption)
