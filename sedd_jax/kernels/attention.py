"""Attention over all positions, or over those up to one's own. Imports jax only."""

import jax
import jax.numpy as jnp

from sedd_jax.kernels import ATTENTION, choose

SPLASH_BLOCK = 512  # positions of a block of the TPU's kernel, at most


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    is_causal: bool = False,
    lengths: jax.Array | None = None,
    implementation: str | None = None,
    platform: str | None = None,
) -> jax.Array:
    """softmax(q k^T / sqrt(K)) v over all positions; every array is [B, L, H, K].

    is_causal leaves out the positions after the query's, lengths, int32 [B], those from a row's
    length on (a number and not a mask: cuDNN's kernel takes no mask of padding); what is found at
    these themselves means nothing. The softmax is taken in float32 whatever the dtype of q.

    implementation is xla, cudnn (a GPU's flash attention) or splash (a TPU's), which keep no
    [L, L] array; by default the platform's if it takes these arrays, and xla otherwise. platform is
    that of the devices, by default jax's own. ValueError if the named one does not take them.
    """
    platform = platform or jax.default_backend()
    name = choose(ATTENTION, implementation, platform)
    refused = _REFUSES[name](q)
    if refused and implementation in (None, "auto"):
        name, refused = "xla", None
    if refused:
        raise ValueError(
            f"attention {name!r} takes no {q.dtype} {tuple(q.shape)}: {refused}; "
            "use 'auto' or 'xla'"
        )
    return FORMS[name](q, k, v, is_causal, lengths, platform)


def is_local(q: jax.Array, implementation: str | None, platform: str) -> bool:
    """Whether `attention` takes a kernel, which each device must run on its own rows and heads."""
    name = choose(ATTENTION, implementation, platform)
    return name != "xla" and _REFUSES[name](q) is None


def _xla(q, k, v, is_causal, lengths, platform):
    # This function takes no precision, but what it calls follows the default in force.
    with jax.default_matmul_precision("highest" if q.dtype == jnp.float32 else "default"):
        return jax.nn.dot_product_attention(
            q, k, v, is_causal=is_causal, key_value_seq_lengths=lengths, implementation="xla"
        )


def _cudnn(q, k, v, is_causal, lengths, platform):
    both = {"query_seq_lengths": lengths, "key_value_seq_lengths": lengths}
    return jax.nn.dot_product_attention(
        q, k, v, is_causal=is_causal, implementation="cudnn", **both
    )


def _splash(q, k, v, is_causal, lengths, platform):
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    length, heads = q.shape[1:3]
    block = next(n for n in range(SPLASH_BLOCK, 0, -128) if length % n == 0)
    names = ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv")
    sizes = dict.fromkeys((*names, "block_kv_dkv_compute", "block_q_dq", "block_kv_dq"), block)
    mask = (splash.CausalMask if is_causal else splash.FullMask)((length, length))
    kernel = splash.make_splash_mha_single_device(
        splash.MultiHeadMask([mask] * heads),
        block_sizes=splash.BlockSizes(**sizes),
        interpret=platform == "cpu",
    )
    q = q * q.shape[-1] ** -0.5  # a power of 4 at 64: exact in bfloat16
    q, k, v = (a.swapaxes(1, 2) for a in (q, k, v))  # [B, H, L, K]
    if lengths is None:
        out = jax.vmap(kernel)(q, k, v)
    else:
        # Padding attends to padding, so that no row attends to nothing.
        segment = (jnp.arange(length) >= lengths[:, None]).astype(jnp.int32)
        out = jax.vmap(kernel)(q, k, v, splash.SegmentIds(segment, segment))
    return out.swapaxes(1, 2).astype(v.dtype)


def _cudnn_refuses(q) -> str | None:
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return "it takes bfloat16 and float16"
    if q.shape[-1] > 128 or q.shape[-1] % 8:
        return "it takes heads of up to 128 channels, a multiple of 8"
    return None


def _splash_refuses(q) -> str | None:
    if q.dtype != jnp.bfloat16:
        return "it takes bfloat16"
    if q.shape[1] % 128:
        return "it takes a multiple of 128 positions"
    return None


FORMS = {"xla": _xla, "cudnn": _cudnn, "splash": _splash}
_REFUSES = {"xla": lambda q: None, "cudnn": _cudnn_refuses, "splash": _splash_refuses}
