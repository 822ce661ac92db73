"""Command-line options made from configuration dataclasses, so that defaults and help texts are written only once.

A configuration starts from the dataclass's defaults or a preset; then the JSON file of --config and then the options of
the command line replace single values. Nested dataclasses become options with a prefix: --energy-channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeVar, get_args, get_origin

import click

from ebm_prior.cli.help import Option
from ebm_prior.evaluation.classifier import ClassifierConfig
from ebm_prior.settings import every_setting, require_kinds, require_seed, setting, spelled

Command = TypeVar("Command", bound=Callable[..., Any])
WORDING = "{help}  [default: {default}]"
SECTIONS = {  # beginning of an option's name -> section of --help-all
    "stage_": "Stages (density ratios one after another)",
    "energy_": "Energy heads",
    "prior_chain_": "Chains of the prior",
    "posterior_chain_": "Chains of the posterior",
    "chain_": "Chains in training (mle)",
    "sampler_": "The sampler that is recorded in the prior",
    "gauge_": "Classifier test between latents",
    "fid_": "FID",
    "annealing_": "Annealed chains, which bound log Z",
}
COLOUR = ClassifierConfig.suited((3, 32, 32))
SUITED = {
    entry.name: f"{{help}}  [default: {{default}}; for colour images {getattr(COLOUR, entry.name)}]"
    for entry in fields(ClassifierConfig)
    if getattr(COLOUR, entry.name) != getattr(ClassifierConfig(), entry.name)
}
"""Patterns of the help of settings that colour images change."""


@dataclass(frozen=True)
class Drawing:
    """Settings of a command that draws from a prior, apart from the sampler's own."""

    seed: int = setting(0, "Seed of all random numbers")

    def __post_init__(self) -> None:
        require_kinds(self)
        require_seed(self)


def config_options(
    kind: type[Any],
    *,
    skip: tuple[str, ...] = ("seed",),
    wording: Mapping[str, str] | None = None,
    also: Mapping[str, Sequence[str]] | None = None,
    section: str = "Settings",
) -> Callable[[Command], Command]:
    """Decorate a command with an option for every field of a configuration dataclass that has a help text.

    kind: the dataclass; nested dataclasses are included.  skip: names of fields that become no options.
    wording: for the beginning of an option's name, the pattern of the help text in place of `WORDING`.
    also: further spellings of an option.  section: section of --help-all for the fields of `kind` itself.
    """

    def decorate(command: Command) -> Command:
        for name, hint, entry, value in reversed(list(every_setting(kind, skip))):
            option_type = _click_type(hint)
            multiple = option_type[1] if isinstance(option_type, tuple) else 1
            said = next((text for start, text in (wording or {}).items() if name.startswith(start)), WORDING)
            click.option(
                f"--{name.replace('_', '-')}/--no-{name.replace('_', '-')}"
                if option_type is bool
                else f"--{name.replace('_', '-')}",
                *(also or {}).get(name, ()),
                name,
                type=None if option_type is bool else option_type[0] if multiple > 1 else option_type,
                nargs=multiple,
                default=None,
                cls=Option,
                section=next((title for start, title in SECTIONS.items() if name.startswith(start)), section),
                help=said.format(help=entry.metadata["help"], default=spelled(value)),
            )(command)
        return command

    return decorate


def _click_type(hint: Any) -> Any:
    if get_origin(hint) is Literal:
        return click.Choice(get_args(hint))
    if get_origin(hint) is tuple:
        return get_args(hint)[0], len(get_args(hint))
    return hint
