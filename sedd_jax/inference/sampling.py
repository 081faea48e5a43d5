"""What a call that samples may say - options and known tokens, checked - and the compiled loop."""

import collections
import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from typing import Any, NamedTuple

import jax
import numpy as np

from sedd_jax.diffusion import gaussian, grids, predictors, samplers
from sedd_jax.diffusion.graph import Graph
from sedd_jax.diffusion.graphs import is_of
from sedd_jax.diffusion.predictors import Options, trait
from sedd_jax.diffusion.reverse import shaped
from sedd_jax.diffusion.samplers import Chain, Known
from sedd_jax.models.head import make_score_fn
from sedd_jax.models.in_loop import params_in_loop
from sedd_jax.registry import is_registered, keyword_defaults, with_parameters

log = logging.getLogger(__name__)
FITTED = "fitted"  # the grid whose times are the model's
GRIDS = collections.ChainMap({FITTED: grids.fitted_grid}, grids.GRIDS)
LEFT_TO_RIGHT = "left_to_right"  # the predictor of autoregressive models: no reverse step
GAUSSIAN = "gaussian"  # that of PLAID models: reverse steps of embeddings
OF_OTHERS = {LEFT_TO_RIGHT: "autoregressive", GAUSSIAN: "PLAID"}  # models that noise no tokens
PREDICTORS = collections.ChainMap(
    {LEFT_TO_RIGHT: None, GAUSSIAN: gaussian.posterior}, predictors.PREDICTORS
)
TABLES = {"predictor": PREDICTORS, "draw": samplers.DRAWS, "grid": GRIDS}


class Inside(NamedTuple):
    """An interval with or without its ends."""

    low: float
    high: float
    ends: str  # "()", "[]", "(]" or "[)"

    def has(self, value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, Real):
            return False
        at_end = (value == self.low and self.ends[0] == "[") or (
            value == self.high and self.ends[1] == "]"
        )
        return self.low < value < self.high or at_end

    def __str__(self) -> str:
        return f"{self.ends[0]}{self.low:g}, {self.high:g}{self.ends[1]}"


