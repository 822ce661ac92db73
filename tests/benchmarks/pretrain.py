"""Images per second of pretraining an NVAE, against a plain loop: batches from the host, Adamax, the average by a loop.

python tests/benchmarks/pretrain.py --size bundled --batch 32 --paths plain ours "ours, channels last" --json out.json

Add "ours, bf16" and "ours, compiled" on machines that gain by them. The paths run in turn, `--steps` steps each.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import torch
from measure import arguments, interleaved, network, report

from ebm_prior.data.images import from_array
from ebm_prior.model.backbone import Backbone
from ebm_prior.model.passes import PLAIN, Passes
from ebm_prior.training.pretrain import Pretraining
from ebm_prior.training.pretrain_config import PretrainConfig

IMAGES = 2_000
CONFIG = PretrainConfig(iterations=10**6, optimizer="adamax", epsilon=1e-3, kl_warmup=0.0, learning_rate=1e-4)
LAST, HALF = replace(CONFIG, channels_last=True), torch.bfloat16
PATHS = {
    "ours": (CONFIG, PLAIN),
    "ours, channels last": (LAST, PLAIN),
    "ours, compiled": (LAST, Passes(compiled=True)),
    "ours, bf16": (LAST, Passes(dtype=HALF)),
    "ours, bf16, compiled": (LAST, Passes(dtype=HALF, compiled=True)),
}


class Plain:
    """A loop as one writes it first."""

    def __init__(self, backbone: Backbone, pixels: torch.Tensor, batch: int) -> None:
        self.network, self.pixels, self.batch = backbone.train().requires_grad_(True), pixels, batch
        self.average = copy.deepcopy(backbone)
        self.device = next(backbone.parameters()).device
        self.optimizer = torch.optim.Adamax(backbone.parameters(), lr=CONFIG.learning_rate, eps=CONFIG.epsilon)

    def step(self) -> None:
        """One step of the optimizer, and of the average."""
        rows = torch.randint(len(self.pixels), (self.batch,))
        x = self.network.observe((self.pixels[rows].float() / 255).to(self.device))
        posterior = self.network.infer(x)
        kl = (posterior.log_q - posterior.log_p).sum(1)
        loss = (kl - self.network.likelihood(posterior.features).log_prob(x)).mean()
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), CONFIG.gradient_clip)
        self.optimizer.step()
        loss.item()
        with torch.no_grad():
            for kept, new in zip(self.average.parameters(), self.network.parameters(), strict=True):
                kept.mul_(CONFIG.ema).add_(new, alpha=1 - CONFIG.ema)
            for kept, new in zip(self.average.buffers(), self.network.buffers(), strict=True):
                kept.copy_(new)


def main() -> None:
    options = arguments(__doc__ or "", size=["bundled"], batch=32, steps=4, rounds=5, paths=["plain", *PATHS])
    rows = []
    for size in options.size:

        def path(name: str, size: str = size) -> Callable[[], object]:
            backbone = network(size, options.device)
            shape = (IMAGES, *backbone.image_shape)
            pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
            if name == "plain":
                return Plain(backbone, pixels, options.batch).step
            config, passes = PATHS[name]
            images = from_array(pixels.numpy(), image_shape=backbone.image_shape)
            return Pretraining(backbone, images, replace(config, batch_size=options.batch), passes=passes).step

        def several(step: Callable[[], object]) -> Callable[[], object]:
            return lambda: [step() for _ in range(options.steps)]

        seconds = interleaved(
            {name: several(path(name)) for name in options.paths}, options.rounds, device=options.device
        )
        for name, each in seconds.items():
            speed = options.steps * options.batch / each
            gain = seconds[options.paths[0]] / each
            rows.append({"size": size, "batch": options.batch, "path": name, "images/s": speed, "faster": gain})
    report("Pretraining: images per second", rows, options.json)


if __name__ == "__main__":
    main()
