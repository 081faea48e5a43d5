"""A pretrained GPT-2 that scores text: nats of its tokens, and features of whole texts.

Its files are those of the Hugging Face hub: config.json, model.safetensors and, where there,
vocab.json and merges.txt. Every tensor's name, shape and dtype is checked before one is read.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from tqdm.auto import tqdm

from sedd_jax import hub
from sedd_jax.config import DTYPES
from sedd_jax.data.tokenizers import GPT2 as GPT2Tokenizer
from sedd_jax.models import gpt2
from sedd_jax.models.gpt2 import GPT2

# Short name -> owner/name@commit, so that a number has one meaning on every day.
SCORERS = {
    "gpt2": "openai-community/gpt2@607a30d783dfa663caf39e06633721c8d4cfcd7e",
    "gpt2-medium": "openai-community/gpt2-medium@6dcaa7a952f72f9298047fd5137cd6e4f05f41da",
    "gpt2-large": "openai-community/gpt2-large@32b71b12589c2f8d625668d2335a01cac3249519",
    "gpt2-xl": "openai-community/gpt2-xl@15ea56dee5df4983c59b2538573817e1667135e2",
}

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
VOCAB, MERGES = "vocab.json", "merges.txt"
FILES = (WEIGHTS, INDEX, "model-*.safetensors", VOCAB, MERGES)  # and CONFIG

# (field of the network, key of config.json)
_SIZES = (
    ("vocab_size", "vocab_size"),
    ("positions", "n_positions"),
    ("hidden_size", "n_embd"),
    ("blocks", "n_layer"),
    ("heads", "n_head"),
)
# Keys that change the mathematics, each with the one value that the network computes, which is
# also what an absent key means.
_FIXED = {
    "activation_function": "gelu_new",
    "layer_norm_epsilon": gpt2.LAYER_NORM_EPSILON,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}
# (tensor, ours, shape in C, V and P positions). A layer is [in, out] in both; ours may split an
# axis into heads, which leaves the order of the values alone.
_TOP = (
    ("wte.weight", "embedding", "V C"),
    ("wpe.weight", "position", "P C"),
    ("ln_f.weight", "norm/scale", "C"),
    ("ln_f.bias", "norm/bias", "C"),
)
_BLOCK = (
    ("h.{}.ln_1.weight", "blocks/norm_1/scale", "C"),
    ("h.{}.ln_1.bias", "blocks/norm_1/bias", "C"),
    ("h.{}.attn.c_attn.weight", "blocks/qkv/kernel", "C 3C"),
    ("h.{}.attn.c_attn.bias", "blocks/qkv/bias", "3C"),
    ("h.{}.attn.c_proj.weight", "blocks/out/kernel", "C C"),
    ("h.{}.attn.c_proj.bias", "blocks/out/bias", "C"),
    ("h.{}.ln_2.weight", "blocks/norm_2/scale", "C"),
    ("h.{}.ln_2.bias", "blocks/norm_2/bias", "C"),
    ("h.{}.mlp.c_fc.weight", "blocks/up/kernel", "C 4C"),
    ("h.{}.mlp.c_fc.bias", "blocks/up/bias", "4C"),
    ("h.{}.mlp.c_proj.weight", "blocks/down/kernel", "4C C"),
    ("h.{}.mlp.c_proj.bias", "blocks/down/bias", "C"),
)
_BUFFER = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")  # the causal mask, and what it hides with
_HEAD = "lm_head.weight"
_STORED = ("F32", "F16", "BF16")  # float32 holds each of them exactly


@dataclasses.dataclass(frozen=True, eq=False)  # eq=False: the object is its own jit cache key
class Scorer:
    """A GPT-2 with its weights; tokens are GPT-2's ids, whoever wrote the text."""

    name: str  # the folder, or owner/name@commit: what a reported number should carry
    network: GPT2
    params: Any  # float32
    tokenizer: GPT2Tokenizer | None  # None where the files hold none

    def nats(
        self, tokens: np.ndarray, *, batch_size: int = 8, progress: bool = False
    ) -> np.ndarray:
        """-log p of each token but the first given those before it, nats, float32 [N, L - 1].

        tokens int32 [N, L]; L at least 2 and at most the network's positions.
        """
        tokens = self._check(tokens, least=2)
        return self._over_batches(self._nats, batch_size, progress, tokens)

    def features(
        self,
        tokens: np.ndarray,
        lengths: np.ndarray | None = None,
        *,
        batch_size: int = 8,
        progress: bool = False,
    ) -> np.ndarray:
        """Last hidden state at the last token of each row, float32 [N, C]: MAUVE's features.

        tokens int32 [N, L], filled up on the right from lengths[n] on with any ids, which change
        nothing; lengths int [N], None where every row is full.
        """
        tokens = self._check(tokens, least=1)
        count, length = tokens.shape
        lengths = np.full(count, length) if lengths is None else np.asarray(lengths)
        integers = np.issubdtype(lengths.dtype, np.integer)
        if lengths.shape != (count,) or not integers or not _inside(lengths, 1, length):
            raise ValueError(
                f"lengths must be {count} integers in [1, {length}], one for each row of tokens, "
                f"not {lengths.dtype} {list(lengths.shape)}"
            )
        last = lengths.astype(np.int32) - 1
        return self._over_batches(self._features, batch_size, progress, tokens, last)

    @functools.cached_property
    def _nats(self) -> Callable:
        return jax.jit(lambda params, tokens: gpt2.token_nats(self.network, params, tokens))

    @functools.cached_property
    def _features(self) -> Callable:
        @jax.jit
        def run(params, tokens, last):
            hidden = self.network.apply({"params": params}, tokens)
            return jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]

        return run

    def _over_batches(self, call, batch_size, progress, *arrays):
        if batch_size < 1:
            raise ValueError(f"batch_size {batch_size} is below 1; give at least 1")
        count = len(arrays[0])
        results = []
        starts = range(0, count, batch_size)
        for start in tqdm(starts, desc="score", unit="batch", disable=not progress):
            # The last batch is filled up with rows that are dropped again: one shape compiles once.
            rows = np.minimum(np.arange(start, start + batch_size), count - 1)
            results.append(np.asarray(call(self.params, *(array[rows] for array in arrays))))
        return np.concatenate(results)[:count]

    def _check(self, tokens, least):
        tokens = np.asarray(tokens)
        if tokens.ndim != 2 or not len(tokens) or not np.issubdtype(tokens.dtype, np.integer):
            raise ValueError(
                f"tokens must be integers [N, L] with N at least 1, not {tokens.dtype} "
                f"{list(tokens.shape)}"
            )
        length, most = tokens.shape[1], self.network.positions
        if not least <= length <= most:
            raise ValueError(
                f"{length} tokens in a row are not in [{least}, {most}], what {self.name} can "
                "score; cut the rows"
            )
        if not _inside(tokens, 0, self.network.vocab_size - 1):
            raise ValueError(
                f"token ids from {tokens.min()} to {tokens.max()} are not in "
                f"[0, {self.network.vocab_size}); encode the text with GPT-2's tokenizer"
            )
        return tokens.astype(np.int32)


