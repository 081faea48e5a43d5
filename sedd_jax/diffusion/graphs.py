"""The two token graphs of the paper: absorbing noise and uniform noise. Imports jax only.

A new graph is a subclass of `Graph` and a line in GRAPHS.
"""

import dataclasses

import jax
import jax.numpy as jnp

from sedd_jax.diffusion.graph import Graph, GraphByTables, Probe, ScoreEntropy, lift
from sedd_jax.diffusion.reverse import Distribution, Reveal, Switch
from sedd_jax.diffusion.schedules import Schedule
from sedd_jax.diffusion.scores import (
    DenseScores,
    NormalisedScores,
    Scores,
    Sigma,
    Tokens,
    Weights,
)


def _k(a: jax.Array, log_a: jax.Array) -> jax.Array:
    """K(a) = a (log a - 1) of Definition 3.1, which makes the smallest score entropy 0."""
    return a * (log_a - 1.0)


@dataclasses.dataclass(frozen=True)
class Absorbing(Graph):
    """Every token falls into MASK, the state vocab_size, at rate 1 and never leaves it."""

    scale_by_sigma: bool = True

    @property
    def dim(self) -> int:
        return self.vocab_size + 1

    @property
    def mask(self) -> int:
        return self.vocab_size

    def transp_rate(self, x: jax.Array) -> jax.Array:
        return jnp.where(x == self.mask, 1.0, 0.0) - self._at(x)

    def transp_transition(self, x: jax.Array, sigma: jax.Array) -> jax.Array:
        return jnp.exp(-sigma) * self._at(x) - jnp.where(x == self.mask, jnp.expm1(-sigma), 0.0)

    def staggered_score(self, score: jax.Array, delta_sigma: jax.Array) -> jax.Array:
        from_mask = jnp.expm1(delta_sigma) * score[: self.vocab_size].sum()
        is_mask = self._at(self.mask) == 1.0
        return jnp.where(is_mask, score - from_mask, jnp.exp(delta_sigma) * score)

    def perturb(self, key: jax.Array, x0: Tokens, sigma: Sigma) -> Tokens:
        moves = jax.random.bernoulli(key, -jnp.expm1(-sigma), x0.shape, mode="high")
        return jnp.where(moves, self.mask, x0)

    def limit(self, key: jax.Array, shape: tuple[int, ...]) -> Tokens:
        """All MASK, int32."""
        del key
        return jnp.full(shape, self.mask, jnp.int32)

    def prior(self, sigma: jax.Array) -> jax.Array:
        """alpha log V nats per token: p_base spreads the mass alpha = exp(-sigma) that is not yet
        masked evenly over the clean tokens."""
        return jnp.exp(-sigma) * jnp.log(self.vocab_size)

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
        key_certain, key_moves = jax.random.split(key)
        # Ties of these 23-bit numbers are too rare to matter.
        rank = jnp.where(is_token, jax.random.uniform(key_certain, x0.shape), -1.0)
        certain = jax.nn.one_hot(rank.argmax(axis=-1), x0.shape[-1], dtype=bool)
        low, high = (jnp.sqrt(-jnp.expm1(-schedule.sigma(t))) for t in (t_min, 1.0))
        root = low + u * (high - low)
        p = root**2
        dp_du = 2.0 * root * (high - low)
        moves = jax.random.bernoulli(key_moves, p, x0.shape, mode="high")
        is_masked = is_token & (moves | certain)
        sigma = jnp.minimum(-jnp.log1p(-p), schedule.sigma(1.0))  # p may round to 1
        length = is_token.sum(axis=-1, keepdims=True)
        return Probe(
            xt=jnp.where(is_masked, self.mask, x0),
            sigma=sigma,
            scale=jnp.expm1(sigma),
            weight=dp_du * length / is_masked.sum(axis=-1, keepdims=True) * is_masked,
            mean_weight=dp_du * is_token,
        )

    def log_scale(self, sigma: Sigma) -> jax.Array:
        """log expm1(sigma) + log V with scale_by_sigma, which makes zero logits a fair guess."""
        if not self.scale_by_sigma:
            return jnp.zeros_like(sigma)
        return jnp.log(jnp.expm1(sigma)) + jnp.log(float(self.vocab_size))

    def score_entropy(self, scores: Scores, sigma: Sigma, xt: Tokens, x0: Tokens) -> ScoreEntropy:
        """Score entropy at masked tokens, 0 elsewhere, [B, L].

        Q[mask, y] = 1 for the clean y, and of their ratios only that of y = x0 is not 0:

            sum over y of s_y - ratio log s_x0 + K(ratio),    ratio = p(x0 | x0) / p(mask | x0)

        With q = s / ratio, the conditional distribution of the clean token, and its sum Z, which
        is 1 for the true score, that is ratio (Z - 1 - log q_x0), where nothing large cancels.
        """
        is_masked = xt == self.mask
        log_total, log_score_x0 = scores.total_and_pick(x0, is_masked)
        odds = jnp.expm1(sigma)  # 1 / ratio
        log_z = log_total + jnp.log(odds)
        log_q_x0 = log_score_x0 + jnp.log(odds)
        # expm1 keeps the digits of Z - 1 near Z = 1; its gradient, computed as (Z - 1) + 1, loses
        # those of a small Z.
        z_minus_1 = jnp.where(jnp.abs(log_z) < 0.5, jnp.expm1(log_z), jnp.exp(log_z) - 1.0)
        return ScoreEntropy(
            value=jnp.where(is_masked, (z_minus_1 - log_q_x0) / odds, 0.0),
            normalised=jnp.where(is_masked, (log_z - log_q_x0) / odds, 0.0),  # of q / Z
            log_z=jnp.where(is_masked, log_z, 0.0),
        )

    def squared_error(self, scores: Scores, sigma: Sigma, xt: Tokens, x0: Tokens) -> jax.Array:
        """sum over clean y of s_y^2 - 2 ratio s_x0 + ratio^2 at masked tokens, 0 elsewhere."""
        is_masked = xt == self.mask
        _, log_score_x0 = scores.total_and_pick(x0, is_masked)
        ratio = 1.0 / jnp.expm1(sigma)  # p(x0 | x0) / p(mask | x0)
        squares = jnp.exp(scores.total_of_squares(is_masked))
        error = squares - 2.0 * ratio * jnp.exp(log_score_x0) + ratio**2
        return jnp.where(is_masked, error, 0.0)

    def posterior_kl(self, scores, xt, x0, sigma_t, sigma_s) -> jax.Array:
        """A masked token is revealed with one chance in both: that times the cross entropy."""
        is_masked = xt == self.mask
        log_total, log_score_x0 = scores.total_and_pick(x0, is_masked)
        reveal = _reveal_chance(sigma_t, sigma_s)
        return jnp.where(is_masked, reveal * (log_total - log_score_x0), 0.0)

    def score_divergence(self, scores, others, sigma, xt) -> jax.Array:
        """KL of the clean token's distributions / expm1(sigma) at masked tokens, 0 elsewhere: both
        totals are known, and the scores are rescaled to them."""

        def token(log_s, log_r, x, sigma):
            log_p, log_q = (jax.nn.log_softmax(row[: self.vocab_size]) for row in (log_s, log_r))
            kl = jnp.sum(jnp.exp(log_p) * (log_p - log_q), where=log_p > -jnp.inf)
            return jnp.where(x == self.mask, kl / jnp.expm1(sigma), 0.0)

        return lift(token, scores.log_score(), others.log_score(), xt, sigma)

    def divergence_from_uniform(self, scores, sigma, xt) -> jax.Array:
        """(log V - entropy of the clean token) / expm1(sigma) at masked tokens."""
        is_masked = xt == self.mask
        _, entropy = scores.peak_and_entropy(is_masked)
        return jnp.where(is_masked, (jnp.log(self.vocab_size) - entropy) / jnp.expm1(sigma), 0.0)

    def scores_of_clean(self, logits: Scores, xt: Tokens, sigma: Sigma) -> Scores:
        """p(y) / expm1(sigma) of a masked token (RADD, 2406.03736): their sum is known."""
        return NormalisedScores(logits, -jnp.log(jnp.expm1(sigma)), xt)

    # A reverse step from MASK has, with the closed forms above, the probabilities
    #     Euler     p(y) = step * 1 * score_y
    #     Tweedie   p(y) = exp(delta_sigma) score_y * (1 - exp(-delta_sigma))
    # of clean tokens y: one factor times the score. `Reveal` draws from them without the table.

    def clean_probabilities(self, score: jax.Array, x: jax.Array, sigma: jax.Array) -> jax.Array:
        del sigma
        score = score[: self.vocab_size]
        here = self._at(x)[: self.vocab_size]
        return jnp.where(x == self.mask, score / score.sum(), here)

    def euler(self, scores: Scores, xt: Tokens, step: jax.Array) -> Distribution:
        table = super().euler(scores, xt, step)
        return Reveal(table, scores, xt, self.mask, log_factor=jnp.log(step))

    def tweedie(self, scores: Scores, xt: Tokens, delta_sigma: jax.Array) -> Distribution:
        table = super().tweedie(scores, xt, delta_sigma)
        log_factor = jnp.log(jnp.expm1(delta_sigma))
        return Reveal(table, scores, xt, self.mask, log_factor)

    def ancestral(self, scores, xt, sigma_t, sigma_s, *, kappa=1.0, shape=None) -> Distribution:
        reveal = kappa * _reveal_chance(sigma_t, sigma_s) + (1.0 - kappa) * jnp.exp(-sigma_s)
        remask = (1.0 - kappa) * -jnp.expm1(-sigma_s)
        return Switch(scores, xt, self.mask, reveal, remask, Weights.of(shape))

    def denoise(self, scores, xt, sigma, *, shape=None) -> Distribution:
        table = super().denoise(scores, xt, sigma)
        return Reveal(table, scores, xt, self.mask, None, shape)  # all that is masked


