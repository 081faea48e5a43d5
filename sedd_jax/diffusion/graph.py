"""What a token graph is: the forward process of one token and all that follows from its rates.

Lou et al. 2024, section 3.3 and appendix C. Imports jax only. Q[y, x] is the rate from x to y, so
the columns of Q sum to zero:

    d p / d sigma = Q p,    p_sigma(. | x0) = exp(sigma Q)[:, x0]

What is written for ONE token takes a state x, a score vector [D] and a scalar sigma, and `lift`
applies it over [B, L]. Losses, samplers and the bound call the methods that take a batch.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import xlogy

from sedd_jax.diffusion.reverse import Distribution, Shape, Table, shape_probabilities
from sedd_jax.diffusion.schedules import Schedule
from sedd_jax.diffusion.scores import Scores, Sigma, Tokens


class ScoreEntropy(NamedTuple):
    """Score entropy per token, before the weight dsigma/dt; float32 [B, L] each.

    normalised is the same for the scores rescaled to the total that the true ones have, and log_z
    the log of how far they are from it, 0 where there are none; None where the graph fixes no
    total.
    """

    value: jax.Array
    normalised: jax.Array | None
    log_z: jax.Array | None


class Probe(NamedTuple):
    """One noised copy of x0 for the bound, and how to read the score entropy at it.

    With cost = scale * score entropy, the sum over l of weight * cost is an unbiased estimate of
    the diffusion part. Given sigma, the mean of weight is mean_weight, whatever the other copies:
    so the sum of (weight - mean_weight) * h has mean 0 for every h that this copy had no part in.
    """

    xt: Tokens  # int32 [B, L]
    sigma: Sigma  # float32 [B, 1]
    scale: jax.Array  # float32 [B, 1]
    weight: jax.Array  # float32 [B, L]
    mean_weight: jax.Array  # float32 [B, L]


def lift(kernel: Callable[..., jax.Array], *arguments: jax.Array) -> jax.Array:
    """Apply a function of one token over [B, L]; [B, 1] arguments are shared along L."""
    shape = jnp.broadcast_shapes(*(a.shape[:2] for a in arguments))
    spread = (jnp.broadcast_to(a, shape + a.shape[2:]) for a in arguments)
    return jax.vmap(jax.vmap(kernel))(*spread)


@dataclasses.dataclass(frozen=True)
class Graph(abc.ABC):
    """The forward process of a token; a graph defines the abstract methods, the rest follows."""

    vocab_size: int
    # Whether a network's logits are those of the clean token's distribution and not log-scores:
    # see scores_of_clean.
    predicts_clean: bool = dataclasses.field(default=False, kw_only=True)

    def __post_init__(self):
        if self.vocab_size < 2:
            raise ValueError(f"vocab_size {self.vocab_size} is below 2; a graph needs two tokens")

    @property
    @abc.abstractmethod
    def dim(self) -> int:
        """Number of states D, the mask included where there is one."""

    @property
    def mask(self) -> int | None:
        """The state that says nothing of the clean token, at which noise ends; None: no state."""
        return None

    # --- one token

    @abc.abstractmethod
    def transp_rate(self, x: jax.Array) -> jax.Array:
        """Forward rates into x: the row Q[x, :], [D]."""

    @abc.abstractmethod
    def transp_transition(self, x: jax.Array, sigma: jax.Array) -> jax.Array:
        """p_sigma(x | y) for every y: the row exp(sigma Q)[x, :], [D]."""

    @abc.abstractmethod
    def staggered_score(self, score: jax.Array, delta_sigma: jax.Array) -> jax.Array:
        """exp(-delta_sigma Q) score, [D]: from the ratios p_sigma(y) / p_sigma(x) those of the
        distribution before, p_{sigma - delta_sigma}(y) / p_sigma(x)."""

    def _at(self, x: jax.Array) -> jax.Array:
        return jax.nn.one_hot(x, self.dim, dtype=jnp.float32)

    def reverse_rate(self, score: jax.Array, x: jax.Array) -> jax.Array:
        """Rates of the reverse process out of x, Q[x, y] score_y; the diagonal is minus the sum of
        the rest, [D]."""
        away = jnp.where(self._at(x) == 1.0, 0.0, self.transp_rate(x) * score)
        return away - self._at(x) * away.sum()

    def euler_probabilities(self, score: jax.Array, x: jax.Array, step: jax.Array) -> jax.Array:
        """p(y) = 1{y = x} + step * reverse rate from x to y, [D]; equation (18)."""
        return self._at(x) + step * self.reverse_rate(score, x)

    def tweedie_probabilities(
        self, score: jax.Array, x: jax.Array, delta_sigma: jax.Array
    ) -> jax.Array:
        """p(y) = [exp(-delta_sigma Q) score]_y * exp(delta_sigma Q)[x, y], [D].

        Theorem 4.2: exact for one token with the exact score.
        """
        return self.staggered_score(score, delta_sigma) * self.transp_transition(x, delta_sigma)

    # --- one token: the distribution of the clean one, the bridge to samplers that start from it

    @abc.abstractmethod
    def clean_probabilities(self, score: jax.Array, x: jax.Array, sigma: jax.Array) -> jax.Array:
        """p(x0 | the whole noised sequence) of a token that is x, [V]; exact for the exact score.

        An approximate score's is made a distribution: nothing below 0, sum 1.
        """

    # --- a batch: the forward process

    @abc.abstractmethod
    def perturb(self, key: jax.Array, x0: Tokens, sigma: Sigma) -> Tokens:
        """xt ~ p_sigma(. | x0), int32 [B, L]."""

    @abc.abstractmethod
    def limit(self, key: jax.Array, shape: tuple[int, ...]) -> Tokens:
        """Draws from p_base, the distribution that sampling starts from, int32 of that shape."""

    def hidden(self, xt: Tokens, where: jax.Array) -> Tokens:
        """xt, of which nothing is known where `where` is True; ValueError without a mask."""
        if self.mask is None:
            raise ValueError(
                f"no state of {self} says that nothing is known of a token, as MASK does; take a "
                "model of absorbing noise"
            )
        return jnp.where(where, self.mask, xt)

    @abc.abstractmethod
    def prior(self, sigma: jax.Array) -> jax.Array:
        """KL(p_sigma(. | x0) || p_base), nats per token, the shape of sigma."""

    def probe(
        self,
        key: jax.Array,
        x0: Tokens,
        u: jax.Array,
        is_token: jax.Array,
        schedule: Schedule,
        t_min: float,
    ) -> Probe:
        """A noised copy for the bound over [t_min, 1], at the noise level of rank u among all.

        u, float32 [B, 1] in [0, 1), is uniform over the copies; here t = t_min + (1 - t_min) u.
        """
        t = t_min + (1.0 - t_min) * u
        sigma = schedule.sigma(t)
        scale = (1.0 - t_min) * schedule.dsigma_dt(t)
        weight = is_token.astype(jnp.float32)
        return Probe(self.perturb(key, x0, sigma), sigma, scale, weight, mean_weight=weight)

    # --- a batch: the loss

    def log_scale(self, sigma: Sigma) -> jax.Array:
        """What is subtracted from the network's logits to give log-scores, float32 [B, 1]."""
        return jnp.zeros_like(sigma)

    @abc.abstractmethod
    def score_entropy(self, scores: Scores, sigma: Sigma, xt: Tokens, x0: Tokens) -> ScoreEntropy:
        """Definition 3.1 with the denoising ratios of Theorem 3.4 and the weights Q[x, y], [B, L]:

        sum over y != x of Q[x, y] (s_y - ratio_y log s_y + K(ratio_y))

        where x is a token of xt and ratio_y = p_sigma(y | x0) / p_sigma(x | x0).
        """

    @abc.abstractmethod
    def squared_error(self, scores: Scores, sigma: Sigma, xt: Tokens, x0: Tokens) -> jax.Array:
        """sum over y != x of Q[x, y] (s_y - ratio_y)^2, the ratios as above, [B, L]."""

    @abc.abstractmethod
    def posterior_kl(
        self, scores: Scores, xt: Tokens, x0: Tokens, sigma_t: Sigma, sigma_s: Sigma
    ) -> jax.Array:
        """KL(q(x_s | x_t, x0) || the reverse step of `ancestral`), nats per token, [B, L]."""

    # --- a batch: how far two sets of scores are apart

    def score_divergence(
        self, scores: Scores, others: Scores, sigma: Sigma, xt: Tokens
    ) -> jax.Array:
        """sum over y != x of Q[x, y] (s_y log(s_y / r_y) - s_y + r_y) with scores s and others r of
        the same xt, nats, float32 [B, L]: by the tables of states.

        What the KL of the two noised distributions loses per unit of sigma (INFO-SEDD, 2502.19183).
        """
        del sigma

        def token(log_s, log_r, x):
            rates = jnp.where(self._at(x) == 1.0, 0.0, self.transp_rate(x))
            s, r = jnp.exp(log_s), jnp.exp(log_r)
            return jnp.sum(rates * (s * (log_s - log_r) - s + r), where=rates > 0.0)

        return lift(token, scores.log_score(), others.log_score(), xt)

    @abc.abstractmethod
    def divergence_from_uniform(self, scores: Scores, sigma: Sigma, xt: Tokens) -> jax.Array:
        """`score_divergence` from the scores of independent uniform clean tokens, [B, L], without a
        table of states."""

    # --- a batch: the clean token's distribution as scores

    @abc.abstractmethod
    def scores_of_clean(self, logits: Scores, xt: Tokens, sigma: Sigma) -> Scores:
        """The scores that softmax(logits) means, as a distribution f of each clean token given the
        other noised ones alone. With x a token of xt,

        s_y = sum over x0 of f(x0) p_sigma(y | x0) / sum over x0 of f(x0) p_sigma(x | x0)

        so the reverse steps are D3PM's, in proportion to the sum of f(x0) q(x_s, x_t | x0) over x0
        (equation 4 of 2107.03006). logits answers for all clean tokens, with none left out at any
        position.
        """

    # --- a batch: a reverse step

    def _table(self, kernel, scores: Scores, xt: Tokens, *noise: jax.Array) -> Table:
        return Table(lambda: lift(kernel, jnp.exp(scores.log_score()), xt, *noise))

    def euler(self, scores: Scores, xt: Tokens, step: jax.Array) -> Distribution:
        """Euler step over step = (t - s) dsigma/dt, [B, 1]."""
        return self._table(self.euler_probabilities, scores, xt, step)

    def tweedie(self, scores: Scores, xt: Tokens, delta_sigma: jax.Array) -> Distribution:
        """Tweedie tau-leaping ("analytic") step over delta_sigma = sigma_t - sigma_s, [B, 1]."""
        return self._table(self.tweedie_probabilities, scores, xt, delta_sigma)

    @abc.abstractmethod
    def ancestral(
        self,
        scores: Scores,
        xt: Tokens,
        sigma_t: Sigma,
        sigma_s: Sigma,
        *,
        kappa: jax.Array | float = 1.0,
        shape: Shape | None = None,
    ) -> Distribution:
        """x_s by the distribution p of the clean tokens: the sum over x0 of p(x0) times

            kappa q(x_s | x_t, x0) + (1 - kappa) q(x_s | x0)

        With kappa = 1, a number or [B, L], and the exact score it is `tweedie`; below 1 some of
        what is clean is noised anew, which gives a token a second chance (Psi, arXiv 2602.21185).
        shape acts on p.
        """

    def denoise(
        self, scores: Scores, xt: Tokens, sigma: Sigma, *, shape: Shape | None = None
    ) -> Distribution:
        """The jump that ends sampling: Tweedie over all of sigma, to the clean tokens."""

        def clean(score, x, sigma):
            return self.tweedie_probabilities(score, x, sigma)[: self.vocab_size]

        return dataclasses.replace(self._table(clean, scores, xt, sigma), shape=shape)


