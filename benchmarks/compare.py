"""Ours beside the original or another checkout of ours: time of a step or a sample, or memory.

    python benchmarks/compare.py --what=step --size=tiny --against=PATH_OF_THE_ORIGINAL [--compile]
    python benchmarks/compare.py --what=step --before=ANOTHER_CHECKOUT --cores=1
    python benchmarks/compare.py --what=sample --size=small --steps=32 --dtype=float32,bfloat16
    python benchmarks/compare.py --what=memory --size=small --set model.remat=blocks

step: forward, backward, gradient clip, AdamW and the moving average, on a batch that is there
already; the original's is its own losses.get_step_fn. Timed are as many steps as --seconds hold,
dispatched together.

sample: a whole sample, from all-MASK through --steps reverse steps (Tweedie, the original's
"analytic") to the denoised tokens on the host, divided by steps + 1, the network calls: what a
step costs may depend on how many tokens are still masked, so no part of a sample stands for the
whole. Ours is SEDD.sample_tokens with its exact draw, the original's its get_pc_sampler with its
float32 draw. Weights are random, head and modulation too.

The sides take turns, --repeats times. Quartiles are over the repeats; `to ours` is the median over
them of the ratio to ours in the same repeat, above 1 where ours is faster. `CPU` is the time that
the side's process computed, on all cores: on a CPU that others use too, compare that, and with
--cores=1, where no thread waits for another. `compiled` says if anything compiled meanwhile.

MFU counts the model's matmuls with every logit of every position, whoever leaves some out or
recomputes some (Chowdhery et al. 2022, appendix B), against the fastest large matmul that either
framework has shown in this run.

memory: the peak of a training step and of a sample, each in a fresh process. On a CPU: what the
process held at most, beyond what it held after its imports (resident memory, so freed memory that
the allocator keeps counts). On an accelerator: the peak of the framework's allocator. `first` is
the peak up to the end of the first step or sample, compiling included, and `later` that of --steps
steps, or another sample, after it; jax's device allocator cannot forget a peak, there `later` is
`first` or more. `state` is arithmetic: weights, two moments, moving average; `as compiled` are the
temporaries that XLA has planned, for ours alone.
"""

import argparse
import contextlib
import dataclasses
from typing import Any

import measure
from measure import Failed, Side, Size, Task, Worker, bytes_of, ratios, seconds, spread


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--what", default="step", choices=WHAT)
    parser.add_argument("--size", default="tiny", choices=measure.SIZES)
    for field in dataclasses.fields(Size):
        parser.add_argument(f"--{field.name}", type=field.type)
    measure.add_sides(parser)
    parser.add_argument("--dtype", default="float32", help="float32, bfloat16, or float32,bfloat16")
    parser.add_argument("--repeats", type=int, help="of each side; 10 of steps, 5 of samples")
    parser.add_argument("--steps", type=int, help="of a sample, 32; of memory, 3")
    parser.add_argument("--seconds", type=float, default=0.5, help="least time of timed steps")
    parser.add_argument("--ceiling_seconds", type=float, default=0.5, help="of large matmuls")
    options = parser.parse_args()
    changes = {field.name: getattr(options, field.name) for field in dataclasses.fields(Size)}
    changes = {name: value for name, value in changes.items() if value is not None}
    size = dataclasses.replace(measure.SIZES[options.size], **changes)
    try:
        results = WHAT[options.what](options, size, measure.sides_of(options))
    except Failed as error:
        raise SystemExit(f"{error}; its trace is above") from None
    results |= {"what": options.what, "size": dataclasses.asdict(size)}
    measure.write_json(options.json, results)


# --- time


