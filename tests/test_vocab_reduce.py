"""The blocked reductions over the vocabulary against their dense definition."""

import dense
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sedd_jax.kernels import vocab_reduce
from sedd_jax.kernels.vocab_reduce import total_and_draw, total_and_pick

BATCH, LENGTH, SIZE, VOCAB = 2, 7, 5, 11
# One position a block (also for two: 7 is not even), three with a ragged last one, everything at once.
BLOCKS = [1, 2 * BATCH * VOCAB, 3 * BATCH * VOCAB + 1, LENGTH * BATCH * VOCAB, 2**24]
blocks = pytest.mark.parametrize("block_elements", BLOCKS)


@pytest.fixture(scope="module")
def head():
    """hidden, weight, bias, excluded and targets; some exclude nothing, some their own target."""
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(BATCH, LENGTH, SIZE)).astype(np.float32)
    weight = rng.normal(size=(VOCAB, SIZE)).astype(np.float32)
    bias = rng.normal(size=VOCAB).astype(np.float32)
    excluded = rng.integers(0, VOCAB, (BATCH, LENGTH)).astype(np.int32)
    excluded[0, :3] = VOCAB, -1, VOCAB + 5
    targets = rng.integers(0, VOCAB, (BATCH, LENGTH)).astype(np.int32)
    targets[1, 0] = excluded[1, 0]
    return tuple(map(jnp.asarray, (hidden, weight, bias, excluded, targets)))


def definition(hidden, weight, bias, excluded, targets):
    table = jnp.einsum("blc,vc->blv", hidden, weight) + bias
    others = jnp.where(jnp.arange(VOCAB) == excluded[..., None], -jnp.inf, table)
    pick = jnp.take_along_axis(table, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(others, axis=-1), pick


@blocks
def test_total_and_pick_equal_the_dense_ones(head, block_elements):
    total, pick = total_and_pick(*head, block_elements)
    assert total.shape == pick.shape == (BATCH, LENGTH)
    assert total.dtype == pick.dtype == jnp.float32
    for value, exact in zip((total, pick), definition(*head), strict=True):
        np.testing.assert_allclose(value, exact, rtol=1e-5, atol=1e-6)


@blocks
def test_gradients_equal_the_dense_ones(head, block_elements):
    *params, excluded, targets = head
    slopes = jax.random.normal(jax.random.key(0), (2, BATCH, LENGTH))

    def cost(reduce):
        def loss(params):
            total, pick = reduce(*params, excluded, targets)
            return (slopes[0] * total + slopes[1] * pick).sum()

        return jax.jit(jax.grad(loss))

    blocked = cost(lambda *args: total_and_pick(*args, block_elements))(params)
    for value, exact in zip(blocked, cost(definition)(params), strict=True):
        np.testing.assert_allclose(value, exact, rtol=1e-5, atol=1e-5)
        assert jnp.isfinite(value).all()


def test_an_excluded_id_outside_the_vocabulary_excludes_nothing(head):
    hidden, weight, bias, _, targets = head
    everything = jax.nn.logsumexp(vocab_reduce.logits(hidden, weight, bias), axis=-1)
    for outside in (-1, VOCAB, VOCAB + 100):
        excluded = jnp.full((BATCH, LENGTH), outside)
        total, _ = total_and_pick(hidden, weight, bias, excluded, targets)
        np.testing.assert_allclose(total, everything, rtol=1e-6)


def test_draws_do_not_depend_on_the_block_size(head):
    *params, excluded, _ = head
    draw = jax.jit(total_and_draw, static_argnums=5)
    sizes = (BLOCKS[0], BLOCKS[1], BLOCKS[-1])
    keys = jax.random.split(jax.random.key(3), BATCH)
    drawn = [draw(keys, *params, excluded, size) for size in sizes]
    for total, token in drawn:
        assert token.dtype == jnp.int32
        np.testing.assert_array_equal(token, drawn[-1][1])
        np.testing.assert_allclose(total, definition(*head)[0], rtol=1e-5)


@pytest.mark.parametrize("block_elements", [BLOCKS[1], BLOCKS[-1]])
def test_tokens_are_drawn_in_proportion_and_never_the_excluded_one(head, block_elements):
    *params, excluded, _ = head
    many, draws = 5_000, 10
    hidden = jnp.tile(params[0][:1], (many, 1, 1))  # rows of one batch differ in noise alone

    @jax.jit
    def draw(key):
        shut = jnp.tile(excluded[:1], (many, 1))
        elements = block_elements * many // BATCH
        keys = jax.random.split(key, many)
        return total_and_draw(keys, hidden, *params[1:], shut, elements)[1]

    drawn = np.concatenate([draw(key) for key in jax.random.split(jax.random.key(0), draws)])
    table = vocab_reduce.logits(*params)[0]
    for place in range(LENGTH):
        others = np.array(jax.nn.softmax(table[place]))
        if 0 <= excluded[0, place] < VOCAB:
            others[excluded[0, place]] = 0.0
        counts = np.bincount(drawn[:, place], minlength=VOCAB)
        assert dense.p_value(counts, others) > dense.P_VALUE


def test_draws_of_different_places_and_rows_are_independent(head):
    *params, _, _ = head
    hidden = jnp.zeros((5_000, 2, SIZE))
    excluded = jnp.full((5_000, 2), VOCAB)
    bias = jnp.where(jnp.arange(VOCAB) < 3, 0.0, -jnp.inf)
    keys = jax.random.split(jax.random.key(0), 5_000)
    _, token = jax.jit(total_and_draw)(keys, hidden, params[1], bias, excluded)
    for pair in (token, jnp.stack([token[:-1, 0], token[1:, 0]], axis=1)):
        assert dense.p_value(dense.count(pair, 3), np.full(9, 1 / 9)) > dense.P_VALUE


def test_bfloat16_products_are_summed_in_float32(head):
    hidden, weight, bias, *_ = head
    table = vocab_reduce.logits(hidden.astype(jnp.bfloat16), weight, bias)
    assert table.dtype == jnp.float32
    np.testing.assert_allclose(table, vocab_reduce.logits(hidden, weight, bias), atol=0.05)
    assert not (table == table.astype(jnp.bfloat16)).all()
