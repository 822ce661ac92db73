"""A folder where the toy backbones are installed, with files and images, in which commands are run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import click.testing
import numpy as np
from forked import Forked
from toys import LinearGaussian, ToyConv

from ebm_prior.cli.main import main
from ebm_prior.storage.checkpoint import save_backbone

HELPERS = Path(__file__).resolve().parent

# The smallest second stage that has everything in it: seconds become milliseconds.
SMALL_FIT: dict[str, Any] = {
    "iterations": 6,
    "batch_size": 8,
    "evaluate_every": 2,
    "held_out": 20,
    "warmup": 0,
    "energy": {"channels": 4, "hidden": 8, "joint": 8},
    "sampler": {"proposals": 2, "steps": 4},
}

# The stand-ins of third_party.py: their names, and their classes.
THIRD_PARTY = {"deep": "DeepVAE", "plain": "PlainVAE", "bottom-up": "BottomUpVAE"}


class Workshop(NamedTuple):
    """A folder in which the toys are installed as `toy` and `linear`, and third parties' adapters under their names,
    with a backbone and images for `toy`."""

    folder: Path
    backbone: Path  # ToyConv in its own form, which says that it was trained on MNIST
    images: Path  # (120, 8, 8) uint8
    data_root: Path  # where "mnist" is an .npz of 8 × 8 images

    def run(self, *arguments: object, code: int = 0) -> click.testing.Result:
        """`ebm-prior ARGUMENTS` in this process. Anything but a stated error is raised."""
        result = click.testing.CliRunner(catch_exceptions=False).invoke(main, [str(a) for a in arguments])
        assert result.exit_code == code, f"exit code {result.exit_code}\n{result.stdout}\n{result.stderr}"
        return result

    def error(self, *arguments: object, code: int = 1) -> str:
        """The message of a command that fails as stated: one line on stderr, nothing on stdout."""
        result = self.run(*arguments, code=code)
        lines = [line for line in result.stderr.splitlines() if line.startswith("ebm-prior: ")]
        assert len(lines) == 1
        assert result.stderr.endswith(lines[0] + "\n"), "the error is not the last line"
        assert result.stdout == ""
        return lines[0]

    def popen(
        self, *arguments: object, stdout: int = subprocess.DEVNULL, cwd: Path | None = None
    ) -> subprocess.Popen[bytes]:
        """`python ARGUMENTS` as a process of its own, which sees the same adapters."""
        command = [sys.executable, *(str(a) for a in arguments)]
        environment = os.environ | self.environment
        return subprocess.Popen(command, env=environment, stdout=stdout, stderr=subprocess.PIPE, cwd=cwd)

    def fork(self, *arguments: object) -> Forked:
        """The same where it does not matter that the process begins with the library imported."""
        return Forked([str(a) for a in arguments], self.environment)

    @property
    def environment(self) -> dict[str, str]:
        path = os.pathsep.join([str(self.folder), str(HELPERS), str(HELPERS.parents[1])])
        return {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def build(folder: Path) -> Workshop:
    """A workshop in the empty `folder`, which is put into the path of imports."""
    info = folder / "toys-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toys\nVersion: 1.0\n")
    points = "[ebm_prior.backbones]\ntoy = toys:ToyConv\nlinear = toys:LinearGaussian\nbroken = toys_nowhere:Nothing\n"
    points += "".join(f"{name} = third_party:{kind}\n" for name, kind in THIRD_PARTY.items())
    (info / "entry_points.txt").write_text(points)
    sys.path.insert(0, str(folder))
    random = np.random.default_rng(0)

    def images(n: int) -> np.ndarray:
        ramp = np.linspace(0, 255, 8)[:, None] * random.random((n, 1, 1)) + np.zeros(8)
        return np.clip(ramp + random.normal(0, 20, (n, 8, 8)), 0, 255).astype(np.uint8)

    pixels = images(120)
    np.save(folder / "images.npy", pixels)
    data_root = folder / "data"
    data_root.mkdir()
    np.savez(data_root / "mnist.npz", x_train=pixels, x_test=images(60))
    backbone = folder / "toy.safetensors"
    save_backbone(ToyConv(), backbone, record={"data": {"name": "mnist/train", "images": 120}})
    save_backbone(LinearGaussian(), folder / "linear.safetensors")
    return Workshop(folder, backbone, folder / "images.npy", data_root)
