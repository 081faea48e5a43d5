"""The rivals of the paper's objective against their definitions, by enumeration."""

import functools

import dense
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sedd_jax import config as configuration
from sedd_jax.configs import quickstart
from sedd_jax.diffusion.graph import lift
from sedd_jax.diffusion.graphs import GRAPHS, Absorbing
from sedd_jax.diffusion.likelihood import discrete_bound
from sedd_jax.diffusion.losses import (
    concrete_score_matching_at,
    d3pm_at,
    dwdse_at,
    normalised_at,
    unweighted_at,
)
from sedd_jax.diffusion.objectives import D3PM, OBJECTIVES
from sedd_jax.diffusion.predictors import Options, Step, tweedie
from sedd_jax.diffusion.schedules import SCHEDULES, LogLinear
from sedd_jax.diffusion.scores import DenseScores, NormalisedScores
from sedd_jax.experiment import make_graph
from sedd_jax.models.head import HeadScores, make_score_fn
from sedd_jax.models.transformer import Output, Transformer
from sedd_jax.parallel.sharding import Placement

graphs = pytest.mark.parametrize("name", GRAPHS)
VOCAB = 4
LAW = dense.data_law(3, 2)
NOWHERE = -1  # an id that leaves no token out


def clean_logits(rows: int, vocab_size: int = VOCAB, seed: int = 0) -> np.ndarray:
    """Logits of clean tokens, [rows, vocab_size]."""
    return np.random.default_rng(seed).normal(size=(rows, vocab_size)).astype(np.float32)


def softmax(logits):
    weights = np.exp(np.asarray(logits, np.float64))
    return weights / weights.sum(axis=-1, keepdims=True)


def of_clean(graph, logits, x, sigma):
    """Scores of one token a row: logits [N, V], x [N], sigma [N]."""
    xt, sigma = jnp.asarray(x)[:, None], jnp.asarray(sigma, jnp.float32)[:, None]
    table = jnp.pad(jnp.asarray(logits), [(0, 0), (0, graph.dim - graph.vocab_size)])[:, None]
    answers = DenseScores(table, jnp.full_like(xt, NOWHERE), graph.vocab_size)
    return graph.scores_of_clean(answers, xt, sigma), xt, sigma


def exact_clean_fn(graph, p0, *, wrong_by: float = 0.0):
    """(xt, sigma) -> scores by the distribution of each clean token given the other noised ones.

    wrong_by adds that many nats of Gaussian error to each logit, fixed for each sequence.
    """
    length, vocab, dim = p0.ndim, graph.vocab_size, graph.dim
    clean = dense.sequences(vocab, length)  # [V^L, L]
    stride = dim ** np.arange(length)[::-1]
    error = wrong_by * jax.random.normal(jax.random.key(0), (dim**length, length, vocab))
    weight = jnp.asarray(p0.ravel(), jnp.float32)
    is_token = jnp.asarray(clean[..., None] == np.arange(vocab), jnp.float32)  # [V^L, L, V]

    def one(x, sigma):
        def chance(token):  # of the noised token given each clean one
            return graph.transp_transition(token, sigma[0])[:vocab]

        likelihood = jax.vmap(chance)(x)  # [L, V]
        each = likelihood[jnp.arange(length), clean]  # [V^L, L]
        others = jnp.prod(jnp.where(jnp.eye(length, dtype=bool)[:, None], 1.0, each), axis=-1)
        joint = jnp.einsum("n,ln,nlv->lv", weight, others, is_token)
        return jnp.log(joint / joint.sum(axis=1, keepdims=True)) + error[(x * stride).sum()]

    def score_fn(xt, sigma):
        logits = jax.vmap(one)(xt, jnp.broadcast_to(sigma, (len(xt), 1)))
        logits = jnp.pad(logits, [(0, 0), (0, 0), (0, dim - vocab)])
        answers = DenseScores(logits, jnp.full_like(xt, NOWHERE), vocab)
        return graph.scores_of_clean(answers, xt, sigma)

    return score_fn


# --- what the clean token's distribution says


def noisy(graph) -> np.ndarray:
    """The states whose scores mean something."""
    return np.array([graph.mask]) if isinstance(graph, Absorbing) else np.arange(graph.dim)


