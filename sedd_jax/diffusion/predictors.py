"""Predictors: one reverse step each, as functions (xt, Step) -> Distribution. Imports jax only.

euler and tweedie are the paper's. The others use the bridge from scores to the distribution p of a
clean token, `Graph.clean_probabilities`, so they run on any SEDD model. A new predictor is such a
function and a line in PREDICTORS; `traits` says what is special about it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sedd_jax.diffusion.graph import Graph, lift
from sedd_jax.diffusion.reverse import (
    Distribution,
    Plan,
    Shape,
    Switch,
    Table,
    shape_probabilities,
)
from sedd_jax.diffusion.schedules import Schedule
from sedd_jax.diffusion.scores import ScoreFn, Scores, Sigma, Tokens, Weights


class Options(NamedTuple):
    """The numbers of predictors; docs/samplers.md says what they do."""

    theta: jax.Array | float = 0.5  # where a step of two calls is cut, in (0, 1)
    eta: jax.Array | float = 0.02  # how much ReMDM masks again, in [0, 1]
    kappa: jax.Array | float = 0.95  # psi: what is not noised anew, in [0, 1]
    gamma: jax.Array | float = 0.1  # nats of entropy that are drawn together, at least 0
    threshold: jax.Array | float = 0.9  # the probability that is confident, in [0, 1)
    shape: Shape | None = None  # of the distribution of clean tokens
    normalised: bool = False  # the scores are normalised first (euler, tweedie)


class Step(NamedTuple):
    """What a predictor knows of one reverse step, from time t to s < t."""

    t: jax.Array  # float32 [B, 1]
    s: jax.Array  # float32 [B, 1]
    score_fn: ScoreFn
    graph: Graph
    schedule: Schedule
    options: Options = Options()
    index: jax.Array | int = 0  # of the step,
    steps: jax.Array | int = 1  # of so many; the denoiser's call comes after them
    is_free: jax.Array | None = None  # bool [B, L]: not known
    keys: jax.Array | None = None  # [B], for a draw of the predictor's own
    sample_keys: jax.Array | None = None  # [B], the same in all steps of a sample
    draw: Callable[[jax.Array, Distribution], Tokens] | None = None
    confidence: jax.Array | None = None  # float32 [B, L]: what each token was revealed with

    @property
    def noise(self) -> tuple[Sigma, Sigma]:
        """Total noise at t and at s."""
        return self.schedule.sigma(self.t), self.schedule.sigma(self.s)

    def count_left(self, count: jax.Array) -> jax.Array:
        """How many of `count` masked tokens are masked after this step if the calls that are left,
        the denoiser's among them, reveal equally many, but at least one; int32 [B, 1]."""
        calls = jnp.maximum(self.steps + 1 - self.index, 1)
        return count - (count + calls - 1) // calls

    def sigma_of_share(self, share: jax.Array) -> Sigma:
        """The total noise under which this share [B, 1] of the tokens would be masked, of the share
        that is masked at t = 1."""
        highest = self.schedule.sigma(jnp.ones_like(share))
        return jnp.minimum(-jnp.log1p(share * jnp.expm1(-highest)), highest)


class Traits(NamedTuple):
    """What is special about a predictor; a plain function has the defaults."""

    graph: str | tuple[str, ...] | None = None  # of GRAPHS, those that it is for; None: all
    calls: int = 1  # of the network in a step
    is_adaptive: bool = False  # a sample is done when nothing is masked
    is_confident: bool = False  # it needs Step.confidence
    has_table: bool = True  # its Distribution has probabilities
    has_own_times: bool = False  # it cannot begin in the middle of the grid's


def traits(**special: Any) -> Callable:
    """Marks a predictor with these of its `Traits`."""

    def mark(predictor):
        predictor.traits = Traits(**special)
        return predictor

    return mark


def trait(predictor: Callable | None, name: str) -> Any:
    """One of a predictor's `Traits`; a functools.partial has those of its function."""
    predictor = getattr(predictor, "func", predictor)
    return getattr(getattr(predictor, "traits", Traits()), name)


# --- the paper's