NUMBERS = {  # of Sampling; traced, so another value does not compile again
    "theta": Inside(0.0, 1.0, "()"),
    "eta": Inside(0.0, 1.0, "[]"),
    "kappa": Inside(0.0, 1.0, "[]"),
    "gamma": Inside(0.0, math.inf, "[)"),
    "threshold": Inside(0.0, 1.0, "[)"),
    "temperature": Inside(0.0, math.inf, "()"),
    "top_p": Inside(0.0, 1.0, "(]"),
    "t_min": Inside(0.0, 1.0, "()"),
}
READ_BY = {  # those of our predictors that an option has an effect on
    "theta": ("two_stage", "theta_trapezoidal"),
    "eta": ("remdm_cap", "remdm_rescale", "remdm_loop"),
    "kappa": ("psi",),
    "gamma": ("entropy_bounded",),
    "threshold": ("confidence",),
    "normalised": ("euler", "tweedie"),
}
KnownTokens = tuple[np.ndarray, np.ndarray]  # tokens int32 and is_known bool, [L] or [N, L]
SHAPES = ("temperature", "top_p", "top_k")
SWITCHES = ("normalised", "greedy")


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How samples are drawn; docs/samplers.md has every predictor with its numbers.

    predictor, draw and grid are a name, of which a wrong one has all listed, or a function like
    those of TABLES. temperature, top_p, top_k and greedy change the model's distribution of clean
    tokens; None: nothing does.

    steps: reverse steps, one or two network calls each; the denoiser is one more.
    predictor: a reverse step, "tweedie" for one; "none": the denoiser alone.
    draw: "exact", or "float32_gumbel", the original's.
    grid: the times of the steps, "uniform", "cosine" or "fitted".
    t_min: the time of the denoising; the grid "fitted" has its own.
    theta: of two_stage, theta_trapezoidal: where a step is cut.
    eta: of remdm_cap, remdm_rescale, remdm_loop: how much is masked again.
    kappa: of psi: how much is not noised again.
    gamma: of entropy_bounded: nats that are drawn together.
    threshold: of confidence: the probability from which a token is drawn.
    normalised: of euler, tweedie: the reveal depends on time alone.
    temperature: of the tokens' probabilities, p^(1/temperature).
    top_p: draws from the likeliest tokens that reach this probability together.
    top_k: draws from this many of the likeliest tokens.
    greedy: the denoiser, after the last step, takes the likeliest tokens; top_k=1: all steps.
    parameters: keyword arguments of a predictor or grid of one's own, which compile again.
    """

    steps: int = 128
    predictor: str | Callable[..., Any] = "tweedie"
    draw: str | Callable[..., Any] = "exact"
    grid: str | Callable[..., Any] = "uniform"
    t_min: float = 1e-5
    theta: float = 0.5
    eta: float = 0.02
    kappa: float = 0.95
    gamma: float = 0.1
    threshold: float = 0.9
    normalised: bool = False
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    greedy: bool = False
    parameters: Mapping[str, Any] | None = None

    @classmethod
    def of(cls, values: Any) -> "Sampling":
        """The options among `values`, a mapping or a section of a config, which may hold more."""
        fields = (field.name for field in dataclasses.fields(cls))
        options = {name: values[name] for name in fields if name in values}
        # A section of a config has a ConfigDict of them, which JSON does not know.
        parameters = dict((options.get("parameters") or {}).items()) or None
        return cls(**{**options, "parameters": parameters})

    @property
    def nfe(self) -> int:
        """Network calls of a sample, of an adaptive predictor the most: the denoiser's is one."""
        if self.predictor == LEFT_TO_RIGHT:
            return self.steps
        return 1 if self._predictor is None else self.steps * self.trait("calls") + 1

    def trait(self, name: str) -> Any:
        """One of the predictor's `Traits`."""
        return trait(self._predictor, name)

    @property
    def _predictor(self) -> Callable | None:
        return TABLES["predictor"].get(self.predictor, self.predictor)

    @property
    def changes_distribution(self) -> dict[str, Any]:
        """The options in effect that make samples differ from what the model says."""
        shapes = {name: getattr(self, name) for name in SHAPES}
        return {k: v for k, v in {**shapes, "greedy": self.greedy or None}.items() if v is not None}

    def replaced(self, **options: Any) -> "Sampling":
        """With the options that are not None in place of these; ValueError for a wrong one."""
        check_names(options, [field.name for field in dataclasses.fields(self)])
        chosen = {name: value for name, value in options.items() if value is not None}
        if self.parameters and "parameters" not in chosen:  # those of what is still chosen
            known = dataclasses.replace(self, **chosen)._known_parameters()
            chosen["parameters"] = {k: v for k, v in self.parameters.items() if k in known}
        checked = dataclasses.replace(self, **chosen)._checked()
        # As Python's numbers: of other types they would compile again, and JSON knows none.
        kinds = {**dict.fromkeys(NUMBERS, float), **dict.fromkeys(("steps", "top_k"), int)}
        kinds |= dict.fromkeys(SWITCHES, bool)
        numbers = {name: getattr(checked, name) for name in kinds}
        plain = {name: kinds[name](v) for name, v in numbers.items() if v is not None}
        return dataclasses.replace(checked, **plain)

    def _known_parameters(self) -> dict[str, Any]:
        functions = (
            TABLES[name].get(v := getattr(self, name), v) for name in ("predictor", "grid")
        )
        return {k: v for f in functions if callable(f) for k, v in keyword_defaults(f).items()}

    def _checked(self) -> "Sampling":
        check_whole("steps", self.steps, 1, 10**6)
        for name, table in TABLES.items():
            value = getattr(self, name)
            if not (callable(value) or (isinstance(value, str) and value in table)):
                known = [one for one in table if one not in OF_OTHERS]
                also = "; it is tweedie here" if value == "analytic" else ""  # of the original
                raise ValueError(f"unknown {name} {value!r}{also}; known: {', '.join(known)}")
        known = self._known_parameters()
        for name in self.parameters or ():
            if name not in known:
                raise ValueError(
                    f"unknown parameter {name!r} of predictor {self.predictor!r} and grid "
                    f"{self.grid!r}; known: {', '.join(known) or 'none'}"
                )
        for name, rule in NUMBERS.items():
            value = getattr(self, name)
            if not (rule.has(value) or (value is None and name in SHAPES)):
                usual = "leave it out for the model's own distribution"
                if name not in SHAPES:
                    usual = f"{type(self).__dataclass_fields__[name].default:g} is usual"
                raise ValueError(f"{name} {value!r} is not inside {rule}; {usual}")
        if self.top_k is not None:
            check_whole("top_k", self.top_k, 1)
        for name in SWITCHES:
            if (value := getattr(self, name)) not in (True, False):
                raise ValueError(f"{name} {value!r} is not True or False; give one of them")
        # The original's draw is of a table of the model's own probabilities.
        others = [*self.changes_distribution]
        if not self.trait("has_table"):
            others.append(self.predictor)
        if self.draw == "float32_gumbel" and others:
            raise ValueError(
                f"draw float32_gumbel is the original's and knows no {others[0]}; use exact"
            )
        return self

    def checked_for(self, graph: Graph) -> "Sampling":
        """These options; ValueError for what makes no sense with a model's noise."""
        name, is_absorbing = self.predictor, graph.mask is not None
        if name in OF_OTHERS:
            raise ValueError(
                f"predictor {name!r} is of {OF_OTHERS[name]} models, and this one takes reverse "
                "steps of tokens; take tweedie"
            )
        if not is_of(type(graph), names := self.trait("graph")):
            table = [(key, one) for key, one in PREDICTORS.items() if key not in OF_OTHERS]
            others = ", ".join(key for key, one in table if is_of(type(graph), trait(one, "graph")))
            names = names if isinstance(names, str) else " or ".join(names)
            raise ValueError(
                f"predictor {name!r} is for {names} noise and this model's is of another kind, "
                f"{type(graph).__name__}; for it there are {others}"
            )
        if self.normalised and name not in (readers := READ_BY["normalised"]):
            known = " and ".join(readers)
            raise ValueError(f"normalised is of {known}, not of {name!r}; leave it out")
        is_shaped = any(getattr(self, shape) is not None for shape in SHAPES)
        of_rates = name in ("euler", "theta_trapezoidal") and (self.normalised or is_shaped)
        if of_rates and not is_absorbing:
            raise ValueError(
                f"with uniform noise {name} has no distribution of clean tokens to normalise or "
                "change; use predictor tweedie, two_stage or psi"
            )
        return self

    def warn_of_unread(self, given: Iterable[str]) -> None:
        """A line, once in a process, for each option that the predictor does not read."""
        if isinstance(self.predictor, str) and not is_registered("predictor", self.predictor):
            for name in given:
                if self.predictor not in READ_BY.get(name, [self.predictor]):
                    _warn_of_unread(name, self.predictor)

    def options(self) -> Options:
        """The numbers as predictors take them."""
        shape = shaped(self.temperature, self.top_p, self.top_k)
        names = ("theta", "eta", "kappa", "gamma", "threshold", "normalised")
        return Options(**{name: getattr(self, name) for name in names}, shape=shape)

    def functions(self, times: np.ndarray | None = None) -> "Sampling":
        """With what the names stand for, which jit compiles for: a table may change.

        times are those of the grid "fitted", float32 [N].
        """
        chosen = {name: getattr(self, name) for name in TABLES}
        chosen = {name: TABLES[name].get(value, value) for name, value in chosen.items()}
        for name in ("predictor", "grid"):
            chosen[name] = with_parameters(chosen[name], self.parameters or {})
        arguments = () if times is None else (times,)
        chosen["grid"] = jax.tree_util.Partial(chosen["grid"], *arguments)
        return dataclasses.replace(self, **chosen, parameters=None)


