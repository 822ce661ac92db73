"""The official files of a VDVAE: they give back the network, run no code, and what they leave open is asked for."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from ebm_prior.backbones.vdvae.adapter import VDVAE
from ebm_prior.backbones.vdvae.official import describe, read_log
from ebm_prior.backbones.vdvae.options import Architecture
from ebm_prior.backbones.vdvae.published import PUBLISHED
from tiny_vdvae import FIXTURES, TINY, needs_fixtures, published, tiny, trained_tiny, weights, write_log, write_weights
from torch import Tensor
from workshop import Workshop

from ebm_prior.errors import AssumptionWarning, CheckpointError, ConfigurationError, EbmPriorError
from ebm_prior.storage.checkpoint import backbone_record, load_backbone
from ebm_prior.storage.weights import fingerprint

# What gives back the network.


@pytest.mark.parametrize(("file", "prefix"), [("latest-model-ema.th", ""), ("latest-model.th", "module.")])
def test_an_official_file_gives_back_the_network(tmp_path: Path, file: str, prefix: str) -> None:
    write_log(tmp_path)
    loaded = VDVAE.load_official(write_weights(tmp_path, file, state=weights(prefix)))
    assert loaded.architecture == tiny().architecture
    assert not loaded.training
    assert loaded.data_name == "cifar10"
    assert loaded.network.state_dict().keys() == weights().keys()
    assert all(torch.equal(tensor, weights()[key]) for key, tensor in loaded.network.state_dict().items())
    assert all(parameter.requires_grad and parameter.is_cpu for parameter in loaded.parameters())


def test_settings_go_before_the_log_and_the_log_of_the_file_before_the_runs(tmp_path: Path) -> None:
    path = write_weights(tmp_path)
    write_log(tmp_path, "log.jsonl", dataset="imagenet64")
    assert VDVAE.load_official(path).architecture["data_set"] == "imagenet64"
    write_log(tmp_path, dataset="ffhq_256")
    assert VDVAE.load_official(path).architecture["data_set"] == "ffhq256"
    given = VDVAE.load_official(path, data_set="imagenet32", bits=7)
    assert (given.architecture["data_set"], given.architecture["bits"]) == ("imagenet32", 7)
    assert VDVAE.load_official(write_weights(tmp_path, "renamed.th")).architecture["data_set"] == "imagenet64"


def test_without_a_log_settings_are_enough_and_sizes_are_the_files(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text(
        'not a run\'s\n[1]\n{"type": "hparam"}\n{"type": "hparam", "key": [], "value": 1}\n'
    )
    path, sizes = write_weights(tmp_path), ("width", "zdim", "num_mixtures")
    loaded = VDVAE.load_official(path, **{key: value for key, value in TINY.items() if key not in sizes})
    assert loaded.architecture == tiny().architecture


def test_lines_of_a_log_are_read_piece_by_piece(tmp_path: Path) -> None:
    log = write_log(tmp_path, "log.jsonl")
    log.write_text(json.dumps({"message": "x" * 250_000}) + "\n" + log.read_text())
    assert read_log(tmp_path / "model.th") == ("log.jsonl", dict(TINY))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_are_known_by_their_shapes(name: str, tmp_path: Path) -> None:
    state = published(name).network.state_dict()
    described = describe(tmp_path / "model.th", state, {})
    assert described == (Architecture(data_set=name, **PUBLISHED[name]), f"the published configuration {name}", True)
    assert not describe(tmp_path / "model.th", state, {"data_set": name}).assumed


@pytest.fixture
def as_published(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if `tiny()` were published, for CIFAR-10."""
    monkeypatch.setitem(PUBLISHED, "cifar10", {key: value for key, value in TINY.items() if key != "data_set"})


@pytest.mark.usefixtures("as_published")
def test_the_data_set_of_a_published_configuration_is_said(tmp_path: Path) -> None:
    path = write_weights(tmp_path)
    with pytest.warns(AssumptionWarning, match="shapes published for cifar10: it is taken to be.*--set data_set=NAME"):
        loaded = VDVAE.load_official(path)
    assert loaded.architecture == tiny().architecture
    assert loaded.data_name == "cifar10"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what is given is not assumed
        assert VDVAE.load_official(path, data_set="cifar10").data_name == "cifar10"
        own = {"data_set": "mine", "shift": -99.0, "scale": 0.01, "bits": 8}
        assert VDVAE.load_official(path, **own).network.architecture.pixels == (-99, 0.01, 8)


@needs_fixtures
def test_raw_and_averaged_weights_of_a_run_are_told_apart() -> None:
    raw, averaged = (VDVAE.load_official(FIXTURES / "run-folder" / f"latest-model{which}.th") for which in ("", "-ema"))
    assert raw.architecture == averaged.architecture
    assert fingerprint(raw) != fingerprint(averaged)


