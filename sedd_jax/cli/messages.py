"""What the commands say on standard error."""

import contextlib
import errno
import io
import logging
import os
import re
import select
import sys
from collections.abc import Iterator
from typing import TextIO

from tqdm.auto import tqdm

from sedd_jax.host.files import shown

TIME = "%H:%M:%S"
SIGPIPE = 128 + 13  # the status of what the shell saw end by that signal
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and line feed


def say(name: str, error: Exception, status: int) -> int:
    print(f"{name}: error: {message_of(error)}", file=sys.stderr)
    return status


def message_of(error: Exception) -> str:
    """What an error says, as one line."""
    message = str(error) or type(error).__name__
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:  # with a suffix of ours
        message = f"{shown(str(error.filename))!r} is too long for a path; give a shorter one"
    return visible(" ".join(message.split()))


def visible(text: str) -> str:
    """The text with control characters, which a terminal would act on, as escapes: "\\x1b"."""
    return _CONTROLS.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


def reader_is_gone() -> bool:
    """Whether nobody reads standard output any more, as in `| head -1`."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def discard_output() -> None:
    """Drops what standard output does not take: the flush at exit would fail with it again."""
    try:
        print(end="", flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _BesideBars(logging.StreamHandler):
    """Clears the progress bars for each line, and draws them again below it."""

    def emit(self, record: logging.LogRecord) -> None:
        with tqdm.external_write_mode(file=self.stream):
            super().emit(record)


@contextlib.contextmanager
def libraries_on_stderr() -> Iterator[TextIO | None]:
    """Within it, what libraries print, as gloo and NCCL do, goes to standard error; yields standard
    output, None where it is closed."""
    if sys.stdout is None or sys.stderr is None:
        yield sys.stdout
        return
    sys.stdout.flush()
    encoding = getattr(sys.stdout, "encoding", None)  # a notebook's has none
    with open(os.dup(1), "w", encoding=encoding, errors="backslashreplace") as out:
        os.dup2(2, 1)
        try:
            yield out
        finally:
            os.dup2(out.fileno(), 1)


@contextlib.contextmanager
def plain_output(has_times: bool) -> Iterator[None]:
    """Within it, the package's own messages are plain lines on standard error, with the time of day
    if has_times, and standard output takes every character: what its encoding lacks, as é in ASCII,
    is shown as an escape.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # a notebook's is not, and takes all
        sys.stdout.reconfigure(errors="backslashreplace")
    logger = logging.getLogger("sedd_jax")
    level, propagate = logger.level, logger.propagate
    logger.setLevel(logging.INFO)
    logger.propagate = False
    handler = _BesideBars()  # for each command: a notebook or a test replaces sys.stderr
    if has_times:
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", TIME))
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate
