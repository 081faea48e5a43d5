"""Preparation: documents to fixed-length blocks of ids, once.

The documents are cut into parts of about PART characters. Each part is encoded by itself and
saved beside the folder to be, in .NAME.parts: a preparation that is stopped continues from there.
Then the parts are read in order and the blocks written, so that the result does not depend on the
number of threads.
"""

import contextlib
import hashlib
import itertools
import json
import logging
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from sedd_jax.data.corpora import Corpus, Pairs
from sedd_jax.data.records import FORMAT, open_records
from sedd_jax.data.tokenizers import Tokenizer
from sedd_jax.host import files
from sedd_jax.host.console import progress_bar

log = logging.getLogger(__name__)

PART = 1 << 20  # characters; a part ends with the document that reaches it
SHARD = 65536  # blocks in a file
PARTS_FORMAT = 2  # parts of another are not used
COUNTS = ("documents", "words", "characters", "tokens")  # of a part


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
    what cannot be encoded. OSError where the parts cannot be written; finished parts remain.

    workers: parts that are encoded at the same time, in threads; the `tokenizers` library uses
    all CPUs for each part besides.
    """
    folder = Path(os.path.abspath(folder))
    check_request(folder, length, form, workers)
    description = _describe(corpus, tokenizer, length, form)
    if _is_there(folder):  # perhaps where nothing can be written, not even a claim
        return _fingerprint_of_same(folder, description)
    parts = folder.with_name(f".{folder.name}.parts")
    claim = folder.with_name(f".{folder.name}.lock")
    with contextlib.ExitStack() as stack:
        with _writing(folder.parent):
            folder.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(files.claimed(claim, f"prepares {str(folder)!r}", wait=True))
        if _is_there(folder):  # by now, from another process
            return _fingerprint_of_same(folder, description)
        try:
            part_files = _encode_all(corpus, tokenizer, parts, workers, progress)
            fingerprint = _write(part_files, tokenizer, description, parts / "records", progress)
            (parts / "records").rename(folder)
            files.sync_folder(folder.parent)
            shutil.rmtree(parts, ignore_errors=True)
        finally:
            if parts.is_dir() and not any(parts.glob("*.npz")):
                shutil.rmtree(parts, ignore_errors=True)
    return fingerprint


def check_request(folder: Path, length: int, form: str, workers: int) -> None:
    """ValueError for what cannot be prepared whatever the corpus is."""
    for name, value in (("data.length", length), ("workers", workers)):
        if value < 1:
            raise ValueError(f"{name} {value} is less than 1; give 1 or more")
    if form not in FORMS:
        raise ValueError(f"unknown form {form!r}; known: {', '.join(FORMS)}")
    if _is_there(folder):
        open_records(folder)


def _is_there(folder: Path) -> bool:
    """Whether anything is at `folder` but an empty folder."""
    return folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))


def _describe(corpus: Corpus, tokenizer: Tokenizer, length: int, form: str) -> dict[str, Any]:
    """The part of the fingerprint that is known before the corpus is read."""
    return {
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


def _fingerprint_of_same(folder: Path, description: dict[str, Any]) -> dict[str, Any]:
    """The fingerprint of the records in `folder`; ValueError if they do not fit description."""
    fingerprint = open_records(folder).fingerprint
    for field in sorted(description, key=lambda field: field == "source"):  # the longest last
        old, new = fingerprint[field], description[field]
        if old == new:
            continue
        if isinstance(new, dict):
            keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
            old, new = ({key: d[key] for key in keys if key in d} for d in (old, new))
        raise ValueError(
            f"{str(folder)!r} was prepared with {field} {old!r}, not {new!r}; choose another folder"
        )
    log.info("the records in %r are there already; nothing was written", str(folder))
    return fingerprint


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Names the folder, and the remedy, in an error of the file system."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # array_record raises RuntimeError
        reason = getattr(error, "strerror", None) or str(error).split("\n")[0]
        raise OSError(
            f"cannot write in {str(folder)!r}: {reason}; make room there, or name another folder, "
            "and run again: finished parts are not encoded again"
        ) from error


# --- encoding


def _encode_part(
    documents: list[str], tokenizer: Tokenizer, detokenize: Callable[[str], str], file: Path
) -> None:
    """Writes ids, where each document ends, and counts of the text."""
    words = sum(len(document.split()) for document in documents)
    documents = [detokenize(document) for document in documents]
    # Parts hold ids for any block length: the dtype is the tokenizer's alone.
    dtype = "<u2" if tokenizer.vocab_size <= 65535 else "<u4"
    separator = np.asarray(tokenizer.separator, dtype)
    rows = tokenizer.encode_batch(documents)
    ids = np.concatenate([part for row in rows for part in (row.astype(dtype), separator)])
    ends = np.cumsum([len(row) + len(separator) for row in rows])
    characters = sum(map(len, documents))
    counts = dict(zip(COUNTS, (len(documents), words, characters, len(ids)), strict=True))
    with _writing(file.parent), files.replacing(file) as out:
        np.savez(out, ids=ids, ends=ends, **counts)


def _encode_all(
    corpus: Corpus, tokenizer: Tokenizer, folder: Path, workers: int, progress: bool
) -> dict[str, list[Path]]:
    """Encodes every part that is not there yet; returns the files of all, by split, in order."""
    folder.mkdir(exist_ok=True)
    for file in folder.glob(".*.part"):  # of processes that were killed
        file.unlink()
    # A part is known by its text; its content depends on these besides.
    identity = f"{PARTS_FORMAT}-{tokenizer.fingerprint()[:16]}-{corpus.detokenizer or 'none'}"
    part_files: dict[str, list[Path]] = {split: [] for split in corpus.streams}
    num_reused = num_documents = 0
    jobs = _cut(corpus.pairs())
    for split, documents in itertools.islice(jobs, 1):  # a mistake shows before the bar does
        tokenizer.encode(corpus.detokenize(documents[0]))
        jobs = itertools.chain([(split, documents)], jobs)
    if corpus.is_read:
        passed_over = f"; passed over: {corpus.passed_over}" if corpus.passed_over else ""
        level = logging.WARNING if passed_over else logging.INFO
        log.log(level, "%s%s", corpus.is_read, passed_over)
    read = corpus.progress
    bar = progress_bar(desc="encode", unit=read.unit, unit_scale=True, is_shown=progress)
    pending: deque[Future[None]] = deque()  # bounded, and with it the memory
    with bar, ThreadPoolExecutor(workers) as pool:
        for split, documents in jobs:
            number = f"{len(part_files[split]):06d}"
            file = folder / f"{split}-{number}-{identity}-{_digest(documents)}.npz"
            part_files[split].append(file)
            if file.exists():
                num_reused += 1
            else:
                job = (documents, tokenizer, corpus.detokenize, file)
                pending.append(pool.submit(_encode_part, *job))
                if len(pending) > workers:
                    pending.popleft().result()
            num_documents += len(documents)
            bar.total = read.total
            if read.unit == "B":  # else the bar itself counts documents
                bar.set_postfix(documents=num_documents, refresh=False)
            bar.update(read.done - bar.n)
        for future in pending:
            future.result()
    if num_reused:
        log.info("went on from %d finished parts of an earlier run", num_reused)
    return part_files


def _cut(pairs: Pairs) -> Iterator[tuple[str, list[str]]]:
    """Yields parts of about PART characters, each of one split."""
    parts: dict[str, list[str]] = {}
    sizes: dict[str, int] = {}
    for split, document in pairs:
        parts.setdefault(split, []).append(document)
        sizes[split] = sizes.get(split, 0) + len(document)
        if sizes[split] >= PART:
            yield split, parts.pop(split)
            sizes[split] = 0
    yield from parts.items()


def _digest(documents: list[str]) -> str:
    digest = hashlib.sha256()
    for document in documents:
        data = document.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


# --- blocks


def _write(
    part_files: dict[str, list[Path]],
    tokenizer: Tokenizer,
    description: dict[str, Any],
    folder: Path,
    progress: bool,
) -> dict[str, Any]:
    """Writes the records, whole, in `folder`; returns the fingerprint."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    splits = {}
    for split, parts in part_files.items():
        bar = progress_bar(parts, desc="write", unit=" parts", is_shown=progress, leave=False)
        splits[split] = _write_split(bar, tokenizer, description, folder / split)
    fingerprint = {**description, "splits": splits}
    with _writing(folder):
        for name, content in (("tokenizer", tokenizer.to_dict()), ("fingerprint", fingerprint)):
            text = json.dumps(content, indent=1)
            (folder / f"{name}.json").write_text(text, encoding="utf-8")
        files.sync_tree(folder)
    for split in splits:  # what was written can be read, before anyone sees it
        open_records(folder).source(split)
    return fingerprint


