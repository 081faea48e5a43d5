"""Every predictor against its exact distribution, which tests/exact_laws.py enumerates in numpy."""

import functools

import dense
import exact_laws as laws
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_languages as toys

from sedd_jax.diffusion import predictors, samplers
from sedd_jax.diffusion.graph import lift
from sedd_jax.diffusion.graphs import GRAPHS
from sedd_jax.diffusion.predictors import PREDICTORS, Options, Step, Traits, trait
from sedd_jax.diffusion.reverse import shaped
from sedd_jax.diffusion.schedules import LogLinear
from sedd_jax.inference.sampling import READ_BY
from sedd_jax.models.head import HeadScores
from sedd_jax.models.transformer import Output
from sedd_jax.parallel.sharding import Placement

P0 = toys.markov(2.0, length=3)  # no ties between tokens or positions
DRAWN = 200_000
T_MIN = 1e-5


def model_of(graph, eps=1e-3, **options):
    return toys.Model(P0, graph, toys.LogLinear(eps), **options)


def times_of(steps):
    return np.append(1.0 - np.arange(steps) * (1.0 - T_MIN) / steps, T_MIN)


@functools.cache
def network(name, one_sigma=True):
    return dense.exact_score_fn(GRAPHS[name](3), P0, one_sigma=one_sigma)


def drawn(name, predictor, steps, eps=1e-3, is_greedy=False, count=DRAWN, **options):
    """The chain at the end of `count` samples, and how many there are of each sequence."""
    graph, function = GRAPHS[name](3), PREDICTORS[predictor]
    # Predictors that choose times of their own call the network at several in one batch.
    several = predictor in ("first_hitting", "entropy_bounded", "confidence")
    score_fn = network(name, one_sigma=not (several and name == "absorbing"))

    @jax.jit
    def run(key, options):
        how = {"steps": steps, "predictor": function, "t_min": T_MIN, "is_greedy": is_greedy}
        shape = shaped(*(options.pop(name, None) for name in ("temperature", "top_p", "top_k")))
        how["options"] = Options(**options, shape=shape, normalised=is_normalised)
        return samplers.sample(key, score_fn, graph, LogLinear(eps), (count, 3), **how)

    is_normalised = options.pop("normalised", False)
    chain = run(jax.random.key(7), options)
    return chain, dense.count(chain.tokens, 3)


CASES = [
    # graph, predictor, steps, options, exact distribution
    ("absorbing", "euler", 4, {"normalised": True}, laws.law_of_euler),
    ("absorbing", "tweedie", 4, {"normalised": True}, laws.law_of_tweedie),
    ("uniform", "tweedie", 4, {"normalised": True}, laws.law_of_tweedie),
    ("absorbing", "first_hitting", 2, {}, lambda m, _: laws.law_of_first_hitting(m)),
    ("absorbing", "two_stage", 2, {}, laws.law_of_two_stage),
    (
        "absorbing", "two_stage", 2, {"theta": 0.4},
        functools.partial(laws.law_of_two_stage, theta=0.4),
    ),
    ("uniform", "two_stage", 3, {}, laws.law_of_two_stage),
    (
        "absorbing", "theta_trapezoidal", 3, {"theta": 0.4},
        functools.partial(laws.law_of_trapezoidal, theta=0.4, first="tweedie"),
    ),
    ("uniform", "theta_trapezoidal", 4, {}, laws.law_of_trapezoidal),
    ("absorbing", "psi", 4, {"kappa": 0.8}, functools.partial(laws.law_of_psi, kappa=0.8)),
    ("uniform", "psi", 4, {"kappa": 0.8}, functools.partial(laws.law_of_psi, kappa=0.8)),
    (
        "absorbing", "remdm_cap", 4, {"eta": 0.2},
        lambda m, t: laws.law_of_remdm(m, t, laws.cap(0.2)),
    ),
    (
        "absorbing", "remdm_rescale", 4, {"eta": 0.3},
        lambda m, t: laws.law_of_remdm(m, t, laws.rescale(0.3)),
    ),
    ("absorbing", "remdm_confidence", 2, {}, laws.law_of_remdm_conf),
    (
        "uniform", "entropy_bounded", 4, {"gamma": 0.6},
        lambda m, t: laws.law_of_entropy_bounded(m, 0.6, t)[0],
    ),
    (
        "absorbing", "entropy_bounded", 4, {"gamma": 1.5},
        lambda m, _: laws.law_of_entropy_bounded(m, 1.5)[0],
    ),
    (
        "absorbing", "confidence", 4, {"threshold": 0.6},
        lambda m, _: laws.law_of_confidence(m, 0.6)[0],
    ),
    ("absorbing", "path_planning", 1, {}, lambda m, _: laws.law_of_path_planning(m, 2)),
]  # fmt: skip


