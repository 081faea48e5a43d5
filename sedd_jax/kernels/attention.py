"""Full bidirectional attention. Imports jax only."""

import jax
import jax.numpy as jnp


def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """softmax(q k^T / sqrt(K)) v over all positions; every array is [B, L, H, K].

    The softmax is taken in float32 whatever the dtype of q.
    """
    # This function takes no precision, but what it calls follows the default in force.
    with jax.default_matmul_precision("highest" if q.dtype == jnp.float32 else "default"):
        return jax.nn.dot_product_attention(q, k, v, implementation="xla")
