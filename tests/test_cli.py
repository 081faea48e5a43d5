"""The commands as a user meets them: what they print, and one line for every mistake."""

import contextlib
import json
import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import command_line, start

from sedd_jax import cli
from sedd_jax.cli import (
    eval_command,
    prepare_command,
    report_command,
    sample_command,
    train_command,
)
from sedd_jax.config import KEYS, to_json
from sedd_jax.data import open_records
from sedd_jax.evaluation import report
from sedd_jax.evaluation.report import _draw_curve, draw_picture
from sedd_jax.inference import pretrained as loading
from sedd_jax.inference.frames import Cell, Frame


def fails(capsys, command, *arguments):
    """The one line of a command that is refused."""
    assert command([str(a) for a in arguments]) == 2
    out, errors = capsys.readouterr()
    lines = [line for line in errors.splitlines() if ": error: " in line]
    assert len(lines) == 1 and errors.rstrip().endswith(lines[0]), errors
    assert "Traceback" not in out + errors
    return lines[0]


@pytest.mark.parametrize(
    "flag, message",
    [
        (
            "--config.train.stepz=3",
            "unknown flag --config.train.stepz; did you mean --config.train.steps",
        ),
        ("--config.foo=1", "unknown flag --config.foo; did you mean"),
        (
            "--config.train.steps=many",
            "config.train.steps 'many' is not allowed; it must be a whole number",
        ),
        ("--config.optimizer.learning_rate=nan", "config.optimizer.learning_rate 'nan' is not"),
        ("--config.graph.name=absorb", "one of absorbing, uniform"),
        ("--config.data.corpus=wiki", "one of pydoc, text"),
        ("--config.model.heads=3", "not divisible by config.model.heads 3"),
        ("--nonsense=1", "unknown flag --nonsense; sedd-train --help"),
        ("nonsense", "unknown argument 'nonsense'"),
    ],
)
def test_a_mistake_in_the_arguments_of_training_is_one_line(capsys, tmp_path, flag, message):
    workdir = tmp_path / "run"
    line = fails(capsys, train_command, "--config=quickstart", f"--workdir={workdir}", flag)
    assert message in line
    assert not workdir.exists()


def test_training_without_a_config_or_workdir_says_what_to_write(capsys, tmp_path):
    line = fails(capsys, train_command, f"--workdir={tmp_path}")
    assert f"--config is missing, and {str(tmp_path)!r} holds no run to go on with; for" in line
    assert "--workdir is missing" in fails(capsys, train_command, "--config=quickstart")
    line = fails(capsys, train_command, "--config=configs/none.py", f"--workdir={tmp_path}")
    assert "no config file 'configs/none.py'" in line and "quickstart" in line


@pytest.mark.parametrize("where", ["--workdir={}", "--workdir {}", "-workdir={}"])
def test_the_run_in_the_workdir_gives_the_config(tmp_path, tiny_config, where):
    (tmp_path / "config.json").write_text(to_json(tiny_config))
    argv = [*where.format(tmp_path).split(), "--config.train.steps", "7"]
    resumed = cli.train.parse_train("sedd-train", argv)
    assert resumed.workdir == tmp_path and resumed.config.train.steps == 7
    assert resumed.config.model.to_dict() == tiny_config.model.to_dict()


def test_an_unreadable_or_too_small_corpus_is_one_line(capsys, tmp_path):
    where = [f"--workdir={tmp_path / 'run'}", "--config.data.corpus=text"]
    line = fails(capsys, train_command, "--config=quickstart", *where, "--config.data.path=/none")
    assert "'/none'" in line
    (tmp_path / "empty").mkdir()
    path = f"--config.data.path={tmp_path / 'empty'}"
    assert "no text in" in fails(capsys, train_command, "--config=quickstart", *where, path)


def test_preparing_again_says_that_the_records_are_there(capsys, tmp_path):
    arguments = ["--dataset=pydoc", "--tokenizer=bytes", "--length=32", f"--out={tmp_path / 'a'}"]
    for is_again in (False, True):
        assert prepare_command(arguments) == 0
        assert ("are there already; nothing was written" in capsys.readouterr().err) is is_again
    assert "was prepared with length 32" in fails(capsys, prepare_command, *arguments, "--length=8")
    own = ["--dataset=text", f"--out={tmp_path / 'b'}"]
    assert "(sedd-prepare: --manual_dir) is empty" in fails(capsys, prepare_command, *own)


