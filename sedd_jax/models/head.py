"""Scores answered from the last hidden state, without a table where none is asked for."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from sedd_jax.diffusion.draws import categorical
from sedd_jax.diffusion.graphs import Graph
from sedd_jax.diffusion.scores import ScoreFn, Tokens, Where
from sedd_jax.kernels import vocab_reduce
from sedd_jax.models.transformer import Output
from sedd_jax.parallel.sharding import Placement


@dataclasses.dataclass(frozen=True)
class HeadScores:
    """log_score = hidden @ weight.T + bias - log_scale, and 0 at y = x_l."""

    output: Output
    xt: Tokens  # int32 [B, L]
    log_scale: jax.Array  # float32 [B, 1]
    vocab_size: int  # clean tokens: the first rows of the head
    placement: Placement  # where the output lives

    def log_score(self) -> jax.Array:
        """The whole table, float32 [B, L, D]; 0 at y = x_l."""
        table = vocab_reduce.logits(*self.output) - self.log_scale[..., None]
        states = jnp.arange(table.shape[-1])
        return jnp.where(states == self.xt[..., None], 0.0, table)

    def _over_rows(self, reduce, *rows: jax.Array):
        """reduce(hidden, weight, bias, xt, *rows), on each device for the rows it holds."""
        hidden, weight, bias = self.output
        # No score of MASK is asked for: left out so, and not by a copy of the other rows.
        clean = jnp.where(jnp.arange(bias.shape[0]) < self.vocab_size, bias, -jnp.inf)

        def local(rows, head):
            hidden, *others = rows
            return reduce(hidden, *head, *others)

        return self.placement.over_rows(local, (hidden, self.xt, *rows), (weight, clean))

    def total(self, where: Where = None) -> jax.Array:
        """Log of the sum of scores over clean y != x_l, [B, L]."""
        return self.total_and_pick(jnp.full_like(self.xt, -1), where)[0]

    def total_and_pick(self, targets: Tokens, where: Where = None) -> tuple[jax.Array, jax.Array]:
        """The same log sum, and log-score at clean targets, [B, L]."""

        def reduce(*rows):
            return vocab_reduce.total_and_pick(*rows, platform=self.placement.platform)

        total, pick = self._over_rows(reduce, targets, *_given(where))
        pick = jnp.where(targets == self.xt, 0.0, pick - self.log_scale)
        return total - self.log_scale, pick

    def log_sum(self) -> jax.Array:
        """Sum of the log-scores of clean y != x_l, [B, L]: a product with the sum of the weights."""

        def local(rows, head):
            hidden, xt = rows
            weight, bias = head
            hidden = hidden.astype(jnp.float32)
            clean = weight[: self.vocab_size].sum(axis=0), bias[: self.vocab_size].sum()
            own = (hidden * weight[xt]).sum(axis=-1) + bias[xt]
            own = jnp.where(xt < self.vocab_size, own, 0.0)
            return jnp.einsum("blc,c->bl", hidden, clean[0], precision="highest") + clean[1] - own

        hidden, weight, bias = self.output
        found = self.placement.over_rows(local, (hidden, self.xt), (weight, bias))
        return found - (self.vocab_size - (self.xt < self.vocab_size)) * self.log_scale

    def draw(self, keys: jax.Array, where: Where = None) -> Tokens:
        """A clean token drawn in proportion to its score, [B, L]."""

        def reduce(hidden, weight, bias, xt, keys, *where):
            return vocab_reduce.draw(
                keys,
                hidden,
                weight,
                bias,
                xt,
                *where,
                categorical=categorical,
                platform=self.placement.platform,
            )

        return self._over_rows(reduce, keys, *_given(where))


def _given(where: Where) -> tuple[jax.Array, ...]:
    return () if where is None else (where,)


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
        scale = graph.log_scale(sigma)
        return HeadScores(output, xt, scale, graph.vocab_size, model.placement)

    return score_fn
