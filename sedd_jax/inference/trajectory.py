"""A state of sampling, as text and in a notebook, and all states as one animation: a page that
plays them, of which trajectory.html is the template, a GIF or an SVG.
"""

import html
import importlib.util
import itertools
import json
import re
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from sedd_jax.data.tokenizer import shorten
from sedd_jax.data.tokenizers import Tokenizer
from sedd_jax.host.files import local_path, replacing, write_text
from sedd_jax.inference import frames

MAX_TEXTS = 4  # of a state in a notebook's output
DEFAULT_TITLE = "From noise to text"
PAUSE = 0.1  # seconds between two updates of a notebook's output, at least


@dataclass(frozen=True, eq=False)
class State:
    """Texts in the middle of sampling: xt after `step` of `steps` reverse steps."""

    step: int
    steps: int
    tokens: np.ndarray  # int32 [N, L]
    is_known: np.ndarray  # bool [N, L]: kept, not sampled
    tokenizer: Tokenizer
    lengths: np.ndarray = None  # int [N]: tokens of each text, then 0s; left out: all L
    calls: np.ndarray | None = None  # int32 [N]: network calls that each needed so far
    # Of noise without a mask: the share of the tokens that is noised, of PLAID's of the variance
    noise_level: float | None = None

    def __post_init__(self):
        tokens, is_known = np.shape(self.tokens), np.shape(self.is_known)
        if len(tokens) != 2 or 0 in tokens or tokens != is_known:
            raise ValueError(
                f"tokens {tokens} and is_known {is_known} are not one [N, L] with N, L >= 1; "
                "reshape them"
            )
        if self.lengths is None:
            object.__setattr__(self, "lengths", np.full(tokens[0], tokens[1]))

    @property
    def rows(self) -> list[np.ndarray]:
        """The tokens of each text, int32 [its length]."""
        return [row[:length] for row, length in zip(self.tokens, self.lengths)]

    @property
    def texts(self) -> list[str]:
        """The N texts; masked positions show as ░."""
        return [self.tokenizer.decode(row) for row in self.rows]

    @property
    def pieces(self) -> list[list[str]]:
        """The text of each position, N lists; joined they are `texts`."""
        return [self.tokenizer.pieces(row) for row in self.rows]

    @property
    def is_masked(self) -> np.ndarray:
        """Which positions hold the mask, bool [N, L]."""
        return np.asarray(self.tokens) >= self.tokenizer.vocab_size

    @property
    def noise(self) -> np.ndarray:
        """The share of each text that is still noise, float [N]: masked, or else noise_level."""
        if self.noise_level is not None:
            return np.full(len(self.tokens), self.noise_level)
        masks = zip(self.is_masked, self.lengths)
        return np.array([is_masked[:length].mean() for is_masked, length in masks])

    def caption(self, n: int | None = None) -> str:
        """The step and the share that is noise of text n, of all texts if left out."""
        share = self.noise.mean() if n is None else self.noise[n]
        kind = "masked" if self.noise_level is None else "noise"
        return f"step {self.step} of {self.steps}, {share:.0%} {kind}"

    def __str__(self) -> str:
        if len(self.tokens) == 1:
            return f"{self.caption()}\n{self.texts[0]}"
        texts = (f"--- {n} ---\n{text}" for n, text in enumerate(self.texts, start=1))
        return "\n".join([self.caption(), *texts])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        part = "height:3px;border-radius:2px;background:"
        rows = "".join(
            '<p style="white-space:pre-wrap;overflow-wrap:anywhere;max-width:46em;margin:.8em 0;'
            f'font:1.1em/1.7 Charter,Georgia,serif">{row}</p>'
            for row in map(
                _spans, self.pieces[:MAX_TEXTS], self.is_masked, np.asarray(self.is_known)
            )
        )
        more = len(self.tokens) - MAX_TEXTS
        rows += f"and {more} more" if more > 0 else ""
        return (
            f'<div style="font:.85em system-ui,sans-serif">{self.caption()}'
            f'<div style="{part}rgba(128,128,128,.25);max-width:16em;margin:.4em 0">'
            f'<div style="{part}#d08a12;width:{100 * self.step / max(self.steps, 1):.1f}%"></div>'
            f"</div>{rows}</div>"
        )


