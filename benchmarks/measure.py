"""What the speed and memory benchmarks share: sizes, sides, their processes, statistics, tables.

Imports no framework: these live in the processes of the sides. A side is one of the programs that
are compared - this checkout, another one of ours, the original - in a process of its own
(worker.py), which computes only on a call over a pipe. So one side runs at a time, A B A B, each
with its own threads, allocator and peak of memory, and torch and jax never meet in one process.
"""

import argparse
import dataclasses
import json
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from tqdm.auto import tqdm
from worker import serve

REPOSITORY = Path(__file__).resolve().parent.parent
GIB, MIB = 2**30, 2**20
SPAWN = multiprocessing.get_context("spawn")  # as a fork would share threads and imports
# Of the processes of the sides, which inherit them, where the user has not set them.
ENVIRONMENT = {
    # The processes of one table share an accelerator: none may reserve all of it.
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    # Huge pages for a CPU's buffers, see launch/environment.sh; they help torch too.
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    "PYTHONDONTWRITEBYTECODE": "1",  # the original's folder is not written to
}
SHORT = {"float32": "f32", "bfloat16": "bf16"}  # dtypes in names of sides


@dataclasses.dataclass(frozen=True)
class Size:
    """A model and the batches that a CPU can take of it."""

    vocab_size: int  # clean tokens
    hidden_size: int
    blocks: int
    heads: int
    cond_dim: int
    length: int  # of a training batch
    batch_size: int
    sample_length: int
    sample_batch_size: int
    dropout: float = 0.1  # in training

    def task(self, kind: str, steps: int = 0) -> "Task":
        """Training, or sampling in so many steps."""
        if kind == "train":
            return Task(kind, self.batch_size, self.length)
        return Task(kind, self.sample_batch_size, self.sample_length, steps)


SIZES = {
    "tiny": Size(27, 256, 4, 4, 128, 256, 16, 256, 16),  # text8's characters; 4.1 M parameters
    "small": Size(50257, 768, 12, 12, 128, 128, 4, 256, 1),  # 169.6 M
    "medium": Size(50257, 1024, 24, 16, 128, 128, 2, 256, 1),  # 424.5 M
}


@dataclasses.dataclass(frozen=True)
class Side:
    """One of the programs that are compared; everything its process must know."""

    name: str  # as in the table
    kind: str  # ours or original
    path: str  # the checkout, or the original's folder
    dtype: str
    compiled: bool = False  # the original, by torch.compile
    cores: int = 0  # of a CPU; 0: all
    values: tuple[tuple[str, Any], ...] = ()  # config keys of ours
    environment: tuple[tuple[str, str], ...] = ()

    def doing(self, kind: str) -> "Side":
        """This side for tasks of a kind: the original samples without TorchScript, in whose rotary
        embedding torch 2.11 crashes on a GPU then."""
        if self.kind == "ours" or kind != "sample":
            return self
        return dataclasses.replace(self, environment=(*self.environment, ("PYTORCH_JIT", "0")))


class Failed(RuntimeError):
    """A side could not do what it was called for; the message fits a table."""


class Worker:
    """The process of a side: `worker.call("train", steps=3)`."""

    def __init__(self, side: Side, size: Size, deadline: float = math.inf):
        self.side, self.deadline = side, deadline  # as time.monotonic counts
        os.environ.update(ENVIRONMENT | os.environ)
        self._calls, its_end = SPAWN.Pipe()
        sizes = dataclasses.asdict(side), dataclasses.asdict(size)
        self._process = SPAWN.Process(target=serve, args=(its_end, *sizes), daemon=True)
        self._process.start()
        its_end.close()

    def call(self, name: str, **arguments: Any) -> Any:
        """What worker.py answers to the call; Failed if it raises, or at the deadline."""
        seconds = max(0.0, self.deadline - time.monotonic())
        try:
            self._calls.send((name, arguments))
            if not self._calls.poll(seconds if math.isfinite(seconds) else None):
                self._process.kill()
                raise Failed(f"{name} stopped after {seconds:.0f} s")
            answer = self._calls.recv()
        except (BrokenPipeError, ConnectionResetError, EOFError):
            self._process.join()
            raise Failed(f"process ended with {self._process.exitcode}") from None
        if "error" in answer:
            raise Failed(answer["error"])
        return answer["value"]

    def close(self) -> None:
        """End the process, and with it all that it holds."""
        self._calls.close()
        self._process.join(timeout=2.0)  # one that waits for a call ends by itself
        self._process.kill()
        self._process.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# --- options


