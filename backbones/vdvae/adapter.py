"""VDVAE: the very deep hierarchical VAE of Child (2021), top-down with one posterior per group."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, ClassVar

import torch
from ebm_prior.backbones.folding import CellBackbone
from ebm_prior.backbones.likelihoods import LogisticMixture
from ebm_prior.backbones.options import record
from ebm_prior.backbones.vdvae import official
from ebm_prior.backbones.vdvae.folding import fold
from ebm_prior.backbones.vdvae.network import Features, Network
from ebm_prior.backbones.vdvae.options import Architecture
from ebm_prior.backbones.vdvae.pixels import CoarseMixture
from torch import Tensor

from ebm_prior.errors import AssumptionWarning, CheckpointError
from ebm_prior.model.backbone import Draw, Gaussian, ImageDistribution, LatentGroup, PosteriorDraw
from ebm_prior.storage.weights import check_state


class VDVAE(CellBackbone[Network]):
    """VDVAE as a backbone; `load_official` reads the .th files of its code.

    The keyword arguments are the fields of `options.Architecture`: enc_blocks, dec_blocks and data_set are required.
    Raises ConfigurationError for what cannot be built. Images are colour images of the side of the last decoder block.
    The likelihood of a model of 5 bits reduces images itself, while its encoder sees all of their 8.
    """

    discretised = True
    official_format: ClassVar[str] = (
        "the official format of VDVAE is a file of weights, X-model-ema.th or X-model.th, beside it X-log.jsonl or "
        "log.jsonl of the run, where there is one"
    )
    official_options = tuple(field.name for field in fields(Architecture))

    def __init__(self, **architecture: Any) -> None:
        super().__init__()
        a = record(Architecture, architecture)
        self.image_shape = (3, a.image_side, a.image_side)
        self.architecture = asdict(a)
        self.network = Network(a)
        count = len(a.decoder)
        self.groups = tuple(LatentGroup(f"z{count - i}", (a.zdim, side, side)) for i, (side, _) in enumerate(a.decoder))

    def top_down(self, draw: Draw, batch_size: int) -> Features:
        """The generator down to z1. A draw's context is the stream, (B, C, r, r).

        Until a draw has entered the stream, its batch axis and that of the priors is 1.
        """
        return self.running.decoder.generate(draw)

    def encode(self, images: Tensor, noise: Sequence[Tensor]) -> PosteriorDraw:
        """The bottom-up pass; then q(z_i | x, z_<i) as the groups are met."""
        network = self.running
        activations = network.encoder(images)

        def conditional(index: int, _: Gaussian, stream: Tensor) -> tuple[Tensor, Tensor]:
            q = network.posterior(index, activations, stream)
            z = q.mean + q.std * noise[index]
            return z, q.log_prob(z)

        return PosteriorDraw(conditional)

    def likelihood(self, features: Features) -> ImageDistribution:
        """p(x | z): the rest of the last block, gain and bias, and the last convolution."""
        bits, parameters = self.network.architecture.pixels.bits, self.running.decoder.image(features)
        return LogisticMixture(parameters) if bits == 8 else CoarseMixture(parameters, bits=bits)

    def fold(self, network: Network) -> Network:
        """See `vdvae.folding`."""
        return fold(network)

    @classmethod
    def load_official(cls, path: Path, **settings: Any) -> VDVAE:
        """Build the network from a .th file of the official code, raw or averaged weights, in eval mode.

        settings: fields of `Architecture`, which go before those of the run's log beside the file. Without either the
        file must have the shapes of a published configuration; that it was trained on the same data is then assumed,
        and said by an AssumptionWarning. Raises CheckpointError, and ConfigurationError for wrong settings.
        """
        if not os.path.isfile(path):
            raise CheckpointError(f"{path} is not a file, and {cls.official_format}")
        path = Path(path)
        state = official.read_state(path)
        architecture, source, assumed = official.describe(path, state, settings)
        with torch.device("meta"):  # nothing is allocated before the weights confirm the architecture
            model = cls(**asdict(architecture))
        check_state(state, model.network.state_dict(), path, architecture=f"architecture of {source}")
        model.to_empty(device="cpu")
        model.network.load_state_dict(state)  # copied from the mapped file
        model.data_name = architecture.data_set
        if assumed:
            warnings.warn(
                f"{path.name} has the shapes published for {architecture.data_set}: it is taken to be trained on these "
                "images, whose constants its encoder and likelihood get; if not, convert it with --set data_set=NAME",
                AssumptionWarning,
                stacklevel=2,
            )
        return model.eval()
