"""Text of one's own in the forms in which people keep it: containers, splits, strays."""

import bz2
import functools
import gzip
import json
import logging
import lzma
import os
import subprocess
import sys
import time
from pathlib import Path

import pyarrow
import pytest
from conftest import says
from pyarrow import parquet

from sedd_jax import config as configuration
from sedd_jax.cli import prepare_command
from sedd_jax.configs import quickstart
from sedd_jax.data import make_corpus, make_records, open_records
from sedd_jax.data.text_files import text, text_source
from sedd_jax.host import files
from sedd_jax.runs import workdir

# Without the time of day, which would be in the names of tests.
gz = functools.partial(gzip.compress, mtime=0)

ROWS = [f"row {i} é" for i in range(30)]
JSONL = "".join(json.dumps({"id": i, "text": t}) + "\n" for i, t in enumerate(ROWS))
CSV = 'id,text\n1,"a ""quoted"",\nsecond line"\n2,NA\n'


def write(folder: Path, contents: dict[str, str | bytes]) -> str:
    for name, content in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(folder)


def documents(path: str, fraction: float = 0.1) -> dict[str, list[str]]:
    corpus = text(path, fraction)
    return {split: list(corpus.documents(split)) for split in corpus.streams}


def everything(path: str) -> list[str]:
    return sorted(documents(path, 1.0)["validation"])


