"""Seconds of one training step, ours and the original's, turn by turn in one run.

    python benchmarks/step_time.py --size=tiny --against=PATH_OF_THE_ORIGINAL [--compile]
    python benchmarks/step_time.py --size=small --dtype=bfloat16 --set model.remat=blocks
    python benchmarks/step_time.py --before=ANOTHER_CHECKOUT --cores=1

A step is forward, backward, gradient clip, AdamW and the moving average, on a batch that is there
already; the original's is its own losses.get_step_fn. A turn is as many steps as --turn seconds
hold, sent off together. Quartiles are over turns; `to ours` is the median over turns of the ratio
to the same turn of ours, above 1 where ours is faster. `CPU` is the time that the side's process
computed, on all cores: on a CPU that others use too, compare that, and with --cores=1, where no
thread waits for another.

MFU counts the model's matrix products (Size.training_flops) against the fastest large product that
either framework has shown in this run. `of floor` is the share of the step that the machine could
not have done without: those products at that rate, and the state's own traffic - weights, two
moments, moving average and gradient, each read and written - at the rate of x += 1.
"""

import math

import measure
from measure import Worker


def main() -> None:
    parser = measure.parser_of(__doc__)
    parser.add_argument("--repeats", type=int, default=10, help="turns of each side")
    parser.add_argument("--turn", type=float, default=0.5, help="least seconds of a turn")
    parser.add_argument("--ceiling_seconds", type=float, default=0.5, help="for each ceiling")
    options = parser.parse_args()
    size, ceilings = measure.size_of(options), measure.Ceilings(options.ceiling_seconds)
    batch = {"batch_size": size.batch_size, "length": size.length}
    steps = {}

    def turn(worker: Worker) -> dict[str, float]:
        count = steps[worker.side.name]
        # Not timed: a process that waited for the others' turns finds caches cold and, where the
        # system takes idle pages back, memory to be fetched.
        worker.call("train", steps=1)
        answer = worker.call("train", steps=count)
        if not math.isfinite(answer["loss"]):
            raise SystemExit(f"{worker.side.name}: loss {answer['loss']}")
        return {name: answer[name] / count for name in ("seconds", "cpu_seconds")}

    sides = measure.sides_of(options)
    with measure.started(sides, size, "start_training", **batch) as (workers, told):
        for worker in workers:
            worker.call("train", steps=1)
            one = worker.call("train", steps=1)["seconds"]
            steps[worker.side.name] = max(1, math.ceil(options.turn / one))
        ceilings.measure(workers)
        found = measure.interleave(workers, turn, options.repeats)
        ceilings.measure(workers)

    flops, tokens = size.training_flops(**batch), size.batch_size * size.length
    traffic = 5 * 2 * 4 * size.parameters / ceilings.best("traffic")
    rows, kept = [], []
    for side in sides:
        rate = ceilings.flops(side.dtype)
        numbers, cells = measure.compared(side, found[side.name], found[sides[0].name], flops, rate)
        median = numbers["spread"]["median"]
        numbers["tokens_a_second"] = tokens / median
        numbers["of_floor"] = (flops / rate + traffic) / median
        numbers["steps_a_turn"] = steps[side.name]
        kept.append(numbers | told[side.name])
        cells["of floor"] = f"{numbers['of_floor']:.1%}"
        cells["tokens/s"] = f"{numbers['tokens_a_second']:,.0f}"
        cells["first"] = measure.seconds(told[side.name]["first_seconds"])
        rows.append({"training step": side.name, **cells})
    print(
        f"\n{options.size}: {size.parameters:,} parameters, batch {size.batch_size} x "
        f"{size.length} tokens, {told[sides[0].name]['device']}, {options.repeats} turns\n"
    )
    print(measure.table(rows), "\n")
    print(ceilings.text())
    measure.report("step_time", options, size, {"sides": kept, "ceilings": ceilings.found})


if __name__ == "__main__":
    main()
