"""The errors a user can act on; `main` prints each as one line and turns it into an exit code."""


class InputError(ValueError):
    """A configuration, path or file that cannot work (exit code 2). The message is one full line."""


class NonFiniteError(RuntimeError):
    """A loss or gradient became NaN or infinite (exit code 1); nothing of that step was kept."""
