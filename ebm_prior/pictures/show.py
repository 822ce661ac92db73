"""Pictures of a prior and of each layer of its hierarchy at work (`ebm-prior show`), with the arrays behind them.

Each function returns a page for people and the arrays that it shows. Lists and columns that count k count groups
from the bottom, as the paper does. Everything random comes from (seed, row).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ebm_prior.compute.randomness import BlockGenerator, Purpose, derived_generator, derived_seed
from ebm_prior.errors import ConfigurationError
from ebm_prior.interfaces import SILENT, Images, Progress
from ebm_prior.model.interpolation import interpolate
from ebm_prior.model.mixing import Mixing
from ebm_prior.model.prior import ANCESTRAL, EBMPrior
from ebm_prior.model.samplers import ChainInfo, ChainState, graphed, kernel_of, run_chain, start
from ebm_prior.model.scores import FreeGroups
from ebm_prior.pictures.plots import COLOURS, Series, plot
from ebm_prior.pictures.sheets import matrix, page

SHORT_RUN, LONG_RUN = 100, 2500  # steps of Fig. 8
DRAWS = 7  # of the other groups, for a sample whose first groups are fixed
SETTLED = 500  # steps after which the energy of a mixing chain has no trend left


class Page(NamedTuple):
    """A picture for people, and the arrays that it shows."""

    image: Image.Image
    arrays: dict[str, NDArray[Any]]


def transitions(prior: EBMPrior, n: int, *, seed: int = 0, progress: Progress = SILENT) -> Page:
    """Chains from the backbone's prior to the energy-based prior, as images at growing steps (Figs. 5, 14)."""
    steps = chain_steps(prior)
    at = sorted({0, *(round(steps * share) for share in (0.025, 0.05, 0.125, 0.25, 0.5, 1))})
    kept = chain(prior, n, steps, at, seed=seed, progress=progress).eps
    frames = torch.stack([decoded(prior, kept[step]) for step in at], dim=1)  # (n, columns, C, H, W)
    rows = [(f"chain {row + 1}", frames[row]) for row in range(n)]
    image = page(
        "From the backbone's prior to the energy-based prior",
        [[matrix(rows, [f"step {step}" for step in at])]],
        f"Each row is one chain of {kernel_words(prior)}. Step 0 is a draw of the backbone's own Gaussian prior; the "
        "images are the means of p(x | z).",
    )
    return Page(image, {"images": frames.cpu().numpy(), "steps": np.array(at)})


