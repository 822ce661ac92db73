"""The feature network of FD(classifier): a small CNN with 64 penultimate features, for use instead of Inception's.

There are two kinds, a plain one for simple images and one with residual blocks for natural ones.

A Fréchet distance on these features is printed as FD(name), never as FID; the name carries a hash of the weights, so
that two distances with the same name are comparable (at equal sample sizes).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ebm_prior.compute.randomness import Purpose, derived_generator, derived_seed
from ebm_prior.data.images import plain_name
from ebm_prior.errors import ConfigurationError, DataError, few
from ebm_prior.interfaces import SILENT, Progress
from ebm_prior.settings import (
    require_kinds,
    require_not_negative,
    require_positive,
    require_seed,
    require_shares,
    setting,
)
from ebm_prior.storage.records import checked, fields, listed, one_of, text, whole
from ebm_prior.storage.weights import build_strictly, fingerprint, read_tensors, require_finite, write_tensors
from ebm_prior.training.steps import batch_indices

FEATURES = 64
CLASSIFIER_KEY = "ebm_prior_classifier"
_SMALLEST_SIDE = 8
Shape = tuple[int, int, int]
NetworkKind = Literal["plain", "residual"]
CLASSIFIER_RECORD = fields(
    {
        "architecture": fields(
            {"shape": listed(whole(1, 2**16), 3, 3), "classes": whole(2, 2**20), "width": whole(1, 2**16)},
            {"network": one_of(*get_args(NetworkKind))},
        ),
        "record": fields({}, {"data": text()}),
    },
    {"format": whole(1, 1)},
)


class LabelledImages(Protocol):
    """An image source with labels, as training the classifier needs it."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""

    @property
    def labels(self) -> Tensor | None:
        """(N,) int64 in 0 … classes − 1."""

    def __len__(self) -> int:
        """N, the number of images."""

    def batch(self, indices: Tensor) -> Tensor:
        """The images at `indices` (B,), float (B, C, H, W) in [0, 1]."""


@dataclass(frozen=True)
class ClassifierConfig:
    """The recipe: AdamW on the cross-entropy with a one-cycle learning rate; images are shifted, and mirrored if told.

    The defaults are for simple grey images; `suited` gives the recipe for images of a shape.
    """

    data: str = setting("images", "Name of the data set, which becomes part of the classifier's name")
    network: NetworkKind = setting("plain", "Architecture of the classifier: plain convolutions, or residual blocks")
    epochs: int = setting(12, "Number of passes over the training images")
    batch_size: int = setting(128, "Images per gradient step")
    learning_rate: float = setting(1e-2, "Peak learning rate")
    weight_decay: float = setting(1e-2, "Decoupled weight decay of AdamW")
    dropout: float = setting(0.2, "Dropout rate before the feature layer")
    shift: int = setting(2, "Largest random shift of a training image, in pixels")
    flip: bool = setting(False, "Mirror a random half of the training images")
    width: int = setting(16, "Channels of the network's first stage")
    seed: int = setting(0, "Seed of all random numbers")

    def __post_init__(self) -> None:
        require_kinds(self)
        require_positive(self, "epochs", "batch_size", "learning_rate", "width")
        require_seed(self)
        require_shares(self, "dropout", open=True)
        require_not_negative(self, "weight_decay", "shift")

    @classmethod
    def suited(cls, shape: Shape, data: str = "images") -> ClassifierConfig:
        """The recipe for images (C, H, W): colour ones are taken for natural ones, which need more of everything."""
        if shape[0] != 3:
            return cls(data=data)
        return cls(data=data, network="residual", epochs=16, shift=4, flip=True, width=32)


