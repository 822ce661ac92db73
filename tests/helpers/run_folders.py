"""What a run leaves in its folder, and the proofs that an interrupted or killed run of either stage loses nothing."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from listener import Listener
from workshop import Workshop

from ebm_prior.training import loop


def content(folder: Path) -> dict[str, bytes]:
    """Everything below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def save_each_step(patch: pytest.MonkeyPatch) -> None:
    """Let the clock save the state of each step."""
    patch.setattr(loop, "STATE_SECONDS", 0.0)
    patch.setattr(loop, "STATE_SHARE", 1e9)


class Interrupted(BaseException):
    """No Exception, as Ctrl-C is none: nothing on the way may take it for a failure that it knows."""


def check_an_interruption(run: Callable[..., bytes], folder: Path, result: str, after: int) -> None:
    """Runs "whole", "cut" and "clocked" in `folder`, the latter two stopped after an iteration: resumed they end alike.

    "cut" goes on from its last evaluation. "clocked" has a state of each step, as if these took a minute, and repeats
    none. `run(out, progress=…, resume=…)` gives the bytes of `result`, the file that only a finished run writes.
    """

    def stop(shown: Mapping[str, Any]) -> None:
        if shown["iteration"] == after:
            raise Interrupted

    whole, cut = run(folder / "whole"), folder / "cut"
    with pytest.raises(Interrupted):
        run(cut, progress=Listener(stop))
    assert not (cut / result).exists()
    assert run(cut, resume=True) == whole
    assert metrics(cut) == metrics(folder / "whole")
    assert run(cut, resume=True) == whole  # nothing left to do

    clocked, rest = folder / "clocked", Listener()
    with pytest.MonkeyPatch.context() as patch:
        save_each_step(patch)
        with pytest.raises(Interrupted):
            run(clocked, progress=Listener(stop))
    saved = torch.load(clocked / "state.pt", weights_only=True)["iteration"]
    assert saved in (after - 1, after)  # the former where it was told of a stage in the midst of a step
    assert run(clocked, progress=rest, resume=True) == whole
    assert metrics(clocked) == metrics(folder / "whole")
    assert rest.steps == [] or rest.steps[0]["iteration"] == saved + 1


def check_kills(
    workshop: Workshop, arguments: Sequence[object], folder: Path, result: str, *moments: Callable[[Path], bool]
) -> None:
    """kill -9 as soon as each of the moments is seen in the run's folder, with a resume after each: nothing is lost."""
    whole, cut = folder / "whole", folder / "cut"
    workshop.run(*arguments, "--out", whole)
    for number, moment in enumerate(moments):
        more = ("--resume",) if number else ()
        with workshop.fork("-m", "ebm_prior", *arguments, "--out", cut, *more) as process:
            try:
                deadline = time.monotonic() + 240
                while not moment(cut):
                    assert process.poll() is None, process.communicate()[1].decode()
                    assert time.monotonic() < deadline
                    time.sleep(0.002)
            finally:
                process.kill()
        assert process.returncode == -signal.SIGKILL
        assert not (cut / result).exists()
    workshop.run(*arguments, "--out", cut, "--resume")
    assert (cut / result).read_bytes() == (whole / result).read_bytes()
    assert metrics(cut) == metrics(whole)


def longer(case: object) -> Any:
    """A parameter of a test that only `pytest -m long` tries: the others tell the same, in less time."""
    return pytest.param(case, marks=pytest.mark.long)
