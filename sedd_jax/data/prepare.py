"""Preparation: documents to fixed-length blocks of ids, once.

The documents are cut into parts of about PART characters. Each part is encoded by itself and
saved beside the folder to be, in .NAME.parts: a preparation that is stopped continues from there.
Then the parts are read in order and the blocks written, so that the result does not depend on the
number of threads.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from sedd_jax.data.corpora import Corpus
from sedd_jax.data.detokenizers import DETOKENIZERS
from sedd_jax.data.records import FORMAT, open_records
from sedd_jax.data.tokenizers import Tokenizer

log = logging.getLogger(__name__)

PART = 1 << 20  # characters; a part ends with the document that reaches it
SHARD = 65536  # blocks in a file


def prepare(
    corpus: Corpus,
    tokenizer: Tokenizer,
    length: int,
    folder: str | Path,
    *,
    form: str = "packed",
    workers: int = 1,
    progress: bool = False,
) -> dict[str, Any]:
    """Writes every split of `corpus` as blocks of `length` tokens; returns the fingerprint.

    form "packed": each document is followed by the tokenizer's separator, the stream is cut into
    blocks, and the tail shorter than a block is dropped. "padded": a block is a document with its
    separator, cut off at `length` or padded up to it.

    Each split's entry in the fingerprint counts `documents`; `words`, separated by white space, of
    the text as published; `characters` and `tokens` of the blocks and what was dropped (separators
    count as tokens, not as characters); `dropped_tokens`; `dropped_characters`; `blocks`. Its
    sha256 is that of the blocks, text_sha256 that of the published text.

    `folder` is there in full or not at all. A complete folder of the same source, tokenizer,
    length and form is reused without reading the corpus; any other raises ValueError, as does
    what cannot be encoded. OSError where the parts cannot be written; what is finished is kept.

    workers: parts that are encoded at the same time, in threads; the `tokenizers` library uses
    all CPUs for each part besides.
    """
    if length < 1:
        raise ValueError(f"data.length {length} is less than 1; give the tokens in a block")
    if form not in FORMS:
        raise ValueError(f"unknown form {form!r}; known: {', '.join(FORMS)}")
    if workers < 1:
        raise ValueError(f"workers {workers} is less than 1; give the number of threads")
    folder = Path(os.path.abspath(folder))
    wanted = {
        "format": FORMAT,
        "source": json.loads(json.dumps({**corpus.source, "detokenizer": corpus.detokenizer})),
        "tokenizer": {
            "name": tokenizer.name,
            "vocab_size": tokenizer.vocab_size,
            "sha256": tokenizer.fingerprint(),
        },
        "length": length,
        "form": form,
        "dtype": "<u2" if max(tokenizer.vocab_size, length) <= 65535 else "<u4",
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    parts = folder.with_name(f".{folder.name}.parts")
    with _alone(folder.with_name(f".{folder.name}.lock")):
        if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
            shutil.rmtree(parts, ignore_errors=True)
            found = _same(folder, wanted)
            log.info("the records in %r are there already; nothing was written", str(folder))
            return found
        try:
            names = _encode_all(corpus, tokenizer, parts, workers, progress)
            fingerprint = _write(parts, names, tokenizer, wanted, progress)
            os.rename(parts / "records", folder)
            _fsync(folder.parent)
            shutil.rmtree(parts, ignore_errors=True)
        finally:
            if parts.is_dir() and not any(parts.glob("*.npz")):
                shutil.rmtree(parts, ignore_errors=True)
    return fingerprint


def _same(folder: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    found = open_records(folder).fingerprint
    for field, value in wanted.items():
        if found[field] != value:
            raise ValueError(
                f"{str(folder)!r} was prepared with {field} {found[field]!r}, not {value!r}; "
                "delete the folder or choose another"
            )
    return found


@contextlib.contextmanager
def _alone(file: Path) -> Iterator[None]:
    """Until no other process of this machine prepares the same folder."""
    while True:
        with file.open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log.info("waiting for another process that prepares the same folder")
                fcntl.flock(lock, fcntl.LOCK_EX)
            # The one before removes the file: what was waited for may be another file by now.
            if not file.exists() or not os.path.samestat(os.fstat(lock.fileno()), file.stat()):
                continue
            try:
                yield
            finally:
                file.unlink(missing_ok=True)
            return


@contextlib.contextmanager
def _writing(place: Path) -> Iterator[None]:
    """What goes wrong inside is the disk's fault."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # array_record raises RuntimeError
        reason = str(error).split("\n")[0]
        raise OSError(
            f"cannot write in {str(place)!r}: {reason}; make room there and run again: what is "
            "finished is kept"
        ) from error


