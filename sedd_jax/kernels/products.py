"""Matrix products in the precision that their operands promise. Imports jax only."""

import math

import jax
import jax.numpy as jnp

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
    """a.T, [N, M], as the left side of a product. No gradient is taken through it."""

    # XLA folds a transposition into the product, and a CPU's fast products take no left side that
    # is summed over its rows: half as fast as with the copy that is made here.
    def copied(a):
        return jax.lax.optimization_barrier(jax.lax.optimization_barrier(a).T)

    return jax.lax.platform_dependent(a, cpu=copied, default=lambda a: a.T)


def dot_general_for(platform: str, is_split: bool):
    """What flax's layers take as their dot_general; None for jax's own.

    A CPU has fast products that it takes in one order only, and of bfloat16 such that are summed
    and returned in float32 only: they are rounded afterwards, the gradients' too. Not where arrays
    are split over devices: a flattened kernel would lose its split.
    """
    return _in_order if platform == "cpu" and _CPU_ADDS_WIDE and not is_split else None


def _in_order(a, b, dimension_numbers, precision=None, preferred_element_type=None):
    """lax.dot_general of the last axes of a and the first of b, without batch axes."""
    (axes, others), batch = dimension_numbers
    count = len(axes)
    last, first = tuple(range(a.ndim - count, a.ndim)), tuple(range(count))
    if tuple(axes) != last or tuple(others) != first or batch != ((), ()):
        raise AssertionError(f"a layer's product sums over its last axes, not {dimension_numbers}")
    inside = math.prod(b.shape[:count])
    flat = _matmul(a.reshape(-1, inside), b.reshape(inside, -1))
    return flat.reshape(*a.shape[: a.ndim - count], *b.shape[count:])


@jax.custom_vjp
def _matmul(a, b):
    return product("mk,kn->mn", a, b).astype(a.dtype)


def _matmul_forward(a, b):
    return _matmul(a, b), (a, b)


def _matmul_backward(kept, slope):
    a, b = kept
    d_a = product("mn,kn->mk", slope, b).astype(a.dtype)
    if a.shape[1] <= slope.shape[1]:  # the smaller one is transposed
        d_b = product("km,mn->kn", transposed(a), slope)
    else:
        d_b = transposed(product("nm,mk->nk", transposed(slope), a))
    return d_a, d_b.astype(b.dtype)


_matmul.defvjp(_matmul_forward, _matmul_backward)
