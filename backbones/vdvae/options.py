"""The arguments of a VDVAE: block strings and widths, and the conditions that they must satisfy together.

Settings have the names that the official code writes into its logs, so that a user can copy them from there. Source:
Child (2021), and the release's command line.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from ebm_prior.backbones.options import LARGEST_COUNT, require_count, require_option_counts
from ebm_prior.backbones.vdvae.pixels import DATA_SETS, Pixels, data_set_name

from ebm_prior.errors import ConfigurationError


class Place(NamedTuple):
    """Where one block runs: its side, and the number behind its d or m, None for a plain block.

    In the encoder the number is the factor by which the block's output is pooled, in the decoder the side of the
    stream that is mixed in.
    """

    side: int
    other: int | None = None


@dataclass(frozen=True)
class Architecture:
    """The arguments of a VDVAE; the defaults are those of the official command line.

    enc_blocks, dec_blocks: comma-separated words, bottom-up and top-down. "32x11" is 11 blocks at side 32, "32" is
    one; "32d2" in the encoder is a block at side 32 that then pools by 2; "32m16" in the decoder is one at side 32
    that first adds the upsampled stream of side 16. data_set: a name in `DATA_SETS`, which has the constants of the
    pixels; shift, scale and bits replace them where they are given, and are required for any other name.
    width: channels of all sides but those that custom_width_str names, "side:channels,…". zdim: channels of a latent
    group. bottleneck_multiple: width inside a block, relative to that of its side. no_bias_above: the largest side at
    which the stream starts from a learned map. num_mixtures: components of the likelihood.
    """

    enc_blocks: str
    dec_blocks: str
    data_set: str
    width: int = 512
    custom_width_str: str = ""
    zdim: int = 16
    bottleneck_multiple: float = 0.25
    no_bias_above: int = 64
    num_mixtures: int = 10
    shift: float | None = None
    scale: float | None = None
    bits: int | None = None

    def __post_init__(self) -> None:
        for name in ("enc_blocks", "dec_blocks", "data_set", "custom_width_str"):
            if type(getattr(self, name)) is not str:
                raise ConfigurationError(f"{name}: expected text, found {getattr(self, name)!r}")
        require_option_counts(self, "width", "zdim", "no_bias_above", "num_mixtures")
        if not _is_number(self.bottleneck_multiple) or not 0 < self.bottleneck_multiple <= LARGEST_COUNT:
            raise ConfigurationError(
                f"bottleneck_multiple: expected a positive number, found {self.bottleneck_multiple!r}"
            )
        object.__setattr__(self, "data_set", data_set_name(self.data_set))
        _check_pixels(self)
        _check_widths(self)
        _check_decoder(self)
        _check_encoder(self)

    @cached_property
    def encoder(self) -> list[Place]:
        """The encoder's blocks, from the image up."""
        return parse_blocks("enc_blocks", self.enc_blocks)

    @cached_property
    def decoder(self) -> list[Place]:
        """The decoder's blocks, one per latent group, in generation order."""
        return parse_blocks("dec_blocks", self.dec_blocks)

    @property
    def image_side(self) -> int:
        """The side of an image: that of the last decoder block."""
        return self.decoder[-1].side

    @cached_property
    def sides(self) -> list[int]:
        """The sides of the decoder's streams, ascending."""
        return sorted({place.side for place in self.decoder})

    @cached_property
    def _custom_widths(self) -> dict[int, int]:
        return parse_widths(self.custom_width_str)

    def width_at(self, side: int) -> int:
        """Channels of the maps of a side, C(r)."""
        return self._custom_widths.get(side, self.width)

    def inner_width_at(self, side: int) -> int:
        """Channels inside the blocks of a side."""
        return int(self.width_at(side) * self.bottleneck_multiple)

    @property
    def pixels(self) -> Pixels:
        """How the network sees pixels."""
        known = DATA_SETS.get(self.data_set, (None, None, None))
        given = (self.shift, self.scale, self.bits)
        return Pixels(*(other if own is None else own for own, other in zip(given, known, strict=True)))  # type: ignore[arg-type]


def parse_blocks(name: str, text: str) -> list[Place]:
    """The places of a block string, as `Architecture` describes it. `name` is the setting's, for ConfigurationError."""
    places: list[Place] = []
    for word in text.split(","):
        match = re.fullmatch(r"([0-9]{1,4})(?:([xmd])([0-9]{1,4}))?", word.strip())
        if match is None:
            raise ConfigurationError(f'{name}: expected words like 32x11, 32d2 or 32m16 between commas, found "{word}"')
        side, number = int(match[1]), int(match[3] or 1)
        require_count(f"{name}, {word}", side)
        require_count(f"{name}, {word}", number)
        places += [Place(side)] * number if match[2] in (None, "x") else [Place(side, number)]
    require_count(f"{name}, blocks", len(places))
    return places


