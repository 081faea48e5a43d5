"""What a model is worth: bounds on corpora and the simple models to hold them against."""

from sedd_jax.evaluate.bounds import (
    BoundFn,
    CorpusBound,
    bound_until,
    corpus_bound,
    in_units,
    make_bound_fn,
    one_in_units,
)
from sedd_jax.evaluate.ngrams import Bigram

__all__ = [
    "Bigram",
    "BoundFn",
    "CorpusBound",
    "bound_until",
    "corpus_bound",
    "in_units",
    "make_bound_fn",
    "one_in_units",
]
