"""What the commands say on standard error."""

import contextlib
import logging
import sys
from collections.abc import Iterator


def say(name: str, error: Exception, status: int) -> int:
    print(f"{name}: error: {' '.join(str(error).split())}", file=sys.stderr)
    return status


@contextlib.contextmanager
def plain_log() -> Iterator[None]:
    """Within it, the package's own messages are plain lines on standard error."""
    logger = logging.getLogger("sedd_jax")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    handler = logging.StreamHandler()  # for each command: a notebook or a test replaces sys.stderr
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
