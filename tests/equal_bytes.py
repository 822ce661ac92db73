"""By hand: does a change of the code leave every byte of the results as it was?

    python tests/equal_bytes.py make OLD                 small runs of every way to train, from fixed seeds
    python tests/equal_bytes.py make CUT --interrupted   the same trainings, each killed (SIGKILL) half-way

and after the change

    python tests/equal_bytes.py make NEW
    python tests/equal_bytes.py compare OLD NEW          a line per file, `equal` or `DIFFERENT: what`; exit code 1
    python tests/equal_bytes.py resume CUT               goes on where the old code was killed
    python tests/equal_bytes.py compare OLD CUT

It knows the command line alone, `python -m ebm_prior …` of the interpreter that runs it, and imports nothing of
ebm_prior: wherever modules move, it stays as it is. Take the interpreter of an environment in which the code in
question is installed, and one machine: equal bytes are promised for equal processors and versions of torch. `make`
takes some five minutes of one core. A folder that is to be resumed can be copied first: no state says where it is.

What is compared: the tensors of .safetensors files byte for byte, and what these files say of themselves; metrics,
settings and results as JSON; samples, scores and pictures byte for byte. What is not: versions, and checksums that
cover them (what else they cover is compared itself), seconds, folders of absolute paths, resume states, logs.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

NOT_COMPARED = ("library", "versions", "sha256", "source_sha256", "seconds", "cpu_seconds")  # keys of JSON
# Words of the command line. All is small: a training takes some ten seconds, most of which are its start and pictures.
SMALL = "--held-out 150 --warmup 5 --seed 3 --sampler-proposals 8 --sampler-steps 3"
HVAE = f"fit --ckpt hvae_fashion_mnist --data fashion-mnist-subset --batch-size 64 {SMALL}"
NVAE = (
    f"fit --ckpt nvae_cifar10 --data colour.npz --batch-size 16 --learning-rate 1e-2 --evaluate-every 5 {SMALL} "
    "--stage-particles 24 --stage-held-out 24 --stage-leapfrogs 3 --energy-channels 16 --energy-hidden 32"
)
MLE = f"{HVAE} --objective mle --chain-steps 4"
FAST = f"{MLE} --penalty 0 --iterations 12 --evaluate-every 2"
OWN = f"{SMALL} --batch-size 32 --ratios one --iterations 20 --evaluate-every 5"
JOINT = (
    "train --data fashion-mnist-subset --set width=8 --set latents=[8,4] --set hidden=16 --energy-hidden 24 "
    "--batch-size 32 --warmup 4 --iterations 40 --evaluate-every 8 --seed 3"
)


class Training(NamedTuple):
    """A command that trains, into the folder `name`."""

    name: str
    words: str
    killed_after: int  # where the run is interrupted: when the state of this iteration has been written
    product: str = "prior.safetensors"  # what a finished run has written
    code: int = 0  # exit code
    needs: str = ""  # the training whose product it takes, so that it cannot begin before that has ended
    shows: tuple[str, ...] = ()  # what must be in its metrics, or it is not the case that it is meant to be


TRAININGS = (
    Training("one-ratio", f"{HVAE} --iterations 100 --evaluate-every 20", 40),
    Training(
        "one-ratio-in-parts",
        f"{HVAE} --ratios one --iterations 40 --evaluate-every 8 --parts 2 --optimizer adam --no-decay "
        "--energy-conditional --energy-dropout 0.2 --energy-bound 3",
        16,
    ),
    Training("staged", f"{NVAE} --ratios staged --iterations 20 --parts 2", 15, shows=('"stage": 2',)),
    # One ratio saturates and hands over to stages: killed after that, and before it.
    Training("handed-over", f"{NVAE} --iterations 60", 20, shows=("now in stages", '"stage": 1')),
    Training(
        "handed-over-later",
        f"{NVAE} --iterations 40 --parts 2 --energy-conditional",
        5,
        shows=("now in stages", '"stage": 1'),
    ),
    Training("mle-fresh", f"{MLE} --iterations 20 --evaluate-every 4", 8),
    Training(
        "mle-persistent",
        f"{MLE} --iterations 20 --evaluate-every 4 --chains persistent --refresh 0.2 --parts 2",
        8,
    ),
    Training("paper", f"{HVAE} --preset paper --batch-size 32 --max-steps 12 --evaluate-every 3", 6),
    # Too fast: rolled back once, and killed after that; and where it falls again, which is exit code 3.
    Training("rolled-back", f"{FAST} --learning-rate 0.1", 6, shows=("rolled_back",)),
    Training("diverged", f"{FAST} --learning-rate 0.2", 2, code=3, shows=("rolled_back",)),
    Training(
        "pretrain-hvae",
        "pretrain --backbone hvae --architecture hvae.json --data fashion-mnist-subset --iterations 60 "
        "--batch-size 32 --checkpoint-every 12 --free-nats 0.1 --ema 0.9 --seed 3",
        24,
        "backbone.safetensors",
    ),
    Training(
        "pretrain-nvae",
        "pretrain --backbone nvae --architecture nvae.json --data tiny.npz --iterations 30 --batch-size 16 "
        "--checkpoint-every 6 --optimizer adamax --rate-warmup 0.2 --kl-warmup 0.5 --kl-balance "
        "--regularization 1e-2 --flip --ema 0.9 --seed 3",
        12,
        "backbone.safetensors",
    ),
    Training(
        "fit-of-pretrained",
        f"fit --ckpt pretrain-hvae/backbone.safetensors --data fashion-mnist-subset {OWN}",
        10,
        needs="pretrain-hvae",
    ),
    Training(
        "fit-of-readjusted",
        f"fit --ckpt pretrain-nvae/backbone.safetensors --data tiny.npz --bn-readjust {OWN}",
        10,
        needs="pretrain-nvae",
    ),
    Training("joint-inference", f"{JOINT} --posterior inference", 16),
    Training(
        "joint-langevin",
        f"{JOINT} --preset paper --chains persistent --refresh 0.2 --prior-chain-steps 8 --posterior-chain-steps 4",
        16,
    ),
)

# What is drawn from each prior, and what is read besides.
SAMPLE = "sample {folder}/prior.safetensors --number 8 --seed 5 --out {folder}/drawn.npz --json"
READINGS = {
    "one-ratio": (
        "sample {folder}/prior.safetensors --number 8 --seed 5 --compare --out {folder}/drawn.png --json",
        "eval {folder}/prior.safetensors --data fashion-mnist-subset --samples 128 --seed 5 --json "
        "--gauge-iterations 20 --gauge-batch-size 32",
        "ood {folder}/prior.safetensors --in fashion-mnist-subset --out noise --out constant --to {folder}/ood "
        "--samples 32 --draws 2 --resamples 50 --seed 5 --json",
        "show {folder}/prior.safetensors reconstruction --data fashion-mnist-subset --number 4 --seed 5 "
        "--out {folder}/reconstruction.png --json",
    ),
    "pretrain-hvae": (
        "doctor --ckpt {folder}/backbone.safetensors --data fashion-mnist-subset --samples 128 --seed 5 --json "
        "--gauge-iterations 20 --gauge-batch-size 32",
    ),
}

# -- data


def write_inputs(out: Path) -> None:
    """Colour images of 32 × 32 and 8 × 8 pixels and two architectures. Fashion-MNIST images come with ebm-prior."""
    out.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for name, side in (("colour.npz", 32), ("tiny.npz", 8)):
        np.savez(out / name, x_train=_pictures(400, side, random), x_test=_pictures(64, side, random))
    stages = [
        {"blocks": [{"filters": 8, "kernel": 3, "stride": 2}], "latent": {"features": 2, "kernel": 3}},
        {"blocks": [{"filters": 8, "kernel": 3, "stride": 2}], "latent": {"features": 4}},
    ]
    hvae = {"image_shape": [1, 28, 28], "likelihood": "bernoulli", "stages": stages}
    nvae = {
        **{"image_shape": [3, 8, 8], "groups_per_scale": [2, 1], "likelihood": "logistic_mixture", "components": 2},
        **{"latent_channels": 2, "encoder_channels": 4, "decoder_channels": 4, "flows": 1},
        **dict.fromkeys(("preprocess_cells", "postprocess_cells", "encoder_cells", "decoder_cells"), 1),
    }
    for name, architecture in (("hvae.json", hvae), ("nvae.json", nvae)):
        (out / name).write_text(json.dumps(architecture))


def _pictures(count: int, side: int, random: np.random.Generator) -> NDArray[np.uint8]:
    """Four by four patches of colour, with noise: (count, side, side, 3) uint8."""
    patches = random.integers(0, 256, (count, 4, 4, 3)).repeat(side // 4, 1).repeat(side // 4, 2)
    pixels: NDArray[np.uint8] = np.clip(patches + random.integers(-12, 13, patches.shape), 0, 255).astype(np.uint8)
    return pixels


# -- running


def _start(out: Path, log: Path, words: Sequence[str]) -> subprocess.Popen[bytes]:
    """`ebm-prior WORDS` in the folder `out`, with one thread; its standard error goes into `log`."""
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    command = [sys.executable, "-m", "ebm_prior", *words]
    with log.open("wb") as errors:
        return subprocess.Popen(
            command, cwd=out, env={**os.environ, **one_thread}, stdout=subprocess.PIPE, stderr=errors
        )


def _run(out: Path, name: str, words: Sequence[str], code: int = 0) -> None:
    """One command to its end; what it prints goes into NAME.json or, where it fails as it should, NAME.txt."""
    began = _seconds()
    log = out / f"{name}.log"
    with _start(out, log, words) as process:
        printed = process.communicate()[0]
    said = log.read_text(errors="replace")
    if process.returncode != code:
        raise SystemExit(f"exit code {process.returncode}, expected {code}: ebm-prior {' '.join(words)}\n{said}")
    if code:
        (out / f"{name}.txt").write_text(said.splitlines()[-1] + "\n")
    else:
        (out / f"{name}.json").write_bytes(printed)
    print(f"{_seconds() - began:6.1f} CPU-seconds  {name}", flush=True)


def _seconds() -> float:
    """CPU time of the commands so far."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _words(training: Training) -> list[str]:
    return [*training.words.split(), "--out", training.name, "--json"]