def energy(prior: EBMPrior, n: int, *, seed: int = 0, progress: Progress = SILENT) -> Page:
    """Energy per head along a short run and all steps of the sampler, with images beneath (Fig. 8).

    The caption says whether the chains have mixed in the total energy (`Mixing`), and by how much it still moves after
    the first `SETTLED` steps: the mean slope of the chains with its standard error.
    """
    steps = chain_steps(prior)
    short = min(SHORT_RUN, steps)
    columns = {run: [round(run * share / 7) for share in range(8)] for run in (short, steps)}
    at = sorted({step for run in columns.values() for step in run})
    chains = chain(prior, n, steps, at, seed=seed, progress=progress)
    energies = -chains.terms  # (steps + 1, n, heads)
    totals = energies.sum(2).clip(min=-prior.ceiling)
    names = [*prior.energy.names, *(["joint head"] if prior.energy.joint is not None else [])]
    colours = [COLOURS[index % len(COLOURS)] for index in range(len(names))]
    frames = {step: decoded(prior, eps) for step, eps in chains.eps.items()}
    pictures = []
    for run in (short, steps):
        x, shown = np.arange(run + 1), energies[: run + 1].mean(1)
        total = Series("total", x, totals[: run + 1].mean(1), "line", "#222222")
        parts = [Series(name, x, shown[:, i], "line", colours[i]) for i, name in enumerate(names)]
        plotted = plot(
            [total, *parts],
            title=f"Energy over {run:,} steps, mean of {n} chains",
            x_label="step",
            y_label="energy −f (nats)",
            size=(660, 340),
        )
        rows = [(f"chain {c + 1}", torch.stack([frames[s][c] for s in columns[run]])) for c in range(min(n, 4))]
        pictures.append([plotted, matrix(rows, [f"step {step}" for step in columns[run]])])
    caption = [
        f"Chains of {kernel_words(prior)}, from draws of the backbone's prior. Energies are relative to that prior: "
        "where f is 0 nothing is changed. Their level is arbitrary; that they settle is not."
    ]
    if prior.ceiling < math.inf:
        held = int((totals[-1] <= -prior.ceiling).sum())
        caption.append(f"f is clipped at {prior.ceiling:.4g} nats, where {held} of {n} chains are at the end.")
    arrays = {"energy": energies, "total": totals, "heads": np.array(names), "steps": np.array(at)}
    mixing = Mixing.of(torch.from_numpy(totals[1:]))
    if math.isfinite(mixing.r_hat):
        arrays["mixing"] = np.array(mixing)
        caption.append(
            f"Total energy over all {steps:,} steps: split R̂ {mixing.r_hat:.3f}, bulk ESS {mixing.bulk_ess:.0f} and "
            f"tail ESS {mixing.tail_ess:.0f} of {n} chains, autocorrelation time {mixing.time:.1f} steps."
        )
    arrays["images"] = torch.stack([frames[step] for step in at]).cpu().numpy()
    if steps > SETTLED + 1:
        slope, error = trend(totals[SETTLED:])
        arrays["trend"] = np.array([slope, error])
        caption.append(
            f"Total energy after step {SETTLED}: {1000 * slope:+.3f} ± {1000 * error:.3f} nats per 1,000 steps (mean "
            f"slope of the chains ± its standard error). Pixels beyond 1 or 99% of the range: "
            f"{_extreme(frames[0]):.1%} at step 0, {_extreme(frames[steps]):.1%} at step {steps:,}."
        )
    return Page(page("The energy along long chains", pictures, caption), arrays)


def trend(values: NDArray[np.float64]) -> tuple[float, float]:
    """Least-squares slope per step of each column of (steps, chains): mean over the chains and its standard error."""
    time = np.arange(len(values)) - (len(values) - 1) / 2
    slopes = time @ values / (time @ time)
    return float(slopes.mean()), float(slopes.std(ddof=1) / np.sqrt(len(slopes))) if len(slopes) > 1 else float("nan")


@torch.no_grad()
def hierarchy(prior: EBMPrior, n: int, *, fix: int | None = None, seed: int = 0) -> Page:
    """Samples with their k lowest groups redrawn, k growing from left to right, f above f = 0 (Figs. 7, 11).

    fix: keep the `fix` top groups of each sample instead, and draw all others anew in every column.
    """
    names = [group.name for group in reversed(prior.backbone.groups)]
    titles = ["sample", *(f"+ {name} redrawn" for name in names[:-1])]
    caption = (
        "From left to right one more latent group is drawn anew, from the bottom up, while those above stay as they "
        "are: what changes is what the group decides. With the energy the lower groups are drawn from p_α given the "
        "upper."
    )
    if fix is not None:
        if not 1 <= fix < len(names):
            raise ConfigurationError(
                f"fix: expected from 1 to {len(names) - 1} groups, since the backbone has {len(names)}, found {fix}"
            )
        titles = ["sample", *(f"draw {number + 1}" for number in range(DRAWS))]
        caption = (
            f"Along a row the first {fix} of {len(names)} latent groups, those from the top, are the sample's, and all "
            "others are drawn anew: what stays is what the first groups decide. With the energy the others are drawn "
            "from p_α given the first."
        )
    rows: list[tuple[str, Tensor]] = []
    arrays: dict[str, NDArray[Any]] = {}
    for title, key, sampler in (
        ("energy-based prior", "energy_based", prior.sampler),
        ("Gaussian prior", "gaussian", ANCESTRAL),
    ):
        z = prior.sample(n, seed=seed, sampler=sampler).z
        columns = [prior.backbone.decode(z).mean]
        if fix is None:
            columns += [_redrawn(prior, z, k, sampler is not ANCESTRAL, seed) for k in range(1, len(names))]
        else:
            codes = [group.repeat_interleave(DRAWS, dim=0) for group in z[:fix]]
            drawn = prior.complete(codes, seed=seed, sampler=sampler).images
            columns += drawn.view(n, DRAWS, *drawn.shape[1:]).unbind(1)
        frames = torch.stack(columns, dim=1)
        rows += [(f"{title} {row + 1}", frames[row]) for row in range(n)]
        arrays[key] = frames.cpu().numpy()
    return Page(page("What each layer of the hierarchy decides", [[matrix(rows, titles)]], caption), arrays)


