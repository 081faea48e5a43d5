"""The oracle of sampler distributions against itself: Bayes by enumeration, marginals, limits,
orders of convergence, and the same samplers drawn in plain numpy."""

import itertools

import numpy as np
import pytest
import scipy.stats
from exact_laws import (
    ancestral,
    cap,
    law_of_confidence,
    law_of_entropy_bounded,
    law_of_euler,
    law_of_first_hitting,
    law_of_path_planning,
    law_of_psi,
    law_of_remdm,
    law_of_remdm_conf,
    law_of_trapezoidal,
    law_of_tweedie,
    law_of_two_stage,
    loop,
    push,
    remdm_step,
    rescale,
)
from toy_languages import (
    LANGUAGES,
    Geometric,
    LogLinear,
    Loop,
    Model,
    cosine_times,
    fitted_times,
    greedy,
    independent,
    kl,
    markov,
    masked_entropies,
    price,
    profile,
    sequences,
    sharpened,
    templates,
    uniform_times,
)

graphs = pytest.mark.parametrize("graph", ["absorbing", "uniform"])
languages = pytest.mark.parametrize("language", LANGUAGES)
SMALL = markov(2.0, length=3)
WRONG = np.random.default_rng(0).normal(size=(64, 3, 4))  # errors of log-scores of SMALL
GRAPH_SCHEDULES = [("absorbing", LogLinear()), ("uniform", LogLinear(1e-3))]
exact_models = pytest.mark.parametrize("graph, schedule", GRAPH_SCHEDULES)


def joint_with_noise(model, alpha):
    """P(x0, x) by one multiplication a token, [V^L, D^L]."""
    q = model.transition(alpha)
    x0 = sequences(model.vocab, model.length)
    joint = np.repeat(model.p0.reshape(-1, 1), len(model.states), axis=1)
    for i in range(model.length):
        joint *= q[model.states[None, :, i], x0[:, None, i]]
    return joint


# --- what an exact network says


@graphs
@pytest.mark.parametrize("schedule", [LogLinear(), LogLinear(1e-3), Geometric(0.01, 5.0)])
@pytest.mark.parametrize("t", [0.05, 0.5, 0.98])
def test_posteriors_and_scores_are_those_of_the_joint_distribution(graph, schedule, t):
    model = Model(SMALL, graph, schedule)
    alpha = schedule.alpha(t)
    joint = joint_with_noise(model, alpha)
    np.testing.assert_allclose(model.marginal(alpha), joint.sum(axis=0), atol=1e-14)
    x0 = sequences(model.vocab, model.length)
    one_hot = np.eye(model.vocab)[x0]
    posterior = np.einsum("cx,ciy->xiy", joint / joint.sum(axis=0), one_hot)
    np.testing.assert_allclose(model.posterior(t), posterior, atol=1e-13)

    p, scores = joint.sum(axis=0), model.scores(alpha)
    for x, i, y in itertools.product(range(0, len(p), 5), range(model.length), range(model.dim)):
        other = model.states[x].copy()
        other[i] = y
        there = other @ model.stride
        np.testing.assert_allclose(scores[x, i, y], p[there] / p[x], rtol=1e-11)


@graphs
@pytest.mark.parametrize("t", [0.05, 0.5, 0.98])
def test_the_bridge_turns_exact_scores_into_posteriors(graph, t):
    model = Model(SMALL, graph)
    bridged = model.bridge(model.scores(1.0 - t), 1.0 - t)
    np.testing.assert_allclose(bridged, model.posterior(t), atol=1e-12)


@graphs
@pytest.mark.parametrize("schedule", [LogLinear(), Geometric(0.01, 5.0)])
def test_rates_are_the_forward_rates_times_the_ratio_of_the_marginals(graph, schedule):
    model, t = Model(SMALL, graph, schedule), 0.4
    alpha, h = schedule.alpha(t), 1e-6
    np.testing.assert_allclose(
        schedule.slope(t), (schedule.alpha(t + h) - schedule.alpha(t - h)) / (2 * h), rtol=1e-6
    )
    forward = np.where(np.eye(model.dim), 0.0, model.pi[:, None])  # to x, from y
    scale = -schedule.slope(t) / alpha
    rates = scale * forward[model.states] * model.scores(alpha)
    np.testing.assert_allclose(model.rates(t), rates, rtol=1e-10)
    np.testing.assert_allclose(model.rates(t, normalised_scores=False), rates, rtol=1e-10)


