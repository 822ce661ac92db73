"""HVAE: the bottom-up hierarchical VAE of Havtorn et al. (2021, "Hierarchical VAEs know what they don't know").

Stages are numbered from the image: stage 0 holds z1, the last one the top latent zL. The encoder is a chain,
x → h_1 → z1 → h_2 → z2 → …, the generator runs down from zL; block t of a lower stage is also given the output of
block t − n, where n is the number of the top stage's blocks and t counts all generator blocks from the top.
`Network` has the official module and parameter names; `HVAE` puts it behind the backbone contract.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ebm_prior.backbone import Backbone, Draw, Gaussian, ImageDistribution, LatentGroup, PosteriorDraw
from ebm_prior.errors import CheckpointError, ConfigurationError
from ebm_prior.randomness import Generator

from .layers import Activation, DataInitialized, Dense, ResidualBlock, SameConv2d, Shape
from .likelihoods import Bernoulli, LogisticMixture, binarize, dequantize
from .safe_loading import check_state, load_plain, load_tensors


def _identity(x: Tensor) -> Tensor:
    return x


ACTIVATIONS: dict[str, Activation] = {
    "Identity": _identity,
    "ReLU": F.relu,
    "LeakyReLU": F.leaky_relu,
    "SELU": F.selu,
    "ELU": F.elu,
    "Tanh": torch.tanh,
    "Swish": F.silu,
}
LIKELIHOODS = ("bernoulli", "logistic_mixture")
MIXTURE_CHANNELS = 100  # ten components of ten parameters

Skips = deque[Tensor]
"""The outputs of the last n generator blocks, oldest first; full once the top stage, of n blocks, has run."""


@dataclass(frozen=True)
class Block:
    """A residual block: output channels, kernel size, stride; gated: outputs times a sigmoid of as many further ones."""

    filters: int
    kernel: int
    stride: int = 1
    gated: bool = False
    weight_norm: bool = True

    def __post_init__(self) -> None:
        _require_counts(self, "filters", "kernel", "stride")


@dataclass(frozen=True)
class Latent:
    """A latent group: `features` channels of a map through a convolution of size `kernel`, or a vector if that is None."""

    features: int
    kernel: int | None = None
    weight_norm: bool = True
    learned_prior: bool = False  # at the top: mean and spread of p(zL) are parameters

    def __post_init__(self) -> None:
        _require_counts(self, "features", *(["kernel"] if self.kernel is not None else []))


@dataclass(frozen=True)
class StageSpec:
    """One stage: its inference blocks in order (the generator runs them reversed and transposed), and its latent."""

    blocks: tuple[Block, ...]
    latent: Latent


def _require_counts(record: Any, *names: str) -> None:
    for name in names:
        value = getattr(record, name)
        if type(value) is not int or value < 1:
            raise ConfigurationError(f"{type(record).__name__}.{name}: expected a positive integer, found {value!r}")


Record = TypeVar("Record", Block, Latent)


def _record(kind: type[Record], options: Mapping[str, Any]) -> Record:
    known = [field.name for field in fields(kind)]
    unknown = [key for key in options if key not in known]
    if unknown:
        raise ConfigurationError(f"{kind.__name__}: expected options among {known}, found {unknown}")
    try:
        return kind(**options)
    except TypeError as error:
        raise ConfigurationError(f"{kind.__name__}: {error}; found {dict(options)}") from error


def _stage_spec(options: Mapping[str, Any]) -> StageSpec:
    if set(options) != {"blocks", "latent"} or not options["blocks"]:
        raise ConfigurationError(f"expected a stage with blocks (at least one) and a latent, found {dict(options)}")
    return StageSpec(tuple(_record(Block, b) for b in options["blocks"]), _record(Latent, options["latent"]))


class StdInverseConstants(nn.Module):
    """Two constants that the official files carry in every stage and that nothing reads."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("beta", torch.full((1,), math.log(2)))
        self.register_buffer("threshold", torch.full((1,), 20.0))


