"""Scores answered from the last hidden state: no [B, L, D] table unless it is asked for."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from sedd_jax.diffusion.draws import categorical
from sedd_jax.diffusion.gaussian import EmbeddingDiffusion
from sedd_jax.diffusion.graph import Graph
from sedd_jax.diffusion.scores import Needed, ScoreFn, Tokens, Weights
from sedd_jax.kernels import vocab_reduce
from sedd_jax.models.plaid import Plaid, make_embedding_diffusion
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

    def total(self, needed: Needed = None) -> jax.Array:
        """Log of the sum of scores over clean y != x_l, [B, L]."""
        return self.total_and_pick(jnp.full_like(self.xt, -1), needed)[0]

    def total_and_pick(self, targets: Tokens, needed: Needed = None) -> tuple[jax.Array, jax.Array]:
        """The same log sum, and log-score at clean targets, [B, L]."""
        total, pick = self._reduce(vocab_reduce.total_and_pick, targets, needed)
        pick = jnp.where(targets == self.xt, 0.0, pick - self.log_scale)
        return total - self.log_scale, pick

    def log_sum(self) -> jax.Array:
        """Sum of the log-scores of clean y != x_l, [B, L]: a matmul with the sum of the weights."""

        def sum_of_logits(rows, head):
            (hidden, xt, is_clean), (weight, bias) = rows, head
            hidden = hidden.astype(jnp.float32)
            clean_weight, clean_bias = weight[: self.vocab_size], bias[: self.vocab_size]
            all_clean = jnp.einsum(
                "blc,c->bl", hidden, clean_weight.sum(axis=0), precision="highest"
            )
            at_xt = (hidden * weight[xt]).sum(axis=-1) + bias[xt]
            return all_clean + clean_bias.sum() - jnp.where(is_clean, at_xt, 0.0)

        hidden, weight, bias = self.output
        is_clean = (self.xt >= 0) & (self.xt < self.vocab_size)
        summed = self.placement.over_rows(
            sum_of_logits, (hidden, self.xt, is_clean), (weight, bias)
        )
        return summed - (self.vocab_size - is_clean) * self.log_scale

    def total_of_squares(self, needed: Needed = None) -> jax.Array:
        """Log of the sum of squared scores over clean y != x_l, [B, L]."""

        def reduce(hidden, weight, bias, excluded, needed, *, platform):
            nowhere = jnp.full_like(excluded, -1)
            twice = 2.0 * hidden, weight, 2.0 * bias, excluded, nowhere, needed
            return vocab_reduce.total_and_pick(*twice, platform=platform)[0]

        return self._reduce(reduce, needed) - 2.0 * self.log_scale

    def peak_and_entropy(self, needed: Needed = None) -> tuple[jax.Array, jax.Array]:
        """Log of the largest probability of a clean token, and the entropy in nats, [B, L]."""
        return self._reduce(vocab_reduce.peak_and_entropy, needed)

    def draw(
        self, keys: jax.Array, needed: Needed = None, weights: Weights | None = None
    ) -> Tokens:
        """A clean token drawn in proportion to its score, or as weights say, [B, L]."""
        others, values, how = (), (), categorical
        if weights is not None:
            others, values = tuple(o.output.hidden for o in weights.others), weights.values

            def how(key, *rows):
                # Log-scores of clean tokens but for a constant of the position, which no draw
                # depends on. MASK is not among them.
                clean = [row[: self.vocab_size] if row.ndim else row for row in rows]
                return categorical(key, weights.function(*clean))

        def draw(hidden, weight, bias, xt, keys, others, values, needed, *, platform):
            return vocab_reduce.draw(
                (hidden, *others),
                weight,
                bias,
                xt,
                keys,
                values,
                needed,
                categorical=how,
                platform=platform,
            )

        return self._reduce(draw, keys, others, values, needed)

    def _reduce(self, reduce: Callable, *rows: Any):
        """reduce(hidden, weight, bias, xt, *rows) over the clean tokens; each device its rows."""
        hidden, weight, bias = self.output
        # MASK has no score: it is left out by its bias, and not by a copy of the other rows.
        clean = jnp.where(jnp.arange(bias.shape[0]) < self.vocab_size, bias, -jnp.inf)

        def local(rows, head):
            hidden, *rest = rows
            return reduce(hidden, *head, *rest, platform=self.placement.platform)

        return self.placement.over_rows(local, (hidden, self.xt, *rows), (weight, clean))


def make_score_fn(
    model: nn.Module,
    params,
    graph: Graph,
    *,
    dropout_key: jax.Array | None = None,
    is_token: jax.Array | None = None,
) -> ScoreFn | EmbeddingDiffusion:
    """The network with these parameters as a score function; dropout acts if it gets a key.

    is_token, bool [B, L], marks what is not padding in the rows that it will be called with. Of
    PLAID's network, what stands in its place: an EmbeddingDiffusion.
    """
    if isinstance(model, Plaid):
        how = {"dropout_key": dropout_key, "is_token": is_token}
        return make_embedding_diffusion(model, params, **how)
    rngs = {} if dropout_key is None else {"dropout": dropout_key}

    def score_fn(xt, sigma):
        output = model.apply(
            {"params": params}, xt, sigma, is_token=is_token, deterministic=not rngs, rngs=rngs
        )
        logits = clean_logits(output, graph.vocab_size, model.placement)
        if graph.predicts_clean:
            return graph.scores_of_clean(logits, xt, sigma)
        return dataclasses.replace(logits, xt=xt, log_scale=graph.log_scale(sigma))

    return score_fn


def clean_logits(output: Output, vocab_size: int, placement: Placement) -> HeadScores:
    """The output answering for its logits of the clean tokens: none left out, none rescaled."""
    batch, length, _ = output.hidden.shape
    nothing = jnp.full((batch, length), -1, jnp.int32)  # an id that excludes nothing
    return HeadScores(output, nothing, jnp.zeros((batch, 1)), vocab_size, placement)