@pytest.mark.parametrize(
    "command, arguments",
    [
        (eval_command, ["likelihood"]),
        (eval_command, ["frontier"]),
        (sample_command, []),
        (report_command, []),
    ],
)
def test_an_empty_or_foreign_workdir_is_one_line(capsys, tmp_path, command, arguments):
    for folder, words in ((tmp_path / "nowhere", "no folder at"), (tmp_path, "holds no model")):
        line = fails(capsys, command, *arguments, f"--workdir={folder}")
        assert words in line and re.search("give .*workdir", line)
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--template", "a" * 40 + "[MASK]"], "more than length 32"),
        (["--template", "[MASK:200]"], "more than length 32"),
        (["--template", "[MASK:x]"], "names no number of free positions"),
        (["--template", "日本[MASK]"], "outside the alphabet"),
        (["--prefix", "日本"], "outside the alphabet"),
        (["--prefix", "x" * 20, "--suffix", "y" * 20], "more than length 32"),
        (["--template", "a[MASK]", "--prefix", "b"], "--template cannot go with --prefix"),
        (["--template", "a[MASK]", "--length", "9"], "--template cannot go with --length"),
        (["--length", "33"], "length 33 is not a whole number in [1, 32]"),
        (["--length", "8", "--prefix", "x" * 9], "more than length 8"),
        (["--format", "csv"], "unknown format 'csv'; known: text, jsonl"),
        (["--model", "some/one"], "--workdir and --model say"),
        (["--out", "/"], "--out: '/' exists already"),
        (["--html", "/none/a.html"], "--html: '/none/a.html' is in no folder"),
        (["--animation", "a.mp4"], "--html: 'a.mp4' has none of the endings of an animation"),
        (["--batch_size", "0"], "batch_size 0 is not a whole number in"),
        (["--steps", "0"], "steps 0 is not a whole number in [1, 1000000]"),
        (["--steps", "3000000000"], "steps 3000000000 is not a whole number in"),
        (["--steps", "x"], "invalid int value"),
        (["--seed", "-1"], "seed -1 is not a whole number in [0, 4294967295]"),
        (["--num_samples", "0"], "num_samples 0 is not a whole number in"),
        (["--predictor", "ddim"], "unknown predictor 'ddim'; known: euler, tweedie, none"),
        (["--draw", "float16"], "unknown draw 'float16'; known: exact, float32_gumbel"),
    ],
)
def test_a_mistake_in_the_arguments_of_sampling_is_one_line(capsys, tiny_run, arguments, message):
    assert message in fails(capsys, sample_command, f"--workdir={tiny_run}", *arguments)


def test_odd_passes_and_no_blocks_are_one_line(capsys, tiny_run):
    run = ("likelihood", f"--workdir={tiny_run}")
    assert "passes 3" in fails(capsys, eval_command, *run, "--passes=3")
    assert "limit 0" in fails(capsys, eval_command, *run, "--blocks=0")
    assert "batch_size 0 is not a whole number" in fails(
        capsys, eval_command, *run, "--batch_size=0"
    )
    line = fails(capsys, eval_command, *run, "--target_standard_error=0")
    assert "target_standard_error 0.0 is not above 0" in line
    line = fails(capsys, eval_command, "perplexity", f"--workdir={tiny_run}")
    assert "unknown evaluation 'perplexity'; did you mean generative_perplexity?" in line


def test_a_foreign_config_is_one_line(capsys, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "tokenizer.json").write_text("{}")
    for text, words in (
        ("[]", "config.json' holds a list, not an object"),
        ('{"model": "bert"}', "is not a config of sedd_jax"),
        ('{"seed": ', "config.json' is not JSON"),
    ):
        (tmp_path / "config.json").write_text(text)
        assert words in fails(capsys, sample_command, f"--workdir={tmp_path}")


@pytest.mark.parametrize("command", list(cli.COMMANDS.values()))
def test_every_command_explains_itself(capsys, command):
    assert command(["--help"]) == 0
    assert "usage: " in capsys.readouterr().out


def sampled(capsys, tiny_run, *arguments):
    assert sample_command([f"--workdir={tiny_run}", "--steps=4", *arguments]) == 0
    texts = re.split(r"--- \d+ -+\n", capsys.readouterr().out)[1:]
    return [text.removesuffix("\n") for text in texts]


def test_sampling_keeps_the_prefix_the_suffix_and_the_template(capsys, tiny_run):
    texts = sampled(capsys, tiny_run, "--prefix=The ", "--suffix= end.", "--num_samples=3")
    assert len(texts) == 3 and len(set(texts)) == 3
    assert all(t.startswith("The ") and t.endswith(" end.") and len(t) == 32 for t in texts)
    (text,) = sampled(capsys, tiny_run, "--template=if [MASK:9]: [MASK]")
    assert re.fullmatch(r"if .{9}: .", text, re.DOTALL)


def test_sampling_repeats_with_the_seed_and_differs_without(capsys, tiny_run):
    first = sampled(capsys, tiny_run, "--seed=1")
    assert sampled(capsys, tiny_run, "--seed=1") == first
    assert sampled(capsys, tiny_run, "--seed=2") != first


@pytest.mark.parametrize("predictor", ["euler", "tweedie", "none"])
def test_every_predictor_samples_clean_text(capsys, tiny_run, predictor):
    (text,) = sampled(capsys, tiny_run, f"--predictor={predictor}")
    assert len(text) == 32 and "░" not in text


