"""PLAID against what a tiny space allows to enumerate and to integrate."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special
import scipy.stats
from conftest import command_line, over_eight_devices, says

from sedd_jax.cli import eval_command, sample_command, train_command
from sedd_jax.configs import rivals
from sedd_jax.data.tokenizers import Characters
from sedd_jax.diffusion import gaussian
from sedd_jax.diffusion.gaussian import EmbeddingDiffusion, LearnedSchedule
from sedd_jax.diffusion.graphs import Absorbing
from sedd_jax.diffusion.losses import stratified_times
from sedd_jax.diffusion.objectives import Dwdse
from sedd_jax.diffusion.objectives import Plaid as Objective
from sedd_jax.diffusion.schedules import LogLinear
from sedd_jax.diffusion.scores import Tokens, draw_categorical
from sedd_jax.inference.model import SEDD
from sedd_jax.inference.pretrained import load
from sedd_jax.models import plaid
from sedd_jax.models.plaid import Plaid, make_embedding_diffusion

LINEAR = LearnedSchedule(jnp.float32(-3.0), jnp.log(jnp.float32(9.0)), jnp.zeros(gaussian.BINS))
# Two tokens and one position: z is a number, and every expectation an integral over a line. At
# gamma_1 = 12 nothing but noise is left.
TWO = np.array([0.3, 0.7])
WIDE = LINEAR._replace(gamma_0=jnp.float32(-1.0), log_range=jnp.log(jnp.float32(13.0)))
SIGNS = jnp.array([[-1.0], [1.0]])
# Three tokens, two positions, which depend on each other.
PAIRS = np.array([[0.30, 0.02, 0.08], [0.05, 0.20, 0.05], [0.10, 0.02, 0.18]])
CORNERS = np.array([[1.0, 0.0], [-0.5, 0.75**0.5], [-0.5, -(0.75**0.5)]])


@dataclasses.dataclass(frozen=True)
class DenseClean:
    """The clean tokens' distribution as a table of logits."""

    logits: jax.Array  # float32 [B, L, V]
    embeddings: jax.Array  # float32 [V, C]

    def mean(self) -> jax.Array:
        return jnp.matmul(jax.nn.softmax(self.logits), self.embeddings, precision="highest")

    def mean_and_log_p(self, tokens: Tokens) -> tuple[jax.Array, jax.Array]:
        log_p = jax.nn.log_softmax(self.logits)
        return self.mean(), jnp.take_along_axis(log_p, tokens[..., None], axis=-1)[..., 0]

    def draw(self, keys: jax.Array, is_greedy: bool = False) -> Tokens:
        if is_greedy:
            return jnp.argmax(self.logits, axis=-1).astype(jnp.int32)
        return draw_categorical(keys, self.logits)


def exact(law, embeddings, schedule=LINEAR):
    """The diffusion whose network is the posterior of the law, by enumeration."""
    sequences = np.stack(np.indices(law.shape), axis=-1).reshape(-1, law.ndim)  # [N, L]
    log_law, embeddings = jnp.log(law.ravel()), jnp.asarray(embeddings)

    def network(z, gamma, previous, embeddings):
        prior = gaussian.output_prior(z, gamma) @ embeddings.T  # [B, L, V]
        terms = jnp.stack([prior[:, i, sequences[:, i]] for i in range(law.ndim)])  # [L, B, N]
        posterior = jax.nn.log_softmax(log_law + terms.sum(axis=0))  # [B, N]
        is_there = sequences[:, :, None] == np.arange(len(embeddings))  # [N, L, V]
        rows = posterior[:, :, None, None] + jnp.where(is_there, 0.0, -jnp.inf)
        return DenseClean(jax.nn.logsumexp(rows, axis=1), embeddings)

    return EmbeddingDiffusion(embeddings, schedule, network)


def uneven(seed, schedule=LINEAR, size=2.0):
    """The schedule with bins of random weights."""
    weights = size * jax.random.normal(jax.random.key(seed), (gaussian.BINS,))
    return schedule._replace(log_weights=weights)


