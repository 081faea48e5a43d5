"""Ours and the original's on one accelerator, within a time budget: one command, all the numbers.

    python benchmarks/device.py --against=PATH_OF_THE_ORIGINAL --json=device.json
    python benchmarks/device.py --size=tiny --budget=60  # the rehearsal, on a CPU

The most valuable rows come first: the device's ceilings and a usual training batch, of the original
under torch.compile too (unless --no-compile), then sampling, each with where our time goes, and a
small and a large batch. Each group of rows has a process of its own, which has the whole
accelerator; a row that fails, lasts longer than its limit or does not fit the budget says so, and
the next one follows. JSON is written after every row. Columns and what is timed are those of
compare.py.

Where the time goes is of one profile of a few steps, or of a sample, by the names of the device's
kernels (device_time.py): milliseconds of a step or a network call. Of a CPU they are of all its
threads.
"""

import argparse
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import device_time
import measure
from measure import Failed, Side, Task, Worker


@dataclasses.dataclass(frozen=True)
class Plan:
    """The rows of one size."""

    length: int
    batch: int
    other_batches: tuple[int, ...]
    sample_batches: tuple[int, ...]  # all but the last one are profiled too
    steps: int  # of a sample
    seconds: float  # of one timing
    limit: float = 150.0  # seconds of one row

    def training(self, batch_size: int) -> Task:
        return Task("train", batch_size, self.length)


PLANS = {
    "tiny": Plan(64, 2, (1, 4), (1, 2, 4), 4, 0.2),
    "small": Plan(1024, 32, (8, 128), (1, 16, 64), 64, 1.5),
    "medium": Plan(1024, 16, (8, 64), (1, 16, 64), 64, 1.5),
}


