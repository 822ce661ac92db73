"""Folded backbones: less work. That it is the same function and has the same weights is shown in test_adapters."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable

import pytest
import tiny_biva
import tiny_hvae
import tiny_nvae
import tiny_vdvae
import torch
from ebm_prior.backbones.folding import FoldableBackbone, NetworkCell
from torch import Tensor
from torch._dynamo.utils import counters

from ebm_prior.errors import ConfigurationError
from ebm_prior.model.backbone import Backbone
from ebm_prior.storage.weights import fingerprint

Make = Callable[[], Backbone]
of_cells = pytest.mark.parametrize("make", [tiny_nvae.trained_tiny, tiny_vdvae.trained_tiny], ids=["nvae", "vdvae"])


@pytest.mark.parametrize(
    ("make", "part"), [(tiny_nvae.trained_tiny, 0.5), (tiny_vdvae.trained_tiny, 0.7)], ids=["nvae", "vdvae"]
)
def test_checkpointing_keeps_less_and_changes_nothing(make: Make, part: float) -> None:
    """Nor does it in half precision, whose cells it takes as they are."""
    backbone = make()
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
        assert kept(less) < part * before
        assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(last(less), leaves), found, strict=True))
    with pytest.raises(ConfigurationError, match="no checkpointing"):
        tiny_hvae.tiny().eval().checkpointing()


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("cells", [None, torch.bfloat16], ids=["float32", "bf16"])
@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: tiny_nvae.seeded(groups_per_scale=[2]), id="nvae"),
        pytest.param(tiny_nvae.trained_tiny, id="nvae of two scales", marks=pytest.mark.long),  # twice the time
        pytest.param(tiny_vdvae.trained_smallest, id="vdvae", marks=pytest.mark.long),  # the compiler takes 20 s
    ],
)
def test_compiled_cells_compute_the_same(make: Make, cells: torch.dtype | None) -> None:
    """To the rounding of the cells' precision; that they are compiled at all shows in what dynamo counts."""
    backbone = make()
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


@of_cells
def test_cells_in_half_precision_agree_to_its_rounding(make: Make) -> None:
    backbone = make()
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
    for backbone in (tiny_hvae.trained_tiny(), tiny_biva.trained_tiny()):
        with pytest.raises(ConfigurationError, match="no cells that run in"):
            backbone.for_inference(cells=torch.bfloat16)


def test_train_mode_unfolds_and_refuses_to_fold() -> None:
    backbone = copy.deepcopy(tiny_nvae.trained_tiny())
    folded = backbone.for_inference()
    assert isinstance(folded, FoldableBackbone)
    assert folded.running is not folded.network
    assert folded.train().running is folded.network is backbone.network
    with pytest.raises(ConfigurationError, match="eval mode"):
        backbone.train().for_inference()


@of_cells
def test_a_network_in_training_has_the_tensors_of_the_first_and_cells_of_its_own(make: Make) -> None:
    backbone = copy.deepcopy(make()).train()
    learning = backbone.for_training(cells=torch.bfloat16, compiled=True)
    for own, first in ((learning.parameters(), backbone.parameters()), (learning.buffers(), backbone.buffers())):
        assert all(a is b for a, b in zip(own, first, strict=True))
    flags = [
        {(cell.branch_dtype, cell.compiled) for cell in each.modules() if isinstance(cell, NetworkCell)}
        for each in (learning, backbone)
    ]
    assert flags == [{(torch.bfloat16, True)}, {(None, False)}]
    assert learning.training
