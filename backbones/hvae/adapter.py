"""HVAE: the bottom-up hierarchical VAE of Havtorn et al. (2021, "Hierarchical VAEs know what they don't know")."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import torch
from ebm_prior.backbones.biva_family.layers import fold_weight_norm, require_initialized
from ebm_prior.backbones.biva_family.paths import ACTIVATIONS, require_model_options
from ebm_prior.backbones.folding import FoldableBackbone
from ebm_prior.backbones.hvae import official
from ebm_prior.backbones.hvae.network import Features, Network, Options, stage_spec
from ebm_prior.backbones.likelihoods import binarize, dequantize
from ebm_prior.backbones.options import require_flag
from ebm_prior.backbones.safe_loading import load_plain, load_tensors
from torch import Tensor

from ebm_prior.compute.randomness import Generator
from ebm_prior.errors import CheckpointError, ConfigurationError
from ebm_prior.model.backbone import Draw, ImageDistribution, LatentGroup, PosteriorDraw
from ebm_prior.storage.weights import check_state


class HVAE(FoldableBackbone[Network]):
    """The HVAE of hvae-oodd as a backbone; `load_official` reads its run folders.

    image_shape: (C, H, W), square. likelihood: "bernoulli", or "logistic_mixture" (RGB).
    stages: from the image up, each {"blocks": [Block options, …], "latent": Latent options}; see `Block`, `Latent`.
    activation: a name of `ACTIVATIONS`. q_dropout, p_dropout: in inference and generator blocks, in train mode only.
    skips: whether blocks are offered auxiliary inputs. Raises ConfigurationError for what cannot be built.
    """

    official_format: ClassVar[str] = (
        "the official format of HVAE is a folder with model_kwargs.pt, model_class_name.pt and model_state_dict.pt"
    )

    def __init__(
        self,
        image_shape: Sequence[int],
        likelihood: str,
        stages: Sequence[Mapping[str, Any]],
        activation: str = "ReLU",
        q_dropout: float = 0.0,
        p_dropout: float = 0.0,
        skips: bool = True,
    ) -> None:
        super().__init__()
        self.image_shape = require_model_options(image_shape, likelihood, activation, q_dropout, p_dropout)
        if not stages:
            raise ConfigurationError("stages: expected at least one, found none")
        require_flag("skips", skips)
        self.discretised = likelihood == "logistic_mixture"
        specs = [stage_spec(stage) for stage in stages]
        self.architecture = {
            "image_shape": list(self.image_shape),
            "likelihood": likelihood,
            "stages": [{"blocks": [asdict(b) for b in s.blocks], "latent": asdict(s.latent)} for s in specs],
            "activation": activation,
            "q_dropout": q_dropout,
            "p_dropout": p_dropout,
            "skips": skips,
        }
        options = Options(ACTIVATIONS[activation], q_dropout, p_dropout, skips)
        self.network = Network(self.image_shape, likelihood, specs, options)
        shapes = [stage.stochastic.shape for stage in self.network.bottom_up]
        self.groups = tuple(LatentGroup(f"z{i + 1}", shape) for i, shape in enumerate(shapes))[::-1]

    def top_down(self, draw: Draw, batch_size: int) -> Features:
        """The generator down to z1. The top prior has batch axis 1; the context of every draw is None."""
        return self.running.generate(draw)

    def encode(self, images: Tensor, noise: Sequence[Tensor]) -> PosteriorDraw:
        """q(z1 | x) q(z2 | z1) …: samples bottom-up, at once. Zero noise gives a group's posterior mean."""
        z, log_q = (values[::-1] for values in self.running.encode(images, noise[::-1]))
        return PosteriorDraw.given(z, log_q)

    def likelihood(self, features: Features) -> ImageDistribution:
        """p(x | z): from z1 and the skips to the image."""
        return self.running.image(features)

    def observe(self, images: Tensor, *, generator: Generator = None) -> Tensor:
        """Dynamic binarisation for the Bernoulli likelihood, dequantisation for the mixture."""
        random = binarize if self.architecture["likelihood"] == "bernoulli" else dequantize
        return random(images, generator=generator)

    def fold(self, network: Network) -> Network:
        """Weight norm is all that folds."""
        return fold_weight_norm(network)

    @classmethod
    def load_official(cls, path: Path) -> HVAE:
        """Build the network from a run folder of hvae-oodd, in eval mode, running none of its code.

        Reads model_class_name.pt, model_kwargs.pt, model_state_dict.pt, datamodule_config.pt if that is there, and no
        other file. Raises CheckpointError.
        """
        path = Path(path)
        if not path.is_dir():
            raise CheckpointError(f"{path} is not a folder, and {cls.official_format}")
        name = load_plain(path / "model_class_name.pt", "the name of the model class")
        if name != "VAE":
            raise CheckpointError(f"expected the model class VAE in {path}, found {name!r}, which is not supported")
        kwargs = load_plain(path / "model_kwargs.pt", "the architecture")
        state = load_tensors(path / "model_state_dict.pt", "the weights")
        try:
            architecture = official.translate(kwargs)
            with torch.device("meta"):  # a corrupt architecture allocates nothing before the weights confirm it
                model = cls(**architecture)
        except ConfigurationError as error:
            raise CheckpointError(f"{path / 'model_kwargs.pt'}: {error}") from error
        check_state(state, model.network.state_dict(), path / "model_state_dict.pt")
        model.to_empty(device="cpu")
        model.network.load_state_dict(state)
        require_initialized(model.network, path)
        with suppress(CheckpointError):  # the network does not need this file
            model.data_name = official.data_name(load_plain(path / "datamodule_config.pt", "the data sets"))
        return model.eval()