@graphs
@pytest.mark.parametrize("sigma", [1e-3, 0.4, 5.0])
def test_scores_of_a_clean_distribution_are_the_ratios_of_it_noised(name, sigma):
    graph = GRAPHS[name](VOCAB)
    x = noisy(graph)
    logits = clean_logits(len(x))
    scores, xt, _ = of_clean(graph, logits, x, np.full(len(x), sigma))
    moved = dense.transition(graph, sigma)
    p = softmax(logits)
    noised = p @ moved[:, :VOCAB].T
    expected = noised / noised[np.arange(len(x)), x][:, None]
    table = np.exp(np.asarray(scores.log_score(), np.float64))[:, 0]
    is_other = np.arange(graph.dim) != x[:, None]
    np.testing.assert_allclose(table[is_other], expected[is_other], rtol=2e-5)
    assert (table[~is_other] == 1.0).all()
    total = np.where(is_other, expected, 0.0)[:, :VOCAB].sum(axis=1)
    np.testing.assert_allclose(np.exp(scores.total(None))[:, 0], total, rtol=2e-5)
    target = np.full_like(xt, 1)
    log_total, pick = scores.total_and_pick(jnp.asarray(target), None)
    np.testing.assert_allclose(np.exp(log_total)[:, 0], total, rtol=2e-5)
    expected_pick = np.where(x == 1, 1.0, expected[:, 1])
    np.testing.assert_allclose(np.exp(pick)[:, 0], expected_pick, rtol=2e-5)
    # And back: the token itself says something too.
    own = p * moved[x][:, :VOCAB]
    noise = jnp.full_like(xt, sigma, jnp.float32)
    clean = lift(graph.clean_probabilities, jnp.exp(scores.log_score()), xt, noise)
    own /= own.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(np.asarray(clean)[:, 0], own, rtol=2e-3, atol=1e-5)


def test_normalised_scores_answer_as_their_table_does():
    rng = np.random.default_rng(0)
    table = rng.normal(size=(2, 3, VOCAB + 1)).astype(np.float32)
    xt = jnp.full((2, 3), VOCAB)
    logits = DenseScores(jnp.asarray(table), jnp.full_like(xt, NOWHERE), VOCAB)
    scores = NormalisedScores(logits, jnp.asarray([[0.3], [-1.0]]), xt)
    same = DenseScores(scores.log_score(), xt, VOCAB)
    sums = np.exp(np.asarray(scores.log_score(), np.float64))[..., :VOCAB].sum(axis=-1)
    np.testing.assert_allclose(np.log(sums), np.tile([[0.3], [-1.0]], 3), atol=1e-6)
    targets = jnp.asarray(rng.integers(0, VOCAB, (2, 3)))
    for question, arguments in [
        ("total", ()),
        ("total_and_pick", (targets,)),
        ("log_sum", ()),
        ("total_of_squares", ()),
        ("peak_and_entropy", ()),
    ]:
        answer, expected = (getattr(s, question)(*arguments) for s in (scores, same))
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-6), answer, expected)
    keys = jax.random.split(jax.random.key(0), 2)
    assert (scores.draw(keys) == same.draw(keys)).all()


@graphs
def test_the_head_answers_for_squares_and_for_its_logits_as_a_table_does(name):
    graph = GRAPHS[name](11)
    rng = np.random.default_rng(0)
    hidden, weight, bias = (
        jnp.asarray(rng.normal(size=shape), jnp.float32)
        for shape in ((2, 5, 3), (graph.dim, 3), (graph.dim,))
    )
    for xt in (graph.limit(jax.random.key(0), (2, 5)), jnp.full((2, 5), NOWHERE)):
        log_scale = jnp.asarray([[0.2], [1.5]])
        scores = HeadScores(Output(hidden, weight, bias), xt, log_scale, 11, Placement())
        table = DenseScores(scores.log_score(), xt, 11)
        np.testing.assert_allclose(scores.total_of_squares(), table.total_of_squares(), rtol=1e-5)
        np.testing.assert_allclose(scores.log_sum(), table.log_sum(), rtol=1e-4, atol=1e-4)


# --- concrete score matching


