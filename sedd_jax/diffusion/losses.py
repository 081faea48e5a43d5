"""Training objectives: nats per sequence from a score function and clean tokens."""

from collections.abc import Callable
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


# (key, batch_size, t_min) -> times in [t_min, 1], float32 [B]
Times = Callable[[jax.Array, int, float], jax.Array]
TIMES: dict[str, Times] = {"independent": independent_times, "stratified": stratified_times}


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


# loss_at(t [B, 1], xt, x0, score_fn, graph, schedule, *, is_token) -> Loss: one at these times.


def at_random_times(
    loss_at: Callable[..., Loss],
    key: jax.Array,
    x0: Tokens,
    score_fn: ScoreFn,
    graph: Graph,
    schedule: Schedule,
    *,
    t_min: float = 1e-3,
    times: Times = independent_times,
    is_token: jax.Array | None = None,
) -> Loss:
    """loss_at one time of [t_min, 1] for each sequence and xt ~ p_sigma(t)(. | x0); Algorithm 1.

    is_token, bool [B, L], leaves padding out of the loss.
    """
    key_t, key_xt = jax.random.split(key)
    t = times(key_t, x0.shape[0], t_min)[:, None]
    xt = graph.perturb(key_xt, x0, schedule.sigma(t))
    return loss_at(t, xt, x0, score_fn, graph, schedule, is_token=is_token)


def dwdse(
    key: jax.Array,
    x0: Tokens,
    score_fn: ScoreFn,
    graph: Graph,
    schedule: Schedule,
    *,
    t_min: float = 1e-3,
    times: Times = independent_times,
    is_token: jax.Array | None = None,
) -> Loss:
    """Diffusion-weighted denoising score entropy, nats per sequence.

    Lou et al. 2024, Theorem 3.6 and Algorithm 1: dsigma/dt times the score entropy of xt ~
    p_sigma(t)(. | x0), summed over L, at one time t for each sequence: see `at_random_times`.
    """
    how = {"t_min": t_min, "times": times, "is_token": is_token}
    return at_random_times(dwdse_at, key, x0, score_fn, graph, schedule, **how)


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
    metrics = {}
    if entropy.log_z is not None:
        log_z = jax.lax.stop_gradient(entropy.log_z)
        has_one = (log_z != 0.0) & (True if is_token is None else is_token)
        metrics["log_z"] = Mean(jnp.sum(log_z, where=has_one), jnp.sum(has_one))
    return Loss(_summed(schedule.dsigma_dt(t) * entropy.value, is_token), metrics)


def normalised_at(
    t: jax.Array,
    xt: Tokens,
    x0: Tokens,
    score_fn: ScoreFn,
    graph: Graph,
    schedule: Schedule,
    *,
    is_token: jax.Array | None = None,
) -> Loss:
    """The same for scores rescaled to the total Z = 1 that the true ones have: the cross entropy of
    the masked tokens, weighted by dsigma/dt / expm1(sigma), 1 / t of the log-linear schedule.

    MDLM (2406.07524), MD4 (2406.04329), RADD's t-DCE (2406.03736). A graph that fixes no total has
    the score entropy itself: for the scores of a distribution of clean tokens, UDLM's (2412.10193).
    """
    sigma = schedule.sigma(t)
    entropy = graph.score_entropy(score_fn(xt, sigma), sigma, xt, x0)
    value = entropy.value if entropy.normalised is None else entropy.normalised
    return Loss(_summed(schedule.dsigma_dt(t) * value, is_token), {})


def unweighted_at(
    t: jax.Array,
    xt: Tokens,
    x0: Tokens,
    score_fn: ScoreFn,
    graph: Graph,
    schedule: Schedule,
    *,
    is_token: jax.Array | None = None,
) -> Loss:
    """The cross entropy of the masked tokens, without a weight: nats, but of no bound."""
    sigma = schedule.sigma(t)
    entropy = graph.score_entropy(score_fn(xt, sigma), sigma, xt, x0)
    return Loss(_summed(jnp.expm1(sigma) * entropy.normalised, is_token), {})


def concrete_score_matching_at(
    t: jax.Array,
    xt: Tokens,
    x0: Tokens,
    score_fn: ScoreFn,
    graph: Graph,
    schedule: Schedule,
    *,
    is_token: jax.Array | None = None,
) -> Loss:
    """dwdse with squared errors of the ratios in place of the score entropy: not nats.

    Meng et al. 2022 (2211.00802); Lou et al. 2024, appendix D, where it is the ablation.
    """
    sigma = schedule.sigma(t)
    error = graph.squared_error(score_fn(xt, sigma), sigma, xt, x0)
    return Loss(_summed(schedule.dsigma_dt(t) * error, is_token), {})


def d3pm_at(
    t: jax.Array,
    xt: Tokens,
    x0: Tokens,
    score_fn: ScoreFn,
    graph: Graph,
    schedule: Schedule,
    *,
    discrete_steps: int,
    is_token: jax.Array | None = None,
) -> Loss:
    """D3PM's bound (Austin et al. 2021, 2107.03006) less its prior, nats: discrete_steps times

        KL(q(x_s | x_t, x0) || p(x_s | x_t)),    p = sum over x0 of q(x_s | x_t, x0) p(x0 | x_t)

    with p(x0 | x_t) in proportion to f(x0) q(x_t | x0) for the network's f, see
    Graph.scores_of_clean. t [B, 1] is a multiple of 1 / discrete_steps and s the one before it; at
    s = 0, the clean tokens, that is -log p(x0 | x_t).
    """
    nats = d3pm_token_nats(t, xt, x0, score_fn, graph, schedule, discrete_steps=discrete_steps)
    return Loss(_summed(nats, is_token), {})


def d3pm_token_nats(
    t: jax.Array,
    xt: Tokens,
    x0: Tokens,
    score_fn: ScoreFn,
    graph: Graph,
    schedule: Schedule,
    *,
    discrete_steps: int,
) -> jax.Array:
    """The same for each token, [B, L]."""
    s = t - 1.0 / discrete_steps
    is_first = s < 0.5 / discrete_steps
    sigma_t = schedule.sigma(t)
    sigma_s = jnp.where(is_first, 0.0, schedule.sigma(jnp.where(is_first, t, s)))
    kl = graph.posterior_kl(score_fn(xt, sigma_t), xt, x0, sigma_t, sigma_s)
    return discrete_steps * kl


def _summed(per_token: jax.Array, is_token: jax.Array | None) -> jax.Array:
    """Over the tokens of each sequence, [B]."""
    return jnp.sum(per_token, axis=-1, where=True if is_token is None else is_token)
