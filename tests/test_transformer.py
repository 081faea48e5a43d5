"""The network's own properties, and the head's scores against their table."""

import functools
import math
import re

import dense
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sedd_jax.diffusion.graphs import GRAPHS, Absorbing
from sedd_jax.diffusion.losses import dwdse
from sedd_jax.diffusion.schedules import LogLinear
from sedd_jax.diffusion.scores import DenseScores
from sedd_jax.kernels.attention import attention
from sedd_jax.models.head import HeadScores, make_score_fn
from sedd_jax.models.transformer import SAVED, Output, Transformer, rotate, sigma_embedding
from sedd_jax.parallel.sharding import Placement

graphs = pytest.mark.parametrize("name", GRAPHS)
GPT2 = 50257
VOCAB, LENGTH = 10, 6
SIGMA = jnp.array([[0.01], [0.5], [3.0]])


def network(**changes):
    sizes = {"dim": VOCAB + 1, "hidden_size": 32, "blocks": 2, "heads": 4, "cond_dim": 16}
    return Transformer(**{**sizes, "dropout": 0.0, **changes})


@functools.cache
def tokens_and_params(dim=VOCAB + 1):
    """Tokens, the parameters at the start, and ones in which no part of the network is zero."""
    tokens = jax.random.randint(jax.random.key(0), (3, LENGTH), 0, dim)
    model = network(dim=dim)

    @jax.jit
    def start(key):
        return model.init(key, tokens, SIGMA, deterministic=True)["params"]

    params = start(jax.random.key(1))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    moved = [p + 0.2 * jax.random.normal(k, p.shape) for p, k in zip(leaves, keys, strict=True)]
    return tokens, params, jax.tree.unflatten(tree, moved)


def logits(model, params, tokens, sigma=SIGMA, **options):
    @jax.jit
    def run(params, tokens, sigma):
        options.setdefault("deterministic", True)
        hidden, weight, bias = model.apply({"params": params}, tokens, sigma, **options)
        hidden = hidden.astype(jnp.float32)
        return jnp.einsum("blc,vc->blv", hidden, weight, precision="highest") + bias

    return run(params, tokens, sigma)


def log_score(model, params, graph, tokens, key=None):
    @jax.jit
    def run(params, key):
        return make_score_fn(model, params, graph, dropout_key=key)(tokens, SIGMA).log_score()

    return run(params, key)


@graphs
def test_at_the_start_the_log_scores_are_those_of_zero_logits(name):
    graph = GRAPHS[name](VOCAB)
    tokens, params, _ = tokens_and_params(graph.dim)
    table = log_score(network(dim=graph.dim), params, graph, tokens)
    fair = {"absorbing": -jnp.log(jnp.expm1(SIGMA) * VOCAB), "uniform": jnp.zeros_like(SIGMA)}
    expected = jnp.broadcast_to(fair[name][..., None], table.shape)
    expected = jnp.where(jnp.arange(graph.dim) == tokens[..., None], 0.0, expected)
    np.testing.assert_allclose(table, expected, atol=1e-6)


@pytest.mark.parametrize(
    "hidden_size, blocks, heads, total, without_tables",
    [(768, 12, 12, 169_627_218, 92_380_672), (1024, 24, 16, 424_477_010, 321_498_368)],
)
def test_parameters_number_as_many_as_the_original_has(
    hidden_size, blocks, heads, total, without_tables
):
    model = Transformer(GPT2 + 1, hidden_size, blocks, heads, cond_dim=128, dropout=0.1)
    tokens, sigma = jnp.zeros((1, 8), jnp.int32), jnp.ones((1, 1))
    init = functools.partial(model.init, deterministic=True)
    params = jax.eval_shape(init, jax.random.key(0), tokens, sigma)["params"]
    sizes = {"/".join(k.key for k in path): p.size for path, p in jax.tree.leaves_with_path(params)}
    assert sum(sizes.values()) == total
    tables = sizes["embedding"] + sizes["head_weight"]
    # The paper's count leaves the output's bias out too.
    assert total - tables - without_tables in (0, sizes["head_bias"])


def test_remat_changes_neither_outputs_nor_gradients():
    tokens, _, params = tokens_and_params()
    slopes = jax.random.normal(jax.random.key(0), (3, LENGTH, VOCAB + 1))

    def cost(model):
        def loss(params):
            how = {"deterministic": False, "rngs": {"dropout": jax.random.key(1)}}
            return (slopes * logits(model, params, tokens, **how)).sum()

        return jax.value_and_grad(loss)(params)

    plain, *others = (cost(network(remat=remat, dropout=0.1)) for remat in SAVED)
    for other in others:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), plain, other
        )
    assert all((leaf != 0).any() for leaf in jax.tree.leaves(plain))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_what_a_block_saves_for_its_gradient(dtype):
    """For each channel of a token: the block's input; q, k and v, what attention gives, the two
    branches and 4 of the MLP; and, unless it is recomputed, what is elementwise between them: the
    stream after the first branch and both norms' results."""
    tokens, _, _ = tokens_and_params()
    channels = network().blocks * tokens.size * network().hidden_size
    for remat, numbers, of_the_stream in (
        ("none", 14, 2),
        ("elementwise", 11, 1),
        ("blocks", 1, 1),
    ):
        saved = saved_arrays(network(dtype=dtype, dropout=0.1, remat=remat))
        assert sum(leaf.size for leaf in saved) / channels == numbers, remat
        # The stream always is float32; no mask of dropout is among them.
        in_float32 = numbers if dtype == jnp.float32 else of_the_stream
        sizes = [leaf.size for leaf in saved if leaf.dtype == jnp.float32]
        assert sum(sizes) / channels == in_float32, remat


