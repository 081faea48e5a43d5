"""What scores text, and a pretrained GPT-2: nats of its tokens, and features of whole texts.

Its files are those of the Hugging Face hub: config.json, model.safetensors, whole or in shards,
and, where there, tokenizer.json or vocab.json and merges.txt.
"""

import dataclasses
import functools
import hashlib
from pathlib import Path
from typing import Any, Protocol

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sedd_jax.config import DTYPES
from sedd_jax.convert import weights
from sedd_jax.data import subwords
from sedd_jax.data.tokenizers import GPT2 as GPT2Tokenizer
from sedd_jax.data.tokenizers import Tokenizer
from sedd_jax.diffusion.draws import make_key
from sedd_jax.host import hub
from sedd_jax.host.console import activity
from sedd_jax.host.files import load_json, local_path
from sedd_jax.inference.bounds import joined, over_batches
from sedd_jax.models import gpt2
from sedd_jax.models.gpt2 import GPT2
from sedd_jax.parallel import processes, sharding
from sedd_jax.parallel.devices import check_platform
from sedd_jax.parallel.sharding import Placement, path_name

# Short name -> owner/name@commit, so that a number has one meaning on every day.
SCORERS = {
    "gpt2": "openai-community/gpt2@607a30d783dfa663caf39e06633721c8d4cfcd7e",
    "gpt2-medium": "openai-community/gpt2-medium@6dcaa7a952f72f9298047fd5137cd6e4f05f41da",
    "gpt2-large": "openai-community/gpt2-large@32b71b12589c2f8d625668d2335a01cac3249519",
    "gpt2-xl": "openai-community/gpt2-xl@15ea56dee5df4983c59b2538573817e1667135e2",
}

CONFIG, VOCAB, MERGES = "config.json", "vocab.json", "merges.txt"

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
_HEAD = "lm_head.weight"
# What a file may hold beside the parameters: the causal mask, its score, and the embedding again.
_EXTRA = r"h\.\d+\.attn\.bias|h\.\d+\.attn\.masked_bias|lm_head\.weight"
_REMEDY = "give the folder of a GPT-2 saved by Hugging Face's save_pretrained"


class TextScorer(Protocol):
    """What gives a sample's tokens their nats, whoever wrote the text."""

    name: str  # what a reported number should carry

    @property
    def tokenizer(self) -> Tokenizer | None: ...  # whose ids it scores

    @property
    def dtype(self) -> str: ...

    @property
    def positions(self) -> int | None: ...  # the longest text in tokens; None: any

    def nats(
        self, tokens: np.ndarray, *, batch_size: int = 8, progress: bool = False
    ) -> np.ndarray: ...

    def sha256(self) -> str: ...  # of all that decides its numbers


