"""Reverse steps against Bayes' rule, whole samplers against the data distribution, rare tokens."""

import dataclasses
import functools
import itertools

import dense
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sedd_jax.diffusion import grids, predictors, samplers
from sedd_jax.diffusion.graphs import GRAPHS, Absorbing, Uniform
from sedd_jax.diffusion.predictors import Step, euler, tweedie
from sedd_jax.diffusion.samplers import (
    DRAWS,
    Chain,
    Known,
    denoise,
    draw_exact,
    draw_float32_gumbel,
)
from sedd_jax.diffusion.schedules import SCHEDULES, Geometric, LogLinear

graphs = pytest.mark.parametrize("name", GRAPHS)
every_predictor = pytest.mark.parametrize(
    "name, predictor",
    [
        (name, predictor)
        for predictor, function in predictors.PREDICTORS.items()
        for name in GRAPHS
        if predictors.trait(function, "graph") in (None, name)
    ],
)


def sample(*arguments, **options):
    """The tokens that `samplers.sample` ends with."""
    return samplers.sample(*arguments, **options).tokens


def one_step(step, graph, law, schedule, t, s, key=None, draws=1):
    """The law of one token's reverse step at every state; its table [D, D] or draws [draws, D]."""
    xt = jnp.arange(graph.dim)[:, None]
    column = jnp.ones((graph.dim, 1), jnp.float32)
    score_fn = dense.exact_score_fn(graph, law)
    reverse = step(xt, Step(t * column, s * column, score_fn, graph, schedule))
    if key is None:
        return np.asarray(reverse.probabilities()[:, 0]).T
    draw = jax.jit(jax.vmap(lambda k: draw_exact(k, reverse)[:, 0]))
    return np.asarray(draw(jax.random.split(key, (draws, graph.dim))))


def bayes(graph, law, schedule, t, s):
    sigma, earlier = (float(schedule.sigma(np.float32(u))) for u in (t, s))
    return dense.bayes(graph, law, sigma, sigma - earlier)


@graphs
@pytest.mark.parametrize("schedule", [LogLinear(), Geometric(1e-4, 5.0)])
@pytest.mark.parametrize("t, s", [(1.0, 0.01), (1.0, 0.9), (0.7, 0.3), (0.5, 0.499)])
def test_a_tweedie_step_with_the_exact_score_is_bayes(name, schedule, t, s):
    graph, law = GRAPHS[name](4), dense.data_law(4, 1)
    table = one_step(tweedie, graph, law, schedule, t, s)
    # float32 loses exp(delta_sigma) of its digits where the uniform graph takes back a long step.
    exact = bayes(graph, law, schedule, t, s)
    np.testing.assert_allclose(table, exact, rtol=1e-4, atol=1e-3 if t - s > 0.9 else 1e-5)


@graphs
def test_draws_of_a_tweedie_step_have_the_frequencies_of_bayes(name):
    graph, law, schedule = GRAPHS[name](4), dense.data_law(4, 1), LogLinear()
    for seed, (t, s) in enumerate([(1.0, 0.4), (0.6, 0.5)]):
        exact = bayes(graph, law, schedule, t, s)
        drawn = one_step(tweedie, graph, law, schedule, t, s, jax.random.key(seed), 100_000)
        for x in range(graph.dim):
            counts = np.bincount(drawn[:, x], minlength=graph.dim)
            assert dense.p_value(counts, exact[:, x]) > dense.P_VALUE


@graphs
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_an_euler_step_is_the_identity_plus_the_reverse_rates(name, schedule):
    graph, law, schedule = GRAPHS[name](4), dense.data_law(4, 1), SCHEDULES[schedule]()
    t, s = np.float32(0.5), np.float32(0.49)
    p = dense.marginal(graph, law, float(schedule.sigma(t)))
    rates = p[:, None] / p[None] * dense.rate_matrix(graph).T  # from x, column, to y, row
    np.fill_diagonal(rates, 0.0)
    rates -= np.diag(rates.sum(axis=0))
    exact = np.eye(graph.dim) + float(t - s) * float(schedule.dsigma_dt(t)) * rates
    table = one_step(euler, graph, law, schedule, t, s)
    np.testing.assert_allclose(table, exact, rtol=1e-5, atol=1e-6)


