"""The paper's ablations (§5.5; Tables 5-8, and 1) at sizes that fit the machine: FD(classifier) of joint training.

Every variant of an ablation has the same data, iterations and seed, and its samples are scored against the same test
images at equal N. The paper's numbers are FID on other data: its trend is to be compared, not the level.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import stdev
from typing import Any, NamedTuple

import torch
from PIL import Image

from ebm_prior.data.images import ImageSource
from ebm_prior.evaluation.metrics import FeatureExtractor, FeatureStatistics, extract, frechet_distance
from ebm_prior.experiments.jobs import clock, named
from ebm_prior.interfaces import Silent
from ebm_prior.model.energy import EnergyConfig
from ebm_prior.model.prior import ANCESTRAL
from ebm_prior.pictures.plots import COLOURS, Series, plot
from ebm_prior.reports.text import table
from ebm_prior.runs.describe import parameters
from ebm_prior.storage.registry import adapter, build
from ebm_prior.storage.weights import count_parameters
from ebm_prior.training.joint import train_jointly
from ebm_prior.training.joint_config import JointConfig

HIDDEN = 200  # hidden units of the MLP conditionals (Table 12)


class Paper(NamedTuple):
    """The paper's measurements."""

    fid: float
    seconds: float | None = None  # per iteration


class Variant(NamedTuple):
    """One row of a table and one point of a plot: changes of training and network, and the paper's measurements."""

    name: str
    at: float  # on the plot's horizontal axis
    paper: Paper
    training: Mapping[str, Any] = {}  # changes of JointConfig; "energy_hidden", "prior_steps": of its heads and chain
    layers: int = 2
    capacity: float = 1.0  # factor on the number of parameters, by wider layers
    line: str = "EBM, L=2"  # name of the line of the plot that joins this point with others


class Ablation(NamedTuple):
    """A table of the paper."""

    axis: str
    published: str  # the paper's data and table
    variants: tuple[Variant, ...]


