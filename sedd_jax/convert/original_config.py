"""The original's config to ours and back: its config.json, or the .hydra/config.yaml of a run.

What the original has and we have not (ngpus, snapshots, cache_dir) comes along in its own
dict, over which ours is laid.
"""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from ml_collections import ConfigDict

from sedd_jax import config as configuration
from sedd_jax import registry
from sedd_jax.config import Constraint
from sedd_jax.configs import base
from sedd_jax.data import CORPORA
from sedd_jax.host.files import load_json, shown

EPS = 1e-3  # of the original's log-linear noise, which has no field for it
NO_CLIP = 1e30  # our clip_norm for the original's negative grad_clip, which turns clipping off
MAX_FILE = 1 << 20  # bytes of a config
TOKENIZERS = {50257: "gpt2", 27: "text8"}  # by vocab_size
_SHARED_CORPORA = tuple(name for name in CORPORA if name not in ("pydoc", "text"))
# How our configs of these corpora hold text out.
_HELDOUT = {
    "lm1b": {"data.heldout_split": "test"},
    "openwebtext": {"data.heldout_fraction": 0.0125},
}


_BASE = dict(configuration.flatten(base.get_config()))
TEXT = Constraint(lambda x: isinstance(x, str), "text")


def _one_of(*values: Any) -> Constraint:
    return Constraint(lambda x: x in values, f"one of {', '.join(map(str, values))}")


def _size(low: int, high: int) -> Constraint:
    """high is far above any model's: names and shapes are listed before a file is read."""
    words = f"a whole number in [{low}, {high}]"
    return Constraint(lambda x: type(x) is int and low <= x <= high, words)  # True is not a number


class _Field(NamedTuple):
    """A field of the original that its programs read and that is checked."""

    ours: str | None = None  # the key of our config, where there is one
    default: Any = None  # what the original's own configs have; None where it must be there
    words: Mapping[str, str] = {}  # the original's -> ours
    rule: Constraint | None = None  # what it may hold, where that is not config.KEYS' rule


_FIELDS = {
    "tokens": _Field(rule=_size(2, 2**24)),
    "graph.type": _Field("graph.name", words={"absorb": "absorbing", "uniform": "uniform"}),
    "noise.type": _Field(
        "schedule.name", words={"loglinear": "log_linear", "geometric": "geometric"}
    ),
    "noise.sigma_min": _Field("schedule.sigma_min", 1e-4),
    "noise.sigma_max": _Field("schedule.sigma_max", 20),
    "model.name": _Field(default="sedd_jax", rule=TEXT),
    "model.type": _Field(default="ddit", rule=_one_of("ddit")),
    "model.hidden_size": _Field("model.hidden_size", rule=_size(1, 2**16)),
    "model.cond_dim": _Field("model.cond_dim", rule=_size(1, 2**16)),
    "model.length": _Field("data.length", 1024, rule=_size(1, 2**24)),
    "model.n_blocks": _Field("model.blocks", rule=_size(1, 2**10)),
    "model.n_heads": _Field("model.heads", rule=_size(1, 2**10)),
    "model.scale_by_sigma": _Field("graph.scale_by_sigma"),
    "model.dropout": _Field("model.dropout", 0.1),
    "data.train": _Field(default="openwebtext", rule=TEXT),
    "optim.optimizer": _Field(default="AdamW", rule=_one_of("AdamW", "Adam")),
    "optim.lr": _Field("optimizer.learning_rate", 3e-4),
    "optim.beta1": _Field("optimizer.b1", 0.9),
    "optim.beta2": _Field("optimizer.b2", 0.999),
    "optim.eps": _Field("optimizer.eps", 1e-8),
    "optim.weight_decay": _Field("optimizer.weight_decay", 0),
    "optim.warmup": _Field("optimizer.warmup_steps", 2500),
    "optim.grad_clip": _Field("optimizer.clip_norm", 1.0),
    "training.batch_size": _Field("train.batch_size", 512),
    "training.accum": _Field("train.microbatches", 1),
    # The original goes on while step < n_iters + 1: one step more than its name says.
    "training.n_iters": _Field("train.steps", 1_300_001),
    "training.log_freq": _Field("train.log_every", 50),
    "training.snapshot_freq_for_preemption": _Field("checkpoint.every", 10_000),
    "training.ema": _Field("optimizer.ema_decay", 0.9999),
    "sampling.predictor": _Field(
        "sample.predictor", "euler", {"analytic": "tweedie", "euler": "euler", "none": "none"}
    ),
    "sampling.steps": _Field("sample.steps", 128),
    "sampling.noise_removal": _Field(default=True, rule=_one_of(True, False)),
}
# Fields that the original's programs read, or its configs have, and that mean nothing here.
_THEIRS_ALONE = {
    "ngpus": 1,
    "training.snapshot_freq": 50_000,
    "training.eval_freq": 100,
    "training.weight": "standard",
    # Its snapshots need a GPT-2 tokenizer, and GPT-2 large to score them.
    "training.snapshot_sampling": False,
    "data.cache_dir": "data",
    "graph.file": "data",
    "graph.report_all": False,
    "eval.perplexity": False,
    "eval.perplexity_batch_size": 32,
}


