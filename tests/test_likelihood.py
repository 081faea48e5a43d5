"""The bound against the truth that a tiny space allows to enumerate."""

import dataclasses
import functools
import math
import re

import dense
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from sedd_jax.diffusion.graphs import GRAPHS, Absorbing
from sedd_jax.diffusion.likelihood import (
    Bound,
    bits_per_character,
    bound,
    perplexity,
    stratified,
)
from sedd_jax.diffusion.samplers import denoise
from sedd_jax.diffusion.schedules import SCHEDULES, Geometric, LogLinear
from sedd_jax.diffusion.scores import DenseScores

graphs = pytest.mark.parametrize("name", GRAPHS)
T_MIN = 1e-3
LAW = dense.data_law(3, 2, 2)


@functools.cache
def estimator(graph, schedule, wrong_by, passes, t_min):
    score_fn = dense.exact_score_fn(graph, LAW, wrong_by=wrong_by)

    @jax.jit
    def run(key, x0, index):
        return bound(key, x0, index, score_fn, graph, schedule, passes=passes, t_min=t_min)

    return run


def estimate(graph, schedule, x0, *, wrong_by=0.0, passes=16, seed=0, index=None, t_min=T_MIN):
    """The bound of every row of x0."""
    run = estimator(graph, schedule, wrong_by, passes, t_min)
    index = jnp.arange(len(x0)) if index is None else index
    return run(jax.random.key(seed), jnp.asarray(x0), index)


@graphs
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_bound_is_tight_with_the_exact_score(name, schedule):
    graph, schedule = GRAPHS[name](3), SCHEDULES[schedule]()
    everything, copies = dense.sequences(3, 2), 1600
    x0 = np.repeat(everything, copies, axis=0)
    # From 0.02 on the weight 1 / t has no tail that the copies could miss; two tokens that are both
    # still noised there add 1e-4 nats.
    part = estimate(graph, schedule, x0, passes=32, t_min=0.02)
    total = np.asarray(part.diffusion + part.prior + part.reconstruction, np.float64)
    total = total.reshape(-1, copies)
    # The base law is not quite p_1: that gap is known, and 0.01 nats at most.
    gap = [base_gap(graph, schedule, x0) for x0 in everything]
    error = total.std(axis=1) / copies**0.5
    excess = total.mean(axis=1) + np.log(LAW.ravel()) - gap
    assert np.abs(gap).max() < 0.01 and error.max() < 0.05
    assert (np.abs(excess) < 4 * error).all()  # 36 of these: 3 would be passed once in ten runs
    pooled = (error**2).sum() ** 0.5 / len(error)
    assert abs(excess.mean()) < 3 * pooled < 0.1


def log_base(graph, schedule):
    """log p_base of one token: the forward process from a uniform clean token, [D]."""
    sigma = float(schedule.sigma(1.0))
    return np.log(dense.transition(graph, sigma)[:, : graph.vocab_size].mean(axis=1))


def base_gap(graph, schedule, x0):
    """E[log p_1(x) - log p_base(x)] over x ~ p_1(. | x0): what the prior adds to -log p(x0)."""
    sigma = float(schedule.sigma(1.0))
    base = functools.reduce(np.add.outer, [log_base(graph, schedule)] * LAW.ndim).ravel()
    log_p = np.log(dense.marginal(graph, LAW, sigma)).ravel()
    return dense.given(graph, x0, sigma) @ (log_p - base)


def expected_parts(graph, schedule, wrong_by, seed, t_min=T_MIN):
    """The expected diffusion, its normalised form, and tail of every sequence, by enumeration."""
    score_fn = dense.exact_score_fn(graph, LAW, wrong_by=wrong_by, seed=seed)

    @jax.jit
    def diffusion(t, xt, x0):
        sigma = schedule.sigma(t)
        entropy = graph.score_entropy(score_fn(xt, sigma), sigma, xt, x0)
        both = jnp.stack([e for e in entropy[:2] if e is not None], axis=-1)
        return (schedule.dsigma_dt(t)[..., None] * both).sum(axis=1)

    @jax.jit
    def reconstruction(t, xt, x0):
        return -denoise(xt, t, score_fn, graph, schedule).log_probability(x0).sum(axis=-1)

    parts = []
    for x0 in dense.sequences(graph.vocab_size, LAW.ndim):

        def at(cost, x0=x0):
            return lambda t, xt: cost(t, xt, np.broadcast_to(x0, xt.shape))

        tail = dense.expected_over_noise(graph, schedule, x0, at(reconstruction), [t_min])
        diffusions = dense.integral(graph, schedule, x0, at(diffusion), t_min)
        parts.append((tail[0], *diffusions))
    return dict(zip(("reconstruction", "value", "normalised"), np.transpose(parts), strict=False))


