"""Results of training and sampling, and descriptions of files, for a person: blocks of tables and lines, or text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ebm_prior.reports.text import Block, Table, table
from ebm_prior.reports.text import text as as_text
from ebm_prior.storage.records import FIT_SUMMARY, READJUSTMENT, fields, keeps_to, listed, measured, text, whole

_OPTIMISM = (
    "the held-out images have also chosen iteration, τ and ceiling, which can flatter the gain: `ebm-prior likelihood` "
    "bounds it on others"
)


def files_written(result: Mapping[str, Any]) -> str:
    """The line that says which files were written."""
    return f"wrote {', '.join(result['files'])}"


def fit_summary(result: Mapping[str, Any]) -> str:
    """The result of a fit as text, and the command to go on with."""
    count = result["parameters"]
    return as_text(
        [
            *fit_blocks(result),
            *([_OPTIMISM] if result["config"]["regime"] == "calibrated" else []),
            f"{result['cpu_seconds']:.0f} CPU-seconds{_of_refiner(result)}; heads {count['heads']:,} parameters, "
            f"{count['ratio']:.1%} of the backbone's",
            f"sampler: {sampler_text(result['sampler'])}",
            *_said_of_roles(result),
            f"wrote {result['prior']} and {result['picture']}",
            f"next: ebm-prior sample {result['prior']} --out samples.png",
        ]
    )


def _of_refiner(result: Mapping[str, Any]) -> str:
    """The time that the refiner of a fit took, where one was fitted."""
    return f" and {result['refiner']['cpu_seconds']:.0f} for the refiner" if "refiner" in result else ""


def _said_of_roles(result: Mapping[str, Any]) -> list[str]:
    """What each role of a fitted prior is for; for a deep hierarchy without a refiner, how to add one."""
    if "roles" in result:
        return _what_for(result["sampled_by"] == "refiner", result["roles"])
    none_tried = "refine" not in result["config"] and not result.get("saturated")  # after which one follows by itself
    if (result["stages"] or result.get("groups")) and none_tried:
        return ["for nearer samples, add a refiner: the same command with --resume --refine 900"]
    return []


def fit_blocks(record: Mapping[str, Any]) -> list[Block]:
    """The result of a fit as blocks, from the record of its prior."""
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
    """Which density ratios the heads were trained on, and the reason for it."""
    stages, saturated = record["stages"], record["saturated"]
    if groups := record.get("groups"):
        furthest, taus = max(groups, key=lambda group: abs(group["log_z"])), [group["tau"] for group in groups]
        return (
            f"{len(groups)} groupwise density ratios, as asked: their gains add up, and their least ESS, of annealed "
            f"weights, is the one above; τ of each from {min(taus):.2f} to {max(taus):.2f}, log Z before it was set to "
            f"0 at most {furthest['log_z']:+.3f} ± {furthest['log_z_error']:.3f} ({furthest['name']})"
        )
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
    """The result of sampling as text: number, sampler, diagnostics, files."""
    return (
        f"{result['samples']} samples, {sampler_text(result['sampler'])}; acceptance {result['acceptance']:.2f}, "
        f"‖ε‖/√D {result['norm']:.3f}, ESS / proposals {result['ess_fraction']:.2f}\nwrote {', '.join(result['files'])}"
    )


def refusal_text(result: Mapping[str, Any]) -> str:
    """How many chains of `sample` or `eval` began anew, or an empty text where none did."""
    if not result.get("restarted"):
        return ""
    beyond = result.get("beyond_limit", 0)
    kept = f"; {beyond:,} left it each time, and the nearest to it is kept" if beyond else ""
    return f"{result['restarted']:,} of {result['samples']:,} chains left the typical set and began anew{kept}"


def pretrain_summary(result: Mapping[str, Any]) -> str:
    """The result of pretraining as text."""
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
    """The result of joint training as text."""
    found, count = result["validation"], result["parameters"]
    heads = f"the heads {count['heads']:,} more ({count['ratio']:.1%})" if count["heads"] else "no energy"
    return (
        f"one-sample ELBO {found['elbo']:.2f} nats (log-likelihood {found['reconstruction']:.2f}, KL "
        f"{found['kl']:.2f}, gain of f {found['gain']:+.3f} at an ESS of {found['ess_fraction']:.1%})\n"
        f"{count['backbone']:,} parameters, {heads}; {result['cpu_seconds'] / 60:.1f} CPU-minutes\n"
        f"wrote {result['backbone']} and {result['prior']}"
    )


def prior_card(record: Mapping[str, Any]) -> str:
    """The record of a prior file as text."""
    return as_text(prior_blocks(record))


def prior_blocks(record: Mapping[str, Any]) -> list[Block]:
    """The record of a prior file, with "heads" (see `head_parameters`), as blocks."""
    backbone, training = record["backbone"], record["record"]
    heads = sum(record["heads"].values())
    rows = [
        [name, "×".join(map(str, shape)), f"{record['heads'].get(name, 0):,}"] for name, shape in backbone["groups"]
    ]
    if "shared" in record["heads"]:
        rows.append(["shared heads", "groups of one shape", f"{record['heads']['shared']:,}"])
    if "joint" in record["heads"]:
        rows.append(["joint head", "all groups", f"{record['heads']['joint']:,}"])
    if "refiner" in record:
        rows.append(["refiner", "all groups", f"{record['heads']['refiner']:,}"])
    ceiling = f", f at most {record['ceiling']:.4g} nats" if record.get("ceiling") is not None else ""
    lines: list[Block] = [
        f"energy-based prior, {record['regime']}, τ = {record['tau']:.4g}{ceiling}, written by ebm-prior "
        f"{record['library']}",
        f"backbone: {backbone['adapter']}, {backbone['checkpoint']}, fingerprint {backbone['fingerprint'][:12]}",
        f"parameters: backbone {backbone['parameters']:,}, heads {heads:,} ({heads / backbone['parameters']:.1%})",
        Table(["group (top first)", "shape", "head parameters"], rows),
        *_roles(record),
    ]
    if keeps_to(READJUSTMENT, training.get("bn_readjust")):
        lines.append(
            "batch norms of the backbone re-adjusted: {iterations} batches of {batch_size} samples at temperature "
            "{temperature:g}, seed {seed}".format(**training["bn_readjust"])
        )
    if keeps_to(FIT_SUMMARY, training):  # a library user may record anything
        gain = training["held_out"]["tempered"]
        lines.append(
            f"trained on {training['data']['name']}: {training['config']['objective']}, {training['iterations']} "
            f"iterations (kept: {training['best_iteration']}), held-out gain {gain['nats']:+.3f} nats at ESS "
            f"{gain['ess_fraction']:.1%}"
        )
    return lines


def _roles(record: Mapping[str, Any]) -> list[str]:
    """The sampler of a prior file, or where it holds a refiner what each of the two does."""
    told = _what_for("refiner" in record, record["record"].get("roles"))
    told += _choice_of_steps(record.get("refiner", record)["record"].get("steps"))
    if "refiner" not in record:
        return [f"sampler: {sampler_text(record['sampler'])}", *told]
    return [
        f"sampler of the refiner: {sampler_text(record['refiner']['sampler'])}",
        f"sampler of the calibrated f: {sampler_text(record['sampler'])}",
        *told,
    ]


_ROLES = fields({"calibrated": measured, "refiner": measured, "images": whole()})
_TRIED = fields({"tried": listed(fields({"steps": whole(), "distance": measured}), 1, 3), "images": whole()})


def _what_for(refined: bool, roles: Any) -> list[str]:
    """What each role is for, and how near the samples of both came to held-out images.

    refined: whether the refiner draws the samples. Nothing is said of a prior that has one role and a `roles` without
    figures.
    """
    compared = ""
    if keeps_to(_ROLES, roles):
        compared = (
            f" (distance to {roles['images']:,} held-out reconstructions: refiner {roles['refiner']:.3g}, calibrated "
            f"{roles['calibrated']:.3g})"
        )
    if refined:
        return [f"the refiner draws the samples{compared}; the calibrated f gives scores, gain and log Z"]
    return [f"the calibrated f does everything: a refiner's samples were no nearer{compared}"] if compared else []


def _choice_of_steps(steps: Any) -> list[str]:
    """How near a refiner's samples came to held-out images after several numbers of steps, where that was measured."""
    if not keeps_to(_TRIED, steps):
        return []
    found = ", ".join(f"{each['steps']} steps {each['distance']:.3g}" for each in steps["tried"])
    return [f"number of steps chosen by the distance to {steps['images']:,} held-out reconstructions: {found}"]