def _write_split(
    parts: Iterable[Path], tokenizer: Tokenizer, description: dict[str, Any], folder: Path
) -> dict[str, Any]:
    """Writes the blocks of the parts in `folder`; returns the split's entry in the fingerprint."""
    counts = dict.fromkeys((*COUNTS, "dropped_tokens", "dropped_characters"), 0)
    text_digest, digest = hashlib.sha256(), hashlib.sha256()

    def read() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for file in parts:
            text_digest.update(file.stem.rsplit("-", 1)[1].encode())
            with np.load(file) as part:
                for name in COUNTS:
                    counts[name] += int(part[name])
                yield part["ids"], part["ends"]

    def drop(ids: np.ndarray) -> None:
        counts["dropped_tokens"] += len(ids)
        counts["dropped_characters"] += tokenizer.count_characters(_text(ids, tokenizer))

    def records() -> Iterator[bytes]:
        for row in FORMS[description["form"]](read(), description["length"], drop):
            record = row.astype(description["dtype"]).tobytes()
            digest.update(record)
            yield record

    with _writing(folder):
        num_blocks = _write_shards(records(), folder)
    if num_blocks == 0:
        raise ValueError(
            f"corpus has {counts['tokens']} tokens in split {folder.name!r}, fewer than one block "
            f"of length {description['length']}; give more text or a smaller data.length"
        )
    return {
        **counts,
        "blocks": num_blocks,
        "sha256": digest.hexdigest(),
        "text_sha256": text_digest.hexdigest(),
    }


