"""Packed records: a corpus as fixed-length blocks of ids in ArrayRecord files. Floor 1.

A folder of records holds fingerprint.json (what it was made from), tokenizer.json and, for each
split, blocks-*.array_record with one block a record. It is self-contained and never rewritten.
"""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sedd_jax.data.corpora import SPLITS, Corpus
from sedd_jax.data.tokenizers import Tokenizer, tokenizer_from_dict

FORMAT = 1
SHARD = 65536  # blocks in a file


@dataclass(frozen=True)
class Records:
    """An open folder of records."""

    folder: Path
    fingerprint: dict[str, Any]  # the content of fingerprint.json
    tokenizer: Tokenizer

    @property
    def length(self) -> int:
        """Tokens in a block."""
        return self.fingerprint["length"]

    def source(self, split: str) -> Sequence[bytes]:
        """Returns the blocks of "train" or "heldout" as an indexable source of bytes."""
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        if split not in self.fingerprint["splits"]:
            raise ValueError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
        files = sorted(str(f) for f in (self.folder / split).glob("blocks-*.array_record"))
        blocks = self.fingerprint["splits"][split]["blocks"]
        try:
            source = ArrayRecordDataSource(files)
            found = len(source)
        except (ValueError, RuntimeError, OSError) as error:
            reason = str(error).split("\n")[0]
            raise ValueError(
                f"cannot read the records of split {split!r} in {str(self.folder)!r}: {reason}; "
                "delete the folder and prepare it again"
            ) from error
        if found != blocks:
            raise ValueError(
                f"{str(self.folder)!r} holds {found} blocks in split {split!r}, its fingerprint "
                f"says {blocks}; delete the folder and prepare it again"
            )
        return source

    def parse(self, record: bytes) -> np.ndarray:
        """Returns the block of one record, int32 [L]."""
        return np.frombuffer(record, self.fingerprint["dtype"]).astype(np.int32)


