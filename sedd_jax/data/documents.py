"""Documents of a published corpus: read from its files, stored and read again by TFDS.

TensorFlow Datasets is imported where it is used: it is slow to import. TensorFlow is never needed.
"""

import functools
import gzip
import hashlib
import json
import lzma
import re
import shutil
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path
from typing import IO, Any

from sedd_jax.data.corpora import decode, json_lines, split_of

SPLITS = ("train", "validation", "test")
SHARD = 65536  # documents in a file
BATCH = 4096  # documents that are written, or read from the files, at once
REMEDY = "download it again or repair it"  # of a published file, for errors
STALE = 3600  # seconds without a write after which another process's half-built folder is litter
DAMAGE = (
    EOFError,
    gzip.BadGzipFile,
    lzma.LZMAError,
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
)


@dataclass(frozen=True)
class Documents:
    """A corpus that TFDS has prepared. Small and picklable; the files are opened when read."""

    corpus: str
    folder: Path  # what TFDS prepared
    splits: Mapping[str, int]  # number of documents, in the order train, validation, test
    source: dict[str, Any]  # what the documents were made from, JSON-able and without paths

    def read(self, split: str, start: int, stop: int) -> list[str]:
        """Returns documents start, ..., stop - 1 of `split` as published, in published order."""
        if split not in self.splits:
            raise ValueError(f"unknown split {split!r}; known: {', '.join(self.splits)}")
        if not 0 <= start <= stop <= self.splits[split]:
            raise ValueError(
                f"documents {start} to {stop} are not in split {split!r}, which has "
                f"{self.splits[split]}; choose 0 <= start <= stop <= {self.splits[split]}"
            )
        try:
            examples = _open(self.folder, split).__getitems__(range(start, stop))
        except (ValueError, IndexError, RuntimeError, OSError) as error:
            raise ValueError(
                f"cannot read split {split!r} in {str(self.folder)!r}: "
                f"{str(error).split(chr(10))[0]}; delete the folder and prepare it again"
            ) from error
        return [example["text"].decode("utf-8") for example in examples]

    def stream(self, split: str) -> Iterator[str]:
        """Yields all documents of `split` in order, BATCH of them in memory."""
        for start in range(0, self.splits[split], BATCH):
            yield from self.read(split, start, min(start + BATCH, self.splits[split]))


@functools.lru_cache(maxsize=8)
def _open(folder: Path, split: str) -> Any:
    import tensorflow_datasets as tfds

    return tfds.builder_from_directory(folder).as_data_source(split)


@dataclass(frozen=True)
class Part:
    """One file to read: an archive, or a file that lay in one."""

    path: Path
    members: Mapping[str, str]  # name or pattern in the archive -> split; "" if the reader decides


@dataclass(frozen=True)
class Choices:
    """What a reader needs to know beside the file."""

    documents: str  # "lines", "whole" or "pages"
    heldout_fraction: float | None  # of pages that go to validation
    size: int | None  # bytes that a text8 of the published archive has


def prepare_documents(
    name: str,
    about: Mapping[str, str],
    source: dict[str, Any],
    data_dir: Path,
    prefix: str,
    examples: Callable[[], Iterator[tuple[str, str]]],
    *,
    progress: bool,
) -> Documents:
    """Has TFDS write (split, document) pairs to data_dir/name/CONFIG/version, unless it is there.

    CONFIG is prefix and a hash of source, so that documents of another source are never taken for
    these. `about` are TFDS's fields version, description, citation and license. `examples` is
    called only if something is to be written. The folder appears when all of it is written.
    """
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.utils.file_utils import incomplete_dir

    key = hashlib.sha256(json.dumps(source, sort_keys=True).encode()).hexdigest()[:12]
    config = f"{prefix}{key}"
    folder = data_dir / name / config / about["version"]
    if not folder.exists():
        sweep(folder.parent, "incomplete.*")
        try:
            with incomplete_dir(folder) as part:
                info = _dataset_info(name, config, about, source, part)
                _write_examples(info, examples(), progress)
        except OSError:
            if not folder.exists():  # else another process wrote it meanwhile
                raise
    try:
        splits = tfds.builder_from_directory(folder).info.splits
    except OSError as error:
        raise ValueError(f"{str(folder)!r} is not what TFDS wrote; delete the folder") from error
    counts = {split: splits[split].num_examples for split in SPLITS if split in splits}
    return Documents(name, folder, counts, source)


