"""Training as a process: killed, stopped and resumed, its files, its refusals."""

import errno
import fcntl
import json
import os
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import QUICK, command_line, says, start
from tensorboardX.proto.event_pb2 import Event, SessionLog

from sedd_jax import config as configuration
from sedd_jax import experiment, state
from sedd_jax.cli import eval_command, sample_command, train_command
from sedd_jax.inference.bounds import CorpusBound
from sedd_jax.runs.checkpoint import Checkpoints
from sedd_jax.runs.workdir import check_workdir, read_metrics
from sedd_jax.training import trackers
from sedd_jax.training.progress import Progress, Signals, TrainingStopped
from sedd_jax.training.train import train


def restored(workdir):
    """The newest train state, every leaf as numpy, by Orbax's own reading."""
    import orbax.checkpoint as ocp

    folder = workdir / "checkpoints"
    step = max(int(path.name) for path in folder.iterdir() if path.name.isdigit())
    items, here = ocp.StandardCheckpointer(), jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def read(place):
        shape = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here),
            dict(items.metadata(place).item_metadata),
        )
        return items.restore(place, shape)

    return step, [read((folder / str(step) / item).absolute()) for item in ("train", "ema")]


def assert_bit_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), (_, y) in zip(
        jax.tree_util.tree_leaves_with_path(a), jax.tree_util.tree_leaves_with_path(b)
    ):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), path


def finish(process):
    _, errors = process.communicate(timeout=300)
    return process.returncode, errors


def wait_until(happened, process):
    deadline = time.monotonic() + 300  # compiling alone took 110 s on cores that ten others used
    while not happened():
        assert process.poll() is None, finish(process)
        if time.monotonic() > deadline:
            process.kill()
            raise AssertionError(f"it never happened: {finish(process)[1]}")
        time.sleep(0.02)


def logged_steps(workdir):
    file = workdir / "metrics.jsonl"
    return (
        [json.loads(row)["step"] for row in file.read_text().splitlines()] if file.exists() else []
    )


def checkpoint_steps(workdir):
    folder = workdir / "checkpoints"
    return [int(path.name) for path in folder.glob("*") if path.name.isdigit()]


def test_a_run_killed_in_the_middle_and_restarted_ends_bit_equal_to_one_that_was_not(tmp_path):
    changes = {"train__log_every": 1, "checkpoint__every": 10}
    killed = start("train", *command_line(tmp_path / "killed", train__steps=100_000, **changes))
    wait_until(lambda: checkpoint_steps(tmp_path / "killed"), killed)
    killed.send_signal(signal.SIGKILL)
    assert finish(killed)[0] == -signal.SIGKILL
    survived = max(checkpoint_steps(tmp_path / "killed"))
    changes["train__steps"] = survived + 20
    code, errors = finish(start("train", *command_line(tmp_path / "killed", **changes)))
    assert code == 0, errors
    assert f"resuming at step {survived}" in errors
    code, errors = finish(start("train", *command_line(tmp_path / "whole", **changes)))
    assert code == 0, errors

    step, ours = restored(tmp_path / "killed")
    step_whole, theirs = restored(tmp_path / "whole")
    assert step == step_whole == survived + 20
    assert_bit_equal(ours, theirs)


def test_a_run_belongs_to_one_process_until_it_is_gone(tmp_path, capsys):
    workdir = tmp_path / "run"
    changes = {"train__steps": 100_000, "train__log_every": 1, "checkpoint__every": 10}
    first = start("train", *command_line(workdir, **changes))
    wait_until(lambda: checkpoint_steps(workdir), first)
    for _ in range(2):  # the refusal leaves the claim as it is
        assert train_command(command_line(workdir, **changes)) == 2
        errors = capsys.readouterr().err
        assert errors.count("\n") == 1
        assert f"sedd-train: error: process {first.pid} on " in errors
        assert f" trains in {str(workdir)!r} already; wait until it ends, end it" in errors
    assert first.poll() is None and json.loads((workdir / "in_use").read_text())["pid"] == first.pid
    # Readers are welcome.
    assert sample_command([f"--workdir={workdir}", "--steps=2"]) == 0
    likelihood = ["likelihood", f"--workdir={workdir}", "--blocks=1", "--passes=2"]
    assert eval_command(likelihood) == 0

    first.send_signal(signal.SIGKILL)
    assert finish(first)[0] == -signal.SIGKILL
    assert (workdir / "in_use").exists()
    began = time.monotonic()
    changes["train__steps"] = max(checkpoint_steps(workdir)) + 1
    assert train_command(command_line(workdir, **changes)) == 0
    assert time.monotonic() - began < 60 and not (workdir / "in_use").exists()
    assert not list(workdir.glob("in_use*"))


