"""Noise schedules: total noise sigma(t) and its slope, for t in [0, 1]. Imports jax only.

Lou et al. 2024 (arXiv 2310.16834), section 5.1. A schedule is a frozen dataclass with two pure
functions of an array of times, of any shape; both return float32 of that shape. A new one is such a
dataclass and a line in SCHEDULES.
"""

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp


class Schedule(Protocol):
    """What every schedule offers.

    sigma rises strictly from near 0 at t = 0 to at most 80 at t = 1, so a share of the tokens is
    clean even there; near t = 0 it is computed without cancellation.
    """

    def sigma(self, t: jax.Array) -> jax.Array:
        """Total noise at time t, float32, the shape of t."""

    def dsigma_dt(self, t: jax.Array) -> jax.Array:
        """Slope of the total noise at time t, float32, the shape of t."""


@dataclasses.dataclass(frozen=True)
class LogLinear:
    """sigma = -log(1 - (1 - eps) t): a token has been moved with probability (1 - eps) t."""

    eps: float = 1e-3

    def __post_init__(self):
        if not 0.0 < self.eps < 1.0:
            raise ValueError(f"schedule eps {self.eps} is outside (0, 1); the paper uses 1e-3")

    def _clean(self, t: jax.Array) -> jax.Array:
        # 1 - (1 - eps) t loses four digits near t = 1; this sum of positive terms loses none.
        return (1.0 - t) + self.eps * t

    def sigma(self, t: jax.Array) -> jax.Array:
        t = jnp.asarray(t, jnp.float32)
        near_zero = -jnp.log1p(-(1.0 - self.eps) * jnp.minimum(t, 0.5))
        return jnp.where(t < 0.5, near_zero, -jnp.log(self._clean(t)))

    def dsigma_dt(self, t: jax.Array) -> jax.Array:
        t = jnp.asarray(t, jnp.float32)
        return (1.0 - self.eps) / self._clean(t)


@dataclasses.dataclass(frozen=True)
class Geometric:
    """sigma = sigma_min^(1-t) sigma_max^t: the logarithm of the noise is linear in time."""

    sigma_min: float = 1e-5
    sigma_max: float = 20.0

    def __post_init__(self):
        if not 0.0 < self.sigma_min < self.sigma_max < float("inf"):
            raise ValueError(
                f"sigma_min {self.sigma_min} and sigma_max {self.sigma_max} must satisfy "
                "0 < sigma_min < sigma_max < inf; the paper uses 1e-5 and 20"
            )

    def sigma(self, t: jax.Array) -> jax.Array:
        t = jnp.asarray(t, jnp.float32)
        return jnp.power(self.sigma_min, 1.0 - t) * jnp.power(self.sigma_max, t)

    def dsigma_dt(self, t: jax.Array) -> jax.Array:
        return self.sigma(t) * (jnp.log(self.sigma_max) - jnp.log(self.sigma_min))


SCHEDULES: dict[str, type[Schedule]] = {"log_linear": LogLinear, "geometric": Geometric}
