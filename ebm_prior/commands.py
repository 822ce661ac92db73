"""What the commands do, without click: a library user can call the same functions."""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ebm_prior.backbone import Backbone
from ebm_prior.checkpoint import PRIOR_KEY, backbone_record, bundled, load_backbone, save_backbone, save_prior
from ebm_prior.classifier import load_classifier
from ebm_prior.data import SUBSET, ImageSource, open_images
from ebm_prior.errors import ConfigurationError, DivergenceError, OutputError
from ebm_prior.evaluate import EvalConfig, Reference, evaluate
from ebm_prior.figures import grid, save_png, titled_grids
from ebm_prior.files import without_nan, write_atomically
from ebm_prior.fit import FitConfig, fit
from ebm_prior.gauge import GaugeConfig
from ebm_prior.metrics import FeatureExtractor
from ebm_prior.pretrain import PretrainConfig, build, evaluate_elbo, pretrain, training_record
from ebm_prior.prior import ANCESTRAL, EBMPrior, Samples
from ebm_prior.runs import Run
from ebm_prior.training import Callback
from ebm_prior.weights import count_parameters, fingerprint, read_tensors

DEMO_BACKBONE = "hvae_fashion_mnist"


def run_directory(out: Path | None, stage: str, *, resume: bool) -> Path:
    """`out`, or the next free runs/<stage>-NNN."""
    if out is not None:
        return out
    if resume:
        raise ConfigurationError("--resume needs --out: which run is to go on?")
    taken = {path.name for path in Path("runs").glob(f"{stage}-*")}
    return next(Path("runs") / f"{stage}-{k:03d}" for k in range(1, 10_000) if f"{stage}-{k:03d}" not in taken)


def require_free(out: Path, overwrite: bool) -> None:
    """Refuse to write over something, or where nothing can be written, before work is done. Raises OutputError."""
    if out.exists() and not overwrite:
        raise OutputError(f"{out} exists: pass --overwrite to replace it, or another --out")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write {out}: {error.strerror}; choose another --out") from error


def fit_into(
    directory: Path,
    backbone: Backbone,
    images: ImageSource,
    config: FitConfig,
    *,
    checkpoint: str,
    resume: bool = False,
    overwrite: bool = False,
    on_step: Callback | None = None,
) -> dict[str, Any]:
    """Fit a prior in a run directory: prior.safetensors, metrics, pictures, resume state.

    Where training diverges for good, the best prior so far is written before DivergenceError goes on.
    """
    inputs = {
        "backbone": fingerprint(backbone),
        "dtype": str(next(backbone.parameters()).dtype),
        "data": images.name,
        "images": images.fingerprint(),
    }
    run = Run(directory, asdict(config), inputs, resume=resume, overwrite=overwrite)
    path = directory / "prior.safetensors"
    where = checkpoint if checkpoint in bundled() else str(Path(checkpoint).resolve())

    def picture(shown: Mapping[str, Any]) -> None:
        if shown["iteration"] % (5 * config.evaluate_every) == 0:
            drawn = shown["prior"].sample(32, seed=config.seed)
            save_png(grid(drawn.images, columns=8), directory / f"samples-{shown['iteration']:06d}.png")

    began = time.process_time()
    try:
        prior = fit(backbone, images, config, run=run, on_step=on_step, on_evaluate=picture)
    except DivergenceError as error:
        if isinstance(error.prior, EBMPrior):
            save_prior(error.prior, path, checkpoint=where)
            raise DivergenceError(f"{error} It was written to {path}", prior=error.prior) from error
        raise
    seconds = time.process_time() - began
    save_prior(prior, path, checkpoint=where)
    before_after = directory / "before-after.png"
    write_comparison(prior, before_after, seed=config.seed)
    return {
        "prior": str(path),
        "picture": str(before_after),
        "parameters": parameters(prior),
        "tau": prior.tau,
        "regime": prior.regime,
        "sampler": asdict(prior.sampler),
        "cpu_seconds": seconds,
        **{key: prior.record[key] for key in ("iterations", "best_iteration", "rollbacks", "held_out")},
    }


def parameters(prior: EBMPrior) -> dict[str, float]:
    """Parameter counts of backbone and heads, and their ratio (Table 9)."""
    backbone, heads = count_parameters(prior.backbone), count_parameters(prior.energy)
    return {"backbone": backbone, "heads": heads, "ratio": heads / backbone}


def head_parameters(path: Path) -> dict[str, int]:
    """Parameters per head of a prior file (the standardisation constants are not counted)."""
    tensors = read_tensors(path, PRIOR_KEY, "an ebm-prior file")[0]
    counts: dict[str, int] = {}
    for name, tensor in tensors.items():
        head = name.split(".")[1] if name.startswith("heads.") else "joint"
        if not name.endswith((".shift", ".scale")):
            counts[head] = counts.get(head, 0) + tensor.numel()
    return counts


