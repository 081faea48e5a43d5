"""Revising a draft: which of its tokens are kept, and the noise that the sampler starts from.

SDEdit (Meng et al. 2022) for tokens: noise a draft to a time between 0 and 1, and sample from
there. If drafts have the data distribution, their noised tokens have that of the forward process,
and so revisions, with the exact score and fine steps, have the data distribution again.
"""

import dataclasses
import functools
import re
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from sedd_jax.data.tokenizers import Tokenizer
from sedd_jax.diffusion.graph import Graph
from sedd_jax.diffusion.samplers import Known
from sedd_jax.diffusion.schedules import Schedule
from sedd_jax.inference.batches import Texts, encoded
from sedd_jax.inference.sampling import FITTED, GAUSSIAN, LEFT_TO_RIGHT, Rows, Sampling

STRENGTH = 0.5  # by default


class Start(NamedTuple):
    """Where a revision begins on the grid of the reverse steps."""

    step: int  # the first reverse step; steps + 1: none, nor the denoiser
    time: float  # that the draft is noised to, of the state before that step
    nfe: int  # network calls of a revision


def start_of(strength: float, sampling: Sampling, fitted: np.ndarray | None = None) -> Start:
    """The start at the last time of the grid that is at least strength, in [0, 1]; 0 at 0.

    Of the uniform grid ceil(strength * steps) steps are left; the denoiser is one more call. fitted
    are the times of the grid "fitted".
    """
    if not 0.0 <= strength <= 1.0:
        raise ValueError(
            f"strength {strength} is not in [0, 1]; 0 returns the draft and 1 samples anew"
        )
    if sampling.predictor == LEFT_TO_RIGHT:
        raise ValueError(
            "an autoregressive model writes from left to right and cannot revise a draft; use an "
            "absorbing or uniform model"
        )
    if sampling.predictor == GAUSSIAN:
        raise ValueError(
            "a PLAID model samples whole texts and cannot revise a draft; use an absorbing or "
            "uniform model"
        )
    if sampling.trait("has_own_times"):
        raise ValueError(
            f"predictor {sampling.predictor!r} has times of its own and cannot begin in the "
            "middle; take remdm_cap"
        )
    steps, t_min = sampling.steps, sampling.t_min
    if strength == 0.0:
        return Start(steps + 1, 0.0, 0)
    is_lacking = sampling.grid == FITTED and fitted is None  # with the predictor "none" alone
    grid = (Sampling() if is_lacking else sampling).functions(fitted).grid
    times = np.array(grid(np.arange(steps + 1), steps, t_min), np.float64)
    times[-1] = t_min  # exactly, as in the loop
    step = max(0, int((times >= strength).sum()) - 1)
    return Start(step, float(times[step]), dataclasses.replace(sampling, steps=steps - step).nfe)


def drafts(
    texts: str | Sequence[str],
    keep: str | Sequence[str | int],
    num_samples: int,
    tokenizer: Tokenizer,
    max_length: int,
) -> Texts:
    """Each draft num_samples times in a row; what must stay of it is known.

    keep holds texts, each of whose occurrences is kept in every draft, with all tokens that spell
    a part of it, and positions of tokens. ValueError for a draft that is empty or longer than
    max_length, and for what is to be kept and is not there.
    """
    remedy = "revise it in parts"
    rows = encoded("draft", texts, tokenizer, max_length, remedy)
    keep = [keep] if isinstance(keep, str | int) else list(keep)
    is_known = [np.zeros(len(row), bool) for row in rows]
    pieces = [tokenizer.pieces(row) for row in rows] if keep else []
    for item in keep:
        if isinstance(item, str):
            places = [_spelling(item, p) for p in pieces]
            if not any(place.any() for place in places):
                raise ValueError(
                    f"keep {item!r} is not in the drafts; copy the text from one, as tokenizer "
                    f"{tokenizer.name!r} spells it"
                )
        else:
            places = [_at(item, number, len(row)) for number, row in enumerate(rows)]
        is_known = [a | b for a, b in zip(is_known, places)]
    lengths = np.array([len(row) for row in rows])

    def stacked(parts):
        filled = [np.pad(part, (0, lengths.max() - len(part))) for part in parts]
        return np.repeat(np.stack(filled), num_samples, axis=0)

    known = Known(stacked(rows).astype(np.int32), stacked(is_known))
    return Texts(known, np.repeat(lengths, num_samples))


def _spelling(text: str, pieces: list[str]) -> np.ndarray:
    """Which tokens spell a part of an occurrence of `text`, bool [L], from the tokens' texts."""
    sizes = np.array([len(piece) for piece in pieces])
    first = np.cumsum(sizes) - sizes
    last = first + np.maximum(sizes, 1)  # "" begins the character that the next token ends
    is_part = np.zeros(len(pieces), bool)
    for match in re.finditer(f"(?={re.escape(text)})", "".join(pieces)) if text else ():
        is_part |= (first < match.start() + len(text)) & (last > match.start())
    return is_part


def _at(position: int, number: int, length: int) -> np.ndarray:
    """bool [length], True at the position."""
    is_whole = isinstance(position, (int, np.integer)) and not isinstance(position, bool)
    if not (is_whole and 0 <= position < length):
        raise ValueError(
            f"keep {position!r} is no text and no position in [0, {length}) of draft {number}; "
            "correct it"
        )
    return np.arange(length) == position


@functools.partial(jax.jit, static_argnames=("graph", "schedule"))
def noised(key: jax.Array, rows: Rows, t: jax.Array, *, graph: Graph, schedule: Schedule) -> Rows:
    """The rows with x_t given x0, their tokens, at a time t; a row's number keys its noise.

    The sampler puts back what is known.
    """
    key = jax.random.fold_in(key, np.uint32(2**32 - 1))  # the sampler's rows have int32 numbers
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, rows.index)
    sigma = schedule.sigma(t)
    x0 = rows.chain.tokens
    xt = jax.vmap(lambda key, x0: graph.perturb(key, x0, sigma))(keys, x0)
    return rows._replace(chain=rows.chain._replace(tokens=xt))