class GaussianHead(nn.Module):
    """q(z | h) and p(z | d), from activated features; at the top p(z) is a constant: N(0, I) unless it is learned."""

    def __init__(self, latent: Latent, in_shape: Shape, activation: Activation, *, top: bool) -> None:
        super().__init__()
        self.shape = (latent.features,) if latent.kernel is None else (latent.features, *in_shape[1:])
        self.activation = activation
        self.std_activation_inverse = StdInverseConstants()
        self.in_transform_q = self._transform(latent, in_shape)
        if not top:
            self.in_transform_p = self._transform(latent, in_shape)
            return
        logits = torch.zeros(2 * latent.features, *self.shape[1:])
        if latent.learned_prior:
            self.prior_logits: Tensor = nn.Parameter(logits)
        else:
            self.register_buffer("prior_logits", logits)

    @staticmethod
    def _transform(latent: Latent, in_shape: Shape) -> nn.Module:
        if latent.kernel is None:
            return Dense(math.prod(in_shape), 2 * latent.features, weight_norm=latent.weight_norm)
        return SameConv2d(in_shape[0], 2 * latent.features, latent.kernel, weight_norm=latent.weight_norm)

    def posterior(self, h: Tensor) -> Gaussian:
        """q(z | h) for features (B, *in_shape)."""
        return self._gaussian(self.in_transform_q(self.activation(h)))

    def prior(self, d: Tensor | None) -> Gaussian:
        """p(z | d) for features (B, *in_shape); None at the top, where the batch axis is 1."""
        return self._gaussian(self.prior_logits[None] if d is None else self.in_transform_p(self.activation(d)))

    @staticmethod
    def _gaussian(logits: Tensor) -> Gaussian:
        mean, spread = logits.chunk(2, dim=1)
        return Gaussian(mean, F.softplus(spread, beta=math.log(2)).clamp(min=1e-6))  # log2(1 + 2^s): 1 at 0


class Projection(nn.Module):
    """Dense layer from a latent vector to a feature map."""

    def __init__(self, features: int, out_shape: Shape) -> None:
        super().__init__()
        self.out_shape = out_shape
        self.transform = Dense(features, math.prod(out_shape))

    def forward(self, z: Tensor) -> Tensor:
        """(B, features) to (B, *out_shape)."""
        y: Tensor = self.transform(z)
        return y.view(-1, *self.out_shape)


