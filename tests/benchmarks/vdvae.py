"""The published CIFAR-10 and ImageNet-64 VDVAEs (43 and 75 groups, random weights): what each kind of pass costs.

Each of the network as it was trained, and as it runs at inference.

python tests/benchmarks/vdvae.py --network cifar10 imagenet64 --batch 1 4 --rounds 3 --json out.json
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from ebm_prior.backbones.vdvae.adapter import VDVAE
from ebm_prior.backbones.vdvae.published import PUBLISHED
from measure import arguments, interleaved, peak_bytes, report

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


def rows_of(name: str, batch: int, rounds: int, device: str) -> list[dict[str, Any]]:
    """One row for each pass of each form of the network."""
    backbone = network(name, device)
    forms = {"as trained": backbone, "inference": backbone.for_inference()}
    alternatives = {
        (piece, form): run for form, which in forms.items() for piece, run in passes(which, batch, device).items()
    }
    less = backbone.for_inference().checkpointing()
    alternatives["gradient", "checkpointing"] = passes(less, batch, device)["gradient"]
    seconds = interleaved(
        {" ".join(key): run for key, run in alternatives.items()}, rounds, device=device, warm_up=min(1, rounds - 1)
    )
    return [
        {
            "network": name,
            "batch": batch,
            "pass": piece,
            "form": form,
            "s": seconds[f"{piece} {form}"],
            "s/image": seconds[f"{piece} {form}"] / batch,
            "peak MiB": peak_bytes(run, device) / 2**20,
        }
        for (piece, form), run in sorted(alternatives.items())
    ]


def main() -> None:
    options = arguments(__doc__, network=["cifar10", "imagenet64"], batch=[1, 4], rounds=3)
    rows: list[dict[str, Any]] = []
    for name in options.network:
        for batch in options.batch:
            rows += rows_of(name, batch, options.rounds, options.device)
    with torch.device("meta"):
        sizes = [count_parameters(VDVAE(data_set=name, **PUBLISHED[name])) for name in options.network]
    title = ", ".join(f"{name} {size:,} parameters" for name, size in zip(options.network, sizes, strict=True))
    report(title, rows, options.json)


if __name__ == "__main__":
    main()
