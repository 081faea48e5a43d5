"""The keys of a config and the constraints on their values; nothing is built here.

`check` refuses every bad value and combination before any work starts. Names are looked up in the
tables of the parts themselves, so a part that is added there is allowed here.
"""

import copy
import dataclasses
import difflib
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
from ml_collections import ConfigDict
from ml_collections.config_dict import RequiredValueError

from sedd_jax import registry
from sedd_jax.configs import base
from sedd_jax.data import FORMS, KNOWN_CORPORA, TOKENIZERS, WINDOWS, is_corpus
from sedd_jax.diffusion.graphs import GRAPHS, is_of
from sedd_jax.diffusion.losses import TIMES
from sedd_jax.diffusion.objectives import OBJECTIVES
from sedd_jax.diffusion.predictors import PREDICTORS, trait
from sedd_jax.diffusion.samplers import DRAWS
from sedd_jax.diffusion.schedules import SCHEDULES, Geometric
from sedd_jax.host import imports
from sedd_jax.host.files import is_address, load_json
from sedd_jax.kernels import attention
from sedd_jax.models.transformer import NOISE_INPUTS, SAVED

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class Constraint:
    """What a value must satisfy, in code and in words."""

    holds: Callable[[Any], bool]
    words: str


def _is_number(x: Any) -> bool:
    # Compared, because JSON may hold an integer that no float is large enough for.
    is_number = isinstance(x, (int, float)) and not isinstance(x, bool)
    return is_number and abs(x) <= sys.float_info.max


def _is_whole(x: Any) -> bool:
    return isinstance(x, int) and _is_number(x)


def _one_of(table: Mapping[str, Any]) -> Constraint:
    return Constraint(lambda x: isinstance(x, str) and x in table, f"one of {', '.join(table)}")


def _named(kind: str, holds: Callable[[Any], bool] | None = None, known: str = "") -> Constraint:
    about = registry.KINDS[kind]
    known = known or ", ".join(about.table)
    words = f"one of {known}, or a name that a module of config.imports (or a cell) has registered"
    return Constraint(holds or (lambda x: isinstance(x, str) and x in about.table), words)


def _whole(low: int, high: float = math.inf) -> Constraint:
    words = f"a whole number >= {low}" + ("" if high == math.inf else f" and <= {high}")
    return Constraint(lambda x: _is_whole(x) and low <= x <= high, words)


_PATH = Constraint(
    lambda x: isinstance(x, str) and not is_address(x),
    "a local path: mount the bucket or share, or copy the files",
)
_ANY_TEXT = Constraint(lambda x: isinstance(x, str), "text")
_BOOLEAN = Constraint(lambda x: isinstance(x, bool), "True or False")
_POSITIVE = Constraint(lambda x: _is_number(x) and x > 0, "a finite number above 0")
_NOT_NEGATIVE = Constraint(lambda x: _is_number(x) and x >= 0, "a finite number >= 0")
_INSIDE = Constraint(lambda x: _is_number(x) and 0 < x < 1, "inside (0, 1)")
_DECAY = Constraint(lambda x: _is_number(x) and 0 <= x < 1, "in [0, 1)")
_SHARE = Constraint(lambda x: _is_number(x) and 0 <= x <= 1, "in [0, 1]")
_AXIS = Constraint(lambda x: _is_whole(x) and (x == -1 or x >= 1), "a whole number >= 1, or -1")
_IMPORTS = Constraint(
    lambda x: isinstance(x, (list, tuple)) and all(isinstance(name, str) and name for name in x),
    "a tuple of names of modules and paths of .py files",
)
_PARAMETERS = Constraint(
    lambda x: isinstance(x, Mapping) and all(isinstance(name, str) for name in x),
    'names with values, as {"power": 3}, of a part that a module of config.imports registers',
)
_PASSES = Constraint(lambda x: _is_whole(x) and x >= 2 and x % 2 == 0, "an even number >= 2")

