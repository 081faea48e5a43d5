"""All states of a sample as one page that plays them; trajectory.html is its template."""

import html
import itertools
import json
import os
import re
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from sedd_jax.inference.trajectory import State, encodable

PAUSE = 0.1  # seconds between two updates of a notebook's output, at least


@dataclass(eq=False)
class Animation:
    """The states of one call of sampling as a page that plays them.

    Batches that came one after the other are put together, state by state.
    """

    states: list[State]
    title: str | None = None
    cell: int | None = None  # the notebook's cell whose output shows it already

    def __post_init__(self):
        self.states = _together(self.states)

    @cached_property
    def html(self) -> str:
        """The page: one file, that needs no network and runs nothing found in a text."""
        template = (
            resources.files("sedd_jax.inference").joinpath("trajectory.html").read_text("utf-8")
        )
        content = {
            "@TITLE@": html.escape(self.title or "From noise to text"),
            "@FILM@": _script_safe({"title": self.title, **_changes(self.states)}),
        }
        page = re.sub("@TITLE@|@FILM@", lambda found: content[found.group()], template)
        return encodable(page)

    def save(self, path: str | Path) -> Path:
        """Writes the page to `path`, whole or not at all, in place of what is there."""
        path = Path(path)
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            part.write_text(self.html, encoding="utf-8")
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
        return path

    def _repr_html_(self) -> str:
        return (  # in a div, for IPython warns of a frame alone
            f'<div><iframe srcdoc="{html.escape(self.html)}" title="Animation" '
            'style="width:100%;height:420px;border:0"></iframe></div>'
        )

    def _ipython_display_(self) -> None:
        from IPython import get_ipython
        from IPython.display import HTML, display

        if self.cell is None or self.cell != get_ipython().execution_count:
            display(HTML(self._repr_html_()))

    def __repr__(self) -> str:
        n, length = np.shape(self.states[0].tokens)
        return f"Animation of {len(self.states)} states: {n} x {length} tokens"


def show(
    states: Iterable[State],
    *,
    title: str | None = None,
    path: str | Path | None = None,
    live: bool = True,
) -> Animation:
    """The film of `states`, which are shown in a notebook while they come.

    Args:
      states: of one call: SEDD.stream's, or a list. A list is not shown while it is gone through.
      title: what stands above the text.
      path: a file to write the page to as well.
      live: whether to show the states in a notebook's output; elsewhere nothing is shown.

    Raises:
      ValueError: no states, states of different shapes, or a path in no folder.
    """
    if path is not None and not Path(path).absolute().parent.is_dir():
        raise ValueError(f"no folder for the page {str(path)!r}; make it, or give another path")
    screen = _Screen() if live and not isinstance(states, list | tuple) and _in_notebook() else None
    seen = []
    for state in states:
        seen.append(state)
        if screen is not None:
            screen.update(state)
    film = Animation(seen, title)
    if path is not None:
        film.save(path)
    if screen is not None:
        screen.close(film)
    return film


class _Screen:
    """One output of a notebook's cell, updated in place."""

    def __init__(self):
        from IPython.display import HTML, display

        self._html = HTML
        self._handle = display(HTML(""), display_id=True)
        self._last = -PAUSE

    def update(self, state: State) -> None:
        now = time.monotonic()
        if now - self._last >= PAUSE:
            self._handle.update(self._html(state._repr_html_()))
            self._last = now

    def close(self, film: Animation) -> None:
        """Puts the film in its place, which then need not be shown again at the cell's end."""
        from IPython import get_ipython

        self._handle.update(self._html(film._repr_html_()))
        film.cell = get_ipython().execution_count


def _in_notebook() -> bool:
    """Whether this process is a notebook's kernel: then IPython is imported already."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return getattr(shell, "kernel", None) is not None


def _together(states: Iterable[State]) -> list[State]:
    """States of all samples from the states of one batch, of the next, and so on."""
    batches: list[list[State]] = []
    for state in states:
        if not batches or state.step <= batches[-1][-1].step:
            batches.append([])
        batches[-1].append(state)
    if not batches:
        raise ValueError("0 states make no film; give those of SEDD.stream")
    kinds = {tuple(state.step for state in batch) for batch in batches}
    shapes = {np.shape(state.tokens)[1] for batch in batches for state in batch}
    counts = {len({len(state.tokens) for state in batch}) for batch in batches}
    if len(kinds) > 1 or len(shapes) > 1 or counts != {1}:
        raise ValueError(
            f"{len(states)} states differ in their steps, samples or lengths; give those of one "
            "call of SEDD.stream"
        )
    if len(batches) == 1:
        return batches[0]
    return [
        replace(
            group[0],
            tokens=np.concatenate([state.tokens for state in group]),
            is_known=np.concatenate([state.is_known for state in group]),
        )
        for group in zip(*batches)
    ]


def _changes(states: list[State]) -> dict[str, Any]:
    """The states as JSON: the first of each text, and what every later state changes in it.

    {"vocab_size", "steps": [step of each state], "of", "table": [[id, text]], "samples":
    [{"known": "0110...", "first": [L entries of table], "changes": [[gap, entry, gap, entry...]]}]}
    where the first gap of a state counts from position 0, the others from the place before.
    """
    table: dict[tuple[int, str], int] = {}
    samples = []
    for n in range(len(states[0].tokens)):
        rows = [np.asarray(state.tokens[n]) for state in states]
        entries = [_entries(states[0], rows[0], table)]
        changes = []
        for before, row in itertools.pairwise(rows):
            same = np.array_equal(before, row)
            entries.append(entries[-1] if same else _entries(states[0], row, table))
            places = np.flatnonzero(entries[-1] != entries[-2])
            gaps = np.diff(places, prepend=0)
            changes.append(np.stack([gaps, entries[-1][places]], axis=1).ravel().tolist())
        known = "".join("01"[known] for known in states[-1].is_known[n].tolist())
        samples.append({"known": known, "first": entries[0].tolist(), "changes": changes})
    return {
        "vocab_size": states[0].tokenizer.vocab_size,
        "steps": [state.step for state in states],
        "of": states[-1].steps,
        "table": list(table),
        "samples": samples,
    }


def _entries(state: State, row: np.ndarray, table: dict[tuple[int, str], int]) -> np.ndarray:
    pairs = zip(row.tolist(), state.tokenizer.pieces(row))
    return np.array([table.setdefault(pair, len(table)) for pair in pairs])


def _script_safe(value: Any) -> str:
    """JSON that ends no <script> and begins no comment in one, whatever texts it holds."""
    text = json.dumps(value, separators=(",", ":"))  # ASCII, so U+2028 is escaped too
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
