"""What the speed and memory benchmarks share: sizes, sides, their processes, statistics, tables.

Imports nothing but the standard library: the frameworks live in the processes of the sides. A
side is one of the programs that are compared - this checkout, another one of ours, the original -
in a process of its own (worker.py), which computes only on a call over a pipe. So one side runs
at a time, A B A B, each with its own threads, allocator and peak of memory, and torch and jax
never meet in one process.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import os
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent
GIB, MIB = 2**30, 2**20
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

    def batch(self, task: str) -> dict[str, int]:
        """Arguments of a worker's start_training or start_sampling."""
        if task == "train":
            return {"batch_size": self.batch_size, "length": self.length}
        return {"batch_size": self.sample_batch_size, "length": self.sample_length}


SIZES = {
    "tiny": Size(27, 256, 4, 4, 128, 256, 16, 256, 16),  # text8's characters; 4.1 M parameters
    "small": Size(50257, 768, 12, 12, 128, 128, 4, 256, 1),  # 169.6 M
    "medium": Size(50257, 1024, 24, 16, 128, 128, 2, 256, 1),  # 424.5 M
}


@dataclasses.dataclass(frozen=True)
class Side:
    """One of the programs that are compared; everything its process must know."""

    name: str  # as in the table
    kind: str  # of worker.KINDS: ours or original
    path: str  # the checkout, or the original's folder
    dtype: str
    compiled: bool = False  # the original, by torch.compile
    cores: int = 0  # of a CPU; 0: all
    values: tuple[tuple[str, Any], ...] = ()  # config keys of ours
    environment: tuple[tuple[str, str], ...] = ()

    @property
    def framework(self) -> str:
        return "jax" if self.kind == "ours" else "torch"


class Failed(RuntimeError):
    """A side could not do what it was called for; the message fits a table."""


