"""What a terminal of 80 columns shows: progress on standard error, and wrapped lines."""

import contextlib
import sys
import textwrap
import threading
import time
import weakref
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import tqdm.std as plain
from tqdm.auto import tqdm

WIDTH = 79
LINE_SECONDS = 15.0  # between the lines that stand for a bar in a log file


def is_terminal() -> bool:
    """Whether standard error is a terminal; not if it is closed."""
    return sys.stderr is not None and sys.stderr.isatty()


def has_lines() -> bool:
    """Whether progress goes to a log file, where a bar drawn over itself cannot be read."""
    return not is_terminal() and "ipykernel" not in sys.modules


def progress_bar(iterable: Iterable[Any] | None = None, *, is_shown: bool, **options: Any) -> tqdm:
    """A bar of tqdm, with its options; in a log file lines, none of work that is over sooner."""
    kind, is_shown = _Lines if has_lines() else tqdm, is_shown and sys.stderr is not None
    return kind(iterable, dynamic_ncols=True, disable=not is_shown, **options)


class _Lines(plain.tqdm):
    """A line at the time of a bar's update, LINE_SECONDS after the one before."""

    _instances: ClassVar = weakref.WeakSet()  # log lines need not be written around it

    def __init__(self, iterable=None, **options):
        self._line_at = time.monotonic() + LINE_SECONDS  # whatever asks for one before
        seconds = {"mininterval": LINE_SECONDS, "maxinterval": LINE_SECONDS}
        super().__init__(iterable, file=sys.stderr, **options, **seconds)

    def display(self, msg=None, pos=None) -> None:
        if time.monotonic() < self._line_at:
            return
        self._line_at = time.monotonic() + LINE_SECONDS
        values = self.format_dict
        is_scaled = self.unit_scale and max(self.n, self.total or 0) >= 1000
        size = tqdm.format_sizeof if is_scaled else str
        total = "" if self.total is None else f" of {size(self.total)}"
        done = f"{size(self.n)}{total}{_units(self.unit.strip())}"
        left = ""
        if self.total is not None and self.n and values["elapsed"]:
            seconds = values["elapsed"] * (self.total - self.n) / self.n
            left = f", {tqdm.format_interval(seconds)} left"
        postfix = f": {self.postfix}" if self.postfix else ""
        clock = time.strftime("%H:%M:%S")
        print(f"{clock} {self.desc.rstrip(': ')} {done}{left}{postfix}", file=self.fp, flush=True)

    def clear(self, nolock=False) -> None: ...

    def close(self) -> None:
        if not self.disable:
            self.disable = True
            self._decr_instances(self)


def _units(unit: str) -> str:
    """A bar's unit behind a number: "B", " batches", " steps"."""
    if unit == "B":
        return unit
    return f" {unit}{'' if unit.endswith('s') else 'es' if unit.endswith('ch') else 's'}"


@contextlib.contextmanager
def ticking(bar: tqdm) -> Iterator[tqdm]:
    """Within it, the time that a bar shows goes on each second, and a log file gets its lines
    whether the bar moves or not."""
    if bar.disable or not (is_terminal() or isinstance(bar, _Lines)):
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
    is_shown = is_shown and is_terminal()
    form = f"{name} ... {{elapsed}}"
    with (
        tqdm(bar_format=form, leave=False, dynamic_ncols=True, disable=not is_shown) as bar,
        ticking(bar),
    ):
        yield


def wrapped(text: str) -> list[str]:
    """The lines of a text, of at most WIDTH columns where its words allow."""
    return textwrap.wrap(text, WIDTH, break_long_words=False, break_on_hyphens=False)
