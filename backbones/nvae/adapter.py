"""NVAE: the deep hierarchical VAE of Vahdat & Kautz (2020), top-down with one posterior per group."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from ebm_prior.backbones.folding import CellBackbone
from ebm_prior.backbones.foreign_values import Arguments
from ebm_prior.backbones.likelihoods import Bernoulli, binarize
from ebm_prior.backbones.nvae import official
from ebm_prior.backbones.nvae.cells import BatchNorm, Conv2d
from ebm_prior.backbones.nvae.distributions import GaussianImage, NvaeMixture, reduce_bits
from ebm_prior.backbones.nvae.folding import fold
from ebm_prior.backbones.nvae.network import Architecture, Context, Features, Network
from ebm_prior.backbones.nvae.spectral import spectral_norms
from ebm_prior.backbones.options import record
from ebm_prior.backbones.safe_loading import load_file
from ebm_prior.backbones.state_dicts import completed, holds_weights, weights_of
from torch import Tensor

from ebm_prior.compute.randomness import Generator
from ebm_prior.errors import CheckpointError, ConfigurationError, few
from ebm_prior.model.backbone import Draw, Gaussian, ImageDistribution, LatentGroup, PosteriorDraw
from ebm_prior.storage.skeleton import skeleton
from ebm_prior.storage.weights import check_state

CHECKPOINT = "checkpoint.pt"
"""The name that the official code gives its file."""
ALIAS = ".weight_normalized"
"""End of the keys under which official files repeat the weights of convolutions without weight norm."""


class NVAE(CellBackbone[Network]):
    """NVAE as a backbone; `load_official` reads the checkpoints of its code and of VAEBM's.

    The keyword arguments are the fields of `nvae_network.Architecture`: image_shape, groups_per_scale and likelihood
    are required. Raises ConfigurationError for what cannot be built. Images have the size that the likelihood models:
    MNIST has 28 × 28 pixels, and the zeros with which the network was trained are added and removed inside.

    `infer` and `log_prob` take observations as `observe` returns them: binary for the Bernoulli likelihood, and at the
    model's own bit depth if that is below 8. Observing twice gives the same at reduced depth.
    """

    official_format: ClassVar[str] = (
        "the official format of NVAE is a checkpoint.pt, a dict with state_dict and args (an argparse.Namespace)"
    )
    official_options: ClassVar[tuple[str, ...]] = ("weights", *official.OPEN)

    def __init__(self, **architecture: Any) -> None:
        super().__init__()
        a = record(Architecture, architecture)
        channels, height, width = a.image_shape
        self.image_shape = (channels, height, width)
        self.architecture = asdict(a)
        self.discretised = a.likelihood == "logistic_mixture"
        self.network = Network(a)
        count = len(a.group_scales)
        self.groups = tuple(LatentGroup(f"z{count - i}", a.latent_shape(s)) for i, s in enumerate(a.group_scales))
        self.group_scales = tuple(a.group_scales)  # of each group: 0 for the highest resolution, S − 1 at the top

    def top_down(self, draw: Draw, batch_size: int) -> Features:
        """The generator down to z1. The top prior has batch axis 1; the context is None there, a `Context` below."""
        return self.running.generate(draw, batch_size)

    def encode(self, images: Tensor, noise: Sequence[Tensor]) -> PosteriorDraw:
        """Run the bottom-up pass, and draw z_i ~ q(z_i | x, z_<i) in the top-down pass: a Gaussian, then the flows.

        The flows preserve volume, so log q is the Gaussian's log density at the draw before the flows.
        """
        network = self.running
        features = network.encode(F.pad(images, [network.architecture.padding] * 4))

        def conditional(index: int, _: Gaussian, context: Context | None) -> tuple[Tensor, Tensor]:
            q = network.posterior(index, features, context)
            z = q.mean + q.std * noise[index]
            return network.flow(index, z), q.log_prob(z)

        return PosteriorDraw(conditional)

    def likelihood(self, features: Features) -> ImageDistribution:
        """p(x | z): the last combiner, the post-processing cells and the image head."""
        a, parameters = self.network.architecture, self.running.image(features)
        border = a.padding
        if border:
            parameters = parameters[:, :, border:-border, border:-border]
        if a.likelihood == "bernoulli":
            return Bernoulli(parameters)
        if a.likelihood == "gaussian":
            return GaussianImage(parameters, log_std_floor=a.log_std_floor)
        return NvaeMixture(parameters, bits=a.bits, colours=a.image_shape[0])

    def observe(self, images: Tensor, *, generator: Generator = None) -> Tensor:
        """Dynamic binarisation for the Bernoulli likelihood; else the model's bit depth."""
        a = self.network.architecture
        if a.likelihood == "bernoulli":
            return binarize(images, generator=generator)
        return images if a.bits == 8 else reduce_bits(images, a.bits)

    def fold(self, network: Network) -> Network:
        """See `nvae_folding`."""
        return fold(network)

    def regularization(self) -> Tensor:
        """The spectral regularisation of §3.2: Σ σ₁(W) over all convolutions plus Σ max |γ| over all batch norms.

        W is a convolution's weight as it is used (normed, masked), as a matrix (C_out, rest).
        """
        scales = [layer.weight.abs().max() for layer in self.batch_norms()]
        return spectral_norms(self.kernels()).sum() + torch.stack(scales).sum()

    # The terms of the regularisation in pretraining.

    def kernels(self) -> Iterator[Tensor]:
        """The weight of every convolution as it is used, (C_out, C_in/groups, K, K): normed, masked."""
        return (module.kernel() for module in self.network.modules() if isinstance(module, Conv2d))

    def batch_norms(self) -> Iterator[BatchNorm]:
        """Every batch-norm layer."""
        return (module for module in self.network.modules() if isinstance(module, BatchNorm))

    @classmethod
    def load_official(cls, path: Path, **options: Any) -> NVAE:
        """Build the network from a checkpoint of the official code, in eval mode.

        Reads the arguments and the weights; the optimizer's state, two thirds of the file, stays on disk. The file
        does not say which code trained a Gaussian decoder: log p(x | z) is NVAE's, and VAEBM's with log_std_floor −2
        (`ebm-prior convert --set log_std_floor=-2`).

        path: the file, or the folder with a checkpoint.pt. options: weights ("plain" or "ema", if the file has both),
        and image_shape, padding, likelihood and components, which replace the values concluded from the name of the
        data set or from the weights. Conclusions are reported by an AssumptionWarning. Raises CheckpointError, and
        ConfigurationError for wrong options.
        """
        path = Path(path)
        if os.path.isfile(path / CHECKPOINT):
            path = path / CHECKPOINT
        if not os.path.isfile(path):
            raise CheckpointError(f"{path} is not a file, and {cls.official_format}")
        content = load_file(path, "an NVAE checkpoint")
        args = content.get("args") if isinstance(content, dict) else None
        if not isinstance(args, (Arguments, dict)) or not holds_weights(content):
            found = (
                f"a dict of {few(sorted(map(str, content)))}" if isinstance(content, dict) else type(content).__name__
            )
            raise CheckpointError(f"expected an NVAE checkpoint in {path}, found {found}; {cls.official_format}")
        args = args if isinstance(args, dict) else vars(args)
        state = weights_of(content, path, "the weights", options.pop("weights", None))
        state = {key: tensor for key, tensor in state.items() if not key.endswith(ALIAS)}
        try:
            model = skeleton(cls, official.translate(args, state, options), state, path)
        except ConfigurationError as error:
            kind = ConfigurationError if options else CheckpointError
            raise kind(f"{path}: {error}") from error
        expected = model.network.state_dict()
        state = completed(state, expected)
        check_state(state, expected, path)
        model.data_name = args["dataset"] if isinstance(args.get("dataset"), str) else None
        # Copied from the mapped file. Assigned, for a module on meta has nothing to copy to.
        copies = {key: torch.empty_like(expected[key], device="cpu").copy_(tensor) for key, tensor in state.items()}
        model.network.load_state_dict(copies, assign=True)
        model.network.make_masks()
        return model.eval()
