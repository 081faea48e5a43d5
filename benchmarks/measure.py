"""What the speed and memory benchmarks share: sizes, sides, their processes, statistics, tables.

Imports nothing but the standard library: the frameworks live in the processes of the sides. A
side is one of the programs that are compared - this checkout, another one of ours, the original -
in a process of its own (worker.py), which computes only when it is told to over a pipe. So one
side runs at a time, A B A B, each with its own threads, allocator and peak of memory, and torch
and jax never meet in one process.
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
GIB = 2**30
MIB = 2**20


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

    @property
    def parameters(self) -> int:
        """Of the absorbing graph's network, whose states are the clean tokens and MASK."""
        h, c, states = self.hidden_size, self.cond_dim, self.vocab_size + 1
        block = 12 * h * h + 7 * h + 6 * h * (c + 1)  # products; biases and norms; modulation
        noise = 257 * c + (c + 1) * c
        return self.blocks * block + noise + h + 2 * h * (c + 1) + (2 * h + 1) * states

    def forward_flops(self, batch_size: int, length: int) -> int:
        """Of the matrix products of one network call, every logit of every position included.

        The model's work, whoever does it: a side that leaves out what nobody asks for is credited
        with it, and one that makes things again is not (Chowdhery et al. 2022, appendix B).
        """
        h, c, states = self.hidden_size, self.cond_dim, self.vocab_size + 1
        a_token = self.blocks * (12 * h * h + 2 * length * h) + h * states
        a_row = 256 * c + c * c + (6 * self.blocks + 2) * h * c
        return 2 * batch_size * (length * a_token + a_row)

    def training_flops(self, batch_size: int, length: int) -> int:
        """Of one training step: the backward pass has two products for each of the forward's."""
        return 3 * self.forward_flops(batch_size, length)


