"""Methods that are trained, scored and sampled alike: a run for each method and seed.

A run has parts. Each is a command of this package in a process of its own, one at a time, and
leaves a JSON file when it is done: a comparison that was stopped goes on where it was, and its
table is made from files alone. This process leaves accelerators to the commands.

OUT/settings.json      what all runs share
OUT/records/           the packed corpus, unless config.data.records names another folder
OUT/METHOD/seed_N/     run/ of sedd-train; PART.json for each finished part, or failure.json;
                       samples.jsonl; log.txt, what the commands printed
"""

import contextlib
import ctypes
import json
import logging
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from ml_collections import ConfigDict

from sedd_jax import config as configuration
from sedd_jax.evaluation.statistics import sample_statistics
from sedd_jax.host.files import load_json, shown, write_json
from sedd_jax.runs import workdir as runs

log = logging.getLogger(__name__)

SETTINGS, FAILURE, LOG, TEXTS = "settings.json", "failure", "log.txt", "samples.jsonl"
STOPPED, DIVERGED = 75, 3  # sedd-train's status after a signal, and when it cannot go on

Result = dict[str, Any]


class Scoring(NamedTuple):
    """How every run is scored and sampled."""

    passes: int
    blocks: int | None  # None: all of the held-out split
    num_samples: int
    scorer: str | None  # of generative perplexity; None: not measured

    @property
    def parts(self) -> list[str]:
        """The parts of a run, in order."""
        return ["train", "likelihood", "samples", *(["perplexity"] if self.scorer else [])]


class Run(NamedTuple):
    """One method, trained from one seed."""

    method: str
    config: ConfigDict
    arguments: Sequence[str]  # of sedd-train, but for --workdir
    out: Path  # of the comparison

    @property
    def label(self) -> str:
        return f"{self.method}, seed {self.config.seed}"

    @property
    def folder(self) -> Path:
        return self.out / self.method / f"seed_{self.config.seed}"

    @property
    def workdir(self) -> Path:
        return self.folder / "run"

    def file(self, part: str) -> Path:
        return self.folder / f"{part}.json"

    def read(self, part: str) -> Result | None:
        """The result of a part, None unless it is finished; or FAILURE's, if the run failed."""
        file = self.file(part)
        return load_json(file.read_bytes(), repr(str(file))) if file.is_file() else None

    def write(self, part: str, result: Result) -> None:
        write_json(self.file(part), result)


class Stopped(RuntimeError):
    """A signal ended the comparison before its last part."""

    def __init__(self, number: int):
        super().__init__("stopped by a signal; run the same command to go on")
        self.number = number


def check_settings(out: Path, settings: Result) -> Result:
    """The settings to write: these, and what out has besides.

    Methods, seeds and a scorer may be added to a comparison. ValueError if it was made with other
    settings, or if out holds something else.
    """
    file = out / SETTINGS
    if not file.is_file():
        # A start that was interrupted leaves these, and nothing else.
        ours = re.compile(rf"{runs.IN_USE}(\.removing|\.\d+\.dead)?|\.?{runs.RECORDS}(\..+)?")
        is_free = out.is_dir() and all(ours.fullmatch(path.name) for path in out.iterdir())
        if out.exists() and not is_free:
            raise ValueError(
                f"{str(out)!r} is there and holds no comparison; give a new folder as --out"
            )
        return settings
    saved = load_json(file.read_bytes(), repr(str(file)))
    written = json.loads(json.dumps(settings))  # JSON has lists for tuples
    before, now = (dict(configuration.flatten(values)) for values in (saved, written))
    if None in (before["scorer"], now["scorer"]):
        before["scorer"] = now["scorer"] = before["scorer"] or now["scorer"]
    lines = [
        f"{key}: {value!r} -> {now[key]!r}"
        for key, value in before.items()
        if key in now and value != now[key]
    ]
    if lines:
        more = f" and {len(lines) - 5} more" if len(lines) > 5 else ""
        raise ValueError(
            f"{str(out)!r} holds a comparison with other settings ({'; '.join(lines[:5])}{more}); "
            "give another --out, or the settings that it began with"
        )
    rivals = saved["rivals"] | settings["rivals"]
    return settings | {"rivals": rivals, "scorer": before["scorer"]}