jax.tree_util.register_dataclass(
    Sampling,
    data_fields=["steps", *NUMBERS, "top_k", "grid", "parameters"],
    meta_fields=["predictor", "draw", "normalised", "greedy"],
)


@functools.cache
def _warn_of_unread(option: str, predictor: str) -> None:
    readers = ", ".join(READ_BY[option])
    log.warning("%s has no effect on predictor %r; it is of %s", option, predictor, readers)


class Rows(NamedTuple):
    """Samples that are drawn at once, filled up with padding to the shape that is compiled."""

    index: jax.Array  # int32 [B]: numbers among all samples, which key their noise
    chain: Chain  # of [B, L]
    known: Known
    is_token: jax.Array  # bool [B, L]: False at padding


@functools.partial(jax.jit, static_argnames=("network", "graph", "schedule"))
def reverse_steps(
    params, key, rows: Rows, begin, end, sampling: Sampling, *, network, graph, schedule
) -> Chain:
    """The chain after the steps begin <= i < end of sampling.steps from rows.chain.

    sampling holds functions, not their names. begin == 0 starts from noise; end == steps ends with
    the denoiser. Equal networks share what is compiled, whatever their parameters.
    """
    weights = params_in_loop(network, params)

    def score_fn(xt, sigma):
        return make_score_fn(network, weights(), graph, is_token=rows.is_token)(xt, sigma)

    return samplers.sample(
        key,
        score_fn,
        graph,
        schedule,
        rows.is_token.shape,
        steps=sampling.steps,
        predictor=sampling.predictor,
        options=sampling.options(),
        is_greedy=sampling.greedy,
        # Padding is known: nothing is drawn there, and no predictor counts it.
        known=rows.known._replace(is_known=rows.known.is_known | ~rows.is_token),
        t_min=sampling.t_min,
        draw=sampling.draw,
        grid=sampling.grid,
        index=rows.index,
        begin=begin,
        end=end,
        chain=rows.chain,
    )


