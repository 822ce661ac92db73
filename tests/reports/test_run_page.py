"""`ebm-prior report`: all that lies in a run's folder is on the page, and what is missing it says how to make."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from web_pages import Page, in_frame, require_fits, screenshot
from workshop import Workshop

from ebm_prior.evaluation.classifier import FeatureClassifier, save_classifier
from ebm_prior.reports import summaries
from ebm_prior.reports.run_page import configuration_blocks, training_curves
from ebm_prior.reports.text import Table
from ebm_prior.storage.atomic import with_nan, without_nan
from ebm_prior.storage.sealed import read_lines
from ebm_prior.training.fit_config import FitConfig


@pytest.fixture(scope="module")
def run(workshop: Workshop, small_options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, with what eval, doctor and ood make of it in its folder."""
    out, root = tmp_path_factory.mktemp("runs") / "mine", ["--data-root", workshop.data_root]
    save_classifier(FeatureClassifier((1, 8, 8), 4, width=4), out.parent / "classifier.safetensors")
    fit = ["fit", "--ckpt", workshop.backbone, *root, "--ema", 0.5, "--no-decay", "--out", out, *small_options]
    workshop.run(*fit)
    prior = out / "prior.safetensors"
    small = ["--gauge-iterations", 2, "--json"]
    commands = {
        "eval": ["eval", prior, *root, "--classifier", out.parent / "classifier.safetensors", *small],
        "doctor": ["doctor", "--ckpt", workshop.backbone, *root, *small],
    }
    for name, words in commands.items():
        (out / f"{name}.json").write_text(workshop.run(*words).stdout)
    workshop.run("ood", prior, *root, "--outliers", "noise", "--samples", 40, "--draws", 1, "--resamples", 20)
    return out


@pytest.fixture(scope="module")
def page(workshop: Workshop, run: Path) -> Page:
    assert workshop.run("report", run).stdout == f"wrote {run / 'report.html'}\n"
    page = Page((run / "report.html").read_text())
    page.require_self_contained()
    return page


def results(run: Path) -> dict[str, Any]:
    named = {name: json.loads((run / f"{name}.json").read_text()) for name in ("eval", "doctor")}
    return named | {"ood": json.loads((run / "ood-001" / "result.json").read_text())}


def test_the_figures_are_in_the_tables(run: Path, page: Page) -> None:
    found = results(run)
    for which in ("backbone", "prior", "reconstruction"):
        assert f"{found['eval'][0][f'fd_{which}']:.4g}" in page.cells
    assert f"{found['eval'][0]['auc_after']:.3f}" in page.cells
    assert f"{found['doctor']['groups'][1]['kl_nats']:.2f}" in page.cells
    for row in found["ood"]["sets"][0]["rows"]:
        assert f"{row['f']['auroc']:.4f}" in page.cells
    assert "L>1" in page.cells
    assert found["doctor"]["verdict"] in page.words
    assert "Not measured yet" not in page.words


def test_the_pictures_are_there(run: Path, page: Page) -> None:
    assert page.images[0] == (run / "before-after.png").read_bytes()
    assert page.images[-1] == (run / "ood-001" / "histograms.png").read_bytes()
    assert len(page.images) == 2 + 4  # the training curves


def test_the_commands_are_those_that_made_it(workshop: Workshop, run: Path, page: Page, tmp_path: Path) -> None:
    """Each result names its command, as it was typed; that of the fit is made of its record, and gives its bytes."""
    for each in (*results(run)["eval"], results(run)["doctor"], results(run)["ood"]):
        assert each["command"].startswith("ebm-prior ")
        assert each["command"] in page.words
    assert str(workshop.data_root) in results(run)["ood"]["command"]
    (line,) = [line for line in page.words.splitlines() if " ebm-prior fit " in line]
    threads, program, *words = shlex.split(line)
    assert (threads, program) == ("OMP_NUM_THREADS=1", "ebm-prior")
    assert words[-2:] == ["--out", str(run)]
    assert "--no-decay" in words
    workshop.run(*words[:-1], tmp_path / "again", "--data-root", workshop.data_root)
    assert (tmp_path / "again" / "prior.safetensors").read_bytes() == (run / "prior.safetensors").read_bytes()


def test_settings_that_are_not_the_default_are_named(page: Page) -> None:
    place = page.cells.index("ema")
    assert page.cells[place : place + 3] == ["ema", "0.5", "0.99"]
    assert "weight_decay" in page.cells


def test_what_became_of_the_settings_where_one_ratio_saturated() -> None:
    parts = configuration_blocks(FitConfig(), {"saturated": {"iteration": 100, "ess_fraction": 1e-4}})
    (became,) = [part for part in parts if isinstance(part, Table)]
    assert became.rows == [["iterations", "900", "2400"], ["ratios", "staged", "auto"], ["batch_size", "128", "256"]]
    assert not any(isinstance(part, Table) for part in configuration_blocks(FitConfig(), {"saturated": None}))