def test_the_second_of_two_that_start_at_once_is_refused(tmp_path):
    changes = {"train__steps": 30}
    both = [start("train", *command_line(tmp_path / "run", **changes)) for _ in range(2)]
    (code, _), (other, errors) = sorted((finish(one) for one in both), key=lambda end: end[0])
    assert (code, other) == (0, 2), errors
    assert errors.splitlines()[-1].startswith("sedd-train: error: process ")
    assert max(checkpoint_steps(tmp_path / "run")) == 30


def test_training_needs_no_lock_of_the_file_system(tmp_path, tiny_config, monkeypatch, tiny_run):
    def no_lock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    for name in ("flock", "lockf"):
        monkeypatch.setattr(fcntl, name, no_lock)
    shutil.copytree(tiny_run / "records", tmp_path / "run/records")
    assert train(tiny_config, tmp_path / "run") == 8


def test_a_start_that_is_refused_leaves_no_folder(tmp_path, tiny_config):
    tiny_config.data.corpus, tiny_config.data.path = "text", str(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="nowhere"):
        train(tiny_config, tmp_path / "a/b/run")
    assert list(tmp_path.iterdir()) == []


def test_a_workdir_that_cannot_be_written_is_said(tmp_path, tiny_config, monkeypatch):
    def read_only(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("sedd_jax.host.files.os.open", read_only)
    with pytest.raises(ValueError, match="cannot write in workdir .*Read-only.*another workdir"):
        train(tiny_config, tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "number",
    # A terminal that is closed, below, sends SIGHUP too.
    [signal.SIGINT, signal.SIGTERM, pytest.param(signal.SIGHUP, marks=pytest.mark.long)],
)
def test_a_signal_ends_training_with_a_checkpoint_and_exit_code_zero(tmp_path, number):
    workdir = tmp_path / "run"
    changes = {"train__steps": 100_000, "train__log_every": 1, "checkpoint__every": 100_000}
    process = start("train", *command_line(workdir, **changes))
    wait_until(lambda: max(logged_steps(workdir), default=0) >= 3, process)
    process.send_signal(number)
    code, errors = finish(process)
    assert code == 0, errors
    step, (train_state, _) = restored(workdir)
    assert 3 <= step < 100_000
    assert int(train_state["step"]) == step
    assert f"stopped by a signal at step {step}" in errors


def test_a_terminal_that_is_closed_ends_training_with_a_checkpoint(tmp_path):
    workdir = tmp_path / "run"
    changes = {"train__steps": 100_000, "train__log_every": 1, "checkpoint__every": 100_000}
    arguments = [sys.executable, "-m", "sedd_jax", "train", *command_line(workdir, **changes)]
    process, terminal = pty.fork()  # the process leads the session of a terminal of its own
    if process == 0:
        os.execve(sys.executable, arguments, {**os.environ, "XLA_FLAGS": QUICK})
    try:
        end = time.monotonic() + 120
        while max(logged_steps(workdir), default=0) < 3 and time.monotonic() < end:
            if select.select([terminal], [], [], 0.1)[0]:
                os.read(terminal, 1 << 16)
    finally:
        os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
    assert 3 <= restored(workdir)[0] < 100_000


def test_a_finished_run_leaves_its_config_metrics_events_and_checkpoints(tiny_run, tiny_config):
    saved = configuration.from_json((tiny_run / "config.json").read_text())
    assert configuration.differences(saved, tiny_config) == []
    rows = [json.loads(row) for row in (tiny_run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "train"] == [2, 4, 6, 8]
    assert [row["step"] for row in rows if row["kind"] == "heldout"] == [4, 8]
    assert all(np.isfinite(row["nats_per_token"]) for row in rows if row["kind"] == "train")
    assert all(row["bound_standard_error"] > 0 for row in rows if row["kind"] == "heldout")
    warm_up, rate = tiny_config.optimizer.warmup_steps, tiny_config.optimizer.learning_rate
    for row in rows:
        if row["kind"] == "train":
            expected = rate * min(row["step"] / max(warm_up, 1), 1.0)
            assert row["learning_rate"] == pytest.approx(expected)
    assert list((tiny_run / "tensorboard").glob("events.out.tfevents.*"))
    with Checkpoints(tiny_run / "checkpoints") as checkpoints:
        assert checkpoints.newest() == 8


def test_metrics_tell_where_the_time_went_and_how_far_the_scores_are_from_their_total(tiny_run):
    rows = [json.loads(row) for row in (tiny_run / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if row["kind"] == "train"][-1]
    phases = ("compile", "input", "checkpoint", "evaluate")
    spent = {name: last[f"{name}_seconds"] for name in phases}
    assert all(seconds > 0 for seconds in spent.values())
    assert 0 < last["goodput"] < 1
    assert last["goodput"] * last["seconds"] + sum(spent.values()) == pytest.approx(
        last["seconds"], rel=0.05, abs=0.1
    )
    assert np.isfinite(last["log_z"])
    assert "mfu" not in last  # a CPU has no peak that is known


def test_samples_and_a_profile_are_kept_where_they_are_asked_for(tmp_path, tiny_config):
    tiny_config.train.steps = 4
    tiny_config.sample.every, tiny_config.sample.steps, tiny_config.sample.count = 2, 3, 8
    tiny_config.profile.start, tiny_config.profile.steps = 1, 2
    assert train(tiny_config, tmp_path / "run") == 4
    assert sorted(path.name for path in (tmp_path / "run/samples").iterdir()) == ["2.txt", "4.txt"]
    text = (tmp_path / "run/samples/4.txt").read_text()
    assert text.count("--- ") >= 8 and "░" not in text
    assert list((tmp_path / "run/profile").rglob("*.xplane.pb"))


def test_a_config_from_before_a_key_was_there_still_resumes(tiny_run, tiny_config):
    values = json.loads((tiny_run / "config.json").read_text())
    del values["profile"], values["train"]["stuck_seconds"], values["sample"]["every"]
    older = configuration.from_json(json.dumps(values))
    configuration.check(older)
    assert configuration.differences(older, tiny_config) == []
    del values["model"]["hidden_size"]  # what says which model it is has no default
    with pytest.raises(ValueError, match="hidden_size is missing"):
        configuration.check(configuration.from_json(json.dumps(values)))


def test_a_finished_run_started_again_does_nothing(tiny_run, tiny_config):
    before = restored(tiny_run)
    assert train(tiny_config, tiny_run) == 8
    after = restored(tiny_run)
    assert before[0] == after[0]
    assert_bit_equal(before[1], after[1])


def test_a_workdir_of_another_config_is_refused_and_left_alone(tiny_run, tiny_config):
    before = (tiny_run / "config.json").read_bytes()
    tiny_config.optimizer.learning_rate = 1.0
    with pytest.raises(
        ValueError, match=r"another config \(optimizer.learning_rate: 0.00\d* -> 1.0"
    ):
        train(tiny_config, tiny_run)
    assert (tiny_run / "config.json").read_bytes() == before


def test_a_folder_that_holds_something_else_is_refused_and_left_alone(tmp_path, tiny_config):
    (tmp_path / "thesis.tex").write_text("chapter 1")
    with pytest.raises(ValueError, match="is not empty and holds no run"):
        check_workdir(tiny_config, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_bad_corpus_is_refused_before_any_compilation(tmp_path, tiny_config):
    tiny_config.data.corpus = "text"
    tiny_config.data.path = str(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no file or folder at"):
        train(tiny_config, tmp_path / "run")
    (tmp_path / "short").mkdir()
    (tmp_path / "short/a.txt").write_text("few words\n" * 3)
    tiny_config.data.path = str(tmp_path / "short")
    with pytest.raises(ValueError, match="fewer than one block of length 32"):
        train(tiny_config, tmp_path / "run")
    # The mistakes have claimed nothing: the same workdir takes a corpus that fits.
    tiny_config.data.corpus, tiny_config.data.path = "pydoc", ""
    tiny_config.train.steps = 1
    assert train(tiny_config, tmp_path / "run") == 1


@pytest.mark.devices(8)
def test_a_batch_that_the_mesh_cannot_split_is_refused(tmp_path, tiny_config):
    tiny_config.train.batch_size = 12
    with pytest.raises(ValueError, match="gives 12 rows, not divisible by the 8 devices"):
        train(tiny_config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_hidden_size_that_the_mesh_cannot_split_is_refused_before_the_corpus_is_packed(
    tmp_path, tiny_config
):
    tiny_config.mesh.data, tiny_config.mesh.fsdp = 1, 8
    tiny_config.model.hidden_size, tiny_config.model.heads = 20, 2
    with says("config.model.hidden_size 20 is not divisible by the mesh's fsdp=8", "change one"):
        train(tiny_config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_training_on_nothing_but_nan_stops_with_the_reason_and_keeps_the_parameters(
    tmp_path, tiny_config, monkeypatch
):
    make = experiment.make_loss_fn

    def poisoned(*parts):
        loss_fn = make(*parts)
        return lambda *given: jax.tree.map(lambda x: x * np.nan, loss_fn(*given))

    monkeypatch.setattr(experiment, "make_loss_fn", poisoned)
    tiny_config.train.max_skipped = 3
    tiny_config.train.log_every = 4  # three in a row within a window are seen at its end
    with pytest.raises(TrainingStopped, match="not finite in 4 steps in a row by step 4"):
        train(tiny_config, tmp_path / "run")
    (row,) = map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    assert (row["nats_per_token"], row["skipped"]) == (None, 4)


def test_a_reader_leaves_a_save_in_progress_alone(tmp_path):
    folder = tmp_path / "checkpoints"
    big = {"w": jnp.ones((2000, 2000))}
    with Checkpoints(folder) as writer:
        saved = state.init(big, optax.adam(1.0))
        writer.save(1, saved)
        writer.wait()
        writer.save(2, saved)  # still being written
        with Checkpoints(folder, read_only=True) as reader:
            assert reader.newest() in (1, 2)
        writer.wait()
        assert writer.newest() == 2


def test_data_that_changed_under_a_run_is_refused(tmp_path, tiny_config):
    corpus = tmp_path / "text"
    corpus.mkdir()
    (corpus / "a.txt").write_text("one two three four five\n" * 200)
    tiny_config.data.corpus, tiny_config.data.path = "text", str(corpus)
    tiny_config.data.records = str(tmp_path / "packed")
    tiny_config.train.steps = 1
    assert train(tiny_config, tmp_path / "run") == 1
    shutil.rmtree(tmp_path / "packed")
    (corpus / "a.txt").write_text("one two three four fivE\n" * 200)
    tokenizer = (tmp_path / "run/tokenizer.json").read_bytes()
    tiny_config.train.steps = 2
    with pytest.raises(ValueError, match="are not those that .*data.json' describes"):
        train(tiny_config, tmp_path / "run")
    assert (tmp_path / "run/tokenizer.json").read_bytes() == tokenizer
    # Nor does another run take packed text for that of the corpus it names.
    tiny_config.data.path = str(tmp_path)
    with pytest.raises(ValueError, match="are not of the text that is at"):
        train(tiny_config, tmp_path / "other")


BLOCKED = """
import hashlib
from sedd_jax.training.progress import Signals
with Signals():
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # minutes, in which Python calls no handler
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_are_heard_while_the_main_thread_waits_for_something_else(number):
    with subprocess.Popen(
        [sys.executable, "-c", BLOCKED], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "ready\n"
        time.sleep(1)  # until it waits
        process.send_signal(number)
        assert process.stderr.readline() == "stopping after this step; again: end now\n"
        process.send_signal(number)
        code, errors = finish(process)
    assert code == 128 + number and errors == "ended; the newest checkpoint is as it was\n"


def test_a_signal_that_was_ignored_at_the_start_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Signals() as stop:
            signal.raise_signal(signal.SIGINT)
            assert not stop.received and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            signal.raise_signal(signal.SIGTERM)
            assert stop.received
    finally:
        signal.signal(signal.SIGINT, before)


def test_two_signals_before_a_handler_is_called_are_two():
    with pytest.raises(KeyboardInterrupt), Signals() as stop:
        stop._count = 2  # as the listening thread counts while the main thread waits
        signal.raise_signal(signal.SIGINT)


def make_progress(workdir, step, **more):
    options = more | {
        "tokens_per_sequence": 1.0,
        "tokens_per_step": 1.0,
        "peak_share_per_step": None,
    }
    return Progress(workdir, step, steps=9, max_skipped=9, **options)


def test_a_log_file_has_lines_a_quarter_of_a_minute_apart_and_the_last(tmp_path, capsys):
    metrics = {"loss": jnp.float32(2.0), "grad_norm": jnp.float32(1.0)}
    metrics |= {"skipped": jnp.int32(0), "skipped_in_a_row": jnp.int32(0)}
    with make_progress(tmp_path, 0) as progress:
        for step in range(1, 10):
            progress.collect(metrics)
            progress.train(step, 0.1)
    first, last = capsys.readouterr().err.splitlines()
    line = r"\d\d:\d\d:\d\d step {} of 9, \d\d:\d\d left: 2.000 nats/token [\d.]+k? tok/s"
    assert re.fullmatch(line.format(1), first) and re.fullmatch(line.format(9), last)


def test_at_most_one_step_is_in_flight_and_the_bar_counts_those_that_are_done(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)

    class Loss:
        is_done = False

        def block_until_ready(self):
            self.is_done = True

    losses = [Loss() for _ in range(5)]
    with make_progress(tmp_path, 0) as progress:
        for n, loss in enumerate(losses):
            progress.collect({"loss": loss})
            assert [one.is_done for one in losses] == [m < n for m in range(5)]
            assert progress._bar.n == n
        progress.settle()
        assert losses[-1].is_done and progress._bar.n == 5


def events(workdir):
    """The events of a run in the order in which a viewer reads them: of files by name."""
    for file in sorted((workdir / "tensorboard").glob("events.*")):
        data = file.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])  # and its checksum, 4 bytes
            yield Event.FromString(data[12 : 12 + size])
            data = data[16 + size :]


def test_a_resumed_run_draws_no_step_twice_and_its_seconds_go_on(tmp_path):
    def log(progress, *steps):
        for step in steps:
            metrics = dict.fromkeys(("loss", "grad_norm", "skipped", "skipped_in_a_row"), 0)
            progress.collect({name: jnp.asarray(value) for name, value in metrics.items()})
            progress.train(step, 0.1)

    with make_progress(tmp_path, 0) as progress:
        progress.clock.began -= 1000.0
        log(progress, 2, 4, 6)
    time.sleep(1.1)  # the name of an event file has its second
    with make_progress(tmp_path, 4) as progress:  # of step 6 there was no checkpoint
        log(progress, 6, 8)
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == [2, 4, 6, 8]
    seconds = [row["seconds"] for row in rows]
    assert seconds == sorted(seconds) and 1000 < seconds[0] and seconds[-1] < 1100
    drawn = set()
    for event in events(tmp_path):
        if event.session_log.status == SessionLog.START:  # a viewer drops what is from here on
            drawn = {step for step in drawn if step < event.step}
        if any(value.tag == "train/nats_per_token" for value in event.summary.value):
            assert event.step not in drawn
            drawn.add(event.step)
    assert drawn == {2, 4, 6, 8}


def test_a_viewer_shows_samples_as_they_are(tmp_path):
    with make_progress(tmp_path, 0) as progress:
        progress.samples(1, ["* one\n\n# two\r```", "<b>three"])
    (text,) = (
        value.tensor.string_val[0].decode()
        for event in events(tmp_path)
        for value in event.summary.value
        if value.tag.startswith("samples")
    )
    assert all(line.startswith("    ") for line in text.splitlines())  # Markdown's form of code
    assert textwrap.dedent(text).splitlines()[1:4] == ["* one", "", "# two"]


def log_once(progress, step):
    metrics = dict.fromkeys(("loss", "grad_norm", "skipped", "skipped_in_a_row"), 0)
    progress.collect({name: jnp.asarray(value) for name, value in metrics.items()})
    progress.train(step, 0.25)


def test_a_tracker_of_a_users_own_gets_what_the_runs_folder_gets(tmp_path, monkeypatch):
    got = []

    class Mine:
        def __init__(self, workdir, step, config):
            got.append((workdir, step, config))

        def scalars(self, step, kind, values):
            got.append({"kind": kind, "step": step} | values)

        def text(self, step, name, text):
            got.append((step, name, text))

        def close(self):
            got.append("closed")

    monkeypatch.setitem(trackers.TRACKERS, "mine", Mine)
    with make_progress(tmp_path, 3, trackers=" mine", config={"seed": 1}) as progress:
        log_once(progress, 4)
        progress.samples(5, ["a", "<b>"])
    (row,) = read_metrics(tmp_path)
    text = "--- 1 ---\na\n\n--- 2 ---\n<b>"
    assert got == [(tmp_path, 3, {"seed": 1}), row, (5, "samples", text), "closed"]
    assert row["learning_rate"] == 0.25
    assert (tmp_path / "samples/5.txt").read_text() == text + "\n"
    assert not (tmp_path / "tensorboard").exists()


def test_tensorboard_imports_no_torch_and_leaves_it_to_be_imported(tmp_path):
    pytest.importorskip("torch", reason="the [torch] extra")
    lines = (
        "import sys; from pathlib import Path; from sedd_jax.training.trackers import TensorBoard",
        f"events = TensorBoard(Path({str(tmp_path)!r}), 0, {{}})",
        "events.scalars(1, 'train', {'loss': 2.0}); events.close()",
        "assert 'torch' not in sys.modules",
        "import torch; torch.zeros(1)",
    )
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True)
    assert list(tmp_path.glob("tensorboard/events.*"))


def test_trackers_that_cannot_be_opened_are_refused_before_any_work(
    tmp_path, tiny_config, monkeypatch
):
    tiny_config.train.trackers = "tensorboard,mlflow"
    with says("config.train.trackers names 'mlflow'; known: tensorboard, wandb"):
        train(tiny_config, tmp_path / "run")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    tiny_config.train.trackers = "wandb"
    with says("names wandb, which is not installed", "[wandb]"):
        train(tiny_config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_resumed_training_goes_on_with_its_run_of_wandb(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="Weights & Biases needs the [wandb] extra")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    started, init = [], wandb.init
    monkeypatch.setattr(
        wandb, "init", lambda **options: started.append(init(**options)) or started[-1]
    )
    for step in (0, 4):  # step 6 is logged twice: the run was killed before its checkpoint
        with make_progress(tmp_path, step, trackers="wandb", config={"seed": 1}) as progress:
            log_once(progress, 6)
            progress.samples(6, ["<b> & ░"])
            progress.heldout(6, CorpusBound(2.0, 0.1, 1.8, 0.1, 0.1, None, None, None, 2))
            summary = dict(started[-1].summary)
        assert summary["train/learning_rate"] == 0.25 and summary["heldout/bound"] == 2.0
        assert summary["step"] == 6 and started[-1].config["seed"] == 1
    assert started[0].id == started[1].id == (tmp_path / "wandb_run").read_text()
    pages = [file.read_text() for file in (tmp_path / "wandb").rglob("*.html")]
    assert len(pages) == 2 and all("<pre>--- 1 ---\n&lt;b&gt; &amp; ░</pre>" in p for p in pages)
    monkeypatch.setattr(
        wandb, "init", lambda **options: raising(wandb.errors.UsageError("No\nkey."))
    )
    with says("W&B begins no run: No key; run `wandb login`, set WANDB_MODE=offline"):
        make_progress(tmp_path, 4, trackers="wandb")


def raising(error):
    raise error


def test_either_signal_after_the_first_acts_as_usual():
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    with Signals() as stop:
        signal.raise_signal(signal.SIGTERM)
        assert stop.received
        assert {n: signal.getsignal(n) for n in before} == before
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert {n: signal.getsignal(n) for n in before} == before


def test_metrics_of_steps_that_a_kill_undid_are_dropped_and_a_torn_line_too(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 2}\n{"step": 4}\n{"step": 6}\n{"st')
    assert read_metrics(tmp_path, 4) == [{"step": 2}, {"step": 4}]


def test_an_interrupted_start_leaves_a_workdir_that_can_be_started(tmp_path, tiny_config):
    for name in (
        "data.json",
        "tokenizer.json",
        "config.json.part",
        "in_use",
        "in_use.7.dead",
    ):
        (tmp_path / name).write_text("{}")
    (tmp_path / ".records.parts").mkdir()
    check_workdir(tiny_config, tmp_path)
    (tmp_path / "patient_records.csv").write_text("")
    with pytest.raises(ValueError, match="holds no run"):
        check_workdir(tiny_config, tmp_path)


def test_a_checkpoint_of_another_model_is_refused_by_name(tiny_run, tiny_config):
    tiny_config.model.hidden_size = 32
    shape = experiment.make_experiment(tiny_config, 103, mesh=None).shape
    with (
        Checkpoints(tiny_run / "checkpoints") as checkpoints,
        pytest.raises(ValueError, match=r"holds .* as float32\[.*the model needs float32\["),
    ):
        checkpoints.restore(8, shape)
