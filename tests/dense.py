"""The D x D definitions that the package's closed forms are tested against.

Rate matrices, their exponentials and the laws of a few tokens, by enumeration and in float64. A
new graph is a line in RATES: every property test then runs on it. The columns of Q sum to zero.
"""

import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
import scipy.stats

from sedd_jax.diffusion.graphs import GRAPHS, Graph
from sedd_jax.diffusion.scores import DenseScores, ScoreFn

# A chi-square test with a fixed seed passes above this p-value.
P_VALUE = 1e-3


def absorbing_rate(dim: int) -> np.ndarray:
    """Every state falls into the last one at rate 1."""
    rate = -np.eye(dim)
    rate[-1] += 1.0
    return rate


def uniform_rate(dim: int) -> np.ndarray:
    """Every state jumps to each state at rate 1 / D."""
    return np.full((dim, dim), 1.0 / dim) - np.eye(dim)


RATES = {"absorbing": absorbing_rate, "uniform": uniform_rate}


def rate_matrix(graph: Graph) -> np.ndarray:
    """Q [D, D]: Q[y, x] is the rate from x to y."""
    (name,) = (name for name, kind in GRAPHS.items() if type(graph) is kind)
    return RATES[name](graph.dim)


def transition(graph: Graph, sigma: float) -> np.ndarray:
    """[D, D]: column x is p_sigma(. | x)."""
    return scipy.linalg.expm(sigma * rate_matrix(graph))


def data_law(vocab_size: int, length: int, seed: int = 0) -> np.ndarray:
    """A data distribution p0 over all sequences, [V] * L, every one of them likely enough."""
    weights = np.random.default_rng(seed).gamma(1.0, size=(vocab_size,) * length) + 0.1
    return weights / weights.sum()


def sequences(states: int, length: int) -> np.ndarray:
    """Every sequence, int32 [states^L, L], in the order in which p0.ravel() holds them."""
    return np.array(list(itertools.product(range(states), repeat=length)), np.int32)


def over_states(graph: Graph, p0: np.ndarray) -> np.ndarray:
    """p0 over all states, [D] * L: the mask has probability 0."""
    return np.pad(p0, [(0, graph.dim - graph.vocab_size)] * p0.ndim)


def marginal(graph: Graph, p0: np.ndarray, sigma: float) -> np.ndarray:
    """p_sigma over all noised sequences, [D] * L."""
    p, moved = over_states(graph, p0), transition(graph, sigma)
    for axis in range(p.ndim):
        p = np.moveaxis(np.tensordot(moved, p, axes=(1, axis)), 0, axis)
    return p


def given(graph: Graph, x0: np.ndarray, sigma: float) -> np.ndarray:
    """p_sigma(. | x0) over all noised sequences, [D^L], for one clean sequence."""
    moved = transition(graph, sigma)
    p = np.ones(1)
    for token in x0:
        p = np.outer(p, moved[:, token]).ravel()
    return p


def bayes(graph: Graph, p0: np.ndarray, sigma: float, delta_sigma: float) -> np.ndarray:
    """[D, D] for one token: column x is the law of x_s given x_t = x, delta_sigma before sigma."""
    earlier = marginal(graph, p0, sigma - delta_sigma)
    return earlier[:, None] * transition(graph, delta_sigma).T / marginal(graph, p0, sigma)


def score_entropy(rates_into, likelihood, score, x) -> float:
    """Definition 3.1 at state x, with the denoising ratios and the weights Q(x, y).

    rates_into [D] is the x-th row of Q, likelihood [D] is p_sigma(. | x0), score [D] the model's.
    """

    def k(a):
        return a * (np.log(a) - 1.0) if a > 0 else 0.0

    total = 0.0
    for y in np.flatnonzero(rates_into):
        if y != x:
            ratio = likelihood[y] / likelihood[x]
            cost = score[y] - ratio * np.log(score[y]) + k(ratio)
            total += rates_into[y] * cost
    return total


def projectors(graph: Graph) -> list[tuple[float, np.ndarray]]:
    """(eigenvalue, projector) of Q, which sum to exp(sigma Q) = sum exp(sigma value) projector."""
    values, vectors = np.linalg.eig(rate_matrix(graph))
    inverse = np.linalg.inv(vectors)
    found = {}
    for i, value in enumerate(np.round(values.real, 9) + 0.0):
        found[value] = found.get(value, 0.0) + np.outer(vectors[:, i], inverse[i]).real
    return [(float(v), np.round(p, 12)) for v, p in found.items()]


