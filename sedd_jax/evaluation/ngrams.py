"""Unigram and bigram models to hold a bound against."""

from collections.abc import Iterable

import numpy as np


class Bigram:
    """Unigram and interpolated bigram models of a token stream, fitted by counting.

    The unigram adds one to every count. The bigram mixes in the unigram by Witten and Bell's rule
    (1991): p(y | x) = (count(x, y) + kinds(x) unigram(y)) / (count(x) + kinds(x)), kinds(x) the
    number of different tokens seen after x.
    """

    def __init__(self, blocks: Iterable[np.ndarray], vocab_size: int):
        self.vocab_size = vocab_size
        singles = np.ones(vocab_size)
        self.pairs, self.counts = np.zeros(0, np.int64), np.zeros(0, np.int64)
        pending: list[np.ndarray] = []

        def merge():
            # A part at a time: memory holds the different pairs, not the corpus.
            pairs, counts = np.unique(np.concatenate(pending), return_counts=True)
            pending.clear()
            both = np.concatenate([self.pairs, pairs])
            self.pairs, where = np.unique(both, return_inverse=True)
            counts = np.concatenate([self.counts, counts])
            self.counts = np.bincount(where, weights=counts).astype(np.int64)

        for block in blocks:  # int32 [L]
            singles += np.bincount(block, minlength=vocab_size)
            pending.append(self._pair(block[:-1], block[1:]))
            if len(pending) * len(block) > 2**20:
                merge()
        if pending:
            merge()
        self.unigram = singles / singles.sum()
        first = self.pairs // vocab_size
        self.totals = np.bincount(first, weights=self.counts, minlength=vocab_size)
        self.kinds = np.bincount(first, minlength=vocab_size)

    def _pair(self, x, y):
        return x.astype(np.int64) * self.vocab_size + y

    def unigram_nats(self, blocks: np.ndarray) -> float:
        """-log p of int32 [N, L] under the unigram, summed."""
        return float(-np.log(self.unigram[blocks]).sum())

    def bigram_nats(self, blocks: np.ndarray) -> float:
        """-log p of int32 [N, L] under the bigram, summed; a block starts with the unigram."""
        x, y = blocks[:, :-1], blocks[:, 1:]
        wanted = self._pair(x, y)
        at = np.minimum(np.searchsorted(self.pairs, wanted), len(self.pairs) - 1)
        seen = np.where(self.pairs[at] == wanted, self.counts[at], 0)
        kinds = np.maximum(self.kinds[x], 1)  # a token that never came first: the unigram
        probability = (seen + kinds * self.unigram[y]) / (self.totals[x] + kinds)
        return float(-np.log(self.unigram[blocks[:, 0]]).sum() - np.log(probability).sum())
