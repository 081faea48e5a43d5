"""The curve of cross entropy, the grid fitted to it and the price of few calls, against the oracle
of tests/toy_languages.py and brute force."""

import functools
import itertools

import dense
import exact_laws
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_languages as toy

from sedd_jax.diffusion import grids, samplers
from sedd_jax.diffusion.graphs import Absorbing
from sedd_jax.diffusion.likelihood import bound
from sedd_jax.diffusion.schedules import SCHEDULES, Geometric, LogLinear
from sedd_jax.inference import bounds
from sedd_jax.inference.curve import (
    MAX_CALLS,
    POINTS,
    TABLE,
    Curve,
    best_shares,
    fitted_shares,
    fitted_times,
    grid_shares,
    masked_share,
    prices,
)

languages = pytest.mark.parametrize("name", toy.LANGUAGES)
schedules = pytest.mark.parametrize("schedule", SCHEDULES)
P0 = toy.markov(2.0, length=4)
TEXTLIKE = 1.8 + 1.6 * np.linspace(0, 1, 65) + 3.0 * np.linspace(0, 1, 65) ** 20


def curve_of(share, nats):
    """A curve through these points, of very many copies."""
    share, nats = np.asarray(share, float), np.asarray(nats, float)
    return Curve(*map(tuple, (share, nats, 0 * share)), (10**8,) * len(share))


@functools.cache
def exact_curve(name):
    u = np.linspace(0.0, 1.0, 241)
    return curve_of(u, toy.profile(toy.LANGUAGES[name](), u))


# --- the grid


def spent(g, at):
    """The sum of (u_k - u_k+1) g(u_k) at the numbers `at` of g [M + 1], falling from M."""
    at = np.array(at)
    return -np.diff(np.append(at, 0)) @ np.asarray(g)[at] / (len(g) - 1)


