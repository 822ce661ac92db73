"""Results for a person, as blocks: tables and lines. Here they become text; `ebm_prior.web_page` makes HTML of them."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Row = Sequence[str]


class Table(NamedTuple):
    """Cells under their heads; the first column names the row."""

    head: Row
    rows: Sequence[Row]


Block = Table | str  # a string is a line; an empty one sets apart what follows


def text(blocks: Sequence[Block]) -> str:
    """Blocks as they are printed."""
    return "\n".join(table(*block) if isinstance(block, Table) else block for block in blocks)


def table(head: Row, rows: Sequence[Row]) -> str:
    """Columns aligned, the first to the left and the others to the right."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]

    def line(row: Row) -> str:
        cells = (
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        return "  ".join(cells).rstrip()

    return "\n".join([line(head), "  ".join("-" * w for w in widths), *(line(row) for row in rows)])


def evaluation_tables(results: Sequence[Mapping[str, Any]]) -> str:
    """One evaluation in full; of several, the distances of each and their mean and standard deviation."""
    return text(evaluation_blocks(results))


def evaluation_blocks(results: Sequence[Mapping[str, Any]]) -> list[Block]:
    """One evaluation in full; of several, the distances of each and their mean and standard deviation."""
    blocks: list[Block] = []
    for result in results:
        blocks += ["", *_evaluation(result)]
        for card in result.get("published", ()):
            blocks += ["", *fid_card(card)]
    if len(results) > 1:
        rows = [
            [_LABELS.get(k, k), f"{m:.4g}", f"{s:.2g}"] for k, (m, s) in mean_and_sd(results).items() if k in _LABELS
        ]
        blocks += ["", f"mean and standard deviation over {len(results)} priors", Table(["", "mean", "sd"], rows)]
    return blocks[1:]


def fid_card(card: Mapping[str, Any]) -> list[Block]:
    """FID, KID and Inception Score with all that they depend on (never without the backbone's own)."""
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
        f"the energy-based prior by {_sampler(card['sampler'])}",
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
    closed = [f"{result[key]:.1%}" for key in ("gap_closed", "gap_closed_rec")]
    rows = [
        ["backbone prior", *(f"{result[f'{m}_backbone']:.4g}" for m in ("fd", "fdrec", "kid")), "", ""],
        ["energy-based prior", *(f"{result[f'{m}_prior']:.4g}" for m in ("fd", "fdrec", "kid")), *closed],
        ["reconstructions", *(f"{result[f'{m}_reconstruction']:.4g}" for m in ("fd", "fdrec", "kid")), "", ""],
    ]
    lines: list[Block] = [
        *([f"{result['prior']}"] if "prior" in result else []),
        Table(["", "FD", "FDrec", "KID", "gap closed FD", "gap closed FDrec"], rows),
        f"features: {result['extractor']}; {result['samples']:,} samples against {result['held_out_images']:,} images "
        f"of {result['data']} (statistics {result['statistics']}), seed {result['seed']}",
        f"sampler: {_sampler(result['sampler'])}; acceptance {result['acceptance']:.2f}, ‖ε‖/√D {result['norm']:.3f}, "
        f"ESS / proposals {result['resampling_ess_fraction']:.2f}",
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


def outlier_tables(result: Mapping[str, Any]) -> str:
    """How well every score tells the outliers, and where the results are."""
    return text([*outlier_blocks(result), *(["", files_written(result)] if "files" in result else [])])


def outlier_blocks(result: Mapping[str, Any]) -> list[Block]:
    """How well every score tells the outliers, with f and without, one table per set."""
    n = result["images"]
    count = f"{n:,} images of each set" if isinstance(n, int) else f"{n[0]:,} normal and {n[1]:,} anomalous images"
    chance = f", chance level of AUPRC {result['prevalence']:.3f}" if "prevalence" in result else ""
    lines: list[Block] = [
        f"{count}, {result['draws']} draws each, seed {result['seed']}, τ = {result['tau']:.3f}{chance}",
        f"lower groups, where sampled: {_sampler(result['sampler'])}",
    ]
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


def files_written(result: Mapping[str, Any]) -> str:
    """Where the results are."""
    return f"wrote {', '.join(result['files'])}"


def doctor_card(result: Mapping[str, Any]) -> str:
    """What the doctor found, the verdict last."""
    *blocks, verdict = doctor_blocks(result)
    return text([*blocks, *textwrap.wrap(str(verdict), 110)])


def doctor_blocks(result: Mapping[str, Any]) -> list[Block]:
    """What the doctor found, the verdict last."""
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
    """The demo's table, and where to look."""
    lines = [evaluation_tables([result]), "", f"{result['seconds']:.0f} s on {result['cores']} cores. Look at:"]
    return "\n".join([*lines, *(f"  {file}" for file in result["files"])])


def fit_summary(result: Mapping[str, Any]) -> str:
    """What a fit gave, and what to do next."""
    count = result["parameters"]
    return text(
        [
            *fit_blocks(result),
            f"{result['cpu_seconds']:.0f} CPU-seconds; heads {count['heads']:,} parameters, {count['ratio']:.1%} of "
            "the backbone's",
            f"sampler: {_sampler(result['sampler'])}",
            f"wrote {result['prior']} and {result['picture']}",
            f"next: ebm-prior sample {result['prior']} --out samples.png",
        ]
    )


def fit_blocks(record: Mapping[str, Any]) -> list[Block]:
    """What a second stage gave, out of its prior's record."""
    plain, tempered = record["held_out"]["plain"], record["held_out"]["tempered"]
    rows = [
        ["f as trained", f"{plain['nats']:+.3f}", f"{plain['ess_fraction']:.1%}", "1"],
        ["tempered", f"{tempered['nats']:+.3f}", f"{tempered['ess_fraction']:.1%}", f"{tempered['tau']:.3f}"],
    ]
    return [
        Table(["held-out", "gain (nats)", "ESS / draws", "τ"], rows),
        *([_ratios(record)] if "stages" in record else []),
        f"iteration {record['best_iteration']} of {record['iterations']} kept, {record['rollbacks']} roll-backs",
    ]


def _ratios(record: Mapping[str, Any]) -> str:
    """What the heads were trained on, and why."""
    stages, saturated = record["stages"], record["saturated"]
    if stages is None:
        return "maximum likelihood by chains, as asked"
    if not stages and record["config"]["ratios"] == "staged":
        return "staged density ratios, as asked: none has brought a gain"
    if not stages:
        narrow = record.get("narrow", False)  # files from before 26 November 2026 do not say
        return "one density ratio, " + ("saturated: stages go further" if narrow else "which does not saturate")
    why = "as asked"
    if saturated:
        why = "one saturates (ESS {ess_fraction:.1%} after {iteration} iterations)".format(**saturated)
    sums = "their gains add up, less what the ceiling costs, and their least ESS is the one above"
    return f"{len(stages)} staged density ratios, {why}; {sums}"


def sample_summary(result: Mapping[str, Any]) -> str:
    """What was drawn and where it is."""
    return (
        f"{result['samples']} samples, {_sampler(result['sampler'])}; acceptance {result['acceptance']:.2f}, "
        f"‖ε‖/√D {result['norm']:.3f}, ESS / proposals {result['ess_fraction']:.2f}\nwrote {', '.join(result['files'])}"
    )


def pretrain_summary(result: Mapping[str, Any]) -> str:
    """What a first stage gave."""
    elbo = result["test_elbo"]
    measured = "no test ELBO: the data have no test split"
    if elbo is not None:
        bits = result["bits_per_dimension"]
        shown = f"{elbo['elbo']:.2f} nats" + ("" if bits is None else f", {bits:.3f} bits per dimension")
        measured = (
            f"one-sample test ELBO {shown} (log-likelihood {elbo['log_likelihood']:.2f}; KL, top group first: "
            f"{', '.join(f'{value:.2f}' for value in elbo['kl'])})"
        )
    return (
        f"{measured}; {result['parameters']:,} parameters, {result['cpu_seconds'] / 60:.1f} CPU-minutes\n"
        f"wrote {result['backbone']}"
    )


def train_summary(result: Mapping[str, Any]) -> str:
    """What joint training gave."""
    found, count = result["validation"], result["parameters"]
    return (
        f"one-sample ELBO {found['elbo']:.2f} nats (log-likelihood {found['reconstruction']:.2f}, KL "
        f"{found['kl']:.2f}, gain of f {found['gain']:+.3f} at an ESS of {found['ess_fraction']:.1%})\n"
        f"{count['backbone']:,} parameters, the heads {count['heads']:,} more ({count['ratio']:.1%}); "
        f"{result['cpu_seconds'] / 60:.1f} CPU-minutes\n"
        f"wrote {result['backbone']} and {result['prior']}"
    )


def prior_card(record: Mapping[str, Any]) -> str:
    """What a prior file says of itself, as text."""
    return text(prior_blocks(record))


def prior_blocks(record: Mapping[str, Any]) -> list[Block]:
    """What a prior file says of itself."""
    backbone, training = record["backbone"], record["record"]
    heads = sum(record["heads"].values())
    rows = [
        [name, "×".join(map(str, shape)), f"{record['heads'].get(name, 0):,}"] for name, shape in backbone["groups"]
    ]
    if "joint" in record["heads"]:
        rows.append(["joint head", "all groups", f"{record['heads']['joint']:,}"])
    ceiling = f", f at most {record['ceiling']:.4g} nats" if record.get("ceiling") is not None else ""
    lines: list[Block] = [
        f"energy-based prior, {record['regime']}, τ = {record['tau']:.4g}{ceiling}, written by ebm-prior "
        f"{record['library']}",
        f"backbone: {backbone['adapter']}, {backbone['checkpoint']}, fingerprint {backbone['fingerprint'][:12]}",
        f"parameters: backbone {backbone['parameters']:,}, heads {heads:,} ({heads / backbone['parameters']:.1%})",
        Table(["group (top first)", "shape", "head parameters"], rows),
        f"sampler: {_sampler(record['sampler'])}",
    ]
    if "bn_readjust" in training:
        lines.append(
            "batch norms of the backbone re-adjusted: {iterations} batches of {batch_size} samples at temperature "
            "{temperature:g}, seed {seed}".format(**training["bn_readjust"])
        )
    if "held_out" in training:  # a library user may record anything
        gain = training["held_out"]["tempered"]
        lines.append(
            f"trained on {training['data']['name']}: {training['config']['objective']}, {training['iterations']} "
            f"iterations (kept: {training['best_iteration']}), held-out gain {gain['nats']:+.3f} nats at ESS "
            f"{gain['ess_fraction']:.1%}"
        )
    return lines


def backbone_card(described: Mapping[str, Any]) -> str:
    """A backbone's groups, parameter counts, the plain values of its architecture, and what is known of its making."""
    count, paper = described["parameters"], described["parameters_paper"]
    rows = [[name, "×".join(map(str, shape))] for name, shape in described["groups"]]
    return "\n".join(
        [
            f"{described['class']}, images {'×'.join(map(str, described['image_shape']))}, fingerprint "
            f"{described['fingerprint'][:12]}",
            f"parameters: backbone {count['backbone']:,}, default heads {count['heads']:,} ({count['ratio']:.1%}), "
            f"heads of --preset paper {paper['heads']:,} ({paper['ratio']:.1%})",
            *_architecture(described["architecture"]),
            *_making(described["record"]),
            table(["group (top first)", "shape"], rows),
        ]
    )


def _architecture(options: Mapping[str, Any]) -> list[str]:
    plain = {
        name: " ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
        for name, value in options.items()
        if isinstance(value, (str, int, float)) or (name != "image_shape" and _plain_list(value))
    }
    return [f"architecture: {', '.join(f'{name} {value}' for name, value in plain.items())}"] if plain else []


def _plain_list(value: object) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(v, (str, int, float)) for v in value)


def _making(record: Mapping[str, Any]) -> list[str]:
    data, config, elbo = (record.get(key) or {} for key in ("data", "config", "test_elbo"))
    said = [
        *([f"trained on {data['name']}"] if "name" in data else []),
        *([f"{config['iterations']:,} steps of batch {config['batch_size']}"] if "batch_size" in config else []),
        *([f"test ELBO {elbo['elbo']:.2f} nats"] if elbo else []),
        *(["batch norms re-adjusted"] if "bn_readjust" in record else []),
    ]
    return [", ".join(said)] if said else []


def backbone_list(listed: Mapping[str, Any]) -> str:
    """Adapters and bundled backbones."""
    adapters = [[row["adapter"], row["class"]] for row in listed["adapters"]]
    trained = [[row["name"], row["adapter"], str(row["data"])] for row in listed["bundled"]]
    broken = [row["error"] for row in listed["adapters"] if "error" in row]
    tables = [table(["adapter", "class"], adapters), table(["bundled", "adapter", "data"], trained)]
    return "\n\n".join(["\n".join([tables[0], *broken]), tables[1]])


def _sampler(sampler: Mapping[str, Any]) -> str:
    parts = []
    if sampler["proposals"] > 1:
        parts.append(f"resampling among {sampler['proposals']} draws")
    if sampler["steps"]:
        leapfrogs = sampler.get("leapfrogs", 1)  # older priors do not know several
        each = f" of {leapfrogs} leapfrogs" if leapfrogs > 1 else ""
        parts.append(f"{sampler['steps']} steps{each} of {sampler['kernel']} at step size {sampler['step_size']:g}")
    return ", then ".join(parts) or "ancestral draws"
