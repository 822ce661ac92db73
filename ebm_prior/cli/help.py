"""Help that fits on a screen: --help shows the options that matter most, --help-all shows every option in sections."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

OPTIONS = "Options"
_ALL = "ebm_prior.help_all"  # key in click's context: whether --help-all was given


class Option(click.Option):
    """An option that belongs to a section of the help."""

    def __init__(self, *arguments: Any, section: str = OPTIONS, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.section = section


class Command(click.Command):
    """A click command with two kinds of help: --help shows the options named in `first`, --help-all every option.

    Args:
        first: names of the command function's parameters. If it is empty, --help shows everything.

    Raises:
        ValueError: where the command has no parameter of such a name.
    """

    def __init__(self, *arguments: Any, first: Sequence[str] = (), **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        unknown = set(first) - {parameter.name for parameter in self.params}
        if unknown:
            raise ValueError(f"{self.name}: no option {', '.join(sorted(unknown))}")
        self.first = tuple(first)
        if self.first:
            self.params.append(
                Option(
                    ["--help-all"],
                    is_flag=True,
                    is_eager=True,
                    expose_value=False,
                    callback=_show_everything,
                    help="Show every option and exit.",
                )
            )

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, section by section."""
        everything = not self.first or ctx.meta.get(_ALL, False)
        sections: dict[str, list[tuple[str, str]]] = {OPTIONS: []}
        left_out = 0
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is None:
                continue
            if everything:
                sections.setdefault(getattr(parameter, "section", OPTIONS), []).append(record)
            elif parameter.name in (*self.first, "help", "help_all"):
                sections[OPTIONS].append(record)
            else:
                left_out += 1
        for title, records in sections.items():
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)
        if left_out:
            formatter.write_paragraph()
            formatter.write_text(f"{left_out} more options: ebm-prior {self.name} --help-all")


def _show_everything(ctx: click.Context, parameter: click.Parameter, asked: bool) -> None:
    if asked and not ctx.resilient_parsing:
        ctx.meta[_ALL] = True
        click.echo(ctx.get_help(), color=ctx.color)
        ctx.exit()
