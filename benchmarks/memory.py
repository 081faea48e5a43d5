"""Peak memory of a training step or a sample, ours and the original's, each in a fresh process.

    python benchmarks/memory.py --size=small --against=PATH_OF_THE_ORIGINAL
    python benchmarks/memory.py --size=small --what=sample --steps=2

On a CPU: what the process held at most, beyond what it held after its imports (resident memory,
so freed memory that the allocator keeps counts). On an accelerator: the peak of the framework's
allocator. `first` is the peak up to the end of the first step, compiling included, and `later`
that of the steps after it; jax's device allocator cannot forget a peak, there `later` is `first`
or more. `state` is arithmetic: weights, two moments, moving average; `as compiled` are the
temporaries that XLA has planned, for ours alone.
"""

from measure import (
    Failed,
    Worker,
    bytes_of,
    parser_of,
    progress,
    report,
    sides_of,
    size_of,
    table,
)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--what", default="train", choices=("train", "sample"))
    parser.add_argument("--steps", type=int, default=3, help="after the first; of the sample")
    options = parser.parse_args()
    size = size_of(options)
    is_training = options.what == "train"
    sides = []
    for side in sides_of(options):
        progress(f"{side.name}")
        with Worker(side, size) as worker:
            found = {"name": side.name, "dtype": side.dtype, **worker.call("about")}
            try:
                found |= _measured(worker, size, options.steps, is_training)
            except Failed as error:
                found["error"] = str(error)
        sides.append(found)
    progress("")
    batch_size = size.batch_size if is_training else size.sample_batch_size
    length = size.length if is_training else size.sample_length
    print(
        f"\n{options.size}: {size.parameters:,} parameters, {batch_size} x {length} tokens, "
        f"{sides[0]['device']}\n"
    )
    base = sides[0].get("later_bytes")
    rows = []
    for found in sides:
        row = {"training step" if is_training else "sample": found["name"]}
        if "error" in found:
            rows.append(row | {"first": found["error"]})
            continue
        row |= {"first": bytes_of(found["first_bytes"]), "later": bytes_of(found["later_bytes"])}
        row["to ours"] = f"{found['later_bytes'] / base:.2f}" if base else "-"
        if is_training:
            row["state"] = bytes_of(found["state_bytes"])
            row["as compiled"] = bytes_of(found["temporary_bytes"])
        rows.append(row)
    print(table(rows))
    report("memory", options, size, {"what": options.what, "sides": sides})


def _measured(worker: Worker, size, steps: int, is_training: bool) -> dict:
    if is_training:
        shape = {"batch_size": size.batch_size, "length": size.length}
        known = worker.call("start_training", **shape)
    else:
        shape = {"batch_size": size.sample_batch_size, "length": size.sample_length}
        known = worker.call("start_sampling", **shape, steps=steps)
    first = worker.call("memory")
    worker.call("forget_memory")
    worker.call("train" if is_training else "sample", steps=steps)
    later = worker.call("memory")
    return known | {
        "first_bytes": first["peak"],
        "later_bytes": later["peak"],
        "held_bytes": later["now"],
    }


if __name__ == "__main__":
    main()
