"""N-gram models of a text: baselines beside a bound, and a scorer of samples without weights."""

import dataclasses
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from sedd_jax import data
from sedd_jax.data.tokenizers import Tokenizer
from sedd_jax.evaluation.scorer import check_token_rows
from sedd_jax.host.console import activity

ORDERS = range(2, 11)  # those of a scorer
DEFAULT_ORDER = 5


class NGrams:
    """Interpolated n-gram models of blocks, of every order up to `order`, fitted by counting.

    The unigram adds one to every count. Each further order mixes in the one below by Witten and
    Bell's rule (1991): with h the tokens before y and h' the same without the first,

        p(y | h) = (count(h, y) + kinds(h) p(y | h')) / (count(h) + kinds(h))

    kinds(h) being the number of different tokens seen after h. No n-gram crosses a block's bounds.
    parts() gives blocks, int [..., L] a part, anew for every order. Memory is that of the different
    n-grams: for texts of millions of tokens, not of billions.
    """

    def __init__(
        self, parts: Callable[[], Iterable[np.ndarray]], vocab_size: int, order: int = 2
    ) -> None:
        singles = np.ones(vocab_size)
        for part in parts():
            singles += np.bincount(part.ravel(), minlength=vocab_size)
        self.vocab_size, self.order = vocab_size, order
        self.unigram = singles / singles.sum()
        # Of orders 2, 3, ...: an n-gram's key is vocab_size * (number of its first n - 1 tokens
        # among the keys of the order below) + its last token; its own number, its place in them.
        self.keys: list[np.ndarray] = []
        self.counts: list[np.ndarray] = []
        self.totals: list[np.ndarray] = []  # count(h), by the number of h
        self.kinds: list[np.ndarray] = []
        contexts = vocab_size
        for n in range(2, order + 1):
            keys, counts = _count(self._keys(part, n)[1] for part in parts())
            context = keys // vocab_size
            self.keys.append(keys)
            self.counts.append(counts)
            self.totals.append(np.bincount(context, counts, contexts))
            self.kinds.append(np.bincount(context, minlength=contexts))
            contexts = len(keys)

    def nats(self, blocks: np.ndarray, order: int | None = None) -> np.ndarray:
        """-log p of each token of int [N, L] under the model of an order, by default the highest.

        float64 [N, L]; a block's first tokens have the tokens before them that there are.
        """
        probability = self.unigram[blocks]
        for n in range(2, min(order or self.order, blocks.shape[-1]) + 1):
            context, keys = self._keys(blocks, n)
            number = self._numbers(keys, n)
            count = np.where(number < 0, 0, self.counts[n - 2][number])
            is_known = context >= 0
            total = np.where(is_known, self.totals[n - 2][context], 0.0)
            kinds = np.where(is_known, self.kinds[n - 2][context], 0)
            lower = probability[..., n - 1 :]
            # Nothing is known after a context that never came: the order below.
            kinds = np.where(total == 0.0, 1, kinds)
            probability[..., n - 1 :] = (count + kinds * lower) / (total + kinds)
        return -np.log(probability)

    def _keys(self, blocks: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
        """(numbers of the contexts, keys) of the n-grams of int [..., L], [..., L - n + 1] each.

        Both below 0 where the context never came.
        """
        number = blocks.astype(np.int64)
        for lower in range(2, n):
            number = self._numbers(self._join(number, blocks, lower), lower)
        return number[..., :-1], self._join(number, blocks, n)

    def _join(self, number: np.ndarray, blocks: np.ndarray, n: int) -> np.ndarray:
        context, last = number[..., :-1], blocks[..., n - 1 :].astype(np.int64)
        return np.where(context < 0, -1, context * self.vocab_size + last)

    def _numbers(self, keys: np.ndarray, n: int) -> np.ndarray:
        """The places of the keys among those of order n, -1 of one that is not there."""
        known = self.keys[n - 2]
        place = np.minimum(np.searchsorted(known, keys), len(known) - 1)
        return np.where(known[place] == keys, place, -1)


def _count(parts: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(the different keys, rising; how often each came), int64 both."""
    keys, counts = np.zeros(0, np.int64), np.zeros(0, np.int64)
    for part in parts:
        new, times = np.unique(part, return_counts=True)
        keys, where = np.unique(np.concatenate([keys, new]), return_inverse=True)
        counts = np.bincount(where, np.concatenate([counts, times])).astype(np.int64)
    return keys, counts


def read_parts(records: data.Records, split: str) -> Iterator[data.Blocks]:
    """The split's blocks, 1024 at a time: memory does not hold the corpus."""
    source = records.source(split)
    for start in range(0, len(source), 1024):
        rows = [records.parse(source[i]) for i in range(start, min(start + 1024, len(source)))]
        yield records.blocks(np.stack(rows))


def fit(records: data.Records, split: str, order: int, remedy: str) -> NGrams:
    """The n-gram models of a split; ValueError, with the remedy, unless its records are packed."""
    if records.fingerprint["form"] != "packed":
        raise ValueError(f"n-gram models need packed records; {remedy}")

    def parts() -> Iterator[np.ndarray]:
        return (part.tokens for part in read_parts(records, split))

    return NGrams(parts, records.tokenizer.vocab_size, order)


def baseline_nats(records: data.Records, split: str, heldout: data.Blocks) -> dict[str, np.ndarray]:
    """-log p of the held-out tokens under the unigram and the bigram of the split, nats [N, L]."""
    remedy = "leave --baselines out"
    if heldout.is_token is not None:
        raise ValueError(f"n-gram models need packed records; {remedy}")
    model = fit(records, split, 2, remedy)
    return {"unigram": model.nats(heldout.tokens, 1), "bigram": model.nats(heldout.tokens)}


# --- as a scorer


@dataclasses.dataclass(frozen=True, eq=False)
class NGramScorer:
    """An n-gram model as a scorer of samples, of the tokens that it counted."""

    name: str
    ngrams: NGrams
    tokenizer: Tokenizer

    dtype = "float64"
    positions = None  # scores texts of any length

    def nats(
        self, tokens: np.ndarray, *, batch_size: int = 8, progress: bool = False
    ) -> np.ndarray:
        """-log p of each token but the first given those before it, nats, float64 [N, L - 1].

        tokens int [N, L], L at least 2. batch_size and progress are for scorers that take long.
        """
        return self.ngrams.nats(check_token_rows(tokens, min_length=2))[:, 1:]

    def sha256(self) -> str:
        digest = hashlib.sha256(self.ngrams.unigram)
        for keys, counts in zip(self.ngrams.keys, self.ngrams.counts, strict=True):
            digest.update(keys)
            digest.update(counts)
        return digest.hexdigest()


def order_of(scorer: str) -> int | None:
    """The order that a name like ngram or ngram:3 says; None of another scorer's name."""
    name, colon, order = scorer.partition(":")
    if name != "ngram":
        return None
    if not colon:
        return DEFAULT_ORDER
    if not re.fullmatch(r"[1-9]\d?", order) or int(order) not in ORDERS:
        raise ValueError(
            f"scorer {scorer!r} is not ngram:N with N in [{ORDERS.start}, {ORDERS.stop - 1}], the "
            f"tokens of an n-gram; leave :N out for {DEFAULT_ORDER}"
        )
    return int(order)


@activity("counting n-grams")
def load_ngram_scorer(order: int, records: data.Records, split: str) -> NGramScorer:
    """The n-grams of a split as a scorer; its name says which text it is."""
    remedy = "choose a GPT-2 as --scorer"
    name = f"{order}-gram of {split} {records.counts(split)['sha256'][:12]}"
    return NGramScorer(name, fit(records, split, order, remedy), records.tokenizer)
