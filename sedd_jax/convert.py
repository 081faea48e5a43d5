"""Parameters to and from the names, shapes and layouts of the original PyTorch code.

The original keeps a linear layer as [out, in] and its blocks one by one; here a layer is
[in, out], heads are axes of their own and blocks are stacked along axis 0. The values are the same.
"""

from collections.abc import Mapping

import flax.traverse_util
import numpy as np

# (original's name, ours, what to do with the original's array). "{}" is the block's number.
_TOP = (
    ("vocab_embed.embedding", "embedding", "same"),
    ("sigma_map.mlp.0.weight", "sigma_1/kernel", "transpose"),
    ("sigma_map.mlp.0.bias", "sigma_1/bias", "same"),
    ("sigma_map.mlp.2.weight", "sigma_2/kernel", "transpose"),
    ("sigma_map.mlp.2.bias", "sigma_2/bias", "same"),
    ("output_layer.norm_final.weight", "norm/scale", "same"),
    ("output_layer.linear.weight", "head_weight", "same"),
    ("output_layer.linear.bias", "head_bias", "same"),
    ("output_layer.adaLN_modulation.weight", "modulation/linear/kernel", "transpose"),
    ("output_layer.adaLN_modulation.bias", "modulation/linear/bias", "same"),
)
_BLOCK = (
    ("blocks.{}.norm1.weight", "blocks/norm_1/scale", "same"),
    ("blocks.{}.attn_qkv.weight", "blocks/qkv/kernel", "qkv"),
    ("blocks.{}.attn_out.weight", "blocks/out/kernel", "out"),
    ("blocks.{}.norm2.weight", "blocks/norm_2/scale", "same"),
    ("blocks.{}.mlp.0.weight", "blocks/up/kernel", "transpose"),
    ("blocks.{}.mlp.0.bias", "blocks/up/bias", "same"),
    ("blocks.{}.mlp.2.weight", "blocks/down/kernel", "transpose"),
    ("blocks.{}.mlp.2.bias", "blocks/down/bias", "same"),
    ("blocks.{}.adaLN_modulation.weight", "blocks/modulation/linear/kernel", "transpose"),
    ("blocks.{}.adaLN_modulation.bias", "blocks/modulation/linear/bias", "same"),
)


def from_original(tensors: Mapping[str, np.ndarray], heads: int) -> dict:
    """Our parameter tree from the original's state dict; rotary_emb.inv_freq is not needed."""
    count = 0
    while f"blocks.{count}.norm1.weight" in tensors:
        count += 1
    layouts = {
        "same": lambda a: a,
        "transpose": lambda a: a.T,
        "qkv": lambda a: a.T.reshape(a.shape[1], 3, heads, -1),
        "out": lambda a: a.T.reshape(heads, -1, a.shape[0]),
    }
    missing = [name for name, _, _ in _TOP if name not in tensors]
    missing += [
        n.format(i) for i in range(count) for n, _, _ in _BLOCK if n.format(i) not in tensors
    ]
    if missing or not count:
        raise ValueError(
            f"the state lacks {', '.join(missing) or 'blocks.0'}; it must be a SEDD model's, with "
            "the names of the original code"
        )
    flat = {ours: layouts[layout](tensors[name]) for name, ours, layout in _TOP}
    for name, ours, layout in _BLOCK:
        flat[ours] = np.stack([layouts[layout](tensors[name.format(i)]) for i in range(count)])
    return flax.traverse_util.unflatten_dict(flat, sep="/")


def to_original(params: Mapping) -> dict[str, np.ndarray]:
    """The original's state dict from our parameter tree, without rotary_emb.inv_freq."""
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    layouts = {
        "same": lambda a: a,
        "transpose": lambda a: a.T,
        "qkv": lambda a: a.reshape(a.shape[0], -1).T,
        "out": lambda a: a.reshape(-1, a.shape[-1]).T,
    }
    tensors = {name: layouts[layout](np.asarray(flat[ours])) for name, ours, layout in _TOP}
    for name, ours, layout in _BLOCK:
        for i, array in enumerate(np.asarray(flat[ours])):
            tensors[name.format(i)] = layouts[layout](array)
    return tensors
