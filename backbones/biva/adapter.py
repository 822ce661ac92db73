"""BIVA: the hierarchical VAE with bidirectional inference of Maaløe et al. (2019), and the LVAE and VAE of its code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import torch
from ebm_prior.backbones.biva import official
from ebm_prior.backbones.biva.network import Features, Network
from ebm_prior.backbones.biva.options import Architecture
from ebm_prior.backbones.biva_family.layers import fold_weight_norm, require_initialized
from ebm_prior.backbones.folding import FoldableBackbone
from ebm_prior.backbones.likelihoods import Bernoulli, LogisticMixture, binarize
from ebm_prior.backbones.options import record
from ebm_prior.backbones.safe_loading import load_file, load_json, load_pickle
from ebm_prior.backbones.state_dicts import weights_of
from torch import Tensor

from ebm_prior.compute.randomness import Generator
from ebm_prior.errors import CheckpointError, ConfigurationError
from ebm_prior.model.backbone import Draw, Gaussian, ImageDistribution, LatentGroup, PosteriorDraw
from ebm_prior.storage.skeleton import skeleton
from ebm_prior.storage.weights import check_state


class BIVA(FoldableBackbone[Network]):
    """BIVA, LVAE or VAE as a backbone; `load_official` reads the run folders of biva-pytorch.

    The keyword arguments are the fields of `biva_options.Architecture`: image_shape, likelihood and stages are
    required. Raises ConfigurationError for what cannot be built. By hand, for `ebm-prior pretrain --architecture`:

        {"image_shape": [1, 28, 28], "likelihood": "bernoulli", "stages": [
            {"blocks": [{"filters": 16, "kernel": 5, "stride": 2}], "latent": {"features": 16}},
            {"blocks": [{"filters": 16, "stride": 2}],              "latent": {"features": 12}},
            {"blocks": [{"filters": 16}],                           "latent": {"features": 8}}]}

    Groups are named after their stage, z1 at the image, and in BIVA below the top after their side: z2_td is drawn
    on the posterior's way down, z2_bu on its way up.

    Nothing is clamped. A std is exp(½ log variance). With the published log variance, a softplus, it is at least 1 and
    grows exponentially with the features. In trained networks the lower groups did not overflow in float32 at three
    times the size of ε ~ N(0, I), can overflow at ten times, and did at fifty times. pCN-Langevin rejects such
    proposals; Langevin ends in a DivergenceError. With log_variance "tanh" every std is between 0.6 and 1.65.
    """

    official_format: ClassVar[str] = (
        "the official format of BIVA is a folder with hyperparameters.p, config.json and model.pth"
    )
    official_options: ClassVar[tuple[str, ...]] = ("weights",)

    layout: ClassVar[torch.memory_format] = torch.contiguous_format  # channels last is no faster on the whole

    def __init__(self, **architecture: Any) -> None:
        super().__init__()
        a = record(Architecture, architecture)
        self.image_shape = a.shape
        self.architecture = asdict(a)
        self.discretised = a.likelihood == "logistic_mixture"
        self.network = Network(a)
        self.groups = tuple(
            LatentGroup(f"z{i}_{side}" if side else f"z{i}", head.shape)
            for i, stage in reversed(list(enumerate(self.network.bottom_up, start=1)))
            for side, head in zip(stage.sides, stage.heads, strict=True)
        )

    def top_down(self, draw: Draw, batch_size: int) -> Features:
        """The generator down to z1. The top prior has batch axis 1.

        The context of a draw is d, (B, C, H, W): the features from above, on which the prior depends; None at the top.
        """
        return self.running.generate(draw)

    def encode(self, images: Tensor, noise: Sequence[Tensor]) -> PosteriorDraw:
        """The posterior of observations. The bottom-up pass draws z_bu, and in BIVA and VAE also the top group.

        The other groups are drawn in the top-down pass. With zero noise a group takes its posterior mean, given the
        draws that it depends on.
        """
        a = self.network.architecture
        posteriors = self.running.encode(images if a.likelihood == "bernoulli" else 2 * images - 1, noise)
        if a.kind == "vae":
            z, log_q = zip(*(draw(None) for draw in posteriors), strict=True)
            return PosteriorDraw.given(list(z), log_q)

        def conditional(index: int, _: Gaussian, d: Tensor | None) -> tuple[Tensor, Tensor]:
            return posteriors[index](d)

        return PosteriorDraw(conditional)

    def likelihood(self, features: Features) -> ImageDistribution:
        """p(x | z): from z1 and the skips to the image."""
        parameters = self.running.image(features)
        if self.network.architecture.likelihood == "bernoulli":
            return Bernoulli(parameters)
        return LogisticMixture(parameters)

    def observe(self, images: Tensor, *, generator: Generator = None) -> Tensor:
        """Dynamic binarisation for the Bernoulli likelihood (binary images stay as they are); else the image itself."""
        if self.network.architecture.likelihood == "bernoulli":
            return binarize(images, generator=generator)
        return images

    def fold(self, network: Network) -> Network:
        """Weight norm is all that folds."""
        return fold_weight_norm(network)

    @classmethod
    def load_official(cls, path: Path, *, weights: str | None = None) -> BIVA:
        """Build the network from a run folder of biva-pytorch, in eval mode, running none of its code.

        Reads hyperparameters.p, config.json and model.pth, and no other file. weights: "plain" or "ema", where
        model.pth has both. Raises CheckpointError, and ConfigurationError for weights that it has not.
        """
        path = Path(path)
        if not path.is_dir():
            raise CheckpointError(f"{path} is not a folder, and {cls.official_format}")
        hyperparameters = load_pickle(path / "hyperparameters.p", "the architecture", official.WORDS)
        config = load_json(path / "config.json", "the training options")
        file = path / "model.pth"
        state = weights_of(load_file(file, "the weights"), file, "the weights", weights)
        try:
            model = skeleton(cls, official.translate(hyperparameters, config), state, path)
        except ConfigurationError as error:
            raise CheckpointError(f"{path}: {error}") from error
        check_state(state, model.network.state_dict(), file)
        model.to_empty(device="cpu")
        model.network.load_state_dict(state)
        require_initialized(model.network, path)
        model.data_name = None if config["dataset"] == "binmnist" else config["dataset"]  # binarised by itself
        return model.eval()
