"""The backbone contract: a hierarchical VAE as a top-down program that visits its latent groups one after another.

An adapter writes this program once (`Backbone.top_down`). The caller decides through the function `draw` which value
each group takes, so all passes below are the same traversal with different draws:

    sample the prior       mean + t·std·ξ
    T_β  (Eqs. 28-29)      mean + t·std·ε_i, with ε given
    T_β⁻¹, log p_β(z)      the given z_i; record (z_i − mean)/std and the log density
    posterior sample       what `encode(images)` returned

Conventions: lists run over the latent groups in generation order (index 0 is the TOP group, the paper's z_L); an entry
has shape (B, *group.shape); B is the batch; densities are in nats; images are float (B, C, H, W) in [0, 1].
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ebm_prior.compute.isolation import require_numbers, require_precision
from ebm_prior.compute.randomness import Generator, standard_normal
from ebm_prior.errors import CheckpointError, ConfigurationError, ContractError, described, few, shown
from ebm_prior.model.latents import batch_of, require_latents

BUILT_IN = "ebm_prior.backbones."  # the package whose modules have the adapters that come with ebm-prior


class LatentGroup(NamedTuple):
    """One latent group z_i: its name and the shape of one draw, (C, H, W) or (D,), without the batch axis.

    >>> LatentGroup("z2", (16,)).shape
    (16,)
    """

    name: str
    shape: tuple[int, ...]


class Gaussian(NamedTuple):
    """A diagonal Gaussian, which an adapter's `top_down` passes to `draw`; `mean` and `std` broadcast to (B, *shape).

    >>> Gaussian(torch.zeros(1, 2), torch.ones(1, 2)).log_prob(torch.zeros(3, 2)).shape  # nats
    torch.Size([3])
    """

    mean: Tensor
    std: Tensor

    def standardize(self, z: Tensor) -> Tensor:
        """ε = (z − mean)/std, of z's shape."""
        return (z - self.mean) / self.std

    def log_prob(self, z: Tensor) -> Tensor:
        """Log density of z (B, *shape) in nats, summed over all axes but the first: (B,)."""
        element = -0.5 * self.standardize(z) ** 2 - self.std.log() - 0.5 * math.log(2 * math.pi)
        return element.expand_as(z).flatten(1).sum(1)


Draw = Callable[[int, Gaussian, Any], Tensor]
"""(group index, its prior p(z_i | z_<i), the adapter's own context) -> z_i of shape (B, *group.shape)."""


class PosteriorDraw:
    """The result of `encode`: a Draw of z_i ~ q(z_i | x, z_<i), which records log q_i (B,) as groups are visited.

    `conditional(i, prior, context)` returns z_i (B, *shape) and log q_i (B,).

    >>> draw = PosteriorDraw(lambda i, prior, context: (prior.mean, prior.log_prob(prior.mean)))
    >>> draw(0, Gaussian(torch.zeros(3, 2), torch.ones(3, 2)), None).shape, draw.log_q[0].shape
    (torch.Size([3, 2]), torch.Size([3]))
    """

    z: list[Tensor] | None = None  # all latents, if the encoder has drawn them before the top-down pass

    def __init__(self, conditional: Callable[[int, Gaussian, Any], tuple[Tensor, Tensor]]) -> None:
        self._conditional = conditional
        self.log_q: list[Tensor] = []

    @classmethod
    def given(cls, z: list[Tensor], log_q: Sequence[Tensor]) -> PosteriorDraw:
        """The draw of a bottom-up encoder, which already has z_i (B, *shape) and log q_i (B,) of every group."""
        draw = cls(lambda index, prior, context: (z[index], log_q[index]))
        draw.z = z
        return draw

    def __call__(self, index: int, prior: Gaussian, context: Any) -> Tensor:
        z, log_q = self._conditional(index, prior, context)
        self.log_q.append(log_q)
        return z


