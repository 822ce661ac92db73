"""Statistics of pixels, which need no network: brightness, contrast, and how power is spread over spatial frequencies.

They say less than a distance on features, because images with the right statistics can still show nothing. But they can
be computed for every kind of image, and show whether samples are too smooth, too noisy or of the wrong brightness.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

BANDS = 8  # of the spectrum, at most
_FLOOR = 1e-12  # of a band's power, in units of [0, 1] pixels squared: a band without any has a logarithm, too


class PixelStatistics(NamedTuple):
    """Statistics of a set of images in [0, 1]."""

    mean: float  # of all pixels
    std: float  # of all pixels about that mean
    spectrum: Tensor  # (bands,), float64: mean power per band of spatial frequencies, low ones first


def descriptors(images: Tensor) -> Tensor:
    """Images (B, C, H, W) in [0, 1] -> (B, 2 + bands), float64 on the CPU: mean, mean square, and power per band.

    The power in a band is the mean of |DFT|² / (H W) over its frequencies and the channels, with the image's own mean
    left out. Bands are rings of equal width up to the highest frequency along an axis; corners belong to the last.
    """
    pixels = images.detach().to("cpu", torch.float64)
    height, width = pixels.shape[2:]
    power = torch.fft.fft2(pixels).abs().square().mean(1) / (height * width)  # (B, H, W)
    rows, columns = (torch.fft.fftfreq(side, dtype=torch.float64) for side in (height, width))
    radius = (rows[:, None].square() + columns.square()).sqrt()
    bands = max(1, min(BANDS, min(height, width) // 2))
    ring = (radius / 0.5 * bands).ceil().long().clamp_(max=bands)  # 0: the mean of the image
    rings = torch.stack([power[:, ring == band].mean(1) for band in range(1, bands + 1) if bool((ring == band).any())])
    flat = pixels.flatten(1)
    return torch.cat([flat.mean(1)[:, None], flat.square().mean(1)[:, None], rings.T], dim=1)


def statistics(rows: Tensor) -> PixelStatistics:
    """The statistics of a set of images, from the `descriptors` (N, 2 + bands) of each."""
    mean, square, *spectrum = rows.mean(0)
    return PixelStatistics(float(mean), math.sqrt(max(0.0, float(square - mean.square()))), torch.stack(spectrum))


def spectrum_distance(a: PixelStatistics, b: PixelStatistics) -> float:
    """How far two power spectra are apart, in decibels: the root mean square over bands of 10 log₁₀ of their ratio."""
    ratio = 10 * (a.spectrum.clamp(min=_FLOOR).log10() - b.spectrum.clamp(min=_FLOOR).log10())
    return float(ratio.square().mean().sqrt())