class InferencePath(nn.Module):
    """The blocks of a stage on the way up; each is offered the same auxiliary input, the features of the stage below."""

    def __init__(self, blocks: Iterable[ResidualBlock]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(blocks)

    def forward(self, x: Tensor, aux: Tensor | None) -> Tensor:
        """The stage's features h."""
        for block in self.layers:
            x = block(x, aux)
        return x


class GenerativePath(nn.Module):
    """The blocks of a stage on the way down; each appends its output to the skips, and a lower stage's takes the oldest."""

    def __init__(self, blocks: Iterable[ResidualBlock]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(blocks)

    def forward(self, d: Tensor, skips: Skips) -> Tensor:
        """The features that the stage below, or the likelihood, starts from. Advances `skips`."""
        for block in self.layers:
            d = block(d, skips[0] if len(skips) == skips.maxlen else None)
            skips.append(d)
        return d


class Stage(nn.Module):
    """One latent group with its two paths. `in_shape`: what it infers from; `below`: h of the stage below, None at 0."""

    def __init__(
        self, spec: StageSpec, in_shape: Shape, below: Shape | None, network: dict[str, Any], *, top: bool
    ) -> None:
        super().__init__()
        activation, skips = network["activation"], network["skips"]

        def path(order: Sequence[Block], shape: Shape, aux: Shape | None, **options: Any) -> list[ResidualBlock]:
            blocks: list[ResidualBlock] = []
            for b in order:
                blocks.append(
                    ResidualBlock(
                        blocks[-1].out_shape if blocks else shape,
                        b.filters,
                        b.kernel,
                        b.stride,
                        activation=activation,
                        gated=b.gated,
                        weight_norm=b.weight_norm,
                        residual=bool(blocks) or options["first_residual"],
                        transposed=options["transposed"],
                        dropout=options["dropout"],
                        aux_shape=aux if skips else None,
                    )
                )
            return blocks

        up = path(
            spec.blocks,
            in_shape,
            below,
            first_residual=below is not None,
            transposed=False,
            dropout=network["q_dropout"],
        )
        h_shape = self.h_shape = up[-1].out_shape
        self.q_deterministic = InferencePath(up)
        self.stochastic = GaussianHead(spec.latent, h_shape, activation, top=top)
        self.q_projection: nn.Module = nn.Identity()
        self.p_projection: nn.Module = nn.Identity()
        d_shape: Shape = (spec.latent.features, *h_shape[1:])
        if spec.latent.kernel is None:
            d_shape = h_shape
            self.q_projection = Projection(spec.latent.features, h_shape)
            self.p_projection = Projection(spec.latent.features, h_shape)
            if top:  # nothing reads its output, so no data ever reaches it
                self.q_projection.transform.initialized.fill_(True)
        self.above_shape: Shape = (spec.latent.features, *h_shape[1:]) if spec.latent.kernel else h_shape
        down = path(
            spec.blocks[::-1],
            d_shape,
            None if top else h_shape,
            first_residual=False,
            transposed=True,
            dropout=network["p_dropout"],
        )
        self.p_deterministic = GenerativePath(down)


class LikelihoodHead(nn.Module):
    """The last convolution: features (B, C, H, W) to the parameters of p(x | z)."""

    def __init__(self, kind: str, in_channels: int, colours: int, activation: Activation, weight_norm: bool) -> None:
        super().__init__()
        self.kind, self.activation = kind, activation
        if kind == "bernoulli":
            self.parameter_net = SameConv2d(in_channels, colours, 3, weight_norm=weight_norm)
        else:
            self.parameter_net = SameConv2d(in_channels, MIXTURE_CHANNELS, 1, weight_norm=weight_norm)

    def forward(self, features: Tensor) -> Bernoulli | LogisticMixture:
        """p(x | z)."""
        if self.kind == "bernoulli":
            return Bernoulli(self.parameter_net(self.activation(features)))
        return LogisticMixture(self.parameter_net(features))  # without the activation, as published


class Network(nn.Module):
    """The stages, bottom first, and the likelihood: the official module tree."""

    def __init__(self, image_shape: Shape, likelihood: str, stages: Sequence[StageSpec], options: dict[str, Any]) -> None:
        super().__init__()
        built: list[Stage] = []
        for i, spec in enumerate(stages):
            in_shape = built[-1].above_shape if built else image_shape
            below = built[-1].h_shape if built else None
            built.append(Stage(spec, in_shape, below, options, top=i == len(stages) - 1))
        self.stages = nn.ModuleList(built)
        self.likelihood = LikelihoodHead(
            likelihood,
            stages[0].blocks[0].filters,
            image_shape[0],
            options["activation"],
            stages[-1].blocks[-1].weight_norm,
        )
        self._check_shapes(built)

    @staticmethod
    def _check_shapes(stages: Sequence[Stage]) -> None:
        """What arrives from above must have the shape that a stage was built for."""
        skips: deque[Shape] = deque(maxlen=len(stages[-1].p_deterministic.layers))
        arriving = stages[-1].h_shape
        for stage in reversed(stages):
            if arriving != stage.h_shape:
                raise ConfigurationError(
                    f"a stage's features have shape {stage.h_shape}, but the stage above generates {arriving}: its first "
                    "block must have as many filters as the last block of the stage below"
                )
            for block in stage.p_deterministic.layers:
                assert isinstance(block, ResidualBlock)
                if block.aux_op is not None and skips[0] != block.aux_shape:
                    raise ConfigurationError(
                        f"a generator block expects a skip of shape {block.aux_shape}, but the block before it in the "
                        f"queue gives {skips[0]}: use equal numbers of blocks per stage, or strides in the last ones"
                    )
                arriving = block.out_shape
                skips.append(arriving)


class HVAE(Backbone):
    """The HVAE of hvae-oodd as a backbone; `load_official` reads its run folders.

    image_shape: (C, H, W), square. likelihood: "bernoulli", or "logistic_mixture" (RGB).
    stages: from the image up, each {"blocks": [Block options, …], "latent": Latent options}; see `Block`, `Latent`.
    activation: a name of `ACTIVATIONS`. q_dropout, p_dropout: in inference and generator blocks, in train mode only.
    skips: whether blocks are offered auxiliary inputs. Raises ConfigurationError for what cannot be built.
    """

    official_format: ClassVar[str] = (
        "the official format of HVAE is a folder with model_kwargs.pt, model_class_name.pt and model_state_dict.pt"
    )

    def __init__(
        self,
        image_shape: Sequence[int],
        likelihood: str,
        stages: Sequence[Mapping[str, Any]],
        activation: str = "ReLU",
        q_dropout: float = 0.0,
        p_dropout: float = 0.0,
        skips: bool = True,
    ) -> None:
        super().__init__()
        if len(image_shape) != 3 or image_shape[1] != image_shape[2]:
            raise ConfigurationError(f"image_shape: expected (C, H, W) of a square image, found {image_shape}")
        if likelihood not in LIKELIHOODS:
            raise ConfigurationError(f"likelihood: expected one of {LIKELIHOODS}, found {likelihood!r}")
        if likelihood == "logistic_mixture" and image_shape[0] != 3:
            raise ConfigurationError(f"the logistic mixture models 3 colours, found images of shape {image_shape}")
        if activation not in ACTIVATIONS:
            raise ConfigurationError(f"activation: expected one of {sorted(ACTIVATIONS)}, found {activation!r}")
        if not stages:
            raise ConfigurationError("stages: expected at least one, found none")
        if not (0 <= q_dropout < 1 and 0 <= p_dropout < 1):
            raise ConfigurationError(f"expected dropout rates in [0, 1), found q {q_dropout} and p {p_dropout}")
        channels, height, width = image_shape
        specs = [_stage_spec(stage) for stage in stages]
        self.image_shape = (channels, height, width)
        self.architecture = {
            "image_shape": list(self.image_shape),
            "likelihood": likelihood,
            "stages": [{"blocks": [asdict(b) for b in s.blocks], "latent": asdict(s.latent)} for s in specs],
            "activation": activation,
            "q_dropout": q_dropout,
            "p_dropout": p_dropout,
            "skips": skips,
        }
        options = {
            "activation": ACTIVATIONS[activation],
            "q_dropout": q_dropout,
            "p_dropout": p_dropout,
            "skips": skips,
        }
        self.network = Network(self.image_shape, likelihood, specs, options)
        self.groups = tuple(
            LatentGroup(f"z{i + 1}", tuple(self.network.stages[i].stochastic.shape)) for i in reversed(range(len(specs)))
        )

    def top_down(self, draw: Draw, batch_size: int) -> Tensor:
        """The generator: features (B, C, H, W). The top prior has batch axis 1; the context of every draw is None."""
        stages = self.network.stages
        skips: Skips = deque(maxlen=len(stages[-1].p_deterministic.layers))
        d: Tensor | None = None
        for index, stage in enumerate(reversed(stages)):
            z = draw(index, stage.stochastic.prior(d), None)
            d = stage.p_deterministic(stage.p_projection(z), skips)
        assert d is not None
        return d

    def encode(self, images: Tensor, noise: Sequence[Tensor]) -> PosteriorDraw:
        """q(z1 | x) q(z2 | z1) …: samples bottom-up, at once. Zero noise gives a group's posterior mean."""
        z: list[Tensor] = []
        log_q: list[Tensor] = []
        x, h = images, None
        for stage, xi in zip(self.network.stages, reversed(noise), strict=True):
            if z:
                x = self.network.stages[len(z) - 1].q_projection(z[-1])
            h = stage.q_deterministic(x, h)
            q = stage.stochastic.posterior(h)
            z.append(q.mean + q.std * xi)
            log_q.append(q.log_prob(z[-1]))
        z.reverse()
        log_q.reverse()
        return PosteriorDraw(lambda index, prior, context: (z[index], log_q[index]))

    def likelihood(self, features: Tensor) -> ImageDistribution:
        """p(x | z) from the features (B, C, H, W)."""
        distribution: ImageDistribution = self.network.likelihood(features)
        return distribution

    def observe(self, images: Tensor, *, generator: Generator = None) -> Tensor:
        """Dynamic binarisation for the Bernoulli likelihood, dequantisation for the mixture."""
        random = binarize if self.architecture["likelihood"] == "bernoulli" else dequantize
        return random(images, generator=generator)

    @classmethod
    def load_official(cls, path: Path) -> HVAE:
        """Build the network from a run folder of hvae-oodd, in eval mode. Raises CheckpointError; runs none of its code.

        Reads model_class_name.pt, model_kwargs.pt and model_state_dict.pt, and no other file.
        """
        path = Path(path)
        if not path.is_dir():
            raise CheckpointError(f"{path} is not a folder, and {cls.official_format}")
        name = load_plain(path / "model_class_name.pt", "the name of the model class")
        if name != "VAE":
            raise CheckpointError(f"expected the model class VAE in {path}, found {name!r}, which is not supported")
        kwargs = load_plain(path / "model_kwargs.pt", "the architecture")
        state = load_tensors(path / "model_state_dict.pt", "the weights")
        try:
            architecture = _official_architecture(kwargs)
            with torch.device("meta"):  # a corrupt architecture allocates nothing before the weights confirm it
                model = cls(**architecture)
        except ConfigurationError as error:
            raise CheckpointError(f"{path / 'model_kwargs.pt'}: {error}") from error
        check_state(state, model.network.state_dict(), path / "model_state_dict.pt")
        model.to_empty(device="cpu")
        model.network.load_state_dict(state)
        raw = [
            key
            for key, layer in model.network.named_modules()
            if isinstance(layer, DataInitialized) and layer.weight_norm and not bool(layer.initialized)
        ]
        if raw:
            raise CheckpointError(
                f"{path} holds layers that were never initialised from data ({', '.join(raw)}): expected the weights of "
                "a model that has been trained; save them again after the first training step"
            )
        return model.eval()


_OFFICIAL_LIKELIHOODS = {
    "BernoulliLikelihoodConv2d": "bernoulli",
    "DiscretizedLogisticMixLikelihoodConv2d": "logistic_mixture",
}
_NOT_SUPPORTED = "which this adapter does not support"


def _official_architecture(record: Any) -> dict[str, Any]:
    """Our architecture from the official keyword arguments. Raises ConfigurationError for what is not supported."""
    kwargs = record.get("kwargs") if isinstance(record, dict) else None
    if not isinstance(kwargs, dict):
        raise ConfigurationError(f"expected a dict with the entry 'kwargs', found {record!r}")
    kwargs = dict(kwargs)
    image_shape = _take(kwargs, "input_shape", list)
    likelihood = _take(kwargs, "likelihood_module", str)
    if likelihood not in _OFFICIAL_LIKELIHOODS:
        raise ConfigurationError(f"expected a likelihood among {list(_OFFICIAL_LIKELIHOODS)}, found {likelihood}")
    blocks = _take(kwargs, "config_deterministic", list)
    latents = _take(kwargs, "config_stochastic", list)
    if len(blocks) != len(latents):
        raise ConfigurationError(f"expected as many stages as latents, found {len(blocks)} and {len(latents)}")
    if kwargs.pop("padded_shape", None) is not None:
        raise ConfigurationError(f"found padded_shape, {_NOT_SUPPORTED}")
    if kwargs.pop("features_out", None) not in (None, image_shape[0]):
        raise ConfigurationError(f"found features_out other than the number of colours, {_NOT_SUPPORTED}")
    architecture = {
        "image_shape": image_shape,
        "likelihood": _OFFICIAL_LIKELIHOODS[likelihood],
        "stages": [
            {"blocks": [_official_block(b) for b in stage], "latent": _official_latent(latent)}
            for stage, latent in zip(blocks, latents, strict=True)
        ],
        "activation": _take(kwargs, "activation", str, "Swish"),
        "q_dropout": _take(kwargs, "q_dropout", (int, float), 0.0),
        "p_dropout": _take(kwargs, "p_dropout", (int, float), 0.0),
        "skips": _take(kwargs, "skip_stochastic", bool, True),
    }
    _nothing_left(kwargs, "model")
    return architecture


def _official_block(config: Any) -> dict[str, Any]:
    config = _named(config, ("ResBlockConv2d",))
    for mode in ("downsampling_mode", "upsampling_mode"):
        if config.pop(mode, "convolutional") != "convolutional":
            raise ConfigurationError(f"found a {mode} other than convolutional, {_NOT_SUPPORTED}")
    block = {
        "filters": _take(config, "out_channels", int),
        "kernel": _take(config, "kernel_size", int),
        "stride": _take(config, "stride", int, 1),
        "gated": _take(config, "gated", bool, True),
        "weight_norm": _take(config, "weightnorm", bool, True),
    }
    _nothing_left(config, "block")
    return block


def _official_latent(config: Any) -> dict[str, Any]:
    dense = isinstance(config, dict) and config.get("block") == "GaussianDense"
    config = _named(config, ("GaussianConv2d", "GaussianDense"))
    latent = {
        "features": _take(config, "latent_features", int),
        "kernel": None if dense else _take(config, "kernel_size", int, 3),
        "weight_norm": _take(config, "weightnorm", bool, True),
        "learned_prior": _take(config, "learn_prior", bool, False),
    }
    _nothing_left(config, "latent")
    return latent


def _named(config: Any, names: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(config, dict) or config.get("block") not in names:
        raise ConfigurationError(f"expected a block among {names}, found {config!r}")
    return {key: value for key, value in config.items() if key != "block"}


_REQUIRED = object()


def _take(config: dict[str, Any], key: str, kind: type | tuple[type, ...], default: Any = _REQUIRED) -> Any:
    value = config.pop(key, default)
    if value is _REQUIRED:
        raise ConfigurationError(f"expected the option {key}, found only {sorted(config)}")
    if not isinstance(value, kind):
        raise ConfigurationError(f"{key}: expected {kind}, found {value!r}")
    return value


def _nothing_left(config: dict[str, Any], where: str) -> None:
    if config:
        raise ConfigurationError(f"found the {where} options {config}, {_NOT_SUPPORTED}")