def saved_arrays(model):
    """[blocks, B, L, ...] of a channel each, by tokens or by heads, that the gradient needs."""
    tokens, _, params = tokens_and_params()

    def pullback(params, key):
        def run(params):
            how = {"deterministic": False, "rngs": {"dropout": key}}
            return model.apply({"params": params}, tokens, SIGMA, **how).hidden

        return jax.vjp(run, params)[1]

    leaves = jax.tree.leaves(jax.eval_shape(pullback, params, jax.random.key(0)))
    rows = {len(tokens), tokens.size, len(tokens) * model.heads}  # and not the parameters
    leaves = [leaf for leaf in leaves if leaf.ndim > 1 and leaf.shape[1] in rows]
    return [leaf for leaf in leaves if leaf.size >= model.blocks * tokens.size * model.hidden_size]


def test_bfloat16_is_close_to_float32_and_leaves_the_parameters_alone():
    tokens, _, params = tokens_and_params()
    half = network(dtype=jnp.bfloat16)
    init = functools.partial(half.init_with_output, deterministic=True)
    output, kept = jax.eval_shape(init, jax.random.key(0), tokens, SIGMA)
    assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(kept))
    assert output.hidden.dtype == jnp.bfloat16 and output.weight.dtype == jnp.float32
    tables = [log_score(model, params, Absorbing(VOCAB), tokens) for model in (network(), half)]
    assert tables[1].dtype == jnp.float32
    error = np.abs(tables[0] - tables[1])
    assert 0 < error.max() < 0.15  # nats, where logits have a standard deviation of about 1.5
    assert error.mean() < 0.03


def test_the_residual_stream_may_be_bfloat16():
    tokens, _, params = tokens_and_params()
    narrow = network(residual_dtype=jnp.bfloat16)
    tables = [log_score(model, params, Absorbing(VOCAB), tokens) for model in (network(), narrow)]
    error = np.abs(tables[0] - tables[1])
    assert 0 < error.max() < 0.15 and error.mean() < 0.03
    saved = saved_arrays(network(residual_dtype=jnp.bfloat16, dtype=jnp.bfloat16, dropout=0.1))
    assert not [leaf for leaf in saved if leaf.dtype == jnp.float32]


def test_rows_of_a_batch_do_not_see_each_other():
    tokens, _, params = tokens_and_params()
    order = jnp.array([2, 0, 1])
    whole = logits(network(), params, tokens)
    np.testing.assert_allclose(
        logits(network(), params, tokens[order], SIGMA[order]), whole[order], atol=1e-5
    )


@pytest.mark.parametrize("changed, watched", [(LENGTH - 1, 0), (0, LENGTH - 1)])
def test_every_position_sees_every_other(changed, watched):
    tokens, _, params = tokens_and_params()
    other = tokens.at[:, changed].set((tokens[:, changed] + 1) % VOCAB)
    whole, moved = (logits(network(), params, x) for x in (tokens, other))
    assert (jnp.abs(whole - moved)[:, watched].max(axis=-1) > 1e-4).all()


def test_the_order_of_tokens_matters():
    tokens, _, params = tokens_and_params()
    turned = logits(network(), params, tokens[:, ::-1])[:, ::-1]
    assert jnp.abs(logits(network(), params, tokens) - turned).max() > 1e-2


def test_the_noise_level_matters_to_its_own_row_alone():
    tokens, _, params = tokens_and_params()
    moved = logits(network(), params, tokens, SIGMA.at[1].set(0.7))
    difference = jnp.abs(logits(network(), params, tokens) - moved).max(axis=(1, 2))
    assert difference[1] > 1e-3 and difference[0] < 1e-5 and difference[2] < 1e-5


