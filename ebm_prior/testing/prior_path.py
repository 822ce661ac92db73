"""Checks of the prior path: the order of the draws, and T_β as a deterministic, differentiable, invertible map."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ebm_prior.errors import few
from ebm_prior.model.backbone import Gaussian
from ebm_prior.testing.case import Case, close, given_eps, given_z, outputs, random_state, run

PRODUCTS = {"convolution", "_convolution", "mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "linear"}


def order_of_draws(case: Case) -> Iterator[str]:
    """`draw` is called once per group, in the order of `groups`, with a Gaussian that broadcasts."""
    names, groups, batch = case.names, case.backbone.groups, len(case.eps[0])
    met: list[int] = []
    mistakes: list[str] = []

    def draw(index: int, prior: Gaussian, context: Any) -> Tensor:
        if not isinstance(index, int) or not 0 <= index < len(groups):
            raise ContractBroken(f"top_down called draw with group index {index!r}; groups has {len(groups)} entries")
        name, shape = groups[index]
        if index in met:
            raise ContractBroken(f"top_down draws group {name!r} twice: draw must be called once per group")
        if index != len(met):
            raise ContractBroken(
                f"top_down met group {name!r} before {names[len(met)]!r}: "
                "draw must be called once per group, in the order of `groups`"
            )
        met.append(index)
        if not isinstance(prior, Gaussian):
            raise ContractBroken(f"the prior of group {name!r} must be a Gaussian(mean, std), found {type(prior)}")
        for what, tensor in prior._asdict().items():
            if not _broadcasts(tensor, (batch, *shape)):
                raise ContractBroken(
                    f"the prior {what} of group {name!r} has shape {tuple(tensor.shape)}, "
                    f"which does not broadcast to (B, *shape) = {(batch, *shape)}"
                )
            if not tensor.isfinite().all():
                mistakes.append(f"the prior {what} of group {name!r} is not finite")
        mistakes.extend(_std(name, prior, case.eps[index]))
        return prior.mean + prior.std * case.eps[index]

    try:
        case.backbone.top_down(draw, batch)
    except ContractBroken as broken:
        yield str(broken)
        return
    yield from mistakes
    if missing := names[len(met) :]:
        yield f"top_down ended without drawing {few(map(repr, missing))}: draw must be called once per group"


def _std(name: str, prior: Gaussian, eps: Tensor) -> Iterator[str]:
    """A std that is not positive, or beside which the mean is so large that z keeps nothing of std·ε."""
    mean, std, eps = (tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in (*prior, eps))
    least = f"{std.min().item():.4g}"
    if not (std > 0).all():
        yield f"the prior std of group {name!r} is not positive, found {least}: is it a log standard deviation?"
        return
    single = bool((std.float().square() < torch.finfo(torch.float32).tiny).any())
    if single or (((mean + std * eps - mean) / std - eps).abs() > 0.5).any():
        kept = torch.float32 if single else mean.dtype
        yield (
            f"the prior std of group {name!r} is too small, found {least}: z = mean + std·ε keeps nothing of ε in "
            f"{str(kept).removeprefix('torch.')}. Give the log standard deviation a floor, or leave the group out "
            "where it holds nothing"
        )


class ContractBroken(Exception):
    """Raised inside a draw to leave `top_down`; the message describes the mistake."""


def _broadcasts(tensor: Tensor, shape: tuple[int, ...]) -> bool:
    return tensor.ndim == len(shape) and all(n in (1, m) for n, m in zip(tensor.shape, shape, strict=True))


def no_noise_of_its_own(case: Case) -> Iterator[str]:
    """`top_down` is deterministic given its draws: it draws no noise and keeps no state between passes."""
    before = random_state(case.images.device)
    first = given_eps(case.backbone, case.eps)
    if not torch.equal(before, random_state(case.images.device)):
        yield "top_down draws from torch's global random generator: the prior path draws noise of its own"
    elif not _same(first.z, given_eps(case.backbone, case.eps).z):
        yield "two calls of top_down with the same draws gave different results: the prior path draws noise of its own"
    else:
        case.backbone.infer(1 - case.images, noise=case.eps)
        if not _same(first.z, given_eps(case.backbone, case.eps).z):
            yield "after infer, top_down gives other latents for the same ε: encode leaves state behind"


def derived_passes(case: Case) -> Iterator[str]:
    """The backbone's T_β, T_β⁻¹, log p_β and decode agree with its `top_down`."""
    backbone, eps = case.backbone, case.eps
    met = given_eps(backbone, eps)
    if not _same(backbone.reparameterize(eps), met.z):
        yield "reparameterize(eps) is not T_β: expected z = mean + std·ε with what top_down gave to draw"
    if not _same(backbone.standardize(met.z), eps):
        yield "T_β⁻¹(T_β(ε)) is not ε: standardize does not invert reparameterize"
    z = [tensor + 0.3 for tensor in met.z]
    again = given_z(backbone, z)
    if not _same(backbone.reparameterize(backbone.standardize(z)), z):
        yield "T_β(T_β⁻¹(z)) is not z: reparameterize does not invert standardize"
    expected = torch.stack([log_normal(v, prior) for v, prior in zip(z, again.priors, strict=True)], dim=1)
    if not close(backbone.log_prior(z), expected):
        yield "log_prior(z) is not log p_β: expected log N(ε) − Σ log std with ε = (z − mean)/std, per group (B, L)"
    if not close(backbone.decode(z).mean, backbone.likelihood(again.features).mean):
        yield "decode(z) is not the likelihood of the features that top_down returns for z"


