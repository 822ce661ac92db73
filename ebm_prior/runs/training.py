"""A training in a run folder, as pretraining, fitting and joint training share it: inputs, pictures, time, products."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

from ebm_prior.data.images import ImageSource
from ebm_prior.errors import DivergenceError
from ebm_prior.interfaces import Callback, Progress
from ebm_prior.model.backbone import Backbone
from ebm_prior.model.prior import EBMPrior
from ebm_prior.runs.backbones import source_record
from ebm_prior.runs.folder import run_inputs
from ebm_prior.runs.kept import diverged
from ebm_prior.runs.watch import Board
from ebm_prior.storage.weights import fingerprint

Product = TypeVar("Product", Backbone, EBMPrior)


def network_inputs(backbone: Backbone, images: ImageSource) -> dict[str, Any]:
    """The inputs of a run that trains `backbone` itself on `images`, including its architecture and initial weights."""
    architecture = json.loads(json.dumps(dict(backbone.architecture)))
    return {"architecture": architecture, "start": fingerprint(backbone), **run_inputs(backbone, images)}


def start_record(checkpoint: str | None, backbone: Backbone) -> dict[str, Any]:
    """{"start": origin of the weights of `backbone`}, for its record; empty where they come from the seed."""
    return {} if checkpoint is None else {"start": source_record(checkpoint, backbone)}


def pictures(
    directory: Path,
    draw: Callable[[Mapping[str, Any], Path], None],
    progress: Progress,
    *,
    every: int = 1,
    board: Board | None = None,
) -> Callback:
    """An `on_evaluate` that lets `draw` make samples-ITERATION.png in `directory`, at multiples of `every` iterations.

    With a `board` the pictures are shown there too. If the chains of a picture diverge, it is left out with a remark,
    because training checks its own chains for divergence.
    """

    def on_evaluate(shown: Mapping[str, Any]) -> None:
        iteration = shown["iteration"]
        if iteration % every == 0:
            path = directory / f"samples-{iteration:06d}.png"
            try:
                draw(shown, path)
            except DivergenceError as error:
                progress.remark(f"no picture of iteration {iteration}: {error}")
                return
            if board:
                board.picture(path, iteration)

    return on_evaluate


def timed(
    train: Callable[[], Product], keep: Callable[[Product, str | None], object], path: Path
) -> tuple[Product, float]:
    """Train, and write the product with `keep`, also the product that is left after a second divergence.

    Args:
        train: trains, and returns the product; it may raise DivergenceError.
        keep: writes the product to `path`. It gets the text of the DivergenceError, or None.

    Returns:
        The product, and the CPU seconds of its training.

    Raises:
        DivergenceError: as `train` does; it says whether the product was written, if there is one, and where.
    """
    began = time.process_time()
    try:
        product = train()
    except DivergenceError as error:
        if error.kept is None:
            raise
        raise diverged(error, partial(keep, cast(Product, error.kept), str(error)), path) from error
    seconds = time.process_time() - began
    keep(product, None)
    return product, seconds
