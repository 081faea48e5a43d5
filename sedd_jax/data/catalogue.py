"""Every corpus by name.

A published corpus is a row of PUBLISHED; one's own text and the text inside CPython are in corpora.
"""

import functools
import hashlib
import os
from pathlib import Path
from typing import Any

from sedd_jax import files
from sedd_jax.data.corpora import Corpus, files_of, pydoc, text
from sedd_jax.data.detokenizers import DETOKENIZERS
from sedd_jax.data.prepare import prepare
from sedd_jax.data.published import PUBLISHED, open_published
from sedd_jax.data.records import Records, open_records
from sedd_jax.data.tokenizers import make_tokenizer, named_tokenizer

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
    data_dir: where TensorFlow Datasets stores the documents of a published corpus; "" for its
      default, TFDS_DATA_DIR or ~/tensorflow_datasets.
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
    chosen = "" if detokenizer in ("published", "none") else detokenizer
    if name in PUBLISHED:
        if not data_dir:
            data_dir = os.environ.get("TFDS_DATA_DIR") or Path.home() / "tensorflow_datasets"
        opened = open_published(
            name,
            manual_dir=path or None,
            data_dir=data_dir,
            documents=documents,
            heldout_fraction=heldout_fraction,
            progress=progress,
        )
        if detokenizer == "published":
            chosen = PUBLISHED[name].detokenizer or ""
        streams = {split: functools.partial(opened.stream, split) for split in opened.splits}
        return Corpus(streams, opened.source, chosen, opened.splits)
    if documents:
        raise ValueError(f"documents {documents!r} is not for corpus {name!r}; leave it out")
    fraction = 0.1 if heldout_fraction is None else heldout_fraction
    if name == "pydoc":
        return Corpus(pydoc(fraction), {"corpus": name, "heldout_fraction": fraction}, chosen)
    return Corpus(text(path, fraction), text_source(path, fraction), chosen)


def make_records(
    name: str,
    folder: str | Path,
    *,
    tokenizer: str,
    length: int,
    path: str = "",
    tokenizer_path: str = "",
    form: str = "packed",
    heldout_fraction: float | None = None,
    documents: str = "",
    detokenizer: str = "published",
    data_dir: str | Path = "",
    workers: int = 1,
    progress: bool = False,
) -> Records:
    """Prepares corpus `name` (see make_corpus) as records in `folder`, and opens them.

    What was finished before a stop or a fault is used by the next call.
    """
    corpus = make_corpus(
        name,
        path,
        heldout_fraction,
        data_dir=data_dir,
        documents=documents,
        detokenizer=detokenizer,
        progress=progress,
    )
    if Path(tokenizer).is_file():
        encoder = named_tokenizer(tokenizer)
    else:
        encoder = make_tokenizer(tokenizer, tokenizer_path, corpus)
    prepare(corpus, encoder, length, folder, form=form, workers=workers, progress=progress)
    return open_records(Path(folder).absolute())


def text_source(path: str, heldout_fraction: float) -> dict[str, Any]:
    """What one's own text at `path` is: it changes with any byte of any file."""
    listing = hashlib.sha256()
    for label, file in files_of(path):
        listing.update(f"{files.sha256(file)}  {label}\n".encode())
    return {
        "corpus": "text",
        "version": "1.0.0",
        "files": {"*": listing.hexdigest()},  # the hash of what sha256sum prints of them
        "heldout_fraction": heldout_fraction,
    }
