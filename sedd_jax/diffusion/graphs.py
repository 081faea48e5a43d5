"""Token graphs: the forward process of one token and everything that follows from its rates.

Lou et al. 2024, section 3.3 and appendix C. Imports jax only. The mathematics is written for ONE
token (a scalar state x, a score vector [D], a scalar sigma) and lifted over [B, L] by `lift`; the
methods marked [B, L] are the lifted ones, which losses, samplers and the bound call.

The columns of the rate matrix sum to zero: d p / d sigma = Q p.
"""

import dataclasses
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from sedd_jax.diffusion.reverse import Law, Reveal, Table
from sedd_jax.diffusion.schedules import Schedule
from sedd_jax.diffusion.scores import Scores, Sigma, Tokens


class ScoreEntropy(NamedTuple):
    """Score entropy per token, before the weight dsigma/dt; float32 [B, L] each.

    normalised is the same for the scores rescaled to the total that the true ones have, and log_z
    the log of how far they are from it, 0 where there are none; None where the graph fixes no total.
    """

    value: jax.Array
    normalised: jax.Array | None
    log_z: jax.Array | None


class Probe(NamedTuple):
    """One noised copy of x0 for the bound, and how to read the score entropy found at it.

    With cost = unit * score entropy, the sum over l of weight * cost is an unbiased estimate of
    the diffusion part. Given sigma, the mean of weight is mean_weight, whatever the other copies:
    so the sum of (weight - mean_weight) * h has mean 0 for every h that this copy had no part in.
    """

    xt: Tokens  # int32 [B, L]
    sigma: Sigma  # float32 [B, 1]
    unit: jax.Array  # float32 [B, 1]
    weight: jax.Array  # float32 [B, L]
    mean_weight: jax.Array  # float32 [B, L]


def lift(kernel, *arguments: jax.Array) -> jax.Array:
    """Apply a per-token kernel over [B, L]; [B, 1] arguments are shared along L."""
    shape = jnp.broadcast_shapes(*(a.shape[:2] for a in arguments))
    spread = (jnp.broadcast_to(a, shape + a.shape[2:]) for a in arguments)
    return jax.vmap(jax.vmap(kernel))(*spread)


class Graph(Protocol):
    """What losses, samplers and the bound ask of a graph."""

    vocab_size: int

    @property
    def dim(self) -> int:
        """Number of states, the mask included where there is one."""

    def perturb(self, key: jax.Array, x0: Tokens, sigma: Sigma) -> Tokens:
        """xt ~ p_sigma(. | x0), int32 [B, L]."""

    def limit(self, key: jax.Array, shape: tuple[int, ...]) -> Tokens:
        """Draws from the distribution that sampling starts from, int32 of that shape."""

    def probe(
        self,
        key: jax.Array,
        x0: Tokens,
        u: jax.Array,
        is_token: jax.Array,
        schedule: Schedule,
        t_min: float,
    ) -> Probe:
        """A noised copy for the bound over [t_min, 1]; u in [0, 1) is its place among the noise
        levels, float32 [B, 1], uniform over all copies."""

    def asked(self, schedule: Schedule, t_min: float) -> float:
        """The mean share of the tokens at which the loss asks for scores, t in [t_min, 1]."""

    def prior(self, sigma: jax.Array) -> jax.Array:
        """KL(p_sigma(. | x0) || p_base), nats per token, the shape of sigma."""

    def log_scale(self, sigma: Sigma) -> jax.Array:
        """What is subtracted from the network's logits to give log-scores, float32 [B, 1]."""

    def score_entropy(self, scores: Scores, sigma: Sigma, xt: Tokens, x0: Tokens) -> ScoreEntropy:
        """Score entropy of every token, [B, L]."""

    def euler(self, scores: Scores, xt: Tokens, step: jax.Array) -> Law:
        """Euler step over step = (t - s) dsigma/dt, [B, 1]."""

    def tweedie(self, scores: Scores, xt: Tokens, delta_sigma: jax.Array) -> Law:
        """Tweedie tau-leaping ("analytic") step over delta_sigma = sigma_t - sigma_s, [B, 1]."""

    def denoise(self, scores: Scores, xt: Tokens, sigma: Sigma) -> Law:
        """The jump from sigma to clean tokens that ends sampling."""


