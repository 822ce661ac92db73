"""What the process has set changes no result and breaks nothing; precisions and devices are supported or refused."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ebm_prior.backbones.shallow import ShallowGenerator
from tiny_biva import initialised as ready_biva
from tiny_biva import tiny as tiny_biva
from tiny_hvae import initialised as ready_hvae
from tiny_hvae import tiny as tiny_hvae
from tiny_nvae import tiny as tiny_nvae
from toys import LinearGaussian
from workshop import Workshop

import ebm_prior
from ebm_prior.data.images import from_dataset
from ebm_prior.errors import ConfigurationError, ContractError
from ebm_prior.evaluation.classifier import ClassifierConfig, save_classifier, train_classifier
from ebm_prior.model.backbone import Backbone, LatentGroup
from ebm_prior.model.bounds import Bounds
from ebm_prior.model.energy import EnergyConfig, JointEnergy
from ebm_prior.model.normalizer import Normalised
from ebm_prior.model.prior import EBMPrior
from ebm_prior.model.samplers import SamplerConfig
from ebm_prior.model.scores import Form
from ebm_prior.storage.checkpoint import bundled, load_backbone, load_prior, save_backbone, save_prior
from ebm_prior.storage.registry import build
from ebm_prior.storage.weights import fingerprint
from ebm_prior.training.fit import fit
from ebm_prior.training.fit_config import FitConfig

SHAPE = {"image_shape": [1, 8, 8], "latents": [3, 2], "width": 4, "hidden": 5}
BACKBONES: dict[str, Callable[[], Backbone]] = {
    "shallow": lambda: ShallowGenerator(**SHAPE),  # type: ignore[arg-type]
    "nvae": lambda: tiny_nvae().eval(),
    "biva": lambda: ready_biva(tiny_biva()),
    "hvae": lambda: ready_hvae(tiny_hvae()),
}


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def default_device(name: str) -> Iterator[None]:
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def seeded_otherwise() -> Iterator[None]:
    with torch.random.fork_rng([]):
        torch.manual_seed(12345)
        before = torch.get_rng_state()
        yield
        assert torch.equal(torch.get_rng_state(), before)


@contextlib.contextmanager
def threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


SETTINGS: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float16": lambda: default_dtype(torch.float16),
    "float64": lambda: default_dtype(torch.float64),
    "default device": lambda: default_device("meta"),
    "device context": lambda: torch.device("meta"),
    "inference": torch.inference_mode,
    "no grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "deterministic": deterministic,
    "seed": seeded_otherwise,
    "threads": lambda: threads(2),
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", [*BACKBONES, "hvae_fashion_mnist"])
def test_a_file_is_the_same_network_under_any_setting(tmp_path: Path, name: str, setting: str) -> None:
    path = bundled().get(name, tmp_path / "b.safetensors")
    if name in BACKBONES:
        torch.manual_seed(0)
        save_backbone(BACKBONES[name](), path)
    expected = load_backbone(None, path)
    with SETTINGS[setting]():
        found = load_backbone(None, path)
        save_backbone(found, tmp_path / "again.safetensors")
        built = build(type(found), found.architecture, seed=3)
    assert (
        fingerprint(found) == fingerprint(expected) == fingerprint(load_backbone(None, tmp_path / "again.safetensors"))
    )
    assert fingerprint(built) == fingerprint(build(type(found), found.architecture, seed=3))
    assert {p.dtype for p in found.parameters()} == {torch.float32}
    assert {p.device.type for p in found.parameters()} == {"cpu"}
    assert not any(p.is_inference() for p in found.parameters())


def small_prior(backbone: Backbone | None = None) -> EBMPrior:
    torch.manual_seed(0)
    backbone = backbone or build(ShallowGenerator, SHAPE).eval().requires_grad_(False)
    energy = JointEnergy(backbone.groups, EnergyConfig(channels=4, hidden=8, joint=8))
    with torch.no_grad():
        for parameter in energy.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    return EBMPrior(backbone, energy, sampler=SamplerConfig(proposals=2, steps=2))


@pytest.mark.parametrize("setting", [name for name in SETTINGS if name != "threads"])
def test_a_prior_samples_and_scores_the_same_under_any_setting(tmp_path: Path, setting: str) -> None:
    prior, images = small_prior(), torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    forms = [Form(k=0), Form(k=1)]
    drawn, scored, f = prior.sample(3, seed=1), prior.scores(images, forms, draws=2), prior.f(prior.sample(3, seed=1).z)
    with SETTINGS[setting]():
        copied = images.clone()  # which is an inference tensor in inference mode
        again = prior.sample(3, seed=1)
        scores, values = prior.scores(images if copied.is_meta else copied, forms, draws=2), prior.f(again.z)
        save_backbone(prior.backbone, tmp_path / "b.safetensors")
        save_prior(prior, tmp_path / "p.safetensors", checkpoint="b.safetensors")
        read = load_prior(tmp_path / "p.safetensors").sample(3, seed=1)
    for a, b, c in zip(drawn[2:], again[2:], read[2:], strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    assert all(torch.equal(scored[form], scores[form]) for form in forms)
    assert torch.equal(f, values)
    assert not again.images.is_inference()


# What a prior and a backbone compute for callers, of latents z and ε, and images.
OF_PRIORS: dict[str, Callable[[EBMPrior, Any, Any, Any], Any]] = {
    "f": lambda p, z, eps, _: p.f(z),
    "f at eps": lambda p, z, eps, _: p.f(z, eps),
    "potential": lambda p, z, eps, _: p.potential(eps),
    "log_density": lambda p, z, eps, _: p.log_density(eps),
    "log_prior": lambda p, z, eps, _: p.log_prior(z),
    "log_normalizer": lambda p, *_: torch.tensor(p.log_normalizer(n=8, seed=1), dtype=torch.float64, device="cpu"),
    "log_normalizer by annealing": lambda p, z, eps, images: torch.tensor(
        _ends(
            p.log_normalizer(method="ais", images=images, config={"repetitions": 2, "chains": 1, "moves": 1}, seed=1)
        ),
        dtype=torch.float64,
        device="cpu",
    ),
    "map_chunks": lambda p, *_: p.map_chunks(lambda part: part.images, 3, seed=1),
    "sample": lambda p, *_: p.sample(3, seed=1),
    "complete": lambda p, z, *_: p.complete(z[:1], seed=1),
    "scores": lambda p, z, eps, images: [*p.scores(images, [Form(k=0), Form(k=1)], draws=2).values()],
}
OF_BACKBONES: dict[str, Callable[[Backbone, Any, Any, Any], Any]] = {
    "transform": lambda b, z, eps, _: b.transform(eps).z,
    "reparameterize": lambda b, z, eps, _: b.reparameterize(eps),
    "standardize": lambda b, z, eps, _: b.standardize(z),
    "log_prior": lambda b, z, eps, _: b.log_prior(z),
    "given": lambda b, z, eps, _: b.given(z).log_prior,
    "decode": lambda b, z, eps, _: b.decode(z).mean,
    "infer": lambda b, z, eps, images: [*b.infer(images, noise=eps)[:4]],
    "draw_posterior": lambda b, z, eps, images: b.draw_posterior(images, generator=generator()),
    "sample": lambda b, *_: b.sample(3, generator=generator()),
    "standard_normal": lambda b, *_: b.standard_normal(3, generator=generator()),
}


def _ends(bounds: Bounds) -> tuple[float, float]:
    return bounds.lower, bounds.upper


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(2)


def flat(value: Any) -> list[torch.Tensor]:
    return [value] if isinstance(value, torch.Tensor) else [tensor for part in value for tensor in flat(part)]


def public(kind: type[Any], but: set[str]) -> set[str]:
    return {name for name, member in vars(kind).items() if callable(member) and name[0] != "_"} - but


def test_every_public_method_is_in_the_test_of_settings() -> None:
    own = public(EBMPrior, {"to", "save", "load"}) | public(Normalised, set())
    assert own == set(OF_PRIORS) - {"f at eps", "log_normalizer by annealing"}
    contract = {"top_down", "encode", "likelihood", "observe", "for_inference", "checkpointing", "compiled", "trace"}
    assert public(Backbone, contract | {"for_training", "regularization"}) == set(OF_BACKBONES)


@pytest.mark.parametrize("name", ["shallow", "nvae"])
def test_every_number_is_the_same_under_any_setting(name: str) -> None:
    """But for a backbone's single passes under autocast, which is a caller's way to say that they may be coarse."""
    torch.manual_seed(0)
    prior = small_prior(BACKBONES[name]().eval().requires_grad_(False))
    images, drawn = torch.rand(3, *prior.backbone.image_shape, generator=generator()), prior.sample(3, seed=1)

    def computed(setting: str) -> dict[str, list[torch.Tensor]]:
        found = {f"prior.{of}": work(prior, drawn.z, drawn.eps, images) for of, work in OF_PRIORS.items()}
        if setting != "autocast":
            passes = OF_BACKBONES.items()
            found |= {f"backbone.{of}": work(prior.backbone, drawn.z, drawn.eps, images) for of, work in passes}
        return {of: flat(value) for of, value in found.items()}

    expected, unequal = computed("none"), set[str]()
    for setting in (each for each in SETTINGS if each != "threads"):
        with SETTINGS[setting]():
            found = computed(setting)
        unequal |= {f"{of}, {setting}" for of in found if not all(map(torch.equal, expected[of], found[of]))}
    assert unequal == set()


def test_f_is_differentiated_where_the_caller_asks_for_it() -> None:
    prior = small_prior()
    z = [t.requires_grad_() for t in prior.sample(2).z]
    assert torch.autograd.grad(prior.f(z).sum(), z)[0].abs().sum() > 0
    with torch.no_grad():
        assert not prior.f(z).requires_grad
    with torch.inference_mode():
        assert not prior.f(z).requires_grad


@pytest.mark.parametrize("setting", ["inference", "no grad", "bfloat16", "default device", "autocast", "seed"])
def test_a_fit_is_the_same_under_any_setting(setting: str) -> None:
    backbone = build(ShallowGenerator, SHAPE).eval().requires_grad_(False)
    pixels = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    images = from_dataset([(image, 0) for image in pixels])
    small = EnergyConfig(channels=4, hidden=8, joint=8)
    config = FitConfig(iterations=3, batch_size=8, evaluate_every=3, held_out=16, warmup=0, energy=small)
    expected = fit(backbone, images, config)
    with SETTINGS[setting]():
        found = fit(backbone, images, config)
    for a, b in zip(expected.energy.state_dict().values(), found.energy.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_the_library_fits_and_evaluates_the_same_under_any_setting(tmp_path: Path) -> None:
    """From tensors, as a caller has them, by the functions of the front door."""
    pixels, backbone = torch.rand(64, 1, 8, 8, generator=generator()), build(ShallowGenerator, SHAPE).eval()
    network = tmp_path / "network.safetensors"
    source = from_dataset([(image, index % 2) for index, image in enumerate(pixels)])
    save_classifier(train_classifier(source, source, ClassifierConfig(epochs=1, width=4))[0], network)
    small = {
        "iterations": 2,
        "batch_size": 8,
        "evaluate_every": 2,
        "held_out": 16,
        "warmup": 0,
        "energy": {"hidden": 8},
    }

    def computed() -> str:
        prior = ebm_prior.fit(backbone, pixels, small)
        found = ebm_prior.evaluate(prior, pixels, config={"samples": 32, "auc": False}, classifier=network)
        return json.dumps(found, sort_keys=True)

    expected = computed()
    for setting in ("default device", "no grad", "autocast", "seed"):
        with SETTINGS[setting]():
            assert computed() == expected, setting


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn, torch.int64, torch.complex64])
def test_other_precisions_are_refused_at_load(tmp_path: Path, dtype: torch.dtype) -> None:
    save_backbone(ShallowGenerator(**SHAPE), tmp_path / "b.safetensors")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match=r"expected parameters in float32 or float64, found \w+"):
        load_backbone(None, tmp_path / "b.safetensors", dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halved_parameters_are_refused_by_priors_and_fits(dtype: torch.dtype) -> None:
    backbone = copy.deepcopy(build(ShallowGenerator, SHAPE)).eval().to(dtype)
    images = from_dataset([(torch.rand(1, 8, 8), 0) for _ in range(20)])
    for use in (
        lambda: EBMPrior(backbone, JointEnergy(backbone.groups, EnergyConfig())),
        lambda: fit(backbone, images),
    ):
        with pytest.raises(ConfigurationError, match=r"found b?float16: use the backbone's \.float\(\)"):
            use()


def test_the_device_meta_is_refused(workshop: Workshop) -> None:
    said = workshop.error("doctor", "--ckpt", workshop.backbone, "--device", "meta")
    assert "the device meta holds shapes and no numbers" in said
    with pytest.raises(ConfigurationError, match="the device meta"):
        load_backbone(None, workshop.backbone, device="meta")
    with pytest.raises(ConfigurationError, match="device: expected one that torch can use here"):
        load_backbone(None, workshop.backbone, device="gpu")
    with pytest.raises(ConfigurationError, match="the device meta"):
        fit(build(ShallowGenerator, SHAPE).eval().to("meta"), from_dataset([(torch.rand(1, 8, 8), 0)]))


class Odd(LinearGaussian):
    """An adapter whose one group has another shape."""

    odd: tuple[int, ...] = ()

    def __init__(self, **architecture: Any) -> None:
        super().__init__(**architecture)
        self.groups = (LatentGroup("z1", self.odd),)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 0), (2, 2), (-1,), (1.0,)])
def test_latent_groups_of_no_shape_are_refused(shape: tuple[Any, ...]) -> None:
    kind = type("Odd", (Odd,), {"odd": shape})
    images = from_dataset([(torch.rand(1, 8, 8), 0)])
    backbone = kind().eval()
    for use in (lambda: build(kind, {}), lambda: EBMPrior(backbone, None), lambda: fit(backbone, images)):  # type: ignore[arg-type]
        with pytest.raises(ContractError, match=r"shape \(D,\) or \(C, H, W\), with sizes of at least 1; found z1 \("):
            use()


PRINTED = [["--help"], ["info", "--ckpt", "hvae_fashion_mnist"], ["fit", "--help-all"]]
PROGRAM = f"""
from ebm_prior.cli.main import main
for words in {PRINTED}:
    print(words, flush=True)
    main(words, standalone_mode=False)
"""


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_commands_print_in_any_encoding(encoding: str) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "LC_ALL": "C", "PYTHONUTF8": "0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr
    if encoding == "latin-1":
        assert rb"\u" in done.stdout.partition(b"--help-all")[2]  # what Latin-1 has no letter for
