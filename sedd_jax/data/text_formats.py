"""How files of one's own text are read, by the endings of their names."""

import bz2
import csv
import functools
import gzip
import io
import json
import lzma
import sys
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath
from typing import IO, Any

from sedd_jax.data.corpora import (
    BYTE_ORDER_MARK,
    Files,
    ReadingProgress,
    decode,
    json_lines,
    text_of,
)
from sedd_jax.data.readers import DAMAGE

REMEDY = 'give UTF-8 text, in a .jsonl file {"text": "..."} a line, or move the file elsewhere'


def _whole(stream: IO[bytes], name: str) -> Iterator[tuple[str, str]]:
    document = decode(stream.read(), name, 0, REMEDY).removeprefix(BYTE_ORDER_MARK)
    if "\0" in document:
        at = document.index("\0")
        raise ValueError(f"{name}: NUL at character {at}, as in UTF-16 or no text; {REMEDY}")
    yield "", document


def _lines(stream: IO[bytes], name: str) -> Iterator[tuple[str, str]]:
    for number, document in json_lines(stream, name, REMEDY):
        yield f":{number}", document


def _json(stream: io.BufferedReader, name: str) -> Iterator[tuple[str, str]]:
    """An array of objects, or an object a line."""
    if not stream.peek(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        yield from _lines(stream, name)
        return
    content = decode(stream.read(), name, 0, REMEDY).removeprefix(BYTE_ORDER_MARK)
    try:
        rows = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: not JSON; {REMEDY}") from error
    for number, row in enumerate(rows, start=1):
        yield f":{number}", text_of(row, f"{name}:{number}", REMEDY)


def _table(delimiter: str, stream: IO[bytes], name: str) -> Iterator[tuple[str, str]]:
    """A document a row of a table whose first row names its columns."""

    def lines() -> Iterator[str]:
        offset = 0
        for number, line in enumerate(stream, start=1):
            text = decode(line, name, offset, REMEDY)
            offset += len(line)
            if "\0" in text:
                raise ValueError(f"{name}:{number}: NUL, as in UTF-16 or no text; {REMEDY}")
            yield text.removeprefix(BYTE_ORDER_MARK) if number == 1 else text

    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # a document is a field; 128 KiB by default
    rows = csv.reader(lines(), delimiter=delimiter, strict=True)
    count, begin = 0, 1
    try:
        columns = next(filter(None, rows), [])
        if columns.count("text") != 1:
            fault = "two columns" if "text" in columns else "no column"
            raise ValueError(f'{name}: {fault} "text"; name one so, or {REMEDY}')
        begin = rows.line_num + 1
        for row in rows:
            if row and len(row) != len(columns):
                raise ValueError(
                    f"{name}:{begin}: {len(row)} fields in a row, {len(columns)} columns; quote "
                    f"the fields that hold {delimiter!r}, or {REMEDY}"
                )
            if row:
                count += 1
                yield f":{count}", row[columns.index("text")]
            begin = rows.line_num + 1
    except csv.Error as error:
        reason = str(error).replace("unexpected end of data", "a quote that nothing closes")
        raise ValueError(f"{name}:{begin}: {reason}; {REMEDY}") from error


def _parquet(stream: IO[bytes], name: str) -> Iterator[tuple[str, str]]:
    """A document a row."""
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        for batch in parquet.ParquetFile(stream).iter_batches(1024, columns=["text"]):
            for value in batch.column("text").to_pylist():
                number += 1
                yield f":{number}", text_of({"text": value}, f"{name}:{number}", REMEDY)
    except KeyError as error:
        raise ValueError(f'{name}: no column "text"; name one so, or {REMEDY}') from error
    except pyarrow.ArrowException as error:
        raise ValueError(f"{name}: {str(error).splitlines()[0]}; {REMEDY}") from error


def _unzstd(file: IO[bytes]) -> io.BufferedReader:
    import pyarrow

    return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(file, "r"), "zstd"))


# A reader takes (stream, its name for errors) and yields (what tells it from others, document).
READERS: dict[str, Callable[[Any, str], Iterator[tuple[str, str]]]] = {
    **dict.fromkeys((".txt", ".text", ".raw", ".tokens", ".md", ".markdown", ".rst"), _whole),
    **dict.fromkeys((".jsonl", ".ndjson"), _lines),
    ".json": _json,
    ".csv": functools.partial(_table, ","),
    ".tsv": functools.partial(_table, "\t"),
    ".parquet": _parquet,
}
OPENERS: dict[str, Callable[[IO[bytes]], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _unzstd,
}


def kind_of(name: str) -> tuple[str, str]:
    """("a.TXT.gz" -> (".txt", ".gz"))."""
    *before, last = ["", "", *map(str.lower, PurePosixPath(name).suffixes)]
    return (before[-1], last) if last in OPENERS else (last, "")


def documents(name: str, file: Any, opened: Callable[[Any], Any]) -> Iterator[tuple[str, str]]:
    """Yields (":3", document) of a file, by the ending of its name; of one with another ending, its
    text. opened(file) is a context that gives the bytes."""
    kind, packing = kind_of(name)
    try:
        with opened(file) as raw:
            stream = OPENERS[packing](raw) if packing else raw
            yield from READERS.get(kind, _whole)(stream, str(file))
    except (*DAMAGE, OSError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ValueError(
            f"cannot read {str(file)!r} to its end: {reason}; get it again or move it elsewhere"
        ) from error


def read(files: Files, progress: ReadingProgress) -> Iterator[tuple[str, str]]:
    """Yields (identity, document) of all that are not blank."""
    for name, file in files:
        for number, document in documents(name, file, progress.opened):
            if document.strip():
                yield name + number, document
