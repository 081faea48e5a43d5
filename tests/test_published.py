"""Published corpora: real text in the published layouts and archives, TFDS, an HTTP server."""

import dataclasses
import functools
import hashlib
import io
import json
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import requests
from conftest import REPOSITORY, real, says

from sedd_jax.data import documents as documents_module
from sedd_jax.data import published
from sedd_jax.data.corpora import split_of
from sedd_jax.data.detokenizers import DETOKENIZERS
from sedd_jax.data.documents import READERS, SPLITS
from sedd_jax.data.published import PUBLISHED, open_published

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LM1B = "1-billion-word-language-modeling-benchmark-r13output"


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Loopback only: whatever asks for another host fails at once."""
    import socket

    connect = socket.socket.connect

    def guarded(self, address):
        if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise OSError(f"the test asked the network for {address[0]}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture
def opened(tmp_path):
    """open_published with the test's own data_dir and no bar."""
    return functools.partial(open_published, data_dir=tmp_path / "tfds", progress=False)


@pytest.fixture
def row(monkeypatch):
    """Changes a row's archive, so that one made here stands for the published one."""

    def change(name: str, index: int = 0, archive: Path | None = None, **fields):
        old = PUBLISHED[name]
        in_row = {k: fields.pop(k) for k in list(fields) if k in ("member_size", "version")}
        if archive is not None:
            fields["sha256"] = hashlib.sha256(archive.read_bytes()).hexdigest()
        archives = list(old.archives)
        archives[index] = dataclasses.replace(archives[index], **fields)
        monkeypatch.setitem(
            PUBLISHED, name, dataclasses.replace(old, archives=tuple(archives), **in_row)
        )

    return change


