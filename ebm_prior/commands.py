"""What the commands do, without click: a library user can call the same functions."""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from io import BytesIO
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL.Image import Image

from ebm_prior.backbone import Backbone
from ebm_prior.batch_norm import BATCH_SIZE, ITERATIONS, adjustable
from ebm_prior.checkpoint import PRIOR_KEY, backbone_record, bundled, prior_record, save_prior
from ebm_prior.classifier import bundled_classifier, load_classifier
from ebm_prior.data import ImageSource
from ebm_prior.energy import EnergyConfig, JointEnergy
from ebm_prior.errors import ConfigurationError, DivergenceError, OutputError, UnknownBackboneError
from ebm_prior.evaluate import EvalConfig, Reference, evaluate
from ebm_prior.figures import grid, picture, save_png, titled_grids
from ebm_prior.files import write_atomically
from ebm_prior.fit import fit
from ebm_prior.metrics import FeatureExtractor
from ebm_prior.parallel import ALONE, Processes
from ebm_prior.prior import ANCESTRAL, EBMPrior, Samples
from ebm_prior.recipes import FitConfig, paper_preset
from ebm_prior.registry import adapter, registered
from ebm_prior.runs import Run
from ebm_prior.samplers import SamplerConfig
from ebm_prior.sources import readjusted
from ebm_prior.training import Callback
from ebm_prior.weights import count_parameters, fingerprint, read_tensors

# Of a prior's record:
RESULTS = ("iterations", "best_iteration", "rollbacks", "held_out", "stages", "saturated", "narrow")


def run_directory(out: Path | None, stage: str, *, resume: bool) -> Path:
    """`out`, or the next free runs/<stage>-NNN."""
    if out is not None:
        return out
    if resume:
        raise ConfigurationError("--resume needs --out: which run is to go on?")
    return next_free(Path("runs"), stage)


def newest_prior() -> Path:
    """The prior under ./runs that was written last. Raises ConfigurationError where there is none."""
    priors = [path for path in Path("runs").glob("*/prior.safetensors") if path.is_file()]
    if not priors:
        raise ConfigurationError(
            f"there is no prior in {Path('runs').resolve()} (*/prior.safetensors): say which file it is, or make one "
            "with ebm-prior fit"
        )
    return max(priors, key=lambda path: (path.stat().st_mtime_ns, path))


def next_drawing(prior: Path) -> Path:
    """The next free drawn-NNN.png beside a prior. Raises CheckpointError where there is no prior."""
    prior_record(prior)  # first, for the folder of a name that is mistyped would be made
    return next_free(prior.parent, "drawn", ".png")


def next_free(folder: Path, stem: str, suffix: str = "") -> Path:
    """The first of folder/stem-001, folder/stem-002, … that is not there."""
    return next(path for k in count(1) if not os.path.lexists(path := folder / f"{stem}-{k:03d}{suffix}"))


