"""By hand: is anything lost, changed or left lying when runs are killed (kill -9) at random moments?

    python tests/kills.py [--kills 40] [--interrupts 0] [--seed 0] [--kinds fit,staged] [--folder FOLDER]

Small runs of five kinds, each a process of its own. A run is killed at a moment drawn uniformly from its whole life,
from the start of its interpreter to its last writes; where it has ended by then, it is begun anew with another moment.
Every third is killed once more while it is resumed. Then it is resumed to its end, as a user would: with --resume,
whether or not something was written. Half of the runs save their state at every step.

Printed is one row per kind: kills; runs of which every file has the bytes of an uninterrupted run; files that should
not be there (temporaries, a lock, also in the folder for temporary files); the first and last moment, as shares of the
life. Exit code 1 where anything differs or is stale. Forty kills take some ten to thirty minutes of one core.

With --interrupts, a second table: Ctrl-C and SIGTERM at such moments, one half of them in the first second. Each must
end the command in one line that says so, with exit code 130 or 143, or come after all is done, with 0; no traceback.
"""

from __future__ import annotations

import argparse
import getpass
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

HELPERS = Path(__file__).resolve().parent / "helpers"
sys.path[:0] = [str(HELPERS), str(HELPERS.parents[1])]

import torch  # noqa: E402 (the path comes first)
from workshop import SMALL_FIT, Workshop, build  # noqa: E402

NOT_COMPARED = {"progress.jsonl", "state.pt"}  # numbers by the clock; a state is compared by what it holds
TORCHS = f"torchinductor_{getpass.getuser()}"  # an empty folder that torch makes whenever it is imported so far
EVERY_STEP, NEVER = 0.0, 1e6  # seconds between two states


def commands(workshop: Workshop) -> dict[str, list[object]]:
    """The runs, each without its --out."""
    flat = {f"{k}-{n}": v for k, part in SMALL_FIT.items() if isinstance(part, dict) for n, v in part.items()}
    flat |= {k: v for k, v in SMALL_FIT.items() if not isinstance(v, dict)}
    flat |= {"iterations": 100, "evaluate-every": 20, "patience": 100, "seed": 5}
    small = [word for key, value in flat.items() for word in (f"--{key.replace('_', '-')}", value)]
    data = ["--data", workshop.images]
    fit = ["fit", "--ckpt", workshop.backbone, *data, *small]
    stage = ["--stage-particles", 16, "--stage-held-out", 16, "--stage-ess", 0.9, "--stage-every", 1]
    joint = ["--set", "width=4", "--set", "hidden=6", "--set", "latents=[4,3]", "--batch-size", 8, "--iterations", 60]
    joint += ["--evaluate-every", 20, "--energy-from", 0, "--energy-hidden", 6, "--prior-chain-steps", 2, "--warmup", 0]
    first = ["--backbone", "toy", "--iterations", 300, "--batch-size", 16, "--checkpoint-every", 60, "--ema", 0.9]
    return {
        "fit": [*fit, "--ratios", "one"],
        "staged": [*fit, "--ratios", "staged", "--iterations", 40, "--evaluate-every", 8, *stage],
        "mle": [*fit, "--objective", "mle", "--chains", "persistent", "--chain-steps", 3, "--iterations", 60],
        "pretrain": ["pretrain", *data, *first, "--seed", 5],
        "train": ["train", *data, *joint, "--seed", 5],
    }


class Bench(NamedTuple):
    """Where the runs lie, and what they share."""

    workshop: Workshop
    folder: Path
    temporary: Path  # the folder for temporary files of every run

    def started(
        self, words: Sequence[object], every: float = NEVER, program: Sequence[str] = ()
    ) -> subprocess.Popen[bytes]:
        """A run in a process of its own: by `program`, or with a state every so many seconds."""
        path = os.pathsep.join([str(self.workshop.folder), str(HELPERS), str(HELPERS.parents[1])])
        places = {"PYTHONPATH": path, "TMPDIR": str(self.temporary), "XDG_CACHE_HOME": str(self.folder / "cache")}
        program = program or (str(HELPERS / "stopped_commands.py"), str(every))
        command = [sys.executable, *program, *map(str, words)]
        nowhere = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, env={**os.environ, **places, "OMP_NUM_THREADS": "1"}, **nowhere)

    def ended(self, words: Sequence[object], every: float = NEVER, program: Sequence[str] = ()) -> float:
        """Run to the end; seconds from start to end."""
        began = time.monotonic()
        with self.started(words, every, program) as process:
            said = process.communicate()[1]
        if process.returncode:
            raise SystemExit(f"exit code {process.returncode}: {' '.join(map(str, words))}\n{said.decode()}")
        return time.monotonic() - began

    def killed(self, words: Sequence[object], every: float, after: float) -> bool:
        """Kill a run so many seconds after its start; False where it has ended before."""
        with self.started(words, every) as process:
            try:
                process.communicate(timeout=after)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
        if process.returncode not in (0, -signal.SIGKILL):
            raise SystemExit(f"exit code {process.returncode}: {' '.join(map(str, words))}")
        return process.returncode == -signal.SIGKILL


