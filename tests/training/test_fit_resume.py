"""A fit is a function of its seed, wherever it is interrupted or killed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from run_folders import Interrupted, check_an_interruption, check_kills, longer, metrics
from small_fits import OBJECTIVES, SATURATING, into, small
from toys import ToyConv
from workshop import Workshop

from ebm_prior.data.images import ImageSource
from ebm_prior.errors import ConfigurationError
from ebm_prior.model.backbone import Backbone
from ebm_prior.model.energy import EnergyConfig
from ebm_prior.runs import folder
from ebm_prior.storage import atomic


def test_equal_seeds_give_equal_files(
    workshop: Workshop, backbone: Backbone, images: ImageSource, tmp_path: Path
) -> None:
    config = small()
    first, second = (into(tmp_path / name, workshop, backbone, images, config) for name in "ab")
    assert first == second
    assert into(tmp_path / "c", workshop, backbone, images, replace(config, seed=1)) != first


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("after", [longer(1), 2, 5, longer(7)])
def test_an_interrupted_run_goes_on_as_if_nothing_had_been(
    workshop: Workshop, backbone: Backbone, images: ImageSource, tmp_path: Path, objective: str, after: int
) -> None:
    def run(out: Path, **how: Any) -> bytes:
        return into(out, workshop, backbone, images, OBJECTIVES[objective], **how)

    check_an_interruption(run, tmp_path, "prior.safetensors", after)
    assert [line["iteration"] for line in metrics(tmp_path / "cut")] == [2, 4, 6, 8]


@pytest.mark.parametrize("after", [longer(1), 2, 3, longer(4)])
def test_so_does_one_whose_ratio_has_saturated(
    workshop: Workshop,
    backbone: Backbone,
    images: ImageSource,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    after: int,
) -> None:
    monkeypatch.setattr("ebm_prior.training.courses.SATURATED_SHARE", 1.0)

    def run(out: Path, **how: Any) -> bytes:
        return into(out, workshop, backbone, images, SATURATING, **how)

    check_an_interruption(run, tmp_path, "prior.safetensors", after)


@pytest.mark.parametrize("moment", ["before the state", "while the state is written", "while the metrics are written"])
def test_a_kill_at_the_worst_moments(
    workshop: Workshop,
    backbone: Backbone,
    images: ImageSource,
    tmp_path: Path,
    moment: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = into(tmp_path / "whole", workshop, backbone, images, small())
    count = 0

    def second(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any) -> Any:
            nonlocal count
            count += "metrics" in moment or Path(arguments[0]).name.startswith((".state", "state"))
            if count == 2:
                if "metrics" in moment:
                    with arguments[0].open("a") as file:
                        file.write(arguments[1][:20])
                raise Interrupted
            return function(*arguments)

        return wrapped

    with monkeypatch.context() as patch:
        if moment == "before the state":
            patch.setattr(folder, "write_atomically", second(folder.write_atomically))
        elif moment == "while the state is written":
            patch.setattr(atomic.Path, "replace", second(Path.replace))
        else:
            patch.setattr(folder, "append_line", second(folder.append_line))
        with pytest.raises(Interrupted):
            into(tmp_path / "cut", workshop, backbone, images, small())
    assert into(tmp_path / "cut", workshop, backbone, images, small(), resume=True) == whole
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")


@pytest.mark.parametrize("objective", [longer("nce"), "staged", longer("mle")])
def test_a_killed_process_goes_on(workshop: Workshop, small_options: list[str], tmp_path: Path, objective: str) -> None:
    """At two moments: shortly after the first state, and after a resume some states later."""

    def logged(lines: int) -> Callable[[Path], bool]:
        return lambda out: (log := out / "metrics.jsonl").exists() and log.read_text().count("\n") >= lines

    arguments = ["fit", "--ckpt", workshop.backbone, "--data", workshop.images, *small_options]
    arguments += ["--iterations", 120, "--evaluate-every", 10, "--patience", 100, "--seed", 5]
    arguments += {
        "nce": [],
        "staged": [
            *("--ratios", "staged", "--stage-particles", 16, "--stage-held-out", 16, "--stage-ess", 0.9),
            *("--iterations", 60, "--evaluate-every", 5),
        ],
        "mle": ["--objective", "mle", "--chains", "persistent", "--chain-steps", 2],
    }[objective]
    check_kills(workshop, arguments, tmp_path, "prior.safetensors", logged(1), logged(4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": 0.5}, r"learning_rate: 0.004 before, 0.5 now"),
        ({"energy": EnergyConfig(channels=4, hidden=4, joint=8)}, r"energy.hidden: 8 before, 4 now"),
        ({"seed": 4}, "seed: 0 before, 4 now"),
    ],
)
def test_another_configuration_is_not_resumed(
    workshop: Workshop,
    backbone: Backbone,
    images: ImageSource,
    tmp_path: Path,
    change: dict[str, Any],
    message: str,
) -> None:
    into(tmp_path / "run", workshop, backbone, images, small(iterations=2))
    other = small(iterations=2, **change)
    with pytest.raises(ConfigurationError, match=message):
        into(tmp_path / "run", workshop, backbone, images, other, resume=True)


def test_other_images_backbones_and_precisions_are_not_resumed(
    workshop: Workshop, backbone: Backbone, images: ImageSource, tmp_path: Path
) -> None:
    config = small(iterations=2)
    into(tmp_path / "run", workshop, backbone, images, config)
    other = ToyConv(seed=1).eval().requires_grad_(False)
    double = copy.deepcopy(backbone).double()
    for which, source, message in (
        (backbone, images.subset(range(100)), "images: "),
        (other, images, "backbone: "),
        (double, images, "precision: 'float32' before, 'float64' now"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            into(tmp_path / "run", workshop, which, source, config, resume=True)
