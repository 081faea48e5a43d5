"""Ours and the original's on one accelerator, within a time budget: one command, all the numbers.

    python benchmarks/device.py --against=PATH_OF_THE_ORIGINAL --json=device.json
    python benchmarks/device.py --sizes=tiny --budget=60  # the rehearsal, on a CPU

The most valuable rows come first: the device's ceilings, training at two batch sizes, sampling,
then the largest batch that fits and longer samples. Each group of rows has a process of its own,
which has the whole accelerator; a row that does not fit the budget says so. JSON is written after
every row. Columns and what is timed are those of compare.py.

The largest batch is a power of two: the first guess is a line through the peaks of the batches
before it, then it is doubled or halved until one fits and the next does not (or was not tried).
Samples are whole ones, of 128 and of 1024 steps, since a step of ours may cost less when fewer
tokens are masked. A 1024-step sample is left out where 1025 of the 128-step sample's steps would
not fit the budget: the original's steps all cost the same, so its 128-step row tells.
"""

import argparse
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import measure
from measure import Failed, Side, Task, Worker


@dataclasses.dataclass(frozen=True)
class Plan:
    """The rows of one size."""

    length: int
    batches: tuple[int, ...]  # of training; powers of two
    max_batch: int  # to try
    sample_batches: tuple[int, ...]  # the last one comes late
    steps: tuple[int, int]
    seconds: float  # of one timing

    def training(self, batches: Sequence[int]) -> list[Task]:
        return [Task("train", batch_size, self.length) for batch_size in batches]

    def sampling(self, batches: Sequence[int], steps: int) -> list[Task]:
        return [Task("sample", batch_size, self.length, steps) for batch_size in batches]


PLANS = {
    "tiny": Plan(64, (1, 2), 4, (1, 2, 4), (4, 8), 0.2),
    "small": Plan(1024, (8, 32), 1024, (1, 16, 64), (128, 1024), 1.5),
    "medium": Plan(1024, (8, 16), 512, (1, 16, 64), (128, 1024), 1.5),
}


class Bench:
    """The budget, and the rows so far."""

    def __init__(self, options: argparse.Namespace, ours: str):
        self.deadline = time.monotonic() + options.budget
        self.json, self.dtype, self.ours = options.json, options.dtype, ours
        self.ceilings = measure.Ceilings()
        self.forward_flops: dict[str, int] = {}  # of a network call for one sequence, by size
        self.rows: list[dict[str, Any]] = []

    @property
    def left(self) -> float:
        return self.deadline - time.monotonic()

    def record(self, row: dict[str, Any]) -> None:
        """Add a row, print it and write all of them."""
        self.rows.append(row)
        what = " ".join(str(row[key]) for key in ("size", "side", "kind", "batch_size"))
        if row["steps"]:
            what += f" x {row['steps']} steps"
        result = row.get("skipped") or f"{measure.seconds(row['seconds'])} a step"
        print(f"[{self.left:4.0f} s left] {what}: {result}", flush=True)
        results = {"dtype": self.dtype, "matmul_rates": self.ceilings.by_kind}
        measure.write_json(self.json, results | {"rows": self.rows})

    def measured(self, **values: Any) -> Iterator[dict[str, Any]]:
        """The rows with these values that were not skipped."""
        for row in self.rows:
            if "skipped" not in row and all(row[key] == value for key, value in values.items()):
                yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", default="small", help=f"of {', '.join(PLANS)}, commas between")
    parser.add_argument("--budget", type=float, default=460.0, help="seconds for all of it")
    parser.add_argument("--dtype", default="bfloat16", choices=measure.SHORT)
    measure.add_sides(parser)
    options = parser.parse_args()
    unknown = set(options.sizes.split(",")) - set(PLANS)
    if unknown:
        raise SystemExit(f"unknown size {', '.join(unknown)}; known: {', '.join(PLANS)}")
    whole = (("XLA_PYTHON_CLIENT_PREALLOCATE", "true"), ("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95"))
    sides = [
        dataclasses.replace(side, environment=whole)
        for side in measure.sides_of(options)
        if side.kind == "ours" or side.compiled == options.compile
    ]
    bench = Bench(options, sides[0].name)
    print(f"sides: {', '.join(side.name for side in sides)}; {options.budget:.0f} s", flush=True)
    for name in options.sizes.split(","):
        measure_size(bench, name, sides)
    print(tables(bench))


def measure_size(bench: Bench, name: str, sides: list[Side]) -> None:
    """Every group of rows of a size, for one side after the other."""
    plan = PLANS[name]
    *early, late = plan.sample_batches

    def samples(batches: Sequence[int], steps: int) -> Callable[[Side], Any]:
        return lambda side: measure_rows(bench, name, side, plan.sampling(batches, steps))

    groups = (
        lambda side: measure_rows(bench, name, side, plan.training(plan.batches)),
        samples(early, plan.steps[0]),
        lambda side: measure_largest(bench, name, side),
        samples([late], plan.steps[0]),
        samples(plan.sample_batches, plan.steps[1]),
    )
    for group in groups:
        for side in sides:
            group(side)