def same(counts, exact):
    """The chance of counts as far off, where every sequence that was drawn can be."""
    possible = exact > 1e-9
    assert counts[~possible].sum() <= 3
    return dense.p_value(counts[possible], exact[possible] / exact[possible].sum())


@pytest.mark.parametrize("name, predictor, steps, options, exact", CASES)
def test_a_predictor_draws_from_its_exact_distribution(name, predictor, steps, options, exact):
    _, counts = drawn(name, predictor, steps, **options)
    law = exact(model_of(name), times_of(steps))
    assert same(counts, law) > dense.P_VALUE
    if predictor not in ("first_hitting", "two_stage"):  # and not from the data's own
        assert dense.p_value(counts, P0.ravel()) < 1e-6


def test_the_loop_of_remdm_draws_from_its_exact_distribution():
    _, counts = drawn("absorbing", "remdm_loop", 5, eps=1e-5, eta=0.1)
    schedule = toys.Loop(1.0 - predictors.LOOP_TIME, predictors.T_ON, predictors.T_OFF)
    model = toys.Model(P0, "absorbing", schedule)
    exact = laws.law_of_remdm(model, times_of(5), laws.loop(0.1))
    assert same(counts, exact) > dense.P_VALUE


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize(
    "shape", [{"temperature": 0.7}, {"top_p": 0.8}, {"temperature": 1.5, "top_p": 0.9}]
)
def test_temperature_and_top_p_shape_the_clean_tokens(name, shape):
    _, counts = drawn(name, "tweedie", 3, normalised=True, **shape)
    model = model_of(name, shape=functools.partial(toys.sharpened, **shape))
    assert same(counts, laws.law_of_tweedie(model, times_of(3), True)) > dense.P_VALUE


@pytest.mark.parametrize("name", GRAPHS)
def test_a_greedy_denoiser_takes_the_likeliest_tokens(name):
    _, counts = drawn(name, "tweedie", 2, normalised=True, is_greedy=True)
    model = model_of(name, shape_last=toys.greedy)
    # With two steps few tokens are left to the denoiser: at t_min hardly any.
    assert same(counts, laws.law_of_tweedie(model, times_of(2), True)) > dense.P_VALUE
    chain, _ = drawn(name, "none", 1, is_greedy=True, count=64)
    if name == "absorbing":
        best = (
            P0.sum(axis=(1, 2)).argmax(),
            P0.sum(axis=(0, 2)).argmax(),
            P0.sum(axis=(0, 1)).argmax(),
        )
        np.testing.assert_array_equal(chain.tokens, np.tile(best, (64, 1)))


def test_top_k_keeps_the_likeliest_tokens():
    row = jnp.log(jnp.array([0.1, 0.4, 0.2, 0.3]))
    for k, kept in ((1, [1]), (2, [1, 3]), (3, [1, 2, 3]), (9, [0, 1, 2, 3])):
        left = np.flatnonzero(np.isfinite(shaped(top_k=k)(row)))
        assert left.tolist() == kept
    both = shaped(top_k=3, top_p=0.5)(row)  # of 0.9, 0.4 / 0.9 is not half
    assert np.flatnonzero(np.isfinite(both)).tolist() == [1, 3]


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("t", [1.0, 0.6, 0.05])
def test_the_bridge_is_the_posterior_of_the_clean_tokens(name, t):
    graph, model = GRAPHS[name](3), model_of(name)
    states = jnp.asarray(model.states)
    sigma = jnp.full((len(states), 1), -np.log(model.schedule.alpha(t)), jnp.float32)
    table = jnp.exp(network(name)(states, sigma).log_score())
    p = lift(graph.clean_probabilities, table, states, sigma)
    np.testing.assert_allclose(p, model.posterior(t), atol=2e-4 if t == 1.0 else 1e-5)


