"""Every corpus by name.

A published corpus is a row of PUBLISHED; one's own text and the text inside CPython are in corpora.
"""

import os
from dataclasses import replace
from pathlib import Path

from sedd_jax.data.corpora import Corpus, pydoc, text
from sedd_jax.data.detokenizers import DETOKENIZERS
from sedd_jax.data.prepare import prepare
from sedd_jax.data.published import PUBLISHED, open_published
from sedd_jax.data.records import Records, open_records
from sedd_jax.data.tokenizers import make_tokenizer

CORPORA = ("pydoc", "text", *sorted(PUBLISHED))


def make_corpus(
    name: str,
    path: str = "",
    heldout_fraction: float | None = None,
    *,
    data_dir: str | Path = "",
    documents: str = "",
    detokenizer: str = "published",
    progress: bool = False,
) -> Corpus:
    """Returns the corpus called `name`.

    path: "text": the folder or file of one's own text. A published corpus: a folder with its
      archive or files; "" to download them.
    heldout_fraction: of the documents, for validation, where the corpus has no split of its own;
      None for its default.
    data_dir: where the archive of a published corpus is downloaded to; "" for TFDS_DATA_DIR or
      ~/tensorflow_datasets.
    documents: how a published corpus is cut into documents; "" for its default.
    detokenizer: "published" for the one that goes with the corpus, "none", or one by name.

    ValueError for a name, path or file that cannot be used.
    """
    if name not in CORPORA:
        raise ValueError(f"unknown corpus {name!r}; known: {', '.join(CORPORA)}")
    known = ("published", "none", *sorted(DETOKENIZERS))
    if detokenizer not in known:
        raise ValueError(f"unknown detokenizer {detokenizer!r}; known: {', '.join(known)}")
    if heldout_fraction is not None and not 0.0 < heldout_fraction < 1.0:
        raise ValueError(f"heldout_fraction {heldout_fraction} is not between 0 and 1; try 0.1")
    if documents and name not in PUBLISHED:
        raise ValueError(f"documents {documents!r} is not for corpus {name!r}; leave it out")
    if name in PUBLISHED:
        default = os.environ.get("TFDS_DATA_DIR") or Path.home() / "tensorflow_datasets"
        corpus = open_published(
            name,
            manual_dir=path or None,
            data_dir=data_dir or default,
            documents=documents,
            heldout_fraction=heldout_fraction,
            progress=progress,
        )
    elif name == "pydoc":
        corpus = pydoc(heldout_fraction or 0.1)
    else:
        corpus = text(path, heldout_fraction or 0.1)
    if detokenizer == "published":
        return corpus
    return replace(corpus, detokenizer="" if detokenizer == "none" else detokenizer)


def make_records(
    corpus: Corpus,
    folder: str | Path,
    *,
    tokenizer: str,
    length: int,
    tokenizer_path: str = "",
    form: str = "packed",
    workers: int = 1,
    progress: bool = False,
) -> Records:
    """Prepares the corpus as records in `folder`, and opens them.

    tokenizer: a name of TOKENIZERS, or a tokenizer.json. What was finished before a stop
    or a fault is used by the next call.
    """
    encoder = make_tokenizer(tokenizer, tokenizer_path, corpus)
    prepare(corpus, encoder, length, folder, form=form, workers=workers, progress=progress)
    return open_records(Path(folder).absolute())
