"""Spectral norms of many convolutions at once, for NVAE's spectral regularisation (Vahdat & Kautz, 2020, §3.2)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

SQUARINGS = 6


def spectral_norms(kernels: Iterable[Tensor]) -> Tensor:
    """The largest singular value of each kernel (C_out, …) as a matrix (C_out, rest), in no particular order: (K,)."""
    by_shape: dict[torch.Size, list[Tensor]] = {}
    for kernel in kernels:
        matrix = kernel.flatten(1)
        by_shape.setdefault(matrix.shape, []).append(matrix)
    return torch.cat([largest_singular_values(torch.stack(alike)) for alike in by_shape.values()])


def largest_singular_values(matrices: Tensor) -> Tensor:
    """σ₁ (K,) of W (K, m, n): power iteration on G = WWᵀ (WᵀW where that is smaller), 2⁶ steps as G squared six times.

    The published code keeps its vectors between steps and iterates four times. This function has no state, so that a
    resumed run gives the same numbers. The gradient is u₁v₁ᵀ, as for the exact value.
    """
    short = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT
    with torch.no_grad():
        power = short @ short.mT
        smallest = torch.finfo(power.dtype).tiny
        for _ in range(SQUARINGS):
            trace = power.diagonal(dim1=1, dim2=2).sum(1)
            power = power / trace.clamp(min=smallest)[:, None, None]
            power = power @ power
        # Nearly u₁u₁ᵀ by now, of which every column is u₁ times an entry; where that is largest, it is not near 0.
        best = power.diagonal(dim1=1, dim2=2).argmax(1)
        u = F.normalize(power[torch.arange(len(power)), best], dim=1)
    found: Tensor = torch.linalg.vector_norm(u[:, None] @ short, dim=(1, 2))
    return found
