"""The graphs' closed forms against their D x D definitions."""

import dense
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sedd_jax.diffusion.graphs import GRAPHS, Absorbing, Uniform
from sedd_jax.diffusion.scores import DenseScores

SIGMAS = (1e-5, 1e-3, 0.1, 1.0, 6.9)
graphs = pytest.mark.parametrize("name", GRAPHS)
vocabularies = pytest.mark.parametrize("vocab_size", [3, 4])
sigmas = pytest.mark.parametrize("sigma", SIGMAS)


def every_state(kernel, graph, *noise):
    """A per-token kernel at every state: column x is kernel(x)."""
    states = jnp.arange(graph.dim)
    return np.asarray(jax.vmap(kernel, (0,) + (None,) * len(noise), 1)(states, *noise))


def transition(graph, sigma):
    """[D, D]: column x is p_sigma(. | x)."""
    return every_state(graph.transp_transition, graph, sigma).T


def log_ratios(graph, sigma, law):
    """log p_sigma(y) - log p_sigma(x) for one token, row x, [D, D]."""
    log_p = np.log(dense.marginal(graph, law, sigma))
    return (log_p[None] - log_p[:, None]).astype(np.float32)


@graphs
@vocabularies
def test_rates_are_the_rows_of_the_rate_matrix(name, vocab_size):
    graph = GRAPHS[name](vocab_size)
    rate = dense.rate_matrix(graph)
    np.testing.assert_allclose(rate.sum(axis=0), 0.0, atol=1e-15)
    np.testing.assert_allclose(every_state(graph.transp_rate, graph).T, rate, atol=1e-7)


@graphs
@vocabularies
@sigmas
def test_transition_is_the_exponential_of_the_rates(name, vocab_size, sigma):
    graph = GRAPHS[name](vocab_size)
    exact = dense.transition(graph, sigma)
    ours = transition(graph, sigma)
    np.testing.assert_allclose(ours, exact, rtol=1e-6, atol=1e-20)
    np.testing.assert_allclose(ours.sum(axis=0), 1.0, rtol=1e-6)


@graphs
@vocabularies
def test_transitions_compose(name, vocab_size):
    graph = GRAPHS[name](vocab_size)
    first, second = transition(graph, 0.3), transition(graph, 1.1)
    np.testing.assert_allclose(second @ first, transition(graph, 1.4), rtol=1e-6)
    np.testing.assert_allclose(transition(graph, 0.0), np.eye(graph.dim))


@graphs
@pytest.mark.parametrize("sigma", [0.01, 1.0, 6.9])
def test_perturb_draws_from_the_transition(name, sigma):
    graph = GRAPHS[name](4)
    x0 = jnp.tile(jnp.arange(4), (50_000, 1))
    xt = jax.jit(graph.perturb)(jax.random.key(0), x0, jnp.full((50_000, 1), sigma))
    assert xt.dtype == jnp.int32
    for token in range(4):
        counts = np.bincount(xt[:, token], minlength=graph.dim)
        assert dense.p_value(counts, dense.transition(graph, sigma)[:, token]) > dense.P_VALUE


@graphs
def test_perturb_moves_tokens_of_a_sequence_independently(name):
    graph = GRAPHS[name](3)
    sigma = 0.7
    xt = graph.perturb(jax.random.key(1), jnp.tile(jnp.array([0, 2]), (100_000, 1)), sigma)
    counts = dense.count(xt, graph.dim)
    assert dense.p_value(counts, dense.given(graph, [0, 2], sigma)) > dense.P_VALUE


@graphs
def test_limit_is_where_the_forward_process_ends(name):
    graph = GRAPHS[name](4)
    x = graph.limit(jax.random.key(0), (10_000, 4))
    assert x.shape == (10_000, 4) and x.dtype == jnp.int32
    end = dense.transition(graph, 60.0)[:, 0]
    end[end < 1e-12] = 0.0
    assert dense.p_value(np.bincount(x.ravel(), minlength=graph.dim), end) > dense.P_VALUE


@graphs
@vocabularies
@sigmas
def test_prior_is_the_divergence_from_the_base_law(name, vocab_size, sigma):
    graph = GRAPHS[name](vocab_size)
    # Both base laws are the forward process started at a uniform clean token.
    ends = dense.transition(graph, sigma)
    base = ends[:, :vocab_size].mean(axis=1)
    p = ends[:, 0]
    held = p > 0
    divergence = (p[held] * np.log(p[held] / base[held])).sum()
    np.testing.assert_allclose(graph.prior(jnp.float32(sigma)), divergence, rtol=2e-5, atol=1e-9)


