"""How the cost of our chains grows with the number of groups, of steps K, and with the batch.

python tests/benchmarks/growth.py --size small --json out.json
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from measure import Chain, arguments, interleaved, network, paper_heads, report


def steps(chain: Chain, count: int) -> None:
    """Run a chain for a while."""
    for _ in range(count):
        chain.step()


def main() -> None:
    options = arguments(__doc__, size=["small"], groups=[1, 2, 4, 8], steps=[1, 5, 20], batch=[1, 4, 16, 64], rounds=5)
    rows = []
    for size in options.size:
        base = network(size)
        scales = len(base.architecture["groups_per_scale"])
        cases: dict[tuple[str, int], Callable[[], object]] = {}
        for groups in options.groups:
            backbone = network(size, groups_per_scale=[groups] * scales) if size != "bundled" else base
            cases["groups per scale", groups] = _case(backbone, 8, 1)
        for count in options.steps:
            cases["steps K", count] = _case(base, 8, count)
        for batch in options.batch:
            cases["batch", batch] = _case(base, batch, 1)
        seconds = interleaved({str(key): run for key, run in cases.items()}, options.rounds)
        rows += [{"size": size, "varied": what, "value": n, "s": seconds[str((what, n))]} for what, n in cases]
    report("Langevin steps of 8 samples, K = 1 unless varied", rows, options.json)


def _case(backbone: object, batch: int, count: int) -> Callable[[], object]:
    return partial(steps, Chain(backbone, paper_heads(backbone), batch), count)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