ABLATIONS = {
    "nef": Ablation(
        "width of the heads (nef)",
        "CIFAR-10, Table 6",
        tuple(
            Variant(f"nef {n}", n, Paper(fid), {"energy_hidden": n})
            for n, fid in ((10, 69.73), (20, 68.45), (50, 67.88), (100, 66.32))
        ),
    ),
    "steps": Ablation(
        "Langevin steps K of the prior",
        "CIFAR-10, Table 8",
        tuple(
            Variant(f"K {n}", n, Paper(fid, seconds), {"prior_steps": n})
            for n, fid, seconds in (
                (10, 69.42, 0.312),
                (20, 67.58, 0.480),
                (40, 66.32, 0.568),
                (80, 66.03, 0.741),
                (100, 65.86, 0.837),
            )
        ),
    ),
    "posterior": Ablation(
        "posterior: 1 Langevin, 2 inference network",
        "SVHN, Table 7",
        (
            Variant("Langevin", 1, Paper(26.81, 0.478), {"posterior": "langevin"}, line="Langevin"),
            Variant("inference network", 2, Paper(28.60, 0.232), {"posterior": "inference"}, line="inference network"),
        ),
    ),
    "capacity": Ablation(
        "parameters of the generator, multiples",
        "SVHN, Table 5",
        (
            Variant("EBM prior", 1, Paper(28.60)),
            *(
                Variant(
                    f"Gaussian prior, {n} x parameters",
                    n,
                    Paper(fid),
                    {"prior": "gaussian"},
                    capacity=n,
                    line="Gaussian, L=2",
                )
                for n, fid in ((1, 42.03), (2, 39.82), (4, 37.75), (8, 36.10))
            ),
        ),
    ),
    "layers": Ablation(
        "layers",
        "SVHN, Tables 1 and 5",
        (
            Variant("EBM, L=2", 2, Paper(26.81)),
            Variant("Gaussian, L=2", 2, Paper(42.03), {"prior": "gaussian"}, line="Gaussian, L=2"),
            Variant("LEBM, L=1", 1, Paper(29.44), layers=1, line="LEBM, L=1"),
        ),
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
    """Common settings: heads with leaky ReLU, which bounds their slopes, and fresh chains of 20 exact steps."""
    base = JointConfig(iterations=iterations, evaluate_every=iterations, seed=seed)
    heads = EnergyConfig(hidden=100, vector_layers=2, joint=0, activation="leaky_relu", standardize=False)
    return replace(
        base,
        energy=heads,
        energy_learning_rate=3e-4,
        prior_chain=replace(base.prior_chain, kernel="pcn-langevin", steps=20, step_size=0.15),
    )


def widened(network: Mapping[str, Any], times: float) -> Mapping[str, Any]:
    """The shallow generator's arguments, widened so that it has about `times` the parameters.

    The number of parameters grows with a power between 1 and 2 of the widths, so every width is tried.
    """
    width, hidden = network["width"], network["hidden"]
    choices = [
        {**network, "width": wider, "hidden": round(hidden * wider / width)}
        for wider in range(width, math.ceil(width * times) + 1)
    ]

    def size(arguments: Mapping[str, Any]) -> int:
        with torch.device("meta"):
            return count_parameters(build(adapter("shallow"), arguments))

    target = times * size(network)
    return min(choices, key=lambda arguments: abs(size(arguments) - target))


class Steps(Silent):
    """Counts the steps of a training, including those that a roll-back undoes."""

    count = 0

    def step(self, shown: Mapping[str, Any]) -> None:
        self.count += 1


def measure(
    variant: Variant,
    train: ImageSource,
    test: ImageSource,
    extractor: FeatureExtractor,
    *,
    iterations: int = 2_000,
    latents: Sequence[int] = (32, 16),
    width: int = 12,
    samples: int = 2_000,
    seed: int = 0,
    device: str = "cpu",
) -> dict[str, Any]:
    """Train a variant and score it: a row with FD, FD of its f = 0, seconds per iteration, parameters, roll-backs.

    A training that diverges begins again at half the rate; its seconds are per iteration actually run.
    """
    n = min(samples, len(test))
    network = widened(
        {
            "image_shape": list(train.shape),
            "latents": list(latents)[: variant.layers],
            "width": width,
            "hidden": HIDDEN,
        },
        variant.capacity,
    )
    config = variant_config(variant, base_config(iterations, seed))
    backbone = build(adapter("shallow"), network, seed=seed).to(device)
    steps = Steps()
    began = clock(torch.device(device))
    with named(f"{variant.name}, seed {seed}"):
        prior = train_jointly(backbone, train, config, validation=test, progress=steps)
    seconds = clock(torch.device(device)) - began
    count = parameters(prior.backbone, config.energy)
    with torch.no_grad():
        drawn = {
            "fd": prior.sample(n, seed=seed).images,
            "fd_gaussian": prior.sample(n, seed=seed, sampler=ANCESTRAL).images,
        }
    real = FeatureStatistics.of(extract(extractor, test.batch(range(n))))
    return {
        "variant": variant.name,
        **{k: frechet_distance(FeatureStatistics.of(extract(extractor, x.cpu())), real) for k, x in drawn.items()},
        "seconds_per_iteration": seconds / steps.count,
        "rollbacks": prior.record["rollbacks"],
        "parameters": count["backbone"],
        "heads": count["heads"] if config.prior == "ebm" else 0,
        "seed": seed,
        "samples": n,
        "data": train.name,
        "distance": extractor.distance_name,
        "device": torch.device(device).type,
    }


def as_table(name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows of an ablation beside the paper's numbers; mean ± sd over the seeds, where there are several."""
    lines = []
    for variant in ABLATIONS[name].variants:
        found = [row for row in rows if row["variant"] == variant.name]
        if found:
            paper = f"{variant.paper.fid:.2f}" + (f", {variant.paper.seconds:g} s" if variant.paper.seconds else "")
            lines.append(
                [
                    variant.name + (", after a fall" if any(row["rollbacks"] for row in found) else ""),
                    *(_spread(found, key, 2) for key in ("fd", "fd_gaussian")),
                    _spread(found, "seconds_per_iteration", 3),
                    f"{found[0]['parameters']:,}",
                    f"{found[0]['heads']:,}" if found[0]["heads"] else "–",
                    paper,
                ]
            )
    seeds = ", ".join(str(seed) for seed in sorted({row["seed"] for row in rows}))
    first = rows[0]
    head = ["", first["distance"], "f = 0", "s/iteration", "parameters", "heads", "paper: FID"]
    title = f"{first['data']}, N = {first['samples']}, seed {seeds}; the paper's of {ABLATIONS[name].published}"
    return f"{title}\n{table(head, lines)}"


def as_picture(name: str, rows: Sequence[Mapping[str, Any]]) -> Image.Image:
    """The trend of an ablation beside the paper's: Fréchet distances, and seconds where the paper has them too."""
    shown = ABLATIONS[name]

    def panel(title: str, label: str, of: Callable[[Variant], Sequence[float | None]]) -> Image.Image:
        """A plot of the numbers `of` each variant: a point for each, and a line through their means."""
        series: list[Series] = []
        for line, colour in zip(dict.fromkeys(v.line for v in shown.variants), COLOURS, strict=False):
            points = {v.at: [y for y in of(v) if y is not None] for v in shown.variants if v.line == line}
            points = {at: found for at, found in points.items() if found}
            if points:
                means = [sum(found) / len(found) for found in points.values()]
                x, y = zip(*((at, value) for at, found in points.items() for value in found), strict=True)
                series += [Series("", list(points), means, "line", colour), Series(line, x, y, "points", colour)]
        return plot(series, title=title, x_label=shown.axis, y_label=label)

    def ours(key: str) -> Callable[[Variant], Sequence[float | None]]:
        return lambda variant: [row[key] for row in rows if row["variant"] == variant.name]

    panels = [
        panel(f"ours, {rows[0]['data']}", rows[0]["distance"], ours("fd")),
        panel(f"paper, {shown.published}", "FID", lambda v: [v.paper.fid]),
    ]
    if any(v.paper.seconds for v in shown.variants):
        panels += [
            panel("ours", "seconds per iteration", ours("seconds_per_iteration")),
            panel("paper", "seconds per iteration", lambda v: [v.paper.seconds]),
        ]
    width, height = panels[0].size
    page = Image.new("RGB", (2 * width, height * (len(panels) // 2)), "white")
    for index, image in enumerate(panels):
        page.paste(image, (index % 2 * width, index // 2 * height))
    return page


def _spread(rows: Sequence[Mapping[str, Any]], key: str, digits: int) -> str:
    values = [row[key] for row in rows]
    sd = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{sum(values) / len(values):.{digits}f}{sd}"
