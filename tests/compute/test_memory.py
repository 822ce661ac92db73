"""What a command will take of memory: held to closed forms, said before it starts, refused where it does not fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_nvae
import torch
from small_fits import OBJECTIVES, small
from tiny_vdvae import tiny
from toys import ToyConv
from workshop import Workshop

from ebm_prior.cli import preflight
from ebm_prior.compute import memory
from ebm_prior.data.forms import as_images
from ebm_prior.data.images import ImageSource
from ebm_prior.errors import MemoryLimitError
from ebm_prior.model.backbone import Backbone
from ebm_prior.model.energy import EnergyConfig, JointEnergy
from ebm_prior.model.passes import PLAIN, Passes
from ebm_prior.model.prior import ANCESTRAL, EBMPrior
from ebm_prior.model.samplers import SamplerConfig
from ebm_prior.settings import configured
from ebm_prior.training.fit import fit
from ebm_prior.training.fit_config import FitConfig
from ebm_prior.training.pretrain import pretrain
from ebm_prior.training.pretrain_config import PretrainConfig
from ebm_prior.training.stages import StageConfig, draws_at_once

CPU = torch.device("cpu")


@pytest.fixture
def prior(backbone: Backbone) -> EBMPrior:
    return EBMPrior(backbone, JointEnergy(backbone.groups, EnergyConfig(channels=4, hidden=8, joint=8)))


def test_tensors_are_counted_while_they_live() -> None:
    x = torch.ones(100)
    assert memory.peak_bytes(lambda: x[10:].view(9, 10)) == 0, "views of what was there"
    assert memory.peak_bytes(lambda: x + 1) == 400
    assert memory.peak_bytes(lambda: (x + 1).add_(1)[1:]) == 400
    assert memory.peak_bytes(lambda: (((x + 1) + 1) + 1) + 1) == 800, "the first is gone when the third comes"
    assert memory.peak_bytes(lambda: [x + 1 for _ in range(5)]) == 2000
    leaf = torch.ones(100, requires_grad=True)
    assert memory.peak_bytes(lambda: leaf.exp().exp().exp().sum()) >= 1200, "each is kept for the backward pass"


def test_a_chunk_takes_what_its_chains_do(prior: EBMPrior) -> None:
    def need(n: int, chunk: int, sampler: SamplerConfig) -> int:
        return preflight.for_samples(prior, n, chunk, sampler).bytes

    each = preflight.OVERHEAD * preflight.chain_bytes(prior, SamplerConfig())
    assert each > 0
    assert need(1_000, 128, SamplerConfig()) - need(1_000, 64, SamplerConfig()) == pytest.approx(64 * each, abs=1)
    assert need(30, 512, SamplerConfig()) - need(30, 512, ANCESTRAL) == pytest.approx(30 * each, abs=1)
    assert not any(p.requires_grad for p in prior.energy.parameters())


def test_parts_of_a_batch_take_less(backbone: Backbone) -> None:
    for config in (small(batch_size=64, ratios="one"), replace(OBJECTIVES["mle"], batch_size=64)):
        whole, parts = (preflight.for_fit(backbone, replace(config, parts=parts), 100) for parts in (1, 4))
        assert whole.bytes > 2 * parts.bytes
        assert "--parts above 1 or --batch-size below 64" in whole.remedy


def test_of_one_ratio_or_stages_what_counts_is_the_stages_that_may_take_over(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = SimpleNamespace(weights=0, posterior=0, seen=0, learning=lambda rows: 0)
    monkeypatch.setattr(preflight, "_Work", lambda prior: nothing)
    few = StageConfig(particles=20, held_out=10)
    for parts, stage, chains in ((1, StageConfig(), 64), (4, StageConfig(), 32), (1, few, 30), (4, few, 8)):
        need = preflight.for_fit(backbone, FitConfig(parts=parts, stage=stage), 100)  # 128 rows, a block, all draws
        assert need.of == f"{chains} chains at a time"
        assert "--ratios one" in need.remedy


DEEP, WIDE = "29 groups up to side 8", "21 groups up to side 16"
SIZES = {
    DEEP: {"enc_blocks": "8x2,8d2,4x2,4d4,1x1", "dec_blocks": "1x1,4m1,4x9,8m4,8x17", "width": 16},
    WIDE: {
        "enc_blocks": "16,16d2,8d2,4d4,1",
        "dec_blocks": "1,4m1,4x2,8m4,8x4,16m8,16x11",
        "width": 12,
    },
}
FITS: dict[str, dict[str, Any]] = {
    "one": {"ratios": "one"},
    "staged": {"ratios": "staged"},
    "mle": {"objective": "mle"},
}


@pytest.mark.parametrize(
    ("course", "size"),
    [
        *((course, WIDE) for course in FITS),
        ("staged", DEEP),
        *(pytest.param(course, DEEP, marks=pytest.mark.long) for course in ("one", "mle")),  # the others tell as much
    ],
)
def test_a_fit_to_tens_of_groups_takes_what_was_expected_within_a_fifth(size: str, course: str) -> None:
    backbone = tiny(**SIZES[size], custom_width_str="", no_bias_above=16, zdim=8).eval().requires_grad_(False)
    changes = {"iterations": 4, "batch_size": 24, "evaluate_every": 2, "warmup": 0, "stage_groupwise": 0.3}
    changes |= {"stage_particles": 48, "stage_held_out": 24, "chain_steps": 2}
    config = configured(FitConfig, changes | FITS[course])
    images = torch.rand(100, *backbone.image_shape, generator=torch.Generator().manual_seed(0))
    expected = preflight.for_fit(backbone, config, len(images)).bytes / preflight.FIT_OVERHEAD
    taken = memory.peak_bytes(lambda: fit(backbone, as_images(images, backbone.image_shape), config))
    print(f"{course}, {size}: expected {expected / 2**20:.1f} MiB of tensors, taken {taken / 2**20:.1f}")
    assert expected == pytest.approx(taken, rel=0.2)


PRETRAINED: dict[str, tuple[dict[str, Any], int, str]] = {  # settings, the number of images, what takes most
    "whole": ({"batch_size": 24}, 20, "a step on 24 images"),
    "parts": ({"batch_size": 24, "parts": 3}, 20, "a step on 8 images"),
    "evaluation": ({"batch_size": 8, "optimizer": "adamax"}, 300, "the ELBO of 300 images"),
    "weights": ({"batch_size": 2}, 4, "the weights in training and in two saved states"),
}


class Nowhere:
    """A recorder that keeps nothing."""

    def log(self, metrics: Mapping[str, Any]) -> None: ...
    def note(self, shown: Mapping[str, Any]) -> None: ...
    def save_state(self, state: Mapping[str, Any]) -> None: ...
    def load_state(self) -> None: ...


@pytest.mark.parametrize("passes", [PLAIN, Passes(dtype=torch.bfloat16)], ids=["float32", "bf16"])
@pytest.mark.parametrize("case", PRETRAINED)
def test_pretraining_takes_what_was_expected_within_a_fifth(case: str, passes: Passes) -> None:
    changes, count, of = PRETRAINED[case]
    side, width = (4, 24) if case == "weights" else (16, 8)
    torch.manual_seed(0)
    backbone = tiny_nvae.tiny(image_shape=[3, side, side], encoder_channels=width, decoder_channels=width)
    pixels = torch.rand(count, *backbone.image_shape, generator=torch.Generator().manual_seed(0))
    images = as_images(pixels, backbone.image_shape)
    config = PretrainConfig(iterations=4, checkpoint_every=2, **changes)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    need = preflight.for_pretrain(backbone, images, images, config, passes)
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    expected = need.bytes / preflight.PRETRAIN_OVERHEAD
    taken = memory.peak_bytes(
        lambda: pretrain(backbone, images, config, run=Nowhere(), validation=images, passes=passes)
    )
    print(f"{case}: expected {expected / 2**20:.1f} MiB of tensors, taken {taken / 2**20:.1f}")
    assert expected == pytest.approx(taken, rel=0.2)
    assert need.of == of
    assert ("--precision bf16" in need.remedy) == (passes is PLAIN and of.startswith("a step"))


def test_images_on_the_device_are_counted(images: ImageSource, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, config = ToyConv(), PretrainConfig(batch_size=4)
    without = preflight.for_pretrain(backbone, images, images, config).bytes
    monkeypatch.setattr(preflight, "held_bytes", lambda images, shape, device: 1000)
    held = preflight.for_pretrain(backbone, images, images, config).bytes
    assert held - without == pytest.approx(1000 * preflight.PRETRAIN_OVERHEAD, abs=1)


def test_on_a_gpu_the_draws_of_a_part_move_together() -> None:
    assert draws_at_once(512, torch.device("cuda")) == 512
    assert [draws_at_once(rows, CPU) for rows in (512, 16)] == [64, 16]


def test_what_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    need = preflight.Need(3 * 2**30, "256 chains at a time", "--chunk 64 or --checkpointing")
    monkeypatch.setattr(preflight, "free_bytes", lambda device: 4 * 2**30)
    assert preflight.require_memory(need, CPU) == "memory on cpu: about 3 GiB for 256 chains at a time, 4 GiB free"
    monkeypatch.setattr(preflight, "free_bytes", lambda device: None)
    assert preflight.require_memory(need, CPU) == "memory on cpu: about 3 GiB for 256 chains at a time"
    monkeypatch.setattr(preflight, "free_bytes", lambda device: 1000 * 2**20)
    with pytest.raises(
        MemoryLimitError, match=r"about 3 GiB .* 256 chains .* 0.977 GiB free: use --chunk 64 or --check"
    ):
        preflight.require_memory(need, CPU)


def test_free_memory_is_what_the_machine_and_the_container_leave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "meminfo").write_text("MemTotal:  900 kB\nMemAvailable:  500 kB\n")
    assert memory._available(tmp_path / "meminfo") == 500 * 1024
    assert memory._available(tmp_path / "nothing") is None
    for name, text in {
        "memory.max": "1000\n",
        "memory.current": "900\n",
        "memory.stat": "anon 1\ninactive_file 300\n",
    }.items():
        (tmp_path / name).write_text(text)
    assert memory._left_in_container(tmp_path) == 400
    (tmp_path / "memory.max").write_text("max\n")
    assert memory._left_in_container(tmp_path) is None
    monkeypatch.setattr(memory, "_available", lambda: 900)
    monkeypatch.setattr(memory, "_left_in_container", lambda: 600)
    assert memory.free_bytes(CPU) == 600
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert memory.free_bytes(CPU) == 300


def test_commands_say_what_they_need_and_refuse_before_they_begin(
    workshop: Workshop, prior_file: Path, fit_words: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("sample", prior_file, "-n", 100, "--out", tmp_path / "a.png")
    shown = workshop.run(*words, "--steps", 1).stderr
    assert "memory on cpu: about" in shown
    assert "for 100 draws, 100 at a time" in shown
    monkeypatch.setattr(preflight, "free_bytes", lambda device: 5000)
    assert "--chunk 64" in workshop.error(*words, "--overwrite", "--chunk", 100_000)
    assert "--stage-particles below 512" in workshop.error(*fit_words, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert "--samples below" in workshop.error("eval", prior_file, "--data", workshop.images)


@pytest.fixture
def prior_file(fitted: Path) -> Path:
    return fitted / "prior.safetensors"
