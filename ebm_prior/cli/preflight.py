"""The memory that a command will need: reported before the work starts, and refused where the device has less.

A step's tensors grow in proportion to the number of chains, latents or images in it. So each kind of step is run with
two of them, the peak over all living tensors is counted, and it is multiplied. What a fit stores is added: held-out
latents, the draws of stages, and the copies of the heads' weights.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ebm_prior.cli.allocator import return_freed_memory
from ebm_prior.compute.memory import free_bytes, peak_bytes
from ebm_prior.compute.randomness import BLOCK, derived_generator
from ebm_prior.data.source import ImageSource
from ebm_prior.errors import MemoryLimitError, few
from ebm_prior.model.backbone import Backbone
from ebm_prior.model.by_group import draw_by_group
from ebm_prior.model.own_energy import energy_of
from ebm_prior.model.passes import PLAIN, Passes
from ebm_prior.model.prior import EBMPrior
from ebm_prior.model.samplers import SamplerConfig, kernel_of, start
from ebm_prior.training.fit_config import FitConfig, may_follow
from ebm_prior.training.held_images import held_bytes
from ebm_prior.training.latents import PRIOR_DRAWS, held_out_count
from ebm_prior.training.pretrain import EVALUATED, Pretraining, evaluate_elbo
from ebm_prior.training.pretrain_config import PretrainConfig
from ebm_prior.training.stages import draws_at_once

UNITS = {"KiB": 1, "MiB": 2, "GiB": 3, "TiB": 4}
MEASURED = 2  # chains in the step that is measured
# Memory of the process as a multiple of the tensors' own, on a CPU: of a fit 1.09 to 1.24 was measured, and 2.7 of
# 1,024 draws from the bundled BIVA at a time, whose convolutions need room that no tensor shows. Of pretraining an NVAE
# and a VDVAE, 1.25 to 1.38 was measured.
FIT_OVERHEAD, PRETRAIN_OVERHEAD, OVERHEAD = 1.2, 1.4, 2.75
COPIES = 11  # of the heads' weights: learned, averaged, best, the optimizer's two, all in the last good state, gradient
# Copies of a backbone's weights in pretraining, beside those that the command has loaded. In a step: the average, the
# optimizer's two, the gradient, and four in the last good state. When a state is saved: four more.
LEARNED, SAVED = 8, 12
PROBE = 16  # latents at which the heads' gradient is measured


class Need(NamedTuple):
    """Memory that a command will take, in addition to what the process has already."""

    bytes: int
    of: str  # the work that needs the memory, e.g. "128 chains at a time"
    remedy: str  # the options that reduce it


class Kept(Enum):
    """The part of each draw that is kept until all are drawn."""

    ALL = "z, ε and the image"
    LATENTS = "z, and the image in bytes, on the host"
    PIXELS = "the image in bytes, on the host"


def for_samples(
    prior: EBMPrior, n: int, chunk: int, sampler: SamplerConfig, passes: Passes = PLAIN, *, kept: Kept = Kept.ALL
) -> Need:
    """Memory for n draws in chunks: the chains of one chunk, and what is `kept` of all draws.

    The results count twice, because the chunks and their concatenation exist together for a moment. `passes`: how the
    backbone is going to be computed.
    """
    prior = _measured(prior, passes)
    chains = min(n, max(BLOCK, chunk // BLOCK * BLOCK))
    smaller = [f"-n or --samples below {n}", *([f"--chunk {BLOCK}"] if chains > BLOCK else [])]
    like = next(prior.backbone.parameters())
    latents, pixels = _draw_bytes(prior.backbone), math.prod(prior.backbone.image_shape)
    each = {Kept.ALL: 2 * latents + pixels * like.dtype.itemsize, Kept.LATENTS: latents + pixels, Kept.PIXELS: pixels}
    draws = 2 * n * each[kept] * (kept is Kept.ALL or like.device.type == "cpu")
    at_work = chains * chain_bytes(prior, sampler) if sampler.steps else 0
    remedy = _one_of(*smaller, *_cells(prior.backbone))
    return Need(int(OVERHEAD * (draws + at_work)), f"{n} draws, {chains} at a time", remedy)


def for_fit(
    backbone: Backbone, config: FitConfig, images: int, passes: Passes = PLAIN, own: nn.Module | None = None
) -> Need:
    """Memory for a fit to a number of `images`: what it stores, and the largest of the steps that it alternates.

    A refiner that may follow takes no memory at the same time, but perhaps more. `passes`: how the backbone is going to
    be computed. `own`: the user's own energy in place of the heads, or None.
    """
    fits = [config, *([refiner] if (refiner := may_follow(config)) else [])]
    return max((_for_one(backbone, each, images, passes, own) for each in fits), key=lambda need: need.bytes)


def _for_one(backbone: Backbone, config: FitConfig, images: int, passes: Passes, own: nn.Module | None) -> Need:
    """Memory for a fit without the refiner that may follow."""
    heads = energy_of(backbone.groups, config.heads, own)
    prior = _measured(EBMPrior(backbone, heads, regime=config.regime, target=config.target), passes)
    device, rows = next(backbone.parameters()).device, config.batch_size // config.parts
    held, each, work = held_out_count(backbone, config, images), _draw_bytes(backbone), _Work(prior)
    latents = held * (1 + PRIOR_DRAWS) * each * config.heads.views * (device.type == "cpu")
    kept = latents + COPIES * work.weights
    smaller = [f"--parts above {config.parts}", f"--batch-size below {config.batch_size}"]
    phases = [
        Need(kept + latents, f"the latents of {held} held-out images", f"--held-out below {held}"),
        Need(kept + work.learning(rows), f"the heads at {2 * rows} latents", _one_of(*smaller)),
        Need(kept + rows * work.posterior, f"the posteriors of {rows} images", _one_of(*smaller)),
    ]
    staged, chains = config.ratios == "staged" or config.may_stage, rows
    if staged:
        stage = config.stage.suited(backbone, config.parts)
        after = config.staging(0).batch_size // config.parts if config.may_stage else rows
        draws = stage.particles + stage.held_out
        chains = min(draws_at_once(after, device), -(-draws // config.parts))
        stored = draws * each + work.weights  # with the heads that f is compared with; again in the last good state
        kept += 2 * stored + stage.held_out * work.seen
        smaller += [f"--stage-particles below {stage.particles}", "--ratios one"]
        phases.append(Need(kept + work.learning(after), f"the heads at {2 * after} latents", _one_of(*smaller)))
        phases.append(Need(kept + 2 * stored, f"{draws} draws of a stage", _one_of(*smaller[2:])))  # copied, then saved
    if staged or config.objective != "nce":
        chain = SamplerConfig(leapfrogs=config.stage.leapfrogs) if staged else config.chain
        moved = draws * each if staged else rows * work.seen  # what has moved already; or the posteriors
        remedy = _one_of(*smaller, *_cells(backbone))
        at_work = chains * chain_bytes(prior, chain) + moved
        if device.type == "cuda":  # the CUDA graphs of the chains keep their memory
            at_work += work.learning(rows)
        phases.append(Need(kept + at_work, f"{chains} chains at a time", remedy))
    largest = max(phases, key=lambda need: need.bytes)
    return largest._replace(bytes=int(FIT_OVERHEAD * largest.bytes))


def for_pretrain(
    backbone: Backbone, train: ImageSource, test: ImageSource, config: PretrainConfig, passes: Passes = PLAIN
) -> Need:
    """Memory for pretraining on the images `train`, with evaluations on `test`: the largest of what it alternates.

    A step on a part of the batch; the copies of all weights when a state is saved; and the ELBO of test images. The
    images that stay on the device are added. `passes`: how the backbone is going to be computed.
    """
    device, rows = next(backbone.parameters()).device, config.batch_size // config.parts
    weights = sum(tensor.nbytes for tensor in [*backbone.parameters(), *backbone.buffers()])
    held = held_bytes(train, backbone.image_shape, device)
    evaluated = min(EVALUATED, len(test))
    constant, each, measured = _for_images(backbone, train, config, passes)
    cells = type(backbone).for_training is not Backbone.for_training and passes.dtype != torch.bfloat16
    smaller = [f"--parts above {config.parts}", f"--batch-size below {config.batch_size}"]
    network = "a smaller network"
    phases = [
        Need(
            (LEARNED + (config.parts > 1)) * weights + constant + rows * each,
            f"a step on {rows} images",
            _one_of(*smaller, *["--precision bf16"] * cells),
        ),
        Need(SAVED * weights, "the weights in training and in two saved states", network),
        Need(LEARNED * weights + evaluated * measured, f"the ELBO of {evaluated} images", network),
    ]
    largest = max(phases, key=lambda need: need.bytes)
    return largest._replace(bytes=int(PRETRAIN_OVERHEAD * (held + largest.bytes)))


def _for_images(
    backbone: Backbone, images: ImageSource, config: PretrainConfig, passes: Passes
) -> tuple[int, int, int]:
    """Bytes that images take in a step of pretraining: a constant, and for each; then for each in an evaluation."""
    some = images.subset(range(min(2 * MEASURED, len(images))))
    passes = replace(passes, compiled=False)
    few, more = (
        Pretraining(copy.deepcopy(backbone), some, replace(config, batch_size=rows, parts=1), passes=passes)
        for rows in (MEASURED, 2 * MEASURED)
    )
    at_few, at_more = (_gradient_bytes(training) for training in (few, more))
    each = (at_more - at_few) // MEASURED
    evaluated = peak_bytes(lambda: evaluate_elbo(few.average, some)) // len(some)
    return max(0, at_few - MEASURED * each), each, evaluated


def _gradient_bytes(training: Pretraining) -> int:
    """Bytes at the peak of a step's backward pass, apart from the gradient itself."""
    for parameter in training.parameters:  # so that the gradient is added to what is there
        parameter.grad = torch.zeros_like(parameter)
    return peak_bytes(lambda: training.share(0)[0].backward())  # type: ignore[no-untyped-call]


