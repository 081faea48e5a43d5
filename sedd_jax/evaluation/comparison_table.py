"""What a comparison says: one list of rows as text, Markdown, LaTeX, CSV and JSON, and a picture.

A row is a method, its numbers are means over its seeds. Bounds and exact likelihoods stand in one
column, and each says which it is.
"""

import csv
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sedd_jax import __version__
from sedd_jax import config as configuration
from sedd_jax.diffusion.likelihood import perplexity, perplexity_error
from sedd_jax.diffusion.objectives import OBJECTIVES
from sedd_jax.evaluation.comparison import (
    FAILURE,
    Result,
    Run,
    failure_line,
    ngrams,
    trained,
    training_clock,
)
from sedd_jax.evaluation.tables import (
    Group,
    aligned,
    column,
    latex,
    latex_text,
    markdown,
    markdown_text,
    of_any_size,
    perplexity_columns,
    statistics_columns,
    with_error,
)
from sedd_jax.host.console import wrapped
from sedd_jax.host.files import replacing, write_json, write_text
from sedd_jax.runs import workdir as runs

FILE = "comparison"  # and .md, .tex, .csv, .json, .png
NGRAMS = {"bigram": "interpolated bigram", "unigram": "unigram"}
UNITS = ("nats_per_token", "bits_per_character")
# How a table and a line of text are written, by the file's suffix.
FORMATS = {".md": (markdown, markdown_text), ".tex": (latex, latex_text)}

Row = dict[str, Any]


# --- rows


def method_rows(all_runs: Sequence[Run]) -> list[Row]:
    """A row for each method, for its normalised bound where that differs, and for n-gram models.

    Numbers are means over the runs that have them; their standard errors, over the noise or over
    samples, are those of the means; seeds_standard_deviation is between the runs.
    """
    rows = []
    methods = {
        run.method: [one for one in all_runs if one.method == run.method] for run in all_runs
    }
    for method, of_method in methods.items():
        results = [run_result(run) for run in of_method]
        scored = [result for result in results if "likelihood" in result]
        row = {"name": method, "kind": kind_of(of_method[0]), "runs": len(results)}
        row |= {"runs_failed": sum("failure" in result for result in results)}
        row |= _mean([result["training"] for result in scored or results])
        row |= _spread([result["likelihood"] for result in scored])
        for part in ("samples", "generative_perplexity"):
            row[part] = _mean([result[part] for result in results if part in result])
        rows.append(row)
        normalised = [result["normalised"] for result in scored if result["normalised"]]
        if normalised and not np.allclose(
            _spread(normalised)["nats_per_token"], row["nats_per_token"], rtol=1e-6
        ):
            name = f"{method}, normalised"
            rows.append({"name": name, "kind": "bound", **_spread(normalised)})
    if result := ngrams(all_runs):
        for key, name in NGRAMS.items():
            rows.append({"name": name, "kind": "exact", **_spread([_likelihood(result, key)])})
    return rows


def run_result(run: Run) -> Row:
    """What is known of a run: "training", and what its finished parts have, or its "failure"."""
    result: Row = {"method": run.method, "seed": run.config.seed, "training": trained(run)}
    if likelihood := run.read("likelihood"):
        result["training"]["parameters"] = likelihood["parameters"]
        result["likelihood"] = _likelihood(likelihood, "bound")
        result["normalised"] = _likelihood(likelihood, "normalised")
    if samples := run.read("samples"):
        about = ("part_seconds", "num_samples")
        result["samples"] = {key: value for key, value in samples.items() if key not in about}
    if perplexity := run.read("perplexity"):
        result["generative_perplexity"] = perplexity["generative_perplexity"]
    if failure := run.read(FAILURE):
        result["failure"] = failure
    return result


def kind_of(run: Run) -> str:
    """Whether the likelihood of the run is "exact" or a "bound"."""
    return "exact" if OBJECTIVES[run.config.objective.name].is_causal else "bound"


def _likelihood(result: Result, name: str) -> dict[str, float]:
    """A row of the table of evaluation.likelihood with its error, {} if it is not there."""
    ends = ("", "_standard_error")
    values = {f"{unit}{end}": result[unit].get(name + end) for unit in UNITS for end in ends}
    return {key: value for key, value in values.items() if value is not None}


