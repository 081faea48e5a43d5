"""Distributions of a reverse step: what may be drawn, and how likely each token is.

A graph turns scores into the distribution of x_s given x_t; a sampler draws from it, and the bound
asks for the probability of the data under the last one.
"""

import dataclasses
from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp

from sedd_jax.diffusion.scores import Scores, Tokens, draw_categorical


class Distribution(Protocol):
    """Independent distributions over the next state of every token."""

    def probabilities(self) -> jax.Array:
        """float32 [B, L, D] as the paper writes them: neither clamped nor normalised."""

    def draw(self, keys: jax.Array) -> Tokens:
        """One draw after clamping and normalising, int32 [B, L]; a key for each row, [B]."""

    def log_probability(self, tokens: Tokens) -> jax.Array:
        """Log-probability of tokens under the distribution that `draw` follows, float32 [B, L]."""


@dataclasses.dataclass(frozen=True)
class Table:
    """A distribution that is a table of probabilities, computed when it is needed."""

    probabilities: Callable[[], jax.Array]  # -> float32 [B, L, D]

    def _log_weights(self) -> jax.Array:
        # An approximate score can make an entry negative. The lower limit is the smallest normal
        # number, so no token is impossible and the bound stays finite.
        return jnp.log(jnp.maximum(self.probabilities(), jnp.finfo(jnp.float32).tiny))

    def draw(self, keys: jax.Array) -> Tokens:
        return draw_categorical(keys, self._log_weights())

    def log_probability(self, tokens: Tokens) -> jax.Array:
        log_probs = jax.nn.log_softmax(self._log_weights(), axis=-1)
        return jnp.take_along_axis(log_probs, tokens[..., None], axis=-1)[..., 0]


@dataclasses.dataclass(frozen=True)
class Reveal:
    """A masked token becomes y with probability factor * score_y; an unmasked one does not change.

    The reveal is drawn first, with probability factor * sum of scores, and then the token in
    proportion to its score: a rare token keeps its rate however small the step is.
    """

    table: Table  # the same probabilities, computed for every state
    scores: Scores
    xt: Tokens
    mask: int
    log_factor: jax.Array | None  # float32 [B, 1]; None reveals every masked token

    def probabilities(self) -> jax.Array:
        return self.table.probabilities()

    def _log_reveal(self, log_total: jax.Array) -> jax.Array:
        if self.log_factor is None:
            return jnp.zeros_like(log_total)
        return jnp.minimum(self.log_factor + log_total, 0.0)

    def draw(self, keys: jax.Array) -> Tokens:
        key_reveal, key_token = jax.vmap(jax.random.split, out_axes=1)(keys)
        is_revealed = self.xt == self.mask
        if self.log_factor is not None:
            reveal = jnp.exp(self._log_reveal(self.scores.total(is_revealed)))
            bernoulli = jax.vmap(lambda k, p: jax.random.bernoulli(k, p, mode="high"))
            # NaN is revealed: the draw says that the scores are not finite.
            is_revealed &= bernoulli(key_reveal, reveal) | jnp.isnan(reveal)
        # Only now, and only for the few that are revealed: noise over the vocabulary is expensive.
        return jnp.where(is_revealed, self.scores.draw(key_token, is_revealed), self.xt)

    def log_probability(self, tokens: Tokens) -> jax.Array:
        is_masked = self.xt == self.mask
        log_total, log_score = self.scores.total_and_pick(tokens, is_masked)
        log_reveal = self._log_reveal(log_total)
        log_hidden = jnp.log(-jnp.expm1(log_reveal))
        masked = jnp.where(tokens == self.mask, log_hidden, log_reveal + log_score - log_total)
        unmasked = jnp.where(tokens == self.xt, 0.0, -jnp.inf)
        return jnp.where(is_masked, masked, unmasked)
