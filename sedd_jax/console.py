"""What a terminal of 80 columns shows: progress on standard error, and wrapped lines."""

import contextlib
import sys
import textwrap
import threading
from collections.abc import Iterator

from tqdm.auto import tqdm

WIDTH = 79


@contextlib.contextmanager
def ticking(bar: tqdm) -> Iterator[tqdm]:
    """Within it, the time that a bar shows goes on each second, on a terminal."""
    if bar.disable or not sys.stderr.isatty():
        yield bar
        return
    is_over = threading.Event()

    def tick() -> None:
        while not is_over.wait(1.0):
            bar.refresh()

    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
        yield bar
    finally:
        is_over.set()
        thread.join()


@contextlib.contextmanager
def activity(name: str, is_shown: bool = True) -> Iterator[None]:
    """Within it, a terminal shows "name ... 00:03", below the bars; a log file has nothing."""
    is_shown = is_shown and sys.stderr.isatty()
    form = f"{name} ... {{elapsed}}"
    with (
        tqdm(bar_format=form, leave=False, dynamic_ncols=True, disable=not is_shown) as bar,
        ticking(bar),
    ):
        yield


def wrapped(text: str) -> list[str]:
    """The lines of a text, of at most WIDTH columns where its words allow."""
    return textwrap.wrap(text, WIDTH, break_long_words=False, break_on_hyphens=False)