def write_comparison(prior: EBMPrior, path: Path, *, seed: int, number: int = 64, caption: Sequence[str] = ()) -> None:
    """A picture: samples of the backbone's prior beside those of the energy-based prior."""
    before = prior.sample(number, seed=seed, sampler=ANCESTRAL).images
    after = prior.sample(number, seed=seed).images
    panels = [("before: the backbone's prior", before), ("after: the energy-based prior", after)]
    save_png(titled_grids(panels, columns=8, caption=caption), path)


def write_samples(prior: EBMPrior, drawn: Samples, out: Path, *, seed: int, compare: bool) -> list[Path]:
    """Write samples as `out`'s suffix says: .png a grid, .npz arrays, else a folder of PNG files."""
    images = drawn.images.cpu()
    if out.suffix == ".png":
        columns = max(1, round(len(images) ** 0.5))
        if compare:
            before = prior.sample(len(images), seed=seed, sampler=ANCESTRAL).images.cpu()
            panels = [("the backbone's prior", before), ("the energy-based prior", images)]
            save_png(titled_grids(panels, columns=columns), out)
        else:
            save_png(grid(images, columns=columns), out)
        return [out]
    pixels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    if out.suffix == ".npz":
        names = [group.name for group in prior.backbone.groups]
        latents = {f"z_{name}": z.cpu().numpy() for name, z in zip(names, drawn.z, strict=True)}
        buffer = BytesIO()
        np.savez_compressed(buffer, allow_pickle=False, images=pixels, **latents)
        write_atomically(out, buffer.getvalue())
        return [out]
    width = len(str(len(images) - 1))
    files = [out / f"{index:0{width}d}.png" for index in range(len(images))]
    try:
        out.mkdir(parents=True, exist_ok=True)
        for earlier in (path for path in out.glob("*.png") if path.stem.isdigit()):
            earlier.unlink()  # of a larger number of samples, say
    except OSError as error:
        raise OutputError(f"cannot make the folder {out}: {error.strerror}; choose another --out") from error
    for image, file in zip(images, files, strict=True):
        save_png(grid(image[None], columns=1, scale=1), file)
    return [out]


def feature_extractor(
    classifier: Path | None, inception: Path | None, fid: bool, mode: Any, download: bool, device: torch.device
) -> FeatureExtractor:
    """The network on whose features FD and KID are measured: Inception where asked for, else a classifier."""
    if inception is None and not fid:
        return load_classifier(classifier).to(device)
    from ebm_prior.inception import load_inception

    return load_inception(inception, mode=mode, download=download, device=device)


def evaluate_all(
    priors: Sequence[EBMPrior],
    names: Sequence[str],
    test: ImageSource,
    train: ImageSource,
    extractor: FeatureExtractor,
    config: EvalConfig,
    on_stage: Callable[[str], None] | None = None,
) -> list[dict[str, Any]]:
    """Evaluate priors of one backbone against the same reference."""
    if on_stage:
        on_stage("held-out images and backbone samples")
    same = train.name == test.name  # a source without splits: its own images are no floor
    reference = Reference(priors[0].backbone, test, extractor, config, training_images=None if same else train)
    return [
        {"prior": name, **evaluate(prior, reference, on_stage=on_stage)}
        for name, prior in zip(names, priors, strict=True)
    ]


def mean_and_sd(results: Sequence[Mapping[str, Any]]) -> dict[str, tuple[float, float]]:
    """Mean and sample standard deviation of every number that the results share."""
    keys = [key for key, value in results[0].items() if isinstance(value, float)]
    columns = {key: [float(result[key]) for result in results] for key in keys}
    return {key: (statistics.fmean(c), statistics.stdev(c) if len(c) > 1 else 0.0) for key, c in columns.items()}


def source_record(checkpoint: str) -> dict[str, Any]:
    """Where a converted backbone comes from: name and SHA-256 over its files; of an own form also what it says."""
    path = bundled().get(checkpoint, Path(checkpoint))
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            digest.update(file.name.encode() + b"\0" + file.read_bytes())
    known = backbone_record(path)["record"] if path.suffix == ".safetensors" else {}
    return {**known, "source": path.name, "source_sha256": digest.hexdigest()}


def describe_backbone(backbone: Backbone, heads: int) -> dict[str, Any]:
    """A backbone's groups and parameter counts, with those of the default heads (Table 9)."""
    count = count_parameters(backbone)
    return {
        "class": type(backbone).__name__,
        "image_shape": list(backbone.image_shape),
        "groups": [[group.name, list(group.shape)] for group in backbone.groups],
        "fingerprint": fingerprint(backbone),
        "parameters": {"backbone": count, "heads": heads, "ratio": heads / count},
    }


def new_backbone(kind: type[Backbone], architecture: Path | None, seed: int) -> Backbone:
    """An untrained network from a JSON file of keyword arguments."""
    if architecture is None:
        return build(kind, {}, seed=seed)
    try:
        described = json.loads(architecture.read_text())
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"--architecture {architecture} cannot be read as JSON: {error}") from error
    if not isinstance(described, dict):
        raise ConfigurationError(f"--architecture {architecture}: expected a JSON object of keyword arguments")
    return build(kind, described, seed=seed)


def pretrain_into(
    directory: Path,
    backbone: Backbone,
    train: ImageSource,
    test: ImageSource,
    config: PretrainConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    on_step: Callback | None = None,
) -> dict[str, Any]:
    """Train a backbone in a run directory: backbone.safetensors, metrics, pictures, resume state."""
    architecture = json.loads(json.dumps(dict(backbone.architecture)))
    inputs = {
        "architecture": architecture,
        "dtype": str(next(backbone.parameters()).dtype),
        "data": train.name,
        "images": train.fingerprint(),
    }
    run = Run(directory, asdict(config), inputs, resume=resume, overwrite=overwrite)

    def picture(shown: Mapping[str, Any]) -> None:
        write_progress(shown["backbone"], test, directory / f"samples-{shown['iteration']:06d}.png", config.seed)

    began = time.process_time()
    trained = pretrain(backbone, train, config, run=run, validation=test, on_step=on_step, on_checkpoint=picture)
    seconds = time.process_time() - began
    elbo = evaluate_elbo(trained, test, seed=config.seed)
    path = directory / "backbone.safetensors"
    save_backbone(trained, path, record=training_record(config, train, elbo))
    return {
        "backbone": str(path),
        "parameters": count_parameters(trained),
        "test_elbo": elbo._asdict(),
        "cpu_seconds": seconds,
        "iterations": config.iterations,
    }


@torch.no_grad()
def write_progress(backbone: Backbone, images: ImageSource, path: Path, seed: int) -> None:
    """A picture of a backbone in training: images, their reconstructions, samples of the prior."""
    like = next(backbone.parameters())
    generator = torch.Generator(device=like.device).manual_seed(seed)
    real = images.batch(range(min(32, len(images)))).to(like.device, like.dtype)
    posterior = backbone.infer(backbone.observe(real, generator=generator), generator=generator)
    reconstructed = backbone.likelihood(posterior.features).mean
    sampled = backbone.decode(backbone.sample(len(real), generator=generator)).mean
    panels = [("images", real), ("reconstructions", reconstructed), ("samples", sampled)]
    save_png(titled_grids([(title, p.cpu()) for title, p in panels], columns=8), path)


def demo_config() -> FitConfig:
    """The demo's second stage: the default one, cut to a minute or two on the bundled 6,000 images."""
    return replace(FitConfig(), iterations=700)


def demo(
    out: Path, *, seed: int = 0, on_step: Callback | None = None, on_stage: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Fit a prior to the bundled backbone on the bundled images and measure it. Writes into `out`."""
    say = on_stage or (lambda text: None)
    began = time.monotonic()
    say(f"backbone {DEMO_BACKBONE}, images {SUBSET}: fitting the energy-based prior")
    backbone = load_backbone(None, DEMO_BACKBONE)
    train, test = (open_images(SUBSET, split=split, image_shape=backbone.image_shape) for split in ("train", "test"))
    config = replace(demo_config(), seed=seed)
    prior = fit(backbone, train, config, on_step=on_step)
    path = out / "prior.safetensors"
    save_prior(prior, path, checkpoint=DEMO_BACKBONE)
    say(f"fitted in {time.monotonic() - began:.0f} s; measuring")
    measured = EvalConfig(samples=len(test), seed=seed, gauge=GaugeConfig(iterations=300))
    reference = Reference(backbone, test, load_classifier(), measured, training_images=train)
    result = evaluate(prior, reference, on_stage=say)
    picture, table = out / "before-after.png", out / "result.json"
    caption = [
        f"{result['extractor']}: {result['fd_backbone']:.1f} before, {result['fd_prior']:.1f} after, "
        f"{result['fd_reconstruction']:.1f} for reconstructions, the best that a prior could reach; N = {len(test)}",
    ]
    write_comparison(prior, picture, seed=seed, caption=caption)
    result |= {
        "seconds": time.monotonic() - began,
        "parameters": parameters(prior),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "files": [str(path), str(picture), str(table)],
    }
    write_atomically(table, (json.dumps(without_nan(result), indent=2, sort_keys=True) + "\n").encode())
    return result
