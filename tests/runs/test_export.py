"""Export: what a friend gets works wherever it is, says what it is, and names no folder of the machine it came from."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from workshop import Workshop

from ebm_prior import EbmPriorError, load_prior
from ebm_prior.runs.export import export_prior
from ebm_prior.storage.checkpoint import prior_record

EVALUATED = {
    "prior": "prior.safetensors",
    "extractor": "FD(mine)",
    "samples": 60,
    "data": "mnist/test",
    "held_out": True,
}
EVALUATED |= {"fd_backbone": 9.5, "fd_prior": 3.25, "gap_closed": 0.625}


@pytest.fixture
def run(fitted: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    shutil.copytree(fitted, folder)
    return folder


def test_it_works_wherever_it_is(workshop: Workshop, run: Path, tmp_path: Path) -> None:
    before = load_prior(run).sample(3).images
    result = workshop.run("export", run, "--out", tmp_path / "gift", "--with-backbone")
    assert result.stdout == f"wrote {tmp_path / 'gift'}: README.md, backbone.safetensors, prior.safetensors\n"
    moved = tmp_path / "elsewhere" / "friend"
    moved.parent.mkdir()
    (tmp_path / "gift").rename(moved)
    shutil.rmtree(run)
    assert torch.equal(load_prior(moved).sample(3).images, before)
    assert str(workshop.folder).encode() not in b"".join(path.read_bytes() for path in moved.iterdir())
    workshop.run("sample", moved / "prior.safetensors", "-n", 4, "--out", tmp_path / "drawn.png")


def test_without_its_backbone_it_says_what_is_missing(workshop: Workshop, run: Path, tmp_path: Path) -> None:
    export_prior(run / "prior.safetensors", tmp_path / "gift")
    assert prior_record(tmp_path / "gift")["backbone"]["checkpoint"] == "toy.safetensors"
    card = (tmp_path / "gift" / "README.md").read_text()
    assert 'load_prior("FOLDER", checkpoint="toy.safetensors")' in card
    with pytest.raises(EbmPriorError, match="say where it is now"):
        load_prior(tmp_path / "gift")
    shutil.copy(workshop.backbone, tmp_path / "gift")
    assert torch.equal(load_prior(tmp_path / "gift").sample(2).images, load_prior(run).sample(2).images)


def test_the_card_says_what_it_is(workshop: Workshop, run: Path, tmp_path: Path) -> None:
    (run / "eval.json").write_text(json.dumps([EVALUATED]))
    workshop.run("export", run, "--out", tmp_path / "gift", "--licence", "cc-by-4.0")
    card, record = (tmp_path / "gift" / "README.md").read_text(), prior_record(run)
    for said in (
        "license: cc-by-4.0\n",
        "- Licence: cc-by-4.0\n",
        record["backbone"]["fingerprint"],
        "Latent groups, the top one first: dense (4,), point (2, 1, 1), conv (3, 4, 4)",
        "- `energy_channels`: 4\n",
        "- `iterations`: 6\n",
        f"{record['record']['held_out']['tempered']['nats']:+.3f} nats over",
        "- measured on: 60 images of mnist/test\n",
        "- FD(mine), with this prior: 3.250\n",
        "- share of the gap closed: 62.5%\n",
        "ebm-prior sample FOLDER/prior.safetensors --ckpt toy.safetensors --out samples.png\n",
    ):
        assert said in card
    assert "learning_rate" not in card  # a default


def test_a_card_without_licence_has_a_line_to_fill_in(run: Path, tmp_path: Path) -> None:
    export_prior(run, tmp_path / "gift")
    card = (tmp_path / "gift" / "README.md").read_text()
    assert "license: other\n" in card
    assert "- Licence: TO BE FILLED IN" in card


def test_one_file_holds_the_same(workshop: Workshop, run: Path, tmp_path: Path) -> None:
    export_prior(run, tmp_path / "gift", with_backbone=True)
    for name in ("one.zip", "two.zip"):
        export_prior(run, tmp_path / name, with_backbone=True)
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "one.zip") as archive:
        for path in (tmp_path / "gift").iterdir():
            assert archive.read(path.name) == path.read_bytes()


def test_nothing_is_replaced_unasked(workshop: Workshop, run: Path, tmp_path: Path) -> None:
    words = ("export", run, "--out")
    workshop.run(*words, tmp_path / "gift", "--with-backbone")
    assert "is not empty" in workshop.error(*words, tmp_path / "gift")
    workshop.run(*words, tmp_path / "gift", "--overwrite")
    assert sorted(path.name for path in (tmp_path / "gift").iterdir()) == ["README.md", "prior.safetensors"]
    (tmp_path / "gift" / "mine.txt").write_text("")
    assert "is not empty" in workshop.error(*words, tmp_path / "gift", "--overwrite")
    assert "is a file" in workshop.error(*words, run / "config.json")
    assert "exists" in workshop.error(*words, _file(tmp_path / "there.zip"))
    assert "found a folder there" in workshop.error("export", tmp_path, "--out", tmp_path / "none")
    assert "give both" in workshop.run(*words, tmp_path / "x", "--ckpt", workshop.backbone, code=2).stderr


def _file(path: Path) -> Path:
    path.write_text("")
    return path
