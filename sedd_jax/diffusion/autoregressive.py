"""The autoregressive rival: a text's probability token by token, from left to right.

    log p(x) = sum over l of log p(x_l | x_1 .. x_l-1)

MASK begins a text: a causal network sees MASK, x_1, ..., x_L-1, and its output at l is the
distribution of x_l. Imports jax only.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sedd_jax.diffusion.likelihood import Bound
from sedd_jax.diffusion.losses import Loss
from sedd_jax.diffusion.reverse import Shape
from sedd_jax.diffusion.samplers import Known
from sedd_jax.diffusion.scores import ScoreFn, Scores, Tokens, Weights


def shifted(x: Tokens, mask: int) -> Tokens:
    """MASK, x_1, ..., x_L-1 of int32 [B, L]: what the network sees at each position of x."""
    return jnp.pad(x[:, :-1], ((0, 0), (1, 0)), constant_values=mask)


def token_nats(score_fn: ScoreFn, x0: Tokens, mask: int) -> jax.Array:
    """-log p(x_l | x_1 .. x_l-1) of int32 [B, L], nats, float32 [B, L]; score_fn is causal."""
    scores = score_fn(shifted(x0, mask), no_noise(x0))
    # The scores as weights of all clean tokens: none is left out for being what is seen.
    scores = dataclasses.replace(scores, xt=jnp.full_like(x0, -1))
    total, pick = scores.total_and_pick(x0, None)
    return total - pick


def no_noise(x: Tokens) -> jax.Array:
    """The sigma that the network is called with: a constant, which training gives its meaning."""
    return jnp.ones((len(x), 1), jnp.float32)


def loss(x0: Tokens, score_fn: ScoreFn, mask: int, *, is_token: jax.Array | None = None) -> Loss:
    """-log p(x0), nats per sequence; is_token, bool [B, L], leaves padding out."""
    nats = token_nats(score_fn, x0, mask)
    return Loss(jnp.sum(nats, axis=-1, where=True if is_token is None else is_token), {})


def exact(x0: Tokens, score_fn: ScoreFn, mask: int, *, is_token: jax.Array | None = None) -> Bound:
    """-log p(x0) itself, as a Bound without an error."""
    nats = token_nats(score_fn, x0, mask)
    nats = nats if is_token is None else jnp.where(is_token, nats, 0.0)
    total = nats.sum(axis=-1)
    zero = jnp.zeros_like(total)
    return Bound(total[:, None], zero[:, None], zero, by_token=nats)


# (tokens int32 [B, 1], their position int32 [], cache) -> scores of the token after each, of which
# none is left out, and the cache with what the network must know of these tokens later.
NextScores = Callable[[Tokens, jax.Array, Any], tuple[Scores, Any]]


class Written(NamedTuple):
    """Texts that are written up to some position."""

    tokens: Tokens  # int32 [B, L]
    calls: jax.Array  # int32 [B]: network calls that each sample has needed so far
    cache: Any  # of NextScores: of the positions so far


def sample(
    key: jax.Array,
    next_scores: NextScores,
    mask: int,
    written: Written,
    known: Known,
    *,
    begin: int | jax.Array,
    end: int | jax.Array,
    index: jax.Array,
    shape: Shape | None = None,
) -> Written:
    """The texts after the positions begin <= l < end, each drawn given those before it.

    Known tokens are not drawn. shape changes the distribution of each token. index, int32 [B], are
    the samples' numbers: the noise of a sample is keyed by its number and the position alone. A
    token is -1 if its scores were not finite.
    """
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, index)

    def column(a, position):
        return jax.lax.dynamic_slice_in_dim(a, position, 1, axis=1)

    def step(position, written):
        tokens, calls, cache = written
        before = jnp.where(position == 0, mask, column(tokens, jnp.maximum(position - 1, 0)))
        scores, cache = next_scores(before, position, cache)
        is_free = ~column(known.is_known, position)
        keys_here = jax.vmap(jax.random.fold_in, (0, None))(keys, position)
        drawn = scores.draw(keys_here, is_free, Weights.of(shape))
        here = jnp.where(is_free, drawn, column(known.tokens, position))
        tokens = jax.lax.dynamic_update_slice_in_dim(tokens, here, position, axis=1)
        return Written(tokens, calls + is_free[:, 0], cache)

    return jax.lax.fori_loop(begin, end, step, written)
