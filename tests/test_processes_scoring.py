"""sedd-eval, sedd-sample and load on several processes: one result, and one end.

The processes are real, on this machine, with simulated CPU devices. Run as a program, this file is
what they run: `python test_processes_scoring.py measure RUN SCORER OUT --coordinator=...`.
"""

import json
import re
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest

long = pytest.mark.long


def measured(model, scorer, records):
    """Numbers of every kind, as JSON holds them."""
    from sedd_jax.data import Blocks
    from sedd_jax.evaluation.answers import Answer, evaluate_answers
    from sedd_jax.evaluation.frontier import _model_sha256
    from sedd_jax.evaluation.generations import generative_perplexity
    from sedd_jax.evaluation.information import information_measures
    from sedd_jax.evaluation.likelihood import evaluate_split

    answers = [Answer("if", "then", ""), Answer("", "a longer one", ""), Answer("or", "else", "")]
    split = evaluate_split(model, records, "validation", blocks=5, passes=2, batch_size=3)
    tokens = model.sample_tokens(4, steps=2, seed=1)
    perplexity = generative_perplexity(model, scorer, num_samples=4, batch_size=4, steps=2)
    del perplexity["seconds_a_sample"]
    return {
        "likelihood": {key: split[key] for key in ("nats_per_token", "curve", "passes")},
        "samples": tokens.tolist(),
        "perplexity": perplexity,
        "answers": evaluate_answers(model, answers, passes=2),
        "information": information_measures(model, Blocks(tokens), first=8, passes=2),
        "features": scorer.features(tokens % 64, batch_size=2).tolist(),
        "sha256": _model_sha256(model),
    }


def measure(argv):
    """Writes what this process measured, and what it is told of data that differ."""
    import jax

    from sedd_jax.cli.arguments import run_records
    from sedd_jax.cli.cluster import _mesh, load_scorer
    from sedd_jax.inference.pretrained import load
    from sedd_jax.parallel import processes, sharding

    run, scorer, out = argv
    model = load(run, mesh=_mesh())
    model.save_pretrained(f"{out}.model")  # by all, and written once
    result = measured(model, load_scorer(scorer), run_records(Path(run))[0])
    index = jax.process_index()
    alone = load(run)  # each process may have one of its own, and results of its own
    result["alone"] = [*processes.fetch(alone.put(np.arange(3) + index)).tolist()]
    refused = []
    for action in (
        lambda: sharding.put_whole(np.full(jax.device_count(), index), _mesh()),
        lambda: load("nowhere" if index == 1 else run, mesh=_mesh()),
        lambda: load(run, mesh=jax.make_mesh((1, 1, 1), sharding.AXES, devices=jax.devices()[-1:])),
    ):
        try:
            action()
        except ValueError as error:
            refused.append(str(error))
    result["refused"] = refused
    Path(f"{out}.{index}.json").write_text(json.dumps(result))
    print("measured")
    assert processes.gather_text(str(index)) == [str(i) for i in range(jax.process_count())]


def wait(argv):
    """Goes on until it is ended; the last process has an error when the file `argv[0]` is there."""
    import jax

    from sedd_jax.parallel import processes

    print("waiting", file=sys.stderr, flush=True)
    is_last = jax.process_index() == jax.process_count() - 1
    while True:
        processes.gather_text("")
        if is_last and Path(argv[0]).exists():
            raise ValueError("the disk is full")


if __name__ == "__main__":
    from sedd_jax.cli.arguments import make_parser
    from sedd_jax.cli.cluster import run_joined

    action = {"measure": measure, "wait": wait}[sys.argv[1]]
    sys.exit(run_joined("scoring", make_parser("scoring", ""), sys.argv[2:], action))


from test_processes import Processes  # pytest imports it, the program above does not

import sedd_jax
from sedd_jax.evaluation.frontier import _model_sha256


