"""The exact distributions that discrete diffusion samplers end in, on small languages.

A sampler is a Markov chain over the D^L noised sequences of `toy_languages.Model`; what it ends in
is computed here, in float64 and without one random number. Nothing is imported from the package,
whose samplers are tested against this. Formulas are those of the papers whose arXiv ids are named.

`times` are the times at which the network is called, falling, the first mostly 1: call k goes from
times[k] to times[k + 1] and the last one to time 0, where nothing is noised. So a method of one
call a step makes len(times) calls. Positions are drawn independently in a step: a step is a table
[D^L, L, D] whose row x, i is the distribution of token i of the next state. a_t is alpha at t.
"""

import itertools
from collections.abc import Callable

import numpy as np
from toy_languages import Model, normalised, sequences

# --- a step


def rows(step: np.ndarray) -> np.ndarray:
    """A table [N, L, D] of independent tokens as distributions of whole sequences, [N, D^L]."""
    joint = np.ones((len(step), 1))
    for i in range(step.shape[1]):
        joint = (joint[:, :, None] * step[:, i, None, :]).reshape(len(step), -1)
    return joint


def push(p: np.ndarray, step: np.ndarray) -> np.ndarray:
    """sum over x of p(x) prod over i of step[x, i, y_i], [D^L]: a matmul of two half sequences."""
    half = step.shape[1] // 2
    return ((p[:, None] * rows(step[:, :half])).T @ rows(step[:, half:])).ravel()


def ancestral(model: Model, p, a_t: float, a_s: float, kappa: float = 1.0, x=None) -> np.ndarray:
    """x_s given x_t = x, by default every state, with the posterior p [N, L, V] of x0, from share
    a_t to a_s: [N, L, D].

        kappa q(x_s | x_t) + (1 - kappa) [a_s p + (1 - a_s) pi]        (Psi, 2602.21185)

    where q(x_s | x_t) = sum over x0 of p(x0) q(x_s | x0) q(x_t | x_s) / q(x_t | x0).
    """
    x = model.states if x is None else x
    q_t, q_s = (model.transition(a)[:, : model.vocab] for a in (a_t, a_s))
    at_x = q_t[x]
    weight = np.divide(p, at_x, out=np.zeros_like(p), where=at_x > 0)
    back = (weight @ q_s.T) * model.transition(a_t / a_s)[x]
    fresh = a_s * model.padded(p) + (1.0 - a_s) * model.pi
    return kappa * back + (1.0 - kappa) * fresh


def leap(x: np.ndarray, rates: np.ndarray, step: float) -> np.ndarray:
    """From states x [N, L], at most one jump a token: with probability 1 - exp(-step * total)."""
    total = rates.sum(axis=-1, keepdims=True)
    jump = -np.expm1(-step * total)
    moved = jump * np.divide(rates, total, out=np.zeros_like(rates), where=total > 0)
    return moved + (1.0 - jump) * np.eye(rates.shape[-1])[x]


def chain(model: Model, times, step: Callable) -> np.ndarray:
    """Starts, applies step(p, t, s) from time to time, and ends with the posterior: [V^L]."""
    p = model.start
    for t, s in itertools.pairwise(times):
        p = step(p, float(t), float(s))
    return finish(model, p, times[-1])


def finish(model: Model, p: np.ndarray, t: float) -> np.ndarray:
    """The last call, at t: every token is drawn from its posterior, [V^L]."""
    return model.clean(push(p, model.padded(model.posterior(t, last=True))))


# --- samplers: each returns the distribution it ends in, [V^L]


def law_of_euler(model: Model, times, normalised_scores: bool = False) -> np.ndarray:
    """Lou et al. (2310.16834), equation (18): 1{y = x} + (t - s) rate(x, y), an entry below 0
    being 0, normalised."""

    def step(p, t, s):
        moved = (t - s) * model.rates(t, normalised_scores)
        stay = np.maximum(1.0 - moved.sum(axis=-1, keepdims=True), 0.0)
        return push(p, normalised(moved + stay * model.here))

    return chain(model, times, step)


def law_of_tweedie(model: Model, times, normalised_scores: bool = False) -> np.ndarray:
    """Lou et al. (2310.16834), Theorem 4.2: exp(-d Q) s, at y, times exp(d Q)[x, y], where d is the
    noise between t and s; an entry below 0 is 0, normalised.

    normalised_scores: by the posterior instead, x_s ~ q(x_s | x_t, x0), the same for exact scores.
    Absorbing noise then reveals with probability (a_s - a_t) / (1 - a_t) whatever the scores are.
    """

    def step(p, t, s):
        a_t, a_s = model.schedule.alpha(t), model.schedule.alpha(s)
        if normalised_scores or a_t == 0.0:  # the limit of the scores' form at alpha = 0
            return push(p, ancestral(model, model.posterior(t), a_t, a_s))
        forward = model.transition(a_t / a_s)
        score = np.where(model.here == 1, 1.0, model.scores(a_t))
        back = score @ np.linalg.inv(forward).T * forward[model.states]
        return push(p, normalised(np.maximum(back, 0.0)))

    return chain(model, times, step)


