"""The official folder of an HVAE: it gives back the network, runs no code, and says what does not fit."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ebm_prior.backbones.hvae.adapter import HVAE
from tiny_hvae import initialised, tiny

from ebm_prior.errors import CheckpointError


def tiny_record() -> dict[str, Any]:
    """`tiny()` as the official code records it; every option that has an official default is left out."""
    block = {"block": "ResBlockConv2d", "out_channels": 4, "kernel_size": 3, "weightnorm": True}
    return {
        "input_shape": torch.Size([1, 8, 8]),
        "likelihood_module": "BernoulliLikelihoodConv2d",
        "config_deterministic": [
            [{**block, "stride": 2, "gated": False}],
            [dict(block), {**block, "stride": 2, "gated": False}],
        ],
        "config_stochastic": [
            {"block": "GaussianConv2d", "latent_features": 2},
            {"block": "GaussianDense", "latent_features": 3, "weightnorm": True},
        ],
        "activation": "ReLU",
        "padded_shape": None,
    }


def write_run(folder: Path, *, record: dict[str, Any] | None = None, name: str = "VAE", state: Any = None) -> Path:
    """The folder that the official code leaves behind, of `tiny()` unless told otherwise."""
    torch.manual_seed(0)
    state = initialised(tiny()).network.state_dict() if state is None else state
    torch.save(name, folder / "model_class_name.pt")
    torch.save({"kwargs": record or tiny_record()}, folder / "model_kwargs.pt")
    torch.save(state, folder / "model_state_dict.pt")
    return folder


def test_an_official_folder_gives_back_the_network(tmp_path: Path) -> None:
    loaded = HVAE.load_official(write_run(tmp_path))
    assert loaded.architecture == tiny().architecture  # with the official default of `gated`, True
    assert not loaded.training
    state = torch.load(tmp_path / "model_state_dict.pt")
    assert state.keys() == loaded.network.state_dict().keys()
    assert all(torch.equal(value, state[key]) for key, value in loaded.network.state_dict().items())


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


class Exploit:
    """Makes a folder when it is unpickled."""

    def __init__(self, victim: Path) -> None:
        self.victim = str(victim)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.victim,)


@pytest.mark.parametrize("file", ["model_class_name.pt", "model_kwargs.pt", "model_state_dict.pt"])
def test_a_malicious_file_is_refused_and_does_not_run(tmp_path: Path, file: str) -> None:
    write_run(tmp_path)
    torch.save(Exploit(tmp_path / "run"), tmp_path / file)
    with pytest.raises(CheckpointError, match=r"mkdir, refused because loading it could run code"):
        HVAE.load_official(tmp_path)
    assert not (tmp_path / "run").exists()


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


@pytest.mark.parametrize("file", ["model_class_name.pt", "model_kwargs.pt", "model_state_dict.pt"])
def test_missing_and_truncated_files_are_named(tmp_path: Path, file: str) -> None:
    path = write_run(tmp_path) / file
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=f"{file}, found a damaged file"):
        HVAE.load_official(tmp_path)
    path.unlink()
    with pytest.raises(CheckpointError, match=f"{file}, found no such file"):
        HVAE.load_official(tmp_path)


def test_a_path_that_is_no_folder_is_told_the_format(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is not a folder, and the official format of HVAE is a folder with"):
        HVAE.load_official(tmp_path / "absent")


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


def test_every_weight_that_does_not_fit_is_named(tmp_path: Path) -> None:
    state = initialised(tiny()).network.state_dict()
    first, second, third = (key for key in list(state) if key.startswith("stages.0.q_deterministic.layers.0.conv1.c"))
    del state[first]
    state[second] = torch.ones(7)
    state[third] = state[third].to(torch.int64)
    state["surprise"] = torch.ones(2)
    with pytest.raises(CheckpointError) as caught:
        HVAE.load_official(write_run(tmp_path, state=state))
    for line in (
        f"missing: {first}",
        f"mis-shaped: {second}",
        f"of another type: {third}",
        "unexpected: surprise (2,)",
    ):
        assert line in str(caught.value)


def test_weights_that_are_not_finite_or_never_met_data_are_refused(tmp_path: Path) -> None:
    state = initialised(tiny()).network.state_dict()
    key = "stages.1.stochastic.in_transform_q.initialized"
    with pytest.raises(CheckpointError, match=r"never initialised from data \(stages.1.stochastic.in_transform_q\)"):
        HVAE.load_official(write_run(tmp_path, state={**state, key: torch.tensor(False)}))
    bias = "likelihood.parameter_net.conv.bias"
    with pytest.raises(CheckpointError, match=f"found NaN or infinity in {bias}"):
        HVAE.load_official(write_run(tmp_path, state={**state, bias: torch.tensor([math.nan])}))
    with pytest.raises(CheckpointError, match="something else than a dict of dense tensors"):
        HVAE.load_official(write_run(tmp_path, state=[1, 2]))
