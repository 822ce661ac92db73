"""Checks of the JSON results of eval, ood and doctor, from which a report is made; they may come from anywhere."""

from __future__ import annotations

from typing import Any

from ebm_prior.model.scores import DERIVED, LOWERS, MODES
from ebm_prior.storage.records import (
    Check,
    InvalidError,
    anything,
    either,
    fields,
    flag,
    listed,
    mapping,
    measured,
    one_of,
    text,
    whole,
)

COUNT = whole(0, 10**15)
SEED = whole(0, 10**300)
SAMPLER = fields(
    {"proposals": COUNT, "steps": COUNT, "kernel": text(), "step_size": measured, "temperature": measured},
    {"leapfrogs": COUNT, "adapt_steps": COUNT, "norm_limit": measured, "by_group": flag},
)
_DISTANCES = fields({"fid": measured, "kid": measured}, {"inception_score": measured, "inception_score_sd": measured})
CARD = fields(
    {
        "distance": text(),
        "official": flag,
        "mode": text(),
        "weights": text(),
        "samples": COUNT,
        "sampler": SAMPLER,
        "seed": SEED,
        "reference": fields({"images": COUNT, "data": text(), "split": text()}),
        "statistics": text(),
        "statistics_file": text(),
        "kid_rows": COUNT,
        "splits": COUNT,
        "backbone": _DISTANCES,
        "prior": _DISTANCES,
    }
)
_INTERVAL = fields(dict.fromkeys(("difference", "low", "high"), measured))
_EVALUATED = ("backbone", "prior", "reconstruction")
_DISTANCE_NAMES = tuple(f"{distance}_{of}" for distance in ("fd", "fdrec", "kid") for of in _EVALUATED)
FEATURES = (*_DISTANCE_NAMES, "gap_closed", "gap_closed_rec", "extractor", "statistics")  # without any: left out
PIXELS = (
    *(f"pixel_{which}_{of}" for which in ("mean", "std") for of in ("data", *_EVALUATED)),
    "reconstruction_error",
)
EVALUATION = fields(
    {
        **dict.fromkeys(
            ("acceptance", "norm", "resampling_ess_fraction", "gain_nats", "ess_fraction", "tau"), measured
        ),
        "data": text(),
        **dict.fromkeys(("samples", "held_out_images"), COUNT),
        "seed": SEED,
        "sampler": SAMPLER,
    },
    {
        **dict.fromkeys((*_DISTANCE_NAMES, "gap_closed", "gap_closed_rec"), measured),
        **dict.fromkeys(("extractor", "statistics"), text()),
        **dict.fromkeys((*PIXELS, *(f"spectrum_{of}" for of in _EVALUATED)), measured),
        "published": listed(CARD),
        "paired": fields({"with": text(), "gain_nats": _INTERVAL}, {"fd_prior": _INTERVAL}),
        "prior": text(),
        "command": text(),
        "held_out": flag,
        **dict.fromkeys(("restarted", "beyond_limit"), COUNT),
        **dict.fromkeys(("f_posterior", "f_backbone", "f_prior", "auc_before", "auc_after"), measured),
        "auc_before_per_group": mapping(measured),
        "auc_after_per_group": mapping(measured),
        "auc_budget": text(),
        "sampled_by": text(),
    },
)
_QUALITY = {"auroc": measured, "auprc": measured}
_MEASURES = fields(_QUALITY, {"fpr80": measured, "auprc_trapezoid": measured})
ROW = fields(
    {
        "score": text(),
        "k": COUNT,
        "mode": one_of(*MODES, *DERIVED),
        "lower": either(one_of(*LOWERS), measured),  # none where no group is drawn
        "f=0": _MEASURES,
        "f": _MEASURES,
        "gain": fields({"auroc": measured, "low": fields({"auroc": measured}), "high": fields({"auroc": measured})}),
    }
)
OUTLIERS = fields(
    {
        "images": either(COUNT, listed(COUNT, 2, 2)),
        "draws": COUNT,
        "seed": SEED,
        "tau": measured,
        "sampler": SAMPLER,
        "in": text(),
        "sets": listed(fields({"out": text(), "rows": listed(ROW)}), 1),
    },
    {"prevalence": measured, "reference": COUNT, "command": text(), "files": listed(text())},
)
GROUP = fields(
    {
        "group": text(),
        "kl_nats": measured,
        "active_units": COUNT,
        "units": COUNT,
        **dict.fromkeys(("eps_mean_rms", "eps_variance", "std_low", "std_high"), measured),
    },
    {"auc": measured},
)
DIAGNOSIS = fields(
    {
        "verdict": text(),
        "groups": listed(GROUP, 1),
        "images": COUNT,
        "data": text(),
        "seed": SEED,
        "not_finite": mapping(COUNT),
        "batch_norms": COUNT,
        "dropout_layers": COUNT,
        "dropout_largest": measured,
        "running_variance": anything,
        "training_mode": flag,
    },
    {
        "auc": measured,
        "auc_budget": text(),
        "command": text(),
        "null": fields(dict.fromkeys(("low", "high", "mean"), measured) | {"pairs": COUNT}),
    },
)


def _together(keys: tuple[str, ...], check: Check) -> Check:
    """A check that either all of the entries `keys` are present or none."""

    def checked(value: Any, where: str) -> Any:
        found = check(value, where)
        there = [key for key in keys if key in found]
        if there and len(there) < len(keys):
            raise InvalidError(where, ", ".join(keys), there)
        return found

    return checked


def _evaluation(value: Any, where: str) -> Any:
    found = _together(("f_posterior", "f_backbone", "f_prior"), EVALUATION)(value, where)
    auc = ("auc_before", "auc_after", "auc_before_per_group", "auc_after_per_group", "auc_budget")
    for keys in (auc, FEATURES, PIXELS, ("restarted", "beyond_limit")):
        found = _together(keys, lambda value, where: value)(found, where)
    if "auc_before" in found and set(found["auc_before_per_group"]) != set(found["auc_after_per_group"]):
        raise InvalidError(where, "an AUC of each group before and after", found["auc_after_per_group"])
    for card in found.get("published", ()):
        for which in ("backbone", "prior"):
            _together(("inception_score", "inception_score_sd"), lambda value, where: value)(card[which], where)
    return found


def _outliers(value: Any, where: str) -> Any:
    found = OUTLIERS(value, where)
    last = "fpr80" if isinstance(found["images"], int) else "auprc_trapezoid"
    for each in found["sets"]:
        for row in each["rows"]:
            for which in ("f=0", "f"):
                fields({last: measured})(row[which], f"{where}.sets")
    return found


def _diagnosis(value: Any, where: str) -> Any:
    found = _together(("auc", "auc_budget"), DIAGNOSIS)(value, where)
    if found["batch_norms"]:
        listed(measured, 2, 2)(found["running_variance"], f"{where}.running_variance")
    return found


RESULTS: dict[str, Check] = {
    "eval": listed(_evaluation, 1),
    "ood": listed(_outliers, 1),
    "doctor": listed(_diagnosis, 1, 1),
}
"""For each command, the check of its JSON results as a list."""
