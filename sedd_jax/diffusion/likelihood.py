"""An upper bound on -log p(x0), all of it, with its standard error. Imports jax only.

    -log p(x0) <= diffusion over [t_min, 1] + reconstruction at t_min + prior

Lou et al. 2024, Theorem 3.6, with the two boundary terms that its tables leave out.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sedd_jax.diffusion.graphs import Graph, ScoreEntropy
from sedd_jax.diffusion.losses import weighted_entropy
from sedd_jax.diffusion.samplers import denoise
from sedd_jax.diffusion.schedules import Schedule
from sedd_jax.diffusion.scores import ScoreFn, Tokens

# Fractional part of the golden ratio: its multiples fill [0, 1) evenly at every count.
GOLDEN = 0.6180339887498949


class Bound(NamedTuple):
    """Unbiased estimates of the bound's parts; nats per sequence, float32 [B] each.

    normalised is the diffusion part of the scores rescaled to their true total (a valid bound
    from the same weights, never looser; None where the graph fixes no total). The variances are of
    the estimates' noise, overestimated: a few percent from about 8 passes on, much at 2.
    """

    diffusion: jax.Array
    normalised: jax.Array | None
    prior: jax.Array
    tail: jax.Array  # reconstruction: -log of the denoiser that sampling ends with, at t_min
    variance: jax.Array  # of diffusion + tail
    normalised_variance: jax.Array | None  # of normalised + tail


def stratified_time(key: jax.Array, index: jax.Array, passes: int, t_min: float) -> jax.Array:
    """Times of every pass over the examples with these global indices, float32 [passes, B].

    Pass k of an example falls into the k-th of `passes` equal parts of [t_min, 1]; within the part
    the examples of the corpus are spread evenly from a random offset. Each is uniform in its part.
    """
    offset = jax.random.uniform(key, (passes, 1))
    # index * GOLDEN mod 1 in integers: float32 has no digits left at large indices.
    turn = index.astype(jnp.uint32) * jnp.uint32(round(GOLDEN * 2**32))
    u = (offset + turn.astype(jnp.float32) * 2.0**-32) % 1.0
    return t_min + (1.0 - t_min) * (jnp.arange(passes)[:, None] + u) / passes


def _pairs_variance(values: jax.Array) -> jax.Array:
    """Variance of the mean over axis 0 from the differences of neighbours, [B].

    Neighbouring strata have almost equal means; what difference there is counts as noise.
    """
    differences = values[0::2] - values[1::2]
    return jnp.sum(differences**2, axis=0) / values.shape[0] ** 2


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
) -> Bound:
    """Bound -log p(x0) with passes + tail_passes network calls a sequence.

    x0 is int32 [B, L], index int32 [B] the examples' places in the corpus: times and noise depend
    on (key, index) alone, not on how the corpus is cut into batches. Both numbers of passes must
    be even, for the error estimate.
    """
    for name, count in (("passes", passes), ("tail_passes", tail_passes)):
        if count < 2 or count % 2:
            raise ValueError(f"{name} {count} must be an even number of at least 2")
    key_times, key_passes, key_tail = jax.random.split(key, 3)

    def noised(key, t):
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, index)
        sigma = schedule.sigma(t)
        perturb = jax.vmap(lambda k, x, sg: graph.perturb(k, x[None], sg[None])[0])
        return perturb(keys, x0, sigma)

    def diffusion_pass(k_and_t):
        k, t = k_and_t
        t = t[:, None]
        xt = noised(jax.random.fold_in(key_passes, k), t)
        entropy = weighted_entropy(t, xt, x0, score_fn, graph, schedule)
        return jax.tree.map(lambda e: (1.0 - t_min) * e, entropy)

    def tail_pass(k):
        t = jnp.full((x0.shape[0], 1), t_min)
        xt = noised(jax.random.fold_in(key_tail, k), t)
        law = denoise(xt, t, score_fn, graph, schedule)
        return -jnp.sum(law.log_probability(x0), axis=-1)

    times = stratified_time(key_times, index, passes, t_min)
    values: ScoreEntropy = jax.lax.map(diffusion_pass, (jnp.arange(passes), times))
    tails = jax.lax.map(tail_pass, jnp.arange(tail_passes))

    tail_variance = _pairs_variance(tails)
    sigma_1 = schedule.sigma(jnp.ones((x0.shape[0],)))
    normalised = values.normalised
    return Bound(
        diffusion=values.value.mean(axis=0),
        normalised=None if normalised is None else normalised.mean(axis=0),
        prior=graph.prior(sigma_1) * x0.shape[1],
        tail=tails.mean(axis=0),
        variance=_pairs_variance(values.value) + tail_variance,
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
