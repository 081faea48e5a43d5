"""Parts of one's own - schedules, graphs, objectives, predictors, grids, corpora - by name.

`register` puts one into the table of its kind; `import_modules` runs the modules of config.imports,
which call it. A run and an exported folder hold a copy of each module that is a .py file.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib
import importlib.util
import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, TypeVar

from sedd_jax.data.catalogue import REGISTERED, is_corpus
from sedd_jax.diffusion.graph import Graph
from sedd_jax.diffusion.graphs import GRAPHS
from sedd_jax.diffusion.grids import GRIDS
from sedd_jax.diffusion.objectives import OBJECTIVES, Objective
from sedd_jax.diffusion.predictors import PREDICTORS
from sedd_jax.diffusion.schedules import SCHEDULES
from sedd_jax.files import local_path

Part = TypeVar("Part", bound=Callable[..., Any])
KindName = Literal["schedule", "graph", "objective", "predictor", "grid", "corpus"]
FOLDER = "imports"  # of a run and of an exported model: the copies of its .py files


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
        if earlier is not None and _identity(earlier) != _identity(part):
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


def is_registered(kind: str, name: Any) -> bool:
    """Whether it is there and not one of sedd_jax's."""
    about = KINDS[kind]
    return isinstance(name, str) and name in about.table and name not in about.built_in


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


# --- modules


def import_modules(names: Iterable[str], *, read_in: Path | None = None) -> None:
    """Run the modules: names that Python finds, and paths of .py files, each once in a process.

    read_in is the folder of a run or an exported model that names them, None if the user does.
    Code that only a folder names runs if the user has named the same before on this machine: its
    content for a file. ValueError, one line, for a module that is missing, raises or may not run.
    """
    for name in names:
        if name.endswith(".py"):
            path = local_path(name)
            code = _read(path, read_in)
            digest, is_there = (
                hashlib.sha256(code).hexdigest(),
                _module_name(path, code) in sys.modules,
            )
        else:
            digest, is_there = (
                hashlib.sha256(b"module " + name.encode()).hexdigest(),
                name in sys.modules,
            )
        if is_there and read_in is not None:
            continue
        if read_in is not None and not _is_remembered(digest):
            what = (
                f"read {name!r} and, if you trust it,"
                if name.endswith(".py")
                else "if you trust it"
            )
            raise ValueError(
                f"{str(read_in)!r} needs the code of {Path(name).name!r}, which you have not named "
                f"on this machine; {what} add --imports={name} (in Python imports=({name!r},))"
            )
        if not is_there:
            execute(path, "imports:") if name.endswith(".py") else _import(name)
        if read_in is None:
            _remember(digest)


def _read(path: Path, read_in: Path | None) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        remedy = "give the path of a .py file"
        if read_in is not None:
            remedy = "give the file by --imports=FILE (in Python imports=(FILE,))"
        raise ValueError(
            f"imports: cannot read {str(path)!r}: {error.strerror}; {remedy}"
        ) from error


def _module_name(path: Path, code: bytes) -> str:
    """Of the same text, wherever it lies: a run's copy is the module that was copied."""
    return f"{path.stem}_{hashlib.sha256(code).hexdigest()[:12]}"


def execute(path: Path | str, title: str, remedy: str = "correct the file") -> ModuleType:
    """The module in a file, run; ValueError, with the line, for whatever it raises."""
    path = Path(path)
    name = _module_name(path, path.read_bytes())
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    earlier = sys.modules.get(name)
    sys.modules[name] = module  # where dataclasses look
    try:
        with errors_of(str(path), title, remedy):
            spec.loader.exec_module(module)
    except ValueError:
        sys.modules.pop(name)
        if earlier is not None:
            sys.modules[name] = earlier
        raise
    return module


@contextlib.contextmanager
def errors_of(path: str, title: str, remedy: str) -> Iterator[None]:
    """Inside, whatever the code of the file raises is a ValueError of one line, with its line."""
    try:
        yield
    except (Exception, SystemExit) as error:
        reason, frames = " ".join(str(error).split()), traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == path]
        if isinstance(error, SyntaxError) and error.filename == path:
            reason, lines = error.msg, [error.lineno]
        where = f", line {lines[-1]}" if lines and lines[-1] else ""
        raise ValueError(
            f"{title} {path!r}{where}: {type(error).__name__}: {reason}; {remedy}"
        ) from error


def _import(name: str) -> None:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise ValueError(f"imports: module {name!r} raises {error}; install it") from error
        raise ValueError(
            f"imports: Python finds no module {name!r}; install it, or give the path of a .py file"
        ) from error
    except (Exception, SystemExit) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"imports: module {name!r} raises {type(error).__name__}: {reason}; correct it"
        ) from error


def _memory() -> Path:
    """Where the digests of the code that the user has named are: an empty file each."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache) / "sedd_jax" / "imports"


def _remember(digest: str) -> None:
    with contextlib.suppress(OSError):  # without it, the code must be named each time
        _memory().mkdir(parents=True, exist_ok=True)
        (_memory() / digest).touch()


def _is_remembered(digest: str) -> bool:
    return (_memory() / digest).is_file()


# --- copies


def copied_names(names: Iterable[str]) -> tuple[str, ...]:
    """The names as a folder with copies says them: a file's without its path."""
    return tuple(Path(name).name if name.endswith(".py") else name for name in names)


def names_in(folder: Path, names: Iterable[str]) -> tuple[str, ...]:
    """The names with the paths of the copies in folder."""
    return tuple(
        str(folder / FOLDER / Path(name).name) if name.endswith(".py") else name for name in names
    )


def read_files(names: Iterable[str]) -> dict[str, bytes]:
    """The text of each .py file, by its name without path."""
    return {
        Path(name).name: _read(local_path(name), None) for name in names if name.endswith(".py")
    }


def check_copies(folder: Path, names: Iterable[str]) -> None:
    """ValueError if a file differs from its copy in the folder of a run."""
    for name, code in read_files(names).items():
        copy = folder / FOLDER / name
        if copy.is_file() and copy.read_bytes() != code:
            raise ValueError(
                f"the run in {str(folder)!r} began with another {name!r}, {str(copy)!r}; name that "
                "one in config.imports, or begin in a new workdir"
            )


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write them as the copies in folder; those that are there already stay."""
    for name, code in files.items():
        (folder / FOLDER).mkdir(exist_ok=True)
        copy = folder / FOLDER / name
        if not (copy.is_file() and copy.read_bytes() == code):
            copy.write_bytes(code)
