"""SEDD's sisters - MDLM, RADD, GIDD, Duo - whose network is the original's up to details.

FAMILIES says of each how its folder is recognised, which config it means and where its tensors
differ from the original's. The facts are those of the authors' repositories, named there.
"""

import re
from collections import ChainMap
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from sedd_jax import config as configuration
from sedd_jax.convert import names, original_config
from sedd_jax.convert.original_config import FromOriginal, get, put
from sedd_jax.convert.weights import BUFFER
from sedd_jax.host.files import shown

SEDD = "sedd"
# GIDD's buffers of the rotary embedding, [1, positions, q k v, 1, K].
COSINES, SINES = "rotary_emb.cos_cached", "rotary_emb.sin_cached"
_NORM = re.compile(r"(norm1|norm2|norm_final)\.weight$")
_OF_NOISE = re.compile(r"^sigma_map\.|adaLN_modulation")


class Limit(NamedTuple):
    """Which values of a field are read."""

    values: tuple
    are_read: bool  # only these, or all but these
    reason: str


class Family(NamedTuple):
    """How one family's folders differ from the original's."""

    title: str
    # Fields of its config.json and what they hold, whatever the case; None: anything.
    marks: Mapping[str, str | None] = {}
    # The original's fields, as original_config takes them, by their names here. "tokens" is the
    # number of the network's states; so many of them, the last, are MASK.
    fields: Mapping[str, str] = {}
    masks: int = 0
    graph: str = "absorb"
    # Keys of our config: their values, or the fields that hold them and what those are by default.
    values: Mapping[str, Any] = {}
    named: Mapping[str, tuple[str, Any]] = {}
    limits: Mapping[str, Limit] = {}
    has_biases: bool = False  # of its norms, in place of adaLN: it does not see the noise level
    special: tuple[str, ...] = ()  # that its vocabulary may have after the tokens of its tokenizer
    prefix: str = ""  # of every name
    buffers: str = re.escape(BUFFER)  # a pattern

    def expected_tensors(self, config: ConfigDict, vocab_size: int) -> dict[str, tuple[int, ...]]:
        """The shape of every parameter in a folder, by name."""
        expected = names.expected_tensors(config, vocab_size)
        if self.has_biases:
            norms = {name: shape for name, shape in expected.items() if _NORM.search(name)}
            expected |= {_NORM.sub(r"\1.bias", name): shape for name, shape in norms.items()}
            expected = {n: s for n, s in expected.items() if not _OF_NOISE.search(n)}
        return expected

    def parameters(
        self, tensors: Mapping[str, np.ndarray], config: ConfigDict, vocab_size: int, where: str
    ) -> dict:
        """Our parameter tree from the folder's tensors; ValueError as names.from_original."""
        if self.has_biases:
            shapes = names.expected_tensors(config, vocab_size)
            tensors = ChainMap(tensors, _biases_as_shifts(tensors, shapes))
        if COSINES in tensors:
            tensors = ChainMap({BUFFER: _frequencies(tensors, where)}, tensors)
        return names.from_original(tensors, config.model.heads, where)


_CLEAN = {"objective.name": "normalised"}  # softmax over the clean tokens: Graph.predicts_clean
_FIELDS = {  # of MDLM and Duo
    "tokens": "vocab_size",
    "model.hidden_size": "hidden_dim",
    "model.n_blocks": "n_blocks",
    "model.n_heads": "n_heads",
    "model.cond_dim": "cond_dim",
    "model.length": "model_length",
}
_MASK_IS_LAST = Limit(
    (30522, 35),
    False,
    "it is the vocabulary of BERT or of its text8, whose MASK is not the last token; take a model "
    "of GPT-2's",
)
_NO_HYBRID = Limit(
    (0,),
    True,
    "its noise takes tokens to MASK and to random tokens at two rates whose ratio changes with "
    "time, and a noise here is one rate matrix at all times; take a model of p_uniform 0",
)
_LOG_LINEAR = Limit(("loglinear",), True, "the published models have loglinear noise")
_NOT_CAUSAL = Limit((None, False), True, "a causal network is no diffusion model")

FAMILIES: dict[str, Family] = {
    SEDD: Family("SEDD"),
    # github.com/kuleshov-group/mdlm, 2406.07524: log-linear noise of eps 1e-3
    "mdlm": Family(
        "MDLM",
        marks={"model_type": "mdlm"},
        fields=_FIELDS,
        masks=1,
        values=_CLEAN,
        named={"model.time_conditioning": ("time_conditioning", False)},
        limits={"vocab_size": _MASK_IS_LAST},
        prefix="backbone.",
    ),
    # github.com/ML-GSAI/RADD, 2406.03736: log-linear noise of eps 1e-3
    "radd": Family(
        "RADD",
        marks={"model.type": "ddit_wot"},
        fields={name: name for name in (*_FIELDS, "noise.type")},
        # Nothing depends on the noise level: one number is width enough for its embedding.
        values={**_CLEAN, "model.time_conditioning": False, "model.cond_dim": 1},
        limits={"noise.type": _LOG_LINEAR},
        has_biases=True,
    ),
    # github.com/dvruette/gidd, 2503.04482: the network sees the time, which is the masked share
    "gidd": Family(
        "GIDD",
        marks={"model_type": "dit", "p_uniform": None},
        fields={
            "tokens": "vocab_size",
            "model.hidden_size": "hidden_size",
            "model.n_blocks": "num_hidden_layers",
            "model.n_heads": "num_attention_heads",
            "model.cond_dim": "timestep_cond_dim",
            "model.length": "max_seq_len",
        },
        masks=1,
        values={**_CLEAN, "model.noise_input": "share"},
        named={"schedule.eps": ("t_eps", 1e-4), "objective.t_min": ("t_eps", 1e-4)},
        limits={"p_uniform": _NO_HYBRID, "vocab_size": _MASK_IS_LAST},
        special=("[PAD]",),
        buffers="|".join(map(re.escape, (BUFFER, COSINES, SINES))),
    ),
    # github.com/s-sahoo/duo, 2506.10892: log-linear noise of eps 1e-3
    "duo": Family(
        "Duo",
        marks={"model_type": "duo"},
        fields=_FIELDS,
        graph="uniform",
        values=_CLEAN,
        limits={"causal": _NOT_CAUSAL},
        special=("[PAD]",),
        prefix="backbone.",
    ),
}
# Kinds of model that are known and not read, by model_type.
OTHERS = {
    "bd3lm": "block diffusion, whose network sees a clean copy of the text beside the noised one",
    "md4": "MD4, whose network has gated MLPs and rotates neighbouring numbers, unlike this one",
    "genmd4": "MD4 with a noise level for each token, and with another network than this one",
}


