"""Exact draws from a categorical law. Imports jax only; floor 0."""

import jax
import jax.numpy as jnp

# Tokens of a group. A draw makes noise for V / GROUP groups and for GROUP tokens of one of them.
GROUP = 256


def categorical(key: jax.Array, log_weights: jax.Array) -> jax.Array:
    """A token in proportion to exp(log_weights [..., V]), int32 [...].

    The law is that of noise over all V tokens, but for a large V first a group of tokens is drawn,
    in proportion to its sum, and then a token of it: noise is dearer than the sum.
    """

    def noisy(key, log_weights):
        # mode="high": with 23-bit noise a token of probability 1e-7 beside a dominant "stay" is
        # drawn at half its rate.
        drawn = jax.random.categorical(key, log_weights, mode="high")
        return drawn.astype(jnp.int32)[..., None]

    vocab = log_weights.shape[-1]
    if vocab <= 2 * GROUP:
        return noisy(key, log_weights)[..., 0]
    key_group, key_token = jax.random.split(key)
    none_more = [(0, 0)] * (log_weights.ndim - 1) + [(0, -vocab % GROUP)]
    groups = jnp.pad(log_weights, none_more, constant_values=-jnp.inf)
    groups = groups.reshape(*log_weights.shape[:-1], -1, GROUP)
    begin = GROUP * noisy(key_group, jax.nn.logsumexp(groups, axis=-1))
    tokens = begin + jnp.arange(GROUP, dtype=jnp.int32)
    members = jnp.take_along_axis(log_weights, jnp.minimum(tokens, vocab - 1), axis=-1)
    members = jnp.where(tokens < vocab, members, -jnp.inf)
    return jnp.take_along_axis(tokens, noisy(key_token, members), axis=-1)[..., 0]
