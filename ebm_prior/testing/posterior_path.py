"""Checks of the posterior: the noise map, and log q as the density of what it draws."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ebm_prior.model.backbone import Draw, Posterior
from ebm_prior.testing.case import Case, Skipped, close, given_z, random_state, run
from ebm_prior.testing.prior_path import log_normal

EXACT_DIMENSIONS = 320
"""The largest number of latent dimensions for which a Jacobian is formed whole, by one backward pass for each."""


def noise_map(case: Case) -> Iterator[str]:
    """`infer` repeats with the same noise, group i moves with noise i, and a draw belongs to its own images."""
    backbone, images, noise = case.backbone, case.images, case.noise
    before = random_state(images.device)
    first = backbone.infer(images, noise=noise)
    if not torch.equal(before, random_state(images.device)):
        yield "infer draws from torch's global random generator although the noise is given"
        return
    if not all(map(close, first.z, backbone.infer(images, noise=noise).z)):
        yield "two calls of infer with the same noise gave different draws: the posterior draws noise of its own"
        return
    yield from _finite(first, case)
    for i, name in enumerate(case.names):
        fresh = case.normal_like(noise, purpose=4)
        moved = backbone.infer(images, noise=[fresh[i] if k == i else n for k, n in enumerate(noise)])
        if close(moved.z[i], first.z[i]):
            yield (
                f"new noise for group {name!r} does not move its draw: "
                "noise is indexed in generation order (index 0 is the top group), also in a bottom-up encoder"
            )
    draw = backbone.encode(images, noise)
    if draw.z is not None and not all(map(close, draw.z, first.z)):
        yield "the z that encode's draw names beforehand are not those that it draws, group by group"
    backbone.encode(1 - images, noise)
    if not all(map(close, run(backbone, draw, len(images)).z, first.z)):
        yield "encoding other images changes a draw that encode returned before: encode keeps its state in the module"
    for i, name in enumerate(case.names):
        alone = run(backbone, _only(i, backbone.encode(images, noise), first.z), len(images))
        if not close(alone.z[i], first.z[i]):
            yield (
                f"the posterior draw of group {name!r} changes when the other groups are given, not drawn by it: "
                "it must use the index, prior and context of the call and count on no earlier call"
            )


def finite_draws(case: Case) -> Iterator[str]:
    """`infer` gives latents and densities of the right shapes, all of them finite."""
    yield from _finite(case.backbone.infer(case.images, noise=case.noise), case)


def _finite(found: Posterior, case: Case) -> Iterator[str]:
    groups = case.backbone.groups
    for what, tensor, shape in [
        *((f"z of group {g.name!r}", z, g.shape) for g, z in zip(groups, found.z, strict=True)),
        ("log_q", found.log_q, (len(groups),)),
        ("log_p", found.log_p, (len(groups),)),
    ]:
        if tuple(tensor.shape) != (len(case.images), *shape):
            yield f"infer: {what} has shape {tuple(tensor.shape)}, expected {(len(case.images), *shape)}"
        elif not tensor.isfinite().all():
            yield f"infer: {what} is not finite"


def _only(drawn: int, draw: Draw, z: Sequence[Tensor]) -> Draw:
    """Draw one group; take the others from z."""
    return lambda index, prior, context: draw(index, prior, context) if index == drawn else z[index]


def log_p_of_draws(case: Case) -> Iterator[str]:
    """`infer`'s log_p and eps are those of the prior path at the same latents."""
    posterior = case.backbone.infer(case.images, noise=case.noise)
    priors = given_z(case.backbone, posterior.z).priors
    for i, (name, z, prior) in enumerate(zip(case.names, posterior.z, priors, strict=True)):
        expected, found = log_normal(z, prior), posterior.log_p[:, i]
        if not close(expected, found):
            yield (
                f"log p of group {name!r} in infer is {found[0]:.6g} nats; log N(ε) − Σ log std with the prior path's "
                f"conditional at the same z is {expected[0]:.6g}: while encoding, draw is given another prior"
            )
        elif not close(posterior.eps[i], (z - prior.mean) / prior.std):
            yield f"eps of group {name!r} in infer is not (z − mean)/std"


