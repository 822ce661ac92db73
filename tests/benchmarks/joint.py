"""A step of joint training at CIFAR-10 size against the plain published loop, written from its description.

    python tests/benchmarks/joint.py [--batch 100] [--steps 40] [--repeats 3] [--device cuda] [--json]

Both take `--steps` Langevin steps for the posterior, through the generator, and as many for the prior, then update
generator, heads and (ours alone) the inference network beside the chains, on the network of Table 12 at 32 × 32. CPU
seconds of this process (on a GPU, seconds by the clock), the fastest of the repeats, the methods in turn.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from ebm_prior.backbones.shallow import ShallowGenerator
from torch import Tensor, nn

from ebm_prior.data.images import from_array
from ebm_prior.experiments.jobs import clock
from ebm_prior.model.energy import EnergyConfig, JointEnergy
from ebm_prior.training.joint import JointTraining
from ebm_prior.training.joint_config import paper_joint

PRIOR_STEP, POSTERIOR_STEP, SIGMA = 0.4, 0.1, 0.3  # of the published code: z + ½s²∇ + sξ
PLAIN = "plain loop"


def network() -> ShallowGenerator:
    torch.manual_seed(0)
    return ShallowGenerator((3, 32, 32), (100, 100), width=128, sigma=SIGMA)


class Plain:
    """The published loop: z-space chains from N(0, I), every weight asking for gradients, three optimizers."""

    def __init__(self, images: Tensor, energy: EnergyConfig, steps: int) -> None:
        self.net, self.images, self.steps = network().train().to(images.device), images, steps
        self.heads = JointEnergy(self.net.groups, energy).to(images.device)
        parts = (self.net.generator, self.net.prior, self.heads)
        self.optimizers = [torch.optim.Adam(part.parameters(), lr=1e-4, betas=(0.5, 0.999)) for part in parts]

    def joint(self, z: list[Tensor]) -> Tensor:
        """log p_β>0(z) + f(z), (B,)."""
        mean, log_std = self.net.prior[0](z[0]).chunk(2, 1)
        conditional = -0.5 * ((z[1] - mean) / log_std.exp()).square() - log_std
        return conditional.sum(1) - 0.5 * z[0].square().sum(1) + self.heads(z)

    def reconstruction(self, z: list[Tensor]) -> Tensor:
        """log p(x | z_1) up to a constant, (B,)."""
        made = self.net.generator(z[1][:, :, None, None])
        return -(2 * self.images - 1 - made).square().flatten(1).sum(1) / (2 * SIGMA**2)

    def chain(self, log_density: Callable[[list[Tensor]], Tensor], size: float) -> list[Tensor]:
        z = [torch.randn(len(self.images), 100, device=self.images.device, requires_grad=True) for _ in range(2)]
        for _ in range(self.steps):
            slope = torch.autograd.grad(log_density(z).sum(), z)
            z = [(a + 0.5 * size**2 * d + size * torch.randn_like(a)).detach() for a, d in zip(z, slope, strict=True)]
            z = [a.requires_grad_() for a in z]
        return [a.detach() for a in z]

    def parts(self) -> dict[str, Callable[[], Any]]:
        def posterior() -> None:
            self.positive = self.chain(lambda z: self.reconstruction(z) + self.joint(z), POSTERIOR_STEP)

        def prior() -> None:
            self.negative = self.chain(self.joint, PRIOR_STEP)

        def update() -> None:
            for optimizer in self.optimizers:
                optimizer.zero_grad()
            (-self.reconstruction(self.positive).mean()).backward()
            (self.joint(self.negative).mean() - self.joint(self.positive).mean()).backward()
            for optimizer in self.optimizers:
                optimizer.step()

        return {"posterior chains": posterior, "prior chains": prior, "update": update}


class Ours:
    """`ebm-prior train --preset paper`, its step taken apart."""

    def __init__(self, images: Tensor, energy: EnergyConfig, steps: int, *, fast: bool) -> None:
        base = paper_joint()
        chains = [replace(chain, steps=steps) for chain in (base.prior_chain, base.posterior_chain)]
        config = replace(
            base,
            batch_size=len(images),
            energy=energy,
            prior_chain=chains[0],
            posterior_chain=chains[1],
            bfloat16=fast,
            channels_last=fast,
        )
        source = from_array(images.cpu().numpy())
        self.images, self.training = images, JointTraining(network().to(images.device), source, config, source)

    def parts(self) -> dict[str, Callable[[], Any]]:
        training, generator = self.training, torch.Generator(self.images.device).manual_seed(0)
        frozen: list[nn.Module] = [training.network]

        def chains(draw: Callable[[], Any]) -> Callable[[], Any]:
            def run() -> None:
                frozen[0].eval().requires_grad_(False)
                draw()
                frozen[0].train().requires_grad_(True)

            return run

        return {
            "posterior chains": chains(lambda: training.chains.of_images(self.images, training.energy, generator)),
            "prior chains": chains(lambda: training.chains.of_prior(len(self.images), training.energy, generator)),
            "step": training.step,
        }


def now(device: torch.device) -> float:
    """`clock`, when all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock(device)


def main() -> None:
    """Print a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("batch", 100), ("steps", 40), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device(given.device)
    images = torch.from_numpy(np.random.default_rng(0).random((given.batch, 3, 32, 32), dtype=np.float32)).to(device)
    energy = paper_joint().energy
    methods = {
        PLAIN: Plain(images, energy, given.steps).parts(),
        "ours": Ours(images, energy, given.steps, fast=False).parts(),
        "ours, bfloat16 and channels last": Ours(images, energy, given.steps, fast=True).parts(),
    }
    best: dict[str, dict[str, float]] = {name: {} for name in methods}
    for _ in range(given.repeats):
        for name, parts in methods.items():
            for part, run in parts.items():
                began = now(device)
                run()
                seconds = now(device) - began
                best[name][part] = min(seconds, best[name].get(part, seconds))
    for seconds_of in best.values():  # our update is what is left of a whole step
        if "step" in seconds_of:
            chains = seconds_of["posterior chains"] + seconds_of["prior chains"]
            seconds_of["update"] = max(0.0, seconds_of.pop("step") - chains)
        seconds_of["step"] = sum(seconds_of.values())
    if given.json:
        print(json.dumps(best))
        return
    seconds_are = "CPU seconds" if device.type == "cpu" else "seconds"
    print(f"batch {given.batch}, {given.steps} + {given.steps} Langevin steps; {seconds_are}, best of {given.repeats}")
    for name, found in best.items():
        shares = ", ".join(f"{part} {seconds:.2f}" for part, seconds in found.items() if part != "step")
        print(f"{name:34} {found['step']:7.2f} s  ×{best[PLAIN]['step'] / found['step']:.2f}   {shares}")


if __name__ == "__main__":
    main()