class ResidualBlock(nn.Module):
    """GELU(x + two 3×3 convolutions of x): (B, C, H, W), of the same shape."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.GELU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        """The residual sum, activated."""
        return F.gelu(x + self.body(x))


class FeatureClassifier(nn.Module):
    """Convolution stages, halved by pooling down to a side of 4-7, then 64 features, then logits.

    `network`: "plain" has one more stage on the smallest side, whose 3×3 places the features see; "residual" has a
    residual block after every pooling but the first, and 2×2 places. `shape` is (C, H, W) with H, W ≥ 8. `record` says
    where the weights come from (data set, test accuracy, recipe, seed); it is saved with them. Features are float32
    whatever the dtype of the images.
    """

    def __init__(
        self,
        shape: Shape,
        classes: int,
        *,
        network: NetworkKind = "plain",
        width: int = 16,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        channels, height, breadth = shape
        if channels < 1 or min(height, breadth) < _SMALLEST_SIDE or classes < 2:
            raise ConfigurationError(
                f"the classifier needs images of at least {_SMALLEST_SIDE} x {_SMALLEST_SIDE} pixels and two classes, "
                f"found shape {tuple(shape)} and {classes} classes"
            )
        self.shape, self.classes = (channels, height, breadth), classes
        self.architecture: dict[str, Any] = {"shape": list(shape), "classes": classes, "width": width}
        if network != "plain":
            self.architecture["network"] = network
        self.record: dict[str, Any] = {}
        halvings = (min(height, breadth) // 4).bit_length() - 1
        places = 3 if network == "plain" else 2
        stages: list[nn.Module] = []
        for stage in range(halvings + 1 if network == "plain" else halvings):
            wide = min(width * 2**stage, 4 * width)
            stages += [nn.Conv2d(channels, wide, 3, padding=1, bias=False), nn.BatchNorm2d(wide), nn.GELU()]
            stages += [nn.MaxPool2d(2)] if stage < halvings else []
            stages += [ResidualBlock(wide)] if stage > 0 and network == "residual" else []
            channels = wide
        stages += [nn.AdaptiveAvgPool2d(places), nn.Flatten(), nn.Dropout(dropout)]
        self.body = nn.Sequential(*stages, nn.Linear(places**2 * channels, FEATURES), nn.GELU())
        self.head = nn.Linear(FEATURES, classes)

    def features(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) in [0, 1] -> penultimate features (B, 64), float32. Raises DataError on another shape."""
        if images.dim() != 4 or tuple(images.shape[1:]) != self.shape:
            raise DataError(f"the classifier was made for images (B, {self.shape}), found {tuple(images.shape)}")
        features: Tensor = self.body(2 * images.float() - 1)
        return features

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) in [0, 1] -> logits (B, classes)."""
        logits: Tensor = self.head(self.features(images))
        return logits

    @property
    def name(self) -> str:
        """The data set, the kind of network, and the first 8 hex digits of the weights' fingerprint."""
        return f"{self.record.get('data', 'untrained')}-CNN-{fingerprint(self)[:8]}"

    @property
    def distance_name(self) -> str:
        """The name under which a Fréchet distance on these features is printed."""
        return f"FD({self.name})"


def train_classifier(
    source: LabelledImages,
    test_source: LabelledImages,
    config: ClassifierConfig | None = None,
    *,
    progress: Progress = SILENT,
) -> tuple[FeatureClassifier, float]:
    """Train on `source`; return the classifier in eval mode and its accuracy on `test_source`, a share in [0, 1].

    The result depends on the seed only, and the global random state is left as it was. Raises DataError where labels
    are missing or do not fit.
    """
    config = config or ClassifierConfig.suited(source.shape)
    labels = _labels(source)
    classes = int(labels.max()) + 1
    if int(labels.min()) < 0 or int(_labels(test_source).max()) >= classes:
        raise DataError(f"expected labels 0 … {classes - 1} in both splits, found others; renumber the classes")
    iterations = -(-config.epochs * len(source) // config.batch_size)
    with torch.random.fork_rng():  # initial weights and dropout
        torch.manual_seed(derived_seed(config.seed, Purpose.CLASSIFIER_WEIGHTS))
        model = FeatureClassifier(
            source.shape, classes, network=config.network, width=config.width, dropout=config.dropout
        ).train()
        if config.network == "residual":  # the layout is faster on a CPU; the plain one's results are kept as they are
            model.to(memory_format=torch.channels_last)
        optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.learning_rate, total_steps=iterations + 1)
        for iteration in range(iterations):
            indices = batch_indices(len(source), config.batch_size, iteration, config.seed)
            images = _shifted(
                source.batch(indices), config.shift, derived_generator(config.seed, Purpose.CLASSIFIER_SHIFT, iteration)
            )
            if config.flip:
                coin = torch.rand(
                    len(images), 1, 1, 1, generator=derived_generator(config.seed, Purpose.CLASSIFIER_MIRROR, iteration)
                )
                images = torch.where(coin < 0.5, images.flip(3), images)
            loss = F.cross_entropy(model(images), labels[indices])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            progress.step({"iteration": iteration + 1, "iterations": iterations, "loss": loss.item()})
    model.eval().requires_grad_(False)
    test_accuracy = accuracy(model, test_source)
    recipe = asdict(config)
    model.record = {
        "data": recipe.pop("data"),
        "seed": recipe.pop("seed"),
        "recipe": recipe,
        "test_accuracy": round(test_accuracy, 6),
    }
    return model, test_accuracy