@dataclasses.dataclass(frozen=True)
class _Kernels:
    """The per-token kernels that both graphs share, given their rates and transitions."""

    vocab_size: int

    def __post_init__(self):
        if self.vocab_size < 2:
            raise ValueError(f"vocab_size {self.vocab_size} is below 2; a graph needs two tokens")

    def _at(self, x: jax.Array) -> jax.Array:
        return jax.nn.one_hot(x, self.dim, dtype=jnp.float32)

    def reverse_rate(self, score: jax.Array, x: jax.Array) -> jax.Array:
        """Rates of the reverse process out of x, [D]; the diagonal is minus the sum of the rest."""
        away = jnp.where(self._at(x) == 1.0, 0.0, self.transp_rate(x) * score)
        return away - self._at(x) * away.sum()

    def euler_probabilities(self, log_score, x, step) -> jax.Array:
        """One Euler step of the reverse process from x, [D]; equation (18) of the paper."""
        return self._at(x) + step * self.reverse_rate(jnp.exp(log_score), x)

    def tweedie_probabilities(self, log_score, x, delta_sigma) -> jax.Array:
        """Tweedie tau-leaping from x, [D]: exact for one token with the exact score (Theorem 4.2).

        p_s(y) = [exp(-delta_sigma Q) score](y) * exp(delta_sigma Q)(x, y)
        """
        staggered = self.staggered_score(jnp.exp(log_score), delta_sigma)
        return staggered * self.transp_transition(x, delta_sigma)


