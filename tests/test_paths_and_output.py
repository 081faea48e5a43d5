"""Paths as users write them, for every command and function; output that nothing can spoil."""

import io
import os
import shutil
import signal
import subprocess
import sys

import pytest
from conftest import command_line, corpus_of, says

import sedd_jax
from sedd_jax import cli, config, convert, data
from sedd_jax.cli import messages, sample_command, train_command
from sedd_jax.cli.sample import show
from sedd_jax.data.tokenizers import named_tokenizer
from sedd_jax.evaluation.scorer import load_scorer
from sedd_jax.training.train import train

WORDS = "The quick brown fox jumps over the lazy dog. " * 40
ADDRESSES = ["gs://bucket/a", "s3://bucket/a", "hdfs://host/a", "https://host/a", "file:///a"]
TAKE_A_PATH = {
    "load": lambda path: sedd_jax.load(path),
    "convert from": lambda path: convert.convert(path, "out"),
    "convert to": lambda path: convert.convert("in", path),
    "make_corpus": lambda path: data.make_corpus("text", path),
    "data_dir": lambda path: data.make_corpus("wikitext2", data_dir=path),
    "make_records": lambda path: make_records(path),
    "tokenizer_path": lambda path: make_records("r", tokenizer="gpt2", tokenizer_path=path),
    "open_records": lambda path: data.open_records(path),
    "load_scorer": lambda path: load_scorer(path),
    "named_tokenizer": lambda path: named_tokenizer(f"gpt2:{path}"),
    "show": lambda path: sedd_jax.show([], path=path),
}


def make_records(folder, tokenizer="bytes", **options):
    corpus = corpus_of([WORDS] * 20, [WORDS] * 4, corpus="text")
    return data.make_records(corpus, folder, tokenizer=tokenizer, length=32, **options)


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home folder, and another, empty one to work in, which stays so."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("home", "here"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    yield tmp_path / "home"
    assert list((tmp_path / "here").iterdir()) == []


@pytest.mark.parametrize("address", ADDRESSES)
@pytest.mark.parametrize("function", TAKE_A_PATH)
def test_no_function_takes_an_address_for_a_path(home, function, address):
    with says(address, "is an address, not a path; mount"):
        TAKE_A_PATH[function](address)


def test_nor_does_training_or_saving(home, tiny_config, tiny_run):
    with says("is an address"):
        train(tiny_config, "gs://bucket/run")
    with says("is an address"):
        sedd_jax.load(tiny_run).save_pretrained("gs://bucket/model")
    for key in ("data.path", "data.records", "data.tokenizer_path"):
        with says(f"config.{key}", "'gs://b/x'", "a local path: mount"):
            config.with_values(tiny_config, {key: "gs://b/x"})


def test_what_has_a_colon_is_still_a_path_or_a_name(home):
    (home / "a:b").mkdir()
    assert make_records(home / "a:b/r").folder == home / "a:b/r"
    with says("cannot read '/none.model'"):
        named_tokenizer("sentencepiece:/none.model")
    assert cli.train._find_config("openwebtext_small:v5e-64").endswith(":v5e-64")


def test_the_home_folder_is_that_everywhere(home, tiny_run, capsys):
    shutil.copytree(tiny_run, home / "run")
    (home / "text").mkdir()
    for name in "abcdefgh":
        (home / f"text/{name}.txt").write_text(WORDS)
    model = sedd_jax.load("~/run")
    model.save_pretrained("~/model")
    convert.convert("~/model", "~/continued", form="workdir")
    corpus = data.make_corpus("text", "~/text")
    data.make_records(corpus, "~/records", tokenizer="~/run/tokenizer.json", length=32)
    assert data.open_records("~/records").folder == home / "records"
    flags = {"workdir": "~/run", "out": "~/samples.txt", "html": "~/page.html", "steps": 2}
    assert sample_command([f"--{flag}={value}" for flag, value in flags.items()]) == 0
    with says("holds no model"):
        sedd_jax.load("~")
    (home / "mine.py").write_text("from sedd_jax.configs.quickstart import get_config")
    _, *rest = command_line("~/mine", train__steps=1, data__corpus="text", evaluate__blocks=1)
    paths = {"data.path": "~/text", "data.records": "~/mine_records"}
    keys = [f"--config.{key}={value}" for key, value in paths.items()]
    assert train_command(["--config=~/mine.py", *rest, *keys]) == 0
    made = {path.name for path in home.iterdir() if path.name[0] != "."}
    ours = {"run", "text", "model", "continued", "records", "samples.txt", "page.html"}
    assert made == ours | {"mine.py", "mine", "mine_records"}


