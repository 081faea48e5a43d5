"""Readers: the files of published corpora as (split, document), one function a format."""

import gzip
import lzma
import re
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO, NamedTuple

from sedd_jax.data.corpora import Pairs, ReadingProgress, decode, json_lines, split_of
from sedd_jax.host.files import refuse_pointer_file

SPLITS = ("train", "validation", "test")
REMEDY = "download it again or repair it"  # of a published file, for errors
DAMAGE = (
    EOFError,
    gzip.BadGzipFile,
    lzma.LZMAError,
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
)

# (name of a file, its bytes, its split or "" where the reader decides) -> (split, document)
Reader = Callable[[str, IO[bytes], str], Pairs]


class Part(NamedTuple):
    """One file to read: an archive, or a file that lay in one."""

    path: Path
    members: Mapping[str, str]  # name or pattern in the archive -> split; "" if the reader decides


def read_parts(
    parts: Sequence[Part], reader: Reader, splits: Iterable[str], progress: ReadingProgress
) -> Iterator:
    """Yields (split, document) of all parts in one pass; a split without a document is an error.

    Archives are read as streams. ValueError names the file, the fault and the remedy.
    """
    empty = set(splits)
    progress.start(sum(part.path.stat().st_size for part in parts))
    for part in parts:
        missing = set(part.members)
        try:
            for name, stream in _members(part.path, part.members, progress):
                pattern = next((p for p in part.members if fnmatchcase(name, p)), None)
                if pattern is None:
                    continue
                missing.discard(pattern)
                for split, document in reader(name, stream, part.members[pattern]):
                    empty.discard(split)
                    yield split, document
        except DAMAGE as error:
            raise ValueError(
                f"{part.path}: damaged or cut short ({str(error) or type(error).__name__}); "
                "download it again"
            ) from error
        if missing:
            raise ValueError(f"{part.path}: no {min(missing)} inside; download it again")
    if empty:
        raise ValueError(
            f"split {min(empty)!r} has no document; give more text or another heldout_fraction, "
            "if the corpus takes one"
        )


def _members(
    path: Path, labels: Iterable[str], progress: ReadingProgress
) -> Iterator[tuple[str, IO[bytes]]]:
    """The files of an archive, each to be read before the next; or the file itself, as labels."""
    refuse_pointer_file(path)
    with progress.opened(path) as file:
        if path.name.endswith(".zip"):
            with zipfile.ZipFile(file) as archive:
                for info in archive.infolist():
                    with archive.open(info) as stream:
                        yield info.filename, stream
        elif path.name.endswith((".tar.gz", ".tar.xz")):
            with (gzip.open if path.suffix == ".gz" else lzma.open)(file) as unpacked:
                yield from _tar_members(unpacked)
        else:
            (label,) = labels
            yield label, file


def _tar_members(unpacked: IO[bytes]) -> Iterator[tuple[str, IO[bytes]]]:
    """Not tarfile's "r|xz", which takes a file cut short for its end: it reads the plain tar."""
    with tarfile.open(fileobj=unpacked, mode="r|") as archive:
        for member in archive:
            if member.isfile():
                yield member.name.removeprefix("./"), archive.extractfile(member)
    while unpacked.read(1 << 20):  # to the end, where gzip and xz keep their checksums
        pass


def _lines(name: str, stream: IO[bytes]) -> Iterator[str]:
    offset = 0
    for line in stream:
        yield decode(line, name, offset, REMEDY)
        offset += len(line)


def whole(name: str, stream: IO[bytes], split: str) -> Pairs:
    """The file is a document."""
    yield split, decode(stream.read(), name, 0, REMEDY)


def sentences(name: str, stream: IO[bytes], split: str) -> Pairs:
    """A document a line, without the white space around it."""
    return ((split, line.strip()) for line in _lines(name, stream))


def wikitext(name: str, stream: IO[bytes], split: str) -> Pairs:
    """A document a line, with its newline; a blank line is empty."""
    return ((split, line if line.strip() else "") for line in _lines(name, stream))


def passages(name: str, stream: IO[bytes], split: str) -> Pairs:
    """A document a line of JSON."""
    return ((split, text) for _, text in json_lines(stream, name, REMEDY))


def text8(name: str, stream: IO[bytes], split: str) -> Pairs:
    """The customary split: 90% of the characters, 5% and 5%; of the whole text8, 90M, 5M, 5M."""
    data = stream.read()
    outside = re.search(rb"[^a-z ]", data)
    if outside:
        raise ValueError(
            f"{name}: byte {outside.start()} is {outside.group()!r}, neither a-z nor a space; "
            "write the text by text8's rules"
        )
    first, second = len(data) * 90 // 100, len(data) * 95 // 100
    pieces = (data[:first], data[first:second], data[second:])
    return ((part, piece.decode("ascii")) for part, piece in zip(SPLITS, pieces) if piece)


def openwebtext(name: str, stream: IO[bytes], split: str, heldout_fraction: float) -> Pairs:
    """Pages, stripped, with at most one blank line in a row; held out by the hash of their name."""
    for identity, text in _pages(name, stream):
        yield split_of(identity, heldout_fraction), re.sub(r"\n{3,}", "\n\n", text.strip())


def _pages(name: str, stream: IO[bytes]) -> Iterator[tuple[str, str]]:
    base = Path(name).name
    if name.endswith(".jsonl"):
        for number, text in json_lines(stream, name, REMEDY):
            yield f"{base}:{number}", text
        return
    with lzma.open(stream) as unpacked:
        for page, content in _tar_members(unpacked):
            if page.endswith(".txt"):
                yield f"{base}/{page}", decode(content.read(), f"{name}/{page}", 0, REMEDY)