def exact_score_fn(
    graph: Graph, p0: np.ndarray, *, wrong_by: float = 0.0, seed: int = 0, one_sigma: bool = False
) -> ScoreFn:
    """The marginal ratios p_sigma(x with y at l) / p_sigma(x), by enumeration, under jit too.

    wrong_by adds that many nats of Gaussian error to every log-score, fixed for each sequence.
    one_sigma says that all sequences of a batch have one sigma, which is much faster.
    """
    length, dim = p0.ndim, graph.dim
    start = jnp.asarray(over_states(graph, p0), jnp.float32)
    spectrum = [(value, jnp.asarray(p, jnp.float32)) for value, p in projectors(graph)]
    stride = dim ** np.arange(length)[::-1]
    error = wrong_by * jax.random.normal(jax.random.key(seed), (dim**length, length, dim))

    def log_marginal(sigma):
        # Each form keeps float32's digits on its side of 1.
        small = jnp.eye(dim) + sum(jnp.expm1(value * sigma) * p for value, p in spectrum)
        large = sum(jnp.exp(value * sigma) * p for value, p in spectrum)
        moved = jnp.where(sigma < 1.0, small, large)
        p = start
        for axis in range(length):
            p = jnp.moveaxis(jnp.tensordot(moved, p, axes=(1, axis)), 0, axis)
        return jnp.log(p).ravel()

    def table(x, sigma):
        here = (x * stride).sum()
        there = here + (jnp.arange(dim) - x[:, None]) * stride[:, None]  # [L, D]
        log_p = log_marginal(sigma[0])
        return log_p[there] - log_p[here] + error[here]

    def score_fn(xt, sigma):
        if one_sigma:
            every = jnp.asarray(sequences(dim, length))
            rows = jax.vmap(table, (0, None))(every, sigma[0])
            return DenseScores(rows[(xt * stride).sum(axis=-1)], xt, graph.vocab_size)
        return DenseScores(jax.vmap(table)(xt, sigma), xt, graph.vocab_size)

    return score_fn


def time_nodes(t_min: float) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights of a quadrature over [t_min, 1], finer towards t_min."""
    points, weights = np.polynomial.legendre.leggauss(24)
    edges = np.geomspace(t_min, 1.0, 7)
    half = np.diff(edges)[:, None] / 2
    nodes = edges[:-1, None] + half * (points + 1.0)
    return nodes.ravel(), (half * weights).ravel()


def expected_over_noise(
    graph: Graph, schedule, x0: np.ndarray, value: Callable, times
) -> np.ndarray:
    """E[value(t, xt)] over xt ~ p_sigma(t)(. | x0) for each time, by enumeration.

    value maps t [B, 1] and xt [B, L] to an array [B, ...]; it is called once, on everything.
    """
    noised = sequences(graph.dim, len(x0))
    t = np.repeat(times, len(noised))[:, None].astype(np.float32)
    values = np.asarray(value(t, np.tile(noised, (len(times), 1))), np.float64)
    sigma = np.asarray(schedule.sigma(np.asarray(times, np.float32)), np.float64)
    weights = np.stack([given(graph, x0, s) for s in sigma])
    values = values.reshape(*weights.shape, *values.shape[1:])
    # What cannot happen may cost an infinity.
    values[weights == 0] = 0.0
    return np.einsum("tn,tn...->t...", weights, values)


def integral(graph: Graph, schedule, x0: np.ndarray, value: Callable, t_min: float):
    """The integral of E[value(t, xt)] over [t_min, 1], one number for each that value gives."""
    nodes, weights = time_nodes(t_min)
    return weights @ expected_over_noise(graph, schedule, x0, value, nodes)


def p_value(counts: np.ndarray, probabilities: np.ndarray) -> float:
    """Chi-square p-value of counts; cells that expect fewer than 5 are pooled."""
    counts, probabilities = np.ravel(counts), np.ravel(probabilities).astype(np.float64)
    expected = probabilities / probabilities.sum() * counts.sum()
    if counts[expected == 0].any():
        return 0.0
    small = expected < 5
    if small.any():
        counts = np.append(counts[~small], counts[small].sum())
        expected = np.append(expected[~small], expected[small].sum())
    counts, expected = counts[expected > 0], expected[expected > 0]
    if len(counts) == 1:
        return 1.0
    return float(scipy.stats.chisquare(counts, expected).pvalue)


def count(tokens: np.ndarray, states: int) -> np.ndarray:
    """How often each sequence occurs among tokens [N, L], in the order of `sequences`."""
    tokens = np.asarray(tokens)
    place = tokens @ states ** np.arange(tokens.shape[1])[::-1]
    return np.bincount(place, minlength=states ** tokens.shape[1])
