"""--config FILE means the same for every command that has settings: below the options, above the defaults."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from workshop import Workshop

from ebm_prior.errors import ConfigurationError
from ebm_prior.evaluation.outliers import OutlierConfig
from ebm_prior.model.samplers import SamplerConfig
from ebm_prior.settings import read_parts, resolve


def written(path: Path, **values: object) -> Path:
    path.write_text(json.dumps(values))
    return path


def test_a_file_is_divided_among_the_dataclasses(tmp_path: Path) -> None:
    kinds = {"ood": OutlierConfig, "sampler": SamplerConfig}
    path = written(tmp_path / "a.json", draws=3, steps=7, sampler={"proposals": 2})
    parts = read_parts(path, **kinds)
    assert parts == {"ood": {"draws": 3}, "sampler": {"steps": 7, "proposals": 2}}
    assert resolve(OutlierConfig(), {"draws": 4, "samples": None}, parts["ood"]) == OutlierConfig(draws=4)
    assert read_parts(None, **kinds) == {"ood": {}, "sampler": {}}
    for wrong in ({"drawz": 3}, {"sampler": 3}, {"ood": [1]}):
        with pytest.raises(ConfigurationError, match=r"a\.json: unknown settings \w+; .* draws, .*proposals"):
            read_parts(written(path, **wrong), **kinds)
    path.write_text("[1]")
    with pytest.raises(ConfigurationError, match="expected a JSON object, found list"):
        read_parts(path, **kinds)


def test_samples_by_a_file(workshop: Workshop, prior: Path, tmp_path: Path) -> None:
    path = written(tmp_path / "a.json", proposals=3, steps=1, seed=5)
    words = ("sample", prior, "-n", 4, "--json")
    first = json.loads(workshop.run(*words, "--config", path, "--out", tmp_path / "a.npz").stdout)
    options = ("--proposals", 3, "--steps", 1, "--seed", 5)
    second = json.loads(workshop.run(*words, *options, "--out", tmp_path / "b.npz").stdout)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    assert first["sampler"] == second["sampler"]
    third = json.loads(workshop.run(*words, "--config", path, "--steps", 2, "--out", tmp_path / "c.npz").stdout)
    assert (third["sampler"]["steps"], third["sampler"]["proposals"]) == (2, 3)
    error = workshop.error(*words, "--config", written(path, step=3), "--out", tmp_path / "d.npz")
    assert "unknown settings step" in error
    assert "cannot be read" in workshop.error(*words, "--config", tmp_path / "none.json")


def test_every_other_command_with_settings(workshop: Workshop, prior: Path, tmp_path: Path) -> None:
    data = ("--data-root", workshop.data_root)
    ood = written(tmp_path / "o.json", samples=20, draws=1, resamples=5, seed=4, steps=1)
    words = ("ood", prior, "--in", "mnist", *data, "--outliers", "noise", "--k", 0, "--config", ood, "--json")
    found = json.loads(workshop.run(*words, "--out", tmp_path / "ood").stdout)
    assert (found["images"], found["draws"], found["seed"], found["sampler"]["steps"]) == (20, 1, 4, 1)
    anomaly = written(tmp_path / "n.json", draws=1, resamples=5, seed=4)
    words = ("anomaly", prior, "--normal", "mnist", *data, "--test", "mnist", "--config", anomaly, "--json")
    found = json.loads(workshop.run(*words, "--out", tmp_path / "anomaly").stdout)
    assert (found["draws"], found["seed"]) == (1, 4)
    settings = written(tmp_path / "e.json", samples=40, auc=False, seed=4, sampler={"steps": 1})
    words = ("eval", prior, "--data", "mnist", *data, "--config", settings, "--json")
    (found,) = json.loads(workshop.run(*words).stdout)
    assert (found["samples"], found["seed"], found["sampler"]["steps"], "auc_after" in found) == (40, 4, 1, False)
    (found,) = json.loads(workshop.run(*words, "--seed", 6).stdout)
    assert found["seed"] == 6
    settings = written(tmp_path / "d.json", samples=40, seed=4, pairs=2, gauge={"iterations": 1})
    words = ("doctor", "--ckpt", workshop.backbone, *data, "--config", settings, "--json")
    found = json.loads(workshop.run(*words).stdout)
    assert (found["images"], found["seed"], found["null"]["pairs"]) == (40, 4, 2)
    for command in ("show", "classifier"):
        assert "--config" in workshop.run(command, "--help-all" if command == "show" else "--help").stdout