def _inside(array, least, most):
    return least <= array.min() and array.max() <= most


def load_scorer(name: str, *, dtype: str = "float32") -> Scorer:
    """The GPT-2 called name: a row of SCORERS, a hub id owner/name@revision, or a folder.

    dtype is that of the matrix products: float32 or bfloat16. Files from the hub are kept in
    Hugging Face's cache, and taken from there when there is no network. ValueError for a name that
    leads nowhere, or files that are not a whole GPT-2.
    """
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; known: {', '.join(DTYPES)}")
    full_name, folder = _find(str(name))
    network = _network(folder / CONFIG, DTYPES[dtype])
    shape = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    flat = _read(folder, network, flax.traverse_util.flatten_dict(shape, sep="/"))
    # One by one, so that memory never holds everything twice.
    flat = {key: jnp.asarray(flat.pop(key)) for key in list(flat)}
    params = flax.traverse_util.unflatten_dict(flat, sep="/")
    return Scorer(full_name, network, params, _tokenizer(folder, network))


def _find(name: str) -> tuple[str, Path]:
    """The full name of a scorer, and the folder that holds its files."""
    found = hub.parse(SCORERS.get(name, name))
    if name not in SCORERS and Path(name).is_dir():
        return name, Path(name)
    if found is None or found[1] is None:
        raise ValueError(
            f"no scorer {name!r}: neither a folder, nor owner/name@revision on the hub, nor one of "
            f"{', '.join(SCORERS)}"
        )
    repository, revision = found
    folder = hub.download(repository, revision, [CONFIG], optional=FILES)
    return f"{repository}@{folder.name}", folder  # a snapshot's folder is called by its commit


