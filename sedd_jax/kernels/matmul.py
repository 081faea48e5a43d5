"""Matmuls in the precision that their operands promise. Imports jax only."""

import jax
import jax.numpy as jnp

Precision = jax.lax.Precision
# The CPU runtime of jax 0.7.2 has no bfloat16 matmul that sums in float32.
CPU_SUMS_IN_FLOAT32 = jax.__version_info__ >= (0, 8)


def precision(dtype: jnp.dtype) -> Precision | None:
    """HIGHEST for float32, whose default is bfloat16 passes on TPU and TF32 on NVIDIA GPUs."""
    return Precision.HIGHEST if dtype == jnp.float32 else None


def einsum(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """jnp.einsum of a and b, of one dtype, summed and returned in float32."""

    def plain(a, b):
        return jnp.einsum(
            spec, a, b, precision=precision(a.dtype), preferred_element_type=jnp.float32
        )

    def widened(a, b):  # the same sums: in float32 each term of them is exact
        return plain(a.astype(jnp.float32), b.astype(jnp.float32))

    if a.dtype == jnp.float32 or CPU_SUMS_IN_FLOAT32:
        return plain(a, b)
    return jax.lax.platform_dependent(a, b, cpu=widened, default=plain)


def linear(x: jax.Array, kernel: jax.Array, axes: int = 1) -> jax.Array:
    """x [..., *inputs] times the float32 kernel [*inputs, *outputs], in the dtype of x.

    axes is the number of inputs.
    """
    contracted = (tuple(range(x.ndim - axes, x.ndim)), tuple(range(axes)))
    kernel = kernel.astype(x.dtype)
    return jax.lax.dot_general(x, kernel, (contracted, ((), ())), precision=precision(x.dtype))


def add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
    """x plus the float32 bias, in the dtype of x; the gradient of the bias is summed in float32."""
    return (x.astype(jnp.float32) + bias).astype(x.dtype)