@graphs
@pytest.mark.parametrize("schedule", [LogLinear(), Geometric(1e-4, 8.0)])
def test_the_expected_bound_is_minus_log_p_to_five_digits_with_the_exact_score(name, schedule):
    graph = GRAPHS[name](3)
    everything = dense.sequences(3, 2)
    parts = expected_parts(graph, schedule, 0.0, 0)
    prior = float(graph.prior(schedule.sigma(1.0))) * LAW.ndim
    gap = [base_gap(graph, schedule, x0) for x0 in everything]
    total = parts["value"] + parts["reconstruction"] + prior - gap
    np.testing.assert_allclose(total, -np.log(LAW.ravel()), atol=3e-5)


@graphs
@pytest.mark.parametrize("wrong_by, seed", [(0.7, 1)])
def test_wrong_scores_bound_a_law_from_above(name, wrong_by, seed):
    graph, schedule = GRAPHS[name](3), LogLinear()
    parts = expected_parts(graph, schedule, wrong_by, seed)
    rest = parts["reconstruction"] + float(graph.prior(schedule.sigma(1.0))) * LAW.ndim
    # exp(-bound) is at most the probability under the law that the scores generate.
    mass = np.exp(-parts["value"] - rest).sum()
    assert mass < 1.0
    if name == "absorbing":
        normalised = np.exp(-parts["normalised"] - rest).sum()
        assert mass < normalised <= 1.0
        assert (parts["normalised"] < parts["value"]).all()
        entropy = -(LAW * np.log(LAW)).sum()
        assert LAW.ravel() @ (parts["normalised"] + rest) > entropy


@graphs
def test_a_bound_given_some_tokens_is_on_the_others_and_tight_with_the_exact_score(name):
    graph, schedule, copies = GRAPHS[name](3), LogLinear(), 1600
    everything = dense.sequences(3, 2)
    x0 = jnp.asarray(np.repeat(everything, copies, axis=0))
    is_scored = jnp.broadcast_to(jnp.array([False, True]), x0.shape)
    conditional = LAW / LAW.sum(axis=1, keepdims=True)

    def exact(xt, sigma):
        if name == "absorbing":  # what is not masked is clean: the scores of all texts
            return dense.exact_score_fn(graph, LAW)(xt, sigma)
        p = jnp.asarray(conditional, jnp.float32)[xt[:, 0]]
        log_p = jnp.log(jnp.exp(-sigma) * p - jnp.expm1(-sigma) / 3)
        log_score = log_p - jnp.take_along_axis(log_p, xt[:, 1:], axis=1)
        return DenseScores(jnp.stack([jnp.zeros_like(log_p), log_score], axis=1), xt, 3)

    def score_fn(xt, sigma):
        scores = exact(xt, sigma)
        is_clean = xt[:, :1] == x0[:, :1]  # what is given is never noised
        table = jnp.where(is_clean[..., None], scores.table, jnp.nan)
        return dataclasses.replace(scores, table=table)

    @jax.jit
    def run(key):
        how = {"passes": 32, "t_min": 0.02, "is_token": is_scored}
        return bound(key, x0, jnp.arange(len(x0)), score_fn, graph, schedule, **how)

    total = np.asarray(run(jax.random.key(0)).total, np.float64).reshape(-1, copies)
    sigma = float(schedule.sigma(1.0))
    gap = [
        dense.given(graph, x[1:], sigma)
        @ (np.log(dense.marginal(graph, conditional[x[0]], sigma)) - log_base(graph, schedule))
        for x in everything
    ]
    error = total.std(axis=1) / copies**0.5
    excess = total.mean(axis=1) + np.log(conditional.ravel()) - gap
    assert error.max() < 0.05
    assert (np.abs(excess) < 4 * error).all()


def markov_law(length, stay):
    """[2] * length: a chain of two states that stays where it is with this chance."""
    step, p = np.array([[stay, 1 - stay], [1 - stay, stay]]), np.array([0.6, 0.4])
    for _ in range(length - 1):
        p = p[..., None] * step
    return p


