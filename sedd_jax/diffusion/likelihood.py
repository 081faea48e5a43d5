"""An upper bound on -log p(x0), all of it, with its standard error. Imports jax only.

    -log p(x0) <= diffusion over [t_min, 1] + reconstruction at t_min + prior

Lou et al. 2024, Theorem 3.6, with the two boundary terms that its tables leave out.
"""

import math
import numbers
import operator
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp

from sedd_jax.diffusion.graph import Graph, Probe
from sedd_jax.diffusion.losses import d3pm_token_nats
from sedd_jax.diffusion.samplers import denoise
from sedd_jax.diffusion.schedules import Schedule
from sedd_jax.diffusion.scores import ScoreFn, Sigma, Tokens

# Fractional part of the golden ratio: its multiples fill [0, 1) evenly at every count.
GOLDEN = 0.6180339887498949


class Bound(NamedTuple):
    """Unbiased estimates of the bound's parts, from each pass; nats per sequence, float32.

    Arrays of jax or of numpy. normalised is the diffusion part of the scores rescaled to their true
    total (a valid bound from the same weights, never looser; None where the graph fixes no total,
    or the scores have it by themselves). The variances are of the estimates' noise, with the noise
    levels of a sequence taken as drawn apart from those of the others and, below 6 passes, with
    the differences between their means: overestimates, a little from 16 passes on, several times
    at 2 and 4. What has a single pass is exact.
    """

    diffusion_passes: jax.Array  # [B, passes]
    reconstruction_passes: jax.Array  # [B, reconstruction passes, or 1]
    prior: jax.Array  # [B]
    normalised_passes: jax.Array | None = None  # [B, passes]
    by_token: jax.Array | None = None  # [B, L]: the share of each token in total; None: not known
    # Of each noised copy of a sequence, [B, passes]; None where it is not measured.
    share: jax.Array | None = None  # the probability that a token is masked
    cross_entropy: jax.Array | None = None  # nats of a masked token, by its normalised scores

    def __repr__(self) -> str:
        """The totals in nats with their standard errors, of 8 sequences at most."""
        if isinstance(self.prior, jax.core.Tracer):
            return f"Bound of {self.prior.shape} sequences"
        rows = zip(self.total.tolist()[:8], self.standard_error.tolist())
        more = ", ..." if len(self.prior) > 8 else ""
        return f"Bound({', '.join(f'{total:.3f}±{error:.3f}' for total, error in rows)}{more} nats)"

    @property
    def diffusion(self) -> jax.Array:
        """The integral over [t_min, 1], [B]."""
        return self.diffusion_passes.mean(axis=-1)

    @property
    def normalised(self) -> jax.Array | None:
        """The same of the normalised scores, [B]."""
        return None if self.normalised_passes is None else self.normalised_passes.mean(axis=-1)

    @property
    def reconstruction(self) -> jax.Array:
        """-log of the denoiser that sampling ends with, at t_min, [B]."""
        return self.reconstruction_passes.mean(axis=-1)

    @property
    def total(self) -> jax.Array:
        """The bound on -log p(x0), [B]."""
        return self.diffusion + self.reconstruction + self.prior

    @property
    def variance(self) -> jax.Array:
        """Of total, [B]."""
        return pairs_variance(self.diffusion_passes) + pairs_variance(self.reconstruction_passes)

    @property
    def normalised_variance(self) -> jax.Array | None:
        """Of normalised + reconstruction, [B]."""
        if self.normalised_passes is None:
            return None
        return pairs_variance(self.normalised_passes) + pairs_variance(self.reconstruction_passes)

    @property
    def standard_error(self) -> jax.Array:
        """Of total, from the noise drawn, [B]."""
        return self.variance**0.5

    @property
    def tightest(self) -> Self:
        """The bound of the normalised scores where there is one, else this; without by_token."""
        if self.normalised_passes is None:
            return self._replace(by_token=None)
        return self._replace(
            diffusion_passes=self.normalised_passes, normalised_passes=None, by_token=None
        )

    def minus(self, other: Self) -> Self:
        """The difference of two bounds, pass by pass: noise that both share cancels, and
        standard_error says what is left. Of its parts; by_token and the curve are left out."""
        parts = jax.tree.map(operator.sub, self[:4], other[:4])
        return type(self)(*parts)