def log_normal(z: Tensor, prior: Gaussian) -> Tensor:
    """log N(ε) − Σ log σ of z under a diagonal Gaussian, (B,) nats."""
    std = prior.std.expand_as(z)
    eps = (z - prior.mean) / std
    return (-0.5 * eps.square() - 0.5 * math.log(2 * math.pi)).flatten(1).sum(1) - std.log().flatten(1).sum(1)


def gradients(case: Case) -> Iterator[str]:
    """Autograd of every output with respect to every ε_j agrees with central finite differences."""
    step = 1e-5
    names = case.names
    eps = [e.clone().requires_grad_() for e in case.eps]
    values = outputs(case, eps)
    weights = [w / math.sqrt(w.numel()) for w in case.normal_like(list(values.values()), purpose=1)]
    # Normalised, so that a difference is the change along one unit direction.
    directions = [d / d.norm() for d in case.normal_like(eps, purpose=2)]
    finite = []
    with torch.no_grad():
        for j, direction in enumerate(directions):
            ends = [
                outputs(case, [e + sign * step * direction if k == j else e for k, e in enumerate(case.eps)])
                for sign in (+1, -1)
            ]
            finite.append({name: (ends[0][name] - ends[1][name]) / (2 * step) for name in values})
    reported: set[int] = set()  # for each ε_j only the first wrong output is reported, since later ones depend on it
    for (name, value), weight in zip(values.items(), weights, strict=True):
        grads: tuple[Tensor | None, ...] = (None,) * len(eps)
        if value.requires_grad:
            grads = torch.autograd.grad((weight * value).sum(), eps, retain_graph=True, allow_unused=True)
        for j, (grad, direction) in enumerate(zip(grads, directions, strict=True)):
            expected = (weight * finite[j][name]).sum().item()
            found = 0.0 if grad is None else (grad * direction).sum().item()
            rounding = 1e-6 * value.detach().abs().max().item()
            if j in reported or abs(expected - found) <= 1e-3 * max(abs(expected), abs(found)) + rounding:
                continue
            reported.add(j)
            verdict = (
                "something on the prior path is detached"
                if found == 0
                else "part of the prior path is detached, or a backward pass is wrong"
            )
            seen = "None" if grad is None else f"{found:.3g}"
            yield (
                f"the gradient of {name} with respect to eps of {names[j]} is {seen} "
                f"while finite differences see {expected:.3g}: {verdict}"
            )


