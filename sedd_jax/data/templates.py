"""Templates: text with free positions -> (tokens, is_known), what infilling is given."""

import re

import numpy as np

from sedd_jax.data.tokenizer import Tokenizer, shorten

MASK = re.compile(r"\[\s*mask[^\[\]]*\]?", re.IGNORECASE)  # and what was meant as one


def parse_template(
    template: str, tokenizer: Tokenizer, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Parses "Hi, my name is [MASK:20] and ..." into tokens int32 [n], is_known bool [n].

    [MASK:k] is k free positions and [MASK] is one; free positions hold token 0 and are not
    known. There is no escape: text cannot hold "[MASK" itself, in capitals or not. The text
    between masks is encoded piece by piece, so with subwords a space before a mask is a token of
    its own.

    Raises:
      ValueError: no mask, one that is written otherwise or with a count below 1, more than
        `length` positions, or a character outside the tokenizer.
    """
    if not isinstance(template, str):
        raise TypeError(
            f"a template is one text, not {shorten(repr(template))}; for several texts of it "
            "give num_samples"
        )
    if not template:
        raise ValueError('template "" is empty; write text and [MASK:20] for 20 free positions')
    pieces: list[np.ndarray | int] = []  # ids of text, or a number of free positions
    start = 0
    for match in MASK.finditer(template):
        mask = re.fullmatch(r"\[MASK(?::([0-9]{1,9}))?\]", match.group())
        count = int(mask[1] or 1) if mask else 0
        if count == 0:
            raise ValueError(
                f"{shorten(repr(match.group()))} at position {match.start()} names no number of "
                "free positions; write [MASK:3] for 3, at least 1"
            )
        pieces += [tokenizer.encode(template[start : match.start()]), count]
        start = match.end()
    if not pieces:
        raise ValueError(
            f"template {shorten(repr(template))} has no free position; write [MASK:20] where 20 "
            "tokens are to be sampled"
        )
    pieces.append(tokenizer.encode(template[start:]))
    needed = sum(p if isinstance(p, int) else len(p) for p in pieces)
    if needed > length:
        raise ValueError(
            f"template {shorten(repr(template))} takes {needed} positions, more than length "
            f"{length}; shorten it"
        )
    rows = [np.zeros(p, np.int32) if isinstance(p, int) else p for p in pieces]
    known = [np.full(len(r), not isinstance(p, int)) for p, r in zip(pieces, rows)]
    return np.concatenate(rows), np.concatenate(known)


def prefix_suffix(
    prefix: str, suffix: str, tokenizer: Tokenizer, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns tokens int32 [length], is_known bool [length]: prefix first, suffix last, rest free.

    Either may be empty. ValueError if together they take more than `length` positions.
    """
    first, last = tokenizer.encode(prefix), tokenizer.encode(suffix)
    free = length - len(first) - len(last)
    if free < 0:
        raise ValueError(
            f"prefix and suffix take {len(first) + len(last)} positions, more than length "
            f"{length}; shorten them"
        )
    tokens = np.concatenate([first, np.zeros(free, np.int32), last])
    is_known = np.ones(length, bool)
    is_known[len(first) : len(first) + free] = False
    return tokens, is_known
