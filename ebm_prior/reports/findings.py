"""Results of eval, ood, anomaly, doctor and demo: as text for the terminal, as blocks for the page of `report`."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from ebm_prior.reports.summaries import files_written, refusal_text, sampler_text
from ebm_prior.reports.text import Block, Table, text


def evaluation_tables(results: Sequence[Mapping[str, Any]]) -> str:
    """Evaluations as text: see `evaluation_blocks`."""
    return text(evaluation_blocks(results))


def evaluation_blocks(results: Sequence[Mapping[str, Any]]) -> list[Block]:
    """Evaluations as blocks; where there are several, their mean and standard deviation follow."""
    blocks: list[Block] = []
    for result in results:
        blocks += ["", *_evaluation(result)]
        for card in result.get("published", ()):
            blocks += ["", *fid_card(card)]
    blocks += _paired(results)
    if len(results) > 1:
        rows = [
            [_LABELS.get(k, k), f"{m:.4g}", f"{s:.2g}"] for k, (m, s) in mean_and_sd(results).items() if k in _LABELS
        ]
        blocks += ["", f"mean and standard deviation over {len(results)} priors", Table(["", "mean", "sd"], rows)]
    return blocks[1:]


def _paired(results: Sequence[Mapping[str, Any]]) -> list[Block]:
    """The paired differences between priors, if there are any."""
    rows = [
        [f"{result['prior']}, {title}", f"{found['difference']:+.4g}", f"{found['low']:+.4g} to {found['high']:+.4g}"]
        for result in results
        for key, title in (("gain_nats", "gain (nats)"), ("fd_prior", "FD"))
        if (found := result.get("paired", {}).get(key))
    ]
    if not rows:
        return []
    first = next(result["paired"]["with"] for result in results if "paired" in result)
    return ["", Table([f"less the same of {first}, on the same images and draws", "difference", "95 % interval"], rows)]


def fid_card(card: Mapping[str, Any]) -> list[Block]:
    """FID, KID and Inception Score of a prior and its backbone, with all that they depend on."""
    official, reference = card["official"], card["reference"]
    name, kid, score = ("FID", "KID", "Inception Score") if official else ("FD", "KD", "score by classes")
    rows = [
        [
            title,
            f"{row['fid']:.2f}",
            f"{row['kid']:.5f}",
            "{inception_score:.2f} ± {inception_score_sd:.2f}".format(**row) if "inception_score" in row else "none",
        ]
        for title, row in (("backbone prior", card["backbone"]), ("energy-based prior", card["prior"]))
    ]
    return [
        Table([f"{name} card", card["distance"], kid, score], rows),
        f"network: {card['weights']}, mode {card['mode']} of clean-fid; images: means of p(x | z), 8 bits per channel",
        f"samples: N = {card['samples']:,}, seed {card['seed']}, temperature {card['sampler']['temperature']:g}; of "
        f"the energy-based prior by {sampler_text(card['sampler'])}",
        f"reference: all {reference['images']:,} images of {reference['data']} (split {reference['split']}), "
        f"statistics {card['statistics']}, {card['statistics_file']}",
        f"{kid}: 100 subsets of at most 1,000, of the reference among {card['kid_rows']:,}; {score}: mean ± sd of "
        f"{card['splits']} splits",
        *([] if official else ["NOT Inception's official weights: these figures compare with none that are published"]),
    ]


def mean_and_sd(results: Sequence[Mapping[str, Any]]) -> dict[str, tuple[float, float]]:
    """Mean and sample standard deviation of every number that the results share."""
    keys = [key for key, value in results[0].items() if isinstance(value, float)]
    columns = {key: [float(result[key]) for result in results] for key in keys}
    return {key: (statistics.fmean(c), statistics.stdev(c) if len(c) > 1 else 0.0) for key, c in columns.items()}


_LABELS = {
    "fd_backbone": "FD, backbone prior",
    "fd_prior": "FD, energy-based prior",
    "fd_reconstruction": "FD, reconstructions",
    "gap_closed": "gap closed in FD",
    "fdrec_backbone": "FDrec, backbone prior",
    "fdrec_prior": "FDrec, energy-based prior",
    "fdrec_reconstruction": "FDrec, reconstructions (floor)",
    "gap_closed_rec": "gap closed in FDrec",
    "kid_backbone": "KID, backbone prior",
    "kid_prior": "KID, energy-based prior",
    "kid_reconstruction": "KID, reconstructions",
    "reconstruction_error": "reconstruction error (RMS of a pixel)",
    "spectrum_backbone": "spectrum, backbone prior (dB)",
    "spectrum_prior": "spectrum, energy-based prior (dB)",
    "spectrum_reconstruction": "spectrum, reconstructions (dB)",
    "f_posterior": "mean f, posterior (nats)",
    "f_backbone": "mean f, backbone prior (nats)",
    "f_prior": "mean f, energy-based prior (nats)",
    "gain_nats": "gain (nats)",
    "ess_fraction": "its ESS / draws",
    "tau": "tempering τ",
    "auc_before": "AUC before",
    "auc_after": "AUC after",
    "acceptance": "sampler: acceptance",
    "norm": "sampler: ‖ε‖/√D",
    "resampling_ess_fraction": "sampler: ESS / proposals",
}


def _evaluation(result: Mapping[str, Any]) -> list[Block]:
    """Distances, gap closed, gain and AUC of one prior."""
    held_out = result.get("held_out", True)
    lines: list[Block] = [
        *([f"{result['prior']}"] if "prior" in result else []),
        *_distances(result),
        *_pixels(result),
        f"sampler: {sampler_text(result['sampler'])}; acceptance {result['acceptance']:.2f}, "
        f"‖ε‖/√D {result['norm']:.3f}, ESS / proposals {result['resampling_ess_fraction']:.2f}",
        *filter(None, [refusal_text(result)]),
        f"{'held-out ' * held_out}gain {result['gain_nats']:+.3f} nats at ESS {result['ess_fraction']:.1%} "
        f"(τ = {result['tau']:.3f})",
    ]
    if "f_posterior" in result:
        lines.append(
            f"mean f (nats, larger is more probable): posterior {result['f_posterior']:.2f}, backbone prior "
            f"{result['f_backbone']:.2f}, energy-based prior {result['f_prior']:.2f}"
        )
    if not held_out:
        lines.append("NOT held out: these are the images the prior was trained on")
    if "auc_before" in result:
        groups = result["auc_before_per_group"]
        rows = [["all groups", f"{result['auc_before']:.3f}", f"{result['auc_after']:.3f}"]]
        rows += [[g, f"{groups[g]:.3f}", f"{result['auc_after_per_group'][g]:.3f}"] for g in groups]
        lines += [
            "",
            Table(["AUC, posterior vs prior latents", "before", "after"], rows),
            f"gauge: {result['auc_budget']}",
        ]
    return lines


def _distances(result: Mapping[str, Any]) -> list[Block]:
    """The distances between features of an evaluation that has them, and what was compared."""
    compared = f"{result['samples']:,} samples against {result['held_out_images']:,} images of {result['data']}"
    if "extractor" not in result:
        return [f"{compared}, seed {result['seed']}; no features, hence neither FD nor KID"]
    closed = [f"{result[key]:.1%}" for key in ("gap_closed", "gap_closed_rec")]
    rows = [
        [title, *(f"{result[f'{measure}_{name}']:.4g}" for measure in ("fd", "fdrec", "kid")), *after]
        for title, name, after in (
            ("backbone prior", "backbone", ["", ""]),
            ("energy-based prior", "prior", closed),
            ("reconstructions", "reconstruction", ["", ""]),
        )
    ]
    return [
        Table(["", "FD", "FDrec", "KID", "gap closed FD", "gap closed FDrec"], rows),
        f"features: {result['extractor']}; {compared} (statistics {result['statistics']}), seed {result['seed']}",
    ]


def _pixels(result: Mapping[str, Any]) -> list[Block]:
    """The statistics of pixels and the reconstruction error of an evaluation; nothing for one of an older version."""
    if "pixel_mean_data" not in result:
        return []
    rows = [
        [
            title,
            *(f"{result[f'pixel_{which}_{name}']:.4f}" for which in ("mean", "std")),
            f"{result[f'spectrum_{name}']:.3g}" if f"spectrum_{name}" in result else "",
        ]
        for title, name in (
            ("images", "data"),
            ("backbone prior", "backbone"),
            ("energy-based prior", "prior"),
            ("reconstructions", "reconstruction"),
        )
    ]
    return [
        Table(["pixels in [0, 1]", "mean", "std", "spectrum, from images' (dB)"], rows),
        f"reconstruction error, root mean square of a pixel: {result['reconstruction_error']:.4f}",
    ]


def outlier_tables(results: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> str:
    """One or several results of ood or anomaly as text, each with the files that were written."""
    blocks: list[Block] = []
    for each in [results] if isinstance(results, Mapping) else results:
        blocks += ["", *outlier_blocks(each), *(["", files_written(each)] if "files" in each else [])]
    return text(blocks[1:])


def outlier_blocks(result: Mapping[str, Any]) -> list[Block]:
    """The result of ood or anomaly: one table per set of outliers, with a row per score, with f and without."""
    n = result["images"]
    count = f"{n:,} images of each set" if isinstance(n, int) else f"{n[0]:,} normal and {n[1]:,} anomalous images"
    chance = f", chance level of AUPRC {result['prevalence']:.3f}" if "prevalence" in result else ""
    draws = f"{result['draws']} draw{'s' * (result['draws'] != 1)}"
    lines: list[Block] = [
        f"{count}, {draws} each, seed {result['seed']}, τ = {result['tau']:.3f}{chance}",
    ]
    if any(row["lower"] == "sample" for each in result["sets"] for row in each["rows"]):
        lines.append(f"lower groups, where sampled: {sampler_text(result['sampler'])}")
    if "reference" in result:
        lines.append(
            f"reference for typicality and composite: {result['reference']:,} further images of {result['in']}"
        )
    ap, trapezoid = ("AUPRC", None) if isinstance(n, int) else ("average precision", "AUPRC, trapezoid")
    for each in result["sets"]:
        head = ["score", "mode", "lower groups"]
        head += ["AUROC f = 0", "f", "f − (f = 0), 95 %", f"{ap} f = 0", "f"]
        head += [f"{trapezoid} f = 0", "f"] if trapezoid else ["FPR80 f = 0", "f"]
        last = "auprc_trapezoid" if trapezoid else "fpr80"
        rows = []
        for row in each["rows"]:
            plain, tilted, gain = row["f=0"], row["f"], row["gain"]
            rows.append(
                [
                    f"{row['score']}>{row['k']}",
                    row["mode"],
                    row["lower"] if row["k"] else "",
                    *(f"{which['auroc']:.4f}" for which in (plain, tilted)),
                    f"{gain['auroc']:+.4f} [{gain['low']['auroc']:+.4f}, {gain['high']['auroc']:+.4f}]",
                    *(f"{which['auprc']:.4f}" for which in (plain, tilted)),
                    *(f"{which[last]:.4f}" for which in (plain, tilted)),
                ]
            )
        lines += ["", f"{result['in']} (in), {each['out']} (out)", Table(head, rows)]
    return lines


def doctor_card(result: Mapping[str, Any]) -> str:
    """The doctor's examination as text, the verdict last."""
    *blocks, verdict = doctor_blocks(result)
    return text([*blocks, *textwrap.wrap(str(verdict), 110)])