@graphs
def test_the_error_of_an_euler_step_shrinks_as_its_square(name):
    graph, law, schedule = GRAPHS[name](4), dense.data_law(4, 1), Geometric(0.01, 5.0)
    t = 0.7
    errors = []
    for step in (0.08, 0.04, 0.02):
        table = one_step(euler, graph, law, schedule, t, t - step)
        errors.append(np.abs(table - bayes(graph, law, schedule, t, t - step)).max())
    assert errors[0] > 1e-3
    np.testing.assert_allclose(np.divide(errors[:-1], errors[1:]), 4.0, rtol=0.25)


@graphs
@pytest.mark.parametrize("t", [1e-3, 0.3, 0.9])
def test_denoising_one_token_with_the_exact_score_is_its_posterior(name, t):
    graph, law, schedule = GRAPHS[name](4), dense.data_law(4, 1), LogLinear()
    xt = jnp.arange(graph.dim)[:, None]
    times = jnp.full((graph.dim, 1), t)
    last = denoise(xt, times, dense.exact_score_fn(graph, law), graph, schedule)
    sigma = float(schedule.sigma(np.float32(t)))
    posterior = dense.bayes(graph, law, sigma, sigma)
    for token in range(4):
        log_p = last.log_probability(jnp.full((graph.dim, 1), token))[:, 0]
        np.testing.assert_allclose(np.exp(log_p), posterior[token], rtol=1e-3, atol=1e-9)
    keys = jax.random.split(jax.random.key(0), (50_000, graph.dim))
    drawn = jax.vmap(lambda k: last.draw(k)[:, 0])(keys)
    assert drawn.max() < 4
    for x in range(graph.dim):
        counts = np.bincount(drawn[:, x], minlength=4)
        assert dense.p_value(counts, posterior[:4, x]) > dense.P_VALUE


