"""The Hugging Face folder: the exchange format of the original code and of this.

config.json and model.safetensors are the original's, so that its from_pretrained reads them.
sedd_jax.json, which it passes over, holds our config, the tokenizer and the step; README.md is the
model card.
"""

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from sedd_jax import config as configuration
from sedd_jax.configs import base
from sedd_jax.convert import names, original_config, sisters, torch_files, weights
from sedd_jax.convert.card import model_card
from sedd_jax.convert.sisters import FAMILIES, SEDD
from sedd_jax.convert.weights import INDEX, WEIGHTS
from sedd_jax.data import Tokenizer, tokenizer_from_dict
from sedd_jax.data.subwords import LibraryTokenizer
from sedd_jax.diffusion.objectives import OBJECTIVES
from sedd_jax.host import imports
from sedd_jax.host.files import appearing, check_new, load_json, local_path, refuse_pointer_file

log = logging.getLogger(__name__)

CONFIG, OURS, CARD = "config.json", "sedd_jax.json", "README.md"
PICKLED = "pytorch_model.bin"
FORMAT = 1
MAX_OURS = 1 << 27  # bytes of sedd_jax.json: it holds the tokenizer
# What fixes the function that the weights stand for, and its length. The original has no field
# for schedule.eps, and the sigmas mean something to the geometric schedule alone.
SHAPING = (
    "vocab_size", "data.length", "graph.name", "graph.scale_by_sigma", "schedule.name",
    "model.hidden_size", "model.blocks", "model.heads", "model.cond_dim",
)  # fmt: skip
_SIGMAS = ("schedule.sigma_min", "schedule.sigma_max")


class Pretrained(NamedTuple):
    """A model as a folder holds it."""

    config: ConfigDict | Mapping[str, Any]
    vocab_size: int  # clean tokens
    params: dict | None  # our tree, float32; None until they are read
    tokenizer: Tokenizer | None = None
    step: int | None = None
    notices: tuple[str, ...] = ()  # what the reader had to assume
    about: Mapping[str, Any] = {}
    original: dict | None = None  # the config that it came with
    curve: Mapping[str, Any] | None = None  # of cross entropy by mask share, as JSON
    family: str = SEDD  # of sisters.FAMILIES: whose tensors the folder holds


def read_folder(folder: Path | str) -> Pretrained:
    """The model in a folder with config.json and the weights, in one of these forms.

    model.safetensors; or the files that model.safetensors.index.json names; or pytorch_model.bin,
    which is read by a child process that needs torch. Peak memory is one copy of the weights and
    their largest tensor. ValueError for whatever is missing, damaged or contradictory.
    """
    folder = local_path(folder)
    model = open_folder(folder)
    return model._replace(params=read_params(folder, model))


def open_folder(folder: Path) -> Pretrained:
    """The model in a folder, without its parameters."""
    file = weights.locate(folder) or folder / PICKLED
    for name in (CONFIG, file.name):
        if not (folder / name).is_file():
            name = f"{WEIGHTS}, {INDEX} or {PICKLED}" if name == PICKLED else name
            raise ValueError(
                f"no {name} in {str(folder)!r}; give a folder that the original's save_pretrained "
                "or sedd-convert has written"
            )
        refuse_pointer_file(folder / name)
    ours = _read_ours(folder / OURS) if (folder / OURS).exists() else None
    if ours is not None:  # before config.json, which may hold the names of registered parts
        names = ours["config"].pop("imports", ())
        configuration.check_value("imports", names)
        ours["config"]["imports"] = imports.names_in(folder, names)
        imports.import_modules(ours["config"]["imports"], read_in=folder)
    family, theirs, (config, vocab_size, notices) = sisters.open_config(folder / CONFIG)
    tokenizer, step, about, curve = None, None, {}, None
    if family != SEDD:
        return Pretrained(config, vocab_size, None, notices=notices, family=family)
    if ours is not None:
        step, about, curve = ours["step"], ours["about"] or {}, ours["curve"]
        if ours["tokenizer"] is not None:
            tokenizer = tokenizer_from_dict(ours["tokenizer"])
        written, notices = _config(ours["config"], str(folder / OURS))
        _check_agreement(folder, (config, vocab_size), (written, ours["vocab_size"]))
        config = written
    return Pretrained(config, vocab_size, None, tokenizer, step, notices, about, theirs, curve)


