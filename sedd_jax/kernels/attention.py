"""Full bidirectional attention. Imports jax only."""

import jax


def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """softmax(q k^T / sqrt(K)) v over all positions; every array is [B, L, H, K].

    The softmax is taken in float32 whatever the dtype of q.
    """
    return jax.nn.dot_product_attention(q, k, v, implementation="xla")