# --- the forward process


def test_signal_and_noise_have_variance_one_and_the_ratio_that_gamma_says():
    gamma = jnp.linspace(-12.0, 12.0, 25)
    signal, noise = gaussian.signal_scale(gamma), gaussian.noise_scale(gamma)
    np.testing.assert_allclose(signal**2 + noise**2, 1.0, rtol=1e-6)
    np.testing.assert_allclose(np.log(noise**2 / signal**2), gamma, rtol=1e-5, atol=1e-5)


def test_output_prior_is_the_likelihood_of_each_token():
    gamma, z = 0.7, np.array([0.3, -1.2])
    alpha, variance = (1 + np.exp(gamma)) ** -0.5, 1 / (1 + np.exp(-gamma))
    log_p = [
        scipy.stats.multivariate_normal(alpha * e, variance * np.eye(2)).logpdf(z) for e in CORNERS
    ]
    prior = gaussian.output_prior(jnp.asarray(z)[None, None], jnp.full((1, 1), gamma))[0, 0]
    logits = CORNERS @ prior
    np.testing.assert_allclose(logits - logits[0], np.array(log_p) - log_p[0], rtol=1e-5)


@pytest.mark.parametrize("gamma_s, gamma_t", [(-2.0, -1.9), (-3.0, 4.0)])
def test_the_posterior_is_bayes(gamma_s, gamma_t):
    clean, z = 0.8, -0.4

    def scales(gamma):
        return (1 + np.exp(gamma)) ** -0.5, (1 + np.exp(-gamma)) ** -0.5

    (alpha_s, sigma_s), (alpha_t, sigma_t) = scales(gamma_s), scales(gamma_t)
    ratio = alpha_t / alpha_s
    added = sigma_t**2 - ratio**2 * sigma_s**2  # z_t = ratio z_s + noise of this variance
    precision = 1 / sigma_s**2 + ratio**2 / added
    mean = (alpha_s * clean / sigma_s**2 + ratio * z / added) / precision
    drawn = gaussian.posterior(
        jnp.array([[[0.0], [1.0]]]),
        jnp.full((1, 2, 1), z),
        jnp.full((1, 2, 1), clean),
        jnp.full((1, 1), gamma_t),
        jnp.full((1, 1), gamma_s),
    )[0, :, 0]
    np.testing.assert_allclose(drawn, [mean, mean + precision**-0.5], rtol=1e-5)


def test_the_prior_is_the_divergence_from_a_standard_normal():
    schedule = LINEAR._replace(gamma_0=jnp.float32(-8.0))  # gamma_1 = 1
    diffusion = exact(PAIRS, CORNERS, schedule)
    clean = jnp.asarray(CORNERS)[None]
    alpha, sigma = (1 + np.exp(1.0)) ** -0.5, (1 + np.exp(-1.0)) ** -0.5
    expected = [
        sum(0.5 * (sigma**2 + (alpha * c) ** 2 - 1) - np.log(sigma) for c in e) for e in CORNERS
    ]
    np.testing.assert_allclose(diffusion.prior(clean)[0], expected, rtol=1e-5)


@pytest.mark.parametrize("schedule", [LINEAR, uneven(0), uneven(1)])
def test_gamma_rises_from_end_to_end_with_the_slope_that_it_says(schedule):
    t = jnp.linspace(0.0, 1.0, 4001)
    gamma, slope, log_density = schedule.at(t)
    assert (jnp.diff(gamma) > 0.0).all()
    np.testing.assert_allclose([gamma[0], gamma[-1]], [-3.0, 6.0], rtol=1e-6)
    middle = schedule.at((t[1:] + t[:-1]) / 2)[1]
    difference = np.diff(gamma) * (len(t) - 1)
    is_inside = np.isclose(middle, slope[1:], rtol=1e-6) & np.isclose(middle, slope[:-1], rtol=1e-6)
    assert is_inside.mean() > 0.9
    np.testing.assert_allclose(difference[is_inside], middle[is_inside], rtol=0.02)
    # The density of gamma is that of t over the slope.
    np.testing.assert_allclose(jnp.ptp(log_density + jnp.log(slope)), 0.0, atol=1e-5)


