"""Distributions of a reverse step: what may be drawn, and how likely each token is.

A graph turns scores into the distribution of x_s given x_t; a sampler draws from it, and the bound
asks for the probability of the data under the last one.
"""

import dataclasses
from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp

from sedd_jax.diffusion.scores import Scores, Tokens, Weights, draw_categorical

# What changes the distribution of a clean token before it is drawn: log-weights [V] -> [V].
Shape = Callable[[jax.Array], jax.Array]


def shaped(
    temperature: jax.Array | None = None,
    top_p: jax.Array | None = None,
    top_k: jax.Array | None = None,
) -> Shape | None:
    """The shape that divides log-probabilities by the temperature, keeps the top_k likeliest tokens
    and of these the fewest that have the probability top_p together; None where nothing is asked.
    """
    if temperature is None and top_p is None and top_k is None:
        return None

    def shape(row):
        if temperature is not None:
            row = row / temperature
        if top_k is None and top_p is None:
            return row
        ranked = -jnp.sort(-row)
        kept = jnp.ones(row.shape, bool)
        if top_k is not None:
            kept &= jnp.arange(row.size) < top_k
        if top_p is not None:
            p = jax.nn.softmax(jnp.where(kept, ranked, -jnp.inf))
            kept &= jnp.cumsum(p) - p < top_p  # of those before it; so the likeliest is kept
        return jnp.where(row >= ranked[kept.sum() - 1], row, -jnp.inf)

    return shape


def shape_probabilities(p: jax.Array, shape: Shape | None) -> jax.Array:
    """The distribution p [V] after the shape, if there is one."""
    return p if shape is None else jax.nn.softmax(shape(jnp.log(p)))


def greedy(row: jax.Array) -> jax.Array:
    """The shape that leaves the likeliest token alone, or those that are as likely."""
    return jnp.where(row == row.max(), 0.0, -jnp.inf)


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
    shape: Shape | None = None  # of the draw

    def _log_weights(self) -> jax.Array:
        # An approximate score can make an entry negative. The lower limit is the smallest normal
        # number, so no token is impossible and the bound stays finite.
        weights = jnp.log(jnp.maximum(self.probabilities(), jnp.finfo(jnp.float32).tiny))
        return weights if self.shape is None else jax.vmap(jax.vmap(self.shape))(weights)

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
    shape: Shape | None = None  # of the token's draw

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
            # NaN is revealed: the draw says that the scores are not finite.
            is_revealed &= _bernoulli(key_reveal, reveal) | jnp.isnan(reveal)
        # Only now, and only for the few that are revealed: noise over the vocabulary is expensive.
        weights = () if self.shape is None else (Weights(self.shape),)
        return jnp.where(is_revealed, self.scores.draw(key_token, is_revealed, *weights), self.xt)

    def log_probability(self, tokens: Tokens) -> jax.Array:
        is_masked = self.xt == self.mask
        log_total, log_score = self.scores.total_and_pick(tokens, is_masked)
        log_reveal = self._log_reveal(log_total)
        log_hidden = jnp.log(-jnp.expm1(log_reveal))
        masked = jnp.where(tokens == self.mask, log_hidden, log_reveal + log_score - log_total)
        unmasked = jnp.where(tokens == self.xt, 0.0, -jnp.inf)
        return jnp.where(is_masked, masked, unmasked)


@dataclasses.dataclass(frozen=True)
class Switch:
    """A masked token is revealed with a chance that time alone decides, and an unmasked one is
    masked again with another: the scores are asked where a token is revealed, nowhere else.

    The token is drawn in proportion to its score, or as weights say; these may have a last entry,
    the chance to stay masked.
    """

    scores: Scores
    xt: Tokens
    mask: int
    reveal: jax.Array  # float32 [B, L] or [B, 1]
    remask: jax.Array  # float32 [B, L] or [B, 1]
    weights: Weights | None = None

    def draw(self, keys: jax.Array) -> Tokens:
        key_switch, key_token = jax.vmap(jax.random.split, out_axes=1)(keys)
        is_masked = self.xt == self.mask
        chance = jnp.where(is_masked, self.reveal, self.remask)
        switches = _bernoulli(key_switch, jnp.broadcast_to(chance, self.xt.shape))
        is_revealed = is_masked & switches
        drawn = self.scores.draw(key_token, is_revealed, self.weights)
        return jnp.where(is_revealed, drawn, jnp.where(switches, self.mask, self.xt))

    def probabilities(self) -> jax.Array:
        log_scores = self.scores.log_score()
        is_token = jnp.arange(log_scores.shape[-1]) < self.mask
        rows = (log_scores, *(other.log_score() for other in _others(self.weights)))
        rows = [jnp.where(is_token, row, -jnp.inf)[..., : self.mask] for row in rows]
        weights = rows[0]
        if self.weights is not None:
            weights = jax.vmap(jax.vmap(self.weights.function))(*rows, *self.weights.values)
        p = jax.nn.softmax(weights, axis=-1)
        p = jnp.pad(p, [(0, 0), (0, 0), (0, self.mask + 1 - p.shape[-1])])
        is_mask = jnp.arange(self.mask + 1) == self.mask
        reveal, remask = self.reveal[..., None], self.remask[..., None]
        here = jnp.arange(self.mask + 1) == self.xt[..., None]
        masked = reveal * p + (1.0 - reveal) * is_mask
        unmasked = remask * is_mask + (1.0 - remask) * here
        return jnp.where((self.xt == self.mask)[..., None], masked, unmasked)

    def log_probability(self, tokens: Tokens) -> jax.Array:
        p = jnp.take_along_axis(self.probabilities(), tokens[..., None], axis=-1)[..., 0]
        return jnp.log(p)

    def confidence(self, tokens: Tokens) -> jax.Array:
        """The probability of each token that was masked, by its score, float32 [B, L]."""
        is_revealed = (self.xt == self.mask) & (tokens != self.mask)
        log_total, log_score = self.scores.total_and_pick(tokens, is_revealed)
        return jnp.exp(log_score - log_total)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Draws of every masked token, of which the `left` least likely are masked again; so positions
    are not independent, and only a draw is defined."""

    scores: Scores
    xt: Tokens
    mask: int
    left: jax.Array  # int32 [B, 1]
    weights: Weights | None

    def draw(self, keys: jax.Array) -> Tokens:
        is_masked = self.xt == self.mask
        drawn = self.scores.draw(keys, is_masked, self.weights)
        log_total, log_score = self.scores.total_and_pick(drawn, is_masked)
        log_p = jnp.where(is_masked, log_score - log_total, jnp.inf)
        rank = jnp.argsort(jnp.argsort(log_p, axis=-1), axis=-1)
        return jnp.where(is_masked & (rank >= self.left), drawn, self.xt)


def _others(weights: Weights | None) -> tuple[Scores, ...]:
    return () if weights is None else weights.others


def _bernoulli(keys: jax.Array, p: jax.Array) -> jax.Array:
    """True with probability p [B, L], which may be very small; a key for each row."""
    return jax.vmap(lambda key, p: jax.random.bernoulli(key, p, mode="high"))(keys, p)
