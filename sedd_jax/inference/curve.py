"""The curve of cross entropy by mask share, the grid fitted to it and the price of few calls.

On the host, in numpy and float64. With g(u) the nats of a masked token where a share u is masked,
a sampler that calls the network at the shares 1 = u_0 > ... > u_K-1 and at the last reveals what is
left, u_K = 0, gives a text of L tokens, on average over the data,

    -log p <= L sum over k of (u_k - u_k+1) g(u_k)

and with ever more calls L times the integral of g, the diffusion part of the (normalised) bound.
The difference is the price of K calls (Lavenant and Zanella 2025, arXiv 2510.25544).
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Self

import jax
import numpy as np

from sedd_jax.diffusion.graph import Graph
from sedd_jax.diffusion.objectives import Objective
from sedd_jax.diffusion.schedules import Schedule

log = logging.getLogger(__name__)

BINS = 64  # of mask share, at most
DEGREE = 32  # of the polynomial fitted to them
POINTS = 512  # the shares that a fitted grid chooses from divide [0, 1] into so many parts
MAX_CALLS = 64  # the most that are fitted; of more, shares between theirs
TABLE = 1024  # steps whose times a sampler is handed; of more, times between theirs
FIELDS = ("share", "nats", "standard_error", "copies")


@dataclasses.dataclass(frozen=True)
class Curve:
    """Means over noised copies of texts, in the bins of mask share that hold some; the share rises.

    The standard errors are over copies, texts among them, as if each were of a text of its own.
    """

    share: tuple[float, ...]  # of the tokens that are masked
    nats: tuple[float, ...]  # cross entropy of a masked token
    standard_error: tuple[float, ...]
    copies: tuple[int, ...]
    about: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False)  # whose it is

    @classmethod
    def of(cls, share: np.ndarray, nats: np.ndarray) -> Self:
        """The curve of noised copies: mask share and nats of a masked token, [N] each, N >= 2."""
        share, nats = np.asarray(share, np.float64), np.asarray(nats, np.float64)
        # Bins that hold some, and the one of each copy among them.
        _, bins, copies = np.unique(_bin(share), return_inverse=True, return_counts=True)

        def average(values: np.ndarray) -> np.ndarray:
            return np.bincount(bins, values) / copies

        squares = np.bincount(bins, (nats - average(nats)[bins]) ** 2)
        # A bin of one copy has the spread of all of them.
        variance = np.where(copies > 1, squares / np.maximum(copies - 1, 1), nats.var(ddof=1))
        columns = average(share), average(nats), np.sqrt(variance / copies), copies
        return cls(*(tuple(column.tolist()) for column in columns))

    @classmethod
    def mean(cls, curves: Iterable[Self]) -> Self:
        """That of the copies of all, which were noised independently."""
        curves = list(curves)
        share, nats, error, copies = (
            np.concatenate([getattr(curve, name) for curve in curves]) for name in FIELDS
        )
        _, bins = np.unique(_bin(share), return_inverse=True)
        count = np.bincount(bins, copies)

        def average(values: np.ndarray) -> np.ndarray:
            return np.bincount(bins, copies * values) / count

        errors = np.sqrt(np.bincount(bins, (copies * error) ** 2)) / count
        columns = average(share), average(nats), errors, count.astype(int)
        return cls(*(tuple(column.tolist()) for column in columns))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """What `to_dict` returned; ValueError, TypeError or KeyError for anything else."""
        share, nats, error, copies = (np.asarray(values[name], np.float64) for name in FIELDS)
        rises = share.ndim == 1 and share.size and np.all(np.diff([0.0, *share, 1.0]) >= 0.0)
        if not rises or any(np.shape(a) != share.shape for a in (nats, error, copies)):
            raise ValueError("the shares do not rise in [0, 1], or a list is of another length")
        limits = (nats, 0.0, 1e6), (error, 0.0, 1e6), (copies, 1.0, 2.0**53)
        if not all(((low <= a) & (a <= high)).all() for a, low, high in limits):  # nor NaN
            raise ValueError("a cross entropy, an error or a number of copies cannot be one")
        about = {name: value for name, value in values.items() if name not in FIELDS}
        columns = (tuple(a.tolist()) for a in (share, nats, error))
        return cls(*columns, tuple(copies.astype(int).tolist()), about)

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {**self.about, **{name: list(getattr(self, name)) for name in FIELDS}}

    @functools.cached_property
    def rises(self) -> np.ndarray:
        """What g rises by, [DEGREE + 1], none of it below 0: g(0), then before each coefficient.

        With h_m the nats of a masked token while m others are masked, on average over the sets,

            g(u) = sum over m of Binomial(L - 1, u)(m) h_m

        and h_m rises for an exact network: seeing more never costs. So the bins are fitted by such
        a polynomial of DEGREE, by least squares weighted by copies. An isotonic regression leaves
        the bins' noise in the curve: a grid fitted to that costs more than the uniform one and
        claims half of its price.
        """
        from scipy.optimize import nnls

        weight = np.sqrt(self.copies)
        # As if one copy more had seen each rise to be 0: where there are few, none runs off.
        flat = np.eye(DEGREE + 1)[1:]
        rows = np.concatenate([_basis(self.share) * weight[:, None], flat])
        return nnls(rows, np.concatenate([self.nats * weight, np.zeros(DEGREE)]))[0]

    def at(self, u: np.ndarray) -> np.ndarray:
        """g, nats of a masked token, at the mask shares u [N]: smooth, and rising from 0 to 1."""
        return _basis(u) @ self.rises

    def price(self, shares: np.ndarray) -> float:
        """The price of calls at the mask shares [K], falling from 1, in nats per token."""
        integral = self.rises @ (1.0 - np.arange(DEGREE + 1) / (DEGREE + 1))
        return float(-np.diff(shares, append=0.0) @ self.at(shares) - integral)


def _basis(u: np.ndarray) -> np.ndarray:
    """P(Binomial(DEGREE, u) >= j) for j = 0 .. DEGREE, at u [N]: [N, DEGREE + 1]."""
    from scipy.special import bdtrc

    return bdtrc(np.arange(DEGREE + 1) - 1.0, DEGREE, np.asarray(u)[:, None])


def _bin(share: np.ndarray) -> np.ndarray:
    return np.minimum((share * BINS).astype(int), BINS - 1)


def best_shares(g: np.ndarray, calls: int) -> np.ndarray:
    """The mask shares of the lowest sum of (u_k - u_k+1) g(u_k), u_0 = 1: [calls], falling.

    Among the multiples of 1 / M for which g [M + 1] is given, calls <= M, by dynamic programming:
    cost[j] is the lowest from j / M to 0, in so many calls.
    """
    points = len(g) - 1
    u = np.arange(points + 1) / points
    is_not_below = np.triu(np.ones((points + 1, points + 1), bool))  # [from, to]
    cost, choices = np.where(u > 0.0, u * g, np.inf), []  # no call where nothing is masked
    for _ in range(calls - 1):
        through = np.where(is_not_below, np.inf, (u[:, None] - u) * g[:, None] + cost)
        choices.append(through.argmin(axis=1))
        cost = through.min(axis=1)
    at = [points]
    for choice in reversed(choices):
        at.append(choice[at[-1]])
    return u[at]


@functools.lru_cache(maxsize=64)
def fitted_shares(curve: Curve, calls: int) -> np.ndarray:
    """The mask shares of the lowest price of so many calls, [calls], falling from 1.

    Of more than MAX_CALLS: shares between theirs, at even distances.
    """
    few = min(calls, MAX_CALLS)
    u = np.linspace(0.0, 1.0, POINTS + 1)
    # A thousandth of a nat more at 1 than at 0: calls are even where the curve is flat.
    shares = best_shares(curve.at(u) + 1e-3 * u, few)
    if calls == few:
        return shares
    k = np.arange(calls) * (few / calls)
    return np.interp(k, np.arange(few + 1), np.append(shares, 0.0))


def checked_curve(
    curve: Curve | None,
    graph: Graph,
    objective: Objective,
    workdir: str | None,
    step: int | None = None,
) -> Curve:
    """The curve that a fitted grid needs; ValueError without one, or for noise that has none.

    workdir is the folder of the model's run, for the message; None for an exported model. step is
    that of the model's weights; one line, once, says if the curve is of another.
    """
    if not objective.has_curve:
        raise ValueError(
            f"grid 'fitted' needs the curve of cross entropy, which the bound of {objective.title} "
            "does not measure; choose uniform or cosine"
        )
    if graph.mask is None:
        raise ValueError(
            "grid 'fitted' is for absorbing noise, whose masked tokens it counts; choose uniform "
            "or cosine"
        )
    if curve is None:
        where = "" if workdir else ", on the run that it is of, and export that again"
        raise ValueError(
            "grid 'fitted' needs the curve of cross entropy, which this model comes without; run "
            f"sedd-eval likelihood --workdir={workdir or 'RUN'}{where}, or choose uniform or cosine"
        )
    if step is not None and curve.about.get("step", step) != step:
        _warn_of_step(curve.about["step"], step)
    return curve


@functools.cache
def _warn_of_step(of_curve: int, of_model: int) -> None:
    log.warning(
        "the curve of the fitted grid is of step %d and the model of step %d; sedd-eval likelihood "
        "measures it again",
        of_curve,
        of_model,
    )


# --- times


def masked_share(schedule: Schedule, t: np.ndarray) -> np.ndarray:
    """The share of a sample's tokens that are still masked at the times t, [N]."""
    masked = -np.expm1(-np.float64(schedule.sigma(np.append(t, 1.0))))
    return masked[:-1] / masked[-1]  # all are at t = 1


