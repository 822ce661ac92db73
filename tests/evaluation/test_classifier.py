import json
from dataclasses import replace
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
from listener import Listener
from safetensors import safe_open
from safetensors.torch import save_file

from ebm_prior.data.images import from_array
from ebm_prior.errors import CheckpointError, ConfigurationError, DataError
from ebm_prior.evaluation.classifier import (
    CLASSIFIER_KEY,
    ClassifierConfig,
    FeatureClassifier,
    ResidualBlock,
    accuracy,
    bundled_classifier,
    load_classifier,
    save_classifier,
    train_classifier,
)
from ebm_prior.evaluation.metrics import extract, frechet_distance

QUICK = ClassifierConfig(data="bars", epochs=4, batch_size=32, width=4, shift=1)


def bars(n, seed, shape=(1, 12, 10)):
    """Three classes: a bright row, a bright column, or neither, in noise."""
    random = np.random.default_rng(seed)
    images, labels = 0.3 * random.random((n, *shape)), random.integers(0, 3, n)
    for image, label, place in zip(images, labels, random.integers(2, 8, n), strict=True):
        if label:
            image[(slice(None), place) if label == 1 else (slice(None), slice(None), place)] = 1
    return from_array(images.astype(np.float32), labels, name="bars")


@pytest.fixture(scope="module")
def trained():
    return train_classifier(bars(600, 0), bars(200, 1), QUICK)


def test_training_learns_and_reports_its_held_out_accuracy(trained):
    classifier, share = trained
    assert share > 0.95
    assert share == accuracy(classifier, bars(200, 1)) == pytest.approx(classifier.record["test_accuracy"], abs=1e-6)
    assert not classifier.training
    assert not any(p.requires_grad for p in classifier.parameters())


