"""Gaussian diffusion of learned token embeddings, with a variational bound. Imports jax only.

PLAID (Gulrajani & Hashimoto 2023, arXiv 2305.18619), which is VDM (Kingma et al. 2021, arXiv
2107.00630) in the space of embeddings e(x), each of norm 1:

    z_t = alpha_t e(x0) + sigma_t noise,  alpha_t^2 = 1 - sigma_t^2 = sigmoid(-gamma_t)
    -log p(x0) <= diffusion over t in [0, 1] + reconstruction from z_0 + prior at z_1

gamma = -log SNR rises with t and is learned. Levels are float32 [B, 1], one for each sequence, and
latents float32 [B, L, C].
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient

from sedd_jax.diffusion.likelihood import Bound, Examples, check_passes, stratified
from sedd_jax.diffusion.losses import Loss, Mean, independent_times
from sedd_jax.diffusion.scores import Tokens

BINS = 64  # of the learned schedule
# Shares of a batch: sequences that the reconstruction is estimated from, the others are for the
# diffusion; and batches in which the network sees its estimate (PLAID: 1/4 of the sequences).
RECONSTRUCTION_SHARE = 1 / 8
SELF_CONDITIONING_SHARE = 1 / 4


def signal_scale(gamma: jax.Array) -> jax.Array:
    """alpha, of the clean embedding."""
    return jnp.exp(0.5 * jax.nn.log_sigmoid(-gamma))


def noise_scale(gamma: jax.Array) -> jax.Array:
    """sigma, the standard deviation of the noise; alpha^2 + sigma^2 = 1."""
    return jnp.exp(0.5 * jax.nn.log_sigmoid(gamma))


def perturb(noise: jax.Array, clean: jax.Array, gamma: jax.Array) -> jax.Array:
    """z_t from standard normal noise and the clean embeddings, [B, L, C] each."""
    return signal_scale(gamma)[..., None] * clean + noise_scale(gamma)[..., None] * noise


def output_prior(z: jax.Array, gamma: jax.Array) -> jax.Array:
    """The vector [B, L, C] whose inner product with e_v is the log-likelihood of token v given z.

    log N(z; alpha e_v, sigma^2) = alpha / sigma^2 (z . e_v) - alpha^2 |e_v|^2 / (2 sigma^2) + ...,
    and |e_v| = 1 for every token: the rest is one constant.
    """
    scale = jnp.exp(0.5 * jax.nn.log_sigmoid(-gamma) - jax.nn.log_sigmoid(gamma))
    return scale[..., None] * z


class LearnedSchedule(NamedTuple):
    """gamma(t), piecewise linear: each of the bins, equal parts of [gamma_0, gamma_1], takes as
    much time as its weight says.

    Increasing whatever the parameters are. The bound depends on the ends alone; the weights change
    its variance, see `loss`.
    """

    gamma_0: jax.Array  # float32 []
    log_range: jax.Array  # float32 []: log(gamma_1 - gamma_0)
    log_weights: jax.Array  # float32 [bins], but for a constant

    @property
    def gamma_1(self) -> jax.Array:
        return self.gamma_0 + jnp.exp(self.log_range)

    def at(self, t: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """gamma(t), its slope, and the log of t's density over gamma, but for a constant.

        Only the third has a gradient in the weights, and it has none in t.
        """
        bins = self.log_weights.size
        weights = stop_gradient(jax.nn.softmax(self.log_weights))
        times = jnp.concatenate([jnp.zeros(1), jnp.cumsum(weights)[:-1], jnp.ones(1)])
        rank = jnp.interp(t, times, jnp.linspace(0.0, 1.0, bins + 1))
        which = jnp.clip(jnp.searchsorted(times, t, side="right") - 1, 0, bins - 1)
        span = jnp.exp(self.log_range)
        slope = span / (bins * weights[which])
        return self.gamma_0 + span * rank, slope, jax.nn.log_softmax(self.log_weights)[which]

    def gamma(self, t: jax.Array) -> jax.Array:
        """-log SNR at time t in [0, 1], the shape of t."""
        return self.at(t)[0]


class Clean(Protocol):
    """The distribution of the clean tokens given the noised embeddings, one for each position."""

    def mean(self) -> jax.Array:
        """The expected embedding, float32 [B, L, C]."""

    def mean_and_log_p(self, tokens: Tokens) -> tuple[jax.Array, jax.Array]:
        """The same, and the log-probability of tokens [B, L], float32 [B, L]."""

    def draw(self, keys: jax.Array, is_greedy: bool = False) -> Tokens:
        """Tokens int32 [B, L], the likeliest with is_greedy; keys has one for each row, [B]."""


class EmbeddingDiffusion(NamedTuple):
    """What one set of parameters knows: the forward process and the network that inverts it."""

    embeddings: jax.Array  # float32 [V, C], rows of norm 1
    schedule: LearnedSchedule
    # (z, gamma, previous estimate of the clean embeddings, embeddings) -> Clean
    network: Callable[[jax.Array, jax.Array, jax.Array, jax.Array], Clean]

    def denoise(self, z: jax.Array, gamma: jax.Array, previous: jax.Array | None = None) -> Clean:
        """The clean tokens' distribution; previous None: there is no estimate yet."""
        previous = jnp.zeros_like(z) if previous is None else previous
        return self.network(z, gamma, previous, self.embeddings)

    def denoise_twice(self, z: jax.Array, gamma: jax.Array) -> Clean:
        """Self-conditioned on the network's estimate from the same z."""
        return self.denoise(z, gamma, self.denoise(z, gamma).mean())

    def prior(self, clean: jax.Array) -> jax.Array:
        """KL(q(z_1 | x0) || N(0, 1)) of clean embeddings [B, L, C], nats per token [B, L]."""
        gamma = self.schedule.gamma_1
        alpha_squared, log_variance = jax.nn.sigmoid(-gamma), jax.nn.log_sigmoid(gamma)
        return 0.5 * (alpha_squared * (clean**2 - 1.0) - log_variance).sum(axis=-1)