def compare_times(options: argparse.Namespace, size: Size, sides: list[Side]) -> dict[str, Any]:
    """Of a training step, or of a network call in a whole sample."""
    task, repeats = size.task("train"), options.repeats or 10
    if options.what == "sample":
        task, repeats = size.task("sample", options.steps or 32), options.repeats or 5
    ceilings = measure.Ceilings(options.ceiling_seconds)
    with contextlib.ExitStack() as stack:
        workers, rows = [], {}
        for side in sides:
            workers.append(stack.enter_context(Worker(side.doing(task.kind), size)))
            row = {"name": side.name, "dtype": side.dtype, "cores": side.cores}
            row |= task.start(workers[-1])
            rows[side.name] = row | {"count": task.count(workers[-1], options.seconds)}
        forward_flops = workers[0].call("forward_flops", length=task.length)
        ceilings.measure(workers)
        times = measure.interleave(
            workers, lambda worker: task.timed(worker, rows[worker.side.name]["count"]), repeats
        )
        ceilings.measure(workers)
    ours = times[sides[0].name]
    for name, row in rows.items():
        row |= times[name]
        for key, of in (("", "seconds"), ("cpu_", "cpu_seconds")):
            row |= {f"{key}spread": spread(row[of]), f"{key}to_ours": ratios(ours[of], row[of])}
        row |= task.rates(row["spread"]["median"], forward_flops)
        row["mfu"] = row["flops_per_second"] / ceilings.flops(row["dtype"])
    first = rows[sides[0].name]
    print(
        f"\n{options.size}, {options.what}, {repeats} repeats: {first['parameters']:,} parameters, "
        f"{task.batch_size} x {task.length} tokens, {first['device']}\n"
    )
    print(measure.table([_time_cells(row) for row in rows.values()]), "\n")
    print(ceilings.table())
    results = {"sides": list(rows.values()), "matmul_rates": ceilings.by_kind}
    return dataclasses.asdict(task) | results


def _time_cells(row: dict[str, Any]) -> dict[str, str]:
    wall, to_ours = row["spread"], row["to_ours"]
    cells = {
        "side": row["name"],
        "median": seconds(wall["median"]),
        "quartiles": f"{seconds(wall['low'])} .. {seconds(wall['high'])}",
        "to ours": f"{to_ours['median']:.2f} ({to_ours['low']:.2f}..{to_ours['high']:.2f})",
        "CPU": seconds(row["cpu_spread"]["median"]),
        "CPU to ours": f"{row['cpu_to_ours']['median']:.2f}",
        **measure.rate_cells(row),
        "first": seconds(row["first_seconds"]),
    }
    if any(row["compiles"]):
        cells["compiled"] = f"{sum(row['compiles'])} times"
    return cells


# --- memory


def compare_memory(options: argparse.Namespace, size: Size, sides: list[Side]) -> dict[str, Any]:
    steps, rows = options.steps or 3, []
    for task in (size.task("train"), size.task("sample", steps)):
        for side in sides:
            row = {"name": side.name, "dtype": side.dtype, **dataclasses.asdict(task)}
            with Worker(side.doing(task.kind), size) as worker:
                try:
                    row |= _peaks(worker, task, steps)
                except Failed as error:
                    row["error"] = str(error)
            rows.append(row)
    print(f"\n{options.size}, peak memory, {rows[0].get('device', '')}\n")
    print(measure.table([_memory_cells(row, rows) for row in rows]))
    return {"sides": rows}


def _peaks(worker: Worker, task: Task, steps: int) -> dict[str, Any]:
    about, first = task.start(worker), worker.call("peak")
    worker.call("forget_memory")
    worker.call(task.kind, steps=steps)
    return about | {"first_bytes": first, "later_bytes": worker.call("peak")}


def _memory_cells(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, str]:
    ours = next(other for other in rows if other["kind"] == row["kind"])
    cells = {"side": row["name"], "of": f"{row['kind']} {row['batch_size']} x {row['length']}"}
    if "error" in row:
        return cells | {"first": row["error"]}
    later = row["later_bytes"]
    cells |= {"first": bytes_of(row["first_bytes"]), "later": bytes_of(later)}
    cells["to ours"] = f"{later / ours['later_bytes']:.2f}" if ours.get("later_bytes") else "-"
    if row["kind"] == "train":
        cells["state"] = bytes_of(row["state_bytes"])
        cells["as compiled"] = bytes_of(row["temporary_bytes"])
    return cells


WHAT = {"step": compare_times, "sample": compare_times, "memory": compare_memory}


if __name__ == "__main__":
    main()