# Refusals: what is missing, and what contradicts the file.


def refused(path: Path, message: str, kind: type[EbmPriorError] = CheckpointError, **settings: Any) -> None:
    """A message that says what was expected, with the file, and never lists more than ten names."""
    with pytest.raises(kind, match=message) as caught:
        VDVAE.load_official(path, **settings)
    assert type(caught.value) is kind
    assert len(re.findall(r"[a-z_]+\.[a-z_0-9.]+\.(?:weight|bias)", str(caught.value))) <= 20  # ten, each with its like


def test_what_neither_log_nor_settings_say_is_asked_for(tmp_path: Path) -> None:
    path = write_weights(tmp_path)
    refused(
        path, "expected the settings enc_blocks, dec_blocks, data_set of .*found no log.*encoder_blocks 4, decoder_"
    )
    refused(path, "expected the settings enc_blocks, data_set of", dec_blocks=TINY["dec_blocks"])
    blocks = {key: TINY[key] for key in ("enc_blocks", "dec_blocks")}
    refused(path, "expected the setting data_set for .*found only enc_blocks, dec_blocks; give what", **blocks)
    refused(path, "expected the settings enc_blocks, dec_blocks of", data_set="mine", shift=0, scale=1, bits=8)


def test_a_published_data_set_of_other_shapes_is_refused_with_both(tmp_path: Path) -> None:
    path = write_weights(tmp_path)
    message = "data_set=imagenet32 is published with encoder_blocks 48, decoder_blocks 78.*found encoder_blocks 4"
    refused(path, message, ConfigurationError, data_set="imagenet32")
    with pytest.raises(ConfigurationError, match=r"published with encoder_blocks 68.*found encoder_blocks 33"):
        describe(path, published("cifar10").network.state_dict(), {"data_set": "ffhq_256"})


CONTRADICTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "blocks": ({"dec_blocks": "1x1,4m1,8m4,8x2"}, "does not fit latest-log.jsonl: expected decoder_blocks 5, found 3"),
    "width": ({"width": 6}, "expected width 6, found 4"),
    "latents and mixtures": ({"zdim": 3, "num_mixtures": 10}, "expected zdim 3, found 2; num_mixtures 10, found 2"),
    "widths": (
        {"custom_width_str": "4:8,1:8"},
        "do not fit the architecture of latest-log.jsonl: mis-shaped: encoder.",
    ),
    "maps": ({"no_bias_above": 8}, r"missing: decoder.bias_xs.2 \(1, 4, 8, 8\)"),
    "nonsense": ({"enc_blocks": "8x1,4d4"}, "latest-log.jsonl beside .*enc_blocks: expected the side 8 next"),
    "no text": ({"enc_blocks": 5}, "latest-log.jsonl beside .*enc_blocks: expected text, found 5"),
    "another data set": ({"dataset": "celeba"}, 'data_set: expected one of cifar10.*found "celeba".*shift, scale'),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_a_log_that_contradicts_the_file_is_refused(tmp_path: Path, case: str) -> None:
    changes, message = CONTRADICTIONS[case]
    write_log(tmp_path, **changes)
    refused(write_weights(tmp_path), message)


def test_settings_that_make_no_sense_are_refused_as_settings(tmp_path: Path) -> None:
    path, _ = write_weights(tmp_path), write_log(tmp_path)
    refused(path, "enc_blocks: expected the side 8 next", ConfigurationError, enc_blocks="4x1")
    refused(path, "expected options among .*blocks", ConfigurationError, blocks="4x1")
    refused(path, "data_set: expected text, found \\[", ConfigurationError, data_set=["cifar10"])
    refused(
        path,
        "does not fit the settings given and latest-log.jsonl: expected decoder_blocks 5",
        dec_blocks="1,4m1,8m4,8x2",
    )
    with pytest.raises(ConfigurationError, match="wdith: VDVAE reads official files with the options enc_blocks"):
        load_backbone("vdvae", path, options={"wdith": 4})


def test_a_side_that_convolutions_do_not_tell_is_still_checked(tmp_path: Path) -> None:
    """1×1 kernels are at sides 1 and 2 alone: the words of a network that has none cannot have such a side."""
    state = weights()
    state["decoder.dec_blocks.0.prior.c2.weight"] = torch.zeros(3, 3, 3, 3)
    write_log(tmp_path)
    refused(
        write_weights(tmp_path, state=state),
        r"mis-shaped: decoder.dec_blocks.0.prior.c2.weight expected \(3, 3, 1, 1\)",
    )


# Refusals: what is no such file.


def renamed(old: str, new: str) -> dict[str, Tensor]:
    return {new if key == old else key: tensor for key, tensor in weights().items()}


