"""A pretrained GPT-2 that scores text: nats of its tokens, and features of whole texts.

Its files are those of the Hugging Face hub: config.json, model.safetensors and, where there,
vocab.json and merges.txt. Every tensor's name, shape and dtype is checked before one is read.
"""

import contextlib
import dataclasses
import functools
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
from sedd_jax.convert.weights import DTYPES as DTYPES_READ
from sedd_jax.convert.weights import compare
from sedd_jax.data.tokenizers import GPT2 as GPT2Tokenizer
from sedd_jax.files import load_json
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

# Field of the network: key of config.json.
_SIZES = {
    "vocab_size": "vocab_size",
    "positions": "n_positions",
    "hidden_size": "n_embd",
    "blocks": "n_layer",
    "heads": "n_head",
}
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
# Our parameter -> (tensor, {} the block's number; its shape in C channels, V tokens, P positions).
# A layer is [in, out] in both; ours may split an axis into heads, which keeps the order of values.
_PARAMETERS = {
    "embedding": ("wte.weight", "V C"),
    "position": ("wpe.weight", "P C"),
    "norm/scale": ("ln_f.weight", "C"),
    "norm/bias": ("ln_f.bias", "C"),
    "blocks/norm_1/scale": ("h.{}.ln_1.weight", "C"),
    "blocks/norm_1/bias": ("h.{}.ln_1.bias", "C"),
    "blocks/qkv/kernel": ("h.{}.attn.c_attn.weight", "C 3C"),
    "blocks/qkv/bias": ("h.{}.attn.c_attn.bias", "3C"),
    "blocks/out/kernel": ("h.{}.attn.c_proj.weight", "C C"),
    "blocks/out/bias": ("h.{}.attn.c_proj.bias", "C"),
    "blocks/norm_2/scale": ("h.{}.ln_2.weight", "C"),
    "blocks/norm_2/bias": ("h.{}.ln_2.bias", "C"),
    "blocks/up/kernel": ("h.{}.mlp.c_fc.weight", "C 4C"),
    "blocks/up/bias": ("h.{}.mlp.c_fc.bias", "4C"),
    "blocks/down/kernel": ("h.{}.mlp.c_proj.weight", "4C C"),
    "blocks/down/bias": ("h.{}.mlp.c_proj.bias", "C"),
}
_BUFFER = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")  # the causal mask, and its score
_HEAD = "lm_head.weight"


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
        tokens = self._check(tokens, min_length=2)
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

        tokens int32 [N, L], padded on the right from lengths[n] on with any ids, which change
        nothing; lengths int [N], None where every row is full.
        """
        tokens = self._check(tokens, min_length=1)
        count, length = tokens.shape
        lengths = np.full(count, length) if lengths is None else np.asarray(lengths)
        is_integer = np.issubdtype(lengths.dtype, np.integer)
        if lengths.shape != (count,) or not is_integer or not _is_within(lengths, 1, length):
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
        def features(params, tokens, last):
            hidden = self.network.apply({"params": params}, tokens)
            return jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]

        return features

    def _over_batches(self, fn, batch_size, progress, *arrays):
        if batch_size < 1:
            raise ValueError(f"batch_size {batch_size} is below 1; give at least 1")
        count = len(arrays[0])
        results = []
        starts = range(0, count, batch_size)
        for start in tqdm(starts, desc="score", unit="batch", disable=not progress):
            # The last batch repeats the last row, dropped below, so that one shape is compiled.
            rows = np.minimum(np.arange(start, start + batch_size), count - 1)
            results.append(np.asarray(fn(self.params, *(array[rows] for array in arrays))))
        return np.concatenate(results)[:count]

    def _check(self, tokens, min_length):
        tokens = check_token_rows(tokens)
        length, max_length = tokens.shape[1], self.network.positions
        if not min_length <= length <= max_length:
            raise ValueError(
                f"{length} tokens in a row are not in [{min_length}, {max_length}], what "
                f"{self.name} can score; cut the rows"
            )
        if not _is_within(tokens, 0, self.network.vocab_size - 1):
            raise ValueError(
                f"token ids from {tokens.min()} to {tokens.max()} are not in "
                f"[0, {self.network.vocab_size}); encode the text with GPT-2's tokenizer"
            )
        return tokens.astype(np.int32)


def check_token_rows(tokens: np.ndarray, min_length: int = 0) -> np.ndarray:
    """The tokens as an array; ValueError unless integers [N, L], N >= 1 and L >= min_length."""
    tokens = np.asarray(tokens)
    is_integer = np.issubdtype(tokens.dtype, np.integer)
    if not is_integer or tokens.ndim != 2 or not len(tokens) or tokens.shape[1] < min_length:
        raise ValueError(
            f"tokens must be integers [N, L] with N at least 1 and L at least {min_length}, not "
            f"{tokens.dtype} {list(tokens.shape)}"
        )
    return tokens


def _is_within(array, lowest, highest):
    return lowest <= array.min() and array.max() <= highest


def load_scorer(name: str, *, dtype: str = "float32") -> Scorer:
    """The GPT-2 called name: a row of SCORERS, a hub id owner/name@revision, or a folder.

    dtype is that of the matmuls: float32 or bfloat16. Files from the hub go to Hugging Face's
    cache, and are taken from there when there is no network. ValueError for a name that leads
    nowhere, or files that are not a whole GPT-2.
    """
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; known: {', '.join(DTYPES)}")
    full_name, folder = _locate(str(name))
    network = _read_network(folder / CONFIG, DTYPES[dtype])
    return Scorer(full_name, network, _read_params(folder, network), _tokenizer(folder, network))


def _locate(name: str) -> tuple[str, Path]:
    """The full name of a scorer, and the folder of its files."""
    if name not in SCORERS and Path(name).is_dir():
        return name, Path(name)
    repository, revision = hub.parse(SCORERS.get(name, name)) or (None, None)
    if revision is None:
        raise ValueError(
            f"no scorer {name!r}: neither a folder, nor owner/name@revision on the hub, nor one of "
            f"{', '.join(SCORERS)}"
        )
    folder = hub.download(repository, revision, [CONFIG], optional=FILES)
    return f"{repository}@{folder.name}", folder  # a snapshot's folder is called by its commit


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ValueError(
            f"no {file.name} in {str(file.parent)!r}; give the folder of a GPT-2 saved by "
            "Hugging Face's save_pretrained"
        )
    return load_json(file.read_bytes(), repr(str(file)))


def _read_network(file: Path, dtype: jnp.dtype) -> GPT2:
    """The network that config.json describes."""
    config, where = _read_json(file), repr(str(file))
    if config.get("model_type") != "gpt2":
        raise ValueError(
            f"{where} describes a model of type {config.get('model_type')!r}, not 'gpt2'; give a "
            "GPT-2"
        )
    sizes = {field: config.get(key) for field, key in _SIZES.items()}
    for field, size in sizes.items():
        if type(size) is not int or size < 1:  # type, because True is an int to isinstance
            raise ValueError(f"{_SIZES[field]} {size!r} in {where} is no integer above 0")
    channels, heads = sizes["hidden_size"], sizes["heads"]
    if channels % heads:
        raise ValueError(f"n_embd {channels} in {where} is not divisible by n_head {heads}")
    for key, value in {**_FIXED, "n_ctx": sizes["positions"]}.items():
        if config.get(key, value) != value:
            raise ValueError(
                f"{key} {config[key]!r} in {where} is not {value!r}, all that this network "
                "computes; give a GPT-2 with that"
            )
    inner = config.get("n_inner")
    if inner not in (None, gpt2.MLP_RATIO * channels):
        raise ValueError(
            f"n_inner {inner!r} in {where} is neither null nor {gpt2.MLP_RATIO} n_embd = "
            f"{gpt2.MLP_RATIO * channels}; give a GPT-2 with that"
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
    index = folder / INDEX
    if not index.is_file():
        raise ValueError(
            f"no {WEIGHTS} in {str(folder)!r}; give the folder of a GPT-2 saved by Hugging Face's "
            "save_pretrained (pytorch_model.bin is not read)"
        )
    weight_map = _read_json(index).get("weight_map")
    names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    # A name alone: a path could lead out of the folder.
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise ValueError(f"{str(index)!r} has no weight_map to files; get it again")
    files = [folder / name for name in sorted(set(names))]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ValueError(f"{', '.join(missing)} not in {str(folder)!r}; get them again")
    return files


def _read_params(folder: Path, network: GPT2) -> Any:
    """The parameters, float32; all names, dtypes and shapes are checked before one is read."""
    shapes = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    shapes = flax.traverse_util.flatten_dict(shapes, sep="/")
    files = _weight_files(folder)
    params = {}
    try:
        with contextlib.ExitStack() as stack:
            tensors = _open_tensors(files, stack)
            _check_tensors(folder, tensors, network)
            for path, (template, _) in _PARAMETERS.items():  # one by one: nothing is held twice
                parts = [tensors[name][:] for name in _tensor_names(template, network)]
                leaf = np.stack(parts, dtype=np.float32).reshape(shapes[path].shape)
                params[path] = jnp.asarray(leaf)
            if _HEAD in tensors:
                head = tensors[_HEAD][:].astype(np.float32)
                if not np.array_equal(head, params["embedding"]):
                    raise ValueError(
                        f"{_HEAD} in {str(folder)!r} differs from wte.weight; give a GPT-2 whose "
                        "output matrix is its embedding"
                    )
    except (SafetensorError, OSError) as error:
        names = ", ".join(str(file) for file in files)
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ValueError(f"cannot read {names}: {reason}; get it again") from error
    return flax.traverse_util.unflatten_dict(params, sep="/")


def _tensor_names(template: str, network: GPT2) -> list[str]:
    return [template.format(i) for i in range(network.blocks if "{}" in template else 1)]


def _open_tensors(files: list[Path], stack: contextlib.ExitStack) -> dict[str, Any]:
    """safetensors' slices by the tensors' names without "transformer."; none is read yet."""
    tensors = {}
    for file in files:
        opened = stack.enter_context(safe_open(file, framework="numpy"))
        for name in opened.keys():  # noqa: SIM118 (no mapping: it has no __iter__)
            bare = name.removeprefix("transformer.")
            if bare in tensors:
                raise ValueError(f"tensor {name} is in {str(file.parent)!r} twice; get it again")
            tensors[bare] = opened.get_slice(name)
    return tensors


def _check_tensors(folder: Path, tensors: Mapping[str, Any], network: GPT2) -> None:
    """ValueError unless the names, shapes and dtypes are those of the network."""
    sizes = {"C": network.hidden_size, "V": network.vocab_size, "P": network.positions}

    def shape(words: str) -> list[int]:
        return [int(word[:-1] or 1) * sizes[word[-1]] for word in words.split()]

    expected = {
        name: shape(words)
        for template, words in _PARAMETERS.values()
        for name in _tensor_names(template, network)
    }
    expected = dict(sorted(expected.items()))
    names = sorted(name for name in tensors if not _BUFFER.fullmatch(name))
    actual = {name: tensors[name].get_shape() for name in names}
    where = f"the model in {str(folder)!r}"
    if _HEAD in tensors:
        expected[_HEAD] = expected["wte.weight"]
    compare(actual, expected, where, model="GPT-2")
    for name in names:
        if (stored := tensors[name].get_dtype()) not in DTYPES_READ:
            known = ", ".join(DTYPES_READ)
            raise ValueError(f"{name} in {where} is stored as {stored}; known: {known}")
