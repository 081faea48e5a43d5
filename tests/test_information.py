"""Entropy, divergence and mutual information against what enumeration gives."""

import functools

import dense
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sedd_jax.diffusion import information
from sedd_jax.diffusion.graphs import GRAPHS, Absorbing, Uniform
from sedd_jax.diffusion.schedules import LogLinear
from sedd_jax.diffusion.scores import DenseScores

graphs = pytest.mark.parametrize("name", GRAPHS)
T_MIN = 1e-3
V = 3
P, Q = dense.data_law(V, 2, 2), dense.data_law(V, 2, 7)
IS_FIRST = np.array([True, False])


def kl(p, q):
    return float(np.sum(p[p > 0] * np.log(p[p > 0] / q[p > 0])))


def kl_of_noised(graph, p, q, t):
    sigma = float(LogLinear().sigma(jnp.float32(t)))
    return kl(dense.marginal(graph, p, sigma), dense.marginal(graph, q, sigma))


def uniform_law():
    return np.full_like(P, 1.0 / P.size)


def product_law():
    return P.sum(axis=1, keepdims=True) * P.sum(axis=0, keepdims=True)


def comparisons(graph):
    """By name: what is compared, by the exact scores of P, and the distribution it stands for."""
    score_fn, other = (dense.exact_score_fn(graph, law) for law in (P, Q))
    yield "entropy", information.from_uniform(score_fn, graph), uniform_law()
    yield "divergence", information.between(score_fn, other, graph), Q
    if isinstance(graph, Absorbing):
        parts = information.from_parts(score_fn, graph, jnp.asarray(IS_FIRST))
        yield "mutual information", parts, product_law()


@functools.cache
def estimates(name, measure, wrong_by=0.0):
    """[9 sequences, copies]: a text's estimate, the mean of its passes."""
    graph, copies = GRAPHS[name](V), 3000
    (compare,) = (compare for known, compare, _ in comparisons(graph) if known == measure)
    x0 = jnp.asarray(np.repeat(dense.sequences(V, 2), copies, axis=0))

    @jax.jit
    def run(key):
        how = {"passes": 16, "t_min": T_MIN}
        index = jnp.arange(len(x0))
        return information.divergence(key, x0, index, compare, graph, LogLinear(), **how)

    return np.asarray(run(jax.random.key(0)), np.float64).mean(axis=1).reshape(-1, copies)


CASES = [
    (name, measure)
    for name in GRAPHS
    for measure in ("entropy", "divergence", "mutual information")
    if name == "absorbing" or measure != "mutual information"
]


@pytest.mark.parametrize("name, measure", CASES)
def test_the_estimate_is_that_of_the_distributions(name, measure):
    graph = GRAPHS[name](V)
    (q,) = (q for known, _, q in comparisons(graph) if known == measure)
    values, weights = estimates(name, measure), P.ravel()
    mean = weights @ values.mean(axis=1)
    error = np.sqrt(weights**2 @ values.var(axis=1) / values.shape[1])
    noised = kl_of_noised(graph, P, q, T_MIN) - kl_of_noised(graph, P, q, 1.0)
    assert error < 0.004
    assert abs(mean - noised) < 3 * error
    # What the ends of the integral leave out is little: the clean distributions are meant.
    assert noised == pytest.approx(kl(P, q), abs=0.01)
    assert kl(P, q) > 30 * error


@graphs
def test_the_divergence_of_scores_is_the_sum_over_states(name):
    graph, sigma = GRAPHS[name](4), jnp.array([[0.3], [2.0]])
    rate, rng = dense.rate_matrix(graph), np.random.default_rng(0)
    xt = jnp.asarray(rng.integers(0, graph.dim, (2, 5)), jnp.int32)
    tables = rng.normal(size=(2, 2, 5, graph.dim))
    if name == "absorbing":  # whose scores have a known total
        xt = xt.at[:, 0].set(graph.mask)
        clean = np.exp(tables[..., :-1])
        clean /= clean.sum(axis=-1, keepdims=True) * np.expm1(np.asarray(sigma))[None, :, None]
        tables[..., :-1] = np.log(clean)
    s, r = (DenseScores(jnp.asarray(table, jnp.float32), xt, 4) for table in tables)
    values = graph.score_divergence(s, r, sigma, xt)
    uniform = graph.divergence_from_uniform(s, sigma, xt)
    log_fair = -graph.log_scale(sigma)[..., None]  # what zero logits mean: independent tokens
    fair = DenseScores(jnp.broadcast_to(log_fair, s.table.shape), xt, 4)
    for b, i in np.ndindex(xt.shape):
        x, total = int(xt[b, i]), 0.0
        for y in range(graph.dim):
            if y != x:
                log_s, log_r = tables[:, b, i, y]
                s_y, r_y = np.exp(log_s), np.exp(log_r)
                total += rate[x, y] * (s_y * (log_s - log_r) - s_y + r_y)
        assert values[b, i] == pytest.approx(total, rel=2e-5, abs=1e-6)
    expected = graph.score_divergence(s, fair, sigma, xt)
    np.testing.assert_allclose(uniform, expected, rtol=2e-5, atol=2e-6)
    assert np.asarray(values).max() > 0.1


def test_what_is_not_scored_is_a_condition():
    graph, copies = Absorbing(V), 3000
    score_fn = dense.exact_score_fn(graph, P)
    x0 = jnp.asarray(np.repeat([[a, 0] for a in range(V)], copies, axis=0), jnp.int32)
    is_token = jnp.broadcast_to(jnp.array([True, False]), x0.shape)

    @jax.jit
    def run(x0):
        compare = information.from_uniform(score_fn, graph)
        args = (jax.random.key(0), x0, jnp.arange(len(x0)), compare, graph, LogLinear())
        return information.divergence(*args, passes=4, is_token=is_token)

    values = np.asarray(run(x0), np.float64).mean(axis=1).reshape(V, copies)
    conditional = P[:, 0] / P[:, 0].sum()
    error = np.sqrt(conditional**2 @ values.var(axis=1) / copies)
    mean = conditional @ values.mean(axis=1)
    assert error < 0.002
    assert mean == pytest.approx(kl(conditional, np.full(V, 1 / V)), abs=3 * error + 0.002)


def test_parts_need_a_state_for_what_is_hidden():
    graph = Uniform(V)
    with pytest.raises(ValueError, match="take a model of absorbing noise"):
        information.from_parts(dense.exact_score_fn(graph, P), graph, jnp.asarray(IS_FIRST))