def grid_shares(grid: Callable, steps: int, t_min: float, schedule: Schedule) -> np.ndarray:
    """The mask shares at the calls of so many steps of a grid and of the denoiser, [steps + 1]."""
    times = np.array(jax.vmap(lambda i: grid(i, max(steps, 1), t_min))(np.arange(steps + 1)))
    times[-1] = t_min
    times[0] = 1.0  # of no steps too
    return masked_share(schedule, times)


def fitted_times(curve: Curve, steps: int, schedule: Schedule) -> np.ndarray:
    """The times of so many steps and of the denoiser, fitted to the curve: float32 [TABLE + 1].

    As `diffusion.grids.fitted_grid` takes them: the last one again where there are fewer.
    """
    few = min(steps, TABLE)
    shares = fitted_shares(curve, steps + 1)
    shares = np.interp(np.linspace(0.0, steps, few + 1), np.arange(steps + 1), shares)
    t = np.linspace(0.0, 1.0, 2**14 + 1)
    times = np.interp(shares, masked_share(schedule, t), t)
    times[0] = 1.0  # where noise saturates the share is 1 before it
    return np.pad(times, (0, TABLE - few), mode="edge").astype(np.float32)


def prices(
    curve: Curve, calls: int, t_min: float, schedule: Schedule, grids: Mapping[str, Callable]
) -> dict[str, float]:
    """{grid: nats per token} of so many calls, the denoiser's at t_min among them; and "fitted"."""
    paid = {
        name: curve.price(grid_shares(grid, calls - 1, t_min, schedule))
        for name, grid in grids.items()
    }
    return {**paid, "fitted": curve.price(fitted_shares(curve, calls))}