def test_samples_as_json_lines_are_those_of_the_text_in_any_batches(capsys, tiny_run, tmp_path):
    arguments = ["--num_samples=3", "--seed=4", "--length=24", "--suffix=end"]
    texts = sampled(capsys, tiny_run, *arguments)
    run = [f"--workdir={tiny_run}", "--steps=4", *arguments, "--format=jsonl"]
    assert sample_command(run) == 0
    out = capsys.readouterr().out
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["text"] for row in rows] == texts and all(len(text) == 24 for text in texts)
    assert [len(row.pop("tokens")) for row in rows] == [24] * 3
    assert rows[2] == {
        "index": 2,
        "text": texts[2],
        "nfe": 5,
        "seed": 4,
        "steps": 4,
        "predictor": "tweedie",
        "draw": "exact",
        "grid": "uniform",
        "suffix": "end",
    }
    file = tmp_path / "samples.jsonl"
    assert sample_command([*run, f"--out={file}", "--batch_size=2"]) == 0
    assert (file.read_text(), capsys.readouterr().out) == (out, "")
    assert "exists already; move it" in fails(capsys, sample_command, *run, f"--out={file}")


def test_a_line_of_json_is_there_when_its_batch_is_done(tiny_run, monkeypatch, tmp_path):
    file, seen = tmp_path / "samples.jsonl", []
    watched = cli.sample._watched

    def spied(*arguments):
        for state in watched(*arguments):
            seen.append(len(file.read_text().splitlines()) if file.exists() else 0)
            yield state

    monkeypatch.setattr(cli.sample, "_watched", spied)
    run = [f"--workdir={tiny_run}", "--steps=1", "--num_samples=3", "--batch_size=1"]
    assert sample_command([*run, "--format=jsonl", f"--out={file}"]) == 0
    assert seen == [0, 0, 1, 1, 2, 2] and len(file.read_text().splitlines()) == 3


def test_a_file_of_samples_is_whole_or_not_there(capsys, tiny_run, tmp_path, monkeypatch):
    run = [f"--workdir={tiny_run}", "--steps=2", f"--out={tmp_path / 'samples.txt'}"]
    with monkeypatch.context() as patch:
        patch.setattr(cli.sample, "_watched", lambda *_: iter([None]))  # fails at the first state
        with pytest.raises(AttributeError):
            sample_command(run)
    assert list(tmp_path.iterdir()) == []
    assert sample_command(run) == 0
    assert capsys.readouterr().out == "" and len(list(tmp_path.iterdir())) == 1
    (text,) = sampled(capsys, tiny_run, "--steps=2")
    assert (tmp_path / "samples.txt").read_text() == f"--- 1 {'-' * 60}\n{text}\n"


def test_the_page_of_a_sample_is_written(capsys, tiny_run, tmp_path):
    file = tmp_path / "animation.html"
    texts = sampled(capsys, tiny_run, "--num_samples=3", f"--html={file}", "--batch_size=2")
    found = re.search(r'id="states">(.*)</script>', file.read_text(encoding="utf-8"))
    page = json.loads(found[1])
    assert page["title"] == "tiny: 4 steps, tweedie, seed 0" and page["steps"] == [0, 1, 2, 3, 4]
    assert len(page["samples"]) == len(texts) == 3


def test_a_terminal_shows_the_first_sample_while_it_is_drawn(capsys, tiny_run, monkeypatch):
    quiet = sampled(capsys, tiny_run, "--live", "--num_samples=2")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    texts = sampled(capsys, tiny_run, "--num_samples=2")
    assert texts == quiet
    assert sample_command([f"--workdir={tiny_run}", "--steps=4", "--live"]) == 0
    out = capsys.readouterr().out
    shown = re.findall(r"step (\d) of 4, \d+% masked\n", out)
    assert shown == ["0", "1", "2", "3", "4"] and out.count("\x1b[J") == 5
    assert re.split(r"--- \d+ -+\n", out)[1] == texts[0] + "\n"


def test_progress_is_for_terminals(capsys, tiny_run, monkeypatch):
    run = [f"--workdir={tiny_run}", "--steps=4", "--num_samples=2", "--batch_size=1"]
    assert sample_command(run) == 0
    assert "sample" not in capsys.readouterr().err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert sample_command(run) == 0
    assert "8/8" in capsys.readouterr().err


def test_evaluation_prints_and_writes_the_same_numbers(capsys, tiny_run, tmp_path):
    file = tmp_path / "result.json"
    arguments = ["likelihood", f"--workdir={tiny_run}", "--blocks=8", "--passes=2", "--baselines"]
    assert eval_command([*arguments, f"--json={file}"]) == 0
    out, result = capsys.readouterr().out, json.loads(file.read_text())
    bits = result["bits_per_character"]
    assert f"{bits['bound']:.3f}±{bits['bound_standard_error']:.3f}" in out
    assert f"{bits['bigram']:.3f}" in out
    assert result["tokens"] == result["characters"] == 8 * 32
    parts = bits["diffusion"] + bits["tail"] + bits["prior"]
    assert bits["bound"] == pytest.approx(parts, rel=1e-6)
    assert bits["bound"] >= bits["normalised"]


