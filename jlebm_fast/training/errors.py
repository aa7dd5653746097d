"""The errors that a user can act on; the command line prints them as one sentence, without a traceback."""


class RunError(Exception):
    """A run cannot start or go on, for a reason its message states together with the remedy."""


class ImageError(RunError):
    """An image source is missing, empty, broken or of no use for the run."""


class CheckpointError(RunError):
    """A checkpoint is missing, damaged, or belongs to another run."""
