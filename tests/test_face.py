"""The face: every public name says what it is for, with an example that runs; help fits on a screen."""

from __future__ import annotations

import doctest
import pydoc
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from workshop import SMALL_FIT, Workshop

import ebm_prior
from ebm_prior.evaluation.classifier import ClassifierConfig, save_classifier, train_classifier

NAMES = sorted(ebm_prior._PLACES)
FUNCTIONS = ("evaluate", "fit", "load_backbone", "save_backbone", "save_prior")


@pytest.fixture(scope="module")
def around(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """What the examples find: a backbone, images, a prior, a classifier of such images, torch, and the face."""
    folder = tmp_path_factory.mktemp("face")
    backbone = ebm_prior.load_backbone(None, workshop.backbone)
    images = ebm_prior.open_images(workshop.images)
    labelled = ebm_prior.from_dataset([(image, index % 2) for index, image in enumerate(images.batch(range(64)))])
    network, _ = train_classifier(labelled, labelled, ClassifierConfig(epochs=1, batch_size=32))
    save_classifier(network, folder / "classifier.safetensors")
    prior = ebm_prior.fit(backbone, images, SMALL_FIT)
    face = {name: getattr(ebm_prior, name) for name in NAMES}
    things = {"backbone": backbone, "images": images, "prior": prior, "classifier": folder / "classifier.safetensors"}
    return {**face, **things, "torch": torch, "np": np}


@pytest.mark.parametrize("name", NAMES)
def test_its_example_runs(
    name: str, around: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = getattr(ebm_prior, name)
    text = found.__doc__ or ""
    example = doctest.DocTestParser().get_doctest(text, dict(around), name, None, 0)
    assert 1 <= len(example.examples) <= 4, f"{name} has no example, or a long one"
    said: list[str] = []
    doctest.DocTestRunner().run(example, out=said.append)
    assert not said, "".join(said)
    assert text.split("\n", 1)[0].endswith((".", ":")), f"{name}: one sentence first"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_says_what_it_takes_and_raises(name: str) -> None:
    function = getattr(ebm_prior, name)
    text = function.__doc__
    assert "Args:" in text
    assert "Raises:" in text
    head = text.partition("Raises:")[0]
    taken = [argument for argument in function.__annotations__ if argument != "return"]
    assert [argument for argument in taken if f"{argument}:" not in head and f"{argument}, " not in head] in (
        [],
        ["on_evaluate"],
    )


def test_help_fits_on_a_screen() -> None:
    assert len(pydoc.render_doc(ebm_prior).splitlines()) <= 60
    described = ebm_prior.__doc__ or ""
    assert [name for name in NAMES if name not in described] == []


def test_the_reference_has_every_name(tmp_path: Path) -> None:
    """As a page that `.ci/docs` makes: of the face alone, with what each setting means."""
    pytest.importorskip("pdoc", reason="needs the extra docs")
    program, page = Path(__file__).resolve().parents[1] / ".ci" / "docs", tmp_path / "api.html"
    subprocess.run([sys.executable, program, page], check=True, capture_output=True, timeout=120)
    text = page.read_text(encoding="utf-8")
    assert sorted(each.partition('"')[0] for each in text.split('<section id="')[1:]) == NAMES
    assert 'id="FitConfig.warmup"' in text
    assert ebm_prior.FitConfig.__dataclass_fields__["warmup"].metadata["help"] in text
