"""Array kernels that know no graph: products, attention, and the reductions over the vocabulary.

Attention has several forms behind one function. `choose` picks one: the form that is named, or the
one that suits the platform of the devices, as jax names it.
"""

from collections.abc import Mapping
from typing import Any

# What each platform takes where nothing is named; xla, plain JAX, runs everywhere.
ATTENTION = {"cpu": "xla", "gpu": "cudnn", "tpu": "splash"}


def for_platform(forms: Mapping[str, Any], platform: str) -> Any:
    """What the platform of the devices, as jax names it, has in forms."""
    return forms["gpu" if platform in ("cuda", "rocm") else platform]


def choose(forms: Mapping[str, str], named: str | None, platform: str) -> str:
    """The name of the form to use; named is None or "auto" for the platform's own."""
    return for_platform(forms, platform) if named in (None, "auto") else named