# --- the bound


@functools.cache
def integrated(x, points=4001):
    """(diffusion, reconstruction, prior) of token x of TWO, float64, by quadrature."""
    noise, weight = np.polynomial.hermite_e.hermegauss(80)
    weight = weight / weight.sum()
    signs, e = np.array([-1.0, 1.0]), [-1.0, 1.0][x]

    def posterior(gamma):  # [points, noise, V]
        alpha, sigma = (1 + np.exp(gamma)) ** -0.5, (1 + np.exp(-gamma)) ** -0.5
        z = alpha[:, None] * e + sigma[:, None] * noise
        log_p = np.log(TWO) + (alpha / sigma**2)[:, None, None] * z[..., None] * signs
        return scipy.special.log_softmax(log_p, axis=-1)

    gamma = np.linspace(-1.0, 12.0, points)
    error = (e - np.exp(posterior(gamma)) @ signs) ** 2 @ weight
    diffusion = np.trapezoid(0.5 * np.exp(-gamma) * error, gamma)
    reconstruction = -(posterior(np.array([-1.0]))[0, :, x] @ weight)
    variance = 1 / (1 + np.exp(-12.0))
    prior = 0.5 * (variance + (1 - variance) * e**2 - 1 - np.log(variance))
    return diffusion, reconstruction, prior


@pytest.mark.parametrize("x", [0, 1])
def test_the_bound_is_minus_log_p_with_the_exact_denoiser(x):
    np.testing.assert_allclose(sum(integrated(x)), -np.log(TWO[x]), atol=1e-5)


@pytest.mark.parametrize("schedule", [WIDE, uneven(2, WIDE, 0.5)])
def test_each_part_of_the_bound_is_its_integral(schedule):
    copies = 8192
    x0 = np.repeat([[0], [1]], copies, axis=0)
    run = jax.jit(
        functools.partial(gaussian.bound, passes=8, diffusion=exact(TWO, SIGNS, schedule))
    )
    part = run(jax.random.key(0), x0, jnp.arange(2 * copies))
    for x in (0, 1):
        rows = slice(x * copies, (x + 1) * copies)
        for name, expected in zip(("diffusion", "reconstruction", "prior"), integrated(x)):
            values = np.asarray(getattr(part, name)[rows], np.float64)
            error = values.std() / copies**0.5
            assert abs(values.mean() - expected) < 4 * error + 1e-5, name
            assert error < 0.02


def test_the_standard_error_is_that_of_the_noise():
    x0 = jnp.ones((4096, 1), jnp.int32)
    run = jax.jit(functools.partial(gaussian.bound, passes=16, diffusion=exact(TWO, SIGNS, WIDE)))
    part = run(jax.random.key(1), x0, jnp.arange(len(x0)))
    assert 0.9 < float(part.variance.mean()) / float(part.total.var()) < 1.5


def test_padding_is_left_out_of_the_bound():
    diffusion = exact(TWO, SIGNS, WIDE)
    run = functools.partial(gaussian.bound, jax.random.key(0), passes=2)
    alone = run(jnp.ones((3, 1), jnp.int32), jnp.arange(3), diffusion)

    def padded_network(z, gamma, previous, embeddings):
        logits = diffusion.network(z[:, :1], gamma, previous[:, :1], embeddings).logits
        return DenseClean(jnp.concatenate([logits, 9.0 * logits + 1.0], axis=1), embeddings)

    padded = diffusion._replace(network=padded_network)
    tokens = jnp.array([[1, 0]] * 3)
    is_token = jnp.array([[True, False]] * 3)
    both = run(tokens, jnp.arange(3), padded, is_token=is_token)
    np.testing.assert_allclose(both.total, alone.total, rtol=1e-5)


