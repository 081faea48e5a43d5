"""Score Entropy Discrete Diffusion (Lou, Meng, Ermon, ICML 2024) in JAX."""

import importlib

__version__ = "0.1.0"
_HOMES = {"SEDD": "model", "State": "trajectory", "load": "pretrained", "show": "trajectory"}
__all__ = list(_HOMES)


def __getattr__(name):
    # Nothing heavy at import: the API comes with its first use.
    if name in _HOMES:
        return getattr(importlib.import_module(f"sedd_jax.inference.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'sedd_jax' has no attribute {name!r}")
