"""The published CIFAR-10 and ImageNet-64 VDVAEs (43 and 75 groups, random weights): what each kind of pass costs.

Each measurement has a process of its own, whose first pass gives the peak of memory beyond the weights. Forms: the
network as it runs at inference, as it was trained, and for gradients with checkpointing.

python tests/benchmarks/vdvae.py --network cifar10 imagenet64 --batch 1 4 --rounds 3 --json out.json
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from typing import Any

import torch
from ebm_prior.backbones.vdvae.adapter import VDVAE
from ebm_prior.backbones.vdvae.published import PUBLISHED
from measure import arguments, interleaved, peak_bytes, report

from ebm_prior.cli.allocator import keep_freed_memory
from ebm_prior.model.backbone import Backbone
from ebm_prior.storage.weights import count_parameters


def network(name: str, device: str) -> VDVAE:
    """A published configuration with random weights, frozen; its priors, too, depend on what is drawn."""
    torch.manual_seed(0)
    backbone = VDVAE(data_set=name, **PUBLISHED[name]).eval().requires_grad_(False)
    for key, parameter in backbone.named_parameters():
        if key.endswith("prior.c4.weight"):
            torch.nn.init.normal_(parameter, std=0.1 * parameter.shape[1] ** -0.5)
    return backbone.to(device)


def passes(backbone: Backbone, batch: int, device: str) -> Mapping[str, Callable[[], object]]:
    """A posterior pass, a prior draw, and the gradient of a function of all z with respect to ε."""
    images = torch.rand(batch, *backbone.image_shape, device=device)

    @torch.no_grad()
    def posterior() -> None:
        backbone.infer(images)

    @torch.no_grad()
    def draw() -> None:
        backbone.sample(batch)

    def gradient() -> None:
        eps = [e.requires_grad_() for e in backbone.standard_normal(batch)]
        total = torch.stack([z.square().sum() for z in backbone.reparameterize(eps)]).sum()
        torch.autograd.grad(total, eps)

    return {"posterior pass": posterior, "prior draw": draw, "gradient": gradient}


PASSES, FORMS = ("posterior pass", "prior draw", "gradient"), ("inference", "as trained", "checkpointing")


def measured(name: str, batch: int, piece: str, form: str, rounds: int, device: str) -> dict[str, Any]:
    """The row of a pass of one form of the network, in a process in which nothing else was done."""
    torch.set_num_threads(1)
    keep_freed_memory()
    backbone: Backbone = network(name, device)
    if form != "as trained":
        backbone = backbone.for_inference() if form == "inference" else backbone.for_inference().checkpointing()
    run = passes(backbone, batch, device)[piece]
    peak = peak_bytes(run, device)
    seconds = interleaved({piece: run}, rounds, device=device, warm_up=0)[piece]
    row = {"network": name, "batch": batch, "pass": piece, "form": form, "s": seconds, "s/image": seconds / batch}
    return {**row, "peak MiB": peak / 2**20}


def main() -> None:
    options = arguments(__doc__, network=["cifar10", "imagenet64"], batch=[1, 4], form=list(FORMS), rounds=3)
    rows, spawn = [], multiprocessing.get_context("spawn")
    for name, batch, piece, form in product(options.network, options.batch, PASSES, options.form):
        if form != "checkpointing" or piece == "gradient":
            with ProcessPoolExecutor(1, mp_context=spawn) as pool:
                rows.append(pool.submit(measured, name, batch, piece, form, options.rounds, options.device).result())
    with torch.device("meta"):
        sizes = [count_parameters(VDVAE(data_set=name, **PUBLISHED[name])) for name in options.network]
    title = ", ".join(f"{name} {size:,} parameters" for name, size in zip(options.network, sizes, strict=True))
    report(title, rows, options.json)


if __name__ == "__main__":
    main()
