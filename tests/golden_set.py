"""The golden values of the original PyTorch code: one folder, described by its own keys.json.

SEDD_GOLDEN names the folder; the default is tests/golden, whose README.md says what each array is.
Every size, seed and schedule comes from the folder. Original's words stay in the keys: "absorb",
"analytic", and "sigma" and "dsigma" for the total noise and its slope.
"""

import functools
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from sedd_jax.diffusion.graphs import Absorbing, Uniform
from sedd_jax.diffusion.schedules import Geometric, LogLinear, Schedule

FOLDER = Path(os.environ.get("SEDD_GOLDEN") or Path(__file__).parent / "golden")
_DESCRIPTION = json.loads((FOLDER / "keys.json").read_text())
SETTINGS = _DESCRIPTION["settings"]
KEYS: dict[str, dict[str, str]] = _DESCRIPTION["keys"]  # file -> key -> dtype[shape]

GRAPHS = {"absorb": Absorbing, "uniform": Uniform}
SCHEDULES = {"log": LogLinear, "geo": Geometric}


@functools.cache
def arrays(file: str) -> Mapping[str, np.ndarray]:
    """The arrays of one file, read when asked for."""
    return np.load(FOLDER / file, allow_pickle=False)


def found(file: str, pattern: str) -> list[str]:
    """What the pattern's group matches in the keys of a file, each once, in their order."""
    hits = (re.fullmatch(pattern, key) for key in KEYS[file])
    return list(dict.fromkeys(hit[1] for hit in hits if hit))


@functools.cache
def schedules() -> dict[str, Schedule]:
    """The set's schedules by name: those of its settings, and any that only the sampler uses."""
    rows = {name: (kind, *values) for name, kind, *values in SETTINGS["noises"]}
    for name in found("sampler.npz", r"\w+/((?:log|geo)[^/]+)/.*"):
        rows.setdefault(name, (name[:3], *map(float, name.split("_")[1:])))
    return {name: SCHEDULES[kind](*values) for name, (kind, *values) in rows.items()}


def model_schedule(graph: str) -> Schedule:
    """The schedule of a graph's network: the one that gives its stored sigma at its stored t."""
    stored = arrays("model.npz")
    t, sigma = stored[f"{graph}/t"], stored[f"{graph}/sigma"]
    for schedule in schedules().values():
        if np.allclose(schedule.sigma(t), sigma, rtol=1e-4, atol=0.0):
            return schedule
    raise ValueError(
        f"no schedule of {FOLDER}/keys.json gives {graph}/sigma {sigma} at {graph}/t {t} of "
        "model.npz; add the network's to settings.noises"
    )


def relative_error(actual, expected, positive=None) -> float:
    """Largest |actual - expected| over |expected|, entry by entry.

    An entry that is a difference of two non-negative terms, expected = positive - negative, is
    known in float32 only to their size, so where `positive` is given it is taken over
    positive + negative instead. An entry that should be 0 must be 0.
    """
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    scale = np.abs(expected)
    if positive is not None:
        positive = np.asarray(positive, np.float64)
        scale = positive + np.abs(positive - expected)
    difference = np.abs(actual - expected)
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.where(difference == 0.0, 0.0, difference / scale).max())


def relative_norm(actual, expected) -> float:
    """|actual - expected| / |expected| in the Euclidean norm."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))