def law_of_first_hitting(model: Model) -> np.ndarray:
    """First-hitting (2409.02908), absorbing: L times, one of the n masked positions, each as
    likely, is revealed from its posterior; the time t u^(1/n) is nothing to an exact network."""
    posterior, p = model.posterior(0.5), model.start
    is_masked = model.states == model.vocab
    for n in range(model.length, 0, -1):
        x, i = np.nonzero(is_masked & (is_masked.sum(axis=1, keepdims=True) == n))
        revealed = np.zeros_like(p)
        for y in range(model.vocab):
            there = x + (y - model.vocab) * model.stride[i]
            np.add.at(revealed, there, p[x] / n * posterior[x, i, y])
        p = revealed
    return model.clean(p)


def law_of_trapezoidal(model: Model, times, theta: float = 0.5, first: str = "leap"):
    """theta-trapezoidal (2502.00234): two calls a step, one in the last: 2 len(times) - 1.

    From x at t to z at rho = t - theta (t - s), a leap with the rates mu_t(x); from z, one by
    (1 - theta) (t - s) with max(0, a1 mu_rho(z) - a2 mu_t(x)), rates to the same target token, none
    to z_i itself; a1 = 1 / (2 theta (1 - theta)), a2 = a1 - 1 = ((1 - theta)^2 + theta^2) a1.

    Of second order where nothing is cut at 0: where seeing more tokens never multiplies a
    probability by less than a2 / a1, at least 1/2 (theta = 1/2). Of first order otherwise.
    first="tweedie" goes to rho by the posterior: no loss for absorbing noise, whose conditionals
    know no time, but of first order for uniform noise, whose alpha must not be 0 at the start.
    """
    a1 = 1.0 / (2.0 * theta * (1.0 - theta))

    def step(p, t, s):
        rho = t - theta * (t - s)
        rates_t, rates_rho = model.rates(t), model.rates(rho)
        a_t, a_rho = model.schedule.alpha(t), model.schedule.alpha(rho)
        to_rho = leap(model.states, rates_t, t - rho)
        if first == "tweedie":
            to_rho = ancestral(model, model.posterior(t), a_t, a_rho)
        result = np.zeros_like(p)
        for x in np.array_split(np.flatnonzero(p), np.count_nonzero(p) // 32 + 1):
            joint = p[x, None] * rows(to_rho[x])
            k, z = np.nonzero(joint)
            rates = np.maximum(0.0, a1 * rates_rho[z] - (a1 - 1.0) * rates_t[x[k]])
            rates[model.here[z] == 1] = 0.0
            result += push(joint[k, z], leap(model.states[z], rates, rho - s))
        return result

    return chain(model, times, step)


def law_of_two_stage(model: Model, times, theta: float = 0.5) -> np.ndarray:
    """A second-order sampler without rates (not published): two calls a step, and in the last, to
    time 0, as well: 2 len(times). Tweedie with normalised scores from x at t to z at rho =
    t - theta (t - s), and from z to s with c1 f_rho(z) - (c1 - 1) f_t(x), cut at 0 and normalised,
    for the distribution f of a clean token given the other tokens;

        c1 = (u + v)^2 / (2 u v),    u = a_rho - a_t,    v = a_s - a_rho

    in proportion to the chances of being revealed in either stage: two tokens revealed in one step
    then have their exact distribution if nothing is cut.
    """

    def f(t):
        seen = model.likelihood(model.schedule.alpha(t))[model.states]
        p = model.posterior(t)
        return normalised(np.divide(p, seen, out=np.zeros_like(p), where=seen > 0))

    p = model.start
    for t, s in itertools.pairwise([*times, 0.0]):
        rho = t - theta * (t - s)
        a_t, a_rho, a_s = (model.schedule.alpha(time) if time else 1.0 for time in (t, rho, s))
        u, v = a_rho - a_t, a_s - a_rho
        c1 = (u + v) ** 2 / (2.0 * u * v)
        f_t, f_rho = f(t), f(rho)
        posterior, seen = model.posterior(rho), model.likelihood(a_rho)
        to_rho, after = ancestral(model, model.posterior(t), a_t, a_rho), np.zeros_like(p)
        for x in np.array_split(np.flatnonzero(p), np.count_nonzero(p) // 32 + 1):
            joint = p[x, None] * rows(to_rho[x])
            k, z = np.nonzero(joint)
            q = np.maximum(0.0, c1 * f_rho[z] - (c1 - 1.0) * f_t[x[k]]) * seen[model.states[z]]
            total = q.sum(axis=-1, keepdims=True)
            q = np.where(total > 0, q / np.where(total > 0, total, 1.0), posterior[z])
            after += push(joint[k, z], ancestral(model, q, a_rho, a_s, x=model.states[z]))
        p = after
    return model.clean(p)


def law_of_psi(model: Model, times, kappa: float | Callable = 1.0) -> np.ndarray:
    """Psi (2602.21185), both noises: see `ancestral`; kappa a number or a function of
    (t, a_t, a_s). At 1 it is Tweedie with normalised scores, at 0 it draws every token anew."""
    kappa_at = kappa if callable(kappa) else lambda *_: kappa

    def step(p, t, s):
        a_t, a_s = model.schedule.alpha(t), model.schedule.alpha(s)
        return push(p, ancestral(model, model.posterior(t), a_t, a_s, kappa_at(t, a_t, a_s)))

    return chain(model, times, step)


def cap(eta: float) -> Callable:
    """ReMDM's probability that a clean token is masked again, min(eta, sigma_max)."""
    return lambda t, a_t, a_s: min(eta, sigma_max(a_t, a_s))


def rescale(eta: float) -> Callable:
    """The same, eta sigma_max."""
    return lambda t, a_t, a_s: eta * sigma_max(a_t, a_s)


def loop(eta: float, t_on: float = 0.55, t_off: float = 0.05) -> Callable:
    """The same, `cap` for t_off < t <= t_on, 0 elsewhere; the schedule is then Loop."""
    return lambda t, a_t, a_s: min(eta, sigma_max(a_t, a_s)) if t_off < t <= t_on else 0.0


def sigma_max(a_t: float, a_s: float) -> float:
    """The largest probability of masking again that leaves all of ReMDM's step positive."""
    return 1.0 if a_t == 0.0 else min(1.0, (1.0 - a_s) / a_t)


def law_of_remdm(model: Model, times, sigma: Callable) -> np.ndarray:
    """ReMDM (2503.00307), absorbing, Psi with kappa = 1 - sigma / (1 - a_s);
    sigma = sigma(t, a_t, a_s) from `cap`, `rescale` or `loop`.

        from MASK   y with p(y) (a_s - (1 - sigma) a_t) / (1 - a_t),
                    MASK with (1 - a_s - sigma a_t) / (1 - a_t)
        from y      MASK with sigma
    """

    def step(p, t, s):
        a_t, a_s = model.schedule.alpha(t), model.schedule.alpha(s)
        return push(p, remdm_step(model, model.posterior(t), a_t, a_s, sigma(t, a_t, a_s)))

    return chain(model, times, step)


def remdm_step(model: Model, p: np.ndarray, a_t: float, a_s: float, sigma) -> np.ndarray:
    """One step of `law_of_remdm`, [D^L, L, D]; sigma a number or [D^L, L]."""
    sigma = np.broadcast_to(sigma, model.states.shape)[..., None]
    hidden = model.padded(p) * (a_s - (1.0 - sigma) * a_t) + model.pi * (1.0 - a_s - sigma * a_t)
    shown = (1.0 - sigma) * model.here + sigma * model.pi
    return np.where(model.states[..., None] == model.vocab, hidden / (1.0 - a_t), shown)


def law_of_remdm_conf(model: Model, times) -> np.ndarray:
    """ReMDM-conf (2503.00307), absorbing: a clean token is masked with sigma_max times the softmax,
    over the clean positions, of minus the probability it was revealed with; a masked position has
    sigma = 0. The state holds these probabilities (inf at MASK): for small cases."""
    chains = {(len(model.states) - 1, (np.inf,) * model.length): 1.0}
    for t, s in itertools.pairwise(times):
        a_t, a_s, after = model.schedule.alpha(t), model.schedule.alpha(s), {}
        posterior = model.posterior(t)
        for (x, shown), probability in chains.items():
            weight = np.exp(-np.array(shown))
            sigma = sigma_max(a_t, a_s) * weight / max(weight.sum(), 1e-300)
            table = remdm_step(model, posterior, a_t, a_s, sigma)[x]
            for y in itertools.product(*(np.flatnonzero(row) for row in table)):
                chance = np.prod([row[token] for row, token in zip(table, y, strict=True)])
                then = tuple(
                    np.inf if new == model.vocab else posterior[x, i, new] if np.isinf(old) else old
                    for i, (new, old) in enumerate(zip(y, shown, strict=True))
                )
                key = (int(np.dot(y, model.stride)), then)
                after[key] = after.get(key, 0.0) + probability * chance
        chains = after
    p = np.zeros(len(model.states))
    np.add.at(p, [x for x, _ in chains], list(chains.values()))
    return finish(model, p, times[-1])


# --- samplers that choose the positions by what the network says


def accept_by_entropy(p: np.ndarray, is_free: np.ndarray, gamma: float) -> np.ndarray:
    """Free positions by rising entropy (the first of equals first) while the entropies before sum
    to at most gamma, bool [N, L]."""
    entropy = np.where(is_free, -(p * np.log(np.maximum(p, 1e-300))).sum(axis=-1), 1e9)
    order = np.argsort(entropy, axis=-1, kind="stable")
    ranked = np.take_along_axis(entropy, order, axis=-1)
    accepted = np.empty_like(is_free)
    np.put_along_axis(accepted, order, np.cumsum(ranked, axis=-1) - ranked <= gamma, axis=-1)
    return accepted & is_free


def accept_by_confidence(p: np.ndarray, is_free: np.ndarray, threshold: float) -> np.ndarray:
    """Free positions whose likeliest token has more than threshold, at least the best, [N, L]."""
    best = np.where(is_free, p.max(axis=-1), -1.0)
    first = np.arange(best.shape[1]) == best.argmax(axis=-1, keepdims=True)
    return is_free & ((best > threshold) | first)


def reveal_until_done(model: Model, accept: Callable, bound: float) -> tuple[np.ndarray, float]:
    """Absorbing: reveals what is accepted until nothing is masked; and the mean number of calls."""
    posterior, is_free, p, calls = model.posterior(0.5), model.states == model.vocab, model.start, 0
    accepted = accept(posterior, is_free, bound)[..., None]
    step = np.where(accepted, model.padded(posterior), model.here)
    for _ in range(model.length):
        calls += p[is_free.any(axis=1)].sum()
        p = push(p, step)
    return model.clean(p), float(calls)


def law_of_confidence(model: Model, threshold: float = 0.9) -> tuple[np.ndarray, float]:
    """Confidence threshold (Fast-dLLM, 2505.22618), absorbing, and its mean number of calls."""
    return reveal_until_done(model, accept_by_confidence, threshold)


def law_of_entropy_bounded(model: Model, gamma: float, times=None) -> tuple[np.ndarray, float]:
    """Entropy-bounded (2505.24857), and its mean number of calls.

    Absorbing: the accepted positions are drawn, the others stay MASK, until none is left. Uniform:
    all are free at every call; the accepted ones are drawn from the posterior at its time and the
    others from pi; all are drawn at the last. It does not stop early.
    """
    if model.graph == "absorbing":
        return reveal_until_done(model, accept_by_entropy, gamma)

    def step(p, t, s):
        posterior = model.posterior(t)
        accepted = accept_by_entropy(posterior, np.ones_like(model.states, bool), gamma)
        return push(p, np.where(accepted[..., None], posterior, model.pi))

    return chain(model, times, step), float(len(times))


def law_of_path_planning(model: Model, calls: int, eta: float = 1.0, planner=0.0) -> np.ndarray:
    """P2 (2502.03540), absorbing: draws x0 where x is MASK; after call k of K the L (1 - k / K),
    rounded down, positions of the lowest score are MASK (the first of equals), the others shown.

    The score is log p(x0) where x is MASK and eta * planner elsewhere: planner [D^L, L] is the
    log-probability of the revealed tokens, 0 by default: what absorbing posteriors say of them.
    """
    posterior, clean, p = model.posterior(0.5), sequences(model.vocab, model.length), model.start
    joint = rows(posterior)
    x, z = np.nonzero(joint)
    picked = np.take_along_axis(posterior[x], clean[z][..., None], axis=-1)[..., 0]
    of_shown = eta * np.broadcast_to(planner, model.states.shape)[x]
    score = np.where(model.states[x] == model.vocab, np.log(picked), of_shown)
    rank = np.argsort(np.argsort(score, axis=-1, kind="stable"), axis=-1)
    for k in range(1, calls + 1):
        hidden = rank < model.length * (calls - k) // calls
        to = np.where(hidden, model.vocab, clean[z]) @ model.stride
        p = np.bincount(to, weights=p[x] * joint[x, z], minlength=len(p))
    return model.clean(p)
