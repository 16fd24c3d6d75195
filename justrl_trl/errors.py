"""Errors that this package raises on purpose.

Their message names the value, the reason and the remedy, and the user sees it as one paragraph without a traceback
(`terminal.report_errors`). Every other exception is a bug, or the machine's, and keeps its traceback.
"""


class JustRLError(Exception):
    """Base class of all errors raised on purpose."""


class ConfigError(JustRLError, ValueError):
    """An option, a recipe key or this machine does not allow the run."""


class DataError(JustRLError, ValueError):
    """A dataset or a file cannot be used as it is."""


class ServerError(JustRLError, RuntimeError):
    """A rollout server could not be started, reached or used."""


class StoppedByRankZero(JustRLError, RuntimeError):
    """Rank 0 failed and reports the error; this rank has nothing to add."""