class Bench:
    """The plan, its budget, and the rows so far."""

    def __init__(self, options: argparse.Namespace, ours: str):
        self.name, self.plan = options.size, PLANS[options.size]
        self.deadline = time.monotonic() + options.budget
        self.json, self.dtype, self.ours = options.json, options.dtype, ours
        self.ceilings = measure.Ceilings()
        self.forward_flops = math.nan  # of a network call for one sequence
        self.rows: list[dict[str, Any]] = []
        self.profiled: set[Task] = set()  # of ours

    @property
    def left(self) -> float:
        return self.deadline - time.monotonic()

    def record(self, row: dict[str, Any]) -> None:
        """Add a row, print it and write all of them."""
        self.rows.append(row)
        steps = f" x {row['steps']} steps" if row["steps"] else ""
        numbers = device_time.cells(row) if row["profiled"] else _cells(self, row)
        result = row.get("skipped") or ", ".join(f"{k} {v}" for k, v in numbers.items())
        what = f"{row['side']} {row['kind']} {row['batch_size']}{steps}"
        print(f"[{self.left:4.0f} s left] {what}: {result}", flush=True)
        results = {"size": self.name, "dtype": self.dtype, "matmul_rates": self.ceilings.by_kind}
        measure.write_json(self.json, results | {"rows": self.rows})

    def measured(self, **values: Any) -> list[dict[str, Any]]:
        """The timed rows with these values that were not skipped."""
        rows = [row for row in self.rows if "skipped" not in row and not row["profiled"]]
        return [row for row in rows if all(row[key] == value for key, value in values.items())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", default="small", choices=PLANS)
    parser.add_argument("--budget", type=float, default=460.0, help="seconds for all of it")
    parser.add_argument("--dtype", default="bfloat16", choices=measure.SHORT)
    measure.add_sides(parser)
    parser.set_defaults(compile=True)
    options = parser.parse_args()
    whole = (("XLA_PYTHON_CLIENT_PREALLOCATE", "true"), ("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95"))
    sides = [dataclasses.replace(side, environment=whole) for side in measure.sides_of(options)]
    bench = Bench(options, sides[0].name)
    print(f"sides: {', '.join(side.name for side in sides)}; {options.budget:.0f} s", flush=True)
    measure_all(bench, sides)
    print(tables(bench))


def measure_all(bench: Bench, sides: list[Side]) -> None:
    """Every group of rows, for one side after the other."""
    plan = bench.plan
    not_compiled = [side for side in sides if not side.compiled]
    usual, *others = map(plan.training, (plan.batch, *plan.other_batches))
    samples = [Task("sample", size, plan.length, plan.steps) for size in plan.sample_batches]
    bench.profiled = {usual, *samples[:-1]}
    for of, tasks in ((sides, [usual]), (not_compiled, samples), (sides, others)):
        for side in of:
            measure_rows(bench, side, tasks)


def measure_rows(bench: Bench, side: Side, tasks: Sequence[Task]) -> None:
    """A row for each task, in one process as long as none fails."""
    rest = list(tasks)
    while rest:
        with Worker(side.doing(rest[0].kind), measure.SIZES[bench.name]) as worker:
            done = True
            while rest and done:
                task = rest.pop(0)
                done = measure_row(bench, worker, task, _times)
                if done and side.kind == "ours" and task in bench.profiled:
                    done = measure_row(bench, worker, task, _profile)


def measure_row(bench: Bench, worker: Worker, task: Task, numbers: Callable) -> bool:
    """A row of numbers(bench, worker, task), or of why there are none; whether there are."""
    row = {"side": worker.side.name, "profiled": numbers is _profile, **dataclasses.asdict(task)}
    worker.deadline = min(bench.deadline, time.monotonic() + bench.plan.limit)
    try:
        if math.isnan(bench.forward_flops) and worker.side.kind == "ours":
            bench.forward_flops = worker.call("forward_flops", length=task.length)
        if worker.side.kind not in bench.ceilings.by_kind:
            bench.ceilings.measure([worker])
        row |= numbers(bench, worker, task)
    except Failed as error:
        row["skipped"] = str(error) if bench.left > 0.0 else "no time left"
    bench.record(row)
    return "skipped" not in row


def _times(bench: Bench, worker: Worker, task: Task) -> dict[str, Any]:
    """The numbers of a row: the median of at most 3 timings, of samples only while time is left."""
    least = bench.plan.seconds
    worker.call("forget_memory")
    about = task.start(worker)
    count = task.count(worker, least)
    limit = least if task.steps else math.inf
    times = measure.interleave([worker], lambda worker: task.timed(worker, count), 3, limit)
    turns, compiles = (times[worker.side.name][key] for key in ("seconds", "compiles"))
    seconds = measure.spread(turns)["median"]
    rates = task.rates(seconds, bench.forward_flops)
    numbers = {"seconds": seconds, "turns": turns, "compiles": sum(compiles)}
    return about | numbers | rates | {"peak_bytes": worker.call("peak")}


def _profile(_: Bench, worker: Worker, task: Task) -> dict[str, Any]:
    """Where the time of what was timed last goes."""
    return worker.call("profile", kind=task.kind, steps=task.steps or 3)


def tables(bench: Bench) -> str:
    """Training, sampling, where the time goes, and the ceilings."""
    devices, frameworks = (
        ", ".join(dict.fromkeys(row[key] for row in bench.measured()))
        for key in ("device", "framework")
    )
    parts = [f"\n{bench.name}; {devices}; {frameworks}; {bench.dtype}"]
    heads = {"train": "training", "sample": "sampling", "profile": "where the time goes, ms"}
    for kind, head in heads.items():
        rows = [
            row for row in bench.rows if kind == ("profile" if row["profiled"] else row["kind"])
        ]
        cells = device_time.cells if kind == "profile" else functools.partial(_cells, bench)
        what = "{side} {kind}" if kind == "profile" else "{side}"
        table = [
            {head: what.format(**row), "batch": str(row["batch_size"]), **cells(row)}
            for row in rows
        ]
        parts.append(measure.table(table))
    return "\n\n".join([*filter(None, parts), bench.ceilings.table()])


def _cells(bench: Bench, row: dict[str, Any]) -> dict[str, str]:
    if "skipped" in row:
        return {"a step": row["skipped"]}
    task = {key: row[key] for key in ("kind", "batch_size", "steps")}
    ours = [other["seconds"] for other in bench.measured(**task, side=bench.ours)]
    cells = {"a step": measure.seconds(row["seconds"])}
    cells["to ours"] = f"{row['seconds'] / ours[0]:.2f}" if ours else "-"
    mfu = row["flops_per_second"] / bench.ceilings.flops(bench.dtype)
    cells |= measure.rate_cells(row | {"mfu": mfu})
    cells["peak"] = measure.bytes_of(row["peak_bytes"])
    if row["compiles"]:
        cells["compiled"] = f"{row['compiles']} times"
    return cells


if __name__ == "__main__":
    main()
