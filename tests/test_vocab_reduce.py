"""The tiled reductions over the vocabulary against their dense definition."""

import functools
import re

import dense
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sedd_jax.diffusion.draws import categorical
from sedd_jax.kernels import vocab_reduce
from sedd_jax.kernels.vocab_reduce import Tile, total_and_pick


def draw(hidden, *rest, **options):
    """Draws in proportion to the scores of one hidden state."""
    weight, bias, excluded, keys, *needed = rest
    rows = (hidden,), weight, bias, excluded, keys, (), *needed
    return vocab_reduce.draw(*rows, categorical=categorical, **options)


BATCH, LENGTH, SIZE, VOCAB = 2, 7, 5, 11
# One logit at a time; a ragged last block of positions, of tokens (by 1 and by 3), of both;
# everything at once; what the platform takes.
TILES = [Tile(1, 1), Tile(3, VOCAB), Tile(14, 5), Tile(4, 4), None]
tiles = pytest.mark.parametrize("tile", TILES, ids=str)
SHAPES = re.compile(r"\b(?:f32|bf16)\[([\d,]+)\]")
NEEDED = ["all", "some", "one", "none"]
needed = pytest.mark.parametrize("needed", NEEDED)


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
    targets[1, 1:3] = 0, VOCAB - 1
    return tuple(map(jnp.asarray, (hidden, weight, bias, excluded, targets)))


def positions(needed):
    """The needed positions, bool [B, L], or None for all."""
    if needed == "all":
        return None
    where = np.zeros((BATCH, LENGTH), bool)
    where[{"some": np.s_[:, 1::2], "one": np.s_[1, 3], "none": np.s_[:0]}[needed]] = True
    return jnp.asarray(where)


def definition(hidden, weight, bias, excluded, targets, where=None):
    table = jnp.einsum("blc,vc->blv", hidden, weight, precision="highest") + bias
    others = jnp.where(jnp.arange(len(bias)) == excluded[..., None], -jnp.inf, table)
    pick = jnp.take_along_axis(table, targets[..., None], axis=-1)[..., 0]
    found = jax.nn.logsumexp(others, axis=-1), pick
    return found if where is None else tuple(jnp.where(where, a, 0.0) for a in found)


def answers(reduce, params, *rest):
    """total, pick, and the gradients of a sum in which each of them has a weight of its own."""
    slopes = jax.random.normal(jax.random.key(0), (2, *rest[0].shape))

    def loss(params):
        total, pick = reduce(*params, *rest)
        return (slopes[0] * total + slopes[1] * pick).sum(), (total, pick)

    gradients, values = jax.jit(jax.grad(loss, has_aux=True))(params)
    return values, gradients


@tiles
@needed
def test_values_and_gradients_equal_the_dense_ones(head, tile, needed):
    *params, excluded, targets = head
    rest = excluded, targets, positions(needed)
    values, slopes = answers(lambda *args: total_and_pick(*args, tile=tile), params, *rest)
    exact_values, exact_slopes = answers(definition, params, *rest)
    for value, exact in zip(values, exact_values, strict=True):
        assert value.shape == (BATCH, LENGTH) and value.dtype == jnp.float32
        np.testing.assert_allclose(value, exact, rtol=1e-5, atol=1e-6)
    for value, exact in zip(slopes, exact_slopes, strict=True):
        np.testing.assert_allclose(value, exact, rtol=1e-5, atol=1e-5)
        assert jnp.isfinite(value).all()


@pytest.mark.parametrize("tile", [Tile(4, 4), None], ids=str)
def test_gradients_of_bfloat16_operands_are_within_a_hundredth(head, tile):
    hidden, weight, bias, *ids = head
    params = hidden.astype(jnp.bfloat16), weight, bias
    rest = *ids, positions("some")
    _, ours = answers(lambda *args: total_and_pick(*args, tile=tile), params, *rest)
    _, exact = answers(definition, (hidden, weight, bias), *rest)
    for value, right in zip(ours, exact, strict=True):
        error = jnp.linalg.norm(value.astype(jnp.float32) - right) / jnp.linalg.norm(right)
        assert error < 1e-2
    assert [value.dtype for value in ours] == [jnp.bfloat16, jnp.float32, jnp.float32]


