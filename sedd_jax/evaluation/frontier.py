"""The frontier of quality and diversity: samples at many steps, predictors and temperatures.

Few calls, a low temperature or a draw in low precision all buy perplexity with entropy, so that a
sampler is judged by the curve of both (the paper's Figures 1 and 2 show perplexity against calls).
"""

import dataclasses
import hashlib
import itertools
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sedd_jax.evaluation import generations
from sedd_jax.evaluation.generations import References
from sedd_jax.evaluation.scorer import TextScorer, params_sha256
from sedd_jax.inference.model import SEDD
from sedd_jax.inference.sampling import Sampling

log = logging.getLogger(__name__)

Row = dict[str, Any]  # a result of generative_perplexity, with the sha256 of both sets of weights
DEFAULTS = {field.name: field.default for field in dataclasses.fields(Sampling)}
ABSENT = object()
VARIED = ("predictor", "temperature", "steps")  # from row to row


def combinations(
    steps: Sequence[int],
    predictors: Sequence[str | None] = (None,),
    temperatures: Sequence[float | None] = (None,),
) -> list[dict[str, Any]]:
    """The sampling options of each row, the steps changing fastest; None is the model's own.

    ValueError for an empty list, or a predictor or temperature that cannot be.
    """
    lists = {"predictors": predictors, "temperatures": temperatures, "steps": steps}
    for name, values in lists.items():
        if not values:
            raise ValueError(f"{name} is empty; give at least one")
    rows = []
    curves = itertools.product(dict.fromkeys(predictors), dict.fromkeys(temperatures))
    for predictor, temperature in curves:
        sampling = Sampling().replaced(predictor=predictor, temperature=temperature)
        takes_no_step = sampling.nfe == 1
        for count in dict.fromkeys(steps[:1] if takes_no_step else steps):
            options = {"predictor": predictor, "temperature": temperature, "steps": count}
            rows.append({name: value for name, value in options.items() if value is not None})
    return rows


def frontier(
    model: SEDD,
    scorer: TextScorer,
    options: Sequence[dict[str, Any]],
    references: References | None = None,
    *,
    finished: Iterable[Row] = (),
    save: Callable[[list[Row]], None] = lambda rows: None,
    batch_size: int,
    progress: bool = False,
    **shared: Any,
) -> list[Row]:
    """generative_perplexity at each of the `options`, a row each; `shared` are those of all rows.

    A row of `finished`, of an earlier call with the same weights and settings, is not made again.
    save is called with all rows there are whenever there is a new one. ValueError before any work
    for options that the model cannot be sampled with, and for finished rows that this call would
    not make.
    """
    generations.check_scorable(model, scorer, shared.get("length"))
    weights = {"model_sha256": _model_sha256(model), "scorer_sha256": scorer.sha256()}
    options = [{**shared, **each} for each in options]
    settings = [
        {**weights, **generations.settings(model, scorer, references, **each)} for each in options
    ]
    for each in options:
        model.stream(batch_size=batch_size, **each)  # checks at the call; nothing is drawn
    finished = list(finished)
    rows = [next((row for row in finished if _is_of(row, each)), None) for each in settings]
    others = [row for row in finished if row not in rows]
    if others:
        raise ValueError(_why_not(others[0], settings[0]))
    if count := sum(row is not None for row in rows):
        log.info("%d of %d rows are there already", count, len(rows))
    for number, each in enumerate(options):
        if rows[number] is None:
            log.info("row %d of %d: %s", number + 1, len(rows), _label(settings[number]))
            row = generations.generative_perplexity(
                model, scorer, references, batch_size=batch_size, progress=progress, **each
            )
            rows[number] = weights | row
            save([row for row in rows if row is not None])
    return rows


def read_rows(file: Path) -> list[Row]:
    """The rows of an earlier frontier, none where there is no file; ValueError for another file."""
    if not file.exists():
        return []
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        rows = None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(
            f"{str(file)!r} is there and holds no rows of a frontier; move it or give another file"
        )
    return rows