def open_config(file: Path) -> tuple[str, dict[str, Any], FromOriginal]:
    """(name in FAMILIES, the dict, what it says) of a config.json; ValueError if it is none."""
    theirs, where = original_config.read_config(file), str(file)
    name = recognise(theirs, where)
    if name == SEDD:
        return name, theirs, original_config.from_original_config(theirs, where)
    return name, theirs, _from_config(FAMILIES[name], theirs, where)


def recognise(theirs: Mapping[str, Any], where: str) -> str:
    """The name in FAMILIES of the model with this config.json; ValueError for one of no family."""
    for name, family in FAMILIES.items():
        if family.marks and all(_is(get(theirs, f), mark) for f, mark in family.marks.items()):
            return name
    kind = theirs.get("model_type")
    if kind is None:
        return SEDD
    what = f"model_type {shown(repr(kind))} in {where}"
    if reason := OTHERS.get(str(kind).lower()):
        raise ValueError(f"{what} is {reason}; it is not read")
    raise ValueError(
        f"{what} is none that is read; known: mdlm, duo, dit with p_uniform (GIDD), and none in "
        "folders of SEDD and RADD"
    )


def _is(value: Any, mark: str | None) -> bool:
    return value is not None and mark in (None, str(value).lower())


def _from_config(family: Family, theirs: Mapping[str, Any], where: str) -> FromOriginal:
    """What the family's config.json says; ValueError for what is not read."""
    for field, limit in family.limits.items():
        value = get(theirs, field)
        if (value in limit.values) != limit.are_read:
            raise ValueError(
                f"{field} {shown(repr(value))} of {family.title} in {where} is not read: "
                f"{limit.reason}"
            )
    words: dict[str, Any] = {"noise": {"type": "loglinear"}, "graph": {"type": family.graph}}
    words |= {"model": {"scale_by_sigma": False}, "data": {"train": "text"}}
    for field, name in family.fields.items():
        if (value := get(theirs, name)) is None:
            raise ValueError(f"{name} of {family.title} is missing in {where}; get it again")
        put(words, field, value)
    if type(words["tokens"]) is int:
        words["tokens"] -= family.masks
    config, vocab_size, _ = original_config.from_original_config(
        words, where, written=family.fields
    )
    values = dict(family.values)
    for key, (name, default) in family.named.items():
        values[key] = default if (value := get(theirs, name)) is None else value
    config = configuration.with_values(config, values)
    return FromOriginal(config, vocab_size, (_taken_for(family, config, vocab_size, where),))


def _taken_for(family: Family, config: ConfigDict, vocab_size: int, where: str) -> str:
    """How the folder is read, in a line."""
    sees = {"sigma": "the total noise", "share": "the masked share"}[config.model.noise_input]
    sees = sees if config.model.time_conditioning else "no noise level"
    mask = " and MASK" if family.graph == "absorb" else ""
    return (
        f"{where} is taken for {family.title}: {config.graph.name} noise, {config.schedule.name} "
        f"with eps {config.schedule.eps:g}; {vocab_size} tokens{mask}; logits of the clean tokens "
        f"from a network that sees {sees}"
    )


def _biases_as_shifts(
    tensors: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, np.ndarray]:
    """The original's tensors that a network lacks whose norms have biases, and which sees no noise
    level: the adaLN whose weights are 0 and whose biases are shift = the norm's bias, scale = 0 and
    gate = 1."""
    made = {n: np.zeros(shape, np.float32) for n, shape in shapes.items() if n not in tensors}
    for name, array in made.items():
        layer, _, kind = name.rpartition(".adaLN_modulation.")
        if kind == "bias":
            norms = ("norm_final",) if layer == "output_layer" else ("norm1", "norm2")
            rows = array.reshape(len(norms), -1, len(tensors[f"{layer}.{norms[0]}.bias"]))
            for row, norm in zip(rows, norms):  # shift, scale and, but for the last norm, gate
                row[0], row[2:] = tensors[f"{layer}.{norm}.bias"], 1.0
    return made


def _frequencies(tensors: Mapping[str, np.ndarray], where: str) -> np.ndarray:
    """Those of the rotary embedding, by its tables of cosines and sines."""
    cos, sin = tensors[COSINES], tensors[SINES]
    if cos.ndim != 5 or cos.shape != sin.shape or cos.shape[1] < 2:
        raise ValueError(
            f"{COSINES} in {where} has shape {list(cos.shape)}, which is no table of a rotary "
            "embedding; get it again"
        )
    half = cos.shape[-1] // 2
    return np.arctan2(sin[0, 1, 0, 0, :half], cos[0, 1, 0, 0, :half])
