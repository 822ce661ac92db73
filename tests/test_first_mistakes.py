"""What everybody types first: each mistake is an error of ours that says what was expected, and what is meant works."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from small_fits import small
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from toys import LinearGaussian, ToyConv
from workshop import SMALL_FIT, Workshop

import ebm_prior
from ebm_prior import (
    EBMPrior,
    EbmPriorError,
    FitConfig,
    SamplerConfig,
    evaluate,
    fit,
    load_backbone,
    load_prior,
    open_images,
    save_backbone,
    save_prior,
)
from ebm_prior.model.backbone import Backbone
from ebm_prior.model.scores import Form


class Bench(NamedTuple):
    """What a mistake is made with."""

    backbone: Backbone
    prior: EBMPrior
    images: torch.Tensor  # (40, 1, 8, 8) in [0, 1]
    folder: Path
    workshop: Workshop

    def fit(self, *given: Any, **more: Any) -> EBMPrior:
        """`fit` with small settings, unless the mistake is among them."""
        backbone, images, config = (*given, *(self.backbone, self.images, SMALL_FIT)[len(given) :])
        return fit(backbone, images, config, **more)

    def saved(self) -> Path:
        """The prior in a file."""
        path = self.folder / "saved.safetensors"
        self.prior.save(path)
        return path


@pytest.fixture(scope="module")
def bench(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    backbone = load_backbone(None, workshop.backbone)
    images = open_images(workshop.images).batch(range(40))
    return Bench(backbone, fit(backbone, images, SMALL_FIT), images, tmp_path_factory.mktemp("mistakes"), workshop)


class Stream(IterableDataset):  # type: ignore[type-arg]
    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(torch.zeros(40, 1, 8, 8))


class Augmented:
    """A data set that flips at random."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.rand(1, 8, 8)


def with_nan(images: torch.Tensor) -> torch.Tensor:
    images = images.clone()
    images[7, 0, 3, 3] = float("nan")
    return images


def latents(bench: Bench, n: int = 2) -> list[torch.Tensor]:
    return bench.backbone.sample(n, generator=torch.Generator().manual_seed(0))