def open_records(folder: str | Path) -> Records:
    """Opens a prepared folder; ValueError if it is missing, half-written or not of this format."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(
            f"no folder at {str(folder)!r}; prepare records there or name another folder"
        )
    try:
        fingerprint = json.loads((folder / "fingerprint.json").read_text(encoding="utf-8"))
        if fingerprint["format"] != FORMAT:
            raise ValueError(f"its format {fingerprint['format']} is not {FORMAT}")
        tokenizer = tokenizer_from_dict(
            json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        )
        if tokenizer.fingerprint() != fingerprint["tokenizer"]["sha256"]:
            raise ValueError("tokenizer.json is not the tokenizer it was prepared with")
    except FileNotFoundError as error:
        raise ValueError(
            f"{str(folder)!r} is no complete folder of records, {Path(error.filename).name} is "
            "missing; delete the folder or choose another"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"cannot open the records in {str(folder)!r}: {error}; delete the folder and prepare "
            "it again"
        ) from error
    return Records(folder, fingerprint, tokenizer)


def prepare(
    corpus: Corpus,
    tokenizer: Tokenizer,
    length: int,
    folder: str | Path,
    *,
    source: dict[str, Any],
) -> dict[str, Any]:
    """Packs both splits of `corpus` into blocks of `length` tokens; returns the fingerprint.

    Documents are encoded in order, each followed by the tokenizer's separator, and the stream is
    cut into blocks; the tail shorter than a block is dropped and counted. Each split's entry in
    the fingerprint counts `documents`, `tokens` (separators and tail included), `dropped_tokens`,
    `blocks` and `characters`: of the documents, less what the dropped tail decodes to, so those
    of the packed blocks without separators (exact but for a character cut by the last block's
    edge; for 'bert', whose decoding is lossy, the tail is approximate).

    Everything is written beside `folder`, in `.NAME.tmp-*`, and renamed when whole, so `folder`
    is there in full or not at all. A complete folder made from the same source (`source` is any
    JSON-able account of it, compared as such), tokenizer and length is reused without reading
    the corpus; any other raises ValueError.
    """
    if length < 1:
        raise ValueError(f"data.length {length} is less than 1; give the tokens in a block")
    folder = Path(os.path.abspath(folder))
    fingerprint = {
        "format": FORMAT,
        "source": json.loads(json.dumps(source)),
        "tokenizer": {
            "name": tokenizer.name,
            "vocab_size": tokenizer.vocab_size,
            "sha256": tokenizer.fingerprint(),
        },
        "length": length,
        "dtype": "<u2" if tokenizer.vocab_size <= 65535 else "<u4",
    }
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        return _same(folder, fingerprint)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.tmp-{uuid.uuid4().hex}")
    temporary.mkdir()
    try:
        fingerprint["splits"] = {
            split: _write_split(corpus, tokenizer, fingerprint, split, temporary / split)
            for split in SPLITS
        }
        for name, content in (
            ("tokenizer.json", tokenizer.to_dict()),
            ("fingerprint.json", fingerprint),
        ):
            (temporary / name).write_text(json.dumps(content, indent=1), encoding="utf-8")
        for split in SPLITS:  # what was written can be read, before anyone sees it
            open_records(temporary).source(split)
        for path in (*temporary.rglob("*"), temporary):
            _fsync(path)
        try:
            os.rename(temporary, folder)
        except OSError:
            if not (folder / "fingerprint.json").exists():
                raise
            return _same(folder, fingerprint)  # another process was first
        _fsync(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # gone already where the rename succeeded
    return fingerprint


def _same(folder: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    found = open_records(folder).fingerprint
    for field, value in wanted.items():
        if field != "splits" and found[field] != value:
            raise ValueError(
                f"{str(folder)!r} was prepared with {field} {found[field]!r}, not {value!r}; "
                "delete the folder or choose another"
            )
    return found


def _write_split(
    corpus: Corpus, tokenizer: Tokenizer, fingerprint: dict[str, Any], split: str, folder: Path
) -> dict[str, Any]:
    from array_record.python.array_record_module import ArrayRecordWriter

    folder.mkdir()
    length, separator = fingerprint["length"], np.asarray(tokenizer.separator, np.int32)
    counts = {"documents": 0, "tokens": 0, "characters": 0, "blocks": 0, "dropped_tokens": 0}
    tail: list[np.ndarray] = []  # ids not yet packed, fewer than `length` between documents

    def blocks() -> Iterator[np.ndarray]:
        for document in corpus.documents(split):
            ids = np.concatenate([tokenizer.encode(document), separator])
            counts["documents"] += 1
            counts["tokens"] += len(ids)
            counts["characters"] += len(document)
            counts["dropped_tokens"] += len(ids)  # until packed
            tail.append(ids)
            whole = counts["dropped_tokens"] // length * length
            if whole:
                stream = np.concatenate(tail)
                tail[:] = [stream[whole:]]
                counts["dropped_tokens"] -= whole
                yield from stream[:whole].reshape(-1, length)

    digest = hashlib.sha256()
    writer = None
    try:
        for block in blocks():
            if counts["blocks"] % SHARD == 0:
                if writer is not None:
                    writer.close()
                name = f"blocks-{counts['blocks'] // SHARD:05d}.array_record"
                writer = ArrayRecordWriter(str(folder / name), "group_size:1")
            record = block.astype(fingerprint["dtype"]).tobytes()
            digest.update(record)
            writer.write(record)
            counts["blocks"] += 1
    finally:
        if writer is not None:
            writer.close()
    if counts["blocks"] == 0:
        raise ValueError(
            f"corpus has {counts['tokens']} tokens in split {split!r}, fewer than one block of "
            f"length {length}; give more text or a smaller data.length"
        )
    for ids in tail:  # each ends in the separator of its document, or is empty
        counts["characters"] -= len(tokenizer.decode(ids[: max(0, len(ids) - len(separator))]))
    return {**counts, "sha256": digest.hexdigest()}


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