# --- encoding


class _Encoder:
    """Encodes a part and writes it: ids, where each document ends, and counts of the text."""

    def __init__(self, tokenizer: Tokenizer, detokenizer: str, parts: Path, dtype: str):
        self.tokenizer, self.parts, self.dtype = tokenizer, parts, dtype
        self.detokenize = DETOKENIZERS[detokenizer] if detokenizer else None

    def __call__(self, name: str, documents: list[str]) -> int:
        """Returns the number of documents."""
        words = sum(len(document.split()) for document in documents)
        if self.detokenize is not None:
            documents = [self.detokenize(document) for document in documents]
        separator = np.asarray(self.tokenizer.separator, self.dtype)
        rows = self.tokenizer.encode_batch(documents)
        both = [part for row in rows for part in (row.astype(self.dtype), separator)]
        ids = np.concatenate([*both, separator[:0]])
        ends = np.cumsum([len(row) + len(separator) for row in rows])
        characters = np.array([len(document) for document in documents])
        file = self.parts / f"{name}.npz"
        unfinished = file.with_suffix(f".tmp-{os.getpid()}")
        with _writing(self.parts):
            with unfinished.open("wb") as out:
                np.savez(out, ids=ids, ends=ends, words=words, characters=characters)
            unfinished.replace(file)
        return len(documents)


def _encode_all(
    corpus: Corpus, tokenizer: Tokenizer, parts: Path, workers: int, progress: bool
) -> dict[str, list[str]]:
    """Encode every part that is not there yet; returns the names of all, by split, in order."""
    from tqdm.auto import tqdm

    parts.mkdir(exist_ok=True)
    for file in parts.glob("*.tmp-*"):  # of processes that were killed
        file.unlink()
    # A part is known by its text; ids depend on these besides.
    identity = f"{tokenizer.fingerprint()[:16]}-{corpus.detokenizer or 'none'}"
    # Parts keep ids of any block length: the dtype is the tokenizer's alone.
    dtype = "<u2" if tokenizer.vocab_size <= 65535 else "<u4"
    encoder = _Encoder(tokenizer, corpus.detokenizer, parts, dtype)
    names: dict[str, list[str]] = {split: [] for split in corpus.streams}
    total = sum(corpus.sizes.values()) if corpus.sizes else None
    kept = 0
    bar = tqdm(desc="encode", unit=" documents", total=total, disable=not progress)
    pending: deque[Future[int]] = deque()  # at most `workers` parts, so that memory is bounded
    with bar, ThreadPoolExecutor(workers) as pool:
        for split in corpus.streams:
            for number, documents in enumerate(_cut(corpus.documents(split))):
                name = f"{split}-{number:06d}-{identity}-{_digest(documents)}"
                names[split].append(name)
                if (parts / f"{name}.npz").exists():
                    kept += 1
                    bar.update(len(documents))
                    continue
                if len(pending) == workers:
                    bar.update(pending.popleft().result())
                pending.append(pool.submit(encoder, name, documents))
        while pending:
            bar.update(pending.popleft().result())
    if kept:
        log.info("went on from %d finished parts of an earlier run", kept)
    return names


def _cut(documents: Iterator[str]) -> Iterator[list[str]]:
    part, size = [], 0
    for document in documents:
        part.append(document)
        size += len(document)
        if size >= PART:
            yield part
            part, size = [], 0
    if part:
        yield part


def _digest(documents: list[str]) -> str:
    digest = hashlib.sha256()
    for document in documents:
        data = document.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


# --- blocks