@graphs
def test_a_difference_of_coupled_bounds_is_unbiased_and_varies_less(name):
    graph, law, copies = GRAPHS[name](2), markov_law(5, 0.6), 2000
    score_fn = dense.exact_score_fn(graph, law)
    one, other = np.array([0, 1, 1, 0, 1]), np.array([0, 1, 0, 1, 1])
    rows = jnp.asarray(np.repeat([one, other], copies, axis=0))

    @jax.jit
    def run(key, index):
        how = {"passes": 32, "t_min": 0.02}
        return bound(key, rows, index, score_fn, graph, LogLinear(), **how)

    def halves(index):
        part = run(jax.random.key(0), index)
        return (jax.tree.map(lambda a, h=h: a.reshape(2, copies, *a.shape[1:])[h], part)
                for h in (0, 1))  # fmt: skip

    numbers = jnp.arange(copies)
    a, b = halves(jnp.concatenate([numbers, numbers]))
    less = b.minus(a)
    difference = np.asarray(less.total, np.float64)
    np.testing.assert_allclose(difference, b.total - a.total, atol=1e-4)
    error = difference.std() / copies**0.5
    truth = np.log(law[tuple(one)] / law[tuple(other)])
    # The base distribution's gap and two tokens that are both still noised at 0.02: 0.01 nats.
    assert abs(difference.mean() - truth) < 4 * error + 0.01
    assert np.asarray(less.variance).mean() == pytest.approx(difference.var(), rel=0.25)
    a, b = halves(jnp.arange(2 * copies))  # each with noise of its own
    independent = np.asarray(b.total - a.total, np.float64)
    assert independent.var() > 1.5 * difference.var()
    print(f"{name}: coupling divides the variance by {independent.var() / difference.var():.1f}")


@pytest.mark.parametrize("wrong_by", [0.0, 0.01, 1.0])
def test_the_normalised_bound_is_never_looser_on_the_same_noise(wrong_by):
    x0 = np.repeat(dense.sequences(3, 2), 200, axis=0)
    part = estimate(Absorbing(3), LogLinear(), x0, wrong_by=wrong_by)
    looser = part.diffusion - part.normalised
    assert looser.min() >= -1e-6  # the last digit of a sum
    assert wrong_by < 1.0 or looser.mean() > 0.1


@graphs
def test_diffusion_and_tail_estimate_their_expectations(name):
    graph, schedule, copies = GRAPHS[name](3), LogLinear(), 2_000
    x0 = np.repeat(dense.sequences(3, 2), copies, axis=0)
    part = estimate(graph, schedule, x0, wrong_by=0.7, passes=8, t_min=0.1)
    expected = expected_parts(graph, schedule, 0.7, 0, t_min=0.1)
    pairs = {"diffusion": "value", "reconstruction": "reconstruction"}
    if name == "absorbing":
        pairs["normalised"] = "normalised"
    else:
        assert part.normalised is None and part.normalised_variance is None
    for field, key in pairs.items():
        value = np.asarray(getattr(part, field), np.float64).reshape(-1, copies)
        # Pooled over x0: the tail of one is a few rare events, far from Gaussian.
        error = (value.var(axis=1) / copies).sum() ** 0.5 / len(value)
        assert error < 0.05 * expected[key].mean()
        assert abs(value.mean() - expected[key].mean()) < 3 * error


@graphs
def test_prior_is_that_of_every_token_at_time_one(name):
    graph = GRAPHS[name](3)
    part = estimate(graph, LogLinear(), np.zeros((4, 2), np.int32))
    np.testing.assert_allclose(part.prior, 2 * graph.prior(LogLinear().sigma(1.0)), rtol=1e-6)


