"""The errors a user can meet. Each message says what was expected, what was found, and what to do."""

from __future__ import annotations

import sys
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

    def __reduce__(self) -> tuple[type[SettingError], tuple[str, str]]:
        """For another process: an exception is otherwise made anew from its message alone."""
        return type(self), (self.name, self.says)


class CheckpointError(EbmPriorError):
    """A weights file is missing, damaged, unsafe, or not of the format asked for."""


class BackboneMismatchError(EbmPriorError):
    """A prior was trained on another backbone than the one it was given."""


class UnknownBackboneError(EbmPriorError):
    """No adapter is registered under the name."""


class ContractError(EbmPriorError):
    """An adapter breaks the backbone contract; the message names the mistake."""


class AssumptionWarning(UserWarning):
    """A file leaves something open, so the likeliest is assumed; the message says what, and how to change it."""


class DataError(EbmPriorError):
    """Images are missing, unreadable, of mixed or wrong size, or not finite; the message names the file."""


class RegimeError(EbmPriorError):
    """A function that needs a calibrated prior was given a refiner."""


class OutputError(EbmPriorError):
    """A result cannot be written, or would overwrite what was written before."""


class MemoryLimitError(EbmPriorError):
    """A command needs more memory than its device has free."""


class ProcessError(EbmPriorError):
    """Another process of the same run has ended, or cannot be reached.

    `repeated`: whether another process tells the user the same, so that the command line need not.
    """

    def __init__(self, message: str, *, repeated: bool = False) -> None:
        super().__init__(message)
        self.repeated = repeated


class DivergenceError(EbmPriorError):
    """Training or sampling diverged; the command line turns it into exit code 3.

    `kept`: the best prior, or the last good backbone, from before the divergence; None where there is none.
    """

    def __init__(self, message: str, *, kept: object = None) -> None:
        super().__init__(message)
        self.kept = kept


class Stopped(KeyboardInterrupt):
    """The user stopped the work by Ctrl-C or SIGTERM. It is no Exception, so that no handler of errors catches it.

    The command line turns it into exit code 128 + `signal`, 130 or 143. `saved`: the iteration of the saved state, from
    which the run can be resumed; None where the work stopped at once.
    """

    def __init__(self, signal: int, saved: int | None = None) -> None:
        super().__init__(f"stopped by signal {signal}")
        self.signal, self.saved = signal, saved

    def __reduce__(self) -> tuple[type[Stopped], tuple[int, int | None]]:
        """For another process, as in SettingError."""
        return type(self), (self.signal, self.saved)


# Words of the messages.


def few(names: Iterable[object], *, most: int = 10, separator: str = ", ") -> str:
    """A list of names for a message: at most `most`, each cut off at 200 characters, and the number left out."""
    every = list(names)
    first = [text if len(text := str(name)) <= 200 else f"{text[:200]}…" for name in every[:most]]
    return separator.join(first) + (f" and {len(every) - most} more" if len(every) > most else "")


def shown(value: object) -> str:
    """A value from a file for a message: the first 200 characters of its repr."""
    try:
        text = " ".join(repr(value).split())
    except (RecursionError, ValueError):  # nested too deep, or an integer too long to print
        text = f"a {type(value).__name__} too large to print"
    return text if len(text) <= 200 else f"{text[:200]}…"


def described(value: object) -> str:
    """A value as words for a message: its type, for arrays also dtype and shape, never its whole content."""
    if value is None or isinstance(value, (bool, int, float)):
        return str(value)
    if isinstance(value, type):
        return f"the class {value.__name__}"
    torch, numpy = sys.modules.get("torch"), sys.modules.get("numpy")  # imported by whoever made the value
    if torch is not None and isinstance(value, torch.Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
    if numpy is not None and isinstance(value, numpy.ndarray):
        return f"a {value.dtype} array of shape {value.shape}"
    if isinstance(value, str):
        return f"the text {value[:80]!r}"
    article = "an" if type(value).__name__[0] in "AEIOUaeiou" else "a"
    return f"{article} {type(value).__name__}"
