"""Schedules against float64 and against their own derivative."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sedd_jax.diffusion.schedules import SCHEDULES, Geometric, LogLinear


def log_linear(t, eps=1e-3):
    return -np.log1p(-(1.0 - eps) * t)


def geometric(t, low=1e-5, high=20.0):
    return low ** (1.0 - t) * high**t


# A schedule in float64, written as the paper does; a new one is a line here.
FLOAT64 = {"log_linear": log_linear, "geometric": geometric}
TIMES = np.concatenate(
    [
        np.linspace(0.0, 1.0, 1001),
        [1e-7, 1e-5, 1e-4, 1e-3, 0.49999997, 0.5, 0.50000006],
        1.0 - np.array([1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 2.0**-24]),
    ]
).astype(np.float32)
schedules = pytest.mark.parametrize("name", SCHEDULES)


@schedules
def test_sigma_equals_float64_at_every_time(name):
    sigma = SCHEDULES[name]().sigma(TIMES)
    assert sigma.dtype == jnp.float32
    np.testing.assert_allclose(sigma, FLOAT64[name](TIMES.astype(np.float64)), rtol=2e-6)


@schedules
def test_dsigma_dt_is_the_derivative_of_sigma(name):
    schedule = SCHEDULES[name]()
    slope = schedule.dsigma_dt(TIMES)
    assert slope.dtype == jnp.float32
    np.testing.assert_allclose(slope, jax.vmap(jax.grad(schedule.sigma))(TIMES), rtol=1e-5)


@schedules
def test_dsigma_dt_is_the_float64_slope(name):
    t = TIMES[(TIMES > 1e-3) & (TIMES < 0.999)].astype(np.float64)
    h = 1e-6
    slope = (FLOAT64[name](t + h) - FLOAT64[name](t - h)) / (2 * h)
    np.testing.assert_allclose(SCHEDULES[name]().dsigma_dt(t), slope, rtol=5e-6)


@schedules
def test_sigma_rises(name):
    sigma = SCHEDULES[name]().sigma(np.linspace(0.0, 1.0, 100_001, dtype=np.float32))
    assert (np.diff(sigma) >= 0).all()
    assert (np.diff(sigma[::10]) > 0).all()


@schedules
def test_shape_of_the_times_is_kept(name):
    schedule = SCHEDULES[name]()
    for shape in ((), (3,), (3, 1)):
        assert schedule.sigma(jnp.ones(shape)).shape == shape
        assert schedule.dsigma_dt(jnp.ones(shape)).shape == shape


def test_log_linear_moves_a_token_with_probability_proportional_to_time():
    np.testing.assert_allclose(LogLinear().sigma(0.0), 0.0)
    np.testing.assert_allclose(LogLinear().sigma(1.0), -np.log(1e-3), rtol=1e-6)
    moved = -np.expm1(-np.asarray(LogLinear().sigma(TIMES), np.float64))
    np.testing.assert_allclose(moved, 0.999 * TIMES.astype(np.float64), rtol=2e-6)


@pytest.mark.parametrize("t", [1e-5, 1e-3, 0.5, 0.99, 0.999, 0.9999, 0.99999, 1.0])
def test_log_linear_keeps_its_digits_near_both_ends(t):
    t = np.float32(t)
    exact = np.float64(t)
    np.testing.assert_allclose(LogLinear().sigma(t), log_linear(exact), rtol=5e-7)
    slope = 0.999 / (1.0 - 0.999 * exact)
    np.testing.assert_allclose(LogLinear().dsigma_dt(t), slope, rtol=5e-7)


def test_log_linear_weighs_the_absorbing_loss_by_one_over_t():
    t = TIMES[TIMES >= 1e-5]
    schedule = LogLinear()
    weight = schedule.dsigma_dt(t) / jnp.expm1(schedule.sigma(t))
    np.testing.assert_allclose(weight, 1.0 / t, rtol=1e-5)


def test_geometric_ends_at_its_two_noises():
    schedule = Geometric(1e-4, 15.0)
    np.testing.assert_allclose(schedule.sigma(np.array([0.0, 1.0])), [1e-4, 15.0], rtol=1e-6)
    np.testing.assert_allclose(schedule.sigma(0.5), np.sqrt(1e-4 * 15.0), rtol=1e-6)


@pytest.mark.parametrize("eps", [0.0, 1.0, -1e-3])
def test_log_linear_refuses_an_eps_outside_its_range(eps):
    with pytest.raises(ValueError, match=str(eps)):
        LogLinear(eps)


@pytest.mark.parametrize("noises", [(0.0, 1.0), (2.0, 1.0), (1.0, float("inf"))])
def test_geometric_refuses_noises_that_do_not_rise(noises):
    with pytest.raises(ValueError, match="sigma_min"):
        Geometric(*noises)