def _spread(results: Sequence[dict[str, float]]) -> Row:
    """The mean of the runs' likelihoods, its perplexity, and what lies between the runs."""
    if not results:
        return {}
    nats = [result["nats_per_token"] for result in results]
    mean = _mean(results, has_one_noise=True)  # the scoring's seed is one
    whole = mean["nats_per_token"]
    if (error := perplexity_error(whole, mean.get("nats_per_token_standard_error"))) is not None:
        mean["perplexity_per_token_standard_error"] = error
    return mean | {
        "perplexity_per_token": perplexity(whole),
        "seeds_standard_deviation": float(np.std(nats, ddof=1)) if len(nats) > 1 else None,
    }


def _mean(results: Sequence[Row], is_error: bool = False, has_one_noise: bool = False) -> Any:
    """The mean of results of the same keys, within them too; errors are those of the means.

    has_one_noise: the results were measured with the same noise, so a mean of several has an error
    no smaller than theirs.
    """
    if not results:
        return {}
    if isinstance(results[0], dict):
        keys = [key for key in results[0] if all(key in result for result in results)]
        return {
            key: _mean(
                [r[key] for r in results],
                is_error or key.endswith("standard_error"),
                has_one_noise,
            )
            for key in keys
        }
    if any(value is None for value in results):
        return None
    values = np.asarray(results, float)
    if is_error and not has_one_noise:
        return float(np.sqrt((values**2).sum())) / len(values)
    return float(values.mean())


# --- tables


def tables(rows: Sequence[Row]) -> list[list[Group]]:
    """The columns of the rows, in tables that fit a terminal: those with samples once more."""
    sampled = [row for row in rows if row.get("samples")]
    names = ("", [column("", map(_label, sampled))])
    statistics = [row["samples"] for row in sampled]
    every = [_likelihood_table(rows)]
    if sampled:
        every.append([names, *statistics_columns(statistics)])
    judged = [row for row in sampled if row.get("generative_perplexity")]
    if judged:
        names = ("", [column("", map(_label, judged))])
        every.append([names, perplexity_columns(judged)])
    return every


def _likelihood_table(rows: Sequence[Row]) -> list[Group]:
    def number(key: str) -> Iterator[str]:
        return (_short(row.get(key)) for row in rows)

    def likelihood(key: str, has_error: bool) -> Iterator[str]:
        for row in rows:
            sign = "≤" if row["kind"] == "bound" else ""
            error = row.get(f"{key}_standard_error") if has_error else None
            if key in row:
                yield sign + with_error(row[key], error or None, 3)
            else:
                yield "failed" if row.get("runs_failed") else ""

    def perplexities() -> Iterator[str]:
        key = "perplexity_per_token"
        for row in rows:
            error = row.get(f"{key}_standard_error")
            yield of_any_size(row[key], error or None) if key in row else ""

    def spread() -> Iterator[str]:
        for row in rows:
            value = row.get("seeds_standard_deviation")
            yield "" if value is None else f"{value:.3f}"

    training = {
        "tokens_seen": "tokens",
        "training_seconds": "seconds",
        "tokens_per_second": "tok/s",
    }
    nats = [column("", likelihood("nats_per_token", True))]
    if any(spreads := [*spread()]):
        nats.append(column("seeds", spreads))
    return [
        ("", [column("", map(_label, rows))]),
        ("", [column("params", number("parameters"))]),
        ("training", [column(name, number(key)) for key, name in training.items()]),
        ("", [column("bits/char", likelihood("bits_per_character", False))]),
        ("nats/token", nats),
        ("", [column("PPL", perplexities())]),
    ]


def _label(row: Row) -> str:
    """The row's name; how many of its runs are in it, if it is not all or none of them."""
    whole = row.get("runs", 0) - row.get("runs_failed", 0)
    return row["name"] + (f" ({whole} of {row['runs']})" if 0 < whole < row.get("runs", 0) else "")


def _short(value: float | None) -> str:
    """Three digits: 561k, 4.92M, 9."""
    if value is None:
        return ""
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if value >= size:
            return f"{value / (1e3 if suffix == 'k' else size):.3g}{suffix}"
    return f"{value:.0f}" if value >= 1e3 else f"{value:.3g}"


