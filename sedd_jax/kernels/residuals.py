"""What the forward pass keeps for the backward pass. Imports jax only."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def packed(a: jax.Array, platform: str) -> jax.Array:
    """a as it is kept: on a CPU the bits of bfloat16, uint16.

    XLA's loops on a CPU stack bfloat16, take it apart and transpose it as float32.
    """
    if platform == "cpu" and a.dtype == jnp.bfloat16:
        return jax.lax.bitcast_convert_type(a, jnp.uint16)
    return a


def unpacked(a: jax.Array) -> jax.Array:
    """What `packed` was given."""
    return jax.lax.bitcast_convert_type(a, jnp.bfloat16) if a.dtype == jnp.uint16 else a


def remade(fn: Callable, platform: str) -> Callable:
    """fn of trees of arrays, which alone are kept, packed; the rest is made again.

    For what costs little beside the products, and for a product of it, whose own result is not
    needed for its gradient and so not made again. platform is that of the devices.
    """

    @jax.custom_vjp
    def found(*arrays):
        return fn(*arrays)

    def forward(*arrays):
        return fn(*arrays), jax.tree.map(lambda a: packed(a, platform), arrays)

    def backward(kept, slope):
        return jax.vjp(fn, *jax.tree.map(unpacked, kept))[1](slope)

    found.defvjp(forward, backward)
    return found
