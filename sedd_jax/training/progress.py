"""What a user and the operating system see of training: progress, metrics, signals.

Takes numbers and paths, no config.
"""

import contextlib
import logging
import math
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Self

import jax
import numpy as np
from tqdm.auto import tqdm

from sedd_jax.diffusion.scores import NotFiniteError
from sedd_jax.host.console import LINE_SECONDS, activity, has_lines
from sedd_jax.inference import bounds
from sedd_jax.parallel import processes
from sedd_jax.parallel.devices import GIB
from sedd_jax.runs import workdir as runs
from sedd_jax.training.trackers import open_trackers

log = logging.getLogger(__name__)

# 80 columns at 400000 of 1000000 steps, with hours, MFU and a bar of one character.
BAR = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {remaining} left{postfix}"


class TrainingStopped(RuntimeError):
    """Training cannot go on; the message says why and what to try."""


class Signals:
    """While entered, the first SIGINT, SIGTERM or SIGHUP sets `received`; the next ends it.

    The next acts as usual, and where that has ended nothing within GRACE seconds, ends the process.
    A thread hears them: Python calls a handler only when the main thread is back from what it waits
    for, which may be a compilation or a slow step. What is ignored already stays so: SIGINT is in
    what `nohup ... &`, cron or a script starts in the background.
    """

    GRACE = 2.0

    def __init__(self):
        self.received = False
        self._before: dict[int, Any] = {}
        self._count, self._done = 0, threading.Event()
        self._write: int | None = None

    def __enter__(self) -> Self:
        if threading.current_thread() is not threading.main_thread():
            return self  # where Python lets nobody handle signals
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) in (signal.SIG_IGN, None):  # None: another library's
                if number == signal.SIGHUP:
                    continue  # as nohup is there to do
                log.info("%s is ignored, as it was at the start", signal.Signals(number).name)
            else:
                self._before[number] = signal.signal(number, self._handle)
        read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._wakeup_before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(read,), daemon=True).start()
        return self

    def _listen(self, read: int) -> None:
        with open(read, "rb", buffering=0) as signals:
            while byte := signals.read(1):  # nothing when the other end is closed
                if byte[0] not in self._before:
                    continue
                self._count += 1
                self.received = True
                if byte[0] == signal.SIGHUP:
                    _leave_terminal()
                if self._count == 1:
                    tqdm.write("stopping after this step; again: end now", file=sys.stderr)
                elif not hasattr(sys, "ps1") and not self._done.wait(self.GRACE):  # no notebook
                    tqdm.write("ended; the newest checkpoint is as it was", file=sys.stderr)
                    os._exit(128 + byte[0])

    def _handle(self, number, frame) -> None:
        self.received = True
        self._restore()
        if self._count > 1:  # two came while the main thread waited: one call for both
            signal.raise_signal(number)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __exit__(self, *exception) -> None:
        self._done.set()
        if self._write is not None:
            self._restore()
            signal.set_wakeup_fd(self._wakeup_before)
            os.close(self._write)