@graphs
def test_prior_has_a_gradient_and_the_shape_of_sigma(name):
    graph = GRAPHS[name](4)
    assert graph.prior(jnp.ones((3, 1))).shape == (3, 1)
    np.testing.assert_allclose(graph.prior(jnp.zeros(())), np.log(4), rtol=1e-6)
    assert (jax.vmap(jax.grad(graph.prior))(jnp.array(SIGMAS)) < 0).all()


@graphs
@vocabularies
@sigmas
def test_reverse_rate_is_the_score_times_the_forward_rate(name, vocab_size, sigma):
    graph = GRAPHS[name](vocab_size)
    ratio = np.exp(log_ratios(graph, sigma, dense.data_law(vocab_size, 1)).astype(np.float64))
    rate = dense.rate_matrix(graph)
    for x in range(graph.dim):
        exact = ratio[x] * rate[x]
        exact[x] = 0.0
        exact[x] = -exact.sum()
        reverse = graph.reverse_rate(jnp.asarray(ratio[x], jnp.float32), jnp.int32(x))
        np.testing.assert_allclose(reverse, exact, rtol=2e-6)


@graphs
@vocabularies
@pytest.mark.parametrize("sigma, delta_sigma", [(1e-3, 9e-4), (0.1, 0.01), (2.0, 1.5), (6.9, 0.7)])
def test_staggered_score_is_the_earlier_law_over_the_present_one(
    name, vocab_size, sigma, delta_sigma
):
    graph = GRAPHS[name](vocab_size)
    law = dense.data_law(vocab_size, 1)
    earlier = dense.marginal(graph, law, sigma - delta_sigma)
    now = dense.marginal(graph, law, sigma)
    score = np.exp(log_ratios(graph, sigma, law))
    for x in range(graph.dim):
        staggered = graph.staggered_score(score[x], jnp.float32(delta_sigma))
        np.testing.assert_allclose(staggered, earlier / now[x], rtol=2e-4)


@graphs
@vocabularies
@sigmas
@pytest.mark.parametrize("wrong_by", [0.0, 1.0])
def test_score_entropy_is_definition_3_1(name, vocab_size, sigma, wrong_by):
    graph = GRAPHS[name](vocab_size)
    rng = np.random.default_rng(0)
    log_score = log_ratios(graph, sigma, dense.data_law(vocab_size, 1))
    log_score += wrong_by * rng.normal(size=log_score.shape).astype(np.float32)
    likelihood, rate = dense.transition(graph, sigma), dense.rate_matrix(graph)
    pairs = np.array(
        [(x, y) for x in range(graph.dim) for y in range(vocab_size) if likelihood[x, y] > 0],
        np.int32,
    )
    xt, x0 = pairs[:, :1], pairs[:, 1:]
    scores = DenseScores(jnp.asarray(log_score)[xt], xt, vocab_size)
    entropy = graph.score_entropy(scores, jnp.full(xt.shape, sigma), xt, x0)
    assert entropy.value.shape == xt.shape
    for (x, clean), value in zip(pairs, entropy.value[:, 0], strict=True):
        score = np.exp(log_score[x].astype(np.float64))
        exact = dense.score_entropy(rate[x], likelihood[:, clean], score, x)
        scale = (rate[x] * score)[np.arange(graph.dim) != x].sum()  # what is added and taken away
        np.testing.assert_allclose(value, exact, rtol=3e-6, atol=3e-6 * scale)


@pytest.mark.parametrize("vocab_size", [256, 32768, 50257])
@pytest.mark.parametrize("sigma", [1e-5, 1e-4, 1e-3, 1.0, 20.0])
def test_uniform_score_entropy_keeps_its_digits_at_a_large_vocabulary(vocab_size, sigma):
    graph = Uniform(vocab_size)
    exact_sigma = np.float64(np.float32(sigma))
    likelihood = np.full(vocab_size, -np.expm1(-exact_sigma) / vocab_size)
    likelihood[7] += np.exp(-exact_sigma)
    log_score = np.random.default_rng(0).normal(size=vocab_size).astype(np.float32)
    rates_into = np.full(vocab_size, 1.0 / vocab_size)
    for x in (7, 8):
        # The scores are those of the best guess, moved by up to a few nats.
        guess = np.log(likelihood / likelihood[x]).astype(np.float32) + log_score
        guess[x] = 0.0
        score = np.exp(guess.astype(np.float64))
        exact = dense.score_entropy(rates_into, likelihood, score, x)
        xt, x0, noise = jnp.int32([[x]]), jnp.int32([[7]]), jnp.float32([[sigma]])
        scores = DenseScores(jnp.asarray(guess)[None, None], xt, vocab_size)
        value = graph.score_entropy(scores, noise, xt, x0).value[0, 0]
        np.testing.assert_allclose(value, exact, rtol=1e-4)