def _model_sha256(model: SEDD) -> str:
    """Of all that decides the model's distribution: weights, graph, schedule, tokenizer."""
    parts = (
        model.graph,
        model.schedule,
        model.tokenizer.fingerprint(),
        params_sha256(model.params),
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _is_of(row: Row, settings: dict[str, Any]) -> bool:
    return all(_value_of(row, name) == value for name, value in settings.items())


def _value_of(row: Row, name: str) -> Any:
    """A row of an earlier version lacks an option that there was not: it had the default."""
    return row.get(name, DEFAULTS.get(name, ABSENT))


def _curve(row: Row) -> str:
    """What the rows of a curve share, as "tweedie, temperature 0.9"."""
    temperature = row.get("temperature")
    suffix = "" if temperature is None else f", temperature {temperature:g}"
    return f"{row.get('predictor')}{suffix}"


def _label(row: Row) -> str:
    return f"{_curve(row)}, {row.get('steps')} steps"


def _why_not(row: Row, settings: dict[str, Any]) -> str:
    """What is wrong with a finished row where rows of these settings are to be made."""
    where = f"a finished row, {_label(row)},"
    of_steps = ("t_min", "times_sha256") if settings["grid"] == "fitted" else ()
    for name, value in settings.items():
        if name not in (*VARIED, *of_steps) and _value_of(row, name) != value:
            return (
                f"{where} has {name} {row.get(name)!r}, not {value!r}; give another file for other "
                "settings"
            )
    return f"{where} is none of the rows to make; add its options or give another file"


def draw_picture(path: Path, rows: list[Row]) -> None:
    """Generative perplexity against entropy and against network calls, as PNG; needs matplotlib.

    A curve for each predictor and temperature; beside its points stand the network calls, as many
    as can be read. The perplexity is the mean of exponentials; bars are standard errors. A star is
    the text that the samples were compared with.
    """
    from matplotlib.figure import Figure  # not pyplot, which would open a window
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

    figure = Figure(figsize=(12, 5.5), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    points: list[tuple[float, ...]] = []  # (network calls, entropy, perplexity)
    curves: dict[str, list[Row]] = {}
    for row in rows:
        curves.setdefault(_curve(row), []).append(row)
    for (label, curve), marker in zip(curves.items(), itertools.cycle("os^Dv<>")):
        curve = sorted(curve, key=lambda row: row["nfe"])
        calls = [row["nfe"] for row in curve]
        x, x_error, y, y_error = _points(curve)
        style = {"fmt": f"{marker}-", "capsize": 2, "label": label, "alpha": 0.8}
        left.errorbar(x, y, yerr=y_error, xerr=x_error, **style)
        right.errorbar(calls, y, yerr=y_error, **style)
        points += [(count, *point) for *point, count in zip(x, y, calls, strict=True)]
    if "reference_measures" in rows[0]:
        x, x_error, y, y_error = _points([rows[0]["reference_measures"]])
        label = f"text ({rows[0]['split']})"
        left.errorbar(x, y, y_error, x_error, fmt="k*", markersize=11, capsize=2, label=label)
    scorer = Path(rows[0]["scorer"]).name
    left.set(yscale="log", xlabel="unigram entropy (nats)")
    left.set_ylabel(f"generative perplexity ({scorer}, mean of exp)")
    low, high = left.get_ylim()
    left.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if high > 5 * low else MaxNLocator(6))
    left.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    left.yaxis.set_minor_formatter(NullFormatter())
    left.legend(frameon=False)
    right.set(xscale="log", xlabel="network calls")
    ticks = _spaced(sorted({row["nfe"] for row in rows}))
    right.set_xticks(ticks, [f"{count:g}" for count in ticks])
    right.set_xticks([], minor=True)
    _write_calls(figure, left, points)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def _spaced(values: list[float]) -> list[float]:
    """Of rising values those that can stand beside each other on a logarithmic axis."""
    ticks = values[-1:]
    for value in values[-2::-1]:
        if (ticks[0] / value) ** 20 >= values[-1] / values[0]:  # a 20th of the axis
            ticks.insert(0, value)
    return ticks


def _write_calls(figure, axes, points: list[tuple[float, ...]]) -> None:
    """Writes the network calls beside the points, but over no other of them."""
    figure.draw_without_rendering()  # from here on it is known where each point is
    size = np.array([26.0, 13.0])  # pixels of a number
    corners: list[np.ndarray] = []
    for count, *point in points:
        corner = axes.transData.transform(point)
        if not any((np.abs(corner - other) < size).all() for other in corners):
            corners.append(corner)
            axes.annotate(
                f"{count:g}", point, xytext=(4, 4), textcoords="offset points", fontsize=8
            )


def _points(rows: list[Row]) -> tuple[list[float], ...]:
    """(entropy, its error, generative perplexity, its error) of each row; an unknown error is 0."""
    perplexity = [row["generative_perplexity"] for row in rows]
    return (
        [row["unigram_entropy"] for row in rows],
        [row["unigram_entropy_standard_error"] or 0.0 for row in rows],
        [value["mean_of_exp"] for value in perplexity],
        [value["mean_of_exp_standard_error"] or 0.0 for value in perplexity],
    )
