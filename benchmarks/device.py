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
import json
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import measure
from measure import Failed, Side, Worker


@dataclasses.dataclass(frozen=True)
class Plan:
    """The rows of one size."""

    length: int
    batches: tuple[int, ...]  # of training
    max_batch: int  # to try
    sample_batches: tuple[int, ...]  # the last one comes late
    steps: tuple[int, int]
    seconds: float  # of one timing


PLANS = {
    "tiny": Plan(64, (1, 2), 4, (1, 2, 4), (4, 8), 0.2),
    "small": Plan(1024, (8, 32), 1024, (1, 16, 64), (128, 1024), 1.5),
    "medium": Plan(1024, (8, 16), 512, (1, 16, 64), (128, 1024), 1.5),
}


class Bench:
    """The budget, and the rows so far."""

    def __init__(self, options: argparse.Namespace):
        self.deadline = time.monotonic() + options.budget
        self.json, self.dtype = options.json, options.dtype
        self.ceilings = measure.Ceilings()
        self.about: dict[str, Any] = {}
        self.flops: dict[str, int] = {}  # of a network call for one sequence, by size
        self.rows: list[dict[str, Any]] = []

    @property
    def left(self) -> float:
        return self.deadline - time.monotonic()

    def call(self, worker: Worker, name: str, **arguments: Any) -> Any:
        """A worker's call that ends with the budget."""
        if self.left > 0.0:
            try:
                return worker.call(name, timeout=self.left, **arguments)
            except Failed:
                if self.left > 0.0:
                    raise
        raise Failed("no time left")

    def record(self, row: dict[str, Any]) -> None:
        """Add a row, print it and write all of them."""
        self.rows.append(row)
        what = " ".join(str(row[key]) for key in ("size", "side", "task", "batch_size"))
        if "steps" in row:
            what += f" x {row['steps']} steps"
        result = row.get("skipped") or f"{measure.seconds(row['seconds'])} a step"
        print(f"[{self.left:4.0f} s left] {what}: {result}", flush=True)
        if self.json:
            results = {"about": self.about, "dtype": self.dtype}
            results |= {"ceilings": self.ceilings.by_framework, "rows": self.rows}
            self.json.write_text(json.dumps(results, indent=1))

    def measured(self, **values: Any) -> Iterator[dict[str, Any]]:
        """The rows with these values that were not skipped."""
        for row in self.rows:
            if "skipped" not in row and all(row.get(k) == v for k, v in values.items()):
                yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", default="small", help=f"of {', '.join(PLANS)}, commas between")
    parser.add_argument("--budget", type=float, default=460.0, help="seconds for all of it")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    measure.add_sides(parser)
    options = parser.parse_args()
    unknown = set(options.sizes.split(",")) - set(PLANS)
    if unknown:
        raise SystemExit(f"unknown size {', '.join(unknown)}; known: {', '.join(PLANS)}")
    bench = Bench(options)
    whole = (("XLA_PYTHON_CLIENT_PREALLOCATE", "true"), ("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95"))
    sides = [
        dataclasses.replace(side, environment=whole + side.environment)
        for side in measure.sides_of(options)
        if side.kind == "ours" or side.compiled == options.compile
    ]
    print(f"sides: {', '.join(side.name for side in sides)}; {options.budget:.0f} s", flush=True)
    for name in options.sizes.split(","):
        measure_size(bench, name, sides)
    print(tables(bench, [side.name for side in sides]))


def measure_size(bench: Bench, name: str, sides: list[Side]) -> None:
    """Every group of rows of a size, for one side after the other."""
    plan = PLANS[name]
    few, many = plan.steps
    *early, late = plan.sample_batches
    groups = (
        lambda side: measure_rows(bench, name, side, plan.batches),
        lambda side: measure_rows(bench, name, side, early, few),
        lambda side: measure_largest(bench, name, side),
        lambda side: measure_rows(bench, name, side, [late], few),
        lambda side: measure_rows(bench, name, side, plan.sample_batches, many),
    )
    for group in groups:
        for side in sides:
            group(side)


def open_worker(bench: Bench, name: str, side: Side) -> Worker:
    """The side's process; at its first start also the device and its ceilings."""
    worker = Worker(side, measure.SIZES[name])
    if bench.left > 0.0 and side.name not in bench.about:
        bench.about[side.name] = bench.call(worker, "about")
        if side.framework not in bench.ceilings.by_framework:
            bench.ceilings.by_framework[side.framework] = bench.call(worker, "ceilings")
    if bench.left > 0.0 and side.kind == "ours" and name not in bench.flops:
        length = PLANS[name].length
        bench.flops[name] = bench.call(worker, "forward_flops", length=length)
    return worker


def measure_rows(
    bench: Bench, name: str, side: Side, batches: Sequence[int], steps: int | None = None
) -> bool:
    """A row for each batch size, ascending; whether the last one fitted.

    Of training, or of whole samples of so many steps.
    """
    row = {"size": name, "side": side.name, "task": "train"}
    if steps:
        row |= {"task": "sample", "steps": steps}
    fits = False
    try:
        with open_worker(bench, name, side) as worker:
            for batch_size in batches:
                row["batch_size"] = batch_size
                numbers = _too_long(bench, row) or _measure_row(bench, worker, row)
                fits = "skipped" not in numbers
                bench.record(row | numbers)
    except Failed as error:
        fits = False
        bench.record({"batch_size": "", **row, "skipped": str(error)})
    return fits