@torch.no_grad()
def accuracy(classifier: FeatureClassifier, source: LabelledImages, batch_size: int = 500) -> float:
    """The share of `source` that the classifier labels rightly, in [0, 1]."""
    labels = _labels(source)
    right = sum(
        int((classifier(source.batch(indices)).argmax(1) == labels[indices]).sum())
        for indices in torch.split(torch.arange(len(source)), batch_size)
    )
    return right / len(source)


def save_classifier(classifier: FeatureClassifier, path: Path) -> None:
    """Write weights and record as one safetensors file, atomically; equal runs give equal bytes."""
    require_finite(classifier.state_dict(), "the classifier", "nothing was written: train it again at a lower rate")
    write_tensors(
        path,
        classifier.state_dict(),
        CLASSIFIER_KEY,
        {"format": 1, "architecture": classifier.architecture, "record": classifier.record},
    )


def bundled_classifier(shape: Shape, data: str = "") -> FeatureClassifier:
    """The bundled classifier for images (C, H, W): the one of the data set that `data` begins with, else of the shape.

    Raises DataError where none was made for such images.
    """
    folder = Path(str(resources.files("ebm_prior.checkpoints")))
    found = [load_classifier(path) for path in sorted(folder.glob("*_classifier.safetensors"))]
    fit = [classifier for classifier in found if classifier.shape == tuple(shape)]
    if not fit:
        made_for = few(f"{c.record.get('data')} {c.shape}" for c in found)
        raise DataError(
            f"no bundled classifier was made for images {tuple(shape)}, only for {made_for}. Pass --classifier with "
            "one trained on such images (ebm-prior classifier makes it), --features with your own, or --fid"
        )
    return next((c for c in fit if plain_name(data).startswith(plain_name(c.record.get("data", "?")))), fit[0])


def load_classifier(path: Path) -> FeatureClassifier:
    """Read a classifier, frozen and in eval mode.

    Raises CheckpointError where the file is missing, damaged, or not a classifier of `save_classifier`.
    """
    what = "a feature classifier (`ebm-prior classifier` trains one)"
    tensors, stored = read_tensors(path, CLASSIFIER_KEY, what)
    stored = checked(CLASSIFIER_RECORD, stored, path, f"it describes no network: expected {what}")
    architecture = stored["architecture"]

    def build() -> FeatureClassifier:
        return FeatureClassifier(
            tuple(architecture["shape"]),
            architecture["classes"],
            network=architecture.get("network", "plain"),
            width=architecture["width"],
        )

    classifier = build_strictly(build, tensors, path)
    classifier.record = dict(stored["record"])
    return classifier.eval().requires_grad_(False)


def _labels(source: LabelledImages) -> Tensor:
    if source.labels is None or len(source.labels) != len(source) or len(source) == 0:
        raise DataError("the classifier needs one label per image; this source has none: give labelled images")
    return source.labels


def _shifted(images: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """One shift per image of up to `most` pixels along each axis; new pixels at the edge repeat the border."""
    if most == 0:
        return images
    batch, _, height, breadth = images.shape
    padded = F.pad(images, (most, most, most, most), mode="replicate")
    offsets = torch.randint(0, 2 * most + 1, (2, batch, 1), generator=generator)
    rows, columns = torch.arange(height) + offsets[0], torch.arange(breadth) + offsets[1]
    picked = padded[torch.arange(batch)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return picked.movedim(-1, 1)
