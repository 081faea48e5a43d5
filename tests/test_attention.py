"""The forms of attention against a softmax over all positions; which form is taken where."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import says

from sedd_jax import sharding
from sedd_jax.kernels import ATTENTION, HEAD, choose
from sedd_jax.kernels.attention import attention, is_local
from sedd_jax.models.transformer import Anywhere

BATCH, LENGTH, HEADS, SIZE = 2, 256, 2, 64


def operands(dtype=jnp.bfloat16, length=LENGTH, size=SIZE):
    shape = (3, BATCH, length, HEADS, size)
    return tuple(jax.random.normal(jax.random.key(0), shape).astype(dtype))


def definition(q, k, v, is_causal=False, lengths=None):
    q, k, v = (a.astype(jnp.float32) for a in (q, k, v))
    place = jnp.arange(q.shape[1])
    seen = jnp.ones((q.shape[0], 1, place.size, place.size), bool)
    if is_causal:
        seen &= place[:, None] >= place
    if lengths is not None:
        seen &= place < lengths[:, None, None, None]
    products = jnp.einsum("blhk,bmhk->bhlm", q, k, precision="highest") * q.shape[-1] ** -0.5
    weights = jax.nn.softmax(jnp.where(seen, products, -jnp.inf), axis=-1)
    return jnp.einsum("bhlm,bmhk->blhk", weights, v, precision="highest")


@pytest.mark.parametrize("name", ["xla", "splash"])
@pytest.mark.parametrize("is_causal, padded", [(False, False), (False, True), (True, False)])
def test_values_and_gradients_are_those_of_the_softmax(name, is_causal, padded):
    heads = operands()
    lengths = jnp.array([LENGTH, 100]) if padded else None
    # What is found at padding means nothing.
    rows = jnp.arange(LENGTH) < (jnp.array([[LENGTH], [100]]) if padded else LENGTH)
    weight = jax.random.normal(jax.random.key(1), heads[0].shape) * rows.reshape(-1, LENGTH, 1, 1)

    def answers(attend):
        def cost(heads):
            out = attend(*heads).astype(jnp.float32)
            return (weight * out).sum(), weight * out

        return jax.jit(jax.grad(cost, has_aux=True))(heads)

    slopes, value = answers(
        lambda *qkv: attention(*qkv, is_causal=is_causal, lengths=lengths, implementation=name)
    )
    exact_slopes, exact = answers(lambda *qkv: definition(*qkv, is_causal, lengths))
    for ours, right in zip((value, *slopes), (exact, *exact_slopes), strict=True):
        ours, right = (np.asarray(a, np.float32) for a in (ours, right))
        assert np.linalg.norm(ours - right) < 1e-2 * np.linalg.norm(right)


@pytest.mark.parametrize(
    "platform, name",
    [("cpu", "xla"), ("gpu", "cudnn"), ("cuda", "cudnn"), ("tpu", "splash")],
)
def test_each_platform_takes_its_own_form_unless_one_is_named(platform, name):
    assert choose(ATTENTION, None, platform) == choose(ATTENTION, "auto", platform) == name
    assert choose(ATTENTION, "xla", platform) == "xla"
    assert choose(HEAD, "auto", platform) == "xla"


def test_what_a_kernel_does_not_take_is_refused_by_name_and_passed_over_by_auto():
    wrong = {
        "cudnn": (operands(jnp.float32), operands(size=256)),
        "splash": (operands(jnp.float32), operands(length=100)),
    }
    for platform, name in (("gpu", "cudnn"), ("tpu", "splash")):
        assert is_local(operands()[0], "auto", platform)
        for heads in wrong[name]:
            assert not is_local(heads[0], "auto", platform)
            with says(f"attention {name!r} takes no", "use 'auto' or 'xla'"):
                attention(*heads, implementation=name)
            passed_over = attention(*heads, platform=platform)
            np.testing.assert_array_equal(passed_over, attention(*heads, implementation="xla"))


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2)])
def test_a_kernel_runs_on_each_devices_rows_and_heads(sizes):
    mesh = sharding.make_mesh(dict(zip(sharding.AXES, sizes)))
    rows, columns = sizes[0] * sizes[1], sizes[2]
    heads = jax.random.normal(jax.random.key(0), (3, 8, 16, 2, 4))
    lengths = jnp.arange(8) + 9
    seen = []

    def attend(heads, lengths):
        seen.append((heads[0].shape, lengths.shape))
        return attention(*heads, lengths=lengths)

    split = jax.jit(lambda *a: sharding.OnMesh(mesh).over_heads(attend, *a))(tuple(heads), lengths)
    assert seen == [((8 // rows, 16, 2 // columns, 4), (8 // rows,))]
    np.testing.assert_allclose(
        split, Anywhere().over_heads(attend, tuple(heads), lengths), atol=1e-6
    )
