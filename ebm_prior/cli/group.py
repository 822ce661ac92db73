"""The `ebm-prior` command group: commands in sections, each imported when it is called; errors as exit codes."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import shlex
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import click

from ebm_prior.compute.stopping import begun, stoppable
from ebm_prior.errors import DivergenceError, EbmPriorError, ProcessError, SettingError, Stopped
from ebm_prior.plain import printable

NOTICED = 1.0  # seconds within which the end of another process is noticed
WORDS = "ebm_prior.words"  # key in click's context: the words of the command line
SHARED_WORK = "ebm_prior.shared_work"  # key in click's context: what ends with the command, and sees its error
RUN_FOLDER = "ebm_prior.run"  # key in click's context: the folder of the run that the command has begun


class Entry(NamedTuple):
    """A command before it is imported."""

    place: str  # "module:function" in ebm_prior.cli
    help: str  # one line for the list of commands


class Group(click.Group):
    """Lists its commands without importing them, and turns errors into one line on stderr and an exit code."""

    def __init__(self, *arguments: Any, sections: Mapping[str, Mapping[str, Entry]], **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.sections = sections
        self.entries = {name: entry for section in sections.values() for name, entry in section.items()}

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All names, section by section."""
        return list(self.entries)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of that name, imported now."""
        if cmd_name not in self.entries:
            return None
        module, function = self.entries[cmd_name].place.split(":")
        command: click.Command = getattr(import_module(f"ebm_prior.cli.{module}"), function)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command that was typed, imported; from here on there is something to put in order at a signal."""
        found = super().resolve_command(ctx, args)
        begun()
        return found

    def _option(self, ctx: click.Context, setting: str) -> str:
        """The option of the command at work that gives a setting; its name where there is none."""
        command = self.get_command(ctx, ctx.invoked_subcommand or "")
        options = [each for each in command.params if each.name == setting] if command else []
        return max(options[0].opts, key=len) if options else setting

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The sections of commands, one line each."""
        for title, commands in self.sections.items():
            with formatter.section(title):
                formatter.write_dl([(name, entry.help) for name, entry in commands.items()])

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        """Click's context, which also keeps the words of the command line, since results record their command."""
        in_any_encoding()
        words = list(args)
        context = super().make_context(info_name, args, parent, **extra)
        context.meta[WORDS] = words
        return context

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; exit code 3 where training diverged, 1 at any other stated error, 128 + n at signal n."""
        try:
            with stoppable(partial(_say_that_it_will_stop, ctx)), contextlib.ExitStack() as shared:
                ctx.meta[SHARED_WORK] = shared
                return super().invoke(ctx)
        except Stopped as stopped:
            if getattr(ctx.obj, "first", True):  # of several processes, all of which have stopped after the same step
                complain(_way_on(ctx, stopped))
            ctx.exit(128 + stopped.signal)
        except DivergenceError as error:
            complain(f"diverged: {error}")
            ctx.exit(3)
        except SettingError as error:
            complain(f"error: {self._option(ctx, error.name)} {error.says}")
            ctx.exit(1)
        except EbmPriorError as error:
            if not (isinstance(error, ProcessError) and error.repeated):
                complain(f"error: {error}")
            ctx.exit(1)
        except OSError as error:  # a disk or path error that the command itself has not explained
            if error.errno == errno.EPIPE:  # whoever read stdout has had enough, of which click says nothing
                raise
            complain(f"error: {error}")
            ctx.exit(1)


def in_any_encoding() -> None:
    """Let stdout and stderr print a character that their encoding lacks (ε in Latin-1, say) as its escaped number."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace")


def complain(text: str) -> None:
    """Print one line on stderr. Each of several processes prints its own line."""
    text = printable(" ".join(text.splitlines()))  # parts of it may come from files
    processes = click.get_current_context().find_root().obj  # Processes, or None before they are connected
    if processes is None or processes.first:
        click.echo(f"ebm-prior: {text}", err=True)
    else:  # `silence` has redirected sys.stderr in the other processes
        click.echo(f"ebm-prior: process {processes.rank} of {processes.count}: {text}", file=sys.__stderr__)


def resume_command(words: Sequence[str], folder: object, processes: int = 1) -> str:
    """The command that goes on with a run in `folder`, from the `words` that began it."""
    kept, skip = list[str](), False
    for word in words:
        if not skip and word not in ("--resume", "--overwrite", "--out") and not word.startswith("--out="):
            kept.append(word)
        skip = not skip and word == "--out"
    threads = os.environ.get("OMP_NUM_THREADS")  # the result depends on it to the last bit
    program = ["ebm-prior"]
    if processes > 1:
        program = ["torchrun", *_launch(processes), "-m", "ebm_prior"]
    command = shlex.join([*program, *kept, "--resume", "--out", str(folder)])
    return f"OMP_NUM_THREADS={shlex.quote(threads)} {command}" if threads else command


def _launch(processes: int) -> list[str]:
    """The options by which torchrun starts as many processes on as many machines as now."""
    nodes = int(os.environ.get("GROUP_WORLD_SIZE", "1"))
    if nodes == 1:
        return ["--standalone", "--nproc-per-node", str(processes)]
    place = f"{os.environ.get('MASTER_ADDR', 'HOST')}:29400"
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", place]
    return ["--nnodes", str(nodes), "--nproc-per-node", str(processes // nodes), *meeting]


def _way_on(ctx: click.Context, stopped: Stopped) -> str:
    """The line for a user who has stopped a command: what was saved, and the command that continues."""
    folder = ctx.meta.get(RUN_FOLDER)
    if folder is None or not (folder / "config.json").exists():
        return "stopped"
    what = "at once" if stopped.saved is None else f"after iteration {stopped.saved}, which is saved"
    return f"stopped {what}. Go on with: {resume_command(ctx.meta[WORDS], folder, getattr(ctx.obj, 'count', 1))}"


def _say_that_it_will_stop(ctx: click.Context) -> None:
    """Tell the user that the command will stop: of several processes a moment later, unless one of them has ended.

    In that case torchrun stops the others, and the user is told of the loss instead.
    """
    if sys.stderr is not sys.__stderr__:  # it is caught, or this is one of the other processes, which say nothing
        return
    if getattr(ctx.obj, "count", 1) == 1:
        _say_now()
        return
    later = threading.Timer(NOTICED, _say_now, [lambda: ctx.obj.lost is None])
    later.daemon = True
    later.start()


def _say_now(still: Callable[[], bool] = lambda: True) -> None:
    """Say that the command will stop, if it `still` will. Unbuffered: a signal can interrupt a buffered write."""
    if not still():
        return
    with contextlib.suppress(OSError):
        os.write(2, b"\nebm-prior: stopping when this step is done and saved; Ctrl-C again stops at once\n")
