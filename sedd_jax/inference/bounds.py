"""The bound on a corpus, in the units of the literature."""

import functools
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Self

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm.auto import tqdm

from sedd_jax.data import Blocks
from sedd_jax.diffusion.graph import Graph
from sedd_jax.diffusion.likelihood import Bound, bits_per_character, perplexity
from sedd_jax.diffusion.objectives import Objective
from sedd_jax.diffusion.schedules import Schedule
from sedd_jax.diffusion.scores import NotFiniteError
from sedd_jax.inference.curve import Curve
from sedd_jax.models.head import make_score_fn
from sedd_jax.models.transformer import Transformer
from sedd_jax.parallel import processes, sharding

log = logging.getLogger(__name__)

# (params, key, Blocks, index int32 [B], is_scored bool [B, L] or None for all tokens, *, passes)
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
    # Mean over t ~ U[t_min, 1], nothing added: what published tables hold. None without such times.
    paper_protocol: float | None
    passes: int  # noise levels a block that it was estimated from
    curve: Curve | None = None  # cross entropy by mask share; None for noise without a mask

    @property
    def sums(self) -> dict[str, float | None]:
        """The fields that are nats."""
        fields = self._asdict().items()
        return {name: value for name, value in fields if name not in ("passes", "curve")}

    def per(self, count: float) -> Self:
        """Each sum divided by count."""
        return self._replace(
            **{name: nats / count for name, nats in self.sums.items() if nats is not None}
        )


@functools.partial(jax.jit, static_argnames=("network", "graph", "schedule", "objective", "passes"))
def _block_bounds(
    params, key, blocks, index, is_scored=None, *, network, graph, schedule, objective, passes
):
    return objective.bound(
        key,
        blocks.tokens,
        index,
        make_score_fn(network, params, graph, is_token=blocks.is_token),
        graph,
        schedule,
        passes=passes,
        is_token=blocks.is_token if is_scored is None else is_scored,
    )


def make_bound_fn(
    network: Transformer, graph: Graph, schedule: Schedule, objective: Objective
) -> BoundFn:
    """Jitted (params, key, Blocks, index, is_scored=None, *, passes) -> Bound.

    Equal networks share what is compiled, whoever makes the function.
    """
    return functools.partial(
        _block_bounds, network=network, graph=graph, schedule=schedule, objective=objective
    )


def corpus_bound(
    bound_fn: BoundFn,
    params: Any,
    key: jax.Array,
    blocks: Blocks,
    *,
    passes: int,
    batch_size: int,
    t_min: float | None,
    mesh: Mesh | None = None,
    progress: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
) -> CorpusBound | None:
    """The bound on all blocks together; None if should_stop() became true before the end.

    A call of bound_fn takes batch_size blocks, rounded up to the devices of the mesh that share a
    batch. t_min is the objective's.
    """
    parts = 1 if mesh is None else sharding.batch_parts(mesh)
    count = len(blocks.tokens)
    results = []
    for rows in batches(count, batch_size, parts, name="bound", progress=progress):
        if should_stop():
            return None
        batch = (jax.tree.map(lambda a, rows=rows: a[rows], blocks), rows)
        if mesh is not None:
            batch = sharding.put_whole(batch, mesh)
        results.append(processes.fetch(bound_fn(params, key, *batch, passes=passes)))
        check_finite(results[-1], rows, "block")
    whole = jax.tree.map(lambda *parts: np.concatenate(parts)[:count], *results)
    curve = None
    if whole.share is not None:
        curve = Curve.of(whole.share.ravel(), whole.cross_entropy.ravel())
    total = jax.tree.map(lambda values: float(values.sum(dtype=np.float64)), whole)
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
        paper_protocol=None if t_min is None else total.diffusion / (1.0 - t_min),
        passes=passes,
        curve=curve,
    )


def check_finite(bound: Bound, index: np.ndarray, kind: str) -> None:
    """NotFiniteError with the first of index [B] whose bound or its error is not finite."""
    wrong = ~np.isfinite(bound.total + bound.variance)
    if wrong.any():
        raise NotFiniteError(f"on {kind} {index[wrong][0]}")


def batches(
    count: int, batch_size: int, parts: int = 1, *, name: str, progress: bool
) -> Iterator[np.ndarray]:
    """The rows of each batch of `count`, int32 [batch_size rounded up to a multiple of parts].

    The last batch is filled up with the last row, which its user drops: one shape compiles once.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size} is below 1; give at least 1")
    size = -(-batch_size // parts) * parts
    hides = not (progress and processes.is_first())
    for start in tqdm(range(0, count, size), desc=name, unit="batch", disable=hides):
        yield np.minimum(np.arange(start, start + size, dtype=np.int32), count - 1)


def bound_until(
    one_round: Callable[[int], CorpusBound], target: float, max_rounds: int, *, tokens: int = 1
) -> CorpusBound:
    """The mean of independent rounds, as many as bring its standard error to target.

    target is in nats per token, of which the text has `tokens`. one_round(r) is round r, r = 0, 1,
    ...; after max_rounds the error may still be above target. Each round is a line of log.
    """
    rounds: list[CorpusBound] = []
    while True:
        rounds.append(one_round(len(rounds)))
        mean = _mean(rounds)
        error = mean.bound_standard_error / tokens
        log.info(
            "round %d, %d noise levels a block: standard error %.3g nats/token, target %g",
            len(rounds),
            mean.passes,
            error,
            target,
        )
        if error <= target or len(rounds) >= max_rounds:
            return mean


def _mean(rounds: list[CorpusBound]) -> CorpusBound:
    """The mean of independent rounds: errors add as squares, passes as they are."""

    def mean(name: str, values: tuple) -> float | None:
        if values[0] is None:
            return None
        is_error = name.endswith("standard_error")
        return (math.hypot(*values) if is_error else sum(values)) / len(values)

    columns = {name: tuple(r.sums[name] for r in rounds) for name in rounds[0].sums}
    means = {name: mean(name, values) for name, values in columns.items()}
    curves = [r.curve for r in rounds if r.curve is not None]
    curve = Curve.mean(curves) if curves else None
    return CorpusBound(**means, passes=sum(r.passes for r in rounds), curve=curve)


def in_units(
    sums: Mapping[str, float | None], tokens: int, characters: int, words: float
) -> dict[str, dict[str, float | None]]:
    """{unit: {name: value}} of total nats over a text: by name, those of a CorpusBound's `sums`.

    The perplexity of a part or of an error means nothing, and is left out.
    """

    def is_whole(name: str) -> bool:
        return name not in ("diffusion", "tail", "prior") and not name.endswith("standard_error")

    units = {
        "nats_per_token": lambda nats: nats / tokens,
        "bits_per_character": lambda nats: bits_per_character(nats, characters),
        "perplexity_per_token": lambda nats: perplexity(nats / tokens),
        "perplexity_per_word": lambda nats: perplexity(nats / words),
    }
    return {
        unit: {
            name: None if nats is None else convert(nats)
            for name, nats in sums.items()
            if is_whole(name) or not unit.startswith("perplexity")
        }
        for unit, convert in units.items()
    }