def test_every_flag_of_training_takes_its_value_after_a_space(tiny_config):
    values = dict(config.flatten(tiny_config)) | {
        "mesh.data": 1,
        "mesh.fsdp": -1,
        "data.path": "my text",
    }
    keys = [(f"--config.{key}", str(value)) for key, value in values.items()]
    others = [("--workdir", "my run"), ("--config", "quickstart"), ("--join_timeout", "7")]
    pairs = [*keys, *others]
    spaced = cli.train.parse_train("sedd-train", [word for pair in pairs for word in pair])
    joined = cli.train.parse_train("sedd-train", ["=".join(pair) for pair in pairs])
    assert spaced == joined and str(spaced.workdir) == "my run"
    assert dict(config.flatten(spaced.config)) == values
    mixed = ["--config.graph.scale_by_sigma", "--workdir", "x", "--config=quickstart"]
    assert cli.train.parse_train("sedd-train", mixed).config.graph.scale_by_sigma is True


def test_a_key_of_a_conversion_takes_its_value_after_a_space(home, tiny_run):
    sedd_jax.load(tiny_run).save_pretrained(home / "model")
    flags = ["--from", home / "model", "--to", home / "run", "--form", "workdir"]
    keys = ["--config.train.steps", 7, "--config.mesh.data", 1, "--config.mesh.fsdp", -1]
    assert cli.convert_command([str(word) for word in (*flags, *keys)]) == 0
    saved = sedd_jax.load(home / "run").experiment
    assert (saved["train"]["steps"], saved["mesh"]["fsdp"]) == (7, -1)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8", "utf-16"])
def test_no_encoding_of_the_output_loses_a_sample(monkeypatch, encoding):
    texts = ["plain", "é ░ 語 \x81", "\ud800"]
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    assert cli._guarded("sedd-sample", lambda *_: show(texts), []) == 0
    shown = raw.getvalue().decode(encoding).splitlines()
    assert shown[1] == "plain" and shown[5] == r"\ud800"
    expected = texts[1].encode(encoding, "backslashreplace").decode(encoding)
    assert shown[3] == expected


def test_a_terminal_gets_no_control_characters_and_a_file_gets_all(monkeypatch):
    text = "a\x1b[31m\x07\0\r\x7f\x9b b\n\tc é"
    out = io.StringIO()
    show([text], out)
    assert out.getvalue().splitlines(keepends=True)[0].startswith("--- 1 -")
    assert text in out.getvalue()
    monkeypatch.setattr(out, "isatty", lambda: True, raising=False)
    out.truncate(out.seek(0))
    show([text], out)
    assert "a\\x1b[31m\\x07\\x00\\x0d\\x7f\\x9b b\n\tc é\n" in out.getvalue()
    assert messages.visible("\x85") == "\\x85"


def test_an_error_shows_no_control_characters(capsys):
    def fail(*_):
        raise ValueError("no file '\x1b[2J\x07'")

    assert cli._guarded("sedd-sample", fail, []) == 2
    assert capsys.readouterr().err == "sedd-sample: error: no file '\\x1b[2J\\x07'\n"


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", [["train", "--help"], ["--version"]])
def test_a_reader_that_goes_ends_a_command_quietly(arguments, unbuffered):
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    command = [sys.executable, "-m", "sedd_jax", *arguments]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        command, stdout=write, stderr=subprocess.PIPE, env=environment, check=False
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_disk_under_the_output_is_one_line():
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "sedd_jax", "train", "--help"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["sedd-train: error: [Errno 28] No space left on device"]


def test_another_broken_pipe_is_an_error(capfd):
    def fail(*_):
        raise BrokenPipeError(32, "Broken pipe", "child")

    assert cli._guarded("sedd-convert", fail, []) == 2
    assert "sedd-convert: error: [Errno 32] Broken pipe: 'child'" in capfd.readouterr().err


def test_samples_come_to_the_output_where_the_file_cannot_be_written(
    capsys, tiny_run, tmp_path, monkeypatch
):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cli.sample, "replacing", full)
    run = [f"--workdir={tiny_run}", "--steps=2", f"--out={tmp_path / 'samples.txt'}"]
    assert sample_command(run) == 2
    out, errors = capsys.readouterr()
    assert out.startswith("--- 1 ---") and "No space left" in errors


def test_every_command_tells_its_version_and_the_package_its_commands(capsys):
    for name, command in cli.COMMANDS.items():
        assert command(["--version"]) == 0
        assert capsys.readouterr().out == f"sedd-{name} {sedd_jax.__version__}\n"
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"sedd_jax {sedd_jax.__version__}\n"
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert "usage: python -m sedd_jax COMMAND" in out
    assert all(f"\n  {name} " in out for name in cli.COMMANDS)
    assert max(map(len, out.splitlines())) <= 80
    assert cli.eval_command(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {name} " in out for name in cli.evaluate.EVALUATIONS)
    assert max(map(len, out.splitlines())) <= 80
    assert cli.main(["sample", "--version"]) == 0
    assert capsys.readouterr().out == f"sedd-sample {sedd_jax.__version__}\n"
