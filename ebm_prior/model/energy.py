"""The joint energy: one small head per latent group, f(z) = Σ_i f_i(z_i) (Eqs. 6-7), and an optional joint head.

f is the NEGATIVE energy: p_α(z) ∝ exp(f(z)) p_β(z), larger is more probable. Each head sees its group standardised
with posterior statistics and ends in a linear layer that starts at zero. So f = 0 exactly before training, and an
untrained prior is the backbone's own.

A conditional head also sees ε_i = (z_i − mean_i)/std_i, which is z_i standardised by its own prior p_β(z_i | z_<i).
Under the backbone's prior ε is white noise, so any structure in it shows what the conditionals miss. A groupwise head
sees mean_i and log std_i, too, and hears of the groups above by a running sum of their features (`Above`). So f is a
sum of terms f_i(z_i, z_<i) then. All that heads see is a function of z, and so is f.

Where many groups have one shape, as in a VDVAE, their heads share their hidden layers (`EnergyConfig.own_heads`). Each
group keeps its own standardisation, its own last layer, and a gain and an offset for each unit of the first hidden
layer (Perez et al. 2018), which tell the shared layers which group they see.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal, cast

import torch
from torch import Tensor, nn

from ebm_prior.errors import ConfigurationError
from ebm_prior.model.backbone import Gaussian, LatentGroup
from ebm_prior.model.layers import HiddenLayers, SharedBody
from ebm_prior.settings import require, require_counts, require_kinds, require_shares, setting

WIDEST, DEEPEST = 2**20, 1_000  # largest width and number of layers; more is a mistake or a damaged file
MOST_GROUPS = 10_000  # more in a file are a mistake or damage
LARGEST_BOUND = 1e9  # in units of posterior standard deviations
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"silu": nn.SiLU, "leaky_relu": partial(nn.LeakyReLU, 0.2)}


@dataclass(frozen=True)
class EnergyConfig:
    """Settings of the heads. The paper's (Table 12): channels 64, hidden 200, vector_layers 2, no joint, leaky_relu."""

    channels: int = setting(48, "Channels of the convolutions in the heads of spatial latent groups (nef)")
    hidden: int = setting(128, "Width of the linear layers in the heads (ndf)")
    vector_layers: int = setting(2, "Hidden layers in the head of a latent group without spatial axes")
    joint: int = setting(128, "Width of the joint head, which sees all latent groups; 0: no joint head")
    activation: Literal["silu", "leaky_relu"] = setting(
        "silu", "Activation function of the heads; leaky_relu has slope 0.2"
    )
    conditional: bool = setting(False, "Let the heads also see each z_i standardised by its own prior p(z_i | z_<i)")
    standardize: bool = setting(
        True, "Standardise the heads' inputs by the mean and standard deviation of posterior latents"
    )
    dropout: float = setting(0.0, "Dropout rate in the joint head")
    own_heads: int = setting(
        8, "Largest number of latent groups of one shape that have a head each; where there are more, they share one"
    )
    bound: float = setting(
        0.0,
        "Bound to which tanh squashes the heads' inputs; 0: none, but stages and groupwise ratios then set their own",
    )
    # No option: `--ratios groupwise` has it. `joint` is then the width of `Above`; 0: without.
    groupwise: bool = field(default=False, metadata={"later": True})
    # No option either: new groupwise heads have it. See `hidden_layers`.
    local: bool = field(default=False, metadata={"later": True})

    def __post_init__(self) -> None:
        require_kinds(self)
        require_counts(self, "channels", "hidden", most=WIDEST)
        require_counts(self, "vector_layers", most=DEEPEST)
        require_counts(self, "own_heads", most=MOST_GROUPS)
        require(self, "joint", 0 <= self.joint <= WIDEST, f"must be from 0 to {WIDEST:,}")
        require_shares(self, "dropout", open=True)
        require(self, "bound", 0 <= self.bound <= LARGEST_BOUND, f"must be from 0 (none) to {LARGEST_BOUND:g}")
        require(self, "local", self.groupwise or not self.local, "must be off unless groupwise is on")
        if self.activation not in ACTIVATIONS:
            raise ConfigurationError(f"expected activation {' or '.join(ACTIVATIONS)}, found {self.activation!r}")

    @property
    def views(self) -> int:
        """The number of tensors of a group's shape that its head sees: z_i, and maybe ε_i, mean_i and log std_i."""
        return 4 if self.groupwise else 1 + self.conditional


