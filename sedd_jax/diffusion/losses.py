"""Training objectives: nats per sequence from a score function and clean tokens. Imports jax only."""

import jax
import jax.numpy as jnp

from sedd_jax.diffusion.graphs import Graph, ScoreEntropy
from sedd_jax.diffusion.schedules import Schedule
from sedd_jax.diffusion.scores import ScoreFn, Tokens


def independent_times(key: jax.Array, batch_size: int, t_min: float) -> jax.Array:
    """Independent uniform times in [t_min, 1], float32 [B]; the paper's Algorithm 1."""
    return jax.random.uniform(key, (batch_size,), minval=t_min, maxval=1.0)


def stratified_times(key: jax.Array, batch_size: int, t_min: float) -> jax.Array:
    """One uniform time in each of B equal parts of [t_min, 1], in random order, float32 [B].

    Each time is uniform by itself, so the loss keeps its mean and loses variance.
    """
    key_order, key_times = jax.random.split(key)
    stratum = jax.random.permutation(key_order, batch_size)
    u = (stratum + jax.random.uniform(key_times, (batch_size,))) / batch_size
    return t_min + (1.0 - t_min) * u


TIMES = {"independent": independent_times, "stratified": stratified_times}


def dwdse(
    key: jax.Array,
    x0: Tokens,
    score_fn: ScoreFn,
    graph: Graph,
    schedule: Schedule,
    *,
    t_min: float = 1e-3,
    times=independent_times,
) -> jax.Array:
    """Diffusion-weighted denoising score entropy, nats per sequence, float32 [B].

    Lou et al. 2024, Theorem 3.6 and Algorithm 1: dsigma/dt times the score entropy of xt ~
    p_sigma(t)(. | x0), summed over L, at one time t for each sequence.
    """
    key_t, key_xt = jax.random.split(key)
    t = times(key_t, x0.shape[0], t_min)[:, None]
    return dwdse_at(t, graph.perturb(key_xt, x0, schedule.sigma(t)), x0, score_fn, graph, schedule)


def dwdse_at(
    t: jax.Array, xt: Tokens, x0: Tokens, score_fn: ScoreFn, graph: Graph, schedule: Schedule
) -> jax.Array:
    """The same at given times [B, 1] and noised tokens [B, L]."""
    return weighted_entropy(t, xt, x0, score_fn, graph, schedule).value


def weighted_entropy(
    t: jax.Array, xt: Tokens, x0: Tokens, score_fn: ScoreFn, graph: Graph, schedule: Schedule
) -> ScoreEntropy:
    """dsigma/dt times the score entropy at times [B, 1], summed over L; float32 [B] each."""
    sigma = schedule.sigma(t)
    entropy = graph.score_entropy(score_fn(xt, sigma), sigma, xt, x0)
    return jax.tree.map(lambda e: jnp.sum(schedule.dsigma_dt(t) * e, axis=-1), entropy)


OBJECTIVES = {"dwdse": dwdse}
