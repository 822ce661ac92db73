"""The files of the official VDVAE code: their tensors, and the sources of the architecture, which they do not hold.

The architecture comes from the caller's settings, else from the log of the run beside the file, else from a published
configuration with the same shapes. It is compared with the file before anything is built.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from ebm_prior.backbones.options import record
from ebm_prior.backbones.safe_loading import LARGEST_RECORD, load_file, tensors_of
from ebm_prior.backbones.vdvae.options import Architecture
from ebm_prior.backbones.vdvae.pixels import data_set_name
from ebm_prior.backbones.vdvae.published import COMMON, PUBLISHED
from torch import Tensor

from ebm_prior.errors import CheckpointError, ConfigurationError, few

CONTENT = "the weights of a VDVAE"
LARGEST_LOG = 2**28  # bytes
SETTINGS = (
    "enc_blocks",
    "dec_blocks",
    "width",
    "custom_width_str",
    "zdim",
    "bottleneck_multiple",
    "no_bias_above",
    "num_mixtures",
)
"""The entries of a log about the architecture, except the data set, under the names of `Architecture`."""


class Signature(NamedTuple):
    """The properties of a network that the shapes of its tensors tell directly."""

    encoder_blocks: int
    decoder_blocks: int
    width: int
    zdim: int
    num_mixtures: int

    @classmethod
    def of(cls, a: Architecture) -> Signature:
        """That of a described network."""
        return cls(len(a.encoder), len(a.decoder), a.width, a.zdim, a.num_mixtures)

    def __str__(self) -> str:
        return few(f"{name} {value}" for name, value in self._asdict().items())


class Described(NamedTuple):
    """The architecture of a file, a description of its source, and whether its data set is only a conclusion."""

    architecture: Architecture
    source: str
    assumed: bool


def describe(path: Path, state: Mapping[str, Tensor], given: Mapping[str, Any]) -> Described:
    """The architecture of the network with the tensors `state` from the file at `path`.

    given: settings of `Architecture`, which go before those of the log. Raises ConfigurationError for settings that
    make no sense, and CheckpointError where something is missing or contradicts the file.
    """
    found, (log, logged) = signature(state, path), read_log(path)
    settings = {**logged, **given}
    if isinstance(settings.get("data_set"), str):
        settings["data_set"] = data_set_name(settings["data_set"])
    sources = (["the settings given"] if given else []) + ([log] if logged else [])
    assumed = False
    if not settings.keys() >= {"enc_blocks", "dec_blocks"}:
        name = _published(path, found, settings)
        assumed = "data_set" not in settings
        settings = {"data_set": name, **PUBLISHED[name], **settings}
        sources.append(f"the published configuration {name}")
    elif "data_set" not in settings:
        raise CheckpointError(f"expected the setting data_set for {path}, found only {few(settings)}; {_ADVICE}")
    told = {key: getattr(found, key) for key in ("width", "zdim", "num_mixtures")}
    source = few(sources, separator=" and ")
    try:
        architecture = record(Architecture, {**COMMON, **told, **settings})
    except ConfigurationError as error:
        if given:
            raise
        raise CheckpointError(f"{source} beside {path}: {error}") from error
    if (described := Signature.of(architecture)) != found:
        pairs = zip(Signature._fields, described, found, strict=True)
        differences = "; ".join(f"{name} {wanted}, found {got}" for name, wanted, got in pairs if wanted != got)
        other_run = "move the log away if it is another run's, or " if logged else ""
        raise CheckpointError(f"{path} does not fit {source}: expected {differences}; {other_run}{_ADVICE}")
    return Described(architecture, source, assumed)


_ADVICE = (
    "give what the run was trained with to ebm-prior convert, e.g. --set data_set=imagenet64, or with block strings of "
    "its own --set enc_blocks=32x11,… --set dec_blocks=1x1,…, or put the run's log.jsonl beside the file"
)


def _published(path: Path, found: Signature, settings: Mapping[str, Any]) -> str:
    """The published configuration that the file has the signature of, and that the data set is of, if it is given."""
    signatures = {name: Signature.of(Architecture(data_set=name, **row)) for name, row in PUBLISHED.items()}
    match = next((name for name, other in signatures.items() if other == found), None)
    name = settings.get("data_set")
    if isinstance(name, str) and name in signatures and match != name:
        raise ConfigurationError(
            f"data_set={name} is published with {signatures[name]}; found {found} in {path}: give another data_set, or "
            "enc_blocks and dec_blocks, too"
        )
    if match is None:
        missing = [key for key in ("enc_blocks", "dec_blocks", "data_set") if key not in settings]
        raise CheckpointError(
            f"expected the settings {few(missing)} of {path}, which its weights do not tell; found no log beside "
            f"it that has them, and no published configuration with its {found}: {_ADVICE}"
        )
    return match


_BLOCK = r"c[1-4]\.(weight|bias)"
_KEY = re.compile(
    rf"encoder\.(in_conv\.(weight|bias)|enc_blocks\.(?P<enc>[0-9]{{1,4}})\.{_BLOCK})"
    rf"|decoder\.(dec_blocks\.(?P<dec>[0-9]{{1,4}})\.((enc|prior|resnet)\.{_BLOCK}|z_proj\.(weight|bias))"
    r"|bias_xs\.[0-9]{1,4}|out_net\.out_conv\.(weight|bias)|gain|bias)"
)


def signature(state: Mapping[str, Tensor], path: Path) -> Signature:
    """The signature of the tensors. Raises CheckpointError where they have not even the tensors that tell it."""
    matches = {key: _KEY.fullmatch(key) for key in state}
    foreign = [key for key, match in matches.items() if match is None]
    where = {
        "width": ("encoder.in_conv.weight", 0),
        "zdim": ("decoder.dec_blocks.0.z_proj.weight", 1),
        "num_mixtures": ("decoder.out_net.out_conv.weight", 0),
    }
    lacking = [key for key, _ in where.values() if key not in state or state[key].dim() != 4]
    if lacking:
        others = f", but {few(foreign)}" if foreign else ""
        raise CheckpointError(
            f"expected {CONTENT} in {path}: encoder.in_conv, encoder.enc_blocks, decoder.dec_blocks, …; found no "
            f"convolution {few(lacking)}{others}. Other networks, Efficient-VDVAE among them, are not supported"
        )
    encoder_blocks, decoder_blocks = (
        max((int(match[side]) + 1 for match in matches.values() if match and match[side]), default=0)
        for side in ("enc", "dec")
    )
    sizes = {name: state[key].shape[axis] for name, (key, axis) in where.items()}
    return Signature(encoder_blocks, decoder_blocks, sizes["width"], sizes["zdim"], sizes["num_mixtures"] // 10)


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a .th file by the names of the bare module. Raises CheckpointError."""
    content = load_file(path, CONTENT)
    if isinstance(content, dict) and not any(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(
            f"expected {CONTENT} in {path}, tensors by name as in X-model-ema.th and X-model.th, found a dict with "
            f"{few(list(map(str, content))) or 'nothing'}"
        )
    state = tensors_of(content, path, CONTENT)
    bare = {key.removeprefix("module."): tensor for key, tensor in state.items()}
    if len(bare) < len(state):
        raise CheckpointError(f"expected each tensor once in {path}, found some with and without the prefix module.")
    return bare


def read_log(path: Path) -> tuple[str, dict[str, Any]]:
    """The name of the run's log beside the file at `path`, and the settings in it: {} where there is no such log.

    Beside X-model.th and X-model-ema.th it is X-log.jsonl, else log.jsonl. Of a setting that occurs again, because the
    run went on, the last value counts.
    """
    run = re.fullmatch(r"(.*-)model(-ema)?\.th", path.name)
    for name in ([f"{run[1]}log.jsonl"] if run else []) + ["log.jsonl"]:
        log = path.with_name(name)
        if log.is_file() and (settings := _settings_in(log)):
            return name, settings
    return "", {}


def _settings_in(log: Path) -> dict[str, Any]:
    if (size := log.stat().st_size) > LARGEST_LOG:
        raise CheckpointError(f"expected the log of a run in {log}, at most {LARGEST_LOG} bytes of it, found {size}")
    settings: dict[str, Any] = {}
    with log.open("rb") as lines:
        while line := lines.readline(LARGEST_RECORD):
            if b'"hparam"' not in line:
                continue
            with suppress(ValueError, RecursionError):  # a run that was killed leaves half a line
                entry = json.loads(line)
                if isinstance(entry, dict) and entry.get("type") == "hparam" and {"key", "value"} <= entry.keys():
                    name = "data_set" if entry["key"] == "dataset" else entry["key"]
                    if name in (*SETTINGS, "data_set"):
                        settings[name] = entry["value"]
    return settings