def _leave_terminal() -> None:
    """Drops what is written to a terminal that was closed: each write there would fail."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a stream without a file, as a notebook's
            poll = select.poll()
            poll.register(stream.fileno(), 0)
            if poll.poll(0):  # it hung up
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def watchdog(seconds: float) -> processes.Watchdog:
    """Ends a training that is stuck: its peers end when its heartbeat is missing."""
    return processes.Watchdog(
        seconds,
        f"stuck: no step, batch or save was finished in {seconds} s (config.train.stuck_seconds); "
        "the stacks follow, the newest checkpoint is as it was",
        with_stacks=True,
    )


class Profile:
    """Traces `steps` steps from number `start` on into folder, on process 0."""

    def __init__(self, folder: Path, start: int, steps: int):
        self.folder, self.window = folder, range(start, start + steps)
        self._is_on = False

    def __enter__(self) -> Self:
        return self

    def before(self, step: int) -> None:
        """To be called before every step with its number from 0."""
        if (step in self.window and processes.is_first()) != self._is_on:
            jax.effects_barrier()
            if self._is_on:
                self.__exit__()
            else:
                jax.profiler.start_trace(str(self.folder))
                self._is_on = True

    def __exit__(self, *exception) -> None:
        if self._is_on:
            jax.profiler.stop_trace()
            self._is_on = False
            log.info("a profile of steps from %d on is in %s", self.window.start, self.folder)


class Clock:
    """Where the time goes: seconds by phase. What is in no phase is training steps."""

    # And what a terminal shows meanwhile.
    PHASES: ClassVar[dict[str, str | None]] = {
        "compile": "compiling",
        "input": None,
        "checkpoint": "saving",
        "evaluate": "evaluating",
        "sample": "sampling",
    }

    def __init__(self):
        self.began = time.perf_counter()
        self.seconds = dict.fromkeys(self.PHASES, 0.0)

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            name = self.PHASES[phase]
            with activity(name, name is not None and processes.is_first()):
                yield
        finally:
            self.seconds[phase] += time.perf_counter() - began

    @property
    def total(self) -> float:
        """Seconds since training began in this process."""
        return time.perf_counter() - self.began

    @property
    def steps(self) -> float:
        """Seconds of training steps."""
        return self.total - sum(self.seconds.values())


class Progress:
    """The bar, and what trackers get; reads the device only when logging."""

    COUNTERS = ("skipped", "skipped_in_a_row")

    def __init__(
        self,
        workdir: Path,
        step: int,
        *,
        steps: int,
        tokens_per_sequence: float,  # on average: padding is not a token
        tokens_per_step: float,
        peak_share_per_step: float | None,  # seconds of the devices' peak that a step needs
        max_skipped: int,
        trackers: str = "tensorboard",
        config: dict[str, Any] | None = None,
    ):
        """Goes on after `step` of `steps`; metrics of later steps, which a kill undid, go.

        `seconds` goes on from the last row that is left; goodput and the phases are this process's.
        A window's MFU is its steps a second times peak_share_per_step, where the peak is known.
        trackers and config are those of `open_trackers`.
        """
        self.workdir, self.clock = workdir, Clock()
        self.tokens_per_sequence, self.tokens_per_step = tokens_per_sequence, tokens_per_step
        self.peak_share_per_step, self.max_skipped = peak_share_per_step, max_skipped
        self._pending: list[dict[str, jax.Array]] = []
        self._in_flight: jax.Array | None = None  # the loss of the last step
        self._since = self._training_seconds()
        self._writes = processes.is_first()
        self._has_lines = has_lines()
        self._line_at = -math.inf
        self._bar = tqdm(
            desc="train",
            total=steps,
            initial=step,
            bar_format=BAR,
            dynamic_ncols=True,
            disable=self._has_lines or not self._writes,
            mininterval=0.5,
        )
        rows = runs.read_metrics(workdir, last_step=step) if self._writes else []
        self._seconds_before = rows[-1].get("seconds", 0.0) if rows else 0.0
        self._trackers = processes.on_all_processes(
            lambda: open_trackers(trackers, workdir, step, config or {}) if self._writes else []
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception) -> None:
        self._bar.close()
        with contextlib.ExitStack() as stack:  # each, whatever becomes of the others
            for tracker in self._trackers:
                stack.callback(tracker.close)

    def collect(self, metrics: dict[str, jax.Array]) -> None:
        """The metrics of the step just dispatched; waits for the one before.

        Steps that are dispatched far ahead would hold up a signal, and the bar would lie.
        """
        self.settle()
        self._pending.append(metrics)
        self._in_flight = metrics["loss"]

    def settle(self) -> None:
        """Wait for the last step: the bar counts finished ones."""
        if self._in_flight is not None:
            self._in_flight.block_until_ready()
            self._in_flight = None
            if not self._bar.disable and self._bar.n == self._bar.initial:
                self._bar.unpause()  # compiling says nothing of the time that is left
            self._bar.update()

    def train(self, step: int, learning_rate: float) -> None:
        """Log the mean over the steps since the last call; steps that were skipped do not count.

        learning_rate is that of the last of them.

        TrainingStopped where max_skipped steps in a row were skipped.
        """
        self.settle()
        window = jax.device_get(self._pending)
        now = self._training_seconds()
        steps_per_second = len(window) / (now - self._since)
        self._pending, self._since = [], now
        finite = [m for m in window if np.isfinite(m["loss"]) and np.isfinite(m["grad_norm"])]
        means = {
            name: float(np.mean([m[name] for m in finite])) if finite else math.nan
            for name in window[-1]
            if name not in self.COUNTERS
        }
        values = {
            "nats_per_token": means.pop("loss") / self.tokens_per_sequence,
            "grad_norm": means.pop("grad_norm"),
            "learning_rate": learning_rate,
            "tokens_per_second": steps_per_second * self.tokens_per_step,
            "skipped": int(window[-1]["skipped"]),
            "goodput": self.clock.steps / self.clock.total,
            **means,
        }
        if self.peak_share_per_step is not None:
            values["mfu"] = steps_per_second * self.peak_share_per_step
        values |= {f"{phase}_seconds": s for phase, s in self.clock.seconds.items() if s}
        self._write("train", step, values | device_memory())
        speed = tqdm.format_sizeof(values["tokens_per_second"])
        mfu = f" MFU {values['mfu']:.0%}" if "mfu" in values else ""
        postfix = f"{values['nats_per_token']:.3f} nats/token {speed} tok/s{mfu}"
        self._bar.set_postfix_str(postfix, refresh=False)
        steps, total = self._bar.total, self.clock.total
        is_due = step >= steps or total - self._line_at >= LINE_SECONDS
        if self._writes and self._has_lines and is_due:
            self._line_at = total
            left = tqdm.format_interval((steps - step) / steps_per_second)
            words = f"step {step} of {steps}, {left} left: {postfix}"
            print(f"{time.strftime('%H:%M:%S')} {words}", file=sys.stderr, flush=True)
        in_a_row = max(int(m["skipped_in_a_row"]) for m in window)
        if in_a_row >= self.max_skipped:
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
        values = {**nats.sums, "passes": nats.passes}
        self._write("heldout", step, {k: v for k, v in values.items() if v is not None})
        if self._writes:
            error = nats.bound_standard_error  # none: of an autoregressive model it is exact
            kind, spread = ("bound", f" +- {error:.3f}") if error else ("-log p", "")
            value = f"{kind} {nats.bound:.3f}{spread} nats/token"
            self._bar.write(f"{time.strftime('%H:%M:%S')} step {step}: held-out {value}")

    def samples(self, step: int, texts: list[str]) -> None:
        """Give the texts to the trackers: samples/STEP.txt and others."""
        text = "\n\n".join(f"--- {n} ---\n{one}" for n, one in enumerate(texts, start=1))
        for tracker in self._trackers:
            tracker.text(step, runs.SAMPLES, text)

    @contextlib.contextmanager
    def scores_may_diverge(self, step: int) -> Iterator[None]:
        """Says that the model's scores are not finite, where they are not; training goes on.

        A later step may bring them back, and what is wrong with a step itself is skipped there.
        """
        try:
            yield
        except NotFiniteError as error:
            if self._writes:
                self._bar.write(f"step {step}: {error}; training goes on", file=sys.stderr)

    def _write(self, kind: str, step: int, values: dict[str, float]) -> None:
        seconds = round(self._seconds_before + self.clock.total, 3)
        for tracker in self._trackers:
            tracker.scalars(step, kind, {"seconds": seconds} | values)


def device_memory() -> dict[str, float]:
    """GiB in use and at the peak on the fullest device of this process; nothing where unknown."""
    stats = [one.memory_stats() or {} for one in jax.local_devices()]
    names = {"bytes_in_use": "device_gib", "peak_bytes_in_use": "device_gib_peak"}
    return {
        ours: max(s[theirs] for s in stats) / GIB
        for theirs, ours in names.items()
        if all(theirs in s for s in stats)
    }