def euler(xt: Tokens, step: Step) -> Distribution:
    """One Euler step, equation (18); normalised: with the time's own chance of a reveal."""
    sigma, slope = step.schedule.sigma(step.t), step.schedule.dsigma_dt(step.t)
    scores, size = step.score_fn(xt, sigma), (step.t - step.s) * slope
    if step.options.normalised:
        reveal = jnp.minimum(size / jnp.expm1(sigma), 1.0)
        return _switch(scores, xt, step, reveal)
    return _shaped(step.graph.euler(scores, xt, size), step.options.shape)


def tweedie(xt: Tokens, step: Step) -> Distribution:
    """Tweedie tau-leaping, Theorem 4.2; "analytic" in the original. Normalised: by the distribution
    of clean tokens, which for the exact score is the same; so too where uniform noise is shaped."""
    sigma_t, sigma_s = step.noise
    scores, shape = step.score_fn(xt, sigma_t), step.options.shape
    if step.options.normalised or (shape is not None and step.graph.mask is None):
        return step.graph.ancestral(scores, xt, sigma_t, sigma_s, shape=shape)
    return _shaped(step.graph.tweedie(scores, xt, sigma_t - sigma_s), shape)


def _shaped(distribution: Distribution, shape: Shape | None) -> Distribution:
    return distribution if shape is None else dataclasses.replace(distribution, shape=shape)


def _switch(scores: Scores, xt: Tokens, step: Step, reveal: jax.Array) -> Switch:
    """A masked token is revealed with this chance, [B, L] or [B, 1]; none is masked again."""
    chance, weights = reveal.astype(jnp.float32), Weights.of(step.options.shape)
    return Switch(scores, xt, step.graph.mask, chance, jnp.zeros_like(chance), weights)


# --- exact, at one call a token


@traits(graph="absorbing", is_adaptive=True)
def first_hitting(xt: Tokens, step: Step) -> Distribution:
    """First-hitting (Zheng et al. 2024, 2409.02908): every token has a time of its own at which it
    is revealed; with as many calls as free tokens, one at each call, exact in distribution. With
    fewer calls equally many at each. Noise that spares a share u of the tokens is that of the next
    token's time."""
    is_masked = xt == step.graph.mask
    hit = jax.vmap(lambda key: jax.random.uniform(key, xt.shape[1:]))(step.sample_keys)
    hit = jnp.where(is_masked, hit, -1.0)
    is_later = jnp.argsort(jnp.argsort(-hit, axis=-1), axis=-1)  # rank: the next to be revealed, 0
    count = is_masked.sum(axis=-1, keepdims=True, dtype=jnp.int32)
    revealed = is_masked & (is_later < count - step.count_left(count))
    sigma = step.sigma_of_share(jnp.maximum(hit.max(axis=-1, keepdims=True), 1e-6))
    return _switch(step.score_fn(xt, sigma), xt, step, revealed)


# --- second order: two calls a step


@traits(graph=("absorbing", "uniform"), calls=2)
def two_stage(xt: Tokens, step: Step) -> Distribution:
    """To a time rho between t and s, and from there with c p_rho - (c - 1) p_t, cut at 0, for p:

        c = (u + v)^2 / (2 u v),   u = alpha_rho - alpha_t,   v = alpha_s - alpha_rho

    in proportion to the chances of being revealed in either stage. Two tokens that are revealed in
    one step then have their exact distribution, if nothing is cut. For uniform noise p is the
    distribution given the other tokens. No rates, so t = 1 is like any other time.
    """
    (sigma_t, sigma_s), graph = step.noise, step.graph
    rho = step.t - step.options.theta * (step.t - step.s)
    sigma_rho = step.schedule.sigma(rho)
    before = step.score_fn(xt, sigma_t)
    first = graph.ancestral(before, xt, sigma_t, sigma_rho, shape=step.options.shape)
    z = jnp.where(step.is_free, step.draw(step.keys, first), xt)
    scores = step.score_fn(z, sigma_rho)
    ratio = -jnp.expm1(sigma_rho - sigma_t) / jnp.expm1(sigma_rho - sigma_s)  # u / v
    c = 1.0 + 0.5 * (ratio + 1.0 / ratio)
    shape = step.options.shape or (lambda row: row)
    if graph.mask is not None:

        def weights(row, row_before, c):
            p, p_before = jax.nn.softmax(row), jax.nn.softmax(row_before)
            return shape(jnp.log(_cut(c * p - (c - 1.0) * p_before, p)))

        arrived = graph.ancestral(scores, z, sigma_rho, sigma_s)
        values = (jnp.broadcast_to(c, z.shape),)
        return dataclasses.replace(arrived, weights=Weights(weights, (before,), values))

    def table():
        def token(score, score_before, z, x, sigma_t, sigma_rho, sigma_s, c):
            f = graph.given_others(score, sigma_rho)
            q = _cut(c * f - (c - 1.0) * graph.given_others(score_before, sigma_t), f)
            p = shape_probabilities(graph.with_own(q, z, sigma_rho), step.options.shape)
            return graph.ancestral_probabilities(p, z, sigma_rho, sigma_s, 1.0)

        tables = jnp.exp(scores.log_score()), jnp.exp(before.log_score())
        return lift(token, *tables, z, xt, sigma_t, sigma_rho, sigma_s, c)

    return Table(table)


