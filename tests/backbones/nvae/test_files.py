"""The official checkpoint of an NVAE: it gives back the network, runs no code, and says what does not fit."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ebm_prior.backbones.nvae.adapter import NVAE
from ebm_prior.backbones.nvae.official import translate
from exploits import Exploit
from tiny_nvae import tiny, tiny_args, trained, weights, write
from workshop import Workshop

from ebm_prior.errors import CheckpointError
from ebm_prior.storage.checkpoint import backbone_record, load_backbone
from ebm_prior.storage.weights import fingerprint


def test_weights_that_the_file_holds_twice_are_read_once(tmp_path: Path) -> None:
    path = write(tmp_path)
    state = torch.load(path, weights_only=False)["state_dict"]
    more = state.keys() - NVAE.load_official(path).network.state_dict().keys()
    assert len(more) == 3 * 4  # three decoder cells, one behind them
    assert all(key.endswith(".weight_normalized") for key in more)


def test_old_files_lack_aliases_and_options(tmp_path: Path) -> None:
    args = tiny_args(dataset="cifar10", num_groups_per_scale=1)
    for option in ("ada_groups", "min_groups_per_scale", "num_mixture_dec"):
        delattr(args, option)
    model = trained(tiny(image_shape=[3, 32, 32], groups_per_scale=[1, 1], components=10))
    loaded = NVAE.load_official(write(tmp_path, args=args, state=model.network.state_dict()))
    assert loaded.architecture == model.architecture


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_after_loading_nothing_of_the_file_is_in_memory(tmp_path: Path) -> None:
    path = write(tmp_path)
    loaded = NVAE.load_official(path)
    assert (
        str(path) not in Path("/proc/self/maps").read_text()
    )  # neither the optimizer, nor weights that a writer moves
    assert all(parameter.is_cpu for parameter in loaded.parameters())


def test_weights_from_a_gpu_load_without_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda _: "cuda:0")
        path = write(tmp_path)
    assert b"cuda:0" in path.read_bytes()
    assert all(parameter.is_cpu for parameter in NVAE.load_official(path).parameters())


# Refusals.


@pytest.mark.parametrize("place", ["args", "epoch"])
def test_a_malicious_file_is_refused_and_does_not_run(tmp_path: Path, place: str) -> None:
    exploit = Exploit(tmp_path / "run")
    write(tmp_path, **{place: tiny_args(save=exploit) if place == "args" else exploit})
    with pytest.raises(CheckpointError, match="mkdir, refused because loading it could run code"):
        NVAE.load_official(tmp_path / "checkpoint.pt")
    assert not (tmp_path / "run").exists()


def test_namespaces_are_read_here_alone(tmp_path: Path) -> None:
    write(tmp_path)
    NVAE.load_official(tmp_path / "checkpoint.pt")
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


def test_a_flipped_bit_is_refused(tmp_path: Path) -> None:
    state = weights(trained(tiny()))
    path = write(tmp_path, state=state)
    content = bytearray(path.read_bytes())
    content[content.index(state["stem.weight"].numpy().tobytes())] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"checkpoint.pt, found a damaged file"):
        NVAE.load_official(path)


def test_bits_mean_nothing_to_binary_images(tmp_path: Path) -> None:
    assert translate(vars(tiny_args(dataset="mnist", num_x_bits=5)))["bits"] == 8


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ({"netE0": {}, "opt0": {}}, "netE0"),
        (tiny().network.state_dict(), "dec_sampler"),
        ({"state_dict": {}, "args": "--dataset mnist"}, "a dict of args, state_dict"),
        ({"args": tiny_args()}, "a dict of args"),
        ([1, 2], "found list"),
    ],
)
def test_a_file_of_another_kind_is_refused(tmp_path: Path, content: Any, found: str) -> None:
    torch.save(content, tmp_path / "checkpoint.pt")
    with pytest.raises(CheckpointError, match=f"expected an NVAE checkpoint in .*{found}.*a dict with state_dict and"):
        NVAE.load_official(tmp_path / "checkpoint.pt")


UNSUPPORTED: dict[str, tuple[dict[str, Any], str]] = {
    "cells": ({"arch_instance": "res_elu"}, "arch_instance res_mbconv.*found res_elu"),
    "blocks": ({"num_postprocess_blocks": 2}, "found 2 and 1"),
    "type": ({"use_se": 1}, "use_se: expected bool, found 1"),
    "scales": ({"num_latent_scales": 10**9}, "halve evenly"),
    "endless": ({"num_groups_per_scale": 4000}, "at most 4096 cells in all"),
    "huge": ({"num_channels_enc": 10**30}, "encoder_channels: expected an integer"),
    "wide": ({"num_channels_dec": 4096}, "mis-shaped"),
    "bits": ({"num_x_bits": 9}, "bits: expected 1 to 8"),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_unsupported_arguments_are_refused(tmp_path: Path, case: str) -> None:
    changes, message = UNSUPPORTED[case]
    with pytest.raises(CheckpointError, match=message):
        NVAE.load_official(write(tmp_path, args=tiny_args(**changes)))


def test_a_missing_option_is_named(tmp_path: Path) -> None:
    args = tiny_args()
    del args.num_nf
    with pytest.raises(CheckpointError, match="expected the option num_nf"):
        NVAE.load_official(write(tmp_path, args=args))


# The own form.


def test_converts_to_a_third_and_half_of_that(workshop: Workshop, tmp_path: Path) -> None:
    """The file of the official code holds an optimizer's state too."""
    official, own = write(tmp_path), tmp_path / "own.safetensors"
    workshop.run("convert", "--backbone", "nvae", "--ckpt", official, "--out", own)
    assert own.stat().st_size < official.stat().st_size / 3
    half = tmp_path / "half.safetensors"
    workshop.run("convert", "--ckpt", own, "--out", half, "--precision", "float16")
    assert half.stat().st_size < 0.75 * own.stat().st_size  # names weigh, in so small a network