def test_sharpening_by_hand():
    p = np.array([0.5, 0.2, 0.3])
    np.testing.assert_allclose(sharpened(p, temperature=0.5), np.array([25, 4, 9]) / 38)
    np.testing.assert_allclose(sharpened(p, top_p=0.5), [1, 0, 0])
    np.testing.assert_allclose(sharpened(p, top_p=0.51), [0.625, 0, 0.375])
    np.testing.assert_allclose(sharpened(p, temperature=0.5, top_p=0.7), [25 / 34, 0, 9 / 34])
    np.testing.assert_allclose(greedy(np.array([0.4, 0.4, 0.2])), [1, 0, 0])


# --- steps and limits


def test_pushing_a_distribution_is_the_sum_over_states_and_positions():
    rng = np.random.default_rng(0)
    step, p = rng.dirichlet(np.ones(2), size=(8, 3)), rng.dirichlet(np.ones(8))
    expected = np.zeros(8)
    for x in range(8):
        for k, y in enumerate(itertools.product(range(2), repeat=3)):
            expected[k] += p[x] * step[x, 0, y[0]] * step[x, 1, y[1]] * step[x, 2, y[2]]
    np.testing.assert_allclose(push(p, step), expected, atol=1e-15)


@exact_models
def test_one_call_draws_independent_tokens(graph, schedule):
    model = Model(SMALL, graph, schedule)
    marginals = [SMALL.sum(axis=tuple({0, 1, 2} - {i})) for i in range(3)]
    product = np.einsum("a,b,c->abc", *marginals).ravel()
    for law in (law_of_euler, law_of_tweedie, law_of_trapezoidal, law_of_psi):
        # At eps = 1e-3 the uniform start is not quite the noised data.
        np.testing.assert_allclose(law(model, [1.0]), product, atol=2e-3 * (graph == "uniform"))


@pytest.mark.parametrize("p0", [markov(2.0, length=1), independent(length=3)])
def test_independent_tokens_are_drawn_exactly_by_every_absorbing_sampler(p0):
    model, times = Model(p0), [1.0, 0.7, 0.5, 0.1]
    drawn = [law(model, times) for law in (law_of_euler, law_of_tweedie, law_of_trapezoidal)]
    drawn += [law_of_trapezoidal(model, times, 0.3, "leap"), law_of_psi(model, times, 0.4)]
    drawn += [law_of_remdm(model, times, sigma) for sigma in (cap(0.2), rescale(0.5))]
    drawn += [law_of_first_hitting(model)]
    drawn += [law_of_confidence(model)[0], law_of_entropy_bounded(model, 0.3)[0]]
    for law in drawn:
        np.testing.assert_allclose(law, p0.ravel(), atol=1e-14)


@languages
def test_first_hitting_is_exact(language):
    p0 = LANGUAGES[language]()
    np.testing.assert_allclose(law_of_first_hitting(Model(p0)), p0.ravel(), atol=1e-15)


def test_one_position_at_a_time_is_exact_in_any_order_that_does_not_look_at_the_draws():
    for language in (markov(1.0), markov(3.0), templates()):
        model = Model(language)
        for law, calls in (law_of_confidence(model, 1.0), law_of_entropy_bounded(model, 0.0)):
            np.testing.assert_allclose(law, language.ravel(), atol=1e-15)
            np.testing.assert_allclose(calls, model.length)


@exact_models
def test_many_steps_end_in_the_data(graph, schedule):
    model = Model(SMALL, graph, schedule)
    times = np.append(uniform_times(200), 1e-3)
    for law in (law_of_euler, law_of_tweedie, law_of_trapezoidal):
        assert kl(SMALL, law(model, times)) < 2e-4
    assert kl(SMALL, law_of_psi(model, times, 0.9)) < 2e-3


