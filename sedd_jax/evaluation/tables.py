"""Results of evaluations of samples as aligned text, and tables as Markdown and LaTeX.

Errors are standard errors over samples.
"""

import dataclasses
import re
from collections.abc import Iterable
from typing import Any

from sedd_jax.evaluation.statistics import DISTINCT_N, REPETITION_N
from sedd_jax.host.console import WIDTH, wrapped
from sedd_jax.inference.sampling import Sampling

MIN_REFERENCES = 500  # below, MAUVE says little

Row = dict[str, Any]
Group = tuple[str, list[list[str]]]  # columns under a title: a name, then a cell for each row

_DEFAULTS = {field.name: field.default for field in dataclasses.fields(Sampling)}
_SHOWN = {"steps", "predictor", "temperature", "draw", "grid"}  # always, or in columns


def perplexity_table(rows: list[Row]) -> str:
    """Results of generative_perplexity that differ in steps, predictor or temperature, a line each.

    A last line has the same numbers of the texts that samples are compared with, if there are any.
    """
    first = rows[0]
    shown = {"draw": first["draw"], "grid": first["grid"]} | {
        name: first[name]
        for name, default in _DEFAULTS.items()
        if name not in _SHOWN
        and first.get(name, default) != default
        and (name != "t_min" or first["grid"] != "fitted")  # which is another one in each row
    }
    about = (
        f"{first['num_samples']} samples of {first['length']} tokens, "
        + "".join(f"{name} {value}, " for name, value in shown.items())
        + f"model {first['dtype']}, seed {first['seed']}; scorer {first['scorer']} in "
        f"{first['scorer_dtype']}; entropy and n-grams of {first['statistics_of']}"
    )
    made, measured = rows, rows
    if "reference_measures" in first:
        made = [*rows, {"predictor": f"({first['split']})"}]
        measured = [*rows, first["reference_measures"]]
        texts = f"{first['references']} texts of {first['split']}"
        distance = first.get("energy_distance_of")
        about += (
            f"; compared with {texts}"
            if distance is None
            else (f"; energy distance of the {distance}, to {texts}")
        )
    groups = [
        ("", _made_columns(made)),
        perplexity_columns(measured),
        *statistics_columns(measured),
        *_distance_columns(measured),
        ("seconds", [column("a sample", (_number(r.get("seconds_a_sample")) for r in made))]),
    ]
    return "\n".join([*wrapped(about), *aligned(groups)])


def describe_mauve(result: Row) -> str:
    """The result of conditional_mauve as text; a warning where it has too few references."""
    value, references = result["mauve"], result["references"]
    lines = [
        *wrapped(
            f"MAUVE {value['mean']:.3f} +- {value['standard_deviation']:.3f} (standard deviation "
            f"of {result['repeats']} repeats of {references} references, {value['buckets']} "
            "clusters), "
            f"{result['form']}, {result['nfe']} network calls, {result['predictor']}, draw "
            f"{result['draw']}, seed {result['seed']}; features of {result['scorer']} in "
            f"{result['scorer_dtype']}; entropy and n-grams of {result['statistics_of']}"
        ),
        *aligned(
            [
                ("", [["", "completions", "references"]]),
                *statistics_columns([result, result["reference_measures"]]),
            ]
        ),
    ]
    if references < MIN_REFERENCES:
        lines += wrapped(
            "not comparable with the paper's 1000 references, 5 repeats: below "
            f"{MIN_REFERENCES} references there are so few clusters that MAUVE is near 1 for any "
            "text; raise --references"
        )
    return "\n".join(lines)


def _made_columns(rows: list[Row]) -> list[list[str]]:
    """Predictor, temperature where one is not the default, steps and calls."""
    columns = [column("predictor", (row["predictor"] for row in rows))]
    default = _DEFAULTS.get("temperature")
    if any(row.get("temperature", default) != default for row in rows):
        columns.append(column("temp.", (_number(row.get("temperature")) for row in rows)))
    return [
        *columns,
        column("steps", (str(row.get("steps", "")) for row in rows)),
        column("NFE", (f"{row['nfe']:.5g}" if "nfe" in row else "" for row in rows)),
    ]


def perplexity_columns(rows: list[Row]) -> Group:
    values = [row["generative_perplexity"] for row in rows]
    names = {"mean_of_exp": "mean of exp", "token_mean": "token mean"}
    return "gen. perplexity", [
        column(name, (with_error(v[key], v[f"{key}_standard_error"], 2) for v in values))
        for key, name in names.items()
    ]