class Counted:
    """A Clean whose mean says how many calls have seen each other's estimates."""

    def __init__(self, previous):
        self.estimate = previous + 1.0

    def mean(self):
        return self.estimate

    def mean_and_log_p(self, tokens):
        return self.estimate, -self.estimate[..., 0]

    def draw(self, keys, is_greedy=False):
        return self.estimate[..., 0].astype(jnp.int32)


def counted():
    return EmbeddingDiffusion(SIGNS, LINEAR, lambda z, gamma, previous, _: Counted(previous))


def test_the_bound_conditions_each_estimate_on_another_of_the_same_latent():
    part = gaussian.bound(
        jax.random.key(0), jnp.ones((2, 1), int), jnp.arange(2), counted(), passes=2
    )
    np.testing.assert_allclose(part.reconstruction, 2.0)


def test_sampling_conditions_each_estimate_on_that_of_the_step_before():
    chain = gaussian.sample(jax.random.key(0), counted(), (2, 3), steps=5)
    np.testing.assert_array_equal(chain.previous, 5.0)
    np.testing.assert_array_equal(chain.tokens, 6)
    np.testing.assert_array_equal(chain.calls, 6)


# --- training


def loss_of(diffusion, seed, x0, **how):
    return gaussian.loss(jax.random.key(seed), x0, diffusion, **how)


@pytest.mark.parametrize("times", [{}, {"times": stratified_times}])
def test_the_loss_is_the_bound_on_average(times):
    copies = 40_000
    for x in (0, 1):
        x0 = jnp.full((copies, 1), x)
        nats = jax.jit(lambda x0: loss_of(exact(TWO, SIGNS, WIDE), 3, x0, **times).nats)(x0)
        error = float(nats.std()) / copies**0.5
        assert abs(float(nats.mean()) - sum(integrated(x))) < 4 * error < 0.1


def conditioned_and_not(x0, count=400):
    """For each of many keys the gradients of the loss in embeddings and gamma_0, and whether the
    network saw an estimate."""

    def loss(embeddings, gamma_0, key):
        def network(z, gamma, previous, embeddings):
            # The estimate is a half and then, of a half, three quarters: read off the loss.
            p = jnp.where(previous[..., :1] == 0.0, 0.5, 0.75) + 0.0 * z.sum() * gamma[0, 0]
            return DenseClean(jnp.log(jnp.concatenate([1 - p, p], axis=-1)), embeddings)

        diffusion = EmbeddingDiffusion(embeddings, LINEAR._replace(gamma_0=gamma_0), network)
        loss = gaussian.loss(key, x0, diffusion)
        return loss.nats.sum(), loss.metrics["reconstruction"].value()

    embeddings = jnp.array([[0.6, 0.8], [0.8, -0.6]])
    grad = jax.grad(loss, argnums=(0, 1), has_aux=True)
    keys = jax.random.split(jax.random.key(0), count)
    return jax.jit(jax.vmap(grad, (None, None, 0)))(embeddings, jnp.float32(-3.0), keys)


def test_a_quarter_of_the_batches_sees_an_estimate_and_teaches_the_network_alone():
    (embeddings, gamma_0), reconstruction = conditioned_and_not(jnp.ones((64, 1), jnp.int32))
    per_row = np.asarray(reconstruction) / 8.0  # each counts 1 / RECONSTRUCTION_SHARE times
    has_gradient = np.abs(embeddings).max(axis=(1, 2)) > 0.0
    np.testing.assert_array_equal(has_gradient, np.asarray(gamma_0) != 0.0)
    assert 0.17 < 1.0 - has_gradient.mean() < 0.33
    # Rows at the lowest level are an eighth of the batch, and cost log 2 or log 4/3 each.
    counts = [per_row[chosen].mean() for chosen in (has_gradient, ~has_gradient)]
    np.testing.assert_allclose(counts, np.array([np.log(2), np.log(4 / 3)]) / 8.0, rtol=0.15)


