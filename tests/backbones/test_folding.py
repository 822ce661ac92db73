"""Folded backbones: the same function, the same weights to the outside, and less work."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from functools import partial

import pytest
import tiny_biva
import tiny_hvae
import tiny_nvae
import torch
from ebm_prior.backbones.biva.adapter import BIVA
from ebm_prior.backbones.folding import FoldableBackbone
from ebm_prior.backbones.hvae.adapter import HVAE
from ebm_prior.backbones.nvae.adapter import NVAE
from torch import Tensor
from torch._dynamo.utils import counters
from watching import Watch

from ebm_prior.errors import ConfigurationError
from ebm_prior.model.backbone import Backbone
from ebm_prior.model.energy import EnergyConfig
from ebm_prior.model.samplers import SamplerChanges, SamplerConfig
from ebm_prior.storage.weights import count_parameters, fingerprint
from ebm_prior.testing.contract import check_backbone
from ebm_prior.training.fit import fit
from ebm_prior.training.fit_config import FitConfig

TOLERANCE = 1e-12
TINY: dict[str, Callable[[], Backbone]] = {
    "nvae": tiny_nvae.trained_tiny,
    "nvae of one group": lambda: tiny_nvae.trained(
        tiny_nvae.tiny(groups_per_scale=[1], encoder_channels=4, squeeze_excite=False)
    ),
    "nvae of combiners": lambda: tiny_nvae.trained(
        tiny_nvae.tiny(blocks=0, encoder_cells=0, decoder_cells=0, image_shape=[3, 4, 4])
    ),
    "hvae": lambda: tiny_hvae.initialised(tiny_hvae.tiny()),
    "biva": lambda: tiny_biva.initialised(tiny_biva.tiny()),
}
FIXTURES = tiny_nvae.FIXTURES.parent
OFFICIAL: dict[str, Callable[[], Backbone]] = {
    **{
        f"nvae/{name}": partial(NVAE.load_official, FIXTURES / "nvae" / name / "checkpoint.pt")
        for name in tiny_nvae.REFERENCES
    },
    **{f"biva/{name}": partial(BIVA.load_official, FIXTURES / "biva" / name) for name in tiny_biva.REFERENCES},
    **{
        f"hvae/{name}": partial(HVAE.load_official, FIXTURES / "hvae" / name)
        for name in ("fashion-mini", "cifar-mini", "fashion-trained")
    },
}
needs_fixtures = tiny_nvae.needs_fixtures


def double(make: Callable[[], Backbone]) -> Backbone:
    return copy.deepcopy(make()).double().eval().requires_grad_(False)


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


@pytest.mark.parametrize(
    "make",
    [
        *(pytest.param(make, id=name) for name, make in TINY.items()),
        *(pytest.param(make, id=name, marks=needs_fixtures) for name, make in OFFICIAL.items()),
    ],
)
def test_folded_passes_agree_to_float64_rounding(make: Callable[[], Backbone]) -> None:
    backbone = double(make)
    folded = backbone.for_inference()
    assert folded is not backbone
    expected, found = computed(backbone), computed(folded)
    assert found.keys() == expected.keys()
    errors = {
        key: float((found[key] - wanted).detach().abs().max() / wanted.detach().abs().max().clamp(min=1))
        for key, wanted in expected.items()
    }
    assert {key: error for key, error in errors.items() if not error <= TOLERANCE} == {}


@pytest.mark.parametrize("make", TINY.values(), ids=TINY)
def test_a_folded_backbone_keeps_the_contract(make: Callable[[], Backbone]) -> None:
    check_backbone(double(make).for_inference())


@pytest.mark.parametrize("make", TINY.values(), ids=TINY)
def test_to_the_outside_it_has_the_weights_that_it_came_from(make: Callable[[], Backbone]) -> None:
    backbone = make()
    folded = backbone.for_inference()
    assert fingerprint(folded) == fingerprint(backbone)
    assert count_parameters(folded) == count_parameters(backbone)
    before, after = backbone.state_dict(), folded.state_dict()
    assert before.keys() == after.keys()
    assert all(tensor.data_ptr() == after[name].data_ptr() for name, tensor in before.items())
    assert folded.for_inference() is folded
    assert isinstance(backbone, FoldableBackbone)
    assert backbone.running is backbone.network, "the backbone itself is as it was"


def test_checkpointing_keeps_less_and_changes_nothing() -> None:
    """Nor does it in half precision, whose cells it takes as they are."""
    backbone = tiny_nvae.trained_tiny()
    leaves = [e.requires_grad_() for e in backbone.standard_normal(4, generator=torch.Generator().manual_seed(1))]

    def last(which: Backbone) -> Tensor:
        return which.reparameterize(leaves)[-1].sum()

    def kept(which: Backbone) -> int:
        """Bytes that autograd keeps for the backward pass, but for weights."""
        constants = {t.data_ptr() for t in [*which.parameters(), *which.buffers()]}
        storages: dict[int, torch.UntypedStorage] = {}

        def pack(tensor: Tensor) -> Tensor:
            if tensor.data_ptr() not in constants:
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            last(which)
        return sum(storage.nbytes() for storage in storages.values())

    for whole in (backbone.for_inference(), backbone.for_inference(cells=torch.bfloat16)):
        before, found = kept(whole), torch.autograd.grad(last(whole), leaves)
        less = whole.checkpointing()
        assert kept(less) < 0.5 * before
        assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(last(less), leaves), found, strict=True))
    with pytest.raises(ConfigurationError, match="no checkpointing"):
        tiny_hvae.tiny().eval().checkpointing()


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("cells", [None, torch.bfloat16], ids=["float32", "bf16"])
def test_compiled_cells_compute_the_same(cells: torch.dtype | None) -> None:
    """To the rounding of the cells' precision; that they are compiled at all shows in what dynamo counts."""
    backbone = tiny_nvae.trained_tiny()
    before = counters["stats"]["unique_graphs"]
    eps = backbone.standard_normal(2, generator=torch.Generator().manual_seed(1))
    found = []
    for which in (backbone.for_inference(cells=cells), backbone.for_inference(cells=cells).compiled()):
        leaves = [e.clone().requires_grad_() for e in eps]
        z = which.reparameterize(leaves)
        found.append([*z, *torch.autograd.grad(z[-1].sum(), leaves)])
    assert counters["stats"]["unique_graphs"] > before
    tolerance = 1e-5 if cells is None else 0.02
    pairs = [(a.detach(), b.detach()) for a, b in zip(*found, strict=True) if b.any()]
    assert all(float((a - b).norm() / b.norm()) < tolerance for a, b in pairs)
    with pytest.raises(ConfigurationError, match="nothing to compile"):
        tiny_hvae.tiny().eval().compiled()


