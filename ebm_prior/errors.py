"""The errors a user can meet. Each message says what was expected, what was found, and what to do."""

from __future__ import annotations

from collections.abc import Iterable


class EbmPriorError(Exception):
    """Base of every error that ebm-prior raises on purpose; the command line turns it into exit code 1.

    >>> try:
    ...     fit(backbone, None)
    ... except EbmPriorError as error:
    ...     print(type(error).__name__)
    DataError
    """


class ConfigurationError(EbmPriorError, ValueError):
    """An option or argument has a value that makes no sense."""


class SettingError(ConfigurationError):
    """A setting has a value out of its range; the message names it alone, and the command line its option.

    `name`: its name, after those of the configurations that hold its own, energy_channels.  `says`: the rest.
    """

    def __init__(self, name: str, says: str) -> None:
        super().__init__(f"{name} {says}")
        self.name, self.says = name, says


class CheckpointError(EbmPriorError):
    """A weights file is missing, damaged, unsafe, or not of the format asked for."""


class BackboneMismatchError(EbmPriorError):
    """A prior was trained on another backbone than the one it was given."""


class UnknownBackboneError(EbmPriorError):
    """No adapter is registered under the name."""


class ContractError(EbmPriorError):
    """An adapter breaks the backbone contract; the message names the mistake."""


class AssumptionWarning(UserWarning):
    """A file leaves something open, and the most likely is taken; the message says what, and how to say otherwise."""


class DataError(EbmPriorError):
    """Images are missing, unreadable, of mixed or wrong size, or not finite; the message names the file."""


class RegimeError(EbmPriorError):
    """A function that needs a calibrated prior was given a refiner."""


class OutputError(EbmPriorError):
    """A result cannot be written, or would overwrite what was written before."""


class MemoryLimitError(EbmPriorError):
    """A command needs more memory than its device has free."""


class ProcessError(EbmPriorError):
    """Another process of the same run has ended, or cannot be reached."""


class DivergenceError(EbmPriorError):
    """Training or sampling diverged; the command line turns it into exit code 3.

    `kept`: the best prior, or the last good backbone, from before the divergence; None where there is none.
    """

    def __init__(self, message: str, *, kept: object = None) -> None:
        super().__init__(message)
        self.kept = kept


class Stopped(KeyboardInterrupt):
    """Somebody stopped the work by Ctrl-C or SIGTERM; no error, so nothing that handles errors may take it for one.

    The command line turns it into exit code 128 + `signal`: 130 or 143. `saved`: the iteration that is kept in the
    run's state; None where the work stopped at once.
    """

    def __init__(self, signal: int, saved: int | None = None) -> None:
        super().__init__(f"stopped by signal {signal}")
        self.signal, self.saved = signal, saved


# Words of the messages.


def few(names: Iterable[object], *, most: int = 10, separator: str = ", ") -> str:
    """At most ten names, each cut off at 200 characters, and how many more there are: a network can have thousands."""
    every = list(names)
    first = [text if len(text := str(name)) <= 200 else f"{text[:200]}…" for name in every[:most]]
    return separator.join(first) + (f" and {len(every) - most} more" if len(every) > most else "")


def shown(value: object) -> str:
    """A value out of a file, in Python's notation: at most 200 characters of it."""
    try:
        text = " ".join(repr(value).split())
    except (RecursionError, ValueError):  # nested too deep, or an integer too long to print
        text = f"a {type(value).__name__} too large to print"
    return text if len(text) <= 200 else f"{text[:200]}…"
