"""Adapters of third parties, written from the README alone, through every command that takes a backbone or its prior:
many groups as VDVAE's, one vector of latents, and an encoder that runs bottom-up."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from workshop import SMALL_FIT, THIRD_PARTY, Workshop

from ebm_prior import check_backbone, fit, load_backbone, load_prior, open_images, save_backbone, save_prior
from ebm_prior.cli.main import SECTIONS
from ebm_prior.pictures.show import PICTURES, WITH_IMAGES
from ebm_prior.storage.weights import fingerprint

OTHERS = {
    "demo": "takes the bundled BIVA alone",
    "classifier": "trains the network of FD, and meets no backbone",
    "anomaly-table": "trains generators of its own",
    "ablation": "trains generators of its own",
    "latents-2d": "trains generators of its own",
}
ARCHITECTURES = {  # groups set by arguments, where the adapter has any
    "deep": {"blocks": [[1, 4], [2, 3], [4, 2]], "width": 6, "channels": 1},
    "bottom-up": {"top": 3, "bottom": 5},
}
GROUPS = {"deep": 9, "plain": 1, "bottom-up": 2}
STEPS = ("--proposals", 2, "--steps", 2)


class Shop(NamedTuple):
    """A third party's backbone, pretrained by `pretrain` and fitted by `fit`, and the images of both."""

    name: str
    workshop: Workshop
    folder: Path
    images: Path  # (60, 8, 8) or (60, 8, 8, 3) uint8
    strange: Path  # others of their kind

    @property
    def backbone(self) -> Path:
        return self.folder / "pretrained" / "backbone.safetensors"

    @property
    def prior(self) -> Path:
        return self.folder / "fitted" / "prior.safetensors"

    @property
    def shape(self) -> tuple[int, int, int]:
        return (3 if self.name == "deep" else 1, 8, 8)

    def json(self, *words: object) -> Any:
        """What a command says with --json, of which every number is finite."""
        found = json.loads(self.workshop.run(*words, "--json").stdout)
        assert all(math.isfinite(number) for number in numbers(found))
        return found


def numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from numbers(item)
    elif isinstance(value, float):
        yield value


def picture(path: Path) -> Image.Image:
    with Image.open(path) as image:
        image.load()
        assert len(np.unique(np.asarray(image))) > 2, f"{path.name} shows nothing"
        return image


