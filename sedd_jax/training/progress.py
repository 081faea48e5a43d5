"""What a user and the operating system see of training: progress, metrics, signals.

A run's metrics go to metrics.jsonl (a JSON object a line) and to TensorBoard events.
"""

import contextlib
import faulthandler
import json
import logging
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
from ml_collections import ConfigDict
from tensorboardX import SummaryWriter
from tqdm.auto import tqdm

from sedd_jax.data import Records
from sedd_jax.experiment import Program
from sedd_jax.files import write_text
from sedd_jax.inference import bounds
from sedd_jax.parallel.devices import GIB, device, format_bytes, program_bytes

log = logging.getLogger(__name__)


class TrainingStopped(RuntimeError):
    """Training cannot go on; the message says why and what to try."""


class Signals:
    """While entered, the first SIGINT or SIGTERM only sets `asked`; the next acts as usual."""

    def __init__(self):
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        with contextlib.suppress(ValueError):  # not the main thread: leave signals alone
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def _ask(self, number, frame) -> None:
        self.asked = True
        self.__exit__()

    def __exit__(self, *exception) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


class Watchdog:
    """While entered, the process ends if nothing calls `alive` for that many seconds; 0: never.

    A host that is stuck (a lost file system, a collective that a peer never joined) is noticed by
    nobody else: it is alive. It writes the stacks of all threads to standard error and exits with
    status 1, and its peers end for want of its heartbeat.
    """

    GRACE = 30  # seconds that a thread of Python's gets, before one that needs no interpreter acts

    def __init__(self, seconds: float):
        self.seconds = seconds
        self._stderr = sys.__stderr__  # a notebook's or a test's has no file descriptor
        self._last = time.monotonic()
        self._done = threading.Event()

    def __enter__(self) -> Self:
        if self.seconds:
            self.alive()
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def alive(self) -> None:
        """Whoever calls this is not stuck."""
        self._last = time.monotonic()
        if self.seconds:
            faulthandler.dump_traceback_later(
                self.seconds + self.GRACE, exit=True, file=self._stderr
            )

    def _watch(self) -> None:
        while not self._done.wait(max(0.01, self._last + self.seconds - time.monotonic())):
            if time.monotonic() - self._last >= self.seconds:
                print(
                    f"sedd-train: error: stuck: no step, batch or save was finished in "
                    f"{self.seconds} s (config.train.stuck_seconds); the stacks follow, the newest "
                    "checkpoint is as it was",
                    file=self._stderr,
                    flush=True,
                )
                faulthandler.dump_traceback(file=self._stderr)
                os._exit(1)

    def __exit__(self, *exception) -> None:
        self._done.set()
        faulthandler.cancel_dump_traceback_later()


class Profile:
    """A window of config.profile.steps steps from config.profile.start, kept in WORKDIR/profile."""

    def __init__(self, section: ConfigDict, workdir: Path):
        self.first, self.end = section.start, section.start + section.steps
        self.folder = workdir / "profile"
        self.runs = False

    def __enter__(self) -> Self:
        return self

    def before(self, step: int) -> None:
        """To be called before every step with its number from 0."""
        wanted = self.first <= step < self.end and jax.process_index() == 0
        if wanted != self.runs:
            jax.effects_barrier()
            if wanted:
                jax.profiler.start_trace(str(self.folder))
            else:
                self._stop()
            self.runs = wanted

    def _stop(self) -> None:
        jax.profiler.stop_trace()
        log.info("a profile of the steps from %d on is in %s", self.first, self.folder)

    def __exit__(self, *exception) -> None:
        if self.runs:
            self._stop()


class Clock:
    """Where the time goes: seconds by phase. What is in no phase is training steps."""

    PHASES = ("compile", "input", "checkpoint", "evaluate", "sample")

    def __init__(self):
        self.began = time.perf_counter()
        self.seconds = dict.fromkeys(self.PHASES, 0.0)

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] += time.perf_counter() - began

    @property
    def total(self) -> float:
        """Seconds since the process began to train."""
        return time.perf_counter() - self.began

    @property
    def steps(self) -> float:
        """Seconds of training steps."""
        return self.total - sum(self.seconds.values())