KEYS: dict[str, Constraint] = {
    "seed": _whole(0, 2**32 - 1),
    "imports": _IMPORTS,
    "data.corpus": _named("corpus", lambda x: isinstance(x, str) and is_corpus(x), KNOWN_CORPORA),
    "data.path": _PATH,
    "data.parameters": _PARAMETERS,
    "data.tokenizer": _one_of(TOKENIZERS),
    "data.tokenizer_path": _PATH,
    "data.length": _whole(1),
    "data.form": _one_of(FORMS),
    "data.windows": _one_of(WINDOWS),
    "data.train_split": _ANY_TEXT,
    "data.heldout_split": _ANY_TEXT,
    "data.heldout_fraction": _INSIDE,
    "data.records": _PATH,
    "graph.name": _named("graph"),
    "graph.scale_by_sigma": _BOOLEAN,
    "graph.parameters": _PARAMETERS,
    "schedule.name": _named("schedule"),
    "schedule.eps": _INSIDE,
    "schedule.sigma_min": _POSITIVE,
    "schedule.sigma_max": Constraint(
        lambda x: _is_number(x) and 0 < x <= 80,
        "a number above 0 and at most 80: float32 has no exp(sigma) beyond",
    ),
    "schedule.parameters": _PARAMETERS,
    "objective.name": _named("objective"),
    "objective.t_min": _INSIDE,
    "objective.times": _one_of(TIMES),
    "objective.discrete_steps": _whole(1, 2**16),  # float32 tells no closer noise levels apart
    "objective.embedding_dim": _whole(1),
    "objective.parameters": _PARAMETERS,
    "model.hidden_size": _whole(1),
    "model.blocks": _whole(1),
    "model.heads": _whole(1),
    "model.cond_dim": _whole(1),
    "model.time_conditioning": _BOOLEAN,
    "model.noise_input": _one_of(NOISE_INPUTS),
    "model.dropout": _DECAY,
    "model.dtype": _one_of(DTYPES),
    "model.residual_dtype": _one_of(DTYPES),
    "model.remat": _one_of(SAVED),
    "model.attention": _one_of({"auto": None, **attention.FORMS}),
    "optimizer.learning_rate": _POSITIVE,
    "optimizer.warmup_steps": _whole(0),
    "optimizer.decay_fraction": _SHARE,
    "optimizer.b1": _DECAY,
    "optimizer.b2": _DECAY,
    "optimizer.eps": _POSITIVE,
    "optimizer.weight_decay": _NOT_NEGATIVE,
    "optimizer.mu_dtype": _one_of(DTYPES),
    "optimizer.clip_norm": _POSITIVE,
    "optimizer.ema_decay": _DECAY,
    "train.steps": _whole(1),
    "train.batch_size": _whole(1),
    "train.microbatches": _whole(1),
    "train.log_every": _whole(1),
    "train.eval_every": _whole(1),
    "train.max_skipped": _whole(1),
    "train.stuck_seconds": _whole(0),
    "train.trackers": _ANY_TEXT,
    "checkpoint.every": _whole(1),
    "checkpoint.keep": _whole(1),
    "evaluate.blocks": _whole(1),
    "evaluate.batch_size": _whole(1),
    "evaluate.passes": _PASSES,
    "sample.predictor": _named("predictor"),
    "sample.steps": _whole(1, 10**6),
    "sample.t_min": _INSIDE,
    "sample.draw": _one_of(DRAWS),
    "sample.grid": _named("grid"),
    "sample.parameters": _PARAMETERS,
    "sample.every": _whole(0),
    "sample.count": _whole(1),
    "profile.start": _whole(0),
    "profile.steps": _whole(0),
    "mesh.data": _AXIS,
    "mesh.fsdp": _AXIS,
    "mesh.tensor": _AXIS,
}

# A run may be resumed with other values of these: they change neither the model nor its noise.
# The data may be in another folder: data.json says whether it is the same data.
MAY_CHANGE = (
    "imports",  # runs.workdir compares what the files hold
    "train.steps",
    "train.log_every",
    "train.eval_every",
    "train.max_skipped",
    "train.stuck_seconds",
    "train.trackers",
    "data.path",
    "data.records",
    "data.tokenizer_path",
    "model.remat",
    "model.attention",
)
MAY_CHANGE_SECTIONS = ("checkpoint", "evaluate", "sample", "mesh", "profile")

# Keys that a saved config may lack: runs from before them did what the default says.
AS_BEFORE = (
    "imports",
    "train.trackers",
    "sample.parameters",
    "data.parameters",
    "graph.parameters",
    "schedule.parameters",
    "objective.parameters",
    "optimizer.decay_fraction",
    "optimizer.mu_dtype",
    "model.residual_dtype",
    "model.time_conditioning",
    "model.noise_input",
    "objective.discrete_steps",
    "objective.embedding_dim",
)
# Keys that saved configs may still hold, and why they went.
RETIRED = {"model.head": "a Triton kernel for the head was slower on a GPU than plain JAX"}