def _cut(q: jax.Array, otherwise: jax.Array) -> jax.Array:
    """q without what is below 0; `otherwise` where nothing is left."""
    q = jnp.maximum(q, 0.0)
    return jnp.where(q.sum() > 0.0, q, otherwise)


@traits(calls=2)
def theta_trapezoidal(xt: Tokens, step: Step) -> Distribution:
    """theta-trapezoidal (Ren et al. 2025, 2502.00234): to rho = t - theta (t - s), and from there a
    leap with the rates max(0, a mu_rho - (a - 1) mu_t), a = 1 / (2 theta (1 - theta)).

    Of second order where nothing is cut at 0. The first stage is Tweedie's for absorbing noise and
    a leap for uniform noise, as its order asks.
    """
    theta, graph = step.options.theta, step.graph
    a = 1.0 / (2.0 * theta * (1.0 - theta))
    rho = step.t - theta * (step.t - step.s)
    sigma_t, sigma_rho = step.schedule.sigma(step.t), step.schedule.sigma(rho)
    slope_t, slope_rho = step.schedule.dsigma_dt(step.t), step.schedule.dsigma_dt(rho)
    before = step.score_fn(xt, sigma_t)
    if graph.mask is not None:
        first = graph.ancestral(before, xt, sigma_t, sigma_rho, shape=step.options.shape)
    else:
        first = Table(lambda: lift(_leap, _rates(graph, before, xt, slope_t), xt, step.t - rho))
    z = jnp.where(step.is_free, step.draw(step.keys, first), xt)
    scores = step.score_fn(z, sigma_rho)
    shape, time = step.options.shape or (lambda row: row), rho - step.s
    if graph.mask is not None:

        def weights(row, row_before, w, w_before):
            means = w * jax.nn.softmax(shape(row)) - w_before * jax.nn.softmax(shape(row_before))
            return jnp.log(_leap(jnp.append(means, 0.0), graph.mask, 1.0))

        means = a * time * slope_rho / jnp.expm1(sigma_rho)
        means_before = (a - 1.0) * time * slope_t / jnp.expm1(sigma_t)
        values = tuple(jnp.broadcast_to(w, z.shape) for w in (means, means_before))
        all_masked = _switch(scores, z, step, jnp.ones(z.shape))
        return dataclasses.replace(all_masked, weights=Weights(weights, (before,), values))

    def table():
        rates = a * _rates(graph, scores, z, slope_rho)
        rates -= (a - 1.0) * _rates(graph, before, xt, slope_t)
        return lift(_leap, rates, z, time)

    return Table(table)


def _rates(graph: Graph, scores: Scores, x: Tokens, slope: jax.Array) -> jax.Array:
    """Reverse rates from x to every state in time, 0 to itself, float32 [B, L, D]."""

    def token(score, x, slope):
        return jnp.where(jnp.arange(graph.dim) == x, 0.0, slope * graph.reverse_rate(score, x))

    return lift(token, jnp.exp(scores.log_score()), x, slope)


