"""Entropy, Kullback-Leibler divergence and mutual information from scores. Imports jax only.

With p_t and q_t two distributions under the same forward process, and the divergence of their
scores as `Graph.score_divergence` has it,

    KL(p_0 || q_0) = integral over [0, 1] of dsigma/dt E[divergence at x ~ p_t] dt + KL(p_1 || q_1)

(INFO-SEDD, 2502.19183). The integral is taken over [t_min, 1], where the scores are known: it is
the KL at t_min less that at 1, where little is left of either. With q the uniform distribution it
gives the entropy, with q the product of the distributions of two parts their mutual information.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from sedd_jax.diffusion.graph import Graph
from sedd_jax.diffusion.likelihood import Examples, check_passes, controlled, stratified
from sedd_jax.diffusion.schedules import Schedule
from sedd_jax.diffusion.scores import ScoreFn, Sigma, Tokens

# (xt int32 [B, L], sigma float32 [B, 1]) -> divergence of two distributions' scores, nats [B, L]
Compare = Callable[[Tokens, Sigma], jax.Array]


def from_uniform(score_fn: ScoreFn, graph: Graph) -> Compare:
    """From independent uniform tokens: the KL is L log V less the entropy. One network call."""
    return lambda xt, sigma: graph.divergence_from_uniform(score_fn(xt, sigma), sigma, xt)


def between(score_fn: ScoreFn, other: ScoreFn, graph: Graph) -> Compare:
    """From another distribution. A call of each network."""
    return lambda xt, sigma: graph.score_divergence(
        score_fn(xt, sigma), other(xt, sigma), sigma, xt
    )


def from_parts(score_fn: ScoreFn, graph: Graph, is_first: jax.Array) -> Compare:
    """From two parts that know nothing of each other: the KL is their mutual information.

    is_first, bool [L], marks the tokens of one part. Its scores by itself are those of the text
    whose other part is hidden: ValueError where noise hides nothing. Three network calls.
    """
    graph.hidden(jnp.zeros((1, 1), jnp.int32), True)

    def compare(xt, sigma):
        whole = score_fn(xt, sigma)

        def nats(is_part):
            alone = score_fn(graph.hidden(xt, ~is_part), sigma)
            return jnp.where(is_part, graph.score_divergence(whole, alone, sigma, xt), 0.0)

        return nats(is_first) + nats(~is_first)

    return compare


def divergence(
    key: jax.Array,
    x0: Tokens,
    index: jax.Array,
    compare: Compare,
    graph: Graph,
    schedule: Schedule,
    *,
    passes: int,
    t_min: float = 1e-3,
    is_token: jax.Array | None = None,
) -> jax.Array:
    """Estimates of the integral at noised copies of x0 ~ p_0, one from each pass, [B, passes].

    Their mean over texts and passes is unbiased. key, index, passes and is_token as in
    `likelihood.bound`, with its stratified noise levels, its copies and its control variate.
    """
    check_passes(passes)
    key_levels, key_copies = jax.random.split(key)
    is_token = jnp.ones(x0.shape, bool) if is_token is None else is_token
    examples = Examples(x0, index, is_token)

    def one_pass(k_and_u):
        k, u = k_and_u
        p = examples.probed(jax.random.fold_in(key_copies, k), u, graph, schedule, t_min)
        return p.scale * compare(p.xt, p.sigma), p.weight, p.mean_weight

    u = stratified(key_levels, index, passes)
    cost, weight, mean_weight = jax.lax.map(one_pass, (jnp.arange(passes), u))  # [passes, B, L]
    return controlled(cost, weight, mean_weight, is_token).sum(axis=-1).T
