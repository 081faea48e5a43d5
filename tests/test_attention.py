"""The forms of attention against a softmax over all positions; which form is taken where."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import says

from sedd_jax.kernels import attention as module
from sedd_jax.kernels.attention import attention
from sedd_jax.parallel import sharding
from sedd_jax.parallel.sharding import Placement

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


def answers(attend, heads, weight):
    """The weighted values and the gradients of their sum."""

    def cost(heads):
        out = attend(*heads).astype(jnp.float32)
        return (weight * out).sum(), weight * out

    slopes, value = jax.jit(jax.grad(cost, has_aux=True))(heads)
    return [np.asarray(a, np.float32) for a in (value, *slopes)]


SPLASH = pytest.mark.platforms("cpu", "tpu", reason="a TPU's kernel, interpreted on a CPU")
CUDNN = pytest.mark.platforms("gpu", reason="a GPU's kernel, which nothing interprets")


@pytest.mark.parametrize(
    "name, dtype",
    [
        ("xla", "float32"),
        ("xla", "bfloat16"),
        pytest.param("splash", "bfloat16", marks=SPLASH),
        pytest.param("cudnn", "bfloat16", marks=CUDNN),
    ],
)
@pytest.mark.parametrize("is_causal, padded", [(False, False), (False, True), (True, False)])
def test_values_and_gradients_are_those_of_the_softmax(name, dtype, is_causal, padded):
    heads = operands(jnp.dtype(dtype))
    lengths = jnp.array([LENGTH, 100]) if padded else None
    # What is found at padding means nothing.
    rows = jnp.arange(LENGTH) < (jnp.array([[LENGTH], [100]]) if padded else LENGTH)
    weight = jax.random.normal(jax.random.key(1), heads[0].shape) * rows.reshape(-1, LENGTH, 1, 1)
    how = {"is_causal": is_causal, "lengths": lengths}
    ours = answers(lambda *qkv: attention(*qkv, **how, implementation=name), heads, weight)
    exact = answers(lambda *qkv: definition(*qkv, **how), heads, weight)
    tolerance = 1e-5 if dtype == "float32" else 1e-2
    for found, right in zip(ours, exact, strict=True):
        assert np.linalg.norm(found - right) < tolerance * np.linalg.norm(right)


@pytest.mark.parametrize("tile", [1, 2, 6, 100])
def test_tiles_of_heads_of_any_size_give_the_same(tile, monkeypatch):
    length = 8
    heads = tuple(jax.random.normal(jax.random.key(0), (3, 3, length, 2, 4)))
    how = {"lengths": jnp.array([8, 1, 5]), "is_causal": True}
    weight = jnp.arange(length) < how["lengths"][:, None]
    weight = weight[..., None, None] * jnp.cos(jnp.arange(float(heads[0].size))).reshape(
        heads[0].shape
    )
    monkeypatch.setitem(module.TILES, "cpu", tile * length**2)
    ours = answers(lambda *qkv: attention(*qkv, **how), heads, weight)
    for found, right in zip(ours, answers(lambda *qkv: definition(*qkv, **how), heads, weight)):
        np.testing.assert_allclose(found, right, atol=1e-5)


def test_no_table_of_two_positions_is_kept_for_the_gradient():
    heads = jax.eval_shape(operands)
    kept = jax.eval_shape(lambda *heads: jax.vjp(attention, *heads)[1], *heads)
    sizes = [leaf.shape for leaf in jax.tree.leaves(kept)]
    assert sizes and not [shape for shape in sizes if shape.count(LENGTH) > 1]


@pytest.mark.parametrize(
    "platform, name",
    [("cpu", "xla"), ("gpu", "cudnn"), ("cuda", "cudnn"), ("tpu", "splash")],
)
def test_each_platform_takes_its_own_form_unless_one_is_named(platform, name, monkeypatch):
    for form in module.FORMS:
        monkeypatch.setitem(module.FORMS, form, lambda *_, form=form: form)
    for implementation, taken in ((None, name), ("auto", name), ("xla", "xla")):
        how = {"implementation": implementation, "platform": platform}
        assert attention(*operands(), **how) == taken


def test_what_a_kernel_does_not_take_is_refused_by_name_and_passed_over_by_auto():
    wrong = {
        "cudnn": (operands(jnp.float32), operands(size=256)),
        "splash": (operands(jnp.float32), operands(length=100)),
    }
    for platform, name in (("gpu", "cudnn"), ("tpu", "splash")):
        for heads in wrong[name]:
            with says(f"attention {name!r} takes no", "use 'auto' or 'xla'"):
                attention(*heads, implementation=name)
            passed_over = attention(*heads, platform=platform)
            np.testing.assert_array_equal(passed_over, attention(*heads, implementation="xla"))


@pytest.mark.devices(8)
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

    split = jax.jit(lambda *a: Placement(mesh).over_heads(attend, *a))(tuple(heads), lengths)
    assert seen == [((8 // rows, 16, 2 // columns, 4), (8 // rows,))]
    np.testing.assert_allclose(
        split, Placement().over_heads(attend, tuple(heads), lengths), atol=1e-6
    )
