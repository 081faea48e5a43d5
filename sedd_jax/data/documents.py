"""Documents of a published corpus: read from its files, kept by TFDS, read at random.

TensorFlow Datasets and array_record are imported where they are used: they are slow to import.
TensorFlow is never needed.
"""

import functools
import gzip
import hashlib
import json
import lzma
import os
import re
import shutil
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO, Any, ClassVar

from sedd_jax.data.corpora import split_of

SPLITS = ("train", "validation", "test")
SHARD = 256 << 20  # bytes of records after which a new file begins
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
    """A corpus that TFDS has prepared. Small and picklable: workers open the files themselves."""

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
        if start == stop:  # array_record refuses to read nothing
            return []
        try:
            records = _open(self.folder, split, os.getpid())
            if len(records) != self.splits[split]:
                raise ValueError(f"it holds {len(records)} documents, not {self.splits[split]}")
            features = _features()
            return [
                features.deserialize_example_np(record)["text"].decode("utf-8")
                for record in records.__getitems__(list(range(start, stop)))
            ]
        except (ValueError, RuntimeError, OSError) as error:
            raise ValueError(
                f"cannot read split {split!r} in {str(self.folder)!r}: "
                f"{str(error).split(chr(10))[0]}; delete the folder and prepare it again"
            ) from error


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
    these. `about` are TFDS's fields version, description, citation and license. `examples` is called
    only if something is to be written. TFDS writes beside the folder and renames when whole.
    """
    key = hashlib.sha256(json.dumps(source, sort_keys=True).encode()).hexdigest()[:12]
    config = f"{prefix}{key}"
    builder = _make_builder(name, about, source, data_dir, config, examples, progress)
    folder = Path(builder.data_dir)
    if not folder.exists():
        sweep(folder.parent, "incomplete.*")
        try:
            builder.download_and_prepare(file_format="array_record")
        except OSError:
            if not folder.exists():
                raise
    if not builder.info.splits and (folder / "dataset_info.json").exists():
        builder.info.read_from_directory(str(folder))  # another process wrote it meanwhile
    if not builder.info.splits:
        raise ValueError(f"{str(folder)!r} is not what TFDS wrote; delete the folder")
    counts = {split: info.num_examples for split, info in builder.info.splits.items()}
    ordered = {split: counts[split] for split in SPLITS if split in counts}
    return Documents(name, folder, ordered, source)


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
    wanted = {split for part in parts for split in part.members.values() if split} or set(splits)
    if wanted - seen:
        raise ValueError(
            f"split {min(wanted - seen)!r} has no document; give more text"
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
    """tarfile's own "r|xz" takes a file cut short for its end, so it is given the plain tar."""
    with tarfile.open(fileobj=unpacked, mode="r|") as archive:
        for member in archive:
            if member.isfile():
                yield member.name.removeprefix("./"), archive.extractfile(member)
    while unpacked.read(1 << 20):  # to the end, where gzip and xz keep their checksums
        pass


def _decode(data: bytes, name: str, offset: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name}: invalid UTF-8 at byte {offset + error.start}; download it again or repair it"
        ) from error


def _lines(
    name: str, stream: IO[bytes], split: str, choices: Choices, *, strip: bool
) -> Iterator[tuple[str, str]]:
    if choices.documents == "whole":
        yield split, _decode(stream.read(), name, 0)
        return
    offset = 0
    for data in stream:
        line = _decode(data, name, offset)
        offset += len(data)
        stripped = line.strip()
        yield split, line if stripped and not strip else stripped


def _json_lines(name: str, stream: IO[bytes]) -> Iterator[tuple[int, str]]:
    offset = 0
    for number, data in enumerate(stream, start=1):
        line = _decode(data, name, offset)
        offset += len(data)
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
            text.encode("utf-8")  # not half a surrogate pair
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f'{name}:{number}: not a JSON object with a string under "text"; download it '
                "again or repair it"
            ) from error
        yield number, text


def _lambada(
    name: str, stream: IO[bytes], split: str, choices: Choices
) -> Iterator[tuple[str, str]]:
    for _, text in _json_lines(name, stream):
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
            for number, text in _json_lines(name, stream):
                yield f"{base}:{number}", text
            return
        with lzma.open(stream) as unpacked:
            for page, content in _tar_members(unpacked):
                if page.endswith(".txt"):
                    yield f"{base}/{page}", _decode(content.read(), f"{name}/{page}", 0)

    for identity, text in pages():
        yield split_of(identity, choices.heldout_fraction), re.sub(r"\n{3,}", "\n\n", text.strip())