def test_accepting_everything_is_one_call_and_nothing_bounds_the_calls():
    for law, calls in (
        law_of_entropy_bounded(Model(SMALL), 100.0),
        law_of_confidence(Model(SMALL), 0.0),
    ):
        np.testing.assert_allclose(law, law_of_tweedie(Model(SMALL), [1.0]), atol=1e-15)
        assert calls == 1.0
    model = Model(SMALL, "uniform", LogLinear(1e-3))
    law, calls = law_of_entropy_bounded(model, 100.0, [1.0, 0.5])
    np.testing.assert_allclose(law, law_of_psi(model, [1.0, 0.5]), atol=0.1)
    assert calls == 2.0
    _, calls = law_of_confidence(Model(templates()), 0.9)
    assert 2.0 < calls < 6.0


# --- scores and posteriors, exact and wrong


@exact_models
@pytest.mark.parametrize("law", [law_of_tweedie, law_of_euler])
def test_exact_scores_need_no_normalising_and_wrong_ones_do(law, graph, schedule):
    times = [1.0, 0.6, 0.2]
    exact = Model(SMALL, graph, schedule)
    np.testing.assert_allclose(law(exact, times, True), law(exact, times), atol=1e-12)
    error = WRONG[:27, :, :3] if graph == "uniform" else WRONG
    wrong = Model(SMALL, graph, LogLinear(1e-3), error=error)
    drawn, normalised = law(wrong, times), law(wrong, times, True)
    np.testing.assert_allclose([drawn.sum(), normalised.sum()], 1.0)
    assert np.abs(drawn - normalised).max() > 0.01


def test_a_wrong_total_of_absorbing_scores_is_a_wrong_reveal_until_normalised():
    error = np.zeros((64, 3, 4)) + 0.5
    exact, wrong = (Model(SMALL, schedule=LogLinear(1e-3), error=e) for e in (None, error))
    times = [1.0, 0.6, 0.2]
    expected = law_of_tweedie(exact, times)
    np.testing.assert_allclose(law_of_tweedie(wrong, times, True), expected, atol=1e-12)
    assert np.abs(law_of_tweedie(wrong, times) - expected).max() > 0.01


def test_euler_and_tweedie_agree_for_log_linear_absorbing_noise_alone():
    times = [1.0, 0.6, 0.2]
    for schedule, agree in ((LogLinear(), True), (Geometric(0.01, 5.0), False)):
        model = Model(SMALL, schedule=schedule)
        error = np.abs(law_of_euler(model, times) - law_of_tweedie(model, times)).max()
        assert (error < 1e-14) == agree


# --- remasking


@pytest.mark.parametrize("sigma", [cap(0.2), rescale(0.5), cap(0.0)])
def test_remdm_is_psi_with_kappa_one_less_sigma_over_the_noised_share(sigma):
    times = uniform_times(5)
    psi = law_of_psi(Model(SMALL), times, lambda t, a_t, a_s: 1 - sigma(t, a_t, a_s) / (1 - a_s))
    np.testing.assert_allclose(law_of_remdm(Model(SMALL), times, sigma), psi, atol=1e-14)


def test_remdm_without_remasking_is_tweedie():
    drawn = law_of_remdm(Model(SMALL), uniform_times(5), cap(0.0))
    np.testing.assert_allclose(drawn, law_of_tweedie(Model(SMALL), uniform_times(5)), atol=1e-14)


def keeps_marginals(model, t, s, step):
    """Whether step(posterior of one x0) takes q_t(. | x0) to q_s(. | x0), weighed by p0."""
    a_t, a_s = model.schedule.alpha(t), model.schedule.alpha(s)
    after = np.zeros(len(model.states))
    joint = joint_with_noise(model, a_t)
    for p, x0 in zip(joint, sequences(model.vocab, model.length), strict=True):
        one_hot = np.broadcast_to(np.eye(model.vocab)[x0], (len(p), model.length, model.vocab))
        after += push(p, step(one_hot, a_t, a_s))
    return np.allclose(after, model.marginal(a_s), atol=1e-14)


@graphs
@pytest.mark.parametrize("kappa", [1.0, 0.6, 0.0])
def test_psi_keeps_the_marginals_with_the_joint_posterior(graph, kappa):
    model = Model(SMALL, graph)
    for t, s in ((0.9, 0.3), (0.5, 0.4)):
        assert keeps_marginals(
            model, t, s, lambda p, a_t, a_s: ancestral(model, p, a_t, a_s, kappa)
        )
    assert not keeps_marginals(model, 0.9, 0.3, lambda p, a_t, a_s: model.here)


