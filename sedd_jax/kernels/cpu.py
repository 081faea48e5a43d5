"""Operations that XLA compiles badly for a CPU, rewritten so that it compiles them well.

Each function equals a plain one, named in its docstring, which other platforms run. Imports jax
only.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from sedd_jax.kernels import matmul
from sedd_jax.kernels.matmul import CPU_SUMS_IN_FLOAT32, einsum


def as_bits(a: jax.Array, platform: str = "cpu") -> jax.Array:
    """a; on a CPU, bfloat16 as uint16, since loops there stack, slice and transpose bfloat16 as
    float32."""
    if platform == "cpu" and a.dtype == jnp.bfloat16:
        return jax.lax.bitcast_convert_type(a, jnp.uint16)
    return a


def from_bits(a: jax.Array) -> jax.Array:
    """The inverse of as_bits."""
    return jax.lax.bitcast_convert_type(a, jnp.bfloat16) if a.dtype == jnp.uint16 else a


def save(a: jax.Array, name: str, platform: str) -> jax.Array:
    """checkpoint_name(a, name): a is saved for the backward pass where the policy has the name."""
    if platform == "cpu" and a.dtype == jnp.bfloat16:
        return _save_bits(a, name)
    return checkpoint_name(a, name)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _save_bits(a, name):
    return from_bits(checkpoint_name(as_bits(a), name))


@_save_bits.defjvp
def _save_bits_jvp(name, primals, tangents):  # a bit cast alone has no gradient
    return from_bits(checkpoint_name(as_bits(primals[0]), name)), tangents[0]


def transposed(a: jax.Array) -> jax.Array:
    """a.swapaxes(-1, -2) for the left side of a matmul. No gradient is taken through it.

    XLA folds a transposition into the matmul, and a CPU's fast matmuls take no left side that is
    summed over its rows: without the copy that is made here they are half as fast.
    """
    shape = (*a.shape[:-2], a.shape[-1], a.shape[-2])

    def copied(a):
        # Flat, since no fast bfloat16 matmul takes an array that XLA has laid out by columns.
        bits = jax.lax.optimization_barrier(as_bits(a))
        flat = bits.swapaxes(-1, -2).reshape(-1)
        return from_bits(jax.lax.optimization_barrier(flat).reshape(shape))

    return jax.lax.platform_dependent(a, cpu=copied, default=lambda a: a.swapaxes(-1, -2))


def linear(x: jax.Array, kernel: jax.Array, axes: int, *, is_one_cpu: bool) -> jax.Array:
    """matmul.linear; is_one_cpu: the arrays are whole on a CPU.

    A CPU has fast matmuls of two matrices in one order only, of bfloat16 only with a result in
    float32. Elsewhere a flattened kernel would lose its split over devices.
    """
    if not (is_one_cpu and CPU_SUMS_IN_FLOAT32):
        return matmul.linear(x, kernel, axes)
    inputs = math.prod(kernel.shape[:axes])
    flat = _linear(x.reshape(-1, inputs), kernel.reshape(inputs, -1))
    return flat.reshape(*x.shape[: x.ndim - axes], *kernel.shape[axes:])


@jax.custom_vjp
def _linear(x, kernel):
    return einsum("mk,kn->mn", x, kernel.astype(x.dtype)).astype(x.dtype)


def _linear_backward(saved, d_out):
    x, kernel = saved
    d_x = einsum("mn,kn->mk", d_out, kernel.astype(x.dtype)).astype(x.dtype)
    if x.shape[1] <= d_out.shape[1]:  # the smaller one is transposed
        return d_x, einsum("km,mn->kn", transposed(x), d_out)
    return d_x, transposed(einsum("nm,mk->nk", transposed(d_out), x))


_linear.defvjp(lambda x, kernel: (_linear(x, kernel), (x, kernel)), _linear_backward)


def add_bias(x: jax.Array, bias: jax.Array, *, is_one_cpu: bool) -> jax.Array:
    """matmul.add_bias of x [..., C]."""
    return (_add_bias if is_one_cpu and CPU_SUMS_IN_FLOAT32 else matmul.add_bias)(x, bias)


@jax.custom_vjp
def _add_bias(x, bias):
    return matmul.add_bias(x, bias)


def _add_bias_backward(_, d_out):
    rows = d_out.reshape(-1, d_out.shape[-1])
    # Of bfloat16, the CPU's sum over rows is much slower than a matmul.
    return d_out, einsum("om,mn->on", jnp.ones((1, rows.shape[0]), rows.dtype), rows)[0]


_add_bias.defvjp(lambda x, bias: (_add_bias(x, bias), None), _add_bias_backward)


def update_if(
    is_accepted: jax.Array, update: Callable[[Any], Any], state: Any, platform: str
) -> Any:
    """jnp.where(is_accepted, update(state), state) of every leaf.

    For a CPU, XLA fuses loops of one result only: each leaf's would compute what it shares with the
    others anew, and read them from copies made before they are overwritten. In a branch, where a
    loop needs no old value but its own, all leaves are overwritten in place.
    """
    if platform == "cpu":
        return jax.lax.cond(is_accepted, update, lambda state: state, state)
    return jax.tree.map(lambda new, old: jnp.where(is_accepted, new, old), update(state), state)