@dataclasses.dataclass(frozen=True)
class Absorbing(_Kernels):
    """Every token falls into MASK at rate 1 and stays there; MASK is the state vocab_size."""

    scale_by_sigma: bool = True

    @property
    def dim(self) -> int:
        return self.vocab_size + 1

    @property
    def mask(self) -> int:
        return self.vocab_size

    def rate(self, x: jax.Array) -> jax.Array:
        """Forward rates out of x, the x-th column of Q, [D]."""
        return self._at(self.mask) - self._at(x)

    def transp_rate(self, x: jax.Array) -> jax.Array:
        """Forward rates into x, the x-th row of Q, [D]."""
        return jnp.where(x == self.mask, 1.0, 0.0) - self._at(x)

    def transition(self, x: jax.Array, sigma: jax.Array) -> jax.Array:
        """p_sigma(. | x), [D]."""
        return jnp.exp(-sigma) * self._at(x) - jnp.expm1(-sigma) * self._at(self.mask)

    def transp_transition(self, x: jax.Array, sigma: jax.Array) -> jax.Array:
        """p_sigma(x | y) for every y, [D]."""
        return jnp.exp(-sigma) * self._at(x) - jnp.where(x == self.mask, jnp.expm1(-sigma), 0.0)

    def staggered_score(self, score: jax.Array, delta_sigma: jax.Array) -> jax.Array:
        """p_{sigma - delta_sigma}(y) / p_sigma(x) from score = p_sigma(y) / p_sigma(x), [D]."""
        from_mask = jnp.expm1(delta_sigma) * score[: self.vocab_size].sum()
        return jnp.where(
            self._at(self.mask) == 1.0, score - from_mask, jnp.exp(delta_sigma) * score
        )

    def perturb(self, key: jax.Array, x0: Tokens, sigma: Sigma) -> Tokens:
        """xt ~ p_sigma(. | x0), int32 [B, L]."""
        moves = jax.random.bernoulli(key, -jnp.expm1(-sigma), x0.shape, mode="high")
        return jnp.where(moves, self.mask, x0)

    def limit(self, key: jax.Array, shape: tuple[int, ...]) -> Tokens:
        """All MASK, int32."""
        del key
        return jnp.full(shape, self.mask, jnp.int32)

    def probe(
        self,
        key: jax.Array,
        x0: Tokens,
        u: jax.Array,
        is_token: jax.Array,
        schedule: Schedule,
        t_min: float,
    ) -> Probe:
        """At least one token masked, and the mean cost over the masked ones: no weight 1 / t.

        Over the mask probability p every schedule has dsigma/dt / expm1(sigma) dt = dp / p. And a
        set of n masked tokens has p^n (1 - p)^(L - n) = (L p / n) times its chance when a uniform
        token is masked for certain and each of the others with probability p. So

            diffusion = L * integral over p of E[mean cost over the masked tokens]

        in which the number of masked tokens is no longer a factor. p is the square of a uniform
        number: where few tokens are masked their mean is noisy, and more copies are spent.
        """
        key_sure, key_moves = jax.random.split(key)
        # Ties of these 23-bit numbers are too rare to matter.
        place = jnp.where(is_token, jax.random.uniform(key_sure, x0.shape), -1.0)
        sure = jax.nn.one_hot(place.argmax(axis=-1), x0.shape[-1], dtype=bool)
        low, high = (jnp.sqrt(-jnp.expm1(-schedule.sigma(t))) for t in (t_min, 1.0))
        root = low + u * (high - low)
        p = root**2
        moves = jax.random.bernoulli(key_moves, p, x0.shape, mode="high")
        is_masked = is_token & (moves | sure)
        sigma = jnp.minimum(-jnp.log1p(-p), schedule.sigma(1.0))  # p may round to 1
        slope = 2.0 * root * (high - low)  # dp / du
        length = is_token.sum(axis=-1, keepdims=True)
        return Probe(
            xt=jnp.where(is_masked, self.mask, x0),
            sigma=sigma,
            unit=jnp.expm1(sigma),
            weight=slope * length / is_masked.sum(axis=-1, keepdims=True) * is_masked,
            mean_weight=slope * is_token,
        )

    def asked(self, schedule: Schedule, t_min: float) -> float:
        """At the masked tokens, 1 - alpha of them."""
        t = t_min + (1.0 - t_min) * (jnp.arange(1000) + 0.5) / 1000
        return float(-jnp.expm1(-schedule.sigma(t)).mean())

    def prior(self, sigma: jax.Array) -> jax.Array:
        """alpha log V nats per token: p_base spreads the mass alpha = exp(-sigma) that is not yet
        masked evenly over the clean tokens."""
        return jnp.exp(-sigma) * jnp.log(self.vocab_size)

    def log_scale(self, sigma: Sigma) -> jax.Array:
        """log expm1(sigma) + log V with scale_by_sigma, which makes zero logits a fair guess."""
        if not self.scale_by_sigma:
            return jnp.zeros_like(sigma)
        return jnp.log(jnp.expm1(sigma)) + jnp.log(float(self.vocab_size))

    def score_entropy(self, scores: Scores, sigma: Sigma, xt: Tokens, x0: Tokens) -> ScoreEntropy:
        """(Z - 1 - log q_x0) / expm1(sigma) at masked tokens, 0 elsewhere, [B, L].

        q = score * expm1(sigma) is the conditional law of the clean token and Z its sum, which
        is 1 for the true score.
        """
        is_masked = xt == self.mask
        log_total, log_pick = scores.total_and_pick(x0, is_masked)
        odds = jnp.expm1(sigma)  # p(mask | x0) / p(x0 | x0)
        log_z = log_total + jnp.log(odds)
        log_q = log_pick + jnp.log(odds)
        # expm1 keeps the penalty's digits near Z = 1; its gradient, computed as (Z - 1) + 1, loses
        # those of a small Z.
        z_minus_1 = jnp.where(jnp.abs(log_z) < 0.5, jnp.expm1(log_z), jnp.exp(log_z) - 1.0)
        return ScoreEntropy(
            value=jnp.where(is_masked, (z_minus_1 - log_q) / odds, 0.0),
            normalised=jnp.where(is_masked, (log_z - log_q) / odds, 0.0),
            log_z=jnp.where(is_masked, log_z, 0.0),
        )

    def _reveal(self, scores, xt, log_chance, kernel, *noise) -> Law:
        def probabilities():
            return lift(kernel, scores.log_score(), xt, *noise)

        return Reveal(scores, xt, self.mask, log_chance, probabilities)

    def euler(self, scores: Scores, xt: Tokens, step: jax.Array) -> Law:
        """Reveal with probability step * sum of scores."""
        return self._reveal(scores, xt, jnp.log(step), self.euler_probabilities, step)

    def tweedie(self, scores: Scores, xt: Tokens, delta_sigma: jax.Array) -> Law:
        """Reveal with probability expm1(delta_sigma) * sum of scores."""
        log_chance = jnp.log(jnp.expm1(delta_sigma))
        return self._reveal(scores, xt, log_chance, self.tweedie_probabilities, delta_sigma)

    def denoise(self, scores: Scores, xt: Tokens, sigma: Sigma) -> Law:
        """Reveal every token that is still masked."""

        def clean(log_score, x, sigma):
            return self.tweedie_probabilities(log_score, x, sigma)[: self.vocab_size]

        return self._reveal(scores, xt, None, clean, sigma)


