"""Whether chains have mixed, in words and tables (`ebm-prior sample --diagnose`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ebm_prior.model.mixing import FEWEST_TIMES, LARGEST_R_HAT
from ebm_prior.model.traces import Diagnosis
from ebm_prior.reports.summaries import sample_summary
from ebm_prior.reports.text import Block, Table, text


def as_plain(found: Diagnosis) -> dict[str, Any]:
    """A diagnosis as plain values."""
    mixing = {name: each._asdict() for name, each in found.mixing.items()}
    return {"chains": found.chains, "steps": found.steps, "quantities": mixing}


def sample_text(result: Mapping[str, Any]) -> str:
    """The result of `sample` as text, with the diagnosis of its chains if there is one."""
    blocks: list[Block] = [*(mixing_blocks(result["mixing"]) if "mixing" in result else []), sample_summary(result)]
    return text(blocks)


def mixing_blocks(found: Mapping[str, Any]) -> list[Block]:
    """A diagnosis: one row per quantity."""
    rows = [
        [name, f"{each['r_hat']:.3f}", f"{each['bulk_ess']:.0f}", f"{each['tail_ess']:.0f}", f"{each['time']:.1f}"]
        for name, each in found["quantities"].items()
    ]
    return [
        f"{found['chains']} chains of {found['steps']} steps, after the choice among the proposals",
        Table(["quantity", "split R̂", "bulk ESS", "tail ESS", "autocorrelation time (steps)"], rows),
    ]


def remark(found: Diagnosis) -> str:
    """A line that says why chains are not known to mix, by the slowest quantity; empty where nothing says so."""
    if not found.unmixed:
        return ""
    slowest = found.mixing[found.unmixed[0]]
    return (
        f"chains of {found.steps} steps do not show that they mix, in {len(found.unmixed)} of {len(found.mixing)} "
        f"quantities. The slowest is {found.unmixed[0]}: R̂ {slowest.r_hat:.2f} (should be at most {LARGEST_R_HAT}), "
        f"{found.steps / slowest.time:.1f} autocorrelation times (should be {FEWEST_TIMES}). --steps auto chooses more"
    )