@graphs
@pytest.mark.parametrize("sigma", [0.05, 1.0, 4.0])
def test_squared_error_is_its_definition(name, sigma):
    graph = GRAPHS[name](VOCAB)
    rates, moved = dense.rate_matrix(graph), dense.transition(graph, sigma)
    rng = np.random.default_rng(0)
    pairs = [(x, x0) for x in range(graph.dim) for x0 in range(VOCAB) if moved[x, x0] > 0]
    x, x0 = (np.array(column)[:, None] for column in zip(*pairs, strict=True))
    log_score = rng.normal(size=(len(x), 1, graph.dim)).astype(np.float32)
    scores = DenseScores(jnp.asarray(log_score), jnp.asarray(x), VOCAB)
    found = graph.squared_error(
        scores, jnp.full(x.shape, sigma, jnp.float32), jnp.asarray(x), jnp.asarray(x0)
    )
    for row, (state, clean) in enumerate(pairs):
        expected = sum(
            rates[state, y]
            * (np.exp(log_score[row, 0, y]) - moved[y, clean] / moved[state, clean]) ** 2
            for y in range(graph.dim)
            if y != state
        )
        np.testing.assert_allclose(found[row, 0], expected, rtol=1e-4)


@graphs
def test_the_minimiser_of_concrete_score_matching_is_the_true_ratio(name):
    graph, schedule = GRAPHS[name](3), LogLinear()
    noised = dense.sequences(graph.dim, 2)
    t = jnp.full((len(noised), 1), 0.6)
    sigma = schedule.sigma(t)
    exact = dense.exact_score_fn(graph, LAW)(jnp.asarray(noised), sigma).log_score()

    def expected_loss(table):
        def score_fn(xt, sigma):
            return DenseScores(table, xt, 3)

        total = 0.0
        for x0, p in zip(dense.sequences(3, 2), LAW.ravel(), strict=True):
            batch = jnp.broadcast_to(x0, noised.shape)
            nats = concrete_score_matching_at(
                t, jnp.asarray(noised), batch, score_fn, graph, schedule
            ).nats
            chance = dense.given(graph, x0, float(sigma[0, 0]))
            total += p * (jnp.where(chance > 0, nats, 0.0) * chance).sum()
        return total

    slope = jax.grad(expected_loss)(exact)
    nearby = jax.grad(expected_loss)(exact + 0.1)
    assert float(jnp.abs(nearby).max()) > 1e-2
    assert float(jnp.abs(slope).max()) < 1e-4 * float(jnp.abs(nearby).max())
    for seed in range(3):
        other = exact + 0.05 * jax.random.normal(jax.random.key(seed), exact.shape)
        assert expected_loss(exact) < expected_loss(other)


# --- normalised scores


def test_the_normalised_objective_is_the_papers_at_scores_of_total_one():
    graph, schedule = Absorbing(VOCAB), LogLinear()
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(6, 3, graph.dim)), jnp.float32)
    x0 = jnp.asarray(rng.integers(0, VOCAB, (6, 3)))
    t = jnp.linspace(0.05, 0.95, 6)[:, None]
    xt = graph.perturb(jax.random.key(0), x0, schedule.sigma(t))

    def loss(loss_at, make):
        def of(logits):
            def score_fn(xt, sigma):
                return make(logits, xt, sigma)

            return loss_at(t, xt, x0, score_fn, graph, schedule).nats.sum()

        return jax.value_and_grad(of)(logits)

    def clean(logits, xt, sigma):
        answers = DenseScores(logits, jnp.full_like(xt, NOWHERE), VOCAB)
        return graph.scores_of_clean(answers, xt, sigma)

    def plain(logits, xt, sigma):
        return DenseScores(logits - graph.log_scale(sigma)[..., None], xt, VOCAB)

    value, gradient = loss(normalised_at, clean)
    for loss_at, make in [(dwdse_at, clean), (normalised_at, plain)]:
        same, slope = loss(loss_at, make)
        np.testing.assert_allclose(same, value, rtol=1e-5)
        np.testing.assert_allclose(slope, gradient, atol=1e-4)
    # By hand: (dsigma/dt / expm1(sigma)) times the cross entropy of the masked tokens.
    log_p = np.log(softmax(logits[..., :VOCAB]))
    cross_entropy = -np.take_along_axis(log_p, np.asarray(x0)[..., None], -1)[..., 0]
    is_masked = np.asarray(xt) == graph.mask
    weight = schedule.dsigma_dt(t) / jnp.expm1(schedule.sigma(t))
    np.testing.assert_allclose(value, (weight * cross_entropy * is_masked).sum(), rtol=1e-5)
    same, _ = loss(unweighted_at, clean)
    np.testing.assert_allclose(same, (cross_entropy * is_masked).sum(), rtol=1e-5)


