"""Batches: grain reads the records in an order that is a pure function of (seed, step). Floor 1.

So a run resumes from its step alone, on any number of processes.
"""

from collections.abc import Iterator

import numpy as np

from sedd_jax.data.records import Records


def train_batches(
    records: Records,
    *,
    seed: int,
    batch_size: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[np.ndarray]:
    """Returns an endless iterator of x0, int32 [batch_size / process_count, L], from start_step.

    The batch of step n holds examples n * batch_size onwards of an endless order that visits
    every block once an epoch and shuffles anew for each. Process p has rows p * batch_size /
    process_count onwards: the slices of all processes, concatenated, are the batch of one
    process. Earlier steps are not read. Threads prefetch; `.close()` ends them.
    """
    import grain

    for name, value, least in (
        ("batch_size", batch_size, 1),
        ("process_count", process_count, 1),
        ("start_step", start_step, 0),
    ):
        if value < least:
            raise ValueError(f"{name} {value} is less than {least}; give {least} or more")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed {seed} is not in [0, 2**32); choose another")
    if not 0 <= process_index < process_count:
        raise ValueError(
            f"process_index {process_index} is not in [0, {process_count}); number processes from 0"
        )
    if batch_size % process_count:
        raise ValueError(
            f"batch_size {batch_size} is not divisible by process_count {process_count}; "
            "choose a multiple"
        )
    slices = (
        grain.MapDataset.source(records.source("train"))
        .seed(seed)
        .shuffle()
        .repeat()
        .map(records.parse)
        # drop_remainder: rounding up the endless length would overflow it
        .batch(batch_size // process_count, drop_remainder=True)
    )
    mine = slices[start_step * process_count + process_index :: process_count]
    options = grain.ReadOptions(num_threads=4, prefetch_buffer_size=8)  # batches, not records
    return iter(mine.to_iter_dataset(options))


def heldout_blocks(records: Records, limit: int | None = None) -> np.ndarray:
    """Returns the first `limit` heldout blocks (all, by default or if fewer), int32 [n, L]."""
    if limit is not None and limit < 1:
        raise ValueError(f"limit {limit} is less than 1; give 1 or more, or None for all")
    source = records.source("heldout")
    count = len(source) if limit is None else min(limit, len(source))
    return np.stack([records.parse(source[i]) for i in range(count)])