def diffusion_cost(
    clean: jax.Array, estimate: jax.Array, gamma: jax.Array, slope: jax.Array
) -> jax.Array:
    """-SNR'(t) / 2 |e(x0) - estimate|^2 = gamma'(t) / 2 exp(-gamma) |...|^2, nats per token [B, L].

    Its integral over t is the diffusion part of the bound.
    """
    return 0.5 * slope * jnp.exp(-gamma) * jnp.sum((clean - estimate) ** 2, axis=-1)


def loss(
    key: jax.Array,
    x0: Tokens,
    diffusion: EmbeddingDiffusion,
    *,
    times: Callable[[jax.Array, int, float], jax.Array] = independent_times,
    is_token: jax.Array | None = None,
) -> Loss:
    """The bound with self-conditioning in a part of the batches, nats per sequence.

    A sequence is at one noise level: the least, which the reconstruction is estimated from, or
    that of a time in [0, 1], each with the weight that leaves the mean unbiased. In a
    self-conditioned batch only the network learns: what the estimate that it sees owes to
    embeddings and schedule has no gradient, so neither does the rest.

    The schedule's weights have no gradient of the bound, which does not depend on them. Theirs is
    that of the estimate's relative second moment over times (VDM, appendix I): times are drawn from
    a density p over gamma, the cost c is as 1 / p, and d E[c^2] = -E[c^2 d log p].
    """
    key_t, key_noise, key_self = jax.random.split(key, 3)
    is_token = jnp.ones(x0.shape, bool) if is_token is None else is_token
    is_conditioned = jax.random.bernoulli(key_self, SELF_CONDITIONING_SHARE)
    diffusion = _frozen_if(is_conditioned, diffusion)

    u = times(key_t, x0.shape[0], 0.0)[:, None]
    is_lowest = u < RECONSTRUCTION_SHARE
    t = jnp.maximum(u - RECONSTRUCTION_SHARE, 0.0) / (1.0 - RECONSTRUCTION_SHARE)
    gamma, slope, log_density = diffusion.schedule.at(t)
    clean = diffusion.embeddings[x0]
    z = perturb(jax.random.normal(key_noise, clean.shape), clean, gamma)

    def estimate():
        return stop_gradient(diffusion.denoise(z, gamma).mean())

    previous = jax.lax.cond(is_conditioned, estimate, lambda: jnp.zeros_like(z))
    mean, log_p = diffusion.denoise(z, gamma, previous).mean_and_log_p(x0)

    def summed(nats):  # over the sequence, [B]
        return jnp.sum(nats, axis=-1, where=is_token)

    cost = summed(diffusion_cost(clean, mean, gamma, slope)) / (1.0 - RECONSTRUCTION_SHARE)
    cost = jnp.where(is_lowest[:, 0], 0.0, cost)
    reconstruction = jnp.where(is_lowest[:, 0], -summed(log_p) / RECONSTRUCTION_SHARE, 0.0)
    prior = summed(diffusion.prior(clean))

    squared = stop_gradient(cost**2)
    moment = -squared / jnp.maximum(squared.mean(), jnp.finfo(jnp.float32).tiny) * log_density[:, 0]
    nats = cost + reconstruction + prior + (moment - stop_gradient(moment))
    parts = {"diffusion": cost, "reconstruction": reconstruction, "prior": prior}
    parts |= {"gamma_0": diffusion.schedule.gamma_0, "gamma_1": diffusion.schedule.gamma_1}
    parts = stop_gradient(parts)
    return Loss(nats, {k: Mean(v.sum(), jnp.asarray(v.size)) for k, v in parts.items()})