def require_writable(out: Path) -> None:
    """Make `out`'s parent folder; refuse a place where nothing can be written, before work is done: OutputError."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=out if out.is_dir() else out.parent, prefix="."):
            pass  # tried for real: permission bits do not tell of read-only disks, and mean nothing to root
    except OSError as error:
        raise OutputError(f"cannot write {out}: {error.strerror}; choose another --out") from error


def require_free(out: Path, overwrite: bool, *, folder: bool = False) -> None:
    """Refuse to write over something, or where nothing can be written, before work is done. Raises OutputError.

    `folder`: `out` is to be a folder of samples, not a file.
    """
    require_writable(out)
    if out.is_dir() and not folder:
        raise OutputError(f"{out} is a folder; expected the name of a file: choose another --out")
    if out.exists() and not overwrite:
        raise OutputError(f"{out} exists: pass --overwrite to replace it, or another --out")
    if out.is_file() and folder:
        raise OutputError(f"{out} is a file; expected a folder for samples: choose another --out")
    if out.is_dir() and not all(_is_sample(path) or path.name.startswith(".") for path in out.iterdir()):
        raise OutputError(f"{out} is a folder that holds other files than samples (0.png, …): choose another --out")


def _is_sample(path: Path) -> bool:
    return path.suffix == ".png" and path.stem.isdigit()


def run_inputs(backbone: Backbone, images: ImageSource) -> dict[str, Any]:
    """What makes a run beside its settings; a resume with another of these would give other bytes."""
    return {
        "precision": backbone.precision,
        "data": images.name,
        "images": images.fingerprint(),
        "device": next(backbone.parameters()).device.type,
        "threads": torch.get_num_threads(),  # the order of sums in a matrix product depends on it
    }


def fit_into(
    directory: Path,
    backbone: Backbone,
    images: ImageSource,
    config: FitConfig,
    *,
    checkpoint: str,
    bn_readjust: bool = False,
    checkpointing: bool = False,
    compiled: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    on_step: Callback | None = None,
    on_stage: Callable[[str], None] | None = None,
    processes: Processes = ALONE,
) -> dict[str, Any]:
    """Fit a prior in a run directory: prior.safetensors, metrics, pictures, resume state.

    `bn_readjust`: first re-adjust the batch norms of `backbone`, which is then another one: it is written to
    backbone.safetensors, and this is the backbone of the prior. `checkpointing`, `compiled`: of its cells. Where
    training diverges for good, the best prior so far is written before DivergenceError goes on. The first of the
    `processes` writes, and none of the others.
    """
    settings: dict[str, Any] | None = None
    if bn_readjust:
        settings = {"iterations": ITERATIONS, "batch_size": BATCH_SIZE, "temperature": 1.0, "seed": config.seed}
    inputs = {"backbone": fingerprint(backbone), "bn_readjust": settings, **run_inputs(backbone, images)}
    path, own = directory / "prior.safetensors", directory / "backbone.safetensors"
    where = checkpoint if checkpoint in bundled() else str(Path(checkpoint).resolve())
    if settings is not None:
        adjustable(backbone)
        if where == str(own.resolve()):
            raise OutputError(f"{own} is the backbone that is to be re-adjusted: choose another --out")
    run = processes.of_first(lambda: Run(directory, asdict(config), inputs, resume=resume, overwrite=overwrite))
    if settings is not None:
        adjust = partial(readjusted, backbone, own, checkpoint, settings)
        processes.of_first(lambda: adjust(resume=resume, on_stage=on_stage) and None)
        backbone = adjust(resume=True)  # the others read what the first has written
        where = own.name  # beside the prior: wherever the run is, equal runs give equal bytes
    if checkpointing:
        backbone = backbone.checkpointing()
    if compiled:
        backbone = backbone.compiled()

    def keep(prior: EBMPrior) -> None:
        prior.record["data"]["fingerprint"] = inputs["images"]  # by which `eval` knows them again
        if settings is not None:
            prior.record["bn_readjust"] = settings
        if processes.first:
            save_prior(prior, path, checkpoint=where)

    def show(shown: Mapping[str, Any]) -> None:
        if shown["iteration"] % (5 * config.evaluate_every) == 0:
            try:
                drawn = shown["prior"].sample(32, seed=config.seed)
            except DivergenceError as error:  # of a picture's chains: training watches its own
                return on_stage(f"no picture of iteration {shown['iteration']}: {error}") if on_stage else None
            save_png(grid(drawn.images, columns=8), directory / f"samples-{shown['iteration']:06d}.png")

    began = time.process_time()
    try:
        if processes.first:
            prior = fit(backbone, images, config, run=run, on_step=on_step, on_evaluate=show, processes=processes)
        else:
            prior = fit(backbone, images, config, processes=processes)
    except DivergenceError as error:
        if isinstance(error.kept, EBMPrior):
            keep(error.kept)
            raise DivergenceError(f"{error} It was written to {path}", kept=error.kept) from error
        raise
    seconds = time.process_time() - began
    keep(prior)
    before_after = directory / "before-after.png"
    if processes.first:
        write_comparison(prior, before_after, seed=config.seed)
    return {
        "prior": str(path),
        "picture": str(before_after),
        "parameters": parameters(backbone, config.energy),
        "tau": prior.tau,
        "ceiling": None if prior.ceiling == math.inf else prior.ceiling,
        "regime": prior.regime,
        "sampler": asdict(prior.sampler),
        "cpu_seconds": seconds,
        **{
            key: prior.record[key]
            for key in ("config", "iterations", "best_iteration", "rollbacks", "held_out", "saturated", "stages")
        },
    }


def parameters(backbone: Backbone, energy: EnergyConfig) -> dict[str, float]:
    """Parameter counts of a backbone and of such heads on it, and their ratio (Table 9)."""
    with torch.device("meta"):  # counted, not made
        heads = count_parameters(JointEnergy(backbone.groups, energy))
    count = count_parameters(backbone)
    return {"backbone": count, "heads": heads, "ratio": heads / count}


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
        latents: dict[str, Any] = {f"z_{name}": z.cpu().numpy() for name, z in zip(names, drawn.z, strict=True)}
        buffer = BytesIO()
        np.savez_compressed(buffer, images=pixels, **latents)
        write_atomically(out, buffer.getvalue())
        return [out]
    width = len(str(len(images) - 1))
    names = [f"{index:0{width}d}.png" for index in range(len(images))]
    try:
        out.mkdir(parents=True, exist_ok=True)
        # Inside `out`, which may be a disk of its own: from anywhere else files would be copied, not renamed.
        with tempfile.TemporaryDirectory(dir=out, prefix=".new-") as new:
            for image, name in zip(images, names, strict=True):
                save_png(picture(image), Path(new, name))
            for name in names:
                Path(new, name).replace(out / name)
        for surplus in [path for path in out.iterdir() if _is_sample(path) and path.name not in names]:
            surplus.unlink()
    except OSError as error:
        raise OutputError(
            f"cannot write into {out}: {error.strerror or error}; free some space or choose another --out"
        ) from error
    return [out]


def write_page(image: Image, arrays: Mapping[str, NDArray[Any]], out: Path) -> dict[str, Any]:
    """Write a picture and, beside it as .npz, the arrays behind it."""
    buffer = BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    write_atomically(out.with_suffix(".npz"), buffer.getvalue())
    save_png(image, out)
    return {"files": [str(out), str(out.with_suffix(".npz"))]}


def describe_samples(drawn: Samples, sampler: SamplerConfig, seed: int, files: Sequence[Path]) -> dict[str, Any]:
    """What was drawn, by which sampler, and the mean diagnostics."""
    return {
        "samples": len(drawn.images),
        "seed": seed,
        "sampler": asdict(sampler),
        "acceptance": float(drawn.acceptance.mean()),
        "norm": float(drawn.norm.mean()),
        "ess_fraction": float(drawn.ess_fraction.mean()),
        "files": [str(file) for file in files],
    }


def feature_classifier(images: ImageSource, path: Path | None, device: torch.device) -> FeatureExtractor:
    """The classifier on whose features FD is measured: of a file, else the bundled one that suits the `images`."""
    return (load_classifier(path) if path else bundled_classifier(images.shape, images.name)).to(device)


def evaluate_all(
    priors: Sequence[EBMPrior],
    names: Sequence[str],
    test: ImageSource,
    train: ImageSource,
    extractor: FeatureExtractor,
    config: EvalConfig,
    on_stage: Callable[[str], None] | None = None,
    processes: Processes = ALONE,
) -> list[dict[str, Any]]:
    """Evaluate priors of one backbone against the same reference."""
    if on_stage:
        on_stage("held-out images and backbone samples")
    shown = test.fingerprint()
    same = train.fingerprint() == shown  # a source without splits: its own images are no floor
    other = None if same else train
    reference = Reference(priors[0].backbone, test, extractor, config, training_images=other, processes=processes)
    return [
        {
            "prior": name,
            "held_out": not _trained_on(prior, test.name, shown),
            **evaluate(prior, reference, on_stage=on_stage),
        }
        for name, prior in zip(names, priors, strict=True)
    ]


def _trained_on(prior: EBMPrior, name: str, images: str) -> bool:
    """Whether a prior says that it was trained on the images with this fingerprint, or failing that with this name."""
    known = prior.record.get("data") or {}
    return bool(known["fingerprint"] == images if "fingerprint" in known else known.get("name") == name)


def describe_backbone(backbone: Backbone, record: Mapping[str, Any]) -> dict[str, Any]:
    """A backbone's groups and parameter counts, with those of the default heads and of the paper's (Table 9).

    `record`: what its checkpoint says of itself.
    """
    return {
        "class": type(backbone).__name__,
        "image_shape": list(backbone.image_shape),
        "groups": [[group.name, list(group.shape)] for group in backbone.groups],
        "fingerprint": fingerprint(backbone),
        "parameters": parameters(backbone, FitConfig().energy),
        "parameters_paper": parameters(backbone, paper_preset().energy),
        "architecture": dict(backbone.architecture),
        "record": dict(record),
    }


def list_backbones() -> dict[str, Any]:
    """The adapters that are installed, those that cannot be imported with the error, and the bundled backbones."""
    adapters = []
    for name, point in registered().items():
        row = {"adapter": name, "class": point.value}
        try:
            adapters.append(row | {"reads": adapter(name).official_format})
        except UnknownBackboneError as error:
            adapters.append(row | {"error": str(error)})
    trained = []
    for name, path in bundled().items():
        card = backbone_record(path)
        trained.append({"name": name, "adapter": card["adapter"], "data": card["record"].get("data", {}).get("name")})
    return {"adapters": adapters, "bundled": trained}
