"""The paper's ablations (§5.5; Tables 5-8, and 1) at sizes that fit the machine: FD(classifier) of joint training.

Every variant of an ablation has the same data, iterations and seed, and its samples are scored against the same test
images at equal N. The paper's numbers are FID on other data: its trend is to be compared, not the level.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from ebm_prior.commands import parameters
from ebm_prior.data import ImageSource
from ebm_prior.energy import EnergyConfig
from ebm_prior.joint import train_jointly
from ebm_prior.joint_config import JointConfig
from ebm_prior.metrics import FeatureExtractor, FeatureStatistics, extract, frechet_distance
from ebm_prior.pretrain import build
from ebm_prior.prior import ANCESTRAL
from ebm_prior.registry import adapter
from ebm_prior.report import table

HIDDEN = 200  # of the MLP conditionals (Table 12)


class Variant(NamedTuple):
    """One row of a table: what differs in the training and in the network, and what the paper measured."""

    name: str
    paper: str
    training: Mapping[str, Any] = {}  # changes of JointConfig; "energy_hidden", "prior_steps" of what is inside
    layers: int = 2
    capacity: float = 1.0  # times the parameters, by the widths, whose square they go with


ABLATIONS: dict[str, tuple[Variant, ...]] = {
    "nef": tuple(  # Table 6, CIFAR-10
        Variant(f"nef {n}", fid, {"energy_hidden": n})
        for n, fid in ((10, "69.73"), (20, "68.45"), (50, "67.88"), (100, "66.32"))
    ),
    "steps": tuple(  # Table 8, CIFAR-10: FID, seconds per iteration
        Variant(f"K {n}", said, {"prior_steps": n})
        for n, said in (
            (10, "69.42, .312 s"),
            (20, "67.58, .480 s"),
            (40, "66.32, .568 s"),
            (80, "66.03, .741 s"),
            (100, "65.86, .837 s"),
        )
    ),
    "posterior": (  # Table 7, SVHN
        Variant("Langevin", "26.81, .478 s", {"posterior": "langevin"}),
        Variant("inference network", "28.60, .232 s", {"posterior": "inference"}),
    ),
    "capacity": (  # Table 5, SVHN
        Variant("EBM prior", "28.60"),
        *(
            Variant(f"Gaussian prior, {n} x parameters", fid, {"prior": "gaussian"}, capacity=n)
            for n, fid in ((1, "42.03"), (2, "39.82"), (4, "37.75"), (8, "36.10"))
        ),
    ),
    "layers": (  # Table 1, SVHN; the Gaussian one is Table 5's
        Variant("EBM, L=2", "26.81"),
        Variant("Gaussian, L=2", "42.03", {"prior": "gaussian"}),
        Variant("LEBM, L=1", "29.44", layers=1),
    ),
}


def variant_config(variant: Variant, base: JointConfig) -> JointConfig:
    """The settings of a variant."""
    changes = dict(variant.training)
    if "energy_hidden" in changes:
        changes["energy"] = replace(base.energy, hidden=changes.pop("energy_hidden"))
    if "prior_steps" in changes:
        changes["prior_chain"] = replace(base.prior_chain, steps=changes.pop("prior_steps"))
    return replace(base, **changes)


def base_config(iterations: int, seed: int) -> JointConfig:
    """Common settings: heads of leaky ReLUs, whose slopes are bounded, and fresh chains of 20 exact steps."""
    base = JointConfig(iterations=iterations, evaluate_every=iterations, seed=seed)
    heads = EnergyConfig(hidden=100, vector_layers=2, joint=0, activation="leaky_relu", standardize=False)
    return replace(
        base,
        energy=heads,
        energy_learning_rate=3e-4,
        prior_chain=replace(base.prior_chain, kernel="pcn-langevin", steps=20, step_size=0.15),
    )


def ablate(
    variants: Sequence[Variant],
    train: ImageSource,
    test: ImageSource,
    extractor: FeatureExtractor,
    *,
    iterations: int = 2_000,
    latents: Sequence[int] = (32, 16),
    width: int = 12,
    samples: int = 2_000,
    seed: int = 0,
    on_stage: Callable[[str], None] | None = None,
) -> list[dict[str, Any]]:
    """Train every variant and score it: a row each, with FD, FD of its f = 0, CPU-seconds per iteration, parameters."""
    n = min(samples, len(test))
    real = FeatureStatistics.of(extract(extractor, test.batch(range(n))))
    rows = []
    for variant in variants:
        if on_stage:
            on_stage(variant.name)
        network = {
            "image_shape": list(train.shape),
            "latents": list(latents)[: variant.layers],
            "width": round(width * variant.capacity**0.5),
            "hidden": round(HIDDEN * variant.capacity**0.5),
        }
        config = variant_config(variant, base_config(iterations, seed))
        backbone = build(adapter("shallow"), network, seed=seed)
        began = time.process_time()
        prior = train_jointly(backbone, train, config, validation=test)
        seconds = time.process_time() - began
        count = parameters(prior.backbone, config.energy)
        with torch.no_grad():
            drawn = {
                "fd": prior.sample(n, seed=seed).images,
                "fd_gaussian": prior.sample(n, seed=seed, sampler=ANCESTRAL).images,
            }
        distances = {k: frechet_distance(FeatureStatistics.of(extract(extractor, x)), real) for k, x in drawn.items()}
        rows.append(
            {
                "variant": variant.name,
                **distances,
                "seconds_per_iteration": seconds / iterations,
                "parameters": count["backbone"],
                "heads": count["heads"],
                "paper": variant.paper,
                "seed": seed,
                "samples": n,
            }
        )
    return rows


def as_table(rows: Sequence[Mapping[str, Any]], extractor: FeatureExtractor, data: str) -> str:
    """The rows beside the paper's numbers."""
    head = ["", f"{extractor.distance_name}", "f = 0", "s/iteration", "parameters", "heads", "paper: FID"]
    lines = [
        [
            row["variant"],
            f"{row['fd']:.2f}",
            f"{row['fd_gaussian']:.2f}",
            f"{row['seconds_per_iteration']:.3f}",
            f"{row['parameters']:,}",
            f"{row['heads']:,}",
            row["paper"],
        ]
        for row in rows
    ]
    return f"{data}, N = {rows[0]['samples']}, seed {rows[0]['seed']}\n" + table(head, lines)
