"""Grids: the times of a sample's reverse steps, from 1 down to t_min. Imports jax only.

A new grid is a function like `uniform_grid` and a line in GRIDS.
"""

import jax
import jax.numpy as jnp


def uniform_grid(i: jax.Array, steps: jax.Array, t_min: float) -> jax.Array:
    """The time before step i of `steps`, from 1 down to t_min: steps of one length."""
    return 1.0 - i * ((1.0 - t_min) / steps)


def cosine_grid(i: jax.Array, steps: jax.Array, t_min: float) -> jax.Array:
    """Short steps near t = 1, where little is known yet and tokens drawn together fit badly, and
    longer ones later (Shi et al. 2024, MD4)."""
    return t_min + (1.0 - t_min) * jnp.cos(0.5 * jnp.pi * i / steps)


def fitted_grid(times: jax.Array, i: jax.Array, steps: jax.Array, t_min: float) -> jax.Array:
    """times[i], float32 [N]; of N steps and more, times between them at even distances.

    Not one of GRIDS: the times are a model's, of inference/curve.py.
    """
    del t_min  # the last of them
    last = len(times) - 1
    return jnp.interp(i * jnp.minimum(1.0, last / steps), jnp.arange(last + 1.0), times)


GRIDS = {"uniform": uniform_grid, "cosine": cosine_grid}
