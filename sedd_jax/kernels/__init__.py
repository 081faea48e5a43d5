"""Array kernels that know no graph: matmuls, attention, and the reductions over the vocabulary.

A platform is a string, as `jax.default_backend()` returns it.
"""

from collections.abc import Mapping
from typing import Any


def for_platform(table: Mapping[str, Any], platform: str) -> Any:
    """The entry of the table for a platform; CUDA and ROCm are both "gpu". ValueError for one
    that is not in it."""
    name = "gpu" if platform in ("cuda", "rocm") else platform
    if name not in table:
        raise ValueError(
            f"jax's platform {platform!r} is not one of {', '.join(table)}; set JAX_PLATFORMS=cpu"
        )
    return table[name]