READERS: dict[str, Callable[..., Iterator[tuple[str, str]]]] = {
    "lambada": _lambada,
    "openwebtext": _openwebtext,
    "sentences": functools.partial(_lines, strip=True),
    "text8": _text8,
    "wikitext": functools.partial(_lines, strip=False),
}


@functools.cache
def _features() -> Any:
    import tensorflow_datasets as tfds

    return tfds.features.FeaturesDict({"text": tfds.features.Text()})


@functools.lru_cache(maxsize=8)
def _open(folder: Path, split: str, process: int) -> Any:
    """Open shards; `process` keeps a forked worker from using its parent's file handles."""
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    return ArrayRecordDataSource(sorted(str(f) for f in folder.glob(f"*-{split}.array_record-*")))


def _make_builder(
    name: str,
    about: Mapping[str, str],
    source: dict[str, Any],
    data_dir: Path,
    config: str,
    examples: Callable[[], Iterator[tuple[str, str]]],
    progress: bool,
) -> Any:
    """Returns the TFDS builder of one corpus and source.

    It writes the shards itself. GeneratorBasedBuilder sorts examples in memory, above 1 GB in
    files that it opens through TensorFlow, and reads the source once for each split.
    """
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.dataset_builder import FileReaderBuilder

    corpus_name = name

    class PublishedText(FileReaderBuilder, skip_registration=True):
        name = corpus_name
        VERSION = tfds.core.Version(about["version"])
        BUILDER_CONFIGS: ClassVar = [tfds.core.BuilderConfig(name=config, version=about["version"])]
        pkg_dir_path = Path(__file__).parent  # else TFDS searches for one

        def _info(self) -> Any:
            info = tfds.core.DatasetInfo(
                builder=self,
                description=about["description"],
                features=_features(),
                citation=about["citation"],
                license=about["license"],
                metadata=tfds.core.MetadataDict(source=source),
                disable_shuffling=True,
            )
            info.initialize_from_bucket = lambda: None  # it would ask Google's bucket
            return info

        def _log_download_bytes(self) -> None:
            pass

        def _log_download_done(self) -> None:
            pass

        def _download_and_prepare(self, dl_manager: Any, download_config: Any) -> None:
            from tqdm.auto import tqdm

            splits: dict[str, _Shards] = {}
            bar = tqdm(examples(), desc=corpus_name, unit=" documents", disable=not progress)
            try:
                for split, text in bar:
                    if split not in splits:
                        splits[split] = _Shards(Path(self.data_dir) / split)
                    splits[split].write(_features().serialize_example({"text": text}))
            finally:
                bar.close()
                for shards in splits.values():
                    shards.close()
            infos = []
            for split in sorted(splits, key=SPLITS.index):
                shards, template = splits[split], self._get_filename_template(split)
                for i, path in enumerate(shards.paths):
                    path.rename(
                        template.sharded_filepath(shard_index=i, num_shards=len(shards.paths))
                    )
                infos.append(tfds.core.SplitInfo(split, shards.lengths, shards.bytes, template))
            self.info.set_splits(tfds.core.SplitDict(infos))

    return PublishedText(data_dir=str(data_dir), config=config)


class _Shards:
    """The files of one split while they are written."""

    def __init__(self, stem: Path):
        self.stem = stem
        self.paths: list[Path] = []
        self.lengths: list[int] = []  # records in each file
        self.bytes = 0  # in all
        self._room = 0  # bytes that the open file may still take
        self._writer: Any = None

    def write(self, record: bytes) -> None:
        from array_record.python.array_record_module import ArrayRecordWriter

        if self._room <= 0:
            self.close()
            self.paths.append(self.stem.with_name(f"{self.stem.name}-{len(self.paths)}.part"))
            self.lengths.append(0)
            self._writer = ArrayRecordWriter(str(self.paths[-1]), "group_size:1")
            self._room = SHARD
        with _file_errors():
            self._writer.write(record)
        self._room -= len(record)
        self.bytes += len(record)
        self.lengths[-1] += 1

    def close(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            with _file_errors():
                writer.close()


@contextmanager
def _file_errors() -> Iterator[None]:
    """array_record says RuntimeError where the file system said OSError: a full disk, say."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(str(error).split("\n")[0]) from error
