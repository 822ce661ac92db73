"""Exact folding: a frozen network as one that computes the same faster, beside the weights that it came from.

Where nearly all work of a network is in cells of one kind, `CellBackbone` can run these in a lower precision, compute
them again for the backward pass instead of keeping what that needs, and compile them.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar, Generic, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ebm_prior.errors import ConfigurationError
from ebm_prior.model.backbone import Backbone

Network = TypeVar("Network", bound=nn.Module)


class FoldableBackbone(Backbone, Generic[Network]):
    """A backbone whose passes run on `self.running`: `self.network`, or what `for_inference` has folded it into.

    The folded network holds constants, not weights: they are neither parameters nor in the state dict, which stay those
    of `network`. So a folded backbone has the fingerprint, the file and the size of the one that it was made from, with
    which it shares the weights; it does not follow when these change.
    """

    layout: ClassVar[torch.memory_format] = torch.channels_last  # of the folded weights, and so of the maps
    network: Network
    folded: Network | None
    cells: torch.dtype | None  # None: that of the weights

    def __init__(self) -> None:
        super().__init__()
        self.folded, self.cells = None, None

    @property
    def precision(self) -> str:
        """bf16 where the cells run in it, else that of the weights."""
        return super().precision if self.cells is None else "bf16"

    @property
    def running(self) -> Network:
        """The network that passes run on."""
        return self.network if self.folded is None else self.folded

    def for_inference(self, *, cells: torch.dtype | None = None) -> Backbone:
        """This backbone with its network folded, on the device of its weights and in their dtype but for the `cells`.

        Raises ConfigurationError in train mode, where batch norms are not constant.
        """
        if self.folded is not None and cells is None:
            return self
        if self.training:
            raise ConfigurationError("expected a backbone in eval mode, found it in train mode: call .eval() first")
        like = next(self.network.parameters())
        twin = copy.copy(self)
        twin._modules = dict(self._modules)
        with torch.no_grad():  # in float64, so that each constant is rounded once; on the CPU, which always has it
            folded = self.fold(copy.deepcopy(self.network).cpu().double()).eval()
        twin.folded = constants(folded).to(like.device, like.dtype).to(memory_format=self.layout)
        if cells is not None:
            self.lower(twin.folded, cells)
            twin.cells = cells
        return twin

    @abstractmethod
    def fold(self, network: Network) -> Network:
        """A network that computes what `network` does. `network` is a copy in eval mode, which may be changed."""

    def lower(self, folded: Network, cells: torch.dtype) -> None:
        """Run the cells of a folded network in a lower precision, in place; ConfigurationError where it has none."""
        raise ConfigurationError(
            f"{type(self).__name__} has no cells that run in {cells}: leave the precision as it is"
        )

    def train(self, mode: bool = True) -> FoldableBackbone[Network]:
        """Set the mode, as ever; in train mode the weights are about to change, so that nothing is folded any more."""
        if mode:
            self.folded, self.cells = None, None
        super().train(mode)
        return self


def constants(network: Network) -> Network:
    """The network with every parameter and buffer turned into a buffer outside the state dict, in place."""
    for module in network.modules():
        for name, parameter in list(module._parameters.items()):
            del module._parameters[name]
            module.register_buffer(name, None if parameter is None else parameter.detach(), persistent=False)
        module._non_persistent_buffers_set.update(module._buffers)
    return network


class InferenceCell(nn.Module):
    """A cell of a folded network: `compute`, of one map (B, C, H, W), and how it is run."""

    branch_dtype: torch.dtype | None = None  # None: that of the input
    recomputed = False  # keep the input alone for the backward pass, and compute the rest again there
    compiled = False  # by torch.compile, which fuses what is done element by element

    @abstractmethod
    def compute(self, x: Tensor) -> Tensor:
        """The cell's result, or the part of it that is worth computing again and compiling."""

    @abstractmethod
    def branch(self) -> Sequence[nn.Module]:
        """The modules that work in `branch_dtype`."""

    def lower(self, dtype: torch.dtype) -> None:
        """Run the branch in a lower precision. What it is added to stays in that of the input."""
        self.branch_dtype = dtype
        for module in self.branch():
            module.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """`compute`, run as the flags say."""
        run = _compiled(type(self)) if self.compiled else type(self).compute
        if not (self.recomputed and torch.is_grad_enabled() and x.requires_grad):
            return run(self, x)
        again: Tensor = checkpoint(run, self, x, use_reentrant=False, preserve_rng_state=False)
        return again


_COMPILED: dict[type[InferenceCell], Callable[[InferenceCell, Tensor], Tensor]] = {}


def _compiled(kind: type[InferenceCell]) -> Callable[[InferenceCell, Tensor], Tensor]:
    """`compute` of a kind of cells compiled: once for all cells of one shape, at their first pass."""
    if kind not in _COMPILED:
        import torch._dynamo  # takes a while, which only those who compile should wait

        torch._dynamo.config.cache_size_limit = max(64, torch._dynamo.config.cache_size_limit)  # shapes; it is 8
        _COMPILED[kind] = torch.compile(kind.compute, dynamic=False)
    return _COMPILED[kind]


class CellBackbone(FoldableBackbone[Network]):
    """A foldable backbone whose folded network is made of `InferenceCell`s, for the most part."""

    def lower(self, folded: Network, cells: torch.dtype) -> None:
        """The branches of the cells in `cells`; what they are added to, and all else, stays as it is."""
        for cell in _cells_of(folded):
            cell.lower(cells)

    def checkpointing(self) -> Backbone:
        """Folded, with cells that keep their input alone for the backward pass."""
        return self._with_cells(recomputed=True)

    def compiled(self) -> Backbone:
        """Folded, with cells that torch.compile has fused."""
        return self._with_cells(compiled=True)

    def _with_cells(self, **flags: bool) -> Backbone:
        folded = cast(CellBackbone[Network], self.for_inference())
        for cell in _cells_of(folded.running):
            vars(cell).update(flags)
        return folded


def _cells_of(network: nn.Module) -> list[InferenceCell]:
    return [module for module in network.modules() if isinstance(module, InferenceCell)]