@pytest.mark.parametrize("predicts_clean", [False, True], ids=["scaled", "normalised"])
def test_a_time_free_networks_score_has_radds_factor(predicts_clean):
    graph = Absorbing(VOCAB, predicts_clean=predicts_clean)
    sizes = {"dim": graph.dim, "hidden_size": 8, "blocks": 1, "heads": 2, "cond_dim": 4}
    xt = jnp.asarray([[graph.mask, 1, graph.mask]])

    @functools.partial(jax.jit, static_argnums=0)
    def table(is_conditioned, sigma):
        network = Transformer(**sizes, dropout=0.0, time_conditioning=is_conditioned)
        params = network.init(jax.random.key(0), xt, jnp.ones((1, 1)), deterministic=True)["params"]
        # Nothing at its zero start, so that the noise level can be seen.
        params = jax.tree.map(
            lambda a: a + 0.3 * jnp.cos(jnp.arange(a.size)).reshape(a.shape), params
        )
        scores = make_score_fn(network, params, graph)(xt, jnp.full((1, 1), sigma))
        return scores.log_score()[0, [0, 2], :VOCAB]

    tables = {
        is_conditioned: [table(is_conditioned, s) for s in (0.3, 2.0)]
        for is_conditioned in (True, False)
    }
    factor = np.log(np.expm1(2.0) / np.expm1(0.3))
    one, two = tables[False]
    np.testing.assert_allclose(one - two, factor, rtol=1e-4)
    one, two = tables[True]
    assert np.abs(np.asarray(one - two) - factor).max() > 1e-2


# --- D3PM


def reverse_step(graph, logits, x, sigma_t, sigma_s):
    """Equation (4) of D3PM: p(x_s | x_t = x) in proportion to the sum over x0 of
    q(x_s, x_t | x0) f(x0), [N, D]."""
    to_x = dense.transition(graph, sigma_t - sigma_s)[x]
    p = to_x * (softmax(logits) @ dense.transition(graph, sigma_s)[:, :VOCAB].T)
    return p / p.sum(axis=1, keepdims=True)


@graphs
@pytest.mark.parametrize(
    ("sigma_t", "sigma_s"), [(0.7, 0.5), (0.002, 0.001), (0.001, 0.0), (6.0, 5.0)]
)
def test_posterior_kl_is_its_definition(name, sigma_t, sigma_s):
    graph = GRAPHS[name](VOCAB)
    moved_t, moved_s = (dense.transition(graph, s) for s in (sigma_t, sigma_s))
    step = dense.transition(graph, sigma_t - sigma_s)
    x, x0 = (a.ravel() for a in np.meshgrid(noisy(graph), np.arange(VOCAB)))
    logits = clean_logits(len(x))
    scores, xt, sigma = of_clean(graph, logits, x, np.full(len(x), sigma_t))
    found = graph.posterior_kl(
        scores, xt, jnp.asarray(x0)[:, None], sigma, jnp.full_like(sigma, sigma_s)
    )
    # q(x_s | x_t, x0) for every x_s, [N, D].
    q = step[x] * moved_s[:, x0].T / moved_t[x, x0][:, None]
    p = reverse_step(graph, logits, x, sigma_t, sigma_s)
    expected = np.where(
        q > 1e-300, q * (np.log(np.maximum(q, 1e-300)) - np.log(np.maximum(p, 1e-300))), 0.0
    ).sum(axis=1)
    np.testing.assert_allclose(found[:, 0], expected, rtol=1e-3, atol=2e-6)
    if sigma_s == 0.0:
        np.testing.assert_allclose(found[:, 0], -np.log(p[np.arange(len(x)), x0]), rtol=1e-3)


@graphs
def test_d3pms_ancestral_step_is_tweedie(name):
    graph, schedule = GRAPHS[name](VOCAB, predicts_clean=True), LogLinear()
    x = noisy(graph)
    logits, t, s = clean_logits(len(x)), 0.6, 0.5
    sigma_t, sigma_s = (float(schedule.sigma(jnp.float32(time))) for time in (t, s))
    scores, xt, _ = of_clean(graph, logits, x, np.full(len(x), sigma_t))
    column = jnp.ones((len(x), 1))
    step = Step(t * column, s * column, lambda xt, sigma: scores, graph, schedule, Options())
    table = tweedie(xt, step).probabilities()[:, 0]
    expected = reverse_step(graph, logits, x, sigma_t, sigma_s)
    np.testing.assert_allclose(table, expected, rtol=1e-4, atol=1e-6)