@graphs
@pytest.mark.parametrize("step", [euler, tweedie])
@pytest.mark.parametrize("wrong_by", [0.0, 3.0])
def test_log_probability_is_that_of_the_clamped_and_normalised_table(name, step, wrong_by):
    graph, schedule = GRAPHS[name](4), LogLinear()
    # Large wrong scores make some tables negative and some sums larger than one.
    score_fn = dense.exact_score_fn(graph, dense.data_law(4, 1), wrong_by=wrong_by)
    xt = jnp.arange(graph.dim)[:, None]
    column = jnp.ones((graph.dim, 1))
    law = step(xt, Step(0.8 * column, 0.3 * column, score_fn, graph, schedule))
    weights = np.maximum(np.asarray(law.probabilities(), np.float64), 0.0)
    if name == "absorbing":  # what is drawn beyond certainty is the token, not the reveal
        weights[-1, 0] /= max(1.0, weights[-1, 0, :4].sum())
        weights[-1, 0, 4] = 1.0 - weights[-1, 0, :4].sum()
    exact = weights / weights.sum(axis=-1, keepdims=True)
    for token in range(graph.dim):
        p = np.exp(law.log_probability(jnp.full_like(xt, token)))
        np.testing.assert_allclose(p, exact[..., token], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("t, s", [(1.0, 0.9), (0.5, 0.2), (1e-3, 1e-5)])
def test_euler_and_tweedie_reveal_alike_with_log_linear_noise(t, s):
    graph, law, schedule = Absorbing(4), dense.data_law(4, 1), LogLinear()
    for step in (euler, tweedie):
        reveals = one_step(step, graph, law, schedule, t, s)[:4, 4].sum()
        np.testing.assert_allclose(reveals, (t - s) / t, rtol=2e-5)


def test_euler_and_tweedie_differ_with_geometric_noise():
    graph, law, schedule = Absorbing(4), dense.data_law(4, 1), Geometric()
    first, second = (
        one_step(step, graph, law, schedule, 0.8, 0.75)[:4, 4].sum() for step in (euler, tweedie)
    )
    assert abs(first - second) > 0.01


# Two tokens, half dependent: few enough steps then suffice, and too few still show.
LAW = dense.data_law(3, 2, seed=5)
LAW = (LAW + np.outer(LAW.sum(axis=1), LAW.sum(axis=0))) / 2
DRAWN = 200_000


def law_of_sampler(graph, predictor, steps):
    """The exact law of a sampler's output over LAW's sequences: its Markov chain, enumerated."""
    schedule, t_min = LogLinear(), 1e-5
    states = jnp.asarray(dense.sequences(graph.dim, 2))
    score_fn = dense.exact_score_fn(graph, LAW, one_sigma=True)
    column = jnp.ones((len(states), 1))

    def joint(p):
        """Independent laws of two tokens [N, 2, D] to the law of both, [N, D^2]."""
        p = p / p.sum(axis=-1, keepdims=True)
        return (p[:, 0, :, None] * p[:, 1, None, :]).reshape(len(p), -1)

    @jax.jit
    def step(t, s):
        law = predictor(states, Step(t * column, s * column, score_fn, graph, schedule))
        return joint(jnp.maximum(law.probabilities(), 0.0))

    @jax.jit
    def last():
        law = denoise(states, t_min * column, score_fn, graph, schedule)
        clean = [law.log_probability(jnp.full_like(states, y)) for y in range(graph.vocab_size)]
        return joint(jnp.exp(jnp.stack(clean, axis=-1)))

    ends = dense.transition(graph, 60.0)[:, 0]
    p = np.outer(ends, ends).ravel()
    times = np.append(1.0 - np.arange(steps) * (1.0 - t_min) / steps, t_min)
    for t, s in itertools.pairwise(times):
        p = p @ np.asarray(step(t, s), np.float64)
    p = p @ np.asarray(last(), np.float64)
    return p.reshape(LAW.shape)


@graphs
@pytest.mark.parametrize("predictor", [euler, tweedie])
def test_the_error_of_a_whole_sampler_halves_with_twice_the_steps(name, predictor):
    coarse, fine = (
        np.abs(law_of_sampler(GRAPHS[name](3), predictor, steps) - LAW).max() for steps in (32, 64)
    )
    assert coarse < 5e-3
    np.testing.assert_allclose(coarse / fine, 2.0, rtol=0.05)


@functools.cache
def sampler(name, predictor, grid="uniform"):
    """Draws of DRAWN sequences, a function of the number of steps."""
    graph = GRAPHS[name](3)
    score_fn = dense.exact_score_fn(graph, LAW, one_sigma=True)
    step = predictors.PREDICTORS[predictor]

    @jax.jit
    def run(steps):
        shape, key = (DRAWN, 2), jax.random.key(0)
        times = grids.GRIDS[grid]
        return sample(
            key, score_fn, graph, LogLinear(), shape, steps=steps, predictor=step, grid=times
        )

    return run


@graphs
@pytest.mark.parametrize(
    "predictor, grid", [("tweedie", "uniform"), ("euler", "uniform"), ("tweedie", "cosine")]
)
def test_a_sampler_with_the_exact_score_draws_from_the_data_distribution(name, predictor, grid):
    # At 64 steps the error of the steps adds about 1 to a chi-square of 8 degrees of freedom.
    counts = dense.count(sampler(name, predictor, grid)(64), 3)
    assert dense.p_value(counts, LAW) > dense.P_VALUE


@graphs
@pytest.mark.parametrize("predictor", ["tweedie", "euler"])
def test_the_chi_square_test_rejects_too_few_steps(name, predictor):
    counts = dense.count(sampler(name, predictor)(4), 3)
    assert dense.p_value(counts, LAW) < 1e-12


@graphs
def test_without_a_predictor_only_the_denoiser_moves(name):
    graph, schedule = GRAPHS[name](3), LogLinear()
    exact = dense.exact_score_fn(graph, LAW, one_sigma=True)
    calls = []

    def score_fn(xt, sigma):
        calls.append(sigma)
        return exact(xt, sigma)

    @jax.jit
    def run(key):
        options = {"steps": 8, "predictor": None, "t_min": 0.25}
        return sample(key, score_fn, graph, schedule, (64, 2), **options)

    key = jax.random.key(3)
    drawn = run(key)
    assert len(calls) == 1
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(64))
    key_limit, _, key_last = jax.vmap(jax.random.split, (0, None), 1)(keys, 3)
    start = jnp.stack([graph.limit(k, (2,)) for k in key_limit])
    last = denoise(start, jnp.full((64, 1), 0.25), exact, graph, schedule)
    np.testing.assert_array_equal(drawn, last.draw(key_last))