def test_large_logits_stay_finite(head):
    hidden, weight, bias, excluded, targets = head
    params = 40.0 * hidden, weight, bias
    tiled = functools.partial(total_and_pick, tile=Tile(4, 4))
    (total, _), slopes = answers(tiled, params, excluded, targets)
    np.testing.assert_allclose(total, definition(*params, excluded, targets)[0], rtol=1e-5)
    assert all(jnp.isfinite(slope).all() for slope in slopes)


def test_what_is_not_needed_spoils_no_gradient_however_large_it_is(head):
    hidden, weight, bias, *ids = head
    where = positions("some")
    huge = jnp.where(where[..., None], hidden, 1e4 * hidden)  # exp of these logits is infinite
    tiled = functools.partial(total_and_pick, tile=Tile(4, 4))
    _, ours = answers(tiled, (huge, weight, bias), *ids, where)
    _, exact = answers(tiled, (hidden, weight, bias), *ids, where)
    for slope, right in zip(ours, exact, strict=True):
        np.testing.assert_allclose(slope, right, rtol=1e-6, atol=1e-6)


def test_a_token_of_bias_minus_infinity_is_in_no_sum_and_has_no_gradient(head):
    hidden, weight, bias, _, targets = head
    nothing = jnp.full_like(targets, -1)
    shut = bias.at[VOCAB - 1].set(-jnp.inf)
    targets = jnp.minimum(targets, VOCAB - 2)

    def reduce(hidden, weight, bias, targets):
        return total_and_pick(hidden, weight, bias, nothing, targets, tile=Tile(4, 4))

    _, ours = answers(reduce, (hidden, weight, shut), targets)
    _, fewer = answers(reduce, (hidden, weight[:-1], bias[:-1]), targets)
    np.testing.assert_allclose(ours[0], fewer[0], rtol=1e-5, atol=1e-6)
    for value, exact in zip(ours[1:], fewer[1:], strict=True):
        np.testing.assert_allclose(value[:-1], exact, rtol=1e-5, atol=1e-6)
        assert not value[-1].any()


def test_an_excluded_id_outside_the_vocabulary_excludes_nothing(head):
    hidden, weight, bias, _, targets = head
    everything = jax.nn.logsumexp(vocab_reduce.logits(hidden, weight, bias), axis=-1)
    for outside in (-1, VOCAB, VOCAB + 100):
        excluded = jnp.full((BATCH, LENGTH), outside)
        total, _ = total_and_pick(hidden, weight, bias, excluded, targets)
        np.testing.assert_allclose(total, everything, rtol=1e-6)


def test_no_array_has_a_number_for_every_token_at_every_position():
    # 80 positions and 500 tokens, dimensions that nothing else has.
    hidden, weight, bias = jnp.zeros((4, 20, 16)), jnp.zeros((500, 16)), jnp.zeros(500)
    ids, where = jnp.zeros((4, 20), jnp.int32), jnp.zeros((4, 20), bool)
    tile = Tile(16, 128)

    def cost(params):
        return sum(a.sum() for a in total_and_pick(*params, ids, ids, where, tile=tile))

    text = jax.jit(jax.grad(cost)).lower((hidden, weight, bias)).compile().as_text()
    sizes = [np.prod([int(n) for n in shape.split(",")]) for shape in SHAPES.findall(text)]
    assert 500 * 16 in sizes  # the weights
    assert max(sizes) < 80 * 500


def test_draws_depend_neither_on_the_block_size_nor_on_what_else_is_drawn(head):
    *params, excluded, _ = head
    keys = jax.random.split(jax.random.key(3), BATCH)
    whole = np.asarray(draw(*params, excluded, keys))
    blocked = jax.jit(draw, static_argnames="block")
    for block in (1, 3):
        for needed in NEEDED[1:]:
            where = positions(needed)
            drawn = blocked(*params, excluded, keys, where, block=block)
            assert drawn.dtype == jnp.int32
            np.testing.assert_array_equal(drawn, np.where(where, whole, 0))


