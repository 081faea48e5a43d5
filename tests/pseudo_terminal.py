"""A command in a real pseudo-terminal of 80 columns, and what a person would read there."""

import fcntl
import itertools
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import NamedTuple

from conftest import QUICK

COLUMNS, ROWS = 80, 24
CONTROL = re.compile(r"\x1b\[([\d;]*)([A-Za-z])|[\r\n\b]|[^\x1b\r\n\b]")


class Capture(NamedTuple):
    """What a command wrote: pieces with the second of each, and its exit status."""

    pieces: list[tuple[float, str]]
    status: int

    @property
    def text(self) -> str:
        return "".join(piece for _, piece in self.pieces)

    @property
    def screen(self) -> str:
        """What is on an endless screen in the end."""
        return "\n".join(draw(self.text))

    @property
    def longest_silence(self) -> float:
        times = [0.0, *(second for second, _ in self.pieces)]
        return max(b - a for a, b in itertools.pairwise(times))


def draw(text: str) -> list[str]:
    """The lines of a terminal, as many as it takes, after it was sent the text.

    A character after the last column wraps to the next line.
    """
    lines, row, column = [[]], 0, 0
    for match in CONTROL.finditer(text):
        character, number = match[0], int(match[1] or 0) if match[2] and match[1].isdigit() else 0
        if match[2] == "A" or match[2] == "F":
            row, column = max(0, row - max(number, 1)), column if match[2] == "A" else 0
        elif match[2] == "K":
            del lines[row][column:]
        elif match[2] == "J":
            del lines[row][column:], lines[row + 1 :]
        elif match[2]:
            continue  # a style
        elif character == "\r":
            column = 0
        elif character == "\b":
            column = max(0, column - 1)
        elif character == "\n":
            row += 1
        else:
            if column == COLUMNS:
                row, column = row + 1, 0
            while len(lines) <= row:
                lines.append([])
            lines[row] += " " * (column + 1 - len(lines[row]))
            lines[row][column] = character
            column += 1
        while len(lines) <= row:
            lines.append([])
    return ["".join(line).rstrip() for line in lines]


def in_terminal(folder: Path, *arguments: str, **environment: str) -> Capture:
    """Runs `python -m sedd_jax ARGUMENTS` in the folder, in such a terminal, on one CPU device."""
    outer, inner = pty.openpty()
    fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    inherited = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR")}
    command = [sys.executable, "-m", "sedd_jax", *arguments]
    variables = {**inherited, "XLA_FLAGS": QUICK, "TERM": "xterm-256color", **environment}
    began = time.monotonic()
    with subprocess.Popen(
        command, stdin=inner, stdout=inner, stderr=inner, env=variables, cwd=folder
    ) as process:
        os.close(inner)
        pieces, rest = [], b""
        while True:
            try:
                data = os.read(outer, 65536)
            except OSError:  # nobody has the other end open any more
                break
            if not data:
                break
            rest += data
            whole = rest.decode("utf-8", "ignore")
            rest = rest[len(whole.encode()) :]
            pieces.append((time.monotonic() - began, whole))
        os.close(outer)
    return Capture(pieces, process.returncode)