def _dataset_info(
    name: str, config: str, about: Mapping[str, str], source: dict[str, Any], folder: str
) -> Any:
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.dataset_info import DatasetIdentity

    return tfds.core.DatasetInfo(
        builder=DatasetIdentity(
            name=name,
            version=tfds.core.Version(about["version"]),
            data_dir=folder,
            module_name=__name__,
            config_name=config,
        ),
        description=about["description"],
        features=tfds.features.FeaturesDict({"text": tfds.features.Text()}),
        citation=about["citation"],
        license=about["license"],
        metadata=tfds.core.MetadataDict(source=source),
        disable_shuffling=True,
    )


def _write_examples(info: Any, examples: Iterator[tuple[str, str]], progress: bool) -> None:
    """Writes (split, document) pairs to info's folder, in one pass and in order.

    Not by a GeneratorBasedBuilder: it sorts the examples in memory, above 1 GB in files that it
    opens through TensorFlow, and reads the source once for each split.
    """
    import tensorflow_datasets as tfds
    from tqdm.auto import tqdm

    writer = tfds.core.SequentialWriter(info, SHARD, file_format="array_record")
    with tqdm(examples, desc=info.name, unit=" documents", disable=not progress) as bar:
        pairs = iter(bar)
        try:
            # add_examples writes the metadata anew each time, so it gets many at once.
            while batch := list(islice(pairs, BATCH)):
                by_split: dict[str, list[dict[str, str]]] = {}
                for split, text in batch:
                    by_split.setdefault(split, []).append({"text": text})
                writer.initialize_splits(list(by_split), fail_if_exists=False)
                writer.add_examples(by_split)
            writer.close_all()
        except RuntimeError as error:  # array_record's for what the file system refused
            raise OSError(str(error).split("\n")[0]) from error


def sweep(folder: Path, pattern: str) -> None:
    """Removes what killed processes left: folders of `pattern` not written to for STALE seconds."""
    for orphan in folder.glob(pattern):
        try:
            written = max(f.stat().st_mtime for f in (orphan, *orphan.rglob("*")))
        except FileNotFoundError:  # its owner is at work
            continue
        if written < time.time() - STALE:
            shutil.rmtree(orphan, ignore_errors=True)


def read_parts(
    parts: list[Part], reader: str, choices: Choices, splits: tuple[str, ...]
) -> Iterator[tuple[str, str]]:
    """Yields (split, document) of all parts in one pass; a split without a document is an error.

    Archives are read as streams. ValueError names the file, the fault and the remedy.
    """
    seen = set()
    for part in parts:
        missing = set(part.members)
        try:
            for name, stream in _members(part):
                pattern = next((p for p in part.members if fnmatchcase(name, p)), None)
                if pattern is None:
                    continue
                missing.discard(pattern)
                for split, text in READERS[reader](name, stream, part.members[pattern], choices):
                    seen.add(split)
                    yield split, text
        except DAMAGE as error:
            raise ValueError(
                f"{part.path}: damaged or cut short ({str(error) or type(error).__name__}); "
                "download it again"
            ) from error
        if missing:
            raise ValueError(f"{part.path}: no {min(missing)} inside; download it again")
    named = {split for part in parts for split in part.members.values() if split}
    empty = (named or set(splits)) - seen
    if empty:
        raise ValueError(
            f"split {min(empty)!r} has no document; give more text"
            + (" or another heldout_fraction" if choices.heldout_fraction is not None else "")
        )