def doctor_blocks(result: Mapping[str, Any]) -> list[Block]:
    """The doctor's examination as blocks, the verdict last."""
    rows = []
    for row in result["groups"]:
        rows.append(
            [
                row["group"],
                f"{row['kl_nats']:.2f}",
                f"{row['active_units']:,} / {row['units']:,}",
                f"{row['eps_mean_rms']:.3f}",
                f"{row['eps_variance']:.3f}",
                f"{row['std_low']:.3g} to {row['std_high']:.3g}",
                f"{row['auc']:.3f}" if "auc" in row else "",
            ]
        )
    head = ["group (top first)", "KL (nats)", "active units", "ε mean (RMS)", "ε variance", "σ of the prior", "AUC"]
    norms, dropout = result["batch_norms"], result["dropout_layers"]
    lines: list[Block] = [
        f"{result['images']:,} images of {result['data']}, seed {result['seed']}",
        Table(head, rows),
        "where the prior is right, codes have an ε mean of 0 and an ε variance of 1, and an AUC of .5",
    ]
    if "auc" in result:
        lines.append(f"AUC of all groups together: {result['auc']:.3f} ({result['auc_budget']})")
    if "null" in result:
        lines.append(
            "null interval, of AUCs between two samples of the prior: {low:.3f} to {high:.3f} ({pairs} pairs, "
            "every group)".format(**result["null"])
        )
    lines += [
        "not finite: "
        + (", ".join(f"{count:,} in {name}" for name, count in result["not_finite"].items()) or "nothing"),
        f"dropout: {dropout} layers" + (f", at most {result['dropout_largest']:g}" if dropout else ""),
        f"batch norm: {norms} layers"
        + (", running variances from {:.3g} to {:.3g}".format(*result["running_variance"]) if norms else ""),
        f"mode: {'TRAINING' if result['training_mode'] else 'evaluation, dropout and batch statistics off'}",
        "",
        result["verdict"],
    ]
    return lines


def demo_summary(result: Mapping[str, Any]) -> str:
    """The demo's evaluation as text, and its files."""
    lines = [evaluation_tables([result]), "", f"{result['seconds']:.0f} s on {result['cores']} cores. Look at:"]
    return "\n".join([*lines, *(f"  {file}" for file in result["files"])])
