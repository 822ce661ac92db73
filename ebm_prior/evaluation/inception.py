"""Inception's features, as clean-fid computes them: with these, and only these, a Fréchet distance is called FID.

The networks and the resizing are clean-fid's (Parmar et al. 2022). Its download function is not used, because it writes
to a fixed place and verifies nothing. Here the weights come from a path or from our own cache, and are identified by
their SHA-256, which several public projects pin. Weights with another hash work, but their distance is named
FD(inception-<hash>, mode).
"""

from __future__ import annotations

import hashlib
import io
import pickle
import tempfile
import urllib.request
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from ebm_prior.errors import CheckpointError, ConfigurationError, DataError
from ebm_prior.storage.atomic import remove_leftovers, user_cache, write_atomically

Mode = Literal["clean", "legacy_pytorch", "legacy_tensorflow"]
MODES: tuple[Mode, ...] = get_args(Mode)
FEATURES = 2048


class Network(NamedTuple):
    """The Inception network without its preprocessing."""

    features: Callable[[Tensor], Tensor]  # resized images (B, 3, H, W) in [0, 255] -> (B, 2048)
    classes: Tensor | None  # (K, 2048): the weights that make logits of features; None: a network without them


class Weights(NamedTuple):
    """An official weights file: its name, its size in MB, and the SHA-256 of its content."""

    name: str
    megabytes: int
    sha256: str


TORCHSCRIPT = Weights("inception-2015-12-05.pt", 96, "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4")
STATE_DICT = Weights(
    "pt_inception-2015-12-05-6726825d.pth", 96, "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
)
OFFICIAL: dict[Mode, Weights] = {"clean": TORCHSCRIPT, "legacy_tensorflow": TORCHSCRIPT, "legacy_pytorch": STATE_DICT}


