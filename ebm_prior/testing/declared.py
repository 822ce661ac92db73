"""Checks of what an adapter declares: its groups, its image shape, its mode, and that it can be built again."""

from __future__ import annotations

import json
from collections.abc import Iterator

import torch
from torch import Tensor

from ebm_prior.errors import shown
from ebm_prior.model.backbone import Backbone, LatentGroup, is_group_shape
from ebm_prior.testing.case import Case, close, given_eps


def declaration(backbone: Backbone) -> Iterator[str]:
    """`groups` and `image_shape` are well formed, and there is a parameter to take dtype and device from."""
    groups = getattr(backbone, "groups", ())
    if not isinstance(groups, tuple) or not groups or not all(isinstance(group, LatentGroup) for group in groups):
        yield (
            "groups must be a tuple of LatentGroup(name, shape), the top group first, set on the class or in the "
            f"constructor; found {_found(groups)}"
        )
        return
    names = [group.name for group in groups]
    if len(set(names)) < len(names):
        yield f"the names of the latent groups are not unique: {names}"
    for name, shape in groups:
        if not isinstance(name, str) or not name or "." in name:
            yield f"a latent group's name must be a non-empty string without dots, found {name!r}"
        if not is_group_shape(shape):
            yield f"the shape of group {name!r} must be (D,) or (C, H, W) without a batch axis, found {shown(shape)}"
    image_shape = getattr(backbone, "image_shape", None)
    if not isinstance(image_shape, tuple) or len(image_shape) != 3 or not is_group_shape(image_shape):
        yield (
            "image_shape must be a tuple (C, H, W) of sizes of at least 1, set on the class or in the constructor; "
            f"found {_found(image_shape)}"
        )
    if next(backbone.parameters(), None) is None:
        yield "the module has no parameters: passes take their dtype and device from the first one"


def _found(value: object) -> str:
    """A value with its type where that is no tuple: the list [1, 28, 28]."""
    plain = value is None or isinstance(value, tuple)
    return shown(value) if plain else f"the {type(value).__name__} {shown(value)}"


def evaluation_mode(backbone: Backbone) -> Iterator[str]:
    """Every submodule is in eval mode (the other checks run in eval mode in any case)."""
    training = [name or type(backbone).__name__ for name, module in backbone.named_modules() if module.training]
    if backbone.training:
        yield "the module is in training mode: call backbone.eval() (dropout and batch norm act on every pass)"
    elif training:
        yield f"submodules are in training mode, call backbone.eval(): {', '.join(training[:5])}"


def own_dtype(case: Case) -> Iterator[str]:
    """Every pass runs in the parameters' own dtype, before anything is converted, and returns that dtype."""
    expected = case.images.dtype
    met = given_eps(case.backbone, case.eps)
    seen = case.backbone.observe(case.images, generator=case.generator(5))
    posterior = case.backbone.infer(seen, noise=case.noise)
    distribution = case.backbone.likelihood(met.features)
    found = {
        "top_down's latents": met.z[-1],
        "infer's latents": posterior.z[-1],
        "infer's log_q": posterior.log_q,
        "likelihood.mean": distribution.mean,
        "likelihood.log_prob": distribution.log_prob(seen),
    }
    for what, tensor in found.items():
        if tensor.dtype != expected:
            yield f"{what} has dtype {tensor.dtype} where the parameters have {expected}"


def unchanged(backbone: Backbone, before: dict[str, Tensor]) -> Iterator[str]:
    """No pass has written to a parameter or buffer."""
    changed = [name for name, tensor in backbone.state_dict().items() if not torch.equal(tensor, before[name])]
    if changed:
        yield f"passes change the state dict: {', '.join(changed[:5])} (running statistics, counters or caches)"


def rebuilding(case: Case) -> Iterator[str]:
    """`type(backbone)(**architecture)` with the state dict is the same backbone, as its file format requires."""
    backbone = case.backbone
    kind = type(backbone).__name__
    architecture = getattr(backbone, "architecture", None)
    if architecture is None:
        yield "architecture is not set: set it in the constructor to the keyword arguments that build the network"
        return
    try:
        arguments = json.loads(json.dumps(dict(architecture)))
    except TypeError as error:
        yield f"architecture cannot be written as JSON: {error}"
        return
    try:
        rebuilt = type(backbone)(**arguments)
    except Exception as error:
        yield f"{kind}(**architecture) fails to rebuild the network: {type(error).__name__}: {error}"
        return
    state = backbone.state_dict()
    expected = {name: tuple(tensor.shape) for name, tensor in state.items()}
    found = {name: tuple(tensor.shape) for name, tensor in rebuilt.state_dict().items()}
    wrong = sorted(
        name for name in expected.keys() | found.keys() if expected.get(name, "absent") != found.get(name, "absent")
    )
    if wrong:
        differences = "; ".join(
            f"{name} is {found.get(name, 'absent')}, expected {expected.get(name, 'absent')}" for name in wrong[:3]
        )
        yield f"{kind}(**architecture) does not rebuild this network's state dict: {differences}"
        return
    if rebuilt.groups != backbone.groups or tuple(rebuilt.image_shape) != tuple(backbone.image_shape):
        yield f"{kind}(**architecture) does not rebuild this network: other groups or another image_shape"
        return
    rebuilt.to(device=case.images.device, dtype=torch.float64).eval().requires_grad_(False)
    rebuilt.load_state_dict(state)
    ours, theirs = given_eps(backbone, case.eps), given_eps(rebuilt, case.eps)
    if not all(
        close(a, b)
        for a, b in [
            *zip(ours.z, theirs.z, strict=True),
            (backbone.likelihood(ours.features).mean, rebuilt.likelihood(theirs.features).mean),
            *zip(
                backbone.infer(case.images, noise=case.noise).z,
                rebuilt.infer(case.images, noise=case.noise).z,
                strict=True,
            ),
        ]
    ):
        yield (
            f"{kind}(**architecture) with this state dict computes something else: "
            "the network depends on values that are in neither (make them constructor arguments or buffers)"
        )