def _too_long(bench: Bench, row: dict[str, Any]) -> dict[str, str]:
    """Why a sample is skipped that is longer than one already measured; empty if it is not."""
    few, steps = PLANS[row["size"]].steps[0], row.get("steps", 0)
    if steps <= few:
        return {}
    short = next(bench.measured(**{**row, "steps": few}), None)
    if short is None:
        return {"skipped": f"no row of {few} steps"}
    if short["seconds"] * (steps + 1) > bench.left:
        return {"skipped": f"no time for {steps} steps"}
    return {}


def _measure_row(bench: Bench, worker: Worker, row: dict[str, Any]) -> dict[str, Any]:
    """The numbers of a row, or that the device's memory did not suffice."""
    try:
        return _times(bench, worker, row)
    except Failed as error:
        if str(error) != "out of memory":
            raise
        return {"skipped": str(error)}


def _times(bench: Bench, worker: Worker, row: dict[str, Any]) -> dict[str, Any]:
    plan, flops = PLANS[row["size"]], bench.flops.get(row["size"], 0) * row["batch_size"]
    batch = {"batch_size": row["batch_size"], "length": plan.length}
    tokens = math.prod(batch.values())
    bench.call(worker, "forget_memory")
    if row["task"] == "train":
        about = bench.call(worker, "start_training", **batch)
        bench.call(worker, "train", steps=1)
        one = bench.call(worker, "train", steps=1)["seconds"]
        calls = steps = max(1, math.ceil(plan.seconds / one))
        flops, limit = 3 * flops, math.inf
    else:
        steps, limit = row["steps"], plan.seconds
        about = bench.call(worker, "start_sampling", **batch, steps=min(steps, plan.steps[0]))
        calls = steps + 1  # of the network
        tokens /= calls
    turns: list[float] = []
    while len(turns) < 3 and sum(turns) * calls < limit:
        answer = bench.call(worker, row["task"], steps=steps)
        turns.append(answer["seconds"] / calls)
    seconds = statistics.median(turns)
    numbers = {
        "seconds": seconds,
        "turns": turns,
        "tokens_a_second": tokens / seconds,
        "flops_a_second": flops / seconds,
        "compiles": answer["compiles"],
        "peak_bytes": bench.call(worker, "memory")["peak"],
    }
    if row["task"] == "sample":
        numbers |= {"steps_a_second": 1.0 / seconds, "masked": answer["masked"]}
    return numbers | about


def measure_largest(bench: Bench, name: str, side: Side) -> None:
    """Rows of larger training batches, until one fits and its double does not."""
    plan = PLANS[name]
    known = list(bench.measured(size=name, side=side.name, task="train"))
    if not known:
        return
    smallest, largest = known[0], known[-1]
    batch_size = 2 * largest["batch_size"]
    memory = bench.about[side.name].get("memory")
    if memory and len(known) > 1:
        added = largest["batch_size"] - smallest["batch_size"]
        a_row = max((largest["peak_bytes"] - smallest["peak_bytes"]) / added, 1.0)
        rows = (memory - smallest["peak_bytes"]) / a_row + smallest["batch_size"]
        batch_size = max(batch_size, 2 ** int(math.log2(max(rows, 1.0))))
    batch_size = min(batch_size, plan.max_batch)
    fits = measure_rows(bench, name, side, [batch_size])
    growing = fits  # doubled until one does not fit, or halved until one does
    while fits == growing and bench.left > 0.0:
        batch_size = 2 * batch_size if growing else batch_size // 2
        if not largest["batch_size"] < batch_size <= plan.max_batch:
            return
        fits = measure_rows(bench, name, side, [batch_size])


def tables(bench: Bench, names: list[str]) -> str:
    """Training, sampling and the ceilings."""
    rate = bench.ceilings.flops(bench.dtype) if bench.ceilings.by_framework else 0.0
    devices = {about["device"] for about in bench.about.values()}
    frameworks = dict.fromkeys(about["framework"] for about in bench.about.values())
    parts = [f"\n{', '.join(devices)}; {', '.join(frameworks)}; {bench.dtype}"]
    for task in ("train", "sample"):
        rows = [row for row in bench.rows if row["task"] == task]
        rows.sort(key=lambda row: (row["size"], row.get("steps", 0)))
        cells = [_cells(bench, row, rate, names[0]) for row in rows]
        if cells:
            parts.append(measure.table(cells))
    if bench.ceilings.by_framework:
        parts.append(bench.ceilings.text())
    return "\n\n".join(parts)


def _cells(bench: Bench, row: dict[str, Any], rate: float, ours: str) -> dict[str, str]:
    cells = {
        "training" if row["task"] == "train" else "sampling": f"{row['size']} {row['side']}",
        "batch": str(row["batch_size"]),
    }
    if row["task"] == "sample":
        cells["steps"] = str(row["steps"])
    if "skipped" in row:
        return cells | {"a step": row["skipped"]}
    same = {key: row[key] for key in ("size", "task", "batch_size", "steps") if key in row}
    base = next(bench.measured(side=ours, **same), None)
    sheet = max((about.get("sheet_flops") or 0.0 for about in bench.about.values()), default=0.0)
    cells["a step"] = measure.seconds(row["seconds"])
    cells["to ours"] = f"{row['seconds'] / base['seconds']:.2f}" if base else "-"
    if row["task"] == "sample":
        cells["steps/s"] = f"{row['steps_a_second']:.4g}"
    cells |= measure.rate_cells(row["tokens_a_second"], row["flops_a_second"], rate)
    if sheet and bench.dtype == "bfloat16":
        cells["of data sheet"] = f"{row['flops_a_second'] / sheet:.1%}"
    cells["peak"] = measure.bytes_of(row["peak_bytes"])
    if row["compiles"]:
        cells["compiled"] = f"{row['compiles']} times"
    return cells


if __name__ == "__main__":
    main()