def test_a_target_that_was_not_reached_is_said(capsys, tiny_run, tmp_path):
    file = tmp_path / "result.json"
    run = ["likelihood", f"--workdir={tiny_run}", "--blocks=4", "--passes=2", f"--json={file}"]
    assert eval_command([*run, "--target_standard_error=1e-9", "--max_passes=4"]) == 0
    (out, errors), result = capsys.readouterr(), json.loads(file.read_text())
    assert (result["target_standard_error"], result["target_reached"]) == (1e-9, False)
    error = result["nats_per_token"]["bound_standard_error"]
    assert " ".join(out.splitlines()[-2:]) == (
        f"target 1e-09 nats/token not reached: {error:.3g} after 4 noise levels a block; "
        "raise --max_passes"
    )
    assert "round 1, 2 noise levels a block: standard error " in errors
    assert f"round 2, 4 noise levels a block: standard error {error:.3g} nats/token" in errors
    assert eval_command([*run, "--target_standard_error=99"]) == 0
    assert json.loads(file.read_text())["target_reached"] is True
    assert "not reached" not in capsys.readouterr().out
    assert eval_command(run) == 0
    assert "target_reached" not in json.loads(file.read_text())


@pytest.fixture
def no_loading(monkeypatch):
    """A command that begins to load a model has failed."""

    def load(*_, **__):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(loading, "load", load)


NO_FOLDER = "'/none/a' is in no folder; make it or give another path"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["likelihood", "--json=/none/a"], f"--json: {NO_FOLDER}"),
        (["generative_perplexity", "--json=/none/a"], f"--json: {NO_FOLDER}"),
        (["mauve", "--json=/"], "--json: '/' is a folder; give a file"),
        (["frontier", "--json=/none/a"], f"--json: {NO_FOLDER}"),
        (["frontier", "--picture=/none/a.png"], "--picture: '/none/a.png' is in no folder"),
        (["frontier", "--picture=a.foo"], "does not end in .png, .pdf or .svg"),
        (["frontier", "--steps="], "--steps '' is not like 32,64,128"),
        (["frontier", "--steps=8,2.5"], "--steps '8,2.5' is not like 32,64,128"),
        (["frontier", "--steps=0"], "--steps '0' is not like 32,64,128"),
        (["frontier", "--predictors=tweedie,ddim"], "unknown predictor 'ddim'; known: "),
        (["frontier", "--predictors="], "unknown predictor ''; known: "),
        (["frontier", "--predictors=euler", "--predictor=euler"], "leave one out"),
        (["frontier", "--temperatures="], "--temperatures '' is not like 0.8,1"),
        (["frontier", "--temperatures=1,0"], "temperature 0.0 is not inside (0, inf)"),
        (["frontier", "--temperatures=nan"], "temperature nan is not inside (0, inf)"),
        (["frontier", "--references=2"], "references 2 is too few for an energy distance"),
        (["frontier", "--references=9", "--num_samples=2"], "num_samples 2 is too few"),
        (["frontier", "--draw=gumbel"], "unknown draw 'gumbel'; known: exact, float32_gumbel"),
        (["mauve", "--grid=sine"], "unknown grid 'sine'; known: "),
        (["frontier", "--split=test"], "--records and --split need --references"),
        (["mauve", "--repeats=1"], "1 repeats have no spread; give at least 2"),
        (["mauve", "--form=suffix"], "unknown form 'suffix'; known: prefix, infill"),
        (["mauve", "--references=1"], "1 references are too few to cluster; give at least 2"),
        (["mauve", "--references=5", "--buckets=11"], "buckets 11 is not in [2, 10]"),
        (["mauve", "--seed=-1"], "seed -1 is not in [0, 2147483645]"),
    ],
)
@pytest.mark.usefixtures("no_loading")
def test_what_cannot_end_well_is_refused_before_the_work(capsys, tiny_run, arguments, message):
    assert message in fails(capsys, eval_command, *arguments, f"--workdir={tiny_run}")


@pytest.mark.usefixtures("no_loading")
def test_a_library_that_is_missing_is_named_before_the_work(
    capsys, tiny_run, tmp_path, monkeypatch
):
    run = f"--workdir={tiny_run}"
    monkeypatch.setitem(sys.modules, "mauve", None)
    line = fails(capsys, eval_command, "mauve", run)
    assert "needs the library mauve-text" in line and 'pip install "sedd_jax[eval]"' in line
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    line = fails(capsys, eval_command, "frontier", run, f"--picture={tmp_path / 'a.png'}")
    assert '--picture needs the library matplotlib; pip install "sedd_jax[plot]"' in line
    assert "sedd-report needs the library matplotlib" in fails(capsys, report_command, run)


