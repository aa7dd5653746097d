"""The errors that a user can act on; the command line prints them as one sentence, without a traceback."""

USAGE_ERROR, FAILURE, INTERRUPTED, PIPE_CLOSED = 2, 1, 130, 141  # exit codes; from 128 on a signal's number is in it


class RunError(Exception):
    """A run cannot start or go on, for a reason its message states together with the remedy.

    shared   every rank of a run on several ranks ends with this very sentence, so that one of them says it
    """

    def __init__(self, message: str, *, shared: bool = False) -> None:
        super().__init__(message)
        self.shared = shared


class ImageError(RunError):
    """An image source is missing, empty, broken or of no use for the run."""


class CheckpointError(RunError):
    """A checkpoint is missing, damaged, or belongs to another run."""