def zstd(data: str) -> bytes:
    return pyarrow.compress(data.encode(), codec="zstd", asbytes=True)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", JSONL.encode()),
        ("a.NDJSON", JSONL.encode()),
        ("a.json", JSONL.encode()),
        ("a.json", json.dumps([{"text": t} for t in ROWS], indent=1).encode()),
        ("a.jsonl.gz", gz(JSONL.encode())),
        ("a.json.gz", gz(json.dumps([{"text": t} for t in ROWS]).encode())),
        ("part.000.jsonl.BZ2", bz2.compress(JSONL.encode())),
        ("a.jsonl.xz", lzma.compress(JSONL.encode())),
        ("a.jsonl.zst", zstd(JSONL)),
        ("a.jsonl.zst", zstd(JSONL[:80]) + zstd(JSONL[80:])),
        ("a.csv", ("text,n\n" + "".join(f'"{t}",1\n' for t in ROWS)).encode()),
        ("a.tsv.gz", gz(("n\ttext\n" + "".join(f"1\t{t}\n" for t in ROWS)).encode())),
    ],
)
def test_rows_of_every_container_are_read(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert everything(str(tmp_path)) == sorted(ROWS)
    assert everything(str(tmp_path / name)) == sorted(ROWS)


def test_parquet_is_read_by_its_text_column_and_a_csv_as_csv(tmp_path):
    parquet.write_table(pyarrow.table({"n": range(30), "text": ROWS}), tmp_path / "a.parquet")
    assert everything(str(tmp_path)) == sorted(ROWS)
    path = write(tmp_path / "csv", {"a.csv": CSV})
    assert everything(path) == ["NA", 'a "quoted",\nsecond line']
    path = write(tmp_path / "long", {"a.csv": "\ufefftext\r\n" + "word " * 99_999 + "\r\n\r\nb"})
    assert sorted(map(len, everything(path))) == [1, 5 * 99_999]


def test_whole_files_in_any_case_packed_or_not_and_folders_behind_links(tmp_path):
    path = write(tmp_path / "t", {"A.TXT": "upper", "b.md": "# mark", "c.rst": "rest"})
    write(tmp_path / "t", {"wiki.x.tokens": "tokens", "y.raw": "raw"})
    write(tmp_path / "t", {"d.txt.gz": gz(b"packed"), "e.TXT.Zst": zstd("zst")})
    write(tmp_path / "elsewhere", {"f.txt": "linked"})
    (tmp_path / "t/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/up").symlink_to(tmp_path / "t")  # a circle
    assert everything(path) == [
        *("# mark", "linked", "packed", "raw", "rest", "tokens", "upper", "zst"),
    ]


def test_what_is_read_and_passed_over_is_said_in_one_line(tmp_path, caplog):
    path = write(
        tmp_path / "t", {"README.txt": "x " * 99, "b.png": b"\x89PNG", "c.py": "", "_": ""}
    )
    write(tmp_path / "t", {"LICENSE": "Apache", "d.pdf": b"%PDF-1.4\n1 0 obj\n", "e": b"a\0b"})
    write(tmp_path / "t", {"part-0.jsonl.gz": gz(JSONL.encode())})
    write(tmp_path / "t", {".a.txt": b"\xa3\xff", ".git/a.txt": "hidden"})
    logging.getLogger("sedd_jax").propagate = True
    with caplog.at_level(logging.INFO, logger="sedd_jax"):
        records = make_records(
            "text", tmp_path / "r", path=path, tokenizer="bytes", length=8, workers=2
        )
    line = f"reading {path!r}: 1 .txt, 1 .jsonl.gz; 0.1 of it held out; passed over: "
    ours = [record for record in caplog.records if record.name.startswith("sedd_jax")]
    said = [(record.levelname, record.message) for record in ours]
    assert said == [("WARNING", f"{line}LICENSE, _, b.png, 3 more, 2 hidden")]
    assert sum(records.counts(s)["documents"] for s in ("train", "validation")) == 31


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.zip", b"PK\x03\x04", ["a.zip", "unpack"]),
        ("a.tar.gz", b"\x1f\x8b", ["a.tar.gz", "unpack"]),
        ("a.TGZ", b"", ["a.TGZ", "unpack"]),
        ("data.arrow", b"ARROW1", ["data.arrow", ".parquet"]),
        ("x.tfrecord-00000-of-00001", b"", ["x.tfrecord", "write its text"]),
        ("part-000.gz", gz(b"text"), ["part-000.gz", "unpack"]),
        ("b.txt.gz", gz(b"text " * 99)[:-9], ["b.txt.gz", "get it again"]),
        ("b.txt.bz2", b"BZh9nonsense", ["b.txt.bz2", "get it again"]),
        ("b.txt.zst", zstd("text " * 99)[:-3], ["b.txt.zst", "get it again"]),
        ("b.csv", b"id;text\n1;x\n", ["b.csv", 'no column "text"']),
        ("b.csv", b"text\n\xff\n", ["b.csv", "invalid UTF-8 at byte 5"]),
        ("b.csv", b"", ["b.csv", 'no column "text"']),
        ("b.csv", b"text,n,text\na,1,b\n", ["b.csv", 'two columns "text"']),
        ("b.csv", b'text\none\n"two\nthree\n', ["b.csv:3", "a quote that nothing closes"]),
        ("b.csv", b'n,text\n1,"one""\n2,two\n', ["b.csv:2", "a quote that nothing closes"]),
        ("b.csv", b'text\n"one" two\n', ["b.csv:2", "expected after"]),
        ("b.csv", b"n,text\n\n1,one\n2\n", ["b.csv:4", "1 fields in a row, 2 columns"]),
        ("b.csv", b'text\n"a\nb"\none, two\n', ["b.csv:4", "2 fields in a row, 1 columns"]),
        ("b.csv", b"text\none\0two\n", ["b.csv:2", "NUL", "UTF-16"]),
        ("b.tsv", b"n\ttext\n1\tone\ttwo\n", ["b.tsv:2", "3 fields", "quote the fields"]),
        ("b.tsv", b'text\n"one\n', ["b.tsv:2", "a quote that nothing closes"]),
        ("b.tsv", b'text\n"' + b"x" * 200_000, ["b.tsv:2", "a quote that nothing closes"]),
        ("run.log", b"step 1\n", ["run.log", "call it .txt if it is a document"]),
        ("b.TXT.part", b"some text\n", ["b.TXT.part", ".txt"]),
        ("page.html", b"<p>text</p>", ["page.html", "move it elsewhere"]),
        ("notes", "caf\u00e9".encode(), ["notes", "move it elsewhere"]),
        ("sub.tokens.1", b"a b c", ["sub.tokens.1", "move it elsewhere"]),
        ("b.parquet", b"PAR1", ["b.parquet", "move the file"]),
        ("b.json", b'{"body": "x"}', ["b.json:1", 'no string under "text"']),
        ("b.json", b'[{"text": 3}]', ["b.json:1", 'no string under "text"']),
        ("b.json", b'[{"text": "x"}', ["b.json", "not JSON"]),
        ("b.txt", "text".encode("utf-16-le"), ["b.txt", "NUL at character 1", "UTF-16"]),
        ("b.txt", "text".encode("utf-32-be"), ["b.txt", "NUL at character 0", "UTF-16"]),
        ("b.txt", "text".encode("utf-16"), ["b.txt", "invalid UTF-8 at byte 0"]),
    ],
)
def test_what_cannot_be_read_is_refused_by_name_beside_what_can(tmp_path, name, content, words):
    (tmp_path / "a.txt").write_text("plain text\n" * 9)
    (tmp_path / name).write_bytes(content)
    with says(*words):
        text(str(tmp_path), 0.1)