def notes(all_runs: Sequence[Run]) -> list[str]:
    """What the tables' signs mean, and why runs failed."""
    results = (run.read("likelihood") for run in all_runs)
    lines = []
    if result := next(filter(None, results), None):
        lines.append(
            f"{result['data']['source']['corpus']} {result['split']}: {result['blocks']} blocks, "
            f"{result['tokens']:,} tokens, {result['passes']} noise levels a block. ≤ is an upper "
            "bound, ± its standard error over the noise; without ≤ the likelihood is exact. "
            "seeds: standard deviation between a method's runs; the rest is their mean. Seconds "
            "are of training alone, without compiling, saving and scoring."
        )
    failures = ((run, run.read(FAILURE)) for run in all_runs)
    return lines + [failure_line(run, failure) for run, failure in failures if failure]


def terminal(all_runs: Sequence[Run]) -> str:
    """The tables and the notes as aligned text."""
    return _document(all_runs, aligned, lambda text: "\n".join(wrapped(text)))


def _document(all_runs: Sequence[Run], table, text) -> str:
    every = tables(method_rows(all_runs))
    return "\n\n".join(["\n".join(table(one)) for one in every] + [*map(text, notes(all_runs))])


def write_files(out: Path, all_runs: Sequence[Run], settings: Result) -> list[Path]:
    """Writes the tables as Markdown, LaTeX, CSV and JSON into out; returns their paths."""
    rows = method_rows(all_runs)
    for suffix, how in FORMATS.items():
        write_text(out / f"{FILE}{suffix}", _document(all_runs, *how) + "\n")
    flat = [dict(configuration.flatten(row)) for row in rows]
    names = list(dict.fromkeys(itertools.chain(*flat)))
    with replacing(out / f"{FILE}.csv", "w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, names)
        table.writeheader()
        table.writerows(flat)
    whole = {
        "version": __version__,
        "settings": settings,
        "rows": rows,
        "runs": [run_result(run) for run in all_runs],
        "notes": notes(all_runs),
    }
    write_json(out / f"{FILE}.json", whole)
    return [out / f"{FILE}{suffix}" for suffix in (*FORMATS, ".csv", ".json")]


# --- the picture


def draw_picture(path: Path, all_runs: Sequence[Run]) -> None:
    """Held-out bounds against tokens and against seconds of training, as PNG; needs matplotlib.

    A colour a method, a line a seed. Each objective has its own bound, and the tables' are finer:
    training takes config.evaluate.blocks blocks at config.evaluate.passes noise levels.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure  # not pyplot, which would open a window

    figure = Figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    colors = dict(zip(dict.fromkeys(run.method for run in all_runs), colormaps["tab10"].colors * 2))
    tops = []  # of what did not diverge, which the axes must show
    for run in all_runs:
        tokens, seconds, bounds = _curve(run)
        label = run.method if run.config.seed == min(r.config.seed for r in all_runs) else None
        style = {"color": colors[run.method], "linewidth": 1, "marker": ".", "label": label}
        for axes, x in ((left, tokens), (right, seconds)):
            axes.plot(x, bounds, **style)
        if len(bounds) and run.read(FAILURE) is None:
            tops.append(bounds.max())
    if result := ngrams(all_runs):
        for (key, name), style in zip(NGRAMS.items(), ("--", ":"), strict=True):
            value = result["nats_per_token"][key]
            tops.append(value)
            for axes in (left, right):
                axes.axhline(value, color="#999999", linestyle=style, label=name, zorder=0)
    left.set(xlabel="tokens of training", ylabel="held-out bound, nats per token")
    right.set(xlabel="seconds of training")
    if tops:
        left.set_ylim(0, 1.05 * max(tops))
    right.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))  # beside the lines
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def _curve(run: Run) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, seconds of training and the bound in nats per token, at each evaluation."""
    if not trained(run):
        return (np.zeros(0),) * 3
    steps, seconds, tokens_per_step = training_clock(run)
    rows = [row for row in runs.read_metrics(run.workdir) if row["kind"] == "heldout"]
    at = np.array([row["step"] for row in rows], float)
    bounds = np.array([row["bound"] for row in rows], float)
    return at * tokens_per_step, np.interp(at, steps, seconds), bounds
