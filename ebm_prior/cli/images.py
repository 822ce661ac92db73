"""The images of a command: those named on the command line, or else those recorded in the folder of a run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click

from ebm_prior.cli.shared import open_images, say_remarks
from ebm_prior.data.images import known_data_set
from ebm_prior.data.source import ImageSource, Shape, Split
from ebm_prior.errors import ConfigurationError, DataError
from ebm_prior.runs.data import Remembered


@dataclass(frozen=True)
class Opener:
    """Opens images for a command.

    data_root, download: values of the options of these names.  memory: the images recorded in the run that the command
    looks at; None where the run has no such record.
    """

    data_root: Path | None
    download: bool
    memory: Remembered | None

    def typed(self, spec: str, *, split: Split, image_shape: Shape | None = None) -> ImageSource:
        """Open the images `spec` of the command line. A named data set is first looked for under the run's data root.

        Raises DataError where there are no such images.
        """

        def opened(root: str | Path | None, download: bool) -> ImageSource:
            return open_images(spec, split=split, data_root=root, download=download, image_shape=image_shape)

        if self.data_root is not None or self.memory is None or known_data_set(spec) is None:
            return opened(self.data_root, self.download)
        for root in self.memory.roots:
            with contextlib.suppress(DataError):
                return opened(root, download=False)
        try:
            return opened(None, self.download)
        except DataError as error:
            looked = "".join(f"; nor is it in {root}" for root in self.memory.roots)
            raise DataError(f"{error}{looked}") from error

    def own(self, *splits: Split, otherwise: Callable[[], str], shape: Shape) -> list[ImageSource]:
        """Open splits of the images recorded in the run, with a remark; without a record, those that `otherwise` names.

        Raises DataError where the recorded images are no longer found, and whatever `otherwise` raises.
        """
        if self.memory is None:
            spec = otherwise()
            click.echo(f"images: {spec}, which its record names (--data takes others)", err=True)
            return [self.typed(spec, split=split, image_shape=shape) for split in splits]
        found = [self.memory.open(split, data_root=self.data_root, download=self.download) for split in splits]
        origin = found[0].origin
        where = "" if origin is None or origin.root is None else f" under {origin.root}"
        click.echo(f"images: {found[0].name}{where}, as {self.memory.folder} remembers them", err=True)
        for source in found:
            say_remarks(source)
        return found

    def training(self, spec: str | None, *, otherwise: Callable[[], str], shape: Shape) -> ImageSource:
        """Open the training images `spec` of the command line, or those of `own` where it names none."""
        if spec is not None:
            return self.typed(spec, split="train", image_shape=shape)
        return self.own("train", otherwise=otherwise, shape=shape)[0]

    def held_out(self, *, otherwise: Callable[[], str], shape: Shape, option: str = "--data") -> list[ImageSource]:
        """The test and the training images of `own`; `option` is the option by which a user names other images.

        Raises ConfigurationError where the two are the same images, because results on its training images would
        flatter a prior.
        """
        test, train = self.own("test", "train", otherwise=otherwise, shape=shape)
        if self.memory is not None and test.fingerprint() == train.fingerprint():
            raise ConfigurationError(
                f"{test.name} has no test split: its images are those that the prior was trained on. For held-out ones "
                f"pass {option} with other images; {option} {test.name} measures on these all the same, and says so"
            )
        return [test, train]