@pytest.mark.parametrize("calls", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("rises", [True, False])
def test_no_grid_on_the_points_costs_less_than_the_best_one(calls, rises):
    g = np.random.default_rng(calls).random(10)
    g = np.sort(g) if rises else g
    others = itertools.combinations(range(8, 0, -1), calls - 1)
    lowest = min(spent(g, (9, *rest)) for rest in others)
    best = best_shares(g, calls)
    assert best[0] == 1.0 and len(best) == calls and (np.diff(best) < 0).all() and best[-1] > 0
    assert spent(g, np.rint(best * 9).astype(int)) == pytest.approx(lowest, abs=1e-12)


@languages
@pytest.mark.parametrize("calls", [2, 3, 7])
def test_the_best_grid_is_that_of_the_oracle(name, calls):
    p0 = toy.LANGUAGES[name]()
    best = best_shares(toy.profile(p0, np.linspace(0.0, 1.0, 241)), calls)
    expected = toy.fitted_times(p0, calls)
    assert toy.price(p0, best) == pytest.approx(toy.price(p0, expected), abs=1e-12)
    if name != "independent":  # of which no grid costs anything
        np.testing.assert_allclose(best, expected, atol=1e-12)


@languages
@pytest.mark.parametrize("calls", [2, 3, 7, 14])
def test_prices_are_those_of_the_oracle_and_the_fitted_grid_has_the_lowest(name, calls):
    p0, curve = toy.LANGUAGES[name](), exact_curve(name)
    paid = prices(curve, calls, 1e-5, LogLinear(), grids.GRIDS)
    for grid, price in paid.items():
        if grid == "fitted":
            shares = fitted_shares(curve, calls)
        else:
            shares = grid_shares(grids.GRIDS[grid], calls - 1, 1e-5, LogLinear())
        assert price * p0.ndim == pytest.approx(toy.price(p0, shares), abs=2e-4)
    assert paid["fitted"] <= min(paid.values()) + 1e-9


@languages
@pytest.mark.parametrize("calls", [2, 3, 5])
def test_the_price_is_above_what_the_sampler_loses(name, calls):
    """KL(p0 || sampler), by enumeration of every state, of the times as the sampler takes them."""
    p0, curve, steps = toy.LANGUAGES[name](), exact_curve(name), calls - 1
    model = toy.Model(p0)
    lost = {}
    for grid in (*grids.GRIDS, "fitted"):
        if grid == "fitted":
            times = np.float64(fitted_times(curve, steps, LogLinear())[:calls])
        else:
            times = masked_times(grids.GRIDS[grid], steps)
        lost[grid] = toy.kl(p0, exact_laws.law_of_tweedie(model, times))
        assert -1e-9 < lost[grid] <= p0.ndim * curve.price(times) + 1e-4
    if name != "independent":
        assert lost["fitted"] < lost["uniform"]


def masked_times(grid, steps):
    """A grid's times at its steps and at the denoiser, of which LogLinear masks as large a share
    of a sample."""
    return np.append([float(grid(i, steps, 1e-5)) for i in range(steps)], 1e-5)


def test_a_flat_curve_has_the_uniform_grid():
    flat = curve_of([0.2, 0.8], [2.0, 2.0])
    np.testing.assert_allclose(fitted_shares(flat, 8), toy.uniform_times(8), atol=1 / POINTS)


def test_many_calls_get_shares_between_those_of_fewer_at_little_cost():
    curve = curve_of(np.linspace(0, 1, 65), TEXTLIKE)
    for calls in (MAX_CALLS + 1, 2 * MAX_CALLS):
        shares = fitted_shares(curve, calls)
        assert len(shares) == calls and shares[0] == 1.0
        assert (np.diff(shares) < 0).all() and shares[-1] > 0
        fine = best_shares(curve.at(np.linspace(0, 1, 3 * POINTS + 1)), calls)
        assert curve.price(shares) < 1.01 * curve.price(fine)


@schedules
@pytest.mark.parametrize("steps", [1, 7, TABLE, 3 * TABLE])
def test_fitted_times_mask_the_fitted_shares_under_every_schedule(schedule, steps):
    schedule, curve = SCHEDULES[schedule](), curve_of(np.linspace(0, 1, 65), TEXTLIKE)
    times = fitted_times(curve, steps, schedule)
    assert times.dtype == np.float32 and times.shape == (TABLE + 1,) and times[0] == 1.0
    few = min(steps, TABLE)
    assert (np.diff(times[: few + 1]) < 0).all() and (times[few:] == times[-1]).all()
    assert times[-1] > 0

    @jax.jit
    def at(i):
        return grids.fitted_grid(jnp.asarray(times), i, steps, 1e-5)

    taken = np.asarray(jax.vmap(at)(jnp.arange(steps + 1)))
    expected = fitted_shares(curve, steps + 1)
    np.testing.assert_allclose(masked_share(schedule, taken), expected, atol=3e-4)
    if steps <= TABLE:
        np.testing.assert_array_equal(taken, times[: steps + 1])


def test_draws_over_a_fitted_grid_have_the_distribution_of_the_oracle():
    p0, u = toy.templates(length=4), np.linspace(0.0, 1.0, 241)
    steps, rows = 2, 40_000
    times = fitted_times(curve_of(u, toy.profile(p0, u)), steps, LogLinear())
    score_fn = dense.exact_score_fn(Absorbing(3), p0, one_sigma=True)
    drawn = jax.jit(
        lambda key: samplers.sample(
            key,
            score_fn,
            Absorbing(3),
            LogLinear(),
            (rows, p0.ndim),
            steps=steps,
            grid=functools.partial(grids.fitted_grid, jnp.asarray(times)),
            t_min=times[-1],
        )
    )(jax.random.key(0))
    counts = np.bincount(
        np.asarray(drawn.tokens) @ (3 ** np.arange(p0.ndim)[::-1]), minlength=p0.size
    )
    model = toy.Model(p0)
    expected = exact_laws.law_of_tweedie(model, np.float64(times[: steps + 1]))
    assert dense.p_value(counts, expected) > dense.P_VALUE
    uniform = exact_laws.law_of_tweedie(model, toy.uniform_times(steps + 1))
    assert dense.p_value(counts, uniform) < dense.P_VALUE


# --- the curve


@functools.cache
def measured(schedule, wrong_by=0.0, rounds=1):
    """The curve of a network on texts of P0, by the bound of them."""
    graph, rng = Absorbing(3), np.random.default_rng(0)
    drawn = rng.choice(P0.size, size=12_000, p=P0.ravel())
    x0 = jnp.asarray(toy.sequences(3, P0.ndim)[drawn], jnp.int32)
    score_fn = dense.exact_score_fn(graph, P0, wrong_by=wrong_by)

    @jax.jit
    def run(key):
        index = jnp.arange(len(x0))
        return bound(key, x0, index, score_fn, graph, schedule, passes=8, t_min=1e-3)

    parts = [run(jax.random.key(r)) for r in range(rounds)]
    return [Curve.of(part.share.ravel(), part.cross_entropy.ravel()) for part in parts]


@pytest.mark.parametrize("schedule", [LogLinear(), Geometric(1e-4, 8.0)])
def test_the_curve_of_an_exact_network_is_the_profile_of_its_language(schedule):
    (curve,) = measured(schedule)
    share, nats, error = (np.array(getattr(curve, n)) for n in ("share", "nats", "standard_error"))
    assert len(share) > 60 and (np.diff(share) > 0).all() and sum(curve.copies) == 8 * 12_000
    assert error.max() < 0.03
    z = (nats - toy.profile(P0, share)) / error
    assert np.abs(z).max() < 4.0
    assert abs(z.mean()) < 3.0 / len(z) ** 0.5 and 0.7 < z.std() < 1.3
    u = np.linspace(0.0, 1.0, 21)
    np.testing.assert_allclose(curve.at(u), toy.profile(P0, u), atol=0.03)
    times = toy.cosine_times(4)
    spread = -np.diff(times, append=0.0) * np.interp(times, share, error)
    excess = curve.price(times) - toy.price(P0, times) / P0.ndim
    assert abs(excess) < 3.0 * (spread**2).sum() ** 0.5 < 0.025


def test_a_wrong_network_has_a_curve_above_the_profile():
    (curve,) = measured(LogLinear(), wrong_by=0.7)
    assert (np.array(curve.nats) - toy.profile(P0, curve.share))[10:].min() > 0.02


def test_rounds_have_the_curve_of_all_their_copies():
    one, other = measured(LogLinear(), rounds=2)
    mean = Curve.mean([one, other])
    assert sum(mean.copies) == 2 * sum(one.copies) and len(mean.share) == len(one.share)
    np.testing.assert_allclose(mean.nats, np.mean([one.nats, other.nats], axis=0), atol=0.02)
    ratio = np.array(mean.standard_error) / one.standard_error
    np.testing.assert_allclose(ratio, 0.5**0.5, rtol=0.2)
    alone = Curve.mean([one])
    np.testing.assert_allclose(alone.standard_error, one.standard_error, rtol=1e-12)
    np.testing.assert_allclose(alone.nats, one.nats, rtol=1e-12)


def test_means_and_errors_of_hand_numbers():
    curve = Curve.of(np.array([0.5, 0.001, 0.505, 0.002, 1.0]), np.array([4.0, 1.0, 6.0, 2.0, 7.0]))
    assert curve.copies == (2, 2, 1)
    np.testing.assert_allclose(curve.share, [0.0015, 0.5025, 1.0])
    np.testing.assert_allclose(curve.nats, [1.5, 5.0, 7.0])
    alone = np.std([4, 1, 6, 2, 7], ddof=1)
    np.testing.assert_allclose(curve.standard_error, [0.5, 1.0, alone])


def test_a_curve_rises_between_and_beyond_its_bins_whatever_they_are():
    curve = Curve((0.1, 0.11, 0.5, 0.7), (1.0, 3.0, 2.0, 4.0), (0.1,) * 4, (1, 1, 3, 1))
    g = curve.at(np.linspace(0.0, 1.0, 101))
    assert (np.diff(g) > -1e-12).all() and g[0] >= 0 and g[-1] < 6
    one = curve_of([0.3], [2.0])
    np.testing.assert_allclose(one.at(np.linspace(0.0, 1.0, 5)), 2.0, rtol=1e-6)
    assert one.price([1.0]) == pytest.approx(0.0, abs=1e-6)


@languages
def test_a_curve_between_its_bins_is_the_profile(name):
    p0 = toy.LANGUAGES[name]()
    bins = (np.arange(64) + 0.5) / 64
    curve, u = curve_of(bins, toy.profile(p0, bins)), np.linspace(0.0, 1.0, 1001)
    np.testing.assert_allclose(curve.at(u), toy.profile(p0, u), atol=2e-3)
    mean = toy.masked_entropies(p0).mean()
    assert curve.at([1.0])[0] - curve.price([1.0]) == pytest.approx(mean, abs=1e-3)


@pytest.mark.parametrize("steep", [0.0, 2.0])
@pytest.mark.parametrize("calls", [8, 32])
def test_a_grid_is_not_fitted_to_the_noise_of_the_bins(steep, calls):
    """With the errors that 209 blocks of 128 tokens at 16 noise levels have."""

    def truth(u):
        return 1.8 + 1.4 * np.asarray(u) + steep * np.asarray(u) ** 20

    rng, bins = np.random.default_rng(0), (np.arange(64) + 0.5) / 64
    exact, prices = curve_of(bins, truth(bins)), []
    for _ in range(12):
        noise = rng.normal(scale=0.045, size=64)
        noisy = Curve(tuple(bins), tuple(truth(bins) + noise), (0.045,) * 64, (50,) * 64)
        shares = fitted_shares(noisy, calls)
        prices.append((noisy.price(shares), exact.price(shares)))
    claimed, true = np.mean(prices, axis=0)
    assert claimed == pytest.approx(true, rel=0.12)
    assert true < 1.08 * exact.price(fitted_shares(exact, calls))


def test_uniform_noise_has_no_curve():
    graph = dense.GRAPHS["uniform"](3)
    score_fn = dense.exact_score_fn(graph, P0)
    x0 = jnp.zeros((2, P0.ndim), jnp.int32)
    how = {"passes": 2, "t_min": 1e-3}
    part = bound(jax.random.key(0), x0, jnp.arange(2), score_fn, graph, LogLinear(), **how)
    assert part.share is None and part.cross_entropy is None


def test_padding_is_not_in_the_curve():
    graph, key, index = Absorbing(3), jax.random.key(0), jnp.arange(64)
    x0 = jnp.zeros((64, 6), jnp.int32)
    is_token = jnp.arange(6) < 4

    def score_fn(xt, sigma):  # bad at the padding
        table = jnp.where(is_token[:, None], 0.0, jnp.array([-9.0, 9.0, 9.0, 0.0]))
        scores = dense.DenseScores(jnp.broadcast_to(table, (*xt.shape, 4)), xt, 3)
        return scores

    how = {"passes": 4, "is_token": jnp.broadcast_to(is_token, x0.shape)}
    part = bound(key, x0, index, score_fn, graph, LogLinear(), **how)
    np.testing.assert_allclose(part.cross_entropy, np.log(3.0), rtol=1e-5)
    assert part.share.shape == (64, 4) and 0 < part.share.min() and part.share.max() < 1


def test_a_curve_survives_json_and_anything_else_is_refused():
    curve = measured(LogLinear())[0]
    values = {**curve.to_dict(), "step": 7}
    again = Curve.from_dict(values)
    assert again == curve and again.about == {"step": 7} and again.to_dict() == values
    assert hash(again) == hash(curve)
    for wrong in (
        {"share": [0.5]},
        {"share": curve.share[::-1]},
        {"share": []},
        {"nats": [float("nan")] * len(curve.nats)},
        {"nats": "text"},
        {"nats": None},
        {"copies": [0] * len(curve.nats)},
        {"copies": {}},
        {"copies": [float("inf")] * len(curve.nats)},
        {"nats": [1e300] * len(curve.nats)},
    ):
        with pytest.raises((ValueError, TypeError)):
            Curve.from_dict({**values, **wrong})
    del values["nats"]
    with pytest.raises(KeyError):
        Curve.from_dict(values)


def test_the_corpus_has_one_curve_however_it_is_cut():
    graph = Absorbing(3)
    score_fn = dense.exact_score_fn(graph, P0, wrong_by=0.5)
    blocks = bounds.Blocks(np.random.default_rng(0).integers(0, 3, (11, P0.ndim)))

    @functools.partial(jax.jit, static_argnames="passes")
    def bound_fn(params, key, blocks, index, *, passes):
        return bound(key, blocks.tokens, index, score_fn, graph, LogLinear(), passes=passes)

    def curve(size):
        how = {"passes": 4, "batch_size": size, "t_min": 1e-3}
        return bounds.corpus_bound(bound_fn, None, jax.random.key(1), blocks, **how).curve

    whole = curve(11)
    assert sum(whole.copies) == 44  # the rows that fill up a batch are not counted
    for size in (1, 4, 32):
        cut = curve(size)
        assert cut.copies == whole.copies
        np.testing.assert_allclose(cut.nats, whole.nats, rtol=1e-5)
