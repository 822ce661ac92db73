"""The memory that a command will need: reported before the work starts, and refused where the device has less.

Nearly all memory is taken by tensors that a step keeps for its backward pass, and it grows in proportion to the number
of chains. So one step with two chains is run, the peak over all living tensors is counted, and it is multiplied.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ebm_prior.compute.memory import free_bytes, peak_bytes
from ebm_prior.compute.randomness import BLOCK, derived_generator
from ebm_prior.errors import MemoryLimitError, few
from ebm_prior.model.backbone import Backbone
from ebm_prior.model.own_energy import energy_of
from ebm_prior.model.passes import PLAIN, Passes
from ebm_prior.model.prior import EBMPrior
from ebm_prior.model.samplers import SamplerConfig, start
from ebm_prior.training.fit_config import FitConfig
from ebm_prior.training.stages import draws_at_once

UNITS = {"KiB": 1, "MiB": 2, "GiB": 3, "TiB": 4}
MEASURED = 2  # chains in the step that is measured
# Memory of the process as a multiple of the tensors' own. On a CPU 1.9 to 2.9 was measured, because the C library does
# not reuse everything that was freed.
OVERHEAD = {"cpu": 2.5}


class Need(NamedTuple):
    """Memory that a command will take, in addition to what the process has already."""

    bytes: int
    of: str  # the work that needs the memory, e.g. "128 chains at a time"
    remedy: str  # the options that reduce it


def for_samples(prior: EBMPrior, n: int, chunk: int, sampler: SamplerConfig, passes: Passes = PLAIN) -> Need:
    """Memory for n draws in chunks: the chains of one chunk, and z, ε and images of all draws.

    The results count twice, because the chunks and their concatenation exist together for a moment. `passes`: how the
    backbone is going to be computed.
    """
    prior = _measured(prior, passes)
    chains = min(n, max(BLOCK, chunk // BLOCK * BLOCK))
    smaller = [f"-n or --samples below {n}", *([f"--chunk {BLOCK}"] if chains > BLOCK else [])]
    numbers = 2 * sum(math.prod(group.shape) for group in prior.backbone.groups) + math.prod(prior.backbone.image_shape)
    draws = 2 * n * numbers * next(prior.backbone.parameters()).dtype.itemsize
    at_work = chains * chain_bytes(prior) if sampler.steps else 0
    return Need(draws + at_work, f"{n} draws, {chains} at a time", _one_of(*smaller, *_cells(prior.backbone)))


def for_fit(backbone: Backbone, config: FitConfig, passes: Passes = PLAIN, own: nn.Module | None = None) -> Need:
    """Memory for an iteration of a fit: for its chains or for the gradient of the heads, whichever is larger.

    `passes`: how the backbone is going to be computed. `own`: the user's own energy in place of the heads, or None.
    """
    heads = energy_of(backbone.groups, config.energy, own)
    prior = _measured(EBMPrior(backbone, heads, regime=config.regime, target=config.target), passes)
    rows = config.batch_size // config.parts
    smaller = (f"--parts above {config.parts}", f"--batch-size below {config.batch_size}")
    learning = Need(2 * rows * _head_bytes(prior), f"the heads at {2 * rows} latents", _one_of(*smaller))
    staged = config.ratios == "staged" or config.may_stage
    if config.objective == "nce" and not staged:
        return learning
    device = next(backbone.parameters()).device
    chains = rows
    if staged:
        rows = config.staging(0).batch_size // config.parts if config.may_stage else rows
        stage = config.stage.suited(backbone, config.parts)
        chains = min(draws_at_once(rows, device), -(-(stage.particles + stage.held_out) // config.parts))
    remedy = _one_of(*smaller, *(["--ratios one"] if staged else []), *_cells(backbone))
    moving = Need(chains * chain_bytes(prior), f"{chains} chains at a time", remedy)
    if device.type == "cuda":  # the CUDA graphs of the chains keep their memory
        return moving._replace(bytes=moving.bytes + learning.bytes, of=f"{moving.of} and {learning.of}")
    return max(learning, moving)


def for_step(step: Callable[[], object], device: torch.device, of: str, remedy: str) -> Need:
    """Memory for a step of training. The `step` is run once to measure it; `of` and `remedy` are those of `Need`."""
    return Need(int(OVERHEAD.get(device.type, 1.2) * peak_bytes(step)), of, remedy)


def require_memory(need: Need, device: torch.device) -> str:
    """One line that says how much is needed and how much is free. Raises MemoryLimitError where it does not fit."""
    free = free_bytes(device)
    there = "" if free is None else f", {_size(free)} free"
    if free is not None and need.bytes > free:
        raise MemoryLimitError(
            f"expected about {_size(need.bytes)} of memory on {device} for {need.of}, found {_size(free)} free: use "
            f"{need.remedy}"
        )
    return f"memory on {device}: about {_size(need.bytes)} for {need.of}{there}"


def chain_bytes(prior: EBMPrior) -> int:
    """Bytes that a chain takes at the peak of a step."""
    eps = _noise(prior.backbone)
    return _taken(lambda: start(prior.potential, eps), eps[0].device)


def _measured(prior: EBMPrior, passes: Passes) -> EBMPrior:
    """The prior with its backbone computed as `passes` say, but not compiled, since compiling takes long."""
    prior = copy.copy(prior)
    prior.backbone = replace(passes, compiled=False).apply(prior.backbone)
    return prior


def _head_bytes(prior: EBMPrior) -> int:
    """Bytes per latent at the peak of the heads' gradient."""
    with torch.no_grad():
        eps = _noise(prior.backbone)
        inputs = prior.energy.inputs(prior.backbone.reparameterize(eps), eps)
    energy = prior.energy.requires_grad_(True)
    learned = list(energy.parameters())
    found = _taken(lambda: torch.autograd.grad(energy(inputs).sum(), learned), eps[0].device)
    energy.requires_grad_(False)
    return max(0, found - _taken(lambda: [torch.zeros_like(p) for p in learned], eps[0].device))


def _noise(backbone: Backbone) -> list[Tensor]:
    device = next(backbone.parameters()).device
    return backbone.standard_normal(MEASURED, generator=derived_generator(0, device=device))


def _taken(run: Callable[[], object], device: torch.device) -> int:
    """Bytes of device memory per chain or latent at the peak of `run`, which works on `MEASURED` of them."""
    return int(OVERHEAD.get(device.type, 1.2) * peak_bytes(run) / MEASURED)


def _cells(backbone: Backbone) -> list[str]:
    """The options that reduce the memory of this backbone's passes; empty where its adapter does not support any."""
    return [] if type(backbone).checkpointing is Backbone.checkpointing else ["--checkpointing", "--precision bf16"]


def _one_of(*remedies: str) -> str:
    return few(remedies, separator=" or ")


def _size(number: int) -> str:
    """A number of bytes in binary units, to at most three digits."""
    unit = next((unit for unit in ("KiB", "MiB", "GiB") if number < 1000 * 1024 ** UNITS[unit]), "TiB")
    return f"{number / 1024 ** UNITS[unit]:.3g} {unit}"
