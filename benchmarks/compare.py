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
framework has shown in this run. `of roofline` is the share of a step that the machine could not
have done without: those matmuls at that rate, and the state's own traffic - weights, two moments,
moving average and gradient, each read and written - at the rate of x += 1.

memory: the peak of a training step and of a sample, each in a fresh process. On a CPU: what the
process held at most, beyond what it held after its imports (resident memory, so freed memory that
the allocator keeps counts). On an accelerator: the peak of the framework's allocator. `first` is
the peak up to the end of the first step or sample, compiling included, and `later` that of --steps
steps, or another sample, after it; jax's device allocator cannot forget a peak, there `later` is
`first` or more. `state` is arithmetic: weights, two moments, moving average; `as compiled` are the
temporaries that XLA has planned, for ours alone.
"""

import argparse
import dataclasses
import math
from typing import Any

import measure
from measure import Failed, Side, Size, Worker, bytes_of, ratios, seconds, spread


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--what", default="step", choices=WHAT)
    parser.add_argument("--size", default="tiny", choices=measure.SIZES)
    for field in dataclasses.fields(Size):
        parser.add_argument(f"--{field.name}", type=field.type)
    measure.add_sides(parser)
    parser.add_argument("--dtype", default="float32", help="float32, bfloat16, or float32,bfloat16")
    parser.add_argument("--cores", type=int, default=0, help="of a CPU, for each side; 0: all")
    parser.add_argument("--repeats", type=int, help="of each side; 10 of steps, 5 of samples")
    parser.add_argument("--steps", type=int, help="of a sample, 32; of memory, 3")
    parser.add_argument("--seconds", type=float, default=0.5, help="least time of timed steps")
    parser.add_argument("--ceiling_seconds", type=float, default=0.5, help="for each ceiling")
    options = parser.parse_args()
    changes = {name: getattr(options, name) for name in measure.SIZES["tiny"].__dict__}
    changes = {name: value for name, value in changes.items() if value is not None}
    size = dataclasses.replace(measure.SIZES[options.size], **changes)
    results = WHAT[options.what](options, size, measure.sides_of(options, options.cores))
    results |= {"what": options.what, "size": dataclasses.asdict(size)}
    measure.write_json(options.json, results)


# --- time


def compare_times(options: argparse.Namespace, size: Size, sides: list[Side]) -> dict[str, Any]:
    """Of a training step, or of a network call in a whole sample."""
    is_training, steps = options.what == "step", options.steps or 32
    task, start, repeats = ("train", {}, 10) if is_training else ("sample", {"steps": steps}, 5)
    repeats = options.repeats or repeats
    batch, ceilings = size.batch(task), measure.Ceilings(options.ceiling_seconds)
    counts = {side.name: steps + 1 for side in sides}  # of what is timed in one repeat

    def timed(worker: Worker) -> dict[str, float]:
        count = counts[worker.side.name]
        if is_training:
            # Not timed: a process that waited for the others finds caches cold and, where the
            # system takes idle pages back, memory to be fetched.
            worker.call("train", steps=1)
        answer = worker.call(task, steps=count if is_training else steps)
        if answer.get("masked"):
            raise SystemExit(f"{worker.side.name}: {answer['masked']} tokens are still masked")
        if not math.isfinite(answer.get("loss", 0.0)):
            raise SystemExit(f"{worker.side.name}: the loss is {answer['loss']}")
        times = {name: answer[name] / count for name in ("seconds", "cpu_seconds")}
        return times | {"compiles": answer["compiles"]}

    with measure.started(sides, size, CALLS[task], **batch, **start) as (workers, about):
        flops = batch["batch_size"] * workers[0].call("forward_flops", length=batch["length"])
        for worker in workers if is_training else ():
            worker.call("train", steps=1)
            one = worker.call("train", steps=1)["seconds"]
            counts[worker.side.name] = max(1, math.ceil(options.seconds / one))
        ceilings.measure(workers)
        times = measure.interleave(workers, timed, repeats)
        ceilings.measure(workers)

    flops, tokens = 3 * flops if is_training else flops, math.prod(batch.values())
    rows = _rows(sides, times, about, ceilings, flops, tokens / (1 if is_training else steps + 1))
    for row in rows:
        if is_training:
            traffic = 5 * 2 * 4 * row["parameters"] / ceilings.best("traffic")
            least = flops / ceilings.flops(row["dtype"]) + traffic
            row["of_roofline"] = least / row["spread"]["median"]
            row["steps_per_repeat"] = counts[row["name"]]
            row["cells"]["of roofline"] = f"{row['of_roofline']:.1%}"
        else:
            row["steps_per_second"] = 1.0 / row["spread"]["median"]
            row["cells"]["steps/s"] = f"{row['steps_per_second']:.4g}"
    what = "a training step" if is_training else f"samples of {steps} steps"
    print(
        f"\n{options.size}, {what}, {repeats} repeats: {rows[0]['parameters']:,} parameters, "
        f"{batch['batch_size']} x {batch['length']} tokens, {rows[0]['device']}\n"
    )
    print(measure.table([row.pop("cells") for row in rows]), "\n")
    print(ceilings.text())
    return start | {"sides": rows, "ceilings": ceilings.by_framework}


def _rows(
    sides: list[Side],
    times: dict[str, dict[str, list[float]]],
    about: dict[str, dict[str, Any]],
    ceilings: measure.Ceilings,
    flops: float,
    tokens: float,
) -> list[dict[str, Any]]:
    """The numbers of each side, and their cells; flops and tokens are those of one step."""
    ours, rows = times[sides[0].name], []
    for side in sides:
        values = times[side.name]
        wall, to_ours = spread(values["seconds"]), ratios(ours["seconds"], values["seconds"])
        cpu_to_ours = ratios(ours["cpu_seconds"], values["cpu_seconds"])
        cpu, ceiling = spread(values["cpu_seconds"]), ceilings.flops(side.dtype)
        tokens_a_second, flops_a_second = tokens / wall["median"], flops / wall["median"]
        cells = {
            "side": side.name,
            "median": seconds(wall["median"]),
            "quartiles": f"{seconds(wall['low'])} .. {seconds(wall['high'])}",
            "to ours": f"{to_ours['median']:.2f} ({to_ours['low']:.2f}..{to_ours['high']:.2f})",
            "CPU": seconds(cpu["median"]),
            "CPU to ours": f"{cpu_to_ours['median']:.2f}",
            **measure.rate_cells(tokens_a_second, flops_a_second, ceiling),
            "first": seconds(about[side.name]["first_seconds"]),
        }
        if any(values["compiles"]):
            cells["compiled"] = f"{sum(values['compiles'])} times"
        row = {"name": side.name, "dtype": side.dtype, "cores": side.cores, "cells": cells}
        row |= {"spread": wall, "to_ours": to_ours, "cpu_spread": cpu, "cpu_to_ours": cpu_to_ours}
        row |= {"tokens_per_second": tokens_a_second, "flops_per_second": flops_a_second}
        row |= {"mfu": flops_a_second / ceiling if ceiling else 0.0}
        rows.append(row | about[side.name] | values)
    return rows


# --- memory


def compare_memory(options: argparse.Namespace, size: Size, sides: list[Side]) -> dict[str, Any]:
    steps, rows = options.steps or 3, []
    for task in ("train", "sample"):
        batch = size.batch(task)
        for side in sides:
            measure.progress(f"{side.name}: {task}")
            row = {"task": task, **batch, "name": side.name, "dtype": side.dtype}
            with Worker(side, size) as worker:
                try:
                    row |= worker.call("about") | _peaks(worker, task, batch, steps)
                except Failed as error:
                    row["error"] = str(error)
            rows.append(row)
    measure.progress("")
    print(f"\n{options.size}, peak memory, {rows[0].get('device', '')}\n")
    print(measure.table([_memory_cells(row, rows) for row in rows]))
    return {"sides": rows}


def _peaks(worker: Worker, task: str, batch: dict[str, int], steps: int) -> dict[str, Any]:
    start = {"steps": steps} if task == "sample" else {}
    about = worker.call(CALLS[task], **batch, **start)
    first = worker.call("memory")
    worker.call("forget_memory")
    worker.call(task, steps=steps)
    later = worker.call("memory")
    peaks = {"first_bytes": first["peak"], "later_bytes": later["peak"], "now_bytes": later["now"]}
    return about | peaks


def _memory_cells(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, str]:
    ours = next(other for other in rows if other["task"] == row["task"])
    cells = {"side": row["name"], "of": f"{row['task']} {row['batch_size']} x {row['length']}"}
    if "error" in row:
        return cells | {"first": row["error"]}
    later = row["later_bytes"]
    cells |= {"first": bytes_of(row["first_bytes"]), "later": bytes_of(later)}
    cells["to ours"] = f"{later / ours['later_bytes']:.2f}" if ours.get("later_bytes") else "-"
    if row["task"] == "train":
        cells["state"] = bytes_of(row["state_bytes"])
        cells["as compiled"] = bytes_of(row["temporary_bytes"])
    return cells


CALLS = {"train": "start_training", "sample": "start_sampling"}
WHAT = {"step": compare_times, "sample": compare_times, "memory": compare_memory}


if __name__ == "__main__":
    main()