class Report:
    """Progress bar, metrics.jsonl and TensorBoard events; reads the device only when logging."""

    def __init__(self, program: Program, records: Records, workdir: Path, step: int):
        self.program, self.config = program, program.config
        self.records, self.workdir = records, workdir
        self.clock = Clock()
        self.tokens_per_block = records.tokens_per_block(self.config.data.train_split)
        self.pending: list[dict[str, jax.Array]] = []
        self.since = self._training_seconds()
        peak = device(program.mesh.devices.flat[0].device_kind)
        self.flops_per_second = peak and peak.flops * program.mesh.size
        self.writes = jax.process_index() == 0
        self.bar = tqdm(
            desc="train",
            total=self.config.train.steps,
            initial=step,
            unit="step",
            disable=not self.writes,
            mininterval=0.5 if sys.stderr.isatty() else 15.0,
        )
        if self.writes:
            write_text(workdir / "metrics.jsonl", lines_up_to(workdir / "metrics.jsonl", step))
            self.lines = (workdir / "metrics.jsonl").open("a", encoding="utf-8")
            self.events = SummaryWriter(str(workdir / "tensorboard"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception) -> None:
        self.bar.close()
        if self.writes:
            self.lines.close()
            self.events.close()

    def began(self, found: int | None) -> None:
        """Say what is trained, and from which checkpoint."""
        parameters = sum(leaf.size for leaf in jax.tree.leaves(self.program.shape.params))
        log.info(
            "%s parameters, %s blocks of %d tokens, mesh %s%s; %s",
            f"{parameters:,}",
            f"{self.records.counts(self.config.data.train_split)['blocks']:,}",
            self.records.length,
            dict(self.program.mesh.shape),
            f", {jax.process_count()} processes" if jax.process_count() > 1 else "",
            f"resuming at step {found}" if found else "starting; compiling the train step",
        )

    def compiled(self, train_step: jax.stages.Compiled) -> None:
        """Say what compiling took and what the step needs."""
        memory = train_step.memory_analysis()
        need = "" if memory is None else f", {format_bytes(program_bytes(memory))} a device"
        log.info("compiled in %.1f s%s", self.clock.seconds["compile"], need)

    def collect(self, metrics: dict[str, jax.Array]) -> None:
        self.pending.append(metrics)
        self.bar.update()

    def train(self, step: int) -> None:
        """Log the mean over the steps since the last call; steps that were skipped do not count."""
        window = jax.device_get(self.pending)
        now = self._training_seconds()
        rate = len(window) / (now - self.since)  # steps a second
        finite = [m for m in window if np.isfinite(m["loss"]) and np.isfinite(m["grad_norm"])]
        values = {
            "nats_per_token": _mean(m["loss"] for m in finite) / self.tokens_per_block,
            "grad_norm": _mean(m["grad_norm"] for m in finite),
            "tokens_per_second": rate * self.config.train.batch_size * self.tokens_per_block,
            "skipped": int(window[-1]["skipped"]),
            "goodput": self.clock.steps / self.clock.total,
        }
        if "log_z" in window[-1]:
            values["log_z"] = _mean(m["log_z"] for m in finite)
        if self.flops_per_second is not None:
            values["mfu"] = rate * self.program.flops / self.flops_per_second
        values |= {f"{phase}_seconds": s for phase, s in self.clock.seconds.items() if s}
        values |= device_memory()
        self.pending, self.since = [], now
        self._write("train", step, values)
        mfu = f", MFU {values['mfu']:.0%}" if "mfu" in values else ""
        self.bar.set_postfix_str(
            f"loss {values['nats_per_token']:.3f} nats/token, "
            f"{values['tokens_per_second']:,.0f} tokens/s{mfu}",
            refresh=False,
        )
        in_a_row = max(int(m["skipped_in_a_row"]) for m in window)
        if in_a_row >= self.config.train.max_skipped:
            raise TrainingStopped(
                f"loss or gradient was not finite in {in_a_row} steps in a row by step {step}; "
                "nothing was updated in them: resume with a lower optimizer.learning_rate in a new "
                "workdir, or look at the data"
            )

    def _training_seconds(self) -> float:
        """Seconds of training so far, with the wait for its input."""
        return self.clock.steps + self.clock.seconds["input"]

    def heldout(self, step: int, nats: bounds.CorpusBound) -> None:
        """Log the bound, nats per token."""
        values = {k: v for k, v in nats._asdict().items() if v is not None}
        self._write("heldout", step, values)
        if self.writes:
            self.bar.write(
                f"step {step}: held-out bound {nats.bound:.3f} +- {nats.bound_standard_error:.3f} "
                "nats/token"
            )

    def samples(self, step: int, texts: list[str]) -> None:
        """Keep the texts in WORKDIR/samples/STEP.txt and in the events."""
        if not self.writes:
            return
        text = "\n\n".join(f"--- {n} ---\n{one}" for n, one in enumerate(texts, start=1))
        (self.workdir / "samples").mkdir(exist_ok=True)
        write_text(self.workdir / "samples" / f"{step}.txt", text + "\n")
        self.events.add_text("samples", text, step)

    def _write(self, kind: str, step: int, values: dict[str, float]) -> None:
        if not self.writes:
            return
        seconds = round(self.clock.total, 3)
        row = {"kind": kind, "step": step, "seconds": seconds}
        # JSON has no NaN: a window in which every step was skipped has null.
        row |= {name: value if math.isfinite(value) else None for name, value in values.items()}
        self.lines.write(json.dumps(row) + "\n")
        self.lines.flush()
        for name, value in values.items():
            self.events.add_scalar(f"{kind}/{name}", value, step)


def lines_up_to(file: Path, step: int) -> str:
    """The lines of metrics that a run resumed at step keeps; a line torn by a kill is none."""
    kept = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
    return "".join(kept)


def device_memory() -> dict[str, float]:
    """GiB in use and at the peak on the fullest device of this process; nothing where unknown."""
    stats = [one.memory_stats() or {} for one in jax.local_devices()]
    names = {"bytes_in_use": "device_gib", "peak_bytes_in_use": "device_gib_peak"}
    return {
        ours: max(s[theirs] for s in stats) / GIB
        for theirs, ours in names.items()
        if all(theirs in s for s in stats)
    }


def _mean(values) -> float:
    values = list(values)
    return float(np.mean(values)) if values else float("nan")