SIZES = {
    "tiny": Size(27, 256, 4, 4, 128, 256, 16, 256, 16),  # text8's characters; 4.1 M parameters
    "small": Size(50257, 768, 12, 12, 128, 128, 4, 256, 1),  # 169.6 M
    "medium": Size(50257, 1024, 24, 16, 128, 128, 2, 256, 1),  # 424.2 M
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
    """A side could not do what it was told; the message fits a table."""


class Worker:
    """The process of a side: `worker.call("train", steps=3)`."""

    def __init__(self, side: Side, size: Size):
        self.side = side
        self._folder = tempfile.TemporaryDirectory()
        self._errors = Path(self._folder.name) / "stderr"
        spec = json.dumps({"side": dataclasses.asdict(side), "size": dataclasses.asdict(size)})
        environment = {
            # Rows of one table share an accelerator: none may take it all.
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            # Huge pages for a CPU's buffers, see launch/environment.sh; they help torch too.
            "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
            "PYTHONDONTWRITEBYTECODE": "1",  # the original's folder stays as it is
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
        try:
            self._process.stdin.write(json.dumps({"call": name, "arguments": arguments}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the empty answer says so below
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


def parser_of(documentation: str) -> argparse.ArgumentParser:
    """The options that all of these benchmarks have."""
    parser = argparse.ArgumentParser(description=documentation.split("\n")[0])
    parser.add_argument("--size", default="tiny", choices=SIZES)
    for field in dataclasses.fields(Size):
        parser.add_argument(f"--{field.name}", type=type(getattr(SIZES["tiny"], field.name)))
    parser.add_argument("--against", type=Path, help="a folder with the original's code")
    parser.add_argument("--before", type=Path, help="another checkout of ours")
    parser.add_argument("--dtype", default="float32", help="float32, bfloat16, or float32,bfloat16")
    parser.add_argument("--compile", action="store_true", help="the original compiled as well")
    parser.add_argument("--cores", type=int, default=0, help="of a CPU, for each side; 0: all")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of ours")
    parser.add_argument(
        "--env",
        action="append",
        default=[],
        metavar="SIDE:NAME=VALUE",
        help="an environment variable of the sides whose name begins so",
    )
    parser.add_argument("--json", type=Path)
    return parser


def size_of(options: argparse.Namespace) -> Size:
    """The named size with the options' changes."""
    fields = (field.name for field in dataclasses.fields(Size))
    given = {name: getattr(options, name) for name in fields if getattr(options, name) is not None}
    return dataclasses.replace(SIZES[options.size], **given)


def sides_of(options: argparse.Namespace) -> list[Side]:
    """Ours first; ratios are to it."""
    values = tuple(_value(text) for text in options.set)
    found = []
    for dtype in options.dtype.split(","):
        if dtype not in ("float32", "bfloat16"):
            raise SystemExit(f"unknown dtype {dtype!r}; known: float32, bfloat16")
        short = {"float32": "f32", "bfloat16": "bf16"}[dtype]
        found.append(Side(f"ours {short}", "ours", str(REPOSITORY), dtype, values=values))
        if options.before:
            path = str(options.before.resolve())
            found.append(Side(f"before {short}", "ours", path, dtype, values=values))
        if options.against:
            path = str(options.against.resolve())
            found.append(Side(f"original {short}", "original", path, dtype))
            if options.compile:
                name = f"original compiled {short}"
                found.append(Side(name, "original", path, dtype, compiled=True))
    return [
        dataclasses.replace(side, cores=options.cores, environment=_environment(side, options))
        for side in found
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


def _environment(side: Side, options: argparse.Namespace) -> tuple[tuple[str, str], ...]:
    pairs = []
    for text in options.env:
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
    """A worker for each side, after that call, and what it and `about` told, by name."""
    with contextlib.ExitStack() as stack:
        workers, told = [], {}
        for side in sides:
            progress(f"{side.name}: starting")
            worker = stack.enter_context(Worker(side, size))
            told[side.name] = worker.call("about") | worker.call(call, **arguments)
            workers.append(worker)
        yield workers, told


def interleave(
    workers: Sequence[Worker], turn: Callable[[Worker], dict[str, float]], repeats: int
) -> dict[str, dict[str, list[float]]]:
    """`repeats` turns of each worker, one after the other, A B A B; what they told, by name."""
    found = {worker.side.name: [] for worker in workers}
    for repeat in range(repeats):
        for worker in workers:
            found[worker.side.name].append(turn(worker))
            told = f"{worker.side.name} {seconds(found[worker.side.name][-1]['seconds'])}"
            progress(f"turn {repeat + 1} of {repeats}: {told}")
    progress("")
    return {
        name: {key: [one[key] for one in turns] for key in turns[0]}
        for name, turns in found.items()
    }


def compared(
    side: Side,
    found: Mapping[str, list[float]],
    ours: Mapping[str, list[float]],
    flops: float,
    ceiling: float,
) -> tuple[dict[str, Any], dict[str, str]]:
    """A side's times of a step beside ours: the numbers for --json, the cells for the table.

    flops are the model's in a step, ceiling what the device can do in a second.
    """
    s, ratio = spread(found["seconds"]), ratios(ours["seconds"], found["seconds"])
    cpu, cpu_ratio = spread(found["cpu_seconds"]), ratios(ours["cpu_seconds"], found["cpu_seconds"])
    rate = flops / s["median"]
    numbers = {
        "name": side.name,
        "dtype": side.dtype,
        "cores": side.cores,
        **found,
        "spread": s,
        "to_ours": ratio,
        "cpu_spread": cpu,
        "cpu_to_ours": cpu_ratio,
        "flops_a_second": rate,
        "mfu": rate / ceiling,
    }
    cells = {
        "median": seconds(s["median"]),
        "quartiles": f"{seconds(s['low'])} .. {seconds(s['high'])}",
        "to ours": f"{ratio['median']:.2f} ({ratio['low']:.2f}..{ratio['high']:.2f})",
        "CPU": seconds(cpu["median"]),
        "CPU to ours": f"{cpu_ratio['median']:.2f}",
        "TFLOP/s": f"{rate / 1e12:.3g}",
        "MFU": f"{rate / ceiling:.1%}",
    }
    return numbers, cells


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
    """Of the other's time to ours, turn by turn: what slows the machine down slows down both."""
    return spread([b / a for a, b in zip(ours, other, strict=True)])


class Ceilings:
    """The best matrix-product rates and memory traffic that either framework has shown."""

    def __init__(self, seconds: float = 0.5):
        self.seconds = seconds  # for each of them
        self.found: dict[str, dict[str, float]] = {}

    def measure(self, workers: Sequence[Worker]) -> None:
        """Ask one worker of each framework; called before and after, the better one stays."""
        for worker in {worker.side.framework: worker for worker in workers}.values():
            before = self.found.setdefault(worker.side.framework, {})
            for name, value in worker.call("ceilings", seconds=self.seconds).items():
                before[name] = max(value, before.get(name, 0.0))

    def best(self, name: str) -> float:
        return max((values.get(name, 0.0) for values in self.found.values()), default=0.0)

    def flops(self, dtype: str) -> float:
        """Operations a second in products of the dtype; float32's where bfloat16 is slower."""
        rates = [self.best(f"matmul {dtype}"), self.best("matmul float32")]
        return rates[0] if dtype == "float32" else max(rates)

    def text(self) -> str:
        rows = []
        for framework, values in self.found.items():
            rows.append(
                {
                    "ceilings": framework,
                    "float32 TFLOP/s": f"{values['matmul float32'] / 1e12:.3f}",
                    "bfloat16 TFLOP/s": f"{values['matmul bfloat16'] / 1e12:.3f}",
                    "x += 1 GB/s": f"{values['traffic'] / 1e9:.1f}",
                }
            )
        return table(rows)


# --- telling


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


def report(benchmark: str, options: argparse.Namespace, size: Size, found: dict[str, Any]) -> dict:
    """What --json keeps of a benchmark; written if it was asked for."""
    result = {
        "benchmark": benchmark,
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "size": dataclasses.asdict(size) | {"parameters": size.parameters},
        **found,
    }
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))
    return result