@pytest.mark.parametrize("sigma", [0.0, 0.2, 0.7])
def test_remdm_keeps_the_marginals_with_the_joint_posterior(sigma):
    model = Model(SMALL)
    for t, s in ((0.9, 0.7), (0.8, 0.8)):
        assert keeps_marginals(
            model, t, s, lambda p, a_t, a_s: remdm_step(model, p, a_t, a_s, sigma)
        )


def test_a_loop_of_remasking_improves_on_its_steps_without_remasking():
    model = Model(SMALL, schedule=Loop())
    times = np.append(uniform_times(40), 1e-3)
    plain, remasked = (kl(SMALL, law_of_remdm(model, times, loop(eta))) for eta in (0.0, 0.02))
    assert remasked < 0.5 * plain
    assert kl(SMALL, law_of_remdm(model, np.append(uniform_times(160), 1e-3), loop(0.02))) < 2e-4


def test_masking_by_confidence_prefers_likely_tokens_even_where_tokens_are_independent():
    p0 = independent(length=3)
    drawn = law_of_remdm_conf(Model(p0), [1.0, 0.7, 0.5, 0.1])
    np.testing.assert_allclose(drawn.sum(), 1.0)
    assert drawn.argmax() == p0.argmax() and drawn.max() > p0.max() + 1e-3
    one = markov(2.0, length=1)
    np.testing.assert_allclose(law_of_remdm_conf(Model(one), [1.0, 0.7, 0.5]).sum(), 1.0)


# --- orders of convergence


def ratios(law, model, numbers, **how):
    """By how much the distance of n to 2 n steps falls from one number to the next, the double."""
    drawn = [law(model, uniform_times(n), **how) for n in (*numbers, 2 * numbers[-1])]
    distances = [np.abs(p - q).max() for p, q in itertools.pairwise(drawn)]
    return np.divide(distances[:-1], distances[1:])


def weakly_dependent(share):
    """SMALL by that share, the rest independent tokens with its marginals."""
    tokens = [SMALL.sum(axis=tuple({0, 1, 2} - {i})) for i in range(3)]
    return share * SMALL + (1.0 - share) * np.einsum("a,b,c->abc", *tokens)


@exact_models
def test_the_error_of_tweedie_is_of_first_order(graph, schedule):
    for p0 in (SMALL, weakly_dependent(0.3)):
        falls = ratios(law_of_tweedie, Model(p0, graph, schedule), (32, 64, 128))
        np.testing.assert_allclose(falls, 2.0, rtol=0.05)


@pytest.mark.parametrize("first", ["leap", "tweedie"])
def test_the_trapezoidal_error_is_of_second_order_where_no_rate_is_cut(first):
    model = Model(weakly_dependent(0.3))
    assert (ratios(law_of_trapezoidal, model, (16, 32, 64), first=first) > 3.3).all()
    model = Model(weakly_dependent(0.1), "uniform", Geometric(1e-3, 6.0))
    falls = ratios(law_of_trapezoidal, model, (16, 32, 64), first=first)
    assert (falls > 4.0).all() if first == "leap" else (falls < 3.5).all()


def test_the_trapezoidal_error_is_of_first_order_where_rates_are_cut():
    model = Model(SMALL)
    falls = ratios(law_of_trapezoidal, model, (32, 64, 128))
    np.testing.assert_allclose(falls, 2.0, rtol=0.05)
    errors = [law(model, uniform_times(64)) for law in (law_of_tweedie, law_of_trapezoidal)]
    tweedie, trapezoidal = (np.abs(p - SMALL.ravel()).max() for p in errors)
    assert trapezoidal < 0.3 * tweedie


@pytest.mark.parametrize("theta", [0.5, 0.3])
@pytest.mark.parametrize("schedule", [LogLinear(), Geometric(0.01, 20.0)])
def test_two_stages_draw_a_weakly_dependent_pair_exactly_in_two_calls(theta, schedule):
    p0 = markov(0.3, length=2)
    drawn = law_of_two_stage(Model(p0, schedule=schedule), [1.0], theta)
    np.testing.assert_allclose(drawn, p0.ravel(), atol=1e-15)
    assert kl(p0, law_of_tweedie(Model(p0, schedule=schedule), [1.0, 0.5])) > 1e-4


