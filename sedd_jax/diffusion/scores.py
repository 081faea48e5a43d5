"""The seam: what one network call knows, answered through a few questions. Imports jax only.

Losses, samplers and the bound take a `ScoreFn` and never see parameters, a model or a config.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp

from sedd_jax.diffusion.draws import categorical

Tokens = jax.Array  # int32 [B, L]
Sigma = jax.Array  # float32 [B, 1]: total noise, one value a sequence
Needed = jax.Array | None  # bool [B, L]: the positions whose answers are used; None: all


class Scores(Protocol):
    """The ratios p_sigma(y at l) / p_sigma(x_l at l) of one noised batch x.

    Clean tokens are y < vocab_size; the sums and the draw below leave y = x_l out. Where a position
    is not needed the answer is finite and means nothing.
    """

    @property
    def vocab_size(self) -> int:
        """Clean tokens."""

    def log_score(self) -> jax.Array:
        """The whole table, float32 [B, L, D]; 0 at y = x_l."""

    def total(self, needed: Needed) -> jax.Array:
        """Log of the sum of scores over clean y != x_l, float32 [B, L]."""

    def total_and_pick(self, targets: Tokens, needed: Needed) -> tuple[jax.Array, jax.Array]:
        """The same log sum, and the log-score at targets; [B, L] each."""

    def log_sum(self) -> jax.Array:
        """Sum of the log-scores of clean y != x_l, float32 [B, L]."""

    def total_of_squares(self, needed: Needed) -> jax.Array:
        """Log of the sum of squared scores over clean y != x_l, float32 [B, L]."""

    def peak_and_entropy(self, needed: Needed) -> tuple[jax.Array, jax.Array]:
        """Of the distribution of clean y != x_l in proportion to their scores: the log of the
        largest probability, and the entropy in nats; float32 [B, L] each."""

    def draw(self, keys: jax.Array, needed: Needed, weights: "Weights | None" = None) -> Tokens:
        """A clean token y != x_l drawn in proportion to its score, or as weights say, int32 [B, L].

        keys has one for each row, [B]: a row's draw does not depend on the rows beside it.
        """


@dataclasses.dataclass(frozen=True)
class Weights:
    """Other weights of a draw than the scores: a function of the whole row of one position.

    function(log_scores [V], *of others [V], *values []) -> log-weights [V], or more, -inf where the
    log-score of the first is. others are the scores of further network calls at the same positions.
    """

    function: Callable[..., jax.Array]
    others: tuple[Scores, ...] = ()
    values: tuple[jax.Array, ...] = ()  # float32 [B, L] each

    @classmethod
    def of(cls, function: Callable[[jax.Array], jax.Array] | None) -> "Weights | None":
        """A function of the scores' own row; None for the scores themselves."""
        return None if function is None else cls(function)


ScoreFn = Callable[[Tokens, Sigma], Scores]


class NotFiniteError(ValueError):
    """A model's scores are NaN or infinite: finite weights may still have diverged."""

    def __init__(self, where: str):
        super().__init__(
            f"the model's scores are not finite {where}: its training has diverged; take an "
            "earlier checkpoint of the run with --step=STEP (in Python load(step=STEP)), or train "
            "again with a lower optimizer.learning_rate"
        )


def draw_categorical(keys: jax.Array, log_weights: jax.Array) -> Tokens:
    """A token in proportion to exp(log_weights [B, L, V]), int32 [B, L]; one key a row, [B]."""
    return jax.vmap(categorical)(keys, log_weights)


