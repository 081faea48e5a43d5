"""Data: corpora, tokenizers, packed records, batches, templates. Does not import jax.

The order inside, each module importing from those before it:
detokenizers, corpora -> tokenizer -> subwords, sentencepiece -> tokenizers -> records
-> prepare, pipeline, templates;
corpora -> tfds, readers -> published, text_files; catalogue, which knows every corpus by name, is
last.
"""

from sedd_jax.data.catalogue import CORPORA, KNOWN_CORPORA, is_corpus, make_corpus, make_records
from sedd_jax.data.corpora import Corpus
from sedd_jax.data.pipeline import WINDOWS, read_blocks, train_batches
from sedd_jax.data.prepare import FORMS, prepare
from sedd_jax.data.records import Blocks, Records, describe, open_records
from sedd_jax.data.templates import parse_template, prefix_suffix
from sedd_jax.data.text_files import text_source
from sedd_jax.data.tokenizers import (
    TOKENIZERS,
    Tokenizer,
    is_of_kind,
    make_tokenizer,
    named_tokenizer,
    tokenizer_from_dict,
)

__all__ = [
    "CORPORA",
    "FORMS",
    "KNOWN_CORPORA",
    "TOKENIZERS",
    "WINDOWS",
    "Blocks",
    "Corpus",
    "Records",
    "Tokenizer",
    "describe",
    "is_corpus",
    "is_of_kind",
    "make_corpus",
    "make_records",
    "make_tokenizer",
    "named_tokenizer",
    "open_records",
    "parse_template",
    "prefix_suffix",
    "prepare",
    "read_blocks",
    "text_source",
    "tokenizer_from_dict",
    "train_batches",
]
