"""What a user and the operating system see of training: progress, metrics, signals.

A run's metrics go to metrics.jsonl (a JSON object a line) and to TensorBoard events.
"""

import contextlib
import json
import math
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
from ml_collections import ConfigDict
from tensorboardX import SummaryWriter
from tqdm.auto import tqdm

from sedd_jax import evaluate


class TrainingStopped(RuntimeError):
    """Training cannot go on; the message says why and what to try."""


def write_text(path: Path, text: str) -> None:
    """Replace the file at once, so that no reader finds half of it."""
    if path.exists() and path.read_bytes() == text.encode("utf-8"):
        return
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


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


class Report:
    """Progress bar, metrics.jsonl and TensorBoard events; reads the device only when logging."""

    def __init__(self, config: ConfigDict, workdir: Path, step: int, tokens_per_block: float):
        self.config = config
        self.tokens_per_block = tokens_per_block
        self.pending: list[dict[str, jax.Array]] = []
        self.began = self.since = time.perf_counter()
        self.writes = jax.process_index() == 0
        self.bar = tqdm(
            desc="train",
            total=config.train.steps,
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

    def collect(self, metrics: dict[str, jax.Array]) -> None:
        self.pending.append(metrics)
        self.bar.update()

    def train(self, step: int) -> None:
        """Log the mean over the steps since the last call; steps that were skipped do not count."""
        window = jax.device_get(self.pending)
        now = time.perf_counter()
        tokens = self.config.train.batch_size * self.tokens_per_block  # a step
        finite = [m for m in window if np.isfinite(m["loss"]) and np.isfinite(m["grad_norm"])]
        values = {
            "nats_per_token": _mean(m["loss"] for m in finite) / self.tokens_per_block,
            "grad_norm": _mean(m["grad_norm"] for m in finite),
            "tokens_per_second": len(window) * tokens / (now - self.since),
            "skipped": int(window[-1]["skipped"]),
        }
        self.pending, self.since = [], now
        self._write("train", step, values)
        self.bar.set_postfix_str(
            f"loss {values['nats_per_token']:.3f} nats/token, "
            f"{values['tokens_per_second']:,.0f} tokens/s",
            refresh=False,
        )
        in_a_row = max(int(m["skipped_in_a_row"]) for m in window)
        if in_a_row >= self.config.train.max_skipped:
            raise TrainingStopped(
                f"loss or gradient was not finite in {in_a_row} steps in a row by step {step}; "
                "nothing was updated in them: resume with a lower optimizer.learning_rate in a new "
                "workdir, or look at the data"
            )

    def heldout(self, step: int, nats: evaluate.CorpusBound) -> None:
        """Log the bound, nats per token."""
        values = {k: v for k, v in nats._asdict().items() if v is not None}
        self._write("heldout", step, values)
        self.bar.write(
            f"step {step}: held-out bound {nats.bound:.3f} +- {nats.bound_standard_error:.3f} "
            "nats/token"
        )

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """What is done inside is not training time."""
        began = time.perf_counter()
        yield
        self.since += time.perf_counter() - began

    def _write(self, kind: str, step: int, values: dict[str, float]) -> None:
        if not self.writes:
            return
        seconds = round(time.perf_counter() - self.began, 3)
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


def _mean(values) -> float:
    values = list(values)
    return float(np.mean(values)) if values else float("nan")