class FromOriginal(NamedTuple):
    """What a config of the original says."""

    config: ConfigDict
    vocab_size: int  # clean tokens: its `tokens`
    notices: tuple[str, ...]


def from_original_config(
    theirs: Mapping[str, Any],
    where: str = "config.json",
    *,
    written: Mapping[str, str] | None = None,
) -> FromOriginal:
    """Our full config from the original's dict; configs/base.py has what it does not say.

    written has the names of fields as `where` writes them, for messages, where those are others.

    The dtype is float32, whatever it was trained in. What is missing and does not shape the model
    is taken as the original's own configs have it, and named in one notice. ValueError, naming
    `where` and the field, for anything that is not a model of the original code.
    """
    remedy = "get it again" if written else "give a config of the original code"
    names = {field: field for field in _FIELDS} | dict(written or {})
    read, missing = {}, []  # read: by the original's fields, in our words
    for field, (ours, default, words, rule) in _FIELDS.items():
        value, name = get(theirs, field), names[field]
        if value is None and default is None:
            raise ValueError(f"{name} is missing in {where}; {remedy}")
        if value is None:
            value = default
            missing.append(f"{field} {default}")
        read[field], rule = _to_ours(field, value), rule or configuration.KEYS[ours]
        if not rule.holds(read[field]):
            known = f"one of {', '.join(words)}" if words else rule.words
            raise ValueError(f"{name} {shown(repr(value))} in {where} is not {known}; {remedy}")
    hidden_size, heads = read["model.hidden_size"], read["model.n_heads"]
    if hidden_size % heads:
        raise ValueError(
            f"{names['model.hidden_size']} {hidden_size} in {where} is not divisible by "
            f"{names['model.n_heads']} {heads}; {remedy}"
        )
    values = {row.ours: read[field] for field, row in _FIELDS.items() if row.ours}
    values |= {"model.dtype": "float32", "schedule.eps": EPS}
    notices = [f"{where} lacks these, taken as {', '.join(missing)}"] if missing else []
    corpus, tokens = read["data.train"], read["tokens"]
    if corpus in _SHARED_CORPORA:
        values |= {"data.corpus": corpus, **_HELDOUT.get(corpus, {})}
    else:
        values["data.corpus"] = "text"
        notices.append(
            f"data.train {shown(repr(corpus))} is not a corpus known here; config.data.corpus is "
            "text"
        )
    if tokens in TOKENIZERS:
        values["data.tokenizer"] = TOKENIZERS[tokens]
    if read["optim.optimizer"] == "Adam" and read["optim.weight_decay"]:
        notices.append("Adam with weight decay is trained on as AdamW, whose decay is decoupled")
    if not read["sampling.noise_removal"]:
        notices.append("sampling.noise_removal false is not kept: samples end with the denoiser")
    config = configuration.with_values(base.get_config(), values)
    return FromOriginal(config, tokens, tuple(notices))


