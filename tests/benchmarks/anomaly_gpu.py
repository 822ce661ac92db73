"""The anomaly table for many digits and seeds on one GPU: all models in lockstep, a CUDA graph with a branch for each.

    python tests/benchmarks/anomaly_gpu.py --digit 4 --digit 9 --seed 0 --seed 1 --width 128 --epochs 30 --out rows.json

What `ebm-prior anomaly-table` trains, by the same settings, loss, chains and scores. Models this small leave a GPU
idle, and processes that share one take turns; the branches of a graph run side by side. Noise is the graph's own, so
numbers differ from the command's by it. An epoch is the batches that the smallest training set has.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ebm_prior.compute.randomness import derived_generator, seeded
from ebm_prior.data.images import ImageSource, open_images
from ebm_prior.evaluation.detection import Detection, detection
from ebm_prior.experiments.anomaly_table import (
    DIGITS,
    FORMS,
    as_table,
    averaged,
    detector_config,
    pooled,
    split_by_digit,
    summary,
)
from ebm_prior.model.energy import JointEnergy
from ebm_prior.model.prior import EBMPrior
from ebm_prior.model.samplers import kernel_of, start, where
from ebm_prior.model.scores import Form
from ebm_prior.storage.atomic import write_atomically
from ebm_prior.storage.registry import adapter, build
from ebm_prior.training.joint_config import JointConfig
from ebm_prior.training.joint_loss import potential, terms


class Rates:
    """What changes from one iteration to the next, on the device, where all models read it."""

    def __init__(self, config: JointConfig, device: torch.device) -> None:
        self.config = config
        self.model, self.energy, self.forget = (torch.zeros((), device=device) for _ in range(3))

    def still(self) -> None:
        """Nothing learns."""
        for rate in (self.model, self.energy, self.forget):
            rate.zero_()

    def at(self, t: int) -> None:
        """As `ebm_prior.joint` has them at iteration t: warm-up and a cosine; the moving average's 1 − decay."""
        c = self.config
        rate = min(1.0, (t + 1) / max(1, c.warmup)) * 0.5 * (1 + math.cos(math.pi * t / c.iterations))
        self.model.fill_(rate * c.learning_rate)
        self.energy.fill_(rate * c.energy_learning_rate)
        self.forget.fill_(1 - min(c.ema, (1 + t) / (10 + t)))


class Model:
    """One digit, one seed. `step` is device work alone, of tensors that stay where they are."""

    def __init__(
        self, pool: ImageSource, digit: int, seed: int, network: dict[str, Any], rates: Rates, device: torch.device
    ) -> None:
        assert pool.labels is not None
        self.digit, self.seed, self.rates = digit, seed, rates
        split = split_by_digit(pool.labels, digit, seed=seed)
        self.train, self.test, self.anomalous = split.train.to(device), split.test.to(device), split.anomalous
        self.backbone = build(adapter("shallow"), network, seed=seed).to(device).train().requires_grad_(True)
        with seeded(device, seed, 30):
            self.energy = JointEnergy(self.backbone.groups, rates.config.energy).to(device)
        self.parameters = [*self.backbone.parameters(), *self.energy.parameters()]
        kept = copy.deepcopy(self.backbone), copy.deepcopy(self.energy)
        self.prior = EBMPrior(*kept)
        self.average = [p for part in kept for p in part.parameters()]
        self.optimizer = torch.optim.Adam(
            [
                {"params": list(self.backbone.parameters()), "lr": rates.model},
                {"params": list(self.energy.parameters()), "lr": rates.energy},
            ],
            betas=rates.config.betas,
            fused=True,
            capturable=device.type == "cuda",
        )
        self.order, self.place = self.train.clone(), torch.zeros((), dtype=torch.int64, device=device)
        self.chains = self.backbone.standard_normal(rates.config.batch_size)
        self.rows = torch.arange(rates.config.batch_size, device=device)
        self.course: dict[Form, list[Detection]] = {form: [] for form in FORMS.values()}

    def shuffle(self, epoch: int) -> None:
        """Begin an epoch."""
        generator = derived_generator(self.seed, self.digit, epoch, device=self.train.device)
        self.order.copy_(self.train[torch.randperm(len(self.train), generator=generator, device=self.train.device)])
        self.place.zero_()

    def step(self, pixels: Tensor, *, joined: bool) -> None:
        """One iteration; with `joined` the energy has a part in it."""
        config = self.rates.config
        x = pixels[self.order[self.place + self.rows]].float() / 255
        self.place += config.batch_size
        energy: nn.Module | None = self.energy if joined else None
        negative = self._prior_draws() if joined else None
        found = terms(self.backbone, energy, x, self.backbone.infer(x), negative)
        gradients = torch.autograd.grad(found.loss(), self.parameters, allow_unused=True)
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        nn.utils.clip_grad_norm_(self.backbone.parameters(), config.gradient_clip)
        self.optimizer.step()
        with torch.no_grad():
            moved = torch._foreach_sub(self.parameters, self.average)
            torch._foreach_mul_(moved, self.rates.forget)
            torch._foreach_add_(self.average, moved)

    def _prior_draws(self) -> list[Tensor]:
        """Persistent chains, moved on in place; z."""
        config, chain = self.rates.config, self.rates.config.prior_chain
        restart = torch.rand(config.batch_size, device=self.rows.device) < config.refresh
        eps = where(restart, self.backbone.standard_normal(config.batch_size), self.chains)
        g = potential(self.backbone, self.energy, config.space)
        state, kernel = start(g, eps), kernel_of(chain)
        for _ in range(chain.steps):
            state, _ = kernel(state, g, torch.full_like(state.value, chain.step_size), None)
        for memory, new in zip(self.chains, state.eps, strict=True):
            memory.copy_(new)
        return [z.detach() for z in self.backbone.reparameterize(state.eps)]

    def score(self, pixels: Tensor, draws: int) -> None:
        """The averaged model on the test images, once more."""
        images = pixels[self.test].float() / 255
        scores = self.prior.scores(images, FORMS.values(), draws=draws, seed=self.seed, chunk=8192)
        for form, values in scores.items():
            outlying = -values.double().cpu().numpy()
            self.course[form].append(detection(outlying[self.anomalous], outlying[~self.anomalous]))

    def found(self) -> list[dict[str, Any]]:
        """Rows, as `anomaly_table.run_digit` has them."""
        shared = {"digit": self.digit, "seed": self.seed, "chance": float(self.anomalous.mean())}
        return [{**shared, "model": f"EBM, L=2{name}", **summary(self.course[form])} for name, form in FORMS.items()]


