"""Attention, bidirectional or causal. Imports jax only."""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from sedd_jax.kernels import for_platform
from sedd_jax.kernels.cpu import as_bits, from_bits, transposed
from sedd_jax.kernels.matmul import einsum

# The default implementation on each platform; xla, plain JAX, runs everywhere.
DEFAULTS = {"cpu": "xla", "gpu": "cudnn", "tpu": "splash"}
# Attention scores computed at a time: what fits a CPU core's cache, 1 MiB, and a small part of an
# accelerator's memory, 512 MiB. At least those of one head of one row.
TILES = {"cpu": 2**18, "gpu": 2**27, "tpu": 2**27}
UNSEEN = -1e30  # finite, so that a row without a key stays finite
CHECKPOINT_NAME = "attention"  # of what attention's gradient needs
SPLASH_BLOCK = 512  # the largest block of the TPU's kernel, in positions


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

    is_causal masks the keys after the query, lengths, int32 [B], those from a row's length on (a
    number and not a mask: cuDNN's kernel takes no padding mask); the results at these positions
    are arbitrary. The softmax is taken in float32 whatever the dtype of q.

    implementation is cudnn (a GPU's flash attention), splash (a TPU's) or xla, which loops over
    tiles of heads; none saves an [L, L] array for the backward pass. xla alone takes a q of fewer
    positions than k has, without is_causal and without a gradient. None or auto: the platform's
    default if it takes these arrays, else xla. platform is the devices', jax.default_backend() by
    default. It works on whole arrays: over several devices, shard_map it over rows and heads.
    ValueError if the named one does not take the arrays.
    """
    platform = platform or jax.default_backend()
    is_auto = implementation in (None, "auto")
    name = for_platform(DEFAULTS, platform) if is_auto else implementation
    refused = _REFUSES[name](q)
    if refused and is_auto:
        name = "xla"
    elif refused:
        raise ValueError(
            f"attention {name!r} takes no {q.dtype} {tuple(q.shape)}: {refused}; "
            "use 'auto' or 'xla'"
        )
    return FORMS[name](q, k, v, is_causal, lengths, platform)


def _xla(q, k, v, is_causal, lengths, platform):
    batch, length, heads, _ = q.shape
    limit = max(1, for_platform(TILES, platform) // length**2)
    tile = next(n for n in range(min(limit, batch * heads), 0, -1) if batch * heads % n == 0)
    if lengths is not None:
        lengths = jnp.repeat(lengths, heads)
    return _softmax(is_causal, tile, platform, q, k, v, lengths)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _softmax(is_causal, tile, platform, q, k, v, lengths):
    return _softmax_forward(is_causal, tile, platform, q, k, v, lengths)[0]


def _softmax_forward(is_causal, tile, platform, q, k, v, lengths):
    """Does not save the weights [N, L, L], as autodiff would: the backward pass recomputes them."""

    def of_tile(q, k, v, lengths):
        position = jnp.arange(k.shape[1])
        seen = _seen(position[:, None], position, is_causal, lengths)
        scores = jnp.where(seen, einsum("nlk,nmk->nlm", q, k), UNSEEN)
        scale = q.shape[-1] ** -0.5
        top = scores.max(axis=-1, keepdims=True)
        weights = jnp.exp(scale * (scores - top))
        total = weights.sum(axis=-1, keepdims=True)
        out = einsum("nlm,nmk->nlk", weights.astype(v.dtype), v) / total
        return out.astype(v.dtype), (scale * top + jnp.log(total))[..., 0]

    shape = q.shape
    q, k, v = (_by_head(as_bits(a, platform)) for a in (q, k, v))
    out, log_total = _over_tiles(of_tile, tile, platform, (q, k, v, lengths))
    out = checkpoint_name(_by_row(out, shape), CHECKPOINT_NAME)
    log_total = checkpoint_name(log_total, CHECKPOINT_NAME)
    return from_bits(out), (q, k, v, lengths, out, log_total)


def _softmax_backward(is_causal, tile, platform, saved, d_out):
    def of_tile(q, k, v, lengths, log_total, mean, d_out):
        # Keys first: a CPU's matmuls are fast where they sum over the last axis of the left side.
        scale = q.shape[-1] ** -0.5
        weights = jnp.exp(scale * einsum("nmk,nlk->nml", k, q) - log_total[:, None])
        position = jnp.arange(q.shape[1])
        seen = _seen(position, position[:, None], is_causal, lengths)
        weights = jnp.where(seen, weights, 0.0)
        d_scores = weights * (einsum("nmk,nlk->nml", v, d_out) - mean[:, None])
        d_scores = d_scores.astype(q.dtype)
        d_q = scale * transposed(einsum("nkm,nml->nkl", transposed(k), d_scores))
        d_k = scale * einsum("nml,nlk->nmk", d_scores, q)
        d_v = einsum("nml,nlk->nmk", weights.astype(v.dtype), d_out)
        return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype)

    q, k, v, lengths, out, log_total = saved
    mean = (from_bits(out).astype(jnp.float32) * d_out.astype(jnp.float32)).sum(axis=-1)
    mean = _by_head(mean[..., None])[..., 0]
    d_out = _by_head(as_bits(d_out, platform))
    gradients = _over_tiles(of_tile, tile, platform, (q, k, v, lengths, log_total, mean, d_out))
    return *(from_bits(_by_row(a, out.shape)) for a in gradients), None


_softmax.defvjp(_softmax_forward, _softmax_backward)


def _by_head(a):
    """[B, L, H, K] -> [B H, L, K]."""
    return a.swapaxes(1, 2).reshape(-1, a.shape[1], a.shape[3])


def _by_row(a, shape):
    """[B H, L, K] -> shape, [B, L, H, K]."""
    batch, length, heads, size = shape
    return a.reshape(batch, heads, length, size).swapaxes(1, 2)


def _seen(query, key, is_causal, lengths):
    """Whether the query at a position sees the key at another, as their shapes broadcast."""
    seen = query >= key if is_causal else True
    return seen if lengths is None else seen & (key < lengths[:, None, None])


def _over_tiles(fn, size, platform, arrays):
    """fn(*arrays), trees of [N, ...] of as_bits in and out, in a loop over tiles of `size` of N."""

    def of_packed(tile):
        out = fn(*jax.tree.map(from_bits, tile))
        return jax.tree.map(lambda a: as_bits(a, platform), out)

    if arrays[0].shape[0] == size:
        return of_packed(arrays)
    split = jax.tree.map(lambda a: a.reshape(-1, size, *a.shape[1:]), arrays)
    out = jax.lax.map(of_packed, split)
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), out)


def _cudnn(q, k, v, is_causal, lengths, platform):
    both = {"query_seq_lengths": lengths, "key_value_seq_lengths": lengths}
    return jax.nn.dot_product_attention(
        q, k, v, is_causal=is_causal, implementation="cudnn", **both
    )


def saves_cudnn(primitive, *_, **__) -> bool:
    """The jax.checkpoint policy that saves cuDNN's residuals, which have no name."""
    return primitive.name == "dot_product_attention_fwd_wrapper"


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
        residual_checkpoint_name=CHECKPOINT_NAME,
    )
    q = q * q.shape[-1] ** -0.5  # a power of 4 at 64: exact in bfloat16
    q, k, v = (a.swapaxes(1, 2) for a in (q, k, v))  # [B, H, L, K]
    if lengths is None:
        out = jax.vmap(kernel)(q, k, v)
    else:
        # Padding attends to padding, so that no softmax is empty.
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