def flatten(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """("data.length", 1024) and so on; the value of "schedule.parameters" is a dict."""
    for key in config:
        value = config[key]
        if not isinstance(value, (ConfigDict, dict)):
            yield prefix + key, value
        elif KEYS.get(prefix + key) is _PARAMETERS:
            yield prefix + key, dict(value.items())
        else:
            yield from flatten(value, f"{prefix}{key}.")


def check_value(key: str, value: Any) -> None:
    """ValueError unless there is such a key, like "data.length", and the value is allowed."""
    if key not in KEYS:
        near = difflib.get_close_matches(key, KEYS, n=3)
        known = f"did you mean {', '.join(near)}?" if near else "known: those of configs/base.py"
        raise ValueError(f"unknown config key {key}; {known}")
    if not KEYS[key].holds(value):
        shown = repr(value) if len(repr(value)) <= 60 else repr(value)[:57] + "..."
        registered = ", ".join(registry.registered_for(key))
        raise ValueError(
            f"config.{key} {shown} is not allowed; it must be {KEYS[key].words}"
            f"{registered and f' ({registered})'}"
        )


def check(config: ConfigDict) -> None:
    """ValueError for the first value or combination that is not allowed.

    Runs the modules of config.imports, unless this process has run them.
    """
    values = dict(flatten(config))
    _import(values)
    for key, value in values.items():
        check_value(key, value)
    for key in KEYS:
        if key not in values:
            raise ValueError(f"config.{key} is missing; start from configs/base.py")

    def divides(part: str, whole: str):
        if values[whole] % values[part]:
            raise ValueError(
                f"config.{whole} {values[whole]} is not divisible by config.{part} {values[part]}; "
                "change one of them"
            )

    divides("model.heads", "model.hidden_size")
    divides("train.microbatches", "train.batch_size")
    if config.model.hidden_size // config.model.heads % 2:
        raise ValueError(
            f"config.model.hidden_size {config.model.hidden_size} over {config.model.heads} heads "
            "gives an odd head size; rotary position embedding needs an even one"
        )
    _check_parameters(values)
    if config.graph.scale_by_sigma and not _has_field(GRAPHS[config.graph.name], "scale_by_sigma"):
        raise ValueError(
            f"config.graph.scale_by_sigma True does not fit the {config.graph.name} graph, whose "
            "logits are the log-scores; set it to False"
        )
    _check_objective(config)
    predictor, graph = config.sample.predictor, config.graph.name
    if not is_of(GRAPHS[graph], trait(PREDICTORS[predictor], "graph")):
        raise ValueError(
            f"config.sample.predictor {predictor!r} does not fit the {graph} graph; take tweedie"
        )
    has_table = trait(PREDICTORS[predictor], "has_table")
    if not has_table and config.sample.draw == "float32_gumbel":
        raise ValueError(
            f"config.sample.draw 'float32_gumbel' does not fit the predictor {predictor!r}; take "
            "exact"
        )
    if config.data.windows == "random" and config.data.form != "packed":
        raise ValueError(
            f"config.data.windows 'random' does not fit data.form {config.data.form!r}, whose "
            "blocks are documents; set data.windows to aligned"
        )
    if [values[f"mesh.{axis}"] for axis in config.mesh].count(-1) > 1:
        raise ValueError("config.mesh holds -1 more than once; one axis may take what is left")
    low, high = config.schedule.sigma_min, config.schedule.sigma_max
    if low >= high and SCHEDULES[config.schedule.name] is Geometric:
        raise ValueError(
            f"config.schedule must have sigma_min < sigma_max, not {low} and {high}; change one"
        )


def _import(values: Mapping[str, Any]) -> None:
    """Run the modules of "imports", which the user names: a folder's run before, or not at all."""
    names = values.get("imports", ())
    check_value("imports", names)
    files = [name for name in imports.copied_names(names) if name.endswith(".py")]
    for name in files:
        if files.count(name) > 1:
            raise ValueError(f"config.imports holds two files called {name!r}; rename one")
    imports.import_modules(names)


def _check_parameters(values: Mapping[str, Any]) -> None:
    """ValueError unless each section's parameters are those of what it names."""
    sections: dict[str, dict[str, str]] = {}
    for kind, about in registry.KINDS.items():
        sections.setdefault(about.parameters_key, {})[kind] = values[about.key]
    for key, named in sections.items():
        registry.check_parameters(named, values[key])


def _check_objective(config: ConfigDict) -> None:
    """ValueError for an objective or a network that does not fit the noise."""
    objective, graph = OBJECTIVES[config.objective.name], config.graph.name
    if objective.graph not in (None, graph):
        raise ValueError(
            f"config.objective.name {config.objective.name!r} does not fit the {graph} graph; set "
            f"graph.name to {objective.graph}, or take dwdse or d3pm"
        )
    has_scale = objective.predicts_clean or config.graph.scale_by_sigma
    if not config.model.time_conditioning and not has_scale:
        raise ValueError(
            "config.model.time_conditioning False does not fit logits that are the log-scores, "
            "which depend on the noise level; set it to True, or graph.scale_by_sigma to True "
            "with absorbing noise"
        )


def _has_field(cls: type, name: str) -> bool:
    return name in (field.name for field in dataclasses.fields(cls))


def with_values(config: ConfigDict, values: Mapping[str, Any]) -> ConfigDict:
    """The config with values such as {"data.records": DIR}; ValueError for a bad key or value.

    What a config file has derived from one of them by a reference follows it.
    """
    config = copy.deepcopy(config)
    _import({"imports": config.get("imports", ()), **values})
    for key, value in values.items():
        check_value(key, value)
    try:
        with config.ignore_type():  # JSON may hold 20 where the config has 20.0
            for key, value in values.items():
                _set(config, key, value)
        config = config.copy_and_resolve_references()
    except (KeyError, RequiredValueError) as error:
        reason = " ".join(str(error.args[0]).split())
        raise ValueError(
            f"the config is not complete: {reason}; start from configs/base.py"
        ) from error
    check(config)
    return config


def _set(config: ConfigDict, key: str, value: Any) -> None:
    section, _, name = key.rpartition(".")
    if KEYS[key] is _PARAMETERS:  # the whole of them
        config[section][name] = ConfigDict(dict(value))
    else:
        config.update_from_flattened_dict({key: tuple(value) if key == "imports" else value})


def may_change(key: str) -> bool:
    """Whether a run may be resumed with another value of the key."""
    return key in MAY_CHANGE or key.split(".")[0] in MAY_CHANGE_SECTIONS


def differences(saved: ConfigDict, config: ConfigDict) -> list[str]:
    """Phrases "key: saved -> now" for the keys that a resumed run may not change."""
    before, now = dict(flatten(saved)), dict(flatten(config))
    return [
        f"{key}: {before.get(key)!r} -> {now.get(key)!r}"
        for key in {**before, **now}
        if before.get(key) != now.get(key) and not may_change(key)
    ]


def to_json(config: ConfigDict) -> str:
    """The config as indented JSON."""
    return json.dumps(config.to_dict(), indent=1)


def from_json(text: str, where: str = "the config") -> ConfigDict:
    """The config of `to_json`; ValueError, naming `where`, if the text is not one."""
    values = load_json(text, where)
    # A run from before a section that changes nothing of what it did may lack it.
    absent = {key.split(".")[0]: None for key in KEYS if "." in key}
    absent |= {section: {} for section in MAY_CHANGE_SECTIONS}
    if not all(
        isinstance(values.get(section, default), dict) for section, default in absent.items()
    ):
        raise ValueError(
            f"{where}, {' '.join(text.split())[:60]!r}, is not a config of sedd_jax; give the "
            "folder of a run"
        )
    names = values.setdefault("imports", ())
    values["imports"] = tuple(names) if isinstance(names, list) else names
    for key in RETIRED:
        section, _, name = key.rpartition(".")
        values[section].pop(name, None)
    # Keys that are newer than the run, and change nothing of what it did, have their defaults.
    for key, value in flatten(base.get_config()):
        section, _, name = key.rpartition(".")
        if section and (may_change(key) or key in AS_BEFORE):
            values.setdefault(section, {}).setdefault(name, value)
    return ConfigDict(values)