def _spans(pieces: list[str], is_masked: np.ndarray, is_known: np.ndarray) -> str:
    """HTML of one text: masked runs grey, known ones underlined."""
    styles = {
        (True, False): "color:transparent;background:rgba(128,128,128,.22);border-radius:.25em",
        (False, True): "font-weight:600;text-decoration:underline;text-underline-offset:.2em",
    }
    kinds = zip(is_masked.tolist(), is_known.tolist(), pieces)
    spans = []
    for (masked, known), run in itertools.groupby(kinds, key=lambda item: item[:2]):
        text = html.escape(encodable("".join(piece for *_, piece in run)))
        style = styles.get((masked, known and not masked))
        spans.append(f'<span style="{style}">{text}</span>' if style else text)
    return "".join(spans)


def encodable(text: str) -> str:
    """The text with U+FFFD for halves of surrogate pairs, which no file can hold."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


@dataclass(eq=False)
class Animation:
    """The states of one call of sampling, to be played: as a page, a GIF or an SVG.

    Batches that came one after the other are put together, state by state.
    """

    states: list[State]
    title: str | None = None
    cell: int | None = None  # number of the notebook's cell whose output shows it already

    def __post_init__(self):
        self.states = _joined(self.states)

    @cached_property
    def html(self) -> str:
        """The page: one file, that needs no network and runs nothing that a text holds."""
        template = (
            resources.files("sedd_jax.inference").joinpath("trajectory.html").read_text("utf-8")
        )
        content = {
            "@TITLE@": html.escape(self.title or DEFAULT_TITLE),
            "@STATES@": _script_safe({"title": self.title, **_changes(self.states)}),
        }
        page = re.sub("|".join(content), lambda match: content[match.group()], template)
        return encodable(page)

    def save(self, path: str | Path) -> Path:
        """Writes to `path`, whole or not at all; what is there is replaced.

        Its ending says what: .html the page, which has every text; .gif (needs matplotlib, the
        [plot] extra) or .svg, which show the first text and play once. ValueError for another one.
        """
        path = local_path(path)
        _check_file(path)
        format_of(path)(self, path)
        return path

    def frames(self, n: int = 0) -> list[frames.Frame]:
        """Text n of each state as lines."""
        states = self.states
        length = states[-1].lengths[n]
        last = [
            "  " if is_masked else encodable(piece)
            for piece, is_masked in zip(states[-1].pieces[n], states[-1].is_masked[n])
        ]
        made, before = [], states[0].tokens[n]
        for state in states:
            tokens = state.tokens[n]
            is_new = (tokens != before) & (state is not states[-1])  # then the text stands alone
            kinds = np.where(is_new, "new", "").astype("U6")[:length]
            kinds[state.is_known[n][:length]] = "known"
            kinds[state.is_masked[n][:length]] = "masked"
            pieces = [encodable(piece) for piece in state.pieces[n]]
            lines = frames.laid_out(pieces, kinds.tolist(), last)
            made.append(frames.Frame(state.caption(n), float(state.noise[n]), lines))
            before = tokens
        return made

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


def _save_page(animation: Animation, path: Path) -> None:
    write_text(path, animation.html)


def _save_gif(animation: Animation, path: Path) -> None:
    with replacing(path, "wb") as file:
        file.write(frames.gif(animation.frames(), animation.title or DEFAULT_TITLE))


def _save_svg(animation: Animation, path: Path) -> None:
    write_text(path, encodable(frames.svg(animation.frames(), animation.title or DEFAULT_TITLE)))


FORMATS = {".html": _save_page, ".gif": _save_gif, ".svg": _save_svg}


def _check_file(path: Path) -> None:
    """ValueError for a file of no format, or in no folder."""
    format_of(path)
    if not path.absolute().parent.is_dir():
        raise ValueError(f"no folder for {str(path)!r}; make it, or give another path")


def format_of(path: Path) -> Callable[[Animation, Path], None]:
    """What writes the file of this name; ValueError for another ending, or without a library."""
    if path.suffix.lower() not in FORMATS:
        raise ValueError(
            f"{path.name!r} has none of the endings of an animation, {', '.join(FORMATS)}; give one"
        )
    if path.suffix.lower() == ".gif" and not all(
        importlib.util.find_spec(name) for name in ("matplotlib", "PIL")
    ):
        raise ValueError(
            "a .gif is drawn with matplotlib, which is not installed; pip install "
            '"sedd_jax[plot]", or give a .svg'
        )
    return FORMATS[path.suffix.lower()]


def show(
    states: Iterable[State],
    *,
    title: str | None = None,
    path: str | Path | None = None,
    live: bool = True,
) -> Animation:
    """The animation of `states`, which a notebook shows while they come.

    Args:
      states: of one call: SEDD.stream's, or a list. A list is not shown state by state.
      title: the heading above the text.
      path: a file to write it to as well, of an ending of `Animation.save`.
      live: whether to show the states in a notebook's output; elsewhere nothing is shown.

    Raises:
      ValueError: no states, states of different shapes, or a path in no folder or of no format.
    """
    if path is not None:
        _check_file(local_path(path))
    handle = None
    if live and not isinstance(states, list | tuple) and _in_notebook():
        from IPython import get_ipython
        from IPython.display import HTML, display

        handle = display(HTML(""), display_id=True)  # one output, updated in place
    seen, last = [], -PAUSE
    for state in states:
        if not isinstance(state, State):
            raise TypeError(
                f"{shorten(repr(state))} is no state; give what SEDD.stream yields, not texts"
            )
        seen.append(state)
        if handle is not None and time.monotonic() - last >= PAUSE:
            handle.update(HTML(state._repr_html_()))
            last = time.monotonic()
    animation = Animation(seen, title)
    if path is not None:
        animation.save(path)
    if handle is not None:
        handle.update(HTML(animation._repr_html_()))
        animation.cell = get_ipython().execution_count
    return animation


def _in_notebook() -> bool:
    """Whether this process is a notebook's kernel: then IPython is imported already."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return getattr(shell, "kernel", None) is not None


