"""The reductions over the vocabulary that training, the bound and sampling need. Imports jax only.

They answer from the last hidden state, a tile of positions and tokens at a time: the [B, L, V] table
of logits never exists, forward or backward, and no tile is made for a position that nobody asks
for. The positions asked for are put first, and the loop over them ends where they do: what is spent
follows their number, exactly and without a capacity that could be too small.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sedd_jax.kernels import HEAD, choose, for_platform
from sedd_jax.kernels.cpu import transposed
from sedd_jax.kernels.matmul import einsum


class Tile(NamedTuple):
    """What one turn of the loops makes logits for."""

    positions: int
    tokens: int


# On a CPU a tile's logits fit into the cache, and little is wasted on a last tile that is not full.
# An accelerator wants fewer and larger products.
TILES = {"cpu": Tile(96, 12_672), "gpu": Tile(2048, 8192), "tpu": Tile(2048, 8192)}
# Logits of one block of draws, whole rows. A step of the sampler draws few tokens, which a CPU
# would notice.
DRAWN_LOGITS = {"cpu": 2**20, "gpu": 2**22, "tpu": 2**22}
# Fewer logits than this are made at once, without sorting positions.
SMALL = 2**18


def logits(hidden: jax.Array, weight: jax.Array, bias: jax.Array) -> jax.Array:
    """hidden [..., C] times weight [V, C] plus bias [V], accumulated in float32, [..., V]."""
    return einsum("...c,vc->...v", hidden, weight.astype(hidden.dtype)) + bias


def total_and_pick(
    hidden: jax.Array,
    weight: jax.Array,
    bias: jax.Array,
    excluded: jax.Array,
    targets: jax.Array,
    where: jax.Array | None = None,
    *,
    implementation: str | None = None,
    platform: str | None = None,
    tile: Tile | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Log-sum-exp of the logits but the excluded one, and the logit at targets; float32 [B, L].

    hidden [B, L, C]; weight [V, C] and bias [V] float32; excluded and targets int32 [B, L]. An
    excluded id outside [0, V) excludes nothing. where, bool [B, L], says which positions are asked
    for: elsewhere both are 0 and nothing is spent. None: all of them. The products are of hidden's
    dtype and summed in float32, and so are the gradients of weight and bias.

    implementation is xla or triton, by default the platform's; platform that of the devices, by
    default jax's own; tile the size of the xla form's tiles, for tests.
    """
    platform = platform or jax.default_backend()
    shape, vocab = excluded.shape, weight.shape[0]
    count = excluded.size
    name = choose(HEAD, implementation, platform)
    form = FORMS[name](platform, tile, count, vocab)
    at_once = where is None or (count * vocab <= SMALL and name == "xla")
    asked = None if at_once else _asked_first(where.reshape(-1))
    flat = (hidden.reshape(count, -1), weight, bias, excluded.reshape(-1), targets.reshape(-1))
    found = _reduced(form, *flat, asked)
    total, pick = (a.reshape(shape) for a in found)
    if where is None:
        return total, pick
    return jnp.where(where, total, 0.0), jnp.where(where, pick, 0.0)


