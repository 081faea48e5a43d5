"""The training objective against its integral, and the times at which it looks."""

import dense
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from sedd_jax.diffusion.graphs import GRAPHS, Absorbing
from sedd_jax.diffusion.losses import TIMES, dwdse, dwdse_at, stratified_times
from sedd_jax.diffusion.schedules import SCHEDULES, LogLinear
from sedd_jax.diffusion.scores import DenseScores

graphs = pytest.mark.parametrize("name", GRAPHS)
LAW = dense.data_law(3, 2)


@graphs
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("times", TIMES)
def test_the_mean_of_the_loss_is_the_integral_over_times_and_noise(name, schedule, times):
    graph, schedule = GRAPHS[name](3), SCHEDULES[schedule]()
    score_fn = dense.exact_score_fn(graph, LAW, wrong_by=0.5)
    t_min, draws = 0.02, 100_000
    x0 = np.array([0, 2], np.int32)
    cost = jax.jit(
        lambda t, xt: dwdse_at(t, xt, jnp.tile(x0, (len(xt), 1)), score_fn, graph, schedule).nats
    )
    mean = dense.integral(graph, schedule, x0, cost, t_min) / (1.0 - t_min)

    @jax.jit
    def draw(key):
        batch = jnp.tile(x0, (draws, 1))
        return dwdse(key, batch, score_fn, graph, schedule, t_min=t_min, times=TIMES[times]).nats

    loss = np.asarray(draw(jax.random.key(0)), np.float64)
    assert loss.shape == (draws,)
    error = loss.std() / draws**0.5
    assert error < 0.02 * mean
    assert abs(loss.mean() - mean) < 3 * error


@graphs
def test_the_loss_is_the_sum_over_tokens_of_slope_times_score_entropy(name):
    graph, schedule = GRAPHS[name](3), LogLinear()
    score_fn = dense.exact_score_fn(graph, LAW, wrong_by=0.5)
    t = jnp.array([[0.3], [0.8]])
    xt = graph.limit(jax.random.key(0), (2, 2))
    x0 = jnp.array([[0, 2], [1, 1]])
    sigma = schedule.sigma(t)
    value = graph.score_entropy(score_fn(xt, sigma), sigma, xt, x0).value
    expected = schedule.dsigma_dt(t)[:, 0] * value.sum(axis=1)
    found = dwdse_at(t, xt, x0, score_fn, graph, schedule)
    np.testing.assert_allclose(found.nats, expected, rtol=1e-5)


@graphs
def test_the_exact_score_has_the_smallest_expected_loss(name):
    graph, schedule = GRAPHS[name](3), LogLinear()

    def expected(wrong_by):
        score_fn = dense.exact_score_fn(graph, LAW, wrong_by=wrong_by)

        @jax.jit
        def cost(t, xt, x0):
            batch = jnp.broadcast_to(x0, xt.shape)
            return dwdse_at(t, xt, batch, score_fn, graph, schedule).nats

        parts = [
            dense.integral(graph, schedule, x0, lambda t, xt, x0=x0: cost(t, xt, x0), 1e-3)
            for x0 in dense.sequences(3, 2)
        ]
        return LAW.ravel() @ parts

    smallest = expected(0.0)
    assert smallest < expected(0.05)


def test_zero_logits_cost_log_vocab_size_under_absorbing():
    vocab_size, length, batch = 50257, 64, 64
    graph = Absorbing(vocab_size)

    def score_fn(xt, sigma):
        table = jnp.zeros((*xt.shape, 1)) - graph.log_scale(sigma)[..., None]
        return Constant(table[..., 0])

    class Constant:
        """Scores of zero logits, without their table."""

        def __init__(self, log_score):
            self.value = log_score

        def total_and_pick(self, targets, needed):
            return self.value + jnp.log(vocab_size), self.value

    t = stratified_times(jax.random.key(0), 100_000, 1e-3)[:, None]
    sigma = LogLinear().sigma(t)
    xt = jnp.full((1, 1), graph.mask)
    value = graph.score_entropy(score_fn(xt, sigma), sigma, xt, jnp.zeros_like(xt)).value
    masked = -jnp.expm1(-sigma)  # the probability of a masked token
    per_token = (LogLinear().dsigma_dt(t) * masked * value).mean()
    np.testing.assert_allclose(per_token, 0.999 * np.log(vocab_size), rtol=1e-5)

    x0 = jax.random.randint(jax.random.key(1), (batch, length), 0, vocab_size)
    keys = jax.random.split(jax.random.key(2), 400)
    draw = jax.jit(
        jax.vmap(lambda k: dwdse(k, x0, score_fn, graph, LogLinear(), times=stratified_times).nats)
    )
    loss = np.asarray(draw(keys)).mean(axis=1)
    error = loss.std() / len(loss) ** 0.5
    assert abs(loss.mean() - length * 0.999 * np.log(vocab_size)) < 3 * error
    assert error < 0.01 * loss.mean()


