"""The bound on a corpus, in the units of the literature."""

import functools
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Self

import jax
import numpy as np
from jax.sharding import Mesh

from sedd_jax.data import Blocks
from sedd_jax.diffusion.graph import Graph
from sedd_jax.diffusion.likelihood import (
    Bound,
    bits_per_character,
    check_passes,
    pairs_variance,
    perplexity,
    perplexity_error,
)
from sedd_jax.diffusion.objectives import Objective
from sedd_jax.diffusion.schedules import Schedule
from sedd_jax.diffusion.scores import NotFiniteError
from sedd_jax.host.console import progress_bar, ticking
from sedd_jax.inference.batches import filled
from sedd_jax.inference.curve import Curve
from sedd_jax.inference.sampling import check_whole
from sedd_jax.models.head import make_score_fn
from sedd_jax.models.transformer import Transformer
from sedd_jax.parallel import processes, sharding

log = logging.getLogger(__name__)


class LogRatio(NamedTuple):
    """The estimate of log p(a) / p(b) for N pairs by the difference of their bounds, nats, [N].

    Neither a lower nor an upper bound: it is off by the difference of how loose the two are. The
    standard errors are of the noise drawn. normalised is by the scores rescaled to their true
    total; None where the model has no such bound.
    """

    value: np.ndarray
    standard_error: np.ndarray
    normalised: np.ndarray | None
    normalised_standard_error: np.ndarray | None

    @classmethod
    def of_halves(cls, bound: Bound) -> Self:
        """From the bounds on -log p of all a, and after them of all b."""
        half = len(bound.prior) // 2
        a, b = (jax.tree.map(lambda v, n=n: v[n : n + half], bound) for n in (0, half))
        less = b.minus(a)
        if less.normalised is None:
            return cls(less.total, less.standard_error, None, None)
        normalised = less.normalised + less.reconstruction + less.prior
        return cls(less.total, less.standard_error, normalised, less.normalised_variance**0.5)


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
    by_token: np.ndarray | None = None  # float32 [N, L], the bound of each token; if it was kept
    paper_protocol_standard_error: float | None = None
    # float64 [N]: what each block has of bound, normalised and paper_protocol, where these are.
    by_block: dict[str, np.ndarray] | None = None

    @property
    def sums(self) -> dict[str, float | None]:
        """The fields that are sums of nats."""
        others = ("passes", "curve", "by_token", "by_block")
        return {name: value for name, value in self._asdict().items() if name not in others}

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
    by_token: bool = False,
    progress: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
) -> CorpusBound | None:
    """The bound on all blocks together; None if should_stop() became true before the end.

    A call of bound_fn takes batch_size blocks, rounded up to the devices of the mesh that share a
    batch. t_min is the objective's. by_token keeps the bound of each token.
    """
    results, count = [], len(blocks.tokens)

    def of_batch(blocks, index):
        bound = bound_fn(params, key, blocks, index, passes=passes)
        return bound if by_token else bound._replace(by_token=None)

    how = {"name": "bound", "progress": progress, "should_stop": should_stop}
    for rows, bound in over_batches(of_batch, params, blocks, batch_size, mesh, **how):
        check_finite(bound, rows, "block")
        results.append(bound)
    if not results or rows[-1] + 1 < count:
        return None
    whole = joined(results, count)
    curve = None
    if whole.share is not None:
        curve = Curve.of(whole.share.ravel(), whole.cross_entropy.ravel())

    def total(nats: np.ndarray) -> float:
        return float(nats.sum(dtype=np.float64))

    diffusion, tail, prior = map(total, (whole.diffusion, whole.reconstruction, whole.prior))
    by_block = {"bound": np.float64(whole.total)}
    if whole.normalised is not None:
        by_block["normalised"] = np.float64(whole.normalised) + whole.reconstruction + whole.prior
    paper_error = None
    if t_min is not None:
        by_block["paper_protocol"] = np.float64(whole.diffusion) / (1.0 - t_min)
        paper_error = math.sqrt(total(pairs_variance(whole.diffusion_passes))) / (1.0 - t_min)
    normalised = whole.normalised
    return CorpusBound(
        bound=diffusion + tail + prior,
        bound_standard_error=math.sqrt(total(whole.variance)),
        diffusion=diffusion,
        tail=tail,
        prior=prior,
        normalised=None if normalised is None else total(normalised) + tail + prior,
        normalised_standard_error=(
            None if normalised is None else math.sqrt(total(whole.normalised_variance))
        ),
        paper_protocol=None if t_min is None else diffusion / (1.0 - t_min),
        paper_protocol_standard_error=paper_error,
        passes=passes,
        curve=curve,
        by_token=whole.by_token,
        by_block=by_block,
    )