def _leap(rates: jax.Array, x: jax.Array, time: jax.Array) -> jax.Array:
    """[D]: at most one jump from x in `time`, with rates [D] where they are above 0."""
    is_here = jnp.arange(rates.size) == x
    means = jnp.where(is_here, 0.0, jnp.maximum(time * rates, 0.0))
    total = means.sum()
    share = -jnp.expm1(-total) / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
    return jnp.where(is_here, jnp.exp(-total), means * share)


# --- second thoughts: a token may be noised again


def psi(xt: Tokens, step: Step) -> Distribution:
    """Psi (Deschenaux et al. 2026, 2602.21185), both noises: `Graph.ancestral` with kappa."""
    sigma_t, sigma_s = step.noise
    how = {"kappa": step.options.kappa, "shape": step.options.shape}
    return step.graph.ancestral(step.score_fn(xt, sigma_t), xt, sigma_t, sigma_s, **how)


@traits(graph="absorbing")
def remdm_cap(xt: Tokens, step: Step) -> Distribution:
    """ReMDM (Wang et al. 2025, 2503.00307): a token is masked again with min(eta, highest)."""
    return _remdm(xt, step, lambda highest: jnp.minimum(step.options.eta, highest))


@traits(graph="absorbing")
def remdm_rescale(xt: Tokens, step: Step) -> Distribution:
    """ReMDM: a token is masked again with eta * highest."""
    return _remdm(xt, step, lambda highest: step.options.eta * highest)


# Of ReMDM's loop: between the times T_ON and T_OFF the share of clean tokens stays what it is at
# the noise's time LOOP_TIME, a tenth from the end.
T_ON, T_OFF, LOOP_TIME = 0.55, 0.05, 0.1


@traits(graph="absorbing", has_own_times=True)
def remdm_loop(xt: Tokens, step: Step) -> Distribution:
    """ReMDM's loop: a draft by T_ON, then only second thoughts until T_OFF, then the rest."""

    def warped(t):
        return jnp.interp(
            t, jnp.array([0.0, T_OFF, T_ON, 1.0]), jnp.array([0.0, *2 * [LOOP_TIME], 1.0])
        )

    is_loop = (T_OFF < step.t) & (step.t <= T_ON)

    def chance(highest):
        return jnp.where(is_loop, jnp.minimum(step.options.eta, highest), 0.0)

    return _remdm(xt, step._replace(t=warped(step.t), s=warped(step.s)), chance)


@traits(graph="absorbing", is_confident=True)
def remdm_confidence(xt: Tokens, step: Step) -> Distribution:
    """ReMDM: the highest chance is shared among the tokens by a softmax of minus the probability
    that each was revealed with. Does not keep the noise's marginals: a heuristic."""
    may_be_masked = (xt != step.graph.mask) & step.is_free
    weight = jnp.where(may_be_masked, -step.confidence, -jnp.inf)
    share = jnp.where(may_be_masked, jax.nn.softmax(weight, axis=-1), 0.0)
    return _remdm(xt, step, lambda highest: highest * share)


def _remdm(xt: Tokens, step: Step, chance: Callable[[jax.Array], jax.Array]) -> Distribution:
    """`ancestral` with the kappa that masks a token again with chance(highest), [B, 1] or [B, L];
    highest is what leaves every probability at least 0."""
    sigma_t, sigma_s = step.noise
    masked_s = -jnp.expm1(-sigma_s)
    kappa = 1.0 - chance(jnp.minimum(1.0, masked_s * jnp.exp(sigma_t))) / masked_s
    how = {"kappa": kappa, "shape": step.options.shape}
    return step.graph.ancestral(step.score_fn(xt, sigma_t), xt, sigma_t, sigma_s, **how)


# --- positions chosen by what the network says: fewer calls where it is sure


