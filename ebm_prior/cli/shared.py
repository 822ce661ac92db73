"""Code that the commands share: options with the same meaning everywhere, images, run folders, printed results."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shlex
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast, get_args

import click
import torch

from ebm_prior.cli.group import RUN_FOLDER, WORDS
from ebm_prior.cli.help import Option
from ebm_prior.cli.preflight import Need, require_memory
from ebm_prior.cli.types import BACKBONE_FILE, PATH, PRIOR_FILE
from ebm_prior.compute.isolation import require_numbers
from ebm_prior.compute.parallel import ALONE, Processes, own_device
from ebm_prior.data import images
from ebm_prior.data.source import ImageSource, Mode
from ebm_prior.errors import AssumptionWarning, ConfigurationError, few
from ebm_prior.model.arguments import require_calibrated
from ebm_prior.model.backbone import Backbone
from ebm_prior.model.passes import Passes
from ebm_prior.model.prior import EBMPrior
from ebm_prior.plain import all_printable
from ebm_prior.runs.watch import Watch
from ebm_prior.storage import places
from ebm_prior.storage.atomic import without_nan
from ebm_prior.storage.checkpoint import load_prior
from ebm_prior.storage.lock import owned

Command = TypeVar("Command", bound=Callable[..., Any])


DTYPES = {"float32": torch.float32, "float64": torch.float64, "bf16": torch.bfloat16}


def together(*options: Callable[[Any], Any]) -> Callable[[Command], Command]:
    """One decorator from several options, so that commands can share them."""

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


MACHINE = "Device, precision, memory"
DEVICE_NAME = click.option(
    "--device",
    cls=Option,
    section=MACHINE,
    default="cpu",
    show_default=True,
    help="Device to compute on, as PyTorch names it, e.g. cuda",
)


def passes_options(*precisions: str, cells: Sequence[Callable[[Any], Any]] = ()) -> Callable[[Command], Command]:
    """Options for how a backbone is computed; the command receives them as one argument, `passes: Passes`.

    `precisions`: choices of --precision. `cells`: which of the options CHECKPOINTING and COMPILE to add.
    """
    half = "; bf16: bfloat16 in the cells of an NVAE or VDVAE, float32 elsewhere" if "bf16" in precisions else ""
    options = [
        DEVICE_NAME,
        click.option(
            "--precision",
            "dtype",
            cls=Option,
            section=MACHINE,
            type=click.Choice(precisions),
            default="float32",
            show_default=True,
            help=f"Floating-point precision of the computation{half}",
        ),
    ]

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def with_passes(
            *, device: str, dtype: str, checkpointing: bool = False, compiled: bool = False, **given: Any
        ) -> Any:
            passes = Passes(torch_device(device), DTYPES[dtype], checkpointing, compiled)
            return command(passes=passes, **given)

        return cast(Command, together(*cells, *options)(with_passes))

    return decorate


CHECKPOINTING = click.option(
    "--checkpointing",
    cls=Option,
    section=MACHINE,
    is_flag=True,
    help="Recompute the cells of an NVAE or VDVAE in the backward pass: less memory, equal results",
)
COMPILE = click.option(
    "--compile",
    "compiled",
    cls=Option,
    section=MACHINE,
    is_flag=True,
    help="Fuse the cells of an NVAE or VDVAE with torch.compile: slower at first, then faster on a GPU",
)
PASSES = passes_options(*DTYPES, cells=(CHECKPOINTING, COMPILE))  # commands whose time and memory the chains take
PLACE = passes_options(*DTYPES)  # commands that read a prior or a backbone
PRETRAIN_PLACE = passes_options(*DTYPES, cells=(COMPILE,))
TRAINING_PLACE = passes_options("float32", "float64")  # joint training
SEED = click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of all random numbers")
RUN_SEED = click.option(
    "--seed", type=click.IntRange(0), help="Seed of all random numbers  [default: 0, or what a file of settings says]"
)
JSON = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON")
BACKBONE = together(
    click.option(
        "--backbone",
        "adapter_name",
        help="Name of the adapter that reads --ckpt (`ebm-prior backbones` lists all adapters)",
    ),
    click.option(
        "--ckpt",
        "checkpoint",
        type=BACKBONE_FILE,
        required=True,
        help="Backbone to use: an official file or folder, a converted .safetensors file, or a bundled name",
    ),
)
READING = "ebm_prior.reading"  # key in click's context: arguments of open_images from --array and --data-mode
REMARKED = "ebm_prior.remarked"  # key in click's context: the remarks on images that were already printed


def _remember_reading(context: click.Context, parameter: click.Parameter, value: str | None) -> None:
    if value is not None:
        context.meta.setdefault(READING, {})["array" if parameter.name == "array" else "mode"] = value


DATA_ROOT = together(
    click.option(
        "--data-root", type=PATH, help="Folder that holds named data sets  [default: $EBM_PRIOR_DATA, else user cache]"
    ),
    click.option("--download", is_flag=True, help="Download the named data set if it is not there yet"),
    click.option(
        "--array",
        metavar="KEY",
        expose_value=False,
        callback=_remember_reading,
        help="Key of the images in an .npz file of several arrays; --data FILE.npz:KEY says the same",
    ),
    click.option(
        "--data-mode",
        type=click.Choice(get_args(Mode)),
        expose_value=False,
        callback=_remember_reading,
        help="Convert all images to colour or to grey, for instance those of a folder that mixes both",
    ),
)
DATA_FORMS = "a folder of images, an .npz, .npy, .mat or idx file, an LMDB, or a data set's name"
DATA = together(click.option("--data", required=True, help=f"Images to use: {DATA_FORMS}"), DATA_ROOT)


def data_or(default: str) -> Callable[[Command], Command]:
    """The options of `DATA` for a command that finds images itself where --data is not given: `default` in words."""
    return together(click.option("--data", help=f"Images to use: {DATA_FORMS}  [default: {default}]"), DATA_ROOT)


PLACES = ("data", "data_root", "out", "resume", "dry_run")  # of a training: options that its help shows first
PRESET_HELP = "Name of the settings to start from; other options change single ones"
CONFIG = click.option(
    "--config", "config_file", type=PATH, help="JSON file of settings; options of the command line override it"
)
RUN = together(
    click.option("--out", type=PATH, help="Folder of the run  [default: the next free one under ./runs]"),
    click.option("--overwrite", is_flag=True, help="Replace an earlier run in --out, and start anew"),
    click.option("--resume", is_flag=True, help="Continue the run in --out from its last saved state, if it has one"),
    CONFIG,
)
WATCHING = "Watching"


def watch_options(*, preview: bool = False) -> Callable[[Command], Command]:
    """Options for watching a training; the command receives them as one argument, `watch: Watch`.

    `preview`: whether to add --preview, for trainings that do not save a picture at each evaluation anyway.
    """
    options = [
        click.option(
            "--tensorboard",
            cls=Option,
            section=WATCHING,
            is_flag=True,
            help="Also write scalars and pictures for TensorBoard",
        )
    ]
    if preview:
        text = "Save a picture of samples at each evaluation instead of every fifth"
        options.insert(0, click.option("--preview", cls=Option, section=WATCHING, is_flag=True, help=text))

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def with_watch(*, tensorboard: bool, preview: bool = False, **given: Any) -> Any:
            return command(watch=Watch(preview, tensorboard), **given)

        return cast(Command, together(*options)(with_watch))

    return decorate


def open_images(spec: str, **where: Any) -> ImageSource:
    """`ebm_prior.data.images.open_images` with --array and --data-mode; its remarks go to stderr, each once."""
    reading = click.get_current_context().meta.get(READING, {})
    source = images.open_images(spec, **reading, **where)
    say_remarks(source)
    return source


def say_remarks(source: ImageSource) -> None:
    """Print the remarks of an image source on stderr, each remark once per command."""
    meta = click.get_current_context().meta
    for remark in (f"{source.name}: {remark}" for remark in source.remarks):
        if remark not in meta.setdefault(REMARKED, set()):
            click.echo(remark, err=True)
        meta[REMARKED].add(remark)


def new_or_resumed(resume: bool, overwrite: bool) -> None:
    """Refuse --resume together with --overwrite."""
    if resume and overwrite:
        raise click.UsageError("--resume goes on with a run, --overwrite starts it anew: give one of them")


def refuse_unused(given: Mapping[str, Any], starts: tuple[str, ...], used: bool, why: str) -> None:
    """Refuse options that would have no effect: those `given` with a name that begins with one of `starts`.

    `used`: whether they have an effect, so that nothing is refused. `why`: the reason, for the error message.
    """
    names = [f"--{key.replace('_', '-')}" for key, v in given.items() if key.startswith(starts) and v is not None]
    if names and not used:
        raise click.UsageError(f"{why}: leave out {few(names)}")


def _refuse_ratios(_: click.Context, option: click.Parameter, value: str | None) -> None:
    if value is not None:
        raise click.UsageError(
            f"{option.opts[0]}: train learns by maximum likelihood alone, because a density ratio gives no gradient of "
            "log Z for the generator's own conditionals. For ratios, with or without weight of the noise: train "
            "--prior gaussian, and then fit --noise-weight M on the backbone that it writes"
        )


NO_RATIOS = together(
    *(
        click.option(name, hidden=True, expose_value=False, callback=_refuse_ratios, help="Option of fit, refused here")
        for name in ("--noise-weight", "--objective")
    )
)
"""Options of `fit` that users look for in `train` too, and the reason why it has none."""


def run_directory(out: Path | None, command: str, resume: bool) -> Path:
    """The folder of the run, from `places.run_directory`. It is printed first, so that a killed run can be resumed."""
    directory = places.run_directory(out, command, resume=resume)
    click.get_current_context().meta[RUN_FOLDER] = directory
    click.echo(f"run: {directory}", err=True)
    return directory


def opened_prior(
    path: Path,
    passes: Passes,
    *,
    checkpoint: str | None = None,
    force: bool = False,
    calibrated: bool = False,
    backbone: Backbone | None = None,
) -> EBMPrior:
    """The prior at `path`, on its own backbone or the given one; without its refiner if the `calibrated` f is to draw.

    Raises RegimeError where that is asked of a file with a refiner alone.
    """
    where: dict[str, Any] = {"checkpoint": checkpoint, "device": passes.device, "dtype": passes.dtype}
    prior = load_prior(path, backbone, force=force, **where)
    if calibrated:
        require_calibrated(prior.regime, "--calibrated")
        prior.refiner = None
    return prior


def own(folder: Path) -> None:
    """Lock a folder of results until the command ends. Raises OutputError where another process has locked it."""
    click.get_current_context().with_resource(owned(folder))


def launched_processes() -> Processes:
    """The processes that torchrun has started and `main` has connected; without torchrun, this process alone."""
    return click.get_current_context().find_object(Processes) or ALONE


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Print nothing inside the block. Of several processes only the first one prints."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield


@contextlib.contextmanager
def plain_remarks() -> Iterator[None]:
    """Inside the block, print an AssumptionWarning as one line on stderr, without the line of code that raised it."""
    usual = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        if issubclass(category, AssumptionWarning):
            click.echo(f"note: {message}", err=True)
        else:
            usual(message, category, *place, **more)

    with warnings.catch_warnings():  # which also puts showwarning back
        warnings.simplefilter("always", AssumptionWarning)
        warnings.showwarning = show
        yield


def torch_device(name: str) -> torch.device:
    """The device of this process for the option --device `name`. Raises ConfigurationError if it cannot be used."""
    try:
        require_numbers(device := torch.device(own_device(name)))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigurationError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from error
    return device


def preflight(need: Need, device: torch.device) -> None:
    """Say how much memory will be taken. Raises MemoryLimitError where it does not fit."""
    click.echo(require_memory(need, device), err=True)


def typed_command() -> str:
    """The command line of the running command, as it was typed."""
    return shlex.join(["ebm-prior", *click.get_current_context().meta[WORDS]])


def show_result(result: Any, as_json: bool, human: Callable[[Any], str]) -> None:
    """Print a result as text, made by `human`, or as JSON that also holds the command line."""
    if not as_json:
        click.echo(human(all_printable(result)))
        return
    made = {"command": typed_command()}
    marked = [made | each for each in result] if isinstance(result, list) else made | result
    click.echo(json.dumps(without_nan(marked), sort_keys=True))


RECORDED = "{help}  [default: as recorded]"


ITS_BACKBONE = together(
    click.option("--ckpt", "checkpoint", help="Path of the backbone, if it has moved since the prior was fitted"),
    click.option(
        "--force",
        is_flag=True,
        help="Use the backbone even if its weights differ from those recorded in the prior",
    ),
)
PRIOR = together(click.argument("prior", type=PRIOR_FILE), ITS_BACKBONE)
CALIBRATED = click.option(
    "--calibrated",
    is_flag=True,
    help="Let the calibrated f draw, also where the prior has a refiner that draws nearer samples",
)
