"""FID, KID and Inception Score as published: through the whole path, with a small network in Inception's place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from listener import Listener
from small_inception import FEATURES, stand_in
from workshop import Workshop

from ebm_prior.data.images import ImageSource, from_array
from ebm_prior.errors import CheckpointError, ConfigurationError
from ebm_prior.evaluation import inception
from ebm_prior.evaluation.fid import FidConfig, figures, published, reference_statistics
from ebm_prior.evaluation.inception import MODES, Weights
from ebm_prior.evaluation.metrics import FeatureStatistics, extract, frechet_distance, inception_score, kernel_distance
from ebm_prior.model.prior import ANCESTRAL
from ebm_prior.storage.checkpoint import load_prior


def test_the_inception_score_of_known_classes() -> None:
    """Images all alike: 1. K classes told apart without doubt, equally often: K. Each with probability p: K p^p
    ((1 − p)/(K − 1))^(1 − p)."""
    assert inception_score(torch.randn(1, 7).expand(40, 7)) == (pytest.approx(1), pytest.approx(0, abs=1e-9))
    labels = torch.arange(200) % 4
    sure = torch.nn.functional.one_hot(labels, 4).float()
    assert inception_score(1e6 * sure) == (pytest.approx(4), pytest.approx(0, abs=1e-9))
    p = 0.7
    logits = torch.where(sure > 0, torch.tensor(p), torch.tensor((1 - p) / 3)).log()
    expected = 4 * p**p * ((1 - p) / 3) ** (1 - p)
    mean, deviation = inception_score(logits - 3.0, splits=5)  # a constant changes no probability
    assert mean == pytest.approx(expected, rel=1e-6)
    assert deviation == pytest.approx(0, abs=1e-6)


def test_the_parts_of_the_inception_score_are_consecutive() -> None:
    """One part with one class (1), one with two (2): mean 1.5, population sd 0.5; in one part, by its marginal."""
    logits = torch.tensor([[1e6, 0, 0]] * 20 + [[0, 1e6, 0], [0, 0, 1e6]] * 10)
    assert inception_score(logits, splits=2) == (pytest.approx(1.5), pytest.approx(0.5))
    entropy = -(0.5 * np.log(0.5) + 2 * 0.25 * np.log(0.25))
    assert inception_score(logits, splits=1)[0] == pytest.approx(np.exp(entropy))


@pytest.fixture
def source() -> ImageSource:
    pixels = np.random.default_rng(0).integers(0, 256, (90, 8, 8), dtype=np.uint8)
    return from_array(pixels, name="random/train")


def test_cached_statistics_are_the_fresh_ones(source: ImageSource, tmp_path: Path) -> None:
    told = Listener()
    fresh, cached = (
        reference_statistics(source, "train", stand_in(), cache_dir=tmp_path, progress=told) for _ in range(2)
    )
    assert sum(told.counts) == 2 * len(source)
    features = extract(stand_in(), source.batch(range(90)))
    direct = FeatureStatistics.of(features)
    for each in (fresh, cached):
        assert each.moments.digest == direct.digest
        assert sorted(map(tuple, each.features.tolist())) == sorted(map(tuple, features.tolist()))
    assert torch.equal(fresh.features, cached.features)
    assert fresh.provenance == cached.provenance
    assert fresh.provenance | {"data": "random/train", "split": "train", "images": 90} == fresh.provenance
    assert fresh.provenance["mode"] == "legacy_tensorflow"
    assert fresh.provenance["weights_sha256"] == "ab" * 32
    samples = torch.randn(40, FEATURES)
    assert figures(samples, stand_in(), fresh, 0) == figures(samples, stand_in(), cached, 0)


def test_statistics_are_of_these_images_and_this_network(source: ImageSource, tmp_path: Path) -> None:
    found = [
        reference_statistics(images, "train", network, cache_dir=tmp_path).path
        for images, network in (
            (source, stand_in()),
            (source, stand_in("clean")),
            (source, stand_in(sha256="cd" * 32)),
            (source.subset(range(80)), stand_in()),
            (source, stand_in()),
        )
    ]
    assert len(set(found)) == 4
    assert found[0] == found[-1]


def test_damaged_statistics_are_refused(source: ImageSource, tmp_path: Path) -> None:
    path = reference_statistics(source, "train", stand_in(), cache_dir=tmp_path).path
    other = reference_statistics(source, "train", stand_in(sha256="cd" * 32), cache_dir=tmp_path).path
    path.write_bytes(other.read_bytes())
    with pytest.raises(CheckpointError, match=r"expected .*weights_sha256.*delete it"):
        reference_statistics(source, "train", stand_in(), cache_dir=tmp_path)
    path.write_bytes(other.read_bytes()[:500])
    with pytest.raises(CheckpointError, match="is damaged"):
        reference_statistics(source, "train", stand_in(), cache_dir=tmp_path)


def test_no_flipped_bit_of_cached_statistics_changes_a_number(source: ImageSource, tmp_path: Path) -> None:
    """Of 300, half of them in the zip's own directory: each is noticed, or is of something that is not read."""
    whole = reference_statistics(source, "train", stand_in(), cache_dir=tmp_path)
    content, random, noticed = whole.path.read_bytes(), np.random.default_rng(0), 0
    directory = content.index(b"PK\1\2")
    places = [*random.integers(0, directory, 150), *random.integers(directory, len(content), 150)]
    for place, bit in zip(places, random.integers(0, 8, 300), strict=True):
        flipped = bytearray(content)
        flipped[place] ^= 1 << bit
        whole.path.write_bytes(flipped)
        try:
            found = reference_statistics(source, "train", stand_in(), cache_dir=tmp_path)
        except CheckpointError as error:
            assert "delete it, and it will be computed again" in str(error)  # noqa: PT017 (it need not be raised)
            noticed += 1
        else:
            assert found.moments.digest == whole.moments.digest
            assert torch.equal(found.features, whole.features)
    assert noticed > 150


