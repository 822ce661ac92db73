"""`ebm-prior show`: what stays fixed stays, what is redrawn is new, chains are the sampler's."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_priors import bent
from toys import LinearGaussian, ToyConv
from workshop import Workshop

from ebm_prior.compute.randomness import BlockGenerator, derived_seed, standard_normal
from ebm_prior.data.images import ImageSource, from_array
from ebm_prior.errors import ConfigurationError
from ebm_prior.model.prior import ANCESTRAL, EBMPrior
from ebm_prior.model.samplers import SamplerConfig
from ebm_prior.pictures.film import transitions_film
from ebm_prior.pictures.show import (
    PICTURES,
    chain,
    draw_picture,
    energy,
    hierarchy,
    interpolation,
    latents,
    reconstruction,
    transitions,
    trend,
)
from ebm_prior.storage.checkpoint import load_prior


@pytest.fixture(scope="module")
def toy() -> EBMPrior:
    prior = bent(ToyConv().double().eval())
    prior.sampler = SamplerConfig(proposals=2, steps=8, step_size=0.3)
    return prior


@pytest.fixture(scope="module")
def pictures() -> ImageSource:
    return from_array(np.random.default_rng(0).integers(0, 256, (40, 8, 8), dtype=np.uint8), name="own")


def test_a_chain_starts_at_the_backbones_prior_and_ends_where_steps_end(toy: EBMPrior) -> None:
    shown = transitions(toy, 3, seed=2)
    assert shown.arrays["steps"].tolist() == [0, 1, 2, 4, 8]
    assert shown.arrays["images"].shape == (3, 5, 1, 8, 8)
    walked = chain(toy, 3, 8, [0, 8], seed=2)
    for column, step in ((0, 0), (-1, 8)):
        expected = toy.backbone.decode(toy.backbone.reparameterize(walked.eps[step])).mean.detach()
        np.testing.assert_allclose(shown.arrays["images"][:, column], expected, atol=1e-12)


def test_energies_along_a_chain_are_the_heads(toy: EBMPrior) -> None:
    walked = chain(toy, 4, 8, [0, 3, 8], seed=1)
    assert walked.terms.shape == (9, 4, 4)  # three heads and the joint one
    for step, eps in walked.eps.items():
        np.testing.assert_allclose(walked.terms[step].sum(1), toy.potential(eps).detach(), rtol=1e-10)
    shown = energy(toy, 4, seed=1)
    np.testing.assert_allclose(shown.arrays["energy"], -walked.terms)
    assert list(shown.arrays["heads"]) == ["dense", "point", "conv", "joint head"]


def test_the_total_is_what_is_clipped(toy: EBMPrior, monkeypatch: pytest.MonkeyPatch) -> None:
    terms = energy(toy, 4, seed=1).arrays["energy"]
    monkeypatch.setattr(toy, "ceiling", float(np.median(-terms.sum(2))))
    arrays = energy(toy, 4, seed=1).arrays
    assert arrays["total"].min() == -toy.ceiling
    np.testing.assert_allclose(arrays["total"], np.maximum(arrays["energy"].sum(2), -toy.ceiling))


def test_a_long_chain_settles_and_a_trend_is_found() -> None:
    """f = a·z on a linear-Gaussian model: from p_β, the energy falls to its mean under p_α, and stays there."""
    backbone = LinearGaussian().double().eval()
    prior = bent(backbone, scale=0.6)
    prior.sampler = SamplerConfig(proposals=1, steps=900, step_size=0.4)
    shown = energy(prior, 24)
    slope, error = shown.arrays["trend"]
    assert abs(slope) < 4 * error
    assert 0.99 < shown.arrays["mixing"][0] < 1.05  # split R̂
    total = shown.arrays["energy"].sum(2)
    assert total[0].mean() > total[500:].mean()
    exact = prior.sample(512, sampler=SamplerConfig(proposals=64, steps=20, step_size=0.4))
    expected = -prior.f(exact.z).detach().numpy()
    assert total[500:].mean() == pytest.approx(expected.mean(), abs=5 * expected.std() / math.sqrt(512))


def test_a_trend_is_a_slope_with_its_error() -> None:
    random = np.random.default_rng(0)
    steps = np.arange(400)[:, None]
    slope, error = trend(0.01 * steps + random.normal(0, 1, (400, 30)))
    assert slope == pytest.approx(0.01, abs=4 * error)
    assert error == pytest.approx(math.sqrt(12 / 400**3) / math.sqrt(30), rel=0.5)


def test_the_hierarchy_keeps_its_upper_groups(toy: EBMPrior) -> None:
    shown = hierarchy(toy, 3, seed=4)
    gaussian = shown.arrays["gaussian"]
    assert gaussian.shape == shown.arrays["energy_based"].shape == (3, 3, 1, 8, 8)
    np.testing.assert_allclose(gaussian[:, 0], toy.sample(3, seed=4, sampler=ANCESTRAL).images)
    assert np.abs(gaussian[:, 1] - gaussian[:, 0]).max() > 1e-3
    # Redrawn by hand: the dense group stays, the two below are new.
    z = toy.sample(3, seed=4, sampler=ANCESTRAL).z
    generator = BlockGenerator(derived_seed(4, 63, 2), 0, 3)
    eps = [
        standard_normal((3, *g.shape), generator, dtype=torch.float64, device="cpu") for g in toy.backbone.groups[1:]
    ]
    trace = toy.backbone.trace(lambda i, prior, _: z[0] if i == 0 else prior.mean + prior.std * eps[i - 1], 3)
    np.testing.assert_allclose(gaussian[:, 2], toy.backbone.likelihood(trace.features).mean.detach(), atol=1e-12)


@pytest.mark.parametrize("fix", [1, 2])
def test_a_hierarchy_with_fixed_groups_draws_the_rest(toy: EBMPrior, fix: int) -> None:
    shown = hierarchy(toy, 3, fix=fix, seed=4)
    for key, sampler in (("energy_based", toy.sampler), ("gaussian", ANCESTRAL)):
        drawn = toy.sample(3, seed=4, sampler=sampler)
        frames = shown.arrays[key]
        assert frames.shape == (3, 8, 1, 8, 8)
        np.testing.assert_allclose(frames[:, 0], drawn.images)
        assert len({frame.tobytes() for frame in frames[1]}) == 8
        codes = [z[[0] * 7 + [1] * 7 + [2] * 7] for z in drawn.z[:fix]]
        expected = toy.complete(codes, seed=4, sampler=sampler).images
        np.testing.assert_allclose(frames[:, 1:].reshape(21, 1, 8, 8), expected)


@pytest.mark.parametrize("fix", [0, 3, 9])
def test_a_fix_that_leaves_nothing_is_refused(toy: EBMPrior, fix: int) -> None:
    with pytest.raises(ConfigurationError, match="from 1 to 2 groups"):
        hierarchy(toy, 3, fix=fix)


def test_the_command_fixes_groups(workshop: Workshop, prior: Path, tmp_path: Path) -> None:
    words = ["show", prior, "hierarchy", "-n", 2, "--steps", 2, "--proposals", 2, "--fix"]
    workshop.run(*words, 1, "--out", tmp_path / "fixed.png")
    with np.load(tmp_path / "fixed.npz") as arrays:
        assert arrays["gaussian"].shape[:2] == (2, 8)
    assert "expected from 1 to" in workshop.error(*words, 40, "--out", tmp_path / "other.png")
    assert "leave out --fix" in workshop.run("show", prior, "energy", "--fix", 1, code=2).stderr


def test_reconstructions_of_growing_k(toy: EBMPrior, pictures: ImageSource) -> None:
    shown = reconstruction(toy, pictures, 5, seed=1)
    frames = shown.arrays["images"]
    assert frames.shape == (5, 1 + 3, 1, 8, 8)
    known = {image.tobytes() for image in pictures.batch(range(40)).double().numpy()}
    assert all(frame.tobytes() in known for frame in frames[:, 0].astype(np.float64))
    assert len({frame.tobytes() for frame in frames[0]}) == 4


def test_interpolation_ends_at_the_reconstructions(toy: EBMPrior, pictures: ImageSource) -> None:
    frames = interpolation(toy, pictures, 4, seed=1).arrays["images"]
    assert frames.shape == (4, 10, 1, 8, 8)
    z = reconstruction(toy, pictures, 8, seed=1).arrays["images"][:, 1]  # the same images, the same draw
    np.testing.assert_allclose(frames[:, 1], z[:4], atol=1e-6)
    np.testing.assert_allclose(frames[:, 8], z[4:], atol=1e-6)


def test_latents_are_shown_in_their_own_plane(pictures: ImageSource) -> None:
    backbone = LinearGaussian().double().eval()
    prior = bent(backbone)
    prior.sampler = SamplerConfig(proposals=1, steps=4, step_size=0.3)
    generator = torch.Generator().manual_seed(0)
    drawn = backbone.decode(backbone.sample(30, generator=generator)).mean.detach().clamp(0, 1)
    shown = latents(prior, from_array(drawn.numpy()), 30)
    assert shown.arrays["steps"].tolist() == [0, 1, 2, 4]
    assert shown.arrays["chain_z2"].shape == (4, 30, 2)
    assert shown.arrays["posterior_z1"].shape == (30, 2)
    np.testing.assert_allclose(shown.arrays["posterior_z2"].mean(0), 0, atol=1e-9)
    spread = shown.arrays["posterior_z1"].std(0)
    assert spread[0] >= spread[1]


def test_what_cannot_be_drawn_is_said(toy: EBMPrior, pictures: ImageSource) -> None:
    resampling = EBMPrior(toy.backbone, toy.energy, sampler=SamplerConfig(steps=0))
    with pytest.raises(ConfigurationError, match="--steps"):
        transitions(resampling, 2)
    with pytest.raises(ConfigurationError, match="show fewer"):
        draw_picture(toy, "interpolate", pictures, 30)
    with pytest.raises(ConfigurationError, match="starts from images"):
        draw_picture(toy, "reconstruction", None)


@pytest.mark.parametrize("what", PICTURES)
def test_the_command(workshop: Workshop, prior: Path, tmp_path: Path, what: str) -> None:
    data = ["--data", workshop.images] if what in ("reconstruction", "interpolate", "latents") else []
    words = ["show", prior, what, "-n", 3, "--steps", 4, "--proposals", 2, *data]
    out = tmp_path / "picture.png"
    result = json.loads(workshop.run(*words, "--out", out, "--json").stdout)
    assert result["files"] == [str(out), str(out.with_suffix(".npz"))]
    with Image.open(out) as image, np.load(out.with_suffix(".npz")) as arrays:
        assert image.width > 300
        assert len(arrays.files) > 1
    assert "--overwrite" in workshop.error(*words, "--out", out)
    if not data:
        workshop.run(*words, "--data", workshop.images, code=2)


def test_transitions_move(workshop: Workshop, prior: Path, tmp_path: Path) -> None:
    """A frame per step, of one size, that goes on for ever; drawn of the same chains as the picture that stands."""
    words, out = (
        ["show", prior, "transitions", "-n", 3, "--steps", 4, "--proposals", 2, "--seed", 1],
        tmp_path / "x.gif",
    )
    result = json.loads(workshop.run(*words, "--out", out, "--json").stdout)
    assert result["files"] == [str(out), str(out.with_suffix(".npz"))]
    with Image.open(out) as image:
        assert (image.format, image.n_frames, image.info["loop"]) == ("GIF", 5, 0)
        frames, times = [], []
        for index in range(image.n_frames):
            image.seek(index)
            times.append(image.info["duration"])
            frames.append(np.asarray(image.convert("RGB")))
    assert len({frame.shape for frame in frames}) == 1
    assert frames[0].shape[1] > 300
    assert all((a != b).any() for a, b in pairwise(frames))
    assert times[0] > times[1] == times[3] < times[4]
    workshop.run(*words, "--out", tmp_path / "x.png", "--overwrite")  # and the same .npz
    with np.load(out.with_suffix(".npz")) as arrays:
        standing = dict(arrays)
    film = transitions_film(load_prior(prior), 3, seed=1)
    np.testing.assert_allclose(film.arrays["images"][:, 0], standing["images"][:, 0], atol=1e-6)


def test_a_film_of_many_steps_is_short(toy: EBMPrior, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toy, "sampler", SamplerConfig(proposals=2, steps=150, step_size=0.3))
    film = transitions_film(toy, 2)
    assert len(film.frames) == len(film.milliseconds) == film.arrays["images"].shape[1] == 60
    assert film.arrays["steps"][[0, -1]].tolist() == [0, 150]
    assert sum(film.milliseconds) < 12_000


@pytest.mark.parametrize(
    ("what", "name", "said"), [("hierarchy", "x.gif", "does not move"), ("transitions", "x.mp4", ".gif")]
)
def test_other_forms_are_refused(
    workshop: Workshop, prior: Path, tmp_path: Path, what: str, name: str, said: str
) -> None:
    found = workshop.run("show", prior, what, "--out", tmp_path / name, code=2).stderr
    assert said in found
    assert ".png" in found
    assert list(tmp_path.iterdir()) == []
