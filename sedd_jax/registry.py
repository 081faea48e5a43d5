"""Parts of one's own - schedules, graphs, objectives, predictors, grids, corpora - by name.

`register` puts one into the table of its kind; the modules of config.imports call it, see
host/imports.py.
"""

import dataclasses
import functools
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, TypeVar

from sedd_jax.data.catalogue import REGISTERED, is_corpus
from sedd_jax.diffusion.graph import Graph
from sedd_jax.diffusion.graphs import GRAPHS
from sedd_jax.diffusion.grids import GRIDS
from sedd_jax.diffusion.objectives import OBJECTIVES, Objective
from sedd_jax.diffusion.predictors import PREDICTORS
from sedd_jax.diffusion.schedules import SCHEDULES

Part = TypeVar("Part", bound=Callable[..., Any])
KindName = Literal["schedule", "graph", "objective", "predictor", "grid", "corpus"]


@dataclasses.dataclass(frozen=True)
class Kind:
    """What may be registered, and where a config names it."""

    table: dict[str, Any]
    key: str  # of the config
    rule: str  # for people
    fits: Callable[[Any], bool]
    given: tuple[str, ...] = ()  # fields that are not parameters: the package sets them
    reserved: tuple[str, ...] = ()  # names that mean something elsewhere
    built_in: frozenset[str] = dataclasses.field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "built_in", frozenset({*self.table, *self.reserved}))

    @property
    def parameters_key(self) -> str:
        return f"{self.key.split('.')[0]}.parameters"


def _is_dataclass_with(*methods: str) -> Callable[[Any], bool]:
    def fits(part: Any) -> bool:
        is_one = inspect.isclass(part) and dataclasses.is_dataclass(part)
        return is_one and all(callable(getattr(part, name, None)) for name in methods)

    return fits


def _is_subclass_of(base: type) -> Callable[[Any], bool]:
    is_dataclass = _is_dataclass_with()
    return lambda part: (
        is_dataclass(part) and issubclass(part, base) and not part.__abstractmethods__
    )


def _takes(*arguments: Any) -> Callable[[Any], bool]:
    def fits(part: Any) -> bool:
        try:
            signature = inspect.signature(part)
            optional = {
                p.name: None for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY
            }
            signature.bind(*arguments, **optional)
        except (TypeError, ValueError):
            return False
        return True

    return fits


KINDS: dict[str, Kind] = {
    "schedule": Kind(
        SCHEDULES,
        "schedule.name",
        "a dataclass with the methods sigma(t) and dsigma_dt(t)",
        _is_dataclass_with("sigma", "dsigma_dt"),
    ),
    "graph": Kind(
        GRAPHS,
        "graph.name",
        "a dataclass, a subclass of sedd_jax.diffusion.graph.Graph with all its abstract methods",
        _is_subclass_of(Graph),
        given=("vocab_size", "predicts_clean", "scale_by_sigma"),
    ),
    "objective": Kind(
        OBJECTIVES,
        "objective.name",
        "a dataclass, a subclass of sedd_jax.diffusion.objectives.Objective with loss and bound",
        _is_subclass_of(Objective),
        given=("t_min", "times"),
    ),
    "predictor": Kind(
        PREDICTORS,
        "sample.predictor",
        "a function (xt, step) -> Distribution, other arguments by keyword",
        _takes(0, 0),
        reserved=("left_to_right", "gaussian"),  # of inference.sampling
    ),
    "grid": Kind(
        GRIDS,
        "sample.grid",
        "a function (i, steps, t_min) -> t, other arguments by keyword",
        _takes(0, 1, 0.0),
        reserved=("fitted",),  # of inference.sampling
    ),
    "corpus": Kind(
        REGISTERED,
        "data.corpus",
        "a function (path, heldout_fraction) -> data.Corpus, other arguments by keyword",
        _takes("", 0.1),
    ),
}


