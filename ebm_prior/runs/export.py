"""Export of a prior to share: its file, a card that describes it and its use, and on request its backbone."""

from __future__ import annotations

import io
import json
import shutil
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ebm_prior.errors import ConfigurationError, OutputError
from ebm_prior.runs.backbones import source_record
from ebm_prior.settings import settings
from ebm_prior.storage import places
from ebm_prior.storage.atomic import write_atomically
from ebm_prior.storage.checkpoint import (
    PRIOR_KEY,
    bundled,
    load_prior,
    prior_file,
    prior_record,
    save_backbone,
)
from ebm_prior.storage.registry import provider
from ebm_prior.storage.weights import read_tensors, write_tensors
from ebm_prior.training.fit_config import FitConfig
from ebm_prior.training.joint_config import JointConfig

PRIOR, BACKBONE, CARD = "prior.safetensors", "backbone.safetensors", "README.md"
FIGURES = {  # of eval.json: key, what it is called, how it is written
    "fd_backbone": ("{extractor}, backbone alone", "{:.3f}"),
    "fd_prior": ("{extractor}, with this prior", "{:.3f}"),
    "fd_reconstruction": ("{extractor}, reconstructions (the best that a prior could reach)", "{:.3f}"),
    "gap_closed": ("share of the gap closed", "{:.1%}"),
    "gap_closed_rec": ("share of the gap closed, to reconstructions", "{:.1%}"),
    "auc_before": ("AUC of a fresh classifier, posterior against the backbone's latents", "{:.3f}"),
    "auc_after": ("AUC of a fresh classifier, posterior against this prior's latents", "{:.3f}"),
}


def export_prior(
    run: Path,
    out: Path,
    *,
    with_backbone: bool = False,
    checkpoint: str | None = None,
    licence: str | None = None,
    overwrite: bool = False,
) -> list[str]:
    """Write a prior and its card into the folder `out`, or into a .zip; returns the names of the files.

    Args:
        run: a prior file, or the folder of a fit; the card then has the figures of its eval.json.
        out: a folder to create, or a file that ends in .zip.
        with_backbone: add the backbone in ebm-prior's own form, so that the export can be used anywhere.
        checkpoint: the present place of the backbone; None takes the place recorded in the prior.
        licence: the licence of the exported files, as model hubs name it; None leaves a line to fill in.
        overwrite: replace an earlier export there.

    Raises:
        ConfigurationError: for a licence of several lines.
        CheckpointError: where there is no prior, or its backbone is not there.
        OutputError: where `out` cannot be written, or holds something else.
    """
    if licence is not None and not licence.isprintable():
        raise ConfigurationError(f"--licence: expected one line, as mit or cc-by-4.0; found {licence[:80]!r}")
    path = prior_file(run)
    record = prior_record(path)
    zipped = out.suffix == ".zip"
    _require_place(out, zipped, overwrite)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if with_backbone:
            backbone = load_prior(path, checkpoint=checkpoint).backbone
            source = str(checkpoint or backbone.checkpoint or record["backbone"]["checkpoint"])
            save_backbone(backbone, folder / BACKBONE, record=_without_paths(source_record(source, backbone)))
        told = _told(record, with_backbone)
        write_tensors(folder / PRIOR, read_tensors(path, PRIOR_KEY, "an ebm-prior file")[0], PRIOR_KEY, told)
        results = path.parent / "eval.json"
        card = model_card(told, _figures(results, path), licence=licence, with_backbone=with_backbone)
        write_atomically(folder / CARD, card.encode())
        files = sorted(folder.iterdir())
        if zipped:
            write_atomically(out, _archive(files))
        else:
            for file in files:
                write_atomically(out / file.name, file.read_bytes())
            if not with_backbone:  # of an earlier export
                (out / BACKBONE).unlink(missing_ok=True)
        return [file.name for file in files]


def model_card(
    record: Mapping[str, Any], figures: Mapping[str, str], *, licence: str | None, with_backbone: bool
) -> str:
    """The card of a prior in Markdown, with the header that model hubs read.

    record: of the prior file.  figures: what was measured, in words.  licence: None leaves a line to fill in.
    """
    backbone, trained = record["backbone"], record["record"]
    data = (trained.get("data") or {}).get("name", "data that the file does not name")
    groups = ", ".join(f"{name} {tuple(shape)}" for name, shape in backbone["groups"])
    known = licence or "other"
    lines = [
        *("---", "library_name: ebm-prior", f"license: {known}", "tags:", "- vae", "- energy-based-model", "---", ""),
        f"# An energy-based prior for a pretrained {backbone['adapter']}",
        "",
        "A joint energy-based prior, p_α(z) ∝ exp(f(z)) p_β(z), for a frozen hierarchical VAE: better samples, and the "
        f"VAE itself is unchanged. Trained on {data} with ebm-prior {record['library']}.",
        "",
        f"- Backbone: adapter `{backbone['adapter']}`, {backbone['parameters']:,} parameters, fingerprint "
        f"`{backbone['fingerprint']}`",
        f"- Latent groups, the top one first: {groups}",
        f"- Kind: {record['regime']}"
        + (", whose f is a log density ratio in nats" if record["regime"] == "calibrated" else ", for samples only")
        + (", with a refiner that draws the samples" if "refiner" in record else ""),
        f"- Licence: {licence or 'TO BE FILLED IN by whoever passes these files on (also in the header)'}",
        "",
        "## Use",
        "",
        *_usage(str(backbone["checkpoint"]), with_backbone, provider(str(backbone["adapter"]))),
        "",
        "## How it was trained",
        "",
        *_training(trained),
        "",
        "## What was measured",
        "",
        *(f"- {what}: {value}" for what, value in {**_own_figures(record), **figures}.items()),
        "",
    ]
    return "\n".join(lines)


