"""Corpora: documents by split, and the two that need no archive."""

import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import IO, Any, Self

from sedd_jax.data.detokenizers import DETOKENIZERS
from sedd_jax.files import refuse_pointer, sha256

SPLITS = ("train", "validation")
WINDOW = 50  # characters; text shared over this many or more counts as a leak between splits
BYTE_ORDER_MARK = "\ufeff"  # is not text
SHORT = 40  # characters; paragraphs below this (headings, "See also") may repeat inside a split
PATH = "data.path (sedd-prepare: --manual_dir)"  # the setting, for errors
FEW = 20  # documents; below this a split by document is too coarse, so the text is cut instead
REMEDY = 'give UTF-8 text, in a .jsonl file {"text": "..."} a line'  # of one's own text, for errors

Pairs = Iterable[tuple[str, str]]  # (split, document)
Files = list[tuple[str, Path]]  # with the name that does not depend on where the corpus lies


@dataclass(frozen=True)
class Corpus:
    """Documents by split: `streams[split]()` starts a fresh pass over that split."""

    streams: Mapping[str, Callable[[], Iterable[str]]]
    source: Mapping[str, Any] = field(default_factory=dict)  # what it is, JSON-able, without paths
    detokenizer: str = ""  # row of DETOKENIZERS that makes the published text plain, if one does
    one_pass: Callable[[], Pairs] | None = None  # over all splits, where they lie in the same files

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
        detokenize = DETOKENIZERS[self.detokenizer] if self.detokenizer else str
        return map(detokenize, self.documents(split))

    def pairs(self) -> Pairs:
        """Returns a lazy pass over (split, document), a split's documents in their order."""
        if self.one_pass is not None:
            return self.one_pass()
        return ((split, document) for split in self.streams for document in self.documents(split))


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


def text(path: str, heldout_fraction: float) -> Corpus:
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
    if not Path(path).exists():
        raise ValueError(f"no file or folder at {path!r}; set {PATH} to your text")
    roots = _roots(path)
    if len(roots) > 1:
        passes = (functools.partial(_documents, _text_files(root)) for root in roots)
        corpus = Corpus(dict(zip(SPLITS, passes)))
    else:
        corpus = Corpus.of_pairs(SPLITS, _split(_text_files(roots[0]), heldout_fraction))
    for split in SPLITS:
        if next(corpus.documents(split), None) is None:
            raise ValueError(
                f"split {split!r} of {path!r} is empty; give more text or another heldout_fraction"
            )
    return replace(corpus, source=text_source(path, heldout_fraction))


def text_source(path: str, heldout_fraction: float) -> dict[str, Any]:
    """What one's own text at `path` is: it changes with any byte of any file."""
    files = [pair for root in _roots(path) for pair in _text_files(root)]
    return {
        "corpus": "text",
        "version": "1.0.0",
        "files": {"*": listing_sha256(files)},
        "heldout_fraction": heldout_fraction,
    }


def listing_sha256(files: Files) -> str:
    """The sha256 of what the program sha256sum prints of the files."""
    listing = "".join(f"{sha256(file)}  {name}\n" for name, file in files)
    return hashlib.sha256(listing.encode()).hexdigest()


def split_of(identity: str, heldout_fraction: float) -> str:
    digest = hashlib.sha256(identity.encode("utf-8", "surrogateescape")).digest()
    draw = int.from_bytes(digest, "big") / 2**256  # uniform in [0, 1], the same on every machine
    return "validation" if draw < heldout_fraction else "train"


def _roots(path: str) -> list[Path]:
    """The subfolders of SPLITS where all exist, else the file or folder itself."""
    folders = [Path(path) / split for split in SPLITS]
    return folders if all(folder.is_dir() for folder in folders) else [Path(path)]


def _text_files(root: Path) -> Files:
    """The files of text in `root`, in order, each with its relative name."""
    paths = {file.relative_to(root).as_posix(): file for file in root.rglob("*")}
    if root.is_file():
        paths = {root.name: root}
    is_text = {n for n, f in paths.items() if f.suffix in (".txt", ".jsonl") and not f.is_dir()}
    if not is_text:
        raise ValueError(f"no .txt or .jsonl file in {str(root)!r}; add one or change {PATH}")
    return [(name, paths[name]) for name in sorted(is_text)]


def _read(files: Files) -> Iterator[tuple[str, str]]:
    """Yields (identity, document) of all that are not blank."""
    for name, file in files:
        try:
            if file.suffix == ".txt":
                document = decode(file.read_bytes(), str(file), 0, REMEDY)
                document = document.removeprefix(BYTE_ORDER_MARK)
                if document.strip():
                    yield name, document
                continue
            with file.open("rb") as stream:
                for number, document in json_lines(stream, str(file), REMEDY):
                    if document.strip():
                        yield f"{name}:{number}", document
        except OSError as error:
            raise ValueError(
                f"cannot read {str(file)!r}: {error.strerror}; repair or remove it"
            ) from error


def _documents(files: Files) -> Iterator[str]:
    return (document for _, document in _read(files))


def _split(files: Files, heldout_fraction: float) -> Callable[[], Pairs]:
    """Returns a function that starts a pass over all documents, each with its split."""
    lengths = [len(document) for _, document in islice(_read(files), FEW)]
    if not lengths:
        raise ValueError(f"the files of {str(files[0][1].parent)!r} hold no text; change {PATH}")
    if len(lengths) >= FEW:
        return lambda: (
            (split_of(identity, heldout_fraction), document) for identity, document in _read(files)
        )
    cut = round(sum(lengths) * (1.0 - heldout_fraction))
    near = round(sum(lengths) * heldout_fraction / 2)  # validation grows by half at most
    index = 0  # the document that holds the cut
    while index < len(lengths) - 1 and cut >= lengths[index]:
        cut -= lengths[index]
        index += 1
    _, document = next(islice(_read(files), index, None))
    cut = document.rfind("\n", max(0, cut - near), cut) + 1 or cut

    def pairs() -> Pairs:
        for i, (_, document) in enumerate(_read(files)):
            end = cut if i == index else len(document) * (i < index)  # of what is for train
            for split, piece in zip(SPLITS, (document[:end], document[end:])):
                if piece.strip():
                    yield split, piece

    return pairs


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
