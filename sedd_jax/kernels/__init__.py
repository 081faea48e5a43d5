"""Array kernels that know no graph: attention and the reductions over the vocabulary.

Each has several forms behind one function, and `choose` picks one by the platform of the devices.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

Precision = jax.lax.Precision

# What a platform takes, as jax names it, if no form is asked for.
HEADS = {"cpu": "xla", "gpu": "xla", "tpu": "xla"}


def choose(forms: Mapping[str, str], requested: str | None, platform: str) -> str:
    """The form that is requested, or the platform's own."""
    return requested or forms[_NAMES.get(platform, platform)]


_NAMES = {"cuda": "gpu", "rocm": "gpu"}


def precision(dtype: jnp.dtype) -> Precision | None:
    """HIGHEST for float32, whose default is bfloat16 passes on TPU and TF32 on NVIDIA GPUs."""
    return Precision.HIGHEST if dtype == jnp.float32 else None


def product(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """einsum of a and b, of one dtype, summed in float32, float32."""

    def plain(a, b):
        kind = {"precision": precision(a.dtype), "preferred_element_type": jnp.float32}
        return jnp.einsum(spec, a, b, **kind)

    def widened(a, b):  # the same sums: float32 holds products of bfloat16 exactly
        return plain(a.astype(jnp.float32), b.astype(jnp.float32))

    if a.dtype == jnp.float32 or jax.__version_info__ >= (0, 8):
        return plain(a, b)
    # The CPU runtime of jax 0.7.2 cannot add up products of bfloat16 in float32 by itself.
    return jax.lax.platform_dependent(a, b, cpu=widened, default=plain)