def read_params(folder: Path, model: Pretrained) -> dict:
    """The parameters of the model that `open_folder` has opened."""
    family, sizes = FAMILIES[model.family], (model.config, model.vocab_size)
    expected = family.expected_tensors(*sizes)
    how = {"extra": family.buffers, "model": family.title, "usual": family.prefix}
    if (file := weights.locate(folder)) is not None:
        tensors = weights.open_tensors(file, expected, **how)
        return family.parameters(tensors, *sizes, repr(str(file)))
    file = folder / PICKLED
    with torch_files.read(file, expected, ("model",), **how) as (tensors, _):
        return family.parameters(tensors["model"], *sizes, repr(str(file)))


def fitted(tokenizer: Tokenizer | None, model: Pretrained) -> Tokenizer | None:
    """The tokenizer with the special tokens that the model's vocabulary has after its own."""
    special = FAMILIES[model.family].special
    if not special or not isinstance(tokenizer, LibraryTokenizer):
        return tokenizer
    is_short = tokenizer.vocab_size + len(special) == model.vocab_size
    return tokenizer.with_special(special) if is_short else tokenizer


def check_tokenizer(tokenizer: Tokenizer | None, vocab_size: int, where: str | Path) -> None:
    """ValueError unless there is a tokenizer with as many tokens as the model in `where`."""
    if tokenizer is None:
        raise ValueError("a workdir needs the model's tokenizer; add --tokenizer=gpt2, or its own")
    if tokenizer.vocab_size != vocab_size:
        raise ValueError(
            f"tokenizer {tokenizer.name!r} has {tokenizer.vocab_size} tokens, the model in "
            f"{str(where)!r} {vocab_size}; give the tokenizer that it was trained with"
        )


def _read_ours(file: Path) -> dict[str, Any]:
    """sedd_jax.json, its types checked."""
    if file.stat().st_size > MAX_OURS:
        raise ValueError(f"{str(file)!r} has over {MAX_OURS} bytes; get it again")
    ours = load_json(file.read_bytes(), repr(str(file)))
    if ours.get("format") != FORMAT:
        raise ValueError(
            f"{str(file)!r} has format {ours.get('format')!r}, {FORMAT} is known; delete it, or "
            "update sedd_jax"
        )
    kinds = {
        "config": (dict,),
        "vocab_size": (int,),
        "tokenizer": (dict, type(None)),
        "step": (int, type(None)),
        "about": (dict, type(None)),
        "curve": (dict, type(None)),
    }
    ours.setdefault("curve", None)  # of a version before it
    for key, kind in kinds.items():
        if key not in ours or type(ours[key]) not in kind:
            raise ValueError(f"{key} of {str(file)!r} is missing or of a wrong type; get it again")
    return ours


def _config(values: Mapping[str, Any], where: str) -> tuple[ConfigDict, tuple[str, ...]]:
    """(config, notices): ours as written; keys that are newer as configs/base.py has them."""
    known = dict(configuration.flatten(values))
    known = {key: known[key] for key in known if key not in configuration.RETIRED}
    for key in known:
        if key not in configuration.KEYS:
            raise ValueError(f"unknown config key {key[:60]!r} in {where}; update sedd_jax")
    config = configuration.with_values(base.get_config(), known)
    missing = {*configuration.KEYS} - {*known, *configuration.AS_BEFORE}
    values = dict(configuration.flatten(config))
    taken = ", ".join(f"{key} {values[key]!r}" for key in sorted(missing))
    return config, ((f"{where} lacks these, taken as {taken}",) if missing else ())


