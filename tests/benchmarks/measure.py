"""What the benchmarks share: networks, the plain path, interleaved timing, memory, and the report.

Times are CPU seconds of this process on one thread, which other load on the machine disturbs least; on a GPU they are
seconds by the clock. Alternatives run in turn, and what is shown is the median over the rounds.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from ebm_prior.backbones.nvae.adapter import NVAE
from torch import Tensor

from ebm_prior.cli.allocator import keep_freed_memory
from ebm_prior.compute.randomness import derived_generator, standard_normal
from ebm_prior.model.backbone import Backbone
from ebm_prior.model.energy import EnergyConfig, JointEnergy
from ebm_prior.model.prior import EBMPrior
from ebm_prior.model.samplers import ChainState, graphed, langevin_step, run_chain, start
from ebm_prior.reports.text import table
from ebm_prior.storage.checkpoint import load_backbone
from ebm_prior.training.fit_config import paper_preset
from ebm_prior.training.objectives import mle_loss

SIZES: dict[str, dict[str, Any] | None] = {
    "small": {
        "image_shape": [3, 32, 32],
        "groups_per_scale": [5, 5],
        "likelihood": "logistic_mixture",
        "encoder_channels": 32,
        "decoder_channels": 32,
    },
    "published": {  # CIFAR-10
        "image_shape": [3, 32, 32],
        "groups_per_scale": [30],
        "likelihood": "gaussian",
        "flows": 1,
    },
    "hq-256": {  # CelebA-HQ-256, 375 million parameters
        "image_shape": [3, 256, 256],
        "groups_per_scale": [16, 8, 4, 4, 4],
        "likelihood": "logistic_mixture",
        "encoder_channels": 32,
        "decoder_channels": 32,
        "flows": 2,
        "bits": 5,
    },
    "bundled": None,  # nvae_cifar10
}
BATCH = {"small": 8, "published": 4, "hq-256": 1, "bundled": 64}
STEP_SIZE = 2e-5  # s of Eq. 12, as published for CIFAR-10: the published code's 4e-5 is 2s


def network(size: str, device: str = "cpu", **changes: Any) -> Backbone:
    """An NVAE of a size, frozen: random weights but for the bundled one."""
    architecture = SIZES[size]
    if architecture is None:
        return load_backbone(None, "nvae_cifar10", device=torch.device(device))
    torch.manual_seed(0)
    return NVAE(**{**architecture, **changes}).eval().requires_grad_(False).to(device)


def paper_heads(backbone: Backbone, config: EnergyConfig | None = None) -> JointEnergy:
    """Heads (the paper's by default) with random weights in the last layer, too."""
    torch.manual_seed(1)
    energy = JointEnergy(backbone.groups, config or paper_preset().energy)
    for name, parameter in energy.named_parameters():
        if name.endswith("last.weight"):
            torch.nn.init.normal_(parameter, std=0.1)
    like = next(backbone.parameters())
    return energy.eval().requires_grad_(False).to(like.device)


def unfolded(backbone: Backbone) -> Backbone:
    """The backbone as one that runs at inference as it is."""
    twin = copy.copy(backbone)
    twin.for_inference = lambda: twin  # type: ignore[method-assign]
    return twin


class Swish(torch.autograd.Function):
    """x·sigmoid(x) as the published code has it: an own backward pass that keeps x and computes its sigmoid again."""

    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        """x·sigmoid(x), element by element."""
        context.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        """gradient · σ(x) · (1 + x·(1 − σ(x)))."""
        (x,) = context.saved_tensors
        sigmoid = torch.sigmoid(x)
        return gradient * (sigmoid * (1 + x * (1 - sigmoid)))


def swish(x: Tensor) -> Tensor:
    """The published swish, in the place of torch.nn.functional.silu."""
    result: Tensor = Swish.apply(x)  # type: ignore[no-untyped-call]
    return result


class Plain:
    """A Langevin step as published: the unfolded network with its image head, heads one by one, log p_β(z) by autograd.

    The published code differentiates Σ_i mean f_i(z_i) + mean log p_β(z) at z = T_β(ε) with respect to ε and moves
    ε ← ε + ½·s_code·B·gradient + √s_code·ξ, s_code = 2s. `fused`: with torch's fused swish in its place.
    """

    def __init__(self, backbone: Backbone, energy: JointEnergy, *, fused: bool) -> None:
        self.backbone, self.energy, self.fused = unfolded(backbone), energy, fused

    def objective(self, eps: Sequence[Tensor]) -> Tensor:
        """A scalar."""
        with self.published():
            trace = self.backbone.transform(eps)
            self.backbone.likelihood(trace.features)
        terms = [head(z).mean() for head, z in zip(self.energy.heads.values(), trace.z, strict=True)]
        return torch.stack([*terms, trace.log_prior.sum(1).mean()]).sum()

    def published(self) -> AbstractContextManager[object]:
        """A context in which the network has this path's swish."""
        return nullcontext() if self.fused else mock.patch.object(F, "silu", swish)

    def step(self, eps: Sequence[Tensor], generator: torch.Generator) -> list[Tensor]:
        """The next ε, a list of (B, *group.shape)."""
        s, leaves = 2 * STEP_SIZE, [e.detach().requires_grad_() for e in eps]
        with torch.enable_grad():
            gradients = torch.autograd.grad(self.objective(leaves), leaves)
        return [
            e + 0.5 * s * len(e) * g + s**0.5 * standard_normal(e.shape, generator, dtype=e.dtype, device=e.device)
            for e, g in zip(eps, gradients, strict=True)
        ]

    def run(self, batch: int, steps: int, generator: torch.Generator) -> list[Tensor]:
        """The ends of new chains, a list of (B, *group.shape)."""
        eps: Sequence[Tensor] = self.backbone.standard_normal(batch, generator=generator)
        for _ in range(steps):
            eps = self.step(eps, generator)
        return list(eps)

    @torch.no_grad()
    def sample(self, batch: int, steps: int, generator: torch.Generator) -> Tensor:
        """Images (B, C, H, W): chains from new draws, decoded."""
        eps = self.run(batch, steps, generator)
        with self.published():
            return self.backbone.likelihood(self.backbone.transform(eps).features).mean

    def iteration(
        self, images: Tensor, steps: int, optimizer: torch.optim.Optimizer, generator: torch.Generator
    ) -> None:
        """A step of training: a posterior pass of `images` (B, C, H, W), chains, an update of the heads."""
        with torch.no_grad(), self.published():
            z_q = self.backbone.draw_posterior(images, generator=generator)
            z_p = self.backbone.transform(self.run(len(images), steps, generator)).z
        optimizer.zero_grad()
        mle_loss(self.energy(z_q), self.energy(z_p), penalty=0.0).backward()
        optimizer.step()


class Chain:
    """A batch of chains on a backbone, stepped by `plain` or by `samplers.langevin_step` (the ε-target, folded)."""

    def __init__(
        self, backbone: Backbone, energy: JointEnergy, batch: int, *, plain: Plain | None = None, graphs: bool = True
    ) -> None:
        device = next(backbone.parameters()).device
        self.generator = derived_generator(0, device=device)
        self.eps = backbone.standard_normal(batch, generator=self.generator)
        self.plain = plain
        self.prior = EBMPrior(unfolded(backbone) if plain else backbone, energy)
        self.potential = graphed(self.prior.potential, device) if graphs else self.prior.potential
        self.step_size = torch.full((batch,), STEP_SIZE, device=device)
        self.state: ChainState | None = None

    def value(self, eps: Sequence[Tensor]) -> Tensor:
        """The scalar that a step differentiates."""
        return self.plain.objective(eps) if self.plain else self.prior.potential(eps).sum()

    def step(self) -> None:
        """One step: one evaluation of the gradient."""
        if self.plain:
            self.eps = self.plain.step(self.eps, self.generator)
            return
        if self.state is None:
            self.state = start(self.potential, self.eps)
        self.state, _, _ = run_chain(
            langevin_step, self.state, self.potential, 1, step_size=self.step_size, generator=self.generator
        )


def interleaved(
    alternatives: Mapping[str, Callable[[], object]], rounds: int, *, device: str = "cpu", warm_up: int = 1
) -> dict[str, float]:
    """Median seconds of each, run in turn `rounds` times after some that do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in alternatives}
    for number in range(warm_up + rounds):
        for name, run in alternatives.items():
            began = _clock(device)
            run()
            if number >= warm_up:
                seconds[name].append(_clock(device) - began)
    return {name: statistics.median(times) for name, times in seconds.items()}


def _clock(device: str) -> float:
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def saved_bytes(chain: Chain) -> int:
    """Bytes that a step of the chain keeps for its backward pass, each storage once; weights and ε are not counted."""
    leaves = [e.clone().requires_grad_() for e in chain.eps]
    modules = (chain.prior.backbone, chain.prior.energy)
    constants = {t.untyped_storage().data_ptr() for m in modules for t in [*m.parameters(), *m.buffers(), *leaves]}
    kept: dict[int, torch.UntypedStorage] = {}

    @torch.compiler.disable
    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in constants:
            kept[storage.data_ptr()] = storage
        return tensor.detach()  # itself it would be kept by its own graph, which would then never end

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = chain.value(leaves)
    del value
    return sum(storage.nbytes() for storage in kept.values())


def peak_bytes(run: Callable[[], object], device: str = "cpu") -> int:
    """How far memory rises above where it is now while `run` runs: resident (Linux, glibc), or a GPU's reserved."""
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        run()
        return torch.cuda.memory_reserved() - before  # with what graphs keep
    ctypes.CDLL(None).malloc_trim(0)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    run()
    return _status("VmHWM") - before


def _status(key: str) -> int:
    line = next(row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith(key))
    return int(line.split()[1]) * 1024


def arguments(description: str, **defaults: Any) -> argparse.Namespace:
    """The options of a benchmark: --json, and for each keyword one with this default (a list takes several values)."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, help="write the rows to this file, too")
    parser.add_argument("--device", default="cpu", help="cpu or cuda [cpu]")
    for name, default in defaults.items():
        many = isinstance(default, list)
        kind = type(default[0] if many else default)
        choices = list(SIZES) if name == "size" else None
        parser.add_argument(
            f"--{name}", type=kind, default=default, nargs="+" if many else None, choices=choices, help=f"[{default}]"
        )
    torch.set_num_threads(1)
    keep_freed_memory()  # as the command line does
    return parser.parse_args()


def report(title: str, rows: Sequence[Mapping[str, Any]], path: Path | None) -> None:
    """Print the rows as a table and write them, with what they were measured on, to `path`."""
    head = list(rows[0])
    print(title)
    print(table(head, [[_shown(row[key]) for key in head] for row in rows]), flush=True)
    if path:
        name = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
        machine = {"machine": name, "torch": torch.__version__, "threads": 1}
        path.write_text(json.dumps({"title": title, **machine, "rows": list(rows)}, indent=1) + "\n")


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
