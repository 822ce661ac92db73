"""Records in words."""

from __future__ import annotations

from dataclasses import asdict

from ebm_prior.model.samplers import SamplerConfig
from ebm_prior.reports.summaries import sampler_text
from ebm_prior.training.fit_config import GROUPWISE_SAMPLER


def test_a_sampler_says_how_its_step_size_comes_about() -> None:
    kept = "resampling among 32 draws, then 40 steps of pcn-langevin at step size 0.15"
    assert sampler_text(asdict(SamplerConfig())) == kept
    adapted = "then 60 steps of pcn-langevin at step size 0.5, adapted in the first 20"
    assert sampler_text(asdict(GROUPWISE_SAMPLER)) == f"group by group: resampling among 8 draws, {adapted}"
    older = {key: value for key, value in asdict(SamplerConfig()).items() if key != "adapt_steps"}
    assert sampler_text(older) == kept
