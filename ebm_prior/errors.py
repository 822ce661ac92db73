"""The errors a user can meet. Each message says what was expected, what was found, and what to do."""


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


class CheckpointError(EbmPriorError):
    """A weights file is missing, damaged, unsafe, or not of the format asked for."""


class BackboneMismatchError(EbmPriorError):
    """A prior was trained on another backbone than the one it was given."""


class UnknownBackboneError(EbmPriorError):
    """No adapter is registered under the name."""


class ContractError(EbmPriorError):
    """An adapter breaks the backbone contract; the message names the mistake."""


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