class ImageDistribution(Protocol):
    """p(x | z): what `Backbone.likelihood` returns.

    >>> z = backbone.sample(2)
    >>> backbone.decode(z).mean.shape  # in [0, 1]
    torch.Size([2, 1, 8, 8])
    """

    @property
    def mean(self) -> Tensor:
        """The expected image, (B, C, H, W) in [0, 1]."""

    def log_prob(self, images: Tensor) -> Tensor:
        """log p(x | z) in nats of images (B, C, H, W), summed over pixels: (B,)."""

    def sample(self, *, generator: Generator = None) -> Tensor:
        """One image per batch entry, (B, C, H, W) in [0, 1]."""


class Posterior(NamedTuple):
    """One posterior draw z ~ q(z | x) for a batch of images, with its densities in nats.

    >>> posterior = backbone.infer(images.batch([0, 1]))
    >>> posterior.log_q.shape, [tuple(z.shape) for z in posterior.z]
    (torch.Size([2, 3]), [(2, 4), (2, 2, 1, 1), (2, 3, 4, 4)])
    """

    z: list[Tensor]
    eps: list[Tensor]
    log_q: Tensor  # (B, L)
    log_p: Tensor  # (B, L): log p_β(z_i | z_<i)
    features: Any  # for `Backbone.likelihood`


class Trace(NamedTuple):
    """The results of one traversal: the latents, their conditional priors, and the features at its end."""

    z: list[Tensor]
    priors: list[Gaussian]
    features: Any

    @property
    def eps(self) -> list[Tensor]:
        """The standardised latents T_β⁻¹(z)."""
        return [prior.standardize(z) for prior, z in zip(self.priors, self.z, strict=True)]

    @property
    def log_prior(self) -> Tensor:
        """log p_β(z_i | z_<i), (B, L) nats."""
        return torch.stack([prior.log_prob(z) for prior, z in zip(self.priors, self.z, strict=True)], dim=1)


