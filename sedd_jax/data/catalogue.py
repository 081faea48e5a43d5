"""Every corpus by name.

A published corpus is a row of PUBLISHED; one's own text and the text inside CPython are here.
"""

import hashlib
import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sedd_jax import files
from sedd_jax.data.corpora import Corpus, files_of, pydoc, text
from sedd_jax.data.detokenizers import DETOKENIZERS
from sedd_jax.data.documents import Documents, prepare_documents
from sedd_jax.data.prepare import prepare
from sedd_jax.data.published import PUBLISHED, open_published
from sedd_jax.data.records import Records, open_records
from sedd_jax.data.tokenizers import make_tokenizer, named_tokenizer

CORPORA = ("pydoc", "text", *sorted(PUBLISHED))
READ = 4096  # documents taken from the files at once


def make_corpus(
    name: str,
    path: str = "",
    heldout_fraction: float | None = None,
    *,
    data_dir: str | Path,
    documents: str = "",
    detokenizer: str = "published",
    progress: bool = False,
) -> Corpus:
    """Returns the corpus called `name`.

    path: "text": the folder or file of one's own text. A published corpus: a folder with its
      archive or files; "" to download them.
    heldout_fraction: of the documents, for validation, where the corpus has no split of its own;
      None for its default.
    data_dir: where TensorFlow Datasets keeps the documents (all but "pydoc").
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
        return _corpus(opened, chosen)
    if documents:
        raise ValueError(f"documents {documents!r} is not for corpus {name!r}; leave it out")
    fraction = 0.1 if heldout_fraction is None else heldout_fraction
    if name == "pydoc":
        return Corpus(pydoc(fraction), {"corpus": name, "heldout_fraction": fraction}, chosen)
    return _corpus(open_text(path, fraction, data_dir=data_dir, progress=progress), chosen)


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

    data_dir "": the documents of a published corpus are kept where TensorFlow Datasets keeps its
    own (TFDS_DATA_DIR or ~/tensorflow_datasets), those of one's own text only until the records
    are there. What was finished before a stop or a fault is used by the next call.
    """
    folder = Path(folder).absolute()
    own = folder.with_name(f".{folder.name}.documents")
    if not data_dir:
        shared = os.environ.get("TFDS_DATA_DIR") or Path.home() / "tensorflow_datasets"
        data_dir = shared if name in PUBLISHED else own
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
        made = named_tokenizer(tokenizer)
    else:
        made = make_tokenizer(tokenizer, tokenizer_path, corpus)
    prepare(corpus, made, length, folder, form=form, workers=workers, progress=progress)
    shutil.rmtree(own, ignore_errors=True)
    return open_records(folder)


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


def open_text(
    path: str, heldout_fraction: float, *, data_dir: str | Path, progress: bool = False
) -> Documents:
    """Returns one's own documents (see corpora.text) as TensorFlow Datasets keeps them.

    The folder in data_dir is keyed by the files' content: edited text is prepared anew.
    """
    streams = text(path, heldout_fraction)
    source = text_source(path, heldout_fraction)
    about = {
        "version": "1.0.0",
        "description": "one's own text",
        "citation": "",
        "license": "",
    }

    def examples() -> Iterator[tuple[str, str]]:
        return ((split, document) for split in streams for document in streams[split]())

    return prepare_documents(
        "text", about, source, Path(data_dir).absolute(), "", examples, progress=progress
    )


def _corpus(documents: Documents, detokenizer: str) -> Corpus:
    def stream(split: str) -> Callable[[], Iterator[str]]:
        def read() -> Iterator[str]:
            count = documents.splits[split]
            starts = range(0, count, READ)
            parts = (documents.read(split, i, min(i + READ, count)) for i in starts)
            return itertools.chain.from_iterable(parts)

        return read

    streams = {split: stream(split) for split in documents.splits}
    return Corpus(streams, documents.source, detokenizer, documents.splits)