@pytest.mark.parametrize("times", TIMES)
def test_every_time_is_uniform_by_itself(times):
    t_min, batch = 0.1, 5
    draw = jax.jit(jax.vmap(lambda k: TIMES[times](k, batch, t_min)))
    t = np.asarray(draw(jax.random.split(jax.random.key(0), 20_000)))
    for place in range(batch):
        assert scipy.stats.kstest(t[:, place], "uniform", (t_min, 1 - t_min)).pvalue > dense.P_VALUE


@pytest.mark.parametrize("batch", [1, 7, 512])
def test_stratified_times_hold_one_time_in_every_part(batch):
    for seed in range(20):
        t = stratified_times(jax.random.key(seed), batch, 1e-3)
        part = np.floor((np.asarray(t, np.float64) - 1e-3) / 0.999 * batch + 1e-6 * batch)
        close = np.abs(np.sort(part) - np.arange(batch))
        assert t.shape == (batch,) and close.max() <= 1 and close.sum() <= 1


def test_stratified_times_shrink_the_variance_of_a_batch():
    graph, schedule = Absorbing(3), LogLinear()

    def score_fn(xt, sigma):
        return DenseScores(jnp.zeros((*xt.shape, 4)) - graph.log_scale(sigma)[..., None], xt, 3)

    x0 = jnp.zeros((32, 64), jnp.int32)
    spread = {}
    for name, times in TIMES.items():
        mean = jax.jit(
            jax.vmap(
                lambda k, t=times: dwdse(k, x0, score_fn, graph, schedule, times=t).nats.mean()
            )
        )
        spread[name] = float(mean(jax.random.split(jax.random.key(0), 500)).var())
    assert spread["stratified"] < 0.9 * spread["independent"]


@graphs
def test_times_and_noise_come_from_different_keys(name):
    seen = [jax.random.key(0)]

    class Spy(GRAPHS[name]):
        def perturb(self, key, x0, sigma):
            seen.append(key)
            return super().perturb(key, x0, sigma)

    def times(key, batch_size, t_min):
        seen.append(key)
        return stratified_times(key, batch_size, t_min)

    graph = Spy(3)
    score_fn = dense.exact_score_fn(GRAPHS[name](3), LAW)
    x0 = jnp.zeros((4, 2), jnp.int32)
    dwdse(seen[0], x0, score_fn, graph, LogLinear(), times=times)
    assert len({tuple(jax.random.key_data(key).tolist()) for key in seen}) == 3


@pytest.mark.parametrize("factor", [1.0, 0.25, 3.0])
def test_log_z_is_the_log_of_the_factor_by_which_the_scores_are_too_large(factor):
    graph, schedule = Absorbing(3), LogLinear()
    exact = dense.exact_score_fn(graph, LAW)

    def score_fn(xt, sigma):
        return DenseScores(exact(xt, sigma).log_score() + jnp.log(factor), xt, 3)

    x0 = jnp.array([[0, 2], [1, 1], [2, 0]])
    t = jnp.array([[0.3], [0.8], [0.6]])
    xt = jnp.array([[3, 3], [1, 3], [3, 0]])
    found = dwdse_at(t, xt, x0, score_fn, graph, schedule)
    np.testing.assert_allclose(found.metrics["log_z"].value(), np.log(factor), atol=1e-5)
    # Padding has none, and a batch without a masked token has none: 0.
    is_token = jnp.array([[True, False], [True, True], [True, True]])
    one = dwdse_at(t, xt, x0, score_fn, graph, schedule, is_token=is_token)
    np.testing.assert_allclose(one.metrics["log_z"].value(), np.log(factor), atol=1e-5)
    none = dwdse_at(t, x0, x0, score_fn, graph, schedule)
    assert none.metrics["log_z"].value() == 0.0


def test_uniform_noise_has_no_log_z():
    graph = GRAPHS["uniform"](3)
    found = dwdse(
        jax.random.key(0),
        jnp.zeros((2, 2), jnp.int32),
        dense.exact_score_fn(graph, LAW),
        graph,
        LogLinear(),
    )
    assert found.metrics == {}