def check_names(options: Iterable[str], known: Iterable[str]) -> None:
    """TypeError, Python's own for a wrong keyword, unless all options are known."""
    known = list(known)
    for name in options:
        if name not in known:
            raise TypeError(f"unknown option {name!r}; known: {', '.join(known)}")


def check_whole(name: str, value: Any, low: int, high: int = 2**31 - 1) -> None:
    """ValueError unless value is a whole number in [low, high]."""
    is_whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not (is_whole and low <= value <= high):
        raise ValueError(f"{name} {value!r} is not a whole number in [{low}, {high}]; choose one")


def known_at_positions(
    positions: Sequence[int], tokens: Sequence[int] | None, length: int | None, max_length: int
) -> KnownTokens:
    """[length], or [max_length] for None, with tokens [n] at positions [n]."""
    length = max_length if length is None else length
    check_whole("length", length, 1, max_length)
    positions, tokens = _integers("positions", positions), _integers("tokens", tokens)
    if positions.ndim != 1 or positions.shape != tokens.shape:
        raise ValueError(
            f"positions {positions.shape} and tokens {tokens.shape} must be two lists of one "
            "length; give a token for each position"
        )
    outside = positions[(positions < 0) | (positions >= length)]
    if outside.size or len(np.unique(positions)) < positions.size:
        fault = "a position is there twice"
        if outside.size:
            fault = f"position {outside[0]} is not in [0, {length})"
        raise ValueError(f"{fault}; correct the positions or the length")
    all_tokens, is_known = np.zeros(length, np.int64), np.zeros(length, bool)
    all_tokens[positions], is_known[positions] = tokens, True
    return all_tokens, is_known


def known_rows(
    known: KnownTokens | None,
    num_samples: int,
    length: int | None,
    *,
    max_length: int,
    vocab_size: int,
) -> Known:
    """What each sample must keep, numpy [num_samples, L]; known None: nothing, of `length`."""
    if known is None:
        length = max_length if length is None else length
        check_whole("length", length, 1, max_length)
        known = np.zeros(length, np.int32), np.zeros(length, bool)
    if not isinstance(known, Sequence) or len(known) != 2:
        raise ValueError("known is not a pair (tokens, is_known); give int and bool arrays")
    tokens, is_known = _integers("known tokens", known[0]), np.array(known[1], bool)
    try:
        shape = (num_samples, np.broadcast_shapes(tokens.shape, is_known.shape)[-1])
        tokens, is_known = np.broadcast_to(tokens, shape), np.broadcast_to(is_known, shape)
    except (ValueError, IndexError) as error:
        raise ValueError(
            f"known has tokens {tokens.shape} and is_known {is_known.shape}; give [L] for all "
            f"samples or [num_samples, L] = [{num_samples}, L] of each"
        ) from error
    positions = shape[1]
    if length is not None and positions != length:
        raise ValueError(f"known has {positions} positions, not length {length}; leave length out")
    if not 1 <= positions <= max_length:
        raise ValueError(
            f"{positions} positions are not in [1, {max_length}], the model's length; give text or "
            "shorten it"
        )
    tokens = np.where(is_known, tokens, 0)
    if not 0 <= tokens.min() <= tokens.max() < vocab_size:
        raise ValueError(
            f"known tokens must be in [0, {vocab_size}), the mask is none of them; encode them "
            "with the model's tokenizer"
        )
    return Known(tokens.astype(np.int32), is_known)


def _integers(name: str, values: Any) -> np.ndarray:
    """values as an array of whole numbers; ValueError for any other kind."""
    array = np.array(() if values is None else values)
    if array.size == 0:
        array = array.astype(np.int64)  # an empty list is float64 to numpy
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name} of dtype {array.dtype} are not whole numbers; give integers")
    return array