@graphs
def test_noise_depends_on_key_and_index_alone(name):
    graph = GRAPHS[name](3)
    rng = np.random.default_rng(0)
    x0 = rng.integers(0, 3, (24, 2)).astype(np.int32)
    index = jnp.asarray(rng.permutation(10**6)[:24])
    run = functools.partial(estimate, graph, LogLinear(), wrong_by=0.5, passes=4)
    whole = run(x0=x0, index=index)
    halves = [run(x0=x0[at], index=index[at]) for at in (slice(0, 8), slice(8, 16), slice(16, 24))]
    order = rng.permutation(24)
    shuffled = run(x0=x0[order], index=index[order])
    for field, value in whole._asdict().items():
        if value is not None:
            cut = np.concatenate([getattr(half, field) for half in halves])
            np.testing.assert_allclose(value, cut, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(value[order], getattr(shuffled, field), rtol=1e-5, atol=1e-6)
    other = run(x0=x0, index=index + 1)
    assert (other.diffusion != whole.diffusion).mean() > 0.5
    assert (run(x0=x0, index=index, seed=1).diffusion != whole.diffusion).mean() > 0.5


@graphs
@pytest.mark.parametrize("passes", [2, 4, 16])
def test_the_variance_is_slightly_overestimated_and_never_under(name, passes):
    graph, schedule = GRAPHS[name](3), LogLinear()
    score_fn = dense.exact_score_fn(graph, LAW, wrong_by=0.5)
    x0 = jnp.array([[0, 2], [1, 1]])

    @jax.jit
    @jax.vmap
    def run(key):
        return bound(key, x0, jnp.arange(2), score_fn, graph, schedule, passes=passes, t_min=T_MIN)

    part = run(jax.random.split(jax.random.key(0), 20_000))
    pairs = [(part.diffusion + part.reconstruction, part.variance)]
    if name == "absorbing":
        pairs.append((part.normalised + part.reconstruction, part.normalised_variance))
    for value, claimed in pairs:
        ratio = np.asarray(claimed).mean(axis=0) / np.asarray(value).var(axis=0)
        assert (ratio > 0.9).all(), ratio
        assert (ratio < {2: 8.0, 4: 8.0, 16: 1.25}[passes]).all(), ratio


@pytest.mark.parametrize("passes", [2, 16])
def test_the_place_of_a_pass_is_uniform_in_its_part(passes):
    keys = jax.random.split(jax.random.key(0), 5_000)
    index = jnp.array([0, 1, 12_345, 2**31 - 1])
    u = np.asarray(jax.jit(jax.vmap(lambda k: stratified(k, index, passes)))(keys))
    assert u.shape == (5_000, passes, 4)
    for k in (0, passes - 1):
        for place in range(4):
            test = scipy.stats.kstest(u[:, k, place], "uniform", (k / passes, 1 / passes))
            assert test.pvalue > dense.P_VALUE


def test_the_places_of_a_pass_are_spread_evenly_over_the_corpus():
    u = stratified(jax.random.key(0), jnp.arange(10**6, 10**6 + 1_000), 2)
    gaps = np.diff(np.sort(u[0]))
    assert gaps.max() < 3 * 0.5 / 1_000
    assert len(np.unique(u[0])) == 1_000


@pytest.mark.parametrize(
    "counts", [{"passes": 3}, {"passes": 0}, {"passes": 2, "reconstruction_passes": 1}]
)
def test_odd_numbers_of_passes_are_refused(counts):
    graph = Absorbing(3)
    score_fn = dense.exact_score_fn(graph, LAW)
    x0 = jnp.zeros((1, 2), jnp.int32)
    with pytest.raises(ValueError, match="passes [013] must be an even number"):
        bound(jax.random.key(0), x0, jnp.arange(1), score_fn, graph, LogLinear(), **counts)


def test_perplexity_and_bits_of_hand_numbers():
    assert perplexity(math.log(20.0)) == pytest.approx(20.0)
    assert bits_per_character(math.log(2.0) * 30, 10) == pytest.approx(3.0)


@graphs
def test_the_bound_costs_as_many_network_calls_as_it_says(name):
    graph, calls = GRAPHS[name](3), []
    exact = dense.exact_score_fn(graph, LAW)

    def score_fn(xt, sigma):
        jax.debug.callback(lambda: calls.append(1))
        return exact(xt, sigma)

    x0 = jnp.zeros((3, 2), jnp.int32)
    part = bound(jax.random.key(0), x0, jnp.arange(3), score_fn, graph, LogLinear(), passes=6)
    jax.block_until_ready(part)
    jax.effects_barrier()
    assert len(calls) == 6 + 2


def test_a_bound_shows_its_totals_and_errors():
    passes, none = jnp.array([[1.0, 3.0], [2.0, 2.0]]), jnp.zeros((2, 1))
    shown = repr(Bound(passes, none, jnp.array([0.5, 0.25])))
    assert re.fullmatch(r"Bound\(2\.500±\d\.\d{3}, 2\.250±0\.000 nats\)", shown)
    many = Bound(np.ones((9, 2)), np.zeros((9, 1)), np.zeros(9))
    assert repr(many).count("±") == 8 and repr(many).endswith(", ... nats)")
