"""GPT-2, the causal network that scores generated text, parameter for parameter as the original.

Tokens go in, the last hidden state comes out; the embedding is the output matrix too. Parameters
are float32. `dtype` is the dtype of the matmuls; the residual stream, layer norms and the
softmax stay in float32. Imports jax, flax and sedd_jax.kernels only.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from sedd_jax.kernels import vocab_reduce
from sedd_jax.kernels.attention import attention
from sedd_jax.kernels.matmul import precision

MLP_RATIO = 4
LAYER_NORM_EPSILON = 1e-5


def _norm(name: str) -> nn.LayerNorm:
    # The fast variance, E[x^2] - E[x]^2, cancels where the mean outweighs the spread.
    return nn.LayerNorm(
        epsilon=LAYER_NORM_EPSILON, dtype=jnp.float32, use_fast_variance=False, name=name
    )


class Block(nn.Module):
    """Causal attention and MLP, each added to the float32 residual stream [B, L, C]."""

    heads: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        size = x.shape[-1]
        linear = {"dtype": self.dtype, "precision": precision(self.dtype)}

        h = _norm("norm_1")(x)
        qkv = nn.DenseGeneral((3, self.heads, size // self.heads), name="qkv", **linear)(h)
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]  # [B, L, H, K]
        h = attention(q, k, v, is_causal=True)
        h = nn.DenseGeneral(size, axis=(-2, -1), name="out", **linear)(h)
        x = x + h.astype(jnp.float32)

        h = _norm("norm_2")(x)
        h = nn.Dense(MLP_RATIO * size, name="up", **linear)(h)
        h = nn.gelu(h, approximate=True)  # tanh: "gelu_new"
        h = nn.Dense(size, name="down", **linear)(h)
        return x + h.astype(jnp.float32), None


class GPT2(nn.Module):
    """tokens int32 [B, L], L <= positions -> last hidden state after the final norm, [B, L, C].

    float32 whatever the dtype of the matmuls. Radford et al. 2019.
    """

    vocab_size: int
    positions: int
    hidden_size: int
    blocks: int
    heads: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        normal = nn.initializers.normal(0.02)
        embedding = self.param("embedding", normal, (self.vocab_size, self.hidden_size))
        position = self.param("position", normal, (self.positions, self.hidden_size))
        x = embedding[tokens] + position[: tokens.shape[1]]
        scanned = nn.scan(
            Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.blocks
        )
        x, _ = scanned(self.heads, self.dtype, name="blocks")(x)
        return _norm("norm")(x)


def token_nats(network: GPT2, params, tokens: jax.Array) -> jax.Array:
    """-log p(token l + 1 | tokens up to l) of int32 [B, L], nats, float32 [B, L - 1].

    A block of positions at a time, so no [B, L, V] table exists.
    """
    hidden = network.apply({"params": params}, tokens)[:, :-1].astype(network.dtype)
    no_bias = jnp.zeros(network.vocab_size)
    targets = tokens[:, 1:]
    nothing = jnp.full_like(targets, -1)  # no token is excluded from the sum
    total, pick = vocab_reduce.total_and_pick(
        hidden, params["embedding"], no_bias, nothing, targets
    )
    return total - pick
