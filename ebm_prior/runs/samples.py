"""Samples as files: grids, arrays, folders of PNG files, before-and-after pictures; and the places for them."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ebm_prior.compute.parallel import ALONE, Processes
from ebm_prior.errors import OutputError
from ebm_prior.interfaces import SILENT, Progress
from ebm_prior.model.prior import ANCESTRAL, EBMPrior
from ebm_prior.model.samplers import SamplerConfig
from ebm_prior.model.samples import Samples, refusals
from ebm_prior.pictures.grids import grid, in_bytes, picture, save_png, titled_grids
from ebm_prior.storage.atomic import temporary_affixes, write_atomically
from ebm_prior.storage.lock import owned
from ebm_prior.storage.places import require_absent, require_free, require_writable


def write_comparison(
    prior: EBMPrior,
    path: Path,
    *,
    seed: int,
    number: int = 64,
    caption: Sequence[str] = (),
    progress: Progress = SILENT,
) -> None:
    """Write a picture of `number` samples of the backbone's prior beside as many of the energy-based prior."""
    progress.begin("before and after", 2 * number)
    before = prior.sample(number, seed=seed, sampler=ANCESTRAL, progress=progress).images
    after = prior.sample(number, seed=seed, progress=progress).images
    panels = [("before: the backbone's prior", before), ("after: the energy-based prior", after)]
    save_png(titled_grids(panels, columns=8, caption=caption), path)


def require_place(out: Path, overwrite: bool) -> None:
    """Refuse a place for samples, a file or (without suffix) a folder, that is taken or where nothing can be written.

    Raises OutputError, before work is done.
    """
    if out.suffix:
        require_free(out, overwrite)
        return
    require_writable(out)
    require_absent(out, overwrite)
    if out.is_file():
        raise OutputError(f"{out} is a file; expected a folder for samples: choose another --out")
    if out.is_dir() and not all(_is_sample(path) or path.name.startswith(".") for path in out.iterdir()):
        raise OutputError(f"{out} is a folder that holds other files than samples (0.png, …): choose another --out")


def _is_sample(path: Path) -> bool:
    return path.suffix == ".png" and path.stem.isdigit()


class Drawn(NamedTuple):
    """The part of samples that is written or described."""

    images: Tensor  # (n, C, H, W) uint8
    z: list[Tensor]  # (n, *group.shape) each; none where the file holds no latents
    diagnostics: Tensor  # (4, n): acceptance, norm, ess_fraction and restarts of `Samples`


def holds_latents(out: Path) -> bool:
    """Whether samples are written to `out` together with their latents."""
    return out.suffix == ".npz"


def draw_samples(
    prior: EBMPrior,
    number: int,
    out: Path,
    *,
    seed: int,
    sampler: SamplerConfig,
    chunk: int,
    progress: Progress = SILENT,
    processes: Processes = ALONE,
) -> Drawn | None:
    """Draw a number of samples to be written to `out`, in the memory that this takes alone. The `processes` share them.

    Returns the samples in the first process, and None in the others. Arguments and errors: see `EBMPrior.sample`.
    """

    def see(part: Samples) -> Drawn:
        z = [group.cpu() for group in part.z] if holds_latents(out) else []
        return Drawn(in_bytes(part.images), z, torch.stack(part[3:]).cpu())

    told: dict[str, Any] = {"progress": progress, "processes": processes, "first_only": True}
    parts = prior.map_chunks(see, number, seed=seed, sampler=sampler, chunk=chunk, **told)
    if not processes.first:
        return None
    images, latents, diagnostics = zip(*parts, strict=True)
    z = [torch.cat(group) for group in zip(*latents, strict=True)]
    return Drawn(torch.cat(images), z, torch.cat(diagnostics, dim=1))


def write_samples(prior: EBMPrior, drawn: Drawn, out: Path, *, seed: int, compare: bool) -> list[Path]:
    """Write samples in the form that the suffix of `out` names: .png a grid, .npz arrays, none a folder of PNG files.

    compare: with a grid of the backbone's own samples beside it, drawn from `seed`. Returns the paths written.
    """
    images = drawn.images
    if out.suffix == ".png":
        columns = max(1, round(len(images) ** 0.5))
        if compare:
            before = prior.sample(len(images), seed=seed, sampler=ANCESTRAL).images
            panels = [("the backbone's prior", before), ("the energy-based prior", images)]
            save_png(titled_grids(panels, columns=columns), out)
        else:
            save_png(grid(images, columns=columns), out)
        return [out]
    if holds_latents(out):
        names = [group.name for group in prior.backbone.groups]
        latents: dict[str, Any] = {f"z_{name}": z.numpy() for name, z in zip(names, drawn.z, strict=True)}
        buffer = BytesIO()
        np.savez_compressed(buffer, images=images.permute(0, 2, 3, 1).numpy(), **latents)
        write_atomically(out, buffer.getvalue())
        return [out]
    width = len(str(len(images) - 1))
    names = [f"{index:0{width}d}.png" for index in range(len(images))]
    try:
        out.mkdir(parents=True, exist_ok=True)
        prefix, suffix = temporary_affixes("new")
        # Inside `out`, which may be a disk of its own: from anywhere else files would be copied, not renamed.
        with owned(out), tempfile.TemporaryDirectory(dir=out, prefix=prefix, suffix=suffix) as new:
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


def describe_samples(drawn: Drawn, sampler: SamplerConfig, seed: int, files: Sequence[Path]) -> dict[str, Any]:
    """The result of `ebm-prior sample`, as plain values: sampler, seed, mean diagnostics and files."""
    acceptance, norm, ess_fraction, restarts = drawn.diagnostics
    return {
        "samples": len(drawn.images),
        "seed": seed,
        "sampler": asdict(sampler),
        "acceptance": float(acceptance.mean()),
        "norm": float(norm.mean()),
        "ess_fraction": float(ess_fraction.mean()),
        **refusals(norm, restarts, sampler.norm_limit),
        "files": [str(file) for file in files],
    }
