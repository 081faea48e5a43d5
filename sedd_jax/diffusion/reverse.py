"""The law of one reverse step: what may be drawn, and how likely each token is. Imports jax only.

A graph turns scores into a law; a sampler draws from it; the bound asks for the probability of the
data under the last one.
"""

import dataclasses
from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp

from sedd_jax.diffusion.scores import Scores, Tokens, draw_categorical


class Law(Protocol):
    """Independent distributions over the next state of every token."""

    def probabilities(self) -> jax.Array:
        """float32 [B, L, D] as the paper writes them: neither clamped nor normalised."""

    def draw(self, keys: jax.Array) -> Tokens:
        """One draw from the clamped and normalised law, int32 [B, L]; a key for each row, [B]."""

    def log_probability(self, tokens: Tokens) -> jax.Array:
        """Log-probability of tokens under the law that `draw` follows, float32 [B, L]."""


@dataclasses.dataclass(frozen=True)
class Table:
    """A law given by its table of probabilities."""

    probabilities: Callable[[], jax.Array]  # -> float32 [B, L, D]

    def _log_weights(self) -> jax.Array:
        # An approximate score can make an entry negative. The floor is the smallest normal number,
        # so no token is impossible and the bound stays finite.
        return jnp.log(jnp.maximum(self.probabilities(), jnp.finfo(jnp.float32).tiny))

    def draw(self, keys: jax.Array) -> Tokens:
        return draw_categorical(keys, self._log_weights())

    def log_probability(self, tokens: Tokens) -> jax.Array:
        log_probs = jax.nn.log_softmax(self._log_weights(), axis=-1)
        return jnp.take_along_axis(log_probs, tokens[..., None], axis=-1)[..., 0]


@dataclasses.dataclass(frozen=True)
class Reveal:
    """A masked token is revealed with probability chance * sum of scores, an unmasked one stays.

    The reveal is drawn first and the token from the unscaled conditional, so a rare token keeps
    its rate however small the step is.
    """

    scores: Scores
    xt: Tokens
    mask: int
    log_chance: jax.Array | None  # float32 [B, 1]; None reveals with certainty
    probabilities: Callable[[], jax.Array]  # -> float32 [B, L, D]

    def _log_reveal(self, log_total: jax.Array) -> jax.Array:
        if self.log_chance is None:
            return jnp.zeros_like(log_total)
        return jnp.minimum(self.log_chance + log_total, 0.0)

    def draw(self, keys: jax.Array) -> Tokens:
        key_reveal, key_token = jax.vmap(jax.random.split, out_axes=1)(keys)
        is_revealed = self.xt == self.mask
        if self.log_chance is not None:
            reveal = jnp.exp(self._log_reveal(self.scores.total(is_revealed)))
            bernoulli = jax.vmap(lambda k, p: jax.random.bernoulli(k, p, mode="high"))
            is_revealed &= bernoulli(key_reveal, reveal)
        # Only now, and only for the few that are revealed: noise over the vocabulary is dear.
        return jnp.where(is_revealed, self.scores.draw(key_token, is_revealed), self.xt)

    def log_probability(self, tokens: Tokens) -> jax.Array:
        is_masked = self.xt == self.mask
        log_total, log_pick = self.scores.total_and_pick(tokens, is_masked)
        log_reveal = self._log_reveal(log_total)
        stays = jnp.log(-jnp.expm1(log_reveal))
        masked = jnp.where(tokens == self.mask, stays, log_reveal + log_pick - log_total)
        unmasked = jnp.where(tokens == self.xt, 0.0, -jnp.inf)
        return jnp.where(is_masked, masked, unmasked)
