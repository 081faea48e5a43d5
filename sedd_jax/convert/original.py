"""The original's config to ours and back: its config.json, or the .hydra/config.yaml of a run.

`fields` says which of its fields is which of ours, what it may hold and what the original takes
where a file lacks it. What the original has and we have not (ngpus, snapshots, cache_dir) is kept
in its own dict, over which ours is laid.
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
from sedd_jax.convert.fields import FIELDS, NEEDED, THEIRS_ALONE, Field, Kind
from sedd_jax.data import CORPORA
from sedd_jax.files import load_json

EPS = 1e-3  # of the original's log-linear noise, which has no field for it
MAX_FILE = 1 << 20  # bytes of a config
TOKENIZERS = {50257: "gpt2", 27: "text8"}  # by vocab_size
_SHARED_CORPORA = tuple(name for name in CORPORA if name not in ("pydoc", "text"))
# How our configs of these corpora hold text out.
_HELDOUT = {"lm1b": {"heldout_split": "test"}, "openwebtext": {"heldout_fraction": 0.0125}}


class FromOriginal(NamedTuple):
    """What a config of the original says."""

    config: ConfigDict
    vocab_size: int  # clean tokens: its `tokens`
    notices: tuple[str, ...]


def from_original_config(theirs: Mapping[str, Any], where: str = "config.json") -> FromOriginal:
    """Our full config from the original's dict; configs/base.py has what it does not say.

    The dtype is float32, whatever it was trained in. What is missing and does not shape the model
    is taken as the original's own configs have it, and told in one notice; whoever uses the config
    tells the notices. ValueError, naming
    `where` and the field, for anything that is not a model of the original code.
    """
    config, values, missing = base.get_config(), {}, []
    for field in FIELDS:
        value = _get(theirs, field.theirs)
        if value is None:
            if field.missing is NEEDED:
                raise ValueError(
                    f"{field.theirs} is missing in {where}; give a config of the original code"
                )
            missing.append(f"{field.theirs} {field.missing}")
            value = field.missing
        value = _plain_number(value, field.kind)
        if not field.kind.holds(value):
            shown = repr(value) if len(repr(value)) <= 60 else repr(value)[:57] + "..."
            raise ValueError(
                f"{field.theirs} {shown} in {where} is not {field.kind.words}; give a config of "
                "the original code"
            )
        values[field.theirs] = value
        if field.ours:
            _put(config, field.ours, field.to_ours(value))
    if values["model.hidden_size"] % values["model.n_heads"]:
        raise ValueError(
            f"model.hidden_size {values['model.hidden_size']} in {where} is not divisible by "
            f"model.n_heads {values['model.n_heads']}; give a config of the original code"
        )
    notices = _complete(config, values)
    if missing:
        notices.insert(0, f"{where} lacks these, taken as {', '.join(missing)}")
    configuration.check(config)
    return FromOriginal(config, values["tokens"], tuple(notices))


def _complete(config: ConfigDict, values: Mapping[str, Any]) -> list[str]:
    """Set what has no field of its own; returns what the user should know."""
    notices = []
    config.model.dtype = "float32"
    config.schedule.eps = EPS
    corpus = values["data.train"]
    if corpus in _SHARED_CORPORA:
        config.data.corpus = corpus
        config.data.update(_HELDOUT.get(corpus, {}))
    else:
        config.data.corpus = "text"
        notices.append(f"data.train {corpus!r} is no corpus known here; config.data.corpus is text")
    if values["tokens"] in TOKENIZERS:
        config.data.tokenizer = TOKENIZERS[values["tokens"]]
    if values["optim.optimizer"] == "Adam" and values["optim.weight_decay"]:
        notices.append("Adam with weight decay is trained on as AdamW, whose decay is decoupled")
    if not values["sampling.noise_removal"]:
        notices.append("sampling.noise_removal false is not kept: samples end with the denoiser")
    return notices


def to_original_config(
    config: ConfigDict, vocab_size: int, original: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Every field that the original's programs read, from our config.

    original is the dict that the model came with, if it did: its fields stay as they are unless
    our config says something else. `cannot_say` lists what the original has no words for.
    """
    theirs = copy.deepcopy(dict(original or {}))
    sizes = (config.model.hidden_size, config.model.blocks, config.model.heads)
    names = {(768, 12, 12): "small", (1024, 24, 16): "medium"}
    corpus = config.data.corpus
    wanted = {field.theirs: field.to_theirs(_get(config, field.ours)) for field in _mapped()}
    fallback = {
        **THEIRS_ALONE,
        **{field.theirs: field.missing for field in FIELDS if field.missing is not NEEDED},
        "model.name": names.get(sizes, "sedd_jax"),
        "data.train": corpus,
        "data.valid": corpus,
        "eval.batch_size": config.train.batch_size,
    }
    if corpus in _SHARED_CORPORA:
        wanted["data.train"] = corpus
    wanted["tokens"] = vocab_size
    for place, value in {**fallback, **wanted}.items():
        there = _get(theirs, place)
        if there is None or (place in wanted and not _means(place, there, value)):
            _put(theirs, place, value)
    return theirs


def cannot_say(config: ConfigDict) -> list[str]:
    """What of our config the original has no field for, so that it would do something else."""
    found = []
    if config.schedule.name == "log_linear" and config.schedule.eps != EPS:
        found.append(f"schedule.eps {config.schedule.eps}: the original's is {EPS}")
    if config.objective.t_min != 1e-3:
        found.append(f"objective.t_min {config.objective.t_min}: the original's is 0.001")
    if config.data.form != "packed":
        found.append(f"data.form {config.data.form}: the original packs its documents")
    return found


def _mapped() -> list[Field]:
    return [field for field in FIELDS if field.ours]


def _means(place: str, there: Any, value: Any) -> bool:
    """Whether the original's value says what ours does, if perhaps as 20 and not 20.0."""
    to_ours = {field.theirs: field.to_ours for field in FIELDS}[place]
    try:
        return to_ours(there) == to_ours(value)
    except (TypeError, ValueError):
        return False


def _plain_number(value: Any, kind: Kind) -> Any:
    """YAML 1.1 reads 1e-4 as text; the original's reader takes it for a number."""
    if isinstance(value, str) and len(value) < 40 and "number" in kind.words:
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _get(tree: Any, place: str) -> Any:
    """The value at "model.length"; None where it, or its section, is missing."""
    for key in place.split("."):
        if not isinstance(tree, (Mapping, ConfigDict)) or key not in tree:
            return None
        tree = tree[key]
    return tree


def _put(tree: Any, place: str, value: Any) -> None:
    *sections, last = place.split(".")
    for key in sections:
        if not isinstance(_get(tree, key), (dict, ConfigDict)):
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