def _joined(states: list[State]) -> list[State]:
    """States of all samples from the states of one batch, of the next, and so on."""
    by_step: dict[int, list[State]] = {}
    for state in states:
        by_step.setdefault(state.step, []).append(state)
    if not by_step:
        raise ValueError(
            "0 states make no animation; give those of SEDD.stream, which can be read once"
        )
    groups = list(by_step.values())
    shapes = {tuple(np.shape(state.tokens) for state in group) for group in groups}
    if len(shapes) > 1 or len({length for _, length in min(shapes)}) > 1:
        raise ValueError(
            f"{len(states)} states differ in their steps, samples or lengths; give those of one "
            "call of SEDD.stream"
        )
    return [
        replace(
            group[0],
            tokens=np.concatenate([state.tokens for state in group]),
            is_known=np.concatenate([state.is_known for state in group]),
            lengths=np.concatenate([state.lengths for state in group]),
            calls=None,
        )
        for group in groups
    ]


def _changes(states: list[State]) -> dict[str, Any]:
    """The states as JSON: the first of each text, and what every later state changes in it.

    {"vocab_size", "steps": [step of each state], "of", "noise": [noise_level of each] or null,
    "table": [[id, text]], "samples": [{"known": "0110...", "first": [L entries of table],
    "changes": [[gap, entry, gap, entry...]]}]}
    where the first gap of a state counts from position 0, the others from the change before.
    """
    table: dict[tuple[int, str], int] = {}
    samples = []
    for n in range(len(states[0].tokens)):
        length = states[0].lengths[n]
        rows = [np.asarray(state.tokens[n][:length]) for state in states]
        entries = [_entries(states[0], rows[0], table)]
        changes = []
        for before, row in itertools.pairwise(rows):
            same = np.array_equal(before, row)
            entries.append(entries[-1] if same else _entries(states[0], row, table))
            positions = np.flatnonzero(entries[-1] != entries[-2])
            gaps = np.diff(positions, prepend=0)
            changes.append(np.stack([gaps, entries[-1][positions]], axis=1).ravel().tolist())
        known = "".join("01"[known] for known in states[-1].is_known[n][:length].tolist())
        samples.append({"known": known, "first": entries[0].tolist(), "changes": changes})
    return {
        "vocab_size": states[0].tokenizer.vocab_size,
        "steps": [state.step for state in states],
        "of": states[-1].steps,
        "noise": None if states[0].noise_level is None else [s.noise_level for s in states],
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