def assert_close(one, other, where=""):
    """Equal, and floats to the rounding of sums in another order."""
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_close(one[key], other[key], f"{where}/{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), where
        for number, pair in enumerate(zip(one, other)):
            assert_close(*pair, f"{where}/{number}")
    elif isinstance(one, float):
        assert one == pytest.approx(other, rel=2e-5, abs=2e-6), where
    else:
        assert one == other, where


@pytest.fixture(scope="module")
def of_one(tiny_run, scorer_folder):
    """`measured` in this process, on one device, as JSON holds it."""
    from sedd_jax import load
    from sedd_jax.cli.arguments import run_records
    from sedd_jax.evaluation.scorer import load_scorer

    scorer, records = load_scorer(str(scorer_folder)), run_records(tiny_run)[0]
    return json.loads(json.dumps(measured(load(tiny_run), scorer, records)))


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=long)])
def test_all_processes_have_the_numbers_of_one(tmp_path, tiny_run, scorer_folder, of_one, count):
    out = tmp_path / "out"
    command = [__file__, "measure", tiny_run, scorer_folder, out]
    with Processes(out, command, count=count, devices=1) as group:
        statuses = group.finish()
        said = [group.said(index) for index in range(count)]
    assert statuses == [0] * count, said
    for index in range(count):  # nor do libraries write to standard output
        assert group.out(index).read_text() == ("measured\n" if index == 0 else "")
        result = json.loads(out.with_name(f"out.{index}.json").read_text())
        assert result.pop("alone") == [index, index + 1, index + 2]
        batch, nowhere, *mesh = result.pop("refused")
        assert "processes 0 and 1 disagree on the batch" in batch
        assert nowhere.startswith("no folder" if index == 1 else "process 1: no folder")
        assert "no folder at 'nowhere'" in nowhere and "\n" not in nowhere
        assert len(mesh) == (index < count - 1)
        for words in mesh:
            assert words.startswith(f"the mesh has devices of the processes {count - 1} of {count}")
        assert_close(result, of_one)
    assert _model_sha256(sedd_jax.load(f"{out}.model")) == of_one["sha256"]


@long
def test_samples_come_from_process_0_alone_and_are_those_of_one(tmp_path, tiny_run, capfd):
    from sedd_jax.cli import sample_command

    flags = [f"--workdir={tiny_run}", "--num_samples=3", "--steps=2", "--format=jsonl"]
    assert sample_command(flags) == 0
    expected = capfd.readouterr().out
    command = ["-m", "sedd_jax", "sample", *flags]
    with Processes(tmp_path / "out", command, devices=2) as group:
        assert group.finish() == [0, 0], [group.said(0), group.said(1)]
        assert group.out(0).read_text() == expected
        assert group.out(1).read_text() == group.said(1) == ""


def test_what_one_host_lacks_is_one_line_on_all(tmp_path, tiny_run):
    """A folder that is there for process 0 alone, of the same name."""
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    (tmp_path / "here/run").symlink_to(tiny_run)
    command = ["-m", "sedd_jax", "eval", "likelihood", "--workdir=run"]
    cwd = [tmp_path / "here", tmp_path / "there"].__getitem__
    with Processes(tmp_path / "out", command, devices=1, cwd=cwd) as group:
        assert group.finish(seconds=60) == [2, 2]
        said = [group.said(0), group.said(1)]
    assert said[0].startswith("sedd-eval: error: process 1: no folder at 'run'")
    assert said[1].startswith("sedd-eval: error: no folder at 'run'")
    assert "\n" not in said[0] + said[1]


GONE = "is gone without a word: it was killed, perhaps for memory, or its machine has stopped"
ENDS = {
    # what happens: (to which process, exit statuses, what each writes)
    "killed": (1, [1, -9], [f"process 1 {GONE}", ""]),
    "process 0 killed": (0, [-9, 1], ["", f"process 0 {GONE}"]),
    "TERM": (0, [143, 143], ["stopped by SIGTERM", "process 0: stopped by SIGTERM"]),
    "INT": (1, [130, 130], ["process 1: stopped by SIGINT", "stopped by SIGINT"]),
    "error": (None, [2, 2], ["process 1: the disk is full", "the disk is full"]),
}
SIGNALS = {"killed": signal.SIGKILL, "process 0 killed": signal.SIGKILL} | {
    name: getattr(signal, f"SIG{name}") for name in ("TERM", "INT")
}


