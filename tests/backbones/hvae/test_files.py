"""The official folder of an HVAE: it gives back the network, runs no code, and says what does not fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ebm_prior.backbones.hvae.adapter import HVAE
from exploits import Exploit
from tiny_hvae import initialised, tiny, tiny_record, write_run

from ebm_prior.errors import CheckpointError


def test_the_official_default_activation_is_swish(tmp_path: Path) -> None:
    record = tiny_record()
    del record["activation"]
    assert HVAE.load_official(write_run(tmp_path, record=record)).architecture["activation"] == "Swish"


def test_unnormed_weights_and_a_learned_prior_have_their_official_names(tmp_path: Path) -> None:
    record = tiny_record()
    for config in (
        *record["config_deterministic"][0],
        *record["config_deterministic"][1],
        *record["config_stochastic"],
    ):
        config["weightnorm"] = False
    record["config_stochastic"][1]["learn_prior"] = True
    stages = tiny().architecture["stages"]
    for stage in stages:
        for options in (*stage["blocks"], stage["latent"]):
            options["weight_norm"] = False
    stages[1]["latent"]["learned_prior"] = True
    model = initialised(tiny(stages=stages))
    names = dict(model.network.named_parameters())
    assert "stages.1.stochastic.prior_logits" in names
    assert "stages.0.q_deterministic.layers.0.conv1.conv.weight" in names
    assert "stages.1.stochastic.in_transform_q.linear.weight" in names
    assert "stages.1.p_projection.transform.linear.weight_v" in names  # projections are always normed
    # Unnormed layers keep their flag False for ever, which is not an error.
    loaded = HVAE.load_official(write_run(tmp_path, record=record, state=model.network.state_dict()))
    eps = loaded.standard_normal(2)
    assert torch.equal(loaded.decode(loaded.reparameterize(eps)).mean, model.decode(model.reparameterize(eps)).mean)


@pytest.mark.parametrize(
    ("datamodule", "name"),
    [
        ({"train_datasets": {"FashionMNISTBinarized": {"dynamic": True}, "MNISTBinarized": {}}}, "FashionMNIST"),
        ({"train_datasets": {"CIFAR10Dequantized": {}}, "batch_size": 128}, "CIFAR10"),
        ({"train_datasets": {}}, None),
        ({"train_datasets": ["MNISTBinarized"]}, None),
        (["MNISTBinarized"], None),
        (None, None),
    ],
)
def test_the_data_set_is_the_first_that_the_folder_names(tmp_path: Path, datamodule: Any, name: str | None) -> None:
    write_run(tmp_path)
    if datamodule is not None:
        torch.save(datamodule, tmp_path / "datamodule_config.pt")
    assert HVAE.load_official(tmp_path).data_name == name


def test_other_files_of_the_folder_are_not_opened(tmp_path: Path) -> None:
    write_run(tmp_path)
    torch.save(Exploit(tmp_path / "run"), tmp_path / "evaluator.pt")
    (tmp_path / "datamodule_config.pt").write_bytes(b"not a torch file")
    assert HVAE.load_official(tmp_path).data_name is None
    torch.save({"train_datasets": Exploit(tmp_path / "run")}, tmp_path / "datamodule_config.pt")
    assert HVAE.load_official(tmp_path).data_name is None
    assert not (tmp_path / "run").exists()


def test_another_model_class_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"expected the model class VAE.*found 'LVAE'"):
        HVAE.load_official(write_run(tmp_path, name="LVAE"))


def change(path: tuple[Any, ...], value: Any) -> Callable[[dict[str, Any]], None]:
    def apply(record: Any) -> None:
        for key in path[:-1]:
            record = record[key]
        record[path[-1]] = value

    return apply


BLOCK = ("config_deterministic", 0, 0)


UNSUPPORTED = {
    "likelihood": (change(("likelihood_module",), "BetaLikelihoodConv2d"), "BetaLikelihoodConv2d"),
    "activation with parameters": (change(("activation",), "PSwish"), "PSwish"),
    "padding": (change(("padded_shape",), [1, 32, 32]), "padded_shape"),
    "output channels": (change(("features_out",), 7), "features_out"),
    "downsampling": (change((*BLOCK, "downsampling_mode"), "nearest"), "downsampling_mode"),
    "upsampling": (change((*BLOCK, "upsampling_mode"), "bilinear"), "upsampling_mode"),
    "block": (change((*BLOCK, "block"), "DenseBlock"), "DenseBlock"),
    "latent": (change(("config_stochastic", 1, "block"), "Categorical"), "Categorical"),
    "unknown option": (change((*BLOCK, "dilation"), 2), "dilation"),
    "absurd size": (change((*BLOCK, "kernel_size"), [3, 3]), "kernel_size"),
    "negative size": (change((*BLOCK, "out_channels"), -4), "filters"),
    "no stages": (change(("config_stochastic",), []), "as many stages as latents"),
    "huge": (change((*BLOCK, "out_channels"), 10**6), "filters: expected an integer from 1 to 4096"),
    "wide": (change((*BLOCK, "out_channels"), 4096), "first block must have as many filters"),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_unsupported_architectures_are_refused(tmp_path: Path, case: str) -> None:
    apply, message = UNSUPPORTED[case]
    record = tiny_record()
    apply(record)
    with pytest.raises(CheckpointError, match=message):
        HVAE.load_official(write_run(tmp_path, record=record))


def test_weights_that_never_met_data_are_refused(tmp_path: Path) -> None:
    state = initialised(tiny()).network.state_dict()
    key = "stages.1.stochastic.in_transform_q.initialized"
    with pytest.raises(CheckpointError, match=r"never initialised from data \(stages.1.stochastic.in_transform_q\)"):
        HVAE.load_official(write_run(tmp_path, state={**state, key: torch.tensor(False)}))
