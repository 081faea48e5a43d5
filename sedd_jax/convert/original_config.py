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
from sedd_jax.configs import base
from sedd_jax.data import CORPORA
from sedd_jax.files import load_json, shown

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


class _Field(NamedTuple):
    """A field of the original; config.KEYS says what ours may hold."""

    ours: str
    default: Any = None  # what the original's own configs have; None where it must be there
    words: Mapping[str, str] | None = None  # the original's -> ours
    # Far above any model's size: names and shapes are listed from them before a file is read.
    largest: int | None = None


_FIELDS = {
    "graph.type": _Field("graph.name", words={"absorb": "absorbing", "uniform": "uniform"}),
    "noise.type": _Field(
        "schedule.name", words={"loglinear": "log_linear", "geometric": "geometric"}
    ),
    "noise.sigma_min": _Field("schedule.sigma_min", 1e-4),
    "noise.sigma_max": _Field("schedule.sigma_max", 20),
    "model.hidden_size": _Field("model.hidden_size", largest=2**16),
    "model.cond_dim": _Field("model.cond_dim", largest=2**16),
    "model.length": _Field("data.length", 1024, largest=2**24),
    "model.n_blocks": _Field("model.blocks", largest=2**10),
    "model.n_heads": _Field("model.heads", largest=2**10),
    "model.scale_by_sigma": _Field("graph.scale_by_sigma"),
    "model.dropout": _Field("model.dropout", 0.1),
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
        "sample.predictor",
        "euler",
        words={"analytic": "tweedie", "euler": "euler", "none": "none"},
    ),
    "sampling.steps": _Field("sample.steps", 128),
}
_KNOWN = {
    "model.type": ("ddit",),
    "optim.optimizer": ("AdamW", "Adam"),
    "sampling.noise_removal": (True, False),
}
# Fields that the original's programs read, or its configs have, and that mean nothing here.
_THEIRS_ALONE = {
    "model.type": "ddit",
    "optim.optimizer": "AdamW",
    "sampling.noise_removal": True,
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


def from_original_config(theirs: Mapping[str, Any], where: str = "config.json") -> FromOriginal:
    """Our full config from the original's dict; configs/base.py has what it does not say.

    The dtype is float32, whatever it was trained in. What is missing and does not shape the model
    is taken as the original's own configs have it, and named in one notice. ValueError, naming
    `where` and the field, for anything that is not a model of the original code.
    """

    def refuse(field: str, value: Any, words: str) -> ValueError:
        return ValueError(
            f"{field} {shown(repr(value))} in {where} is not {words}; give a config of the "
            "original code"
        )

    config, missing, values = base.get_config(), [], {}
    defaults = dict(configuration.flatten(config))
    for field, (ours, default, words, largest) in _FIELDS.items():
        written, rule = _get(theirs, field), configuration.KEYS[ours]
        if written is None and default is None:
            raise ValueError(f"{field} is missing in {where}; give a config of the original code")
        if written is None:
            written = default
            missing.append(f"{field} {default}")
        value = _to_ours(field, written, defaults[ours])
        if not rule.holds(value):
            raise refuse(field, written, f"one of {', '.join(words)}" if words else rule.words)
        if largest and value > largest:
            raise refuse(field, written, f"{rule.words}, and at most {largest}")
        values[ours] = float(value) if isinstance(defaults[ours], float) else value
    tokens = _get(theirs, "tokens")
    if type(tokens) is not int or not 2 <= tokens <= 2**24:
        raise refuse("tokens", tokens, f"a whole number in [2, {2**24}]")
    for field, known in _KNOWN.items():
        value = _get(theirs, field)
        if value is not None and value not in known:
            raise refuse(field, value, f"one of {', '.join(map(str, known))}")
    if not isinstance(_get(theirs, "data.train"), (str, type(None))):
        raise refuse("data.train", _get(theirs, "data.train"), "text")
    hidden_size, heads = values["model.hidden_size"], values["model.heads"]
    if hidden_size % heads:
        raise ValueError(
            f"model.hidden_size {hidden_size} in {where} is not divisible by model.n_heads "
            f"{heads}; give a config of the original code"
        )
    notices = _complete(values, theirs, tokens, missing)
    if missing:
        notices.insert(0, f"{where} lacks these, taken as {', '.join(missing)}")
    return FromOriginal(configuration.with_values(config, values), tokens, tuple(notices))


def _complete(
    values: dict[str, Any], theirs: Mapping[str, Any], tokens: int, missing: list[str]
) -> list[str]:
    """Set our keys that have no field of their own; returns what the user should know."""
    notices = []
    values |= {"model.dtype": "float32", "schedule.eps": EPS}
    corpus = _get(theirs, "data.train")
    if corpus is None:
        corpus = "openwebtext"
        missing.append(f"data.train {corpus}")
    if corpus in _SHARED_CORPORA:
        values |= {"data.corpus": corpus, **_HELDOUT.get(corpus, {})}
    else:
        values["data.corpus"] = "text"
        notices.append(
            f"data.train {shown(repr(corpus))} is no corpus known here; config.data.corpus is text"
        )
    if tokens in TOKENIZERS:
        values["data.tokenizer"] = TOKENIZERS[tokens]
    if _get(theirs, "optim.optimizer") == "Adam" and values["optimizer.weight_decay"]:
        notices.append("Adam with weight decay is trained on as AdamW, whose decay is decoupled")
    if _get(theirs, "sampling.noise_removal") is False:
        notices.append("sampling.noise_removal false is not kept: samples end with the denoiser")
    return notices


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
        **_THEIRS_ALONE,
        "model.name": {(768, 12): "small", (1024, 24): "medium"}.get(sizes, "sedd_jax"),
        "data.train": corpus,
        "data.valid": corpus,
        "eval.batch_size": config.train.batch_size,
    }
    for field, value in fallback.items():
        if _get(theirs, field) is None:
            _put(theirs, field, value)
    for field, (ours, _, words, _) in _FIELDS.items():
        value, there = values[ours], _get(theirs, field)
        # 20 means 20.0, and 1e-4 without a point is text to YAML 1.1.
        if there is None or _to_ours(field, there, value) != value:
            if words:
                value = next(word for word in words if words[word] == value)
            elif field == "optim.grad_clip" and value == NO_CLIP:
                value = -1.0
            _put(theirs, field, value)
    theirs["tokens"] = vocab_size
    if corpus in _SHARED_CORPORA:
        _put(theirs, "data.train", corpus)
    return theirs


