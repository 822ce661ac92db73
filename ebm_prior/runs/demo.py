"""The demo: an energy-based prior on the bundled backbone, fitted and measured on the bundled images, offline."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ebm_prior.data.images import SUBSET, open_images
from ebm_prior.errors import OutputError
from ebm_prior.evaluation.classifier import bundled_classifier
from ebm_prior.evaluation.evaluate import EvalConfig, evaluate_all, parts
from ebm_prior.evaluation.gauge import GaugeConfig
from ebm_prior.interfaces import SILENT, Progress
from ebm_prior.runs.describe import parameters
from ebm_prior.runs.samples import write_comparison
from ebm_prior.storage.atomic import without_nan, write_atomically
from ebm_prior.storage.checkpoint import load_backbone, save_prior
from ebm_prior.storage.lock import owned
from ebm_prior.storage.places import require_writable
from ebm_prior.training.fit import fit
from ebm_prior.training.fit_config import FitConfig

DEMO_BACKBONE = "biva_fashion_mnist"  # its prior hole is wide enough to be seen in a picture
PRIOR, PICTURE, TABLE = "prior.safetensors", "before-after.png", "result.json"  # the files of a demo


def demo_config() -> FitConfig:
    """The demo's fit: the default settings, with a number of steps that suits the bundled 6,000 images."""
    return replace(FitConfig(), iterations=800)


def demo_eval_config(samples: int) -> EvalConfig:
    """The demo's evaluation: `samples` draws, with a fixed seed.

    So fits of different seeds are compared on the same noise and with the same draws of the backbone. The classifiers
    of the AUC are trained for a shorter time than those of `eval`, which would take a quarter of the demo's.
    """
    return EvalConfig(samples=samples, gauge=GaugeConfig(iterations=150))


def require_demo_folder(out: Path, overwrite: bool) -> None:
    """Refuse to write where nothing can be written, or into a folder of something else. Raises OutputError."""
    require_writable(out)
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is a file; the demo needs a folder: choose another --out")
    if out.exists() and not (overwrite or _is_demo(out)):
        raise OutputError(
            f"{out} holds something else than a demo: pass --overwrite to write into it, or another --out"
        )


def run_demo(
    out: Path,
    *,
    seed: int = 0,
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Fit a prior to the bundled backbone on the bundled images, and measure it; the files are written into `out`.

    overwrite: write into `out` even if it holds other files than an earlier demo's; else OutputError is raised.
    progress: gets the steps of the fit, and remarks. Returns the result, as plain values.
    """
    require_demo_folder(out, overwrite)
    with owned(out):
        return _run(out, seed, progress)


def _run(out: Path, seed: int, progress: Progress) -> dict[str, Any]:
    began, cpu = time.monotonic(), time.process_time()
    progress.remark(f"backbone {DEMO_BACKBONE}, images {SUBSET}: fitting the energy-based prior")
    backbone = load_backbone(None, DEMO_BACKBONE)
    train, test = (open_images(SUBSET, split=split, image_shape=backbone.image_shape) for split in ("train", "test"))
    prior = fit(backbone, train, replace(demo_config(), seed=seed), progress=progress)
    path, picture, table = (out / name for name in (PRIOR, PICTURE, TABLE))
    save_prior(prior, path, checkpoint=DEMO_BACKBONE)
    progress.remark(f"fitted in {time.monotonic() - began:.0f} s; measuring")
    judge = bundled_classifier(test.shape, test.name)
    config = demo_eval_config(len(test))
    progress.begin("measuring", parts(1, len(backbone.groups), len(test), config))
    result = evaluate_all([prior], [str(path)], test, train, judge, config, progress)[0]
    caption = [
        f"{result['extractor']}: {result['fd_backbone']:.1f} before, {result['fd_prior']:.1f} after, "
        f"{result['fd_reconstruction']:.1f} for reconstructions, the best that a prior could reach; "
        f"N = {result['samples']}",
    ]
    write_comparison(prior, picture, seed=seed, caption=caption, progress=progress)
    result |= {
        "command": "demo",
        "fit_seed": seed,
        "seconds": time.monotonic() - began,
        "cpu_seconds": time.process_time() - cpu,
        "parameters": parameters(backbone, prior.energy.config),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "files": [str(path), str(picture), str(table)],
    }
    write_atomically(table, (json.dumps(without_nan(result), indent=2, sort_keys=True) + "\n").encode())
    return result


def _is_demo(folder: Path) -> bool:
    """Whether a folder holds the files of a demo alone, be it finished or interrupted."""
    return all(path.name in (PRIOR, PICTURE, TABLE) or path.name.startswith(".") for path in folder.iterdir())