def test_it_says_how_to_make_what_is_missing(workshop: Workshop, run: Path, tmp_path: Path) -> None:
    bare = tmp_path / "a run"
    bare.mkdir()
    for name in ("config.json", "prior.safetensors", "metrics.jsonl"):
        shutil.copy(run / name, bare)
    workshop.run("report", bare, "--out", tmp_path / "page.html")
    page = Page((tmp_path / "page.html").read_text())
    page.require_self_contained()
    assert page.words.count("Not measured yet") == 3
    for name in ("eval", "doctor", "ood"):
        (line,) = [text for text in page.words.splitlines() if text.startswith(f"ebm-prior {name} ")]
        words = shlex.split(line)
        assert words[-2:] == [">", str(bare / f"{name}.json")]
        assert "--json" in words
    workshop.run("report", bare, "--eval", run / "eval.json", "--out", tmp_path / "page.html", "--overwrite")
    assert "gap closed FDrec" in (tmp_path / "page.html").read_text()


def test_mistakes_are_named(workshop: Workshop, run: Path, page: Page, tmp_path: Path) -> None:
    assert "pass --overwrite" in workshop.error("report", run)
    assert "expected the folder of a run of ebm-prior fit" in workshop.error("report", tmp_path)
    shutil.copy(run / "config.json", tmp_path)
    assert "finish the run" in workshop.error("report", tmp_path)
    arguments = ("report", run, "--out", tmp_path / "page.html")
    assert "verdict" in workshop.error(*arguments, "--doctor", run / "eval.json")
    (tmp_path / "broken.json").write_text("[{")
    assert "cannot be read" in workshop.error(*arguments, "--eval", tmp_path / "broken.json")
    assert not (tmp_path / "page.html").exists()


def test_numbers_that_are_not_finite_are_shown(workshop: Workshop, run: Path, tmp_path: Path) -> None:
    result = {"a": [1.0, None], "b": {"c": None}, "d": "text"}
    assert without_nan(with_nan(result)) == result
    (evaluation,) = results(run)["eval"]
    (tmp_path / "eval.json").write_text(json.dumps([evaluation | {"gap_closed": None}]))
    workshop.run("report", run, "--eval", tmp_path / "eval.json", "--out", tmp_path / "page.html")
    assert "nan%" in Page((tmp_path / "page.html").read_text()).cells


def test_curves_of_what_was_logged(run: Path) -> None:
    metrics = read_lines(run / "metrics.jsonl")
    assert len(training_curves(metrics)) == 4
    staged = [{"iteration": i, "gain": 1.0 * i, "ess_fraction": 0.5, "stage": 1} for i in (1, 2)]
    odd = [{"iteration": 2, "rolled_back": "why", "rate": 0.5}, {"iteration": 3, "gain": None}]
    assert [each.caption.split()[0] for each in training_curves(staged + odd)] == ["Held-out", "Effective"]
    assert training_curves([]) == []


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_it_looks_right_in_a_browser(run: Path, page: Page, tmp_path: Path, width: int, dark: bool) -> None:
    """On a telephone and on a desk, the paper is light or dark as the reader's browser is, and there is much on it."""
    text = (run / "report.html").read_text()
    shot = screenshot(in_frame(text, width, tmp_path), dark=dark, width=max(width, 500))[:900, :width]
    assert shot.shape == (900, width, 3)
    assert (shot[:, :10] < 40).all() if dark else (shot[:, :10] > 240).all()
    assert 0.03 < (abs(shot - shot[2, 2]).sum(2) > 200).mean() < 0.8
    if not dark:
        require_fits(text, width, tmp_path)


@pytest.mark.parametrize(
    ("ratios", "stages", "saturated", "narrow", "said"),
    [
        ("auto", None, None, False, "maximum likelihood by chains"),
        ("auto", [], None, False, "one density ratio, which does not saturate"),
        ("one", [], None, True, "one density ratio, saturated: stages go further"),
        ("staged", [], None, False, "staged density ratios, as asked: none has brought a gain"),
        ("staged", [{}], None, False, "1 staged density ratios, as asked"),
        ("staged", [{}] * 2, {"ess_fraction": 0.001, "iteration": 7}, False, "2 staged .* one saturates .ESS 0.1%"),
    ],
)
def test_a_fit_says_what_its_heads_were_trained_on(
    ratios: str, stages: Any, saturated: Any, narrow: bool, said: str
) -> None:
    gain = {"nats": 1.0, "ess_fraction": 0.5, "tau": 1.0}
    record = {"held_out": {"plain": gain, "tempered": gain}, "stages": stages, "saturated": saturated, "narrow": narrow}
    record["config"] = {"ratios": ratios}
    lines = summaries.fit_blocks(record | {"iterations": 9, "best_iteration": 9, "rollbacks": 0})
    assert any(isinstance(line, str) and re.match(said, line) for line in lines)