def for_step(step: Callable[[], object], of: str, remedy: str) -> Need:
    """Memory for a step of training. The `step` is run once to measure it; `of` and `remedy` are those of `Need`."""
    return Need(int(OVERHEAD * peak_bytes(step)), of, remedy)


def require_memory(need: Need, device: torch.device) -> str:
    """One line that says how much is needed and how much is free. Raises MemoryLimitError where it does not fit."""
    return_freed_memory()  # of the steps that were measured
    free = free_bytes(device)
    there = "" if free is None else f", {_size(free)} free"
    if free is not None and need.bytes > free:
        raise MemoryLimitError(
            f"expected about {_size(need.bytes)} of memory on {device} for {need.of}, found {_size(free)} free: use "
            f"{need.remedy}"
        )
    return f"memory on {device}: about {_size(need.bytes)} for {need.of}{there}"


def chain_bytes(prior: EBMPrior, sampler: SamplerConfig) -> int:
    """Bytes of tensors for each chain at the peak of a step of the sampler's kernel."""
    eps = _noise(prior.backbone)
    generator, potential = derived_generator(1, device=eps[0].device), prior.potential
    if sampler.by_group:
        few = replace(sampler, proposals=min(2, sampler.proposals), steps=1, adapt_steps=0, leapfrogs=1)
        return _each(lambda: draw_by_group(prior.backbone, prior.walk(), [], MEASURED, few, generator))
    kernel = kernel_of(replace(sampler, leapfrogs=min(2, sampler.leapfrogs)))  # more take longer, and no more memory
    still = torch.zeros(MEASURED, dtype=eps[0].dtype, device=eps[0].device)
    return _each(lambda: kernel(start(potential, eps), potential, still, generator))


