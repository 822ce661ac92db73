"""Inception through clean-fid. The real weights are not here: stand-ins go the same way through the same code."""

import hashlib
import io
import sys
import urllib.error
import urllib.request
import warnings
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from ebm_prior.errors import CheckpointError, ConfigurationError, DataError
from ebm_prior.evaluation import inception
from ebm_prior.evaluation.inception import MODES, OFFICIAL, Inception, Network, Weights, load_inception


class Layers(nn.Module):
    """(B, 3, H, W) -> (B, 2048): pooled pixels, so that features show what the network was given."""

    def forward(self, x):
        return nn.functional.adaptive_avg_pool2d(x, 32).flatten(1)[:, :2048]


class StandIn(nn.Module):
    """With the parts, names and signature of inception-2015-12-05.pt."""

    def __init__(self):
        super().__init__()
        self.layers = Layers()
        self.output = nn.Linear(2048, 7)

    def forward(self, x, return_features: bool = False, use_fp16: bool = False, no_output_bias: bool = False):
        features = self.layers((nn.functional.interpolate(x, (299, 299)) - 128) / 128)
        if return_features:
            return features
        logits = nn.functional.linear(features, self.output.weight) if no_output_bias else self.output(features)
        return logits.softmax(1)


@pytest.fixture(scope="module")
def torchscript(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "stand-in.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated, but it is what the official file is
        torch.jit.save(torch.jit.script(StandIn()), path)
    return path


@pytest.mark.filterwarnings("ignore:`torch.jit.load` is deprecated:FutureWarning")
def test_features_are_those_of_clean_fid_on_png_files(torchscript, tmp_path):
    from cleanfid.inception_torchscript import InceptionV3W
    from cleanfid.utils import ResizeDataset

    images = torch.rand(3, 3, 20, 24, generator=torch.Generator().manual_seed(0))
    paths = []
    for number, image in enumerate(images):
        paths.append(tmp_path / f"{number}.png")
        Image.fromarray((image.permute(1, 2, 0) * 255).round().byte().numpy()).save(paths[-1])
    (tmp_path / "inception-2015-12-05.pt").write_bytes(torchscript.read_bytes())
    for mode in ("clean", "legacy_tensorflow"):
        files = ResizeDataset(paths, mode=mode)
        network = InceptionV3W(str(tmp_path), download=False, resize_inside=mode == "legacy_tensorflow")
        expected = network(torch.stack([files[i] for i in range(3)]))
        found = load_inception(torchscript, mode=mode)(images)
        assert found.shape == (3, 2048)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected)


@pytest.mark.filterwarnings("ignore:`torch.jit.load` is deprecated:FutureWarning")
def test_classes_are_those_of_the_network_without_its_bias(torchscript):
    """The network's own probabilities, as metrics that call it compute them, from features alone."""
    extractor, network = load_inception(torchscript, mode="legacy_tensorflow"), torch.jit.load(torchscript)
    images = torch.randint(0, 256, (3, 3, 20, 20))
    probabilities = extractor.logits(extractor(images / 255)).softmax(1)
    assert probabilities.shape == (3, 7)
    torch.testing.assert_close(probabilities, network(images.float(), no_output_bias=True))
    assert (probabilities - network(images.float())).abs().max() > 1e-4


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_resizes_as_clean_fid_does(mode, tmp_path):
    from cleanfid.utils import ResizeDataset

    images = torch.rand(2, 3, 40, 31, generator=torch.Generator().manual_seed(1))
    paths = [tmp_path / f"{number}.png" for number in range(2)]
    for image, path in zip(images, paths, strict=True):
        Image.fromarray((image.permute(1, 2, 0) * 255).round().byte().numpy()).save(path)
    seen = []

    def remember(batch):
        seen.append(batch)
        return batch.flatten(1)

    Inception(Network(remember, None), mode, "0" * 64, torch.device("cpu"))(images)
    files = ResizeDataset(paths, mode=mode)
    torch.testing.assert_close(seen[0], torch.stack([files[0], files[1]]))


def test_legacy_pytorch_is_clean_fids_network_with_the_given_state_dict(tmp_path):
    from cleanfid import inception_pytorch
    from cleanfid.resize import build_resizer

    captured = {}

    def remember(self, state, *arguments, **options):
        captured["state"] = {key: value.clone() for key, value in self.state_dict().items()}

    with (
        warnings.catch_warnings(),
        mock.patch.object(inception_pytorch, "load_state_dict_from_url", return_value={}),
        mock.patch.object(nn.Module, "load_state_dict", remember),
    ):
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        reference = inception_pytorch.InceptionV3(output_blocks=[3], resize_input=False).eval()
    path = tmp_path / "weights.pth"
    torch.save(captured["state"], path)

    images = torch.rand(1, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        extractor = load_inception(path, mode="legacy_pytorch")
        assert warnings.filters[0][0] == "error"  # clean-fid's resizer turns all warnings off: not ours
        found = extractor(images)
    with warnings.catch_warnings():
        resize = build_resizer("legacy_pytorch")
    grey = (images[0, 0] * 255).round().byte().numpy()
    resized = torch.from_numpy(resize(np.stack([grey] * 3, axis=2))).permute(2, 0, 1)[None]
    torch.testing.assert_close(found, reference(resized / 255)[0].flatten(1))
    assert extractor.distance_name == f"FD(inception-{extractor.sha256[:8]}, legacy_pytorch)"
    torch.testing.assert_close(extractor.logits(found), found @ captured["state"]["fc.weight"].T)


def test_grey_images_are_taken_as_rgb(torchscript):
    grey = torch.rand(2, 1, 28, 28)
    extractor = load_inception(torchscript)
    torch.testing.assert_close(extractor(grey), extractor(grey.expand(-1, 3, -1, -1)))


def test_images_are_quantised_to_8_bits(torchscript):
    extractor = load_inception(torchscript)
    image = torch.randint(1, 255, (1, 3, 16, 16)) / 255
    assert torch.equal(extractor(image), extractor(image + 0.4 / 255))
    assert not torch.equal(extractor(image), extractor(image + 0.6 / 255))


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(2, 2, 8, 8),
        torch.zeros(3, 8, 8),
        torch.full((1, 3, 8, 8), -1.0),
        torch.full((1, 3, 8, 8), torch.nan),
    ],
)
def test_images_of_another_kind_are_refused(torchscript, images):
    with pytest.raises(DataError):
        load_inception(torchscript)(images)


