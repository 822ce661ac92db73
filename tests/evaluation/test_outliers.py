"""What `ebm-prior ood` and `anomaly` write: the scores themselves, for the images they name, and fair comparisons."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from workshop import Workshop

from ebm_prior.cli.outliers import parsed_k
from ebm_prior.compute.randomness import Purpose, derived_generator
from ebm_prior.data.images import from_array, open_images
from ebm_prior.data.outlier_sets import Adapted, labelled, open_set
from ebm_prior.errors import ConfigurationError, DataError
from ebm_prior.evaluation.detection import detection
from ebm_prior.evaluation.normality import TermDensity, code_length
from ebm_prior.evaluation.outliers import OutlierConfig, every_form, set_sizes
from ebm_prior.model.scores import DERIVED, Form, observed
from ebm_prior.runs.outliers import FILES
from ebm_prior.storage.checkpoint import load_prior

WORDS = ["--samples", 40, "--draws", 2, "--resamples", 20, "--seed", 3]


@pytest.fixture(scope="module")
def found(workshop: Workshop, fitted: Path) -> tuple[dict[str, Any], Path]:
    to = workshop.folder / "ood"
    words = [
        "--in",
        "mnist",
        "--data-root",
        workshop.data_root,
        "--outliers",
        workshop.images,
        "--outliers",
        "noise",
        "--out",
        to,
    ]
    result = workshop.run("ood", fitted / "prior.safetensors", *words, *WORDS, "--json")
    return json.loads(result.stdout), to


def test_the_files_hold_the_scores_of_the_images_they_name(
    workshop: Workshop, fitted: Path, found: tuple[dict[str, Any], Path]
) -> None:
    prior = load_prior(fitted / "prior.safetensors")
    with np.load(found[1] / "scores.npz") as file:
        names, sets, rows = list(file["scores"]), list(file["sets"]), file["rows_1"]
        values = [file[f"values_{index}"] for index in range(3)]
    assert sets == ["mnist/test", str(workshop.images), "noise"]
    assert [len(each) for each in values] == [40, 40, 40]
    assert len(set(rows)) == 40
    form = Form(2, True, "iw")
    own = prior.scores(open_images(workshop.images).batch(rows), [form], draws=2, seed=3)[form]
    np.testing.assert_allclose(values[1][:, names.index(form.name)], own, rtol=1e-5, atol=1e-4)


def test_the_terms_of_the_same_images_lie_beside_the_scores(
    workshop: Workshop, fitted: Path, found: tuple[dict[str, Any], Path]
) -> None:
    prior = load_prior(fitted / "prior.safetensors")
    with np.load(found[1] / "terms.npz") as file, np.load(found[1] / "scores.npz") as scores:
        names, values, code, rows = list(file["terms"]), file["values_1"], file["code_1"], file["rows_1"]
        assert (rows == scores["rows_1"]).all()
        bound = scores["values_1"][:, list(scores["scores"]).index(Form(0, mode="elbo").name)]
    batch = open_images(workshop.images).batch(rows)
    own = prior.terms(batch, draws=2, seed=3)
    assert names == list(own)
    np.testing.assert_allclose(values, np.stack(list(own.values()), axis=1), rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(values.sum(1), bound, rtol=1e-5, atol=1e-3)
    np.testing.assert_array_equal(code, code_length(observed(prior.backbone, batch, seed=3)))
    assert (code < code_length(batch)).all()  # this backbone models binarised pixels, which are simpler


def test_scores_made_of_others(workshop: Workshop, fitted: Path, tmp_path: Path) -> None:
    """Each by hand from the library; the reference is the part of the normal images that is not scored."""
    words = ["ood", fitted / "prior.safetensors", "--in", "mnist", "--data-root", workshop.data_root, "--samples", 24]
    words += ["--draws", 2, "--resamples", 20, "--seed", 3, "--reference", 30, "--json"]
    modes = [word for mode in DERIVED for word in ("--mode", mode)]
    result = json.loads(workshop.run(*words, *modes, "--outliers", "noise", "--out", tmp_path / "a").stdout)
    assert [(row["score"], row["k"], row["mode"]) for row in result["sets"][0]["rows"]] == [
        ("L", 0, mode) for mode in DERIVED
    ]
    normal = open_images("mnist", split="test", data_root=workshop.data_root)
    assert (result["images"], result["reference"]) == (24, 30)
    with np.load(tmp_path / "a" / "scores.npz") as file:
        names, values, rows = list(file["scores"]), file["values_0"], file["rows_0"]
    mixed = torch.randperm(len(normal), generator=derived_generator(3, Purpose.OUTLIER_CHOICE))
    assert sorted(mixed[:24].tolist()) == rows.tolist()
    scored, reference = normal.batch(rows), normal.batch(mixed[24:54].sort().values)
    prior = load_prior(fitted / "prior.safetensors")
    for energy in (True, False):
        bound = Form(0, mode="iw", energy=energy)
        level, usual = (prior.scores(x, bound, draws=2, seed=3)[bound].double().numpy() for x in (scored, reference))
        terms = [prior.terms(x, draws=2, seed=3) for x in (scored, reference)]
        own, known = (
            np.stack([v.double().numpy() for k, v in t.items() if energy or not k.startswith("f")], axis=1)
            for t in terms
        )
        expected = {
            "complexity": level + code_length(observed(prior.backbone, scored, seed=3)),
            "typicality": -np.abs(level - usual.mean()),
            "composite": TermDensity(known).log_density(own),
        }
        for mode in DERIVED:
            column = values[:, names.index(Form(0, mode=mode, energy=energy).name)]
            np.testing.assert_allclose(column, expected[mode], rtol=1e-3, atol=2e-2)

    workshop.run(*words, *modes, "--outliers", "constant", "--out", tmp_path / "b")
    with np.load(tmp_path / "b" / "scores.npz") as file:
        np.testing.assert_array_equal(file["values_0"], values)  # no outlier has a part in it
    refused = workshop.run(*words, "--mode", "iw", "--outliers", "noise", "--out", tmp_path / "c", code=2)
    assert "leave out --reference" in refused.stderr
    text = workshop.run(*words[:-1], *modes, "--outliers", "noise", "--out", tmp_path / "d").stdout
    assert "reference for typicality and composite: 30 further images of mnist/test" in text


def test_the_other_direction(workshop: Workshop, fitted: Path, tmp_path: Path) -> None:
    """It is what the command gives for the other prior with --in and --outliers exchanged."""
    prior, other = fitted / "prior.safetensors", tmp_path / "other.safetensors"
    other.write_bytes(prior.read_bytes())
    options = ["--data-root", workshop.data_root, "--mode", "iw", "--k", 0, *WORDS]
    there = ["ood", prior, "--in", "mnist", "--outliers", workshop.images, "--outliers", "noise", *options]
    found = json.loads(workshop.run(*there, "--reverse", other, "--out", tmp_path / "there", "--json").stdout)
    assert [(each["prior"], each["in"], [one["out"] for one in each["sets"]]) for each in found] == [
        (str(prior), "mnist/test", [str(workshop.images), "noise"]),
        (str(other), str(workshop.images), ["mnist/test"]),
    ]
    back = ["ood", other, "--in", workshop.images, "--outliers", "mnist", *options]
    alone = json.loads(workshop.run(*back, "--out", tmp_path / "back", "--json").stdout)
    assert found[1]["sets"] == alone["sets"]
    beside = tmp_path / "there-reverse-1"
    assert found[1]["files"] == [str(beside / name) for name in FILES]
    for name in ("scores.npz", "terms.npz"):
        assert (beside / name).read_bytes() == (tmp_path / "back" / name).read_bytes()
    assert "there-reverse-1 holds results" in workshop.error(*back, "--out", beside)
    text = workshop.run(*there, "--reverse", other, "--out", tmp_path / "text").stdout
    assert text.index("mnist/test (in), noise (out)") < text.index(f"{workshop.images} (in), mnist/test (out)")
    assert "--reverse is given 3 times" in workshop.run(*there, *["--reverse", prior] * 3, code=2).stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--mode", "composite", "--k", 1], "L^{>0} alone: leave out --k"),
        (["--mode", "prior", "--mode", "complexity", "--lower", "mean"], "L^{>0} alone: leave out --lower"),
        (["--mode", "prior", "--mode", "elbo", "--k", 1], "add 0 to --k"),
        (["--k", 0, "--lower", "mean"], "k above 0: leave out --lower"),
        (["--mode", "typicality", "--steps", 3], "samples latent groups: leave out --steps"),
        (["--lower", "mean", "--step-size", 0.1], "samples latent groups: leave out --step-size"),
        (["--reference", 9], "have reference images: leave out --reference"),
    ],
)
def test_options_without_effect_are_refused(
    workshop: Workshop, prior: Path, words: list[object], said: str, tmp_path: Path
) -> None:
    where = ["--in", "mnist", "--data-root", workshop.data_root, "--outliers", "noise", "--out", tmp_path / "none"]
    assert said in workshop.run("ood", prior, *where, *words, code=2).stderr
    assert not (tmp_path / "none").exists()


def test_the_table_is_made_of_the_files(found: tuple[dict[str, Any], Path]) -> None:
    result, to = found
    with np.load(to / "scores.npz") as file:
        names, values = list(file["scores"]), [file[f"values_{index}"] for index in range(3)]
    assert json.loads((to / "result.json").read_text())["sets"] == result["sets"]
    for index, each in enumerate(result["sets"], start=1):
        assert len(each["rows"]) == 4 + 8 + 12  # L>0, L>1 and L>2, LLR>1 and LLR>2
        for row in each["rows"]:
            form = Form(row["k"], row["score"] == "LLR", row["mode"], row["lower"] or "sample")
            sign = 1 if form.ratio else -1
            for key, variant in (("f", form), ("f=0", form._replace(energy=False))):
                column = names.index(variant.name)
                expected = detection(sign * values[index][:, column], sign * values[0][:, column])
                assert row[key]["auroc"] == pytest.approx(expected.auroc)
                assert row[key]["fpr80"] == pytest.approx(expected.fpr80)
                assert row[key]["low"]["auroc"] <= expected.auroc <= row[key]["high"]["auroc"]
            assert row["gain"]["auroc"] == pytest.approx(row["f"]["auroc"] - row["f=0"]["auroc"])


def test_the_picture_is_there_and_the_table_is_readable(
    workshop: Workshop, fitted: Path, found: tuple[dict[str, Any], Path]
) -> None:
    with Image.open(found[1] / "histograms.png") as image:
        assert 3 * 380 < image.width < 4 * 420  # L>0 to L>2
        assert image.height > 9 * 290  # L: 3 modes, 2 of lower groups; LLR: 3 modes, 2 of lower groups
    words = [
        "--in",
        "mnist",
        "--outliers",
        "constant",
        "--data-root",
        workshop.data_root,
        "--k",
        "0,2",
        "--mode",
        "elbo",
        "--lower",
        "mean",
    ]
    text = workshop.run("ood", fitted / "prior.safetensors", *words, *WORDS).stdout
    assert "40 images of each set, 2 draws" in text
    assert "mnist/test (in), constant (out)" in text
    assert [line.split()[0] for line in text.splitlines() if line.startswith("L")] == ["L>0", "L>2", "LLR>2"]
    assert (fitted / "ood-001" / "scores.npz").exists()


def test_results_are_not_written_over_unasked(
    workshop: Workshop, prior: Path, found: tuple[dict[str, Any], Path]
) -> None:
    words = [
        "ood",
        prior,
        "--in",
        "mnist",
        "--outliers",
        "noise",
        "--data-root",
        workshop.data_root,
        *WORDS,
        "--k",
        0,
        "--out",
    ]
    assert "--overwrite" in workshop.error(*words, found[1])
    assert "other files" in workshop.error(*words, workshop.folder)
    assert "is a file" in workshop.error(*words, workshop.images)
    assert "pass --in with" in workshop.error("ood", prior, "--outliers", "noise", "--out", workshop.folder / "new")
    assert "from 0 to 2" in workshop.error(*words, workshop.folder / "new", "--k", "1,3")


def test_anomalies_by_label(workshop: Workshop, prior: Path, tmp_path: Path) -> None:
    pixels = np.load(workshop.images)
    np.savez(tmp_path / "labelled.npz", images=pixels[:60], labels=np.arange(60) % 3)
    words = ["--normal", tmp_path / "labelled.npz", "--test", tmp_path / "labelled.npz", "--labels", 2]
    options = ["--draws", 2, "--resamples", 20, "--out", tmp_path / "results", "--json"]
    result = json.loads(workshop.run("anomaly", prior, *words, *options).stdout)
    assert result["images"] == [40, 20]
    assert result["prevalence"] == pytest.approx(1 / 3)
    assert [(row["score"], row["k"], row["mode"]) for row in result["sets"][0]["rows"]] == [
        ("L", 0, "eq20"),
        ("L", 0, "elbo"),
        ("L", 0, "iw"),
        ("L", 0, "prior"),
    ]
    with np.load(tmp_path / "results" / "scores.npz") as file:
        values, names = (file["values_0"], file["values_1"]), list(file["scores"])
    row = result["sets"][0]["rows"][1]
    column = names.index(Form(0, mode="elbo").name)
    expected = detection(-values[1][:, column], -values[0][:, column])
    assert row["f"]["auprc"] == pytest.approx(expected.auprc)
    assert row["f"]["auprc_trapezoid"] == pytest.approx(expected.auprc_trapezoid)
    own = ["--mode", "composite", "--mode", "prior", *options[2:4], "--json", "--out", tmp_path / "own"]
    result = json.loads(workshop.run("anomaly", prior, *words, *own).stdout)
    assert (result["images"], result["reference"]) == ([20, 20], 20)  # half of the 40 normal images are the reference
    assert [row["mode"] for row in result["sets"][0]["rows"]] == ["composite", "prior"]
    text = workshop.run("anomaly", prior, *words, "--draws", 1, "--resamples", 5, "--out", tmp_path / "again").stdout
    assert "40 normal and 20 anomalous images" in text
    assert "chance level of AUPRC 0.333" in text


def test_labels_choose_and_complain() -> None:
    source = from_array(np.zeros((6, 4, 4), np.uint8), [0, 1, 2, 0, 1, 2])
    assert labelled(source, [2], among=True).labels.tolist() == [2, 2]  # type: ignore[union-attr]
    assert len(labelled(source, [2], among=False)) == 4
    assert len(labelled(source, [], among=True)) == 6
    with pytest.raises(DataError, match="its labels are 0, 1, 2"):
        labelled(source, [7], among=True)
    with pytest.raises(DataError, match="no labels"):
        labelled(from_array(np.zeros((6, 4, 4), np.uint8)), [1], among=True)


def test_images_are_brought_to_the_backbones_shape_without_loss() -> None:
    grey = from_array(np.full((2, 4, 6), 51, np.uint8), name="grey")
    images = Adapted(grey, (3, 8, 8)).batch([1])
    assert images.shape == (1, 3, 8, 8)
    assert images[0, 2, 2:6, 1:7].unique().tolist() == [pytest.approx(0.2)]
    assert float(images.sum()) == pytest.approx(0.2 * 24 * 3, rel=1e-5)
    assert Adapted(grey, (3, 8, 8)).name == "grey (as RGB, padded to 8×8)"
    for shape in [(1, 4, 4), (3, 2, 8)]:
        with pytest.raises(DataError, match="expected images of shape"):
            Adapted(grey, shape)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="expected images of shape"):
        Adapted(from_array(np.zeros((2, 3, 4, 4), np.uint8)), (1, 4, 4))


def test_synthetic_sets() -> None:
    noise, constant = (open_set(name, (3, 5, 5), 30, seed=1).batch(range(30)) for name in ("noise", "constant"))
    assert noise.shape == constant.shape == (30, 3, 5, 5)
    assert noise.flatten(1).std(1).min() > 0.2
    assert constant.flatten(2).std(2).max() == 0
    assert constant[:, :, 0, 0].std() > 0.2
    assert torch.equal(open_set("noise", (3, 5, 5), 30, seed=1).batch(range(30)), noise)


def test_which_forms_and_which_k() -> None:
    forms = every_form([0, 1], ("elbo", "iw"), ("sample", "mean"))
    assert len(forms) == len(set(forms)) == 2 + 2 + 4
    assert every_form([1], ("composite",), ("sample", "mean")) == [Form(0, mode="composite")]
    assert parsed_k("all", 3) == [0, 1, 2]
    assert parsed_k("2,0", 3) == [0, 2]
    for text in ("3", "-1", "x", "", "0,,1"):
        with pytest.raises(ConfigurationError, match="from 0 to 2"):
            parsed_k(text, 3)
    with pytest.raises(ConfigurationError, match="positive"):
        OutlierConfig(draws=0)


def test_a_reference_takes_half_of_few_images() -> None:
    forms, config = [Form(0, mode="typicality")], OutlierConfig(reference=30)
    sets = [from_array(np.zeros((n, 4, 4), np.uint8)) for n in (100, 41, 3)]
    assert set_sizes(sets[0], sets[:1], forms, config) == (70, 30)
    assert set_sizes(sets[1], sets[:1], forms, config) == (21, 20)
    assert set_sizes(sets[0], sets[1:2], [Form(0, mode="complexity")], config) == (41, 0)
    with pytest.raises(DataError, match="4 or more normal images"):
        set_sizes(sets[2], sets[:1], forms, config)


def test_the_old_spelling_goes_on_with_a_remark(workshop: Workshop, prior: Path, tmp_path: Path) -> None:
    words = ["ood", prior, "--in", "mnist", "--data-root", workshop.data_root, *WORDS, "--k", 0, "--json"]
    old = workshop.run(*words, "--out", "noise", "--out", "constant", "--to", tmp_path / "old")
    assert "old spelling: --outliers for the sets, --out for the folder" in old.stderr
    new = workshop.run(*words, "--outliers", "noise", "--outliers", "constant", "--out", tmp_path / "new")
    assert "old spelling" not in new.stderr
    assert json.loads(old.stdout)["sets"] == json.loads(new.stdout)["sets"]
    assert (tmp_path / "old" / "scores.npz").read_bytes() == (tmp_path / "new" / "scores.npz").read_bytes()
    assert "--to is an old spelling" in workshop.run(*words, "--outliers", "noise", "--to", tmp_path / "b").stderr
    assert "--outliers" in workshop.run(*words, code=2).stderr
    for wrong in (("--out", "a", "--out", "b"), ("--out", "a", "--to", "b"), ("--out", "")):
        workshop.run(*words, "--outliers", "noise", *wrong, code=2)
    assert "--to" not in workshop.run("ood", "--help-all").stdout
    pixels = np.load(workshop.images)
    np.savez(tmp_path / "labelled.npz", images=pixels[:30], labels=np.arange(30) % 3)
    words = ["anomaly", prior, "--normal", tmp_path / "labelled.npz", "--test", tmp_path / "labelled.npz"]
    words += ["--labels", 2, "--draws", 1, "--resamples", 5]
    assert "--to is an old spelling: --out" in workshop.run(*words, "--to", tmp_path / "a").stderr
    assert (tmp_path / "a" / "scores.npz").exists()
