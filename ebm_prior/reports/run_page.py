"""The page of `ebm-prior report RUN`: everything in the folder of a fit, for a person to read."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import ebm_prior
from ebm_prior.data.images import DATA_SET_NAMES
from ebm_prior.errors import CheckpointError, ConfigurationError, DataError
from ebm_prior.pictures.plots import COLOURS, Series, plot
from ebm_prior.plain import read_json
from ebm_prior.reports.findings import doctor_blocks, evaluation_blocks, outlier_blocks
from ebm_prior.reports.html import Code, Figure, Figures, Folded, Part, Picture, Pictures, Statement, web_page
from ebm_prior.reports.results import RESULTS
from ebm_prior.reports.summaries import fit_blocks, prior_blocks
from ebm_prior.reports.text import Table
from ebm_prior.runs.describe import head_parameters
from ebm_prior.runs.folder import read_run_record
from ebm_prior.settings import as_words, of_plain, resolve, settings
from ebm_prior.storage.atomic import with_nan
from ebm_prior.storage.checkpoint import backbone_record, prior_record
from ebm_prior.storage.records import FIT_RECORD, InvalidError, checked, fields, text, whole
from ebm_prior.storage.sealed import read_lines
from ebm_prior.training.fit_config import PRESETS, FitConfig

# The curves of a fit: title, unit, and columns of metrics.jsonl with their labels.
CURVES = (
    ("Loss", "loss (nats)", {"loss": "in training"}),
    ("Held-out gain", "gain (nats)", {"gain": "f as trained", "tempered_gain": "tempered"}),
    ("Effective sample size", "ESS / draws", {"ess_fraction": "f as trained", "tempered_ess_fraction": "tempered"}),
    ("Mean f, posterior - prior latents", "difference (nats)", {"f_gap": "in training"}),
)
_RUN = fields(
    {
        "config": fields({"objective": text()}),
        "inputs": fields({"data": text(), "device": text(), "precision": text(), "threads": whole(1)}),
        "versions": fields({}),
    }
)


def run_page(run: Path, given: Mapping[str, Path | None]) -> str:
    """The page of the run of `ebm-prior fit` in a folder, as HTML.

    given: paths of the results of "eval", "ood" and "doctor"; None looks for them in the folder. Raises
    ConfigurationError where the folder holds no finished fit, and DataError where results cannot be read.
    """
    record, config, inputs, versions = _read_run(run)
    backbone, trained = record["backbone"], record["record"]
    found = {name: given[name] or _in_folder(run, name) for name in ("eval", "ood", "doctor")}
    evaluations, outliers, diagnosis = (_read_results(found[name], name) for name in ("eval", "ood", "doctor"))
    prior, data = str(run / "prior.safetensors"), _named(inputs["data"])
    images = [] if data in DATA_SET_NAMES else ["--data", data]
    makers = {
        "eval": ["ebm-prior", "eval", prior, *images, "--json"],
        "doctor": ["ebm-prior", "doctor", *_backbone(backbone, run), *images, "--json"],
        "ood": ["ebm-prior", "ood", prior, *(["--in", data] if images else []), "--outliers", "DATA", "--json"],
    }

    def results(name: str, parts: Sequence[Part]) -> list[Part]:
        if found[name] is not None:
            return [*parts]
        command = f"{shlex.join(makers[name])} > {shlex.quote(str(run / f'{name}.json'))}"
        what = {"ood": " DATA are the outliers: images, or a known data set."}.get(name, "")
        return [f"Not measured yet. This makes it, and the next report shows it.{what}", Code(command)]

    commands = [fit_command(config, inputs, backbone, run)]
    commands += [each["command"] for each in (*evaluations[:1], *outliers, *diagnosis) if "command" in each]
    commands.append(shlex.join(["ebm-prior", "report", str(run)]))
    curves = Pictures(training_curves(read_lines(run / "metrics.jsonl")))
    diagnosed = doctor_blocks(diagnosis[0]) if diagnosis else []
    sections: list[tuple[str, Sequence[Part]]] = [
        ("Before and after", _before_after(run)),
        ("Training", [*fit_blocks(trained), curves]),
        ("Evaluation", results("eval", evaluation_blocks(evaluations) if evaluations else [])),
        ("Outliers", results("ood", _outliers(outliers, found["ood"]))),
        ("Doctor", results("doctor", [*map(Statement, map(str, diagnosed[-1:])), *diagnosed[:-1]])),
        ("Model", prior_blocks(record | {"heads": head_parameters(run / "prior.safetensors")})),
        (
            "Configuration",
            [
                *configuration_blocks(config, trained),
                Folded("Inputs and versions", Table(["", "value"], _rows(inputs | versions))),
            ],
        ),
        ("Commands", ["Data sets are looked for under --data-root or $EBM_PRIOR_DATA.", Code("\n".join(commands))]),
    ]
    title = f"Energy-based prior for {backbone['adapter']}, {inputs['data']}"
    lead: list[Part] = [Figures(_figures(trained, evaluations))]
    return web_page(title, lead, sections, f"{run.name}, made by ebm-prior {ebm_prior.__version__}")


def fit_command(config: FitConfig, inputs: Mapping[str, Any], backbone: Mapping[str, Any], run: Path) -> str:
    """The shortest command that repeats a fit, byte for byte, whatever options or file of settings it was given."""
    name, words = min(
        ((name, as_words(config, preset())) for name, preset in PRESETS.items()),
        key=lambda pair: len(pair[1]),
    )
    own = run / "backbone.safetensors"
    if inputs.get("bn_readjust") and own.is_file():  # the file keeps the name of the backbone before that
        backbone = {**backbone, "checkpoint": str(backbone_record(own)["record"].get("source"))}
    words = [
        *_backbone(backbone, run),
        *("--data", _named(inputs["data"])),
        *(["--preset", name] if name != "default" else []),
        *words,
        *(["--bn-readjust"] if inputs.get("bn_readjust") else []),
        *(["--device", inputs["device"]] if inputs["device"] != "cpu" else []),
        *(["--precision", inputs["precision"]] if inputs["precision"] != "float32" else []),
        *("--out", str(run)),
    ]
    return f"OMP_NUM_THREADS={inputs['threads']} {shlex.join(['ebm-prior', 'fit', *words])}"


def training_curves(metrics: Sequence[Mapping[str, Any]]) -> list[Picture]:
    """Plots of `CURVES` over the iterations, as far as the metrics of a fit hold them."""
    pictures = []
    for title, unit, columns in CURVES:
        series = []
        for (key, label), colour in zip(columns.items(), COLOURS, strict=False):
            points = [(row["iteration"], row[key]) for row in metrics if isinstance(row.get(key), (int, float))]
            if any(math.isfinite(y) for _, y in points):
                x, y = zip(*points, strict=True)
                series.append(Series(label, x, y, "line" if len(x) > 1 else "points", colour))
        if series:
            image = plot(series, title=title, x_label="iteration", y_label=unit, size=(540, 340))
            buffer = BytesIO()
            image.save(buffer, format="PNG")
            pictures.append(Picture(buffer.getvalue(), f"{title} over the iterations"))
    return pictures


def _read_run(run: Path) -> tuple[dict[str, Any], FitConfig, dict[str, Any], dict[str, Any]]:
    """The prior's record, the settings, the inputs and the versions of a finished fit."""
    path, prior = run / "config.json", run / "prior.safetensors"
    try:
        stored = _RUN(read_run_record(path), "")
    except (CheckpointError, InvalidError) as error:
        raise ConfigurationError(
            f"{run}: expected the folder of a run of ebm-prior fit, found no config.json of one ({error})"
        ) from error
    inputs, versions = dict(stored["inputs"]), dict(stored["versions"])
    if not prior.is_file():
        raise ConfigurationError(f"{run} holds no prior.safetensors yet: finish the run with ebm-prior fit --resume")
    record = prior_record(prior)
    checked(FIT_RECORD, record["record"], prior, "a report needs the run of ebm-prior fit, and this is none")
    return record, of_plain(FitConfig, stored["config"]), inputs, versions