@pytest.mark.parametrize(
    "what", [pytest.param(name, marks=long if name == "INT" else ()) for name in ENDS]
)
def test_the_end_of_one_process_ends_all_with_a_line(tmp_path, what):
    victim, statuses, lines = ENDS[what]
    command = [__file__, "wait", tmp_path / "error"]
    with Processes(tmp_path / "out", command, devices=1) as group:
        group.wait_until(lambda: all("waiting" in group.said(i) for i in range(2)))
        began = time.monotonic()
        if victim is None:
            (tmp_path / "error").touch()
        else:
            group.members[victim].send_signal(SIGNALS[what])
        ended = group.finish(seconds=20)
        assert time.monotonic() - began < 8  # not the heartbeat of 10 s
        if victim == 0 and "distributed service detected fatal" in group.said(1):
            # jax has heard of it too, says so in lines of its own, and may be the first.
            assert ended[0] == -signal.SIGKILL and ended[1] in (1, -signal.SIGABRT)
            return
        assert ended == statuses, [group.said(0), group.said(1)]
        for index, line in enumerate(lines):
            said = group.said(index).partition("waiting\n")[2]
            assert (f"scoring: error: {line}" in said) if line else not said, said
            assert len(said.splitlines()) == bool(line), said


@long
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_evaluation_ends_the_other(tmp_path, tiny_run, victim):
    command = ["-m", "sedd_jax", "eval", "likelihood", f"--workdir={tiny_run}", "--passes=512"]
    with Processes(tmp_path / "out", [*command, "--batch_size=2"], devices=1) as group:
        group.wait_until(lambda: re.search(r"bound:? \d", group.said(0)))
        time.sleep(3)
        group.members[victim].kill()
        statuses = group.finish(seconds=20)
        assert statuses[victim] == -9 and statuses[1 - victim] in (1, -6), group.said(1 - victim)
        assert f"sedd-eval: error: process {victim} {GONE}" in group.said(1 - victim)


def without_seconds(result):
    rows = result if isinstance(result, list) else [result]
    return [{k: v for k, v in row.items() if k != "seconds_a_sample"} for row in rows]


@long
@pytest.mark.parametrize("kind", ["frontier", "mauve"])
def test_evaluations_of_samples_write_the_numbers_of_one(tmp_path, long_run, scorer_folder, kind):
    from sedd_jax.cli import eval_command

    flags = [f"--workdir={long_run}", f"--scorer={scorer_folder}", "--batch_size=4"]
    flags += {
        "frontier": ["--steps=1,2", "--num_samples=4"],
        "mauve": ["--steps=1", "--references=20", "--repeats=2", "--buckets=2"],
    }[kind]
    assert eval_command([kind, *flags, f"--json={tmp_path}/one.json"]) == 0
    command = ["-m", "sedd_jax", "eval", kind, *flags, f"--json={tmp_path}/two.json"]
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    with Processes(tmp_path / "out", command, devices=1) as group:
        assert group.finish() == [0, 0], [group.said(0), group.said(1)]
    results = [without_seconds(json.loads(file.read_text())) for file in (one, two)]
    assert_close(*results)
    if kind == "frontier":  # its second half is not made again
        two.write_text(json.dumps(json.loads(two.read_text())[:1]))
        with Processes(tmp_path / "again", command, devices=1) as group:
            assert group.finish() == [0, 0], [group.said(0), group.said(1)]
            assert "1 of 2 rows are there already" in group.said(0)
        assert_close(without_seconds(json.loads(two.read_text())), results[0])


@long
def test_processes_with_other_arguments_are_refused(tmp_path, tiny_run):
    command = ["-m", "sedd_jax", "sample", f"--workdir={tiny_run}"]
    with Processes(
        tmp_path / "out", command, devices=1, each=lambda index: [f"--seed={index}"]
    ) as group:
        assert group.finish(seconds=60) == [2, 2]
        for index in range(2):
            words = "disagree on the command: argument 2 '--seed=0' and '--seed=1'"
            assert words in group.said(index)


def test_the_flags_of_a_cluster_are_its_fields_with_their_defaults():
    from sedd_jax.cli.cluster import CLUSTER, cluster_of
    from sedd_jax.parallel.cluster import Cluster

    assert [*CLUSTER] == [*Cluster._fields]
    assert cluster_of(dict.fromkeys(CLUSTER)) == Cluster()
    for name in ("join_timeout", "heartbeat"):
        assert f"(default: {Cluster._field_defaults[name]})" in CLUSTER[name][1]
