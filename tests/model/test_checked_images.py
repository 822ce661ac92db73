"""Images of anybody's own class are looked at: an error names the image, instead of training on black."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from image_writers import GREY, Items
from own_images import Own
from torch import Tensor

from ebm_prior.data.images import from_array, from_dataset
from ebm_prior.errors import DataError
from ebm_prior.model.checked_images import checked


def good(n: int = 200) -> Tensor:
    return torch.rand(n, 1, 5, 4, generator=torch.Generator().manual_seed(0))


def with_value(value: float, image: int) -> Tensor:
    images = good()
    images[image, 0, 1, 1] = value
    return images


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1.001, -0.001, 255.0])
def test_a_value_that_no_image_has_is_an_error_with_its_number(value: float) -> None:
    with pytest.raises(DataError, match=r"my own: expected float images in \[0, 1\], found .* in image 63 "):
        checked(Own(with_value(value, 63)))
    source = checked(Own(with_value(value, 150)))
    source.batch([3, 4])
    for indices in ([7, 150, 8], torch.tensor([150, 3])):
        with pytest.raises(DataError, match="in image 150 "):
            source.batch(indices)


@settings(deadline=None, max_examples=15)
@given(bad=st.sets(st.integers(0, 199), min_size=1, max_size=5), asked=st.lists(st.integers(0, 199), min_size=1))
def test_just_the_bad_images_are_refused(bad: set[int], asked: list[int]) -> None:
    images = good()
    images[sorted(bad)] = float("nan")
    source = checked(Own(images), first=0)
    first = next((index for index in asked if index in bad), None)
    if first is None:
        assert torch.equal(source.batch(asked), images[asked])
    else:
        with pytest.raises(DataError, match=rf"in image {first} "):
            source.batch(asked)


WRONG: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "bytes": (lambda x: (x * 255).to(torch.uint8), r"found torch.uint8 of shape \(64, 1, 5, 4\)"),
    "doubles": (lambda x: x.double(), "found torch.float64"),
    "half": (lambda x: x.half(), "found torch.float16"),
    "arrays": (lambda x: x.numpy(), "found ndarray"),
    "pairs": (lambda x: (x, None), "found tuple"),
    "no channels": (lambda x: x[:, 0], r"found torch.float32 of shape \(64, 5, 4\)"),
    "too few": (lambda x: x[1:], "expected 64 images for as many indices, found 63"),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_batches_of_another_kind(mistake: str) -> None:
    change, message = WRONG[mistake]
    own = Own(good())
    batch = own.batch
    own.batch = lambda indices: change(batch(indices))  # type: ignore[method-assign]
    with pytest.raises(DataError, match=f"my own: .*{message}"):
        checked(own)


def test_shapes_must_not_change() -> None:
    own = Own(good())
    source = checked(own)
    own.images = torch.rand(200, 1, 4, 5)
    with pytest.raises(
        DataError, match=r"expected images of shape \(1, 5, 4\) as in its first batch, found \(1, 4, 5\)"
    ):
        source.batch([0])


def test_no_images() -> None:
    with pytest.raises(DataError, match="my own: no images"):
        checked(Own(good(0)))


def test_all_else_is_the_sources_own() -> None:
    own = Own(good())
    source = checked(own, first=10)
    assert own.asked == list(range(10))
    assert (source.name, len(source)) == ("my own", 200)
    assert source.labels is own.labels  # type: ignore[attr-defined]
    assert checked(source) is source
    assert len(source.batch([])) == 0
    assert torch.equal(pickle.loads(pickle.dumps(source)).batch([5]), own.images[[5]])
    assert len(copy.copy(source)) == 200
    array = from_array(GREY)
    assert checked(array) is array


def test_a_nan_in_a_dataset() -> None:
    images = list(with_value(float("nan"), 9))
    with pytest.raises(DataError, match=r"mine: .*NaN or infinite values in image 9 "):
        from_dataset(Items(images), name="mine")