def draw(
    keys: jax.Array,
    hidden: jax.Array,
    weight: jax.Array,
    bias: jax.Array,
    excluded: jax.Array,
    where: jax.Array | None = None,
    *,
    categorical: Callable[[jax.Array, jax.Array], jax.Array],
    platform: str | None = None,
    block: int | None = None,
) -> jax.Array:
    """A token in proportion to exp(logit), never the excluded one, int32 [B, L]; 0 outside where.

    categorical(key, log_weights [V]) draws one token, as diffusion.draws.categorical does.

    keys has one for each row, [B], and the noise of a position is keyed by its place: a draw
    depends neither on the block size (of positions, for tests) nor on what else is drawn. platform
    is that of the devices, by default jax's own.
    """
    batch, length = excluded.shape
    vocab = weight.shape[0]
    where = jnp.ones(excluded.shape, bool) if where is None else where
    asked = _asked_first(where.reshape(-1))
    most = for_platform(DRAWN_LOGITS, platform or jax.default_backend())
    size = block or max(1, min(batch * length, most // vocab))
    order = _padded(asked.order, size)
    flat = hidden.reshape(batch * length, -1)

    def one(key, place, row):
        return categorical(jax.random.fold_in(key, place), row)

    def turn(i, drawn):
        index = jax.lax.dynamic_slice_in_dim(order, i * size, size)
        table = logits(flat[index], weight, bias)
        others = jnp.arange(vocab) != excluded.reshape(-1)[index, None]
        table = jnp.where(others, table, -jnp.inf)
        tokens = jax.vmap(one)(keys[index // length], index % length, table)
        return jax.lax.dynamic_update_slice_in_dim(drawn, tokens, i * size, 0)

    drawn = jnp.zeros(order.shape, jnp.int32)
    drawn = jax.lax.fori_loop(0, -(-asked.count // size), turn, drawn)
    return jnp.where(where, drawn[asked.place].reshape(where.shape), 0)


# --- the positions asked for


class _Asked(NamedTuple):
    """N positions, those asked for first."""

    order: jax.Array  # int32 [N]: the position at each place
    place: jax.Array  # int32 [N]: the place of each position
    count: jax.Array  # int32 []: asked for


def _asked_first(where: jax.Array) -> _Asked:
    """Of bool [N]; the order among them is kept."""
    before = jnp.cumsum(where, dtype=jnp.int32)
    count = before[-1]
    index = jnp.arange(where.shape[0], dtype=jnp.int32)
    place = jnp.where(where, before - 1, count + index - before)
    order = jnp.zeros_like(index).at[place].set(index, unique_indices=True)
    return _Asked(order, place, count)


def _padded(a: jax.Array, size: int) -> jax.Array:
    """a [N, ...] with rows added up to a multiple of size."""
    # Not len(a): what jax 0.7.2 keeps of a constant for the gradient has none.
    return jnp.pad(a, [(0, -a.shape[0] % size)] + [(0, 0)] * (a.ndim - 1))


# --- the reduction, and its gradient


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _reduced(form, hidden, weight, bias, excluded, targets, asked):
    """total and pick [N] of hidden [N, C]; 0 for what is not asked for."""
    return _forward(form, hidden, weight, bias, excluded, targets, asked)[0]


def _forward(form, hidden, weight, bias, excluded, targets, asked):
    rows, count = _sorted((hidden, excluded, targets), asked)
    hidden_rows, *ids = rows
    cast = weight.astype(hidden.dtype)
    total, pick = form.forward(hidden_rows, cast, bias, *ids, count)
    kept = (hidden, weight, bias, excluded, targets, asked, total)
    if asked is not None:
        total, pick = total[asked.place], pick[asked.place]
    return (total, pick), kept


def _backward(form, kept, slopes):
    hidden, weight, bias, excluded, targets, asked, total = kept
    rows, count = _sorted((hidden, excluded, targets, *slopes), asked)
    hidden_rows, excluded, targets, *slopes = rows
    cast = weight.astype(hidden.dtype)
    d_hidden, d_weight, d_bias = form.backward(
        hidden_rows, cast, bias, excluded, targets, count, total, *slopes
    )
    if asked is not None:
        d_hidden = d_hidden[asked.place]
    return d_hidden.astype(hidden.dtype), d_weight, d_bias, None, None, None


_reduced.defvjp(_forward, _backward)


def _sorted(arrays, asked: _Asked | None):
    """The rows of each array in the order of asked, and how many of them are asked for."""
    if asked is None:
        return arrays, jnp.int32(arrays[0].shape[0])
    return tuple(a[asked.order] for a in arrays), asked.count


# --- the form in plain XLA


def _fitted(tile: Tile, count: int, vocab: int) -> Tile:
    """The tile for count positions and vocab tokens: no larger, with little of the last one empty;
    as many logits, where the vocabulary is small."""
    tokens = -(-vocab // -(-vocab // tile.tokens))
    if tokens < vocab:
        tokens = -(-tokens // 128) * 128
    positions = max(tile.positions, tile.positions * tile.tokens // tokens)
    return Tile(min(positions, count), tokens)


@dataclasses.dataclass(frozen=True)
class Xla:
    """A scan over blocks of tokens, and in it a loop over blocks of positions, in plain JAX.

    A block of the weights is cut out once, and its gradient written once.
    """

    tile: Tile

    @classmethod
    def make(cls, platform: str, tile: Tile | None, count: int, vocab: int) -> "Xla":
        return cls(tile or _fitted(for_platform(TILES, platform), count, vocab))

    def forward(self, hidden, weight, bias, excluded, targets, count):
        tile = self.tile
        rows = tuple(_padded(a, tile.positions) for a in (hidden, excluded, targets))

        def block(carry, part):
            def turn(i, carry):
                hidden, excluded, targets = _cut(rows, i, tile.positions)
                most, total, pick = _cut(carry, i, tile.positions)
                table = part.logits(hidden)
                others = jnp.where(part.tokens != excluded[:, None], table, -jnp.inf)
                higher = jnp.maximum(most, others.max(axis=-1))
                total = total * jnp.exp(most - higher)
                total += jnp.exp(others - higher[:, None]).sum(axis=-1)
                here, found = part.pick(table, targets)
                pick = jnp.where(here, found, pick)
                return _put(carry, (higher, total, pick), i, tile.positions)

            return jax.lax.fori_loop(0, -(-count // tile.positions), turn, carry)

        length = rows[0].shape[0]
        # The least number and not -inf, whose difference from itself is not a number.
        least = jnp.full(length, jnp.finfo(jnp.float32).min)
        nothing = (least, jnp.zeros(length), jnp.zeros(length))
        most, total, pick = _scan_tokens(block, nothing, tile, weight, bias)
        is_asked = jnp.arange(length) < count
        total = jnp.where(is_asked, most + jnp.log(jnp.where(is_asked, total, 1.0)), 0.0)
        pick = jnp.where(is_asked, pick, 0.0)
        return total[: hidden.shape[0]], pick[: hidden.shape[0]]

    def backward(self, hidden, weight, bias, excluded, targets, count, total, d_total, d_pick):
        tile = self.tile
        whole = (hidden, excluded, targets, total, d_total, d_pick)
        rows = tuple(_padded(a, tile.positions) for a in whole)

        def block(carry, part):
            d_hidden, d_weight, d_bias = carry

            def turn(i, carry):
                d_hidden, d_part, d_bias = carry
                hidden, excluded, targets, total, d_total, d_pick = _cut(rows, i, tile.positions)
                is_asked = (i * tile.positions + jnp.arange(tile.positions)) < count
                # What is not asked for has no total: its share may be infinite.
                counted = part.is_new & is_asked[:, None]
                share = jnp.exp(part.logits(hidden) - total[:, None])
                others = counted & (part.tokens != excluded[:, None])
                slope = jnp.where(others, share * d_total[:, None], 0.0)
                picked = counted & (part.tokens == targets[:, None])
                slope += jnp.where(picked, d_pick[:, None], 0.0)
                d_bias += slope.sum(axis=0)
                slope = slope.astype(hidden.dtype)
                if slope.dtype == jnp.float32:
                    d_part += einsum("pv,pc->vc", slope, hidden)
                else:
                    d_part += einsum("vp,pc->vc", transposed(slope), hidden)
                (mine,) = _cut((d_hidden,), i, tile.positions)
                mine += einsum("pv,vc->pc", slope, part.weight)
                (d_hidden,) = _put((d_hidden,), (mine,), i, tile.positions)
                return d_hidden, d_part, d_bias

            nothing = jnp.zeros(part.weight.shape), jnp.zeros(part.bias.shape)
            blocks = -(-count // tile.positions)
            d_hidden, *found = jax.lax.fori_loop(0, blocks, turn, (d_hidden, *nothing))
            return d_hidden, *map(part.put, (d_weight, d_bias), found)

        nothing = jnp.zeros(rows[0].shape), jnp.zeros(weight.shape), jnp.zeros(bias.shape)
        d_hidden, d_weight, d_bias = _scan_tokens(block, nothing, tile, weight, bias)
        return d_hidden[: hidden.shape[0]], d_weight, d_bias


class _Part(NamedTuple):
    """A block of tokens. That of the rest begins where it ends with the vocabulary: what is in the
    block before it too is not new."""

    weight: jax.Array  # [v, C]
    bias: jax.Array  # [v]
    tokens: jax.Array  # int32 [v]
    is_new: jax.Array  # bool [v]

    def logits(self, hidden):
        """Of [p, C], float32 [p, v]; -inf where not new."""
        return logits(hidden, self.weight, jnp.where(self.is_new, self.bias, -jnp.inf))

    def pick(self, table, targets):
        """Whether each target is here, and its logit, [p] each."""
        column = targets - self.tokens[0]
        inside = jnp.clip(column, 0, self.tokens.shape[0] - 1)
        found = jnp.take_along_axis(table, inside[:, None], axis=-1)[:, 0]
        return (column == inside) & self.is_new[inside], found

    def put(self, whole, mine):
        """whole [V, ...] with this block's rows."""
        return jax.lax.dynamic_update_slice_in_dim(whole, mine, self.tokens[0], 0)


def _scan_tokens(block: Callable, carry, tile: Tile, weight, bias):
    """block(carry, _Part) over the vocabulary, last block first: where it overlaps with the one
    before it, that one has the last word."""
    vocab = weight.shape[0]
    if tile.tokens >= vocab:  # no loop, and no copy of the weights
        tokens = jnp.arange(vocab)
        return block(carry, _Part(weight, bias, tokens, tokens >= 0))
    begins = [*range(0, vocab, tile.tokens)][::-1]

    def turn(carry, begin):
        start = jnp.minimum(begin, vocab - tile.tokens)
        cut = (jax.lax.dynamic_slice_in_dim(a, start, tile.tokens) for a in (weight, bias))
        tokens = start + jnp.arange(tile.tokens)
        return block(carry, _Part(*cut, tokens, tokens >= begin)), None

    return jax.lax.scan(turn, carry, jnp.asarray(begins, jnp.int32))[0]


def _cut(arrays, i, size):
    return tuple(jax.lax.dynamic_slice_in_dim(a, i * size, size) for a in arrays)


def _put(arrays, parts, i, size):
    return tuple(
        jax.lax.dynamic_update_slice_in_dim(a, part, i * size, 0)
        for a, part in zip(arrays, parts, strict=True)
    )


# --- the form of GPU kernels


@dataclasses.dataclass(frozen=True)
class Triton:
    """vocab_reduce_gpu, in a module of its own; interpreted on a CPU."""

    interpret: bool

    @classmethod
    def make(cls, platform: str, tile: Tile | None, count: int, vocab: int) -> "Triton":
        if platform == "tpu":
            raise ValueError("head 'triton' is for GPUs; use 'auto' or 'xla' on a TPU")
        return cls(interpret=platform == "cpu")

    def forward(self, *rows):
        from sedd_jax.kernels import vocab_reduce_gpu

        return vocab_reduce_gpu.forward(*rows, interpret=self.interpret)

    def backward(self, *rows):
        from sedd_jax.kernels import vocab_reduce_gpu

        return vocab_reduce_gpu.backward(*rows, interpret=self.interpret)


FORMS = {"xla": Xla.make, "triton": Triton.make}