@torch.no_grad()
def reconstruction(prior: EBMPrior, images: Images, n: int, *, seed: int = 0) -> Page:
    """Images, and their reconstructions with the k lowest groups drawn from the prior instead of inferred (Fig. 12)."""
    real, z = _inferred(prior, images, n, seed)
    depth = len(z)
    columns = [real, prior.backbone.decode(z).mean, *(_redrawn(prior, z, k, True, seed) for k in range(1, depth))]
    frames = torch.stack([column.to(real) for column in columns], dim=1)
    names = [group.name for group in reversed(prior.backbone.groups)]
    titles = ["image", "all inferred", *(f"k = {k}: {names[k - 1]} drawn" for k in range(1, depth))]
    picture = page(
        f"Hierarchical reconstruction of {images.name}",
        [[matrix([(f"image {row + 1}", frames[row]) for row in range(n)], titles)]],
        "The k lowest latent groups, the last of them named above, come from the energy-based prior given the others, "
        "which are inferred from the image: details give way to what is common, and what the upper groups know stays.",
    )
    return Page(picture, {"images": frames.cpu().numpy(), "k": np.arange(depth)})


@torch.no_grad()
def interpolation(prior: EBMPrior, images: Images, n: int, *, seed: int = 0) -> Page:
    """From one image's latents to another's along great circles in ε-space, group by group."""
    real = _chosen(prior, images, 2 * n, seed)
    shares = [step / 7 for step in range(8)]
    between = interpolate(prior.backbone, real[:n], real[n:], steps=len(shares), seed=seed).cpu()
    frames = torch.cat([real[:n, None], between, real[n:, None]], dim=1)
    titles = ["image A", *(f"{share:.0%}" for share in shares), "image B"]
    picture = page(
        f"Interpolation between images of {images.name}",
        [[matrix([(f"pair {row + 1}", frames[row]) for row in range(n)], titles)]],
        "0% and 100% are the reconstructions of the two images. Between them the standardised latents ε of each "
        "group go along a great circle: a straight line would leave the shell on which a Gaussian prior lies.",
    )
    return Page(picture, {"images": frames.numpy(), "share": np.array(shares)})