def parse_widths(text: str) -> dict[int, int]:
    """Channels by side from "side:channels,…", {} from "". Raises ConfigurationError."""
    widths: dict[int, int] = {}
    for word in text.split(",") if text else ():
        match = re.fullmatch(r"([0-9]{1,4}):([0-9]{1,4})", word.strip())
        if match is None:
            raise ConfigurationError(f'custom_width_str: expected words like 16:256 between commas, found "{word}"')
        require_count(f"custom_width_str, {word}", int(match[2]))
        widths[int(match[1])] = int(match[2])
    return widths


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]


def _check_pixels(a: Architecture) -> None:
    for name in ("shift", "scale"):
        if (value := getattr(a, name)) is not None and not _is_number(value):
            raise ConfigurationError(f"{name}: expected a number, found {value!r}")
    if a.bits is not None and not (type(a.bits) is int and 1 <= a.bits <= 8):
        raise ConfigurationError(f"bits: expected an integer from 1 to 8, found {a.bits!r}")
    if a.data_set not in DATA_SETS and None in (a.shift, a.scale, a.bits):
        raise ConfigurationError(
            f'data_set: expected one of {", ".join(DATA_SETS)}, found "{a.data_set}", for which shift, scale and '
            "bits must be given: the encoder reads (v + shift)·scale of 8-bit values v, the likelihood has `bits` bits"
        )


def _check_widths(a: Architecture) -> None:
    for side in {place.side for place in (*a.encoder, *a.decoder)}:
        if a.inner_width_at(side) < 1:
            raise ConfigurationError(
                f"bottleneck_multiple: expected at least one channel inside the blocks of side {side}, found none with "
                f"{a.bottleneck_multiple} of {a.width_at(side)}"
            )
    if (found := a.width_at(a.image_side)) != a.width:
        raise ConfigurationError(
            f"custom_width_str: expected the width {a.width} at the image's side {a.image_side}, found {found}"
        )


def _check_decoder(a: Architecture) -> None:
    """A stream must exist before it is mixed in, fit into the other, and end at the image."""
    if a.image_side != a.sides[-1]:
        raise ConfigurationError(
            f"dec_blocks: expected the last block at the largest side, {a.sides[-1]}, found it at {a.image_side}"
        )
    if a.sides[0] > a.no_bias_above:
        raise ConfigurationError(
            f"no_bias_above: expected at least the smallest side, {a.sides[0]}, found {a.no_bias_above}"
        )
    visited = {side for side in a.sides if side <= a.no_bias_above}
    for side, other in a.decoder:
        if other is not None and (other not in visited or other >= side or side % other):
            raise ConfigurationError(
                f"dec_blocks, {side}m{other}: expected a lower side that divides {side} and has blocks before or a "
                f"learned map, one of {sorted(s for s in visited if s < side and side % s == 0)}, found {other}"
            )
        if other is not None and a.width_at(other) < a.width_at(side):
            raise ConfigurationError(
                f"dec_blocks, {side}m{other}: expected at least {a.width_at(side)} channels at side {other}, found "
                f"{a.width_at(other)}"
            )
        visited.add(side)


def _check_encoder(a: Architecture) -> None:
    """The words must say the sides that pooling leads to, channels may only grow, and every decoder side must occur."""
    side, met = a.image_side, {a.image_side}
    for place in a.encoder:
        if place.side != side:
            raise ConfigurationError(f"enc_blocks: expected the side {side} next, found {place.side}")
        factor = place.other or 1
        if side % factor:
            raise ConfigurationError(
                f"enc_blocks, {side}d{factor}: expected a factor that divides {side}, found {factor}"
            )
        if a.width_at(side // factor) < a.width_at(side):
            raise ConfigurationError(
                f"enc_blocks, {side}d{factor}: expected at least the {a.width_at(side)} channels of side {side} "
                f"at side {side // factor}, found {a.width_at(side // factor)}"
            )
        side //= factor
        met.add(side)
    if lacking := set(a.sides) - met:
        raise ConfigurationError(
            f"enc_blocks: expected to reach all sides of dec_blocks, found none at {sorted(lacking)}"
        )
