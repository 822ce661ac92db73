"""Translation of the architecture record in hvae-oodd run folders to the arguments of `HVAE`."""

from __future__ import annotations

from typing import Any

from ebm_prior.backbones.options import require_nothing_left, take

from ebm_prior.errors import ConfigurationError, shown

LIKELIHOODS = {
    "BernoulliLikelihoodConv2d": "bernoulli",
    "DiscretizedLogisticMixLikelihoodConv2d": "logistic_mixture",
}
_NOT_SUPPORTED = "which this adapter does not support"


def translate(record: Any) -> dict[str, Any]:
    """The keyword arguments of `HVAE` from the content of model_kwargs.pt.

    Absent options have the defaults of the official constructors. Raises ConfigurationError for what is unsupported.
    """
    kwargs = record.get("kwargs") if isinstance(record, dict) else None
    if not isinstance(kwargs, dict):
        raise ConfigurationError(f"expected a dict with the entry 'kwargs', found {shown(record)}")
    kwargs = dict(kwargs)
    image_shape = take(kwargs, "input_shape", list)
    likelihood = take(kwargs, "likelihood_module", str)
    if likelihood not in LIKELIHOODS:
        raise ConfigurationError(f"expected a likelihood among {list(LIKELIHOODS)}, found {shown(likelihood)}")
    blocks = take(kwargs, "config_deterministic", list)
    latents = take(kwargs, "config_stochastic", list)
    if not image_shape or not all(isinstance(stage, list) for stage in blocks):
        raise ConfigurationError(
            f"expected an image shape and lists of blocks, found {shown(image_shape)} and {shown(blocks)}"
        )
    if len(blocks) != len(latents):
        raise ConfigurationError(f"expected as many stages as latents, found {len(blocks)} and {len(latents)}")
    if kwargs.pop("padded_shape", None) is not None:
        raise ConfigurationError(f"found padded_shape, {_NOT_SUPPORTED}")
    if kwargs.pop("features_out", None) not in (None, image_shape[0]):
        raise ConfigurationError(f"found features_out other than the number of colours, {_NOT_SUPPORTED}")
    architecture = {
        "image_shape": image_shape,
        "likelihood": LIKELIHOODS[likelihood],
        "stages": [
            {"blocks": [_block(b) for b in stage], "latent": _latent(latent)}
            for stage, latent in zip(blocks, latents, strict=True)
        ],
        "activation": take(kwargs, "activation", str, "Swish"),
        "q_dropout": take(kwargs, "q_dropout", (int, float), 0.0),
        "p_dropout": take(kwargs, "p_dropout", (int, float), 0.0),
        "skips": take(kwargs, "skip_stochastic", bool, True),
    }
    require_nothing_left(kwargs, "model")
    return architecture


def data_name(datamodule: Any) -> str | None:
    """The first training data set in datamodule_config.pt, without the suffix for the treatment of its pixels."""
    names = datamodule.get("train_datasets") if isinstance(datamodule, dict) else None
    if not names or not isinstance(names, dict):
        return None
    return str(next(iter(names))).removesuffix("Binarized").removesuffix("Dequantized")


def _block(config: Any) -> dict[str, Any]:
    config = _named(config, ("ResBlockConv2d",))
    for mode in ("downsampling_mode", "upsampling_mode"):
        if config.pop(mode, "convolutional") != "convolutional":
            raise ConfigurationError(f"found a {mode} other than convolutional, {_NOT_SUPPORTED}")
    block = {
        "filters": take(config, "out_channels", int),
        "kernel": take(config, "kernel_size", int),
        "stride": take(config, "stride", int, 1),
        "gated": take(config, "gated", bool, True),
        "weight_norm": take(config, "weightnorm", bool, True),
    }
    require_nothing_left(config, "block")
    return block


def _latent(config: Any) -> dict[str, Any]:
    dense = isinstance(config, dict) and config.get("block") == "GaussianDense"
    config = _named(config, ("GaussianConv2d", "GaussianDense"))
    latent = {
        "features": take(config, "latent_features", int),
        "kernel": None if dense else take(config, "kernel_size", int, 3),
        "weight_norm": take(config, "weightnorm", bool, True),
        "learned_prior": take(config, "learn_prior", bool, False),
    }
    require_nothing_left(config, "latent")
    return latent


def _named(config: Any, names: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(config, dict) or config.get("block") not in names:
        raise ConfigurationError(f"expected a block among {names}, found {shown(config)}")
    return {key: value for key, value in config.items() if key != "block"}
