"""What a config may say, and the objects it names. Config objects stop at this floor.

`check` rejects every bad value and combination before any work starts; each `make_` builds one
part from its section. The tables are the ones that hold the parts, so a new part is known here.
"""

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sedd_jax.configs import base
from sedd_jax.data import CORPORA, FORMS, TOKENIZERS, WINDOWS
from sedd_jax.diffusion.graphs import GRAPHS
from sedd_jax.diffusion.losses import OBJECTIVES, TIMES
from sedd_jax.diffusion.samplers import DRAWS, GRIDS, PREDICTORS
from sedd_jax.diffusion.schedules import SCHEDULES
from sedd_jax.kernels import attention, vocab_reduce
from sedd_jax.models.transformer import SAVED
from sedd_jax.parallel.sharding import batch_parts

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class Rule:
    """What a value must satisfy, in code and in words."""

    holds: Callable[[Any], bool]
    words: str


def _is_number(x: Any) -> bool:
    # Compared, because JSON may hold an integer that no float is large enough for.
    is_number = isinstance(x, (int, float)) and not isinstance(x, bool)
    return is_number and abs(x) <= sys.float_info.max


def _one_of(table: Mapping[str, Any]) -> Rule:
    return Rule(lambda x: isinstance(x, str) and x in table, f"one of {', '.join(table)}")


def _whole(least: int, most: float = math.inf) -> Rule:
    words = f"a whole number >= {least}" + ("" if most == math.inf else f" and <= {most}")
    return Rule(lambda x: isinstance(x, int) and _is_number(x) and least <= x <= most, words)


_ANY_TEXT = Rule(lambda x: isinstance(x, str), "text")
_TRUTH = Rule(lambda x: isinstance(x, bool), "True or False")
_POSITIVE = Rule(lambda x: _is_number(x) and x > 0, "a finite number above 0")
_NOT_NEGATIVE = Rule(lambda x: _is_number(x) and x >= 0, "a finite number >= 0")
_INSIDE = Rule(lambda x: _is_number(x) and 0 < x < 1, "inside (0, 1)")
_DECAY = Rule(lambda x: _is_number(x) and 0 <= x < 1, "in [0, 1)")
_AXIS = Rule(lambda x: isinstance(x, int) and (x == -1 or x >= 1), "a whole number >= 1, or -1")
_PASSES = Rule(lambda x: isinstance(x, int) and x >= 2 and x % 2 == 0, "an even number >= 2")

RULES: dict[str, Rule] = {
    "seed": _whole(0, 2**32 - 1),
    "data.corpus": _one_of(CORPORA),
    "data.path": _ANY_TEXT,
    "data.tokenizer": _one_of(TOKENIZERS),
    "data.tokenizer_path": _ANY_TEXT,
    "data.length": _whole(1),
    "data.form": _one_of(FORMS),
    "data.windows": _one_of(WINDOWS),
    "data.train_split": _ANY_TEXT,
    "data.heldout_split": _ANY_TEXT,
    "data.heldout_fraction": _INSIDE,
    "data.records": _ANY_TEXT,
    "graph.name": _one_of(GRAPHS),
    "graph.scale_by_sigma": _TRUTH,
    "schedule.name": _one_of(SCHEDULES),
    "schedule.eps": _INSIDE,
    "schedule.sigma_min": _POSITIVE,
    "schedule.sigma_max": Rule(
        lambda x: _is_number(x) and 0 < x <= 80,
        "a number above 0 and at most 80: float32 has no exp(sigma) beyond",
    ),
    "objective.name": _one_of(OBJECTIVES),
    "objective.t_min": _INSIDE,
    "objective.times": _one_of(TIMES),
    "model.hidden_size": _whole(1),
    "model.blocks": _whole(1),
    "model.heads": _whole(1),
    "model.cond_dim": _whole(1),
    "model.dropout": _DECAY,
    "model.dtype": _one_of(DTYPES),
    "model.remat": _one_of(SAVED),
    "model.attention": _one_of({"auto": None, **attention.FORMS}),
    "model.head": _one_of({"auto": None, **vocab_reduce.FORMS}),
    "optimizer.learning_rate": _POSITIVE,
    "optimizer.warmup_steps": _whole(0),
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
    "checkpoint.every": _whole(1),
    "checkpoint.keep": _whole(1),
    "evaluate.blocks": _whole(1),
    "evaluate.batch_size": _whole(1),
    "evaluate.passes": _PASSES,
    "sample.predictor": _one_of(PREDICTORS),
    "sample.steps": _whole(1),
    "sample.t_min": _INSIDE,
    "sample.draw": _one_of(DRAWS),
    "sample.grid": _one_of(GRIDS),
    "sample.every": _whole(0),
    "sample.count": _whole(1),
    "profile.start": _whole(0),
    "profile.steps": _whole(0),
    "mesh.data": _AXIS,
    "mesh.fsdp": _AXIS,
    "mesh.tensor": _AXIS,
}

