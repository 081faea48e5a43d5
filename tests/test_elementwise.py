"""The functions between the matmuls: equal to the plain ones, with equal gradients."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sedd_jax.kernels.elementwise import gelu, keep_masks, modulated_norm

EPSILON = 1e-5
TOLERANCES = {jnp.float32: 1e-5, jnp.bfloat16: 1e-2}


def assert_close(actual, expected, dtype):
    """Within the dtype's tolerance of the largest value."""
    scale = jnp.abs(expected).max()
    np.testing.assert_allclose(actual / scale, expected / scale, atol=TOLERANCES[dtype])


def plain_norm(x, weight, shift, scale):
    norm = nn.LayerNorm(epsilon=EPSILON, use_bias=False)
    return norm.apply({"params": {"scale": weight}}, x) * (1.0 + scale) + shift


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_modulated_norm_and_its_gradients_are_the_plain_ones(dtype):
    keys = jax.random.split(jax.random.key(0), 6)
    shapes = (3, 7, 24), (24,), (3, 1, 24), (3, 1, 24)
    x, weight, shift, scale = map(jax.random.normal, keys[:4], shapes)
    x = 5.0 * x + 2.0  # far from what it becomes
    d_x, d_out = (jax.random.normal(key, x.shape) for key in keys[4:])
    d_out = d_out.astype(dtype)

    def plain(x, *vectors):
        return x, plain_norm(x, *vectors).astype(dtype)

    arguments = x, weight, shift, scale
    expected, plain_vjp = jax.vjp(plain, *arguments)
    actual, vjp = jax.vjp(lambda *a: modulated_norm(EPSILON, dtype, *a), *arguments)
    assert actual[1].dtype == dtype
    np.testing.assert_array_equal(actual[0], x)
    assert_close(actual[1].astype(jnp.float32), expected[1].astype(jnp.float32), dtype)
    for gradient, other in zip(vjp((d_x, d_out)), plain_vjp((d_x, d_out)), strict=True):
        assert gradient.shape == other.shape
        assert_close(gradient, other, dtype)


def test_modulated_norm_of_a_constant_row_is_finite():
    x = jnp.full((1, 2, 8), 300.1)  # of which the mean square less the squared mean may be negative
    ones = jnp.ones((1, 1, 8))

    def total(x):
        return modulated_norm(EPSILON, jnp.float32, x, ones[0, 0], ones, ones)[1].sum()

    value, gradient = jax.value_and_grad(total)(x)
    assert jnp.isfinite(value) and jnp.isfinite(gradient).all()


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_gelu_and_its_gradient_are_the_plain_ones(dtype):
    x = jnp.linspace(-12.0, 12.0, 4001).astype(dtype)
    slopes = jnp.cos(jnp.arange(x.size)).astype(dtype)

    def plain(x):
        return nn.gelu(x.astype(jnp.float32), approximate=True)

    expected, plain_vjp = jax.vjp(plain, x.astype(jnp.float32))
    actual, vjp = jax.vjp(gelu, x)
    assert actual.dtype == dtype
    assert_close(actual.astype(jnp.float32), expected, dtype)
    (gradient,), (other,) = vjp(slopes), plain_vjp(slopes.astype(jnp.float32))
    assert_close(gradient.astype(jnp.float32), other, dtype)


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.999])
def test_masks_drop_at_the_rate_though_their_bytes_know_multiples_of_a_256th_only(rate):
    rows, length, channels = 4096, 32, 62  # no multiple of the 4 bytes of a word
    masks = keep_masks(jax.random.key(1), 2, (rows, length, channels), rate)
    assert masks.shape == (2, rows, length, channels) and masks.dtype == bool
    for mask in masks:
        # Within 4 standard deviations, in which no multiple of a 256th is.
        deviation = (rate * (1 - rate) / mask.size + 1 / 256**2 / 4 / rows) ** 0.5
        assert 4 * deviation < abs(round(256 * rate) / 256 - rate)
        assert abs((~mask).mean() - rate) < 4 * deviation
        by_channel = (~mask).mean(axis=(0, 1))
        assert np.ptp(by_channel) < 10 * (rate * (1 - rate) / rows / length) ** 0.5
    assert (masks[0] != masks[1]).any()
    one = keep_masks(jax.random.key(1), 2, (rows, length, channels), rate)
    np.testing.assert_array_equal(one, masks)


def test_elements_that_share_a_word_are_dropped_independently():
    mask = ~keep_masks(jax.random.key(2), 1, (4096, 4, 8), 0.5)[0].reshape(-1, 8)
    together = np.einsum("ni,nj->ij", mask, mask, dtype=float) / len(mask)
    independent = np.full((8, 8), 0.25) + np.diag(np.full(8, 0.25))
    # The chance of a row's rate is shared: 1/256^2/4 at most, far below what is seen here.
    np.testing.assert_allclose(together, independent, atol=5 * 0.5 / len(mask) ** 0.5)