def test_a_model_without_a_run_is_evaluated_on_records_that_it_is_given(
    capsys, tiny_run, tmp_path, monkeypatch
):
    folder = tmp_path / "exported"
    loading.load(tiny_run).save_pretrained(folder)
    records = [f"--records={tiny_run / 'records'}", "--split=validation"]
    run = ["likelihood", f"--workdir={folder}", "--blocks=2", "--passes=2"]
    assert eval_command([*run, *records]) == 0
    table = capsys.readouterr().out
    assert eval_command([*run[:1], f"--workdir={tiny_run}", *run[2:]]) == 0
    assert capsys.readouterr().out == table
    monkeypatch.setattr(loading, "load", None)  # from here on, nothing is loaded
    needs = "has no records of its own; give --records, a folder made by sedd-prepare"
    for kind in ("likelihood", "mauve"):
        for source, what in ((folder, "is an exported model"), ("some/one", "a model of the hub")):
            line = fails(capsys, eval_command, kind, f"--workdir={source}")
            assert what in line and needs in line
    line = fails(capsys, eval_command, *run, *records, "--baselines")
    assert "leave --baselines out" in line
    line = fails(capsys, report_command, f"--workdir={folder}")
    assert "give --records to sedd-eval likelihood" in line


def test_a_folder_without_a_tokenizer_takes_one_from_the_command_line(capsys, tiny_run, tmp_path):
    folder = tmp_path / "model"
    loading.load(tiny_run).save_pretrained(folder)
    (folder / "sedd_jax.json").unlink()  # as the original code leaves a folder
    assert "--tokenizer and --tokenizer_path" in fails(capsys, sample_command, f"--model={folder}")
    line = fails(capsys, sample_command, f"--model={folder}", "--tokenizer_path=x")
    assert line.endswith("--tokenizer_path needs --tokenizer, the kind of its files")
    named = f"--tokenizer={tiny_run / 'tokenizer.json'}"
    assert sample_command([f"--model={folder}", named, "--template=ab[MASK:4]", "--steps=2"]) == 0
    assert "\nab" in capsys.readouterr().out
    few = ["--blocks=2", "--passes=2", "--split=validation"]
    records = f"--records={tiny_run / 'records'}"
    assert eval_command(["likelihood", f"--workdir={folder}", named, records, *few]) == 0
    for flag in (named, "--passes=4", "--baselines", "--seed=1"):
        line = fails(capsys, eval_command, "likelihood", "--gpt2=gpt2", records, flag)
        assert f"{flag.split('=')[0]} is of the bound of --workdir; leave it out" in line


def test_the_evaluations_are_listed_with_an_example(capsys):
    assert eval_command(["--help"]) == 0
    out = capsys.readouterr().out
    assert "  likelihood             An upper bound on -log p" in out
    assert all(f"\n  {kind} " in out for kind in cli.evaluate.EVALUATIONS)
    assert "example: sedd-eval likelihood --workdir=" in out


