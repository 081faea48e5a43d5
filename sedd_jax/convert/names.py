"""Parameters to and from the names, shapes and layouts of the original PyTorch code.

The original keeps a linear layer as [out, in] and its blocks one by one; here a layer is
[in, out], heads are axes of their own and blocks are stacked along axis 0. The values are the same.
"""

from collections.abc import Iterator, Mapping

import flax.traverse_util
import numpy as np
from ml_collections import ConfigDict

from sedd_jax import experiment
from sedd_jax.convert.weights import BUFFER
from sedd_jax.models.transformer import FREQUENCIES, MLP_RATIO, ROTARY_BASE

# (original's name, ours, layout, original's shape), in the order of the original's parameters,
# which is that of its optimizer and of its moving average. "{}" is the block's number.
# D states, C hidden, E cond_dim, F frequencies, M the MLP's width.
_FIRST = (
    ("vocab_embed.embedding", "embedding", "same", "D C"),
    ("sigma_map.mlp.0.weight", "sigma_1/kernel", "transpose", "E F"),
    ("sigma_map.mlp.0.bias", "sigma_1/bias", "same", "E"),
    ("sigma_map.mlp.2.weight", "sigma_2/kernel", "transpose", "E E"),
    ("sigma_map.mlp.2.bias", "sigma_2/bias", "same", "E"),
)
_BLOCK = (
    ("blocks.{}.norm1.weight", "blocks/norm_1/scale", "same", "C"),
    ("blocks.{}.attn_qkv.weight", "blocks/qkv/kernel", "qkv", "3C C"),
    ("blocks.{}.attn_out.weight", "blocks/out/kernel", "out", "C C"),
    ("blocks.{}.norm2.weight", "blocks/norm_2/scale", "same", "C"),
    ("blocks.{}.mlp.0.weight", "blocks/up/kernel", "transpose", "M C"),
    ("blocks.{}.mlp.0.bias", "blocks/up/bias", "same", "M"),
    ("blocks.{}.mlp.2.weight", "blocks/down/kernel", "transpose", "C M"),
    ("blocks.{}.mlp.2.bias", "blocks/down/bias", "same", "C"),
    ("blocks.{}.adaLN_modulation.weight", "blocks/modulation/linear/kernel", "transpose", "6C E"),
    ("blocks.{}.adaLN_modulation.bias", "blocks/modulation/linear/bias", "same", "6C"),
)
_LAST = (
    ("output_layer.norm_final.weight", "norm/scale", "same", "C"),
    ("output_layer.linear.weight", "head_weight", "same", "D C"),
    ("output_layer.linear.bias", "head_bias", "same", "D"),
    ("output_layer.adaLN_modulation.weight", "modulation/linear/kernel", "transpose", "2C E"),
    ("output_layer.adaLN_modulation.bias", "modulation/linear/bias", "same", "2C"),
)
# layout -> (from the original's array and the number of heads to ours, and back).
_LAYOUTS = {
    "same": (lambda a, heads: a, lambda a: a),
    "transpose": (lambda a, heads: a.T, lambda a: a.T),
    "qkv": (
        lambda a, heads: a.T.reshape(a.shape[1], 3, heads, -1),
        lambda a: a.reshape(a.shape[0], -1).T,
    ),
    "out": (
        lambda a, heads: a.T.reshape(heads, -1, a.shape[0]),
        lambda a: a.reshape(-1, a.shape[-1]).T,
    ),
}


def _rows(blocks: int) -> Iterator[tuple[str, str, str, str, int | None]]:
    """(original's name, ours, layout, shape, block) of every parameter, in the original's order."""
    for row in _FIRST:
        yield *row, None
    for i in range(blocks):
        for name, ours, layout, shape in _BLOCK:
            yield name.format(i), ours, layout, shape, i
    for row in _LAST:
        yield *row, None


def expected_tensors(config: ConfigDict, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter of a model over vocab_size clean tokens; no buffer.

    By the original's name, in the original's order.
    """
    letters = {
        "D": experiment.make_graph(config, vocab_size).dim,
        "C": config.model.hidden_size,
        "E": config.model.cond_dim,
        "F": FREQUENCIES,
        "M": MLP_RATIO * config.model.hidden_size,
    }

    def shape(words: str) -> tuple[int, ...]:
        return tuple(int(word[:-1] or 1) * letters[word[-1]] for word in words.split())

    return {name: shape(words) for name, _, _, words, _ in _rows(config.model.blocks)}


def buffer(head_dim: int) -> np.ndarray:
    """The original's one buffer: the inverse frequencies of the rotary embedding, [K / 2]."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    return (np.float32(1.0) / np.float32(ROTARY_BASE) ** exponents).astype(np.float32)


def from_original(
    tensors: Mapping[str, np.ndarray], heads: int, where: str = "the state dict"
) -> dict:
    """Our parameter tree from the original's state dict, whose names and shapes are checked.

    tensors may read an array at its use: each is used once, and one is held beside the result.
    The buffer is not needed; ValueError, naming `where`, if there is one, of another rotary
    embedding.
    """
    count = 0
    while f"blocks.{count}.norm1.weight" in tensors:
        count += 1
    flat: dict[str, np.ndarray] = {}
    for name, ours, layout, _, block in _rows(count):
        array = _LAYOUTS[layout][0](np.asarray(tensors[name]), heads)
        if block is None:
            flat[ours] = np.ascontiguousarray(array)
            continue
        if block == 0:
            flat[ours] = np.empty((count, *array.shape), array.dtype)
        flat[ours][block] = array
    frequencies = buffer(flat["blocks/qkv/kernel"].shape[-1])
    stored = tensors.get(BUFFER, frequencies)
    if stored.shape != frequencies.shape or not np.allclose(stored, frequencies, 1e-2, atol=0.0):
        raise ValueError(
            f"{where} has {BUFFER} of another base than {ROTARY_BASE:.0f}, all that this network "
            "computes; give a model of the original code"
        )
    return flax.traverse_util.unflatten_dict(flat, sep="/")


def to_original(params: Mapping) -> dict[str, np.ndarray]:
    """The original's parameters from our tree, in its order, without the buffer; views of ours."""
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    flat = {ours: np.asarray(array) for ours, array in flat.items()}
    return {
        name: _LAYOUTS[layout][1](flat[ours] if block is None else flat[ours][block])
        for name, ours, layout, _, block in _rows(len(flat["blocks/norm_1/scale"]))
    }


def state_dict(params: Mapping) -> dict[str, np.ndarray]:
    """The original's state dict from our tree: its buffer stands before the blocks."""
    first = dict.fromkeys(name for name, *_ in _FIRST)
    tensors = to_original(params)
    return first | {BUFFER: buffer(params["blocks"]["qkv"]["kernel"].shape[-1])} | tensors
