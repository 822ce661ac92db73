"""The result of `ebm-prior likelihood` in words: what is bounded, how surely, and where nothing is claimed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ebm_prior.model.bounds import OPEN
from ebm_prior.reports.text import Block, Table, text

_NAMES = {"elbo": "ELBO", "iw": "importance-weighted bound"}


def likelihood_text(result: Mapping[str, Any]) -> str:
    """The result as text: see `likelihood_blocks`."""
    return text(likelihood_blocks(result))


def likelihood_blocks(result: Mapping[str, Any]) -> list[Block]:
    """Bounds on log Z; then bounds on log p(x) per image, with f and without, and their gains."""
    z, f = result["log_z"], result["f_posterior"]
    head = ["mean over images, nats", "at log Z's bounds", "95 % interval"]
    unit = 1.0 if result["dimensions"] is None else result["dimensions"] * math.log(2)
    head += [] if result["dimensions"] is None else ["bits per dimension (gain: fewer)"]
    rows = []
    for key, name in _NAMES.items():
        name = f"{name}, K = {result['draws']}" if key == "iw" else name
        for which, label in (("f=0", f"{name}, f = 0"), ("f", f"{name}, with f"), ("gain", f"gain of the {name}")):
            rows.append(_row(label, result[key][which], unit, head))
    return [
        f"{result['images']:,} images of {result['data']}, {result['draws']} posterior draws each, seed "
        f"{result['seed']}, τ = {result['tau']:.3f}",
        "",
        *_log_z(z),
        "",
        f"E_q[f] = {f['nats']:.3f} nats (95 % interval over images {f['low']:.3f} to {f['high']:.3f})",
        Table(head, rows),
        "the gain of the importance-weighted bound is a difference of two lower bounds",
        *["", *_doubts(z)] * bool(_doubts(z)),
    ]


def _log_z(z: Mapping[str, Any]) -> list[Block]:
    rows = [
        ["lower bound", f"{z['lower']:+.3f}", f"{z['lower_error']:.3f}", f"{z['low']:+.3f}"],
        ["upper bound", f"{z['upper']:+.3f}", f"{z['upper_error']:.3f}", f"{z['high']:+.3f}"],
    ]
    lines: list[Block] = [
        Table(["log Z (nats)", "mean", "standard error", "97.5 % limit"], rows),
        f"{z['repetitions']} repetitions of {z['chains']} chains in each direction, {z['rungs']} steps of τ, "
        f"{z['leapfrogs']} leapfrogs a move, acceptance {z['acceptance']:.2f}",
        "log weights of single chains: standard deviation {:.2f} nats upwards, {:.2f} downwards".format(*z["spread"]),
        f"the upper bound's chains: {z['moves']} moves at τ = 1, in whose second half f drifted by "
        f"{_difference(z['drift'])} nats",
    ]
    if z["apart"] is not None:
        lines.append(
            f"those begun at posterior latents end with an f that is higher by {_difference(z['apart'])} nats than "
            "those begun at annealed draws"
        )
    return lines


def _doubts(z: Mapping[str, Any]) -> list[str]:
    """Why nothing is claimed; nothing where the bounds are closed and no doubt was found."""
    doubts = []
    gap = z["upper"] - z["lower"]
    if gap > OPEN:
        doubts.append(
            f"the bounds on log Z differ by {gap:.2f} nats, more than {OPEN:g}: more --annealing-chains, or an "
            "--annealing-ess nearer to 1, bring them closer"
        )
    if gap < -OPEN:
        doubts.append(f"the upper bound lies {-gap:.2f} nats below the lower one: its chains have not settled")
    if not z["settled"]:
        doubts.append("f differs by more than 3 standard errors where it should not: use more --annealing-moves")
    return [f"NO CLAIM on the likelihood: {'; '.join(doubts)}"] if doubts else []


def _difference(found: Mapping[str, Any]) -> str:
    return f"{found['nats']:+.3f} ± {found['error']:.3f}"


def _row(label: str, values: Mapping[str, float], unit: float, head: Sequence[str]) -> list[str]:
    """A row of the table: in nats, and in bits per dimension if `head` has the column; `unit`: nats for each bit."""
    gain, pair = label.startswith("gain"), "at_upper" in values
    sign, ends = "+" if gain else "", [values["at_upper"], values["at_lower"]] if pair else [values["nats"]]
    row = [
        label,
        " to ".join(f"{end:{sign}.3f}" for end in ends),
        f"{values['low']:{sign}.3f} to {values['high']:{sign}.3f}",
    ]
    if len(head) > len(row):
        row.append(" to ".join(f"{(end if gain else -end) / unit:{sign}.4f}" for end in ends))
    return row