def test_the_error_of_two_stages_is_of_second_order_where_no_probability_is_cut():
    falls = ratios(law_of_two_stage, Model(weakly_dependent(0.3)), (4, 8, 16))
    np.testing.assert_allclose(falls, 4.0, rtol=0.01)
    falls = ratios(law_of_two_stage, Model(SMALL), (16, 32))
    np.testing.assert_allclose(falls, 2.0, rtol=0.05)


@exact_models
def test_two_stages_beat_tweedie_at_equal_calls(graph, schedule):
    for p0 in (SMALL, markov(1.0, length=4), templates(length=4)):
        model = Model(p0, graph, schedule)
        for steps in (1, 2, 3):
            tweedie = kl(p0, law_of_tweedie(model, uniform_times(2 * steps)))
            assert kl(p0, law_of_two_stage(model, uniform_times(steps))) < 0.8 * tweedie


# --- the price of few steps


@languages
def test_the_profile_integrates_to_the_entropy_and_rises(language):
    p0 = LANGUAGES[language]()
    entropy = -(p0 * np.log(p0)).sum()
    np.testing.assert_allclose(masked_entropies(p0).sum(), entropy)
    g = profile(p0, np.linspace(0.0, 1.0, 2001))
    np.testing.assert_allclose(p0.ndim * np.trapezoid(g, dx=1 / 2000), entropy, rtol=1e-5)
    assert (np.diff(g) >= -1e-13).all()
    tokens = [p0.sum(axis=tuple(set(range(p0.ndim)) - {i})) for i in range(p0.ndim)]
    np.testing.assert_allclose(g[-1], np.mean([-(p * np.log(p)).sum() for p in tokens]))


@languages
@pytest.mark.parametrize("times", [uniform_times, cosine_times])
def test_the_price_bounds_the_divergence(language, times):
    p0 = LANGUAGES[language]()
    for calls in (1, 3, 7):
        drawn = law_of_tweedie(Model(p0), times(calls))
        assert kl(p0, drawn) <= price(p0, times(calls)) + 1e-12


def test_the_price_of_one_call_is_the_divergence_itself():
    # Then nothing is lost by forgetting the step of each token.
    np.testing.assert_allclose(price(SMALL, [1.0]), kl(SMALL, law_of_tweedie(Model(SMALL), [1.0])))


@languages
def test_fitted_times_have_the_lowest_price_of_all(language):
    p0, points = LANGUAGES[language](), 12
    for calls in (1, 2, 4):
        inner = itertools.combinations(np.arange(points - 1, 0, -1) / points, calls - 1)
        best = min(price(p0, (1.0, *times)) for times in inner)
        times = fitted_times(p0, calls, points)
        assert len(times) == calls and times[0] == 1.0
        np.testing.assert_allclose(price(p0, times), best, atol=1e-12)
    for calls in (3, 5):
        assert price(p0, fitted_times(p0, calls)) <= price(p0, uniform_times(calls)) + 1e-12


def test_the_divergences_of_the_template_language_are_the_published_ones():
    # nats per sequence at 2, 3, 5, 7 calls; the fitted times are multiples of 1 / 64
    p0 = templates()
    model = Model(p0)
    for times, expected in (
        (uniform_times, [0.814, 0.383, 0.151, 0.081]),
        (cosine_times, [0.516, 0.277, 0.118, 0.065]),
        (lambda calls: fitted_times(p0, calls, 64), [0.553, 0.251, 0.097, 0.0525]),
    ):
        drawn = [kl(p0, law_of_tweedie(model, times(calls))) for calls in (2, 3, 5, 7)]
        np.testing.assert_allclose(drawn, expected, atol=6e-4)
    np.testing.assert_allclose(kl(p0, law_of_tweedie(model, uniform_times(14))), 0.0218, atol=6e-5)
    drawn = [kl(p0, law_of_trapezoidal(model, uniform_times(n), 0.5, "tweedie")) for n in (2, 3, 4)]
    np.testing.assert_allclose(drawn, [0.168, 0.063, 0.032], atol=6e-4)
    drawn = [kl(p0, law_of_remdm(model, uniform_times(n), cap(0.2))) for n in (7, 14)]
    np.testing.assert_allclose(drawn, [0.045, 0.0096], atol=3e-4)


# --- the same samplers, drawn: numpy alone, one function each, from the papers' words

DRAWN = 100_000