@dataclasses.dataclass(frozen=True, eq=False)
class Scorer:
    """A GPT-2 with its weights; tokens are GPT-2's ids, whoever wrote the text."""

    name: str  # the folder, or owner/name@commit
    network: GPT2
    params: Any  # float32
    tokenizer: Tokenizer | None  # None where the files hold none
    mesh: Mesh | None = None  # whose devices share a batch, the weights on each; None: one device

    @property
    def dtype(self) -> str:
        """Of the matmuls."""
        return np.dtype(self.network.dtype).name

    @property
    def positions(self) -> int:
        """The longest text, in tokens."""
        return self.network.positions

    def sha256(self) -> str:
        """Of the weights."""
        return params_sha256(self.params)

    def nats(
        self, tokens: np.ndarray, *, batch_size: int = 8, progress: bool = False
    ) -> np.ndarray:
        """-log p of each token but the first given those before it, nats, float32 [N, L - 1].

        tokens int32 [N, L]; L at least 2 and at most the network's positions.
        """
        tokens = self._check(tokens, min_length=2)
        return self._over_batches(gpt2.token_nats, batch_size, progress, tokens)

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
        rows = self._check_rows(tokens, lengths)
        return self._over_batches(_last_features, batch_size, progress, *rows)

    def mean_features(
        self,
        tokens: np.ndarray,
        lengths: np.ndarray | None = None,
        *,
        batch_size: int = 8,
        progress: bool = False,
    ) -> np.ndarray:
        """Mean of the last hidden states over the tokens of each row, float32 [N, C]."""
        rows = self._check_rows(tokens, lengths)
        return self._over_batches(_mean_features, batch_size, progress, *rows)

    def _over_batches(self, of_rows, batch_size, progress, *arrays):
        def of_batch(rows, index):
            return _on_mesh(of_rows, self.network, self.mesh, self.params, rows)

        how = {"name": "score", "progress": progress}
        parts = over_batches(of_batch, self.params, arrays, batch_size, self.mesh, **how)
        return joined([result for _, result in parts], len(arrays[0]))

    def _check_rows(self, tokens, lengths):
        """(tokens, lengths), int32, of rows to take features of."""
        tokens = self._check(tokens, min_length=1)
        count, length = tokens.shape
        lengths = np.full(count, length) if lengths is None else np.asarray(lengths)
        is_integer = np.issubdtype(lengths.dtype, np.integer)
        if lengths.shape != (count,) or not is_integer or not _is_within(lengths, 1, length):
            raise ValueError(
                f"lengths must be {count} integers in [1, {length}], one for each row of tokens, "
                f"not {lengths.dtype} {list(lengths.shape)}"
            )
        return tokens, lengths.astype(np.int32)

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


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _on_mesh(of_rows, network, mesh, params, rows):
    """of_rows(network, params, *rows): each device of the mesh computes its rows."""

    def of_device(rows, params):
        return of_rows(network, params, *rows)

    return Placement(mesh).over_rows(of_device, rows, params)


def _last_features(network, params, tokens, lengths):
    hidden = network.apply({"params": params}, tokens)
    return jnp.take_along_axis(hidden, lengths[:, None, None] - 1, axis=1)[:, 0]


def _mean_features(network, params, tokens, lengths):
    hidden = network.apply({"params": params}, tokens)
    is_text = jnp.arange(tokens.shape[1]) < lengths[:, None]
    return jnp.mean(hidden, axis=1, where=is_text[..., None])


def params_sha256(params: Any) -> str:
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        digest.update(f"{path_name(path)} {leaf.dtype} {leaf.shape}".encode())
        digest.update(np.ascontiguousarray(processes.fetch(leaf)))  # leaf by leaf: memory for one
    return digest.hexdigest()


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


@activity("loading the scorer")
def load_scorer(name: str, *, dtype: str = "float32", mesh: Mesh | None = None) -> Scorer:
    """The GPT-2 called name: a row of SCORERS, a hub id owner/name@revision, or a folder.

    With a mesh, of one process's or all processes' devices, each device scores a part of a batch.

    dtype is that of the matmuls: float32 or bfloat16. Files from the hub go to Hugging Face's
    cache, and are taken from there when there is no network. ValueError for a name that leads
    nowhere, or files that are not a whole GPT-2.
    """
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; known: {', '.join(DTYPES)}")
    check_platform()

    def read() -> Scorer:
        full_name, folder = _locate(str(name))
        network = _read_network(folder / CONFIG, DTYPES[dtype])
        params, tokenizer = _read_params(folder, network), _tokenizer(folder, network)
        return Scorer(full_name, network, params, tokenizer, mesh)

    is_shared = mesh is not None and processes.is_shared(mesh)
    scorer = processes.on_all_processes(read) if is_shared else read()
    where = jax.tree.map(lambda _: sharding.whole(mesh), scorer.params)
    return dataclasses.replace(scorer, params=sharding.put_tree("scorer", scorer.params, where))


def _locate(name: str) -> tuple[str, Path]:
    """The full name of a scorer, and the folder of its files."""
    if name not in SCORERS and (folder := local_path(name)).is_dir():
        return name, folder
    repository, revision = hub.parse(SCORERS.get(name, name)) or (None, None)
    if revision is None:
        raise ValueError(
            f"no scorer {name!r}: neither a folder, nor owner/name@revision on the hub, nor one of "
            f"{', '.join(SCORERS)}; n-grams of a run's text are ngram:N in a command, "
            "evaluation.ngrams.load_ngram_scorer in Python"
        )
    optional = [subwords.WHOLE, subwords.CONFIG, VOCAB, MERGES]
    folder = weights.download(repository, revision, optional=optional)
    return f"{repository}@{folder.name}", folder  # a snapshot's folder is called by its commit


