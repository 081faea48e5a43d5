"""What the commands say on standard error."""

import logging
import sys


def say(name: str, error: Exception, status: int) -> int:
    print(f"{name}: error: {' '.join(str(error).split())}", file=sys.stderr)
    return status


class _ToStandardError(logging.StreamHandler):
    """Writes to what sys.stderr is when the message comes: a notebook or a test may replace it."""

    @property
    def stream(self):
        return sys.stderr

    @stream.setter
    def stream(self, _):
        pass


def log_plainly() -> None:
    """The package's own messages as plain lines on standard error."""
    logger = logging.getLogger("sedd_jax")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    if not logger.handlers:
        handler = _ToStandardError()
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
