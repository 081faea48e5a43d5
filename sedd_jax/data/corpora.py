"""Corpora: documents by split, the text that ships with Python, and what all readers share."""

import contextlib
import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Self

from sedd_jax.data.detokenizers import DETOKENIZERS
from sedd_jax.host.files import refuse_pointer, sha256

SPLITS = ("train", "validation")
WINDOW = 50  # characters; text shared over this many or more counts as a leak between splits
BYTE_ORDER_MARK = "\ufeff"  # is not text
SHORT = 40  # characters; paragraphs below this (headings, "See also") may repeat inside a split
PATH = "data.path (sedd-prepare: --manual_dir)"  # the setting, for errors

Pairs = Iterable[tuple[str, str]]  # (split, document)
Files = list[tuple[str, Path]]  # with the name that does not depend on where the corpus lies


class ReadingProgress:
    """How far a pass over a corpus has come, for a bar: `done` of `total`, None: unknown."""

    def __init__(self, unit: str = " documents"):
        self.unit, self.total = unit, None
        self._done, self._file = 0, None

    def start(self, total: int | None) -> None:
        self.total, self._done, self._file = total, 0, None

    @property
    def done(self) -> int:
        return self._done + (self._file.tell() if self._file else 0)

    def count(self, amount: int = 1) -> None:
        self._done += amount

    @contextlib.contextmanager
    def opened(self, path: Path) -> Iterator[IO[bytes]]:
        """The file, whose bytes count as they are read; unit "B"."""
        with path.open("rb") as file:
            self._file = file
            try:
                yield file
            finally:
                self._file = None
        self._done += path.stat().st_size


@dataclass(frozen=True)
class Corpus:
    """Documents by split: `streams[split]()` starts a fresh pass over that split."""

    streams: Mapping[str, Callable[[], Iterable[str]]]
    source: Mapping[str, Any] = field(default_factory=dict)  # what it is, JSON-able, without paths
    detokenizer: str = ""  # row of DETOKENIZERS that makes the published text plain, if one does
    one_pass: Callable[[], Pairs] | None = None  # over all splits, where they lie in the same files
    progress: ReadingProgress = field(default_factory=ReadingProgress)  # of the latest pairs()
    is_read: str = ""  # what a pass reads, for people
    passed_over: str = ""  # and what lies beside it

    @classmethod
    def of_pairs(cls, splits: Iterable[str], pairs: Callable[[], Pairs], **fields) -> Self:
        """Returns the corpus of these splits, all of which a pass over pairs() reads."""

        def stream(name: str) -> Iterator[str]:
            return (document for split, document in pairs() if split == name)

        streams = {split: functools.partial(stream, split) for split in splits}
        return cls(streams, **fields, one_pass=pairs)

    def documents(self, split: str) -> Iterator[str]:
        """Returns a lazy pass over the published documents of a split, in a fixed order."""
        if split not in self.streams:
            raise ValueError(f"unknown split {split!r}; known: {', '.join(self.streams)}")
        return iter(self.streams[split]())

    def plain(self, split: str) -> Iterator[str]:
        """Returns the same, detokenized: what tokenizers see."""
        return map(self.detokenize, self.documents(split))

    @property
    def detokenize(self) -> Callable[[str], str]:
        """What makes a published document plain."""
        return DETOKENIZERS[self.detokenizer] if self.detokenizer else str

    def pairs(self) -> Iterator[tuple[str, str]]:
        """Yields (split, document) in one pass, a split's documents in their order."""
        if self.one_pass is not None:
            yield from self.one_pass()
            return
        self.progress.start(None)
        for split in self.streams:
            for document in self.documents(split):
                self.progress.count()
                yield split, document


