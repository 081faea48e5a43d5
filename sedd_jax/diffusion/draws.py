"""Exact draws from a categorical distribution. Imports jax only."""

import jax
import jax.numpy as jnp

# Tokens of a group. A draw makes noise for V / GROUP groups and for GROUP tokens of one of them.
GROUP = 256


def categorical(key: jax.Array, log_weights: jax.Array) -> jax.Array:
    """A token in proportion to exp(log_weights [..., V]), int32 [...].

    The distribution is that of noise over all V tokens, but for a large V first a group of tokens
    is drawn, in proportion to its sum, and then a token of it: noise costs more than the sum.
    """

    def draw(key, log_weights):
        # mode="high": with 23-bit noise a token of probability 1e-7 beside a dominant "stay" is
        # drawn at half its rate.
        return jax.random.categorical(key, log_weights, mode="high").astype(jnp.int32)

    *rows, vocab = log_weights.shape
    if vocab <= 2 * GROUP:
        return draw(key, log_weights)
    key_group, key_token = jax.random.split(key)
    padding = [(0, 0)] * len(rows) + [(0, -vocab % GROUP)]
    groups = jnp.pad(log_weights, padding, constant_values=-jnp.inf)
    groups = jax.nn.logsumexp(groups.reshape(*rows, -1, GROUP), axis=-1)
    begin = GROUP * draw(key_group, groups)
    # Slices of one size: a last group that is not full begins with tokens of the one before.
    start = jnp.minimum(begin, vocab - GROUP)
    cut = jax.vmap(lambda row, i: jax.lax.dynamic_slice_in_dim(row, i, GROUP))
    members = cut(log_weights.reshape(-1, vocab), start.reshape(-1)).reshape(*rows, GROUP)
    is_member = jnp.arange(GROUP) >= (begin - start)[..., None]
    return start + draw(key_token, jnp.where(is_member, members, -jnp.inf))
