"""Array kernels that know no graph: products, attention, and the reductions over the vocabulary.

Attention and the reductions have several forms behind one function. `choose` picks one: the form
that is named, or the one that suits the platform of the devices, as jax names it.
"""

from collections.abc import Mapping

# What each platform takes where nothing is named; xla, plain JAX, runs everywhere.
ATTENTION = {"cpu": "xla", "gpu": "cudnn", "tpu": "splash"}
HEAD = {"cpu": "xla", "gpu": "xla", "tpu": "xla"}


def choose(forms: Mapping[str, str], named: str | None, platform: str) -> str:
    """The name of the form to use; named is None or "auto" for the platform's own."""
    if named not in (None, "auto"):
        return named
    return forms["gpu" if platform in ("cuda", "rocm") else platform]