class Input(nn.Module):
    """The transformation of one group's latents into an energy's input: standardised, then squashed to ± `bound`.

    With `bound` 0 inputs are not squashed.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, shape: tuple[int, ...], config: EnergyConfig) -> None:
        super().__init__()
        per_channel = (shape[0], *(1 for _ in shape[1:]))
        self.register_buffer("shift", torch.zeros(per_channel))
        self.register_buffer("scale", torch.ones(per_channel))
        self.bound = config.bound

    def standardized(self, z: Tensor) -> Tensor:
        """z_i (B, *shape) in units of its posterior mean and standard deviation, of the same shape."""
        x = (z - self.shift) / self.scale
        return self.bound * torch.tanh(x / self.bound) if self.bound else x


class Head(Input):
    """The head of one latent group, f_i: z_i (B, *shape) -> (B,). Its last hidden layer also feeds the joint head."""

    def __init__(self, shape: tuple[int, ...], config: EnergyConfig, body: SharedBody | None = None) -> None:
        """`body`: the hidden layers. None: layers of its own."""
        super().__init__(shape, config)
        self.body = hidden_layers(shape, config) if body is None else body
        self.last = zero_linear(self.body.width)

    def features(self, z: Tensor) -> Tensor:
        """The last hidden layer, (B, hidden); in local heads sums over places follow."""
        hidden: Tensor = self.body(self.standardized(z))
        return hidden

    def forward(self, z: Tensor) -> Tensor:
        """f_i(z_i), (B,)."""
        return self.energy(self.features(z))

    def energy(self, features: Tensor) -> Tensor:
        """f_i from the features that `features` returned, (B,)."""
        value: Tensor = self.last(features)
        return value.squeeze(1)


def hidden_layers(shape: tuple[int, ...], config: EnergyConfig) -> HiddenLayers:
    """The hidden layers of a head, (B, *shape) to (B, width).

    Maps (C, H, W): N × [conv(4, stride 2, pad 1), activation] and N × [Linear, activation], N = log2(side/4), the
    paper's rule for sides 8 to 128 (Table 12), rounded for any other side; at least one linear layer, and no
    convolution on maps smaller than 6. Vectors: `vector_layers` linear layers.

    `local` heads of maps of sides from 3: [conv(3, pad 1), activation], the same N convolutions, one linear layer, and
    the sums of `HiddenLayers`.
    """
    activation = ACTIVATIONS[config.activation]
    layers: list[nn.Module] = []
    local = False
    if len(shape) == 3:
        halvings = max(0, round(math.log2(min(shape[1:]) / 4)))
        channels, height, width = shape
        if local := config.local and min(height, width) >= 3:
            layers += [nn.Conv2d(channels, config.channels, 3, padding=1), activation()]
            channels = config.channels
        for _ in range(halvings):
            layers += [nn.Conv2d(channels, config.channels, 4, stride=2, padding=1), activation()]
            channels, height, width = config.channels, height // 2, width // 2
        features, depth = channels * height * width, 1 if local else max(1, halvings)
    else:
        features, depth = math.prod(shape), config.vector_layers
    layers.append(nn.Flatten())
    for _ in range(depth):
        layers += [nn.Linear(features, config.hidden), activation()]
        features = config.hidden
    return HiddenLayers(layers, local)


class Above(nn.Module):
    """Terms of f that see a group together with the groups above it, through the last hidden layers of their heads.

    Group i hears the sum of what the groups above it tell, each by a linear map of its layer, over √i. Groups that
    share a head share these maps. Since f_i sees no group below i, it stays a log density ratio given z_<i.
    """

    def __init__(self, parts: Sequence[Sequence[int]], config: EnergyConfig) -> None:
        super().__init__()
        self.hidden = config.hidden
        self.part = {index: number for number, part in enumerate(parts) for index in part}
        bottom = len(self.part) - 1
        self.seen = nn.ModuleList(nn.Linear(config.hidden, config.joint) for _ in parts)
        self.told = nn.ModuleList(nn.Linear(config.hidden, config.joint) for part in parts if list(part) != [bottom])
        self.last = nn.ModuleList(zero_linear(config.joint) for _ in self.part)
        self.activation = ACTIVATIONS[config.activation]()

    def heard(self, index: int, features: Tensor, context: Tensor | None) -> Tensor | None:
        """What the groups down to `index` tell, (B, width), from its `features` and the `context` of those above it."""
        if index == len(self.last) - 1:  # there is none below it
            return context
        told: Tensor = self.told[self.part[index]](features[:, : self.hidden])
        return told if context is None else context + told

    def term(self, index: int, features: Tensor, context: Tensor | None) -> Tensor:
        """The term of the group `index`, (B,), from its `features` and what those above it tell."""
        hidden: Tensor = self.seen[self.part[index]](features[:, : self.hidden])
        if context is not None:
            hidden = hidden + context * index**-0.5
        value: Tensor = self.last[index](self.activation(hidden))
        return value.squeeze(1)


class JointEnergy(nn.Module):
    """f(z) = Σ_i f_i(z_i) [+ f_joint(features of all groups)], the negative energy of the prior (Eq. 6).

    The joint head is one of the paper's "other parameterizations" (§3.1). It can express relations between groups,
    which no sum of terms of single groups can. It sees the features of each group, where n groups share a head their
    sum over √n.
    """

    per_group = True  # whether `terms` has a summand for each group that depends on this group alone

    def __init__(self, groups: Sequence[LatentGroup], config: EnergyConfig) -> None:
        super().__init__()
        self.config = config
        self.names = [group.name for group in groups]
        unfit = [name for name in self.names if "." in name or hasattr(nn.ModuleDict(), name)]
        if unfit:  # the names become keys of the state dict in the prior file
            raise ConfigurationError(f"latent groups cannot be named {unfit}: no dots, no names of torch's methods")
        shapes = shapes_seen(groups, config)
        shared = shared_shapes(shapes, config)
        self.shared = nn.ModuleDict({_named(shape): hidden_layers(shape, config) for shape in shared})
        self.heads = nn.ModuleDict()
        parts: dict[object, list[int]] = {}
        for index, (name, shape) in enumerate(zip(self.names, shapes, strict=True)):
            layers = cast(HiddenLayers, self.shared[_named(shape)]) if shape in shared else None
            self.heads[name] = Head(shape, config, None if layers is None else SharedBody(layers))
            parts.setdefault(shape if shape in shared else index, []).append(index)
        self.parts = list(parts.values())  # the groups that have one head, and so one place in the joint head
        self.joint = (
            nn.Sequential(
                nn.Dropout(config.dropout),
                nn.Linear(config.hidden * len(self.parts), config.joint),
                ACTIVATIONS[config.activation](),
                nn.Dropout(config.dropout),
                zero_linear(config.joint),
            )
            if config.joint and not config.groupwise
            else None
        )
        self.above = Above(self.parts, config) if config.joint and config.groupwise else None

    @property
    def is_sum(self) -> bool:
        """Whether f is a sum of one term per group, which depends on this group and those above it."""
        return self.per_group and self.joint is None

    def inputs(
        self, z: Sequence[Tensor], eps: Sequence[Tensor], priors: Sequence[Gaussian] | None = None
    ) -> list[Tensor]:
        """The heads' inputs for z and ε = T_β⁻¹(z), lists of (B, *group.shape): see `seen`.

        priors: the p_β(z_i | z_<i) of all groups, which only groupwise heads need.
        """
        known = priors if self.config.groupwise and priors is not None else [None] * len(z)
        return [seen(self.config, index, *group) for index, group in enumerate(zip(z, eps, known, strict=True))]

    def head(self, index: int) -> Head:
        """The head of the group `index`."""
        return cast(Head, self.heads[self.names[index]])

    @torch.no_grad()
    def correct(self, index: int, factor: float, nats: float) -> None:
        """Replace f_i of the group `index` by `factor` · f_i + `nats`."""
        for parameter in (parameter for last in self._last(index) for parameter in last.parameters()):
            parameter.mul_(factor)
        self.head(index).last.bias.add_(nats)

    def is_constant(self, index: int) -> bool:
        """Whether f_i of the group `index` is the same everywhere, as before training and after a `correct` by 0."""
        return not any(bool(last.weight.any()) for last in self._last(index))

    def terms(self, inputs: Sequence[Tensor], rows: Tensor | None = None) -> Tensor:
        """The summands of f in nats, (B, L) or, with a joint head as last column, (B, L + 1).

        rows: for each latent the row (B,) whose groups count as those above, for groupwise heads; None: its own.
        """
        heads = [head for head in self._heads() if isinstance(head, Head)]
        features = [head.features(seen) for head, seen in zip(heads, inputs, strict=True)]
        columns = [head.energy(h) for head, h in zip(heads, features, strict=True)]
        if self.above is not None:
            context = None
            for index, h in enumerate(features):
                columns[index] = columns[index] + self.above.term(index, h, context)
                context = self.above.heard(index, h if rows is None else h[rows], context)
        if self.joint is not None:
            pooled = [torch.stack([features[i] for i in part]).sum(0) * len(part) ** -0.5 for part in self.parts]
            columns.append(self.joint(torch.cat(pooled, dim=1)).squeeze(1))
        return torch.stack(columns, dim=1)

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """f(z) in nats, (B,), from the heads' inputs that `inputs` returned, a list in generation order."""
        return self.terms(inputs).sum(1)

    @torch.no_grad()
    def moments(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Sums of 1, x and x² over each head's input x, (3, C) in float64, per dimension (vectors) or channel (maps).

        The sums of several batches add up.
        """
        found = []
        for seen in inputs:
            x, axes = seen.double(), [axis for axis in range(seen.dim()) if axis != 1]
            found.append(torch.stack([torch.ones_like(x).sum(axes), x.sum(axes), x.square().sum(axes)]))
        return found

    @torch.no_grad()
    def standardize(self, moments: Sequence[Tensor]) -> None:
        """Fit the heads' input scaling to the `moments` of posterior latents."""
        for head, (count, total, squares) in zip(self._heads(), moments, strict=True):
            mean = total / count
            std = (squares / count - mean.square()).clamp(min=1e-12).sqrt()
            head.shift.copy_(mean.reshape(head.shift.shape))
            head.scale.copy_(std.reshape(head.scale.shape))

    def squash(self, bound: float) -> None:
        """Replace the heads' standardised inputs x by bound · tanh(x / bound). With 0 they stay as they are."""
        self.config = replace(self.config, bound=bound)
        for head in self._heads():
            head.bound = bound

    @torch.no_grad()
    def spread(self, inputs: Sequence[Tensor]) -> float:
        """The largest RMS of any channel or dimension of the heads' standardised inputs: 1 for posterior latents."""
        found = []
        for head, (count, total, squares) in zip(self._heads(), self.moments(inputs), strict=True):
            shift, scale = head.shift.flatten().to(total), head.scale.flatten().to(total)
            mean = total / count
            found.append(((squares / count - 2 * shift * mean + shift.square()).clamp(min=0).sqrt() / scale).max())
        return float(torch.stack(found).max())

    @torch.no_grad()
    def add(self, nats: float) -> None:
        """Add a constant to f through the bias of the top head, which changes only the normaliser."""
        next(head.last.bias for head in self._heads() if isinstance(head, Head)).add_(nats)

    @torch.no_grad()
    def scale(self, factor: float) -> None:
        """Multiply f by a factor, through the last layers, in which f is linear."""
        last: list[nn.Module] = [head.last for head in self._heads() if isinstance(head, Head)]
        last += [] if self.joint is None else [self.joint[-1]]
        last += [] if self.above is None else self.above.last
        for parameter in (parameter for layer in last for parameter in layer.parameters()):
            parameter.mul_(factor)

    def _last(self, index: int) -> list[nn.Linear]:
        """The last layers of f_i, a sum over them, in which it is linear."""
        above = [] if self.above is None else [cast(nn.Linear, self.above.last[index])]
        return [self.head(index).last, *above]

    def _heads(self) -> list[Input]:
        return [head for head in self.heads.values() if isinstance(head, Input)]


def seen(config: EnergyConfig, index: int, z: Tensor, eps: Tensor, prior: Gaussian | None) -> Tensor:
    """The input of the head of group `index`: z_i, and by the `config` ε_i, mean_i and log std_i along axis 1.

    The top group's head sees z alone: its prior is constant, so ε would only repeat z.
    """
    views = [z]
    if index and (config.conditional or config.groupwise):
        views.append(eps)
    if index and config.groupwise:
        assert prior is not None
        views += [prior.mean.expand_as(z), prior.std.log().expand_as(z)]
    return z if len(views) == 1 else torch.cat(views, dim=1)


def shapes_seen(groups: Sequence[LatentGroup], config: EnergyConfig) -> list[tuple[int, ...]]:
    """The shapes of `JointEnergy.inputs`, without the batch axis."""
    top, *lower = (tuple(group.shape) for group in groups)
    return [top, *((config.views * channels, *sides) for channels, *sides in lower)]


def shared_shapes(shapes: Sequence[tuple[int, ...]], config: EnergyConfig) -> dict[tuple[int, ...], int]:
    """Those of the `shapes_seen` of which there are more than `own_heads`, so that they share a head; how many each."""
    return {shape: count for shape, count in Counter(shapes).items() if count > config.own_heads}


def _named(shape: tuple[int, ...]) -> str:
    """A shape as a name of a module: 16x32x32."""
    return "x".join(map(str, shape))


def zero_linear(features: int) -> nn.Linear:
    """A linear layer to one number that starts at exactly zero."""
    layer = nn.Linear(features, 1)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


@torch.no_grad()
def values(f: Callable[[Sequence[Tensor]], Tensor], z: Sequence[Tensor], device: torch.device | None = None) -> Tensor:
    """f at N latents, or N inputs of a head, in chunks of 1,000 that are moved to `device` in turn: (N,) on the CPU."""
    chunks = ([group[i : i + 1000].to(device) for group in z] for i in range(0, len(z[0]), 1000))
    return torch.cat([f(chunk).cpu() for chunk in chunks])
