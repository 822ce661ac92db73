"""The loss of joint training of generator, Gaussian conditionals, inference network and energy (§3.2, §3.3).

The gradient of this one loss gives all learning rules of the paper. With z⁺ from the posterior and z⁻ from the prior
p_α,β (Eq. 6),

    loss = −E[log p_β0(x | z⁺) + log p_β>0(z⁺) + f_α(z⁺)] + E[log p_β>0(z⁻) + f_α(z⁻)]  (+ E[log q_ω(z⁺ | x)])

    posterior "langevin":   z⁺ from chains (Eq. 14), no gradient through them         Eqs. 9, 10, 11
    posterior "inference":  z⁺ = z_ω(x, noise), with its gradient, and the last term  Eqs. 16, 17, 18, 19

The terms at z⁻ have the opposite sign, because they give the gradient of log Z for α and β>0 (Eqs. 24, 25). With the
prior "gaussian", f = 0, Z = 1, and there is no z⁻. Special cases: VAE = inference + gaussian; ABP and SRI = langevin +
gaussian; LEBM = langevin + ebm with one layer. With "langevin", the inference network still learns by Eq. 19, for the
scores of images, and nothing else depends on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ebm_prior.model.backbone import Backbone, Posterior
from ebm_prior.model.batch_norm import keeping_statistics
from ebm_prior.model.samplers import Potential, norm
from ebm_prior.training.joint_config import Space


def potential(
    backbone: Backbone,
    energy: nn.Module | None,
    space: Space,
    images: Tensor | None = None,
    *,
    bfloat16: bool = False,
) -> Potential:
    """The function g in the chains' log density log p(u) = g(u) − ½‖u‖² + const.

    Without `images` the density is the prior (Eq. 13), with `images` (B, C, H, W) the posterior (Eq. 14). In the space
    "eps", u is ε and g = f(T_β(ε)) + log p(x|z) (A.3); in "z", u is z and g = f + log p(x|z) + log p_β(z) + ½‖z‖². So
    one Langevin kernel (Eq. 12) serves both. `energy` None means f = 0. `bfloat16`: compute the image head in bfloat16,
    since it takes most of the time.
    """

    def g(u: Sequence[Tensor]) -> Tensor:
        trace = backbone.transform(u) if space == "eps" else backbone.given(u)
        value = u[0].new_zeros(len(u[0]))
        if energy is not None:
            value = value + energy(energy.inputs(trace.z, trace.eps))  # type: ignore[operator]
        if images is not None:
            with torch.autocast(images.device.type, torch.bfloat16, enabled=bfloat16):
                distribution = backbone.likelihood(trace.features)
            value = value + distribution.log_prob(images)
        if space == "z":
            value = value + trace.log_prior.sum(1) + 0.5 * _squares(u)
        return value

    return g


class Terms(NamedTuple):
    """The terms of the loss per image or prior draw, (B,) in nats, and ‖ε‖/√D of the draws."""

    log_likelihood: Tensor
    log_p: Tensor  # log p_β>0(z⁺)
    log_q: Tensor  # log q_ω(z⁺ | x); 0 for draws that no inference network made
    f_q: Tensor
    prior: Tensor  # log p_β>0(z⁻)
    f_p: Tensor
    norm_q: Tensor  # ‖ε‖/√D of z⁺
    norm_p: Tensor  # of z⁻

    def loss(self) -> Tensor:
        """The loss of Eqs. 9-11 and 16-19 as a scalar; expectations are means over the batch."""
        positive = self.log_likelihood + self.log_p + self.f_q - self.log_q
        return (self.prior + self.f_p).mean() - positive.mean()


def terms(
    backbone: Backbone,
    energy: nn.Module | None,
    images: Tensor,
    posterior: Posterior | Sequence[Tensor],
    prior: Sequence[Tensor] | None,
) -> Terms:
    """The terms of the loss for images (B, C, H, W).

    `posterior`: the result of `Backbone.infer`, or latents z⁺ that chains have drawn. `prior`: latents z⁻ of p_α,β, or
    None with f = 0, where log Z is 0 for any β. At z⁻ batch norms use their running statistics, as they do in chains.
    """
    if isinstance(posterior, Posterior):
        z, eps, features, log_p, log_q = (
            posterior.z,
            posterior.eps,
            posterior.features,
            posterior.log_p.sum(1),
            posterior.log_q.sum(1),
        )
    else:
        trace = backbone.given(posterior)
        z, eps, features, log_p = trace.z, trace.eps, trace.features, trace.log_prior.sum(1)
        log_q = torch.zeros_like(log_p)
    log_likelihood = backbone.likelihood(features).log_prob(images)
    zero = torch.zeros_like(log_p)
    if energy is None or prior is None:
        return Terms(log_likelihood, log_p, log_q, zero, zero, zero, norm(eps), zero)
    with keeping_statistics(backbone):
        below = backbone.given(prior)
    f_q, f_p = (energy(energy.inputs(*pair)) for pair in ((z, eps), (below.z, below.eps)))  # type: ignore[operator]
    return Terms(log_likelihood, log_p, log_q, f_q, below.log_prior.sum(1), f_p, norm(eps), norm(below.eps))


def _squares(u: Sequence[Tensor]) -> Tensor:
    return torch.stack([e.square().flatten(1).sum(1) for e in u]).sum(0)