def test_the_figures_are_those_of_the_samples(
    workshop: Workshop, fitted: Path, images: ImageSource, tmp_path: Path
) -> None:
    prior, network = load_prior(fitted / "prior.safetensors"), stand_in()
    config = FidConfig(samples=70)
    ((card,),) = published([prior], [network], images, config, seed=4, chunk=64, cache_dir=tmp_path)
    real = extract(network, images.batch(range(len(images))))
    for which, sampler in (("backbone", ANCESTRAL), ("prior", prior.sampler)):
        drawn = extract(network, prior.sample(70, seed=4, sampler=sampler).images)
        assert card[which]["fid"] == pytest.approx(frechet_distance(drawn, real), rel=1e-6)
        logits = drawn @ network._network.classes.T
        assert card[which]["inception_score"] == pytest.approx(inception_score(logits)[0], rel=1e-6)
    same = published([prior], [network], images, config, seed=4, chunk=512, cache_dir=tmp_path)
    assert same == [[card]]  # from the cache, in other chunks
    two = published([prior, prior], [stand_in("clean"), network], images, config, seed=4, cache_dir=tmp_path)
    assert [[each["mode"] for each in cards] for cards in two] == [["clean", "legacy_tensorflow"]] * 2
    assert two[0][1] == two[1][1] == card


def test_a_network_without_classes_has_no_inception_score(source: ImageSource, tmp_path: Path) -> None:
    network = stand_in(classes=False)
    reference = reference_statistics(source, "train", network, cache_dir=tmp_path)
    found = figures(reference.features, network, reference, 0)
    assert set(found) == {"fid", "kid"}
    assert found["fid"] == pytest.approx(0, abs=1e-9)
    assert found["kid"] == pytest.approx(kernel_distance(reference.features, reference.features))


def test_too_few_samples_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="at least 20"):
        FidConfig(samples=19)


EVAL = [
    "--samples",
    20,
    "--no-auc",
    "--fid-samples",
    30,
    "--fid-mode",
    "legacy_tensorflow",
    "--fid-mode",
    "legacy_pytorch",
]


@pytest.fixture
def words(workshop: Workshop, fitted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """`ebm-prior eval` on Inception's features in two modes; only the networks in the files are others."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(inception, "FEATURES", FEATURES)
    tensorflow, pytorch = stand_in("legacy_tensorflow")._network, stand_in("legacy_pytorch")._network
    monkeypatch.setattr(inception, "_from_torchscript", lambda content, device, *, resize_inside: tensorflow)
    monkeypatch.setattr(inception, "_from_state_dict", lambda content, device: pytorch)
    (tmp_path / "weights").write_bytes(b"stand-in")
    where = ["--data", "mnist", "--data-root", workshop.data_root, "--inception", tmp_path / "weights"]
    return ["eval", fitted / "prior.safetensors", *where, *EVAL]


def test_the_command_prints_every_figure_with_its_card(workshop: Workshop, words: list[Any], tmp_path: Path) -> None:
    (result,) = json.loads(workshop.run(*words, "--json").stdout)
    assert [card["mode"] for card in result["published"]] == ["legacy_tensorflow", "legacy_pytorch"]
    for card in result["published"]:
        assert card["reference"] | {"data": "mnist/train", "images": 120, "split": "train"} == card["reference"]
        assert Path(card["statistics_file"]).parent == tmp_path / "cache" / "ebm-prior" / "statistics"
    text = workshop.run(*words).stdout
    for card, shown in zip(result["published"], text.split("FD card")[1:], strict=True):
        assert card["distance"] in shown
        for which in ("backbone", "prior"):
            assert f"{card[which]['fid']:.2f}" in shown
            assert "{inception_score:.2f} ± {inception_score_sd:.2f}".format(**card[which]) in shown
        for fact in ("N = 30", "120 images of mnist/train (split train)", card["statistics"], f"mode {card['mode']}"):
            assert fact in shown


def test_a_stand_in_is_never_called_fid(
    workshop: Workshop, words: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = workshop.run(*words).stdout + workshop.run(*words, "--json").stdout.replace("fid", "")
    assert "FID" not in found
    assert "Inception Score" not in found
    assert "NOT Inception's official weights" in found
    for mode in MODES:  # the same files, declared to be the official ones
        sha256 = inception.hashlib.sha256(b"stand-in").hexdigest()
        monkeypatch.setitem(inception.OFFICIAL, mode, Weights("official.pt", 1, sha256))
    official = workshop.run(*words).stdout
    assert "FID card" in official
    assert "FID(legacy_tensorflow)" in official
    assert "NOT" not in official
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "official.pt").write_bytes(b"stand-in")
    words[words.index("--inception") + 1] = tmp_path / "folder"
    assert workshop.run(*words).stdout == official


def test_options_of_fid_need_inception(workshop: Workshop, prior: Path) -> None:
    result = workshop.run("eval", prior, "--fid-samples", 30, code=2)
    assert "--fid-samples" in result.stderr
    assert "pass --fid or --inception" in result.stderr
