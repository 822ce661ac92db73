"""Several processes: what they make is what one makes, bit for bit, and none of them outlives the others."""

from __future__ import annotations

import json
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_nvae
import torch
from run_folders import metrics
from small_fits import small
from two_processes import REPLACED
from workshop import HELPERS, Workshop

from ebm_prior.compute.parallel import ALONE, Processes
from ebm_prior.data.images import ImageSource
from ebm_prior.errors import ConfigurationError
from ebm_prior.model.backbone import Backbone
from ebm_prior.training.fit import fit

FITS: dict[str, list[object]] = {
    "nce": [],
    "staged": ["--ratios", "staged", "--stage-particles", 13, "--stage-held-out", 8, "--stage-ess", 0.99],
    "mle": ["--objective", "mle", "--chains", "persistent", "--chain-steps", 2, "--refresh", 0.3],
    "refined": ["--refine", 4],
}


class Shared:
    """What two processes did in one launch of torchrun, and the commands that they were given."""

    def __init__(self, workshop: Workshop, prior: Path, fit_words: list[object], folder: Path) -> None:
        data = ["--data", workshop.images, "--fid", "--fid-samples", 130, "--samples", 120, "--chunk", 64]
        data += ["--gauge-iterations", 5]
        broken = ["--kernel", "langevin", "--step-size", 2.0, "--steps", 20, "--temperature", 1e38]
        self.fit_words, self.folder = fit_words, folder
        self.pretrain = ["pretrain", "--backbone", "nvae", "--architecture", _small_nvae(folder / "nvae.json")]
        self.pretrain += ["--data", workshop.data_root / "mnist.npz", "--batch-size", 8, "--iterations", 4]
        self.pretrain += ["--checkpoint-every", 2, "--regularization", 0.01, "--ema", 0.5]
        self.sample = ["sample", prior, "-n", 200, "--chunk", 64, "--steps", 2]
        self.eval = ["eval", prior, *data, "--steps", 2, "--json"]
        commands = [
            [*self.sample, "--out", folder / "two.npz"],
            self.eval,
            *([*fit_words, *FITS[name], "--out", folder / name] for name in FITS),
            [*self.pretrain, "--out", folder / "pretrained"],
            ["sample", prior, "-n", 200, "--chunk", 64, *broken, "--out", folder / "broken.png"],
            ["backbones"],
        ]
        given = {"slow": [*fit_words, "--out", folder / "slow"], "killed": [*fit_words, "--out", folder / "killed"]}
        file = written(folder / "commands.json", commands, **given)
        launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)
        with workshop.popen(*launch, HELPERS / "two_processes.py", file, stdout=subprocess.PIPE) as process:
            out, err = process.communicate()  # the script ends itself if it hangs
        ended = time.time()
        self.code, self.out, self.err = process.returncode, out.decode(), err.decode()
        died = file.with_suffix(".killed")
        assert died.exists(), self.err
        self.survived = ended - float(died.read_text())
        self.codes = codes_beside(file)


def written(file: Path, commands: list[list[object]], **more: list[object]) -> Path:
    """The commands in a file for two_processes.py."""
    texts = {name: [str(word) for word in words] for name, words in more.items()}
    file.write_text(json.dumps({"commands": [[str(word) for word in words] for words in commands], **texts}))
    return file


def codes_beside(file: Path) -> list[list[int]]:
    """The exit codes of the commands in both processes."""
    return [json.loads(file.with_suffix(f".codes{rank}").read_text()) for rank in range(2)]


