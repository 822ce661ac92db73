"""The command line: `ebm-prior COMMAND`. The commands that train, that read a prior,
and that remake experiments have a module each.

Results go to stdout (`--json` for machines), progress and remarks to stderr.
Exit codes: 0 done, 1 a stated error, 2 usage, 3 diverged.
"""

from __future__ import annotations

import click

import ebm_prior
from ebm_prior.cli import experiments, inspect, outliers, train, use
from ebm_prior.cli.allocator import keep_freed_memory
from ebm_prior.cli.shared import (
    SHARED,
    Group,
    silence,
)
from ebm_prior.compute.parallel import launched
from ebm_prior.errors import ConfigurationError


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(ebm_prior.__version__)
def main() -> None:
    """Better samples and scores from a pretrained hierarchical VAE, by an energy-based prior trained on top of it.

    Start with `ebm-prior demo`. With a backbone of your own: `fit`, then `sample` and `eval`, which several processes
    share: torchrun --nproc-per-node 2 -m ebm_prior fit …
    """
    keep_freed_memory()
    context = click.get_current_context()
    processes = context.obj = context.with_resource(launched())
    if processes.count > 1 and context.invoked_subcommand not in SHARED:
        raise ConfigurationError(
            f"several processes share {', '.join(SHARED)}; {context.invoked_subcommand} runs in one: leave out torchrun"
        )
    if not processes.first:
        context.with_resource(silence())


for command in (
    train.fit,
    use.sample,
    use.evaluate,
    outliers.ood,
    outliers.anomaly,
    use.show,
    train.pretrain,
    train.train,
    experiments.anomalies,
    experiments.ablation,
    experiments.two_dimensions,
    train.classifier,
    inspect.report,
    inspect.doctor,
    inspect.info,
    inspect.convert,
    inspect.demo,
    inspect.backbones,
):
    main.add_command(command)
