"""Translation of the records in run folders of biva-pytorch (hyperparameters.p, config.json) to arguments of `BIVA`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ebm_prior.backbones.options import require_nothing_left, take

from ebm_prior.errors import ConfigurationError, shown

WORDS = {
    "biva.model.stage.BivaStage": "biva",
    "biva.model.stage.LvaeStage": "lvae",
    "biva.model.stage.VaeStage": "vae",
    "biva.model.stochastic.DenseNormal": "dense",
    "biva.model.stochastic.ConvNormal": "conv",
    "torch.nn.modules.activation.Softplus": "softplus",
    "torch.nn.modules.activation.Tanh": "tanh",
}
"""All names that hyperparameters.p may contain, with the word for each."""

ACTIVATIONS = {"elu": "ELU", "relu": "ReLU"}
DATASETS = {"binmnist": "bernoulli", "cifar10": "logistic_mixture"}


def translate(hyperparameters: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments of `BIVA` from the content of the two files. Raises ConfigurationError for the unsupported.

    config.json tells the likelihood, by the name of the data set. Everything else comes from the hyper-parameters,
    which are the official constructor's arguments.
    """
    if not isinstance(hyperparameters, dict):
        raise ConfigurationError(f"expected a dict of hyper-parameters, found {shown(hyperparameters)}")
    rest = dict(hyperparameters)
    kind, stage = take(rest, "type", str), take(rest, "Stage", str)
    if kind != stage:
        raise ConfigurationError(f"expected a type and a Stage that agree, found {kind!r} and {stage!r}")
    shape = take(rest, "tensor_shp", list)
    if len(shape) != 4:
        raise ConfigurationError(f"tensor_shp: expected (batch, C, H, W), found {shown(shape)}")
    blocks, latents = take(rest, "stages", list), take(rest, "latents", list)
    if len(blocks) != len(latents):
        raise ConfigurationError(f"expected as many stages as latents, found {len(blocks)} and {len(latents)}")
    activation = take(rest, "nonlinearity", str)
    if activation not in ACTIVATIONS:
        raise ConfigurationError(f"nonlinearity: expected one of {list(ACTIVATIONS)}, found {activation!r}")
    architecture = {
        "image_shape": shape[1:],
        **_likelihood(take(rest, "features_out", int), shape[1], config),
        "stages": [
            {"blocks": _blocks(stage), "latent": _latent(latent)} for stage, latent in zip(blocks, latents, strict=True)
        ],
        "kind": kind,
        "log_variance": take(rest, "log_var_act", (str, type(None))) or "none",
        "activation": ACTIVATIONS[activation],
        "q_dropout": take(rest, "q_dropout", (int, float)),
        "p_dropout": take(rest, "p_dropout", (int, float)),
        "skips": not take(rest, "no_skip", bool),
        "init_std": 0.01,  # a constant there
    }
    require_nothing_left(rest, "model")
    return architecture


def _likelihood(features_out: int, colours: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    dataset = take(dict(config), "dataset", str)
    if dataset not in DATASETS:
        raise ConfigurationError(f"dataset: expected one of {list(DATASETS)}, found {dataset!r}")
    likelihood: dict[str, Any] = {"likelihood": DATASETS[dataset]}
    expected = colours
    if dataset == "cifar10":
        likelihood["components"] = take(dict(config), "nr_mix", int)
        expected = 10 * likelihood["components"]
    if features_out != expected:
        raise ConfigurationError(f"features_out: expected {expected} for the data set {dataset}, found {features_out}")
    return likelihood


def _blocks(stage: Any) -> list[dict[str, Any]]:
    if not isinstance(stage, list) or not all(isinstance(block, list) and len(block) == 3 for block in stage):
        raise ConfigurationError(f"expected a list of blocks [filters, kernel, stride], found {shown(stage)}")
    return [dict(zip(("filters", "kernel", "stride"), block, strict=True)) for block in stage]


def _latent(latent: Any) -> dict[str, Any]:
    if not isinstance(latent, dict) or latent.get("block") not in ("dense", "conv"):
        raise ConfigurationError(f"expected a latent of DenseNormal or ConvNormal, found {shown(latent)}")
    rest = {key: value for key, value in latent.items() if key != "block"}
    features = take(rest, "N", int)
    kernel = take(rest, "kernel", int) if latent["block"] == "conv" else None
    require_nothing_left(rest, "latent")
    return {"features": features, "kernel": kernel}