def no_clamp(case: Case) -> Iterator[str]:
    """Draws are not clamped: the rest of the pass changes with a group at 0, and between 5 and 6 std."""
    for j, name in enumerate(case.names):
        signs = case.normal_like(case.eps, purpose=3)[j].sign()
        drawn, other, at5, at6 = (
            _downstream(case, [e if k == j else rest for k, rest in enumerate(case.eps)], j)
            for e in (case.eps[j], torch.zeros_like(signs), 5 * signs, 6 * signs)
        )
        if all(map(torch.equal, drawn, other)):
            yield f"neither later groups nor the image depend on group {name!r}: does top_down use what draw returned?"
        elif all(map(torch.equal, at5, at6)):
            yield f"beyond 5 std the draws of group {name!r} change nothing: they are clamped, which p(z) does not know"


def _downstream(case: Case, eps: list[Tensor], index: int) -> list[Tensor]:
    """The conditional priors after group `index`, and the image."""
    met = given_eps(case.backbone, eps)
    likelihood = case.backbone.likelihood(met.features)
    later = [tensor for prior in met.priors[index + 1 :] for tensor in prior]
    return [*later, likelihood.mean, likelihood.log_prob(case.images)]


def stops_after_the_last_draw(case: Case) -> Iterator[str]:
    """No convolution or matrix product after the last draw, and no call of `likelihood`: Langevin needs latents only.

    Operations are watched and not modules, because a head may be functional, and an activation module may be shared.
    """
    backbone = case.backbone
    watch = _Products({p.untyped_storage().data_ptr(): name for name, p in backbone.named_parameters()})
    calls: list[None] = []

    def spy(features: Any) -> Any:
        calls.append(None)
        return type(backbone).likelihood(backbone, features)

    def draw(index: int, prior: Gaussian, context: Any) -> Tensor:
        watch.seen.clear()  # operations before a draw belong to the prior path
        return prior.mean + prior.std * case.eps[index]

    backbone.likelihood = spy  # type: ignore[method-assign]
    try:
        with watch:
            run(backbone, draw, len(case.images))
    finally:
        del backbone.likelihood
    if calls:
        yield "top_down calls likelihood: the image head must not run on the prior path"
    elif watch.seen:
        yield (
            f"top_down goes on after the last draw ({', '.join(watch.seen[:3])}): return what likelihood needs as the "
            "features and run this, the image head included, in likelihood"
        )


class _Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the convolutions and matrix products that run, by the parameter they use where it is one."""

    def __init__(self, parameters: dict[int, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[str] = []
        self._parameters = parameters

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operation = func.overloadpacket.__name__
        if operation in PRODUCTS:
            storages = [a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)]
            weights = [self._parameters[s] for s in storages if s in self._parameters]
            self.seen.append(f"{operation} with {weights[0]}" if weights else operation)
        return func(*args, **(kwargs or {}))


def batch_independence(case: Case) -> Iterator[str]:
    """Row b of a batch is what the same row gives alone, on the prior path and in the posterior."""
    together = outputs(case, case.eps)
    posterior = case.backbone.infer(case.images, noise=case.noise)
    inferred = dict(zip(case.names, posterior.z, strict=True)) | {"log q": posterior.log_q}
    wrong: dict[str, None] = {}
    for b in range(len(case.images)):
        row = slice(b, b + 1)
        alone = outputs(case._replace(images=case.images[row]), [e[row] for e in case.eps])
        single = case.backbone.infer(case.images[row], noise=[n[row] for n in case.noise])
        inferred_alone = [*single.z, single.log_q]
        wrong |= {f"{n} on the prior path": None for n, v in together.items() if not close(v[row], alone[n])}
        wrong |= {
            f"{n} of the posterior": None
            for (n, v), other in zip(inferred.items(), inferred_alone, strict=True)
            if not close(v[row], other)
        }
    if wrong:
        yield (
            f"one sample's result depends on the rest of the batch ({few(wrong)}): something mixes samples, "
            "such as batch statistics or a mean over the batch axis"
        )


def _same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(map(close, a, b))