def discrete_sum(graph, schedule, score_fn, steps):
    """x0 [L] -> D3PM's bound, over all of its steps and all noised sequences."""
    times = (np.arange(steps) + 1.0) / steps

    @jax.jit
    def nats(t, xt, x0):
        batch = jnp.broadcast_to(x0, xt.shape)
        loss = d3pm_at(t, xt, batch, score_fn, graph, schedule, discrete_steps=steps)
        return loss.nats / steps

    def total(x0):
        of_x0 = functools.partial(nats, x0=x0)
        parts = dense.expected_over_noise(graph, schedule, x0, of_x0, times)
        return parts.sum() + len(x0) * float(graph.prior(schedule.sigma(jnp.float32(1.0))))

    return total


@graphs
def test_d3pms_bound_is_tight_with_the_exact_posterior_of_a_token(name):
    graph, schedule, p0 = GRAPHS[name](3), LogLinear(), dense.data_law(3, 1)
    score_fn = exact_clean_fn(graph, p0)
    bound = discrete_sum(graph, schedule, score_fn, 12)
    total = p0.ravel() @ [bound(x0) for x0 in dense.sequences(3, 1)]
    entropy = -(p0 * np.log(p0)).sum()
    # What is left is the mean of how far p_1 of the data is from the base distribution.
    last = dense.marginal(graph, p0, float(schedule.sigma(jnp.float32(1.0))))
    base = np.full(3, 1 / 3)
    alpha = float(jnp.exp(-schedule.sigma(jnp.float32(1.0))))
    if name == "absorbing":  # the base has the mass alpha on the clean tokens, evenly
        base = np.append(alpha * base, 1.0 - alpha)
    gap = (last * (np.log(last) - np.log(base))).sum()
    np.testing.assert_allclose(total, entropy + gap, atol=2e-5)


@graphs
def test_d3pms_bound_is_above_minus_log_p_and_falls_to_it(name):
    graph, schedule = GRAPHS[name](3), LogLinear()
    score_fn = exact_clean_fn(graph, LAW)
    entropy = -(LAW * np.log(LAW)).sum()
    excess = []
    for steps in (2, 8, 32):
        bound = discrete_sum(graph, schedule, score_fn, steps)
        excess.append(LAW.ravel() @ [bound(x0) for x0 in dense.sequences(3, 2)] - entropy)
    assert excess[0] > excess[1] > excess[2] > 0.0
    assert excess[2] < 0.2 * excess[1] + 0.01


def test_d3pms_absorbing_bound_tends_to_the_normalised_one():
    graph, schedule = Absorbing(3), LogLinear()
    score_fn, x0 = exact_clean_fn(graph, LAW, wrong_by=0.7), np.array([2, 0], np.int32)

    @jax.jit
    def nats(t, xt):
        batch = jnp.broadcast_to(x0, xt.shape)
        return normalised_at(t, xt, batch, score_fn, graph, schedule).nats

    prior = 2 * float(graph.prior(schedule.sigma(jnp.float32(1.0))))
    limit = dense.integral(graph, schedule, x0, nats, 1e-6) + prior
    excess = [discrete_sum(graph, schedule, score_fn, steps)(x0) - limit for steps in (8, 64, 512)]
    # A right-hand sum of a function that rises: above, by about a constant over the steps.
    assert abs(excess[0]) > 1e-2
    np.testing.assert_allclose(np.divide(excess[:2], excess[1:]), 8.0, rtol=0.15)


@graphs
def test_the_drawn_bound_of_d3pm_is_its_sum_on_average(name):
    graph, schedule, copies, steps = GRAPHS[name](3), LogLinear(), 4000, 5
    score_fn, x0 = exact_clean_fn(graph, LAW, wrong_by=0.5), np.array([1, 2], np.int32)
    expected = discrete_sum(graph, schedule, score_fn, steps)(x0)
    run = jax.jit(
        functools.partial(
            discrete_bound,
            score_fn=score_fn,
            graph=graph,
            schedule=schedule,
            passes=4,
            discrete_steps=steps,
        )
    )
    drawn = run(jax.random.key(0), jnp.tile(x0, (copies, 1)), jnp.arange(copies))
    total = np.asarray(drawn.total, np.float64)
    error = total.std() / copies**0.5
    assert error < 0.05 * expected
    assert abs(total.mean() - expected) < 3 * error
    # The stated error covers the spread; it is an overestimate at few passes.
    assert 0.7 * total.var() < np.asarray(drawn.variance).mean() < 5 * total.var()
    # Padding: the loss of the first token alone.
    is_token = jnp.tile(jnp.array([True, False]), (copies, 1))
    short = run(jax.random.key(0), jnp.tile(x0, (copies, 1)), jnp.arange(copies), is_token=is_token)
    assert np.asarray(short.total).mean() < total.mean()


