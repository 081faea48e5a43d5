"""Log-sum-exp over the vocabulary and its gradient, fused with the head, for GPUs from Ampere on.

Pallas-Triton kernels behind `forward` and `backward`. Imports jax and sedd_jax.kernels.precision.
Pallas's Triton backend is deprecated from jax 0.11, and jax-triton is its documented successor, so
all that stands on it is in this file.

A program makes the logits of a block of positions and a block of tokens on chip, reduces them and
drops them. The gradient has two kernels, and each makes them again: d_hidden, which a program adds
up over the tokens, and d_weight, added up over the positions. A program adds up as many channels
as it has registers for, so the logits are made once for each such group of channels. Nothing is
added by atomics, whose order varies from call to call.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from sedd_jax.kernels.matmul import precision

LOWEST = float(jnp.finfo(jnp.float32).min)  # a maximum to start from: -inf - -inf would be NaN
# Programs of one kernel at least, if there are tokens enough: about 4 for each core of an H100.
# Where positions are few the vocabulary is split, and d_hidden's parts, about 50 MB at C = 768,
# are added up after the kernel.
PROGRAMS = 512
SMALLEST = 16  # side of the smallest operand of a product


@dataclasses.dataclass(frozen=True)
class Tile:
    """What of the arrays one program has on chip at a time; sides are powers of two from 16."""

    positions: int
    vocab: int
    channels: int  # of hidden and weight for a step towards the logits
    warps: int
    stages: int  # of the pipeline of loads
    chunk: int = 0  # channels of one sum of the gradient
    chunks: int = 0  # sums that one program keeps in registers

    def clipped(self, channels: int) -> "Tile":
        """No wider than `channels` needs."""
        most = max(SMALLEST, pl.next_power_of_2(channels))
        return dataclasses.replace(
            self, channels=min(self.channels, most), chunk=min(self.chunk, most)
        )


# Nothing was run on a device: no time was measured. What was read off the programs compiled for
# A100 and H100 at V = 50257, C = 768 (ptxas -v) is that they fit, with at most 32 bytes of a
# thread's registers spilled, where most wider tiles spilled hundreds. A program that keeps all 768
# channels of its gradient would make the logits once and not twice, but has registers for 32
# positions only, fewer than the 64 of the H100's matrix instruction.
TOTAL = {
    "bfloat16": Tile(positions=128, vocab=128, channels=64, warps=8, stages=3),
    "float32": Tile(positions=64, vocab=64, channels=32, warps=8, stages=2),
}
GRADIENT = {
    "bfloat16": Tile(64, 64, channels=64, warps=8, stages=3, chunk=128, chunks=3),
    "float32": Tile(32, 32, channels=32, warps=4, stages=2, chunk=64, chunks=3),
}


class Given(NamedTuple):
    """The arguments of a kernel, as references to memory."""

    hidden: Any  # [N, C]
    weight: Any  # [V, C]
    bias: Any  # float32 [V]
    excluded: Any  # int32 [N]
    targets: Any  # int32 [N]
    count: Any  # int32 [1]
    total: Any = None  # float32 [N], as the next two
    d_total: Any = None
    d_pick: Any = None


def forward(
    hidden: jax.Array,
    weight: jax.Array,
    bias: jax.Array,
    excluded: jax.Array,
    targets: jax.Array,
    count: jax.Array,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Log-sum-exp of the logits but the excluded one, and the logit at targets; float32 [N].

    logits[n, v] = sum_c hidden[n, c] weight[v, c] + bias[v], summed in float32.

    hidden [N, C] and weight [V, C] are both bfloat16 or both float32, bias is float32 [V], excluded
    and targets are int32 [N], count is int32 []. Both results are 0 from position `count` on, and a
    block of such positions costs nothing. An excluded id outside [0, V) excludes nothing; the
    target may be the excluded token.
    """
    tile = _tile(TOTAL, hidden, weight)
    size, vocab = hidden.shape[0], weight.shape[0]
    rows = pl.cdiv(size, tile.positions)
    splits, blocks = _split(rows, pl.cdiv(vocab, tile.vocab))
    count = jnp.minimum(count, size)
    part = jax.ShapeDtypeStruct((splits, size), jnp.float32)
    totals, picks = _call(
        functools.partial(_total_kernel, tile=tile, blocks=blocks),
        Given(hidden, weight, bias, excluded, targets, count[None]),
        (part, part),
        tile,
        grid=(rows, splits),
        products=1,
        name="vocab_total",
        interpret=interpret,
    )
    is_asked = jnp.arange(size) < count
    total = jnp.where(is_asked, jax.nn.logsumexp(totals, axis=0), 0.0)
    return total, jnp.where(is_asked, picks.sum(axis=0), 0.0)


