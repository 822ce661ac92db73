"""`check_backbone`: does an adapter keep the backbone contract, and if not, which mistake does it make?

A check is a generator that yields one sentence per mistake. Checks run on the frozen network in float64, where finite
differences and densities are accurate, and the caller's module is restored afterwards. No density is taken from the
pass under test: log p is log N(ε) − Σ log σ with the conditionals that `top_down` passed to `draw`, and log q comes
from the posterior's noise map, log q(z_i | x, z_<i) = log N(ξ_i) − log|det ∂z_i/∂ξ_i|.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple, ParamSpec

import torch
from torch import Tensor

from ebm_prior.compute.randomness import derived_generator
from ebm_prior.errors import ConfigurationError, ContractError, described
from ebm_prior.interfaces import Images
from ebm_prior.model.backbone import BUILT_IN, Backbone
from ebm_prior.model.checked_images import unfit
from ebm_prior.testing import declared, image_side, posterior_path, prior_path
from ebm_prior.testing.case import Case, Skipped, frozen, on_copies

P = ParamSpec("P")
TYPES = re.compile("dtype|float|double|cuda", re.IGNORECASE)

Checks = dict[str, Callable[[Case], Iterator[str]]]
# In the parameters' own dtype. The first mistake ends the inspection: what comes later would stumble over it again.
FIRST: Checks = {
    "draw is called once per group, in order": prior_path.order_of_draws,
    "observe keeps shape and range and follows its generator": image_side.observation,
    "passes keep the dtype of the parameters": declared.own_dtype,
}
# In float64 from here on. Without these two the rest has nothing to compare with: here too the first mistake ends it.
REPEATABLE: Checks = {
    "top_down adds no noise and keeps no state": prior_path.no_noise_of_its_own,
    "infer follows its noise": posterior_path.noise_map,
}
REST: Checks = {
    "T_β, its inverse, log p_β and decode agree with top_down": prior_path.derived_passes,
    "gradients agree with finite differences": prior_path.gradients,
    "draws are used as drawn, without a clamp": prior_path.no_clamp,
    "top_down stops after the last draw": prior_path.stops_after_the_last_draw,
    "samples of a batch are independent": prior_path.batch_independence,
    "log p of posterior draws is that of the prior path": posterior_path.log_p_of_draws,
    "log q is the density of the draws": posterior_path.log_q_is_the_density,
    "the likelihood is one over images in [0, 1]": image_side.likelihood,
    "architecture and state dict rebuild the network": declared.rebuilding,
}

# After FIRST what `fit` looks at, in the parameters' own dtype: ten passes in all, however many groups there are.
QUICK: Checks = {
    "infer gives finite latents and densities": posterior_path.finite_draws,
    "top_down adds no noise and keeps no state": prior_path.no_noise_of_its_own,
    "the likelihood is one over images in [0, 1]": image_side.likelihood,
}


class ContractReport(NamedTuple):
    """The names of the checks that passed, and for each check that could not be made a sentence with the reason."""

    checks: tuple[str, ...]
    skipped: tuple[str, ...]


def check_backbone(
    backbone: Backbone, images: Tensor | None = None, *, batch_size: int = 3, seed: int = 0
) -> ContractReport:
    """Prove that `backbone` keeps the contract of `ebm_prior.model.backbone`; raise ContractError naming its mistakes.

    `images`: (B, *image_shape) in [0, 1], at least two; uniform random ones, `batch_size` of them, if None. They pass
    through `backbone.observe`. The backbone is put back as it was: dtype, mode, flags, values, torch's random state.
    The time is some ten passes per latent group in float64, so check a small network of the kind first.

    >>> report = check_backbone(backbone)
    >>> report.skipped
    ()
    """
    inspection = _Inspection(type(backbone).__name__)
    inspection.demand("groups and image_shape are well formed", declared.declaration, backbone)
    inspection.run("the module is in eval mode", declared.evaluation_mode, backbone)
    with frozen(backbone):
        with on_copies(backbone):
            case = _case(backbone, images, batch_size, seed)
            for name, check in FIRST.items():
                inspection.demand(name, check, case)
        with on_copies(backbone, torch.float64):
            case = _case(backbone, images, batch_size, seed)
            case = case._replace(images=backbone.observe(case.images, generator=case.generator(5)))
            before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
            for name, check in REPEATABLE.items():
                inspection.demand(name, check, case)
            for name, check in REST.items():
                inspection.run(name, check, case)
            inspection.run("passes leave the state dict alone", declared.unchanged, backbone, before)
    inspection.conclude()
    return ContractReport(tuple(inspection.proved), tuple(inspection.skipped))


def check_foreign(backbone: Backbone, images: Images, *, seed: int = 0) -> None:
    """The quick part of `check_backbone` on an adapter that does not come with ebm-prior; on others, nothing.

    `images`: such as the backbone was trained on; two of them are used. Densities, gradients and independence are left
    to `check_backbone`. Raises ContractError naming the mistakes.
    """
    if type(backbone).__module__.startswith(BUILT_IN):
        return
    inspection = _Inspection(type(backbone).__name__, one_line=True)
    inspection.demand("groups and image_shape are well formed", declared.declaration, backbone)
    with frozen(backbone), torch.no_grad():
        case = _case(backbone, images.batch([0, len(images) - 1]), 2, seed)
        for name, check in FIRST.items():
            inspection.demand(name, check, case)
        case = case._replace(images=backbone.observe(case.images, generator=case.generator(5)))
        for name, check in QUICK.items():
            inspection.run(name, check, case)
    inspection.conclude()


class _Inspection:
    """The findings so far."""

    def __init__(self, subject: str, *, one_line: bool = False) -> None:
        self.subject, self.one_line = subject, one_line
        self.proved: list[str] = []
        self.skipped: list[str] = []
        self.mistakes: list[str] = []

    def run(self, name: str, check: Callable[P, Iterator[str]], *args: P.args, **kwargs: P.kwargs) -> None:
        """Run one check. An exception raised by the adapter counts as a mistake."""
        found: list[str] = []
        try:
            found.extend(check(*args, **kwargs))
        except (MemoryError, torch.OutOfMemoryError):  # says nothing of the adapter
            raise
        except Exception as error:
            # Most checks run in float64, which reveals hard-coded dtypes.
            hint = "; new tensors must take dtype and device from a parameter" if TYPES.search(str(error)) else ""
            found.append(f"while checking that {name}: {type(error).__name__}: {error}{hint}")
        self.skipped += [sentence for sentence in found if isinstance(sentence, Skipped)]
        self.mistakes += [sentence for sentence in found if not isinstance(sentence, Skipped)]
        if not found:
            self.proved.append(name)

    def demand(self, name: str, check: Callable[P, Iterator[str]], *args: P.args, **kwargs: P.kwargs) -> None:
        """Run a check that later ones depend on, and end the inspection if any mistake has been found."""
        known = len(self.mistakes)
        self.run(name, check, *args, **kwargs)
        if len(self.mistakes) > known:
            self.conclude()

    def conclude(self) -> None:
        """Raise ContractError if there were mistakes."""
        if self.mistakes and self.one_line:
            found = "; ".join(self.mistakes).rstrip(".")
            raise ContractError(
                f"{self.subject} does not keep the backbone contract: {found}. Correct that, and let check_backbone "
                "look at the rest (backbones/README.md)"
            )
        if self.mistakes:
            lines = "".join(f"\n  - {mistake}" for mistake in self.mistakes)
            raise ContractError(f"{self.subject} does not keep the backbone contract:{lines}")


def _case(backbone: Backbone, images: Tensor | None, batch_size: int, seed: int) -> Case:
    """A batch of everything that the passes take, in the dtype and on the device of the backbone's parameters."""
    like = next(backbone.parameters())
    generator = derived_generator(seed, device=like.device)
    if images is None:
        shape = (max(2, batch_size), *backbone.image_shape)
        images = torch.rand(shape, generator=generator, dtype=like.dtype, device=like.device)
    else:
        expected = f"images: expected at least two of shape {backbone.image_shape} in [0, 1], found {described(images)}"
        if tuple(images.shape[1:]) != backbone.image_shape or len(images) < 2:
            raise ConfigurationError(expected)
        if bad := unfit(images):
            raise ConfigurationError(f"{expected} with {bad.values} in image {bad.number}")
    images = images[: max(2, batch_size)].to(like)
    eps, noise = (backbone.standard_normal(len(images), generator=generator) for _ in range(2))
    return Case(backbone, images, eps, noise, seed)