@dataclasses.dataclass(frozen=True)
class Next:
    """A law that draws x + 1 for certain."""

    x: jax.Array

    def draw(self, keys):
        return self.x + 1


@every_predictor
def test_a_loop_cut_in_parts_gives_what_the_whole_gives(name, predictor):
    graph = GRAPHS[name](3)
    score_fn = dense.exact_score_fn(graph, LAW, one_sigma=True)
    traces = []

    @jax.jit
    def run(chain, begin, end):
        traces.append(chain.tokens.shape)
        step = predictors.PREDICTORS[predictor]
        options = {"steps": 8, "predictor": step, "begin": begin, "end": end, "chain": chain}
        return samplers.sample(jax.random.key(1), score_fn, graph, LogLinear(), (256, 2), **options)

    unused = Chain.of(jnp.full((256, 2), 99, jnp.int32))
    start = run(unused, 0, 0)
    whole = run(unused, 0, 8)
    middle = run(run(start, 0, 3), 3, 7)
    first = np.asarray(start.tokens)
    assert (first == graph.mask).all() if name == "absorbing" else first.max() == 2
    jax.tree.map(np.testing.assert_array_equal, run(middle, 7, 8), whole)
    assert len(traces) == 1
    assert predictor not in ("euler", "tweedie") or not np.array_equal(middle.tokens, whole.tokens)
    plain = {"steps": 8, "predictor": predictors.PREDICTORS[predictor]}
    uncut = samplers.sample(jax.random.key(1), score_fn, graph, LogLinear(), (256, 2), **plain)
    jax.tree.map(np.testing.assert_array_equal, uncut, whole)


@graphs
@pytest.mark.parametrize("draw", DRAWS)
def test_a_sample_depends_on_its_own_number_and_not_on_the_batch(name, draw):
    graph = GRAPHS[name](3)
    score_fn = dense.exact_score_fn(graph, LAW, one_sigma=True)

    def run(index):
        options = {"steps": 4, "draw": DRAWS[draw], "index": index}
        return sample(jax.random.key(1), score_fn, graph, LogLinear(), (len(index), 2), **options)

    together = run(jnp.arange(64))
    np.testing.assert_array_equal(run(jnp.array([40, 7])), together[jnp.array([40, 7])])
    assert len(np.unique(together, axis=0)) > 4


@pytest.mark.parametrize("grid", grids.GRIDS)
def test_times_of_the_steps_run_from_one_to_t_min(grid):
    seen = []

    def watch(xt, step):
        times = step.t, step.s
        jax.debug.callback(lambda t, s: seen.append((float(t[0, 0]), float(s[0, 0]))), *times)
        return Next(xt)

    graph = Absorbing(3)
    score_fn = dense.exact_score_fn(graph, LAW)
    how = {"steps": 5, "predictor": watch, "t_min": 0.1, "grid": grids.GRIDS[grid]}
    out = sample(jax.random.key(0), score_fn, graph, LogLinear(), (1, 2), **how)
    jax.block_until_ready(out)
    jax.effects_barrier()
    seen.sort(reverse=True)
    times = {
        "uniform": 1 - 0.18 * np.arange(6),
        "cosine": 0.1 + 0.9 * np.cos(np.pi / 2 * np.arange(6) / 5),
    }[grid]
    np.testing.assert_allclose(seen, np.c_[times[:-1], times[1:]], rtol=1e-6)
    assert seen[-1][1] == np.float32(0.1)