def to_original_config(
    config: ConfigDict, vocab_size: int, original: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Every field that the original's programs read, from our config.

    original is the dict that the model came with, if it did: its fields stay as they are unless
    our config says something else. `cannot_say` lists what the original has no words for.
    """
    theirs, values = copy.deepcopy(dict(original or {})), dict(configuration.flatten(config))
    corpus, sizes = config.data.corpus, (config.model.hidden_size, config.model.blocks)
    fallback = {
        **{field: row.default for field, row in _FIELDS.items() if not row.ours},
        **_THEIRS_ALONE,
        "model.name": {(768, 12): "small", (1024, 24): "medium"}.get(sizes, "sedd_jax"),
        "data.train": corpus,
        "data.valid": corpus,
        "eval.batch_size": config.train.batch_size,
    }
    for field, value in fallback.items():
        if get(theirs, field) is None:
            put(theirs, field, value)
    for field, (ours, default, words, _) in _FIELDS.items():
        there, value = get(theirs, field), values.get(ours)
        # 20 means 20.0, and 1e-4 without a point is text to YAML 1.1.
        if ours and (there is None or _to_ours(field, there) != value):
            if words:
                # A graph or schedule of a user keeps its name, which the original refuses.
                value = next((word for word in words if words[word] == value), default or value)
            elif field == "optim.grad_clip" and value == NO_CLIP:
                value = -1.0
            put(theirs, field, value)
    theirs["tokens"] = vocab_size
    if corpus in _SHARED_CORPORA:
        put(theirs, "data.train", corpus)
    return theirs


def cannot_say(config: ConfigDict) -> list[str]:
    """What of our config the original has no field for, so that it would do something else."""
    only = {"objective.t_min": 1e-3, "data.form": "packed"}
    only |= {"objective.name": "dwdse", "model.time_conditioning": True}
    only |= {"model.noise_input": "sigma", "optimizer.decay_fraction": 0.0}
    if config.schedule.name == "log_linear":
        only["schedule.eps"] = EPS
    values = dict(configuration.flatten(config))
    return [f"{k} {values[k]}: the original's is {only[k]}" for k in only if values[k] != only[k]]


def _to_ours(field: str, value: Any) -> Any:
    """What the original's value means here, not checked yet."""
    ours, _, words, _ = _FIELDS[field]
    if words:
        if value in registry.registered_for(ours):  # of a user: the original cannot read it
            return value
        return words.get(value) if isinstance(value, str) else None
    if isinstance(_BASE.get(ours), float) and type(value) in (int, float, str):
        try:  # YAML 1.1 reads 1e-4 as text; the original's reader takes it for a number
            value = float(value)
        except (ValueError, OverflowError):
            return value
        if field == "optim.grad_clip" and value < 0:
            return NO_CLIP
    return value


def get(tree: Any, path: str) -> Any:
    """The value at "model.length"; None where it, or its section, is missing."""
    for key in path.split("."):
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree


def put(tree: dict, path: str, value: Any) -> None:
    section, _, name = path.rpartition(".")
    if section and not isinstance(tree.get(section), dict):
        tree[section] = {}
    (tree[section] if section else tree)[name] = value


def open_config(file: Path) -> tuple[dict[str, Any], FromOriginal]:
    """(the original's dict, ours) of a config.json or config.yaml; ValueError if it is none."""
    theirs = read_config(file)
    return theirs, from_original_config(theirs, str(file))


def read_config(file: Path) -> dict[str, Any]:
    """The dict of a config.json or config.yaml; ValueError if it is none."""
    where = repr(str(file))
    try:
        if file.stat().st_size > MAX_FILE:
            raise ValueError(f"{where} has over {MAX_FILE} bytes; give a config")
        text = file.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read {where}: {error.strerror}; give a config") from error
    if file.suffix != ".json":
        try:
            # An alias can make a short file enormous, and the original's files have none.
            if any(isinstance(e, yaml.AliasEvent) for e in yaml.parse(text, yaml.SafeLoader)):
                raise ValueError("it has aliases")
            text = json.dumps(yaml.safe_load(text))
        except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
            reason = " ".join(str(error).split())[:120]
            raise ValueError(
                f"{where} is not a config of the original code: {reason}; get it again"
            ) from error
    return load_json(text, where)
