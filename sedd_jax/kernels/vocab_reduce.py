"""The reductions over the vocabulary that training, the bound and sampling need. Imports jax only.

They answer from the last hidden state, a tile of positions and tokens at a time: the table of
logits, [B, L, V], never exists, forward or backward. The positions that are needed are put first
and the loops end with them, so the cost follows their number, exactly and without a capacity that
could be too small.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sedd_jax.kernels import for_platform
from sedd_jax.kernels.cpu import transposed
from sedd_jax.kernels.matmul import einsum

# The least number and not -inf, whose difference from itself is not a number.
LEAST = float(jnp.finfo(jnp.float32).min)


class Tile(NamedTuple):
    """The logits that exist at a time."""

    positions: int
    tokens: int


# On a CPU a tile's logits fit into the cache, and little is wasted on a last tile that is not full.
# An accelerator wants fewer and larger matmuls, and a GPU few iterations: before each one of a loop
# whose end depends on data its host waits for the device.
TILES = {"cpu": Tile(96, 12_672), "gpu": Tile(2048, 25_344), "tpu": Tile(2048, 8192)}
# Logits of one block of draws, whole rows, at most. It has no more than a 64th of the positions
# either: a step of the sampler draws few of them.
DRAWN_LOGITS = {"cpu": 2**20, "gpu": 2**25, "tpu": 2**22}


def logits(hidden: jax.Array, weight: jax.Array, bias: jax.Array) -> jax.Array:
    """hidden [..., C] times weight [V, C] plus bias [V], accumulated in float32, [..., V]."""
    return einsum("...c,vc->...v", hidden, weight.astype(hidden.dtype)) + bias


def total_and_pick(
    hidden: jax.Array,
    weight: jax.Array,
    bias: jax.Array,
    excluded: jax.Array,
    targets: jax.Array,
    needed: jax.Array | None = None,
    *,
    platform: str | None = None,
    tile: Tile | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Log-sum-exp of the logits but the excluded one, and the logit at targets; float32 [B, L].

    hidden [B, L, C]; weight [V, C] and bias [V] float32; excluded and targets int32 [B, L]. An
    excluded id outside [0, V) excludes nothing. needed, bool [B, L], says which positions count:
    elsewhere both are 0 and nothing is spent. None: all of them. The matmuls are of hidden's dtype
    and summed in float32, and so are the gradients of weight and bias.

    platform is that of the devices, by default jax's own; tile the size of the tiles, for tests.
    """
    count, vocab = excluded.size, weight.shape[0]
    platform = platform or jax.default_backend()
    tile = tile or _fitted(for_platform(TILES, platform), count, vocab)
    needed = jnp.ones(excluded.shape, bool) if needed is None else needed
    order = _needed_first(needed.reshape(-1))
    rows = jnp.reshape(hidden, (count, -1)), weight, bias, jnp.ravel(excluded), jnp.ravel(targets)
    total, pick = (a.reshape(excluded.shape) for a in _total_and_pick(tile, *rows, order))
    return jnp.where(needed, total, 0.0), jnp.where(needed, pick, 0.0)


