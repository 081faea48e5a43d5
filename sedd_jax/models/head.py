"""Scores answered from the last hidden state, without a table where none is asked for."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from sedd_jax.diffusion.graphs import Graph
from sedd_jax.diffusion.scores import ScoreFn, Tokens
from sedd_jax.kernels import vocab_reduce
from sedd_jax.models.transformer import Output


@dataclasses.dataclass(frozen=True)
class HeadScores:
    """log_score = hidden @ weight.T + bias - log_scale, and 0 at y = x_l."""

    output: Output
    xt: Tokens  # int32 [B, L]
    log_scale: jax.Array  # float32 [B, 1]
    vocab_size: int  # clean tokens: the first rows of the head
    parts: int = 1  # devices that share the rows

    def log_score(self) -> jax.Array:
        """The whole table, float32 [B, L, D]; 0 at y = x_l."""
        table = vocab_reduce.logits(*self.output) - self.log_scale[..., None]
        states = jnp.arange(table.shape[-1])
        return jnp.where(states == self.xt[..., None], 0.0, table)

    def _clean_head(self):
        hidden, weight, bias = self.output
        return hidden, weight[: self.vocab_size], bias[: self.vocab_size]

    @property
    def _block_elements(self) -> int:
        return vocab_reduce.BLOCK_ELEMENTS * self.parts  # a block's share of each device

    def total_and_pick(self, targets: Tokens) -> tuple[jax.Array, jax.Array]:
        """Log of the sum of scores over clean y != x_l, and log-score at clean targets, [B, L]."""
        total, pick = vocab_reduce.total_and_pick(
            *self._clean_head(), self.xt, targets, self._block_elements
        )
        pick = jnp.where(targets == self.xt, 0.0, pick - self.log_scale)
        return total - self.log_scale, pick

    def total_and_draw(self, keys: jax.Array) -> tuple[jax.Array, Tokens]:
        """Log of the same sum, and a clean token drawn in proportion to its score, [B, L]."""
        total, token = vocab_reduce.total_and_draw(
            keys, *self._clean_head(), self.xt, self._block_elements
        )
        return total - self.log_scale, token


def make_score_fn(
    model: nn.Module,
    params,
    graph: Graph,
    *,
    dropout_key: jax.Array | None = None,
    is_token: jax.Array | None = None,
) -> ScoreFn:
    """The network with these parameters as a score function; dropout acts if it gets a key.

    is_token, bool [B, L], marks what is no padding in the rows that it will be called with.
    """
    rngs = {} if dropout_key is None else {"dropout": dropout_key}

    def score_fn(xt, sigma):
        output = model.apply(
            {"params": params}, xt, sigma, is_token=is_token, deterministic=not rngs, rngs=rngs
        )
        return HeadScores(output, xt, graph.log_scale(sigma), graph.vocab_size, model.place.parts)

    return score_fn
