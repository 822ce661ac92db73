"""Fits of milliseconds, by either objective."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from listener import Listener
from workshop import SMALL_FIT, Workshop

from ebm_prior.data.images import ImageSource
from ebm_prior.model.backbone import Backbone
from ebm_prior.model.energy import EnergyConfig
from ebm_prior.model.samplers import SamplerChanges, SamplerConfig
from ebm_prior.runs.fit import fit_into
from ebm_prior.training.fit_config import FitConfig
from ebm_prior.training.stages import StageConfig

CHAIN = SamplerConfig(proposals=1, kernel="langevin", steps=3, step_size=0.02)


def small(**changes: Any) -> FitConfig:
    energy, sampler = EnergyConfig(**SMALL_FIT["energy"]), SamplerChanges(**SMALL_FIT["sampler"])
    return FitConfig(**(SMALL_FIT | {"energy": energy, "sampler": sampler} | changes))


STAGE = StageConfig(particles=12, held_out=8, every=1, ess=0.99)
OBJECTIVES = {
    "nce": small(iterations=8),
    "staged": small(iterations=8, ratios="staged", stage=STAGE),
    "groupwise": small(iterations=8, ratios="groupwise"),
    "mle": replace(small(iterations=8), objective="mle", chains="persistent", chain=CHAIN, refresh=0.3),
}
SATURATING = small(
    iterations=24, ess_floor=0.9999, learning_rate=2e-2, ema=0.0, stage=STAGE
)  # with courses.SATURATED_SHARE = 1


def into(
    out: Path, workshop: Workshop, backbone: Backbone, images: ImageSource, config: FitConfig, **how: Any
) -> bytes:
    if "on_step" in how:
        how["progress"] = Listener(how.pop("on_step"))
    fit_into(out, backbone, images, config, checkpoint=str(workshop.backbone), **how)
    return (out / "prior.safetensors").read_bytes()
