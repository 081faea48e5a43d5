"""What a network may be trained for: the paper's objective and its rivals. Imports jax only.

An objective is a frozen dataclass whose fields are keys of config.objective, with a loss and the
bound on -log p that belongs to it. A new one is such a class and a line in OBJECTIVES.
"""

import abc
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from sedd_jax.diffusion import autoregressive, gaussian, likelihood, losses
from sedd_jax.diffusion.graph import Graph
from sedd_jax.diffusion.likelihood import Bound
from sedd_jax.diffusion.losses import Loss, at_random_times, independent_times
from sedd_jax.diffusion.schedules import Schedule
from sedd_jax.diffusion.scores import ScoreFn, Tokens


class Objective(abc.ABC):
    """A loss, and what a network that was trained with it says of a text."""

    graph: ClassVar[str | None] = None  # the only one that it is for
    predicts_clean: ClassVar[bool] = False  # see Graph.predicts_clean
    is_causal: ClassVar[bool] = False  # of the network; the bound is then -log p itself
    # Tokens are noised as embeddings: graph and schedule are not read, and score_fn is a
    # gaussian.EmbeddingDiffusion.
    is_continuous: ClassVar[bool] = False
    has_scores: ClassVar[bool] = True  # of noised tokens
    t_min: ClassVar[float | None] = None  # times are drawn from [t_min, 1]; None: no such interval
    title: ClassVar[str]  # of the models that it trains, for tables
    # Whether its bound measures the cross entropy by mask share, if the noise masks.
    has_curve: ClassVar[bool] = False

    @abc.abstractmethod
    def loss(
        self,
        key: jax.Array,
        x0: Tokens,
        score_fn: ScoreFn,
        graph: Graph,
        schedule: Schedule,
        *,
        is_token: jax.Array | None = None,
    ) -> Loss:
        """Of clean tokens x0, int32 [B, L]; is_token, bool [B, L], leaves padding out."""

    @abc.abstractmethod
    def bound(
        self,
        key: jax.Array,
        x0: Tokens,
        index: jax.Array,
        score_fn: ScoreFn,
        graph: Graph,
        schedule: Schedule,
        *,
        passes: int,
        is_token: jax.Array | None = None,
    ) -> Bound:
        """An upper bound on -log p(x0), nats, with the arguments of `likelihood.bound`."""


@dataclasses.dataclass(frozen=True)
class _OverTimes(Objective):
    """One time of [t_min, 1] for each sequence; the bound is the paper's."""

    t_min: float = 1e-3
    times: Callable[[jax.Array, int, float], jax.Array] = independent_times  # of losses.TIMES

    loss_at: ClassVar[Callable[..., Loss]]  # of losses
    has_curve = True

    def loss(self, *args: Any, **padding: Any) -> Loss:
        how = {"t_min": self.t_min, "times": self.times}
        return at_random_times(self.loss_at, *args, **how, **padding)

    def bound(self, *args: Any, **how: Any) -> Bound:
        return likelihood.bound(*args, t_min=self.t_min, **how)


class Dwdse(_OverTimes):
    """The paper's: diffusion-weighted denoising score entropy."""

    title = "SEDD"
    loss_at = staticmethod(losses.dwdse_at)


class Normalised(_OverTimes):
    """Scores of a predicted distribution of the clean tokens: MDLM, MD4 and RADD's t-DCE, and on
    uniform noise UDLM and Duo."""

    predicts_clean = True
    title = "normalised"
    loss_at = staticmethod(losses.normalised_at)


class Unweighted(_OverTimes):
    """The cross entropy of masked tokens, all noise levels alike."""

    graph = "absorbing"
    predicts_clean = True
    title = "unweighted"
    loss_at = staticmethod(losses.unweighted_at)


class ConcreteScoreMatching(_OverTimes):
    """The paper's ablation; its bound is that of the scores that it learns."""

    title = "CSM"
    loss_at = staticmethod(losses.concrete_score_matching_at)


@dataclasses.dataclass(frozen=True)
class D3PM(Objective):
    """Discrete-time diffusion: the clean tokens' distribution, discrete_steps noise levels."""

    discrete_steps: int = 1000
    times: Callable[[jax.Array, int, float], jax.Array] = independent_times

    predicts_clean = True
    title = "D3PM"

    def loss(self, *args: Any, **padding: Any) -> Loss:
        def discrete_times(key, batch_size, t_min):
            u = self.times(key, batch_size, t_min)
            return jnp.clip(jnp.ceil(u * self.discrete_steps), 1) / self.discrete_steps

        loss_at = functools.partial(losses.d3pm_at, discrete_steps=self.discrete_steps)
        return at_random_times(loss_at, *args, t_min=0.0, times=discrete_times, **padding)

    def bound(self, *args: Any, **how: Any) -> Bound:
        return likelihood.discrete_bound(*args, discrete_steps=self.discrete_steps, **how)


@dataclasses.dataclass(frozen=True)
class Autoregressive(Objective):
    """-log p itself: each token given those before it; no noise."""

    graph = "absorbing"  # whose MASK begins a text
    is_causal = True
    has_scores = False
    title = "autoregressive"

    def loss(self, key, x0, score_fn, graph, schedule, *, is_token=None) -> Loss:
        return autoregressive.loss(x0, score_fn, graph.mask, is_token=is_token)

    def bound(self, key, x0, index, score_fn, graph, schedule, *, passes, is_token=None) -> Bound:
        return autoregressive.exact(x0, score_fn, graph.mask, is_token=is_token)


@dataclasses.dataclass(frozen=True)
class Plaid(Objective):
    """Gaussian diffusion of learned embeddings of the tokens."""

    embedding_dim: int = 16
    times: Callable[[jax.Array, int, float], jax.Array] = independent_times

    is_continuous = True
    has_scores = False
    title = "PLAID"

    def loss(self, key, x0, score_fn, graph, schedule, *, is_token=None) -> Loss:
        return gaussian.loss(key, x0, score_fn, times=self.times, is_token=is_token)

    def bound(self, key, x0, index, score_fn, graph, schedule, **how: Any) -> Bound:
        return gaussian.bound(key, x0, index, score_fn, **how)


OBJECTIVES = {
    "dwdse": Dwdse,
    "normalised": Normalised,
    "unweighted": Unweighted,
    "concrete_score_matching": ConcreteScoreMatching,
    "d3pm": D3PM,
    "autoregressive": Autoregressive,
    "plaid": Plaid,
}
