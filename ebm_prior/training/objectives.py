"""The losses of the heads, and the gain of the result on held-out latents.

f_q: f at posterior latents (B,); f_p: f at prior latents (B,); both in nats. With f* = log q(z) − log p_β(z), the
log density ratio of the aggregate posterior and the backbone's prior, exp(f*) p_β is the aggregate posterior itself.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ebm_prior.model.samplers import effective_sample_size


def nce_loss(f_q: Tensor, f_p: Tensor, noise_weight: float = 1.0) -> Tensor:
    """Logistic density ratio: E_q[softplus(−g)] + M E_p[softplus(g)] with g = f − log M.

    The minimiser is log q − log p_β for every `noise_weight` M > 0, and its log Z is 0. M = 1 is plain NCE; as M grows,
    the gradient approaches that of maximum likelihood with importance weights e^f. f_p is taken at ancestral draws of
    the backbone: no chains (Gutmann & Hyvärinen 2012; NCP-VAE, Aneja et al. 2021).
    """
    shift = math.log(noise_weight)
    return F.softplus(shift - f_q).mean() + noise_weight * F.softplus(f_p - shift).mean()


def mle_loss(f_q: Tensor, f_p: Tensor, *, penalty: float = 0.0) -> Tensor:
    """Maximum likelihood (Eqs. 10, 17): the gradient of E_p[f] − E_q[f], with f_p at draws of p_α itself.

    `penalty`: weight of E[f_q² + f_p²], which keeps the energy's level and scale from drifting.
    """
    return f_p.mean() - f_q.mean() + penalty * (f_q.square().mean() + f_p.square().mean())


class Gain(NamedTuple):
    """How much better exp(τf)p_β explains posterior latents than p_β does."""

    nats: float  # E_q[log p_α − log p_β] = τ E_q[f] − log E_p[e^{τf}]
    ess_fraction: float  # effective sample size of the weights e^{τf} under p_β / number of prior latents
    tau: float


def gain(f_q: Tensor, f_p: Tensor, tau: float = 1.0) -> Gain:
    """The gain of τf, from held-out f_q (N,) and f_p (M,): τ E_q[f] − log E_p[e^{τf}], at most KL(q ‖ p_β).

    log Z is estimated from draws of p_β. Where the ESS is small, log Z is underestimated and the gain is optimistic.
    """
    f_q, f_p = f_q.double(), f_p.double()
    log_z = (tau * f_p).logsumexp(0) - math.log(len(f_p))
    ess = float(effective_sample_size(tau * f_p)) / len(f_p)
    return Gain(float(tau * f_q.mean() - log_z), ess, tau)


def temper(f_q: Tensor, f_p: Tensor, *, ess_floor: float = 0.05, largest: float = 2.0) -> Gain:
    """The τ in [0, largest] with the best gain on held-out latents, as long as the ESS stays above `ess_floor`.

    The gain is concave in τ and 0 at τ = 0, with slope E_q[f] − E_{p,τ}[f], so τ is found by bisection on the slope.
    Tempering never harms: if f has learned nothing, τ = 0 gives the backbone's own prior.
    """
    f_q, f_p = f_q.double(), f_p.double()

    def slope(tau: float) -> float:
        return float(f_q.mean() - torch.softmax(tau * f_p, 0) @ f_p)

    def enough(tau: float) -> bool:
        return gain(f_q, f_p, tau).ess_fraction >= ess_floor

    if not bool(torch.isfinite(f_q).all() & torch.isfinite(f_p).all()) or slope(0.0) <= 0:
        return Gain(0.0, 1.0, 0.0)
    low, high = 0.0, largest
    for _ in range(40):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if slope(middle) > 0 and enough(middle) else (low, middle)
    return gain(f_q, f_p, low)