@dataclasses.dataclass(frozen=True)
class DenseScores:
    """Scores answered from a table, for tests, small distributions and small vocabularies.

    log_score at y = x_l is set to 0 whatever the table holds there.
    """

    table: jax.Array  # float32 [B, L, D]
    xt: Tokens  # int32 [B, L]
    vocab_size: int  # clean tokens

    def log_score(self) -> jax.Array:
        states = jnp.arange(self.table.shape[-1])
        return jnp.where(states == self.xt[..., None], 0.0, self.table)

    def _others(self) -> jax.Array:
        """The table over clean tokens, -inf at y = x_l; [B, L, V]."""
        states = jnp.arange(self.vocab_size)
        clean = self.table[..., : self.vocab_size]
        return jnp.where(states == self.xt[..., None], -jnp.inf, clean)

    def total(self, needed: Needed = None) -> jax.Array:
        return jax.nn.logsumexp(self._others(), axis=-1)

    def total_and_pick(self, targets: Tokens, needed: Needed = None) -> tuple[jax.Array, jax.Array]:
        pick = jnp.take_along_axis(self.log_score(), targets[..., None], axis=-1)
        return self.total(needed), pick[..., 0]

    def log_sum(self) -> jax.Array:
        return self.log_score()[..., : self.vocab_size].sum(axis=-1)

    def total_of_squares(self, needed: Needed = None) -> jax.Array:
        return jax.nn.logsumexp(2.0 * self._others(), axis=-1)

    def peak_and_entropy(self, needed: Needed = None) -> tuple[jax.Array, jax.Array]:
        log_p = jax.nn.log_softmax(self._others(), axis=-1)
        # Of p / uniform: where p is nearly uniform, no large terms are summed.
        log_size = math.log(self.vocab_size)
        terms = jnp.where(log_p > -jnp.inf, log_p + log_size, 0.0)
        return log_p.max(axis=-1), log_size - (jnp.exp(log_p) * terms).sum(axis=-1)

    def draw(
        self, keys: jax.Array, needed: Needed = None, weights: Weights | None = None
    ) -> Tokens:
        return draw_categorical(keys, self.log_weights(weights))

    def log_weights(self, weights: Weights | None) -> jax.Array:
        """What `draw` draws in proportion to the exponential of, [B, L, V] or as weights say."""
        if weights is None:
            return self._others()
        rows = (self._others(), *(other._others() for other in weights.others))
        return jax.vmap(jax.vmap(weights.function))(*rows, *weights.values)


@dataclasses.dataclass(frozen=True)
class NormalisedScores:
    """Scores in proportion to exp(logits) whose sum over clean tokens is known: exp(log_total)."""

    logits: Scores
    log_total: jax.Array  # float32 [B, 1]
    xt: Tokens  # int32 [B, L]

    def _shift(self, needed: Needed = None) -> jax.Array:
        """What is added to a logit, [B, L]."""
        return self.log_total - self.logits.total(needed)

    def log_score(self) -> jax.Array:
        table = self.logits.log_score() + self._shift()[..., None]
        return jnp.where(jnp.arange(table.shape[-1]) == self.xt[..., None], 0.0, table)

    def total(self, needed: Needed = None) -> jax.Array:
        return jnp.broadcast_to(self.log_total, self.xt.shape)

    def total_and_pick(self, targets: Tokens, needed: Needed = None) -> tuple[jax.Array, jax.Array]:
        total, pick = self.logits.total_and_pick(targets, needed)
        return self.total(), pick - total + self.log_total

    def log_sum(self) -> jax.Array:
        return self.logits.log_sum() + self.logits.vocab_size * self._shift()

    def total_of_squares(self, needed: Needed = None) -> jax.Array:
        return self.logits.total_of_squares(needed) + 2.0 * self._shift(needed)

    def peak_and_entropy(self, needed: Needed = None) -> tuple[jax.Array, jax.Array]:
        return self.logits.peak_and_entropy(needed)

    def draw(
        self, keys: jax.Array, needed: Needed = None, weights: Weights | None = None
    ) -> Tokens:
        if weights is not None:
            others = tuple(other.logits for other in weights.others)
            weights = dataclasses.replace(weights, others=others)
        return self.logits.draw(keys, needed, weights)