def _measured(prior: EBMPrior, passes: Passes) -> EBMPrior:
    """The prior with its backbone computed as `passes` say, but not compiled, since compiling takes long."""
    prior = copy.copy(prior)
    prior.backbone = replace(passes, compiled=False).apply(prior.backbone)
    return prior


class _Work:
    """Bytes of tensors in the steps of a fit, and of the weights of its heads."""

    def __init__(self, prior: EBMPrior) -> None:
        energy, backbone = prior.energy, prior.backbone
        eps = _noise(backbone)
        with torch.no_grad():
            trace = backbone.transform(eps)
            inputs = energy.inputs(trace.z, eps, trace.priors)
            pictures = torch.zeros(MEASURED, *backbone.image_shape, dtype=eps[0].dtype, device=eps[0].device)
            self.posterior = _each(lambda: backbone.infer(pictures, noise=eps))  # for each image
        self.energy, self.inputs = energy, inputs
        self.weights = sum(parameter.nbytes for parameter in energy.parameters())
        self.seen = sum(each.nbytes for each in inputs) // MEASURED  # for the heads' inputs of each latent
        few, more = (self._gradient(rows) for rows in (PROBE // 2, PROBE))
        self.each = 2 * (more - few) // PROBE
        self.constant = more - PROBE * self.each

    def learning(self, rows: int) -> int:
        """Bytes for the gradient of the heads: at `rows` posterior and as many prior latents, which are joined."""
        return self.constant + 2 * rows * (self.each + 2 * self.seen)

    def _gradient(self, rows: int) -> int:
        """Bytes at the peak of the heads' gradient at so many latents."""
        inputs = [seen[:1].repeat(rows, *(1 for _ in seen[0].shape)) for seen in self.inputs]
        learned = list(self.energy.requires_grad_(True).parameters())
        found = peak_bytes(lambda: torch.autograd.grad(self.energy(inputs).sum(), learned))
        self.energy.requires_grad_(False)
        return found


def _noise(backbone: Backbone) -> list[Tensor]:
    device = next(backbone.parameters()).device
    return backbone.standard_normal(MEASURED, generator=derived_generator(0, device=device))


def _each(run: Callable[[], object]) -> int:
    """Bytes of tensors per chain, latent or image at the peak of `run`, which works on `MEASURED` of them."""
    return peak_bytes(run) // MEASURED


def _draw_bytes(backbone: Backbone) -> int:
    """Bytes of one draw of all latent groups."""
    return sum(math.prod(g.shape) for g in backbone.groups) * next(backbone.parameters()).dtype.itemsize


def _cells(backbone: Backbone) -> list[str]:
    """The options that reduce the memory of this backbone's passes; empty where its adapter does not support any."""
    return [] if type(backbone).checkpointing is Backbone.checkpointing else ["--checkpointing", "--precision bf16"]


def _one_of(*remedies: str) -> str:
    return few(remedies, separator=" or ")


def _size(number: int) -> str:
    """A number of bytes in binary units, to at most three digits."""
    unit = next((unit for unit in ("KiB", "MiB", "GiB") if number < 1000 * 1024 ** UNITS[unit]), "TiB")
    return f"{number / 1024 ** UNITS[unit]:.3g} {unit}"
