"""Translation of the arguments in checkpoints of the official NVAE code to arguments of `NVAE`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ebm_prior.backbones.state_dicts import remark
from torch import Tensor

from ebm_prior.errors import ConfigurationError, few, shown

BINARY = ("mnist", "omniglot")  # padded from 28 to 32, dynamically binarised
SIDES = {"cifar10": 32, "ffhq": 256}  # other names of colour images end in their side
DEFAULTS: dict[str, Any] = {"ada_groups": False, "min_groups_per_scale": 1, "num_mixture_dec": 10}
"""Values of options that older files lack."""


OPEN = ("image_shape", "padding", "likelihood", "components")
"""Options of `NVAE` that files do not hold; they are concluded from the name of the data set and from the weights."""


def translate(
    args: Mapping[str, Any], state: Mapping[str, Tensor] | None = None, given: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The keyword arguments of `NVAE` from the training options. Raises ConfigurationError for what is unsupported.

    state: the weights. given: options among `OPEN`, which replace conclusions from the file. The names of official data
    sets tell the size of an image and whether it is binary; for other names the weights tell it, with a remark.
    """
    cells = _take(args, "arch_instance", str)
    if cells != "res_mbconv":
        raise ConfigurationError(f"expected arch_instance res_mbconv, the one of all published models, found {cells}")
    blocks, postprocess = (_take(args, f"num_{side}process_blocks", int) for side in ("pre", "post"))
    if blocks != postprocess:
        raise ConfigurationError(
            f"expected as many blocks for post- as for preprocessing, so that the image gets its size back, found "
            f"{postprocess} and {blocks}"
        )
    groups, components = _groups(args), _take(args, "num_mixture_dec", int)
    image = _image(args.get("dataset"), components, blocks + len(groups) - 1, state or {}, given or {})
    bits = _take(args, "num_x_bits", int)
    return {
        **image,
        "groups_per_scale": groups,
        "latent_channels": _take(args, "num_latent_per_group", int),
        "encoder_channels": _take(args, "num_channels_enc", int),
        "decoder_channels": _take(args, "num_channels_dec", int),
        "blocks": blocks,
        "preprocess_cells": _take(args, "num_preprocess_cells", int),
        "postprocess_cells": _take(args, "num_postprocess_cells", int),
        "encoder_cells": _take(args, "num_cell_per_cond_enc", int),
        "decoder_cells": _take(args, "num_cell_per_cond_dec", int),
        "flows": _take(args, "num_nf", int),
        "squeeze_excite": _take(args, "use_se", bool),
        "residual_posterior": _take(args, "res_dist", bool),
        "bits": 8 if image["likelihood"] == "bernoulli" else bits,  # fewer leave binary pixels as they are
    }


def _image(
    dataset: Any, components: int, halvings: int, state: Mapping[str, Tensor], given: Mapping[str, Any]
) -> dict[str, Any]:
    """image_shape, padding, likelihood and components: as given, else as the data set's name has it, else the weights.

    components: of a mixture, by the training options. halvings: of the side, up to the top scale.
    """
    named = _named(dataset, components)
    if named is not None and not given:
        return named
    if {"image_shape", "likelihood"} <= given.keys():
        return {"components": components, **_framed(given, state, halvings), **given}
    if named is None:
        named = _seen(dataset, halvings, state)
        taken = {**named, **_framed(given, state, halvings), **given}
        shape = ",".join(map(str, taken["image_shape"]))
        frame = f" within a frame of {taken['padding']}" if taken.get("padding") else ""
        remark(
            f"the data set {shown(dataset)} is not one whose images are known: by the weights they are taken to have "
            f"the shape [{shape}]{frame} and the likelihood {taken['likelihood']}; if they have not, convert the file "
            "with e.g. --set image_shape=[1,28,28] --set likelihood=bernoulli"
        )
        return taken
    return {**named, **_framed(given, state, halvings), **given}