def _one_line(error: Exception, most: int = 200) -> str:
    line = " ".join(f"{type(error).__name__}: {error}".split())
    return line if len(line) <= most else line[: most - 3] + "..."


def _load_json(file: Path) -> dict:
    if not file.is_file():
        raise ValueError(
            f"no {file.name} in {str(file.parent)!r}; give the folder of a GPT-2 saved by "
            "Hugging Face's save_pretrained"
        )
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError, OSError) as error:
        raise ValueError(f"cannot read {str(file)!r}: {_one_line(error)}; get it again") from error


def _network(file: Path, dtype: jnp.dtype) -> GPT2:
    """The network that config.json describes."""
    config = _load_json(file)
    if config.get("model_type") != "gpt2":
        raise ValueError(
            f"{str(file)!r} describes a model of type {config.get('model_type')!r}, not 'gpt2'; "
            "give a GPT-2"
        )
    sizes = {ours: config.get(key) for ours, key in _SIZES}
    for ours, key in _SIZES:
        # type, because True is an int to isinstance
        if type(sizes[ours]) is not int or sizes[ours] < 1:
            raise ValueError(f"{key} {sizes[ours]!r} in {str(file)!r} is no integer above 0")
    size, heads = sizes["hidden_size"], sizes["heads"]
    if size % heads:
        raise ValueError(f"n_embd {size} in {str(file)!r} is not divisible by n_head {heads}")
    for key, value in {**_FIXED, "n_ctx": sizes["positions"]}.items():
        if config.get(key, value) != value:
            raise ValueError(
                f"{key} {config[key]!r} in {str(file)!r} is not {value!r}, all that this network "
                "computes; give a GPT-2 with that"
            )
    inner = config.get("n_inner")
    if inner not in (None, gpt2.MLP_RATIO * size):
        raise ValueError(
            f"n_inner {inner!r} in {str(file)!r} is neither null nor {gpt2.MLP_RATIO} n_embd = "
            f"{gpt2.MLP_RATIO * size}; give a GPT-2 with that"
        )
    return GPT2(**sizes, dtype=dtype)


def _tokenizer(folder: Path, network: GPT2) -> GPT2Tokenizer | None:
    if not all((folder / name).is_file() for name in (VOCAB, MERGES)):
        return None
    tokenizer = GPT2Tokenizer.make(str(folder), None)  # its files are all it needs: no corpus
    if tokenizer.vocab_size > network.vocab_size:
        raise ValueError(
            f"{str(folder / VOCAB)!r} has {tokenizer.vocab_size} tokens, more than the model's "
            f"vocab_size {network.vocab_size}; get both from one place"
        )
    return tokenizer


