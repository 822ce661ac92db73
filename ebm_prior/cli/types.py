"""Types of command-line arguments: non-empty paths, and priors and backbones by path or bundled name.

`require_suffix` refuses paths of results that end otherwise than a command writes them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from ebm_prior.errors import few
from ebm_prior.storage.checkpoint import bundled, bundled_priors, prior_file


class _Path(click.Path):
    """A non-empty path. An empty one, which an unset shell variable leaves, would mean the current folder."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Click's conversion. Refuses an empty string."""
        if value == "":
            self.fail("expected a path, found an empty string; the current folder is called .", param, ctx)
        return super().convert(value, param, ctx)


class _Prior(_Path):
    """The path of a prior, or the name of a bundled one."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path of the prior file that `value` names."""
        return prior_file(super().convert(value, param, ctx))

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Names of bundled priors, and files."""
        names = [CompletionItem(name) for name in bundled_priors() if name.startswith(incomplete)]
        return names + super().shell_complete(ctx, param, incomplete)


class _Backbone(click.types.StringParamType):
    """The path of a backbone (an official file or folder, or the own form), or the name of a bundled one."""

    name = "text"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Names of bundled backbones, and files."""
        names = [CompletionItem(name) for name in bundled() if name.startswith(incomplete)]
        return [*names, CompletionItem(incomplete, type="file")]


def require_suffix(out: Path, *suffixes: str, why: str = "") -> None:
    """Refuse an --out that ends in none of the `suffixes`, "" for a folder. Raises click.UsageError.

    why: the reason, for the message.
    """
    if out.suffix not in suffixes:
        named = few([suffix for suffix in suffixes if suffix], separator=" or ")
        reason = f" ({why})" if why else ""
        raise click.UsageError(f"--out must end in {named}{reason}, found {out}")


PATH = _Path(exists=False, path_type=Path)
PRIOR_FILE = _Prior(exists=False, path_type=Path)
BACKBONE_FILE = _Backbone()
