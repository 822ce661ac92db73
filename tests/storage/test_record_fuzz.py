"""Whatever stands in a record, a command gives its result or one stated error: mutations of every field."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from run_folders import longer
from safetensors import safe_open
from safetensors.torch import save_file
from workshop import Workshop

from ebm_prior.errors import EbmPriorError
from ebm_prior.model.backbone import Backbone
from ebm_prior.model.prior import EBMPrior
from ebm_prior.reports import summaries
from ebm_prior.reports.results import RESULTS
from ebm_prior.reports.run_page import _read_results
from ebm_prior.runs import describe
from ebm_prior.storage.checkpoint import BACKBONE_KEY, PRIOR_KEY, backbone_record, load_prior, prior_record, save_prior
from ebm_prior.storage.records import InvalidError

Way = tuple[str | int, ...]
ODD = [
    *(None, True, False, 0, -1, 1, 1.5, -5.0, 1e30, 10**9, 10**30, 10**400, 2**63, float("nan"), float("inf")),
    *("", "x", "a\0b", "\x1b[31mred", "\ud800", [], {}, [1], {"a": 1}, [[]], ["a", [2**40]], "9" * 5000),
]
FUZZ = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def ways(value: Any, before: Way = ()) -> Iterator[Way]:
    """The places of a record: each of its parts, however deep."""
    if before:
        yield before
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        yield from ways(part, (*before, key))


def changed(record: Any, way: Way, value: Any) -> Any:
    record = copy.deepcopy(record)
    place = record
    for key in way[:-1]:
        place = place[key]
    place[way[-1]] = value
    return record


def without(record: Any, way: Way) -> Any:
    record = copy.deepcopy(record)
    place = record
    for key in way[:-1]:
        place = place[key]
    del place[way[-1]]
    return record


def mutations(record: Any, every: int) -> Iterator[Any]:
    """The record with each field left out, and with each odd value in its place: every third of all these, say."""
    number = 0
    for way in ways(record):
        if any(isinstance(key, int) and key > 1 for key in way):
            continue  # groups or rows like those before
        if "config" in way[1:-1]:
            continue  # of which nothing is read but the objective
        for value in [*ODD, ...]:
            number += 1
            if number % every == 0:
                yield without(record, way) if value is ... else changed(record, way, value)


class Stored:
    """A file of tensors whose record and tensors can be replaced."""

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.key = path, key
        with safe_open(path, framework="pt") as file:
            self.record = json.loads(file.metadata()[key])
            self.tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        self.record.pop("sha256")

    def write(self, record: Any, tensors: dict[str, torch.Tensor] | None = None) -> None:
        text = record if isinstance(record, str) else json.dumps(record)
        save_file(self.tensors if tensors is None else tensors, self.path, metadata={self.key: text})


@pytest.fixture
def stored(prior: Path, tmp_path: Path) -> Stored:
    """The prior of a real fit, with the record of its making."""
    path = tmp_path / "prior.safetensors"
    path.write_bytes(prior.read_bytes())
    return Stored(path, PRIOR_KEY)


@pytest.fixture
def both(prior: Path, backbone: Backbone, tmp_path: Path) -> Stored:
    """A prior with a refiner, and with the records that a fit of both writes."""
    path = tmp_path / "both.safetensors"
    loaded, refiner = load_prior(prior, backbone), load_prior(prior, backbone)
    refiner.regime = "refiner"
    refiner.record["steps"] = {"images": 12, "tried": [{"steps": 20, "distance": 0.5}]}
    loaded.record["roles"] = {"images": 12, "calibrated": 0.5, "refiner": 0.25}
    loaded.refiner = refiner
    save_prior(loaded, path, checkpoint="toy.safetensors")
    return Stored(path, PRIOR_KEY)


def told(read: Callable[[], object]) -> bool:
    """Whether it is refused; anything but a stated error is raised."""
    try:
        read()
    except EbmPriorError:
        return True
    return False


def use(path: Path, backbone: Backbone) -> None:
    """What info, sample and report do with a prior's record."""
    record = prior_record(path) | {"heads": describe.head_parameters(path)}
    summaries.prior_card(record)
    loaded = load_prior(path, backbone)
    assert 0 <= loaded.tau <= 1000
    assert loaded.sampler.steps <= 100_000