def pydoc(heldout_fraction: float) -> Corpus:
    """The language reference that ships inside CPython: no download needed.

    Topics are held out by the hash of their name. The topics quote each other at length, so a
    paragraph of train that shares WINDOW whitespace-normalised characters with validation, or that
    repeats an earlier paragraph of its own split, is dropped. The text differs between versions
    of Python; the fingerprint of the records says which text a model saw.
    """
    from pydoc_data.topics import topics

    topics_of: dict[str, list[list[str]]] = {split: [] for split in SPLITS}
    for name in sorted(topics):
        paragraphs = [p for p in re.split(r"\n(?:[ \t]*\n)+", topics[name]) if p.strip()]
        topics_of[split_of(name, heldout_fraction)].append(paragraphs)
    forbidden: set[str] = set()
    documents: dict[str, tuple[str, ...]] = {}
    for split in ("validation", "train"):
        documents[split] = tuple(_without_repeats(topics_of[split], forbidden))
        if not documents[split]:
            raise ValueError(
                f"heldout_fraction {heldout_fraction} leaves split {split!r} of 'pydoc' empty; "
                "try 0.1"
            )
        for document in documents[split]:
            plain = _normalise(document)
            forbidden.update(plain[i : i + WINDOW] for i in range(len(plain) - WINDOW + 1))
    source = {"corpus": "pydoc", "heldout_fraction": heldout_fraction}
    return Corpus({split: documents[split].__iter__ for split in SPLITS}, source)


def _normalise(document: str) -> str:
    return " ".join(document.split())


def _without_repeats(documents: list[list[str]], forbidden: set[str]) -> Iterator[str]:
    """Yields the documents less paragraphs seen before or sharing a window with `forbidden`."""
    seen: set[str] = set()
    for paragraphs in documents:
        unique = []
        before = ""  # the end of those in unique: windows across paragraphs are checked too
        for paragraph in paragraphs:
            plain = _normalise(paragraph)
            joined = f"{before} {plain}".lstrip()
            windows = (joined[i : i + WINDOW] for i in range(len(joined) - WINDOW + 1))
            if plain in seen or any(window in forbidden for window in windows):
                continue
            if len(plain) >= SHORT:
                seen.add(plain)
            unique.append(paragraph.strip("\n"))
            before = joined[-(WINDOW - 1) :]
        if unique:
            yield "\n\n".join(unique) + "\n"


def listing_sha256(files: Files) -> str:
    """The sha256 of what the program sha256sum prints of the files."""
    listing = "".join(f"{sha256(file)}  {name}\n" for name, file in files)
    return hashlib.sha256(listing.encode()).hexdigest()


def split_of(identity: str, heldout_fraction: float) -> str:
    digest = hashlib.sha256(identity.encode("utf-8", "surrogateescape")).digest()
    draw = int.from_bytes(digest, "big") / 2**256  # uniform in [0, 1], the same on every machine
    return "validation" if draw < heldout_fraction else "train"


def decode(data: bytes, name: str, offset: int, remedy: str) -> str:
    """UTF-8 bytes as text; ValueError names the file and the byte, counted from offset."""
    if not offset:
        refuse_pointer(data, name)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        position = offset + error.start
        raise ValueError(f"{name}: invalid UTF-8 at byte {position}; {remedy}") from error


def json_lines(stream: IO[bytes], name: str, remedy: str) -> Iterator[tuple[int, str]]:
    """Yields (line number, what is under "text") of lines of JSON objects; skips blank lines.

    ValueError names the file, the line, the fault and the remedy.
    """
    offset = 0
    for number, line in enumerate(stream, start=1):
        content = decode(line, name, offset, remedy).removeprefix(BYTE_ORDER_MARK).strip()
        offset += len(line)
        if not content:
            continue
        try:
            value = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{name}:{number}: not JSON; {remedy}") from error
        yield number, text_of(value, f"{name}:{number}", remedy)


def text_of(value: Any, where: str, remedy: str) -> str:
    """What is under "text" of a JSON object or of a table's row; ValueError if that is not text."""
    try:
        document = value["text"]
        document.encode("utf-8")
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f'{where}: no string under "text"; {remedy}') from error
    except UnicodeEncodeError as error:
        fault = f"half a surrogate pair at character {error.start}"
        raise ValueError(f"{where}: {fault}; {remedy}") from error
    return document