class Examples(NamedTuple):
    """Clean sequences, and what keys their noise."""

    x0: Tokens  # int32 [B, L]
    index: jax.Array  # int32 [B]: positions in the corpus
    is_token: jax.Array  # bool [B, L]: what is noised and scored; not padding, nor a condition

    def each(self, fn: Callable, key: jax.Array, *rows: jax.Array) -> Any:
        """fn(key, *rows of one example [1, ...]) for every example, each with a key of its own."""
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, self.index)

        def one(key, *rows):
            return jax.tree.map(lambda a: a[0], fn(key, *(row[None] for row in rows)))

        return jax.vmap(one)(keys, *rows)

    def noised(self, key: jax.Array, graph: Graph, sigma: Sigma) -> Tokens:
        """xt of every example at its noise level."""
        xt = self.each(graph.perturb, key, self.x0, sigma)
        return jnp.where(self.is_token, xt, self.x0)

    def probed(
        self, key: jax.Array, u: jax.Array, graph: Graph, schedule: Schedule, t_min: float
    ) -> Probe:
        """`Graph.probe` of every example at its noise level, the one of rank u [B]."""

        def probe(key, x0, u, is_token):
            copy = graph.probe(key, x0, u, is_token, schedule, t_min)
            return copy._replace(xt=jnp.where(is_token, copy.xt, x0))

        return self.each(probe, key, self.x0, u[:, None], self.is_token)


def bound(
    key: jax.Array,
    x0: Tokens,
    index: jax.Array,
    score_fn: ScoreFn,
    graph: Graph,
    schedule: Schedule,
    *,
    passes: int,
    reconstruction_passes: int = 2,
    t_min: float = 1e-3,
    is_token: jax.Array | None = None,
) -> Bound:
    """Bound -log p(x0) with passes + reconstruction_passes network calls a sequence.

    x0 is int32 [B, L], index int32 [B] the examples' positions in the corpus: times and noise
    depend on (key, index) alone, not on how the corpus is cut into batches. is_token, bool [B, L],
    says which tokens are noised and scored; the others are padding, which score_fn must know, or a
    clean condition: then the bound is on -log p(the former | the latter). Both numbers of passes
    must be even, for the error estimate.

    Three things make it need fewer calls than independent times would, and leave it unbiased: the
    noise levels are stratified over passes and corpus; `graph.probe` draws copies whose weights
    vary little; and a control variate makes it matter less which tokens a pass happens to noise.
    """
    check_passes(passes)
    check_passes(reconstruction_passes, "reconstruction_passes")
    key_levels, key_diffusion, key_reconstruction = jax.random.split(key, 3)
    is_token = jnp.ones(x0.shape, bool) if is_token is None else is_token
    examples = Examples(x0, index, is_token)
    process = score_fn, graph, schedule, t_min

    u = stratified(key_levels, index, passes)  # [passes, B]
    diffusion, normalised, copies = _diffusion(key_diffusion, u, examples, *process)
    reconstruction = _reconstruction(key_reconstruction, reconstruction_passes, examples, *process)
    prior = graph.prior(schedule.sigma(jnp.ones((len(x0), 1)))) * is_token  # [B, L]

    has_curve = copies is not None
    has_total = normalised is not None and not graph.predicts_clean  # else it is the bound again
    return Bound(
        diffusion_passes=diffusion.sum(axis=-1).T,
        reconstruction_passes=reconstruction.sum(axis=-1).T,
        prior=prior.sum(axis=-1),
        normalised_passes=normalised.sum(axis=-1).T if has_total else None,
        by_token=diffusion.mean(axis=0) + reconstruction.mean(axis=0) + prior,
        share=copies[0].T if has_curve else None,
        cross_entropy=copies[1].T if has_curve else None,
    )