def test_a_pipe_or_a_link_to_nothing_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "a.txt")
    for path in (tmp_path, tmp_path / "a.txt"):
        with says("a.txt", "a pipe or a device"):
            text(str(path), 0.1)
    with says("'/dev/null'", "a pipe or a device"):  # as <(zcat texts.gz) is
        text("/dev/null", 0.1)
    with says("notes.log' holds text", "call it .txt if it is a document"):
        text(write(tmp_path, {"notes.log": "x"}) + "/notes.log", 0.1)
    (tmp_path / "b").mkdir()
    (tmp_path / "b/a.txt").symlink_to("/no/such")
    with says("a.txt", "a link to nothing"):
        text(str(tmp_path / "b"), 0.1)


FORMS = [
    ("train/a.txt", "valid/a.txt", None),
    ("Train/a.txt", "VAL/a.txt", "test/a.txt"),
    ("en/training/a.txt", "en/dev/a.txt", "de/test/a.txt"),
    ("train.txt", "valid.txt", "test.txt"),
    ("train-00000-of-00002.txt", "validation-00000-of-00001.txt", None),
    ("c4-train.00000-of-01024.txt", "c4-validation.00000-of-00008.txt", None),
    ("ptb.train.txt", "ptb.valid.txt", "ptb.test.txt"),
    ("wiki.train.tokens.txt", "wiki.dev.tokens.txt", "wiki.test.tokens.txt"),
    ("train_0.md", "dev1.txt", "test_set.txt"),
    ("train/valid-notes.txt", "validation/train.txt", None),
    ("train.jsonl.txt", "eval.txt", "testing.txt"),
    ("train/a.txt", "held-out/a.txt", None),
    ("a-train.txt", "a-heldout-00001.txt", None),
    ("wiki.train.raw", "wiki.valid.raw", "wiki.test.raw"),
    (None, "dev.txt", "test.txt"),
    (None, None, "test/a.txt"),
]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_forms_in_which_people_keep_splits_are_taken_as_splits(tmp_path, form):
    expected = dict(zip(("train", "validation", "test"), form))
    expected = {split: name for split, name in expected.items() if name}
    path = write(tmp_path, {name: f"of {split}" for split, name in expected.items()})
    write(tmp_path, {"README.md": "not text"})
    assert documents(path) == {split: [f"of {split}"] for split in expected}
    corpus = text(path, 0.1)
    assert corpus.passed_over == "README.md"
    assert "heldout_fraction" not in corpus.source
    assert list(corpus.source["files"]) == list(expected)
    assert list(corpus.pairs()) == [(split, f"of {split}") for split in expected]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("train/a.txt", "valid/a.txt", "validation/a.txt"), ["valid/", "are one split"]),
        (("train.txt", "dev.txt", "val.txt"), ["'dev.txt'", "'val.txt'", "are one split"]),
        (("train/test/a.txt", "valid/a.txt"), ["train/test/a.txt", "test and train"]),
        (("train.txt", "valid.txt", "more.txt"), ["'more.txt' is in no split"]),
        (("train/a.txt", "valid/a.txt", "extra/b.txt"), ["extra/b.txt", "is in no split"]),
        (("a.txt", "b.txt", "test/a.txt"), ["'a.txt' is in no split", "test"]),
    ],
)
def test_splits_that_contradict_each_other_are_refused(tmp_path, names, words):
    path = write(tmp_path, dict.fromkeys(names, "text"))
    with says(*words, "put each text in one of the folders train, validation and test"):
        text(path, 0.1)


def test_without_a_split_by_name_text_is_held_out_as_before(tmp_path):
    content = "".join(f"line {i}\n" for i in range(100))
    for i, name in enumerate(("story.txt", "train.txt", "train/b.txt", "latest.txt", "valid.txt")):
        folder = tmp_path / str(i)
        path = write(folder, {name: content})
        if name == "valid.txt":  # named as a file: its name says nothing
            path += "/valid.txt"
        splits = documents(path)
        assert "".join(splits["train"] + splits["validation"]) == content
        assert all(splits.values())
        assert text_source(path, 0.1).keys() == {"corpus", "version", "files", "heldout_fraction"}


def test_a_rearranged_corpus_is_another(tmp_path):
    one = write(tmp_path / "one", {"a.txt": "a" * 99, "b.txt": "b" * 99})
    two = write(tmp_path / "two", {"train/a.txt": "a" * 99, "valid/b.txt": "b" * 99})
    three = write(tmp_path / "three", {"train/a.txt": "a" * 99, "test/b.txt": "b" * 99})
    sources = [json.dumps(text_source(path, 0.1)) for path in (one, two, three)]
    assert len(set(sources)) == 3