def test_the_schedule_is_taught_to_lower_the_second_moment_over_times():
    def network(z, gamma, previous, embeddings):
        return DenseClean(jnp.zeros((*z.shape[:2], 2)), embeddings)  # the estimate is 0 always

    def loss(log_weights, x0):
        schedule = LINEAR._replace(log_weights=log_weights)
        return loss_of(EmbeddingDiffusion(SIGNS, schedule, network), 0, x0, times=stratified_times)

    def moment(log_weights):
        """log of the integral over t of the squared cost, as a sum over bins."""
        gamma = np.linspace(-3.0, 6.0, gaussian.BINS + 1)
        squared = (np.exp(-2 * gamma[:-1]) - np.exp(-2 * gamma[1:])) / 2 / 4
        return jnp.log(jnp.sum(squared / jax.nn.softmax(log_weights)))

    weights = 0.5 * jax.random.normal(jax.random.key(1), (gaussian.BINS,))
    x0 = jnp.ones((2**17, 1), jnp.int32)
    taught = jax.jit(jax.grad(lambda w: loss(w, x0).nats.mean()))(weights)
    np.testing.assert_allclose(taught, jax.grad(moment)(weights), atol=0.004)
    assert float(jnp.abs(taught).max()) > 0.05


# --- sampling


def drawn(diffusion, steps, count=6000):
    """Samples, int32 [count, 2]."""
    run = jax.jit(lambda key: gaussian.sample(key, diffusion, (count, 2), steps=steps).tokens)
    return np.asarray(run(jax.random.key(0)))


def counts_of(tokens):
    counts = np.zeros(PAIRS.shape)
    np.add.at(counts, tuple(tokens.T), 1)
    return counts


def test_samples_have_the_distribution_of_the_exact_denoiser():
    tokens = drawn(exact(PAIRS, CORNERS), steps=256)
    assert scipy.stats.chisquare(counts_of(tokens).ravel(), 6000 * PAIRS.ravel()).pvalue > 1e-3


def test_few_steps_draw_the_marginals_and_lose_the_dependence():
    tokens = drawn(exact(PAIRS, CORNERS), steps=1)
    assert scipy.stats.chisquare(counts_of(tokens).ravel(), 6000 * PAIRS.ravel()).pvalue < 1e-3


def test_a_sample_depends_on_its_own_number():
    diffusion = exact(PAIRS, CORNERS)

    @jax.jit
    def run(index):
        shape = (len(index), 2)
        return gaussian.sample(jax.random.key(7), diffusion, shape, steps=8, index=index)

    eight, some = run(jnp.arange(8)), run(jnp.array([5, 0, 7]))
    np.testing.assert_array_equal(some.tokens, eight.tokens[jnp.array([5, 0, 7])])
    np.testing.assert_allclose(some.z, eight.z[jnp.array([5, 0, 7])], rtol=1e-5)
    assert len(np.unique(eight.z)) == eight.z.size


def test_a_loop_that_is_cut_gives_the_same_samples():
    diffusion = exact(PAIRS, CORNERS)

    @jax.jit
    def run(begin=0, end=None, chain=None):
        how = {"steps": 6, "begin": begin, "end": end, "chain": chain}
        return gaussian.sample(jax.random.key(7), diffusion, (8, 2), **how)

    whole, chain = run(), None
    for begin, end in ((0, 0), (0, 2), (2, 6)):
        chain = run(begin=begin, end=end, chain=chain)
        if end < 6:
            latent = chain.z if end == 0 else chain.previous
            nearest = np.argmax(latent @ jnp.asarray(CORNERS).T, axis=-1)
            np.testing.assert_array_equal(chain.tokens, nearest)
    jax.tree.map(np.testing.assert_array_equal, chain, whole)


def test_a_latent_that_is_not_finite_shows_as_no_token():
    diffusion = exact(PAIRS, CORNERS * np.nan)
    assert (gaussian.sample(jax.random.key(0), diffusion, (2, 2), steps=2).tokens == -1).all()


# --- the network