def _write(
    parts: Path, names: dict[str, list[str]], tokenizer: Tokenizer, wanted: dict, progress: bool
) -> dict[str, Any]:
    """The records, whole, in parts/records; returns the fingerprint."""
    records = parts / "records"
    shutil.rmtree(records, ignore_errors=True)
    records.mkdir()
    fingerprint = {
        **wanted,
        "splits": {
            split: _write_split(parts, names[split], tokenizer, wanted, records / split, progress)
            for split in names
        },
    }
    with _writing(records):
        for name, content in (
            ("tokenizer.json", tokenizer.to_dict()),
            ("fingerprint.json", fingerprint),
        ):
            (records / name).write_text(json.dumps(content, indent=1), encoding="utf-8")
        for path in (*records.rglob("*"), records):
            _fsync(path)
    for split in names:  # what was written can be read, before anyone sees it
        open_records(records).source(split)
    return fingerprint


def _write_split(
    parts: Path,
    names: list[str],
    tokenizer: Tokenizer,
    wanted: dict[str, Any],
    folder: Path,
    progress: bool,
) -> dict[str, Any]:
    from array_record.python.array_record_module import ArrayRecordWriter
    from tqdm.auto import tqdm

    folder.mkdir()
    counts = dict.fromkeys(
        ("documents", "words", "characters", "tokens", "dropped_tokens", "dropped_characters"), 0
    )
    text_digest = hashlib.sha256()

    def read() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for name in tqdm(names, desc="write", unit=" parts", disable=not progress, leave=False):
            with np.load(parts / f"{name}.npz") as part:
                ids, ends = part["ids"], part["ends"]
                counts["documents"] += len(ends)
                counts["words"] += int(part["words"])
                counts["characters"] += int(part["characters"].sum())
            counts["tokens"] += len(ids)
            text_digest.update(name.rsplit("-", 1)[1].encode())
            yield ids, ends

    def drop(ids: np.ndarray) -> None:
        counts["dropped_tokens"] += len(ids)
        counts["dropped_characters"] += tokenizer.count_characters(_text(ids, tokenizer))

    digest, blocks, writer = hashlib.sha256(), 0, None
    try:
        for row in FORMS[wanted["form"]](read(), wanted["length"], drop):
            record = row.astype(wanted["dtype"]).tobytes()
            digest.update(record)
            with _writing(folder):
                if blocks % SHARD == 0:
                    if writer is not None:
                        writer.close()
                    name = f"blocks-{blocks // SHARD:05d}.array_record"
                    writer = ArrayRecordWriter(str(folder / name), "group_size:1")
                writer.write(record)
            blocks += 1
        if writer is not None:
            with _writing(folder):
                writer.close()
    except BaseException:
        if writer is not None:
            with contextlib.suppress(RuntimeError):
                writer.close()
        raise
    if blocks == 0:
        raise ValueError(
            f"corpus has {counts['tokens']} tokens in split {folder.name!r}, fewer than one block "
            f"of length {wanted['length']}; give more text or a smaller data.length"
        )
    return {
        **counts,
        "blocks": blocks,
        "sha256": digest.hexdigest(),
        "text_sha256": text_digest.hexdigest(),
    }


def _text(ids: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """ids less the separator that may end them."""
    count = len(tokenizer.separator)
    ends = count and tuple(ids[-count:]) == tuple(tokenizer.separator)
    return ids[:-count] if ends else ids


def _packed(parts, length: int, drop: Callable[[np.ndarray], None]) -> Iterator[np.ndarray]:
    """The stream cut into rows of `length` ids."""
    tail: list[np.ndarray] = []  # documents, of which less than a block in all is not yet in one
    size = 0
    for ids, ends in parts:
        tail += np.split(ids, ends[:-1])
        size += len(ids)
        if size >= length:
            stream = np.concatenate(tail)
            whole = size // length * length
            yield from stream[:whole].reshape(-1, length)
            # Of the documents in the tail, where each begins is kept: each ends in a separator.
            starts = np.cumsum([0, *map(len, tail)])
            tail = [
                stream[max(start, whole) : stop] for start, stop in pairwise(starts) if stop > whole
            ]
            size -= whole
    for ids in tail:
        drop(ids)


def _padded(parts, length: int, drop: Callable[[np.ndarray], None]) -> Iterator[np.ndarray]:
    """A document a row: the number of its ids, then they, then zeros up to `length` ids."""
    for ids, ends in parts:
        for document in np.split(ids, ends[:-1]):
            kept = document[:length]
            if len(document) > length:
                drop(document[length:])
            row = np.zeros(length + 1, np.int64)
            row[0], row[1 : 1 + len(kept)] = len(kept), kept
            yield row


FORMS = {"packed": _packed, "padded": _padded}


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