@pytest.fixture(scope="module", params=THIRD_PARTY)
def shop(
    request: pytest.FixtureRequest,
    workshop: Workshop,
    small_options: list[str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Shop:
    folder, random = tmp_path_factory.mktemp(request.param), np.random.default_rng(0)
    shop = Shop(request.param, workshop, folder, folder / "images.npy", folder / "strange.npy")
    ramps = np.linspace(0, 200, 8)[:, None, None] * random.random((60, 1, 1, 1)) + np.zeros((8, shop.shape[0]))
    np.save(shop.images, (ramps + random.integers(0, 50, ramps.shape)).astype(np.uint8))
    np.save(shop.strange, random.integers(0, 256, (30, *ramps.shape[1:]), dtype=np.uint8))
    architecture: list[object] = []
    if request.param in ARCHITECTURES:
        (folder / "architecture.json").write_text(json.dumps(ARCHITECTURES[request.param]))
        architecture = ["--architecture", folder / "architecture.json"]
    new = ["--backbone", shop.name, *architecture, "--data", shop.images, "--out", folder / "pretrained"]
    words = ["--iterations", 4, "--batch-size", 8, "--checkpoint-every", 2]
    assert shop.json("pretrain", *new, *words)["iterations"] == 4
    fitted = ["--ckpt", shop.backbone, "--data", shop.images, "--out", folder / "fitted"]
    assert shop.json("fit", *fitted, *small_options)["prior"] == str(shop.prior)
    return shop


def from_python(shop: Shop) -> None:
    backbone, images = load_backbone(None, shop.backbone), open_images(shop.images)
    assert len(backbone.groups) == GROUPS[shop.name]
    assert check_backbone(backbone).skipped == ()
    prior, path, own = (
        fit(backbone, images, SMALL_FIT),
        shop.folder / "mine.safetensors",
        shop.folder / "own.safetensors",
    )
    save_backbone(backbone, own)
    save_prior(prior, path, checkpoint=str(own))
    again = load_prior(path)
    assert type(again.backbone).__name__ == THIRD_PARTY[shop.name]
    drawn = again.sample(3, seed=1).images
    assert drawn.shape == (3, *shop.shape)
    assert torch.equal(drawn, prior.sample(3, seed=1).images)
    assert 0 <= float(drawn.min()) < float(drawn.max()) <= 1


def pretrained(shop: Shop) -> None:
    lines = (shop.backbone.parent / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in lines][-1] == 4


def fitted(shop: Shop) -> None:
    picture(shop.prior.parent / "before-after.png")
    metrics = [json.loads(line) for line in (shop.prior.parent / "metrics.jsonl").read_text().splitlines()]
    assert metrics[-1]["iteration"] == SMALL_FIT["iterations"]
    dry = shop.workshop.run("fit", "--ckpt", shop.backbone, "--data", shop.images, "--dry-run")
    assert dry.stdout


def info(shop: Shop) -> None:
    described = shop.json("info", "--ckpt", shop.backbone)
    assert (described["class"], len(described["groups"])) == (THIRD_PARTY[shop.name], GROUPS[shop.name])
    assert described["fingerprint"] == fingerprint(load_backbone(None, shop.backbone))
    assert len(shop.json("info", shop.prior)["heads"]) >= GROUPS[shop.name]
    assert shop.workshop.run("info", shop.prior).stdout


def backbones(shop: Shop) -> None:
    assert shop.name in shop.workshop.run("backbones").stdout
    assert f"third_party:{THIRD_PARTY[shop.name]}" in json.dumps(shop.json("backbones"))


def doctor(shop: Shop) -> None:
    words = ["--samples", 60, "--gauge-iterations", 3, "--pairs", 1]
    found = shop.json("doctor", "--ckpt", shop.backbone, "--data", shop.images, *words)
    assert len(found["groups"]) == GROUPS[shop.name]


def sample(shop: Shop) -> None:
    compared, arrays = shop.folder / "compared.png", shop.folder / "drawn.npz"
    shop.workshop.run("sample", shop.prior, "-n", 4, *STEPS, "--compare", "--out", compared)
    picture(compared)
    shop.json("sample", shop.prior, "-n", 4, *STEPS, "--out", arrays)
    with np.load(arrays) as drawn:
        assert drawn["images"].shape == (4, *shop.shape[1:], shop.shape[0])
        assert len({image.tobytes() for image in drawn["images"]}) == 4


def evaluated(shop: Shop) -> None:
    words = ["--data", shop.images, "--samples", 40, "--gauge-iterations", 3, *STEPS]
    result = shop.workshop.run("eval", shop.prior, *words, "--json")
    (found,) = json.loads(result.stdout)
    assert math.isfinite(found["gain_nats"])
    assert "FD and KID are left out" in result.stderr
    (shop.prior.parent / "eval.json").write_text(result.stdout)


def likelihood(shop: Shop) -> None:
    few = ("--samples", 10, "--draws", 2, "--annealing-repetitions", 2, "--annealing-chains", 2, "--annealing-moves", 2)
    found = shop.json("likelihood", shop.prior, "--data", shop.images, *few)
    assert found["log_z"]["repetitions"] == 2
    assert (found["dimensions"] is None) == (not load_backbone(None, shop.backbone).discretised)


def report(shop: Shop) -> None:
    page = shop.folder / "report.html"
    shop.workshop.run("report", shop.prior.parent, "--out", page)
    assert "data:image/png" in page.read_text(encoding="utf-8")


def ood(shop: Shop) -> None:
    words = ["--in", shop.images, "--outliers", shop.strange, "--out", shop.folder / "ood"]
    chosen = ["--k", "0,4"] if shop.name == "deep" else []
    found = shop.json("ood", shop.prior, *words, *chosen, "--samples", 12, "--draws", 1, "--resamples", 5)
    rows = found["sets"][0]["rows"]
    assert {row["k"] for row in rows} == ({0, 4} if chosen else set(range(GROUPS[shop.name])))
    assert all(0 <= row[kind]["auroc"] <= 1 for row in rows for kind in ("f", "f=0"))
    results_lie_in(shop.folder / "ood")


def anomaly(shop: Shop) -> None:
    words = ["--normal", shop.images, "--test", shop.strange, "--out", shop.folder / "anomaly"]
    found = shop.json("anomaly", shop.prior, *words, "--draws", 1, "--resamples", 5)
    assert all(0 <= row["f"]["auprc"] <= 1 for row in found["sets"][0]["rows"])
    results_lie_in(shop.folder / "anomaly")


def results_lie_in(folder: Path) -> None:
    picture(folder / "histograms.png")
    assert (folder / "result.json").is_file()
    with np.load(folder / "scores.npz") as scores:
        assert all(np.isfinite(scores[key]).all() for key in scores.files if scores[key].dtype.kind == "f")


def show(shop: Shop) -> None:
    for what in PICTURES:
        out = shop.folder / f"{what}.png"
        data = ["--data", shop.images] if what in WITH_IMAGES else []
        number = 20 if what == "latents" else 2
        shop.workshop.run("show", shop.prior, what, *data, "-n", number, "--steps", 4, "--out", out)
        picture(out)
        with np.load(out.with_suffix(".npz")) as arrays:
            assert all(np.isfinite(arrays[key]).all() for key in arrays.files if arrays[key].dtype.kind == "f")


def convert(shop: Shop) -> None:
    out = shop.folder / "half.safetensors"
    shop.workshop.run(
        "convert", "--backbone", shop.name, "--ckpt", shop.backbone, "--precision", "float16", "--out", out
    )
    assert out.stat().st_size < shop.backbone.stat().st_size
    assert type(load_backbone(None, out)).__name__ == THIRD_PARTY[shop.name]


def export(shop: Shop) -> None:
    out = shop.folder / "exported"
    shop.workshop.run("export", shop.prior.parent, "--with-backbone", "--out", out)
    moved = out.rename(shop.folder / "elsewhere")
    prior = load_prior(moved / "prior.safetensors")
    assert fingerprint(prior.backbone) == fingerprint(load_backbone(None, shop.backbone))
    card = (moved / "README.md").read_text(encoding="utf-8")
    assert f"first install the package toys, which has `third_party:{THIRD_PARTY[shop.name]}`" in card
    assert str(shop.folder) not in card


def train(shop: Shop) -> None:
    words = ["--iterations", 2, "--batch-size", 8, "--evaluate-every", 2, "--warmup", 0, "--energy-from", 0]
    out = shop.folder / "trained"
    small = ["--energy-hidden", 8, "--energy-vector-layers", 1, "--prior-chain-steps", 2, "--out", out]
    network = {
        "deep": ["--ckpt", shop.backbone],
        "plain": ["--backbone", "plain"],
        "bottom-up": ["--backbone", "bottom-up", "--set", "top=2"],
    }
    found = shop.json("train", *network[shop.name], "--data", shop.images, *words, *small)
    assert math.isfinite(found["validation"]["elbo"])
    assert load_prior(out / "prior.safetensors").sample(2).images.shape == (2, *shop.shape)


COMMANDS: dict[str, Callable[[Shop], None]] = {
    "pretrain": pretrained,
    "fit": fitted,
    "info": info,
    "backbones": backbones,
    "doctor": doctor,
    "sample": sample,
    "eval": evaluated,
    "likelihood": likelihood,
    "report": report,
    "ood": ood,
    "anomaly": anomaly,
    "show": show,
    "convert": convert,
    "export": export,
    "train": train,
}


def test_no_command_is_forgotten() -> None:
    every = {command for section in SECTIONS.values() for command in section}
    assert every == COMMANDS.keys() | OTHERS.keys()
    assert not COMMANDS.keys() & OTHERS.keys()


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command(command: str, shop: Shop) -> None:
    COMMANDS[command](shop)


def test_python(shop: Shop) -> None:
    from_python(shop)