def _weight_files(folder: Path) -> list[Path]:
    """model.safetensors, or the files that its index names."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        raise ValueError(
            f"no {WEIGHTS} in {str(folder)!r}; give the folder of a GPT-2 saved by Hugging Face's "
            "save_pretrained (pytorch_model.bin is not read)"
        )
    places = _load_json(folder / INDEX).get("weight_map")
    names = set(places.values()) if isinstance(places, dict) else {None}
    wrong = [n for n in names if not isinstance(n, str) or Path(n).name != n]
    if wrong or not names:
        raise ValueError(f"{str(folder / INDEX)!r} has no weight_map to files; get it again")
    missing = sorted(name for name in names if not (folder / name).is_file())
    if missing:
        raise ValueError(f"{', '.join(missing)} not in {str(folder)!r}; get them again")
    return [folder / name for name in sorted(names)]


def _read(folder: Path, network: GPT2, wanted: Mapping) -> dict[str, np.ndarray]:
    """Our parameters by their names, float32; wanted holds their shapes."""
    letters = {"C": network.hidden_size, "V": network.vocab_size, "P": network.positions}

    def shape(words):
        return [int(word[:-1] or 1) * letters[word[-1]] for word in words.split()]

    places = {name: (ours, ..., shape(words)) for name, ours, words in _TOP}
    for i in range(network.blocks):
        places |= {name.format(i): (ours, i, shape(words)) for name, ours, words in _BLOCK}
    expected = {name: words for name, (_, _, words) in places.items()}
    head = {_HEAD: expected["wte.weight"]}

    files = _weight_files(folder)
    try:
        found = _headers(files)
        _check_tensors(folder, found, expected, optional=head)
        flat = {ours: np.empty(leaf.shape, np.float32) for ours, leaf in wanted.items()}
        for name, tensor in _tensors(found, expected):
            ours, block, _ = places[name]
            flat[ours][block] = tensor.reshape(flat[ours][block].shape)
        for _, tensor in _tensors(found, head):
            if not np.array_equal(tensor.astype(np.float32), flat["embedding"]):
                raise ValueError(
                    f"{_HEAD} in {str(folder)!r} differs from wte.weight; give a GPT-2 whose "
                    "output matrix is its embedding"
                )
    except (SafetensorError, OSError) as error:
        names = ", ".join(str(file) for file in files)
        raise ValueError(f"cannot read {names}: {_one_line(error)}; get it again") from error
    return flat


def _headers(files: list[Path]) -> dict[str, tuple]:
    """Each tensor's (file, name there, dtype, shape) by its name without "transformer."."""
    found = {}
    for file in files:
        with safe_open(file, framework="numpy") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (no mapping: it has no __iter__)
                bare, part = name.removeprefix("transformer."), tensors.get_slice(name)
                if bare in found:
                    raise ValueError(
                        f"tensor {name} is in {str(file.parent)!r} twice; get it again"
                    )
                found[bare] = (file, name, part.get_dtype(), part.get_shape())
    return found


def _check_tensors(folder: Path, found: Mapping, expected: Mapping, optional: Mapping) -> None:
    missing = sorted(expected.keys() - found.keys())
    extra = sorted(
        n for n in found.keys() - expected.keys() - optional.keys() if not _BUFFER.fullmatch(n)
    )
    for fault, names in (("lacks", missing), ("has a tensor too many:", extra)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(
                f"the model in {str(folder)!r} {fault} {names[0]}{more}; its weights and "
                f"{CONFIG} must be of one GPT-2"
            )
    for name, shape in {**expected, **optional}.items():
        if name not in found:
            continue
        _, _, stored, actual = found[name]
        if stored not in _STORED:
            raise ValueError(
                f"{name} in {str(folder)!r} is stored as {stored}; known: {', '.join(_STORED)}"
            )
        if list(actual) != shape:
            raise ValueError(
                f"{name} in {str(folder)!r} has shape {list(actual)}, not {shape}; its weights "
                f"and {CONFIG} must be of one GPT-2"
            )


def _tensors(found: Mapping, names: Mapping):
    """(name, array) of those names that were found, a file opened once."""
    by_file = {}
    for name in found.keys() & names.keys():
        by_file.setdefault(found[name][0], []).append(name)
    for file, mine in by_file.items():
        with safe_open(file, framework="numpy") as tensors:
            for name in sorted(mine):
                yield name, tensors.get_tensor(found[name][1])
