"""The diffusion transformer of the paper, parameter for parameter as the original.

Tokens and total noise go in, the last hidden state and the output matrix come out; the graph says
what the output means. Small has 169,627,218 parameters at GPT-2's vocabulary with MASK. Parameters
are float32. `dtype` is the dtype of the matmuls, `residual_dtype` that in which the residual stream
is stored; what is elementwise is computed in float32.
"""

import functools
import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from sedd_jax.kernels import cpu, for_platform
from sedd_jax.kernels.attention import attention, saves_cudnn
from sedd_jax.kernels.elementwise import gelu, keep_masks, modulated_norm
from sedd_jax.kernels.matmul import Precision
from sedd_jax.parallel.sharding import Placement

FREQUENCIES = 256
MLP_RATIO = 4
ROTARY_BASE = 10_000.0
LAYER_NORM_EPSILON = 1e-5

# What a block saves for the backward pass beside its input, by name, and how many numbers of each
# per channel of a token:
#     heads           q, k and v after rotation, 3
#     attention       what flash attention's gradient needs: its result 1, a float32 per head
#     out, up, down   results of these matmuls before their biases, 1, 4 and 1
#     normed          of both norms, modulated, 2
#     residual        the stream between the branches, a float32
#     dropout         random bits, 2 bytes
#     statistics, modulation   small
# All else is recomputed there. Each value of config.model.remat saves less than the one before and
# takes more time.
MATMULS = ("heads", "out", "up", "down")
SAVED = {
    "none": (*MATMULS, "attention", "normed", "residual", "dropout", "statistics", "modulation"),
    "elementwise": (*MATMULS, "attention"),
    "blocks": (),
}
# What the network may embed of the total noise sigma: itself, or the share of the tokens that are
# noised, the time of a linear schedule.
NOISE_INPUTS = {"sigma": lambda sigma: sigma, "share": lambda sigma: -jnp.expm1(-sigma)}
# Whether the blocks are compiled one by one or, as a loop, once. A loop stacks what they save and
# copies it out again; its program is compiled in a time that does not grow with their number.
IS_UNROLLED = {"cpu": False, "gpu": True, "tpu": False}


def saving(names):
    """The jax.checkpoint policy that saves what has one of the names."""
    policy = jax.checkpoint_policies.save_only_these_names(*names)
    if "attention" in names:  # cuDNN's has no name
        policy = jax.checkpoint_policies.save_from_both_policies(policy, saves_cudnn)
    return policy


class Output(NamedTuple):
    """The network's output: logits = hidden @ weight.T + bias."""

    hidden: jax.Array  # [B, L, C] in the compute dtype
    weight: jax.Array  # float32 [D, C]
    bias: jax.Array  # float32 [D]


# torch's default for linear layers: uniform in +-1/sqrt(fan_in).
_torch_linear = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def _torch_bias(fan_in: int):
    bound = fan_in**-0.5
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)