def _frozen_if(is_frozen: jax.Array, diffusion: EmbeddingDiffusion) -> EmbeddingDiffusion:
    """The same, without gradients in embeddings and the schedule's ends where is_frozen []."""
    embeddings, schedule, network = diffusion
    frozen = (embeddings, schedule.gamma_0, schedule.log_range)
    embeddings, gamma_0, log_range = jax.tree.map(
        lambda a: jnp.where(is_frozen, stop_gradient(a), a), frozen
    )
    schedule = schedule._replace(gamma_0=gamma_0, log_range=log_range)
    return EmbeddingDiffusion(embeddings, schedule, network)


def bound(
    key: jax.Array,
    x0: Tokens,
    index: jax.Array,
    diffusion: EmbeddingDiffusion,
    *,
    passes: int,
    reconstruction_passes: int = 2,
    is_token: jax.Array | None = None,
) -> Bound:
    """Bound -log p(x0), as likelihood.bound, with 2 (passes + reconstruction_passes) network calls.

    Each estimate is self-conditioned, as in PLAID's evaluation.
    """
    check_passes(passes)
    check_passes(reconstruction_passes, "reconstruction_passes")
    key_levels, key_diffusion, key_reconstruction = jax.random.split(key, 3)
    is_token = jnp.ones(x0.shape, bool) if is_token is None else is_token
    examples = Examples(x0, index, is_token)
    clean = diffusion.embeddings[x0]

    def noised(key, k, gamma):
        def of_one(key, clean, gamma):
            return perturb(jax.random.normal(key, clean.shape), clean, gamma)

        return examples.each(of_one, jax.random.fold_in(key, k), clean, gamma)

    def diffusion_pass(k_and_t):
        k, t = k_and_t
        gamma, slope, _ = diffusion.schedule.at(t[:, None])
        mean = diffusion.denoise_twice(noised(key_diffusion, k, gamma), gamma).mean()
        return jnp.where(is_token, diffusion_cost(clean, mean, gamma, slope), 0.0)

    def reconstruction_pass(k):
        gamma = jnp.broadcast_to(diffusion.schedule.gamma_0, (len(x0), 1))
        z = noised(key_reconstruction, k, gamma)
        _, log_p = diffusion.denoise_twice(z, gamma).mean_and_log_p(x0)
        return jnp.where(is_token, -log_p, 0.0)

    t = stratified(key_levels, index, passes)  # [passes, B]
    costs = jax.lax.map(diffusion_pass, (jnp.arange(passes), t))
    reconstruction = jax.lax.map(reconstruction_pass, jnp.arange(reconstruction_passes))
    prior = jnp.where(is_token, diffusion.prior(clean), 0.0)
    return Bound(
        diffusion_passes=costs.sum(axis=-1).T,
        reconstruction_passes=reconstruction.sum(axis=-1).T,
        prior=prior.sum(axis=-1),
        by_token=costs.mean(axis=0) + reconstruction.mean(axis=0) + prior,
    )