def test_only_official_weights_give_fid(torchscript, monkeypatch):
    sha256 = hashlib.sha256(torchscript.read_bytes()).hexdigest()
    extractor = load_inception(torchscript)
    assert extractor.distance_name == f"FD(inception-{sha256[:8]}, clean)"
    monkeypatch.setitem(OFFICIAL, "clean", Weights("stand-in.pt", 1, sha256))
    assert extractor.distance_name == "FID(clean)"


def test_missing_weights_say_what_to_do(tmp_path):
    with pytest.raises(CheckpointError, match=r"--download .*--inception PATH .*Offline"):
        load_inception(cache_dir=tmp_path)
    with pytest.raises(CheckpointError, match=r"nowhere\.pt"):
        load_inception(tmp_path / "nowhere.pt")
    with pytest.raises(ConfigurationError, match="legacy_tensorflow"):
        load_inception(mode="dirty")


@pytest.mark.parametrize(("mode", "content"), [("clean", b"garbage"), ("legacy_pytorch", b"garbage"), ("clean", b"")])
def test_damaged_weights_are_refused(tmp_path, mode, content):
    (tmp_path / "weights").write_bytes(content)
    with pytest.raises(CheckpointError, match=f"mode {mode} needs {OFFICIAL[mode].name}"):
        load_inception(tmp_path / "weights", mode=mode)


def test_another_network_is_refused(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(Layers()), tmp_path / "layers.pt")
    torch.save({"weight": torch.zeros(3)}, tmp_path / "state.pth")
    with pytest.raises(CheckpointError, match="of another form"):
        load_inception(tmp_path / "layers.pt")
    with pytest.raises(CheckpointError, match="of another form"):
        load_inception(tmp_path / "state.pth", mode="legacy_pytorch")


def test_nothing_in_a_state_dict_is_executed(tmp_path):
    class Trap:
        def __reduce__(self):
            return (sys.exit, ("executed",))

    torch.save({"weight": Trap()}, tmp_path / "trap.pth")
    with pytest.raises(CheckpointError):
        load_inception(tmp_path / "trap.pth", mode="legacy_pytorch")


def test_download_is_verified_and_cached(torchscript, tmp_path, monkeypatch):
    content = torchscript.read_bytes()
    requests = []

    def urlopen(url, timeout):
        requests.append(url)
        return io.BytesIO(content)

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    with pytest.raises(CheckpointError, match="not the official file"):
        load_inception(download=True, cache_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []

    monkeypatch.setitem(OFFICIAL, "clean", Weights("stand-in.pt", 1, hashlib.sha256(content).hexdigest()))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert load_inception(download=True).official
    assert load_inception(download=True).official  # from the cache
    assert requests == [inception._url("clean")] * 2  # a refused one and a kept one
    cached = tmp_path / "ebm-prior" / "stand-in.pt"
    cached.write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match=r"damaged: expected SHA-256 .*Delete it"):
        load_inception()


def test_every_flipped_bit_of_downloaded_weights_is_noticed(torchscript, tmp_path, monkeypatch):
    content, random = torchscript.read_bytes(), np.random.default_rng(0)
    monkeypatch.setitem(OFFICIAL, "clean", Weights("stand-in.pt", 1, hashlib.sha256(content).hexdigest()))
    for place, bit in zip(random.integers(0, len(content), 100), random.integers(0, 8, 100), strict=True):
        flipped = bytearray(content)
        flipped[place] ^= 1 << bit
        (tmp_path / "stand-in.pt").write_bytes(flipped)
        with pytest.raises(CheckpointError, match=r"damaged: expected SHA-256 .*Delete it"):
            load_inception(cache_dir=tmp_path)


def test_offline_download_says_what_to_do(tmp_path, monkeypatch):
    def urlopen(url, timeout):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    with pytest.raises(CheckpointError, match=r"no route to host.*--inception PATH"):
        load_inception(mode="legacy_pytorch", download=True, cache_dir=tmp_path)


def test_official_hashes_fit_the_names_that_clean_fid_uses():
    assert OFFICIAL["clean"].name == inception._url("clean").rsplit("/", 1)[1]
    assert OFFICIAL["legacy_pytorch"].name == inception._url("legacy_pytorch").rsplit("/", 1)[1]
    # torch.hub's convention: the name ends with the first hex digits of the content's SHA-256.
    assert OFFICIAL["legacy_pytorch"].name == f"pt_inception-2015-12-05-{OFFICIAL['legacy_pytorch'].sha256[:8]}.pth"
