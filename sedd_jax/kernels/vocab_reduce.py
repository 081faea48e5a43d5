"""The two reductions over the vocabulary that training and sampling need. Imports jax only.

Both answer from the last hidden state, a block of positions at a time, so that the [B, L, V] table
of logits never exists, forward or backward: a block's logits are made, reduced and dropped, and
made again for its gradient. Blocks run along L, so a batch sharded over devices stays where it is.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from sedd_jax.kernels import precision

# Elements of one block of logits on a device: 64 MiB of float32.
BLOCK_ELEMENTS = 2**24


def logits(hidden: jax.Array, weight: jax.Array, bias: jax.Array) -> jax.Array:
    """hidden [..., C] times weight [V, C] plus bias [V], accumulated in float32, [..., V]."""

    def product(hidden, weight):
        return jnp.einsum(
            "...c,vc->...v",
            hidden,
            weight,
            precision=precision(hidden.dtype),
            preferred_element_type=jnp.float32,
        )

    def widened(hidden, weight):
        # The same sums: float32 holds products of bfloat16 exactly. The CPU runtime of jax 0.7.2
        # cannot add them up in float32 by itself.
        return product(hidden.astype(jnp.float32), weight.astype(jnp.float32))

    weight = weight.astype(hidden.dtype)
    return jax.lax.platform_dependent(hidden, weight, cpu=widened, default=product) + bias


def _exclude(table: jax.Array, excluded: jax.Array) -> jax.Array:
    """table [B, l, V] with -inf at the excluded token of each position, int32 [B, l]."""
    tokens = jnp.arange(table.shape[-1])
    return jnp.where(tokens == excluded[..., None], -jnp.inf, table)


def total_and_pick(
    hidden: jax.Array,
    weight: jax.Array,
    bias: jax.Array,
    excluded: jax.Array,
    targets: jax.Array,
    block_elements: int = BLOCK_ELEMENTS,
) -> tuple[jax.Array, jax.Array]:
    """Log-sum-exp of the logits but the excluded one, and the logit at targets; float32 [B, L].

    hidden [B, L, C], weight [V, C], bias [V]; excluded and targets int32 [B, L]. An excluded id
    outside [0, V) excludes nothing.
    """

    def block(hidden, excluded, targets):
        table = logits(hidden, weight, bias)
        pick = jnp.take_along_axis(table, targets[..., None], axis=-1)[..., 0]
        return jax.nn.logsumexp(_exclude(table, excluded), axis=-1), pick

    return _over_blocks(block, block_elements, weight.shape[0], hidden, excluded, targets)


def total_and_draw(
    keys: jax.Array,
    hidden: jax.Array,
    weight: jax.Array,
    bias: jax.Array,
    excluded: jax.Array,
    block_elements: int = BLOCK_ELEMENTS,
) -> tuple[jax.Array, jax.Array]:
    """The same log-sum-exp, and a token drawn in proportion to exp(logit); [B, L] each.

    keys has one for each row, [B], and the noise of a position is keyed by its place: the draw
    depends neither on the block size nor on the other rows.
    """

    def draw(key, position, row):
        # mode="high": exact for tokens far below 2^-23 of the most likely one.
        return jax.random.categorical(jax.random.fold_in(key, position), row, mode="high")

    def block(hidden, excluded, position):
        others = _exclude(logits(hidden, weight, bias), excluded)
        token = jax.vmap(jax.vmap(draw, (None, 0, 0)))(keys, position, others)
        return jax.nn.logsumexp(others, axis=-1), token.astype(jnp.int32)

    position = jnp.broadcast_to(jnp.arange(hidden.shape[1]), hidden.shape[:2])
    return _over_blocks(block, block_elements, weight.shape[0], hidden, excluded, position)


def _over_blocks(block: Callable, block_elements: int, vocab: int, *arrays: jax.Array):
    """block over slices along axis 1 of arrays [B, L, ...] whose logits fit into block_elements."""
    batch, length = arrays[0].shape[:2]
    size = max(1, block_elements // (batch * vocab))
    if size >= length:
        return block(*arrays)
    # Blocks of one size if up to twice as many make that possible: a rest is a second program, and
    # on several devices a second sum of the head's gradient.
    least = -(-length // size)
    size = next((length // n for n in range(least, 2 * least + 1) if length % n == 0), size)
    whole = length // size * size

    def split(a):
        return a[:, :whole].reshape(batch, whole // size, size, *a.shape[2:]).swapaxes(0, 1)

    remade = jax.checkpoint(block)
    out = jax.lax.map(lambda parts: remade(*parts), tuple(map(split, arrays)))
    out = jax.tree.map(lambda a: a.swapaxes(0, 1).reshape(batch, whole), out)
    if whole == length:
        return out
    rest = remade(*(a[:, whole:] for a in arrays))
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), out, rest)
