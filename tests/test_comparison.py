"""sedd-compare: what it runs, goes on with, refuses and writes; its rows from results by hand."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import QUICK, REPOSITORY, TINY, says

from sedd_jax import config as configuration
from sedd_jax.cli import compare, compare_command
from sedd_jax.configs import quickstart
from sedd_jax.configs.rivals import RIVALS, with_rival
from sedd_jax.evaluation import comparison, comparison_table, tables
from sedd_jax.evaluation.comparison import FAILURE, Run, Scoring

KEYS = TINY | {
    "data.corpus": "text",
    "data.tokenizer": "bytes",
    "model.hidden_size": 32,
    "model.blocks": 1,
    "train.steps": 6,
    "train.eval_every": 2,
    "checkpoint.every": 2,
    "sample.steps": 2,
}
SCORING = Scoring(passes=2, blocks=None, num_samples=3, scorer=None)


def command(out, text, methods, **changes):
    keys = KEYS | {"data.path": text} | {key.replace("__", "."): v for key, v in changes.items()}
    flags = [f"--config.{key}={value}" for key, value in keys.items()]
    how = [f"--methods={methods}", "--passes=2", "--num_samples=3"]
    return ["--config=quickstart", f"--out={out}", *how, *flags]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for name in "abcd":
        words = "The quick brown fox jumps over the lazy dog. " * 20
        (folder / f"{name}.txt").write_text(f"{name} {words}")
    return folder


def started(text, *argv):
    """The command as a process whose own processes compile quickly."""
    environment = os.environ | {"XLA_FLAGS": QUICK}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    line = [sys.executable, "-m", "sedd_jax", "compare", *argv]
    return subprocess.Popen(line, env=environment, **pipes)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, text):
    """A comparison of two methods, and what the command printed."""
    out = tmp_path_factory.mktemp("comparison") / "out"
    process = started(text, *command(out, text, "sedd_absorbing,normalised"))
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return out, printed, errors


def rows_of(out):
    return {row["name"]: row for row in json.loads((out / "comparison.json").read_text())["rows"]}


def without_times(row):
    times = ("training_seconds", "tokens_per_second")
    return {key: value for key, value in row.items() if key not in times}


# --- real runs


def test_methods_are_trained_alike_and_stand_in_one_table(finished):
    out, printed, errors = finished
    rows = rows_of(out)
    names = ["sedd_absorbing", "sedd_absorbing, normalised", "normalised"]
    assert list(rows) == [*names, "interpolated bigram", "unigram"]
    for method in ("sedd_absorbing", "normalised"):
        row, folder = rows[method], out / method / "seed_0"
        assert row["tokens_seen"] == 6 * 8 * 32 and row["kind"] == "bound"
        result = json.loads((folder / "likelihood.json").read_text())
        for unit in ("nats_per_token", "bits_per_character"):
            assert row[unit] == result[unit]["bound"]
            assert row[f"{unit}_standard_error"] == result[unit]["bound_standard_error"]
        ppl, error = (row[f"perplexity_per_token{end}"] for end in ("", "_standard_error"))
        assert ppl == pytest.approx(np.exp(row["nats_per_token"]))
        assert error == pytest.approx(ppl * row["nats_per_token_standard_error"])
        assert f" {ppl:.4g}±{error:.2g}" in printed
        assert row["parameters"] == result["parameters"] > 10_000
        texts = [json.loads(line) for line in (folder / "samples.jsonl").open()]
        assert len(texts) == 3 and len(texts[0]["tokens"]) == 32
        assert row["samples"]["distinct"]["1"] > 0
        config = json.loads((folder / "run/config.json").read_text())
        assert config["data"]["records"] == str(out / "records")
        assert config["objective"]["name"] == RIVALS[method]["objective.name"]
    assert rows["unigram"]["nats_per_token"] > rows["interpolated bigram"]["nats_per_token"] > 0
    lines = printed.splitlines()
    assert max(map(len, lines[:-1])) <= 80
    assert f"≤{rows['normalised']['nats_per_token']:.3f}±" in printed
    assert "comparison.png" in lines[-1] and (out / "comparison.png").stat().st_size > 10_000
    assert "[1/6] sedd_absorbing, seed 0: train\n" in errors
    assert "[5/6] normalised, seed 0: likelihood, about " in errors
    assert "it/s" not in errors and "tok/s" not in errors  # their bars are in log.txt
    assert "tok/s" in (out / "normalised/seed_0/log.txt").read_text()


def test_the_files_have_the_rows_of_the_table(finished):
    out, *_ = finished
    rows = rows_of(out)
    with (out / "comparison.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["name"] for row in table] == list(rows)
    assert float(table[0]["nats_per_token"]) == rows["sedd_absorbing"]["nats_per_token"]
    assert (
        float(table[0]["samples.distinct.2"]) == rows["sedd_absorbing"]["samples"]["distinct"]["2"]
    )
    text = (out / "comparison.md").read_text()
    assert r"| sedd\_absorbing, normalised |" in text
    cells = [line.count("|") for line in text.splitlines() if line.startswith("| ")]
    assert len(set(cells[:7])) == 1
    text = (out / "comparison.tex").read_text()
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == 2
    assert r"sedd\_absorbing, normalised & " in text and r"$\le$" in text


def test_a_killed_comparison_goes_on_and_ends_with_the_same_table(finished, text, tmp_path):
    whole, *_ = finished
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    shutil.rmtree(out / "normalised")
    (out / "unweighted/seed_0/run").mkdir(parents=True)
    (out / "unweighted/seed_0/run/a_file_of_mine").touch()  # sedd-train refuses it
    before = {path: path.stat().st_mtime_ns for path in (out / "sedd_absorbing").rglob("*")}
    argv = command(out, text, "sedd_absorbing,normalised,unweighted")

    process = started(text, *argv)
    metrics = out / "normalised/seed_0/run/metrics.jsonl"
    for _ in range(1200):
        if metrics.exists() and metrics.read_text():
            break
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM and printed == ""
    assert errors.endswith("sedd-compare: stopped by a signal; run the same command to go on\n")
    assert "Traceback" not in errors and not (out / "in_use").exists()
    assert not (out / "normalised/seed_0/likelihood.json").exists()

    process = started(text, *argv)
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == compare.FAILED, errors
    assert "3 of 9 parts are there already" in errors or "4 of 9 parts" in errors
    assert "sedd_absorbing, seed 0: train" not in errors
    assert before == {p: p.stat().st_mtime_ns for p in (out / "sedd_absorbing").rglob("*")}
    rows, expected = rows_of(out), rows_of(whole)
    for name in expected:
        assert without_times(rows[name]) == without_times(expected[name])
    failure = "unweighted, seed 0: train failed with status 2: workdir "
    assert failure in errors and failure in " ".join(printed.split())
    assert rows["unweighted"]["runs_failed"] == 1 and "nats_per_token" not in rows["unweighted"]
    assert " failed" in next(line for line in printed.splitlines() if "unweighted" in line)


# --- results by hand


def runs_of(out, methods=("sedd_absorbing", "csm"), seeds=2):
    for seed in range(seeds):
        for method in methods:
            config = with_rival(quickstart.get_config(), method)
            config.seed = seed
            yield Run(method, config, [], out)


def likelihood(nats, error, **others):
    values = {"bound": nats, "bound_standard_error": error, "normalised": None, **others}
    return {
        "part_seconds": 10.0,
        "parameters": 1000,
        "split": "validation",
        "blocks": 2,
        "tokens": 256,
        "passes": 2,
        "data": {"source": {"corpus": "pydoc"}},
        "nats_per_token": values,
        "bits_per_character": values,
    }


@pytest.fixture
def by_hand(tmp_path):
    """Two seeds of two methods; the second one's second run diverged."""
    runs = list(runs_of(tmp_path))
    for run, nats in zip(runs, (2.0, 3.0, 2.5), strict=False):
        run.folder.mkdir(parents=True)
        run.write("train", {"part_seconds": 100.0})
        run.write("likelihood", likelihood(nats, 0.3))
        run.write("samples", {"part_seconds": 1.0, "num_samples": 3, **statistics(nats)})
    runs[3].folder.mkdir(parents=True)
    reason = "loss | gradient_norm was not finite & 100% <lost>"
    runs[3].write(FAILURE, {"part": "train", "status": 3, "reason": reason})
    return runs


