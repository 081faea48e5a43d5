"""Small languages and what an exact network says of them under noise, in numpy and float64.

A language is a distribution over all sequences, p0 [V] * L. With alpha the share of tokens that
noise has left alone and pi what noise leads to, each token follows

    q_alpha(x | x0) = alpha 1{x = x0} + (1 - alpha) pi(x)

so the noised sequences are D^L states: D = V + 1 with MASK = V for absorbing noise, whose pi is
MASK, and D = V for uniform noise, whose pi is 1 / V. Everything is computed from these definitions;
nothing is imported from the package, which is tested against this.

Also the times of few steps and what they cost (2510.25544).
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import numpy as np

# --- languages, all of whose sequences are possible


def templates(length: int = 6, vocab: int = 3, noise: float = 0.08) -> np.ndarray:
    """As many sequences as tokens, equally likely, no two alike at any position; then a token is
    another one with probability noise. Any choice of them has the same distances."""
    p0 = 0.0
    for first in range(vocab):
        p = np.array(1.0 / vocab)
        for i in range(length):
            at = np.eye(vocab)[(first + i) % vocab]
            p = np.multiply.outer(p, (1.0 - noise) * at + noise * (1.0 - at) / (vocab - 1))
        p0 = p0 + p
    return p0


def markov(strength: float, length: int = 6, vocab: int = 3, seed: int = 4) -> np.ndarray:
    """A chain with random transitions to the power of strength, normalised."""
    rng = np.random.default_rng(seed)
    p0 = rng.dirichlet(np.ones(vocab))
    moves = normalised(rng.dirichlet(np.ones(vocab), size=vocab) ** strength)
    for _ in range(length - 1):
        p0 = p0[..., None] * moves
    return p0


def independent(length: int = 6, vocab: int = 3, seed: int = 0) -> np.ndarray:
    """Independent tokens, each with a random distribution of its own."""
    p0 = np.ones(())
    for p in np.random.default_rng(seed).dirichlet(np.ones(vocab), size=length):
        p0 = p0[..., None] * p
    return p0


LANGUAGES = {
    "templates": templates,
    "markov 1": functools.partial(markov, 1.0),
    "markov 2": functools.partial(markov, 2.0),
    "markov 3": functools.partial(markov, 3.0),
    "independent": independent,
}


def kl(p0: np.ndarray, drawn: np.ndarray) -> float:
    """KL(p0 || drawn) in nats per sequence."""
    p = p0.ravel()
    return float((p * (np.log(p) - np.log(drawn))).sum())


# --- noise


@dataclasses.dataclass(frozen=True)
class LogLinear:
    """alpha = 1 - (1 - eps) t."""

    eps: float = 0.0

    def alpha(self, t: float) -> float:
        return 1.0 - (1.0 - self.eps) * t

    def slope(self, t: float) -> float:
        """d alpha / dt."""
        return -(1.0 - self.eps)


@dataclasses.dataclass(frozen=True)
class Loop:
    """ReMDM-loop's: alpha rises from 0 at t = 1 to alpha_on at t_on, waits until t_off, and rises
    to 1 at 0; linear in between."""

    alpha_on: float = 0.9
    t_on: float = 0.55
    t_off: float = 0.05

    def alpha(self, t: float) -> float:
        ends = [0.0, self.t_off, self.t_on, 1.0]
        return float(np.interp(t, ends, [1.0, self.alpha_on, self.alpha_on, 0.0]))


@dataclasses.dataclass(frozen=True)
class Geometric:
    """alpha = exp(-sigma), sigma = low^(1 - t) high^t."""

    low: float = 1e-5
    high: float = 20.0

    def alpha(self, t: float) -> float:
        return float(np.exp(-(self.low ** (1.0 - t)) * self.high**t))

    def slope(self, t: float) -> float:
        """d alpha / dt."""
        return float(self.alpha(t) * np.log(self.alpha(t)) * np.log(self.high / self.low))


def sequences(states: int, length: int) -> np.ndarray:
    """Every sequence, int [states^L, L], in the order in which an array [states] * L holds them."""
    return np.indices((states,) * length).reshape(length, -1).T


def over_axes(matrix: np.ndarray, p: np.ndarray, axes) -> np.ndarray:
    """p with matrix [new, old] applied along each of the axes."""
    for axis in axes:
        p = np.moveaxis(np.tensordot(matrix, p, axes=(1, axis)), 0, axis)
    return p


@dataclasses.dataclass(frozen=True)
class Model:
    """What an exact network says of a language p0 [V] * L, all of it positive, under a noise.

    error, [D^L, L, D], is added to the log-scores if not None: a wrong network, whose scores the
    bridge turns into distributions of clean tokens. shape is applied to these at every call, and
    shape_last, if not None, at the last instead: see `sharpened` and `greedy`.
    """

    p0: np.ndarray
    graph: str = "absorbing"
    schedule: LogLinear | Geometric | Loop = LogLinear()
    error: np.ndarray | None = None
    shape: Callable = lambda p: p
    shape_last: Callable | None = None

    @property
    def vocab(self) -> int:
        return self.p0.shape[0]

    @property
    def length(self) -> int:
        return self.p0.ndim

    @property
    def dim(self) -> int:
        return self.vocab + (self.graph == "absorbing")

    @property
    def pi(self) -> np.ndarray:
        """What noise leads to, [D]."""
        if self.graph == "uniform":
            return np.full(self.vocab, 1.0 / self.vocab)
        return np.eye(self.dim)[-1]

    @functools.cached_property
    def states(self) -> np.ndarray:
        """Every noised sequence, int [D^L, L]."""
        return sequences(self.dim, self.length)

    @property
    def stride(self) -> np.ndarray:
        """x @ stride is the number of the state x, [L]."""
        return self.dim ** np.arange(self.length)[::-1]

    @functools.cached_property
    def here(self) -> np.ndarray:
        """1 at y = x_i, [D^L, L, D]."""
        return np.eye(self.dim)[self.states]

    def padded(self, p: np.ndarray) -> np.ndarray:
        """Probabilities of clean tokens [..., V] as those of states, [..., D]."""
        return np.pad(p, [(0, 0)] * (p.ndim - 1) + [(0, self.dim - self.vocab)])

    @property
    def start(self) -> np.ndarray:
        """The distribution sampling starts from, pi for every token, [D^L]."""
        return self.pi[self.states].prod(axis=1)

    def transition(self, alpha: float) -> np.ndarray:
        """[D, D]: column y is the distribution of y under noise that leaves a share alpha alone."""
        return alpha * np.eye(self.dim) + (1.0 - alpha) * self.pi[:, None]

    def marginal(self, alpha: float) -> np.ndarray:
        """The distribution of noised data, [D^L]."""
        noised = self.transition(alpha)[:, : self.vocab]
        return over_axes(noised, self.p0, range(self.length)).ravel()

    def clean(self, p: np.ndarray) -> np.ndarray:
        """The part of p [D^L] that lies on clean sequences, [V^L]."""
        return p.reshape((self.dim,) * self.length)[(slice(self.vocab),) * self.length].ravel()

    def likelihood(self, alpha: float) -> np.ndarray:
        """[D, V]: q_alpha(x | x0) up to a factor of x alone; for absorbing noise without alpha."""
        if self.graph == "uniform":
            return self.transition(alpha)
        return np.vstack([np.eye(self.vocab), np.ones(self.vocab)])

    def others(self, alpha: float) -> np.ndarray:
        """f[x, i, y] = P(x0_i = y | the noised tokens of x but for the i-th), [D^L, L, V]."""
        f = np.empty((self.dim,) * self.length + (self.length, self.vocab))
        for i in range(self.length):
            axes = [j for j in range(self.length) if j != i]
            joint = over_axes(self.likelihood(alpha), self.p0, axes)  # axis i is clean
            joint = joint / joint.sum(axis=i, keepdims=True)
            f[..., i, :] = np.expand_dims(np.moveaxis(joint, i, -1), i)
        return f.reshape(-1, self.length, self.vocab)

    def scores(self, alpha: float) -> np.ndarray:
        """s[x, i, y] = q_alpha(x with y at i) / q_alpha(x), [D^L, L, D], and its error."""
        p = self.transition(alpha)[:, : self.vocab]
        token = self.others(alpha) @ p.T  # of the i-th noised token, given the other ones
        s = token / np.take_along_axis(token, self.states[..., None], axis=-1)
        return s if self.error is None else s * np.exp(self.error)

    def bridge(self, s: np.ndarray, alpha: float) -> np.ndarray:
        """P(x0_i = y | x) from scores, [D^L, L, V].

        Absorbing: s_y / sum over clean y of s_y where x_i is MASK, certainly x_i elsewhere.
        Uniform, b = (1 - alpha) / V: f(y) = (s_y / sum s - b) / alpha, with s = 1 at x_i, is the
        distribution given the other tokens, clipped at 0 and normalised, and the posterior is f(y)
        times q_alpha(x_i | y), normalised.
        """
        s = np.where(self.here == 1, 1.0, s)
        if self.graph == "absorbing":
            f = s[..., : self.vocab]
        else:
            f = np.maximum(s / s.sum(-1, keepdims=True) - (1.0 - alpha) / self.vocab, 0.0)
        return normalised(f * self.likelihood(alpha)[self.states])

    def posterior(self, t: float, last: bool = False) -> np.ndarray:
        """P(x0_i = y | x_t = x), [D^L, L, V], as the network says it and shaped."""
        alpha = self.schedule.alpha(t)
        if self.error is None:
            p = normalised(self.others(alpha) * self.likelihood(alpha)[self.states])
        else:
            p = self.bridge(self.scores(alpha), alpha)
        return (self.shape_last if last and self.shape_last else self.shape)(p)

    def rates(self, t: float, normalised_scores: bool = True) -> np.ndarray:
        """Rates of the reverse process by time, from x to y at position i, 0 at y = x_i.

            -alpha' / alpha pi(x_i) s_y,    s_y = sum over x0 of p(x0) q(y | x0) / q(x_i | x0)

        with p the posterior, or the scores themselves without normalised_scores. For absorbing
        noise the former is -alpha' / (1 - alpha) p(y) from MASK, finite at alpha = 0.
        """
        alpha, slope = self.schedule.alpha(t), self.schedule.slope(t)
        if not normalised_scores and alpha > 0.0:
            s = self.scores(alpha)
        elif self.graph == "absorbing":
            p = self.padded(self.posterior(t))
            return -slope / (1.0 - alpha) * p * self.pi[self.states][..., None]
        else:
            q = self.transition(alpha)
            s = (self.posterior(t) / q[self.states]) @ q.T
        rates = -slope / alpha * self.pi[self.states][..., None] * s
        return np.where(self.here == 1, 0.0, rates)


def normalised(p: np.ndarray) -> np.ndarray:
    return p / p.sum(axis=-1, keepdims=True)


def greedy(p: np.ndarray) -> np.ndarray:
    """All of the probability on the likeliest token (the first of equals)."""
    return np.eye(p.shape[-1])[p.argmax(axis=-1)]


def sharpened(p: np.ndarray, temperature: float = 1.0, top_p: float = 1.0) -> np.ndarray:
    """p^(1 / temperature), then the likeliest tokens that hold top_p together, normalised.

    A token is in if those before it, by falling probability, hold less than top_p.
    """
    p = normalised(p ** (1.0 / temperature))
    order = np.argsort(-p, axis=-1, kind="stable")
    ranked = np.take_along_axis(p, order, axis=-1)
    ranked = np.where(np.cumsum(ranked, axis=-1) - ranked < top_p, ranked, 0.0)
    np.put_along_axis(p, order, ranked, axis=-1)
    return normalised(p)


# --- times of few steps, for absorbing noise with alpha = 1 - t


def uniform_times(calls: int) -> np.ndarray:
    """1, 1 - 1 / calls, ..., 1 / calls."""
    return 1.0 - np.arange(calls) / calls


def cosine_times(calls: int) -> np.ndarray:
    """cos(pi / 2 * k / calls) (2406.04329)."""
    return np.cos(0.5 * np.pi * np.arange(calls) / calls)


def masked_entropies(p0: np.ndarray) -> np.ndarray:
    """h[n - 1] = mean entropy, in nats, of a masked token when n are masked and the others seen,
    over all sets of n, n = 1 .. L. Their sum is the entropy of p0."""
    model = Model(p0)
    p = model.posterior(0.5)
    entropy = -(p * np.log(np.maximum(p, 1e-300))).sum(axis=(1, 2))  # 0 at what is seen
    seen = over_axes(model.likelihood(0.5), p0, range(model.length)).ravel()
    masked = (model.states == model.vocab).sum(axis=1)
    total = np.bincount(masked, weights=seen * entropy)[1:]
    n = np.arange(1, model.length + 1)
    return total / (n * [math.comb(model.length, k) for k in n])


def profile(p0: np.ndarray, t) -> np.ndarray:
    """g(t), the mean entropy of a masked token when each of the others is masked with probability
    t: sum over m of Binomial(L - 1, t)(m) h[m]."""
    t, others = np.asarray(t, float)[..., None], np.arange(p0.ndim)
    ways = np.array([math.comb(p0.ndim - 1, m) for m in others])
    return (ways * t**others * (1.0 - t) ** others[::-1]) @ masked_entropies(p0)


def price(p0: np.ndarray, times) -> float:
    """L [sum over k of (t_k - t_k+1) g(t_k) - integral of g], nats per sequence; t_K = 0.

    The KL between the data's and Tweedie's joint distributions of the tokens and of the step that
    reveals each: an upper bound of KL(p0 || Tweedie).
    """
    times = np.asarray(times, float)
    spent = -np.diff(np.append(times, 0.0)) @ profile(p0, times)
    return float(p0.ndim * spent - masked_entropies(p0).sum())


def fitted_times(p0: np.ndarray, calls: int, points: int = 240) -> np.ndarray:
    """The times of the lowest price among multiples of 1 / points, by dynamic programming.

    cost[j] is the least sum of (t_k - t_k+1) g(t_k) from j / points to 0 in so many calls.
    """
    u = np.arange(points + 1) / points
    g = profile(p0, u)
    cost, choices = u * g, []
    for _ in range(calls - 1):
        through = (u[:, None] - u) * g[:, None] + cost  # [from, to]
        through[np.triu_indices(points + 1)] = np.inf
        through[0, 0] = 0.0
        choices.append(through.argmin(axis=1))
        cost = through.min(axis=1)
    at = [points]
    for choice in reversed(choices):
        at.append(choice[at[-1]])
    return u[at]
