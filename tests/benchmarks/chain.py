"""A chain of the published refiner with and without work that nobody reads, in CPU seconds, interleaved.

python tests/benchmarks/chain.py --size small --steps 20 --rounds 5 --json out.json

"whole": every step takes the gradient, the last one too, and log p_β(T(ε)) is differentiated with the terms that
cancel. "exact" and "published" are the two targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import product

import torch
from measure import BATCH, STEP_SIZE, arguments, interleaved, network, paper_heads, report
from torch import Tensor

from ebm_prior.compute.randomness import derived_generator
from ebm_prior.model.prior import EBMPrior
from ebm_prior.model.samplers import Kernel, Potential, langevin_step, last_langevin_step, run_chain, start


def whole(prior: EBMPrior, eps: Sequence[Tensor]) -> Tensor:
    """The published potential, log p_β(T(ε)) + ½‖ε‖² in full."""
    trace = prior.backbone.transform(eps)
    squares = torch.stack([e.square().flatten(1).sum(1) for e in eps], dim=1)
    return prior.f(trace.z, eps, trace.priors) + (trace.log_prior + 0.5 * squares).sum(1)


def chain(potential: Potential, eps: Sequence[Tensor], steps: int, *, last: Kernel | None) -> None:
    """Run a chain from ε, with another kernel for its `last` step or not."""
    settings = {"step_size": torch.full((len(eps[0]),), STEP_SIZE), "generator": derived_generator(1), "last": last}
    run_chain(langevin_step, start(potential, eps), potential, steps, **settings)


def main() -> None:
    options = arguments(__doc__, size=["small"], batch=[0], steps=20, rounds=5)
    rows = []
    for size, given in product(options.size, options.batch):
        backbone, batch = network(size), given or BATCH[size]
        eps = backbone.standard_normal(batch, generator=derived_generator(0))
        for target in ("exact", "published"):
            prior = EBMPrior(backbone, paper_heads(backbone), regime="refiner", target=target)
            before = prior.potential if target == "exact" else partial(whole, prior)
            runs = {
                "whole": partial(chain, before, eps, options.steps, last=None),
                "ours": partial(chain, prior.potential, eps, options.steps, last=last_langevin_step),
            }
            found = interleaved(runs, options.rounds)
            row = {"size": size, "batch": batch, "steps": options.steps, "target": target}
            rows.append({**row, **found, "faster": found["whole"] / found["ours"]})
    report("A Langevin chain with and without work that nobody reads, CPU seconds", rows, options.json)


if __name__ == "__main__":
    main()