def test_training_depends_on_the_seed_alone(trained):
    torch.rand(3)
    told = Listener()
    again, _ = train_classifier(bars(600, 0), bars(200, 1), QUICK, progress=told)
    assert again.name == trained[0].name
    assert [m["iteration"] for m in told.steps] == list(range(1, 4 * 600 // 32 + 1))
    other, _ = train_classifier(bars(600, 0), bars(200, 1), ClassifierConfig(**{**vars(QUICK), "seed": 1}))
    assert other.name != trained[0].name


def test_training_leaves_the_global_random_state():
    before = torch.get_rng_state()
    train_classifier(bars(64, 0), bars(10, 1), ClassifierConfig(epochs=1, width=2))
    assert torch.equal(torch.get_rng_state(), before)


def test_file_gives_the_same_network_back(trained, tmp_path):
    classifier, _ = trained
    save_classifier(classifier, tmp_path / "a.safetensors")
    save_classifier(classifier, tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    loaded = load_classifier(tmp_path / "a.safetensors")
    images = bars(20, 2).batch(range(20))
    assert torch.equal(loaded.features(images), classifier.features(images))
    assert loaded.record == classifier.record
    assert loaded.distance_name == classifier.distance_name == f"FD({classifier.name})"
    assert loaded.name.startswith("bars-CNN-")
    assert not loaded.training
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert list(file.metadata()) == [CLASSIFIER_KEY]


@pytest.mark.parametrize("network", ["plain", "residual"])
def test_images_of_any_size_have_64_features(network):
    for shape in ((1, 8, 8), (3, 8, 20), (3, 17, 31), (1, 28, 28), (3, 64, 64)):
        classifier = FeatureClassifier(shape, 7, network=network, width=4).eval()
        images = torch.rand(2, *shape)
        assert classifier.features(images).shape == (2, 64)
        assert classifier.features(images.double()).dtype == torch.float32
        assert classifier(images).shape == (2, 7)


COLOURS = replace(ClassifierConfig.suited((3, 16, 16), "bars"), epochs=3, batch_size=32, width=4)


def test_colour_images_get_residual_blocks_and_mirrored_images(tmp_path):
    assert (COLOURS.network, COLOURS.flip, COLOURS.shift) == ("residual", True, 4)
    source, test = bars(600, 0, (3, 16, 16)), bars(200, 1, (3, 16, 16))
    classifier, share = train_classifier(source, test, COLOURS)
    assert share > 0.9
    assert sum(isinstance(module, ResidualBlock) for module in classifier.modules()) == 1
    save_classifier(classifier, tmp_path / "a.safetensors")
    loaded = load_classifier(tmp_path / "a.safetensors")
    images = test.batch(range(20))
    torch.testing.assert_close(loaded.features(images), classifier.features(images))
    assert loaded.name == classifier.name
    mirrored, _ = train_classifier(source, test, replace(COLOURS, epochs=1))
    straight, _ = train_classifier(source, test, replace(COLOURS, epochs=1, flip=False))
    assert mirrored.name != straight.name


def test_a_residual_block_starts_from_its_input():
    block = ResidualBlock(3).eval()
    torch.nn.init.zeros_(block.body[-1].weight)
    x = torch.randn(2, 3, 5, 5)
    torch.testing.assert_close(block(x), torch.nn.functional.gelu(x))


def test_the_bundled_classifier_follows_data_set_and_shape():
    with pytest.raises(DataError, match=r"images \(2, 28, 28\), only for.*Fashion-MNIST \(1, 28, 28\).*--classifier"):
        bundled_classifier((2, 28, 28))
    assert bundled_classifier((1, 28, 28), "mnist/test").record["data"] == "Fashion-MNIST"
    assert bundled_classifier((3, 32, 32), "cifar10/test").record["data"] == "CIFAR-10"


def test_the_data_set_counts_where_several_classifiers_fit(tmp_path, monkeypatch):
    monkeypatch.setattr(resources, "files", lambda _: tmp_path)
    for name in ("Zebras", "A-B", "C"):
        classifier = FeatureClassifier((1, 8, 8), 2, width=2)
        classifier.record = {"data": name}
        save_classifier(classifier, tmp_path / f"{name}_classifier.safetensors")
    for data, expected in (("zebras/test", "Zebras"), ("a_b-subset/test", "A-B"), ("images.npy", "A-B")):
        assert bundled_classifier((1, 8, 8), data).record["data"] == expected


def test_the_bundled_classifier_of_colour_images_is_small_and_good():
    classifier = bundled_classifier((3, 32, 32))
    assert classifier.classes == 10
    assert classifier.record["test_accuracy"] > 0.88
    now = vars(ClassifierConfig.suited((3, 32, 32)))
    assert classifier.record["recipe"] == {key: now[key] for key in classifier.record["recipe"]}
    bundled = Path(__file__).parents[2] / "checkpoints" / "cifar10_classifier.safetensors"
    assert bundled.stat().st_size < 3_000_000


def test_what_cannot_be_classified_is_refused(trained):
    with pytest.raises(ConfigurationError, match="8 x 8"):
        FeatureClassifier((1, 7, 28), 10)
    with pytest.raises(ConfigurationError, match="two classes"):
        FeatureClassifier((1, 28, 28), 1)
    with pytest.raises(DataError, match=r"\(1, 12, 10\)"):
        trained[0].features(torch.rand(2, 1, 10, 12))
    unlabelled = from_array(np.zeros((20, 1, 8, 8), np.float32))
    with pytest.raises(DataError, match="one label per image"):
        train_classifier(unlabelled, unlabelled)
    one, two = (from_array(np.zeros((4, 1, 8, 8), np.float32), np.array(y)) for y in ([0, 1, 0, 1], [0, 1, 2, 1]))
    with pytest.raises(DataError, match=r"0 … 1"):
        train_classifier(one, two)
    with pytest.raises(ConfigurationError, match="epochs"):
        ClassifierConfig(epochs=0)
    with pytest.raises(ConfigurationError, match="network"):
        ClassifierConfig(network="deep")
    with pytest.raises(ConfigurationError, match="dropout"):
        ClassifierConfig(dropout=1.0)
    with pytest.raises(ConfigurationError, match=r"seed.*-1"):
        ClassifierConfig(seed=-1)


def test_damaged_and_foreign_files_are_refused(trained, tmp_path):
    good, bad = tmp_path / "good.safetensors", tmp_path / "bad.safetensors"
    save_classifier(trained[0], good)
    bad.write_bytes(good.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="damaged"):
        load_classifier(bad)
    save_file({"weight": torch.zeros(2)}, bad)
    with pytest.raises(CheckpointError, match="not a feature classifier"):
        load_classifier(bad)
    with pytest.raises(CheckpointError, match="nothing"):
        load_classifier(tmp_path / "missing.safetensors")

    state = {name: tensor.clone() for name, tensor in trained[0].state_dict().items()}
    record = {"architecture": trained[0].architecture, "record": {}}
    save_file({**state, "head.bias": torch.full((3,), torch.nan)}, bad, {CLASSIFIER_KEY: json.dumps(record)})
    with pytest.raises(CheckpointError, match=r"NaN.*head\.bias"):
        load_classifier(bad)
    state.pop("head.bias")
    save_file(state, bad, {CLASSIFIER_KEY: json.dumps(record)})
    with pytest.raises(CheckpointError, match=r"missing: head\.bias"):
        load_classifier(bad)
    save_file(state, bad, {CLASSIFIER_KEY: json.dumps({"architecture": {"shape": [1, 2]}, "record": {}})})
    with pytest.raises(CheckpointError, match="describes no network"):
        load_classifier(bad)


def test_bundled_classifier_is_small_and_says_where_it_comes_from():
    classifier = bundled_classifier((1, 28, 28), "fashion-mnist-subset/test")
    assert classifier.shape == (1, 28, 28)
    assert classifier.classes == 10
    assert classifier.record["data"] == "Fashion-MNIST"
    assert classifier.record["test_accuracy"] > 0.9
    now = vars(ClassifierConfig.suited((1, 28, 28)))  # the recipe has got options since
    assert classifier.record["recipe"] == {key: now[key] for key in classifier.record["recipe"]}
    bundled = Path(__file__).parents[2] / "checkpoints" / "fashion_mnist_classifier.safetensors"
    assert bundled.stat().st_size < 300_000


def test_bundled_classifier_sees_a_difference_between_sets_of_images():
    classifier = bundled_classifier((1, 28, 28))
    generator = torch.Generator().manual_seed(0)
    smooth = torch.nn.functional.interpolate(torch.rand(600, 1, 4, 4, generator=generator), 28, mode="bilinear")
    a, b = extract(classifier, smooth[:300]), extract(classifier, smooth[300:])
    brighter = extract(classifier, (smooth[300:] + 0.1).clamp(max=1))
    assert frechet_distance(a, brighter) > 1.5 * frechet_distance(a, b)
