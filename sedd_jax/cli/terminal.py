"""A state as lines for a terminal, redrawn in place."""

import itertools
import os
import shutil
import time
from typing import TextIO

import numpy as np

from sedd_jax.inference.frames import Cell, wrap
from sedd_jax.inference.trajectory import State


def screenful(state: State, columns: int, lines: int) -> list[str]:
    """The first text as lines for a terminal: masks dim, known tokens underlined, unless NO_COLOR
    is set (no-color.org).

    At most `lines` lines of `columns` columns; control characters show as "·".
    """
    dim, underlined = ("", "") if os.environ.get("NO_COLOR") else ("2", "4")
    kinds = zip(state.pieces[0], state.is_masked[0].tolist(), np.asarray(state.is_known)[0])
    cells = [
        Cell(character, dim if masked else underlined if known else "", position)
        for position, (piece, masked, known) in enumerate(kinds)
        for character in piece
    ]
    wrapped = list(itertools.islice(wrap(cells, columns), lines + 1))
    styled = [
        "".join(
            f"\x1b[{style}m{text}\x1b[0m" if style else text
            for style, run in itertools.groupby(line, key=lambda cell: cell.kind)
            for text in ["".join(cell.character for cell in run)]
        )
        for line in wrapped[:lines]
    ]
    return [*styled[:-1], "..."] if len(wrapped) > lines else styled


class TerminalView:
    """The lines of a terminal in which each state replaces the one before, not too fast to see."""

    SECONDS = 0.1  # that a state is shown at least: 64 take 6 s

    def __init__(self, terminal: TextIO):
        self._terminal, self._lines = terminal, 0
        self._next = 0.0  # the time from which another state may be drawn

    def draw(self, state: State) -> None:
        """Shows the first text of `state` and its step."""
        time.sleep(max(0.0, self._next - time.monotonic()))
        self._next = time.monotonic() + self.SECONDS
        columns, rows = shutil.get_terminal_size()
        lines = screenful(state, columns - 1, max(1, rows - 3))
        head = state.caption(0)
        self._terminal.write(self._home() + "\n".join([head, *lines, ""]))
        self._terminal.flush()
        self._lines = 1 + len(lines)

    def close(self) -> None:
        """Leaves the terminal as it was."""
        self._terminal.write(self._home())
        self._terminal.flush()

    def _home(self) -> str:
        return f"\x1b[{self._lines}F\x1b[J" if self._lines else ""