def statistics(entropy):
    from sedd_jax.evaluation.statistics import sample_statistics

    tokens = np.arange(60).reshape(3, 20) % int(10 * entropy)
    return sample_statistics(tokens) | {"unigram_entropy": entropy}


def test_numbers_are_means_over_seeds_with_their_spread(by_hand):
    sedd, csm = comparison_table.method_rows(by_hand)
    assert sedd["nats_per_token"] == pytest.approx(2.25)
    # The same noise scores both, so two are no surer than one.
    assert sedd["nats_per_token_standard_error"] == pytest.approx(0.3)
    assert sedd["seeds_standard_deviation"] == pytest.approx(0.5 / np.sqrt(2))
    assert sedd["samples"]["unigram_entropy"] == pytest.approx(2.25)
    assert (csm["runs"], csm["runs_failed"]) == (2, 1)
    assert csm["nats_per_token"] == 3.0 and csm["seeds_standard_deviation"] is None
    # Two tables, each in two parts.
    assert comparison_table.terminal(by_hand).count("csm (1 of 2)") == 4


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child of its parent's end")
def test_a_command_ends_with_a_comparison_that_is_killed(tmp_path):
    command = ["train", "--config=quickstart", f"--workdir={tmp_path}/run"]
    code = f"""
import pathlib
from sedd_jax.evaluation.comparison import Commands
with Commands() as commands:
    commands.run({command}, pathlib.Path("{tmp_path}/log"))
"""
    parent = subprocess.Popen([sys.executable, "-c", code])
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
    wait_until(lambda: children.exists() and children.read_text())
    child = Path(f"/proc/{children.read_text().split()[0]}/cmdline")
    parent.kill()
    parent.wait()
    wait_until(lambda: not child.exists() or not child.read_bytes())  # gone, or not yet reaped