def discrete_bound(
    key: jax.Array,
    x0: Tokens,
    index: jax.Array,
    score_fn: ScoreFn,
    graph: Graph,
    schedule: Schedule,
    *,
    passes: int,
    discrete_steps: int,
    is_token: jax.Array | None = None,
) -> Bound:
    """D3PM's bound, the sum over discrete_steps reverse steps and the prior, as `bound`.

    Each of the passes is at one step, stratified over passes and corpus. The last step, to the
    clean tokens, is among them: reconstruction is 0.
    """
    check_passes(passes)
    key_levels, key_noise = jax.random.split(key)
    is_token = jnp.ones(x0.shape, bool) if is_token is None else is_token
    examples = Examples(x0, index, is_token)

    def one_pass(k_and_u):
        k, u = k_and_u
        last = jnp.floor(u[:, None] * discrete_steps)
        t = jnp.minimum(last + 1.0, discrete_steps) / discrete_steps  # u may round to 1
        key = jax.random.fold_in(key_noise, k)
        xt = examples.noised(key, graph, schedule.sigma(t))
        process = (score_fn, graph, schedule)
        nats = d3pm_token_nats(t, xt, x0, *process, discrete_steps=discrete_steps)
        return jnp.where(is_token, nats, 0.0)

    u = stratified(key_levels, index, passes)
    diffusion = jax.lax.map(one_pass, (jnp.arange(passes), u))  # [passes, B, L]
    prior = graph.prior(schedule.sigma(jnp.ones((len(x0), 1)))) * is_token
    return Bound(
        diffusion_passes=diffusion.sum(axis=-1).T,
        reconstruction_passes=jnp.zeros((len(x0), 1)),
        prior=prior.sum(axis=-1),
        by_token=diffusion.mean(axis=0) + prior,
    )


def _diffusion(key, u, examples, score_fn, graph, schedule, t_min):
    """The integral of dsigma/dt * score entropy over [t_min, 1] and that of the normalised one, by
    token, [passes, B, L], and (mask share, nats of a masked token) of each copy, [passes, B]: from
    each pass, at the noise levels u [passes, B]; the second and third or None.
    """
    x0, _, is_token = examples

    def one_pass(k_and_u):
        k, u = k_and_u
        p = examples.probed(jax.random.fold_in(key, k), u, graph, schedule, t_min)
        entropy = graph.score_entropy(score_fn(p.xt, p.sigma), p.sigma, p.xt, x0)
        cost = jax.tree.map(lambda e: p.scale * e, entropy)
        return cost, p.weight, p.mean_weight, -jnp.expm1(-p.sigma[:, 0])

    # A ScoreEntropy of costs, and the weights: [passes, B, L] each; share [passes, B].
    cost, weight, mean_weight, share = jax.lax.map(one_pass, (jnp.arange(len(u)), u))

    def estimate(cost):
        return controlled(cost, weight, mean_weight, is_token)

    if cost.normalised is None:
        return estimate(cost.value), None, None
    normalised = estimate(cost.normalised)
    # What the scores' totals cost is >= 0; added uncontrolled, the bound is never the smaller one.
    penalty = jnp.maximum(cost.value - cost.normalised, 0.0)
    # The masked tokens have one weight; their mean cost is an unbiased estimate at that share.
    cross_entropy = (weight * cost.normalised).sum(axis=-1) / weight.sum(axis=-1)
    value = normalised + jnp.where(is_token, weight * penalty, 0.0)
    return value, normalised, (share, cross_entropy)


def controlled(
    cost: jax.Array, weight: jax.Array, mean_weight: jax.Array, is_token: jax.Array
) -> jax.Array:
    """weight * cost less its control variate at the tokens that count, [passes, B, L]."""
    value = weight * cost - control_variate(cost, weight, mean_weight)
    return jnp.where(is_token, value, 0.0)