def test_the_report_writes_the_summary_and_the_picture(capsys, tiny_run):
    pytest.importorskip("matplotlib", reason="the picture needs the [plot] extra")
    arguments = ["--template=if [MASK:9]:", "--passes=2", "--began=0"]
    assert report_command([f"--workdir={tiny_run}", *arguments]) == 0
    summary = json.loads((tiny_run / "summary.json").read_text())
    bits = summary["bits_per_character"]
    assert set(bits) == {
        "bound",
        "bound_standard_error",
        "normalised",
        "normalised_standard_error",
        "paper_protocol",
        "unigram",
        "bigram",
    }
    assert all(isinstance(value, float) for value in bits.values())
    assert summary["seconds"] > 0 and len(summary["samples"]) == 8
    assert all(re.fullmatch(r"if .{9}:", text, re.DOTALL) for text in summary["infill"])
    assert (tiny_run / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert f"{bits['bound']:.3f}" in capsys.readouterr().out


def test_a_run_of_padded_records_has_a_report_without_ngrams(capsys, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="the picture needs the [plot] extra")
    workdir = tmp_path / "run"
    assert train_command(command_line(workdir, data__form="padded", train__steps=1)) == 0
    assert report_command([f"--workdir={workdir}", "--passes=2"]) == 0
    bits = json.loads((workdir / "summary.json").read_text())["bits_per_character"]
    assert bits["bound"] > 0 and bits["unigram"] is bits["bigram"] is None
    assert "bigram" not in capsys.readouterr().out
    monkeypatch.setattr(report, "MOST_TOKENS", 10)  # the first part alone is read
    records = open_records(workdir / "records")
    assert 0 < len(report.vocabulary(records, "train"))


def test_a_report_that_cannot_be_written_is_shown_first(capsys, tiny_run, monkeypatch):
    pytest.importorskip("matplotlib", reason="the picture needs the [plot] extra")

    def read_only(*_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("sedd_jax.evaluation.report.write_json", read_only)
    assert report_command([f"--workdir={tiny_run}", "--passes=2"]) == 2
    out, errors = capsys.readouterr()
    assert "bound" in out and "\n--- 4 ---" in out and "written" not in out
    assert errors.splitlines()[-1] == (
        f"sedd-report: error: cannot write summary.json and picture.png in {str(tiny_run)!r}: "
        "Read-only file system; make the folder writable, or run it on a copy"
    )


def test_an_older_checkpoint_is_sampled_and_scored(capsys, tiny_run, tmp_path):
    newest = sampled(capsys, tiny_run, "--prefix=ab")
    assert sampled(capsys, tiny_run, "--prefix=ab", "--step=8") == newest
    assert sampled(capsys, tiny_run, "--prefix=ab", "--step=4") != newest
    run = ["likelihood", f"--workdir={tiny_run}", "--passes=2", "--blocks=2"]
    for step in (4, 8):
        assert eval_command([*run, f"--step={step}", f"--json={tmp_path / 'a.json'}"]) == 0
        assert json.loads((tmp_path / "a.json").read_text())["step"] == step
    capsys.readouterr()
    for command, *arguments in (
        (sample_command,),
        (eval_command, *run),
        (eval_command, "frontier"),
    ):
        line = fails(capsys, command, *arguments, f"--workdir={tiny_run}", "--step=5")
        assert "no checkpoint of step 5 in" in line and line.endswith("steps there: 4, 8")
    gpt2 = ["likelihood", "--gpt2=gpt2", f"--records={tiny_run / 'records'}", "--step=4"]
    assert "leave it out" in fails(capsys, eval_command, *gpt2)
    loading.load(tiny_run, step=4).save_pretrained(tmp_path / "model")
    assert loading.load(tmp_path / "model").step == 4
    for source in (str(tmp_path / "model"), "owner/name"):
        with pytest.raises(ValueError, match="is not a run with checkpoints; leave step 4 out"):
            loading.load(source, step=4)


def test_the_picture_names_its_lines_has_errors_and_does_not_begin_at_0():
    figures = pytest.importorskip("matplotlib.figure", reason="needs the [plot] extra")
    heldout = {"bound": 2.5, "bound_standard_error": 0.02}
    metrics = [
        *({"kind": "train", "step": step, "nats_per_token": 2 + 9 / step} for step in range(1, 9)),
        *({"kind": "heldout", "step": step, **heldout} for step in (4, 8)),
    ]
    bits = {"bound": 3.6, "bound_standard_error": 0.01, "unigram": 4.5, "bigram": 3.61}
    result = {"bits_per_character": bits, "tokens": 2, "characters": 2, "step": 8}
    axes = figures.Figure().subplots()
    _draw_curve(axes, metrics, result)
    low, high = axes.get_ylim()
    assert 2 < low < (2 + 9 / 8) / np.log(2) and 4.5 < high < 11 / np.log(2)
    names = {text.get_text(): text.xyann[1] for text in axes.texts}
    assert sorted(names, key=names.get) == [
        "held out, all blocks: 3.600±0.010",
        "held-out bound",
        "bigram: 3.610",
        "unigram: 4.500",
        "training loss",
    ]
    assert (np.diff(sorted(names.values())) > 0.05 * (high - low)).all()
    bars = [bar.get_segments() for lines in axes.containers for bar in lines.lines[2]]
    sizes = [segment[1, 1] - segment[0, 1] for segments in bars for segment in segments]
    np.testing.assert_allclose(sizes[-3:], [0.04 / np.log(2)] * 2 + [0.02])


def test_the_picture_has_a_panel_for_each_frame(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="the picture needs the [plot] extra")
    from matplotlib.figure import Figure

    result = {"bits_per_character": {}, "tokens": 2, "characters": 2}
    skipped = {"kind": "train", "step": 2, "nats_per_token": None}
    cells = [[Cell("a", kind, 0)] * 3 for kind in ("", "masked", "new", "known")]
    frames = [Frame("noise", 1.0, []), Frame("text", 0.0, cells * 5)]
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    draw_picture(tmp_path / "a.png", [skipped], result, frames)
    noise, text, *_ = [axes for axes in drawn[0].axes if axes.get_ylabel() == ""]
    assert (noise.get_title("left"), text.get_title("left")) == ("noise", "text")
    shown = "".join(letter.get_text() for letter in text.texts)
    assert len(noise.texts) == 0 and shown == "aaa···aaaaaa" * 3  # twelve lines at most
    monkeypatch.undo()
    draw_picture(tmp_path / "a.png", [skipped], result, frames)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_the_commands_are_there_as_processes(tiny_run):
    process = start("sample", f"--workdir={tiny_run}", "--steps=2", "--prefix=ab")
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert out.splitlines()[1].startswith("ab")
    process = start("sing")
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 2
    assert errors == f"sedd_jax: error: unknown command 'sing'; known: {', '.join(cli.COMMANDS)}\n"


@pytest.fixture(scope="module")
def completions(tmp_path_factory):
    """What bash would offer at the end of a line's words, by the script that is printed."""
    file = tmp_path_factory.mktemp("completion") / "script.sh"
    with file.open("w") as out, contextlib.redirect_stdout(out):
        assert cli.main(["completion"]) == 0
    call = (
        'source "$0"; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _sedd_jax; echo "${COMPREPLY[@]}"'
    )

    piped = {"capture_output": True, "text": True}

    def offered(*words):
        made = subprocess.run(["bash", "-c", call, file, *words], check=False, **piped)
        assert made.stderr == ""
        return made.stdout.split()

    return offered


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("sedd-train --config = text8", ["text8", "text8_uniform"]),  # bash cuts at "="
        ("sedd-train --config quick", ["quickstart"]),
        ("sedd-train --config.model.ti", ["--config.model.time_conditioning"]),
        ("/some/bin/sedd-sample --pre", ["--predictor", "--prefix"]),
        ("sedd-eval li", ["likelihood"]),
        ("sedd-eval table --form", ["--format"]),
        ("sedd-sample --workdir = ru", []),  # the shell offers files
    ],
)
def test_a_shell_completes_flags_keys_and_names(completions, line, offered):
    assert completions(*line.split(" ")) == offered


