"""The official folder of a BIVA: it gives back the network, runs no code, and says what does not fit."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ebm_prior.backbones.biva.adapter import BIVA
from ebm_prior.backbones.safe_loading import load_json, load_pickle
from exploits import Exploit
from tiny_biva import CONV, DENSE, ELSEWHERE, STAGE, dumps, tiny, tiny_config, tiny_record, weights, write_run

from ebm_prior.errors import CheckpointError


@pytest.mark.parametrize(("protocol", "legacy"), [(0, True), (4, False), (5, False)])
def test_an_official_folder_gives_back_the_network(tmp_path: Path, protocol: int, legacy: bool) -> None:
    loaded = BIVA.load_official(write_run(tmp_path, protocol=protocol, legacy=legacy))
    assert loaded.architecture == tiny(q_dropout=0.5, p_dropout=0, init_std=0.01).architecture
    assert loaded.data_name is None  # a fixed binarisation, which is not the MNIST that we know by name
    assert not any(module.training for module in loaded.modules())
    state = torch.load(tmp_path / "model.pth")
    assert state.keys() == loaded.network.state_dict().keys()
    assert all(torch.equal(value, state[key]) for key, value in loaded.network.state_dict().items())
    assert not {"biva", "biva.model.stage"} & sys.modules.keys()


def test_every_option_of_the_official_code_is_understood(tmp_path: Path) -> None:
    changes = {"log_var_act": torch.nn.Tanh, "nonlinearity": "relu", "no_skip": True, "features_out": 30}
    record = tiny_record(Stage=STAGE["lvae"], type="lvae", tensor_shp=(-1, 3, 8, 8), **changes)
    architecture: dict[str, Any] = {
        "image_shape": [3, 8, 8],
        "likelihood": "logistic_mixture",
        "kind": "lvae",
        "components": 3,
        "log_variance": "tanh",
        "activation": "ReLU",
        "skips": False,
        "init_std": 0.01,
    }
    config = tiny_config(dataset="cifar10", nr_mix=3)
    loaded = BIVA.load_official(write_run(tmp_path, record=record, config=config, state=weights(**architecture)))
    assert loaded.architecture == tiny(q_dropout=0.5, p_dropout=0, **architecture).architecture
    assert loaded.data_name == "cifar10"
    record = tiny_record(Stage=STAGE["vae"], type="vae", log_var_act=None)
    state = weights(kind="vae", log_variance="none")
    assert "stages.2.q_proj.linear.linear.weight_v" in state  # which nothing reads
    loaded = BIVA.load_official(write_run(tmp_path, record=record, state=state))
    assert loaded.architecture["log_variance"] == "none"


# Refusals.


@pytest.mark.parametrize("place", ["Stage", "new option"])
def test_a_malicious_file_is_refused_and_does_not_run(tmp_path: Path, place: str) -> None:
    exploit = Exploit(tmp_path / "run")
    write_run(tmp_path, record=tiny_record(**{place: exploit}))
    with pytest.raises(CheckpointError, match=r"mkdir, refused because loading it could run code"):
        BIVA.load_official(tmp_path)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("stranger", [ELSEWHERE, torch.nn.ReLU, print, torch.nn.functional.softplus, Path])
def test_names_that_are_not_on_the_list_are_refused(tmp_path: Path, stranger: Any) -> None:
    with pytest.raises(CheckpointError, match=rf"found the name \S*{stranger.__name__}, refused"):
        BIVA.load_official(write_run(tmp_path, record=tiny_record(log_var_act=stranger)))


def test_a_name_on_the_list_is_a_word_and_cannot_be_called(tmp_path: Path) -> None:
    path = tmp_path / "file.p"
    words = {"torch.nn.modules.activation.Softplus": "softplus"}
    path.write_bytes(dumps([torch.nn.Softplus, 1.5, (True, None), {"a": "b"}]))
    assert load_pickle(path, "a list", words) == ["softplus", 1.5, [True, None], {"a": "b"}]
    for instruction in (b")R", b")\x81", b"}b"):  # call it, make an instance, set its attributes
        path.write_bytes(b"ctorch.nn.modules.activation\nSoftplus\n" + instruction + b".")
        with pytest.raises(CheckpointError, match=r"file.p, found a damaged file"):
            load_pickle(path, "a list", words)
    for dotted in (b"Softplus.forward", b"Softplus.__init__.__globals__"):
        path.write_bytes(b"\x80\x04\x8c\x1btorch.nn.modules.activation\x8c" + bytes([len(dotted)]) + dotted + b"\x93.")
        with pytest.raises(CheckpointError, match=r"found the name torch.nn.modules.activation.Softplus\.\w+"):
            load_pickle(path, "a list", words)


def endless() -> bytes:
    knot: list[Any] = []
    knot.append(knot)
    return pickle.dumps(knot)


def laughter() -> bytes:
    laugh: Any = "ha"
    for _ in range(30):
        laugh = [laugh, laugh]
    return pickle.dumps(laugh)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (endless(), "entries that contain themselves"),
        (laughter(), "found too many"),
        (b"]r\xff\xff\xff\x7f.", "a damaged file"),  # memo entry 2³¹ of a list
        (b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f.", "a damaged file"),  # 2⁶³ bytes follow, says the file
        (pickle.dumps(10**5000), "found int"),
        (pickle.dumps({1: 2}), "found dict"),
        (pickle.dumps({"a": {1}}, protocol=4), "found set"),
        (pickle.dumps([b"ab"]), "found bytes"),
        (b"\x80\x04" + b"N" * 100_000 + b".", "at most 100000 bytes"),
        (b"", "a damaged file"),
    ],
    ids=["cycle", "expansion", "memo", "length", "integer", "keys", "set", "bytes", "size", "empty"],
)
def test_pickles_that_are_no_plain_record_end_early(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "file.p").write_bytes(data)
    with pytest.raises(CheckpointError, match=message):
        load_pickle(tmp_path / "file.p", "a record", {})


@pytest.mark.parametrize("data", [b"", b"{", b"[1]", b"[" * 50_000, b'{"a": "\xff"}', b'{"a": 1' + b"0" * 5000 + b"}"])
def test_a_record_that_is_no_json_object_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "config.json").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"expected the options in .*config.json"):
        load_json(tmp_path / "config.json", "the options")


def test_other_files_of_the_folder_are_not_opened(tmp_path: Path) -> None:
    write_run(tmp_path)
    (tmp_path / "optimizer.p").write_bytes(pickle.dumps(Exploit(tmp_path / "run")))
    BIVA.load_official(tmp_path)
    assert not (tmp_path / "run").exists()


def change(path: tuple[Any, ...], value: Any) -> Callable[[dict[str, Any]], None]:
    def apply(record: Any) -> None:
        for key in path[:-1]:
            record = record[key]
        record[path[-1]] = value

    return apply


UNSUPPORTED: dict[str, tuple[tuple[Any, ...], Any, str]] = {
    "not the type's stage": (("Stage",), STAGE["vae"], "that agree, found 'biva' and 'vae'"),
    "stage": (("Stage",), DENSE, "that agree, found 'biva' and 'dense'"),
    "no image": (("tensor_shp",), (1, 8, 8), r"tensor_shp: expected \(batch, C, H, W\)"),
    "not square": (("tensor_shp",), (-1, 1, 8, 4), "square"),
    "huge image": (("tensor_shp",), (-1, 1, 10**9, 10**9), "image_shape: expected an integer from 1 to"),
    "latents": (("latents",), [], "as many stages as latents"),
    "nonlinearity": (("nonlinearity",), "gelu", "nonlinearity: expected one of .*found 'gelu'"),
    "log variance": (("log_var_act",), CONV, "log_variance: expected one of"),
    "outputs": (("features_out",), 100, "features_out: expected 1 for the data set binmnist, found 100"),
    "flag": (("no_skip",), 0, "no_skip: expected <class 'bool'>, found 0"),
    "dropout": (("p_dropout",), 1.0, "dropout rates in"),
    "padding": (("padded_shp",), (-1, 1, 32, 32), "found the model options {'padded_shp'.*does not support"),
    "conditional": (("conditional_bu",), False, "found the model options {'conditional_bu'"),
    "merge": (("merge_kernel",), 5, "found the model options {'merge_kernel'"),
    "learned prior": (("latents", 2, "learn_prior"), True, "found the latent options {'learn_prior'"),
    "two latent blocks": (("latents", 1, "block"), (DENSE, DENSE), "DenseNormal or ConvNormal"),
    "no latent size": (("latents", 1), {"block": DENSE}, "expected the option N"),
    "kernel of a vector": (("latents", 1, "kernel"), 3, "found the latent options {'kernel'"),
    "block options": (("stages", 0, 0), [4, 3], "expected a list of blocks"),
    "no blocks": (("stages", 0), [], "at least one block"),
    "many blocks": (("stages", 0), [[4, 3, 1]] * 5000, "number of blocks in all: expected"),
    "negative": (("stages", 0, 0, 0), -4, "Block.filters: expected an integer from 1"),
    "huge": (("stages", 0, 0, 0), 10**15, "Block.filters: expected an integer from 1 to"),
    "fraction": (("stages", 0, 0, 1), 3.0, "Block.kernel: expected an integer from 1"),
    "wide": (("stages", 0, 0, 0), 4096, "as many filters"),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_unsupported_architectures_are_refused(tmp_path: Path, case: str) -> None:
    path, value, message = UNSUPPORTED[case]
    record = tiny_record()
    change(path, value)(record)
    with pytest.raises(CheckpointError, match=message):
        BIVA.load_official(write_run(tmp_path, record=record, state={}))


def test_a_missing_option_is_named(tmp_path: Path) -> None:
    for key in tiny_record():
        record = tiny_record()
        del record[key]
        with pytest.raises(CheckpointError, match=f"expected the option {key}"):
            BIVA.load_official(write_run(tmp_path, record=record, state={}))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"dataset": "celeba"}, r"dataset: expected one of \['binmnist', 'cifar10'\], found 'celeba'"),
        ({}, "expected the option dataset"),
        ({"dataset": []}, "dataset: expected"),
        ({"dataset": "cifar10"}, "expected the option nr_mix"),
        ({"dataset": "cifar10", "nr_mix": 3}, "features_out: expected 30 for the data set cifar10, found 1"),
    ],
)
def test_training_options_that_name_no_likelihood_are_refused(tmp_path: Path, config: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        BIVA.load_official(write_run(tmp_path, config=config, state={}))


def test_weights_that_never_met_data_are_refused(tmp_path: Path) -> None:
    state = weights()
    flags = [key for key in state if key.endswith("initialized")]
    assert len(flags) == len([key for key in state if key.endswith("weight_g")])
    for key in flags[::10]:
        layer = key.removesuffix(".initialized")
        with pytest.raises(CheckpointError, match=rf"never initialised from data \({layer}\)"):
            BIVA.load_official(write_run(tmp_path, state={**state, key: torch.tensor(False)}))
