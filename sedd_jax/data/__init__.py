"""Data: corpora, tokenizers, packed records, batches, templates. Floor 1: no jax, no other room."""

from sedd_jax.data.corpora import CORPORA, Corpus, make_corpus
from sedd_jax.data.pipeline import heldout_blocks, train_batches
from sedd_jax.data.records import Records, open_records, prepare
from sedd_jax.data.templates import parse_template, prefix_suffix
from sedd_jax.data.tokenizers import (
    TOKENIZERS,
    Tokenizer,
    make_tokenizer,
    tokenizer_from_dict,
)

__all__ = [
    "CORPORA",
    "TOKENIZERS",
    "Corpus",
    "Records",
    "Tokenizer",
    "heldout_blocks",
    "make_corpus",
    "make_tokenizer",
    "open_records",
    "parse_template",
    "prefix_suffix",
    "prepare",
    "tokenizer_from_dict",
    "train_batches",
]
