"""Matrix products in the precision that their operands promise. Imports jax only."""

import math

import jax
import jax.numpy as jnp

from sedd_jax.kernels.residuals import packed, unpacked

Precision = jax.lax.Precision
# The CPU runtime of jax 0.7.2 cannot add up products of bfloat16 in float32.
_CPU_ADDS_WIDE = jax.__version_info__ >= (0, 8)


def precision(dtype: jnp.dtype) -> Precision | None:
    """HIGHEST for float32, whose default is bfloat16 passes on TPU and TF32 on NVIDIA GPUs."""
    return Precision.HIGHEST if dtype == jnp.float32 else None


def product(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """einsum of a and b, of one dtype, summed in float32, float32."""

    def plain(a, b):
        kind = {"precision": precision(a.dtype), "preferred_element_type": jnp.float32}
        return jnp.einsum(spec, a, b, **kind)

    def widened(a, b):  # the same sums: float32 holds products of bfloat16 exactly
        return plain(a.astype(jnp.float32), b.astype(jnp.float32))

    if a.dtype == jnp.float32 or _CPU_ADDS_WIDE:
        return plain(a, b)
    return jax.lax.platform_dependent(a, b, cpu=widened, default=plain)


def transposed(a: jax.Array) -> jax.Array:
    """a [..., M, N] as [..., N, M], the left side of a product. No gradient is taken through it."""
    shape = (*a.shape[:-2], a.shape[-1], a.shape[-2])

    # XLA folds a transposition into the product, and a CPU's fast products take no left side that
    # is summed over its rows: half as fast as with the copy that is made here.
    def copied(a):
        # As whole numbers, since a CPU turns bfloat16 through float32; and flat, since what XLA
        # has laid out by columns is not taken for one of bfloat16's fast products.
        bits = jax.lax.optimization_barrier(packed(a, "cpu"))
        flat = bits.swapaxes(-1, -2).reshape(-1)
        return unpacked(jax.lax.optimization_barrier(flat).reshape(shape))

    return jax.lax.platform_dependent(a, cpu=copied, default=lambda a: a.swapaxes(-1, -2))


def linear(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    axes: int = 1,
    *,
    is_one_cpu: bool,
) -> jax.Array:
    """x [..., *inputs] times kernel [*inputs, *outputs] plus bias [*outputs], in the dtype of x.

    axes is the number of inputs. Kernel and bias are float32. is_one_cpu says that the arrays are
    whole on a CPU.

    A CPU has fast products that it takes in one order only, and of bfloat16 such that are summed
    and returned in float32 only. They are asked for where nothing is split: a flattened kernel
    would lose its split.
    """
    if is_one_cpu and _CPU_ADDS_WIDE:
        inputs = math.prod(kernel.shape[:axes])
        flat_bias = None if bias is None else bias.reshape(-1)
        flat = _in_order(x.reshape(-1, inputs), kernel.reshape(inputs, -1), flat_bias)
        return flat.reshape(*x.shape[: x.ndim - axes], *kernel.shape[axes:])
    summed = (tuple(range(x.ndim - axes, x.ndim)), tuple(range(axes)))
    kernel = kernel.astype(x.dtype)
    out = jax.lax.dot_general(x, kernel, (summed, ((), ())), precision=precision(x.dtype))
    # In float32, in which the gradient of the bias is then summed.
    return out if bias is None else (out.astype(jnp.float32) + bias).astype(x.dtype)


@jax.custom_vjp
def _in_order(x, kernel, bias):
    out = product("mk,kn->mn", x, kernel.astype(x.dtype))
    return (out if bias is None else out + bias).astype(x.dtype)


def _in_order_forward(x, kernel, bias):
    return _in_order(x, kernel, bias), (packed(x, "cpu"), kernel, bias)


def _in_order_backward(kept, slope):
    bits, kernel, bias = kept
    x = unpacked(bits)
    d_x = product("mn,kn->mk", slope, kernel.astype(x.dtype)).astype(x.dtype)
    if x.shape[1] <= slope.shape[1]:  # the smaller one is transposed
        d_kernel = product("km,mn->kn", transposed(x), slope)
    else:
        d_kernel = transposed(product("nm,mk->nk", transposed(slope), x))
    # Of bfloat16, the CPU's sum over rows is much slower than a product.
    ones = jnp.ones((1, slope.shape[0]), slope.dtype)
    d_bias = None if bias is None else product("om,mn->on", ones, slope)[0]
    return d_x, d_kernel, d_bias


_in_order.defvjp(_in_order_forward, _in_order_backward)
