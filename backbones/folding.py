"""Exact folding: from a frozen network, a second one that computes the same function faster.

If nearly all work of a network is in cells of one kind, `CellBackbone` can run the cells in a lower precision and
compile them, in training too, and recompute those of a frozen network in the backward pass to save memory.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import ClassVar, Generic, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ebm_prior.errors import ConfigurationError
from ebm_prior.model.backbone import Backbone

Network = TypeVar("Network", bound=nn.Module)


class FoldableBackbone(Backbone, Generic[Network]):
    """A backbone with passes that run on `self.running`: on `self.network`, or on the folded form of it.

    The folded network holds constants, which are neither parameters nor in the state dict; those remain `network`'s. So
    a folded backbone has the fingerprint, file and size of the original, and shares its weights, but it does not follow
    later changes of the weights.
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
        """Set the mode. Train mode drops the folded network, since the weights are about to change."""
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


class NetworkCell(nn.Module):
    """A cell of a network: a function `compute` of a map (B, C, H, W), and flags for how it is run."""

    branch_dtype: torch.dtype | None = None  # None: that of the input
    compiled = False  # by torch.compile, which fuses elementwise operations

    @abstractmethod
    def compute(self, x: Tensor) -> Tensor:
        """The cell's result, or the part of it that is worth compiling and recomputing."""

    def lower(self, dtype: torch.dtype) -> None:
        """Run the branch in a lower precision. The residual stream keeps the precision of the input."""
        self.branch_dtype = dtype

    def in_branch(self, branch: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """`branch` of x, in x's dtype; with a `branch_dtype` computed under autocast, with the weights as they are."""
        if self.branch_dtype is None:
            return branch(x)
        with torch.autocast(x.device.type, self.branch_dtype):
            return branch(x).to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """`compute`, run as the flags say."""
        return self.run(x)

    @property
    def run(self) -> Callable[[Tensor], Tensor]:
        """`compute`, compiled or not."""
        return partial(_compiled(type(self)) if self.compiled else type(self).compute, self)


class InferenceCell(NetworkCell):
    """A cell of a folded network, with constant weights."""

    recomputed = False  # keep only the input for the backward pass, and compute the rest again there

    @abstractmethod
    def branch(self) -> Sequence[nn.Module]:
        """The modules that run in `branch_dtype`."""

    def lower(self, dtype: torch.dtype) -> None:
        """Run the branch in a lower precision, to which its weights are rounded once."""
        super().lower(dtype)
        for module in self.branch():
            module.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """`compute`, run as the flags say."""
        if not (self.recomputed and torch.is_grad_enabled() and x.requires_grad):
            return self.run(x)
        again: Tensor = checkpoint(self.run, x, use_reentrant=False, preserve_rng_state=False)
        return again


_COMPILED: dict[type[NetworkCell], Callable[[NetworkCell, Tensor], Tensor]] = {}


def _compiled(kind: type[NetworkCell]) -> Callable[[NetworkCell, Tensor], Tensor]:
    """`compute` of a kind of cells compiled: once for all cells of one shape, at their first pass."""
    if kind not in _COMPILED:
        import torch._dynamo  # imported here, because it is slow and only needed for compiling

        torch._dynamo.config.cache_size_limit = max(64, torch._dynamo.config.cache_size_limit)  # shapes; it is 8
        _COMPILED[kind] = torch.compile(kind.compute, dynamic=False)
    return _COMPILED[kind]


class CellBackbone(FoldableBackbone[Network]):
    """A foldable backbone whose network consists mostly of `NetworkCell`s, and the folded one of `InferenceCell`s."""

    def for_training(self, *, cells: torch.dtype | None = None, compiled: bool = False) -> Backbone:
        """A copy of the modules of this backbone around the same tensors, with cells compiled or under autocast."""
        tensors = [*self.parameters(), *self.buffers()]
        twin = copy.deepcopy(self, {id(tensor): tensor for tensor in tensors})
        for cell in _cells_of(twin.network):
            cell.compiled = compiled
            if cells is not None:
                cell.lower(cells)
        return twin

    def lower(self, folded: Network, cells: torch.dtype) -> None:
        """Run the branches of the cells in the dtype `cells`; the residual stream and all else stay as they are."""
        for cell in _cells_of(folded):
            cell.lower(cells)

    def checkpointing(self) -> Backbone:
        """The folded backbone with cells that keep only their input for the backward pass."""
        return self._with_cells(recomputed=True)

    def compiled(self) -> Backbone:
        """The folded backbone with cells compiled by torch.compile."""
        return self._with_cells(compiled=True)

    def _with_cells(self, **flags: bool) -> Backbone:
        folded = cast(CellBackbone[Network], self.for_inference())
        for cell in _cells_of(folded.running):
            vars(cell).update(flags)
        return folded


def _cells_of(network: nn.Module) -> list[NetworkCell]:
    return [module for module in network.modules() if isinstance(module, NetworkCell)]