def add_sides(parser: argparse.ArgumentParser) -> None:
    """The options that say which programs are compared."""
    parser.add_argument("--against", type=Path, help="a folder with the original's code")
    parser.add_argument("--before", type=Path, help="another checkout of ours")
    flag = argparse.BooleanOptionalAction
    parser.add_argument("--compile", action=flag, help="the original by torch.compile too")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of ours")
    parser.add_argument("--cores", type=int, default=0, help="of a CPU, for each side; 0: all")
    parser.add_argument("--json", type=Path, help="a file for all the numbers")


def sides_of(options: argparse.Namespace) -> list[Side]:
    """Ours first; ratios are to it."""
    values = tuple(_value(text) for text in options.set)
    sides = []

    def add(name: str, kind: str, path: Path, **others: Any) -> None:
        name = f"{name} {SHORT[dtype]}"
        sides.append(Side(name, kind, str(path.resolve()), dtype, cores=options.cores, **others))

    for dtype in options.dtype.split(","):
        if dtype not in SHORT:
            raise SystemExit(f"unknown dtype {dtype!r}; known: {', '.join(SHORT)}")
        add("ours", "ours", REPOSITORY, values=values)
        if options.before:
            add("before", "ours", options.before, values=values)
        if options.against:
            if options.compile:
                add("original compiled", "original", options.against, compiled=True)
            add("original", "original", options.against)
    return sides


def _value(text: str) -> tuple[str, Any]:
    """model.remat=blocks as ("model.remat", "blocks"); a value that is JSON is read as such."""
    key, equals, value = text.partition("=")
    if not equals:
        raise SystemExit(f"--set={text} has no '='; give KEY=VALUE")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


# --- measuring


@dataclasses.dataclass(frozen=True)
class Task:
    """What is timed: steps of training, or whole samples."""

    kind: str  # train or sample
    batch_size: int
    length: int
    steps: int = 0  # of a sample, which are one network call fewer than it makes

    def start(self, worker: Worker) -> dict[str, Any]:
        """What the worker says of the device and of its first step or sample."""
        about, batch = worker.call("about"), {"batch_size": self.batch_size, "length": self.length}
        if self.kind == "train":
            return about | worker.call("start_training", **batch)
        # No program depends on the number of steps, so a short sample compiles all.
        return about | worker.call("start_sampling", **batch, steps=min(self.steps, 32))

    def count(self, worker: Worker, least: float) -> int:
        """How many steps last at least so many seconds; the network calls of a sample."""
        if self.kind == "sample":
            return self.steps + 1
        worker.call("train", steps=1)
        return max(1, math.ceil(least / worker.call("train", steps=1)["seconds"]))

    def timed(self, worker: Worker, count: int) -> dict[str, float]:
        """Seconds of one of `count` steps or network calls, on the wall and of its cores."""
        if self.kind == "train":
            # Not timed: a process that waited for the others finds caches cold and, where the
            # system takes idle pages back, memory to be fetched.
            worker.call("train", steps=1)
        answer = worker.call(self.kind, steps=self.steps or count)
        times = {name: answer[name] / count for name in ("seconds", "cpu_seconds")}
        return times | {"compiles": answer["compiles"]}

    def rates(self, seconds: float, forward_flops: float) -> dict[str, float]:
        """What a step of so many seconds comes to; forward_flops for one sequence."""
        tokens, flops = self.batch_size * self.length, self.batch_size * forward_flops
        tokens, flops = (tokens / (self.steps + 1), flops) if self.steps else (tokens, 3 * flops)
        return {
            "steps_per_second": 1.0 / seconds,
            "tokens_per_second": tokens / seconds,
            "flops_per_second": flops / seconds,
        }