def _read_network(file: Path, dtype: jnp.dtype) -> GPT2:
    """The network that config.json describes."""
    if not file.is_file():
        raise ValueError(f"no {CONFIG} in {str(file.parent)!r}; {_REMEDY}")
    where = repr(str(file))
    config = load_json(file.read_bytes(), where)
    if config.get("model_type") != "gpt2":  # Hugging Face writes it into every config
        raise ValueError(
            f"model_type {config.get('model_type')!r} in {where} is not 'gpt2', a GPT-2; {_REMEDY}"
        )
    sizes = {field: config.get(key) for field, key in _SIZES.items()}
    channels, heads = sizes["hidden_size"], sizes["heads"]
    fixed = {**_FIXED, "n_ctx": sizes["positions"]}
    if config.get("n_inner") is not None and type(channels) is int:
        fixed["n_inner"] = gpt2.MLP_RATIO * channels
    for key, value in fixed.items():
        if config.get(key, value) != value:
            raise ValueError(
                f"{key} {config[key]!r} in {where} is not {value!r}, all that this network "
                "computes; give a GPT-2 with that"
            )
    for field, size in sizes.items():
        if type(size) is not int or size < 1:  # type, because True is an int to isinstance
            raise ValueError(f"{_SIZES[field]} {size!r} in {where} is not above 0, as in a GPT-2")
    if channels % heads:
        raise ValueError(f"n_embd {channels} in {where} is not divisible by n_head {heads}")
    return GPT2(**sizes, dtype=dtype)


def _tokenizer(folder: Path, network: GPT2) -> Tokenizer | None:
    vocabularies = [subwords.WHOLE], [VOCAB, MERGES]
    if not any(all((folder / name).is_file() for name in names) for names in vocabularies):
        return None
    tokenizer = GPT2Tokenizer.make(str(folder), None)  # its files are all it needs: no corpus
    if tokenizer.vocab_size > network.vocab_size:
        raise ValueError(
            f"the tokenizer in {str(folder)!r} has {tokenizer.vocab_size} tokens, more than the "
            f"model's vocab_size {network.vocab_size}; get both from one place"
        )
    return tokenizer


def _read_params(folder: Path, network: GPT2) -> Any:
    """The parameters, numpy float32; names, dtypes and shapes are checked before one is read."""
    file = weights.locate(folder)
    if file is None:
        raise ValueError(
            f"no {weights.WEIGHTS} or {weights.INDEX} in {str(folder)!r}; {_REMEDY} "
            "(pytorch_model.bin is not read)"
        )
    tensors = weights.open_tensors(file, _expected(network), extra=_EXTRA, model="GPT-2")
    shapes = jax.eval_shape(network.init, make_key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    shapes = flax.traverse_util.flatten_dict(shapes, sep="/")
    params = {}
    for path, (template, _) in _PARAMETERS.items():  # one by one: nothing is held twice
        parts = [tensors[name] for name in _tensor_names(template, network)]
        params[path] = np.stack(parts).reshape(shapes[path].shape)
    if _HEAD in tensors and not np.array_equal(tensors[_HEAD], params["embedding"]):
        raise ValueError(
            f"{_HEAD} in {str(folder)!r} differs from wte.weight; give a GPT-2 whose output matrix "
            "is its embedding"
        )
    return flax.traverse_util.unflatten_dict(params, sep="/")


def _tensor_names(template: str, network: GPT2) -> list[str]:
    return [template.format(i) for i in range(network.blocks if "{}" in template else 1)]


def _expected(network: GPT2) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor by its name, without "transformer."."""
    sizes = {"C": network.hidden_size, "V": network.vocab_size, "P": network.positions}

    def shape(words: str) -> tuple[int, ...]:
        return tuple(int(word[:-1] or 1) * sizes[word[-1]] for word in words.split())

    shapes = {
        name: shape(words)
        for template, words in _PARAMETERS.values()
        for name in _tensor_names(template, network)
    }
    return dict(sorted(shapes.items()))