def backbone_card(described: Mapping[str, Any]) -> str:
    """A description of a backbone (see `describe_backbone`) as text."""
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


_DATA = fields({"name": text()})
_STEPS = fields({"iterations": whole(), "batch_size": whole()})
_ELBO = fields({"elbo": measured})


def _making(record: Mapping[str, Any]) -> list[str]:
    data, config, elbo = (
        record[key] if keeps_to(check, record.get(key)) else {}
        for key, check in (("data", _DATA), ("config", _STEPS), ("test_elbo", _ELBO))
    )
    said = [
        *([f"trained on {data['name']}"] if "name" in data else []),
        *([f"{config['iterations']:,} steps of batch {config['batch_size']}"] if "batch_size" in config else []),
        *([f"test ELBO {elbo['elbo']:.2f} nats"] if elbo else []),
        *(["batch norms re-adjusted"] if "bn_readjust" in record else []),
    ]
    return [", ".join(said)] if said else []


def backbone_list(listed: Mapping[str, Any]) -> str:
    """Adapters, bundled backbones and bundled priors."""
    adapters = [[row["adapter"], row["class"]] for row in listed["adapters"]]
    trained = [[row["name"], row["adapter"], str(row["data"])] for row in listed["bundled"]]
    broken = [row["error"] for row in listed["adapters"] if "error" in row]
    priors = [[row["name"], row["backbone"], f"{row['gain']:+.2f} nats"] for row in listed["priors"]]
    return "\n\n".join(
        [
            "\n".join([table(["adapter", "class"], adapters), *broken]),
            table(["bundled backbone", "adapter", "data"], trained),
            table(["bundled prior", "on backbone", "held-out gain"], priors),
        ]
    )


def sampler_text(sampler: Mapping[str, Any]) -> str:
    """A sampler in words."""
    parts = []
    if sampler["proposals"] > 1:
        parts.append(f"resampling among {sampler['proposals']} draws")
    if sampler["steps"]:
        leapfrogs = sampler.get("leapfrogs", 1)  # older priors do not know several
        each = f" of {leapfrogs} leapfrogs" if leapfrogs > 1 else ""
        limit = sampler.get("norm_limit", 0.0)
        again = f", anew where ‖ε‖/√D ends above {limit:.3f}" if limit else ""
        adapting = min(sampler.get("adapt_steps", 0), sampler["steps"])  # results need not say
        adapted = f", adapted in the first {adapting}" if adapting else ""
        size = f"{sampler['step_size']:g}{adapted}"
        parts.append(f"{sampler['steps']} steps{each} of {sampler['kernel']} at step size {size}{again}")
    by_group = "group by group: " if sampler.get("by_group") and parts else ""  # older priors do not know this
    return by_group + ", then ".join(parts) or "ancestral draws"
