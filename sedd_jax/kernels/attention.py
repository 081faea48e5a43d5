"""Attention over all positions, or over those up to one's own. Imports jax only."""

import jax
import jax.numpy as jnp


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    is_causal: bool = False,
    lengths: jax.Array | None = None,
) -> jax.Array:
    """softmax(q k^T / sqrt(K)) v over all positions; every array is [B, L, H, K].

    is_causal leaves out the positions after the query's, lengths, int32 [B], those from a row's
    length on (a number and not a mask: cuDNN's kernel takes no mask of padding). The softmax is taken in float32 whatever
    the dtype of q.
    """
    # This function takes no precision, but what it calls follows the default in force.
    with jax.default_matmul_precision("highest" if q.dtype == jnp.float32 else "default"):
        return jax.nn.dot_product_attention(
            q, k, v, is_causal=is_causal, key_value_seq_lengths=lengths, implementation="xla"
        )