@pytest.mark.parametrize("every", [5, longer(1)])
def test_every_field_of_a_prior_with_every_odd_value(stored: Stored, backbone: Backbone, every: int) -> None:
    """Over 1,000 mutations; what is not of the free record of the making is refused nearly always."""
    count = refused = 0
    for record in mutations(stored.record, every):
        stored.write(record)
        count += 1
        refused += told(lambda: use(stored.path, backbone))
    assert count > 1000 / every
    assert refused > count / 2


@pytest.mark.parametrize("every", [9, longer(1)])
def test_every_field_of_a_prior_with_a_refiner_with_every_odd_value(
    both: Stored, backbone: Backbone, every: int
) -> None:
    """The second role is checked as the first one is."""
    assert not told(lambda: use(both.path, backbone))
    count = refused = 0
    for record in mutations(both.record, every):
        both.write(record)
        count += 1
        refused += told(lambda: use(both.path, backbone))
    assert count > 1500 / every
    assert refused > count / 2


@pytest.mark.parametrize(
    "change",
    [
        {"regime": "calibrated"},
        {"tau": -1},
        {"sampler": {"steps": 10**9}},
        {"sampler": {"step_size": "x"}},
        {"energy": {"channels": 10**9}},
    ],
)
def test_a_second_role_that_is_none(both: Stored, backbone: Backbone, change: dict[str, Any]) -> None:
    both.write(both.record | {"refiner": both.record["refiner"] | change})
    assert told(lambda: use(both.path, backbone))


def test_a_second_role_whose_tensors_are_others(both: Stored, backbone: Backbone) -> None:
    second = [name for name in both.tensors if name.startswith("refiner/")]
    both.write(both.record, {name: value for name, value in both.tensors.items() if name != second[0]})
    assert told(lambda: use(both.path, backbone))
    both.write(both.record, both.tensors | {"refiner/more": torch.zeros(3)})
    assert told(lambda: use(both.path, backbone))
    both.write(without(both.record, ("refiner",)))
    assert told(lambda: use(both.path, backbone))


@FUZZ
@given(data=st.data())
def test_a_prior_with_anything_anywhere(stored: Stored, backbone: Backbone, data: st.DataObject) -> None:
    way = data.draw(st.sampled_from(list(ways(stored.record))))
    stored.write(changed(stored.record, way, data.draw(PLAIN)))
    told(lambda: use(stored.path, backbone))


@pytest.mark.parametrize("value", [None, True, 3, [], [1], "text", {}])
def test_a_record_that_is_none(stored: Stored, backbone: Backbone, value: Any) -> None:
    stored.write(value if not isinstance(value, str) else json.dumps(value))
    assert told(lambda: use(stored.path, backbone))


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 100_000, "[" * 900 + "]" * 900, "{", "", '{"format": 1, "format": 2}', "9" * 5000]
)
def test_a_record_that_is_no_json_of_ours(workshop: Workshop, stored: Stored, backbone: Backbone, text: str) -> None:
    stored.write(text)
    assert told(lambda: use(stored.path, backbone))
    workshop.error("info", stored.path)


@pytest.mark.parametrize(
    "kind", [torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64, torch.int64, torch.bool, torch.uint16]
)
def test_tensors_of_other_numbers(stored: Stored, backbone: Backbone, kind: torch.dtype) -> None:
    for name, tensor in stored.tensors.items():
        stored.write(stored.record, {**stored.tensors, name: torch.ones(tensor.shape).to(kind)})
        assert told(lambda: use(stored.path, backbone))