class Row(NamedTuple):
    """What came of the kills of one kind of run."""

    kills: int
    runs: int
    unequal: list[str]
    stale: list[str]
    moments: list[float]


def tried(bench: Bench, kind: str, words: list[object], kills: int, chance: random.Random) -> Row:
    """So many kills of one kind of run."""
    whole = bench.folder / kind
    lives = [
        bench.ended([*words, "--out", bench.folder / f"{kind}-{n}"], every)
        for n, every in enumerate((EVERY_STEP, NEVER))
    ]
    os.rename(bench.folder / f"{kind}-1", whole)
    unequal, stale, moments = list[str](), list[str](), list[float]()
    runs = 0
    while len(moments) < kills:
        out = bench.folder / f"{kind}-killed-{runs}"
        which = runs % 2
        more: list[object] = []
        for _ in range(1 + (runs % 3 == 2)):
            if len(moments) == kills:
                break
            moment = chance.random()
            every = (EVERY_STEP, NEVER)[which]
            if bench.killed([*words, "--out", out, *more], every, moment * lives[which]):
                moments.append(moment)
            more = ["--resume"]
        bench.ended([*words, "--out", out, "--resume"])
        runs += 1
        unequal += [f"{out.name}/{name}" for name in differing(whole, out)]
        stale += [f"{out.name}/{name}" for name in sorted(names(out) - names(whole))]
        stale += [f"{path.relative_to(bench.folder)}" for path in bench.temporary.iterdir() if path.name != TORCHS]
    return Row(len(moments), runs, unequal, stale, moments)


def interrupted(bench: Bench, words: list[object], count: int, chance: random.Random) -> bool:
    """So many signals at random moments of one kind of run, and a row of what came of each; whether all is well."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell lets its background processes ignore
    life = bench.ended([*words, "--out", bench.folder / "signals"], program=("-m", "ebm_prior"))
    well = True
    print(f"{'signal':8}{'second':>8}{'code':>6}  last line")
    for index in range(count):
        number = (signal.SIGINT, signal.SIGTERM)[index % 4 == 3]
        moment = chance.random() * (1.0 if index % 2 else life)
        out = bench.folder / f"signal-{index}"
        with bench.started([*words, "--out", out], program=("-m", "ebm_prior")) as process:
            time.sleep(moment)
            process.send_signal(number)
            said = process.communicate()[1].decode()
        last = (said.splitlines() or [""])[-1]
        right = "ebm-prior: stopped" in last if process.returncode == 128 + number else process.returncode == 0
        right = right and "Traceback" not in said and "ignored" not in said
        print(f"{number.name:8}{moment:8.2f}{process.returncode:6}  {last[:80]}", flush=True)
        if not right:
            print(said)
        well = well and right
    return well


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.name not in NOT_COMPARED}


def differing(whole: Path, cut: Path) -> list[str]:
    """The files that a run lacks, or that have other bytes than those of the uninterrupted one."""
    files = [name for name in sorted(names(whole)) if (whole / name).is_file()]
    found = [n for n in files if not (cut / n).is_file() or (cut / n).read_bytes() != (whole / n).read_bytes()]
    states = [torch.load(folder / "state.pt", weights_only=True) for folder in (whole, cut)]
    return found + ["state.pt"] * (not alike(*states))


def alike(first: object, second: object) -> bool:
    if isinstance(first, torch.Tensor):
        return isinstance(second, torch.Tensor) and first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return isinstance(second, dict) and [*first] == [*second] and all(alike(first[k], second[k]) for k in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(alike, first, second))  # type: ignore[arg-type]
    return first == second


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=40, help="of all kinds together")
    parser.add_argument("--interrupts", type=int, default=0, help="Ctrl-C and SIGTERM, of a fit")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--kinds", default="fit,staged,mle,pretrain,train")
    parser.add_argument("--folder", type=Path, help="a new folder to keep the runs in; else they are removed")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as passing:
        folder = given.folder.resolve() if given.folder else Path(passing)
        (folder / "workshop").mkdir(parents=True)
        (folder / "temporary").mkdir()
        bench = Bench(build(folder / "workshop"), folder, folder / "temporary")
        kinds, chance = given.kinds.split(","), random.Random(given.seed)
        clean = True
        if given.interrupts:
            clean = interrupted(bench, commands(bench.workshop)["fit"], given.interrupts, chance)
        print(f"{'kind':10}{'kills':>7}{'runs':>6}{'equal':>7}{'stale':>7}  moments of its life", flush=True)
        for number, kind in enumerate(kinds):
            share = given.kills // len(kinds) + (number < given.kills % len(kinds))
            if not share:
                continue
            row = tried(bench, kind, commands(bench.workshop)[kind], share, chance)
            equal = row.runs - len({name.split("/")[0] for name in row.unequal})
            span = f"{min(row.moments):.2f} to {max(row.moments):.2f}"
            print(f"{kind:10}{row.kills:7}{row.runs:6}{equal:7}{len(row.stale):7}  {span}", flush=True)
            for name in row.unequal:
                print(f"  other bytes: {name}")
            for name in row.stale:
                print(f"  stale: {name}")
            clean = clean and not row.unequal and not row.stale
    if not clean:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