NETWORK = Plaid(dim=3, hidden_size=32, blocks=1, heads=2, cond_dim=16, dropout=0.0, embedding_dim=2)


@functools.cache
def initial():
    z = jnp.zeros((1, 2, 2))
    init = jax.jit(functools.partial(NETWORK.init, deterministic=True))
    return init(jax.random.key(0), z, jnp.zeros((1, 1)), z)["params"]


@functools.cache
def trained(steps=1000):
    """Parameters after some training on PAIRS, and the largest gradient of each leaf."""
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, steps))
    log_law = jnp.log(PAIRS.ravel())

    def step(carry, key):
        params, state, largest = carry
        key_data, key_loss = jax.random.split(key)
        number = jax.random.categorical(key_data, log_law, shape=(128,))
        x0 = jnp.stack(jnp.divmod(number, 3), axis=-1)

        def mean_loss(params):
            diffusion = make_embedding_diffusion(NETWORK, params)
            loss = gaussian.loss(key_loss, x0, diffusion, times=stratified_times)
            return loss.nats.mean()

        grads = jax.grad(mean_loss)(params)
        updates, state = optimizer.update(grads, state)
        largest = jax.tree.map(lambda a, g: jnp.maximum(a, jnp.abs(g).max()), largest, grads)
        return (optax.apply_updates(params, updates), state, largest), None

    params = initial()
    start = params, optimizer.init(params), jax.tree.map(lambda _: jnp.float32(0.0), params)
    keys = jax.random.split(jax.random.key(1), steps)
    params, _, largest = jax.jit(lambda start: jax.lax.scan(step, start, keys))(start)[0]
    return params, largest


@jax.jit
def bound_of(params, x0):
    diffusion = make_embedding_diffusion(NETWORK, params)
    return gaussian.bound(jax.random.key(2), x0, jnp.arange(len(x0)), diffusion, passes=8)


@functools.cache
def excess(is_trained):
    """(mean over PAIRS of bound - -log p, its standard error), nats per sequence."""
    copies = 1000
    params = trained()[0] if is_trained else initial()
    sequences = np.stack(np.indices(PAIRS.shape), axis=-1).reshape(-1, 2)
    x0 = np.repeat(sequences, copies, axis=0)

    values = np.asarray(bound_of(params, x0).total, np.float64).reshape(-1, copies)
    law = PAIRS.ravel()
    error = np.sqrt(law**2 @ values.var(axis=1) / copies)
    return law @ (values.mean(axis=1) + np.log(law)), error


def test_the_bound_of_an_untrained_network_is_above_the_entropy():
    mean, error = excess(False)
    assert mean > 3 * error > 0.0


def test_the_bound_of_a_trained_network_is_above_the_entropy_and_near():
    mean, error = excess(True)
    assert mean > -3 * error
    assert mean < 0.12 < excess(False)[0]
    assert error < 0.02


def test_every_parameter_learns():
    params, largest = trained()
    for path, leaf in jax.tree_util.tree_leaves_with_path(largest):
        assert leaf > 0.0, path
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), params, initial())
    assert min(jax.tree.leaves(moved)) > 0.0


def test_training_evens_out_the_costs_over_times():
    @jax.jit
    def second_moment(params):
        """Relative, of the diffusion part over times: 1 for costs that are all alike."""
        number = jax.random.categorical(jax.random.key(5), jnp.log(PAIRS.ravel()), shape=(20_000,))
        x0 = jnp.stack(jnp.divmod(number, 3), axis=-1)
        diffusion = make_embedding_diffusion(NETWORK, params)
        parts = gaussian.loss(jax.random.key(6), x0, diffusion).nats
        return (parts**2).mean() / parts.mean() ** 2

    params = trained()[0]
    linear = params | {"gamma_log_weights": jnp.zeros(gaussian.BINS)}
    assert second_moment(params) < 0.9 * second_moment(linear)


