"""Images per second: `sample` through the unfolded backbone ("plain") and the folded one, and the published loop.

python tests/benchmarks/sample.py --size bundled --images 64 --json out.json
"""

from __future__ import annotations

from functools import partial

from measure import STEP_SIZE, Plain, arguments, interleaved, network, paper_heads, report, unfolded

from ebm_prior.compute.randomness import derived_generator
from ebm_prior.model.energy import EnergyConfig
from ebm_prior.model.prior import ANCESTRAL, EBMPrior
from ebm_prior.model.samplers import SamplerConfig

LANGEVIN = "chains of 40, Langevin"
SAMPLERS = {
    "ancestral": ANCESTRAL,
    "default": SamplerConfig(),
    LANGEVIN: SamplerConfig(proposals=1, kernel="langevin", steps=40, step_size=STEP_SIZE),
}


def main() -> None:
    options = arguments(__doc__, size=["bundled"], images=64, rounds=3)
    rows = []
    for size in options.size:
        backbone = network(size)
        energy = paper_heads(backbone, EnergyConfig(joint=0))
        priors = {"plain": EBMPrior(unfolded(backbone), energy), "ours": EBMPrior(backbone, energy)}
        for sampler, config in SAMPLERS.items():
            runs = {n: lambda p=p, c=config: p.sample(options.images, sampler=c) for n, p in priors.items()}
            if sampler == LANGEVIN:
                published = Plain(backbone, energy, fused=False)
                runs["published"] = partial(published.sample, options.images, config.steps, derived_generator(0))
            rates = {name: options.images / seconds for name, seconds in interleaved(runs, options.rounds).items()}
            for name, rate in rates.items():
                row = {"size": size, "images": options.images, "sampler": sampler, "path": name, "images/s": rate}
                rows.append({**row, "ours / this": rates["ours"] / rate})
    report("Sampling, image head included", rows, options.json)


if __name__ == "__main__":
    main()