def command(*more: str, **options) -> int:
    flags = {"dataset": "text", "tokenizer": "bytes", "length": 16, **options}
    return prepare_command([f"--{key}={value}" for key, value in flags.items()] + list(more))


def test_a_whole_file_of_ones_own_can_be_prepared_to_be_scored(tmp_path, capsys):
    path = write(tmp_path / "t", {"a.txt": "one line of text\n" * 20})
    assert command(manual_dir=f"{path}/a.txt", out=tmp_path / "r", heldout_fraction=1) == 0
    records = open_records(tmp_path / "r")
    assert list(records.fingerprint["splits"]) == ["validation"] == [records.scored_split]
    assert records.counts("validation")["characters"] == 340
    write(tmp_path / "s", {"train.txt": "x" * 99, "test.txt": "y" * 99})
    assert command(manual_dir=tmp_path / "s", out=tmp_path / "q") == 0
    assert open_records(tmp_path / "q").scored_split == "test"
    capsys.readouterr()
    assert command(manual_dir=tmp_path / "s", out=tmp_path / "p", heldout_fraction=1) == 2
    assert "has the splits train, test; leave heldout_fraction out" in capsys.readouterr().err
    with says("heldout_fraction 1.0 is not between 0 and 1; try 0.1"):
        make_corpus("pydoc", "", 1.0)


def test_tokenizer_and_folder_are_looked_at_before_the_corpus(tmp_path, monkeypatch, capsys):
    path = write(tmp_path / "t", {"a.txt": "one line of text\n" * 20})
    monkeypatch.setattr("sedd_jax.data.catalogue.text", lambda *_: 1 / 0)
    tokenizer = {"manual_dir": path, "tokenizer": "gpt2", "tokenizer_path": tmp_path / "none"}
    assert command(**tokenizer, out=tmp_path / "r") == 2
    assert "none" in capsys.readouterr().err
    assert command(manual_dir=path, out=path) == 2
    error = capsys.readouterr().err
    assert "holds no whole records" in error and "delete" not in error
    assert command(manual_dir=path, out="gs://b/r") == 2
    assert "mount" in capsys.readouterr().err


def test_records_that_are_there_are_opened_without_a_write_or_a_claim(tmp_path, monkeypatch):
    path = write(tmp_path / "t", {"a.txt": "one line of text\n" * 20})
    arguments = {"path": path, "tokenizer": "bytes", "length": 16}
    records = make_records("text", tmp_path / "r", **arguments)

    def refuse(*_, **__):
        raise OSError(30, "Read-only file system")

    for name in ("os.open", "pathlib.Path.mkdir", "shutil.rmtree", "os.utime"):
        monkeypatch.setattr(name, refuse)
    assert make_records("text", tmp_path / "r", **arguments).fingerprint == records.fingerprint
    with pytest.raises(OSError, match=r"cannot write in .*: Read-only file system; .*another fol"):
        make_records("text", tmp_path / "new", **arguments)


def test_no_lock_of_the_file_system_is_needed_and_a_dead_claim_is_no_hindrance(tmp_path):
    path = write(tmp_path / "t", {"a.txt": "one line of text\n" * 20})
    here = {"host": "h", "pid": 2**22 + 1, "started": "1", "work": "x"}
    (tmp_path / ".r.lock").write_text(json.dumps({**here, **files._machine()}))
    start = time.monotonic()
    make_records("text", tmp_path / "r", path=path, tokenizer="bytes", length=16)
    assert time.monotonic() - start < 5
    assert {p.name for p in tmp_path.iterdir()} == {"t", "r"}


def test_the_bar_knows_the_whole_from_the_start(tmp_path, capfd, bars):
    contents = {f"{i:03d}.txt": "words of a line\n" * 400 for i in range(250)}
    write(tmp_path / "t", contents)
    assert command(manual_dir=tmp_path / "t", out=tmp_path / "r") == 0
    error = capfd.readouterr().err
    assert "1.60M/1.60M" in error and "documents=250" in error


def test_records_by_name_bring_their_corpus_and_tokenizer(tmp_path):
    path = write(tmp_path / "t", {"a.txt": "one line of text\n" * 40})
    out = tmp_path / "r"
    assert command(manual_dir=path, out=out, heldout_fraction=0.2) == 0
    values = {"data.records": str(out), "data.length": 16}
    config = configuration.with_values(quickstart.get_config(), values)
    assert (config.data.corpus, config.data.tokenizer) == ("pydoc", "sentencepiece")
    config = workdir.with_stored_data(config)
    section = config.data
    assert section.tokenizer_path == ""  # that of the tokenizer that it was
    assert (section.corpus, section.tokenizer, section.heldout_fraction) == ("text", "bytes", 0.2)
    assert workdir.with_stored_data(config) == config
    assert workdir.prepare_data(config, tmp_path / "run").length == 16
    with says("have length 16, config.data.length is 32"):
        workdir.prepare_data(
            configuration.with_values(config, {"data.length": 32}), tmp_path / "run"
        )


