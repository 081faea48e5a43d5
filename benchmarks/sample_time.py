"""Seconds of one sampling step, ours and the original's, whole samples turn by turn in one run.

    python benchmarks/sample_time.py --size=tiny --steps=64 --against=PATH_OF_THE_ORIGINAL
    python benchmarks/sample_time.py --size=small --steps=32 --dtype=float32,bfloat16

A turn is one whole sample, from all-MASK through --steps reverse steps (Tweedie, the original's
"analytic") to the denoised tokens on the host, and its time is divided by steps + 1, the network
calls: what a step costs may depend on how many tokens are still masked, so no part of a sample
stands for the whole. Ours is SEDD.sample_tokens with its exact draw, the original's its
get_pc_sampler with its float32 draw. Weights are random, head and modulation too; a whole sample
is drawn before the first turn, so that nothing compiles in one (`compiled` would say so).

The columns are those of step_time.py. MFU counts a network call with all its logits
(Size.forward_flops), whoever leaves some out.
"""

import measure
from measure import Worker


def main() -> None:
    parser = measure.parser_of(__doc__)
    parser.add_argument("--steps", type=int, default=32, help="reverse steps of a sample")
    parser.add_argument("--repeats", type=int, default=5, help="whole samples of each side")
    parser.add_argument("--ceiling_seconds", type=float, default=0.5, help="for each ceiling")
    options = parser.parse_args()
    size, ceilings, calls = (
        measure.size_of(options),
        measure.Ceilings(options.ceiling_seconds),
        options.steps + 1,
    )
    batch = {"batch_size": size.sample_batch_size, "length": size.sample_length}

    def turn(worker: Worker) -> dict[str, float]:
        answer = worker.call("sample", steps=options.steps)
        if answer["masked"]:
            raise SystemExit(f"{worker.side.name}: {answer['masked']} tokens are still masked")
        times = {name: answer[name] / calls for name in ("seconds", "cpu_seconds")}
        return times | {"compiles": answer["compiles"]}

    sides = measure.sides_of(options)
    arguments = batch | {"steps": options.steps}
    with measure.started(sides, size, "start_sampling", **arguments) as (workers, told):
        ceilings.measure(workers)
        found = measure.interleave(workers, turn, options.repeats)
        ceilings.measure(workers)

    flops = size.forward_flops(**batch)
    tokens = size.sample_batch_size * size.sample_length
    rows, kept = [], []
    for side in sides:
        numbers, cells = measure.compared(
            side, found[side.name], found[sides[0].name], flops, ceilings.flops(side.dtype)
        )
        median = numbers["spread"]["median"]
        numbers["steps_a_second"] = 1.0 / median
        numbers["tokens_a_second"] = tokens / (calls * median)
        kept.append(numbers | told[side.name])
        cells["steps/s"] = f"{numbers['steps_a_second']:.4g}"
        cells["tokens/s"] = f"{numbers['tokens_a_second']:,.1f}"
        cells["first"] = measure.seconds(told[side.name]["first_seconds"])
        if any(numbers["compiles"]):
            cells["compiled"] = f"{sum(numbers['compiles'])} times"
        rows.append({"sampling step": side.name, **cells})
    print(
        f"\n{options.size}: {size.parameters:,} parameters, {size.sample_batch_size} x "
        f"{size.sample_length} tokens, {options.steps} steps, {told[sides[0].name]['device']}, "
        f"{options.repeats} samples\n"
    )
    print(measure.table(rows), "\n")
    print(ceilings.text())
    found = {"steps": options.steps, "sides": kept, "ceilings": ceilings.found}
    measure.report("sample_time", options, size, found)


if __name__ == "__main__":
    main()
