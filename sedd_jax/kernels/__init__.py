"""Array kernels that know no graph: matmuls, attention, and the reductions over the vocabulary.

Attention has several implementations behind one function; `choose` picks one by name, or else the
default of the devices' platform. A platform is a string, as `jax.default_backend()` returns it.
"""

from collections.abc import Mapping
from typing import Any

# The default implementation on each platform; xla, plain JAX, runs everywhere.
ATTENTION = {"cpu": "xla", "gpu": "cudnn", "tpu": "splash"}


def for_platform(forms: Mapping[str, Any], platform: str) -> Any:
    """The entry of forms for a platform; CUDA and ROCm are both "gpu"."""
    return forms["gpu" if platform in ("cuda", "rocm") else platform]


def choose(defaults: Mapping[str, str], name: str | None, platform: str) -> str:
    """name, or the default of the platform where name is None or "auto"."""
    return for_platform(defaults, platform) if name in (None, "auto") else name
