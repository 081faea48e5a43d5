"""Padding counts nowhere: a padded row has the scores, the loss and the bound of the row alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sedd_jax import experiment
from sedd_jax.data import Blocks
from sedd_jax.diffusion.graphs import GRAPHS
from sedd_jax.diffusion.losses import dwdse_at
from sedd_jax.diffusion.objectives import Dwdse
from sedd_jax.diffusion.schedules import LogLinear
from sedd_jax.inference import bounds
from sedd_jax.models.head import make_score_fn

LENGTHS = (3, 8, 5)


@pytest.fixture(params=sorted(GRAPHS))
def parts(request, tiny_config):
    """Graph, network and parameters without zeros, for 11 tokens."""
    graph = GRAPHS[request.param](11)
    tiny_config.model.dropout = 0.0
    model = experiment.make_model(tiny_config, graph)
    params = experiment.init_params(tiny_config, model, jax.random.key(0))
    params = jax.tree.map(
        lambda p: p + 0.1 * jnp.cos(jnp.arange(p.size) + 1.0).reshape(p.shape), params
    )
    return graph, model, params


def rows(seed: int, padding: int):
    """Blocks of LENGTHS tokens, filled up to 8 with `padding`."""
    tokens = np.random.default_rng(seed).integers(0, 11, (3, 8)).astype(np.int32)
    is_token = np.arange(8) < np.array(LENGTHS)[:, None]
    return Blocks(np.where(is_token, tokens, padding).astype(np.int32), is_token)


def test_scores_and_loss_of_a_padded_row_are_those_of_the_row_alone(parts):
    graph, model, params = parts
    x0, is_token = rows(0, padding=0)
    t = jnp.array([[0.3], [0.5], [0.8]])
    sigma = LogLinear().sigma(t)
    xt = graph.perturb(jax.random.key(1), x0, sigma)
    score_fn = make_score_fn(model, params, graph, is_token=is_token)
    scores = score_fn(xt, sigma).log_score()
    losses = dwdse_at(t, xt, x0, score_fn, graph, LogLinear(), is_token=is_token).nats
    other = make_score_fn(model, params, graph)(xt, sigma).log_score()
    for i, length in enumerate(LENGTHS):
        row = slice(i, i + 1)
        alone = make_score_fn(model, params, graph)
        shown, clean = xt[row, :length], x0[row, :length]
        expected = alone(shown, sigma[row]).log_score()
        np.testing.assert_allclose(scores[row, :length], expected, atol=2e-5)
        loss = dwdse_at(t[row], shown, clean, alone, graph, LogLinear()).nats
        np.testing.assert_allclose(losses[row], loss, rtol=1e-5)
        if length < 8:  # without the mask the padding is read
            assert np.abs(other[row, :length] - expected).max() > 1e-3


def test_the_gradient_of_the_loss_does_not_see_the_padding(parts):
    graph, model, params = parts
    t = jnp.array([[0.3], [0.5], [0.8]])

    @jax.jit
    def gradient(blocks, xt):
        def loss(params):
            score_fn = make_score_fn(model, params, graph, is_token=blocks.is_token)
            x0, is_token = blocks
            return dwdse_at(t, xt, x0, score_fn, graph, LogLinear(), is_token=is_token).nats.mean()

        return jax.grad(loss)(params)

    first, second = rows(0, padding=0), rows(0, padding=7)
    xt = graph.perturb(jax.random.key(1), first.tokens, LogLinear().sigma(t))
    noised = [jnp.where(b.is_token, xt, b.tokens) for b in (first, second)]
    one, two = gradient(first, noised[0]), gradient(second, noised[1])
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6 * max(1.0, float(jnp.abs(a).max())))


def test_the_bound_of_padded_rows_counts_their_tokens_alone(parts):
    graph, model, params = parts
    bound_fn = bounds.make_bound_fn(model, graph, LogLinear(), Dwdse())

    def total(blocks, seed=0):
        return bounds.corpus_bound(
            bound_fn, params, jax.random.key(seed), blocks, passes=64, batch_size=3, t_min=1e-3
        )

    padded = total(rows(0, padding=0))
    again = total(rows(0, padding=7))
    for name, nats in padded.sums.items():
        assert nats == again.sums[name] or nats == pytest.approx(again.sums[name], rel=1e-5)
    assert padded.curve == again.curve
    for name, nats in padded.by_block.items():
        np.testing.assert_allclose(nats, again.by_block[name], rtol=1e-5)
    prior = graph.prior(LogLinear().sigma(1.0)) * sum(LENGTHS)
    assert padded.prior == pytest.approx(float(prior), rel=1e-5)
    # Row by row, without padding: other noise, the same bound.
    x0 = rows(0, padding=0).tokens
    alone = [
        total(Blocks(np.repeat(x0[i : i + 1, :length], 3, axis=0)), seed=i)
        for i, length in enumerate(LENGTHS)
    ]
    expected = sum(one.bound / 3 for one in alone)
    error = np.hypot(
        padded.bound_standard_error, np.sqrt(sum(o.bound_standard_error**2 / 9 for o in alone))
    )
    assert abs(padded.bound - expected) < 4 * error < 0.5 * expected