@graphs
def test_a_traced_number_of_steps_compiles_once_and_changes_nothing(name):
    graph = GRAPHS[name](3)
    exact = dense.exact_score_fn(graph, LAW, one_sigma=True)
    traces = []

    def score_fn(xt, sigma):
        traces.append(xt.shape)
        return exact(xt, sigma)

    def run(key, steps):
        return sample(key, score_fn, graph, LogLinear(), (16, 2), steps=steps)

    key = jax.random.key(0)
    jitted = jax.jit(run)
    jitted(key, 4)
    compiled = len(traces)
    drawn = [jitted(key, steps) for steps in (3, 64, 17)][-1]
    assert len(traces) == compiled
    static = jax.jit(run, static_argnums=1)(key, 17)
    np.testing.assert_array_equal(drawn, static)


@every_predictor
def test_known_tokens_are_kept_at_every_step_and_at_the_end(name, predictor):
    graph = GRAPHS[name](3)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 3, (256, 2)).astype(np.int32)
    is_known = rng.random((256, 2)) < 0.5
    score_fn = dense.exact_score_fn(graph, LAW, one_sigma=True)
    step = predictors.PREDICTORS[predictor]

    @jax.jit
    def run(key, end):
        known = Known(jnp.asarray(tokens), jnp.asarray(is_known))
        options = {"steps": 8, "predictor": step, "known": known, "end": end}
        return sample(key, score_fn, graph, LogLinear(), (256, 2), **options)

    for end in range(9):
        drawn = np.asarray(run(jax.random.key(0), end))
        np.testing.assert_array_equal(drawn[is_known], tokens[is_known])
    free = drawn[~is_known]
    assert (free < 3).all() and len(np.unique(free)) == 3


def test_free_tokens_follow_their_conditional_law_under_absorbing():
    law = dense.data_law(3, 3, seed=9)
    graph, prompt, each = Absorbing(3), (2, 0, 1), 40_000
    score_fn = dense.exact_score_fn(graph, law, one_sigma=True)
    patterns = np.array([[True, False, False], [False, True, False], [True, False, True]])
    known = Known(jnp.tile(jnp.array(prompt), (3 * each, 1)), jnp.repeat(patterns, each, axis=0))

    @jax.jit
    def run(key):
        shape = known.tokens.shape
        return sample(key, score_fn, graph, LogLinear(), shape, steps=64, known=known)

    tokens = np.asarray(run(jax.random.key(0))).reshape(3, each, 3)
    everything = dense.sequences(3, 3)
    for pattern, drawn in zip(patterns, tokens, strict=True):
        agrees = (everything == prompt)[:, pattern].all(axis=1)
        counts = dense.count(drawn, 3)
        assert counts[~agrees].sum() == 0
        assert dense.p_value(counts, np.where(agrees, law.ravel(), 0.0)) > dense.P_VALUE
        independent = functools.reduce(
            np.multiply.outer, [law.sum(axis=tuple({0, 1, 2} - {i})) for i in range(3)]
        )
        assert dense.p_value(counts, np.where(agrees, independent.ravel(), 0.0)) < 1e-12


@dataclasses.dataclass(frozen=True)
class EvenScores:
    """Every clean token has the same score; its answers cost nothing, so that draws can be many."""

    log_each: float
    xt: jax.Array
    dim: int
    vocab_size: int

    def log_score(self):
        table = jnp.full((*self.xt.shape, self.dim), self.log_each)
        return jnp.where(jnp.arange(self.dim) == self.xt[..., None], 0.0, table)

    def total(self, needed):
        return jnp.full(self.xt.shape, self.log_each + jnp.log(self.vocab_size))

    def draw(self, keys, needed):
        shape = self.xt.shape[1:]
        draw = jax.vmap(lambda key: jax.random.randint(key, shape, 0, self.vocab_size, jnp.int32))
        return draw(keys)