@pytest.mark.parametrize(
    "name, predictor", [("absorbing", "psi"), ("uniform", "psi"), ("absorbing", "remdm_cap")]
)
@pytest.mark.parametrize("t, s", [(1.0, 0.6), (0.5, 0.1)])
def test_one_step_is_the_tables_of_its_definition(name, predictor, t, s):
    graph, model = GRAPHS[name](3), model_of(name)
    states = jnp.asarray(model.states)
    column = jnp.ones((len(states), 1))
    options = Options(kappa=0.7, eta=0.1)
    step = Step(t * column, s * column, network(name), graph, LogLinear(), options)
    got = PREDICTORS[predictor](states, step).probabilities()
    a_t, a_s = model.schedule.alpha(t), model.schedule.alpha(s)
    kappa = 0.7
    if predictor == "remdm_cap":
        kappa = 1.0 - laws.cap(0.1)(t, a_t, a_s) / (1.0 - a_s)
    exact = laws.ancestral(model, model.posterior(t), a_t, a_s, kappa)
    np.testing.assert_allclose(got, exact, atol=3e-4 if t == 1.0 else 1e-5)


@pytest.mark.parametrize("predictor", [name for name in PREDICTORS if name != "none"])
def test_options_have_an_effect_on_the_predictors_that_are_listed(predictor):
    read = set()

    class Recorder:
        def __getattr__(self, name):
            read.add(name)
            return getattr(Options(), name)

    def watched(xt, step):
        return function(xt, step._replace(options=Recorder()))

    function = PREDICTORS[predictor]
    watched.traits = getattr(function, "traits", Traits())
    one_sigma = predictor not in ("first_hitting", "entropy_bounded", "confidence")
    process = network("absorbing", one_sigma=one_sigma), GRAPHS["absorbing"](3), LogLinear()
    samplers.sample(jax.random.key(0), *process, (1, 3), steps=2, predictor=watched, t_min=T_MIN)
    assert read & READ_BY.keys() == {name for name, of in READ_BY.items() if predictor in of}


def test_network_calls_are_counted_for_each_sample():
    for gamma in (0.2, 0.9):
        chain, _ = drawn("absorbing", "entropy_bounded", 6, gamma=gamma)
        _, calls = laws.law_of_entropy_bounded(model_of("absorbing"), gamma)
        np.testing.assert_allclose(chain.calls.mean(), calls, atol=0.01)
    chain, _ = drawn("absorbing", "first_hitting", 9, count=8)
    assert (np.asarray(chain.calls) == 3).all()  # one a token
    chain, _ = drawn("absorbing", "two_stage", 3, count=8)
    assert (np.asarray(chain.calls) == 7).all()
    chain, _ = drawn("uniform", "tweedie", 3, count=8)
    assert (np.asarray(chain.calls) == 4).all()


@pytest.mark.parametrize("theta, order", [(0.5, 3.2)])
def test_two_calls_a_step_are_worth_it(theta, order):
    """On a weakly dependent language the error falls with the square of the step, Tweedie's with
    the step; enumerated by the definitions that the samplers are tested against."""
    model = toys.Model(toys.markov(0.3, length=3), "absorbing", toys.LogLinear(0.0))

    def error(law, steps, **options):
        return np.abs(law(model, toys.uniform_times(steps), **options) - model.p0.ravel()).max()

    tweedie = error(laws.law_of_tweedie, 8) / error(laws.law_of_tweedie, 16)
    trapezoidal = error(laws.law_of_trapezoidal, 8, theta=theta) / error(
        laws.law_of_trapezoidal, 16, theta=theta
    )
    two_stage = error(laws.law_of_two_stage, 8) / error(laws.law_of_two_stage, 16)
    assert 1.8 < tweedie < 2.3 and trapezoidal > order and two_stage > order