def together(models: Sequence[Model], pixels: Tensor, *, joined: bool) -> Callable[[], None]:
    """One iteration of all models; on a GPU a graph, recorded here, with a branch for each."""

    def each() -> None:
        for model in models:
            model.step(pixels, joined=joined)

    if pixels.device.type != "cuda":
        return each
    graph, streams = torch.cuda.CUDAGraph(), [torch.cuda.Stream() for _ in models]  # type: ignore[no-untyped-call]

    def branches() -> None:
        trunk = torch.cuda.current_stream()
        for model, stream in zip(models, streams, strict=True):
            stream.wait_stream(trunk)
            with torch.cuda.stream(stream):
                model.step(pixels, joined=joined)
            trunk.wait_stream(stream)

    branches()  # libraries choose their kernels, and the optimizers make their moments
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        branches()
    return graph.replay


def seconds_of(iteration: Callable[[], None], device: torch.device, repeats: int = 20) -> float:
    """Seconds of one."""
    began = time.perf_counter()
    for _ in range(repeats):
        iteration()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / repeats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--digit", type=int, action="append", help="several times; default: the table's")
    parser.add_argument("--seed", type=int, action="append", help="several times; default: 0")
    parser.add_argument("--latents", type=int, nargs=2, default=(16, 8))
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--sigma", type=float, default=0.3)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="as many epochs, at most --epochs, as this takes"
    )
    parser.add_argument("--draws", type=int, default=8)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    device = torch.device(given.device)
    pool = pooled([open_images("mnist", split=split, data_root=given.data_root) for split in ("train", "test")])
    assert pool.labels is not None
    pixels = pool.batch(range(len(pool))).mul(255).round().to(torch.uint8).to(device)
    digits, seeds = given.digit or DIGITS, given.seed or [0]
    smallest = min(len(split_by_digit(pool.labels, digit).train) for digit in digits)
    config = detector_config(smallest, epochs=given.epochs)
    rates = Rates(config, device)
    network = {
        "image_shape": list(pool.shape),
        "latents": list(given.latents),
        "width": given.width,
        "sigma": given.sigma,
    }
    models = [Model(pool, digit, seed, network, rates, device) for seed in seeds for digit in digits]
    rates.still()
    plain, joint = (together(models, pixels, joined=joined) for joined in (False, True))
    without, within = (seconds_of(each, device) for each in (plain, joint))
    print(f"{len(models)} models: {without * 1e3:.1f} ms an iteration, {within * 1e3:.1f} with energies", flush=True)
    mean = config.energy_from * without + (1 - config.energy_from) * within
    epochs = int(min(given.epochs, given.seconds / (mean * config.evaluate_every)))
    rates.config = detector_config(smallest, epochs=epochs)
    per_epoch = rates.config.evaluate_every
    rows: list[dict[str, Any]] = []
    began, t, epoch = time.perf_counter(), 0, 0
    while epoch < epochs:
        for model in models:
            model.shuffle(epoch)
        for _ in range(per_epoch):
            rates.at(t)
            (plain if t < rates.config.energy_from * rates.config.iterations else joint)()
            t += 1
        epoch += 1
        if epoch > epochs - averaged(epochs):
            for model in models:
                model.score(pixels, given.draws)
            rows = [row | {"epochs": epoch} for model in models for row in model.found()]
            write_atomically(given.out, json.dumps(rows, indent=2).encode())
        seconds = time.perf_counter() - began
        print(f"epoch {epoch} of {epochs}: {seconds:.0f} s", flush=True)
    print(as_table(rows))
    print(f"width {given.width}, {epoch} epochs of {per_epoch} batches, {seconds:.0f} s, scores among them")


if __name__ == "__main__":
    main()