def compare(
    all_runs: Sequence[Run],
    scoring: Scoring,
    *,
    baselines: bool,
    after_part: Callable[[], None] = lambda: None,
) -> None:
    """Does the parts that are not done, run by run.

    baselines: the first run that is scored is so beside n-gram models. A failure ends its own run
    alone, and is tried again by the next call unless training diverged. Stopped if a signal came,
    which the command that ran then had too.
    """
    todo = [(run, part) for run in all_runs for part in scoring.parts if run.read(part) is None]
    count = len(all_runs) * len(scoring.parts)
    done = count - len(todo)
    if done:
        log.info("%d of %d parts are there already", done, count)
    failed: list[Path] = []  # folders
    with Commands() as commands:
        for number, (run, part) in enumerate(todo):
            if run.folder in failed:
                continue
            failure = run.read(FAILURE)
            if failure is None or failure["status"] != DIVERGED:
                left = [part for run, part in todo[number:] if run.folder not in failed]
                where = f"[{done + number + 1}/{count}] {run.label}: {part}"
                log.info("%s%s", where, time_left(all_runs, left))
                flags = ["--baselines"] if baselines and ngrams(all_runs) is None else []
                failure = do_part(commands, run, part, scoring, flags)
            if failure is not None:
                failed.append(run.folder)
                log.info("%s", failure_line(run, failure))
            after_part()


def do_part(
    commands: "Commands", run: Run, part: str, scoring: Scoring, flags: Sequence[str]
) -> Result | None:
    """Runs the part's command, likelihood with these flags; the failure, also written, if it fails.

    Stopped after a signal.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    run.file(FAILURE).unlink(missing_ok=True)
    output = run.folder / f".{part}.output"
    output.unlink(missing_ok=True)
    began = time.monotonic()
    command = command_of(run, part, scoring, output)
    status, reason = commands.run(
        [*command, *(flags if part == "likelihood" else [])], run.folder / LOG
    )
    if status == 0:
        result = RESULTS[part](run, output)
        output.unlink(missing_ok=True)
        run.write(part, {"part_seconds": time.monotonic() - began} | result)
        return None
    if commands.received is not None:
        raise Stopped(commands.received)
    failure = {"part": part, "status": status, "reason": reason}
    run.write(FAILURE, failure)
    return failure


def command_of(run: Run, part: str, scoring: Scoring, output: Path) -> list[str]:
    """The arguments of `python -m sedd_jax` for a part that leaves its result in output."""
    workdir, seed = f"--workdir={run.workdir}", f"--seed={run.config.seed}"
    samples = [f"--num_samples={scoring.num_samples}", seed]
    if part == "train":
        return ["train", *run.arguments, workdir, f"--requeue_status={STOPPED}"]
    if part == "likelihood":  # of one seed: the same noise for all
        blocks = [] if scoring.blocks is None else [f"--blocks={scoring.blocks}"]
        size = f"--batch_size={run.config.evaluate.batch_size}"
        how = [f"--passes={scoring.passes}", size, f"--json={output}"]
        return ["eval", "likelihood", workdir, *how, *blocks]
    if part == "samples":
        return ["sample", workdir, *samples, "--format=jsonl", f"--out={output}"]
    how = [f"--scorer={scoring.scorer}", f"--json={output}"]
    return ["eval", "generative_perplexity", workdir, *samples, *how]


def training_clock(run: Run) -> tuple[np.ndarray, np.ndarray, float]:
    """Steps [N] at which training was logged, seconds of training until each, tokens of a step.

    Without compiling, saving and evaluating. Steps that a stopped process had not logged take what
    those after them took.
    """
    section = run.config.data
    per_block = runs.open_records(run.config, run.workdir).tokens_per_block(section.train_split)
    tokens = per_block * run.config.train.batch_size
    rows = [row for row in runs.read_metrics(run.workdir) if row["kind"] == "train"]
    steps = np.array([row["step"] for row in rows])
    rates = np.array([row["tokens_per_second"] for row in rows])
    return steps, np.cumsum(np.diff(steps, prepend=0) * tokens / rates), tokens


def trained(run: Run) -> Result:
    """How much a run has been trained, also one that failed; nothing if it never began."""
    if not (run.workdir / runs.METRICS).is_file():
        return {}
    steps, seconds, tokens_per_step = training_clock(run)
    if not len(steps):
        return {}
    tokens, taken = float(steps[-1] * tokens_per_step), float(seconds[-1])
    return {"tokens_seen": tokens, "training_seconds": taken, "tokens_per_second": tokens / taken}


def _trained(run: Run, output: Path) -> Result:
    seconds = runs.read_metrics(run.workdir)[-1]["seconds"]  # of all processes
    return trained(run) | {"part_seconds": seconds}


def _scored(run: Run, output: Path) -> Result:
    return load_json(output.read_bytes(), repr(str(output)))


def _sampled(run: Run, output: Path) -> Result:
    lines = output.read_text(encoding="utf-8").splitlines()
    statistics = sample_statistics(np.array([json.loads(line)["tokens"] for line in lines]))
    output.replace(run.folder / TEXTS)
    return {"num_samples": len(lines), **statistics}


RESULTS: dict[str, Callable[[Run, Path], Result]] = {
    "train": _trained,
    "likelihood": _scored,
    "samples": _sampled,
    "perplexity": _scored,
}


def ngrams(all_runs: Sequence[Run]) -> Result | None:
    """The result of `evaluation.likelihood` that has n-gram models beside it, if there is one."""
    results = (run.read("likelihood") for run in all_runs)
    return next((r for r in results if r and "bigram" in r["nats_per_token"]), None)


def time_left(all_runs: Sequence[Run], left: Sequence[str]) -> str:
    """How long these parts will take, as ", about 12 min left"; "" before one of each is done."""
    total = 0.0
    for part in set(left):
        results = (run.read(part) for run in all_runs)
        seconds = [result["part_seconds"] for result in results if result]
        if not seconds:
            return ""
        total += left.count(part) * float(np.mean(seconds))
    units = (("h", 3600.0), ("min", 60.0), ("s", 1.0))
    unit, size = next((unit for unit in units if total >= 2 * unit[1]), units[-1])
    return f", about {total / size:.0f} {unit} left"


def failure_line(run: Run, failure: Result) -> str:
    """What failed, why, and where all of it is."""
    return (
        f"{run.label}: {failure['part']} failed with status {failure['status']}: "
        f"{failure['reason']} ({run.folder / LOG})"
    )


def _end_with_parent() -> None:
    """In a child, on Linux: a parent that is killed takes it along."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