@pytest.mark.parametrize("predictor", ["tweedie", "two_stage", "theta_trapezoidal"])
def test_draws_of_one_step_have_noise_of_their_own(predictor):
    """Through a network's head, whose noise is keyed by the position: at every position all tokens
    of a uniform distribution are as likely, whatever was drawn elsewhere before."""
    vocab, rows = 8, 20_000
    graph = GRAPHS["absorbing"](vocab)

    def score_fn(xt, sigma):
        output = Output(jnp.zeros((*xt.shape, 1)), jnp.zeros((vocab + 1, 1)), jnp.zeros(vocab + 1))
        return HeadScores(output, xt, graph.log_scale(sigma), vocab, Placement())

    how = {"steps": 1, "predictor": PREDICTORS[predictor], "t_min": T_MIN}
    chain = samplers.sample(jax.random.key(0), score_fn, graph, LogLinear(), (rows, vocab), **how)
    for position in (0, 1, vocab - 1):
        counts = np.bincount(chain.tokens[:, position], minlength=vocab)
        assert dense.p_value(counts, np.full(vocab, 1 / vocab)) > dense.P_VALUE


@pytest.mark.parametrize(
    "name, predictor",
    [
        ("absorbing", "two_stage"),
        ("absorbing", "theta_trapezoidal"),
        ("absorbing", "remdm_cap"),
        ("absorbing", "path_planning"),
        ("absorbing", "first_hitting"),
    ],
)
def test_every_stage_draws_from_the_shaped_distribution(name, predictor):
    """Only the likeliest token: of an independent language that is one sequence."""
    p0 = toys.independent(length=3)
    graph, score_fn = GRAPHS[name](3), dense.exact_score_fn(GRAPHS[name](3), p0)
    how = {
        "steps": 2,
        "predictor": PREDICTORS[predictor],
        "options": Options(shape=shaped(top_k=1)),
    }
    chain = samplers.sample(jax.random.key(0), score_fn, graph, LogLinear(), (64, 3), **how)
    best = [p0.sum(axis=axes).argmax() for axes in ((1, 2), (0, 2), (0, 1))]
    np.testing.assert_array_equal(chain.tokens, np.tile(best, (64, 1)))


@pytest.mark.parametrize("predictor", ["first_hitting", "path_planning"])
def test_the_calls_that_are_left_share_the_tokens_that_are_masked(predictor):
    graph = GRAPHS["absorbing"](3)
    left, chain = [], samplers.Chain.of(jnp.full((4, 3), 3, jnp.int32).at[:, 0].set(1))
    how = {"steps": 8, "predictor": PREDICTORS[predictor]}
    for begin in range(5, 8):
        cut = {"begin": begin, "end": begin + 1, "chain": chain}
        key, shape = jax.random.key(0), (4, 3)
        arguments = key, network("absorbing", one_sigma=False), graph, LogLinear(), shape
        chain = samplers.sample(*arguments, **how, **cut)
        left.append(int((chain.tokens == 3).sum(axis=-1).max()))
    assert left == [1, 0, 0]  # 2 masked, 4 calls: one each


def test_scores_of_nothing_but_noise_are_a_uniform_distribution():
    graph = GRAPHS["uniform"](3)
    p = graph.clean_probabilities(jnp.ones(3), jnp.int32(0), jnp.float32(20.0))
    np.testing.assert_allclose(p, 1 / 3, rtol=1e-6)
    assert np.isnan(graph.clean_probabilities(jnp.full(3, jnp.nan), 0, jnp.float32(1.0))).all()


def test_traits_of_a_plain_function_are_those_of_one_call_on_both_graphs():
    assert trait(predictors.tweedie, "calls") == 1 and trait(None, "graph") is None
    assert trait(predictors.two_stage, "calls") == 2
    assert trait(predictors.confidence, "is_adaptive") and trait(predictors.confidence, "graph")