def register(kind: KindName, name: str) -> Callable[[Part], Part]:
    """A decorator that makes a class or function known to configs by a name.

    ```python
    @sedd_jax.register("schedule", "cosine")
    @dataclasses.dataclass(frozen=True)
    class Cosine: ...
    ```

    kind is schedule, graph, objective, predictor, grid or corpus. The fields of the dataclass, or
    the keyword arguments of the function, are its parameters, which config.SECTION.parameters sets.
    A run whose config names the module in config.imports finds the part again: docs/extend.md.

    ValueError for an unknown kind, a name that is taken, and a part that is not of its kind.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}; known: {', '.join(KINDS)}")
    about = KINDS[kind]
    if not (isinstance(name, str) and re.fullmatch(r"[A-Za-z]\w*", name)):
        raise ValueError(f"{kind} name {name!r} is not letters, digits and _; choose another")

    def add(part: Part) -> Part:
        earlier = about.table.get(name)
        is_built_in = name in about.built_in or (kind == "corpus" and name not in about.table)
        if is_built_in and (kind != "corpus" or is_corpus(name)):
            raise ValueError(f"{kind} {name!r} is one of sedd_jax's; choose another name")
        if earlier is not None and not _is_same(earlier, part):
            raise ValueError(
                f"{kind} {name!r} is registered already, by {' '.join(_identity(earlier))}; choose "
                "another name, or another process"
            )
        if not about.fits(part):
            raise ValueError(f"{kind} {name!r} is not {about.rule}; change {part!r}")
        for parameter, default in _parameters(part, kind).items():
            if type(default) not in (bool, int, float, str):
                raise ValueError(
                    f"{kind} {name!r}: parameter {parameter!r} has no default that is a number, a "
                    "text, True or False; give it one"
                )
        about.table[name] = part
        return part

    return add


def _identity(part: Any) -> tuple[str, str]:
    """Where a part is defined: a module that runs again, as a notebook's cell does, may replace
    it."""
    return getattr(part, "__module__", "?"), getattr(part, "__qualname__", repr(part))


def _is_same(earlier: Any, part: Any) -> bool:
    """Whether a part is that one, defined again, or the same text from another file."""
    if _identity(earlier) == _identity(part):
        return True
    try:
        return inspect.getsource(earlier) == inspect.getsource(part)
    except (OSError, TypeError):  # no file has it
        return False


def is_registered(kind: str, name: Any) -> bool:
    """Whether it is there and not one of sedd_jax's."""
    about = KINDS[kind]
    return isinstance(name, str) and name in about.table and name not in about.built_in


def defined_elsewhere(values: Mapping[str, Any], modules: Iterable[str]) -> list[str]:
    """The registered parts that a config's values name and that none of the modules defines."""
    inside = tuple(f"{module}." for module in modules)
    named = {kind: values[about.key] for kind, about in KINDS.items()}
    return [
        f"{kind} {name!r}"
        for kind, name in named.items()
        if is_registered(kind, name)
        and not f"{_identity(KINDS[kind].table[name])[0]}.".startswith(inside)
    ]


def registered_for(key: str) -> list[str]:
    """The registered names that a key of the config may have."""
    kinds = [kind for kind, about in KINDS.items() if about.key == key]
    return [name for kind in kinds for name in KINDS[kind].table if is_registered(kind, name)]


def parameters(kind: str, name: Any) -> dict[str, Any]:
    """The parameters of a registered part with their defaults; others have none."""
    return _parameters(KINDS[kind].table[name], kind) if is_registered(kind, name) else {}


def _parameters(part: Any, kind: str) -> dict[str, Any]:
    if not dataclasses.is_dataclass(part):
        return keyword_defaults(part)
    fields = dataclasses.fields(part)
    return {f.name: f.default for f in fields if f.init and f.name not in KINDS[kind].given}


def keyword_defaults(function: Callable) -> dict[str, Any]:
    """The arguments that are given by keyword alone, with their defaults."""
    arguments = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in arguments if p.kind is p.KEYWORD_ONLY}


def check_parameters(named: Mapping[str, str], values: Mapping[str, Any]) -> None:
    """ValueError unless the parts, names by kind, of one section have the parameters in values."""
    key = KINDS[next(iter(named))].parameters_key
    who = " and ".join(f"{kind} {name!r}" for kind, name in named.items())
    known: dict[str, Any] = {}
    for kind, name in named.items():
        known |= parameters(kind, name)
    for name, value in values.items():
        if name not in known:
            has = f"known: {', '.join(known)}" if known else f"{who} has none, leave it out"
            raise ValueError(f"unknown parameter {name!r} in config.{key}; {has}")
        words = _fault(value, known[name])
        if words:
            raise ValueError(
                f"config.{key}.{name} {value!r} is not {words}; {known[name]!r} is usual"
            )


def _fault(value: Any, default: Any) -> str:
    """What a value should have been, by the type of its default; "" if it is."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if isinstance(default, bool):
        return "" if isinstance(value, bool) else "True or False"
    if isinstance(default, int):
        return "" if is_number and isinstance(value, int) else "a whole number"
    if isinstance(default, float):
        return "" if is_number and abs(value) <= sys.float_info.max else "a finite number"
    return "text" if isinstance(default, str) and not isinstance(value, str) else ""


@functools.cache
def _with_values(function: Callable, values: tuple[tuple[str, Any], ...]) -> Callable:
    return functools.partial(function, **dict(values))


def with_parameters(function: Callable | None, values: Mapping[str, Any]) -> Callable | None:
    """The function with those of the values that are keyword arguments of it; the same object for
    the same values, so that nothing is compiled twice."""
    if function is None or not values:
        return function
    chosen = tuple((name, values[name]) for name in keyword_defaults(function) if name in values)
    return _with_values(function, chosen) if chosen else function
