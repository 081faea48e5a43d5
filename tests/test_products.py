"""Products: the precision they keep, and the layers' product that a CPU takes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sedd_jax.kernels import products
from sedd_jax.kernels.products import dot_general_for, product, transposed

dtypes = pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])


@dtypes
def test_a_product_is_summed_and_returned_in_float32(dtype):
    a, b = (jax.random.normal(jax.random.key(i), (40, 40)).astype(dtype) for i in range(2))
    exact = np.asarray(a, np.float64) @ np.asarray(b, np.float64)
    found = product("mk,kn->mn", a, b)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(transposed(a), np.asarray(a).T)


@dtypes
@pytest.mark.parametrize(
    "a_shape, b_shape, axes",
    [
        ((2, 5, 8), (8, 3, 2, 4), 1),  # as q, k and v
        ((2, 5, 2, 4), (2, 4, 7), 2),  # as the way out of attention
        ((3, 16), (16, 4), 1),  # the gradient transposes the other one
    ],
)
def test_the_layers_product_and_its_gradients_are_lax_dot_generals(dtype, a_shape, b_shape, axes):
    dims = ((tuple(range(len(a_shape) - axes, len(a_shape))), tuple(range(axes))), ((), ()))
    a = jax.random.normal(jax.random.key(0), a_shape).astype(dtype)
    b = jax.random.normal(jax.random.key(1), b_shape).astype(dtype)

    def answers(dot, dtype):
        def cost(a, b):
            out = dot(a, b, dims, precision="highest").astype(jnp.float32)
            return (out * jnp.sin(jnp.arange(out.size)).reshape(out.shape)).sum(), out

        return jax.grad(cost, argnums=(0, 1), has_aux=True)(a.astype(dtype), b.astype(dtype))

    slopes, value = answers(products._in_order, dtype)
    exact_slopes, exact = answers(jax.lax.dot_general, jnp.float32)
    assert all(slope.dtype == dtype for slope in slopes)
    tolerance = 1e-6 if dtype == jnp.float32 else 1e-2
    for ours, right in zip((value, *slopes), (exact, *exact_slopes), strict=True):
        error = np.linalg.norm(np.asarray(ours, np.float32) - right)
        assert error < tolerance * np.linalg.norm(right)


def test_other_devices_and_split_arrays_take_jaxs_own_product():
    assert dot_general_for("gpu", is_split=False) is dot_general_for("tpu", is_split=False) is None
    assert dot_general_for("cpu", is_split=True) is None
    own = products._in_order if products._CPU_ADDS_WIDE else None  # not on jax 0.7's
    assert dot_general_for("cpu", is_split=False) is own


def test_a_product_over_other_axes_is_a_mistake():
    with pytest.raises(AssertionError, match="sums over its last axes"):
        dims = (((0,), (0,)), ((), ()))
        products._in_order(jnp.zeros((3, 2)), jnp.zeros((3, 2)), dims)
