"""The `ebm-prior` command group: commands in sections, each imported when it is called; errors as exit codes."""

from __future__ import annotations

import errno
import io
import sys
from collections.abc import Mapping
from importlib import import_module
from typing import Any, NamedTuple

import click

from ebm_prior.errors import DivergenceError, EbmPriorError
from ebm_prior.plain import printable

WORDS = "ebm_prior.words"  # key, in click's context, of the words that were typed


class Entry(NamedTuple):
    """A command before it is imported."""

    place: str  # "module:function" in this room
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

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The sections of commands, one line each."""
        for title, commands in self.sections.items():
            with formatter.section(title):
                formatter.write_dl([(name, entry.help) for name, entry in commands.items()])

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        """Click's context, which also remembers the words that were typed: results say which command made them."""
        in_any_encoding()
        words = list(args)
        context = super().make_context(info_name, args, parent, **extra)
        context.meta[WORDS] = words
        return context

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; exit code 3 where training diverged, 1 at any other stated error."""
        try:
            return super().invoke(ctx)
        except DivergenceError as error:
            complain(f"diverged: {error}")
            ctx.exit(3)
        except EbmPriorError as error:
            complain(f"error: {error}")
            ctx.exit(1)
        except OSError as error:  # a disk or path of which no command has more to say
            if error.errno == errno.EPIPE:  # whoever read stdout has had enough, of which click says nothing
                raise
            complain(f"error: {error}")
            ctx.exit(1)


def in_any_encoding() -> None:
    """What stdout and stderr cannot encode, an ε or … in Latin-1, is printed as its number, and breaks nothing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace")


def complain(text: str) -> None:
    """One line on stderr; of several processes each has its own."""
    text = printable(" ".join(text.splitlines()))  # parts of it may come from files
    processes = click.get_current_context().find_root().obj  # Processes, or None before they are connected
    if processes is None or processes.first:
        click.echo(f"ebm-prior: {text}", err=True)
    else:  # whose sys.stderr leads nowhere
        click.echo(f"ebm-prior: process {processes.rank} of {processes.count}: {text}", file=sys.__stderr__)
