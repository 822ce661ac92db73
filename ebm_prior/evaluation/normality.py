"""How normal images are, by a lossless code and by a density of their terms; neither has ever seen an outlier."""

from __future__ import annotations

import math
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.linalg import solve_triangular
from torch import Tensor

Array = NDArray[np.float64]
SMALLEST_SPREAD = 1e-9  # of a term, relative to its mean; a smaller standard deviation is rounding
LEAST_SHARE = 1e-6  # of the identity in a covariance


def code_length(images: Tensor) -> Array:
    """The length in nats of the PNG file of each image.

    A simple image has a high density under any model of pixels, and a short code (Serrà et al. 2020).

    Args:
        images: (B, C, H, W) in [0, 1]; they are rounded to 8 bits. Three channels are coded as RGB; other numbers of
            channels are coded as grey images below one another, with 1 bit per pixel where all are black or white.

    Returns:
        The lengths, (B,).
    """
    pixels = (images.float() * 255).round().clamp(0, 255).byte().cpu()
    colour = images.shape[1] == 3
    arrays = pixels.permute(0, 2, 3, 1) if colour else pixels.flatten(1, 2)
    return np.array([8 * math.log(2) * _png_bytes(each) for each in arrays.contiguous().numpy()])


def _png_bytes(pixels: NDArray[np.uint8]) -> int:
    image = Image.fromarray(pixels)
    if pixels.ndim == 2 and ((pixels == 0) | (pixels == 255)).all():
        image = image.convert("1", dither=Image.Dither.NONE)
    file = BytesIO()
    image.save(file, "PNG", optimize=True)
    return file.tell()


class TermDensity:
    """The density of the terms of normal images: a Gaussian whose correlations are shrunk (Ledoit & Wolf 2004).

    Terms that are equal in all the normal images have no part in it.
    """

    def __init__(self, terms: Array) -> None:
        """terms: (N, T) in nats, of N normal images."""
        mean, scale = terms.mean(0), terms.std(0)
        self._used = scale > SMALLEST_SPREAD * (1 + np.abs(mean))
        self._mean, self._scale = mean[self._used], scale[self._used]
        self._factor = np.linalg.cholesky(shrunk_covariance(self._standardized(terms)))

    def log_density(self, terms: Array) -> Array:
        """The log density at terms (M, T): (M,)."""
        white = solve_triangular(self._factor, self._standardized(terms).T, lower=True)
        volume = np.log(np.diag(self._factor)).sum() + np.log(self._scale).sum()
        level = -volume - 0.5 * len(self._mean) * math.log(2 * math.pi)
        found: Array = level - 0.5 * np.square(white).sum(0)
        return found

    def _standardized(self, terms: Array) -> Array:
        found: Array = (terms[:, self._used] - self._mean) / self._scale
        return found


def shrunk_covariance(x: Array) -> Array:
    """The covariance of centred values (N, T), moved towards a multiple of the identity by as much as is best.

    The best share is the one of Ledoit & Wolf (2004), which has the least expected squared error as N grows. For two
    images it would be 0; `LEAST_SHARE` keeps the covariance invertible.
    """
    n, size = x.shape
    sample = x.T @ x / n
    level = float(np.trace(sample)) / max(size, 1)
    target = level * np.eye(size)
    distance = float(np.square(sample - target).sum())
    noise = float(np.square(np.square(x).sum(1)).sum() / n - np.square(sample).sum()) / n
    share = min(1.0, max(LEAST_SHARE, noise / distance)) if distance > 0 else 1.0
    found: Array = share * target + (1 - share) * sample
    return found
