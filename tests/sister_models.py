"""Tiny models of SEDD's sisters, made from numbers, in folders as their authors publish them.

The names, shapes and configs are written out here, from the authors' repositories, and not taken
from the package. Imports numpy alone.
"""

import copy
import zlib

import numpy as np

CLEAN, SIZE, BLOCKS, HEADS, COND, LENGTH = 11, 16, 2, 2, 8, 10
TIMES = (0.03, 0.25, 0.6, 0.97)  # of the golden answers, one a row
_TYPED = {"torch_dtype": "float32", "transformers_version": "4.40.0"}
_SIZES = {"n_blocks": BLOCKS, "n_heads": HEADS, "cond_dim": COND}

CONFIGS = {
    "mdlm": {
        "architectures": ["MDLM"],
        "auto_map": {"AutoModelForMaskedLM": "modeling_mdlm.MDLM"},
        "model_type": "mdlm",
        "vocab_size": CLEAN + 1,
        "hidden_dim": SIZE,
        "model_length": LENGTH,
        "dropout": 0.1,
        "time_conditioning": False,
        "return_dict": False,
        **_SIZES,
        **_TYPED,
    },
    "radd": {
        "ngpus": 8,
        "tokens": CLEAN,
        "training": {"batch_size": 512, "accum": 1, "n_iters": 400001, "loss_type": "t_DCE"},
        "data": {"train": "openwebtext", "valid": "wikitext103", "cache_dir": "data"},
        "noise": {"type": "loglinear", "sigma_min": "1e-4", "sigma_max": 20},
        "sampling": {"predictor": "euler", "steps": 1024},
        "model": {
            "name": "small_radd",
            "type": "ddit_wot",
            "hidden_size": SIZE,
            "length": LENGTH,
            "dropout": 0.02,
            "use_checkpoint": False,
            "dtype": "float16",
            **_SIZES,
        },
    },
    "gidd": {
        "architectures": ["DIT"],
        "auto_map": {"AutoConfig": "configuration_dit.DITConfig"},
        "model_type": "dit",
        "attention_dropout": 0.0,
        "hidden_size": SIZE,
        "max_seq_len": LENGTH,
        "num_attention_heads": HEADS,
        "num_hidden_layers": BLOCKS,
        "p_uniform": 0.0,
        "t_eps": 1e-4,
        "timestep_cond_dim": COND,
        "vocab_size": CLEAN + 1,
        **_TYPED,
    },
    "duo": {
        "architectures": ["DUO"],
        "auto_map": {"AutoModelForMaskedLM": "model.DUO"},
        "model_type": "DUO",
        "causal": False,
        "vocab_size": CLEAN,
        "hidden_dim": SIZE,
        "model_length": LENGTH,
        "dropout": 0.1,
        "var_min": True,
        **_SIZES,
        **_TYPED,
    },
}
# What stands before every name, and the number of states.
PREFIX = {"mdlm": "backbone.", "duo": "backbone.", "radd": "", "gidd": ""}
STATES = {"mdlm": CLEAN + 1, "radd": CLEAN + 1, "gidd": CLEAN + 1, "duo": CLEAN}


def config_of(family: str, **changes) -> dict:
    """Its config.json."""
    return {**copy.deepcopy(CONFIGS[family]), **changes}


def shapes(family: str) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter, by name without the prefix."""
    states, has_time = STATES[family], family != "radd"
    found = {"vocab_embed.embedding": (states, SIZE)}
    if has_time:
        found |= {"sigma_map.mlp.0.weight": (COND, 256), "sigma_map.mlp.0.bias": (COND,)}
        found |= {"sigma_map.mlp.2.weight": (COND, COND), "sigma_map.mlp.2.bias": (COND,)}
    layers = [(f"blocks.{i}", 6, ("norm1", "norm2")) for i in range(BLOCKS)]
    for layer, vectors, norms in [*layers, ("output_layer", 2, ("norm_final",))]:
        for norm in norms:
            found[f"{layer}.{norm}.weight"] = (SIZE,)
            if not has_time:
                found[f"{layer}.{norm}.bias"] = (SIZE,)
        if has_time:
            found[f"{layer}.adaLN_modulation.weight"] = (vectors * SIZE, COND)
            found[f"{layer}.adaLN_modulation.bias"] = (vectors * SIZE,)
        if layer == "output_layer":
            found[f"{layer}.linear.weight"] = (states, SIZE)
            found[f"{layer}.linear.bias"] = (states,)
            continue
        found[f"{layer}.attn_qkv.weight"] = (3 * SIZE, SIZE)
        found[f"{layer}.attn_out.weight"] = (SIZE, SIZE)
        found[f"{layer}.mlp.0.weight"] = (4 * SIZE, SIZE)
        found[f"{layer}.mlp.0.bias"] = (4 * SIZE,)
        found[f"{layer}.mlp.2.weight"] = (SIZE, 4 * SIZE)
        found[f"{layer}.mlp.2.bias"] = (SIZE,)
    return found


def parameters(family: str) -> dict[str, np.ndarray]:
    """Every parameter, float32: normal numbers of the seed crc32(name), the same everywhere.

    A matrix [out, in] has the standard deviation in^-1/2, a bias 0.3; a norm's weight has mean 1.
    The embedding's is 1.
    """

    def draw(name, shape):
        normal = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
        if "norm" in name:
            return 0.3 * normal + name.endswith("weight")
        if name == "vocab_embed.embedding":
            return normal
        return normal * (0.3 if len(shape) == 1 else shape[-1] ** -0.5)

    return {name: draw(name, shape).astype(np.float32) for name, shape in shapes(family).items()}


def buffers(family: str) -> dict[str, np.ndarray]:
    """What the state dict holds beside the parameters: the rotary embedding's, by name."""
    half = SIZE // HEADS // 2
    inverse = 10_000.0 ** (-np.arange(half) / half)
    if family != "gidd":
        return {"rotary_emb.inv_freq": inverse.astype(np.float32)}
    angles = np.tile(np.arange(LENGTH)[:, None] * inverse, 2)[None, :, None, None]
    cos, sin = np.cos(angles), np.sin(angles)  # of q and k; v is not rotated
    cos = np.concatenate([cos, cos, np.ones_like(cos)], axis=2)
    sin = np.concatenate([sin, sin, np.zeros_like(sin)], axis=2)
    return {
        "rotary_emb.cos_cached": cos.astype(np.float32),
        "rotary_emb.sin_cached": sin.astype(np.float32),
    }


def state_dict(family: str) -> dict[str, np.ndarray]:
    """All of it, by the names in the folder."""
    tensors = parameters(family) | buffers(family)
    return {PREFIX[family] + name: array for name, array in tensors.items()}


def noised(family: str) -> tuple[np.ndarray, np.ndarray]:
    """(x0, xt), int [len(TIMES), LENGTH]: about t of a row's tokens are noised."""
    random = np.random.RandomState(0)
    shape = (len(TIMES), LENGTH)
    x0 = random.randint(CLEAN, size=shape)
    noise = random.randint(CLEAN, size=shape) if family == "duo" else np.full(shape, CLEAN)
    is_noised = random.uniform(size=shape) < np.array(TIMES)[:, None]
    is_noised[0, 0] = True
    return x0, np.where(is_noised, noise, x0)
