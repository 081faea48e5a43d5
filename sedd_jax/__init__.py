"""Score Entropy Discrete Diffusion (Lou, Meng, Ermon, ICML 2024) in JAX."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # for type checkers and editors alone: these load jax
    from sedd_jax.diffusion.likelihood import Bound as Bound
    from sedd_jax.inference.bounds import CorpusBound as CorpusBound
    from sedd_jax.inference.bounds import LogRatio as LogRatio
    from sedd_jax.inference.model import SEDD as SEDD
    from sedd_jax.inference.options import CallOptions as CallOptions
    from sedd_jax.inference.options import SamplingOptions as SamplingOptions
    from sedd_jax.inference.pretrained import load as load
    from sedd_jax.inference.sampling import Sampling as Sampling
    from sedd_jax.inference.trajectory import Animation as Animation
    from sedd_jax.inference.trajectory import State as State
    from sedd_jax.inference.trajectory import show as show
    from sedd_jax.registry import register as register

__version__ = "0.1.0"
_HOMES = {  # the same at run time, each imported at its first use
    "Animation": "inference.trajectory",
    "Bound": "diffusion.likelihood",
    "CallOptions": "inference.options",
    "CorpusBound": "inference.bounds",
    "LogRatio": "inference.bounds",
    "SEDD": "inference.model",
    "Sampling": "inference.sampling",
    "SamplingOptions": "inference.options",
    "State": "inference.trajectory",
    "load": "inference.pretrained",
    "register": "registry",
    "show": "inference.trajectory",
}
__all__ = list(_HOMES)


def __getattr__(name: str):
    import importlib

    if name in _HOMES:
        return getattr(importlib.import_module(f"sedd_jax.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'sedd_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__} - {"TYPE_CHECKING"})