def sigma_embedding(sigma: jax.Array) -> jax.Array:
    """Cosines and sines of sigma at 128 frequencies from 1 to 1e-4, float32 [B, 256]."""
    half = FREQUENCIES // 2
    frequencies = jnp.exp(-jnp.log(10_000.0) * jnp.arange(half) / half)
    angles = sigma.astype(jnp.float32) * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def rotate(x: jax.Array, first: jax.Array | None = None) -> jax.Array:
    """Rotary position embedding of [B, L, H, K], halves not interleaved, computed in float32.

    first, int32 [], is the position of the first token, 0 by default.
    """
    length, size = x.shape[1], x.shape[-1]
    inverse = ROTARY_BASE ** (-jnp.arange(0, size, 2, dtype=jnp.float32) / size)
    position = jnp.arange(length, dtype=jnp.float32)
    position = position if first is None else first + position
    angles = (position[:, None] * inverse)[:, None, :]  # [L, 1, K/2]
    cos, sin = jnp.cos(angles)[..., None, :], jnp.sin(angles)
    sin = jnp.stack([-sin, sin], axis=-2)
    halves = x.astype(jnp.float32).reshape(*x.shape[:-1], 2, size // 2)
    rotated = halves * cos + jnp.flip(halves, axis=-2) * sin
    return rotated.reshape(x.shape).astype(x.dtype)


class ModulatedNorm(nn.Module):
    """x -> (x, modulate(norm(x))), the latter in `dtype`: see modulated_norm."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, shift, scale):
        weight = self.param("scale", nn.initializers.ones_init(), x.shape[-1:])
        return modulated_norm(LAYER_NORM_EPSILON, self.dtype, x, weight, shift, scale)


class Modulation(nn.Module):
    """`count` vectors [B, 1, C] from the conditioning [B, cond]; zero at the start (adaLN-zero)."""

    count: int
    size: int
    placement: Placement

    @nn.compact
    def __call__(self, conditioning):
        zeros = nn.initializers.zeros_init()
        dense = nn.Dense(
            self.count * self.size, kernel_init=zeros, precision=Precision.HIGHEST, name="linear"
        )
        out = self.placement.rows(dense(conditioning))
        return checkpoint_name(jnp.split(out[:, None], self.count, axis=-1), "modulation")


class Linear(nn.Module):
    """[..., *inputs] -> [..., *outputs] in `dtype`, as flax's DenseGeneral over the last axes.

    The matmul's result is saved for the backward pass where SAVED has the module's name.
    """

    outputs: tuple[int, ...]
    dtype: jnp.dtype
    placement: Placement
    axes: int = 1  # of the inputs
    has_bias: bool = False

    @nn.compact
    def __call__(self, x):
        inputs = x.shape[x.ndim - self.axes :]
        flat = (math.prod(inputs), math.prod(self.outputs))

        def kernel_init(key, shape):
            return _torch_linear(key, flat).reshape(shape)

        kernel = self.param("kernel", kernel_init, (*inputs, *self.outputs))
        is_one_cpu = self.placement.is_one_cpu
        out = cpu.linear(x.astype(self.dtype), kernel, self.axes, is_one_cpu=is_one_cpu)
        out = cpu.save(out, self.name, self.placement.platform)
        if self.has_bias:
            bias = self.param("bias", _torch_bias(flat[0]), self.outputs, jnp.float32)
            out = cpu.add_bias(out, bias, is_one_cpu=is_one_cpu)
        return out


class Block(nn.Module):
    """Attention and MLP, each modulated by the noise level and gated into the residual stream."""

    heads: int
    dropout: float
    dtype: jnp.dtype
    deterministic: bool
    placement: Placement
    attention: str
    is_causal: bool

    @nn.compact
    def __call__(self, x, conditioning, lengths, position):
        x = self.placement.rows(x)
        size, stream = x.shape[-1], x.dtype
        linear = functools.partial(Linear, dtype=self.dtype, placement=self.placement)
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = Modulation(
            6, size, self.placement, name="modulation"
        )(conditioning)
        norm_1, norm_2 = (ModulatedNorm(self.dtype, name=name) for name in ("norm_1", "norm_2"))
        dropout_1, dropout_2 = self.dropouts(x.shape)

        def mix(heads, lengths):
            how = {"implementation": self.attention, "is_causal": self.is_causal}
            if position is not None:  # one query: lengths end the keys at it
                how = {"implementation": "xla"}
            return attention(*heads, lengths=lengths, platform=self.placement.platform, **how)

        def attend(x):
            qkv = linear((3, self.heads, size // self.heads), name="qkv")(x)
            q, k, v = (a[:, :, 0] for a in jnp.split(qkv, 3, axis=2))  # [B, L, H, K]
            heads = rotate(q, position), rotate(k, position), v
            heads = tuple(cpu.save(a, "heads", self.placement.platform) for a in heads)
            mixed = self.placement.over_heads(mix, self.with_cache(*heads, position), lengths)
            return linear((size,), axes=2, name="out")(mixed)

        def mlp(x):
            x = linear((MLP_RATIO * size,), has_bias=True, name="up")(x)
            return linear((size,), has_bias=True, name="down")(gelu(x))

        x, normed = norm_1(x, shift_1, scale_1)
        x = x + gate_1 * dropout_1(attend(normed))
        x = checkpoint_name(x.astype(stream), "residual")
        x, normed = norm_2(x, shift_2, scale_2)
        x = x + gate_2 * dropout_2(mlp(normed))
        return self.placement.rows(x.astype(stream)), None

    def with_cache(self, q, k, v, position):
        """q, and k and v of all positions: the collection "cache", where a call may write it, holds
        them from call to call."""
        if self.is_initializing() or not self.is_mutable_collection("cache"):
            return q, k, v
        cached = []
        for name, part in (("keys", k), ("values", v)):
            whole = self.variable("cache", name, lambda part=part: part)
            if position is not None:
                part = jax.lax.dynamic_update_slice_in_dim(whole.value, part, position, axis=1)
            whole.value = part
            cached.append(part)
        return q, *cached

    def dropouts(self, shape):
        """The dropout of each of the two branches, float32 out."""
        if self.deterministic or self.dropout == 0.0:
            return 2 * (lambda branch: branch.astype(jnp.float32),)
        masks = keep_masks(self.make_rng("dropout"), 2, shape, self.dropout)

        def dropout(mask, branch):
            return jnp.where(mask, branch.astype(jnp.float32) / (1.0 - self.dropout), 0.0)

        return tuple(functools.partial(dropout, mask) for mask in masks)


class Transformer(nn.Module):
    """(tokens [B, L], sigma [B, 1]) -> Output for `dim` states.

    Vectors, float [B, L, C], may stand in place of tokens and their embeddings.
    is_token, bool [B, L], is False at the padding, which is at the end of a row: no position
    attends to it. None: no padding.

    A causal network can be called a token at a time. A call with mutable="cache" also returns the
    keys and values of its L positions; one with that cache, tokens [B, 1] and their position,
    int32 [], gives what a call with all tokens up to it would, and puts theirs into the cache.
    """

    dim: int
    hidden_size: int
    blocks: int
    heads: int
    cond_dim: int
    dropout: float
    time_conditioning: bool = True  # False: sigma is not read
    noise_input: str = "sigma"  # of NOISE_INPUTS: what is embedded
    dtype: jnp.dtype = jnp.float32
    residual_dtype: jnp.dtype = jnp.float32
    remat: str = "none"  # of SAVED
    attention: str = "auto"  # of kernels.attention
    is_causal: bool = False  # positions attend to themselves and those before
    placement: Placement = Placement()

    def example(self, length: int) -> tuple[jax.Array, ...]:
        """What it may be called with: one row of `length` positions."""
        return jnp.zeros((1, length), jnp.int32), jnp.zeros((1, 1))

    @property
    def is_unrolled(self) -> bool:
        """Whether the blocks are compiled one by one."""
        return for_platform(IS_UNROLLED, self.placement.platform)

    def _conditioning(self, sigma: jax.Array) -> jax.Array:
        """What the blocks see of the noise level, float32 [B, cond_dim]; a part of __call__."""
        if not self.time_conditioning:  # the same parameters; what they give is a constant
            sigma = jnp.zeros_like(sigma)
        x = sigma_embedding(NOISE_INPUTS[self.noise_input](sigma))
        for name, fan_in in (("sigma_1", FREQUENCIES), ("sigma_2", self.cond_dim)):
            linear = nn.Dense(
                self.cond_dim,
                kernel_init=_torch_linear,
                bias_init=_torch_bias(fan_in),
                precision=Precision.HIGHEST,
                name=name,
            )
            x = nn.silu(linear(x))
        return x

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        sigma: jax.Array,
        *,
        deterministic: bool,
        is_token: jax.Array | None = None,
        position: jax.Array | None = None,
    ) -> Output:
        rows = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", in_axis=1, out_axis=0)
        zeros = nn.initializers.zeros_init()
        table = (self.dim, self.hidden_size)

        if jnp.issubdtype(tokens.dtype, jnp.integer):
            embedding = self.param("embedding", rows, table)
            tokens = self.placement.whole(embedding)[tokens]
        x = self.placement.rows(tokens.astype(self.residual_dtype))

        conditioning = self.placement.rows(self._conditioning(sigma))

        # In a loop nothing that is recomputed can be merged with what it was computed from.
        block = nn.remat(Block, prevent_cse=self.is_unrolled, policy=saving(SAVED[self.remat]))
        scanned = nn.scan(
            block,
            variable_axes={"params": 0, "cache": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=nn.broadcast,
            length=self.blocks,
            unroll=self.blocks if self.is_unrolled else 1,
        )
        lengths = None if is_token is None else is_token.sum(axis=-1, dtype=jnp.int32)
        if position is not None:
            lengths = jnp.broadcast_to(position + 1, tokens.shape[:1])
        x, _ = scanned(
            self.heads,
            self.dropout,
            self.dtype,
            deterministic,
            self.placement,
            self.attention,
            self.is_causal,
            name="blocks",
        )(x, conditioning, lengths, position)

        shift, scale = Modulation(2, self.hidden_size, self.placement, name="modulation")(
            conditioning
        )
        _, hidden = ModulatedNorm(self.dtype, name="norm")(x, shift, scale)
        hidden = self.placement.rows(hidden)
        weight = self.param("head_weight", zeros, table)
        bias = self.param("head_bias", zeros, (self.dim,))
        return Output(hidden, self.placement.whole(weight), bias)
