"""The errors a user can cause or meet. A leaf: imports no room.

Every error that reaches the command line is a `SpecdecError`: its text names the file or option,
what was found and what was expected, and the process exits with `exit_code` and no traceback.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the type alone: this stays a leaf
    from specdec.generation import Result


class SpecdecError(Exception):
    """Bad input, a broken file or a request that cannot be met.

    result: what a generation had done before this error ended it; None outside of one.
    """

    exit_code = 2
    result: "Result | None" = None


class CheckpointError(SpecdecError):
    """A model folder, its config or one of its tensors is missing, broken or of another kind."""


class PairingError(SpecdecError):
    """Draft and target do not belong together."""


class PlanError(SpecdecError):
    """The memory plan does not fit its cap, or pins and slots are out of range."""


class ExpertReadError(SpecdecError):
    """An expert could not be read from disk: a short read or an I/O error."""


class RepackError(SpecdecError):
    """A repacked folder cannot be written, is unfinished, or is not what its index says."""


class RoutingLogError(SpecdecError):
    """A routing log or a hot set cannot be read or written, or belongs to another model."""


class NonFiniteError(SpecdecError):
    """NaN or Inf in a forward pass."""


class PromptError(SpecdecError):
    """The prompt is empty, too long for the model, or its template is unusable."""


class PeerError(SpecdecError):
    """Another engine that is to be compared with is not installed or cannot load the model."""


class ResumeError(SpecdecError):
    """A file of earlier runs cannot be read, or was made under other conditions."""


class RunFileError(SpecdecError):
    """A file of runs cannot be read, is of another kind or schema, or is damaged."""


class DisagreementError(SpecdecError):
    """Two runs that must emit the same tokens did not: a bug in this engine, never bad input."""

    exit_code = 1


class OutputClosedError(SpecdecError):
    """Whoever read standard output has stopped reading. Nobody is told: it was their choice."""

    exit_code = 141  # as a shell reports a process that SIGPIPE ended