@torch.no_grad()
def latents(prior: EBMPrior, images: Images, n: int, *, seed: int = 0, progress: Progress = SILENT) -> Page:
    """Posterior codes and chains of the prior in two dimensions per group, at growing steps (Fig. 2).

    A group of more than two units is shown along the two principal directions of its posterior codes; one of a single
    unit by the distribution of its values.
    """
    steps = chain_steps(prior)
    at = [0, steps // 4, steps // 2, steps]
    _, posterior = _inferred(prior, images, n, seed)
    chains = chain(prior, n, steps, at, seed=seed, progress=progress)
    drawn = {step: prior.backbone.reparameterize(eps) for step, eps in chains.eps.items()}
    rows, arrays = [], {"steps": np.array(at)}
    for index, group in enumerate(prior.backbone.groups):
        flat, labels = _plane(posterior[index])
        known = flat(posterior[index])
        moved = {step: flat(z[index]) for step, z in drawn.items()}
        everything = np.concatenate([known, *moved.values()])
        low, high = np.quantile(everything, [0.002, 0.998], axis=0)
        room = 0.08 * (high - low)
        cells = []
        for step in at:
            series = [
                Series("posterior", known[:, 0], known[:, 1], "points", COLOURS[1], 0.5),
                Series("chain", moved[step][:, 0], moved[step][:, 1], "points", COLOURS[0], 0.5),
            ]
            cells.append(
                plot(
                    series,
                    title=f"{group.name}, step {step}",
                    x_label=labels[0],
                    y_label=labels[1],
                    size=(330, 330),
                    x_range=(low[0] - room[0], high[0] + room[0]),
                    y_range=(low[1] - room[1], high[1] + room[1]),
                )
            )
        rows.append(cells)
        arrays[f"posterior_{group.name}"] = known
        arrays[f"chain_{group.name}"] = np.stack([moved[step] for step in at])
    image = page(
        f"Latents of {images.name} and chains of the prior",
        rows,
        f"Orange: codes of {n} images. Blue: as many chains of {kernel_words(prior)}, which start at the backbone's "
        "prior (step 0). Where the prior is learned, blue ends where orange is.",
    )
    return Page(image, arrays)


def _plane(z: Tensor) -> tuple[Callable[[Tensor], NDArray[np.float64]], tuple[str, str]]:
    """How latents of a group are put in a plane, (N, *shape) to (N, 2), and what its axes are; z: posterior codes."""
    codes = z.flatten(1).double().cpu()
    mean = codes.mean(0)
    if codes.shape[1] == 1:

        def ranked(z: Tensor) -> NDArray[np.float64]:
            values = z.flatten().double().cpu().numpy()
            return np.stack([values - mean.item(), (values.argsort().argsort() + 1) / len(values)], axis=1)

        return ranked, ("value", "share of the draws up to it")
    directions, share = torch.eye(2, dtype=codes.dtype), ""
    if codes.shape[1] > 2:
        _, scales, axes = torch.linalg.svd(codes - mean, full_matrices=False)
        directions = axes[:2].T
        share = f" (both: {float((scales[:2] ** 2).sum() / (scales**2).sum()):.0%} of the variance)"

    def flat(z: Tensor) -> NDArray[np.float64]:
        return ((z.flatten(1).double().cpu() - mean) @ directions).numpy()

    return flat, (f"direction 1{share}", "direction 2")


PICTURES = {"transitions": 8, "energy": 16, "hierarchy": 4, "reconstruction": 6, "interpolate": 6, "latents": 500}
"""Name of each picture, and the number of rows, chains or codes that it shows by default."""
WITH_CHAINS = ("transitions", "energy", "latents")
WITH_IMAGES = ("reconstruction", "interpolate", "latents")


def draw_picture(
    prior: EBMPrior,
    what: str,
    images: Images | None,
    n: int | None = None,
    *,
    fix: int | None = None,
    seed: int = 0,
    progress: Progress = SILENT,
) -> Page:
    """Draw the picture of `PICTURES` called `what`.

    images: needed by the pictures in `WITH_IMAGES`.  n: number of rows, chains or codes.  fix: that of `hierarchy`.
    progress: advances by the steps of the pictures in `WITH_CHAINS`.
    """
    n = n or PICTURES[what]
    if what == "transitions":
        return transitions(prior, n, seed=seed, progress=progress)
    if what == "energy":
        return energy(prior, n, seed=seed, progress=progress)
    if what == "hierarchy":
        return hierarchy(prior, n, fix=fix, seed=seed)
    if images is None:
        raise ConfigurationError(f"{what} starts from images: give some")
    if what == "latents":
        return latents(prior, images, n, seed=seed, progress=progress)
    return {"reconstruction": reconstruction, "interpolate": interpolation}[what](prior, images, n, seed=seed)


class Chains(NamedTuple):
    """Chains of a prior: ε at some of the steps, and the summands of τ f at every step, in nats."""

    eps: dict[int, list[Tensor]]
    terms: NDArray[np.float64]  # (steps + 1, n, heads)


@torch.no_grad()
def chain(prior: EBMPrior, n: int, steps: int, at: Sequence[int], *, seed: int, progress: Progress = SILENT) -> Chains:
    """Run n chains of the prior's kernel from draws of the backbone's prior, and keep ε at the steps `at`."""
    backbone, sampler = prior.backbone, prior.sampler
    device = next(backbone.parameters()).device
    generator = BlockGenerator(derived_seed(seed, Purpose.PICTURE_CHAIN), 0, n, device)
    kept: dict[int, list[Tensor]] = {}
    terms: list[Tensor] = []

    def keep(step: int, state: ChainState, info: ChainInfo | None = None) -> None:
        if step + 1 in at:
            kept[step + 1] = state.eps
        trace = backbone.transform(state.eps)
        seen = prior.energy.inputs(trace.z, state.eps, trace.priors)
        terms.append(prior.tau * prior.energy.terms(seen).double().cpu())
        if step >= 0:
            progress.advance(1)

    potential = graphed(prior.potential, device)
    state = start(potential, backbone.standard_normal(n, generator=generator))
    keep(-1, state)
    step_size = torch.full_like(state.value, sampler.step_size)
    told: dict[str, Any] = {"step_size": step_size, "adapt_steps": sampler.adapt_steps, "generator": generator}
    run_chain(kernel_of(sampler), state, potential, steps, callback=keep, **told)
    return Chains(kept, torch.stack(terms).numpy())


@torch.no_grad()
def decoded(prior: EBMPrior, eps: Sequence[Tensor]) -> Tensor:
    """Means of p(x | z) at z = T_β(ε), (B, C, H, W) on the CPU."""
    trace = prior.backbone.transform(eps)
    return prior.backbone.likelihood(trace.features).mean.cpu()


@torch.no_grad()
def _redrawn(prior: EBMPrior, z: Sequence[Tensor], k: int, energy: bool, seed: int) -> Tensor:
    """Images with the k lowest groups drawn given the others, from p_α or from p_β."""
    n = len(z[0])
    free = FreeGroups(prior.backbone, prior.f, z[: len(z) - k], n, prior.walk)
    generator = BlockGenerator(derived_seed(seed, Purpose.PICTURE_LOWER, k), 0, n, z[0].device)
    trace = free.sample(prior.sampler if energy else None, generator)
    return prior.backbone.likelihood(trace.features).mean


@torch.no_grad()
def _inferred(prior: EBMPrior, images: Images, n: int, seed: int) -> tuple[Tensor, list[Tensor]]:
    """n images and a posterior draw of their latents."""
    batch, like = _chosen(prior, images, n, seed), next(prior.backbone.parameters())
    generator = BlockGenerator(derived_seed(seed, Purpose.PICTURE_POSTERIOR), 0, n, like.device)
    observed = prior.backbone.observe(batch.to(like.device), generator=generator)
    return batch, prior.backbone.infer(observed, generator=generator).z


def _chosen(prior: EBMPrior, images: Images, n: int, seed: int) -> Tensor:
    """n of the images, (n, C, H, W) in the backbone's precision on the CPU."""
    if len(images) < n:
        raise ConfigurationError(f"expected at least {n} images, found {len(images)} of {images.name}: show fewer (-n)")
    rows = torch.randperm(len(images), generator=derived_generator(seed, Purpose.PICTURE_CHOICE))[:n]
    return images.batch(rows).to("cpu", next(prior.backbone.parameters()).dtype)


def chain_steps(prior: EBMPrior) -> int:
    """Steps of the prior's sampler. Raises ConfigurationError where it has none."""
    if not prior.sampler.steps:
        raise ConfigurationError("this prior's sampler is resampling alone: give the chain some --steps")
    return prior.sampler.steps


def kernel_words(prior: EBMPrior) -> str:
    """The sampler's kernel in words, for captions."""
    return f"{prior.sampler.kernel} at step size {prior.sampler.step_size:g}"


def _extreme(images: Tensor) -> float:
    """The share of pixels that are almost black or almost white."""
    return float(((images < 0.01) | (images > 0.99)).double().mean())