def _small_nvae(path: Path) -> Path:
    changes = {"image_shape": [1, 8, 8], "likelihood": "bernoulli"}
    path.write_text(json.dumps({**tiny_nvae.tiny().architecture, **changes}))
    return path


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The replacements of two_processes.py in this process."""
    for replaced in REPLACED:
        monkeypatch.setattr(*replaced)


@pytest.fixture(scope="module")
def shared(
    workshop: Workshop, fitted: Path, small_options: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Shared:
    words: list[object] = ["fit", "--ckpt", workshop.backbone, "--data", workshop.images, *small_options]
    return Shared(workshop, fitted / "prior.safetensors", words, tmp_path_factory.mktemp("two"))


def test_exit_codes_are_those_of_one_process(shared: Shared) -> None:
    assert shared.codes == [[0, 0, 0, 0, 0, 0, 0, 3, 1, 0]] * 2
    assert "several processes share fit, pretrain, sample, eval; backbones runs in one" in shared.err


def test_samples(shared: Shared, workshop: Workshop, tmp_path: Path) -> None:
    workshop.run(*shared.sample, "--out", tmp_path / "one.npz")
    with np.load(tmp_path / "one.npz") as one, np.load(shared.folder / "two.npz") as two:
        assert len(one["images"]) == 200
        assert all(np.array_equal(one[name], two[name]) for name in one)


def test_an_evaluation_is_printed_once(
    shared: Shared, workshop: Workshop, tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With FID: its statistics are kept by the first process alone, and the second one has another cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (printed,) = [line for line in shared.out.splitlines() if line.startswith("[")]
    one, two = json.loads(workshop.run(*shared.eval).stdout)[0], json.loads(printed)[0]
    (one_card,), (two_card,) = one.pop("published"), two.pop("published")
    assert Path(two_card.pop("statistics_file")).name == Path(one_card.pop("statistics_file")).name
    assert one_card == two_card
    assert {key: one[key] for key in one if key != "command"} == {key: two[key] for key in two if key != "command"}
    assert (shared.folder / "commands.cache0").exists()
    assert not (shared.folder / "commands.cache1").exists()


@pytest.mark.parametrize("name", FITS)
def test_fits(shared: Shared, workshop: Workshop, tmp_path: Path, name: str) -> None:
    two = shared.folder / name
    workshop.run(*shared.fit_words, *FITS[name], "--parts", 2, "--out", tmp_path / "one")
    assert (tmp_path / "one" / "prior.safetensors").read_bytes() == (two / "prior.safetensors").read_bytes()
    assert metrics(tmp_path / "one") == metrics(two)
    assert {path.name for path in two.iterdir()} == {path.name for path in (tmp_path / "one").iterdir()}


def test_pretraining(shared: Shared, workshop: Workshop, tmp_path: Path) -> None:
    """Of a network with batch norms, whose running statistics are those of all parts; and its test ELBO."""
    one, two = tmp_path / "one", shared.folder / "pretrained"
    workshop.run(*shared.pretrain, "--parts", 2, "--out", one)
    assert (one / "backbone.safetensors").read_bytes() == (two / "backbone.safetensors").read_bytes()
    assert metrics(one) == metrics(two)
    assert "elbo" in metrics(two)[-1]
    assert {path.name for path in two.iterdir()} == {path.name for path in one.iterdir()}


def test_a_share_may_take_longer_than_every_time_out(shared: Shared) -> None:
    slow, two = shared.folder / "slow", shared.folder / "nce"
    assert (slow / "prior.safetensors").read_bytes() == (two / "prior.safetensors").read_bytes()
    assert metrics(slow) == metrics(two)


def test_a_killed_process_ends_the_run_within_seconds_in_one_true_line(shared: Shared) -> None:
    """The other one had a minute of work left before it would have met it."""
    assert shared.survived < 10
    (said,) = [line for line in shared.err.splitlines() if "has ended" in line]
    assert said.startswith("ebm-prior: error: process 1 of 2 has ended without a word (killed, or out of memory)")
    assert said.endswith("so all end; a training goes on from its last state by --resume")
    assert "stopping when" not in shared.err


def test_a_killed_process_leaves_a_run_which_one_process_can_resume(
    shared: Shared, workshop: Workshop, tmp_path: Path
) -> None:
    killed, two = shared.folder / "killed", shared.folder / "nce"
    assert shared.code == 1
    assert "SIGKILL" in shared.err or "exitcode  : -9" in shared.err
    assert not (killed / "prior.safetensors").exists()
    assert torch.load(killed / "state.pt", weights_only=True)["iteration"] == 4
    workshop.run(*shared.fit_words, "--parts", 2, "--out", killed, "--resume")
    assert (killed / "prior.safetensors").read_bytes() == (two / "prior.safetensors").read_bytes()
    assert metrics(killed) == metrics(two)


class Machines:
    """What two processes did that two launches of torchrun started, as on two machines: they share no folder."""

    def __init__(self, workshop: Workshop, network: Path, fit_words: list[object], folder: Path) -> None:
        self.homes = [folder / "first", folder / "second"]
        for home in self.homes:
            home.mkdir(parents=True)
        self.fit = ["fit", "--ckpt", network, "--data", workshop.data_root / "mnist.npz", *fit_words, "--bn-readjust"]
        commands: list[list[object]] = [
            [*self.fit, "--out", "run"],
            ["sample", workshop.folder / "fitted" / "prior.safetensors", "-n", 100, "--steps", 1, "--chunk", 64],
        ]
        commands[1] += ["--out", "drawn"]
        file = written(folder / "commands.json", commands)
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        launch = ["-m", "torch.distributed.run", "--nnodes", 2, "--nproc-per-node", 1]
        launch += ["--master-addr", "127.0.0.1", "--master-port", port]
        words = [[*launch, "--node-rank", rank, HELPERS / "two_processes.py", file] for rank in range(2)]
        started = [workshop.popen(*each, cwd=home) for each, home in zip(words, self.homes, strict=True)]
        self.said = [process.communicate()[1].decode() for process in started]
        self.codes = codes_beside(file)


@pytest.fixture(scope="module")
def machines(shared: Shared, workshop: Workshop, small_options: list[str], tmp_path_factory: Any) -> Machines:
    network = shared.folder / "pretrained" / "backbone.safetensors"
    return Machines(workshop, network, small_options, tmp_path_factory.mktemp("machines"))


def test_two_machines_make_what_one_makes(
    machines: Machines, workshop: Workshop, tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a backbone that the first one changes and writes: the second one, which cannot read it, is sent it."""
    monkeypatch.chdir(tmp_path)
    assert machines.codes == [[0, 0]] * 2, machines.said
    workshop.run(*machines.fit, "--parts", 2, "--out", "run")
    for name in ("backbone.safetensors", "prior.safetensors"):
        assert (machines.homes[0] / "run" / name).read_bytes() == Path("run", name).read_bytes()
    assert metrics(machines.homes[0] / "run") == metrics(Path("run"))