def _write_shards(records: Iterable[bytes], folder: Path) -> int:
    """Writes SHARD records a file; returns their number. RuntimeError of a full disk."""
    from array_record.python.array_record_module import ArrayRecordWriter

    folder.mkdir()
    num_records = 0
    with contextlib.ExitStack() as open_file:
        for record in records:
            if num_records % SHARD == 0:
                open_file.close()
                file = folder / f"blocks-{num_records // SHARD:05d}.array_record"
                writer = ArrayRecordWriter(str(file), "group_size:1")
                open_file.callback(writer.close)
            writer.write(record)
            num_records += 1
    return num_records


def _text(ids: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """ids less the separator that may end them."""
    count = len(tokenizer.separator)
    ends = count and tuple(ids[-count:]) == tuple(tokenizer.separator)
    return ids[:-count] if ends else ids


def _packed(parts, length: int, drop: Callable[[np.ndarray], None]) -> Iterator[np.ndarray]:
    """The stream cut into rows of `length` ids."""
    tail, ends = np.zeros(0, np.uint8), np.zeros(0, np.int64)  # not yet in a row, less than one
    for ids, new_ends in parts:
        ends = np.concatenate([ends, len(tail) + new_ends])
        tail = np.concatenate([tail, ids])
        whole = len(tail) // length * length
        yield from tail[:whole].reshape(-1, length)
        tail, ends = tail[whole:], ends[ends > whole] - whole
    for document in np.split(tail, ends[:-1]):  # each ends in a separator, which is not text
        drop(document)


def _padded(parts, length: int, drop: Callable[[np.ndarray], None]) -> Iterator[np.ndarray]:
    """A document a row: the number of its ids, then they, then zeros up to `length` ids."""
    for ids, ends in parts:
        for document in np.split(ids, ends[:-1]):
            tokens = document[:length]
            if len(document) > length:
                drop(document[length:])
            row = np.zeros(length + 1, np.int64)
            row[0], row[1 : 1 + len(tokens)] = len(tokens), tokens
            yield row


FORMS = {"packed": _packed, "padded": _padded}
