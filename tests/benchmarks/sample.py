"""Images per second of `sample` with the default sampler, through the unfolded backbone and the folded one.

python tests/benchmarks/sample.py --size bundled --images 64 --json out.json
"""

from __future__ import annotations

from measure import arguments, interleaved, network, paper_heads, report, unfolded

from ebm_prior.model.energy import EnergyConfig
from ebm_prior.model.prior import ANCESTRAL, EBMPrior
from ebm_prior.model.samplers import SamplerConfig

SAMPLERS = {"ancestral": ANCESTRAL, "default": SamplerConfig(), "chains of 40 alone": SamplerConfig(proposals=1)}


def main() -> None:
    options = arguments(__doc__, size=["bundled"], images=64, rounds=3)
    rows = []
    for size in options.size:
        backbones = {"plain": unfolded(network(size)), "ours": network(size)}
        priors = {
            name: EBMPrior(backbone, paper_heads(backbone, EnergyConfig(joint=0)))
            for name, backbone in backbones.items()
        }
        for sampler, config in SAMPLERS.items():
            runs = {n: lambda p=p, c=config: p.sample(options.images, sampler=c) for n, p in priors.items()}
            plain, ours = interleaved(runs, options.rounds).values()
            row = {"size": size, "sampler": sampler, "images": options.images}
            rates = {"plain images/s": options.images / plain, "ours images/s": options.images / ours}
            rows.append({**row, **rates, "faster": plain / ours})
    report("Sampling, image head included", rows, options.json)


if __name__ == "__main__":
    main()