def test_cells_in_half_precision_agree_to_its_rounding() -> None:
    backbone = tiny_nvae.trained_tiny()
    full, half = backbone.for_inference(), backbone.for_inference(cells=torch.bfloat16)
    eps = backbone.standard_normal(4, generator=torch.Generator().manual_seed(1))
    found, wanted = half.reparameterize(eps), full.reparameterize(eps)
    assert all(z.dtype == torch.float32 for z in found)
    errors = [float((a - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=True)]
    assert max(errors) < 0.02
    assert max(errors[1:]) > 1e-5, "the cells do run in half"
    slopes = []
    for each in (half, full):
        leaves = [e.clone().requires_grad_() for e in eps]
        slopes.append(
            torch.cat([g.flatten() for g in torch.autograd.grad(each.reparameterize(leaves)[-1].sum(), leaves)])
        )
    assert float((slopes[0] - slopes[1]).norm() / slopes[1].norm()) < 0.05
    assert fingerprint(half) == fingerprint(backbone)
    assert half.for_inference() is half
    assert (half.precision, full.precision) == ("bf16", "float32")


def test_what_has_no_such_cells_says_so() -> None:
    for make in (TINY[name] for name in TINY if "nvae" not in name):
        with pytest.raises(ConfigurationError, match="no cells that run in"):
            make().for_inference(cells=torch.bfloat16)


def test_train_mode_unfolds_and_refuses_to_fold() -> None:
    backbone = copy.deepcopy(tiny_nvae.trained_tiny())
    folded = backbone.for_inference()
    assert isinstance(folded, FoldableBackbone)
    assert folded.running is not folded.network
    assert folded.train().running is folded.network is backbone.network
    with pytest.raises(ConfigurationError, match="eval mode"):
        backbone.train().for_inference()


class Pictures:
    """Images at random."""

    name = "random"

    def __init__(self, shape: tuple[int, int, int]) -> None:
        self.pixels = torch.rand(60, *shape, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.pixels)

    def batch(self, indices: Tensor) -> Tensor:
        return self.pixels[torch.as_tensor(indices)]


@pytest.mark.parametrize("make", TINY.values(), ids=TINY)
@pytest.mark.parametrize("objective", ["nce", "mle"])
def test_fits_and_samples_agree_to_rounding(
    make: Callable[[], Backbone], objective: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """20 steps on the folded backbone, which `fit` takes of itself, and on the one it came from."""
    backbone = copy.deepcopy(make()).requires_grad_(False)
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
    losses: dict[str, list[float]] = {"folded": [], "plain": []}
    priors = {"folded": fit(backbone, Pictures(backbone.image_shape), config, progress=_into(losses["folded"]))}
    with monkeypatch.context() as patch:
        patch.setattr(FoldableBackbone, "for_inference", lambda self: self)
        priors["plain"] = fit(backbone, Pictures(backbone.image_shape), config, progress=_into(losses["plain"]))
        assert priors["plain"].backbone is backbone is not priors["folded"].backbone
        drawn = {"plain": priors["plain"].sample(6, seed=1)}
    drawn["folded"] = priors["folded"].sample(6, seed=1)
    assert len(losses["plain"]) == 20
    assert losses["folded"] == pytest.approx(losses["plain"], rel=1e-4, abs=1e-5)
    torch.testing.assert_close(drawn["folded"].eps, drawn["plain"].eps, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(drawn["folded"].images, drawn["plain"].images, rtol=1e-3, atol=1e-3)


def _into(losses: list[float]) -> Watch:
    return Watch(lambda shown: losses.append(shown["loss"]))