def statistics_columns(rows: list[Row]) -> list[Group]:
    """What statistics.sample_statistics has; the share of repeated n-grams in per cent."""

    def entropy(row):
        return with_error(row["unigram_entropy"], row["unigram_entropy_standard_error"], 3)

    def repeated(row, n):
        error = row["repetition_standard_error"][n]
        return with_error(100 * row["repetition"][n], error and 100 * error, 1)

    def different(row, n):
        return with_error(row["distinct"][n], row.get("distinct_standard_error", {}).get(n), 3)

    repeats, kinds = map(str, REPETITION_N), map(str, DISTINCT_N)
    return [
        ("entropy", [column("(nats)", map(entropy, rows))]),
        ("% rep-n", [column(n, (repeated(row, n) for row in rows)) for n in repeats]),
        ("distinct-n", [column(n, (different(row, n) for row in rows)) for n in kinds]),
    ]


def _distance_columns(rows: list[Row]) -> list[Group]:
    """Energy distances; no column where there are none."""
    if "energy_distance" not in rows[0]:
        return []

    def distance(row):
        if "energy_distance" not in row:
            return ""
        return with_error(row["energy_distance"], row["energy_distance_standard_error"], 3)

    return [("energy", [column("distance", map(distance, rows))])]


def column(name: str, cells: Iterable[str]) -> list[str]:
    return [name, *cells]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def with_error(value: float, error: float | None, digits: int) -> str:
    """As "5.31±0.02"; the value alone where a single sample leaves the error unknown."""
    return f"{value:.{digits}f}" + ("" if error is None else f"±{error:.{digits}f}")


def of_any_size(value: float, error: float | None) -> str:
    """As with_error, for perplexities, which may be 9.54 or 9.523e+06."""
    return f"{value:.4g}" + ("" if error is None else f"±{error:.2g}")


def aligned(groups: list[Group]) -> list[str]:
    """A line of titles, one of names and one for each row; everything is flush right.

    Groups that do not fit in WIDTH come below, beside the first group once more.
    """
    first, *others = groups
    parts = [[first]]
    for group in others:
        if len(parts[-1]) > 1 and max(map(len, _beside([*parts[-1], group]))) > WIDTH:
            parts.append([first])
        parts[-1].append(group)
    return [line for part in parts for line in _beside(part)]


def _beside(groups: list[Group]) -> list[str]:
    lines = [""] * (1 + len(groups[0][1][0]))
    for title, columns in groups:
        widths = [2 + max(map(len, column)) for column in columns]
        widths[0] += max(0, 2 + len(title) - sum(widths))
        lines[0] += title.rjust(sum(widths))
        for column, width in zip(columns, widths, strict=True):
            for number, cell in enumerate(column, start=1):
                lines[number] += cell.rjust(width)
    return [line.rstrip() for line in lines]


def markdown(groups: list[Group]) -> list[str]:
    """The table of `aligned` in GitHub's Markdown."""
    names, *rows = ([markdown_text(cell) for cell in row] for row in _flat(groups))
    rules = ["---"] + ["---:"] * (len(names) - 1)
    return [f"| {' | '.join(row)} |" for row in (names, rules, *rows)]


def markdown_text(text: str) -> str:
    """The text with what Markdown would act on escaped."""
    return re.sub(r"([\\`*_<>|\[\]$~])", r"\\\1", text)


_LATEX = {character: f"\\{character}" for character in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "±": r"$\pm$",
    "≤": r"$\le$",
}


def latex(groups: list[Group]) -> list[str]:
    """The table of `aligned` as LaTeX's tabular, which needs the package booktabs."""
    cells = zip(*(column for _, columns in groups for column in columns), strict=True)
    names, *rows = (rf"{' & '.join(map(latex_text, row))} \\" for row in cells)
    titles, rules, first = [], [], 1  # a title stands over its columns
    for title, columns in groups:
        last = first + len(columns) - 1
        titles.append(rf"\multicolumn{{{len(columns)}}}{{c}}{{{latex_text(title)}}}")
        rules += [rf"\cmidrule(lr){{{first}-{last}}}"] if title else []
        first = last + 1
    heads = [" & ".join(titles) + r" \\", " ".join(rules)] if rules else []
    begin, end = rf"\begin{{tabular}}{{l{'r' * (first - 2)}}}", r"\end{tabular}"
    return [begin, r"\toprule", *heads, names, r"\midrule", *rows, r"\bottomrule", end]


def latex_text(text: str) -> str:
    """The text with what LaTeX would act on escaped."""
    return text.translate(str.maketrans(_LATEX))


def _flat(groups: list[Group]) -> list[list[str]]:
    """A list of names, each with its group's title, and one of cells for each row."""
    columns = [
        [f"{title} {name}".strip(), *cells] for title, group in groups for name, *cells in group
    ]
    return [list(row) for row in zip(*columns, strict=True)]