class Chain(NamedTuple):
    """What sampling carries from step to step."""

    tokens: Tokens  # int32 [B, L]: at the end the sample, before it those nearest to the estimate
    calls: jax.Array  # int32 [B]: network calls so far
    z: jax.Array
    previous: jax.Array  # the last estimate of the clean embeddings


def sample(
    key: jax.Array,
    diffusion: EmbeddingDiffusion,
    shape: tuple[int, int],
    *,
    steps: int | jax.Array,
    is_greedy: bool = False,
    index: jax.Array | None = None,
    begin: int | jax.Array = 0,
    end: int | jax.Array | None = None,
    chain: Chain | None = None,
) -> Chain:
    """Draw `shape` = (B, L) sequences by `steps` steps of q(z_s | z_t, estimate) and a last draw.

    The estimate of each step is self-conditioned on that of the step before. The last draw is from
    p(x0 | z_0), which the bound's reconstruction scores; with is_greedy it takes the likeliest
    tokens, as PLAID does. steps + 1 network calls. A token is -1 if its latent is not finite.
    index, begin, end and chain are as in samplers.sample.
    """
    if isinstance(steps, int) and steps < 1:
        raise ValueError(f"steps {steps} is below 1; give at least 1")
    index = jnp.arange(shape[0]) if index is None else index
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, index)
    key_limit, key_steps, key_last = jax.vmap(lambda k: jax.random.split(k, 3), out_axes=1)(keys)
    size = (shape[1], diffusion.embeddings.shape[1])

    def normal(keys):
        return jax.vmap(lambda key: jax.random.normal(key, size))(keys)

    def level(t):
        return jnp.broadcast_to(diffusion.schedule.gamma(t), (shape[0], 1))

    def step(i, chain):
        gamma_t, gamma_s = level(1.0 - i / steps), level(1.0 - (i + 1) / steps)
        mean = diffusion.denoise(chain.z, gamma_t, chain.previous).mean()
        noise = normal(jax.vmap(jax.random.fold_in, (0, None))(key_steps, i))
        z = posterior(noise, chain.z, mean, gamma_t, gamma_s)
        return Chain(chain.tokens, chain.calls + 1, z, mean)

    def with_tokens(chain, tokens, calls):
        tokens = jnp.where(jnp.isfinite(chain.z).all(axis=-1), tokens, -1)
        return chain._replace(tokens=tokens, calls=chain.calls + calls)

    def finish(chain):
        clean = diffusion.denoise(chain.z, level(0.0), chain.previous)
        return with_tokens(chain, clean.draw(key_last, is_greedy), 1)

    def show(chain):
        estimate = jnp.where(chain.calls[:, None, None] == 0, chain.z, chain.previous)
        return with_tokens(chain, nearest(estimate, diffusion.embeddings), 0)

    z = normal(key_limit)
    start = Chain(jnp.zeros(shape, jnp.int32), jnp.zeros(shape[0], jnp.int32), z, jnp.zeros_like(z))
    if chain is not None:
        start = jax.tree.map(lambda new, old: jnp.where(begin == 0, new, old), start, chain)
    chain = jax.lax.fori_loop(begin, steps if end is None else end, step, start)
    return finish(chain) if end is None else jax.lax.cond(end == steps, finish, show, chain)


def nearest(latents: jax.Array, embeddings: jax.Array) -> Tokens:
    """The tokens whose embeddings, of one norm, are nearest to [B, L, C], a row at a time."""
    return jax.lax.map(lambda row: jnp.argmax(row @ embeddings.T, axis=-1), latents).astype(
        jnp.int32
    )


def posterior(
    noise: jax.Array, z: jax.Array, clean: jax.Array, gamma_t: jax.Array, gamma_s: jax.Array
) -> jax.Array:
    """z_s ~ q(z_s | z_t, clean), from standard normal noise; VDM, equation (33).

    With c = 1 - exp(gamma_s - gamma_t): alpha_s ((1 - c) z_t / alpha_t + c clean) + sigma_s sqrt(c)
    noise.
    """
    gamma_t, gamma_s = gamma_t[..., None], gamma_s[..., None]
    c = -jnp.expm1(gamma_s - gamma_t)
    mean = signal_scale(gamma_s) * ((1.0 - c) * z / signal_scale(gamma_t) + c * clean)
    return mean + noise_scale(gamma_s) * jnp.sqrt(c) * noise