def draw(rng, p):
    """One token a row, from p [..., V]."""
    u = rng.random(p.shape[:-1])[..., None]
    return (np.cumsum(p, axis=-1) < u * p.sum(axis=-1, keepdims=True)).sum(axis=-1)


def look_up(model, table):
    """The rows of a table [D^L, ...] that belong to sequences [B, L]."""
    return lambda x: table[x @ model.stride]


def agrees(drawn, law, vocab=3):
    """Chi-square of drawn clean sequences [B, L] against a distribution [V^L]; pools rare cells."""
    index = drawn @ vocab ** np.arange(drawn.shape[1])[::-1]
    counts, expected = np.bincount(index, minlength=len(law)), law * len(drawn)
    rare = expected < 5
    counts = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum() + 1e-9)
    p_value = scipy.stats.chi2.sf(((counts - expected) ** 2 / expected).sum(), len(counts) - 1)
    return p_value > 1e-3


@exact_models
@pytest.mark.parametrize("theta", [0.5, 0.3])
def test_trapezoidal_draws_have_the_computed_distribution(graph, schedule, theta):
    model, rng, times = Model(SMALL, graph, schedule), np.random.default_rng(0), [0.9, 0.5, 0.2]
    x = draw(rng, np.broadcast_to(model.pi, (DRAWN, 3, model.dim)))
    a1 = 1 / (2 * theta * (1 - theta))
    a2 = ((1 - theta) ** 2 + theta**2) / (2 * theta * (1 - theta))
    for t, s in itertools.pairwise(times):
        rho = t - theta * (t - s)
        rates = look_up(model, model.rates(t))(x)
        moves = rng.random(x.shape) < 1 - np.exp(-theta * (t - s) * rates.sum(axis=-1))
        z = np.where(moves, draw(rng, rates + 1e-300), x)
        rates = np.maximum(0, a1 * look_up(model, model.rates(rho))(z) - a2 * rates)
        np.put_along_axis(rates, z[..., None], 0.0, axis=-1)
        moves = rng.random(x.shape) < 1 - np.exp(-(1 - theta) * (t - s) * rates.sum(axis=-1))
        x = np.where(moves, draw(rng, rates + 1e-300), z)
    x = draw(rng, look_up(model, model.posterior(times[-1]))(x))
    assert agrees(x, law_of_trapezoidal(model, times, theta, "leap"))
    assert not agrees(x, SMALL.ravel())


def test_remdm_conf_draws_have_the_computed_distribution():
    model, rng, times = Model(SMALL), np.random.default_rng(0), [1.0, 0.7, 0.5, 0.3]
    posterior = look_up(model, model.posterior(0.5))
    x, confidence = np.full((DRAWN, 3), 3), np.full((DRAWN, 3), np.inf)
    for t, s in itertools.pairwise(times):
        weight = np.exp(-confidence)
        largest = 1.0 if t == 1.0 else min(1.0, s / (1.0 - t))
        sigma = largest * weight / np.maximum(weight.sum(axis=1, keepdims=True), 1e-9)
        p = posterior(x)
        y = draw(rng, p)
        reveals = (x == 3) & (rng.random(x.shape) < (t - s) / t)
        hides = (x != 3) & (rng.random(x.shape) < sigma)
        shown = np.take_along_axis(p, y[..., None], axis=-1)[..., 0]
        confidence = np.where(reveals, shown, np.where(hides, np.inf, confidence))
        x = np.where(reveals, y, np.where(hides, 3, x))
    x = draw(rng, posterior(x))
    assert agrees(x, law_of_remdm_conf(model, times))
    assert not agrees(x, law_of_tweedie(model, times))
    assert not agrees(x, law_of_remdm(model, times, rescale(1.0)))