def wait_until(happened):
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_scorer_adds_its_table(by_hand):
    names = ("mean_of_exp", "token_mean")
    for run, value in zip(by_hand[:2], (30.0, 40.0), strict=True):
        perplexity = {name: value for name in names}
        perplexity |= {f"{name}_standard_error": 1.0 for name in names}
        run.write("perplexity", {"part_seconds": 1.0, "generative_perplexity": perplexity})
    lines = comparison_table.terminal(by_hand).split("\n\n")[2].splitlines()
    assert [line.split()[-1] for line in lines[2:]] == ["30.00±1.00", "40.00±1.00"]
    with_scorer = SCORING._replace(scorer="gpt2")
    assert with_scorer.parts == [*SCORING.parts, "perplexity"]
    command = comparison.command_of(by_hand[0], "perplexity", with_scorer, by_hand[0].out)
    assert command[:2] == ["eval", "generative_perplexity"] and "--scorer=gpt2" in command


def test_a_run_that_diverged_is_a_row_with_its_reason_and_is_not_tried_again(by_hand, monkeypatch):
    started = []
    monkeypatch.setattr(
        comparison.Commands, "run", lambda self, command, log: started.append(command) or (1, "")
    )
    comparison.compare(by_hand, SCORING, baselines=False)
    assert started == []
    lines = comparison_table.terminal(by_hand).split("\n\n")
    assert "gradient_norm was not finite & 100% <lost>" in " ".join(lines[-1].split())
    markdown = comparison_table._document(by_hand, *comparison_table.FORMATS[".md"])
    assert r"loss \| gradient\_norm was not finite & 100% \<lost\>" in markdown
    latex = comparison_table._document(by_hand, *comparison_table.FORMATS[".tex"])
    assert r"gradient\_norm was not finite \& 100\% \textless{}lost\textgreater{}" in latex


def test_a_part_that_failed_for_another_reason_is_tried_again(by_hand, monkeypatch):
    by_hand[3].write(FAILURE, {"part": "train", "status": 1, "reason": "the disk is full"})
    monkeypatch.setattr(comparison.Commands, "run", lambda self, command, log: (2, "no text"))
    comparison.compare(by_hand, SCORING, baselines=False)
    assert by_hand[3].read(FAILURE)["reason"] == "no text"