def interleave(
    workers: Sequence[Worker],
    measured: Callable[[Worker], dict[str, float]],
    repeats: int,
    limit: float = math.inf,
) -> dict[str, dict[str, list[float]]]:
    """measured(worker) of each in turn, A B A B, `repeats` times: lists of its values, by name.

    After `limit` seconds no other repeat begins.
    """
    answers, until = {worker.side.name: [] for worker in workers}, time.monotonic() + limit
    for repeat in tqdm(range(repeats), leave=False, disable=None):
        if repeat and time.monotonic() > until:
            break
        for worker in workers:
            answers[worker.side.name].append(measured(worker))
    return {
        name: {key: [answer[key] for answer in rows] for key in rows[0]}
        for name, rows in answers.items()
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    quartiles = np.quantile(values, (0.25, 0.5, 0.75)).tolist()
    return dict(zip(("low", "median", "high"), quartiles, strict=True))


def ratios(ours: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    """Of the other's time to ours, pair by pair: what slows the machine down slows down both."""
    return spread([b / a for a, b in zip(ours, other, strict=True)])


class Ceilings:
    """The best rates of large matmuls that either framework has shown, operations a second."""

    def __init__(self, seconds: float = 0.5):
        self.seconds = seconds  # for each of them
        self.by_kind: dict[str, dict[str, float]] = {}

    def measure(self, workers: Sequence[Worker]) -> None:
        """Time one worker of ours and of the original; of several calls the best counts."""
        for worker in {worker.side.kind: worker for worker in workers}.values():
            rates, best = worker.call("matmul_rates", seconds=self.seconds), self.by_kind
            before = best.get(worker.side.kind, rates)
            best[worker.side.kind] = {k: max(rate, before[k]) for k, rate in rates.items()}

    def flops(self, dtype: str) -> float:
        """In matmuls of the dtype; float32's where bfloat16 is slower."""
        rates = [max(v["float32"], v[dtype]) for v in self.by_kind.values()]
        return max(rates, default=math.nan)

    def table(self) -> str:
        return table(
            [
                {"matmuls": name, **{f"{k} TFLOP/s": f"{v / 1e12:.3f}" for k, v in rates.items()}}
                for name, rates in self.by_kind.items()
            ]
        )


# --- printing


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """In markdown, for people too: the first column to the left, the others to the right."""
    if not rows:
        return ""
    heads = list(dict.fromkeys(head for row in rows for head in row))
    widths = [max(3, *(len(row.get(head, "")) for row in [*rows, {head: head}])) for head in heads]

    def line(cells: Sequence[str]) -> str:
        others = map(str.rjust, cells[1:], widths[1:])
        return f"| {' | '.join([cells[0].ljust(widths[0]), *others])} |"

    rules = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    body = [line([row.get(head, "") for head in heads]) for row in rows]
    return "\n".join([line(heads), line(rules), *body])


def seconds(value: float) -> str:
    """1.234 s, 12.3 ms or 123 us, to three or four digits."""
    if value <= 0.0 or not math.isfinite(value):
        return str(value)
    unit, factor = ("s", 1.0) if value >= 1.0 else ("ms", 1e3) if value >= 1e-3 else ("us", 1e6)
    return f"{value * factor:.4g} {unit}"


def bytes_of(value: float | None) -> str:
    """1.23 GiB or 123 MiB."""
    if value is None:
        return "-"
    return f"{value / GIB:.2f} GiB" if value >= GIB else f"{value / MIB:.0f} MiB"


def rate_cells(row: Mapping[str, Any]) -> dict[str, str]:
    """Of Task.rates and mfu."""
    return {
        "steps/s": f"{row['steps_per_second']:.4g}",
        "tokens/s": f"{row['tokens_per_second']:,.1f}",
        "TFLOP/s": f"{row['flops_per_second'] / 1e12:.3g}",
        "MFU": f"{row['mfu']:.1%}",
    }


def write_json(file: Path | None, results: dict[str, Any]) -> None:
    """The results and the command that made them; nothing without a file."""
    if file:
        command = [Path(sys.argv[0]).name, *sys.argv[1:]]
        now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        file.write_text(json.dumps({"command": command, "time": now, **results}, indent=1))
