"""The functions between a block's matmuls, with gradients that pass over memory few times.

An accelerator spends on them what it takes to read and write their arrays. XLA fuses what is
elementwise, but by autodiff's gradients alone it writes intermediate results that two of its
kernels share. Each gradient here is the plain function's, in a form that is fused whole. Imports
jax only.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

GELU_SCALE = math.sqrt(2.0 / math.pi)
GELU_CUBE = 0.044715


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def modulated_norm(epsilon, dtype, x, weight, shift, scale):
    """(x, layer_norm(x) * weight * (1 + scale) + shift) of x [B, L, C], the latter in dtype.

    weight [C] and the noise level's shift and scale [B, 1, C] are float32, and so is what is
    computed. x is returned for the residual sum: both its gradients meet here and are added in the
    pass that computes one.
    """
    return _norm_forward(epsilon, dtype, x, weight, shift, scale)[0]


def _norm_forward(epsilon, dtype, x, weight, shift, scale):
    wide = x.astype(jnp.float32)
    mean = wide.mean(axis=-1, keepdims=True)
    # Both means come from one pass; rounding may make the difference less than 0.
    variance = jnp.maximum(jnp.square(wide).mean(axis=-1, keepdims=True) - jnp.square(mean), 0.0)
    inverse = jax.lax.rsqrt(variance + epsilon)
    mean, inverse = checkpoint_name((mean, inverse), "statistics")
    normed = (wide - mean) * inverse
    out = (normed * weight * (1.0 + scale) + shift).astype(dtype)
    return (x, checkpoint_name(out, "normed")), (x, mean, inverse, weight, scale)


def _norm_backward(epsilon, dtype, saved, cotangents):
    x, mean, inverse, weight, scale = saved
    d_x, d_out = (d.astype(jnp.float32) for d in cotangents)
    normed = (x.astype(jnp.float32) - mean) * inverse
    d_shift = d_out.sum(axis=1, keepdims=True)
    d_scaled = (d_out * normed).sum(axis=1, keepdims=True)  # of weight * (1 + scale)
    d_normed = d_out * (weight * (1.0 + scale))
    # The norm takes out what is constant over the channels and what is along x.
    d_normed -= d_normed.mean(axis=-1, keepdims=True)
    along = (d_normed * normed).mean(axis=-1, keepdims=True)
    d_x += inverse * (d_normed - normed * along)
    d_weight = (d_scaled * (1.0 + scale)).sum(axis=(0, 1))
    return d_x.astype(x.dtype), d_weight, d_shift, d_scaled * weight


modulated_norm.defvjp(_norm_forward, _norm_backward)


@jax.custom_vjp
@jax.named_scope("gelu")
def gelu(x: jax.Array) -> jax.Array:
    """x (1 + tanh(u)) / 2 with u = sqrt(2 / pi) (x + 0.044715 x^3), computed in float32."""
    wide = x.astype(jnp.float32)
    return (wide * _gelu_share(wide)).astype(x.dtype)


def _gelu_share(wide):
    """(1 + tanh(u)) / 2, as a sigmoid: a GPU has an instruction for exp and none for tanh."""
    return jax.nn.sigmoid(2.0 * GELU_SCALE * (wide + GELU_CUBE * wide**3))


@jax.named_scope("gelu")
def _gelu_backward(x, d_out):
    wide, share = x.astype(jnp.float32), _gelu_share(x.astype(jnp.float32))
    d_u = 2.0 * GELU_SCALE * (1.0 + 3.0 * GELU_CUBE * jnp.square(wide))
    slope = share + wide * share * (1.0 - share) * d_u
    return (_written_once((d_out.astype(jnp.float32) * slope).astype(x.dtype)),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)


def _written_once(x):
    """x, which a GPU's XLA may not write a second time in float32 for the sum of a bias's
    gradient."""
    barrier = jax.lax.optimization_barrier
    return jax.lax.platform_dependent(x, cuda=barrier, rocm=barrier, default=lambda x: x)


def keep_masks(key: jax.Array, count: int, shape: tuple[int, ...], rate: float) -> jax.Array:
    """`count` masks for dropout of [B, L, C], bool; each element is False with chance `rate`.

    An element costs 8 random bits, a quarter of a word. They know multiples of 1/256 only: each
    row's rate is the one above or the one below, by chance, so that `rate` is met exactly.
    """
    bits_key, row_key = jax.random.split(key)
    words = jax.random.bits(bits_key, (count, *shape[:-1], -(-shape[-1] // 4)))
    bits = jax.lax.bitcast_convert_type(words, jnp.uint8).reshape(*words.shape[:-1], -1)
    below = jnp.floor(256 * rate + jax.random.uniform(row_key, (count, shape[0], 1, 1)))
    bits, below = checkpoint_name((bits[..., : shape[-1]], below), "dropout")
    return bits.astype(jnp.float32) >= below