# The rare tokens' probability, each, beside a dominant "stay"; 3.8e8 of them are tried, so 15 draws
# are expected. A draw with 23-bit noise makes 2.4 and misses 3 standard deviations.
RARE = 4e-8
TRIED = 3.8e8


def rare_draws(name, draw):
    """Draws of rare tokens and their expected number, of one Euler step."""
    graph = {"absorbing": Absorbing(64), "uniform": Uniform(65)}[name]
    rows, stay = 4096, 64
    xt = jnp.full((rows, 1), stay, jnp.int32)
    scores = EvenScores(0.0, xt, graph.dim, graph.vocab_size)
    rate = float(graph.transp_rate(jnp.int32(stay))[0])
    law = graph.euler(scores, xt, jnp.full((rows, 1), RARE / rate))
    rounds = int(TRIED / rows / stay)

    @jax.jit
    def run(key):
        def one(i):
            keys = jax.random.split(jax.random.fold_in(key, i), rows)
            return (draw(keys, law) != xt).sum()

        return jax.lax.map(one, jnp.arange(rounds)).sum()

    np.testing.assert_allclose(law.probabilities()[0, 0, :stay], RARE, rtol=1e-5)
    return int(run(jax.random.key(0))), RARE * rows * rounds * stay


@graphs
def test_rare_tokens_beside_a_dominant_stay_are_drawn_at_their_rate(name):
    drawn, expected = rare_draws(name, draw_exact)
    assert abs(drawn - expected) < 3 * expected**0.5


def test_rare_tokens_are_missed_by_the_float32_gumbel_draw():
    drawn, expected = rare_draws("absorbing", draw_float32_gumbel)
    assert abs(drawn - expected) > 3 * expected**0.5


@pytest.mark.parametrize("probability", [1e-6, 1e-9])
def test_a_masked_token_is_revealed_at_its_rate_however_rare(probability):
    scores = EvenScores(0.0, jnp.full((1, 4096), 2, jnp.int32), 3, 2)
    law = Absorbing(2).euler(scores, scores.xt, jnp.full((1, 1), probability))
    rounds = 10_000

    @jax.jit
    def run(key):
        def one(i):
            return (law.draw(jax.random.fold_in(key, i)[None]) == 0).sum()

        return jax.lax.map(one, jnp.arange(rounds)).sum()

    expected = probability * 4096 * rounds
    assert abs(int(run(jax.random.key(0))) - expected) < 3 * expected**0.5


def test_a_uniform_token_of_probability_1e_6_is_drawn_at_its_rate():
    graph, rows, rounds = Uniform(2), 4096, 10_000
    xt = jnp.zeros((rows, 1), jnp.int32)
    law = graph.euler(EvenScores(0.0, xt, 2, 2), xt, jnp.full((rows, 1), 2e-6))  # the rate is 1/2
    np.testing.assert_allclose(law.probabilities()[0, 0], [1.0, 1e-6], rtol=1e-5)

    @jax.jit
    def run(key):
        def one(i):
            return law.draw(jax.random.split(jax.random.fold_in(key, i), rows)).sum()

        return jax.lax.map(one, jnp.arange(rounds)).sum()

    expected = 1e-6 * rows * rounds
    assert abs(int(run(jax.random.key(0))) - expected) < 3 * expected**0.5


def test_the_float32_gumbel_draw_is_right_where_no_token_is_rare():
    p = jnp.broadcast_to(jnp.array([0.5, 0.3, 0.2]), (100_000, 1, 3))
    drawn = samplers.gumbel_argmax(jax.random.uniform(jax.random.key(0), p.shape), p)
    counts = np.bincount(drawn[:, 0], minlength=3)
    assert dense.p_value(counts, np.asarray(p[0, 0])) > dense.P_VALUE
    assert set(DRAWS) == {"exact", "float32_gumbel"}


def test_no_steps_at_all_are_refused():
    with pytest.raises(ValueError, match="steps 0 is below 1"):
        sample(jax.random.key(0), None, Absorbing(3), LogLinear(), (1, 1), steps=0)