def _resolved(config: FitConfig) -> FitConfig:
    """The settings, with all settings of the sampler that the prior records."""
    return resolve(config, {f"sampler_{k}": v for k, v in settings(config.recorded_sampler).items()})


def _in_folder(run: Path, name: str) -> Path | None:
    """Results in a run's folder: NAME.json, or what ood wrote last."""
    written = sorted(run.glob("ood-*/result.json")) if name == "ood" else []
    return next((path for path in (run / f"{name}.json", *reversed(written)) if path.is_file()), None)


def _read_results(path: Path | None, name: str) -> list[dict[str, Any]]:
    """The results in a file of `ebm-prior NAME --json`, as a list."""
    if path is None:
        return []
    what, advice = f"what ebm-prior {name} --json prints", "make it again, or leave it out"
    stored = with_nan(read_json(path, what, error=DataError, advice=advice))
    try:
        results: list[dict[str, Any]] = RESULTS[name](stored if isinstance(stored, list) else [stored], "")
    except InvalidError as error:
        raise DataError(f"{path}: expected {what}, found other JSON ({error}): {advice}") from error
    return results


def _before_after(run: Path) -> list[Part]:
    path = run / "before-after.png"
    caption = "Samples of the backbone's own prior (left), and of the energy-based prior on the same backbone (right)"
    return [Picture(path.read_bytes(), caption)] if path.is_file() else [f"There is no {path.name} in the folder."]