def _reveal_chance(sigma_t: jax.Array, sigma_s: jax.Array) -> jax.Array:
    """(alpha_s - alpha_t) / (1 - alpha_t), where no nearly equal numbers are subtracted."""
    return jnp.exp(-sigma_t) * jnp.expm1(sigma_t - sigma_s) / -jnp.expm1(-sigma_t)


@dataclasses.dataclass(frozen=True)
class Uniform(GraphByTables):
    """Every token jumps to any token at rate 1 / V: alpha 1{x = x0} + (1 - alpha) / V."""

    @property
    def dim(self) -> int:
        return self.vocab_size

    def transp_rate(self, x: jax.Array) -> jax.Array:
        return 1.0 / self.dim - self._at(x)

    def transp_transition(self, x: jax.Array, sigma: jax.Array) -> jax.Array:
        return jnp.exp(-sigma) * self._at(x) - jnp.expm1(-sigma) / self.dim

    def staggered_score(self, score: jax.Array, delta_sigma: jax.Array) -> jax.Array:
        return score + jnp.expm1(delta_sigma) * (score - score.mean())

    def clean_probabilities(self, score: jax.Array, x: jax.Array, sigma: jax.Array) -> jax.Array:
        return self.with_own(self.given_others(score, sigma), x, sigma)

    def given_others(self, score: jax.Array, sigma: jax.Array) -> jax.Array:
        """f, the clean token's distribution given the other noised tokens alone, [V]: the share of
        y among the scores is f(y) under more noise, alpha f(y) + (1 - alpha) / V."""
        uniform = -jnp.expm1(-sigma) / self.vocab_size
        f = jnp.maximum(score / score.sum() - uniform, 0.0)
        total = f.sum()  # 0 where so much is noise that float32 sees nothing else
        return jnp.where(total == 0.0, 1.0 / self.vocab_size, f / total)

    def with_own(self, f: jax.Array, x: jax.Array, sigma: jax.Array) -> jax.Array:
        """The same given the noised token x too, from f [V]: in proportion to f(y) p(x | y)."""
        p = f * self._noised(self._at(x), sigma)
        return p / p.sum()

    def ancestral_probabilities(self, p, x, sigma_t, sigma_s, kappa) -> jax.Array:
        weight = p / self._noised(self._at(x), sigma_t)
        back = self._noised(weight, sigma_s) * self._noised(self._at(x), sigma_t - sigma_s)
        return kappa * back + (1.0 - kappa) * self._noised(p, sigma_s)

    def _noised(self, p: jax.Array, sigma: jax.Array) -> jax.Array:
        """p [V] after noise sigma; the transitions are symmetric."""
        return jnp.exp(-sigma) * p - jnp.expm1(-sigma) / self.vocab_size * p.sum()

    def perturb(self, key: jax.Array, x0: Tokens, sigma: Sigma) -> Tokens:
        key_move, key_token = jax.random.split(key)
        moves = jax.random.bernoulli(key_move, -jnp.expm1(-sigma), x0.shape, mode="high")
        return jnp.where(moves, self.limit(key_token, x0.shape), x0)

    def limit(self, key: jax.Array, shape: tuple[int, ...]) -> Tokens:
        """Uniform tokens, int32."""
        return jax.random.randint(key, shape, 0, self.vocab_size, jnp.int32)

    def prior(self, sigma: jax.Array) -> jax.Array:
        """KL from alpha 1{x = x0} + (1 - alpha) / V to 1 / V, nats per token."""
        alpha, others = jnp.exp(-sigma), self.vocab_size - 1
        stayed = (1.0 + others * alpha) / self.vocab_size * jnp.log1p(others * alpha)
        # log1p(-1) is -inf at sigma = 0, where the weight is 0.
        moved = jax.scipy.special.xlog1py(-jnp.expm1(-sigma), -alpha)
        return stayed + others / self.vocab_size * moved

    def score_entropy(self, scores: Scores, sigma: Sigma, xt: Tokens, x0: Tokens) -> ScoreEntropy:
        """Score entropy of every token, [B, L].

        Q[x, y] = 1 / V, and with ratio = p(y | x0) / p(x0 | x0), y != x0, the sums over y != x are

            x = x0:   1/V sum (s_y - ratio log s_y + K(ratio))
            x != x0:  1/V sum (s_y - log s_y + K(1)), and at y = x0 the ratio is 1 / ratio, not 1

        Every ratio is written through odds / V, none as a difference of nearly equal numbers.
        """
        vocab = self.vocab_size
        odds = jnp.expm1(sigma)
        log_total, log_score_x0 = scores.total_and_pick(x0, None)
        mean_score = jnp.exp(log_total) / vocab  # sums over y != x, divided by V
        mean_log_score = scores.log_sum() / vocab

        ratio = odds / (odds + vocab)
        log_ratio = jnp.log(odds) - jnp.log(odds + vocab)
        constant = (vocab - 1) / vocab * _k(ratio, log_ratio)
        stayed = mean_score - ratio * mean_log_score + constant

        gain = 1.0 + vocab / odds  # 1 / ratio
        log_gain = jnp.log1p(vocab / odds)
        constant = (_k(gain, log_gain) - (vocab - 2)) / vocab  # K(1) = -1
        # log s_x0 has the factor gain / V, of which 1 / V is in the mean: 1 / odds is left.
        moved = mean_score - mean_log_score - log_score_x0 / odds + constant
        return ScoreEntropy(jnp.where(xt == x0, stayed, moved), normalised=None, log_z=None)

    def squared_error(self, scores: Scores, sigma: Sigma, xt: Tokens, x0: Tokens) -> jax.Array:
        """1/V times the sum over y != x of (s_y - ratio_y)^2, every token; the ratios above."""
        vocab, odds = self.vocab_size, jnp.expm1(sigma)
        log_total, log_score_x0 = scores.total_and_pick(x0, None)
        total, score_x0 = jnp.exp(log_total), jnp.exp(log_score_x0)
        ratio, gain = odds / (odds + vocab), 1.0 + vocab / odds
        squares = jnp.exp(scores.total_of_squares(None))
        stayed = squares - 2.0 * ratio * total + (vocab - 1) * ratio**2
        # The ratios are 1 but for that of x0.
        moved = squares - 2.0 * total + (vocab - 2) + gain**2 - 2.0 * (gain - 1.0) * score_x0
        return jnp.where(xt == x0, stayed, moved) / vocab

    def divergence_from_uniform(self, scores, sigma, xt) -> jax.Array:
        """1/V sum over y != x of s_y log s_y - s_y + 1: the ratios of uniform tokens are 1."""
        log_total = scores.total(None)
        _, entropy = scores.peak_and_entropy(None)  # of s / total
        total = jnp.exp(log_total)
        return (total * (log_total - entropy - 1.0) + self.vocab_size - 1) / self.vocab_size

    def scores_of_clean(self, logits: Scores, xt: Tokens, sigma: Sigma) -> Scores:
        """alpha f(y) + (1 - alpha) / V over the same at x, for f = softmax(logits): by the table of
        states."""

        def token(logits, x, sigma):
            log_noise = jnp.log(-jnp.expm1(-sigma)) - jnp.log(self.vocab_size)
            log_noised = jnp.logaddexp(jax.nn.log_softmax(logits) - sigma, log_noise)
            return log_noised - log_noised[x]

        table = lift(token, logits.log_score(), xt, sigma)
        return DenseScores(table, xt, self.vocab_size)


GRAPHS: dict[str, type[Graph]] = {"absorbing": Absorbing, "uniform": Uniform}


def is_of(graph: type[Graph], names: str | tuple[str, ...] | None) -> bool:
    """Whether a class of graphs is of these kinds of noise, names in GRAPHS or None for all; one
    with a mask counts as absorbing."""
    names, has_mask = (names,) if isinstance(names, str) else names, graph.mask is not Graph.mask
    return names is None or any(
        issubclass(graph, GRAPHS.get(name, ())) or (name == "absorbing" and has_mask)
        for name in names
    )