class Commands:
    """Runs commands one at a time; while entered, signals go to the command that runs.

    The first stops training with a checkpoint, and a second one at once; `received` is the number
    of the last one. What is ignored at the start stays so, as SIGHUP under nohup.
    """

    def __init__(self):
        self.received: int | None = None
        self._process: subprocess.Popen | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, number, frame) -> None:
        self.received = number
        if self._process is not None:
            self._process.send_signal(number)

    def __exit__(self, *exception) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def run(self, command: Sequence[str], log_file: Path) -> tuple[int, str]:
        """The status of `python -m sedd_jax COMMAND`, and the last line that it printed.

        What it prints is added to log_file. Stopped, before it starts, after a signal.
        """
        if self.received is not None:
            raise Stopped(self.received)
        with log_file.open("ab") as printed:
            printed.write(f"$ sedd-{shlex.join(command)}\n".encode("utf-8", "replace"))
            printed.flush()
            start = printed.tell()
            # A group of its own: a terminal's Ctrl-C must not come twice, which ends at once.
            self._process = subprocess.Popen(
                [sys.executable, "-m", "sedd_jax", *command],
                stdin=subprocess.DEVNULL,
                stdout=printed,
                stderr=subprocess.STDOUT,
                process_group=0,
                preexec_fn=_end_with_parent,  # noqa: PLW1509 (this process has no other thread)
            )
            try:
                if self.received is not None:  # while it was started
                    self._process.send_signal(self.received)
                status = self._process.wait()
            finally:
                if self._process.poll() is None:
                    self._process.terminate()
                self._process = None
        with log_file.open("rb") as printed:
            printed.seek(start)
            text = printed.read().decode("utf-8", "replace")
        lines = [line for line in re.split(r"[\r\n]", text) if line.strip()]
        last = lines[-1].strip() if lines else "it printed nothing"
        return status, shown(re.sub(r"^sedd-\w+: (error: )?", "", last), 300)
