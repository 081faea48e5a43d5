"""Batches: grain reads the records in an order that is a pure function of (seed, step).

So a run resumes from its step alone, on any number of processes.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from sedd_jax.data.records import Blocks, Records

WINDOWS = ("aligned", "random")


def train_batches(
    records: Records,
    *,
    seed: int,
    batch_size: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    split: str = "train",
    windows: str = "aligned",
) -> Iterator[Blocks]:
    """Returns an endless iterator of Blocks of batch_size / process_count rows, from start_step.

    The batch of step n holds examples n * batch_size onwards of an endless order that visits
    every block once an epoch and shuffles anew for each. Process p has rows p * batch_size /
    process_count onwards: the slices of all processes, concatenated, are the batch of one
    process. Earlier steps are not read. Threads prefetch; `.close()` ends them.

    windows "random": in place of block i, the L tokens from a random place in it onwards, into
    block i + 1, so that every contiguous piece of the stream is trained on.
    """
    import grain

    for name, value, least, end in (
        ("batch_size", batch_size, 1, "inf"),
        ("process_count", process_count, 1, "inf"),
        ("process_index", process_index, 0, process_count),
        ("start_step", start_step, 0, "inf"),
        ("seed", seed, 0, 2**32),
    ):
        if not least <= value < float(end):
            raise ValueError(f"{name} {value} is not in [{least}, {end}); choose another")
    if batch_size % process_count:
        raise ValueError(
            f"batch_size {batch_size} is not divisible by process_count {process_count}; "
            "choose a multiple"
        )
    source = records.source(split)
    if windows not in WINDOWS:
        raise ValueError(f"unknown windows {windows!r}; known: {', '.join(WINDOWS)}")
    if windows == "random":
        if records.fingerprint["form"] != "packed" or len(source) < 2:
            raise ValueError(
                f"random windows need packed records of at least 2 blocks; {str(records.folder)!r} "
                f"has {len(source)} of form {records.fingerprint['form']!r}: use aligned windows"
            )
        source = _Neighbours(source)

    def window(record: bytes, generator: np.random.Generator) -> np.ndarray:
        start = generator.integers(records.length)
        return records.parse(record)[start : start + records.length]

    order = grain.MapDataset.source(source).seed(seed).shuffle().repeat()
    rows = order.random_map(window) if windows == "random" else order.map(records.parse)
    slices = (
        # drop_remainder: rounding up the endless length would overflow it
        rows.batch(batch_size // process_count, drop_remainder=True).map(records.blocks)
    )
    mine = slices[start_step * process_count + process_index :: process_count]
    options = grain.ReadOptions(num_threads=4, prefetch_buffer_size=8)  # batches, not records
    return iter(mine.to_iter_dataset(options))


class _Neighbours:
    """Every record with the one after it."""

    def __init__(self, source: Sequence[bytes]):
        self.source = source

    def __len__(self) -> int:
        return len(self.source) - 1

    def __getitem__(self, index: int) -> bytes:
        return self.source[index] + self.source[index + 1]


def read_blocks(records: Records, split: str, limit: int | None = None) -> Blocks:
    """Returns the first `limit` blocks of a split (all, by default or if fewer), in order."""
    if limit is not None and limit < 1:
        raise ValueError(f"limit {limit} is less than 1; give 1 or more, or None for all")
    source = records.source(split)
    count = len(source) if limit is None else min(limit, len(source))
    return records.blocks(np.stack([records.parse(source[i]) for i in range(count)]))
