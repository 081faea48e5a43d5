"""Every corpus by name.

A published corpus is a row of PUBLISHED; the text inside CPython is in corpora, one's own in
text_files, and what TensorFlow Datasets has prepared in tfds.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sedd_jax.data.corpora import Corpus, pydoc
from sedd_jax.data.detokenizers import DETOKENIZERS
from sedd_jax.data.prepare import check_request, prepare
from sedd_jax.data.published import PUBLISHED, open_published
from sedd_jax.data.records import Records, open_records
from sedd_jax.data.text_files import root_of, text
from sedd_jax.data.tfds import PREFIX, open_tfds
from sedd_jax.data.tokenizers import make_tokenizer
from sedd_jax.host.files import local_path

CORPORA = ("pydoc", "text", *sorted(PUBLISHED))
KNOWN_CORPORA = f"{', '.join(CORPORA)}, {PREFIX}NAME[/CONFIG][:VERSION]"  # for people


REGISTERED: dict[str, Callable[..., Corpus]] = {}  # by sedd_jax.register


def is_corpus(name: str) -> bool:
    return name in CORPORA or name in REGISTERED or (name.startswith(PREFIX) and name != PREFIX)


def make_corpus(
    name: str,
    path: str = "",
    heldout_fraction: float | None = None,
    *,
    data_dir: str | Path = "",
    documents: str = "",
    detokenizer: str = "published",
    parameters: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> Corpus:
    """Returns the corpus called `name`.

    path: "text": the folder or file of one's own text. A published corpus: a folder with its
      archive or files; "" to download them. "tfds:NAME": data_dir, by another name.
    heldout_fraction: of the documents, for validation, where the corpus has no split of its own;
      None for its default; 1, of one's own text, for all of them.
    data_dir: where the archive of a published corpus is downloaded to, and where TFDS keeps its
      datasets; "" for TFDS_DATA_DIR or ~/tensorflow_datasets.
    documents: how a published corpus is cut into documents; "" for its default.
    detokenizer: "published" for the one that goes with the corpus, "none", or one by name.

    parameters: of a registered corpus.

    ValueError for a name, path or file that cannot be used.
    """
    _check(name, path, heldout_fraction, documents=documents, detokenizer=detokenizer)
    path = str(local_path(path)) if path else ""
    data_dir = local_path(
        data_dir or os.environ.get("TFDS_DATA_DIR") or Path.home() / "tensorflow_datasets"
    )
    if name in PUBLISHED:
        corpus = open_published(
            name,
            manual_dir=path or None,
            data_dir=data_dir,
            documents=documents,
            heldout_fraction=heldout_fraction,
            progress=progress,
        )
    elif name in REGISTERED:
        corpus = _registered(name, path, heldout_fraction or 0.1, parameters or {})
    elif name == "pydoc":
        corpus = pydoc(heldout_fraction or 0.1)
    elif name == "text":
        corpus = text(path, heldout_fraction or 0.1)
    else:
        corpus = open_tfds(name, path or data_dir)
    if detokenizer == "published":
        return corpus
    return replace(corpus, detokenizer="" if detokenizer == "none" else detokenizer)


def _registered(
    name: str, path: str, heldout_fraction: float, parameters: Mapping[str, Any]
) -> Corpus:
    """The corpus of a user's function; its name and parameters go into the records' fingerprint."""
    corpus = REGISTERED[name](path, heldout_fraction, **parameters)
    if not isinstance(corpus, Corpus):
        raise ValueError(  # noqa: TRY004 (a user's mistake, one line)
            f"corpus {name!r} returns a value of type {type(corpus).__name__}; return a data.Corpus"
        )
    about = {
        "corpus": name,
        "heldout_fraction": heldout_fraction,
        **({"parameters": dict(parameters)} if parameters else {}),
    }
    return replace(corpus, source={**corpus.source, **about})


def _check(
    name: str,
    path: str = "",
    heldout_fraction: float | None = None,
    *,
    documents: str = "",
    detokenizer: str = "published",
    **others,
) -> None:
    """ValueError for arguments of make_corpus that are wrong whatever the files hold."""
    if not is_corpus(name):
        known = ", ".join([KNOWN_CORPORA, *REGISTERED])
        raise ValueError(
            f"unknown corpus {name!r}; known: {known}; for one of yours name the module that "
            "registers it: --imports (in Python import it)"
        )
    known = ("published", "none", *sorted(DETOKENIZERS))
    if detokenizer not in known:
        raise ValueError(f"unknown detokenizer {detokenizer!r}; known: {', '.join(known)}")
    is_whole = heldout_fraction == 1.0 and name == "text"
    if heldout_fraction is not None and not 0.0 < heldout_fraction < 1.0 and not is_whole:
        more = ", or 1 to hold out all" if name == "text" else ""
        raise ValueError(
            f"heldout_fraction {heldout_fraction} is not between 0 and 1; try 0.1{more}"
        )
    if documents and name not in PUBLISHED:
        raise ValueError(f"documents {documents!r} is not for corpus {name!r}; leave it out")
    if name == "text":
        root_of(path)
    if name == "pydoc" and path:
        raise ValueError(
            f"corpus 'pydoc' comes with Python and reads no path, but there is {path!r}; for text "
            "of your own choose the corpus 'text'"
        )


def make_records(
    corpus: Corpus | str,
    folder: str | Path,
    *,
    tokenizer: str,
    length: int,
    tokenizer_path: str = "",
    form: str = "packed",
    splits: Sequence[str] = (),
    workers: int = 1,
    progress: bool = False,
    **options,
) -> Records:
    """Prepares the corpus as records in `folder`, and opens them.

    corpus: an open one, or a name, opened by make_corpus with `options` when the other arguments
      have been checked and the tokenizer, unless it is fitted on the corpus, has been read.
    tokenizer: a name of TOKENIZERS, or a tokenizer.json.
    splits: that the corpus must have.

    What was finished before a stop or a fault is used by the next call.
    """
    folder = local_path(folder).absolute()
    check_request(folder, length, form, workers)
    tokenizer_path = tokenizer_path and str(local_path(tokenizer_path))
    encoder = None
    if isinstance(corpus, str):
        _check(corpus, **options)
        path = options.get("path")
        if (
            corpus == "text"
            and path
            and folder.resolve().is_relative_to(local_path(path).resolve())
        ):
            raise ValueError(
                f"{str(folder)!r} is inside {str(path)!r}, whose files are read as text; choose "
                "another folder for the records"
            )
    elif options:
        raise TypeError(f"{', '.join(options)}: only for a corpus by name")
    if tokenizer != "characters" and not tokenizer_path.startswith("train:"):
        encoder = make_tokenizer(tokenizer, tokenizer_path, None)
    if isinstance(corpus, str):
        corpus = make_corpus(corpus, progress=progress, **options)
    for split in splits:
        if split not in corpus.streams:
            raise ValueError(
                f"the corpus has no split {split!r}, it has {', '.join(corpus.streams)}; set "
                "config.data.train_split and config.data.heldout_split to what it has"
            )
    encoder = encoder or make_tokenizer(tokenizer, tokenizer_path, corpus)
    prepare(corpus, encoder, length, folder, form=form, workers=workers, progress=progress)
    return open_records(folder)