@graphs
def test_the_loss_of_d3pm_is_the_bound_without_its_prior(name):
    graph, schedule, copies = GRAPHS[name](3), LogLinear(), 20_000
    score_fn, x0 = exact_clean_fn(graph, LAW, wrong_by=0.5), np.array([1, 2], np.int32)
    expected = discrete_sum(graph, schedule, score_fn, 5)(x0)
    expected -= 2 * float(graph.prior(schedule.sigma(jnp.float32(1.0))))
    objective = D3PM(discrete_steps=5)
    batch = jnp.tile(x0, (copies, 1))
    loss = jax.jit(lambda key: objective.loss(key, batch, score_fn, graph, schedule).nats)
    nats = np.asarray(loss(jax.random.key(0)), np.float64)
    error = nats.std() / copies**0.5
    assert error < 0.02 * expected
    assert abs(nats.mean() - expected) < 3 * error


# --- all of them


@pytest.mark.parametrize("objective", [n for n in OBJECTIVES if not OBJECTIVES[n].is_continuous])
@graphs
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_objective_of_tokens_has_a_finite_loss_gradient_and_bound(objective, name, schedule):
    cls = OBJECTIVES[objective]
    if cls.graph not in (None, name):
        with pytest.raises(ValueError, match=f"objective.name '{objective}' does not fit"):
            checked(objective, name)
        return
    graph, objective = GRAPHS[name](VOCAB, predicts_clean=cls.predicts_clean), cls()
    process = graph, SCHEDULES[schedule]()
    x0 = jax.random.randint(jax.random.key(1), (64, 6), 0, VOCAB)

    def make(table):
        """A network without neighbours: the logits of each state."""

        def score_fn(xt, sigma):
            if graph.predicts_clean:
                answers = DenseScores(table[xt], jnp.full_like(xt, NOWHERE), VOCAB)
                return graph.scores_of_clean(answers, xt, sigma)
            return DenseScores(table[xt] - graph.log_scale(sigma)[..., None], xt, VOCAB)

        return score_fn

    @jax.jit
    @jax.value_and_grad
    def loss(table, key):
        return objective.loss(key, x0, make(table), *process).nats.mean()

    # A guess that all tokens are as likely, but for the one that is there.
    table = 3.0 * jnp.eye(graph.dim) if graph.predicts_clean else jnp.zeros((graph.dim, graph.dim))
    value, gradient = loss(table, jax.random.key(2))
    assert np.isfinite(value) and value > 0.0
    assert np.isfinite(gradient).all() and jnp.abs(gradient).max() > 0.0
    index = jnp.arange(len(x0))
    drawn = jax.jit(lambda key: objective.bound(key, x0, index, make(table), *process, passes=2))
    total = drawn(jax.random.key(3)).total
    assert np.isfinite(total).all() and total.mean() > 0.0


def checked(objective: str, graph: str):
    """The quickstart's config with this objective and noise, checked."""
    config = quickstart.get_config()
    config.objective.name, config.graph.name = objective, graph
    config.graph.scale_by_sigma = graph == "absorbing"
    configuration.check(config)
    return config


def test_a_network_without_the_noise_level_needs_scores_that_know_it():
    config = checked("dwdse", "absorbing")
    config.model.time_conditioning = False
    configuration.check(config)
    config.graph.scale_by_sigma = False
    with pytest.raises(ValueError, match="time_conditioning False does not fit"):
        configuration.check(config)


@pytest.mark.parametrize("objective", ["normalised", "d3pm"])
@graphs
def test_a_config_says_what_its_logits_mean(objective, name):
    if OBJECTIVES[objective].graph in (None, name):
        graph = make_graph(checked(objective, name), VOCAB)
        assert graph == GRAPHS[name](VOCAB, predicts_clean=True)
    assert not make_graph(checked("dwdse", name), VOCAB).predicts_clean