def check_noise(passes: int, batch_size: int, seed: int) -> None:
    """ValueError for what no texts can be noised and scored with."""
    check_whole("batch_size", batch_size, 1)
    check_whole("seed", seed, 0, 2**32 - 1)
    check_passes(passes)


def text_bounds(
    bound_of: Callable[[tuple], Bound], batches: Iterable[tuple[np.ndarray, tuple]]
) -> Bound:
    """bound_of each batch of `batches.by_bucket` as one Bound of numpy arrays, in the order of the
    texts; by_token is as long as the longest batch, 0 beyond a text's end."""
    numbers, results = [], []
    for part, batch in batches:
        bound = processes.fetch(bound_of(batch))
        results.append(jax.tree.map(lambda a, part=part: a[: len(part)], bound))
        check_finite(results[-1], part, "text")
        numbers.extend(part)
    longest = max(bound.by_token.shape[1] for bound in results)
    results = [
        bound._replace(by_token=filled(bound.by_token, len(bound.by_token), longest))
        for bound in results
    ]
    order = np.argsort(numbers)
    return jax.tree.map(lambda *parts: np.concatenate(parts)[order], *results)


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
    options = {"desc": name, "unit": "batch", "is_shown": processes.shows(progress)}
    with ticking(progress_bar(range(0, count, size), **options)) as bar:
        bar.set_postfix_str("compiling ...")
        for start in bar:
            yield np.minimum(np.arange(start, start + size, dtype=np.int32), count - 1)
            bar.set_postfix_str("", refresh=False)


def over_batches(
    fn: Callable[..., Any],
    params: Any,
    arrays: Any,
    batch_size: int,
    mesh: Mesh | None,
    *,
    name: str,
    progress: bool,
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[np.ndarray, Any]]:
    """(rows, fn(batch, rows) as numpy) of `batches` of a tree of numpy arrays [N, ...], which come
    to fn where the params are; no more once should_stop(). `joined` puts the results together."""
    count = len(jax.tree.leaves(arrays)[0])
    parts = 1 if mesh is None else sharding.batch_parts(mesh)
    for rows in batches(count, batch_size, parts, name=name, progress=progress):
        if should_stop():
            return
        batch = jax.tree.map(lambda a, rows=rows: a[rows], arrays), rows
        yield rows, processes.fetch(fn(*sharding.put_beside(params, batch, mesh)))


def joined(results: Sequence[Any], count: int) -> Any:
    """Trees of arrays [B, ...] one after the other, without what fills the last batch up."""
    return jax.tree.map(lambda *parts: np.concatenate(parts)[:count], *results)


def bound_until(
    one_round: Callable[[int], CorpusBound], target: float | None, max_rounds: int, tokens: int
) -> CorpusBound:
    """The mean of independent rounds, as many as bring its standard error to target; one for None.

    target is in nats per token, of which the text has `tokens`. one_round(r) is round r, r = 0, 1,
    ...; after max_rounds the error may still be above target. Each round is a line of log.
    """
    if target is None:
        return one_round(0)
    if not target > 0.0:
        raise ValueError(f"target_standard_error {target} is not above 0; give nats per token")
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
    by_token = None if rounds[0].by_token is None else sum(r.by_token for r in rounds) / len(rounds)
    by_block = None
    if rounds[0].by_block is not None:
        by_block = {
            name: sum(r.by_block[name] for r in rounds) / len(rounds) for name in rounds[0].by_block
        }
    passes = sum(r.passes for r in rounds)
    return CorpusBound(**means, passes=passes, curve=curve, by_token=by_token, by_block=by_block)


def in_units(
    sums: Mapping[str, float | None], tokens: int, characters: int, words: float
) -> dict[str, dict[str, float | None]]:
    """{unit: {name: value}} of total nats over a text: by name, those of a CorpusBound's `sums`.

    The error of a perplexity is to first order, perplexity times the error of its exponent: 3%
    too small where that is Gaussian and 0.2 nats, less below. The perplexity of a part means
    nothing, and is left out.
    """
    counts = {"perplexity_per_token": tokens, "perplexity_per_word": words}

    def exponential(name: str, nats: float, count: float) -> float:
        whole, is_error, _ = name.partition("_standard_error")
        if is_error:
            return perplexity_error(sums[whole] / count, nats / count)
        return perplexity(nats / count)

    units = {
        "nats_per_token": lambda name, nats: nats / tokens,
        "bits_per_character": lambda name, nats: bits_per_character(nats, characters),
        **{unit: functools.partial(exponential, count=count) for unit, count in counts.items()},
    }
    return {
        unit: {
            name: None if nats is None else convert(name, nats)
            for name, nats in sums.items()
            if unit not in counts or name not in ("diffusion", "tail", "prior")
        }
        for unit, convert in units.items()
    }