def _train(out: Path, training: Training, *more: str) -> None:
    _run(out, training.name, [*_words(training), *more], training.code)
    metrics = (out / training.name / "metrics.jsonl").read_text()
    lacking = [text for text in training.shows if text not in metrics]
    if lacking:
        raise SystemExit(f"{training.name} did not come to what it is to show: {', '.join(lacking)}\n{metrics}")


def _read(out: Path, training: Training) -> None:
    """Draw from the prior that a training made, and read what else is to be read."""
    sample = (SAMPLE,) if training.product == "prior.safetensors" else ()
    for number, line in enumerate((*sample, *READINGS.get(training.name, ()))):
        words = line.format(folder=training.name).split()
        _run(out, f"{training.name}-{number}-{words[0]}", words)


def _kill(out: Path, training: Training) -> None:
    """Begin a training, and kill it when its state of `killed_after` iterations has been written."""
    folder, log = out / training.name, out / f"{training.name}.log"
    with _start(out, log, _words(training)) as process:
        try:
            while process.poll() is None and not _reached(folder, training.killed_after):
                time.sleep(0.01)
        finally:
            process.kill()
    if process.returncode != -signal.SIGKILL or (folder / training.product).exists():
        raise SystemExit(f"{training.name} ended before it was killed:\n{log.read_text(errors='replace')}")
    print(f"killed {training.name} after iteration {_metrics(folder / 'metrics.jsonl')[-1]['iteration']}", flush=True)


