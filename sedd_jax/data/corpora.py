"""Corpora: documents by split, and the two that need no archive."""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

from sedd_jax.data.detokenizers import DETOKENIZERS

SPLITS = ("train", "validation")
WINDOW = 50  # characters; text shared over this many or more counts as a leak between splits
BYTE_ORDER_MARK = "\ufeff"  # is not text
SHORT = 40  # characters; paragraphs below this (headings, "See also") may repeat inside a split
PATH = "data.path (sedd-prepare: --manual_dir)"  # the setting, for errors
FEW = 20  # documents; below this a split by document is too coarse, so the text is cut instead
REMEDY = 'give UTF-8 text, in a .jsonl file {"text": "..."} a line'  # of one's own text, for errors

Streams = Mapping[str, Callable[[], Iterable[str]]]


@dataclass(frozen=True)
class Corpus:
    """Documents by split: `streams[split]()` starts a fresh pass over that split."""

    streams: Streams
    source: Mapping[str, Any] = field(default_factory=dict)  # what it is, JSON-able, without paths
    detokenizer: str = ""  # row of DETOKENIZERS that makes the published text plain, if one does
    sizes: Mapping[str, int] | None = None  # documents of each split, where that is known

    def documents(self, split: str) -> Iterator[str]:
        """Returns a lazy pass over the published documents of a split, in a fixed order."""
        if split not in self.streams:
            raise ValueError(f"unknown split {split!r}; known: {', '.join(self.streams)}")
        return iter(self.streams[split]())

    def plain(self, split: str) -> Iterator[str]:
        """Returns the same, detokenized: what tokenizers see."""
        detokenize = DETOKENIZERS[self.detokenizer] if self.detokenizer else str
        return map(detokenize, self.documents(split))


def pydoc(heldout_fraction: float) -> Streams:
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
    return {split: documents[split].__iter__ for split in SPLITS}


def text(path: str, heldout_fraction: float) -> Streams:
    """A user's folder (recursive) or file: a document per .txt file and per line of a .jsonl file.

    Files come in the order of their relative POSIX paths; the lines of a .jsonl file are objects
    whose key "text" is the document; blank documents are skipped. The splits are the subfolders
    `train` and `validation` where both exist (files beside them are not read). Else a document goes
    by the hash of its relative path and line number; with fewer than FEW documents, validation
    is the last `heldout_fraction` of all characters, cut after a line break where one is near.
    Documents are streamed: memory holds one at a time. A fault in a file raises ValueError when
    its line is read, which for a large corpus is during the pass and not here.
    """
    if not path:
        raise ValueError(f"{PATH} is empty; name a folder or file of .txt or .jsonl text")
    root = Path(path)
    if not root.exists():
        raise ValueError(f"no file or folder at {path!r}; set {PATH} to your text")
    if all((root / split).is_dir() for split in SPLITS):
        streams = {split: _TextFiles(root / split) for split in SPLITS}
    else:
        streams = _split(_TextFiles(root), heldout_fraction)
    for split in SPLITS:
        if next(iter(streams[split]()), None) is None:
            raise ValueError(
                f"split {split!r} of {path!r} is empty; give more text or another heldout_fraction"
            )
    return streams


def split_of(identity: str, heldout_fraction: float) -> str:
    digest = hashlib.sha256(identity.encode("utf-8", "surrogateescape")).digest()
    draw = int.from_bytes(digest, "big") / 2**256  # uniform in [0, 1], the same on every machine
    return "validation" if draw < heldout_fraction else "train"


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


def files_of(path: str) -> list[tuple[str, Path]]:
    """The files that `text` reads at `path`, in order, each with its relative name."""
    root = Path(path)
    folders = [root / split for split in SPLITS]
    roots = folders if all(f.is_dir() for f in folders) else [root]
    return [
        (file.name if file == root else file.relative_to(root).as_posix(), file)
        for documents in map(_TextFiles, roots)
        for file in documents.files
    ]


class _TextFiles:
    """The documents of a file or folder as (identity, text), read again at each pass."""

    def __init__(self, root: Path):
        self.root = root
        paths = [root] if root.is_file() else sorted(root.rglob("*"), key=self._identity)
        self.files = [f for f in paths if f.suffix in (".txt", ".jsonl") and not f.is_dir()]
        if not self.files:
            raise ValueError(f"no .txt or .jsonl file in {str(root)!r}; add one or change {PATH}")
        if not any(True for _ in self.pairs()):
            raise ValueError(f"the files of {str(root)!r} hold no text; change {PATH}")

    def _identity(self, file: Path) -> str:
        return file.name if file == self.root else file.relative_to(self.root).as_posix()

    def __call__(self) -> Iterator[str]:
        return (document for _, document in self.pairs())

    def pairs(self) -> Iterator[tuple[str, str]]:
        for file in self.files:
            try:
                if file.suffix == ".txt":
                    document = decode(file.read_bytes(), str(file), 0, REMEDY)
                    document = document.removeprefix(BYTE_ORDER_MARK)
                    if document.strip():
                        yield self._identity(file), document
                    continue
                with file.open("rb") as stream:
                    for number, document in json_lines(stream, str(file), REMEDY):
                        if document.strip():
                            yield f"{self._identity(file)}:{number}", document
            except OSError as error:
                raise ValueError(
                    f"cannot read {str(file)!r}: {error.strerror}; repair or remove it"
                ) from error


def decode(data: bytes, name: str, offset: int, remedy: str) -> str:
    """UTF-8 bytes as text; ValueError names the file and the byte, counted from offset."""
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
            document = json.loads(content)["text"]
            document.encode("utf-8")
        except UnicodeEncodeError as error:
            fault = f"half a surrogate pair at character {error.start}"
            raise ValueError(f"{name}:{number}: {fault}; {remedy}") from error
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{name}:{number}: not JSON; {remedy}") from error
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f'{name}:{number}: no string under "text"; {remedy}') from error
        yield number, document


def _split(documents: _TextFiles, heldout_fraction: float) -> dict[str, Callable]:
    lengths = [len(document) for document in islice(documents(), FEW)]
    if len(lengths) >= FEW:

        def by_hash(split: str) -> Callable[[], Iterator[str]]:
            return lambda: (
                document
                for identity, document in documents.pairs()
                if split_of(identity, heldout_fraction) == split
            )

        return {split: by_hash(split) for split in SPLITS}

    cut = round(sum(lengths) * (1.0 - heldout_fraction))
    near = round(sum(lengths) * heldout_fraction / 2)  # validation grows by half at most
    index = 0  # the document that holds the cut
    while index < len(lengths) - 1 and cut >= lengths[index]:
        cut -= lengths[index]
        index += 1
    line_end = next(islice(documents(), index, None)).rfind("\n", max(0, cut - near), cut)
    if line_end >= 0:
        cut = line_end + 1

    def pieces(part: slice, whole: tuple[int, int | None]) -> Iterator[str]:
        piece = (document[part] for document in islice(documents(), index, index + 1))
        others = islice(documents(), *whole)
        ordered = chain(others, piece) if whole[0] == 0 else chain(piece, others)
        return (document for document in ordered if document.strip())

    return {
        "train": lambda: pieces(slice(0, cut), (0, index)),
        "validation": lambda: pieces(slice(cut, None), (index + 1, None)),
    }