class Backbone(nn.Module, ABC):
    """A hierarchical VAE behind the contract. Subclass it, implement the three abstract methods, register the class.

    An adapter sets `groups`, `image_shape` and `architecture`. `Adapter(**architecture)` must build the same network
    and `architecture` must be JSON-serialisable, because the safetensors file of a backbone holds it with the state
    dict. On the prior path an adapter detaches nothing, draws no noise of its own, and clamps nothing that its density
    does not clamp. `ebm_prior.testing.check_backbone` checks all of this.

    >>> eps = backbone.standardize(backbone.sample(2))  # T_β⁻¹(z), a list of (B, *group.shape)
    >>> backbone.reparameterize(eps)[0].shape  # T_β (Eqs. 28-29)
    torch.Size([2, 4])
    """

    groups: tuple[LatentGroup, ...]
    image_shape: tuple[int, int, int]
    architecture: Mapping[str, Any]
    # Whether p(x | z) is a distribution over images of a fixed bit depth. If so, ELBOs are also shown in bits/dim.
    discretised: bool = False
    data_name: str | None = None  # the data set that an official file names as its training data
    checkpoint: str | None = None  # where `load_backbone` found it: an absolute path, or a bundled name
    official_format: ClassVar[str] = "this adapter reads no foreign checkpoint format"
    official_options: ClassVar[tuple[str, ...]] = ()  # keywords of `load_official`, for what official files do not say

    @abstractmethod
    def top_down(self, draw: Draw, batch_size: int) -> Any:
        """Run the generator to the last group: call `draw` once per group, in order, and never run the image head.

        Args:
            draw: called as draw(group index, prior, context); returns z_i of shape (B, *group.shape).
            batch_size: B. A prior that depends on no other group, as the top one, may have batch axis 1 instead.

        Returns:
            The features from which `likelihood` makes an image distribution.
        """

    @abstractmethod
    def encode(self, images: Tensor, noise: Sequence[Tensor]) -> PosteriorDraw:
        """The posterior of `images` (B, C, H, W) as a draw.

        `noise`: one standard normal (B, *group.shape) per group, in generation order. It is an argument here because
        bottom-up encoders sample before the top-down pass.
        """

    @abstractmethod
    def likelihood(self, features: Any) -> ImageDistribution:
        """The image head: p(x | z) from the features that `top_down` returned."""

    def observe(self, images: Tensor, *, generator: Generator = None) -> Tensor:
        """The observation that the likelihood models, of the shape of `images`: binarised or dequantised, say.

        The default returns `images` unchanged. `generator`: source of any randomness.
        """
        return images

    @property
    def precision(self) -> str:
        """The precision of computation under its command-line name: float32, float64 or bf16."""
        return str(next(self.parameters()).dtype).removeprefix("torch.")

    def for_inference(self, *, cells: torch.dtype | None = None) -> Backbone:
        """A frozen backbone that computes the same function faster, for priors and fits. Default: the backbone itself.

        It has the same state dict, and so the same file and fingerprint, but need not follow later changes of weights.
        `cells`: a lower precision for the network's cells, which changes results. Raises ConfigurationError where the
        adapter does not support it.
        """
        if cells is not None:
            raise ConfigurationError(
                f"{type(self).__name__} has no cells that run in {cells}: leave the precision as is"
            )
        return self

    def checkpointing(self) -> Backbone:
        """The backbone `for_inference` with gradient checkpointing: less memory in a backward pass, equal results.

        Raises ConfigurationError where the adapter has no checkpointing.
        """
        raise ConfigurationError(f"{type(self).__name__} has no checkpointing: leave out --checkpointing")

    def compiled(self) -> Backbone:
        """The backbone `for_inference` with parts compiled by torch.compile: equal up to rounding, slow at first.

        Raises ConfigurationError where the adapter has nothing to compile.
        """
        raise ConfigurationError(f"{type(self).__name__} has nothing to compile: leave out --compile")

    def for_training(self, *, cells: torch.dtype | None = None, compiled: bool = False) -> Backbone:
        """A backbone of the same tensors as this one, in train mode, for the steps of a training.

        `cells`: a lower precision for the network's cells; weights, latents and densities keep theirs. `compiled`: fuse
        the cells by torch.compile. The default is the backbone itself, which raises ConfigurationError for either.
        """
        if cells is not None:
            raise ConfigurationError(
                f"{type(self).__name__} has no cells that run in {cells}: leave the precision as is"
            )
        if compiled:
            raise ConfigurationError(f"{type(self).__name__} has nothing to compile: leave out --compile")
        return self

    def regularization(self) -> Tensor:
        """The term that pretraining adds to its loss, times `PretrainConfig.regularization`: a scalar. Default: 0."""
        return next(self.parameters()).new_zeros(())

    @classmethod
    def load_official(cls, path: Path) -> Backbone:
        """Build the network from the checkpoint format of its official code. Raises CheckpointError.

        Sets `data_name` where the format names the data: `fit` then needs no --data.
        """
        raise CheckpointError(
            f"{path} is not a backbone in ebm-prior's own safetensors form, and {cls.official_format}"
        )

    # Derived passes: one traversal, many meanings.

    def trace(self, draw: Draw, batch_size: int) -> Trace:
        """Run `top_down` with `draw`, and return every latent, every conditional prior, and the final features."""
        z: list[Tensor] = []
        priors: list[Gaussian] = []

        def recording(index: int, prior: Gaussian, context: Any) -> Tensor:
            z.append(draw(index, prior, context))
            priors.append(prior)
            return z[-1]

        return Trace(z, priors, self.top_down(recording, batch_size))

    def transform(self, eps: Sequence[Tensor], *, temperature: float = 1.0) -> Trace:
        """The traversal at T_β(ε) (Eqs. 28-29), z_i = mean_i + t·std_i·ε_i with t the `temperature`.

        eps: list of (B, *group.shape). The trace also holds the conditional priors and the features.
        """
        require_latents("eps", eps, self.groups)
        return self.trace(lambda i, p, _: torch.addcmul(p.mean, p.std, eps[i], value=temperature), len(eps[0]))

    def reparameterize(self, eps: Sequence[Tensor], *, temperature: float = 1.0) -> list[Tensor]:
        """T_β (Eqs. 28-29): latents z from standard normal ε, both lists of (B, *group.shape)."""
        return self.transform(eps, temperature=temperature).z

    def standardize(self, z: Sequence[Tensor]) -> list[Tensor]:
        """T_β⁻¹: ε_i = (z_i − mean_i)/std_i, lists of (B, *group.shape)."""
        return self.given(z).eps

    def log_prior(self, z: Sequence[Tensor]) -> Tensor:
        """log p_β(z_i | z_<i) per group, (B, L) nats."""
        return self.given(z).log_prior

    def decode(self, z: Sequence[Tensor]) -> ImageDistribution:
        """p(x | z) for latents z, a list of (B, *group.shape)."""
        return self.likelihood(self.given(z).features)

    def infer(self, images: Tensor, *, noise: Sequence[Tensor] | None = None, generator: Generator = None) -> Posterior:
        """One draw of q(z | x) for images (B, C, H, W); the same `noise` gives the same draw.

        `noise`: one standard normal (B, *group.shape) per group, in generation order; drawn from `generator` if None.
        """
        self._require_shape(images)
        noise = self.standard_normal(len(images), generator=generator) if noise is None else noise
        require_latents("noise", noise, self.groups)
        draw = self.encode(images, noise)
        trace = self.trace(draw, len(images))
        return Posterior(trace.z, trace.eps, torch.stack(draw.log_q, dim=1), trace.log_prior, trace.features)

    def draw_posterior(self, images: Tensor, *, generator: Generator = None) -> list[Tensor]:
        """A draw z ~ q(z | x) as `infer` makes it, a list of (B, *group.shape), without a top-down pass if possible."""
        self._require_shape(images)
        draw = self.encode(images, self.standard_normal(len(images), generator=generator))
        return self.trace(draw, len(images)).z if draw.z is None else draw.z

    def _require_shape(self, images: object) -> None:
        if not isinstance(images, Tensor) or images.ndim == 0 or images.shape[1:] != self.image_shape:
            found = tuple(images.shape) if isinstance(images, Tensor) else described(images)
            raise ConfigurationError(f"expected images of shape {batch_of(self.image_shape)}, found {found}")

    def sample(self, n: int, *, temperature: float = 1.0, generator: Generator = None) -> list[Tensor]:
        """n ancestral draws z ~ p_β(z), a list of (n, *group.shape)."""
        return self.reparameterize(self.standard_normal(n, generator=generator), temperature=temperature)

    def standard_normal(self, n: int, *, generator: Generator = None) -> list[Tensor]:
        """ε ~ N(0, I), a list of (n, *group.shape) in the backbone's dtype and on its device."""
        like = next(self.parameters())
        return [standard_normal((n, *g.shape), generator, dtype=like.dtype, device=like.device) for g in self.groups]

    def given(self, z: Sequence[Tensor]) -> Trace:
        """The traversal in which every group takes its value in z, a list of (B, *group.shape)."""
        require_latents("z", z, self.groups)
        return self.trace(lambda i, prior, _: z[i], len(z[0]))


def is_group_shape(shape: object) -> bool:
    """Whether this can be the shape of a latent group: (D,) or (C, H, W), with sizes of at least 1."""
    sized = isinstance(shape, Sequence) and len(shape) in (1, 3)
    return sized and all(type(size) is int and size > 0 for size in shape)  # type: ignore[attr-defined]


def require_groups(backbone: Backbone) -> None:
    """Raise ContractError where a latent group's shape is neither (D,) nor (C, H, W), or one of its sizes is 0."""
    wrong = [f"{group.name} {shown(group.shape)}" for group in backbone.groups if not is_group_shape(group.shape)]
    if wrong or not backbone.groups:
        raise ContractError(
            f"{type(backbone).__name__}.groups: expected at least one latent group of shape (D,) or (C, H, W), with "
            f"sizes of at least 1; found {few(wrong) or 'none'}: correct the adapter (check_backbone says what else)"
        )


def require_usable(backbone: Backbone) -> None:
    """Raise ConfigurationError for parameters on the device meta or of an unsupported precision.

    Raises ContractError as `require_groups` does.
    """
    like = next(backbone.parameters())
    require_numbers(like.device)
    require_precision(like.dtype)
    require_groups(backbone)
