"""The published CIFAR-10 NVAE (30 groups, 128 channels, random weights): what each piece of an iteration costs.

python tests/benchmarks/published.py --batch 4 --json out.json
"""

from __future__ import annotations

import torch
from measure import Chain, arguments, interleaved, network, paper_heads, peak_bytes, report

from ebm_prior.storage.weights import count_parameters
from ebm_prior.training.objectives import mle_loss


def main() -> None:
    options = arguments(__doc__, size="published", batch=4, rounds=5)
    backbone = network(options.size)
    chain = Chain(backbone, paper_heads(backbone), options.batch)
    folded = chain.prior.backbone
    images = torch.rand(options.batch, *folded.image_shape)
    heads = paper_heads(backbone).train().requires_grad_(True)
    optimizer = torch.optim.Adam(heads.parameters(), lr=1e-4)
    z_q, z_p = (folded.sample(options.batch) for _ in range(2))

    @torch.no_grad()
    def posterior() -> None:
        folded.draw_posterior(images)

    def update() -> None:
        optimizer.zero_grad(set_to_none=True)
        mle_loss(heads(z_q), heads(z_p), penalty=0.0).backward()
        optimizer.step()

    pieces = {"Langevin step": chain.step, "posterior pass": posterior, "head update": update}
    seconds = interleaved(pieces, options.rounds)
    rows = [
        {
            "piece": name,
            "s": seconds[name],
            "s/sample": seconds[name] / options.batch,
            "peak MiB": peak_bytes(run) / 2**20,
        }
        for name, run in pieces.items()
    ]
    title = f"{count_parameters(backbone):,} parameters, heads {count_parameters(heads):,}, batch {options.batch}"
    report(title, rows, options.json)


if __name__ == "__main__":
    main()
