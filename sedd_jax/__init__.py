"""Score Entropy Discrete Diffusion (Lou, Meng, Ermon, ICML 2024) in JAX."""

__version__ = "0.1.0"
__all__ = ["SEDD", "load"]


def __getattr__(name):
    # Nothing heavy at import: the API comes with its first use.
    if name in __all__:
        from sedd_jax import api

        return getattr(api, name)
    raise AttributeError(f"module 'sedd_jax' has no attribute {name!r}")
