"""The keyword arguments of calls that sample: for type checkers, for help() and as one object.

`Sampling` and `Call` are what is read; the TypedDicts say the same to type checkers, which need it
in writing, and tests/test_public_api.py keeps the two equal.
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Self, TypedDict, TypeVar, get_args, get_type_hints

from sedd_jax.inference.sampling import Sampling, check_names, check_whole
from sedd_jax.inference.trajectory import State

Method = TypeVar("Method", bound=Callable[..., Any])
OnStep = Callable[[State], object]  # called with the state of noise and that after each step
NONE = "An option of these that is None is as in the model's own, `SEDD.sampling`."


class SamplingOptions(TypedDict, total=False):
    """The fields of `Sampling`, which documents them; None: as in the model's own options."""

    steps: int | None
    predictor: str | Callable[..., Any] | None
    draw: str | Callable[..., Any] | None
    grid: str | Callable[..., Any] | None
    t_min: float | None
    theta: float | None
    eta: float | None
    kappa: float | None
    gamma: float | None
    threshold: float | None
    normalised: bool | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    greedy: bool | None
    parameters: Mapping[str, Any] | None


class CallOptions(SamplingOptions, total=False):
    """Those, and the fields of `Call`, which documents them."""

    batch_size: int
    seed: int
    progress: bool


@dataclasses.dataclass(frozen=True)
class Call:
    """How one call draws its samples.

    batch_size: how many are drawn at once.
    seed: of the noise, in [0, 2**32); a sample depends on it and on its own number alone.
    progress: whether to show a bar of steps.
    """

    sampling: Sampling
    batch_size: int = 16
    seed: int = 0
    progress: bool = False

    def __post_init__(self):
        check_whole("batch_size", self.batch_size, 1)
        check_whole("seed", self.seed, 0, 2**32 - 1)

    @classmethod
    def of(cls, chosen: Callable[..., Sampling], options: Mapping[str, Any]) -> Self:
        """From CallOptions, of which chosen(**SamplingOptions) takes its part."""
        check_names(options, CallOptions.__annotations__)
        ours = options.keys() & {field.name for field in dataclasses.fields(cls)[1:]}
        others = {name: value for name, value in options.items() if name not in ours}
        return cls(chosen(**others), **{name: options[name] for name in ours})


def shows_options(method: Method) -> Method:
    """The method with its **options, one of the TypedDicts, spelled out in signature and docs.

    inspect, help() and notebooks read these; type checkers read the TypedDict.
    """
    signature = inspect.signature(method)
    *parameters, options = signature.parameters.values()
    (kind,) = get_args(options.annotation)  # of Unpack[kind]
    hints = get_type_hints(kind)
    defaults = {f.name: f.default for f in dataclasses.fields(Call) if f.name in hints}
    for name in [*defaults, *(name for name in hints if name not in defaults)]:
        about = {"default": defaults.get(name), "annotation": hints[name]}
        parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, **about))
    texts = [method.__doc__, *([Call.__doc__] if defaults else []), Sampling.__doc__, NONE]
    method.__signature__ = signature.replace(parameters=parameters)
    method.__doc__ = "\n\n".join(map(inspect.cleandoc, texts))
    return method
