"""The errors that a user can act on; `exits.run` prints each as one line and turns it into an exit code."""


class InputError(ValueError):
    """A configuration, path or file that cannot work (exit code 2). The message is one full line.

    Attributes:
      shared: whether all of several processes raise it at the same point.
    """

    shared = False


class RunError(RuntimeError):
    """An error that ends a run that had begun (exit code 1). The message is one full line.

    Attributes:
      shared: whether all processes of the run raise it at the same point.
    """

    shared = False


class NonFiniteError(RunError):
    """A loss or gradient became NaN or infinite; nothing of that step was kept."""


class StorageError(RunError):
    """A file of the run could not be written; the checkpoints that are complete were left as they are."""


class DataError(RunError):
    """The next batch does not come: the workers that prepare it hang or have died."""


def require(condition: bool, message: str) -> None:
    """Raises InputError with the message unless the condition holds."""
    if not condition:
        raise InputError(message)


def one_line(error: Exception) -> str:
    """What an error says, without line breaks."""
    return " ".join(str(error).split())
