"""No size is believed from a file: not before the weights are there that have it, and none beyond its range."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from workshop import Workshop

from ebm_prior.errors import CheckpointError, ConfigurationError
from ebm_prior.evaluation.classifier import CLASSIFIER_KEY, FeatureClassifier, load_classifier
from ebm_prior.model.energy import EnergyConfig
from ebm_prior.model.samplers import SamplerConfig
from ebm_prior.storage.checkpoint import PRIOR_KEY, load_prior

PEAK = (
    "import resource, sys; from pathlib import Path; from ebm_prior.storage.checkpoint import load_prior\n"
    "from ebm_prior.errors import CheckpointError\n"
    "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
    "try: load_prior(Path(sys.argv[1]))\n"
    "except CheckpointError as error: print('refused')\n"
    "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)"
)


def rewritten(prior: Path, folder: Path, part: str, **changes: Any) -> Path:
    path = folder / "prior.safetensors"
    with safe_open(prior, framework="pt") as file:
        record = json.loads(file.metadata()[PRIOR_KEY])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    record.pop("sha256")
    record[part] |= changes
    save_file(tensors, path, metadata={PRIOR_KEY: json.dumps(record)})
    return path


BELIEVED = [
    ("energy", {"hidden": 60_000}),
    ("energy", {"hidden": 2**20, "channels": 2**20, "joint": 2**20}),
    ("energy", {"vector_layers": 1_000}),
    ("energy", {"vector_layers": 10**9}),
    ("energy", {"joint": 10**12}),
    ("energy", {"own_heads": 0}),
    ("energy", {"own_heads": 10**12}),
    ("sampler", {"steps": 10**9}),
    ("sampler", {"proposals": 10**9}),
    ("sampler", {"leapfrogs": 10**9, "steps": 1}),
    ("backbone", {"groups": [["dense", [2**24]], ["point", [2, 1, 1]], ["conv", [3, 4, 4]]]}),
    ("backbone", {"groups": [["dense", [4]], ["point", [2, 1, 1]], ["conv", [3, 2**23, 2**23]]]}),
    ("backbone", {"groups": [[f"g{k}", [4]] for k in range(9_999)]}),
    ("backbone", {"groups": [[f"g{k}", [1 + k // 9]] for k in range(9_999)]}),  # nine groups of each shape
]


@pytest.mark.parametrize(("part", "changes"), BELIEVED)
def test_sizes_that_the_file_does_not_have_are_refused_at_once(
    prior: Path, tmp_path: Path, part: str, changes: dict[str, Any]
) -> None:
    path, began = rewritten(prior, tmp_path, part, **changes), time.process_time()
    with pytest.raises(CheckpointError, match=r"prior\.safetensors"):
        load_prior(path)
    assert time.process_time() - began < 20


@pytest.mark.parametrize("hidden", [8, 60_000])
def test_a_prior_costs_no_more_memory_than_its_file(
    workshop: Workshop, prior: Path, tmp_path: Path, hidden: int
) -> None:
    """An 11 kB prior that says `hidden: 60000` took 3 GB."""
    path = rewritten(prior, tmp_path, "energy", hidden=hidden)
    with workshop.fork("-c", PEAK, path) as process:
        said = process.communicate()[0].decode().split()
    assert ("refused" in said) == (hidden == 60_000)
    assert int(said[-1]) < 200  # MiB, of which torch's first use takes some


def test_numbers_have_ranges_before_anything_is_made_of_them() -> None:
    for wrong in ({"hidden": 10**9}, {"vector_layers": 10**9}, {"channels": 2**21}, {"bound": 1e30}):
        with pytest.raises(ConfigurationError, match=f"^{next(iter(wrong))} must be from [01] "):
            EnergyConfig(**wrong)
    for wrong in ({"steps": 10**9}, {"proposals": 10**9}, {"leapfrogs": 10**9}):
        with pytest.raises(ConfigurationError, match=f"^{next(iter(wrong))} must be from [01] to "):
            SamplerConfig(**wrong)


def test_of_many_wrong_names_ten_are_listed(prior: Path, tmp_path: Path) -> None:
    path = rewritten(prior, tmp_path, "energy", vector_layers=100)
    with pytest.raises(CheckpointError, match=r" and \d+ more") as caught:
        load_prior(path)
    assert str(caught.value).count("heads.dense.") == 10


@pytest.mark.parametrize(
    "changes", [{"width": 60_000}, {"classes": 2**20}, {"shape": [3, 60_000, 60_000]}, {"width": True}]
)
def test_so_it_is_with_a_classifier(tmp_path: Path, changes: dict[str, Any]) -> None:
    classifier, path = FeatureClassifier((1, 8, 8), 4, width=4), tmp_path / "c.safetensors"
    for architecture in (classifier.architecture, classifier.architecture | changes):
        record = {"architecture": architecture, "record": {}}
        save_file(classifier.state_dict(), path, {CLASSIFIER_KEY: json.dumps(record)})
        if architecture is classifier.architecture:
            assert torch.equal(load_classifier(path).head.weight, classifier.head.weight)
    with pytest.raises(CheckpointError, match=r"c\.safetensors"):
        load_classifier(path)