# A run may be resumed with other values of these: they change neither the model nor its noise.
# Where the data is may change too: data.json tells whether it is the same.
MAY_CHANGE = (
    "train.steps",
    "train.log_every",
    "train.eval_every",
    "train.max_skipped",
    "train.stuck_seconds",
    "data.path",
    "data.records",
    "data.tokenizer_path",
    "model.remat",
    "model.attention",
    "model.head",
)
MAY_CHANGE_SECTIONS = ("checkpoint", "evaluate", "sample", "mesh", "profile")


# Runs from before these keys did what their defaults say.
AS_BEFORE = ("optimizer.mu_dtype",)


def flatten(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """("data.length", 1024) and so on."""
    for key in config:
        if isinstance(config[key], (ConfigDict, dict)):
            yield from flatten(config[key], f"{prefix}{key}.")
        else:
            yield prefix + key, config[key]


def check_value(key: str, value: Any) -> None:
    """ValueError unless there is such a key, like "data.length", and it may have the value."""
    if key not in RULES:
        raise ValueError(f"unknown config key {key}; known: {', '.join(RULES)}")
    if not RULES[key].holds(value):
        shown = repr(value) if len(repr(value)) <= 60 else repr(value)[:57] + "..."
        raise ValueError(f"config.{key} {shown} is not allowed; it must be {RULES[key].words}")


def check(config: ConfigDict) -> None:
    """Raise ValueError at the first value or combination that cannot be meant."""
    values = dict(flatten(config))
    for key, value in values.items():
        check_value(key, value)
    for key in RULES:
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
    graph_fields = [field.name for field in dataclasses.fields(GRAPHS[config.graph.name])]
    if config.graph.scale_by_sigma and "scale_by_sigma" not in graph_fields:
        raise ValueError(
            f"config.graph.scale_by_sigma True does not fit the {config.graph.name} graph, whose "
            "logits are the log-scores; set it to False"
        )
    if [values[f"mesh.{axis}"] for axis in config.mesh].count(-1) > 1:
        raise ValueError("config.mesh holds -1 more than once; one axis may take what is left")
    named(SCHEDULES, config.schedule)  # which refuses bad combinations


def with_values(config: ConfigDict, values: Mapping[str, Any]) -> ConfigDict:
    """The config with {"data.records": ...} set; ValueError for a key or value that is none."""
    config = config.copy_and_resolve_references()
    for key, value in values.items():
        check_value(key, value)
        section, dot, name = key.rpartition(".")
        target = config[section] if dot else config
        with target.ignore_type():  # JSON may hold 20 where the config has 20.0
            target[name] = value
    check(config)
    return config


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


def from_json(text: str) -> ConfigDict:
    """The config of `to_json`; ValueError if the text is not one."""
    values = json.loads(text)
    sections = {key.split(".")[0] for key in RULES if not may_change(key)}
    if not isinstance(values, dict) or not sections <= set(values):
        raise ValueError(
            f"{' '.join(text.split())[:60]!r} is no config of sedd_jax; give the folder of a run"
        )
    config = ConfigDict(values)
    # Keys that are newer than the run, and change nothing that it has done, are as by default.
    for key, value in flatten(base.get_config()):
        if may_change(key) or key in AS_BEFORE:
            section, _, name = key.rpartition(".")
            if section not in config:
                config[section] = ConfigDict()
            if name not in config[section]:
                config[section][name] = value
    return config


def named(table: Mapping[str, type], section: ConfigDict, **given: Any) -> Any:
    """The dataclass that section names, with those of its fields that the section holds."""
    cls = table[section.name]
    fields = {field.name for field in dataclasses.fields(cls)} & set(section) - {"name"}
    return cls(**given, **{field: section[field] for field in fields})


def check_mesh(config: ConfigDict, mesh: Mesh) -> None:
    """ValueError if the mesh cannot split the batch or the heads."""
    if config.model.heads % mesh.shape["tensor"]:
        raise ValueError(
            f"config.model.heads {config.model.heads} is not divisible by the mesh's "
            f"tensor={mesh.shape['tensor']}; change one of them"
        )
    parts = batch_parts(mesh)
    rows = config.train.batch_size // config.train.microbatches
    if rows % parts:
        raise ValueError(
            f"config.train.batch_size {config.train.batch_size} in {config.train.microbatches} "
            f"microbatches gives {rows} rows, not divisible by the {parts} devices of the mesh's "
            "data and fsdp axes; change one of them"
        )
