"""An upper bound on -log p(x0), all of it, with its standard error. Imports jax only.

    -log p(x0) <= diffusion over [t_min, 1] + reconstruction at t_min + prior

Lou et al. 2024, Theorem 3.6, with the two boundary terms that its tables leave out.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sedd_jax.diffusion.graphs import Graph
from sedd_jax.diffusion.samplers import denoise
from sedd_jax.diffusion.schedules import Schedule
from sedd_jax.diffusion.scores import ScoreFn, Tokens

# Fractional part of the golden ratio: its multiples fill [0, 1) evenly at every count.
GOLDEN = 0.6180339887498949


class Bound(NamedTuple):
    """Unbiased estimates of the bound's parts; nats per sequence, float32 [B] each.

    normalised is the diffusion part of the scores rescaled to their true total (a valid bound
    from the same weights, never looser; None where the graph fixes no total). The variances are of
    the estimates' noise, with the noise levels of a sequence taken as drawn apart from those of
    the others and, below 6 passes, with how their means differ counted in: overestimates, a little
    from 16 passes on, several times at 2 and 4.
    """

    diffusion: jax.Array
    normalised: jax.Array | None
    prior: jax.Array
    tail: jax.Array  # reconstruction: -log of the denoiser that sampling ends with, at t_min
    variance: jax.Array  # of diffusion + tail
    normalised_variance: jax.Array | None  # of normalised + tail

    @property
    def total(self) -> jax.Array:
        """The bound on -log p(x0)."""
        return self.diffusion + self.tail + self.prior

    @property
    def standard_error(self) -> jax.Array:
        """Of total, from the noise drawn."""
        return self.variance**0.5


def stratified(key: jax.Array, index: jax.Array, passes: int) -> jax.Array:
    """Places in [0, 1) for every pass over the examples with these indices, float32 [passes, B].

    Pass k of an example falls into the k-th of `passes` equal parts; within the part the examples
    of the corpus are spread evenly from a random offset. Each is uniform in its part.
    """
    offset = jax.random.uniform(key, (passes, 1))
    # index * GOLDEN mod 1 in integers: float32 has no digits left at large indices.
    turn = index.astype(jnp.uint32) * jnp.uint32(round(GOLDEN * 2**32))
    u = (offset + turn.astype(jnp.float32) * 2.0**-32) % 1.0
    return (jnp.arange(passes)[:, None] + u) / passes


def check_passes(passes: int, name: str = "passes") -> None:
    """ValueError unless the passes can be compared in pairs."""
    if passes < 2 or passes % 2:
        raise ValueError(f"{name} {passes} must be an even number of at least 2")


def _pairs_variance(values: jax.Array) -> jax.Array:
    """Variance of the mean over axis 0 from the differences within pairs of neighbours, [B].

    The slope of the pairs' means along axis 0 is taken off; what else the entries' means differ
    by counts as noise.
    """
    pairs = values.reshape(-1, 2, *values.shape[1:])
    differences = pairs[:, 1] - pairs[:, 0]
    if len(pairs) > 2:
        middle = pairs.mean(axis=1)
        # Neighbouring pairs are two places apart. A pair's own noise stays out of its slope.
        slope = (middle[2:] - middle[:-2]) / 4.0
        first, last = (middle[2] - middle[1]) / 2.0, (middle[-2] - middle[-3]) / 2.0
        differences -= jnp.concatenate([first[None], slope, last[None]])
    return jnp.sum(differences**2, axis=0) / values.shape[0] ** 2


def _difficulty(cost: jax.Array, seen: jax.Array) -> jax.Array:
    """What each pass expects of each token's cost from the other passes alone, [passes, B, L].

    The mean cost of the token where the others saw it, shrunk to the mean over the sequence.
    """
    seen = seen.astype(cost.dtype)
    sums, counts = (a.sum(axis=0) - a for a in (cost * seen, seen))
    overall = sums.sum(axis=-1, keepdims=True) / jnp.maximum(counts.sum(-1, keepdims=True), 1.0)
    return (sums + overall) / (counts + 1.0)


def bound(
    key: jax.Array,
    x0: Tokens,
    index: jax.Array,
    score_fn: ScoreFn,
    graph: Graph,
    schedule: Schedule,
    *,
    passes: int,
    tail_passes: int = 2,
    t_min: float = 1e-3,
    is_token: jax.Array | None = None,
) -> Bound:
    """Bound -log p(x0) with passes + tail_passes network calls a sequence.

    x0 is int32 [B, L], index int32 [B] the examples' places in the corpus: times and noise depend
    on (key, index) alone, not on how the corpus is cut into batches. is_token, bool [B, L], leaves
    padding out. Both numbers of passes must be even, for the error estimate.

    Three things make it need fewer calls than independent times would, and leave it unbiased: the
    noise levels are stratified over passes and corpus; `graph.probe` draws copies whose weights
    vary little; and a token's cost is compared with what the other passes found it to cost, so
    that it matters less which tokens a pass happens to noise.
    """
    check_passes(passes)
    check_passes(tail_passes, "tail_passes")
    key_places, key_passes, key_tail = jax.random.split(key, 3)
    counted = jnp.ones(x0.shape, bool) if is_token is None else is_token

    def probes(key, u):
        """graph.probe with a key for each example."""
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, index)

        def one(key, *example):
            probe = graph.probe(key, *(a[None] for a in example), schedule, t_min)
            return jax.tree.map(lambda a: a[0], probe)

        return jax.vmap(one)(keys, x0, u, counted)

    def diffusion_pass(k_and_u):
        k, u = k_and_u
        probe = probes(jax.random.fold_in(key_passes, k), u[:, None])
        scores = score_fn(probe.xt, probe.sigma)
        entropy = graph.score_entropy(scores, probe.sigma, probe.xt, x0)
        return jax.tree.map(lambda e: probe.unit * e, entropy), probe.weight, probe.mean_weight

    def tail_pass(k):
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key_tail, k), index)
        t = jnp.full((x0.shape[0], 1), t_min)
        perturb = jax.vmap(lambda k, x, sg: graph.perturb(k, x[None], sg[None])[0])
        xt = perturb(keys, x0, schedule.sigma(t))
        log_p = denoise(xt, t, score_fn, graph, schedule).log_probability(x0)
        return -jnp.sum(jnp.where(counted, log_p, 0.0), axis=-1)

    def compared(cost):
        """The estimate of each pass, [passes, B]."""
        excess = (weight - mean_weight) * _difficulty(cost, weight > 0.0)
        return jnp.sum(jnp.where(counted, weight * cost - excess, 0.0), axis=-1)

    places = stratified(key_places, index, passes)
    entropy, weight, mean_weight = jax.lax.map(diffusion_pass, (jnp.arange(passes), places))
    tails = jax.lax.map(tail_pass, jnp.arange(tail_passes))

    if entropy.normalised is None:
        values, normalised = compared(entropy.value), None
    else:
        normalised = compared(entropy.normalised)
        # What the scores' totals cost is >= 0; kept apart and added, the bound stays above.
        penalty = jnp.maximum(entropy.value - entropy.normalised, 0.0)
        values = normalised + jnp.sum(jnp.where(counted, weight * penalty, 0.0), axis=-1)
    tail_variance = _pairs_variance(tails)
    return Bound(
        diffusion=values.mean(axis=0),
        normalised=None if normalised is None else normalised.mean(axis=0),
        prior=graph.prior(schedule.sigma(jnp.ones((x0.shape[0],)))) * counted.sum(axis=-1),
        tail=tails.mean(axis=0),
        variance=_pairs_variance(values) + tail_variance,
        normalised_variance=(
            None if normalised is None else _pairs_variance(normalised) + tail_variance
        ),
    )


def perplexity(nats_per_token: float) -> float:
    """exp(nats_per_token), inf where a float64 cannot hold it."""
    return math.exp(nats_per_token) if nats_per_token < 709.0 else math.inf


def bits_per_character(nats: float, characters: int) -> float:
    """Total nats over a text, per character of it, in bits."""
    return nats / characters / math.log(2.0)
