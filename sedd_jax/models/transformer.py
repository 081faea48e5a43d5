"""The diffusion transformer of the paper, parameter for parameter as the original.

Tokens and total noise go in, the last hidden state and the output matrix come out; what the
output means is the graph's to say. Small has 169,627,218 parameters at GPT-2's vocabulary with
MASK. Parameters are float32. `dtype` is the dtype of the matrix products; the residual stream,
layer norms and the modulation stay in float32.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from sedd_jax.kernels.attention import attention
from sedd_jax.kernels.products import Precision, linear
from sedd_jax.kernels.residuals import remade
from sedd_jax.parallel.sharding import Placement

FREQUENCIES = 256
MLP_RATIO = 4
ROTARY_BASE = 10_000.0
LAYER_NORM_EPSILON = 1e-5


# What the backward pass makes again: nothing; each block, all but the products with its weights,
# or all of it. Less memory each, and more time: blocks costs a third more operations.
REMAT = {
    "none": None,
    "elementwise": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "blocks": jax.checkpoint_policies.nothing_saveable,
}


class Output(NamedTuple):
    """What the network knows: logits = hidden @ weight.T + bias."""

    hidden: jax.Array  # [B, L, C] in the compute dtype
    weight: jax.Array  # float32 [D, C]
    bias: jax.Array  # float32 [D]


# torch's default for linear layers: uniform in +-1/sqrt(fan_in).
_torch_linear = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def _torch_bias(fan_in: int):
    bound = fan_in**-0.5
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)


def sigma_embedding(sigma: jax.Array) -> jax.Array:
    """Cosines and sines of sigma at 128 frequencies from 1 to 1e-4, float32 [B, 256]."""
    half = FREQUENCIES // 2
    frequencies = jnp.exp(-jnp.log(10_000.0) * jnp.arange(half) / half)
    angles = sigma.astype(jnp.float32) * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def rotate(x: jax.Array) -> jax.Array:
    """Rotary position embedding of [B, L, H, K], halves not interleaved, computed in float32."""
    length, size = x.shape[1], x.shape[-1]
    inverse = ROTARY_BASE ** (-jnp.arange(0, size, 2, dtype=jnp.float32) / size)
    angles = (jnp.arange(length, dtype=jnp.float32)[:, None] * inverse)[:, None, :]  # [L, 1, K/2]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    left, right = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)
    return turned.astype(x.dtype)


def modulate(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    """x [B, L, C] scaled and shifted by the noise level's [B, C]."""
    return x * (1.0 + scale[:, None]) + shift[:, None]


class Modulation(nn.Module):
    """`count` vectors [B, C] from the conditioning [B, cond]; zero at the start (adaLN-zero)."""

    count: int
    size: int
    placement: Placement

    @nn.compact
    def __call__(self, conditioning):
        zeros = nn.initializers.zeros_init()
        dense = nn.Dense(
            self.count * self.size, kernel_init=zeros, precision=Precision.HIGHEST, name="linear"
        )
        out = self.placement.rows(dense(conditioning))
        return jnp.split(out, self.count, axis=-1)


def gelu(x: jax.Array) -> jax.Array:
    """The tanh form, computed in float32."""
    return nn.gelu(x.astype(jnp.float32), approximate=True).astype(x.dtype)


class Linear(nn.Module):
    """[..., *inputs] -> [..., *outputs] in `dtype`, as flax's DenseGeneral over the last axes.

    It takes what prologue makes of arrays, [..., *inputs], and keeps the arrays: that is made again
    for the gradient. Of a tuple it takes the first, and returns the others beside the product.
    """

    outputs: tuple[int, ...]
    dtype: jnp.dtype
    placement: Placement
    axes: int = 1  # of the inputs
    has_bias: bool = False
    prologue: Callable = lambda x: x

    @nn.compact
    def __call__(self, *arrays):
        def prologue(arrays):
            made = self.prologue(*arrays)
            return made if isinstance(made, tuple) else (made,)

        inputs = jax.eval_shape(prologue, arrays)[0].shape[-self.axes :]
        flat = (math.prod(inputs), math.prod(self.outputs))

        def kernel_init(key, shape):
            return _torch_linear(key, flat).reshape(shape)

        kernel = self.param("kernel", kernel_init, (*inputs, *self.outputs))
        bias = None
        if self.has_bias:
            bias = self.param("bias", _torch_bias(flat[0]), self.outputs, jnp.float32)

        def product(arrays, kernel, bias):
            x, *others = prologue(arrays)
            x = x.astype(self.dtype)
            out = linear(x, kernel, bias, self.axes, is_one_cpu=self.placement.is_one_cpu)
            return (out, *others) if others else out

        return remade(product, self.placement.platform)(arrays, kernel, bias)


class LayerNormWeight(nn.Module):
    """[C]: the norm itself is a function of arrays, to be made again."""

    @nn.compact
    def __call__(self, size):
        return self.param("scale", nn.initializers.ones_init(), (size,))