def _usage(checkpoint: str, with_backbone: bool, adapter_from: str | None) -> list[str]:
    needs = f"The backbone lies beside the prior{': nothing else is needed' if adapter_from is None else ''}."
    more = ""
    if not with_backbone and checkpoint in bundled():
        needs = f"The backbone, `{checkpoint}`, comes with ebm-prior."
    elif not with_backbone:
        needs = (
            f"The backbone is not among these files. Put it beside the prior as `{checkpoint}`, or say where it is; "
            "one with other weights is refused, by its fingerprint."
        )
        more = f', checkpoint="{checkpoint}"'
    if adapter_from is not None:
        needs += f" Its adapter does not come with ebm-prior: first install {adapter_from}."
    return [
        needs,
        "",
        "```python",
        "from ebm_prior import load_prior",
        "",
        f'prior = load_prior("FOLDER"{more})  # where these files are',
        "images = prior.sample(64, seed=0).images  # (64, C, H, W) in [0, 1]",
        "```",
        "",
        "```console",
        f"ebm-prior sample FOLDER/{PRIOR}{f' --ckpt {checkpoint}' if more else ''} --out samples.png",
        "```",
    ]


def _training(trained: Mapping[str, Any]) -> list[str]:
    """The settings that differ from the defaults, and how far the training went."""
    config = trained.get("config") or {}
    kind = FitConfig if set(config) <= set(FitConfig.__dataclass_fields__) else JointConfig
    usual, used = settings(kind()), _flat(config)
    changed = {name: value for name, value in used.items() if _plain(usual.get(name)) != value}
    steps = f"{trained['iterations']:,} iterations" if "iterations" in trained else "an unknown number of iterations"
    images = (trained.get("data") or {}).get("training")
    return [
        f"{steps}{f' on {images:,} images' if images else ''}. "
        + ("All settings are the defaults." if not changed else "Settings that are not the defaults:"),
        *([""] if changed else []),
        *(f"- `{name}`: {json.dumps(value)}" for name, value in sorted(changed.items())),
    ]


def _own_figures(record: Mapping[str, Any]) -> dict[str, str]:
    """What the prior file knows of itself."""
    tempered = (record["record"].get("held_out") or {}).get("tempered")
    if not tempered or record["regime"] != "calibrated":
        return {"held-out gain": "none, for a refiner is no density" if record["regime"] != "calibrated" else "unknown"}
    return {
        "held-out gain": f"{tempered['nats']:+.3f} nats over the backbone's own prior (τ = {record['tau']:.3g})",
        "effective sample size": f"{tempered['ess_fraction']:.1%} of the backbone's draws",
    }


def _figures(results: Path, prior: Path) -> dict[str, str]:
    """The figures of eval.json beside a prior, none where there is no such file or it is of other priors."""
    try:
        found = json.loads(results.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    rows = [row for row in (found if isinstance(found, list) else [found]) if isinstance(row, dict)]
    named = [row for row in rows if Path(str(row.get("prior"))).name in (prior.name, prior.parent.name)]
    row = named[0] if len(named) == 1 else rows[0] if len(rows) == 1 else {}
    numbers = {
        title.format(extractor=row.get("extractor", "FD")): pattern.format(row[key])
        for key, (title, pattern) in FIGURES.items()
        if isinstance(row.get(key), (int, float))
    }
    if not numbers:
        return {}
    held_out = "" if row.get("held_out", True) else ", which training has seen"
    data = str(row.get("data", "?"))
    data = Path(data).name if Path(data).is_absolute() else data
    return {"measured on": f"{row.get('samples', '?')} images of {data}{held_out}", **numbers}


def _told(record: Mapping[str, Any], with_backbone: bool) -> dict[str, Any]:
    """The record of a prior for others to read, without the names of folders of this machine."""
    backbone = dict(record["backbone"])
    where = str(backbone["checkpoint"])
    backbone["checkpoint"] = BACKBONE if with_backbone else where if where in bundled() else Path(where).name
    told = {**record, "backbone": backbone, "record": _without_paths(record["record"])}
    if "refiner" in record:
        told["refiner"] = {**record["refiner"], "record": _without_paths(record["refiner"]["record"])}
    return told


def _without_paths(trained: Mapping[str, Any]) -> dict[str, Any]:
    """A training record that names its data without their folder."""
    data = trained.get("data")
    if not isinstance(data, Mapping) or not Path(str(data.get("name"))).is_absolute():
        return dict(trained)
    return {**trained, "data": {**data, "name": Path(str(data["name"])).name}}


def _require_place(out: Path, zipped: bool, overwrite: bool) -> None:
    if zipped:
        places.require_free(out, overwrite)
        return
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is a file; expected the name of a folder, or of a .zip: choose another --out")
    others = {path.name for path in out.iterdir()} if out.is_dir() else set()
    if others and not (overwrite and others <= {PRIOR, BACKBONE, CARD}):
        raise OutputError(
            f"{out} is not empty: choose another --out, or pass --overwrite where it holds an earlier export alone"
        )
    out.mkdir(parents=True, exist_ok=True)
    places.require_writable(out / PRIOR)


def _archive(files: list[Path]) -> bytes:
    """A .zip of files, of equal bytes for equal files; weights do not compress."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for file in files:
            entry = zipfile.ZipInfo(file.name)  # of 1980, as without a time
            with archive.open(entry, "w", force_zip64=True) as target, file.open("rb") as source:
                shutil.copyfileobj(source, target)
    return buffer.getvalue()


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"energy": {"channels": 4}} -> {"energy_channels": 4}, as `settings` names them."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}_") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
