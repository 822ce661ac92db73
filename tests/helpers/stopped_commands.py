"""Run as a process in the tests of stopping: ebm-prior with a clock of its own.

python stopped_commands.py SECONDS WORDS…: states are saved every SECONDS, and a line is noted at every step.
"""

from __future__ import annotations

import signal
import sys

from ebm_prior.__main__ import main
from ebm_prior.training import loop

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell lets its background processes ignore
    loop.STATE_SECONDS, loop.STATE_SHARE, loop.NOTE_SECONDS = float(sys.argv[1]), 1e9, 0.0
    sys.argv[1:] = sys.argv[2:]
    main()