def backward(
    hidden: jax.Array,
    weight: jax.Array,
    bias: jax.Array,
    excluded: jax.Array,
    targets: jax.Array,
    count: jax.Array,
    total: jax.Array,
    d_total: jax.Array,
    d_pick: jax.Array,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The gradient of sum(d_total * total + d_pick * pick), float32: [N, C], [V, C] and [V].

    d_logits[n, v] = d_total[n] exp(logits[n, v] - total[n]) [v != excluded[n]]
                   + d_pick[n] [v == targets[n]], and 0 from position `count` on

    The arguments are those of `forward`, its total, and two float32 [N]. The products
    d_hidden = d_logits weight and d_weight = d_logits^T hidden take d_logits in hidden's dtype and
    sum in float32; d_bias is the sum of d_logits over positions.
    """
    tile = _tile(GRADIENT, hidden, weight)
    (size, channels), vocab = hidden.shape, weight.shape[0]
    rows, columns = pl.cdiv(size, tile.positions), pl.cdiv(vocab, tile.vocab)
    groups = pl.cdiv(pl.cdiv(channels, tile.chunk), tile.chunks)
    # As even as can be: 4 chunks in groups of at most 3 are 2 and 2.
    tile = dataclasses.replace(tile, chunks=pl.cdiv(pl.cdiv(channels, tile.chunk), groups))
    splits, blocks = _split(rows * groups, columns)
    count = jnp.minimum(count, size)
    given = Given(hidden, weight, bias, excluded, targets, count[None], total, d_total, d_pick)
    (parts,) = _call(
        functools.partial(_d_hidden_kernel, tile=tile, blocks=blocks),
        given,
        (jax.ShapeDtypeStruct((splits, size, channels), jnp.float32),),
        tile,
        grid=(rows, groups, splits),
        products=groups + 1,
        name="vocab_d_hidden",
        interpret=interpret,
    )
    d_weight, d_bias = _call(
        functools.partial(_d_weight_kernel, tile=tile),
        given,
        tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((vocab, channels), (vocab,))),
        tile,
        grid=(columns, groups),
        products=groups + 1,
        name="vocab_d_weight",
        interpret=interpret,
    )
    return parts.sum(axis=0), d_weight, d_bias


def _tile(tiles: dict[str, Tile], hidden: jax.Array, weight: jax.Array) -> Tile:
    if hidden.dtype != weight.dtype or hidden.dtype.name not in tiles:
        raise ValueError(
            f"hidden is {hidden.dtype} and weight {weight.dtype}; the kernel takes both in one of "
            f"{', '.join(tiles)}"
        )
    return tiles[hidden.dtype.name].clipped(hidden.shape[1])


def _split(programs: int, blocks: int) -> tuple[int, int]:
    """Into how many parts the vocabulary goes to occupy a GPU, and the blocks of each part."""
    each = pl.cdiv(blocks, pl.cdiv(PROGRAMS, programs))
    return pl.cdiv(blocks, each), each


def _call(
    kernel: Callable,
    given: Given,
    out: tuple[jax.ShapeDtypeStruct, ...],
    tile: Tile,
    *,
    grid: tuple[int, ...],
    products: int,
    name: str,
    interpret: bool,
) -> tuple[jax.Array, ...]:
    """Run a kernel that makes `products` products of N x V x C, with whole arrays as references."""
    (size, channels), vocab = given.hidden.shape, given.weight.shape[0]
    arrays = [a for a in given if a is not None]
    cost = pl.CostEstimate(
        flops=2 * products * size * vocab * channels,
        transcendentals=size * vocab,
        bytes_accessed=sum(a.size * a.dtype.itemsize for a in (*arrays, *out)),
    )
    return pl.pallas_call(
        kernel,
        out_shape=out,
        grid=grid,
        compiler_params=triton.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        cost_estimate=cost,
        name=name,
        interpret=interpret,
    )(*arrays)


def _total_kernel(*refs, tile: Tile, blocks: int):
    *given, total_ref, pick_ref = refs
    given = Given(*given)
    n, split = pl.program_id(0) * tile.positions, pl.program_id(1)
    excluded = _vector(given.excluded, n, tile.positions)[:, None]
    targets = _vector(given.targets, n, tile.positions)[:, None]

    def block(step, carry):
        most, total, pick = carry
        v = step * tile.vocab
        tokens = (v + jnp.arange(tile.vocab))[None, :]
        logits = _logits(given, n, v, tile)
        pick += jnp.where(tokens == targets, logits, 0.0).sum(axis=1)
        logits = jnp.where(tokens == excluded, -jnp.inf, logits)
        higher = jnp.maximum(most, logits.max(axis=1))
        total = total * jnp.exp(most - higher) + jnp.exp(logits - higher[:, None]).sum(axis=1)
        return higher, total, pick

    zero = jnp.zeros((tile.positions,), jnp.float32)
    first, last = _part(given, n, split, tile, blocks)
    most, total, pick = jax.lax.fori_loop(first, last, block, (zero + LOWEST, zero, zero))
    rows = pl.ds(n, tile.positions)
    is_row = n + jnp.arange(tile.positions) < given.hidden.shape[0]
    triton.store(total_ref.at[split, rows], most + jnp.log(total), mask=is_row)
    triton.store(pick_ref.at[split, rows], pick, mask=is_row)


def _d_hidden_kernel(*refs, tile: Tile, blocks: int):
    *given, d_hidden_ref = refs
    given = Given(*given)
    n, split = pl.program_id(0) * tile.positions, pl.program_id(2)
    places = [(pl.program_id(1) * tile.chunks + i) * tile.chunk for i in range(tile.chunks)]
    vocab = given.weight.shape[0]

    def block(step, sums):
        v = step * tile.vocab
        d_logits = _d_logits(given, n, v, tile).astype(given.weight.dtype)
        weights = (_matrix(given.weight, v, tile.vocab, c, tile.chunk, vocab) for c in places)
        return tuple(
            total + _product(d_logits, weight, 1, 0)
            for total, weight in zip(sums, weights, strict=True)
        )

    zero = jnp.zeros((tile.positions, tile.chunk), jnp.float32)
    first, last = _part(given, n, split, tile, blocks)
    sums = jax.lax.fori_loop(first, last, block, (zero,) * tile.chunks)
    for c, total in zip(places, sums, strict=True):
        out = d_hidden_ref.at[split, pl.ds(n, tile.positions), pl.ds(c, tile.chunk)]
        triton.store(out, total, mask=_inside(n, c, total.shape, given.hidden.shape))


def _d_weight_kernel(*refs, tile: Tile):
    *given, d_weight_ref, d_bias_ref = refs
    given = Given(*given)
    v, group = pl.program_id(0) * tile.vocab, pl.program_id(1)
    places = [(group * tile.chunks + i) * tile.chunk for i in range(tile.chunks)]
    count = given.count[0]

    def block(step, carry):
        d_bias, sums = carry
        n = step * tile.positions
        d_logits = _d_logits(given, n, v, tile)
        d_bias += d_logits.sum(axis=0)
        d_logits = d_logits.astype(given.hidden.dtype)
        hiddens = (_matrix(given.hidden, n, tile.positions, c, tile.chunk, count) for c in places)
        return d_bias, tuple(
            total + _product(d_logits, hidden, 0, 0)
            for total, hidden in zip(sums, hiddens, strict=True)
        )

    zeros = [jnp.zeros(shape, jnp.float32) for shape in ((tile.vocab,), (tile.vocab, tile.chunk))]
    # int32, as count: Triton refuses a loop whose bounds differ in type.
    first, last = jnp.int32(0), pl.cdiv(count, tile.positions)
    d_bias, sums = jax.lax.fori_loop(first, last, block, (zeros[0], (zeros[1],) * tile.chunks))
    for c, total in zip(places, sums, strict=True):
        out = d_weight_ref.at[pl.ds(v, tile.vocab), pl.ds(c, tile.chunk)]
        triton.store(out, total, mask=_inside(v, c, total.shape, given.weight.shape))
    # Programs that differ in their group alone have the same sum: one stores it.
    is_token = (v + jnp.arange(tile.vocab) < given.weight.shape[0]) & (group == 0)
    triton.store(d_bias_ref.at[pl.ds(v, tile.vocab)], d_bias, mask=is_token)


def _part(given: Given, n, split, tile: Tile, blocks: int):
    """The first block of tokens of a part and the one after its last; none beyond count."""
    first = split * blocks
    last = jnp.minimum(first + blocks, pl.cdiv(given.weight.shape[0], tile.vocab))
    return first, jnp.where(n < given.count[0], last, first)


def _logits(given: Given, n, v, tile: Tile):
    """[tile.positions, tile.vocab] from position n and token v on; -inf beyond the vocabulary."""
    vocab, channels = given.weight.shape
    count = given.count[0]

    def add(step, logits):
        c = step * tile.channels
        hidden = _matrix(given.hidden, n, tile.positions, c, tile.channels, count)
        weight = _matrix(given.weight, v, tile.vocab, c, tile.channels, vocab)
        return logits + _product(hidden, weight, 1, 1)

    zero = jnp.zeros((tile.positions, tile.vocab), jnp.float32)
    logits = jax.lax.fori_loop(0, pl.cdiv(channels, tile.channels), add, zero)
    is_token = (v + jnp.arange(tile.vocab) < vocab)[None, :]
    return jnp.where(is_token, logits + _vector(given.bias, v, tile.vocab)[None, :], -jnp.inf)


def _d_logits(given: Given, n, v, tile: Tile):
    """The slope of the cost in each of `_logits`, float32; 0 beyond count and the vocabulary."""
    names = ("excluded", "targets", "total", "d_total", "d_pick")
    excluded, targets, total, d_total, d_pick = (
        _vector(getattr(given, name), n, tile.positions)[:, None] for name in names
    )
    tokens = (v + jnp.arange(tile.vocab))[None, :]
    share = jnp.exp(_logits(given, n, v, tile) - total)
    d_logits = jnp.where(tokens == excluded, 0.0, d_total * share)
    d_logits += jnp.where(tokens == targets, d_pick, 0.0)
    is_asked = (n + jnp.arange(tile.positions) < given.count[0])[:, None]
    return jnp.where(is_asked, d_logits, 0.0)


def _product(a, b, a_axis: int, b_axis: int):
    """a times b, summed in float32 over these axes."""
    axes = (((a_axis,), (b_axis,)), ((), ()))
    kinds = {"precision": precision(a.dtype), "preferred_element_type": jnp.float32}
    return jax.lax.dot_general(a, b, axes, **kinds)


def _vector(ref, start, size: int):
    """ref[start : start + size], 0 beyond its end."""
    return triton.load(
        ref.at[pl.ds(start, size)], mask=start + jnp.arange(size) < ref.shape[0], other=0
    )


def _matrix(ref, row, rows: int, column, columns: int, last):
    """ref[row : row + rows, column : column + columns], 0 from row `last` and past its columns."""
    mask = _inside(row, column, (rows, columns), (last, ref.shape[1]))
    return triton.load(ref.at[pl.ds(row, rows), pl.ds(column, columns)], mask=mask, other=0)


def _inside(row, column, shape: tuple[int, int], ends):
    """bool of this shape: which entries from (row, column) on lie before both ends."""
    is_row = (row + jnp.arange(shape[0]) < ends[0])[:, None]
    is_column = (column + jnp.arange(shape[1]) < ends[1])[None, :]
    return jnp.broadcast_to(is_row, shape) & jnp.broadcast_to(is_column, shape)
