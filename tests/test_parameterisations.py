"""The conditional law of a masked token and the absorbing score: one from the other, exactly."""

import functools

import dense
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import says

from sedd_jax.diffusion.graphs import Absorbing, Uniform
from sedd_jax.diffusion.likelihood import bound
from sedd_jax.diffusion.losses import dwdse
from sedd_jax.diffusion.parameterisations import (
    conditional_from_log_score,
    log_score_from_conditional,
    score_fn_from_conditional,
)
from sedd_jax.diffusion.schedules import LogLinear

VOCAB, LENGTH = 3, 3
compiled_quickly = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)
GRAPH = Absorbing(VOCAB)
LAW = dense.data_law(VOCAB, LENGTH)
NOISED = dense.sequences(GRAPH.dim, LENGTH)  # every sequence with and without MASK
CLEAN = dense.sequences(VOCAB, LENGTH)


def conditional_table() -> np.ndarray:
    """log p(x0_l = y | unmasked tokens) by enumeration, float64 [D^L, L, V]."""
    fits = ((NOISED[:, None] == CLEAN) | (NOISED[:, None] == GRAPH.mask)).all(-1)  # [D^L, V^L]
    weights = fits * LAW.ravel()
    is_y = CLEAN[:, :, None] == np.arange(VOCAB)  # [V^L, L, V]
    joint = np.einsum("nc,clv->nlv", weights, is_y)
    with np.errstate(divide="ignore"):
        return np.log(joint / weights.sum(-1)[:, None, None])


def exact_conditional(xt, sigma):
    """The same as a model would give it, float32 [B, L, V]: of sigma it needs nothing."""
    del sigma
    stride = GRAPH.dim ** np.arange(LENGTH)[::-1]
    return jnp.asarray(conditional_table(), jnp.float32)[(xt * stride).sum(-1)]


EXACT = dense.exact_score_fn(GRAPH, LAW)
SCORE_FN = score_fn_from_conditional(exact_conditional, GRAPH)


@pytest.mark.parametrize("sigma", [1e-4, 0.3, 6.0])
def test_exact_conditional_gives_the_exact_score(sigma):
    column = jnp.full((len(NOISED), 1), sigma, jnp.float32)
    exact = dense.exact_score_fn(GRAPH, LAW, one_sigma=True)(NOISED, column).log_score()
    ours = SCORE_FN(NOISED, column).log_score()
    is_masked = NOISED == GRAPH.mask
    assert is_masked.sum() == 3 * 16
    np.testing.assert_allclose(ours[is_masked], exact[is_masked], rtol=2e-5, atol=2e-5)


def test_total_of_the_scores_is_the_odds_of_being_unmasked():
    xt, sigma = jnp.full((1, LENGTH), GRAPH.mask), jnp.full((1, 1), 0.7)
    log_total, _ = SCORE_FN(xt, sigma).total_and_pick(jnp.zeros_like(xt))
    np.testing.assert_allclose(log_total, -np.log(np.expm1(0.7)), rtol=1e-5)


def test_one_is_the_inverse_of_the_other():
    logits = jax.random.normal(jax.random.key(0), (4, 5, 7))
    log_p = jax.nn.log_softmax(logits)
    sigma = jnp.asarray([[1e-5], [0.1], [1.0], [7.0]])
    log_score = log_score_from_conditional(log_p, sigma)
    np.testing.assert_allclose(conditional_from_log_score(log_score), log_p, atol=5e-6)
    again = log_score_from_conditional(conditional_from_log_score(log_score), sigma)
    np.testing.assert_allclose(again, log_score, atol=5e-6)


def test_a_wrong_total_is_lost_and_the_conditional_is_kept():
    log_p = jax.nn.log_softmax(jax.random.normal(jax.random.key(1), (2, 3, 5)))
    sigma = jnp.asarray([[0.2], [2.0]])
    too_large = log_score_from_conditional(log_p, sigma) + 0.5
    np.testing.assert_allclose(conditional_from_log_score(too_large), log_p, atol=2e-6)


def test_loss_is_that_of_the_exact_score_and_its_gradient_is_finite():
    x0 = jnp.asarray(CLEAN)
    schedule = LogLinear(1e-3)

    def loss(score_fn):
        return dwdse(jax.random.key(2), x0, score_fn, GRAPH, schedule).nats

    losses = [compiled_quickly(lambda fn=fn: loss(fn))() for fn in (SCORE_FN, EXACT)]
    np.testing.assert_allclose(*losses, rtol=1e-4)

    def mean(shift):
        def conditional(xt, sigma):  # -inf at unmasked positions, as MDLM's carry-over has it
            return jax.nn.log_softmax(exact_conditional(xt, sigma) + shift)

        return loss(score_fn_from_conditional(conditional, GRAPH)).mean()

    gradient = compiled_quickly(jax.grad(mean))(jnp.zeros(VOCAB))
    assert np.isfinite(gradient).all()


def test_reverse_step_is_that_of_the_exact_score():
    sigma, step = jnp.full((len(NOISED), 1), 0.8), jnp.full((len(NOISED), 1), 0.3)
    laws = [
        GRAPH.tweedie(score_fn(NOISED, sigma), jnp.asarray(NOISED), step).probabilities()
        for score_fn in (SCORE_FN, dense.exact_score_fn(GRAPH, LAW, one_sigma=True))
    ]
    is_masked = NOISED == GRAPH.mask
    np.testing.assert_allclose(laws[0][is_masked], laws[1][is_masked], rtol=1e-4, atol=1e-6)


def test_bound_is_that_of_the_exact_score():
    x0, schedule = jnp.asarray(CLEAN), LogLinear(1e-3)

    def diffusion(score_fn):
        index = jnp.arange(len(x0))
        return bound(jax.random.key(4), x0, index, score_fn, GRAPH, schedule, passes=4).diffusion

    bounds = [compiled_quickly(lambda fn=fn: diffusion(fn))() for fn in (SCORE_FN, EXACT)]
    np.testing.assert_allclose(*bounds, rtol=1e-3, atol=1e-3)


def test_a_graph_without_mask_is_refused():
    with says("Uniform has no MASK", "use the absorbing graph"):
        score_fn_from_conditional(exact_conditional, Uniform(VOCAB))
