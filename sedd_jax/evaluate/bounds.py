"""The bound on a corpus, in the units of the literature."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm.auto import tqdm

from sedd_jax import sharding
from sedd_jax.diffusion.graphs import Graph
from sedd_jax.diffusion.likelihood import Bound, bits_per_character, bound, perplexity
from sedd_jax.diffusion.schedules import Schedule

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

    def per(self, count: float) -> dict[str, float | None]:
        """Each divided by count."""
        return {k: None if v is None else v / count for k, v in self._asdict().items()}


def make_bound_fn(
    make_score_fn: Callable, graph: Graph, schedule: Schedule, *, t_min: float
) -> BoundFn:
    """Jitted (params, key, x0, index, *, passes) -> Bound; make_score_fn takes the parameters."""

    @functools.partial(jax.jit, static_argnames="passes")
    def bound_fn(params, key, x0, index, *, passes):
        score_fn = make_score_fn(params)
        return bound(key, x0, index, score_fn, graph, schedule, passes=passes, t_min=t_min)

    return bound_fn


def corpus_bound(
    bound_fn: BoundFn,
    params: Any,
    key: jax.Array,
    blocks: np.ndarray,
    *,
    batch_size: int,
    t_min: float,
    mesh: Mesh | None = None,
    progress: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
) -> CorpusBound | None:
    """Bound the blocks int32 [N, L] together; bound_fn(params, key, x0, index) -> Bound.

    A call takes batch_size blocks, rounded up to the devices of the mesh that share a batch. None
    if should_stop() turned true before the end.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size} is below 1; give at least 1")
    parts = 1 if mesh is None else sharding.batch_parts(mesh)
    batch_size = -(-batch_size // parts) * parts
    results = []
    starts = range(0, len(blocks), batch_size)
    for start in tqdm(starts, desc="bound", unit="batch", disable=not progress):
        if should_stop():
            return None
        index = np.arange(start, start + batch_size, dtype=np.int32)
        # The last batch is filled up with blocks that are dropped again: one shape compiles once.
        batch = (blocks[np.minimum(index, len(blocks) - 1)], index)
        if mesh is not None:
            batch = tuple(sharding.put_batch(part, mesh) for part in batch)
        results.append(jax.device_get(bound_fn(params, key, *batch)))

    def add_up(*values):
        return float(np.concatenate(values)[: len(blocks)].sum(dtype=np.float64))

    total = jax.tree.map(add_up, *results)
    ends = total.tail + total.prior
    normalised = total.normalised
    return CorpusBound(
        bound=total.diffusion + ends,
        bound_standard_error=math.sqrt(total.variance),
        diffusion=total.diffusion,
        tail=total.tail,
        prior=total.prior,
        normalised=None if normalised is None else normalised + ends,
        normalised_standard_error=(
            None if normalised is None else math.sqrt(total.normalised_variance)
        ),
        paper_protocol=total.diffusion / (1.0 - t_min),
    )


def one_in_units(nats: float, tokens: int, characters: int) -> dict[str, float]:
    """Total nats over a text, in every unit."""
    return {
        "nats_per_token": nats / tokens,
        "bits_per_character": bits_per_character(nats, characters),
        "perplexity_per_token": perplexity(nats / tokens),
    }


def in_units(
    total: CorpusBound, tokens: int, characters: int
) -> dict[str, dict[str, float | None]]:
    """{unit: {field of total: value}}; the perplexity of a part or of an error means nothing."""
    nats = total.per(tokens)
    wholes = ("bound", "normalised", "paper_protocol")
    return {
        "nats_per_token": nats,
        "bits_per_character": total.per(characters * math.log(2.0)),
        "perplexity_per_token": {
            name: None if nats[name] is None else perplexity(nats[name]) for name in wholes
        },
    }
