"""Code shared by the checks of the contract kit: test inputs, and the protection of the module's own state."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ebm_prior.compute.randomness import derived_generator
from ebm_prior.model.backbone import Backbone, Draw, Gaussian


class Skipped(str):
    """Yielded by a check in place of a mistake: what could not be checked, and why."""


class Case(NamedTuple):
    """A frozen backbone with a batch (B ≥ 2) of all inputs of its passes."""

    backbone: Backbone
    images: Tensor  # (B, *image_shape), what the likelihood models
    eps: list[Tensor]  # list of (B, *group.shape), standard normal
    noise: list[Tensor]  # likewise, for the posterior
    seed: int

    @property
    def names(self) -> list[str]:
        """The latent groups' names, in generation order."""
        return [group.name for group in self.backbone.groups]

    def generator(self, purpose: int) -> torch.Generator:
        """A fresh generator on the backbone's device; the same `purpose` gives the same numbers."""
        return derived_generator(self.seed, purpose, device=self.images.device)

    def normal_like(self, tensors: Sequence[Tensor], purpose: int) -> list[Tensor]:
        """Standard normals of the shapes of `tensors`."""
        generator = self.generator(purpose)
        kind = {"dtype": self.images.dtype, "device": self.images.device}
        return [torch.randn(t.shape, generator=generator, **kind) for t in tensors]  # type: ignore[call-overload]


class Pass(NamedTuple):
    """The results of one run of `top_down`, recorded without the help of the base class."""

    z: list[Tensor]
    priors: list[Gaussian]
    features: Any


def run(backbone: Backbone, draw: Draw, batch_size: int) -> Pass:
    """`top_down` with `draw`, keeping each latent and its conditional prior."""
    z: list[Tensor] = []
    priors: list[Gaussian] = []

    def recording(index: int, prior: Gaussian, context: Any) -> Tensor:
        priors.append(prior)
        z.append(draw(index, prior, context))
        return z[-1]

    return Pass(z, priors, backbone.top_down(recording, batch_size))


def given_eps(backbone: Backbone, eps: Sequence[Tensor]) -> Pass:
    """T_β by hand: z_i = mean_i + std_i·ε_i."""
    return run(backbone, lambda i, prior, _: prior.mean + prior.std * eps[i], len(eps[0]))


def given_z(backbone: Backbone, z: Sequence[Tensor]) -> Pass:
    """T_β⁻¹ by hand: the given latents, met in order."""
    return run(backbone, lambda i, prior, _: z[i], len(z[0]))


def outputs(case: Case, eps: Sequence[Tensor]) -> dict[str, Tensor]:
    """All outputs of the prior path for given ε: each group's z, and log p(x | z) of the case's images."""
    met = given_eps(case.backbone, eps)
    images = case.images[: len(eps[0])]
    return dict(zip(case.names, met.z, strict=True)) | {
        "log p(x | z)": case.backbone.likelihood(met.features).log_prob(images)
    }


def close(a: Tensor, b: Tensor, tolerance: float = 1e-7) -> bool:
    """Equal up to rounding: within `tolerance`, or 32 units of rounding where they are coarser than float64's, of the
    larger tensor's largest entry (or of 1)."""
    if a.shape != b.shape:
        return False
    tolerance = max(tolerance, 32 * torch.finfo(a.dtype).eps)
    scale = max(1.0, a.abs().max().item(), b.abs().max().item())
    return (a - b).abs().max().item() <= tolerance * scale  # False for NaN


def random_state(device: torch.device) -> Tensor:
    """The state of torch's global generator that draws on `device` use."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


@contextmanager
def frozen(backbone: Backbone) -> Iterator[None]:
    """Inside the block the module is in eval mode, without parameter gradients; afterwards all is put back, RNG too."""
    modes = [(module, module.training) for module in backbone.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in backbone.parameters()]
    device = next(backbone.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.enable_grad():
        try:
            for module, _ in modes:
                module.training = False
            backbone.requires_grad_(False)
            yield
        finally:
            for module, training in modes:
                module.training = training
            for parameter, flag in flags:
                parameter.requires_grad_(flag)


@contextmanager
def on_copies(backbone: Backbone, dtype: torch.dtype | None = None) -> Iterator[None]:
    """Work on copies of every parameter and buffer, in `dtype` if given; the caller's own tensors are put back.

    The module itself is kept, for some modules (weight norm hooks, cached tensors) cannot be deep-copied.
    """
    parameters = [(parameter, parameter.data) for parameter in backbone.parameters()]
    buffers = [
        (module, name, buffer)
        for module in backbone.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    copies: dict[int, Tensor] = {}  # tied buffers stay tied
    try:
        for parameter, data in parameters:
            parameter.data = _copy(data, dtype)
        for module, name, buffer in buffers:
            module._buffers[name] = copies.setdefault(id(buffer), _copy(buffer, dtype))
        yield
    finally:
        for parameter, data in parameters:
            parameter.data = data
        for module, name, buffer in buffers:
            module._buffers[name] = buffer


def _copy(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.detach().to(dtype if dtype and tensor.is_floating_point() else tensor.dtype, copy=True)