def test_only_the_first_machine_writes(machines: Machines) -> None:
    assert len(list((machines.homes[0] / "drawn").glob("*.png"))) == 100
    assert list(machines.homes[1].iterdir()) == []


def test_one_process_is_the_identity() -> None:
    assert ALONE.first
    assert ALONE.map(lambda item: 2 * item, [3, 1, 2]) == [6, 2, 4]
    assert ALONE.of_first(lambda: "made") == "made"


def test_a_total_is_taken_in_order() -> None:
    """Of 1, 1e8 and −1e8 in float32 the order decides; a tensor that none has stays out."""
    parts = [[torch.tensor(value), None, torch.tensor([2, index])] for index, value in enumerate([1.0, 1e8, -1e8])]
    total, none, counted = ALONE.total(lambda index: parts[index], range(3))
    assert (float(total), none, counted.tolist()) == (0.0, None, [6, 3])


@pytest.mark.parametrize("change", [{"parts": 3}, {"parts": 16}, {"parts": 0}])
def test_parts_divide_the_batch(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="parts must divide the batch of"):
        small(**change)


def test_processes_share_whole_parts(backbone: Backbone, images: ImageSource) -> None:
    with pytest.raises(ConfigurationError, match="expected a multiple of that, found 4"):
        fit(backbone, images, small(parts=4), processes=Processes(0, 3))


def test_parts_are_draws_of_their_own_and_no_other_result(backbone: Backbone, images: ImageSource) -> None:
    """In parts a fit is another draw of the same thing."""
    config = {"iterations": 30, "batch_size": 64, "learning_rate": 5e-3, "evaluate_every": 20}
    whole, parts = (fit(backbone, images, small(**config, parts=parts)) for parts in (1, 4))
    gains = [prior.record["held_out"]["tempered"]["nats"] for prior in (whole, parts)]
    assert gains[0] != gains[1]
    assert gains[1] == pytest.approx(gains[0], rel=0.3)