class Inception:
    """Images (B, C, H, W) in [0, 1], grey or RGB -> features (B, 2048), float32: a `metrics.FeatureExtractor`.

    As in a comparison of folders of PNG files, images are rounded to 8 bits, then resized to 299 x 299 by the rule of
    the mode.
    """

    def __init__(self, network: Network, mode: Mode, sha256: str, device: torch.device) -> None:
        from cleanfid.resize import build_resizer

        with warnings.catch_warnings():  # the legacy resizer silences all warnings of the process
            self._resize = build_resizer(mode)
        self._network, self._device = network, device
        self.mode: Mode = mode
        self.sha256 = sha256

    @property
    def official(self) -> bool:
        """Whether these are the published weights."""
        return self.sha256 == OFFICIAL[self.mode].sha256

    @property
    def name(self) -> str:
        """Network and preprocessing: inception, or inception-<hash> for weights that are not official, and the mode."""
        return f"{'inception' if self.official else f'inception-{self.sha256[:8]}'}, {self.mode}"

    @property
    def distance_name(self) -> str:
        """The name under which a Fréchet distance on these features is printed."""
        return f"FID({self.mode})" if self.official else f"FD({self.name})"

    @property
    def weights(self) -> str:
        """The weights file, as a card names it."""
        known = OFFICIAL[self.mode].name if self.official else "no official weights"
        return f"{known} (SHA-256 {self.sha256[:8]})"

    def logits(self, features: Tensor) -> Tensor | None:
        """Features (B, 2048) -> logits (B, K), for the Inception Score; None where the network has no classes.

        As in Salimans et al. (2016), the last layer's bias is not added.
        """
        return None if self._network.classes is None else features @ self._network.classes.to(features).T

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) in [0, 1] -> features (B, 2048). Raises DataError on another shape or range."""
        if images.dim() != 4 or images.shape[1] not in (1, 3):
            raise DataError(f"expected images (B, 1 or 3, H, W), found {tuple(images.shape)}")
        if not bool(((images >= -1e-4) & (images <= 1 + 1e-4)).all()):  # false for NaN; the margin is for rounding
            raise DataError("expected images with finite values in [0, 1], found others; rescale them")
        colour = images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1)
        quantised = colour.clamp(0, 1).mul(255).round().to(torch.uint8).cpu().numpy()
        resized = np.stack([self._resize(image) for image in quantised])
        batch = torch.from_numpy(resized).permute(0, 3, 1, 2).float()
        return self._network.features(batch.to(self._device)).float()

    __call__ = features


def load_inception(
    path: Path | None = None,
    *,
    mode: Mode = "clean",
    download: bool = False,
    cache_dir: Path | None = None,
    device: torch.device | str = "cpu",
) -> Inception:
    """Inception from `path`, else from the cache, else, with `download`, from its publisher into the cache.

    `mode`: clean-fid's; `legacy_pytorch` is comparable with the paper. `path`: the TorchScript file
    inception-2015-12-05.pt (clean, legacy_tensorflow) or the state dict pt_inception-2015-12-05-6726825d.pth
    (legacy_pytorch); official or not, its SHA-256 is in the name of the distance. A folder is taken for a cache: it
    holds both files, official ones, under these names.
    `cache_dir`: by default ebm-prior in the user's cache directory ($XDG_CACHE_HOME or ~/.cache).
    Raises CheckpointError where the weights are missing, cannot be downloaded, are damaged or of the wrong form.
    """
    if mode not in MODES:
        raise ConfigurationError(f"expected a mode of clean-fid, {', '.join(MODES)}; found {mode!r}")
    folder = path if path is not None and path.is_dir() else None
    source = path if path and not folder else _cached(mode, download, folder or cache_dir or user_cache())
    try:
        content = source.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read the Inception weights {source}: {error.strerror or error}") from error
    device = torch.device(device)
    try:
        if mode == "legacy_pytorch":
            network = _from_state_dict(content, device)
        else:
            network = _from_torchscript(content, device, resize_inside=mode == "legacy_tensorflow")
        inception = Inception(network, mode, hashlib.sha256(content).hexdigest(), device)
        size = inception.features(torch.zeros(1, 1, 32, 32)).shape[1]  # a network of another kind fails here, not later
    except (RuntimeError, pickle.UnpicklingError, EOFError, AttributeError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{source} is damaged or of another form; mode {mode} needs {OFFICIAL[mode].name}: {str(error)[:500]}"
        ) from error
    if size != FEATURES:
        raise CheckpointError(f"{source}: expected a network with {FEATURES} features, found {size}")
    return inception


def _url(mode: Mode) -> str:
    from cleanfid import downloads_helper, inception_pytorch

    return str(inception_pytorch.FID_WEIGHTS_URL if mode == "legacy_pytorch" else downloads_helper.inception_url)


def _cached(mode: Mode, download: bool, cache_dir: Path) -> Path:
    """The official weights in the cache, verified; downloaded first if they are not there and `download` allows it."""
    official = OFFICIAL[mode]
    place = cache_dir / official.name
    if place.is_file():
        found = hashlib.sha256(place.read_bytes()).hexdigest()
        if found != official.sha256:
            raise CheckpointError(
                f"{place} is damaged: expected SHA-256 {official.sha256}, found {found}. "
                "Delete it and download it again"
            )
        return place
    url = _url(mode)
    if not download:
        raise CheckpointError(
            f"FID ({mode}) needs Inception's weights, found none at {place}. Pass --download to fetch them "
            f"({official.megabytes} MB from {url}), or --inception PATH with the file {official.name}. Offline: fetch "
            "it on another machine, or use the bundled classifier, whose distance is printed as FD(name)"
        )
    try:
        with urllib.request.urlopen(url, timeout=60) as response:
            content: bytes = response.read()
    except OSError as error:
        raise CheckpointError(
            f"cannot download {url}: {error}. Fetch it on a machine that can, and pass --inception PATH"
        ) from error
    found = hashlib.sha256(content).hexdigest()
    if found != official.sha256:
        raise CheckpointError(
            f"what {url} sent is not the official file: expected SHA-256 {official.sha256}, found {found}; nothing was "
            "kept. Try again, or pass --inception PATH"
        )
    remove_leftovers(place.parent, of=place.name)
    write_atomically(place, content)
    return place


def _from_torchscript(content: bytes, device: torch.device, *, resize_inside: bool) -> Network:
    from cleanfid.inception_torchscript import InceptionV3W

    with tempfile.TemporaryDirectory() as folder:  # clean-fid reads a fixed name in a folder
        (Path(folder) / TORCHSCRIPT.name).write_bytes(content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # TorchScript is; but it is what is published
            network = InceptionV3W(folder, download=False, resize_inside=resize_inside)
    network = network.to(device).eval()
    return Network(network, network.base.state_dict().get("output.weight"))


def _from_state_dict(content: bytes, device: torch.device) -> Network:
    from cleanfid import inception_pytorch

    state: dict[str, Any] = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    # Its constructor always calls the downloader: hand it the weights that we have.
    given = mock.patch.object(inception_pytorch, "load_state_dict_from_url", return_value=state)
    with given, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision's, about how clean-fid builds its network
        network = inception_pytorch.InceptionV3(output_blocks=[3], resize_input=False).to(device).eval()
    return Network(lambda images: network(images / 255)[0].flatten(1), state.get("fc.weight"))