class Worker:
    """The process of a side: `worker.call("train", steps=3)`."""

    def __init__(self, side: Side, size: Size):
        self.side = side
        self._folder = tempfile.TemporaryDirectory()
        self._errors = Path(self._folder.name) / "stderr"
        spec = json.dumps({"side": dataclasses.asdict(side), "size": dataclasses.asdict(size)})
        environment = {
            # The processes of one table share an accelerator: none may reserve all of it.
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            # Huge pages for a CPU's buffers, see launch/environment.sh; they help torch too.
            "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
            "PYTHONDONTWRITEBYTECODE": "1",  # the original's folder is not written to
        }
        with self._errors.open("w") as errors:
            self._process = subprocess.Popen(
                [sys.executable, str(HERE / "worker.py"), spec],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**environment, **os.environ, **dict(side.environment)},
            )

    def call(self, name: str, timeout: float | None = None, **arguments: Any) -> Any:
        """What worker.py's function of that name returns; Failed if it raises or is too late."""
        with contextlib.suppress(BrokenPipeError):  # the empty answer says so below
            self._process.stdin.write(json.dumps({"call": name, "arguments": arguments}) + "\n")
            self._process.stdin.flush()
        if not select.select([self._process.stdout], [], [], timeout)[0]:
            self.close()
            raise Failed(f"stopped after {timeout:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            print(self._errors.read_text()[-4000:], file=sys.stderr)
            raise Failed(f"process ended with {code}")
        answer = json.loads(line)
        if "error" in answer:
            print(answer["trace"], file=sys.stderr)
            raise Failed(answer["error"])
        return answer["value"]

    def close(self) -> None:
        """End the process, and with it all that it holds."""
        self._process.kill()
        self._process.wait()
        self._folder.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# --- options


def add_sides(parser: argparse.ArgumentParser) -> None:
    """The options that say which programs are compared."""
    parser.add_argument("--against", type=Path, help="a folder with the original's code")
    parser.add_argument("--before", type=Path, help="another checkout of ours")
    parser.add_argument("--compile", action="store_true", help="the original by torch.compile")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of ours")
    parser.add_argument(
        "--env",
        action="append",
        default=[],
        metavar="SIDE:NAME=VALUE",
        help="an environment variable of the sides whose name begins so",
    )
    parser.add_argument("--json", type=Path)


def sides_of(options: argparse.Namespace, cores: int = 0) -> list[Side]:
    """Ours first; ratios are to it."""
    values = tuple(_value(text) for text in options.set)
    sides = []
    for dtype in options.dtype.split(","):
        if dtype not in SHORT:
            raise SystemExit(f"unknown dtype {dtype!r}; known: {', '.join(SHORT)}")
        sides.append(Side(f"ours {SHORT[dtype]}", "ours", str(REPOSITORY), dtype, values=values))
        if options.before:
            path = str(options.before.resolve())
            sides.append(Side(f"before {SHORT[dtype]}", "ours", path, dtype, values=values))
        if options.against:
            path = str(options.against.resolve())
            sides.append(Side(f"original {SHORT[dtype]}", "original", path, dtype))
            if options.compile:
                name = f"original compiled {SHORT[dtype]}"
                sides.append(Side(name, "original", path, dtype, compiled=True))
    return [
        dataclasses.replace(side, cores=cores, environment=_environment(side, options.env))
        for side in sides
    ]


def _value(text: str) -> tuple[str, Any]:
    """model.remat=blocks as ("model.remat", "blocks"); a value that is JSON is read as such."""
    key, equals, value = text.partition("=")
    if not equals:
        raise SystemExit(f"--set={text} has no '='; give KEY=VALUE")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def _environment(side: Side, settings: Sequence[str]) -> tuple[tuple[str, str], ...]:
    pairs = []
    for text in settings:
        start, _, setting = text.partition(":")
        name, equals, value = setting.partition("=")
        if not equals:
            raise SystemExit(f"--env={text} is not SIDE:NAME=VALUE")
        if side.name.startswith(start):
            pairs.append((name, value))
    return tuple(pairs)


# --- measuring


@contextlib.contextmanager
def started(sides: Sequence[Side], size: Size, call: str, **arguments: Any) -> Iterator[Any]:
    """A worker for each side, after that call; and what it and `about` returned, by name."""
    with contextlib.ExitStack() as stack:
        workers, answers = [], {}
        for side in sides:
            progress(f"{side.name}: starting")
            worker = stack.enter_context(Worker(side, size))
            answers[side.name] = worker.call("about") | worker.call(call, **arguments)
            workers.append(worker)
        yield workers, answers


def interleave(
    workers: Sequence[Worker], measured: Callable[[Worker], dict[str, float]], repeats: int
) -> dict[str, dict[str, list[float]]]:
    """measured(worker) of each in turn, A B A B, `repeats` times: lists of its values, by name."""
    answers = {worker.side.name: [] for worker in workers}
    for repeat in range(repeats):
        for worker in workers:
            answers[worker.side.name].append(measured(worker))
            time_of_it = seconds(answers[worker.side.name][-1]["seconds"])
            progress(f"{repeat + 1} of {repeats}: {worker.side.name} {time_of_it}")
    progress("")
    return {
        name: {key: [answer[key] for answer in rows] for key in rows[0]}
        for name, rows in answers.items()
    }


def progress(text: str) -> None:
    """A line that the next one overwrites, where a person is looking."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    if len(values) == 1:
        return {"median": values[0], "low": values[0], "high": values[0]}
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high}


def ratios(ours: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    """Of the other's time to ours, pair by pair: what slows the machine down slows down both."""
    return spread([b / a for a, b in zip(ours, other, strict=True)])


class Ceilings:
    """The best matmul rates and memory traffic that either framework has shown."""

    def __init__(self, seconds: float = 0.5):
        self.seconds = seconds  # for each of them
        self.by_framework: dict[str, dict[str, float]] = {}

    def measure(self, workers: Sequence[Worker]) -> None:
        """Time one worker of each framework; of a call before and one after the better counts."""
        for worker in {worker.side.framework: worker for worker in workers}.values():
            best = self.by_framework.setdefault(worker.side.framework, {})
            for name, value in worker.call("ceilings", seconds=self.seconds).items():
                best[name] = max(value, best.get(name, 0.0))

    def best(self, *names: str) -> float:
        values = (v.get(name, 0.0) for v in self.by_framework.values() for name in names)
        return max(values, default=0.0)

    def flops(self, dtype: str) -> float:
        """Operations a second in matmuls of the dtype; float32's where bfloat16 is slower."""
        return self.best("matmul float32", f"matmul {dtype}")

    def text(self) -> str:
        return table(
            [
                {
                    "ceilings": framework,
                    "float32 TFLOP/s": f"{values['matmul float32'] / 1e12:.3f}",
                    "bfloat16 TFLOP/s": f"{values['matmul bfloat16'] / 1e12:.3f}",
                    "x += 1 GB/s": f"{values['traffic'] / 1e9:.1f}",
                }
                for framework, values in self.by_framework.items()
            ]
        )


# --- printing


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """Columns under their heads, the first to the left and the others to the right."""
    heads = list(dict.fromkeys(head for row in rows for head in row))
    widths = [max(len(head), *(len(row.get(head, "")) for row in rows)) for head in heads]

    def line(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        aligned = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
        return "  ".join(aligned).rstrip()

    body = [line([row.get(head, "") for head in heads]) for row in rows]
    return "\n".join([line(heads), line(["-" * width for width in widths]), *body])


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


def rate_cells(tokens_a_second: float, flops_a_second: float, ceiling: float) -> dict[str, str]:
    """What a step comes to; ceiling as Ceilings.flops."""
    return {
        "tokens/s": f"{tokens_a_second:,.1f}",
        "TFLOP/s": f"{flops_a_second / 1e12:.3g}",
        "MFU": f"{flops_a_second / ceiling:.1%}" if ceiling else "-",
    }


def write_json(file: Path | None, results: dict[str, Any]) -> None:
    """The results and the command that made them; nothing without a file."""
    if file:
        command = [Path(sys.argv[0]).name, *sys.argv[1:]]
        now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        file.write_text(json.dumps({"command": command, "time": now, **results}, indent=1))