def _check_agreement(folder: Path, theirs: tuple, ours: tuple) -> None:
    """ValueError if the two (config, vocab_size) are of two models."""
    one, other = (
        {**dict(configuration.flatten(config)), "vocab_size": vocab_size}
        for config, vocab_size in (theirs, ours)
    )
    for key in SHAPING + (_SIGMAS if one["schedule.name"] == "geometric" else ()):
        if one[key] != other[key]:
            raise ValueError(
                f"{key} in {str(folder)!r} is {one[key]!r} by {CONFIG} and {other[key]!r} by "
                f"{OURS}; get both again, or delete {OURS}"
            )


def write_folder(
    folder: Path | str, model: Pretrained, *, name: str | None = None, replace: bool = False
) -> None:
    """Write the model as a folder that the original's from_pretrained and `read_folder` read.

    name is the card's title and what it says to load, the folder's name by default. about goes
    into sedd_jax.json, and what `card.model_card` knows of it into the card. The folder appears
    whole: written beside and renamed. ValueError if anything is there; with replace, if that is
    no such export.
    """
    folder = local_path(folder)
    check_target(folder, replace)
    if not model.config:
        raise ValueError(
            "a model that was built by hand has no config to export; load it, or give "
            "SEDD(experiment=config.to_dict())"
        )
    config, vocab_size, tokenizer = ConfigDict(model.config), model.vocab_size, model.tokenizer
    if OBJECTIVES[config.objective.name].is_continuous:
        raise ValueError(
            f"a model of objective {config.objective.name!r} has another network than the "
            "original's and cannot be written as its folder; load it from its run's"
        )
    name = name or os.path.basename(os.path.abspath(folder))
    tensors = names.to_original(model.params)
    shapes = {name: array.shape for name, array in tensors.items()}
    weights.compare(shapes, names.expected_tensors(config, vocab_size), "the parameter tree")
    for fault in original_config.cannot_say(config):
        log.warning("left out of config.json, which has no key for it: %s", fault)
    theirs = original_config.to_original_config(config, vocab_size, model.original)
    ours = {
        "format": FORMAT,
        "config": config.to_dict() | {"imports": imports.copied_names(config.imports)},
        "vocab_size": vocab_size,
        "tokenizer": None if tokenizer is None else tokenizer.to_dict(),
        "step": model.step,
        "about": model.about,
        "curve": model.curve,
    }
    count = sum(array.size for array in tensors.values())
    modules = imports.read_files(config.imports)
    for module in modules:
        log.info("the folder holds the code that config.imports names: %s", module)
    with appearing(folder) as part:
        _write_json(part / CONFIG, theirs, sort_keys=True)
        _write_json(part / OURS, ours)
        imports.write_files(part, modules)
        card = model_card(name, config, vocab_size, tokenizer, model.step, count, model.about)
        (part / CARD).write_text(card, encoding="utf-8")
        weights.write_tensors(part / WEIGHTS, names.state_dict(model.params))


def _write_json(file: Path, value: Any, *, sort_keys: bool = False) -> None:
    text = json.dumps(value, indent=2, sort_keys=sort_keys, allow_nan=False)
    file.write_text(text, encoding="utf-8")


def check_target(folder: Path, replace: bool) -> None:
    """ValueError unless the folder is absent, empty, or an export alone that may be replaced."""
    inside = set()
    if folder.is_dir() and not folder.is_symlink():
        inside = {path.name for path in folder.iterdir()}
    if not (OURS in inside and inside <= {CONFIG, WEIGHTS, OURS, CARD, imports.FOLDER}):
        check_new(folder)
    elif not replace:
        raise ValueError(
            f"{str(folder)!r} is there and holds an exported model; choose a new folder, or add "
            "--replace (in Python replace=True) for this one in its place"
        )