@pytest.mark.parametrize("with_planner, eta", [(False, 1.0), (True, 1.0), (True, 2.0)])
def test_path_planning_draws_have_the_computed_distribution(with_planner, eta):
    model, rng, calls = Model(SMALL), np.random.default_rng(0), 3
    table = np.zeros((64, 3))
    if with_planner:
        f = model.others(0.5)
        for n, i in itertools.product(range(64), range(3)):
            if model.states[n, i] < 3:
                table[n, i] = np.log(f[n, i, model.states[n, i]])
    posterior, planner = look_up(model, model.posterior(0.5)), look_up(model, table)
    x = np.full((DRAWN, 3), 3)
    for k in range(1, calls + 1):
        p = posterior(x)
        x0 = draw(rng, p)
        chance = np.take_along_axis(p, x0[..., None], axis=-1)[..., 0]
        score = np.where(x == 3, np.log(chance), eta * planner(x))
        lowest = np.argsort(score, axis=1, kind="stable")[:, : int(3 * (1 - k / calls) + 1e-9)]
        x = x0.copy()
        np.put_along_axis(x, lowest, 3, axis=1)
    assert agrees(x, law_of_path_planning(model, calls, eta, table))
    assert not agrees(x, SMALL.ravel())


@pytest.mark.parametrize("gamma", [0.3, 0.8])
def test_entropy_bounded_draws_have_the_computed_distribution(gamma):
    model, rng = Model(SMALL, "uniform", LogLinear(1e-3)), np.random.default_rng(0)
    times, x = [1.0, 0.6, 0.3, 0.1], rng.integers(0, 3, (DRAWN, 3))
    for t in times:
        p = look_up(model, model.posterior(t))(x)
        entropy = scipy.stats.entropy(p, axis=-1)
        accepted = np.zeros(x.shape, bool)
        for row, h in zip(accepted, entropy, strict=True):
            total = 0.0
            for i in np.argsort(h, kind="stable"):
                row[i] = total <= gamma
                total += h[i]
        x = np.where(accepted | (t == times[-1]), draw(rng, p), rng.integers(0, 3, x.shape))
    assert agrees(x, law_of_entropy_bounded(model, gamma, times)[0])
    assert not agrees(x, law_of_tweedie(model, times))


@pytest.mark.parametrize("rule", ["entropy", "confidence"])
def test_reveals_by_entropy_and_confidence_have_the_computed_distribution(rule):
    model, rng, bound = Model(SMALL), np.random.default_rng(0), 0.6
    posterior, x, calls = look_up(model, model.posterior(0.5)), np.full((DRAWN, 3), 3), 0.0
    while (x == 3).any():
        calls += (x == 3).any(axis=1).mean()
        p, free = posterior(x), x == 3
        accepted = np.zeros_like(free)
        for row, is_free, each in zip(accepted, free, p, strict=True):
            if not is_free.any():
                continue
            if rule == "confidence":
                best = np.where(is_free, each.max(axis=1), 0)
                row[:] = best > bound
                row[best.argmax()] = True
                continue
            total, h = 0.0, scipy.special.entr(each).sum(axis=1)
            for i in np.argsort(np.where(is_free, h, np.inf), kind="stable")[: is_free.sum()]:
                row[i] = total <= bound
                total += h[i]
        x = np.where(accepted, draw(rng, p), x)
    law = {"entropy": law_of_entropy_bounded, "confidence": law_of_confidence}[rule]
    expected, expected_calls = law(model, bound)
    assert agrees(x, expected)
    assert not agrees(x, law_of_tweedie(model, [1.0]))
    np.testing.assert_allclose(calls, expected_calls, rtol=0.01)


# --- shaping


def test_a_greedy_last_step_draws_the_likeliest_tokens():
    drawn = law_of_tweedie(Model(SMALL, shape_last=greedy), [1.0])
    marginals = [SMALL.sum(axis=tuple({0, 1, 2} - {i})) for i in range(3)]
    best = np.ravel_multi_index([p.argmax() for p in marginals], SMALL.shape)
    assert drawn[best] == 1.0
    partly = law_of_tweedie(Model(SMALL, shape_last=greedy), [1.0, 0.5])
    assert partly[best] < 1.0


@graphs
def test_a_low_temperature_lowers_the_entropy_and_one_and_everything_change_nothing(graph):
    times = [0.95, 0.6, 0.2]

    def entropy(shape):
        law = law_of_psi(Model(SMALL, graph, shape=shape), times)
        np.testing.assert_allclose(law.sum(), 1.0)
        return scipy.stats.entropy(law)

    plain = entropy(lambda p: p)
    np.testing.assert_allclose(entropy(lambda p: sharpened(p, 1.0, 1.0)), plain)
    assert entropy(lambda p: sharpened(p, temperature=0.7)) < plain
    assert entropy(lambda p: sharpened(p, top_p=0.8)) < plain
