"""Sampling: a predictor is one reverse step, `sample` the loop, `denoise` the last jump.

Imports jax only. Everything here is a pure function of arrays and of `(score_fn, graph, schedule)`;
the caller jits. A new predictor is a function like `euler` and a line in PREDICTORS.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sedd_jax.diffusion.graphs import Graph
from sedd_jax.diffusion.grids import uniform_grid
from sedd_jax.diffusion.reverse import Distribution
from sedd_jax.diffusion.schedules import Schedule
from sedd_jax.diffusion.scores import ScoreFn, Tokens


class Known(NamedTuple):
    """Tokens that sampling must keep: x[is_known] == tokens[is_known] (Algorithm 3)."""

    tokens: jax.Array  # int32 [B, L]
    is_known: jax.Array  # bool [B, L]

    def clamp(self, x: Tokens) -> Tokens:
        """x with the known tokens where they are known."""
        return jnp.where(self.is_known, self.tokens, x)


def euler(
    xt: Tokens, t: jax.Array, s: jax.Array, score_fn: ScoreFn, graph: Graph, schedule: Schedule
) -> Distribution:
    """x_s given x_t by one Euler step, equation (18); t and s are float32 [B, 1], s < t."""
    scores = score_fn(xt, schedule.sigma(t))
    return graph.euler(scores, xt, (t - s) * schedule.dsigma_dt(t))


def tweedie(
    xt: Tokens, t: jax.Array, s: jax.Array, score_fn: ScoreFn, graph: Graph, schedule: Schedule
) -> Distribution:
    """x_s given x_t by Tweedie tau-leaping, Theorem 4.2; "analytic" in the original."""
    sigma = schedule.sigma(t)
    return graph.tweedie(score_fn(xt, sigma), xt, sigma - schedule.sigma(s))


def denoise(
    xt: Tokens, t: jax.Array, score_fn: ScoreFn, graph: Graph, schedule: Schedule
) -> Distribution:
    """The clean tokens that sampling ends with, given x_t at its last time t, [B, 1]."""
    sigma = schedule.sigma(t)
    return graph.denoise(score_fn(xt, sigma), xt, sigma)


# None takes no step: only the denoiser moves.
PREDICTORS = {"euler": euler, "tweedie": tweedie, "none": None}


def draw_exact(keys: jax.Array, distribution: Distribution) -> Tokens:
    """A draw in which every token keeps its probability, however rare; a key for each row, [B]."""
    return distribution.draw(keys)


def draw_float32_gumbel(keys: jax.Array, distribution: Distribution) -> Tokens:
    """The original's draw, for comparison with published generative perplexities only.

    Its noise has 2^23 values, so beside a dominant "stay" a token of probability p is drawn at
    (1/a) / (exp(1/a) - 1) of its rate, a = p 2^23: text looks better and varies less than what the
    model says.
    """
    probabilities = distribution.probabilities()
    u = jax.vmap(lambda key: jax.random.uniform(key, probabilities.shape[1:]))(keys)
    return gumbel_argmax(u, probabilities)


def gumbel_argmax(u: jax.Array, probabilities: jax.Array) -> Tokens:
    """argmax of probabilities / -log u, with the original's guards against zero, int32 [B, L].

    -1 where a probability is not finite.
    """
    drawn = jnp.argmax(probabilities / (1e-10 - jnp.log(u + 1e-10)), axis=-1).astype(jnp.int32)
    return jnp.where(jnp.isfinite(probabilities).all(axis=-1), drawn, -1)


DRAWS = {"exact": draw_exact, "float32_gumbel": draw_float32_gumbel}


def sample(
    key: jax.Array,
    score_fn: ScoreFn,
    graph: Graph,
    schedule: Schedule,
    shape: tuple[int, int],
    *,
    steps: int | jax.Array,
    predictor: Callable | None = tweedie,
    known: Known | None = None,
    t_min: float = 1e-5,
    draw: Callable = draw_exact,
    grid: Callable = uniform_grid,
    index: jax.Array | None = None,
    begin: int | jax.Array = 0,
    end: int | jax.Array | None = None,
    x: Tokens | None = None,
) -> Tokens:
    """Draw `shape` = (B, L) sequences by `steps` reverse steps from t = 1 to t_min and a denoising.

    One `lax` loop over the times of `grid`: steps may be traced, so another number of steps does
    not recompile. Known tokens are put back before every step and after the denoiser. A sample
    costs steps + 1 network calls; predictor None takes no step and costs one. index, int32 [B], are
    the samples' numbers, 0, 1, ... by default: a sample's noise is keyed by its own number, not by
    what else is in the batch.

    A token is -1, from then to the end, if its scores were not finite.

    The loop may be cut: begin and end take the steps begin <= i < end from the state x at step
    begin (unused at 0), and the denoiser comes when end == steps. The parts give what the whole
    gives.
    """
    if isinstance(steps, int) and steps < 1:
        raise ValueError(f"steps {steps} is below 1; give at least 1")
    if isinstance(begin, int) and begin > 0 and x is None:
        raise ValueError(f"begin {begin} needs x, the state at that step")
    index = jnp.arange(shape[0]) if index is None else index
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, index)
    key_limit, key_steps, key_last = jax.vmap(lambda k: jax.random.split(k, 3), out_axes=1)(keys)
    clamp = known.clamp if known is not None else lambda x: x
    start = jax.vmap(lambda k: graph.limit(k, shape[1:]))(key_limit)
    x = clamp(start if x is None else jnp.where(begin == 0, start, x))
    column = jnp.ones((shape[0], 1), jnp.float32)

    def moved(x, keys, distribution):
        return clamp(jnp.where(x < 0, x, draw(keys, distribution)))

    def step(i, x):
        t, s = grid(i, steps, t_min), grid(i + 1, steps, t_min)
        s = jnp.where(i + 1 == steps, t_min, s)  # exactly
        distribution = predictor(x, t * column, s * column, score_fn, graph, schedule)
        return moved(x, jax.vmap(jax.random.fold_in, (0, None))(key_steps, i), distribution)

    def finish(x):
        return moved(x, key_last, denoise(x, t_min * column, score_fn, graph, schedule))

    if predictor is not None:
        x = jax.lax.fori_loop(begin, steps if end is None else end, step, x)
    return finish(x) if end is None else jax.lax.cond(end == steps, finish, lambda x: x, x)