@pytest.mark.parametrize("vocab_size", [3, 50257])
@sigmas
def test_absorbing_score_entropy_splits_into_cross_entropy_and_a_penalty(vocab_size, sigma):
    graph = Absorbing(vocab_size)
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(64, 1, graph.dim)).astype(np.float32)
    x0 = rng.integers(0, vocab_size, size=(64, 1)).astype(np.int32)
    xt = np.full_like(x0, graph.mask)
    noise = jnp.full((64, 1), sigma)
    table = logits - graph.log_scale(noise)[..., None]
    entropy = graph.score_entropy(DenseScores(table, xt, vocab_size), noise, xt, x0)

    log_q = logits[..., :vocab_size].astype(np.float64) - np.log(vocab_size)
    z = np.exp(log_q).sum(axis=-1)
    cross_entropy = np.log(z) - np.take_along_axis(log_q, x0[..., None], -1)[..., 0]
    odds = np.expm1(np.float64(np.float32(sigma)))
    np.testing.assert_allclose(entropy.normalised * odds, cross_entropy, rtol=1e-5, atol=3e-6)
    penalty = (entropy.value - entropy.normalised) * odds
    np.testing.assert_allclose(penalty, z - 1.0 - np.log(z), atol=5e-6)


@sigmas
def test_normalised_score_entropy_is_never_larger(sigma):
    graph = Absorbing(4)
    rng = np.random.default_rng(1)
    spread = rng.choice([1e-4, 1e-2, 1.0], size=(10_000, 1, 1))
    table = (np.log(0.25) + spread * rng.normal(size=(10_000, 1, 5))).astype(np.float32)
    noise = jnp.full((10_000, 1), sigma)
    xt = np.full((10_000, 1), graph.mask, np.int32)
    scores = DenseScores(table - jnp.log(jnp.expm1(sigma)), xt, 4)
    entropy = graph.score_entropy(scores, noise, xt, np.zeros_like(xt))
    looser = (entropy.value - entropy.normalised) * np.expm1(sigma)
    assert looser.min() > -1e-6  # float32 rounding of the log-scores
    assert looser.max() > 1.0


@pytest.mark.parametrize("scale_by_sigma", [True, False])
def test_zero_logits_are_a_fair_guess_only_with_scale_by_sigma(scale_by_sigma):
    graph = Absorbing(4, scale_by_sigma)
    sigma = jnp.array(SIGMAS)[:, None]
    xt = jnp.full((len(SIGMAS), 1), graph.mask)
    table = jnp.zeros((len(SIGMAS), 1, 5)) - graph.log_scale(sigma)[..., None]
    scores = DenseScores(table, xt, 4)
    log_z = scores.total_and_pick(jnp.zeros_like(xt))[0] + jnp.log(jnp.expm1(sigma))
    fair = jnp.zeros_like(log_z) if scale_by_sigma else jnp.log(4 * jnp.expm1(sigma))
    np.testing.assert_allclose(log_z, fair, atol=2e-6)


def test_unmasked_tokens_cost_nothing_under_absorbing():
    graph = Absorbing(3)
    x0 = jnp.array([[0, 1, 2]])
    scores = DenseScores(jnp.ones((1, 3, 4)), x0, 3)
    entropy = graph.score_entropy(scores, jnp.ones((1, 1)), x0, x0)
    assert all((part == 0).all() for part in entropy)


@graphs
def test_score_entropy_has_a_finite_gradient_at_the_noise_of_the_last_step(name):
    graph = GRAPHS[name](4)
    xt = graph.limit(jax.random.key(0), (1, 8)).at[0, 0].set(2)
    x0 = jnp.array([[2, 1, 0, 3, 3, 2, 1, 0]])
    sigma = jnp.full((1, 1), 1e-5)

    def loss(logits):
        scores = DenseScores(logits - graph.log_scale(sigma)[..., None], xt, 4)
        return graph.score_entropy(scores, sigma, xt, x0).value.sum()

    gradient = jax.grad(loss)(jnp.zeros((1, 8, graph.dim)))
    assert jnp.isfinite(gradient).all() and (gradient != 0).any()


@graphs
def test_a_vocabulary_of_one_token_is_refused(name):
    with pytest.raises(ValueError, match="vocab_size 1"):
        GRAPHS[name](1)