def norm(x: jax.Array, weight: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    """The layer norm of x [B, L, C] with weight [C], modulated by the noise level's [B, C]."""
    layer_norm = nn.LayerNorm(
        epsilon=LAYER_NORM_EPSILON, use_bias=False, dtype=jnp.float32, parent=None
    )
    return modulate(layer_norm.apply({"params": {"scale": weight}}, x), shift, scale)


class Block(nn.Module):
    """Attention and MLP, each modulated by the noise level and gated into the residual stream."""

    heads: int
    dropout: float
    dtype: jnp.dtype
    deterministic: bool
    placement: Placement
    attention: str

    @nn.compact
    def __call__(self, x, conditioning, lengths):
        x = self.placement.rows(x)
        size = x.shape[-1]
        head = (self.heads, size // self.heads)
        layer = functools.partial(Linear, dtype=self.dtype, placement=self.placement)

        def attend(heads, lengths):
            how = {"implementation": self.attention, "platform": self.placement.platform}
            return attention(*heads, lengths=lengths, **how)

        def stays():
            """What dropout leaves of a branch, bool; () where it leaves everything."""
            if self.deterministic or not self.dropout:
                return ()
            return (nn.Dropout(self.dropout, deterministic=False)(jnp.ones(x.shape)) > 0,)

        def gated(branch, gate, *stays):
            branch = branch.astype(jnp.float32)
            for mask in stays:
                branch = jnp.where(mask, branch / (1.0 - self.dropout), 0.0)
            return gate[:, None] * branch

        def norm_of_sum(x, branch, *modulation):
            x = x + gated(*branch)
            return norm(x, *modulation), x

        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = Modulation(
            6, size, self.placement, name="modulation"
        )(conditioning)

        weight_1, weight_2 = (LayerNormWeight(name=f"norm_{i}")(size) for i in (1, 2))
        qkv = layer((3, *head), prologue=norm, name="qkv")(x, weight_1, shift_1, scale_1)
        q, k, v = (a[:, :, 0] for a in jnp.split(qkv, 3, axis=2))  # [B, L, H, K]
        h = self.placement.over_heads(attend, (rotate(q), rotate(k), v), lengths)
        h = layer((size,), axes=2, name="out")(h)
        branch = (h, gate_1, *stays())

        up = layer((MLP_RATIO * size,), has_bias=True, prologue=norm_of_sum, name="up")
        h, x = up(x, branch, weight_2, shift_2, scale_2)
        h = layer((size,), has_bias=True, prologue=gelu, name="down")(h)
        x = x + remade(gated, self.placement.platform)(h, gate_2, *stays())
        return self.placement.rows(x), None


class Transformer(nn.Module):
    """(tokens [B, L], sigma [B, 1]) -> Output for `dim` states.

    is_token, bool [B, L], is False at the padding, which is at the end of a row: no position
    attends to it. None: no padding.
    """

    dim: int
    hidden_size: int
    blocks: int
    heads: int
    cond_dim: int
    dropout: float
    dtype: jnp.dtype = jnp.float32
    remat: str = "none"  # of REMAT
    attention: str = "auto"  # of kernels.attention
    placement: Placement = Placement()

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        sigma: jax.Array,
        *,
        deterministic: bool,
        is_token: jax.Array | None = None,
    ) -> Output:
        rows = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", in_axis=1, out_axis=0)
        zeros = nn.initializers.zeros_init()
        table = (self.dim, self.hidden_size)

        embedding = self.param("embedding", rows, table)
        x = self.placement.rows(self.placement.whole(embedding)[tokens])

        def embedded(name, fan_in):
            bias_init = _torch_bias(fan_in)
            return nn.Dense(
                self.cond_dim,
                kernel_init=_torch_linear,
                bias_init=bias_init,
                precision=Precision.HIGHEST,
                name=name,
            )

        conditioning = embedded("sigma_1", FREQUENCIES)(sigma_embedding(sigma))
        conditioning = embedded("sigma_2", self.cond_dim)(nn.silu(conditioning))
        conditioning = self.placement.rows(nn.silu(conditioning))

        block = Block
        if self.remat != "none":
            block = nn.remat(Block, prevent_cse=False, policy=REMAT[self.remat])
        scanned = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=nn.broadcast,
            length=self.blocks,
        )
        lengths = None if is_token is None else is_token.sum(axis=-1, dtype=jnp.int32)
        x, _ = scanned(
            self.heads,
            self.dropout,
            self.dtype,
            deterministic,
            self.placement,
            self.attention,
            name="blocks",
        )(x, conditioning, lengths)

        norm_weight = LayerNormWeight(name="norm")(self.hidden_size)
        shift, scale = Modulation(2, self.hidden_size, self.placement, name="modulation")(
            conditioning
        )
        hidden = self.placement.rows(norm(x, norm_weight, shift, scale).astype(self.dtype))
        weight = self.param("head_weight", zeros, table)
        bias = self.param("head_bias", zeros, (self.dim,))
        return Output(hidden, self.placement.whole(weight), bias)