def peak_and_entropy(
    hidden: jax.Array,
    weight: jax.Array,
    bias: jax.Array,
    excluded: jax.Array,
    needed: jax.Array | None = None,
    *,
    platform: str | None = None,
    tile: Tile | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Of the tokens but the excluded one, in proportion to exp(logit): the log of the largest
    probability, and the entropy in nats; float32 [B, L], 0 where not needed. Has no gradient.

    The arrays are those of `total_and_pick`.
    """
    shape, vocab = excluded.shape, weight.shape[0]
    platform = platform or jax.default_backend()
    tile = tile or _fitted(for_platform(TILES, platform), excluded.size, vocab)
    needed = jnp.ones(shape, bool) if needed is None else needed
    order = _needed_first(needed.reshape(-1))

    def combine(sums, table):
        highest, total, weighted = sums
        higher = jnp.maximum(highest, table.max(axis=-1))
        p = jnp.exp(table - higher[:, None])
        kept = jnp.exp(highest - higher)
        # Sums of exp(d) and of d exp(d), d = logit - highest: 0 for what has no probability.
        weighted = kept * (weighted + jnp.where(kept > 0.0, highest - higher, 0.0) * total)
        weighted += jnp.where(p > 0.0, p * (table - higher[:, None]), 0.0).sum(axis=-1)
        return higher, kept * total + p.sum(axis=-1), weighted

    rows = jnp.reshape(hidden, (excluded.size, -1)), jnp.ravel(excluded)
    head = weight.astype(hidden.dtype), bias
    _, total, weighted = _over_tiles(combine, (LEAST, 0.0, 0.0), tile, *rows, *head, order)
    log_peak, entropy = -jnp.log(total), jnp.log(total) - weighted / total
    return tuple(jnp.where(needed, a[order.rank].reshape(shape), 0.0) for a in (log_peak, entropy))


def draw(
    hiddens: tuple[jax.Array, ...],
    weight: jax.Array,
    bias: jax.Array,
    excluded: jax.Array,
    keys: jax.Array,
    values: tuple[jax.Array, ...] = (),
    needed: jax.Array | None = None,
    *,
    categorical: Callable[..., jax.Array],
    platform: str | None = None,
    block: int | None = None,
) -> jax.Array:
    """A token in proportion to exp(logit), never the excluded one, int32 [B, L]; 0 if not needed.

    The arrays are those of `total_and_pick`; of several hidden states, each has logits of its own.
    categorical(key, *logits [V], *values []) draws one token from a position's rows of logits, the
    excluded token's -inf, and its values [B, L], as diffusion.draws.categorical does from one row.
    keys has one for each row, [B], and the noise of a position is keyed by its index in the row: a
    draw depends neither on the block size (of positions, for tests) nor on what else is drawn.
    """
    batch, length = excluded.shape
    vocab = weight.shape[0]
    needed = jnp.ones(excluded.shape, bool) if needed is None else needed
    order = _needed_first(needed.reshape(-1))
    max_logits = for_platform(DRAWN_LOGITS, platform or jax.default_backend())
    few = max(64, batch * length // 64)
    block = block or max(1, min(few, batch * length, max_logits // vocab))
    positions = _padded(order.position, block)
    hiddens = [hidden.reshape(batch * length, -1) for hidden in hiddens]
    values = [value.reshape(-1) for value in values]
    excluded = excluded.reshape(-1)

    def draw_one(position, *rows):
        key = jax.random.fold_in(keys[position // length], position % length)
        return categorical(key, *rows)

    def body(i, drawn):
        position = _block(positions, i, block)
        tables = [logits(hidden[position], weight, bias) for hidden in hiddens]
        is_excluded = jnp.arange(vocab) == excluded[position, None]
        tables = [jnp.where(is_excluded, -jnp.inf, table) for table in tables]
        at = [value[position] for value in values]
        return _with_block(drawn, jax.vmap(draw_one)(position, *tables, *at), i)

    drawn = jnp.zeros(positions.shape, jnp.int32)
    drawn = jax.lax.fori_loop(0, -(-order.count // block), body, drawn)
    return jnp.where(needed, drawn[order.rank].reshape(needed.shape), 0)


# --- the order of the positions


class _Order(NamedTuple):
    """N positions, the needed ones first and otherwise as they were."""

    position: jax.Array  # int32 [N]: the position at each rank
    rank: jax.Array  # int32 [N]: the rank of each position
    count: jax.Array  # int32 []: needed


def _needed_first(needed: jax.Array) -> _Order:
    """Of bool [N]."""
    so_far = jnp.cumsum(needed, dtype=jnp.int32)
    count = so_far[-1]
    index = jnp.arange(needed.shape[0], dtype=jnp.int32)
    rank = jnp.where(needed, so_far - 1, count + index - so_far)
    position = jnp.zeros_like(index).at[rank].set(index, unique_indices=True)
    return _Order(position, rank, count)


# --- the reduction and its gradient: a scan over blocks of tokens, and in it a loop over blocks of
# positions. A block of the weights is sliced once, and its gradient written once.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _total_and_pick(tile, hidden, weight, bias, excluded, targets, order):
    """total and pick [N] of hidden [N, C]; anything where a position is not needed, whose
    cotangents must be 0."""
    return _forward(tile, hidden, weight, bias, excluded, targets, order)[0]


def _forward(tile, hidden, weight, bias, excluded, targets, order):
    narrow = weight.astype(hidden.dtype)

    def combine(sums, table):
        highest, total = sums
        top, part_total = _max_and_sum(table)
        # The sum of exp(logit - highest), rescaled whenever a block has a higher logit.
        higher = jnp.maximum(highest, top)
        total = total * jnp.exp(highest - higher) + part_total * jnp.exp(top - higher)
        return higher, total

    rows = hidden, excluded, narrow, bias, order
    highest, total = _over_tiles(combine, (LEAST, 0.0), tile, *rows)
    log_total = highest + jnp.log(total)  # in that order, and -inf beyond the last block
    is_token = (targets >= 0) & (targets < weight.shape[0])
    at_target = narrow[targets].astype(jnp.float32)
    pick = (hidden.astype(jnp.float32) * at_target).sum(axis=-1) + bias[targets]
    saved = (hidden, weight, bias, excluded, targets, order, log_total)
    return (log_total[order.rank], jnp.where(is_token, pick, 0.0)), saved


def _over_tiles(
    combine: Callable, start: tuple[float, ...], tile: Tile, hidden, excluded, weight, bias, order
):
    """Sums over the vocabulary for each position, [N'] each in the order's rows: from `start`,
    combine(sums, table [p, v]) for tile after tile of logits; LEAST at the excluded tokens."""
    rows = [_padded(a[order.position], tile.positions) for a in (hidden, excluded)]

    def token_block(carry, part):
        def body(i, carry):
            hidden, excluded = (_block(a, i, tile.positions) for a in rows)
            table = jnp.maximum(part.logits(hidden), LEAST)
            table = jnp.where(part.tokens == excluded[:, None], LEAST, table)
            sums = combine(tuple(_block(a, i, tile.positions) for a in carry), table)
            return jax.tree.map(lambda a, b: _with_block(a, b, i), carry, sums)

        return jax.lax.fori_loop(0, -(-order.count // tile.positions), body, carry)

    sums = tuple(jnp.full(rows[0].shape[0], value) for value in start)
    return _scan_tokens(token_block, sums, tile, weight, bias)


def _max_and_sum(table):
    """Of [p, v]: the largest of each row, and the sum of exp(entry - it)."""

    def in_two_passes(table):
        top = table.max(axis=-1)
        return top, jnp.exp(table - top[:, None]).sum(axis=-1)

    def in_one_pass(table):  # for a GPU, whose passes cost what reading the table takes
        def combine(a, b):
            top = jnp.maximum(a[0], b[0])
            return top, a[1] * jnp.exp(a[0] - top) + b[1] * jnp.exp(b[0] - top)

        start = jnp.float32(LEAST), jnp.float32(0.0)
        # A row in 8 parts, if it divides: XLA would cut a long one into too many.
        parts = table.reshape(table.shape[0], 8 if table.shape[1] % 8 == 0 else 1, -1)
        parts = jax.lax.reduce((parts, jnp.ones_like(parts)), start, combine, (2,))
        return jax.lax.reduce(parts, start, combine, (1,))

    return jax.lax.platform_dependent(
        table, cuda=in_one_pass, rocm=in_one_pass, default=in_two_passes
    )


def _backward(tile, saved, cotangents):
    """With p = exp(logit - log_total) of the tokens that are not excluded:

    d_logit = d_total p + d_pick 1{token = target}
    """
    hidden, weight, bias, excluded, targets, order, log_total = saved
    arrays = (hidden, excluded, targets, *cotangents)
    rows = [_padded(a[order.position], tile.positions) for a in arrays]
    rows.append(log_total)

    def token_block(carry, part):
        d_hidden, d_weight, d_bias = carry

        def body(i, carry):
            d_hidden, d_part, d_bias = carry
            block = (_block(a, i, tile.positions) for a in rows)
            hidden, excluded, targets, d_total, d_pick, log_total = block
            p = jnp.exp(part.logits(hidden) - log_total[:, None])
            is_other = part.is_new & (part.tokens != excluded[:, None])
            is_target = part.is_new & (part.tokens == targets[:, None])
            d_logits = jnp.where(is_other, p * d_total[:, None], 0.0)
            d_logits += jnp.where(is_target, d_pick[:, None], 0.0)
            # The barrier has d_logits written once, in hidden's dtype, and not once for each use.
            d_logits = jax.lax.optimization_barrier(d_logits.astype(hidden.dtype))
            d_bias += d_logits.sum(axis=0, dtype=jnp.float32)
            if d_logits.dtype == jnp.float32:
                d_part += einsum("pv,pc->vc", d_logits, hidden)
            else:
                d_part += einsum("vp,pc->vc", transposed(d_logits), hidden)
            d_block = _block(d_hidden, i, tile.positions)
            d_block += einsum("pv,vc->pc", d_logits, part.weight)
            return _with_block(d_hidden, d_block, i), d_part, d_bias

        zeros = jnp.zeros(part.weight.shape), jnp.zeros(part.bias.shape)
        d_hidden, *d_head = jax.lax.fori_loop(
            0, -(-order.count // tile.positions), body, (d_hidden, *zeros)
        )
        return d_hidden, part.written(d_weight, d_head[0]), part.written(d_bias, d_head[1])

    start = jnp.zeros(rows[0].shape), jnp.zeros(weight.shape), jnp.zeros(bias.shape)
    d_hidden, d_weight, d_bias = _scan_tokens(
        token_block, start, tile, weight.astype(hidden.dtype), bias
    )
    d_hidden = d_hidden[order.rank].astype(hidden.dtype)
    return d_hidden, d_weight, d_bias, None, None, None


_total_and_pick.defvjp(_forward, _backward)


# --- blocks of tokens and of positions


def _fitted(tile: Tile, count: int, vocab: int) -> Tile:
    """The tile for count positions and vocab tokens: no larger, with little of the last one empty;
    as many logits, where the vocabulary is small."""
    tokens = -(-vocab // -(-vocab // tile.tokens))
    if tokens < vocab:
        tokens = -(-tokens // 128) * 128
    positions = tile.positions * max(1, tile.tokens // tokens)
    return Tile(min(positions, count), tokens)


class _TokenBlock(NamedTuple):
    """A block of tokens. The last one ends with the vocabulary and so overlaps the one before it:
    the tokens that it shares are not new."""

    weight: jax.Array  # [v, C]
    bias: jax.Array  # [v]
    tokens: jax.Array  # int32 [v]
    is_new: jax.Array  # bool [v]

    def logits(self, hidden):
        """Of [p, C], float32 [p, v]; -inf where not new."""
        return logits(hidden, self.weight, jnp.where(self.is_new, self.bias, -jnp.inf))

    def written(self, whole, part):
        """whole [V, ...] with part as the rows of this block."""
        return jax.lax.dynamic_update_slice_in_dim(whole, part, self.tokens[0], 0)


def _scan_tokens(token_block: Callable, carry, tile: Tile, weight: jax.Array, bias: jax.Array):
    """token_block(carry, _TokenBlock) -> carry over the vocabulary.

    Iterates in reverse so that the overlapping last block is overwritten by the one before it.
    """
    vocab = weight.shape[0]
    if tile.tokens >= vocab:  # no loop, and no copy of the weights
        tokens = jnp.arange(vocab)
        return token_block(carry, _TokenBlock(weight, bias, tokens, tokens >= 0))

    def body(carry, begin):
        start = jnp.minimum(begin, vocab - tile.tokens)
        part = (jax.lax.dynamic_slice_in_dim(a, start, tile.tokens) for a in (weight, bias))
        tokens = start + jnp.arange(tile.tokens)
        return token_block(carry, _TokenBlock(*part, tokens, tokens >= begin)), None

    begins = jnp.arange(0, vocab, tile.tokens, dtype=jnp.int32)[::-1]
    return jax.lax.scan(body, carry, begins)[0]


def _padded(a: jax.Array, size: int) -> jax.Array:
    """a [N, ...] with rows added up to a multiple of size."""
    # Not len(a): what jax 0.7.2 saves of a constant for the gradient has none.
    return jnp.pad(a, [(0, -a.shape[0] % size)] + [(0, 0)] * (a.ndim - 1))


def _block(a: jax.Array, i: jax.Array, size: int) -> jax.Array:
    """The i-th block of size rows."""
    return jax.lax.dynamic_slice_in_dim(a, i * size, size)


def _with_block(a: jax.Array, rows: jax.Array, i: jax.Array) -> jax.Array:
    """a with these rows as its i-th block."""
    return jax.lax.dynamic_update_slice_in_dim(a, rows, i * rows.shape[0], 0)
