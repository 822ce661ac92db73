"""What every adapter must do, proved for all of them: a new one is a row of `ADAPTERS` and has all of it."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_biva
import tiny_hvae
import tiny_nvae
import tiny_shallow
import tiny_vdvae
import torch
from adapter_cases import AdapterCase, Official
from ebm_prior.backbones.folding import FoldableBackbone
from exploits import Exploit
from listener import Listener
from torch import Tensor
from workshop import Workshop

from ebm_prior.errors import CheckpointError, ConfigurationError
from ebm_prior.model.backbone import Backbone
from ebm_prior.model.energy import EnergyConfig
from ebm_prior.model.samplers import SamplerChanges, SamplerConfig
from ebm_prior.storage.checkpoint import backbone_record, load_backbone, save_backbone
from ebm_prior.storage.registry import build, registered
from ebm_prior.storage.weights import count_parameters, fingerprint
from ebm_prior.testing.contract import check_backbone
from ebm_prior.training.fit import fit
from ebm_prior.training.fit_config import FitConfig

ADAPTERS: dict[str, AdapterCase] = {
    "nvae": tiny_nvae.CASE,
    "biva": tiny_biva.CASE,
    "hvae": tiny_hvae.CASE,
    "shallow": tiny_shallow.CASE,
    "vdvae": tiny_vdvae.CASE,
}
OFFICIAL = {name: case.official for name, case in ADAPTERS.items() if case.official is not None}
Make = Callable[[], Backbone]

each_adapter = pytest.mark.parametrize("adapter", ADAPTERS)
each_official = pytest.mark.parametrize("adapter", OFFICIAL)
each_file = pytest.mark.parametrize(
    ("adapter", "file"), [(adapter, file) for adapter, official in OFFICIAL.items() for file in official.files]
)


def skip_without(path: Path) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not path.exists(), reason="the reference arrays of ../shared are not here")


def own_networks() -> list[Any]:
    """The small networks of every adapter."""
    return [
        pytest.param(adapter, make, id=f"{adapter} {name}".strip())
        for adapter, case in ADAPTERS.items()
        for name, make in case.networks.items()
    ]


def official_networks() -> list[Any]:
    """Those that the official codes wrote, where they are here."""
    return [
        pytest.param(
            adapter,
            partial(ADAPTERS[adapter].kind.load_official, path),
            id=f"{adapter}/{name}",
            marks=skip_without(path),
        )
        for adapter, official in OFFICIAL.items()
        for name, path in official.references.items()
    ]


each_small_network = pytest.mark.parametrize(("adapter", "make"), own_networks())
each_network = pytest.mark.parametrize(("adapter", "make"), own_networks() + official_networks())


def standing_for_all(adapter: str) -> Backbone:
    """A small network of its own for a test."""
    return copy.deepcopy(next(iter(ADAPTERS[adapter].networks.values()))())


def double(make: Make) -> Backbone:
    return copy.deepcopy(make()).double().eval().requires_grad_(False)


def test_no_built_in_adapter_is_left_out() -> None:
    built_in = {name for name, point in registered().items() if point.value.startswith("ebm_prior.backbones.")}
    assert built_in == ADAPTERS.keys()


# The contract.


@each_network
def test_keeps_the_contract(adapter: str, make: Make) -> None:
    """As it is and, if it is small, `for_inference`; only an official network may be too large for a density."""
    small = make in ADAPTERS[adapter].networks.values()
    if small:
        assert not check_backbone(make()).skipped
        check_backbone(double(make).for_inference())
    else:
        skipped = check_backbone(make(), batch_size=2).skipped
        assert all("dimensions that its noise map mixes" in sentence for sentence in skipped)


@each_adapter
def test_what_cannot_be_built_is_a_stated_error(adapter: str) -> None:
    options = standing_for_all(adapter).architecture
    wrong, message = ADAPTERS[adapter].wrong
    for changes, match in (({"surprise": 3}, "surprise"), (wrong, message)):
        with pytest.raises(ConfigurationError, match=match):
            build(ADAPTERS[adapter].kind, {**options, **changes})


# Its own form.


def passes(backbone: Backbone) -> list[Tensor]:
    """What equal networks compute equally."""
    generator = torch.Generator().manual_seed(0)
    eps, noise = (backbone.standard_normal(2, generator=generator) for _ in range(2))
    images = backbone.observe(torch.rand(2, *backbone.image_shape, generator=generator), generator=generator)
    z, posterior = backbone.reparameterize(eps), backbone.infer(images, noise=noise)
    return [*z, backbone.decode(z).mean, *posterior.z, posterior.log_q, posterior.log_p]


@each_network
def test_the_own_form_is_the_same_network(adapter: str, make: Make, tmp_path: Path) -> None:
    backbone, path = make().requires_grad_(False), tmp_path / "own.safetensors"
    save_backbone(backbone, path)
    assert backbone_record(path)["adapter"] == adapter
    for name in (None, adapter):
        again = load_backbone(name, path)
        assert type(again) is ADAPTERS[adapter].kind
        assert json.dumps(again.architecture) == json.dumps(backbone.architecture)
        assert (again.groups, tuple(again.image_shape)) == (backbone.groups, tuple(backbone.image_shape))
        assert fingerprint(again) == fingerprint(backbone)
        assert not any(module.training for module in again.modules())
        assert not any(parameter.requires_grad for parameter in again.parameters())
    assert all(map(torch.equal, passes(again), passes(backbone)))
    other = next(name for name in ADAPTERS if name != adapter)
    with pytest.raises(CheckpointError, match=f"use --backbone {adapter}"):
        load_backbone(other, path)


@each_network
def test_half_precision_files_run_in_float32(adapter: str, make: Make, tmp_path: Path) -> None:
    backbone, path = make().requires_grad_(False), tmp_path / "half.safetensors"
    save_backbone(backbone, path, dtype=torch.float16)
    half = load_backbone(None, path)
    for (key, whole), rounded in zip(backbone.state_dict().items(), half.state_dict().values(), strict=True):
        assert rounded.dtype == whole.dtype, key
        assert torch.equal(rounded, whole.half().float() if whole.is_floating_point() else whole), key
    eps = backbone.standard_normal(2, generator=torch.Generator().manual_seed(0))
    for a, b in zip(backbone.reparameterize(eps), half.reparameterize(eps), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0.05 * float(a.abs().max()))
    save_backbone(half, tmp_path / "again.safetensors")
    assert fingerprint(load_backbone(None, tmp_path / "again.safetensors")) == fingerprint(half)


@each_adapter
def test_info_counts_its_parameters(adapter: str, workshop: Workshop, tmp_path: Path) -> None:
    backbone, path = standing_for_all(adapter), tmp_path / "own.safetensors"
    save_backbone(backbone, path)
    shown = json.loads(workshop.run("info", "--ckpt", path, "--json").stdout)
    assert shown["parameters"]["backbone"] == sum(p.numel() for p in backbone.parameters())
    assert shown["fingerprint"] == fingerprint(backbone)
    assert shown["groups"] == [[name, list(shape)] for name, shape in backbone.groups]
    assert workshop.run("info", "--ckpt", path).stdout


# For inference.


def computed(backbone: Backbone) -> dict[str, Tensor]:
    """Everything that the passes give, and ∂/∂ε of a random functional of z, of log p_β and of log p(x | z)."""
    generator = torch.Generator().manual_seed(0)
    eps, noise = (backbone.standard_normal(3, generator=generator) for _ in range(2))
    x = torch.rand(3, *backbone.image_shape, generator=generator, dtype=torch.float64)
    x = backbone.observe(x, generator=generator)
    trace = backbone.transform([e.requires_grad_() for e in eps], temperature=0.8)
    found = {f"z{i}": z for i, z in enumerate(trace.z)}
    weights = [torch.randn(z.shape, generator=generator, dtype=z.dtype) for z in trace.z]
    log_px = backbone.likelihood(trace.features).log_prob(x)
    functionals = {
        "z": torch.stack([(z * w).sum() for z, w in zip(trace.z, weights, strict=True)]).sum(),
        "log_p": trace.log_prior.sum(),
        "log_px": log_px.sum(),
    }
    for name, value in functionals.items():
        gradients = torch.autograd.grad(value, eps, retain_graph=True, allow_unused=True)
        found |= {f"∂{name}/∂ε{i}": g for i, g in enumerate(gradients) if g is not None}
    posterior = backbone.infer(x, noise=noise)
    found |= {"log_px": log_px, "log_q": posterior.log_q, "log_p": posterior.log_p}
    found |= {f"posterior {i}": z for i, z in enumerate(posterior.z)}
    found |= {f"drawn {i}": z for i, z in enumerate(backbone.draw_posterior(x, generator=generator))}
    return found | {"mean": backbone.likelihood(posterior.features).mean}


@each_network
def test_for_inference_it_computes_the_same(adapter: str, make: Make) -> None:
    """To float64 rounding: whatever is folded into one is as it was apart."""
    backbone = double(make)
    folded = backbone.for_inference()
    assert (folded is not backbone) == isinstance(backbone, FoldableBackbone)
    expected, found = computed(backbone), computed(folded)
    assert found.keys() == expected.keys()
    errors = {
        key: float((found[key] - wanted).detach().abs().max() / wanted.detach().abs().max().clamp(min=1))
        for key, wanted in expected.items()
    }
    assert {key: error for key, error in errors.items() if not error <= 1e-12} == {}


@each_small_network
def test_for_inference_it_has_the_same_weights_to_the_outside(adapter: str, make: Make) -> None:
    backbone = make()
    folded = backbone.for_inference()
    assert fingerprint(folded) == fingerprint(backbone)
    assert count_parameters(folded) == count_parameters(backbone) == sum(p.numel() for p in backbone.parameters())
    before, after = backbone.state_dict(), folded.state_dict()
    assert before.keys() == after.keys()
    assert all(tensor.data_ptr() == after[name].data_ptr() for name, tensor in before.items())
    assert folded.for_inference() is folded
    if isinstance(backbone, FoldableBackbone):
        assert backbone.running is backbone.network, "the backbone itself is as it was"


# The second stage.


class Pictures:
    """Images at random."""

    name = "random"

    def __init__(self, shape: tuple[int, int, int]) -> None:
        self.pixels = torch.rand(60, *shape, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.pixels)

    def batch(self, indices: Tensor) -> Tensor:
        return self.pixels[torch.as_tensor(indices)]


@pytest.mark.parametrize("objective", ["nce", "mle"])
@each_adapter
def test_fits_and_samples_for_inference_agree_to_rounding(
    adapter: str, objective: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """20 steps on the backbone for inference, which `fit` takes of itself, and on the one it came from."""
    backbone = standing_for_all(adapter).requires_grad_(False)
    chain = SamplerConfig(proposals=1, kernel="langevin", steps=3, step_size=0.02)
    config = FitConfig(
        objective=objective,  # type: ignore[arg-type]
        iterations=20,
        batch_size=8,
        evaluate_every=20,
        held_out=6,
        warmup=0,
        energy=EnergyConfig(channels=4, hidden=8, joint=8),
        sampler=SamplerChanges(proposals=2, steps=3),
        chain=chain,
    )
    pictures = Pictures(backbone.image_shape)
    losses: dict[str, list[float]] = {"folded": [], "plain": []}
    priors = {"folded": fit(backbone, pictures, config, progress=_into(losses["folded"]))}
    with monkeypatch.context() as patch:
        patch.setattr(FoldableBackbone, "for_inference", lambda self: self)
        priors["plain"] = fit(backbone, pictures, config, progress=_into(losses["plain"]))
        assert priors["plain"].backbone is backbone
        assert (priors["folded"].backbone is not backbone) == isinstance(backbone, FoldableBackbone)
        drawn = {"plain": priors["plain"].sample(6, seed=1)}
    drawn["folded"] = priors["folded"].sample(6, seed=1)
    assert len(losses["plain"]) == 20
    assert losses["folded"] == pytest.approx(losses["plain"], rel=1e-4, abs=1e-5)
    assert drawn["plain"].images.shape == (6, *backbone.image_shape)
    assert drawn["plain"].images.isfinite().all()
    torch.testing.assert_close(drawn["folded"].eps, drawn["plain"].eps, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(drawn["folded"].images, drawn["plain"].images, rtol=1e-3, atol=1e-3)


def _into(losses: list[float]) -> Listener:
    return Listener(lambda shown: losses.append(shown["loss"]))


# The format of its official code.


def official_files() -> list[Any]:
    """The checkpoint that a test writes, and those that the official codes wrote."""
    return [
        pytest.param(adapter, path, id=f"{adapter}/{name}", marks=[] if path is None else skip_without(path))
        for adapter, official in OFFICIAL.items()
        for name, path in {"written": None, **official.references}.items()
    ]


@each_official
def test_official_files_give_back_the_network(adapter: str, tmp_path: Path) -> None:
    official = OFFICIAL[adapter]
    loaded, written = ADAPTERS[adapter].kind.load_official(official.write(tmp_path)), official.written()
    assert loaded.architecture == written.architecture
    assert fingerprint(loaded) == fingerprint(written)
    assert not any(module.training for module in loaded.modules())
    assert all(parameter.requires_grad for parameter in loaded.parameters())


@pytest.mark.parametrize(("adapter", "path"), official_files())
def test_official_files_convert_fit_and_sample(
    workshop: Workshop, small_options: list[str], adapter: str, path: Path | None, tmp_path: Path
) -> None:
    """By the shortest commands: the prior of the converted file is that of the official one."""
    checkpoint = path or OFFICIAL[adapter].write(tmp_path)
    loaded, own, run = load_backbone(adapter, checkpoint), tmp_path / "own.safetensors", tmp_path / "run"
    assert "wrote" in workshop.run("convert", "--backbone", adapter, "--ckpt", checkpoint, "--out", own).stdout
    assert backbone_record(own)["adapter"] == adapter
    assert fingerprint(load_backbone(None, own)) == fingerprint(loaded)
    channels, side, _ = loaded.image_shape
    np.save(tmp_path / "images.npy", np.random.default_rng(0).integers(0, 256, (40, side, side, channels), np.uint8))
    words = ["--data", tmp_path / "images.npy", *small_options]
    words += ["--iterations", 2, "--max-steps", 2, "--sampler-steps", 1]
    workshop.run("fit", "--backbone", adapter, "--ckpt", checkpoint, *words, "--out", run)
    for more in ((), ("--ckpt", own)):
        workshop.run("sample", run / "prior.safetensors", *more, "-n", 2, "--out", run / f"drawn{len(more)}.npz")
    with np.load(run / "drawn0.npz") as drawn, np.load(run / "drawn2.npz") as again:
        assert drawn["images"].shape == (2, side, side, channels)
        assert np.array_equal(drawn["images"], again["images"])


# Official files that are refused.


@each_file
def test_missing_and_truncated_files_are_named(adapter: str, file: str, tmp_path: Path) -> None:
    kind, checkpoint = ADAPTERS[adapter].kind, OFFICIAL[adapter].write(tmp_path)
    whole = (tmp_path / file).read_bytes()
    for kept in (0.0, 0.5, 0.99):
        (tmp_path / file).write_bytes(whole[: int(kept * len(whole))])
        with pytest.raises(CheckpointError, match=f"{file}, found a damaged file"):
            kind.load_official(checkpoint)
    (tmp_path / file).unlink()
    with pytest.raises(CheckpointError, match=rf"{file}(, found no such file| is not a file)"):
        kind.load_official(checkpoint)


@each_file
def test_foreign_pickles_are_refused_and_do_not_run(adapter: str, file: str, tmp_path: Path) -> None:
    checkpoint, attack = OFFICIAL[adapter].write(tmp_path), Exploit(tmp_path / "run")
    said = []
    for write in (lambda path: path.write_bytes(pickle.dumps(attack)), partial(torch.save, attack)):
        write(tmp_path / file)
        with pytest.raises(CheckpointError) as caught:
            load_backbone(adapter, checkpoint)
        said.append(str(caught.value))
        assert not (tmp_path / "run").exists()
    assert all("could run code" in message or "found a damaged file" in message for message in said)
    assert any("mkdir, refused because" in message for message in said) or file.endswith(".json")
    pickle.loads(pickle.dumps(attack))
    assert (tmp_path / "run").exists()  # the attack would have worked


@each_official
def test_a_path_of_another_kind_is_told_the_format(adapter: str, tmp_path: Path) -> None:
    kind = ADAPTERS[adapter].kind
    with pytest.raises(CheckpointError, match=f"is not a f.*, and the official format of {kind.__name__} is a"):
        kind.load_official(tmp_path / "absent")


def spoiled(official: Official) -> tuple[dict[str, Tensor], list[str]]:
    """The official weights, and the names of some that every checkpoint must hold."""
    state = dict(official.state())
    return state, [key for key, tensor in state.items() if key.endswith("bias") and tensor.is_floating_point()]


@each_official
def test_every_weight_that_does_not_fit_is_named(adapter: str, tmp_path: Path) -> None:
    official = OFFICIAL[adapter]
    state, (renamed, misshapen, retyped, *_) = spoiled(official)
    state["renamed"] = state.pop(renamed)
    state[misshapen] = torch.ones(7, 5)
    state[retyped] = state[retyped].to(torch.int64)
    with pytest.raises(CheckpointError) as caught:
        ADAPTERS[adapter].kind.load_official(official.write(tmp_path, state=state))
    for line in (
        f"missing: {renamed}",
        "unexpected: renamed",
        f"mis-shaped: {misshapen} expected",
        f"of another type: {retyped}",
    ):
        assert line in str(caught.value)


@each_official
def test_weights_that_are_no_finite_tensors_are_refused(adapter: str, tmp_path: Path) -> None:
    official = OFFICIAL[adapter]
    state, (name, *_) = spoiled(official)
    for value, message in (
        (state[name].clone().fill_(float("nan")), f"found NaN or infinity in {name}"),
        ([1.0], "something else than a dict of dense tensors"),
    ):
        with pytest.raises(CheckpointError, match=message):
            ADAPTERS[adapter].kind.load_official(official.write(tmp_path, state={**state, name: value}))