def _reached(folder: Path, iteration: int) -> bool:
    """Whether a run has written the metrics of this iteration, and then its state."""
    state, metrics = folder / "state.pt", folder / "metrics.jsonl"
    if not (state.exists() and metrics.exists()):
        return False
    rows = _metrics(metrics)
    return bool(rows and rows[-1]["iteration"] >= iteration and state.stat().st_mtime_ns >= metrics.stat().st_mtime_ns)


def _metrics(path: Path) -> list[dict[str, Any]]:
    lines = [dict(json.loads(line)) for line in path.read_text().split("\n")[:-1]]
    return [{key: value for key, value in line.items() if key != "crc32"} for line in lines]  # 0.1.0 wrote no checksum


def make(out: Path, *, interrupted: bool) -> None:
    """Every training, and what is read from it; or every training that needs no other, killed half-way."""
    if out.exists() and any(out.iterdir()):
        raise SystemExit(f"{out} is not empty")
    write_inputs(out)
    for training in TRAININGS:
        if not interrupted:
            _train(out, training)
            _read(out, training)
        elif not training.needs:
            _kill(out, training)
    print(f"{_seconds():6.1f} CPU-seconds in all")


def resume(out: Path) -> None:
    """Go on where `make --interrupted` killed, and do what it left out."""
    for training in TRAININGS:
        if not training.needs and not (out / training.name / "state.pt").exists():
            raise SystemExit(f"there is no interrupted {training.name} in {out}")
        _train(out, training, "--resume")
        _read(out, training)
    print(f"{_seconds():6.1f} CPU-seconds in all")