def control_variate(cost: jax.Array, weight: jax.Array, mean_weight: jax.Array) -> jax.Array:
    """(weight - mean_weight) * expected cost, which has mean 0; all [passes, B, L].

    What a pass is expected to cost at a token comes from the other passes alone: the mean over
    those that noised the token, shrunk to the mean over the sequence.
    """
    noised = (weight > 0.0).astype(cost.dtype)
    sums, counts = (a.sum(axis=0) - a for a in (cost * noised, noised))
    overall = sums.sum(axis=-1, keepdims=True) / jnp.maximum(counts.sum(-1, keepdims=True), 1.0)
    expected_cost = (sums + overall) / (counts + 1.0)
    return (weight - mean_weight) * expected_cost


def _reconstruction(key, passes, examples, score_fn, graph, schedule, t_min):
    """-log of the denoiser's probability of x0 at t_min, from each pass, [passes, B, L]."""
    x0 = examples.x0
    t = jnp.full((len(x0), 1), t_min)

    def one_pass(k):
        xt = examples.noised(jax.random.fold_in(key, k), graph, schedule.sigma(t))
        log_p = denoise(xt, t, score_fn, graph, schedule).log_probability(x0)
        return jnp.where(examples.is_token, -log_p, 0.0)

    return jax.lax.map(one_pass, jnp.arange(passes))


def stratified(key: jax.Array, index: jax.Array, passes: int) -> jax.Array:
    """Numbers in [0, 1) for every pass over the examples with these indices, float32 [passes, B].

    Pass k of an example falls into the k-th of `passes` equal parts; within the part the examples
    of the corpus are spread evenly from a random offset. Each is uniform in its part.
    """
    offset = jax.random.uniform(key, (passes, 1))
    # index * GOLDEN mod 1 in integers: float32 has no digits left at large indices.
    multiple = index.astype(jnp.uint32) * jnp.uint32(round(GOLDEN * 2**32))
    u = (offset + multiple.astype(jnp.float32) * 2.0**-32) % 1.0
    return (jnp.arange(passes)[:, None] + u) / passes


def check_passes(passes: int, name: str = "passes") -> None:
    """ValueError unless the passes can be compared in pairs."""
    if not isinstance(passes, numbers.Integral) or passes < 2 or passes % 2:
        raise ValueError(f"{name} {passes} must be an even number of at least 2")


def pairs_variance(values: jax.Array) -> jax.Array:
    """Variance of the mean of values [..., passes] from the differences within pairs of neighbours,
    [...]; 0 for a single pass, which is exact.

    The slope of the pairs' means along the passes is subtracted; what else the entries' means
    differ by counts as noise.
    """
    passes = values.shape[-1]
    if passes == 1:
        return 0.0 * values[..., 0]
    pairs = values.reshape(*values.shape[:-1], passes // 2, 2)
    differences = pairs[..., 1] - pairs[..., 0]
    if passes > 4:
        middle = pairs.mean(axis=-1)
        # Neighbouring pairs are two entries apart. A pair's own noise stays out of its slope.
        slope = (middle[..., 2:] - middle[..., :-2]) / 4.0
        first = (middle[..., 2:3] - middle[..., 1:2]) / 2.0
        last = (middle[..., -2:-1] - middle[..., -3:-2]) / 2.0
        concat = values.__array_namespace__().concat  # of jax or of numpy
        differences = differences - concat([first, slope, last], axis=-1)
    return (differences**2).sum(axis=-1) / passes**2


def perplexity(nats_per_token: float) -> float:
    """exp(nats_per_token), inf where a float64 cannot hold it."""
    return math.exp(nats_per_token) if nats_per_token < 709.0 else math.inf


def perplexity_error(nats_per_token: float, error: float | None) -> float | None:
    """The standard error of `perplexity` to first order, from that of nats_per_token.

    None where that is unknown, 0 where it is 0: of an infinite perplexity too.
    """
    if error is None:
        return None
    return perplexity(nats_per_token) * error if error else 0.0


def bits_per_character(nats: float, characters: int) -> float:
    """Total nats over a text, per character of it, in bits."""
    return nats / characters / math.log(2.0)
