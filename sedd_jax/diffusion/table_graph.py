"""A graph of one's own from a few one-token functions: the rest by tables of states, D^2 numbers a
token, for small vocabularies. Imports jax only.

Absorbing and Uniform have closed forms in place of the tables; what is slow here may be overridden.
"""

import abc
import dataclasses

import jax
import jax.numpy as jnp
from jax.scipy.special import xlogy

from sedd_jax.diffusion.draws import categorical
from sedd_jax.diffusion.graph import GraphByTables, ScoreEntropy, lift
from sedd_jax.diffusion.scores import DenseScores, Scores, Sigma, Tokens

TINY = 2.0**-126  # the smallest normal float32


@dataclasses.dataclass(frozen=True)
class TableGraph(GraphByTables):
    """Needs transp_rate, transp_transition, staggered_score and base_probabilities; and dim, where
    there are other states than the clean tokens."""

    @property
    def dim(self) -> int:
        return self.vocab_size

    @abc.abstractmethod
    def base_probabilities(self) -> jax.Array:
        """p_base, the distribution at which the forward process ends, [D]."""

    # --- one token

    def _transitions(self, sigma: jax.Array) -> jax.Array:
        """p_sigma(y | x0), [D, V]: row y, column x0."""
        states = jnp.arange(self.dim)
        rows = jax.vmap(self.transp_transition, (0, None))(states, sigma)
        return rows[:, : self.vocab_size]

    def transition(self, x0: jax.Array, sigma: jax.Array) -> jax.Array:
        """p_sigma(. | x0), [D]."""
        return self._transitions(sigma)[:, x0]

    def clean_probabilities(self, score: jax.Array, x: jax.Array, sigma: jax.Array) -> jax.Array:
        p = jnp.maximum(self.tweedie_probabilities(score, x, sigma)[: self.vocab_size], 0.0)
        return jnp.where(p.sum() > 0.0, p / p.sum(), 1.0 / self.vocab_size)

    def ancestral_probabilities(self, p, x, sigma_t, sigma_s, kappa) -> jax.Array:
        earlier = self._transitions(sigma_s)
        given_x = p / jnp.maximum(self.transp_transition(x, sigma_t)[: self.vocab_size], TINY)
        back = self.transp_transition(x, sigma_t - sigma_s) * (earlier @ given_x)
        return kappa * back + (1.0 - kappa) * (earlier @ p)

    def _ratios(self, x: jax.Array, x0: jax.Array, sigma: jax.Array) -> jax.Array:
        """p_sigma(y | x0) / p_sigma(x | x0), [D]."""
        p = self.transition(x0, sigma)
        return p / p[x]

    def _other_rates(self, x: jax.Array) -> jax.Array:
        return jnp.where(self._at(x) == 1.0, 0.0, self.transp_rate(x))

    # --- a batch

    def perturb(self, key: jax.Array, x0: Tokens, sigma: Sigma) -> Tokens:
        return categorical(key, jnp.log(lift(self.transition, x0, sigma)))

    def limit(self, key: jax.Array, shape: tuple[int, ...]) -> Tokens:
        log_p = jnp.log(self.base_probabilities())
        return categorical(key, jnp.broadcast_to(log_p, (*shape, self.dim)))

    def prior(self, sigma: jax.Array) -> jax.Array:
        """The largest over x0: the bound is one for every text."""

        def largest(sigma):
            p = self._transitions(sigma)
            terms = xlogy(p, p) - xlogy(p, self.base_probabilities()[:, None])
            return terms.sum(axis=0).max()

        sigma = jnp.asarray(sigma)
        return jax.vmap(largest)(sigma.ravel()).reshape(sigma.shape)

    def score_entropy(self, scores: Scores, sigma: Sigma, xt: Tokens, x0: Tokens) -> ScoreEntropy:
        def token(log_score, x, x0, sigma):
            ratio = self._ratios(x, x0, sigma)
            constant = xlogy(ratio, ratio) - ratio
            return self._other_rates(x) @ (jnp.exp(log_score) - ratio * log_score + constant)

        value = lift(token, scores.log_score(), xt, x0, sigma)
        return ScoreEntropy(value, normalised=None, log_z=None)

    def squared_error(self, scores: Scores, sigma: Sigma, xt: Tokens, x0: Tokens) -> jax.Array:
        def token(log_score, x, x0, sigma):
            error = jnp.exp(log_score) - self._ratios(x, x0, sigma)
            return self._other_rates(x) @ error**2

        return lift(token, scores.log_score(), xt, x0, sigma)

    def divergence_from_uniform(self, scores: Scores, sigma: Sigma, xt: Tokens) -> jax.Array:
        logits = DenseScores(jnp.zeros((*xt.shape, self.vocab_size)), xt, self.vocab_size)
        return self.score_divergence(scores, self.scores_of_clean(logits, xt, sigma), sigma, xt)

    def scores_of_clean(self, logits: Scores, xt: Tokens, sigma: Sigma) -> Scores:
        def token(logits, x, sigma):
            p = self._transitions(sigma) @ jax.nn.softmax(logits[: self.vocab_size])
            log_p = jnp.log(jnp.maximum(p, TINY))
            return log_p - log_p[x]

        return DenseScores(lift(token, logits.log_score(), xt, sigma), xt, self.vocab_size)
