"""The README's adapter, run as another distribution's code: what it promises a third party is what happens."""

from __future__ import annotations

import configparser
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
SECTIONS = {  # of what a third party reads: the adapter, the session that saves it, the entry point that names it
    "python": ("README.md", "## Adapter for your own architecture"),
    "pycon": ("backbones/README.md", "## Check it, save it, name it"),
    "console": ("backbones/README.md", "## Check it, save it, name it"),
    "ini": ("backbones/README.md", "## Check it, save it, name it"),
}


def block(language: str) -> str:
    """The only code block in `language` of its section."""
    page, title = SECTIONS[language]
    section = (ROOT / page).read_text(encoding="utf-8").partition(title + "\n")[2].partition("\n## ")[0]
    blocks = re.findall(rf"^```{language}\n(.*?)^```", section, flags=re.DOTALL | re.MULTILINE)
    assert len(blocks) == 1, f"{page}, {title!r}: expected one {language} block, found {len(blocks)}"
    return str(blocks[0])


class Installed:
    """A folder with the README's module, which `register` makes look as after `pip install`, and processes in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "my_vae.py").write_text(block("python"), encoding="utf-8")

    def session(self) -> None:
        """The session that the README shows, on trained weights; doctest tells where it shows something else."""
        (self.folder / "session.txt").write_text(block("pycon"), encoding="utf-8")
        weights = "import torch, my_vae; torch.save(my_vae.MyVAE().state_dict(), 'my_weights.pt')"
        shown = "import doctest, sys; sys.exit(doctest.testfile('session.txt', module_relative=False).failed)"
        self.python("-c", f"{weights}; {shown}")

    def register(self) -> None:
        """Give the class its name, by the README's entry point."""
        setup = configparser.ConfigParser()
        setup.read_string(block("ini"))
        info = self.folder / "my_vae-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-vae\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(
            "".join(f"[{group}]\n{points}\n" for group, points in setup["options.entry_points"].items())
        )

    def python(self, *arguments: str) -> str:
        """Run python in the folder; its standard output."""
        environment = {**os.environ, "PYTHONPATH": f"{self.folder}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, *arguments], cwd=self.folder, env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, f"{shlex.join(arguments)}\n{done.stdout}\n{done.stderr}"
        return done.stdout


@pytest.fixture(scope="module")
def third_party(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """Its weights written in the own form by the session that the README shows, and then registered, as told there."""
    installed = Installed(tmp_path_factory.mktemp("third_party"))
    installed.session()
    installed.register()
    return installed


def test_an_adapter_is_short() -> None:
    assert len(block("python").splitlines()) < 50


def test_the_registered_name_finds_the_class_and_the_saved_weights(third_party: Installed) -> None:
    program = """
import torch
from ebm_prior import load_backbone
vae = load_backbone("mine", "mine.safetensors")
weights = torch.load("my_weights.pt", weights_only=True)
print(type(vae).__module__, type(vae).__name__, all(torch.equal(t, weights[n]) for n, t in vae.state_dict().items()))
"""
    assert third_party.python("-c", program).split() == ["my_vae", "MyVAE", "True"]


def test_the_commands_work_on_it(third_party: Installed) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, size=(64, 28, 28), dtype=np.uint8)
    np.save(third_party.folder / "images.npy", pixels)
    fit, sample = (shlex.split(line)[1:] for line in block("console").splitlines())
    assert (fit[0], sample[0]) == ("fit", "sample")
    small = ["--iterations", "4", "--batch-size", "8", "--held-out", "8", "--sampler-proposals", "2"]
    typed = [[*fit, *small, "--sampler-steps", "2"], [*sample, "--number", "4"]]
    run = "from ebm_prior.cli.main import main; [main(words, standalone_mode=False) for words in {typed}]"
    third_party.python("-c", run.format(typed=typed))
    assert (third_party.folder / "runs/mine/prior.safetensors").is_file()
    assert (third_party.folder / "samples.png").is_file()