def _named(dataset: Any, components: int) -> dict[str, Any] | None:
    """The image options that an official name of a data set implies."""
    if not isinstance(dataset, str):
        return None
    if dataset in BINARY:
        return {"image_shape": [1, 28, 28], "padding": 2, "likelihood": "bernoulli"}
    named = re.fullmatch(r"(?:celeba|imagenet|lsun_\w+)_(\d{1,4})", dataset)
    side = int(named[1]) if named else SIDES.get(dataset)
    if side is None:
        return None
    image = {"image_shape": [3, side, side]}
    if components == 1:
        return {**image, "likelihood": "gaussian"}
    return {**image, "likelihood": "logistic_mixture", "components": components}


def _framed(given: Mapping[str, Any], state: Mapping[str, Tensor], halvings: int) -> dict[str, Any]:
    """The padding around images of the given shape that brings them to the side that the weights have."""
    shape, side = given.get("image_shape"), _side(state, halvings)
    if not isinstance(shape, list) or not shape or type(shape[-1]) is not int or side is None:
        return {}
    frame = side - shape[-1] - 2 * (given["padding"] if type(given.get("padding")) is int else 0)
    if frame and ("padding" in given or frame < 0 or frame % 2):
        raise ConfigurationError(
            f"image_shape: expected images of side {side}, zeros around them included, as the weights have it; found "
            f"{shape}{' and padding ' + str(given['padding']) if 'padding' in given else ''}: --set "
            f"image_shape=[{shape[0]},{side},{side}]"
        )
    return {"padding": frame // 2} if frame else {"padding": given.get("padding", 0)}


def _side(state: Mapping[str, Tensor], halvings: int) -> int | None:
    """The side of the image that the network sees, from the size of its top scale."""
    start = state.get("prior_ftr0")
    if start is None or start.dim() != 3 or not 0 <= halvings <= 32:
        return None
    return int(start.shape[1]) << halvings


def _seen(dataset: Any, halvings: int, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The image options concluded from the weights: the widths of the first and the last convolution."""
    side, stem, head = _side(state, halvings), state.get("stem.weight"), state.get("image_conditional.1.weight")
    if side is None or stem is None or stem.dim() != 4 or head is None or head.dim() != 4:
        known = [*BINARY, *SIDES, "celeba_K", "imagenet_K", "lsun_…_K"]
        raise ConfigurationError(
            f"dataset: expected one of {few(known)}, K the side of an image, or weights that tell the images' shape; "
            f"found {shown(dataset)} and no such weights: --set image_shape=[3,64,64] --set likelihood=logistic_mixture"
        )
    colours, numbers = int(stem.shape[1]), int(head.shape[0])
    image: dict[str, Any] = {"image_shape": [colours, side, side]}
    if numbers == colours:
        return {**image, "likelihood": "bernoulli"}
    if numbers == 2 * colours:
        return {**image, "likelihood": "gaussian"}
    each = {1: 3, 3: 10}.get(colours)
    if each and numbers % each == 0:
        return {**image, "likelihood": "logistic_mixture", "components": numbers // each}
    raise ConfigurationError(
        f"likelihood: expected {colours} numbers per pixel of {colours} colours (bernoulli), {2 * colours} (gaussian), "
        f"or of a logistic_mixture 3 for each component of one colour and 10 of three; found {numbers}, which is none "
        "that this adapter knows"
    )


def _groups(args: Mapping[str, Any]) -> list[int]:
    """Latent groups per scale, the highest resolution first; adaptive ones halve from scale to scale."""
    scales, most = (_take(args, f"num_{name}", int) for name in ("latent_scales", "groups_per_scale"))
    adaptive, least = _take(args, "ada_groups", bool), _take(args, "min_groups_per_scale", int)
    groups = [most]
    for _ in range(1, min(scales, 32)):  # more are refused by the network, so nothing hangs here
        groups.append(max(least, groups[-1] // 2) if adaptive else groups[-1])
    return groups


def _take(args: Mapping[str, Any], key: str, kind: type) -> Any:
    if key not in args and key not in DEFAULTS:
        example = {int: 1, bool: True, str: "res_mbconv"}[kind]
        raise ConfigurationError(
            f"expected the option {key} in args, found only {few(sorted(map(str, args)))}: write it there, e.g. "
            f"args.{key} = {example!r}, and save the file again"
        )
    value = args.get(key, DEFAULTS.get(key))
    if type(value) is not kind:
        raise ConfigurationError(f"{key}: expected {kind.__name__}, found {shown(value)}")
    return value