def test_a_shell_completes_every_key_and_every_evaluation(completions):
    keys = {f"--config.{key}" for key in KEYS}
    assert keys <= {*completions("sedd-train", "--config.")}
    assert {*completions("sedd-eval", "")} == {*cli.evaluate.EVALUATIONS}


def test_a_config_is_found_by_path_and_by_name():
    by_name, workdir, *_ = cli.train.parse_train("sedd-train", ["--config=text8", "--workdir=x"])
    path = command_line("x")[0].replace("quickstart", cli.train._find_config("text8"))
    by_path, *_ = cli.train.parse_train("sedd-train", [path, "--workdir=x", "--config.seed=3"])
    assert str(workdir) == "x"
    assert (by_name.seed, by_path.seed) == (0, 3)
    by_name.seed = 3
    assert by_name.to_dict() == by_path.to_dict()


CONFIG_FILES = {  # the text of a config file, the words of the message
    "a_name": ("def get_config():\n    return STEPS\n", "line 2: NameError: name 'STEPS'"),
    "a_syntax": ("def get_config():\n    return (\n", "line 2: SyntaxError: '(' was never closed"),
    "an_import": ("import no_such_package\n", "line 1: ModuleNotFoundError"),
    "an_exit": ("import sys\n\nsys.exit(7)\n", "line 3: SystemExit: 7"),
    "a_null": ("x = '\0'\n", "SyntaxError: source code"),
    "a_key": ("def get_config(name):\n    return {}[name]\n", "takes one: --config=FILE:ARGUMENT"),
    "no_function": ("config = 1\n", "has no function get_config"),
    "no_return": ("def get_config():\n    pass\n", "returns a value of type NoneType; return a"),
    "empty": (
        "from ml_collections import ConfigDict\nget_config = lambda: ConfigDict()\n",
        "; start from configs/base.py",
    ),
    "a_type": (
        "from sedd_jax.configs import base\ndef get_config():\n    base.get_config().seed = ''\n",
        "line 3: TypeError",
    ),
}


@pytest.mark.parametrize("name", CONFIG_FILES)
def test_a_mistake_in_a_config_file_is_one_line_with_its_place(capsys, tmp_path, name):
    text, words = CONFIG_FILES[name]
    file = tmp_path / f"{name}.py"
    file.write_text(text)
    for more in ([], ["--config.train.steps=3"]):
        workdir = f"--workdir={tmp_path / 'run'}"
        line = fails(capsys, train_command, f"--config={file}", workdir, *more)
        assert words in line and (name in line or name == "empty")
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


@pytest.mark.parametrize(
    "config, words",
    [
        ("quickstart:v9", "takes no argument; leave out 'v9'"),
        ("openwebtext_small:v9", "line 15: ValueError: unknown hardware 'v9'; known: a100x8"),
        ("{file}:b", "line 2: KeyError: 'b'"),
    ],
)
def test_an_argument_that_a_config_does_not_know_is_one_line(capsys, tmp_path, config, words):
    file = tmp_path / "c.py"
    file.write_text(CONFIG_FILES["a_key"][0])
    config = f"--config={config.format(file=file)}"
    line = fails(capsys, train_command, config, f"--workdir={tmp_path / 'run'}")
    assert words in line and config.partition(":")[0].rpartition("/")[2][-10:] in line


