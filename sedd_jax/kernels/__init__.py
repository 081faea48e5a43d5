"""Array kernels that know no graph: attention and the reductions over the vocabulary."""

import jax
import jax.numpy as jnp

Precision = jax.lax.Precision


def precision(dtype: jnp.dtype) -> Precision | None:
    """HIGHEST for float32, whose default is bfloat16 passes on TPU and TF32 on NVIDIA GPUs."""
    return Precision.HIGHEST if dtype == jnp.float32 else None