FOREIGN: dict[str, tuple[Any, str]] = {
    "one renamed key": (
        renamed("decoder.gain", "decoder.gian"),
        r"missing: decoder.gain \(1, 4, 1, 1\); unexpected: decoder.gian \(1, 4, 1, 1\)",
    ),
    "a key with another's name": (
        renamed("encoder.enc_blocks.3.c1.bias", "decoder.bias_xs.2"),
        r"missing: encoder.enc_blocks.3.c1.bias \(3,\); unexpected: decoder.bias_xs.2 \(3,\)",
    ),
    "a first key renamed": (
        renamed("encoder.in_conv.weight", "encoder.conv_in.weight"),
        "found no convolution encoder.in_conv.weight, but encoder.conv_in.weight",
    ),
    "no convolution": ({**weights(), "encoder.in_conv.weight": torch.ones(3)}, "no convolution encoder.in_conv.weight"),
    "Efficient-VDVAE": (
        {f"{side}.levels.{i}.conv.weight": torch.ones(1) for side in ("bottom_up", "top_down") for i in range(9)},
        "found no convolution .*, but bottom_up.*and 8 more. Other networks, Efficient-VDVAE among them",
    ),
    "a training state": (
        {"model_state_dict": weights(), "global_step": 3},
        "found a dict with model_state_dict, global_s",
    ),
    "an optimizer's state": (
        {"state": {}, "param_groups": []},
        "as in X-model-ema.th.*found a dict with state, param_gr",
    ),
    "nothing": ({}, "found a dict with nothing"),
    "a list": ([1, 2], "something else than a dict of dense tensors"),
    "both forms": ({**weights(), "module.decoder.gain": torch.ones(1, 4, 1, 1)}, "some with and without the prefix"),
    "everything else": (
        {key: torch.ones(7) if key.endswith(".bias") and "." in key else tensor for key, tensor in weights().items()},
        "mis-shaped: encoder.in_conv.bias expected .*and [0-9]+ more",
    ),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_another_file_is_refused(tmp_path: Path, case: str) -> None:
    content, message = FOREIGN[case]
    write_log(tmp_path)
    refused(write_weights(tmp_path, state=content), message)


def test_nothing_is_allocated_before_the_shapes_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A log that describes terabytes costs nothing."""
    monkeypatch.setattr(VDVAE, "to_empty", lambda *_, **__: pytest.fail("allocated"))
    write_log(tmp_path, custom_width_str="4:4096,1:4096", bottleneck_multiple=1.0)
    refused(write_weights(tmp_path), "do not fit the architecture of latest-log.jsonl: mis-shaped")


# The own form, and the command line.


def test_converts_with_what_the_file_leaves_open(workshop: Workshop, tmp_path: Path) -> None:
    official, own, half = write_weights(tmp_path), tmp_path / "own.safetensors", tmp_path / "half.safetensors"
    convert = ("convert", "--backbone", "vdvae", "--ckpt", official, "--out", own)
    assert "expected the settings enc_blocks, dec_blocks, data_set" in workshop.error(*convert)
    assert "expected the settings enc_blocks" in workshop.error(*convert, "--set", "encblocks=8x1")
    options = [word for key, value in TINY.items() for word in ("--set", f"{key}={value}")]
    assert "wrote" in workshop.run(*convert, *options).stdout
    record = backbone_record(own)
    assert (record["adapter"], record["architecture"]) == ("vdvae", tiny().architecture)
    assert record["record"]["set"] == TINY
    assert record["record"]["data"] == {"name": "cifar10/train"}
    assert fingerprint(load_backbone(None, own)) == fingerprint(trained_tiny())
    workshop.run("convert", "--ckpt", own, "--out", half, "--precision", "float16", "--set", "data_set=imagenet64")
    again = load_backbone(None, half)
    assert again.architecture["data_set"] == "imagenet64"
    for key, tensor in again.state_dict().items():
        torch.testing.assert_close(tensor, trained_tiny().state_dict()[key], rtol=1e-3, atol=1e-5)
    error = workshop.error("convert", "--ckpt", own, "--out", tmp_path / "x.safetensors", "--set", "zdim=3")
    assert "--set zdim: expected options that change no weights" in error


@pytest.mark.usefixtures("as_published")
def test_commands_say_what_is_assumed_in_one_line(workshop: Workshop, tmp_path: Path) -> None:
    result = workshop.run("info", "--backbone", "vdvae", "--ckpt", write_weights(tmp_path))
    notes = [line for line in result.stderr.splitlines() if "cifar10" in line]
    assert len(notes) == 1
    assert notes[0].startswith("note: latest-model-ema.th has the shapes published for cifar10")
