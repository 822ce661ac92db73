"""Images per second of `sample` in one process and in several, of one thread each, interleaved.

python tests/benchmarks/processes.py --size bundled --images 256 --processes 2 --json out.json

By the wall clock, for which the machine must have as many idle cores as processes; and by the CPU seconds of the
busiest process, which other load disturbs less: what is lost by sharing, if each had a core of its own.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from measure import arguments, network, paper_heads, report

from ebm_prior.compute.parallel import launched
from ebm_prior.model.energy import EnergyConfig
from ebm_prior.model.prior import EBMPrior
from ebm_prior.model.samplers import SamplerConfig

WORKER = "EBM_PRIOR_WORKER"  # set for the processes that torchrun starts


def seconds(options: dict[str, Any], count: int) -> tuple[float, float]:
    """Wall-clock seconds of one drawing in `count` processes, and the busiest one's of CPU; their start not counted."""
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder, "seconds")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", WORKER: json.dumps({**options, "told": str(told)})}
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
        subprocess.run([*launch, __file__], env=environment, check=True)
        wall, busiest = json.loads(told.read_text())
        return wall, busiest


def work(options: dict[str, Any]) -> None:
    """Draw, once to warm up and once for the clock."""
    torch.set_num_threads(1)
    sampler = SamplerConfig(proposals=options["proposals"], steps=options["steps"])
    backbone = network(options["size"])
    prior = EBMPrior(backbone, paper_heads(backbone, EnergyConfig(joint=0)), sampler=sampler)
    with launched() as processes:
        prior.sample(1)
        processes.map(lambda _: None, range(processes.count))  # so that all begin together
        began, worked = time.perf_counter(), time.process_time()
        prior.sample(options["images"], chunk=options["chunk"], processes=processes)
        wall, worked = time.perf_counter() - began, time.process_time() - worked
        busiest = max(processes.map(lambda _: worked, range(processes.count)))
        if processes.first:
            Path(options["told"]).write_text(json.dumps([wall, busiest]))


def main() -> None:
    options = arguments(__doc__, size=["bundled"], images=256, chunk=64, processes=2, proposals=32, steps=40, rounds=3)
    rows = []
    for size in options.size:
        given = {key: getattr(options, key) for key in ("images", "chunk", "proposals", "steps")} | {"size": size}
        times: dict[int, list[tuple[float, float]]] = {1: [], options.processes: []}
        for _ in range(options.rounds):
            for count, found in times.items():
                found.append(seconds(given, count))
        row: dict[str, Any] = {"size": size, "images": options.images, "processes": options.processes}
        for which, clock in enumerate(("wall", "CPU")):
            one, several = (statistics.median(t[which] for t in found) for found in times.values())
            row |= {f"one, images/s {clock}": options.images / one, f"all, images/s {clock}": options.images / several}
            row[f"faster, {clock}"] = one / several
        rows.append(row)
    report("Sampling in processes of one thread each", rows, options.json)


if __name__ == "__main__":
    if WORKER in os.environ:
        work(json.loads(os.environ[WORKER]))
    else:
        main()
