"""Training objectives: nats per sequence from a score function and clean tokens."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from sedd_jax.diffusion.graph import Graph
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


class Mean(NamedTuple):
    """A mean that may be taken over several batches: both fields then have an axis for them."""

    total: jax.Array  # the sum of what is averaged
    count: jax.Array  # how many were summed

    def value(self) -> jax.Array:
        """The mean over everything counted, float32 []; 0 where nothing is."""
        return jnp.sum(self.total) / jnp.maximum(jnp.sum(self.count), 1)


class Loss(NamedTuple):
    """The value of an objective on a batch."""

    nats: jax.Array  # per sequence, float32 [B]: what training minimises
    metrics: dict[str, Mean]  # by name, what is only reported; no gradient is taken through it


def dwdse(
    key: jax.Array,
    x0: Tokens,
    score_fn: ScoreFn,
    graph: Graph,
    schedule: Schedule,
    *,
    t_min: float = 1e-3,
    times=independent_times,
    is_token: jax.Array | None = None,
) -> Loss:
    """Diffusion-weighted denoising score entropy, nats per sequence.

    Lou et al. 2024, Theorem 3.6 and Algorithm 1: dsigma/dt times the score entropy of xt ~
    p_sigma(t)(. | x0), summed over L, at one time t for each sequence. is_token, bool [B, L],
    leaves padding out of the sum.
    """
    key_t, key_xt = jax.random.split(key)
    t = times(key_t, x0.shape[0], t_min)[:, None]
    xt = graph.perturb(key_xt, x0, schedule.sigma(t))
    return dwdse_at(t, xt, x0, score_fn, graph, schedule, is_token=is_token)


def dwdse_at(
    t: jax.Array,
    xt: Tokens,
    x0: Tokens,
    score_fn: ScoreFn,
    graph: Graph,
    schedule: Schedule,
    *,
    is_token: jax.Array | None = None,
) -> Loss:
    """dwdse at the times t [B, 1] and the noised tokens xt [B, L]."""
    sigma = schedule.sigma(t)
    entropy = graph.score_entropy(score_fn(xt, sigma), sigma, xt, x0)
    counted = True if is_token is None else is_token
    metrics = {}
    if entropy.log_z is not None:
        log_z = jax.lax.stop_gradient(entropy.log_z)
        has_one = (log_z != 0.0) & counted
        metrics["log_z"] = Mean(jnp.sum(log_z, where=has_one), jnp.sum(has_one))
    nats = jnp.sum(schedule.dsigma_dt(t) * entropy.value, axis=-1, where=counted)
    return Loss(nats, metrics)


OBJECTIVES = {"dwdse": dwdse}