# -- comparing


def compare(first: Path, second: Path) -> bool:
    """Print what is equal and what is not; whether all is."""
    alike = True
    for name in sorted({*_files(first), *_files(second), *_expected()}):
        difference = _difference(first / name, second / name)
        print(f"{name}: DIFFERENT: {difference}" if difference else f"{name}: equal")
        alike = alike and not difference
    return alike


def _expected() -> Iterator[str]:
    """What there must be, in both."""
    for training in TRAININGS:
        yield f"{training.name}/{training.product}"
        yield f"{training.name}/metrics.jsonl"
        if training.product == "prior.safetensors":
            yield f"{training.name}/drawn.npz"


def _files(out: Path) -> Iterator[str]:
    for path in out.rglob("*"):
        if path.is_file() and path.name != "state.pt" and path.suffix != ".log" and not path.name.startswith("."):
            yield path.relative_to(out).as_posix()


def _difference(first: Path, second: Path) -> str:
    """In what the two files differ; nothing if they do not."""
    absent = [str(path) for path in (first, second) if not path.is_file()]
    if absent:
        return f"there is no {' and no '.join(absent)}"
    if first.suffix not in READERS:
        return "" if first.read_bytes() == second.read_bytes() else "other bytes"
    old, new = (dict(_flat(READERS[path.suffix](path))) for path in (first, second))
    differing = [key for key in (*old, *(key for key in new if key not in old)) if old.get(key) != new.get(key)]
    shown = "; ".join(f"{key} {_short(old.get(key))} / {_short(new.get(key))}" for key in differing[:3])
    return shown + (f" and {len(differing) - 3} more" if len(differing) > 3 else "")


def _tensors(path: Path) -> dict[str, Any]:
    """What a safetensors file holds: of each tensor its kind, shape and bytes; and its metadata, which are JSON."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    about = {key: json.loads(text) for key, text in header.pop("__metadata__", {}).items()}
    tensors = {}
    for name, entry in header.items():
        start, stop = entry["data_offsets"]
        tensors[name] = {**entry, "data_offsets": None, "bytes": content[end + start : end + stop]}
    return {"tensors": tensors, "metadata": about}


READERS: dict[str, Callable[[Path], Any]] = {
    ".safetensors": _tensors,
    ".jsonl": _metrics,
    ".json": lambda path: json.loads(path.read_text()),
}


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every entry by its place, {"a": [{"b": 1}]} -> ("a.0.b", 1), less what is not compared."""
    if isinstance(value, Mapping):
        yield prefix or "entries", "{}"
        for key, entry in value.items():
            if key not in NOT_COMPARED:
                yield from _flat(entry, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list):
        yield prefix or "entries", f"[{len(value)}]"
        for index, entry in enumerate(value):
            yield from _flat(entry, f"{prefix}.{index}" if prefix else str(index))
    elif isinstance(value, str):
        yield prefix, Path(value).name if os.path.isabs(value) else value.removesuffix(" --resume")  # of a command
    else:
        yield prefix, value if isinstance(value, bytes) else json.dumps(value)  # so that 1, 1.0 and true differ


def _short(value: Any) -> str:
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make", help="run everything, into the new folder OUT")
    making.add_argument("out", type=Path)
    making.add_argument("--interrupted", action="store_true", help="kill each training half-way")
    resuming = commands.add_parser("resume", help="go on in a folder of make --interrupted")
    resuming.add_argument("out", type=Path)
    comparing = commands.add_parser("compare", help="say which files differ, and in what")
    comparing.add_argument("first", type=Path)
    comparing.add_argument("second", type=Path)
    given = parser.parse_args()
    if given.command == "make":
        make(given.out.resolve(), interrupted=given.interrupted)
    elif given.command == "resume":
        resume(given.out.resolve())
    elif not compare(given.first, given.second):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