def measure_rows(bench: Bench, name: str, side: Side, tasks: Sequence[Task]) -> bool:
    """A row for each task in one process, until one fails; whether the last one did not."""
    with Worker(side, measure.SIZES[name], bench.deadline) as worker:
        for task in tasks:
            row = {"size": name, "side": side.name, **dataclasses.asdict(task)}
            try:
                if side.kind == "ours" and name not in bench.forward_flops:
                    bench.forward_flops[name] = worker.call("forward_flops", length=task.length)
                if side.kind not in bench.ceilings.by_kind:
                    bench.ceilings.measure([worker])
                bench.record(row | (_too_long(bench, row) or _times(bench, worker, name, task)))
            except Failed as error:
                bench.record(row | {"skipped": str(error) if bench.left > 0.0 else "no time left"})
                if str(error) != "out of memory":
                    break
    return "skipped" not in bench.rows[-1]


def _too_long(bench: Bench, row: dict[str, Any]) -> dict[str, str]:
    """Why a sample is skipped that is longer than one already measured; empty if it is not."""
    few, steps = PLANS[row["size"]].steps[0], row["steps"]
    if steps <= few:
        return {}
    short = next(bench.measured(**row | {"steps": few}), None)
    if short is None:
        return {"skipped": f"no row of {few} steps"}
    if short["seconds"] * (steps + 1) > bench.left:
        return {"skipped": f"no time for {steps} steps"}
    return {}


def _times(bench: Bench, worker: Worker, name: str, task: Task) -> dict[str, Any]:
    """The numbers of a row: the median of at most 3 timings, of samples only while time is left."""
    least = PLANS[name].seconds
    worker.call("forget_memory")
    about = task.start(worker)
    count = task.count(worker, least)
    limit = least if task.steps else math.inf
    times = measure.interleave([worker], lambda worker: task.timed(worker, count), 3, limit)
    turns, compiles = (times[worker.side.name][key] for key in ("seconds", "compiles"))
    seconds = measure.spread(turns)["median"]
    rates = task.rates(seconds, bench.forward_flops.get(name, 0.0))
    numbers = {"seconds": seconds, "turns": turns, "compiles": sum(compiles)}
    return about | numbers | rates | {"peak_bytes": worker.call("memory")["peak"]}


def measure_largest(bench: Bench, name: str, side: Side) -> None:
    """Rows of larger training batches, until one fits and its double does not."""
    plan = PLANS[name]
    known = list(bench.measured(size=name, side=side.name, kind="train"))
    if not known:
        return
    first, last = known[0], known[-1]
    batch_size = 2 * last["batch_size"]
    if last.get("memory") and len(known) > 1:
        added = last["batch_size"] - first["batch_size"]
        a_row = max((last["peak_bytes"] - first["peak_bytes"]) / added, 1.0)
        rows = (last["memory"] - first["peak_bytes"]) / a_row + first["batch_size"]
        batch_size = max(batch_size, 2 ** int(math.log2(max(rows, 1.0))))
    batch_size = min(batch_size, plan.max_batch)
    tried = {row["batch_size"]: True for row in known}
    while batch_size not in tried and batch_size <= plan.max_batch and bench.left > 0.0:
        fits = measure_rows(bench, name, side, plan.training([batch_size]))
        tried[batch_size] = fits
        batch_size = 2 * batch_size if fits else batch_size // 2


def tables(bench: Bench) -> str:
    """Training, sampling and the ceilings."""
    devices, frameworks = (
        ", ".join(dict.fromkeys(row[key] for row in bench.measured()))
        for key in ("device", "framework")
    )
    parts = [f"\n{devices}; {frameworks}; {bench.dtype}"]
    for kind in ("train", "sample"):
        rows = [row for row in bench.rows if row["kind"] == kind]
        rows.sort(key=lambda row: (row["size"], row["steps"]))
        if rows:
            parts.append(measure.table([_cells(bench, row) for row in rows]))
    return "\n\n".join([*parts, bench.ceilings.table()])


def _cells(bench: Bench, row: dict[str, Any]) -> dict[str, str]:
    task = {key: row[key] for key in ("size", "kind", "batch_size", "steps")}
    cells = {"sampling" if row["steps"] else "training": f"{row['size']} {row['side']}"}
    cells["batch"] = str(row["batch_size"])
    if row["steps"]:
        cells["steps"] = str(row["steps"])
    if "skipped" in row:
        return cells | {"a step": row["skipped"]}
    ours = next(bench.measured(**task, side=bench.ours), None)
    sheet = max(other.get("sheet_flops") or 0.0 for other in bench.measured())
    cells["a step"] = measure.seconds(row["seconds"])
    cells["to ours"] = f"{row['seconds'] / ours['seconds']:.2f}" if ours else "-"
    mfu = row["flops_per_second"] / bench.ceilings.flops(bench.dtype)
    cells |= measure.rate_cells(row | {"mfu": mfu})
    if sheet and bench.dtype == "bfloat16":
        cells["of data sheet"] = f"{row['flops_per_second'] / sheet:.1%}"
    cells["peak"] = measure.bytes_of(row["peak_bytes"])
    if row["compiles"]:
        cells["compiled"] = f"{row['compiles']} times"
    return cells


if __name__ == "__main__":
    main()
