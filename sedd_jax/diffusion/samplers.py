"""Sampling: a predictor is one reverse step, `sample` the loop, `denoise` the last jump.

Imports jax only. Everything here is a pure function of arrays and of `(score_fn, graph, schedule)`;
the caller jits.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sedd_jax.diffusion.graph import Graph
from sedd_jax.diffusion.grids import uniform_grid
from sedd_jax.diffusion.predictors import Options, Step, trait, tweedie
from sedd_jax.diffusion.reverse import Distribution, Shape, greedy
from sedd_jax.diffusion.schedules import Schedule
from sedd_jax.diffusion.scores import ScoreFn, Tokens

# What is folded into a key for a predictor's own draws: fold_in(key, 1) would be split(key)[1], the
# key of the loop's draw of tokens.
OWN = 2**32 - 1


class Known(NamedTuple):
    """Tokens that sampling must keep: x[is_known] == tokens[is_known] (Algorithm 3)."""

    tokens: jax.Array  # int32 [B, L]
    is_known: jax.Array  # bool [B, L]

    def clamp(self, x: Tokens) -> Tokens:
        """x with the known tokens where they are known."""
        return jnp.where(self.is_known, self.tokens, x)

    @classmethod
    def nothing(cls, shape: tuple[int, int]) -> "Known":
        """No token of a batch of that shape."""
        return cls(jnp.zeros(shape, jnp.int32), jnp.zeros(shape, bool))


class Chain(NamedTuple):
    """What the loop carries from step to step."""

    tokens: Tokens  # int32 [B, L]
    calls: jax.Array  # int32 [B]: network calls that each sample has needed so far
    confidence: jax.Array  # float32 [B, L]: the probability each token was revealed with

    @classmethod
    def of(cls, tokens: Tokens) -> "Chain":
        """At its start."""
        return cls(tokens, jnp.zeros(len(tokens), jnp.int32), jnp.ones(tokens.shape, jnp.float32))


def denoise(
    xt: Tokens,
    t: jax.Array,
    score_fn: ScoreFn,
    graph: Graph,
    schedule: Schedule,
    shape: Shape | None = None,
) -> Distribution:
    """The clean tokens that sampling ends with, given x_t at its last time t, [B, 1]."""
    sigma = schedule.sigma(t)
    return graph.denoise(score_fn(xt, sigma), xt, sigma, shape=shape)


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


Draw = Callable[[jax.Array, Distribution], Tokens]  # with a key for each row, [B]
DRAWS: dict[str, Draw] = {"exact": draw_exact, "float32_gumbel": draw_float32_gumbel}


def sample(
    key: jax.Array,
    score_fn: ScoreFn,
    graph: Graph,
    schedule: Schedule,
    shape: tuple[int, int],
    *,
    steps: int | jax.Array,
    predictor: Callable[[Tokens, Step], Distribution] | None = tweedie,
    options: Options | None = None,
    is_greedy: bool = False,
    known: Known | None = None,
    t_min: float = 1e-5,
    draw: Draw = draw_exact,
    grid: Callable[..., jax.Array] = uniform_grid,
    index: jax.Array | None = None,
    begin: int | jax.Array = 0,
    end: int | jax.Array | None = None,
    chain: Chain | None = None,
) -> Chain:
    """Draw `shape` = (B, L) sequences by `steps` reverse steps from t = 1 to t_min and a denoising.

    One `lax` loop over the times of `grid`: steps may be traced, so another number of steps does
    not recompile, nor do other numbers in options. Known tokens are put back before every step and
    after the denoiser, which with is_greedy takes the likeliest tokens. A sample costs a network
    call a step, or two (see predictors.Traits), and one more; predictor None takes no step. An
    adaptive predictor ends when no token is masked, after `steps` at the latest; Chain.calls has
    what each sample needed. index, int32 [B], are the samples' numbers, 0, 1, ... by default: a
    sample's noise is keyed by its own number, not by what else is in the batch.

    A token is -1, from then to the end, if its scores were not finite.

    The loop may be cut: begin and end take the steps begin <= i < end from the chain at step begin
    (unused at 0), and the denoiser comes when end == steps. The parts give what the whole gives.
    """
    if isinstance(steps, int) and steps < 1:
        raise ValueError(f"steps {steps} is below 1; give at least 1")
    if isinstance(begin, int) and begin > 0 and chain is None:
        raise ValueError(f"begin {begin} needs the chain at that step")
    index = jnp.arange(shape[0]) if index is None else index
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, index)
    of_limit, of_steps, of_last = jax.vmap(lambda k: jax.random.split(k, 3), out_axes=1)(keys)
    own_keys = jax.vmap(jax.random.fold_in, (0, None))(of_limit, jnp.uint32(OWN))
    times, known = 2 * (jnp.zeros((shape[0], 1)),), known or Known.nothing(shape)
    how = {"options": options or Options(), "steps": steps, "draw": draw}
    how |= {"is_free": ~known.is_known, "sample_keys": own_keys}
    every = Step(*times, score_fn, graph, schedule, **how)
    loop = _Loop(every, predictor, t_min, grid, known, of_steps)
    start = Chain.of(known.clamp(jax.vmap(lambda k: graph.limit(k, shape[1:]))(of_limit)))
    if chain is not None:
        start = jax.tree.map(lambda new, old: jnp.where(begin == 0, new, old), start, chain)
        start = start._replace(tokens=known.clamp(start.tokens))
    stop = steps if end is None else end
    finish = functools.partial(loop.finish, of_last, greedy if is_greedy else every.options.shape)
    if trait(predictor, "is_adaptive"):
        _, start = jax.lax.while_loop(
            lambda state: (state[0] < stop) & loop.is_unfinished(state[1]).any(),
            lambda state: (state[0] + 1, loop.step(*state)),
            (jnp.asarray(begin, jnp.int32), start),
        )
    elif predictor is not None:
        start = jax.lax.fori_loop(begin, stop, loop.step, start)
    return finish(start) if end is None else jax.lax.cond(end == steps, finish, lambda c: c, start)


@dataclasses.dataclass(frozen=True)
class _Loop:
    """The reverse steps of `sample`, with its arguments; a key for each sample, [B]."""

    every: Step  # what all steps have
    predictor: Callable[[Tokens, Step], Distribution] | None
    t_min: float
    grid: Callable[..., jax.Array]
    known: Known
    keys: jax.Array

    def times(self, t: jax.Array | float, chain: Chain) -> jax.Array:
        """t for each sample, float32 [B, 1]."""
        return t * jnp.ones((len(chain.tokens), 1), jnp.float32)

    def is_unfinished(self, chain: Chain) -> jax.Array:
        """Whether a sample needs another call, bool [B]."""
        mask = self.every.graph.mask
        if mask is None or not trait(self.predictor, "is_adaptive"):
            return jnp.ones(len(chain.tokens), bool)
        return (chain.tokens == mask).any(axis=-1)

    def step(self, i: jax.Array, chain: Chain) -> Chain:
        steps, keys = self.every.steps, jax.vmap(jax.random.fold_in, (0, None))(self.keys, i)
        t, s = (self.grid(j, steps, self.t_min) for j in (i, i + 1))
        s = jnp.where(i + 1 == steps, self.t_min, s)  # exactly
        one = self.every._replace(
            t=self.times(t, chain),
            s=self.times(s, chain),
            index=i,
            keys=jax.vmap(jax.random.fold_in, (0, None))(keys, jnp.uint32(OWN)),
            confidence=chain.confidence,
        )
        of_step = trait(self.predictor, "calls"), trait(self.predictor, "is_confident")
        distribution = self.predictor(chain.tokens, one)
        if not hasattr(distribution, "draw"):
            is_array = isinstance(distribution, jax.Array)
            what = "an array" if is_array else f"a {type(distribution).__name__}"
            raise ValueError(
                f"predictor {self.predictor!r} returns {what}, no Distribution of the next tokens; "
                "return one, as step.graph.tweedie(...) is"
            )
        return self.moved(chain, keys, distribution, *of_step)

    def finish(self, keys: jax.Array, shape: Shape | None, chain: Chain) -> Chain:
        """The chain with clean tokens; shape acts on their distribution."""
        process = self.every.score_fn, self.every.graph, self.every.schedule
        clean = denoise(chain.tokens, self.times(self.t_min, chain), *process, shape)
        return self.moved(chain, keys, clean, 1)

    def moved(
        self,
        chain: Chain,
        keys: jax.Array,
        distribution: Distribution,
        calls: int,
        is_confident: bool = False,
    ) -> Chain:
        """The chain with tokens drawn, after so many more network calls."""
        x = chain.tokens
        drawn = self.known.clamp(jnp.where(x < 0, x, self.every.draw(keys, distribution)))
        sure = chain.confidence
        if is_confident:
            mask = self.every.graph.mask
            is_new = (x == mask) & (drawn != mask)
            sure = jnp.where(is_new, distribution.confidence(drawn), sure)
        return Chain(drawn, chain.calls + calls * self.is_unfinished(chain), sure)
