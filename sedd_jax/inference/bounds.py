"""The bound on a corpus, in the units of the literature."""

import functools
import logging
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm.auto import tqdm

from sedd_jax.data import Blocks
from sedd_jax.diffusion.graphs import Graph
from sedd_jax.diffusion.likelihood import Bound, bits_per_character, bound, perplexity
from sedd_jax.diffusion.schedules import Schedule
from sedd_jax.parallel import processes, sharding

log = logging.getLogger(__name__)

BoundFn = Callable[..., Bound]


class CorpusBound(NamedTuple):
    """Sums over a corpus, nats; the standard errors are of the sums, for the noise drawn."""

    bound: float
    bound_standard_error: float
    diffusion: float
    tail: float
    prior: float
    normalised: float | None
    normalised_standard_error: float | None
    paper_protocol: float  # mean over t ~ U[t_min, 1], nothing added: what published tables hold
    passes: int  # noise levels a block that it was estimated from

    def per(self, count: float) -> Self:
        """Each but passes divided by count."""
        values = self._asdict().items()
        return CorpusBound(**{k: v if v is None or k == "passes" else v / count for k, v in values})


def make_bound_fn(
    make_score_fn: Callable, graph: Graph, schedule: Schedule, *, t_min: float
) -> BoundFn:
    """Jitted (params, key, Blocks, index, *, passes) -> Bound.

    make_score_fn(params, is_token) gives the score function for rows with that padding.
    """

    @functools.partial(jax.jit, static_argnames="passes")
    def bound_fn(params, key, blocks, index, *, passes):
        x0, is_token = blocks
        return bound(
            key,
            x0,
            index,
            make_score_fn(params, is_token),
            graph,
            schedule,
            passes=passes,
            t_min=t_min,
            is_token=is_token,
        )

    return bound_fn


def corpus_bound(
    bound_fn: BoundFn,
    params: Any,
    key: jax.Array,
    blocks: Blocks,
    *,
    passes: int,
    batch_size: int,
    t_min: float,
    mesh: Mesh | None = None,
    progress: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
) -> CorpusBound | None:
    """Bound the blocks together; bound_fn(params, key, Blocks, index, passes=...) -> Bound.

    A call takes batch_size blocks, rounded up to the devices of the mesh that share a batch. None
    if should_stop() turned true before the end.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size} is below 1; give at least 1")
    parts = 1 if mesh is None else sharding.batch_parts(mesh)
    batch_size = -(-batch_size // parts) * parts
    results = []
    count = len(blocks.tokens)
    for start in tqdm(
        range(0, count, batch_size), desc="bound", unit="batch", disable=not progress
    ):
        if should_stop():
            return None
        index = np.arange(start, start + batch_size, dtype=np.int32)
        # The last batch is filled up with blocks that are dropped again: one shape compiles once.
        rows = np.minimum(index, count - 1)
        batch = (jax.tree.map(lambda a, rows=rows: a[rows], blocks), index)
        if mesh is not None:
            batch = sharding.put_whole(batch, mesh)
        results.append(processes.fetch(bound_fn(params, key, *batch, passes=passes)))

    def add_up(*values):
        return float(np.concatenate(values)[:count].sum(dtype=np.float64))

    total = jax.tree.map(add_up, *results)
    ends = total.reconstruction + total.prior
    normalised = total.normalised
    return CorpusBound(
        bound=total.diffusion + ends,
        bound_standard_error=math.sqrt(total.variance),
        diffusion=total.diffusion,
        tail=total.reconstruction,
        prior=total.prior,
        normalised=None if normalised is None else normalised + ends,
        normalised_standard_error=(
            None if normalised is None else math.sqrt(total.normalised_variance)
        ),
        paper_protocol=total.diffusion / (1.0 - t_min),
        passes=passes,
    )


def bound_until(
    one_round: Callable[[int], CorpusBound], target: float, most: int, *, tokens: int = 1
) -> CorpusBound:
    """The mean of independent rounds, as many as bring its standard error to target.

    target is in nats per token, of which the text has `tokens`. one_round(r) is round r, r = 0, 1,
    ...; at most `most` are made, and then the error may be above target. Each is a line of log.
    """
    rounds: list[CorpusBound] = []
    while True:
        rounds.append(one_round(len(rounds)))
        total = _mean(rounds)
        error = total.bound_standard_error / tokens
        log.info(
            "round %d, %d noise levels a block: standard error %.3g nats/token, target %g",
            len(rounds),
            total.passes,
            error,
            target,
        )
        if error <= target or len(rounds) >= most:
            return total


def _mean(rounds: list[CorpusBound]) -> CorpusBound:
    values = {}
    for name in CorpusBound._fields:
        each = [getattr(total, name) for total in rounds]
        if name == "passes":
            values[name] = sum(each)
        elif each[0] is None:
            values[name] = None
        elif name.endswith("standard_error"):
            values[name] = math.sqrt(sum(error**2 for error in each)) / len(each)
        else:
            values[name] = sum(each) / len(each)
    return CorpusBound(**values)


UNITS = ("nats_per_token", "bits_per_character", "perplexity_per_token", "perplexity_per_word")


def one_in_units(nats: float, tokens: int, characters: int, words: float) -> dict[str, float]:
    """Total nats over a text, in every unit."""
    values = (
        nats / tokens,
        bits_per_character(nats, characters),
        perplexity(nats / tokens),
        perplexity(nats / words),
    )
    return dict(zip(UNITS, values, strict=True))


def in_units(
    total: CorpusBound, tokens: int, characters: int, words: float
) -> dict[str, dict[str, float | None]]:
    """{unit: {field of total: value}}; the perplexity of a part or of an error means nothing."""
    wholes = ("bound", "normalised", "paper_protocol")
    values: dict[str, dict[str, float | None]] = {unit: {} for unit in UNITS}
    for name, nats in total._asdict().items():
        if name == "passes":
            continue
        for unit in UNITS:
            if name in wholes or not unit.startswith("perplexity"):
                one = None if nats is None else one_in_units(nats, tokens, characters, words)[unit]
                values[unit][name] = one
    return values