@pytest.mark.parametrize(
    "spelling, key, value",
    [
        ("--config.train.steps=1e6", "train.steps", 1_000_000),
        ("--config.train.steps 7", "train.steps", 7),
        ("-config.mesh.data -1", "mesh.data", -1),
        ("--config.seed=4294967295", "seed", 2**32 - 1),
        ("--config.model.dropout=0", "model.dropout", 0.0),
        ("--config.data.path=123", "data.path", "123"),
        ("--config.data.path=", "data.path", ""),
        ("--config.graph.scale_by_sigma=false", "graph.scale_by_sigma", False),
        ("--noconfig.graph.scale_by_sigma", "graph.scale_by_sigma", False),
        ("--config.graph.scale_by_sigma", "graph.scale_by_sigma", True),
    ],
)
def test_a_value_is_read_as_its_key_takes_it(spelling, key, value):
    argv = ["--config", "quickstart", "--workdir", "a b", *spelling.split(" ")]
    request = cli.train.parse_train("sedd-train", argv)
    read = request.config.to_dict()
    for name in key.split("."):
        read = read[name]
    assert (read, type(read)) == (value, type(value)) and str(request.workdir) == "a b"


@pytest.mark.parametrize("text", ["", "many", "2.5", "inf", "nan", "true", "-1", "1e-3"])
def test_what_is_no_whole_number_is_refused_with_the_key_and_the_rule(capsys, tmp_path, text):
    argv = ["--config=quickstart", f"--workdir={tmp_path / 'run'}", f"--config.train.steps={text}"]
    line = fails(capsys, train_command, *argv)
    assert f"config.train.steps {text!r} is not allowed; it must be a whole number >= 1" in line


def test_what_a_config_file_derives_from_a_key_follows_the_command_line(tmp_path):
    file = tmp_path / "c.py"
    file.write_text(
        "from ml_collections import FrozenConfigDict\nfrom sedd_jax.configs import base\n\n"
        "def get_config(frozen=''):\n"
        "    c = base.get_config()\n"
        "    c.checkpoint.every = c.train.get_ref('eval_every') * 2\n"
        "    return FrozenConfigDict(c) if frozen else c\n"
    )
    argv = ["--workdir=x", "--config.train.eval_every=7"]
    config = cli.train.parse_train("sedd-train", [f"--config={file}", *argv]).config
    assert (config.train.eval_every, config.checkpoint.every) == (7, 14)
    config = cli.train.parse_train("sedd-train", [f"--config={file}:frozen", *argv]).config
    assert (config.train.eval_every, config.checkpoint.every) == (7, 14)


@pytest.mark.parametrize("evaluation", ["generative_perplexity", "frontier"])
@pytest.mark.usefixtures("no_loading")
def test_samples_too_short_to_be_measured_are_refused_first(capsys, tiny_run, evaluation):
    line = fails(capsys, eval_command, evaluation, f"--workdir={tiny_run}", "--length=2")
    assert "length 2 is too short" in line and "give at least 4" in line


@pytest.mark.parametrize(
    "command, arguments, message",
    [
        (
            sample_command,
            ["--stpes=3", "--workdir=x"],
            "unknown flag --stpes; did you mean --steps",
        ),
        (sample_command, ["--wrokdir", "x"], "unknown flag --wrokdir; did you mean --workdir?"),
        (eval_command, ["likelihood", "--pases=3"], "unknown flag --pases; did you mean --passes"),
        (eval_command, ["likelhood"], "unknown evaluation 'likelhood'; did you mean likelihood?"),
        (
            cli.convert_command,
            ["--config.seed=1", "--fom=hub"],
            "--fom; did you mean --from, --form",
        ),
        (cli.main, ["trian"], "unknown command 'trian'; did you mean train?"),
        (cli.report_command, ["--qqq"], "unknown flag --qqq; sedd-report --help lists the flags"),
    ],
)
def test_a_misspelt_flag_gets_a_suggestion(capsys, command, arguments, message):
    assert message in fails(capsys, command, *arguments)


def test_a_value_may_look_like_a_flag(capsys):
    line = fails(capsys, sample_command, "--prefix=--- a", "--suffix", "--b c", "--format=x")
    assert "arguments are required: --workdir/--model;" in line


def shown_help(capsys, command, *arguments) -> str:
    assert command([*arguments, "--help"]) == 0
    return " ".join(capsys.readouterr().out.split())


def test_the_helps_say_every_default_and_every_command(capsys):
    for evaluation in cli.evaluate.EVALUATIONS:
        if evaluation not in ("harness", "table"):  # which draw nothing
            assert "--seed SEED of the" in shown_help(capsys, cli.eval_command, evaluation)
    text = shown_help(capsys, eval_command, "likelihood")
    assert "blocks a network call (default: 32)" in text and "None" not in text
    text = shown_help(capsys, cli.prepare_command)
    assert "tokens in a block (default: 1024)" in text
    assert train_command(["--help"]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80
    text = shown_help(capsys, train_command)
    assert "--config=quickstart " in text and "configs/quickstart.py" not in text
    for key in KEYS:
        assert f"--config.{key}=" in text
    text = shown_help(capsys, cli.main)
    assert all(f" {name} " in text for name in cli.COMMANDS)


def test_a_closed_standard_error_is_no_fault(tiny_run):
    command = f"{sys.executable} -m sedd_jax sample --workdir={tiny_run} --steps=2 2>&-"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("--- 1 ---")
