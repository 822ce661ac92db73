"""The command line: `ebm-prior COMMAND`. One module each holds the commands that train, that use a prior, that score
images, that describe files, and that remake the paper's experiments.

Results go to stdout (`--json` for machines), progress and remarks to stderr.
Exit codes: 0 done, 1 a stated error, 2 usage, 3 diverged, 130 stopped by Ctrl-C, 143 by SIGTERM.
"""

from __future__ import annotations

import click

import ebm_prior
from ebm_prior.cli.allocator import keep_freed_memory
from ebm_prior.cli.group import SHARED_WORK, Entry, Group
from ebm_prior.errors import ConfigurationError

SECTIONS = {
    "Use a prior": {
        "demo": Entry("inspect:demo", "Fit a prior to the bundled BIVA and show samples before and after."),
        "fit": Entry("fit:fit", "Train an energy-based prior on a frozen, pretrained VAE."),
        "sample": Entry("sample:sample", "Draw images from a prior."),
        "eval": Entry("use:evaluate", "Measure priors of one backbone against held-out images."),
        "likelihood": Entry("likelihood:likelihood", "Bound log Z from both sides, and log p(x) from below."),
        "report": Entry("inspect:report", "Make one HTML page of a fit."),
        "export": Entry("inspect:export", "Write a prior with a model card, to share or to publish."),
        "doctor": Entry("inspect:doctor", "Say whether a VAE has a prior hole that an energy can fill."),
        "info": Entry("inspect:info", "Describe a prior file or a backbone."),
        "backbones": Entry("inspect:backbones", "List adapters, bundled backbones and bundled priors."),
    },
    "Read images": {
        "ood": Entry("outliers:ood", "Tell outliers from images of the known kind by L^{>k} and LLR^{>k}."),
        "anomaly": Entry("outliers:anomaly", "Tell anomalies from normal images by L^{>0}."),
        "show": Entry("use:show", "Draw pictures of a prior at work."),
    },
    "Train": {
        "pretrain": Entry("train:pretrain", "Train a hierarchical VAE by its ELBO."),
        "train": Entry("train:train", "Train a generator and its energy-based prior together."),
        "classifier": Entry("train:classifier", "Train the classifier that gives the features of FD."),
        "convert": Entry("inspect:convert", "Write a backbone in ebm-prior's own form."),
    },
    "Remake the paper": {
        "anomaly-table": Entry("experiments:anomalies", "Remake Table 4: one digit held out."),
        "ablation": Entry("experiments:ablation", "Remake Tables 1 and 5 to 8: an ablation of joint training."),
        "latents-2d": Entry("experiments:two_dimensions", "Remake Figure 2: two latents in each of two layers."),
    },
}
SHARED = ("fit", "pretrain", "sample", "eval")  # commands that several processes of torchrun can share


@click.group(
    cls=Group,
    sections=SECTIONS,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(ebm_prior.__version__)
def main() -> None:
    """Better samples and scores from a pretrained hierarchical VAE, by an energy-based prior trained on top of it.

    Start with `ebm-prior demo`. With a backbone of your own: `fit`, then `sample` and `eval`, which several processes
    share: torchrun --standalone --nproc-per-node 2 -m ebm_prior fit …
    """
    from ebm_prior.cli.shared import (  # imported here because it imports torch, for which --help need not wait
        plain_remarks,
        silence,
    )
    from ebm_prior.compute.parallel import launched

    keep_freed_memory()
    context = click.get_current_context()
    context.with_resource(plain_remarks())
    processes = context.obj = context.meta[SHARED_WORK].enter_context(launched())
    if processes.count > 1 and context.invoked_subcommand not in SHARED:
        raise ConfigurationError(
            f"several processes share {', '.join(SHARED)}; {context.invoked_subcommand} runs in one: leave out torchrun"
        )
    if not processes.first:
        context.with_resource(silence())