def test_samples_of_a_trained_network_resemble_the_data():
    tokens = drawn(make_embedding_diffusion(NETWORK, trained()[0]), steps=64)
    assert np.abs(counts_of(tokens) / 6000 - PAIRS).sum() / 2 < 0.06
    independent = np.outer(PAIRS.sum(1), PAIRS.sum(0))
    assert np.abs(independent - PAIRS).sum() / 2 > 0.2


def head(block, monkeypatch):
    """The HeadClean of a trained network at some latents, its logits computed in small blocks."""
    monkeypatch.setitem(plaid.LOGITS, "cpu", block)
    z = jax.random.normal(jax.random.key(3), (5, 2, 2))
    diffusion = make_embedding_diffusion(NETWORK, trained()[0])
    return diffusion.denoise(z, jnp.linspace(-2.0, 2.0, 5)[:, None])


@pytest.mark.parametrize("block", [3, 12, 10**6])
def test_the_head_is_the_table(block, monkeypatch):
    clean = head(block, monkeypatch)
    hidden, weight, bias = clean.output
    table = hidden @ weight.T + bias + clean.prior @ clean.embeddings.T
    dense = DenseClean(table, clean.embeddings)
    tokens = jnp.arange(10).reshape(5, 2) % 3
    for a, b in zip(clean.mean_and_log_p(tokens), dense.mean_and_log_p(tokens)):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5)
    keys = jax.random.split(jax.random.key(0), 5)
    np.testing.assert_array_equal(clean.draw(keys, True), dense.draw(keys, True))

    def summed(clean_of):
        def fn(weight, embeddings):
            mean, log_p = clean_of(weight, embeddings).mean_and_log_p(tokens)
            return (mean**2).sum() + log_p.sum()

        return jax.grad(fn, argnums=(0, 1))(weight, clean.embeddings)

    def of_head(weight, embeddings):
        output = clean.output._replace(weight=weight)
        return plaid.HeadClean(output, clean.prior, embeddings, clean.placement)

    def of_table(weight, embeddings):
        return DenseClean(hidden @ weight.T + bias + clean.prior @ embeddings.T, embeddings)

    for a, b in zip(summed(of_head), summed(of_table)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_the_draw_is_of_the_heads_probabilities(monkeypatch):
    clean = head(10**6, monkeypatch)
    keys = jax.random.split(jax.random.key(1), (4000, 5))
    tokens = np.asarray(jax.jit(jax.vmap(clean.draw))(keys))  # [4000, 5, 2]
    for v in range(3):
        p = np.exp(clean.mean_and_log_p(jnp.full((5, 2), v))[1])
        assert np.abs((tokens == v).mean(axis=0) - p).max() < 4 * 0.5 / 4000**0.5


def test_bfloat16_is_inside_the_transformer_alone():
    network = NETWORK.clone(dtype=jnp.bfloat16)
    params = trained()[0]
    z, gamma = jax.random.normal(jax.random.key(0), (4, 2, 2)), jnp.zeros((4, 1))
    clean = make_embedding_diffusion(network, params).denoise(z, gamma)
    assert clean.output.hidden.dtype == jnp.bfloat16
    mean, log_p = clean.mean_and_log_p(jnp.zeros((4, 2), int))
    assert mean.dtype == log_p.dtype == clean.prior.dtype == jnp.float32
    exact_mean = make_embedding_diffusion(NETWORK, params).denoise(z, gamma).mean()
    np.testing.assert_allclose(mean, exact_mean, atol=0.05)


# --- a model of it, and the commands

LETTERS = "abcdefg"


@functools.cache
def a_model():
    network = NETWORK.clone(dim=len(LETTERS), blocks=2)
    init = jax.jit(functools.partial(network.init, deterministic=True))
    params = init(jax.random.key(0), *network.example(5))["params"]
    params["head_weight"] = jax.random.normal(jax.random.key(1), params["head_weight"].shape)
    modulation = params["modulation"]["linear"]
    modulation["kernel"] = jax.random.normal(jax.random.key(2), modulation["kernel"].shape)
    process = Absorbing(len(LETTERS)), LogLinear(), Characters(LETTERS)
    return SEDD(network, params, *process, 5, objective=Objective(embedding_dim=2))


@pytest.mark.long
@pytest.mark.devices(8)
def test_a_mesh_draws_and_scores_as_one_device():
    model = a_model()
    spread = over_eight_devices(model)
    tokens = model.sample_tokens(4, seed=3, steps=6)
    np.testing.assert_array_equal(spread.sample_tokens(4, seed=3, steps=6), tokens)
    bound = model.bound(tokens, passes=4).bound
    np.testing.assert_allclose(spread.bound(tokens, passes=4).bound, bound, rtol=1e-5)


def test_the_first_of_four_samples_is_the_first_of_one_and_a_text_is_bounded_by_itself():
    model = a_model()
    four = model.sample(4, steps=6, seed=2)
    assert model.sample(1, steps=6, seed=2) == four[:1]
    assert len(set(four)) == 4
    alone = model.log_likelihood(["abc"], passes=2)
    both = model.log_likelihood(["abc", "defga"], passes=2)
    np.testing.assert_allclose(alone.total[0], both.total[0], rtol=1e-5)


def test_the_states_end_with_the_samples():
    model = a_model()
    states = list(model.stream(num_samples=2, updates=3, steps=6, seed=4))
    assert [state.step for state in states] == [0, 2, 4, 6]
    assert [int(state.calls[0]) for state in states] == [0, 2, 4, 7]
    levels = [state.noise_level for state in states]  # of the variance: more than 0 at every time
    assert 1 > levels[0] > levels[1] > levels[2] > levels[3] == 0
    np.testing.assert_array_equal(states[-1].tokens, model.sample_tokens(2, steps=6, seed=4))


def test_what_a_plaid_model_cannot_do_is_refused(tmp_path):
    model = a_model()
    with says("predictor 'tweedie'", "embeddings", "steps and greedy"):
        model.sample(predictor="tweedie")
    with says("temperature 0.5", "leave it out"):
        model.sample(temperature=0.5)
    with says("cannot keep known tokens", "infill"):
        model.infill("ab[MASK:2]")
    with says("cannot revise a draft"):
        model.revise("abc", steps=4, strength=0.5)
    with says("objective 'plaid'", "load it from its run's"):
        values = dataclasses.replace(model, experiment=rivals.get_config("plaid").to_dict())
        values.save_pretrained(tmp_path / "exported")
    discrete = dataclasses.replace(model, objective=Dwdse())
    with says("predictor 'gaussian' is of PLAID models"):
        discrete.sample(predictor="gaussian")
    params = model.params | {"head_bias": model.params["head_bias"].at[2].set(jnp.nan)}
    with says("not finite by step"):
        model.with_params(params).sample(steps=4)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A tiny run that has sampled while it was trained."""
    workdir = tmp_path_factory.mktemp("runs") / "plaid"
    named = {"objective.name": "plaid", "sample.every": 8, "sample.count": 2, "sample.steps": 4}
    assert train_command(command_line(workdir, **named)) == 0
    return workdir


def test_the_commands_train_score_and_sample(run, capsys):
    assert (run / "samples" / "8.txt").read_text().strip()
    assert eval_command(["likelihood", f"--workdir={run}", "--blocks=4", "--passes=2"]) == 0
    table = capsys.readouterr().out
    assert "PLAID, bound" in table and "prior" in table and "protocol" not in table
    assert sample_command([f"--workdir={run}", "--steps=3", "--format=jsonl", "--greedy"]) == 0
    sample = json.loads(capsys.readouterr().out)
    assert sample["nfe"] == 4 and sample["predictor"] == "gaussian" and sample["greedy"]
    assert sample["text"] == load(run).sample(steps=3, greedy=True)[0]
    assert sample_command([f"--workdir={run}", "--explain"]) == 0
    assert "4 steps and a denoiser: 5 network calls" in capsys.readouterr().out
    assert sample_command([f"--workdir={run}", "--prefix=The "]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "PLAID" in line and "infill" in line
