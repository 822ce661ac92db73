"""The arguments in the checkpoints of the official NVAE code, in the terms of `NVAE`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ebm_prior.errors import ConfigurationError

BINARY = ("mnist", "omniglot")  # padded from 28 to 32, dynamically binarised
SIDES = {"cifar10": 32, "ffhq": 256}  # other names of colour images end in their side
DEFAULTS: dict[str, Any] = {"ada_groups": False, "min_groups_per_scale": 1, "num_mixture_dec": 10}
"""What files older than the option mean."""


def translate(args: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments of `NVAE` from the training options. Raises ConfigurationError for what is unsupported.

    The name of the data set says the size of an image and whether it is binary; nothing else is concluded from it.
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
    image = _image(_take(args, "dataset", str), _take(args, "num_mixture_dec", int))
    bits = _take(args, "num_x_bits", int)
    return {
        **image,
        "groups_per_scale": _groups(args),
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


def _image(dataset: str, components: int) -> dict[str, Any]:
    if dataset in BINARY:
        return {"image_shape": [1, 28, 28], "padding": 2, "likelihood": "bernoulli"}
    named = re.fullmatch(r"(?:celeba|imagenet|lsun_\w+)_(\d{1,4})", dataset)
    side = int(named[1]) if named else SIDES.get(dataset)
    if side is None:
        known = [*BINARY, *SIDES, "celeba_K", "imagenet_K", "lsun_…_K"]
        raise ConfigurationError(f"dataset: expected one of {known}, K the side of an image, found {dataset}")
    image = {"image_shape": [3, side, side]}
    if components == 1:
        return {**image, "likelihood": "gaussian"}
    return {**image, "likelihood": "logistic_mixture", "components": components}


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
        raise ConfigurationError(f"expected the option {key}, found only {sorted(map(str, args))}")
    value = args.get(key, DEFAULTS.get(key))
    if type(value) is not kind:
        raise ConfigurationError(f"{key}: expected {kind.__name__}, found {value!r}")
    return value
