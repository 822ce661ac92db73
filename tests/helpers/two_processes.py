"""Run by torchrun in test_parallel: commands of ebm-prior one after another, in the last of which a process dies.

python two_processes.py FILE: a JSON list of commands, each a list of words. Exit codes go to FILE.codes.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from ebm_prior.cli.main import main
from ebm_prior.compute.parallel import launched
from ebm_prior.training import fit

LAST_WORDS = 5  # iterations after which the second process is killed


def die_in_time() -> None:
    """Let the second process be killed in the midst of a fit."""
    whole = fit.Fitting.part

    def part(self: Any, *arguments: Any) -> fit.Part:
        if self.iteration == LAST_WORDS and self.processes.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(self, *arguments)

    fit.Fitting.part = part  # type: ignore[method-assign]


if __name__ == "__main__":
    faulthandler.dump_traceback_later(120, exit=True)  # processes that wait for one another would wait for long
    file = Path(sys.argv[1])
    *whole, last = json.loads(file.read_text())
    with launched() as processes:
        codes = [main(words, standalone_mode=False) or 0 for words in whole]
        file.with_suffix(f".codes{processes.rank}").write_text(json.dumps(codes))
        die_in_time()
        sys.exit(main(last, standalone_mode=False))