class GraphByTables(Graph):
    """A graph that defines a reverse step of one token, and takes it by tables of states."""

    @abc.abstractmethod
    def ancestral_probabilities(
        self, p: jax.Array, x: jax.Array, sigma_t: jax.Array, sigma_s: jax.Array, kappa: jax.Array
    ) -> jax.Array:
        """The distribution of `ancestral` for one token, [D], from p [V]."""

    def ancestral(self, scores, xt, sigma_t, sigma_s, *, kappa=1.0, shape=None) -> Distribution:
        def token(score, x, sigma_t, sigma_s, kappa):
            p = shape_probabilities(self.clean_probabilities(score, x, sigma_t), shape)
            return self.ancestral_probabilities(p, x, sigma_t, sigma_s, kappa)

        kappa = jnp.broadcast_to(jnp.float32(kappa), xt.shape)
        return self._table(token, scores, xt, sigma_t, sigma_s, kappa)

    def posterior_kl(self, scores, xt, x0, sigma_t, sigma_s) -> jax.Array:
        """For scores of a clean token's distribution: the ancestral step is then Tweedie's."""

        def token(score, x, x0, sigma_t, sigma_s):
            given = self._at(x0)[: self.vocab_size]
            q = self.ancestral_probabilities(given, x, sigma_t, sigma_s, 1.0)
            p = self.tweedie_probabilities(score, x, sigma_t - sigma_s)
            p = jnp.maximum(p, jnp.finfo(jnp.float32).tiny)
            # Both sum to 1, and this way no term is below 0.
            return (xlogy(q, q) - xlogy(q, p) - q + p).sum()

        return lift(token, jnp.exp(scores.log_score()), xt, x0, sigma_t, sigma_s)