def test_gpt2_may_give_the_tokenizer_of_its_files_settings(tmp_path):
    from tokenizers import ByteLevelBPETokenizer
    from tokenizers.pre_tokenizers import ByteLevel

    tokens = [*sorted(ByteLevel.alphabet()), "<|endoftext|>"]
    library = ByteLevelBPETokenizer({t: i for i, t in enumerate(tokens)}, [], add_prefix_space=True)
    library.save(str(tmp_path / "tokenizer.json"))
    path = write(tmp_path / "t", {"a.txt": "one line of text\n" * 40})
    values = {"data.corpus": "text", "data.path": path, "data.length": 16}
    values |= {"data.tokenizer": "gpt2", "data.tokenizer_path": str(tmp_path / "tokenizer.json")}
    config = configuration.with_values(quickstart.get_config(), values)
    for _ in range(2):  # prepared, and there already
        assert workdir.prepare_data(config, tmp_path / "run").tokenizer.name == "json"
    for other in ("bytes", "sentencepiece"):
        config.data.tokenizer = other
        with says("have tokenizer 'json', config.data.tokenizer is", other):
            workdir.prepare_data(config, tmp_path / "run")


def test_training_says_which_splits_there_are_before_it_prepares(tmp_path):
    path = write(tmp_path / "t", {"train.txt": "x" * 99, "test.txt": "y" * 99})
    values = {"data.corpus": "text", "data.path": path, "data.length": 16}
    values |= {"data.tokenizer": "characters", "data.tokenizer_path": ""}
    config = configuration.with_values(quickstart.get_config(), values)
    with says("no split 'validation', it has train, test; set config.data.train_split and"):
        workdir.prepare_data(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    config.data.heldout_split = "test"
    assert workdir.prepare_data(config, tmp_path / "run").counts("test")["blocks"] == 6


def test_a_run_of_the_version_before_goes_on_with_the_splits_it_was_prepared_with(tmp_path):
    path = write(tmp_path / "t", {"train/a.txt": "x" * 99, "validation/a.txt": "y" * 99})
    values = {"data.corpus": "text", "data.path": path, "data.length": 16}
    values |= {"data.tokenizer": "characters", "data.tokenizer_path": ""}
    config = configuration.with_values(quickstart.get_config(), values)
    workdir.prepare_data(config, tmp_path / "run")
    file = tmp_path / "run/records/fingerprint.json"
    fingerprint = json.loads(file.read_text())
    old = {"corpus": "text", "version": "1.0.0", "files": {"*": "x"}, "heldout_fraction": 0.1}
    file.write_text(json.dumps({**fingerprint, "source": {**old, "detokenizer": ""}}))
    assert workdir.prepare_data(config, tmp_path / "run").length == 16
    file.write_text(json.dumps(fingerprint))
    write(tmp_path / "t", {"train/a.txt": "z" * 99})
    with says("are not of the text that is at", "leave config.data.path empty"):
        workdir.prepare_data(config, tmp_path / "run")


def test_records_are_not_made_inside_the_text(tmp_path, capsys):
    path = write(tmp_path / "t", {"a.txt": "one line of text\n" * 40})
    assert command(manual_dir=path, out=f"{path}/records") == 2
    assert "choose another folder for the records" in capsys.readouterr().err
    assert [file.name for file in Path(path).iterdir()] == ["a.txt"]


def test_records_of_a_corpus_by_name_need_no_guard_in_a_script_or_on_standard_input(tmp_path):
    write(tmp_path / "t", {"a.txt": "one line of text\n" * 40})
    program = (
        "from sedd_jax import data\n"
        "r = data.make_records('text', 'r', path='t', tokenizer='bytes', length=16, workers=2)\n"
        "print(r.counts('train')['blocks'])\n"
    )
    (tmp_path / "program.py").write_text(program)
    for arguments, text_in in ((["program.py"], None), (["-"], program)):
        result = subprocess.run(
            [sys.executable, *arguments],
            input=text_in,
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
            timeout=60,
        )
        assert (result.returncode, result.stdout) == (0, "38\n"), result.stderr