def log_q_is_the_density(case: Case) -> Iterator[str]:
    """log q(z_i | x, z_<i) = log N(ξ_i) − log|det ∂z_i/∂ξ_i|, by autograd through the noise map; and the joint one.

    In any encoder z_i is a function of its own noise and of earlier draws, so each group's density needs only its own
    block of the Jacobian. The joint determinant is checked too, where it is small enough.
    """
    noise = [n.clone().requires_grad_() for n in case.noise]
    posterior = case.backbone.infer(case.images, noise=noise)
    exact = []
    for i, (name, z) in enumerate(zip(case.names, posterior.z, strict=True)):
        log_det = _log_det(z, noise[i]) if z.requires_grad else torch.full_like(posterior.log_q[:, i], -math.inf)
        if log_det is None:
            yield Skipped(
                f"log q of group {name!r}: {z[0].numel()} dimensions that its noise map mixes are more than "
                f"{EXACT_DIMENSIONS}, so the determinant was not computed (check a smaller network of this kind)"
            )
            continue
        if not log_det.isfinite().all():
            yield (
                f"the posterior draw of group {name!r} has a singular Jacobian with respect to its own noise "
                "(detached, clamped, or drawn from another group's noise), so it has no density to compare log q with"
            )
            continue
        expected, found = _log_normal(noise[i]) - log_det, posterior.log_q[:, i]
        exact.append(expected)
        if not close(expected, found, tolerance=1e-6):
            yield (
                f"log q of group {name!r} is not the density of its draws: infer reports {found[0]:.6g} nats, the "
                f"noise map gives {expected[0]:.6g}{_factor_of_std(found - expected, z[0].numel())}"
            )
    if len(exact) == len(noise) and sum(n[0].numel() for n in noise) <= EXACT_DIMENSIONS:
        joint = sum(map(_log_normal, noise)) - _log_abs_det(_jacobian(posterior.z, noise))
        if not close(joint, torch.stack(exact).sum(0), tolerance=1e-6):
            yield (
                "the groups' densities do not multiply to the joint density of the draws: two groups' draws use "
                "each other's noise"
            )


def _log_normal(noise: Tensor) -> Tensor:
    return (-0.5 * noise.detach().square() - 0.5 * math.log(2 * math.pi)).flatten(1).sum(1)


def _factor_of_std(difference: Tensor, dimensions: int) -> str:
    """A hint for messages: a wrong scale of the standard deviation leaves the same difference for all images."""
    if not close(difference, difference.mean().expand_as(difference), tolerance=1e-6):
        return ""
    return f" (as if std were wrong by a factor {math.exp(-difference.mean().item() / dimensions):.4g})"


def _log_det(z: Tensor, noise: Tensor) -> Tensor | None:
    """log|det ∂z/∂ξ| of each row, (B,); None where a large Jacobian is not diagonal.

    Jᵀv ⊙ v is the diagonal of J for every sign vector v if J is diagonal, and differs between random ones if not.
    """
    generator = torch.Generator(device=z.device).manual_seed(0)
    scales = []
    for _ in range(3):
        v = torch.randn(z.shape, generator=generator, dtype=z.dtype, device=z.device).sign()
        scales.append(_pull_back((v * z).sum(), [noise])[0] * v)
    if close(scales[0], scales[1], tolerance=1e-9) and close(scales[0], scales[2], tolerance=1e-9):
        return scales[0].abs().log().flatten(1).sum(1)
    if z[0].numel() > EXACT_DIMENSIONS:
        return None
    return _log_abs_det(_jacobian([z], [noise]))


def _jacobian(z: Sequence[Tensor], noise: Sequence[Tensor]) -> Tensor:
    """∂z/∂ξ of each row over all groups given, (B, N, N). Rows are independent: one backward pass serves them all."""
    flat = torch.cat([tensor.flatten(1) for tensor in z], dim=1)
    rows = [torch.cat([g.flatten(1) for g in _pull_back(flat[:, k].sum(), noise)], 1) for k in range(flat.shape[1])]
    return torch.stack(rows, dim=1)


def _log_abs_det(matrix: Tensor) -> Tensor:
    log_abs_det: Tensor = torch.linalg.slogdet(matrix).logabsdet
    return log_abs_det


def _pull_back(value: Tensor, noise: Sequence[Tensor]) -> list[Tensor]:
    grads = torch.autograd.grad(value, noise, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(n) if g is None else g for n, g in zip(noise, grads, strict=True)]
