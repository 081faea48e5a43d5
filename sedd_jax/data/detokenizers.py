"""Detokenizers: the published, word-tokenized corpora back to running text.

They are part of what a zero-shot number means, so each does exactly what Lou et al.'s code does
(which took them from earlier evaluations), its peculiarities included. A new one is a function
str -> str and a row in DETOKENIZERS.
"""

import re
from collections.abc import Callable
from functools import partial

Steps = tuple[tuple[str | re.Pattern[str], str], ...]  # replacements, applied in this order


def _tight(left: str, right: str, inside: str, gap: str) -> tuple[re.Pattern[str], str]:
    """The step that removes `gap` at both ends of what `left` and `right` enclose."""
    pattern = f"{re.escape(left)}{gap}({inside}){gap}{re.escape(right)}"
    return re.compile(pattern), rf"{left}\1{right}"


WIKITEXT: Steps = (
    ("s '", "s'"),
    (re.compile(r"/' [0-9]/"), "/'[0-9]/"),  # between slashes only; meant for " ' 90 " and the like
    (" @-@ ", "-"),
    (" @,@ ", ","),
    (" @.@ ", "."),
    *((f" {mark} ", f"{mark} ") for mark in ":;.!?,"),
    *(
        _tight(left, right, f"[^{re.escape(right)}]*?", r"\s*")
        for left, right in ("()", "[]", "{}", '""', "''")
    ),
    ("= = = =", "===="),
    ("= = =", "==="),
    ("= =", "=="),
    (" ° ", "°"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
)

PTB: Steps = (
    (" 's", "'s"),
    ("s ' ", "s' "),
    (" n't", "n't"),
    (" \n ", "\n"),
    ("\\/", "/"),
    *(((" N ", " 1 "),) * 10),  # N is a number; one pass leaves every second of "N N N"
    ("$ 1", "$1"),
    ("# 1", "#1"),
    ("<unk>", "?"),
)

LM1B: Steps = (
    ("http : / / ", "http://"),
    ("https : / / ", "https://"),
    (re.compile(r" '(\w+)"), r"'\1"),
    (re.compile(r" (\w+) \. "), r" \1. "),
    (re.compile(r" (\w+) \.$"), r" \1."),
    (" ? ", "? "),
    (re.compile(r" \?$"), "?"),
    (" ! ", "! "),
    (re.compile(r" !$"), "!"),
    *((f" {mark} ", f"{mark} ") for mark in ",:;"),
    (" / ", "/"),
    _tight('"', '"', '[^"]+', " "),
    _tight("'", "'", "[^']+", " "),
    _tight("(", ")", "[^()]+", " "),
    _tight("[", "]", r"[^\[\]]+", " "),
    ("$ ", "$"),
    ("£ ", "£"),
)

LAMBADA: Steps = (("“", '"'), ("”", '"'))


def _apply(steps: Steps, text: str) -> str:
    for pattern, replacement in steps:
        if isinstance(pattern, str):
            text = text.replace(pattern, replacement)
        else:
            text = pattern.sub(replacement, text)
    return text


def lambada(text: str) -> str:
    """LAMBADA, a passage: straight quotes, and a newline before it."""
    return "\n" + _apply(LAMBADA, text).strip()


DETOKENIZERS: dict[str, Callable[[str], str]] = {
    "lambada": lambada,
    "lm1b": partial(_apply, LM1B),  # a sentence
    "ptb": partial(_apply, PTB),
    "wikitext": partial(_apply, WIKITEXT),  # a line with its newline, or a whole file
}
