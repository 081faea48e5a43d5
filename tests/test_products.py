"""Products: the precision they keep, the layers' own, and what is kept for their gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sedd_jax.kernels import products
from sedd_jax.kernels.products import linear, product, transposed
from sedd_jax.kernels.residuals import packed, remade, unpacked

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
    "x_shape, kernel_shape, axes",
    [
        ((2, 5, 8), (8, 3, 2, 4), 1),  # as q, k and v
        ((2, 5, 2, 4), (2, 4, 7), 2),  # as the way out of attention
        ((3, 16), (16, 4), 1),  # the gradient transposes the other one
    ],
)
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_layer_and_its_gradients_are_lax_dot_generals(
    dtype, x_shape, kernel_shape, axes, has_bias
):
    x = jax.random.normal(jax.random.key(0), x_shape).astype(dtype)
    kernel = jax.random.normal(jax.random.key(1), kernel_shape).astype(dtype).astype(jnp.float32)
    bias = jax.random.normal(jax.random.key(2), kernel_shape[axes:]) if has_bias else None

    def answers(x, is_one_cpu):
        def cost(x, kernel, bias):
            out = linear(x, kernel, bias, axes, is_one_cpu=is_one_cpu)
            weighted = jnp.sin(jnp.arange(out.size)).reshape(out.shape) * out.astype(jnp.float32)
            return weighted.sum(), out

        return jax.grad(cost, argnums=(0, 1, 2), has_aux=True)(x, kernel, bias)

    slopes, value = answers(x, is_one_cpu=True)
    exact_slopes, exact = answers(x.astype(jnp.float32), is_one_cpu=False)
    assert (value.dtype, slopes[0].dtype, slopes[1].dtype) == (dtype, dtype, jnp.float32)
    tolerance = 1e-6 if dtype == jnp.float32 else 1e-2
    pairs = zip(
        jax.tree.leaves((value, slopes)), jax.tree.leaves((exact, exact_slopes)), strict=True
    )
    for ours, right in pairs:
        error = np.linalg.norm(np.asarray(ours, np.float32) - right)
        assert error < tolerance * np.linalg.norm(right)


@pytest.mark.parametrize("is_one_cpu", [True, False])
def test_one_cpu_takes_flat_products(is_one_cpu):
    def layer(x, kernel):
        return linear(x, kernel, None, is_one_cpu=is_one_cpu)

    program = str(jax.make_jaxpr(layer)(jnp.zeros((2, 3, 4)), jnp.zeros((4, 5))))
    assert ("6,4" in program) == (is_one_cpu and products._CPU_ADDS_WIDE)


@dtypes
def test_transposed_is_the_transpose_of_the_last_two_axes(dtype):
    a = jax.random.normal(jax.random.key(0), (3, 4, 5)).astype(dtype)
    found = jax.jit(transposed)(a)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, a.swapaxes(1, 2))


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_what_is_remade_keeps_its_arguments_alone(platform):
    def fn(x, is_kept, scale):
        return jnp.where(is_kept, jnp.tanh(jnp.exp(x.astype(jnp.float32))) ** 3, 0.0) * scale

    x = jax.random.normal(jax.random.key(0), (4, 3)).astype(jnp.bfloat16)
    is_kept, scale = jnp.arange(12).reshape(4, 3) % 3 > 0, jnp.linspace(1.0, 2.0, 3)

    def answers(fn):
        value, pull = jax.vjp(lambda x, scale: fn(x, is_kept, scale), x, scale)
        return value, pull(jnp.ones_like(value))

    jax.tree.map(np.testing.assert_array_equal, answers(remade(fn, platform)), answers(fn))
    arguments = jax.eval_shape(lambda: (x, is_kept, scale))
    kept = jax.eval_shape(lambda *a: jax.vjp(remade(fn, platform), *a)[1], *arguments)
    bits = {"cpu": jnp.uint16, "gpu": jnp.bfloat16}[platform]
    found = sorted((leaf.shape, leaf.dtype.name) for leaf in jax.tree.leaves(kept))
    assert found == sorted([((4, 3), jnp.dtype(bits).name), ((4, 3), "bool"), ((3,), "float32")])
    np.testing.assert_array_equal(unpacked(packed(x, platform)), x)
