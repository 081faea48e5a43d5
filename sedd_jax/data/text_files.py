"""Text of one's own as a corpus: which files are read and how, and which split each is in."""

import codecs
import functools
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

from sedd_jax.data.corpora import (
    PATH,
    SPLITS,
    Corpus,
    Files,
    Pairs,
    ReadingProgress,
    listing_sha256,
    split_of,
)
from sedd_jax.data.text_formats import OPENERS, READERS, kind_of, read
from sedd_jax.host.files import local_path, refuse_pointer_file

FEW = 20  # documents; below this a split by document is too coarse, so the text is cut instead
SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("valid", "val", "dev", "validation", "eval", "evaluation"), "validation"),
    **dict.fromkeys(("heldout", "held-out", "held_out", "holdout"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
_WORD = "|".join(SPLIT_NAMES)
_IN_FILE_NAME = re.compile(rf"({_WORD})(?:[._-].*)?|.*[._-]({_WORD})|.*\.({_WORD})\..*", re.DOTALL)
_SHARD = re.compile(r"[._-]?\d+([._-]of[._-]\d+)?$")
# Of no split and no fault beside files that have one.
_ABOUT = re.compile(r"(readme|licen[cs]e|copying|notice|citation|changelog|authors)\b", re.ASCII)
# These may hold text, which is not dropped without a word.
CONTAINERS = (".zip", ".tar", ".tgz", ".7z", ".rar", ".lz4", ".z", ".arrow", ".feather", ".orc")
CONTAINERS += (".avro", ".warc", ".tfrecord", ".array_record", ".xlsx")


def text(path: str, heldout_fraction: float) -> Corpus:
    """A user's folder (recursive) or file: what READERS and OPENERS know, by the names' endings.

    Files come in the order of their relative POSIX paths; blank documents are skipped; names that
    begin with a dot are not read. Where the names of folders or files say which split a text is in
    (SPLIT_NAMES), those are the splits. Else a document goes by the hash of its relative path and
    number; with fewer than FEW documents, validation is the last `heldout_fraction` of all
    characters, cut after a line break where one is near. With heldout_fraction 1, all of it is.
    Documents are streamed: memory holds one at a time. A fault in a file raises ValueError when
    its line is read, which for a large corpus is during the pass and not here.
    """
    files_of, passed_over = _plan(path)
    if "" not in files_of and heldout_fraction == 1.0:
        raise ValueError(
            f"{path!r} has the splits {', '.join(files_of)}; leave heldout_fraction out, or name "
            "one of its files"
        )
    progress = ReadingProgress("B")
    if "" in files_of:
        pairs = _split(files_of[""], heldout_fraction, progress)
        corpus = Corpus.of_pairs(SPLITS if heldout_fraction < 1.0 else SPLITS[1:], pairs)
    else:
        passes = {s: functools.partial(_documents, f, progress) for s, f in files_of.items()}
        corpus = Corpus(passes)

        def pairs() -> Pairs:
            return ((split, document) for split in passes for document in passes[split]())

    for split in corpus.streams:
        if next(corpus.documents(split), None) is None:
            raise ValueError(
                f"split {split!r} of {path!r} is empty; give more text or another heldout_fraction"
            )
    size = sum(file.stat().st_size for files in files_of.values() for _, file in files)

    def one_pass() -> Pairs:
        progress.start(size)
        return pairs()

    return replace(
        corpus,
        source=_source(files_of, heldout_fraction),
        one_pass=one_pass,
        progress=progress,
        is_read=_isread(path, files_of, heldout_fraction),
        passed_over=passed_over,
    )


def text_source(path: str, heldout_fraction: float) -> dict[str, Any]:
    """What one's own text at `path` is: it changes with any byte of any file."""
    return _source(_plan(path)[0], heldout_fraction)


def _source(files_of: dict[str, Files], heldout_fraction: float) -> dict[str, Any]:
    hashes = {split or "*": listing_sha256(files) for split, files in files_of.items()}
    if "*" not in hashes:
        return {"corpus": "text", "version": "1.1.0", "files": hashes}
    about = {"corpus": "text", "version": "1.0.0", "files": hashes}
    return {**about, "heldout_fraction": heldout_fraction}


def _isread(path: str, files_of: dict[str, Files], heldout_fraction: float) -> str:
    kinds = Counter("".join(kind_of(name)) for files in files_of.values() for name, _ in files)
    shown = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    splits = ", ".join(f"{len(files)} {split}" for split, files in files_of.items())
    how = f"{heldout_fraction:g} of it held out" if "" in files_of else f"of which {splits}"
    return f"reading {path!r}: {shown}; {how}"


# --- which files


def root_of(path: str) -> Path:
    """The folder or file of one's own text; ValueError if there is none."""
    if not path:
        raise ValueError(f"{PATH} is empty; name a folder or file of .txt or .jsonl text")
    root = local_path(path)
    if not root.exists():
        raise ValueError(f"no file or folder at {str(path)!r}; set {PATH} to your text")
    return root


def _plan(path: str) -> tuple[dict[str, Files], str]:
    """(files by split, or all under "" where their names say none; what is passed over)."""
    root = root_of(path)
    if not root.is_dir():
        _check_file(root)
    paths, hidden = _walk(root) if root.is_dir() else ({root.name: root}, 0)
    files, others = [], []
    for name in sorted(paths):
        kind, packing = kind_of(name)
        if kind in READERS:
            files.append((name, paths[name]))
            _check_file(paths[name])
        elif packing or kind.split("-")[0] in CONTAINERS:
            raise ValueError(
                f"{str(paths[name])!r} is not read: unpack it, or write its text as .txt, .jsonl "
                f"or .parquet ({', '.join(filter(None, OPENERS))} may follow), or move it elsewhere"
            )
        elif _is_text(paths[name]) and not _ABOUT.match(PurePosixPath(name).name.lower()):
            raise ValueError(
                f"{str(paths[name])!r} holds text, and its name ends in none of "
                f"{', '.join(READERS)}: call it .txt if it is a document, or move it elsewhere"
            )
        else:
            others.append(name)
    if not files:
        holds = f" but {', '.join(others[:3])}" if others and root.is_dir() else ""
        raise ValueError(
            f"no text in {str(root)!r}{holds}; set {PATH} to files of {', '.join(READERS)}"
        )
    files_of, beside = _by_split(files) if root.is_dir() else ({"": files}, [])
    others = beside + others
    shown = others[:3] + [f"{len(others) - 3} more"] * (len(others) > 3)
    return files_of, ", ".join(shown + [f"{hidden} hidden"] * (hidden > 0))


def _walk(root: Path) -> tuple[dict[str, Path], int]:
    """(the files in root by their relative names, the number of hidden files and folders)."""
    paths, hidden, seen = {}, 0, set()

    def refuse(error: OSError) -> None:
        raise ValueError(f"cannot read the folder {error.filename!r}: {error.strerror}; mend it")

    for folder, folders, names in os.walk(root, onerror=refuse, followlinks=True):
        about = os.stat(folder)
        if (about.st_dev, about.st_ino) in seen:  # a link to a folder above it
            folders.clear()
            continue
        seen.add((about.st_dev, about.st_ino))
        shown = [name for name in names if name[0] != "."]
        hidden += len(names) - len(shown) + sum(name[0] == "." for name in folders)
        folders[:] = sorted(name for name in folders if name[0] != ".")
        for file in (Path(folder, name) for name in shown):
            paths[file.relative_to(root).as_posix()] = file
    return paths, hidden


def _check_file(file: Path) -> None:
    if not file.exists():
        fault = "it is a link to nothing"
    elif not file.is_file():  # a pipe is read once, if ever; a corpus is read several times
        fault = "it is a pipe or a device, not a file"
    elif not os.access(file, os.R_OK):
        fault = "permission denied"
    else:
        return refuse_pointer_file(file)
    raise ValueError(f"cannot read {str(file)!r}: {fault}; give its text as a file")


def _is_text(file: Path) -> bool:
    """Whether a file of any name begins as UTF-8 text that is not blank."""
    if not (file.is_file() and os.access(file, os.R_OK)):
        return False
    try:
        with file.open("rb") as opened:  # its first bytes may end amid a character
            text = codecs.getincrementaldecoder("utf-8")().decode(opened.read(1 << 16))
    except UnicodeDecodeError:
        return False
    return bool(text.strip()) and not re.search(r"\A%PDF-|[\x00-\x08\x0e-\x1a]", text)


def _by_split(files: Files) -> tuple[dict[str, Files], list[str]]:
    """Files by the split that their names say; ValueError where names contradict each other."""
    files_of: dict[str, Files] = {}
    words_of: dict[str, dict[str, str]] = {}  # of a split: each word for it and a file so named
    for name, file in files:
        words = _split_words(name)
        splits = {SPLIT_NAMES[word] for word in words}
        if len(splits) > 1:
            raise ValueError(f"{name!r} is in splits {' and '.join(sorted(splits))}; {_SORT}")
        split = next(iter(splits), "")
        files_of.setdefault(split, []).append((name, file))
        words_of.setdefault(split, {}).update(dict.fromkeys(words, name))
    if files_of.keys() <= {"", "train"}:  # nothing is held out by name
        return {"": files}, []
    rest = [name for name, _ in files_of.pop("", [])]
    for words in words_of.values():
        if len(words) > 1:
            raise ValueError(f"{' and '.join(map(repr, words.values()))} are one split; {_SORT}")
    for name in rest:
        if not _ABOUT.match(PurePosixPath(name).name.lower()):
            (split, others) = next(iter(files_of.items()))
            raise ValueError(f"{name!r} is in no split, {others[0][0]!r} is in {split}; {_SORT}")
    order = (*SPLITS, "test")
    return {split: files_of[split] for split in order if split in files_of}, rest


_SORT = "put each text in one of the folders train, validation and test, or rename it"


def _split_words(name: str) -> set[str]:
    """The names of splits among the folders of a path, or, without one, in the file's name."""
    *folders, file = PurePosixPath(name.lower()).parts
    words = {folder for folder in folders if folder in SPLIT_NAMES}
    if not words:
        stem = _SHARD.sub("", file.removesuffix("".join(kind_of(file))))
        match = _IN_FILE_NAME.fullmatch(stem)
        words = {match[match.lastindex]} if match else set()
    return words


def _documents(files: Files, progress: ReadingProgress) -> Iterator[str]:
    return (document for _, document in read(files, progress))


# --- a split of what comes without one


def _split(files: Files, heldout_fraction: float, progress: ReadingProgress) -> Callable[[], Pairs]:
    """Returns a function that starts a pass over all documents, each with its split."""
    lengths = [len(document) for _, document in islice(read(files, progress), FEW)]
    if not lengths:
        raise ValueError(f"the files of {str(files[0][1].parent)!r} hold no text; change {PATH}")
    if len(lengths) >= FEW:
        return lambda: (
            (split_of(identity, heldout_fraction), document)
            for identity, document in read(files, progress)
        )
    cut = round(sum(lengths) * (1.0 - heldout_fraction))
    near = round(sum(lengths) * heldout_fraction / 2)  # validation grows by half at most
    index = 0  # the document that holds the cut
    while index < len(lengths) - 1 and cut >= lengths[index]:
        cut -= lengths[index]
        index += 1
    _, document = next(islice(read(files, progress), index, None))
    cut = document.rfind("\n", max(0, cut - near), cut) + 1 or cut

    def pairs() -> Pairs:
        for i, (_, document) in enumerate(read(files, progress)):
            end = cut if i == index else len(document) * (i < index)  # of what is for train
            for split, piece in zip(SPLITS, (document[:end], document[end:])):
                if piece.strip():
                    yield split, piece

    return pairs