def everything(documents, split: str) -> list[str]:
    return documents.read(split, 0, documents.splits[split])


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def zip_of(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def tar_of(members: dict[str, bytes], mode: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def wikitext_zip(folder: Path) -> Path:
    """The published layout; the validation text stands for train too."""
    raw = {
        part: real(f"wikitext2/wiki.{source}.raw").read_bytes()
        for part, source in (("train", "valid"), ("valid", "valid"), ("test", "test"))
    }
    members = {f"wikitext-2-raw/wiki.{part}.raw": content for part, content in raw.items()}
    return zip_of(folder / "wikitext-2-raw-v1.zip", {"wikitext-2-raw/": b"", **members})


# --- the table


def test_every_row_of_the_table_can_be_used():
    for name, entry in PUBLISHED.items():
        assert entry.reader in READERS, name
        assert entry.detokenizer is None or entry.detokenizer in DETOKENIZERS, name
        assert set(entry.splits) <= set(SPLITS) and entry.documents and entry.licence
        for archive in entry.archives:
            assert re.fullmatch("[0-9a-f]{64}", archive.sha256)
            assert archive.urls and all(url.endswith(archive.name) for url in archive.urls)
            assert set(archive.members.values()) <= {"", *entry.splits}
    assert len(PUBLISHED["lm1b"].archives[0].members) == 99 + 50


def test_what_cannot_be_opened_is_named(tmp_path, opened):
    with says("unknown corpus 'wiki'; known: lambada, lm1b,", "wikitext2"):
        opened("wiki", manual_dir=tmp_path)
    with says("documents 'whole' is not for corpus 'lm1b'; known: lines"):
        opened("lm1b", manual_dir=tmp_path, documents="whole")
    with says("heldout_fraction 1.5 is not between 0 and 1; try"):
        opened("openwebtext", manual_dir=tmp_path, heldout_fraction=1.5)
    with says("no folder at", "nowhere'; set data.path", "--manual_dir) to one with 'ptb'"):
        opened("ptb", manual_dir=tmp_path / "nowhere")
    with says("looked for wikitext-2-raw-v1.zip, wikitext-2-raw/wiki.train.raw", "to download"):
        opened("wikitext2", manual_dir=tmp_path)
    with says(f"looked for {LM1B}.tar.gz", "..., ", "heldout-00049-of-00050;"):
        opened("lm1b", manual_dir=tmp_path)
    assert not (tmp_path / "tfds").exists()


# --- reading the published files


def test_wikitext_lines_keep_their_newline_and_blank_lines_are_empty(opened):
    folder = real("wikitext2/wiki.test.raw").parent
    documents = opened("wikitext2", manual_dir=folder)
    assert dict(documents.splits) == {"validation": 3760, "test": 4358}  # there is no train here
    lines = everything(documents, "test")
    assert lines[:3] == ["", " = Robert Boulter = \n", ""]
    raw = (folder / "wiki.test.raw").read_text(encoding="utf-8").splitlines(keepends=True)
    assert sum(map(len, lines)) == sum(len(line) for line in raw if line.strip())
    assert "".join(lines).split() == "".join(raw).split()
    assert documents.read("test", 4357, 4358) == [lines[4357]]
    assert documents.read("test", 7, 7) == []
    with says("documents 4357 to 4359 are not in split 'test', which has 4358"):
        documents.read("test", 4357, 4359)
    with says("unknown split 'train'; known: validation, test"):
        documents.read("train", 0, 1)


def test_a_whole_file_is_one_document(opened):
    folder = real("wikitext2/wiki.test.raw").parent
    documents = opened("wikitext2", manual_dir=folder, documents="whole")
    assert documents.splits["test"] == 1
    assert everything(documents, "test") == [(folder / "wiki.test.raw").read_text("utf-8")]


def test_ptb_is_its_published_count_of_words(opened):
    documents = opened("ptb", manual_dir=real("ptb/ptb.test.txt").parent)
    assert list(documents.splits) == ["train", "validation", "test"]
    words = {
        split: sum(len(d.split()) + 1 for d in everything(documents, split))
        for split in documents.splits
    }
    assert words == {"train": 929589, "validation": 73760, "test": 82430}
    assert documents.read("test", 0, 1) == ["no it was n't black monday"]


def test_lambada_is_5153_passages(opened):
    documents = opened("lambada", manual_dir=real("lambada/lambada_test.jsonl").parent)
    assert dict(documents.splits) == {"test": 5153}
    assert documents.read("test", 0, 1)[0].startswith("In my palm is a clear stone, and inside")
    assert documents.read("test", 5152, 5153)[0].startswith("“Yes, Grandmother, and don’t worry")


def test_lm1b_is_the_sentences_of_its_shards(tmp_path, opened, row):
    train = f"{LM1B}/training-monolingual.tokenized.shuffled/news.en-00001-of-00100"
    folder = f"{LM1B}/heldout-monolingual.tokenized.shuffled"
    heldout = {
        f"{folder}/news.en.heldout-{i:05d}-of-00050": real(
            f"lm1b/news.en.heldout-{i:05d}-of-00050"
        ).read_bytes()
        for i in (10, 11)
    }
    members = {
        f"{LM1B}/README": b"not a document",
        train: "A made-up sentence .\nAnother £ 5 one . \n".encode(),
        f"{folder}/news.en-00000-of-00100": b"what heldout was cut from\n",
        **heldout,
    }
    archive = write(tmp_path / f"given/{LM1B}.tar.gz", tar_of(members, "w:gz"))
    row("lm1b", archive=archive, members={train: "train", **dict.fromkeys(heldout, "test")})
    documents = opened("lm1b", manual_dir=archive.parent)
    sentences = b"".join(heldout.values()).decode().strip("\n").split("\n")
    assert everything(documents, "train") == ["A made-up sentence .", "Another £ 5 one ."]
    assert everything(documents, "test") == [s.strip() for s in sentences]
    assert dict(documents.splits) == {"train": 2, "test": len(sentences)}


def test_lm1b_files_laid_flat_are_told_apart(tmp_path, opened):
    for name in ("news.en-00000-of-00100", "news.en-00001-of-00100"):
        write(tmp_path / "flat" / name, name)
    heldout = real("lm1b/news.en.heldout-00010-of-00050")
    shutil.copy(heldout, tmp_path / "flat")
    documents = opened("lm1b", manual_dir=tmp_path / "flat")
    assert everything(documents, "train") == ["news.en-00001-of-00100"]
    assert documents.splits["test"] == heldout.read_text().count("\n")


@pytest.fixture(scope="module")
def text8() -> bytes:
    """WikiText by text8's rules: lower case, digits spelled out, all else a single space."""
    text = real("wikitext2/wiki.test.raw").read_text(encoding="utf-8").lower()
    for digit, word in enumerate(DIGITS):
        text = text.replace(str(digit), f" {word} ")
    return re.sub("[^a-z]+", " ", text).encode()


def test_text8_is_cut_at_ninety_and_ninety_five_percent(tmp_path, opened, row, text8):
    archive = zip_of(tmp_path / "given/text8.zip", {"text8": text8})
    row("text8", archive=archive)
    with says(f"text8: {len(text8)} bytes, not 100000000; download it again"):
        opened("text8", manual_dir=archive.parent)
    row("text8", member_size=len(text8))
    documents = opened("text8", manual_dir=archive.parent)
    assert dict(documents.splits) == {"train": 1, "validation": 1, "test": 1}
    pieces = [documents.read(split, 0, 1)[0] for split in documents.splits]
    assert "".join(pieces).encode() == text8
    first, second = len(text8) * 90 // 100, len(text8) * 95 // 100
    assert [len(p) for p in pieces] == [first, second - first, len(text8) - second]


def test_a_text8_file_of_ones_own_may_have_any_size(tmp_path, opened, text8):
    file = write(tmp_path / "own/text8", text8[:1000])
    documents = opened("text8", manual_dir=file.parent)
    assert [len(documents.read(s, 0, 1)[0]) for s in documents.splits] == [900, 50, 50]
    write(file, text8[:1000] + b"\n")
    with says("text8: byte 1000 is b'\\n', neither a-z nor a space; write"):
        opened("text8", manual_dir=file.parent)
    write(file, b"")
    with says("split 'test' has no document; give more text"):
        opened("text8", manual_dir=file.parent)


@pytest.fixture(scope="module")
def pages() -> list[str]:
    lines = real("openwebtext_1k/openwebtext-1000.jsonl").open(encoding="utf-8")
    return [json.loads(line)["text"] for _, line in zip(range(60), lines)]


def subsets_of(pages: list[str]) -> dict[str, bytes]:
    halves = {"urlsf_subset00-1_data.xz": pages[:30], "urlsf_subset00-2_data.xz": pages[30:]}
    return {
        f"openwebtext/{name}": tar_of(
            {f"./{i:07d}-page.txt": f"\n{page}\n\n\n\n".encode() for i, page in enumerate(half)},
            "w:xz",
        )
        for name, half in halves.items()
    }


def test_openwebtext_pages_are_read_from_tars_in_a_tar(tmp_path, opened, row, pages):
    subsets = subsets_of(pages)
    archive = write(tmp_path / "given/openwebtext.tar.xz", tar_of(subsets, "w:xz"))
    row("openwebtext", archive=archive)
    documents = opened("openwebtext", manual_dir=archive.parent, heldout_fraction=0.2)
    wanted = {"train": [], "validation": []}
    for i, page in enumerate(pages):
        identity = f"urlsf_subset00-{1 + i // 30}_data.xz/{i % 30:07d}-page.txt"
        split = split_of(identity, 0.2)
        wanted[split].append(re.sub("\n\n\n+", "\n\n", page.strip()))
    assert {split: everything(documents, split) for split in documents.splits} == wanted
    assert len(wanted["validation"]) > 3
    for name, content in subsets.items():
        write(tmp_path / "laid_open" / name, content)
    laid_open = opened("openwebtext", manual_dir=tmp_path / "laid_open", heldout_fraction=0.2)
    assert laid_open.folder != documents.folder
    assert {split: everything(laid_open, split) for split in laid_open.splits} == wanted
    assert list(laid_open.source["files"]) == ["openwebtext/urlsf_subset*_data.xz"]


def test_openwebtext_may_come_as_lines_of_json(tmp_path, opened, pages):
    file = write(tmp_path / "given/pages.jsonl", "\n".join(json.dumps({"text": p}) for p in pages))
    documents = opened("openwebtext", manual_dir=file.parent, heldout_fraction=0.2)
    assert sum(documents.splits.values()) == 60
    assert documents.source["heldout_fraction"] == 0.2
    other = opened("openwebtext", manual_dir=file.parent, heldout_fraction=0.5)
    assert other.folder != documents.folder and other.splits != documents.splits
    with says("split 'validation' has no document; give more text or another heldout_fraction"):
        opened("openwebtext", manual_dir=file.parent, heldout_fraction=1e-9)


# --- prepared once


def test_a_second_open_reads_what_the_first_wrote(opened, monkeypatch):
    folder = real("ptb/ptb.test.txt").parent
    first = opened("ptb", manual_dir=folder)
    written = {f: f.stat().st_mtime_ns for f in first.folder.rglob("*")}
    monkeypatch.setattr(published, "read_parts", lambda *_: pytest.fail("it was built again"))
    assert opened("ptb", manual_dir=folder) == first
    assert {f: f.stat().st_mtime_ns for f in first.folder.rglob("*")} == written
    again = pickle.loads(pickle.dumps(first))
    assert again.read("test", 5, 9) == first.read("test", 5, 9)


@pytest.mark.parametrize("moment", ["after_it_looked", "while_it_writes"])
def test_documents_that_another_process_wrote_meanwhile_are_taken(
    tmp_path, opened, monkeypatch, moment
):
    """The other's folder appears once this process has looked for it, or before its own rename."""
    file = write(tmp_path / "text/wiki.test.raw", " one \n two \n")
    inodes = []

    def first(function):
        """`function`, before whose first call the other process writes the whole folder."""

        def after_the_other(*arguments):
            if not inodes:
                inodes.append(None)
                other = opened("wikitext2", manual_dir=file.parent)
                inodes[0] = other.folder.stat().st_ino
            return function(*arguments)

        return after_the_other

    if moment == "after_it_looked":
        monkeypatch.setattr(documents_module, "sweep", first(documents_module.sweep))
    else:
        monkeypatch.setattr(published, "read_parts", first(published.read_parts))
    documents = opened("wikitext2", manual_dir=file.parent)
    assert everything(documents, "test") == [" one \n", " two \n"]
    assert inodes == [documents.folder.stat().st_ino]
    assert [f.name for f in documents.folder.parent.iterdir()] == ["1.0.0"]


def test_a_folder_of_documents_without_its_description_is_refused(tmp_path, opened):
    file = write(tmp_path / "text/wiki.test.raw", " one \n")
    folder = opened("wikitext2", manual_dir=file.parent).folder
    (folder / "dataset_info.json").unlink()
    with says(repr(str(folder)), "is not what TFDS wrote; delete the folder"):
        opened("wikitext2", manual_dir=file.parent)


def test_other_content_gets_another_folder(tmp_path, opened):
    file = write(tmp_path / "given/wiki.test.raw", " one \n")
    first = opened("wikitext2", manual_dir=file.parent)
    write(file, " two \n")
    second = opened("wikitext2", manual_dir=file.parent)
    assert (everything(first, "test"), everything(second, "test")) == ([" one \n"], [" two \n"])
    write(tmp_path / "deep/wikitext-2-raw/wiki.test.raw", " two \n")
    assert opened("wikitext2", manual_dir=tmp_path / "deep") == second  # the layout is no content
    assert str(tmp_path) not in json.dumps(second.source)
    digest = hashlib.sha256(b" two \n").hexdigest()
    assert second.source["files"] == {"wikitext-2-raw/wiki.test.raw": digest}


def test_documents_are_read_in_a_fresh_process_without_tensorflow(tmp_path, opened):
    file = write(tmp_path / "given/wiki.test.raw", " one \n\n two \n")
    documents = write(
        tmp_path / "documents.pickle", pickle.dumps(opened("wikitext2", manual_dir=file.parent))
    )
    program = f"""
import pickle, sys
documents = pickle.load(open({str(documents)!r}, "rb"))
print(documents.read("test", 0, 3), [m for m in ("tensorflow", "jax") if m in sys.modules])
"""
    result = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        check=False,
    )
    assert (result.stdout, result.stderr) == ("[' one \\n', '', ' two \\n'] []\n", "")


def test_damaged_shards_are_named(tmp_path, opened):
    file = write(tmp_path / "given/wiki.test.raw", " one \n")
    documents = opened("wikitext2", manual_dir=file.parent)
    (shard,) = documents.folder.glob("*array_record*")
    shard.write_bytes(shard.read_bytes()[:-40])
    with says("cannot read split 'test' in", "delete the folder and prepare it again"):
        documents.read("test", 0, 1)


def test_building_is_quiet_and_shows_one_bar(tmp_path, capfd):
    file = write(tmp_path / "given/wiki.test.raw", " one \n")
    open_published("wikitext2", manual_dir=file.parent, data_dir=tmp_path, progress=False)
    assert capfd.readouterr() == ("", "")
    write(file, " two \n")
    open_published("wikitext2", manual_dir=file.parent, data_dir=tmp_path, progress=True)
    out, err = capfd.readouterr()
    lines = [line for line in re.split(r"[\r\n]", err) if line.strip()]
    assert out == "" and lines and all(line.startswith("wikitext2: ") for line in lines)


# --- bad input


def leaves_nothing(data_dir: Path) -> bool:
    return not [f for f in data_dir.rglob("*") if "array_record" in f.name or f.name == "1.0.0"]


def test_an_archive_with_another_hash_is_refused(tmp_path, opened):
    archive = wikitext_zip(tmp_path / "given")
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    known = PUBLISHED["wikitext2"].archives[0].sha256
    with says(f"its sha256 {found} is not the published {known}; download it again from https"):
        opened("wikitext2", manual_dir=archive.parent)


def test_damaged_archives_are_refused_and_leave_nothing(tmp_path, opened, row, pages):
    good = {
        "wikitext2": wikitext_zip(tmp_path / "given").read_bytes(),
        "openwebtext": tar_of(subsets_of(pages), "w:xz"),
    }
    for name, content in good.items():
        half = len(content) // 2
        noise = content[:half] + bytes(64) + content[half + 64 :]
        for fault in (content[:half], content[:-20], b"no archive", b""):
            path = write(tmp_path / "given" / PUBLISHED[name].archives[0].name, fault)
            row(name, archive=path)
            with says(str(path), "damaged or cut short", "download it again"):
                opened(name, manual_dir=path.parent)
        write(path, noise)
        row(name, archive=path)
        with says("download it again"):  # it may unpack to bytes that are no UTF-8
            opened(name, manual_dir=path.parent)
    train = f"{LM1B}/training-monolingual.tokenized.shuffled/news.en-00001-of-00100"
    whole = tar_of({train: b"a line\n" * 9999}, "w:gz")
    for fault in (whole[: len(whole) // 2], whole[:-4], whole[:-9] + b"\0" + whole[-8:]):
        path = write(tmp_path / f"given/{LM1B}.tar.gz", fault)
        row("lm1b", archive=path, members={train: "train"})
        with says(str(path), "damaged or cut short", "download it again"):
            opened("lm1b", manual_dir=path.parent)
    assert leaves_nothing(tmp_path / "tfds")


def test_a_damaged_archive_inside_an_archive_is_refused(tmp_path, opened, row, pages):
    subsets = subsets_of(pages)
    last = max(subsets)
    subsets[last] = subsets[last][:-30]
    archive = write(tmp_path / "given/openwebtext.tar.xz", tar_of(subsets, "w:xz"))
    row("openwebtext", archive=archive)
    with says("damaged or cut short", "download it again"):
        opened("openwebtext", manual_dir=archive.parent, heldout_fraction=0.2)
    assert leaves_nothing(tmp_path / "tfds")


def test_a_missing_member_is_named(tmp_path, opened, row):
    archive = zip_of(tmp_path / "given/wikitext-2-raw-v1.zip", {"wiki.test.raw": b" a \n"})
    row("wikitext2", archive=archive)
    with says("wikitext-2-raw-v1.zip: no wikitext-2-raw/wiki.test.raw inside; download it again"):
        opened("wikitext2", manual_dir=archive.parent)
    assert leaves_nothing(tmp_path / "tfds")


def test_bad_text_is_named_by_file_and_place(tmp_path, opened):
    file = write(tmp_path / "given/wiki.test.raw", b" good \n b\xffd \n")
    for way in ("lines", "whole"):
        with says("wiki.test.raw: invalid UTF-8 at byte 9; download it again or repair"):
            opened("wikitext2", manual_dir=file.parent, documents=way)
    for line, fault in (
        (b"{", "not JSON"),
        (b"[1]", 'no string under "text"'),
        (b'{"txt": "a"}', 'no string under "text"'),
        (b'{"text": 3}', 'no string under "text"'),
        (b'{"text": "\\ud800"}', "half a surrogate pair at character 0"),
        (b"[" * 9999, "not JSON"),
    ):
        file = write(tmp_path / "json/pages.jsonl", b'{"text": "a"}\n\n' + line + b"\n")
        with says(f"pages.jsonl:3: {fault}; download it again or repair it"):
            opened("openwebtext", manual_dir=file.parent)
    assert leaves_nothing(tmp_path / "tfds")


def test_a_full_disk_is_an_os_error_and_leaves_nothing(tmp_path, opened):
    file = write(tmp_path / "given/wiki.test.raw", os.urandom(500_000).hex() + "\n")
    opened("wikitext2", manual_dir=write(tmp_path / "other/wiki.test.raw", " a \n").parent)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, limit[1]))  # stands for a full disk
    try:
        with pytest.raises(OSError, match="File too large"):
            opened("wikitext2", manual_dir=file.parent)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert len(list((tmp_path / "tfds/wikitext2").rglob("*array_record*"))) == 1
    assert opened("wikitext2", manual_dir=file.parent).splits == {"test": 1}


def test_a_killed_build_is_not_taken_for_whole(tmp_path, opened):
    file = write(tmp_path / "given/wiki.test.raw", " a line of text \n" * 300_000)
    program = f"""
from sedd_jax.data.published import open_published
open_published("wikitext2", manual_dir={str(file.parent)!r}, data_dir={str(tmp_path / "tfds")!r})
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=REPOSITORY, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 30
    while not (found := list((tmp_path / "tfds").rglob("*array_record*"))):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    orphan = found[0].parent
    assert orphan.exists() and orphan.name.startswith("incomplete.")
    for path in (*orphan.iterdir(), orphan):
        os.utime(path, (0, 0))
    documents = opened("wikitext2", manual_dir=file.parent)
    assert documents.splits == {"test": 300_000}
    assert documents.read("test", 299_999, 300_000) == [" a line of text \n"]
    assert not orphan.exists()  # litter of long ago


# --- downloads


@pytest.fixture
def server(tmp_path):
    """Serves tmp_path/web on loopback; .asked lists the requested paths."""
    folder = tmp_path / "web"
    folder.mkdir()
    asked = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, format, *arguments):
            asked.append(self.path)

    handler = functools.partial(Handler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        thread = threading.Thread(target=http.serve_forever, daemon=True)
        thread.start()
        http.folder, http.asked = folder, asked
        http.url = f"http://127.0.0.1:{http.server_port}"
        yield http
        http.shutdown()
        thread.join()


def test_an_archive_is_downloaded_once_and_verified(tmp_path, opened, row, server):
    archive = wikitext_zip(server.folder)
    row(
        "wikitext2",
        archive=archive,
        urls=(f"{server.url}/gone.zip", f"{server.url}/{archive.name}"),
    )
    documents = opened("wikitext2", manual_dir=None)
    assert dict(documents.splits) == {"train": 3760, "validation": 3760, "test": 4358}
    downloads = tmp_path / "tfds/downloads/wikitext2"
    assert [f.name for f in downloads.iterdir()] == [archive.name]
    asked = len(server.asked)
    assert opened("wikitext2", manual_dir=None) == documents
    whole = opened("wikitext2", manual_dir=None, documents="whole")
    assert len(server.asked) == asked  # neither asked the server again
    assert whole.splits["train"] == 1
    assert opened("wikitext2", manual_dir=downloads) == documents


def test_a_download_that_fails_names_every_url_and_the_way_out(tmp_path, opened, row, server):
    archive = write(server.folder / "lambada_test.jsonl", '{"text": "a"}\n')
    url = f"{server.url}/{archive.name}"
    row("lambada", urls=(f"{server.url}/absent.jsonl", url, "http://127.0.0.1:1/refused.jsonl"))
    place = server.url.removeprefix("http://")
    with says(
        f"cannot download lambada_test.jsonl ({place}: HTTP 404; {place}: sha256 differs; "
        "127.0.0.1:1: no connection); try again",
        f"as from {server.url}/absent.jsonl, and set data.path (sedd-prepare: --manual_dir)",
    ):
        opened("lambada", manual_dir=None)
    assert leaves_nothing(tmp_path / "tfds")
    assert list((tmp_path / "tfds/downloads/lambada").iterdir()) == []


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_download_without_a_network_is_a_short_line(name, opened, monkeypatch):
    def get(*_, **__):
        raise requests.ConnectionError("x" * 1000)

    monkeypatch.setattr(requests, "get", get)
    with says("no connection", "--manual_dir") as refused:
        opened(name, manual_dir=None)
    assert len(str(refused.value)) < 400


def test_a_download_shows_one_bar_with_the_files_name(tmp_path, row, server, capfd):
    archive = write(server.folder / "lambada_test.jsonl", '{"text": "a"}\n')
    row("lambada", archive=archive, urls=(f"{server.url}/{archive.name}",))
    open_published("lambada", manual_dir=None, data_dir=tmp_path / "tfds")
    out, err = capfd.readouterr()
    lines = [line for line in re.split(r"[\r\n]", err) if line.strip()]
    assert out == "" and all(re.match("lambada(_test.jsonl)?: ", line) for line in lines)


# --- detokenizers, on lines of the real files


DETOKENIZED = [
    (
        "wikitext",
        "wikitext2/wiki.test.raw",
        " = Ise @-@ class battleship = \n",
        " = Ise-class battleship =\n",
    ),
    ("wikitext", "wikitext2/wiki.test.raw", ' " Kiss You " – 3 : 04 \n', ' "Kiss You" – 3: 04\n'),
    (
        "wikitext",
        "wikitext2/wiki.test.raw",
        " = Kiss You ( One Direction song ) = \n",
        " = Kiss You (One Direction song) =\n",
    ),
    (
        "wikitext",
        "wikitext2/wiki.test.raw",
        " = = = 2000 – 2005 = = = \n",
        " === 2000 – 2005 ===\n",
    ),
    (
        "wikitext",
        "wikitext2/wiki.test.raw",
        ' Seagoing ships intended to " stand in the line of battle " ; the precursors of the battleship . \n',
        ' Seagoing ships intended to "stand in the line of battle"; the precursors of the battleship.\n',
    ),
    (
        "wikitext",
        "wikitext2/wiki.test.raw",
        " Coastal service and riverine vessels , including ' floating batteries ' and ' monitors' \n",
        " Coastal service and riverine vessels, including 'floating batteries' and 'monitors'\n",
    ),
    ("ptb", "ptb/ptb.test.txt", "no it was n't black monday", "no it wasn't black monday"),
    (
        "ptb",
        "ptb/ptb.test.txt",
        "heavy selling of standard & poor 's 500-stock index futures in chicago <unk> beat stocks downward",
        "heavy selling of standard & poor's 500-stock index futures in chicago ? beat stocks downward",
    ),
    (  # the last N has no space after it
        "ptb",
        "ptb/ptb.test.txt",
        "in N N N of those aged N to N lived with <unk> other than spouses down from N N in N",
        "in 1 1 1 of those aged 1 to 1 lived with ? other than spouses down from 1 1 in N",
    ),
    (
        "ptb",
        "ptb/ptb.test.txt",
        "britain 's government plans to raise about # N billion $ N billion from the sale of most of its giant water and electric utilities beginning next month",
        "britain's government plans to raise about #1 billion $1 billion from the sale of most of its giant water and electric utilities beginning next month",
    ),
    (
        "ptb",
        "ptb/ptb.test.txt",
        "seven big board stocks ual amr bankamerica walt disney capital cities\\/abc philip morris and pacific telesis group stopped trading and never resumed",
        "seven big board stocks ual amr bankamerica walt disney capital cities/abc philip morris and pacific telesis group stopped trading and never resumed",
    ),
    (
        "lm1b",
        "lm1b/news.en.heldout-00010-of-00050",
        "See video at http : / / www.encoreenergyinc.com.",
        "See video at http://www.encoreenergyinc.com.",
    ),
    (
        "lm1b",
        "lm1b/news.en.heldout-00010-of-00050",
        'Actor Coby Bell ( " Third Watch " ) is 34 .',
        'Actor Coby Bell ("Third Watch") is 34.',
    ),
    (
        "lm1b",
        "lm1b/news.en.heldout-00010-of-00050",
        "But now , it 's looking like the page that list Reps who won 't talk will be the most popular .",
        "But now, it's looking like the page that list Reps who won't talk will be the most popular.",
    ),
    (
        "lm1b",
        "lm1b/news.en.heldout-00010-of-00050",
        "It it estimated clearing leaves costs most councils around £ 100,000 a year .",
        "It it estimated clearing leaves costs most councils around £100,000 a year.",
    ),
    (
        "lm1b",
        "lm1b/news.en.heldout-00010-of-00050",
        'Now they must contribute ! . "',  # only a word draws the full stop to it
        'Now they must contribute! . "',
    ),
    (
        "lm1b",
        "lm1b/news.en.heldout-00010-of-00050",
        "And look how that turns out ! 4 : In case mr .",
        "And look how that turns out! 4: In case mr.",
    ),
]


@pytest.mark.parametrize(("name", "file", "given", "wanted"), DETOKENIZED)
def test_a_published_line_becomes_running_text(name, file, given, wanted):
    lines = real(file).read_text(encoding="utf-8").splitlines(keepends=True)
    assert given.strip() in map(str.strip, lines)
    assert DETOKENIZERS[name](given) == wanted


def test_lambada_gets_straight_quotes_and_a_newline_before():
    passages = [json.loads(line)["text"] for line in real("lambada/lambada_test.jsonl").open()]
    passage = min((p for p in passages if "“" in p), key=len)
    assert passage.startswith("“Happy to comply,” I said.\n“So, you’re Ben. Ben what?” \n“No, I’m")
    running = DETOKENIZERS["lambada"](passage)
    assert running.startswith(
        '\n"Happy to comply," I said.\n"So, you’re Ben. Ben what?" \n"No, I’m'
    )


def test_peculiarities_of_the_detokenizers_are_kept():
    assert DETOKENIZERS["wikitext"]("the ' 90s") == "the ' 90s"  # meant to be tight, and is not
    assert DETOKENIZERS["wikitext"]("a/' 9/b") == "a/'[0-9]/b"
    assert DETOKENIZERS["wikitext"]("= N ° = = N =") == "= N°== 1 ="  # ° is drawn in before N is
    assert DETOKENIZERS["ptb"](" " + "N " * 30) == " " + "1 " * 30
    assert DETOKENIZERS["lambada"]("  a ”") == '\na "'