Mistake = tuple[Callable[[Bench], object], str]
MISTAKES: dict[str, Mistake] = {
    # the backbone
    "a backbone's name": (lambda b: b.fit("nvae"), "expected a backbone, found the text 'nvae': load it first"),
    "a backbone's file": (lambda b: b.fit(b.workshop.backbone), "expected a backbone, found a PosixPath"),
    "a backbone's class": (lambda b: b.fit(ToyConv), "found the class ToyConv: load trained weights"),
    "no backbone": (lambda b: b.fit(None), "expected a backbone, found None"),
    "a prior as backbone": (lambda b: b.fit(b.prior), "found an EBMPrior: pass its .backbone"),
    "images first": (lambda b: b.fit(b.images, b.backbone), "expected a backbone, found a float32 tensor"),
    "another network": (lambda b: b.fit(torch.nn.Linear(2, 2)), "found a Linear: put the network behind"),
    "train mode": (lambda b: b.fit(ToyConv().train()), "expected a backbone in eval mode"),
    "an unknown adapter": (lambda b: load_backbone("nvea", b.workshop.backbone), "no backbone adapter is registered"),
    "the file first": (lambda b: load_backbone(b.workshop.backbone, "toy"), "expected an adapter's name"),
    "no file": (lambda b: load_backbone(None, None), "path: expected the path of a file, found None"),
    "a missing file": (lambda b: load_backbone(None, "gone.safetensors"), "no backbone at gone.safetensors"),
    "an empty path": (lambda b: load_backbone(None, ""), "expected the path of a file, found the text ''"),
    "a device that is none": (
        lambda b: load_backbone(None, b.workshop.backbone, device="gpu"),
        "device: expected one that torch can use here, as cpu or cuda:0, found 'gpu'",
    ),
    "a class saved": (lambda b: save_backbone(ToyConv, b.folder / "b.safetensors"), "found the class ToyConv"),
    # images
    "a path for images": (lambda b: b.fit(b.backbone, b.workshop.images), "open_images('"),
    "a name for images": (lambda b: b.fit(b.backbone, "cifar10"), "open_images('cifar10') reads"),
    "no images": (lambda b: b.fit(b.backbone, None), "expected a tensor or array (N, C, H, W), "),
    "numbers": (lambda b: b.fit(b.backbone, [1, 2]), "images[0]: expected an image"),
    "an empty list": (lambda b: b.fit(b.backbone, []), "found an empty list"),
    "an empty array": (lambda b: b.fit(b.backbone, np.zeros((0, 1, 8, 8))), "no images"),
    "one image": (lambda b: b.fit(b.backbone, b.images[0]), "which is one: images[None]"),
    "one picture": (lambda b: b.fit(b.backbone, Image.new("L", (8, 8))), "a single picture: pass a list"),
    "few images": (lambda b: b.fit(b.backbone, b.images[:5]), "at least 10 images to fit a prior, found 5"),
    "a generator": (lambda b: b.fit(b.backbone, (x for x in b.images)), "list(…) keeps its items"),
    "a stream": (lambda b: b.fit(b.backbone, Stream()), "found a Stream"),
    "a loader": (lambda b: b.fit(b.backbone, DataLoader(TensorDataset(b.images))), "found a DataLoader: pass its"),
    "a dictionary of splits": (lambda b: b.fit(b.backbone, {"train": b.images}), "with the keys 'train': pass one"),
    "a class of data sets": (lambda b: b.fit(b.backbone, TensorDataset), "found the class TensorDataset: make an"),
    "labels first": (
        lambda b: b.fit(b.backbone, TensorDataset(torch.arange(40), b.images)),
        "images[0]: expected an image",
    ),
    "augmented at random": (lambda b: b.fit(b.backbone, Augmented()), "expected the same image at every read"),
    "0 to 255": (lambda b: b.fit(b.backbone, b.images * 255), "expected float images in [0, 1], found values from"),
    "-1 to 1": (lambda b: b.fit(b.backbone, b.images * 2 - 1), "expected float images in [0, 1], found values from"),
    "NaN": (lambda b: b.fit(b.backbone, with_nan(b.images)), "NaN or infinite values in image 7"),
    "NaN in a data set": (lambda b: b.fit(b.backbone, TensorDataset(with_nan(b.images))), "in image 7"),
    "int64 pixels": (lambda b: b.fit(b.backbone, (b.images * 255).long()), "found int64; convert the array"),
    "another size": (lambda b: b.fit(b.backbone, torch.rand(40, 1, 28, 28)), "expected images of shape (1, 8, 8)"),
    "colours": (lambda b: b.fit(b.backbone, torch.rand(40, 3, 8, 8)), "expected images of shape (1, 8, 8)"),
    "texts": (lambda b: b.fit(b.backbone, ["a.png", "b.png"]), "images[0]: expected an image"),
    # settings
    "an unknown setting": (lambda b: b.fit(b.backbone, b.images, {"iteration": 5}), "did you mean iterations?"),
    "an unknown nested one": (
        lambda b: b.fit(b.backbone, b.images, {"energy": {"width": 5}}),
        "unknown settings width; EnergyConfig has",
    ),
    "a text for a number": (
        lambda b: b.fit(b.backbone, b.images, {"iterations": "5"}),
        "iterations must be a whole number, found '5'",
    ),
    "the same in a FitConfig": (lambda b: FitConfig(iterations="5"), "iterations must be a whole number, found '5'"),
    "a float for a number": (lambda b: FitConfig(batch_size=16.0), "batch_size must be a whole number, found 16.0"),
    "the class of settings": (lambda b: b.fit(b.backbone, b.images, FitConfig), "found the class FitConfig"),
    "a number for settings": (lambda b: b.fit(b.backbone, b.images, 100), "or as a dictionary, found a int"),
    "other settings": (lambda b: b.fit(b.backbone, b.images, SamplerConfig()), "found a SamplerConfig"),
    "a negative seed": (lambda b: FitConfig(seed=-1), "seed must not be negative"),
    "a text for steps": (lambda b: SamplerConfig(steps="5"), "steps must be a whole number, found '5'"),
    # a prior
    "a negative number of samples": (lambda b: b.prior.sample(-1), "n: expected a whole number of 0 or more, found -1"),
    "a text for it": (lambda b: b.prior.sample("64"), "n: expected a whole number of 0 or more, found the text '64'"),
    "half a sample": (lambda b: b.prior.sample(2.5), "n: expected a whole number of 0 or more, found 2.5"),
    "no number": (lambda b: b.prior.sample(None), "n: expected a whole number of 0 or more, found None"),
    "sample with seed -1": (lambda b: b.prior.sample(2, seed=-1), "seed: expected a whole number of 0 or more"),
    "chunks of nothing": (lambda b: b.prior.sample(2, chunk=0), "chunk: expected a whole number of 1 or more, found 0"),
    "a dictionary as sampler": (lambda b: b.prior.sample(2, sampler={"steps": 5}), "sampler: expected a SamplerConfig"),
    "a tensor for latents": (lambda b: b.prior.f(torch.zeros(2, 4)), "expected a list of one tensor per latent group"),
    "latents in reverse": (lambda b: b.prior.f(latents(b)[::-1]), "in reverse order, list(reversed(z)) turns them"),
    "a group too few": (lambda b: b.prior.f(latents(b)[:2]), "found 2 tensors"),
    "a group of another shape": (
        lambda b: b.prior.f([torch.zeros(2, 5), *latents(b)[1:]]),
        "dense (B, 4), point (B, 2, 1, 1), conv (B, 3, 4, 4); found that dense has (2, 5)",
    ),
    "groups of several B": (lambda b: b.prior.f([latents(b, 3)[0], *latents(b)[1:]]), "with one B; found B = 3, 2, 2"),
    "latents in float64": (lambda b: b.prior.f([z.double() for z in latents(b)]), "found torch.float64 on cpu"),
    "latents elsewhere": (lambda b: b.prior.f([z.to("meta") for z in latents(b)]), "found torch.float32 on meta"),
    "latents as arrays": (lambda b: b.prior.f([z.numpy() for z in latents(b)]), "number 0 is a float32 array"),
    "scores of 0 to 255": (
        lambda b: b.prior.scores(b.images * 255, [Form(0)]),
        "in image 0: images / 255 scales those of 8 bits",
    ),
    "scores of -1 to 1": (lambda b: b.prior.scores(b.images * 2 - 1, [Form(0)]), "(images + 1) / 2 scales"),
    "scores of uint8": (lambda b: b.prior.scores((b.images * 255).byte(), [Form(0)]), "(images.float() / 255)"),
    "scores of NaN": (lambda b: b.prior.scores(with_nan(b.images), [Form(0)]), "NaN or infinite values in image 7"),
    "scores of an array": (lambda b: b.prior.scores(b.images.numpy(), [Form(0)]), "torch.from_numpy makes a tensor"),
    "scores without batch axis": (lambda b: b.prior.scores(b.images[0], [Form(0)]), "images[None] adds it"),
    "scores with channels last": (
        lambda b: b.prior.scores(b.images.permute(0, 2, 3, 1), [Form(0)]),
        "images.permute(0, 3, 1, 2) moves them",
    ),
    "scores in a text": (lambda b: b.prior.scores(b.images, "LLR>1"), "forms: expected forms of scores"),
    "scores without forms": (lambda b: b.prior.scores(b.images, None), "forms: expected forms of scores"),
    "scores of no draws": (lambda b: b.prior.scores(b.images, [Form(0)], draws=0), "draws: expected a whole number"),
    "to a device that is none": (lambda b: b.prior.to("gpu"), "device: expected one that torch can use here"),
    "log Z of no draws": (lambda b: b.prior.log_normalizer(n=0), "n: expected a whole number of 1 or more, found 0"),
    # files
    "a prior of another backbone": (
        lambda b: (
            b.prior.save(b.folder / "other.safetensors"),
            load_prior(b.folder / "other.safetensors", ToyConv(seed=1)),
        ),
        "was trained on the toy backbone with fingerprint",
    ),
    "a prior of another architecture": (
        lambda b: (
            b.prior.save(b.folder / "other.safetensors"),
            load_prior(b.folder / "other.safetensors", LinearGaussian()),
        ),
        "is for a backbone with the latent groups",
    ),
    "a backbone's name for a backbone": (
        lambda b: load_prior(b.saved(), "toy"),
        "expected a backbone, found the text 'toy'",
    ),
    "a prior that is not there": (lambda b: EBMPrior.load("gone.safetensors"), "expected an ebm-prior file at gone"),
    "a folder without prior": (lambda b: load_prior(b.folder), "found a folder there"),
    "a backbone as prior": (lambda b: load_prior(b.workshop.backbone), "but not an ebm-prior file"),
    "a backbone saved as prior": (lambda b: save_prior(b.backbone, "p.safetensors"), "found a ToyConv: fit makes one"),
    "a prior saved nowhere": (lambda b: b.prior.save(None), "path: expected the path of a file, found None"),
    "a backbone in memory": (
        lambda b: b.fit(ToyConv().eval()).save(b.folder / "m.safetensors"),
        "write it with save_backbone(prior.backbone, FILE)",
    ),
    # the evaluation
    "a file to evaluate": (lambda b: evaluate("prior.safetensors", b.images), "expected a prior, found the text"),
    "evaluated on a path": (lambda b: evaluate(b.prior, "mnist"), "open_images('mnist') reads"),
    "evaluated with a typo": (lambda b: evaluate(b.prior, b.images, config={"sample": 5}), "did you mean samples?"),
    "evaluated by no network": (lambda b: evaluate(b.prior, b.images), "no bundled classifier was made for images"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_an_error_of_ours(bench: Bench, mistake: str) -> None:
    make, said = MISTAKES[mistake]
    with pytest.raises(EbmPriorError, match=re.escape(said)) as caught:
        make(bench)
    assert len(str(caught.value)) < 700


WORKS: dict[str, Callable[[torch.Tensor], Any]] = {
    "tensor": lambda x: x,
    "array": lambda x: x.numpy(),
    "float64": lambda x: x.double().numpy(),
    "half": lambda x: x.bfloat16(),
    "uint8": lambda x: (x * 255).byte(),
    "channels last": lambda x: x.permute(0, 2, 3, 1).numpy(),
    "without channels": lambda x: x[:, 0],
    "with gradient": lambda x: x.clone().requires_grad_(True),
    "data set": TensorDataset,
    "pairs": lambda x: TensorDataset(x, torch.arange(len(x))),
    "dictionaries": lambda x: [{"image": image, "label": 3} for image in x],
    "list of pictures": lambda x: [Image.fromarray((image[0] * 255).byte().numpy()) for image in x],
    "list of tensors": list,
    "subset": lambda x: torch.utils.data.Subset(TensorDataset(x), range(20)),
}


@pytest.mark.parametrize("form", WORKS)
def test_images_are_taken_as_they_are(bench: Bench, form: str) -> None:
    prior = fit(bench.backbone, WORKS[form](bench.images), SMALL_FIT)
    assert prior.record["data"]["name"] == "images"


def test_images_of_ones_own_class(bench: Bench) -> None:
    class Own:
        name = "mine"

        def __len__(self) -> int:
            return len(bench.images)

        def batch(self, indices: torch.Tensor) -> torch.Tensor:
            return with_nan(bench.images)[indices]

    with pytest.raises(EbmPriorError, match=r"mine: expected float images .* in image 7"):
        fit(bench.backbone, Own(), SMALL_FIT)


def test_settings_are_taken_as_they_are(bench: Bench) -> None:
    flat = {"iterations": 6, "batch_size": 8, "evaluate_every": 2, "held_out": 20, "warmup": 0}
    flat |= {"energy_channels": 4, "energy_hidden": 8, "energy_joint": 8, "sampler_proposals": 2}
    priors = [fit(bench.backbone, bench.images, config) for config in (SMALL_FIT, flat, small())]
    first, *others = [prior.energy.state_dict() for prior in priors]
    assert all(torch.equal(first[key], other[key]) for other in others for key in first)


def test_no_samples_are_an_empty_result(bench: Bench) -> None:
    nothing, two = bench.prior.sample(0), bench.prior.sample(2)
    assert [z.shape for z in nothing.z] == [(0, *z.shape[1:]) for z in two.z]
    assert nothing.images.shape == (0, 1, 8, 8)
    assert [len(column) for column in nothing[3:]] == [0] * 4
    assert bench.prior.scores(bench.images[:0], Form(0))[Form(0)].shape == (0,)


def test_one_form_of_a_score_need_not_be_in_a_list(bench: Bench) -> None:
    form = Form(1, ratio=True)
    assert torch.equal(bench.prior.scores(bench.images, form)[form], bench.prior.scores(bench.images, [form])[form])


def test_a_prior_says_what_it_is(bench: Bench) -> None:
    assert re.fullmatch(
        r"<EBMPrior calibrated on ToyConv: 3 groups \(dense \(4,\), point \(2, 1, 1\), conv \(3, 4, 4\)\), "
        r"[\d,]+ parameters, tau [\d.e-]+, gain [+-][\d.e-]+ nats>",
        repr(bench.prior),
    )
    assert "refiner" in repr(EBMPrior(bench.backbone, bench.prior.energy, regime="refiner"))


def test_a_prior_is_saved_loaded_and_moved(bench: Bench, tmp_path: Path) -> None:
    bench.prior.save(tmp_path / "prior.safetensors")
    loaded = EBMPrior.load(tmp_path).to("cpu")
    assert torch.equal(loaded.sample(3).images, bench.prior.sample(3).images)
    loaded.save(str(tmp_path / "again.safetensors"))
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "prior.safetensors").read_bytes()


@pytest.mark.skipif(importlib.util.find_spec("ebm_prior.compute.isolation") is None, reason="has its own branch")
def test_inside_inference_mode(bench: Bench) -> None:
    with torch.inference_mode():
        prior = fit(bench.backbone, bench.images, SMALL_FIT)
        assert torch.isfinite(prior.f(prior.sample(2).z)).all()


def test_the_face_says_which_names_it_has() -> None:
    with pytest.raises(AttributeError, match="module 'ebm_prior' has no attribute 'fitt'"):
        _ = ebm_prior.fitt
    assert {"fit", "evaluate", "EBMPrior", "FitConfig"} <= set(dir(ebm_prior))


def test_one_seed_one_prior_by_either_door(bench: Bench) -> None:
    from ebm_prior.training.fit import fit as trained

    source = open_images(bench.workshop.images)
    ours, theirs = (call(bench.backbone, source, replace(small(), seed=5)) for call in (fit, trained))
    assert all(torch.equal(a, b) for a, b in zip(ours.energy.parameters(), theirs.energy.parameters(), strict=True))