@pytest.mark.parametrize(
    "change",
    [
        {"tau": -5.0},
        {"tau": 1e30},
        {"ceiling": float("nan")},
        {"ceiling": -1e20},
        {"record": {"a": {1, 2}}},
        {"record": {"a": 10**400}},
        {"record": {"a": "\ud800"}},
        {"record": {"data": json.loads("[" * 80 + "]" * 80)}},
        {"regime": "perfect"},
        {"heads": float("nan")},
        {"heads": float("inf")},
    ],
)
def test_what_would_not_load_is_not_written(
    stored: Stored, backbone: Backbone, tmp_path: Path, change: dict[str, Any]
) -> None:
    loaded, path = load_prior(stored.path, backbone), tmp_path / "new.safetensors"
    for name, value in change.items():
        if name == "heads":
            next(iter(loaded.energy.state_dict().values())).fill_(value)
        else:
            setattr(loaded, name, value)
    with pytest.raises(EbmPriorError, match=r"nothing was written|cannot write"):
        save_prior(loaded, path, checkpoint="toy.safetensors")
    assert not path.exists()


@pytest.mark.parametrize("tau", [-5.0, 1e30, float("nan")])
def test_a_prior_is_not_made_of_such_numbers(stored: Stored, backbone: Backbone, tau: float) -> None:
    with pytest.raises(EbmPriorError, match="tau from 0 to 1000"):
        EBMPrior(backbone, load_prior(stored.path, backbone).energy, tau=tau)


def test_every_field_of_a_backbone_with_every_odd_value(workshop: Workshop, tmp_path: Path) -> None:
    path = tmp_path / "b.safetensors"
    path.write_bytes(workshop.backbone.read_bytes())
    stored = Stored(path, BACKBONE_KEY)
    for way in list(ways(stored.record)):
        for value in [*ODD, ...]:
            stored.write(without(stored.record, way) if value is ... else changed(stored.record, way, value))
            told(lambda: summaries._making(backbone_record(path)["record"]))


# What eval, ood and doctor print.


@pytest.fixture(scope="module")
def printed(workshop: Workshop, fitted: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    from ebm_prior.evaluation.classifier import FeatureClassifier, save_classifier

    folder, prior = tmp_path_factory.mktemp("printed"), fitted / "prior.safetensors"
    save_classifier(FeatureClassifier((1, 8, 8), 4, width=4), folder / "c.safetensors")
    small = ["--gauge-iterations", 2, "--json"]
    images = ["--data", workshop.images]
    words: dict[str, list[object]] = {
        "eval": ["eval", prior, *images, "--classifier", folder / "c.safetensors", *small],
        "doctor": ["doctor", "--ckpt", workshop.backbone, *images, *small],
        "ood": [
            *("ood", prior, "--in", workshop.images, "--out", "noise", "--to", folder / "ood", "--json"),
            *("--samples", 40, "--draws", 1, "--resamples", 5, "--k", "0,1"),
        ],
    }
    return {name: json.loads(workshop.run(*command).stdout) for name, command in words.items()}


@pytest.mark.parametrize("every", [5, longer(1)])
@pytest.mark.parametrize("name", ["eval", "doctor", "ood"])
def test_a_report_of_results_with_every_odd_value(
    printed: dict[str, Any], tmp_path: Path, name: str, every: int
) -> None:
    """What is typed is shown without an error; and what the commands print is what is typed."""
    from ebm_prior.reports.findings import doctor_blocks, evaluation_blocks, outlier_blocks

    show: dict[str, Callable[[Any], object]] = {
        "eval": evaluation_blocks,
        "doctor": lambda found: doctor_blocks(found[0]),
        "ood": lambda found: [outlier_blocks(each) for each in found],
    }
    path, true = tmp_path / "x.json", printed[name]
    path.write_text(json.dumps(true))
    show[name](_read_results(path, name))
    count = refused = 0
    for record in mutations(true, every):
        path.write_text(json.dumps(record))
        count += 1
        refused += told(lambda: show[name](_read_results(path, name)))
    assert refused > count / 4


@pytest.mark.parametrize("name", ["eval", "doctor", "ood"])
def test_results_of_another_command_are_refused(printed: dict[str, Any], tmp_path: Path, name: str) -> None:
    for other in set(printed) - {name}:
        (tmp_path / "x.json").write_text(json.dumps(printed[other]))
        assert told(lambda: _read_results(tmp_path / "x.json", name))
    with pytest.raises(InvalidError):
        RESULTS[name]([], "")