def cannot_say(config: ConfigDict) -> list[str]:
    """What of our config the original has no field for, so that it would do something else."""
    faults = []
    if config.schedule.name == "log_linear" and config.schedule.eps != EPS:
        faults.append(f"schedule.eps {config.schedule.eps}: the original's is {EPS}")
    if config.objective.t_min != 1e-3:
        faults.append(f"objective.t_min {config.objective.t_min}: the original's is 0.001")
    if config.data.form != "packed":
        faults.append(f"data.form {config.data.form}: the original packs its documents")
    return faults


def _to_ours(field: str, value: Any, ours: Any) -> Any:
    """What the original's value means here; ours, any value of our field, tells the type."""
    if words := _FIELDS[field].words:
        return words.get(value) if isinstance(value, str) else None
    if isinstance(value, str) and len(value) < 40 and isinstance(ours, float):
        try:  # YAML 1.1 reads 1e-4 as text; the original's reader takes it for a number
            value = float(value)
        except ValueError:
            return value
    is_negative = type(value) in (int, float) and value < 0
    return NO_CLIP if field == "optim.grad_clip" and is_negative else value


def _get(tree: Any, path: str) -> Any:
    """The value at "model.length"; None where it, or its section, is missing."""
    for key in path.split("."):
        if not isinstance(tree, Mapping) or key not in tree:
            return None
        tree = tree[key]
    return tree


def _put(tree: dict, path: str, value: Any) -> None:
    *sections, last = path.split(".")
    for key in sections:
        if not isinstance(tree.get(key), dict):
            tree[key] = {}
        tree = tree[key]
    tree[last] = value


def read_config(file: Path) -> dict[str, Any]:
    """The dict of a config.json or config.yaml; ValueError if it is none."""
    try:
        if file.stat().st_size > MAX_FILE:
            raise ValueError(f"{str(file)!r} has over {MAX_FILE} bytes; give a config")
        text = file.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read {str(file)!r}: {error.strerror}; give a config") from error
    if file.suffix == ".json":
        return load_json(text, repr(str(file)))
    try:
        # An alias can make a short file enormous, and the original's files have none.
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
            raise ValueError("it has aliases")
        theirs = yaml.safe_load(text)
        json.dumps(theirs)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:120]
        raise ValueError(
            f"{str(file)!r} is no config of the original code: {reason}; get it again"
        ) from error
    kind = type(theirs).__name__
    if kind != "dict":
        raise ValueError(f"{str(file)!r} holds a {kind}; give a config of the original code")
    return theirs
