"""What it costs to be told what there is: `ebm-prior --help`, in CPU-seconds.

python tests/benchmarks/startup.py --rounds 20 --json out.json

More than 0.4 CPU-seconds is too much, and ends it with exit code 1.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys

from measure import arguments, report

MOST = 0.4
PROGRAMS = {
    "python": "",
    "import ebm_prior": "import ebm_prior",
    "ebm-prior --help": "from ebm_prior.cli.main import main; main(['--help'], standalone_mode=False)",
    "ebm-prior fit --help": "from ebm_prior.cli.main import main; main(['fit', '--help'], standalone_mode=False)",
}


def seconds(program: str) -> float:
    """CPU-seconds of a process of its own, user and system together."""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"python -c {program!r} failed")
    return used.ru_utime + used.ru_stime


def main() -> None:
    options = arguments(__doc__, rounds=10)
    taken: dict[str, list[float]] = {name: [] for name in PROGRAMS}
    for _ in range(options.rounds):  # interleaved, so that all meet the same machine
        for name, program in PROGRAMS.items():
            taken[name].append(seconds(program))
    rows = [{"program": name, "CPU-seconds": statistics.median(each)} for name, each in taken.items()]
    report("Starting", rows, options.json)
    if (median := statistics.median(taken["ebm-prior --help"])) > MOST:
        raise SystemExit(f"ebm-prior --help takes {median:.2f} CPU-seconds, more than {MOST}")


if __name__ == "__main__":
    main()