@pytest.mark.parametrize("block", [7_000, None])
def test_tokens_are_drawn_in_proportion_and_never_the_excluded_one(head, block):
    *params, excluded, _ = head
    many, draws = 5_000, 10
    hidden = jnp.tile(params[0][:1], (many, 1, 1))  # rows of one batch differ in noise alone

    @jax.jit
    def drawn_with(key):
        shut = jnp.tile(excluded[:1], (many, 1))
        keys = jax.random.split(key, many)
        return draw(hidden, *params[1:], shut, keys, block=block)

    drawn = np.concatenate([drawn_with(key) for key in jax.random.split(jax.random.key(0), draws)])
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
    token = jax.jit(draw)(hidden, params[1], bias, excluded, keys)
    for pair in (token, jnp.stack([token[:-1, 0], token[1:, 0]], axis=1)):
        assert dense.p_value(dense.count(pair, 3), np.full(9, 1 / 9)) > dense.P_VALUE


def test_bfloat16_products_are_summed_in_float32(head):
    hidden, weight, bias, *_ = head
    table = vocab_reduce.logits(hidden.astype(jnp.bfloat16), weight, bias)
    assert table.dtype == jnp.float32
    np.testing.assert_allclose(table, vocab_reduce.logits(hidden, weight, bias), atol=0.05)
    assert not (table == table.astype(jnp.bfloat16)).all()


@tiles
@needed
def test_peak_and_entropy_are_those_of_the_whole_distribution(head, tile, needed):
    hidden, weight, bias, excluded, _ = head
    bias = bias.at[3].set(-jnp.inf)  # as MASK's is
    where = positions(needed)
    table = jnp.einsum("blc,vc->blv", hidden, weight, precision="highest") + bias
    table = jnp.where(jnp.arange(VOCAB) == excluded[..., None], -jnp.inf, table)
    log_p = np.asarray(jax.nn.log_softmax(table, axis=-1), np.float64)
    expected = log_p.max(axis=-1), -(np.exp(log_p) * np.maximum(log_p, -1e9)).sum(axis=-1)
    got = vocab_reduce.peak_and_entropy(hidden, weight, bias, excluded, where, tile=tile)
    for value, exact in zip(got, expected, strict=True):
        exact = exact if where is None else np.where(where, exact, 0.0)
        np.testing.assert_allclose(value, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("logit", [-3e4, 0.0, 3e4])
def test_peak_and_entropy_of_a_certain_token(logit):
    hidden, weight = jnp.ones((1, 1, 1)), jnp.array([[logit], [logit - 2e4], [logit - 3e4]])
    how = hidden, weight, jnp.zeros(3), jnp.full((1, 1), -1)
    for tile in (Tile(1, 1), Tile(1, 3)):
        peak, entropy = vocab_reduce.peak_and_entropy(*how, tile=tile)
        assert peak == 0.0 and entropy == 0.0


def test_a_draw_of_several_hidden_states_has_all_their_rows_and_values(head):
    hidden, weight, bias, excluded, _ = head
    second = hidden[::-1] * 0.5
    values = (jnp.arange(BATCH * LENGTH, dtype=jnp.float32).reshape(BATCH, LENGTH),)
    keys = jax.random.split(jax.random.key(0), BATCH)
    rows = [
        jnp.where(
            jnp.arange(VOCAB) == excluded[..., None],
            -jnp.inf,
            jnp.einsum("blc,vc->blv", h, weight, precision="highest") + bias,
        )
        for h in (hidden, second)
    ]

    def best(key, row, other, value):  # no noise: what the rows and the value say
        return jnp.argmax(jnp.where(value % 2 == 0, row, other)).astype(jnp.int32)

    expected = jnp.where(values[0] % 2 == 0, rows[0].argmax(-1), rows[1].argmax(-1))
    for block in (1, 3, None):
        how = {"categorical": best, "block": block}
        hiddens = hidden, second
        got = vocab_reduce.draw(hiddens, weight, bias, excluded, keys, values, **how)
        np.testing.assert_array_equal(got, expected)