def _members(part: Part) -> Iterator[tuple[str, IO[bytes]]]:
    """The files of an archive, each to be read before the next; or the file that `part` is."""
    name = part.path.name
    if name.endswith(".zip"):
        with zipfile.ZipFile(part.path) as archive:
            for info in archive.infolist():
                with archive.open(info) as stream:
                    yield info.filename, stream
    elif name.endswith((".tar.gz", ".tar.xz")):
        with (gzip.open if name.endswith("gz") else lzma.open)(part.path) as unpacked:
            yield from _tar_members(unpacked)
    else:
        (label,) = part.members
        with part.path.open("rb") as stream:
            yield label, stream


def _tar_members(unpacked: IO[bytes]) -> Iterator[tuple[str, IO[bytes]]]:
    """Not tarfile's "r|xz", which takes a file cut short for its end: it reads the plain tar."""
    with tarfile.open(fileobj=unpacked, mode="r|") as archive:
        for member in archive:
            if member.isfile():
                yield member.name.removeprefix("./"), archive.extractfile(member)
    while unpacked.read(1 << 20):  # to the end, where gzip and xz keep their checksums
        pass


def _lines(
    name: str, stream: IO[bytes], split: str, choices: Choices, *, strip: bool
) -> Iterator[tuple[str, str]]:
    if choices.documents == "whole":
        yield split, decode(stream.read(), name, 0, REMEDY)
        return
    offset = 0
    for data in stream:
        line = decode(data, name, offset, REMEDY)
        offset += len(data)
        stripped = line.strip()
        yield split, line if stripped and not strip else stripped


def _lambada(
    name: str, stream: IO[bytes], split: str, choices: Choices
) -> Iterator[tuple[str, str]]:
    for _, text in json_lines(stream, name, REMEDY):
        yield split, text


def _text8(name: str, stream: IO[bytes], split: str, choices: Choices) -> Iterator[tuple[str, str]]:
    """The customary split: 90% of the characters, 5% and 5%; of the whole text8, 90M, 5M, 5M."""
    data = stream.read()
    if choices.size is not None and len(data) != choices.size:
        raise ValueError(f"{name}: {len(data)} bytes, not {choices.size}; download it again")
    outside = re.search(rb"[^a-z ]", data)
    if outside:
        raise ValueError(
            f"{name}: byte {outside.start()} is {outside.group()!r}, neither a-z nor a space; "
            "write the text by text8's rules"
        )
    first, second = len(data) * 90 // 100, len(data) * 95 // 100
    pieces = (data[:first], data[first:second], data[second:])
    for part, piece in zip(SPLITS, pieces):
        if piece:
            yield part, piece.decode("ascii")


def _openwebtext(
    name: str, stream: IO[bytes], split: str, choices: Choices
) -> Iterator[tuple[str, str]]:
    """Pages, stripped, with at most one blank line in a row; held out by the hash of their name."""
    base = Path(name).name

    def pages() -> Iterator[tuple[str, str]]:
        if name.endswith(".jsonl"):
            for number, text in json_lines(stream, name, REMEDY):
                yield f"{base}:{number}", text
            return
        with lzma.open(stream) as unpacked:
            for page, content in _tar_members(unpacked):
                if page.endswith(".txt"):
                    yield f"{base}/{page}", decode(content.read(), f"{name}/{page}", 0, REMEDY)

    for identity, text in pages():
        yield split_of(identity, choices.heldout_fraction), re.sub(r"\n{3,}", "\n\n", text.strip())


READERS: dict[str, Callable[..., Iterator[tuple[str, str]]]] = {
    "lambada": _lambada,
    "openwebtext": _openwebtext,
    "sentences": functools.partial(_lines, strip=True),
    "text8": _text8,
    "wikitext": functools.partial(_lines, strip=False),
}
