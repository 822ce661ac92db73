"""The official files of a VDVAE through every command, as a user types them."""

from __future__ import annotations

import shlex
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from run_folders import longer
from tiny_vdvae import FILES, FIXTURES, needs_fixtures

from ebm_prior.cli.main import main

SIDES = {"ddp-imagenet64": 64}  # of the images; those of the other folders have 32
COMMANDS = """
doctor --backbone vdvae --ckpt {file} --data {data} --samples 60 --gauge-iterations 5
fit --backbone vdvae --ckpt {file} --data {data} --iterations 2 --batch-size 8 --held-out 20 --out run
sample run/prior.safetensors -n 8 --compare --proposals 2 --steps 2 --out samples.png
info run/prior.safetensors
eval run/prior.safetensors --data {data} --samples 40 --gauge-iterations 5 --proposals 2 --steps 1
show run/prior.safetensors hierarchy --fix 2 --out hierarchy.png
"""


@needs_fixtures
@pytest.mark.parametrize("folder", [name if name == "run-folder" else longer(name) for name in FILES])
def test_an_official_file_goes_through_every_command(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    side = SIDES.get(folder, 32)
    pixels = np.random.default_rng(0).integers(0, 256, (100, side, side, 3), dtype=np.uint8)
    np.save("images.npy", pixels)
    for line in COMMANDS.strip().splitlines():
        typed = shlex.split(line.format(file=FIXTURES / folder / FILES[folder], data="images.npy"))
        done = CliRunner(catch_exceptions=False).invoke(main, typed)
        assert done.exit_code == 0, f"{line}\n{done.output}"
    assert {"samples.png", "hierarchy.png"} <= {path.name for path in tmp_path.iterdir()}
