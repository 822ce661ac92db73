"""Pixels as a VDVAE sees them: constants of the data sets it was published for, and the likelihood of few bits.

Source: the constants and the rule for 5 bits are those of the release of Child (2021, "Very Deep VAEs Generalize
Autoregressive Models and Can Outperform Them on Images").
"""

from __future__ import annotations

from typing import NamedTuple

from ebm_prior.backbones.likelihoods import LogisticMixture
from torch import Tensor


class Pixels(NamedTuple):
    """The encoder reads (v + shift)·scale of 8-bit values v = 255·x; the likelihood models the leading `bits` of v."""

    shift: float
    scale: float
    bits: int

    def normalised(self, images: Tensor) -> Tensor:
        """The encoder's input, of the shape of `images` (B, 3, H, W) in [0, 1]; it keeps all 8 bits."""
        return (255 * images + self.shift) * self.scale


DATA_SETS = {
    "cifar10": Pixels(-120.63838, 1 / 64.16736, 8),
    "imagenet32": Pixels(-116.2373, 1 / 69.37404, 8),
    "imagenet64": Pixels(-115.92961967, 1 / 69.37404, 8),
    "ffhq256": Pixels(-112.8666757481, 1 / 69.84780273, 5),
    "ffhq1024": Pixels(255 * -0.4387, 1 / (255 * 0.2743), 8),  # published for values in [0, 1]
}
_OTHER_NAMES = {"ffhq_256": "ffhq256", "ffhq_1024": "ffhq1024"}


def data_set_name(name: str) -> str:
    """The name of a published data set as `DATA_SETS` has it; any other name as it is."""
    return _OTHER_NAMES.get(name, name)


class CoarseMixture(LogisticMixture):
    """The likelihood of a model with b < 8 bits: it scores an 8-bit image by the leading b bits of its values.

    A value v counts as ⌊v/2^(8−b)⌋·2^(8−b), still on the scale of 0 … 255, where the bins of the density, 2/(2^b − 1)
    wide, overlap a little: as published, the probabilities do not add up to exactly one.
    """

    def __init__(self, parameters: Tensor, *, bits: int) -> None:
        super().__init__(parameters, bits=bits)
        self.step = 2 ** (8 - bits)

    def log_prob_of_pixels(self, images: Tensor) -> Tensor:
        """Nats per pixel, its three colours together, (B, H, W), of images (B, 3, H, W) in [0, 1]."""
        values = (255 * images).round()
        return super().log_prob_of_pixels((values / self.step).floor() * self.step / 255)