def test_dropout_acts_only_with_a_key():
    tokens, _, params = tokens_and_params()
    model, graph = network(dropout=0.5), Absorbing(VOCAB)

    def table(key):
        return log_score(model, params, graph, tokens, key)

    plain = log_score(network(), params, graph, tokens)
    np.testing.assert_allclose(table(None), plain, atol=1e-5)
    first, again, other = (table(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert jnp.abs(first - plain).max() > 0.1 and jnp.abs(first - other).max() > 0.1


def test_rotary_products_depend_on_the_distance_alone():
    q, k = jax.random.normal(jax.random.key(0), (2, 16))
    length = 12
    q_rows, k_rows = (rotate(jnp.tile(v, (1, length, 1, 1)))[0, :, 0] for v in (q, k))
    products = np.asarray(q_rows) @ np.asarray(k_rows).T
    for distance in range(-length + 1, length):
        diagonal = np.diagonal(products, distance)
        np.testing.assert_allclose(diagonal, diagonal[0], atol=2e-5)
    assert products[0].std() > 0.1
    np.testing.assert_allclose(products[0, 0], np.dot(q, k), rtol=1e-5)
    np.testing.assert_allclose(jnp.linalg.norm(q_rows, axis=-1), jnp.linalg.norm(q), rtol=1e-5)


def test_sigma_embedding_is_cosines_then_sines():
    embedding = sigma_embedding(jnp.array([[0.3]]))
    frequency = 10_000.0 ** (-np.arange(128) / 128)
    np.testing.assert_allclose(embedding[0, :128], np.cos(0.3 * frequency), atol=1e-6)
    np.testing.assert_allclose(embedding[0, 128:], np.sin(0.3 * frequency), atol=1e-6)


def test_attention_is_a_softmax_over_all_positions():
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 5, 3, 8))
    weights = jax.nn.softmax(
        jnp.einsum("blhk,bmhk->bhlm", q, k, precision="highest") / 8**0.5, axis=-1
    )
    exact = jnp.einsum("bhlm,bmhk->blhk", weights, v, precision="highest")
    np.testing.assert_allclose(attention(q, k, v), exact, atol=1e-5)


@graphs
def test_head_scores_answer_as_the_scores_of_their_table(name):
    graph = GRAPHS[name](VOCAB)
    rng = np.random.default_rng(0)
    rows = 20_000
    hidden = np.tile(rng.normal(size=(1, 3, 4)), (rows, 1, 1)).astype(np.float32)
    weight = rng.normal(size=(graph.dim, 4)).astype(np.float32)
    bias = rng.normal(size=graph.dim).astype(np.float32)
    xt = jnp.tile(jnp.array([VOCAB - 1, graph.dim - 1, 4]), (rows, 1))
    log_scale = graph.log_scale(jnp.full((rows, 1), 0.3))
    output = Output(*map(jnp.asarray, (hidden, weight, bias)))
    head = HeadScores(output, xt, log_scale, VOCAB, Placement())

    table = np.einsum("lc,vc->lv", hidden[0], weight) + bias - np.asarray(log_scale)[0]
    table[np.arange(3), xt[0]] = 0.0
    np.testing.assert_allclose(head.log_score()[0], table, atol=2e-6)
    whole = DenseScores(head.log_score(), xt, VOCAB)

    targets = jnp.tile(jnp.array([3, 7, 4]), (rows, 1))
    for value, exact in zip(
        head.total_and_pick(targets), whole.total_and_pick(targets), strict=True
    ):
        np.testing.assert_allclose(value, exact, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(head.log_sum(), whole.log_sum(), rtol=1e-5, atol=1e-5)
    table_sum = table[:, :VOCAB].sum(axis=-1)  # where y = x_l the table holds 0
    np.testing.assert_allclose(head.log_sum()[0], table_sum, rtol=1e-5, atol=1e-5)

    for scores in (head, whole):
        drawn = scores.draw(jax.random.split(jax.random.key(0), rows))
        np.testing.assert_allclose(scores.total(), whole.total(), rtol=1e-5, atol=1e-5)
        for place in range(3):
            share = np.exp(table[place, :VOCAB])
            share[[y for y in range(VOCAB) if y == xt[0, place]]] = 0.0
            counts = np.bincount(drawn[:, place], minlength=VOCAB)
            assert dense.p_value(counts, share) > dense.P_VALUE


@graphs
def test_no_graph_trains_with_a_table_of_logits(name):
    vocab, rows, length = 40_000, 2, 128
    graph = GRAPHS[name](vocab)
    model = network(dim=graph.dim)
    x0 = jax.ShapeDtypeStruct((rows, length), jnp.int32)

    def cost(params, key, x0):
        score_fn = make_score_fn(model, params, graph, dropout_key=key)
        return dwdse(key, x0, score_fn, graph, LogLinear()).nats.mean()

    def init(key, x0):
        return model.init(key, x0, jnp.ones((rows, 1)), deterministic=True)["params"]

    key = jax.eval_shape(lambda: jax.random.key(0))
    params = jax.eval_shape(init, key, x0)
    text = jax.jit(jax.grad(cost)).lower(params, key, x0).as_text()
    shapes = {match.group(1) for match in re.finditer(r"tensor<((?:\d+x)+)", text)}
    sizes = [math.prod(map(int, shape.split("x")[:-1])) for shape in shapes]
    assert vocab * 32 <= max(sizes) < rows * length * vocab