def test_a_gaussian_file_is_scored_as_its_converter_says(workshop: Workshop, tmp_path: Path) -> None:
    """NVAE's and VAEBM's files do not differ in form, but their log p(x | z) does where log σ is below −2."""
    model = trained(tiny(likelihood="gaussian"))
    with torch.no_grad():
        model.network.image_conditional[1].bias[3:] = -4.0
    path = write(tmp_path, args=tiny_args(num_mixture_dec=1), state=weights(model))
    convert = ("convert", "--backbone", "nvae", "--ckpt", path, "--out")
    nvae, vaebm = tmp_path / "nvae.safetensors", tmp_path / "vaebm.safetensors"
    workshop.run(*convert, nvae)
    workshop.run(*convert, vaebm, "--set", "log_std_floor=-2", "--set", "residual_posterior=true")
    assert backbone_record(vaebm)["record"]["set"] == {"log_std_floor": -2, "residual_posterior": True}
    assert "set" not in backbone_record(nvae)["record"]
    again = tmp_path / "again.safetensors"
    workshop.run("convert", "--ckpt", vaebm, "--set", "bits=5", "--out", again)
    assert list(backbone_record(again)["record"]["set"]) == ["bits", "log_std_floor", "residual_posterior"]
    first, second = (load_backbone(None, file) for file in (nvae, vaebm))
    assert (first.architecture["log_std_floor"], second.architecture["log_std_floor"]) == (None, -2)
    assert fingerprint(first) == fingerprint(second) == fingerprint(model)
    z, images = first.sample(2, generator=torch.Generator().manual_seed(0)), torch.rand(2, 3, 8, 8)
    assert torch.equal(first.decode(z).mean, second.decode(z).mean)
    assert (second.decode(z).log_prob(images) > first.decode(z).log_prob(images)).all()
    for changes, message in (
        ("decoder_channels=5", r"--set decoder_channels: expected options that change no weights, found \d+ weights"),
        ("flows=0", "--set flows: expected options that change no weights.*nf_cells"),
        ("likelihood='bernoulli'", "--set likelihood='bernoulli': expected KEY=VALUE with the value in JSON"),
        ("bits=9", "--set bits: NVAE cannot build.*bits: expected 1 to 8"),
        ("floor=-2", "--set floor: NVAE has only the options image_shape, .* and [0-9]+ more"),
    ):
        assert re.search(message, workshop.error(*convert, tmp_path / "not.safetensors", "--set", changes))
    assert not (tmp_path / "not.safetensors").exists()
