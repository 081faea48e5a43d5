"""A state of sampling, and how it shows itself as text and in a notebook."""

import html
import itertools
from dataclasses import dataclass

import numpy as np

from sedd_jax.data.tokenizers import Tokenizer

SHOWN = 4  # texts of a state in a notebook's output, at most


@dataclass(frozen=True, eq=False)
class State:
    """Texts in the middle of sampling: xt after `step` of `steps` reverse steps."""

    step: int
    steps: int
    tokens: np.ndarray  # int32 [N, L]
    is_known: np.ndarray  # bool [N, L]: given, not sampled
    tokenizer: Tokenizer

    def __post_init__(self):
        tokens, is_known = np.shape(self.tokens), np.shape(self.is_known)
        if len(tokens) != 2 or 0 in tokens or tokens != is_known:
            raise ValueError(
                f"tokens {tokens} and is_known {is_known} are not one [N, L] with N, L >= 1; "
                "reshape them"
            )

    @property
    def texts(self) -> list[str]:
        """The N texts; masked positions show as ░."""
        return [self.tokenizer.decode(row) for row in self.tokens]

    @property
    def pieces(self) -> list[list[str]]:
        """The text of each position, [N][L]; joined they are `texts`."""
        return [self.tokenizer.pieces(row) for row in self.tokens]

    @property
    def is_masked(self) -> np.ndarray:
        """Which positions hold the mask, bool [N, L]."""
        return np.asarray(self.tokens) >= self.tokenizer.vocab_size

    def __str__(self) -> str:
        head = f"step {self.step} of {self.steps}"
        if len(self.tokens) == 1:
            return f"{head}\n{self.texts[0]}"
        texts = (f"--- {n} ---\n{text}" for n, text in enumerate(self.texts, start=1))
        return "\n".join([head, *texts])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        part = "height:3px;border-radius:2px;background:"
        rows = "".join(
            '<p style="white-space:pre-wrap;overflow-wrap:anywhere;max-width:46em;margin:.8em 0;'
            f'font:1.1em/1.7 Charter,Georgia,serif">{row}</p>'
            for row in map(_spans, self.pieces[:SHOWN], self.is_masked, np.asarray(self.is_known))
        )
        more = len(self.tokens) - SHOWN
        rows += f"and {more} more" if more > 0 else ""
        return (
            f'<div style="font:.85em system-ui,sans-serif">step {self.step} of {self.steps}'
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
    found = []
    for (masked, known), run in itertools.groupby(kinds, key=lambda item: item[:2]):
        text = html.escape(encodable("".join(piece for *_, piece in run)))
        style = styles.get((masked, known and not masked))
        found.append(f'<span style="{style}">{text}</span>' if style else text)
    return "".join(found)


def encodable(text: str) -> str:
    """The text with U+FFFD for halves of surrogate pairs, which no file can hold."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