def test_time_left_is_what_parts_took_so_far(by_hand):
    assert comparison.time_left(by_hand, ["train"] * 3 + ["samples"]) == ", about 5 min left"
    assert comparison.time_left(by_hand, ["likelihood"]) == ", about 10 s left"
    assert comparison.time_left(by_hand, ["train", "perplexity"]) == ""


def test_markdown_and_latex_escape_every_cell():
    groups = [("", [["", "a|b_c", "50%"]]), ("# x", [["n", "≤1±2", "~^{}\\"]])]
    assert tables.markdown(groups) == [
        "|  | # x n |",
        "| --- | ---: |",
        r"| a\|b\_c | ≤1±2 |",
        r"| 50% | \~^{}\\ |",
    ]
    assert tables.latex(groups)[2:8] == [
        r"\multicolumn{1}{c}{} & \multicolumn{1}{c}{\# x} \\",
        r"\cmidrule(lr){2-2}",
        r" & n \\",
        r"\midrule",
        r"a|b\_c & $\le$1$\pm$2 \\",
        r"50\% & \textasciitilde{}\textasciicircum{}\{\}\textbackslash{} \\",
    ]


# --- the methods


def test_every_method_sets_the_same_keys_and_leaves_the_batches_alone():
    keys = {frozenset(values) for values in RIVALS.values()}
    assert len(keys) == 1
    assert {key.split(".")[0] for key in next(iter(keys))} == {
        "objective",
        "graph",
        "schedule",
        "model",
    }


@pytest.mark.parametrize("method", RIVALS)
@pytest.mark.parametrize("other", RIVALS)
def test_a_method_does_not_depend_on_the_config_it_changes(method, other):
    config = with_rival(with_rival(quickstart.get_config(), other), method)
    configuration.check(config)
    assert config == with_rival(quickstart.get_config(), method)


# --- what is refused


def refused(capsys, *argv):
    assert compare_command([str(argument) for argument in argv]) == 2
    printed, errors = capsys.readouterr()
    assert printed == "" and errors.count("\n") == 1, errors
    return errors


def test_other_settings_are_refused_with_what_differs(finished, text, capsys):
    out, *_ = finished
    argv = command(out, text, "sedd_absorbing")
    line = refused(capsys, *argv, "--passes=4", "--config.optimizer.b1=0.5")
    assert "config.optimizer.b1: 0.9 -> 0.5; passes: 2 -> 4" in line
    assert "give another --out, or the settings that it began with" in line


def test_methods_and_a_scorer_may_be_added(tmp_path):
    settings = {"config": {"seed": 0}, "rivals": {"ar": {"a.b": 1}}, "passes": 2, "scorer": None}
    (tmp_path / comparison.SETTINGS).write_text(json.dumps(settings))
    more = settings | {"rivals": {"csm": {"a.b": 2}}, "scorer": "gpt2"}
    merged = comparison.check_settings(tmp_path, more)
    assert merged["rivals"] == {"ar": {"a.b": 1}, "csm": {"a.b": 2}}
    (tmp_path / comparison.SETTINGS).write_text(json.dumps(merged))
    assert comparison.check_settings(tmp_path, settings)["scorer"] == "gpt2"
    with says("rivals.ar.a.b: 1 -> 3", "give another --out"):
        comparison.check_settings(tmp_path, settings | {"rivals": {"ar": {"a.b": 3}}})


def test_nothing_is_done_for_a_config_that_a_method_does_not_allow(capsys, tmp_path, text):
    argv = command(tmp_path / "out", text, "sedd_uniform", model__time_conditioning=False)
    line = refused(capsys, *argv)
    assert "config.model.time_conditioning is what the methods differ in" in line
    argv = command(tmp_path / "out", text, "sedd_uniform", sample__predictor="first_hitting")
    assert "does not fit the uniform graph" in refused(capsys, *argv)
    argv = command(tmp_path / "out", tmp_path / "none", "sedd_uniform")
    assert "none" in refused(capsys, *argv)
    assert not (tmp_path / "out").exists()


def test_the_comparison_itself_starts_no_accelerator():
    code = (
        "from sedd_jax.cli import compare\n"
        "from sedd_jax.evaluation import comparison_table\n"
        "o, k = compare._parsed('x', ['--config=quickstart', '--out=o', '--no_picture'])\n"
        "compare._runs('x', o, k)\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge.backends_are_initialized()"
    )
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