def _outliers(results: Sequence[Mapping[str, Any]], path: Path | None) -> list[Part]:
    """Tables, and the histograms where these lie beside."""
    parts: list[Part] = [block for each in results for block in outlier_blocks(each)]
    picture = path.parent / "histograms.png" if path else None
    if picture and path and path.name == "result.json" and picture.is_file():
        shown = Picture(picture.read_bytes(), "Densities of every score with f, one colour per set of images")
        parts.append(Folded("Histograms of the scores", shown))
    return parts


def _figures(trained: Mapping[str, Any], evaluations: Sequence[Mapping[str, Any]]) -> list[Figure]:
    gain = trained["held_out"]["tempered"]
    figures = [Figure("Held-out gain", f"{gain['nats']:+.3f} nats", f"at an ESS of {gain['ess_fraction']:.1%}")]
    for each in evaluations[:1]:
        for name, key in (("FD", "fd"), ("FDrec", "fdrec")) if "fd_prior" in each else ():
            before, after, best = (each[f"{key}_{which}"] for which in ("backbone", "prior", "reconstruction"))
            figures.append(Figure(name, f"{before:.4g} → {after:.4g}", f"reconstructions: {best:.4g}"))
        for card in each.get("published", ()):
            before, after = card["backbone"]["fid"], card["prior"]["fid"]
            figures.append(Figure(card["distance"], f"{before:.2f} → {after:.2f}", f"N = {card['samples']:,}"))
        if "auc_before" in each:
            auc = f"{each['auc_before']:.3f} → {each['auc_after']:.3f}"
            figures.append(Figure("AUC, posterior vs prior", auc, ".5: no difference is seen"))
    return figures


def _backbone(backbone: Mapping[str, Any], run: Path) -> list[str]:
    """The options that name the backbone; one with re-adjusted batch norms lies in the run's folder."""
    where = backbone["checkpoint"]
    return ["--backbone", backbone["adapter"], "--ckpt", str(run / where) if (run / where).is_file() else where]


def _named(data: str) -> str:
    """`--data` that opens a recorded source: a known data set without its split, or the path itself."""
    name, _, split = data.rpartition("/")
    return name if name in DATA_SET_NAMES and split in ("train", "test") else data


def configuration_blocks(asked: FitConfig, trained: Mapping[str, Any]) -> list[Part]:
    """Tables of the settings that differ from the defaults, of those of the stages after saturation, and of all."""
    config = _resolved(asked)
    changed = _changes(_resolved(FitConfig()), config)
    parts: list[Part] = [
        Table(["setting", "value", "default"], changed) if changed else "Every setting is the default."
    ]
    if trained["saturated"]:
        since = trained["saturated"]["iteration"]
        parts += [
            f"One density ratio saturated by iteration {since}; from there on, stages with these settings:",
            Table(["setting", "value", "as asked"], _changes(config, _resolved(asked.staging(since)))),
        ]
    return [*parts, Folded("All settings, as asked", Table(["setting", "value"], _rows(settings(config))))]


def _changes(before: FitConfig, after: FitConfig) -> list[list[str]]:
    old = settings(before)
    return [[k, _spelled(v), _spelled(old[k])] for k, v in settings(after).items() if v != old[k]]


def _rows(values: Mapping[str, Any]) -> list[list[str]]:
    return [[name, _spelled(value)] for name, value in values.items()]


def _spelled(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else "" if value is None else str(value)