@traits(graph=("absorbing", "uniform"), is_adaptive=True)
def entropy_bounded(xt: Tokens, step: Step) -> Distribution:
    """Entropy-bounded (Ben-Hamu et al. 2025, 2505.24857): draws the tokens of the lowest entropies,
    as long as those before have at most gamma nats together. For absorbing noise the others stay
    masked; for uniform noise they are noised anew, and the steps are not cut short: a gamma much
    below the nats of a whole text then leaves noise in it."""
    graph = step.graph
    if graph.mask is not None:
        scores, is_masked = _at_share(xt, step)
        _, entropy = scores.peak_and_entropy(is_masked)
        return _switch(scores, xt, step, _lowest(entropy, is_masked, step.options.gamma))
    sigma = step.schedule.sigma(step.t)
    scores = step.score_fn(xt, sigma)

    def table():
        p = lift(graph.clean_probabilities, jnp.exp(scores.log_score()), xt, sigma)
        entropy = -jax.scipy.special.xlogy(p, p).sum(axis=-1)
        drawn = _lowest(entropy, step.is_free, step.options.gamma)[..., None]
        p = lift(lambda p: shape_probabilities(p, step.options.shape), p)
        return jnp.where(drawn, p, 1.0 / graph.vocab_size)

    return Table(table)


def _lowest(entropy: jax.Array, is_free: jax.Array, gamma: jax.Array | float) -> jax.Array:
    """The free positions by rising entropy while those before have at most gamma, bool [B, L]."""
    entropy = jnp.where(is_free, entropy, jnp.inf)
    order = jnp.argsort(entropy, axis=-1)
    ranked = jnp.take_along_axis(jnp.where(is_free, entropy, 0.0), order, axis=-1)
    before = jnp.cumsum(ranked, axis=-1) - ranked
    rank = jnp.argsort(order, axis=-1)
    return is_free & (jnp.take_along_axis(before, rank, axis=-1) <= gamma)


@traits(graph="absorbing", is_adaptive=True)
def confidence(xt: Tokens, step: Step) -> Distribution:
    """Confidence threshold (Wu et al. 2025, 2505.22618): draws where the likeliest token has more
    than `threshold`, and where it has most. A heuristic."""
    scores, is_masked = _at_share(xt, step)
    peak, _ = scores.peak_and_entropy(is_masked)
    peak = jnp.where(is_masked, peak, -jnp.inf)
    is_best = jnp.arange(xt.shape[1]) == peak.argmax(axis=-1, keepdims=True)
    is_sure = peak > jnp.log(step.options.threshold)
    return _switch(scores, xt, step, is_masked & (is_sure | is_best))


def _at_share(xt: Tokens, step: Step) -> tuple[Scores, jax.Array]:
    """Scores at the noise that masks as many tokens as are masked now, and where they are."""
    is_masked = xt == step.graph.mask
    count = is_masked.sum(axis=-1, keepdims=True)
    share = count / jnp.maximum(step.is_free.sum(axis=-1, keepdims=True), 1)
    return step.score_fn(xt, step.sigma_of_share(jnp.maximum(share, 1e-6))), is_masked


@traits(graph="absorbing", has_table=False)
def path_planning(xt: Tokens, step: Step) -> Distribution:
    """Path planning (P2, Peng et al. 2025, 2502.03540) without a planner: draws every masked token
    and keeps the likeliest, as many as the step's share. A heuristic: far from the model's own
    distribution."""
    scores = step.score_fn(xt, step.schedule.sigma(step.t))
    weights = Weights.of(step.options.shape)
    count = (xt == step.graph.mask).sum(axis=-1, keepdims=True, dtype=jnp.int32)
    return Plan(scores, xt, step.graph.mask, step.count_left(count), weights)


# None takes no step: only the denoiser moves.
PREDICTORS = {
    "euler": euler,
    "tweedie": tweedie,
    "none": None,
    "first_hitting": first_hitting,
    "two_stage": two_stage,
    "theta_trapezoidal": theta_trapezoidal,
    "psi": psi,
    "remdm_cap": remdm_cap,
    "remdm_rescale": remdm_rescale,
    "remdm_loop": remdm_loop,
    "remdm_confidence": remdm_confidence,
    "entropy_bounded": entropy_bounded,
    "confidence": confidence,
    "path_planning": path_planning,
}