@dataclasses.dataclass(frozen=True)
class Uniform(_Kernels):
    """Every token jumps to any token at rate 1 / V: alpha 1{x = x0} + (1 - alpha) / V."""

    @property
    def dim(self) -> int:
        return self.vocab_size

    def rate(self, x: jax.Array) -> jax.Array:
        """Forward rates out of x, the x-th column of Q, [D]."""
        return 1.0 / self.dim - self._at(x)

    def transp_rate(self, x: jax.Array) -> jax.Array:
        """Forward rates into x, the x-th row of Q, [D]; Q is symmetric."""
        return self.rate(x)

    def transition(self, x: jax.Array, sigma: jax.Array) -> jax.Array:
        """p_sigma(. | x), [D]."""
        return jnp.exp(-sigma) * self._at(x) - jnp.expm1(-sigma) / self.dim

    def transp_transition(self, x: jax.Array, sigma: jax.Array) -> jax.Array:
        """p_sigma(x | y) for every y, [D]; the transition is symmetric."""
        return self.transition(x, sigma)

    def staggered_score(self, score: jax.Array, delta_sigma: jax.Array) -> jax.Array:
        """p_{sigma - delta_sigma}(y) / p_sigma(x) from score = p_sigma(y) / p_sigma(x), [D]."""
        return score + jnp.expm1(delta_sigma) * (score - score.mean())

    def perturb(self, key: jax.Array, x0: Tokens, sigma: Sigma) -> Tokens:
        """xt ~ p_sigma(. | x0), int32 [B, L]."""
        key_move, key_token = jax.random.split(key)
        moves = jax.random.bernoulli(key_move, -jnp.expm1(-sigma), x0.shape, mode="high")
        return jnp.where(moves, self.limit(key_token, x0.shape), x0)

    def limit(self, key: jax.Array, shape: tuple[int, ...]) -> Tokens:
        """Uniform tokens, int32."""
        return jax.random.randint(key, shape, 0, self.vocab_size, jnp.int32)

    def probe(
        self,
        key: jax.Array,
        x0: Tokens,
        u: jax.Array,
        is_token: jax.Array,
        schedule: Schedule,
        t_min: float,
    ) -> Probe:
        """Noise at the time t_min + (1 - t_min) u."""
        t = t_min + (1.0 - t_min) * u
        sigma = schedule.sigma(t)
        weight = is_token.astype(jnp.float32)
        unit = (1.0 - t_min) * schedule.dsigma_dt(t)
        return Probe(self.perturb(key, x0, sigma), sigma, unit, weight, mean_weight=weight)

    def asked(self, schedule: Schedule, t_min: float) -> float:
        """At all of them."""
        return 1.0

    def prior(self, sigma: jax.Array) -> jax.Array:
        """KL from alpha 1{x = x0} + (1 - alpha) / V to the uniform law, nats per token."""
        alpha, others = jnp.exp(-sigma), self.vocab_size - 1
        stayed = (1.0 + others * alpha) / self.vocab_size * jnp.log1p(others * alpha)
        # log1p(-1) is -inf at sigma = 0, where the weight is 0.
        moved = jax.scipy.special.xlog1py(-jnp.expm1(-sigma), -alpha)
        return stayed + others / self.vocab_size * moved

    def log_scale(self, sigma: Sigma) -> jax.Array:
        """0: the logits are the log-scores."""
        return jnp.zeros_like(sigma)

    def score_entropy(self, scores: Scores, sigma: Sigma, xt: Tokens, x0: Tokens) -> ScoreEntropy:
        """Score entropy of every token, [B, L].

        The stable form: with odds = expm1(sigma), every ratio of probabilities is written through
        odds / V and none as a difference of nearly equal numbers.
        """
        vocab = self.vocab_size
        odds = jnp.expm1(sigma)
        log_total, log_pick = scores.total_and_pick(x0, None)
        positive = jnp.exp(log_total) / vocab
        mean_log = scores.log_sum() / vocab

        ratio = odds / (odds + vocab)  # p(y | x0) / p(x0 | x0), y != x0
        log_ratio = jnp.log(odds) - jnp.log(odds + vocab)
        constant_stayed = (vocab - 1) / vocab * ratio * (log_ratio - 1.0)
        stayed = positive - ratio * mean_log + constant_stayed

        gain = 1.0 + vocab / odds  # p(x0 | x0) / p(xt | x0), xt != x0
        constant_moved = (gain * (jnp.log1p(vocab / odds) - 1.0) - (vocab - 2)) / vocab
        moved = positive - mean_log - log_pick / odds + constant_moved
        return ScoreEntropy(jnp.where(xt == x0, stayed, moved), normalised=None, log_z=None)

    def _table(self, kernel, scores, xt, *noise) -> Law:
        return Table(lambda: lift(kernel, scores.log_score(), xt, *noise))

    def euler(self, scores: Scores, xt: Tokens, step: jax.Array) -> Law:
        """The table of Euler probabilities."""
        return self._table(self.euler_probabilities, scores, xt, step)

    def tweedie(self, scores: Scores, xt: Tokens, delta_sigma: jax.Array) -> Law:
        """The table of Tweedie probabilities."""
        return self._table(self.tweedie_probabilities, scores, xt, delta_sigma)

    def denoise(self, scores: Scores, xt: Tokens, sigma: Sigma) -> Law:
        """Tweedie over the whole of sigma."""
        return self.tweedie(scores, xt, sigma)


GRAPHS = {"absorbing": Absorbing, "uniform": Uniform}
