"""The results of several runs as one table: a row a run, a column a number, with errors."""

import csv
import io
import json
import math
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sedd_jax.evaluation.likelihood import OF_DOCUMENTS, UNITS
from sedd_jax.evaluation.tables import (
    Group,
    aligned,
    column,
    latex,
    latex_text,
    markdown,
    markdown_text,
)
from sedd_jax.host.console import wrapped

SUMMARY = "summary.json"  # of sedd-report
PRINTED = ("perplexity_per_token", "bits_per_character")  # in the paper's Tables 1 and 2
LEGEND = (
    "± is the standard error over the noise, or over samples or texts; ±docs over documents, noise "
    "included."
)


class Number(NamedTuple):
    """A number of a result."""

    title: str  # what was measured: a corpus and split, or how samples were made
    name: str  # with its unit
    value: float
    error: float | None  # over the noise, or over samples
    documents_error: float | None = None
    tokenizer: str = ""  # what its unit is, where it is per token
    text: str = ""  # which was scored: its sha256, and how many blocks

    @property
    def column(self) -> str:
        return f"{self.title} {self.name}"

    def cell(self) -> str:
        """The value and its errors, of which the smaller has two digits."""
        errors = {"±": self.error, " ±docs ": self.documents_error}
        errors = {sign: error for sign, error in errors.items() if error}
        if not errors or not all(map(math.isfinite, (self.value, *errors.values()))):
            return f"{self.value:.4g}"
        if self.value >= 1e9:  # a perplexity of a word
            return f"{self.value:.3e}" + "".join(f"{s}{e:.1e}" for s, e in errors.items())
        digits = min(4, max(0, 1 - math.floor(math.log10(min(errors.values())))))
        each = (f"{sign}{error:.{digits}f}" for sign, error in errors.items())
        return f"{self.value:.{digits}f}" + "".join(each)


class Run(NamedTuple):
    """A row."""

    name: str
    numbers: dict[str, Number]  # by column


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """A row for each folder of a run, with the results among its JSON files, or file of results.

    ValueError, in a line, for what is not there, is no result, or has a number twice.
    """
    parent = os.path.commonpath([path.absolute().parent for path in paths])
    runs = []
    for path in paths:
        numbers: dict[str, Number] = {}
        came_from: dict[str, Path] = {}
        for file, number in _numbers_in(path):
            # Of the summary nothing counts that another file has.
            before = came_from.setdefault(number.column, file)
            if before not in (file, file.with_name(SUMMARY)):
                raise ValueError(
                    f"{str(before)!r} and {str(file)!r} both have {number.column!r}; name the file "
                    "instead of its folder"
                )
            came_from[number.column] = file
            numbers[number.column] = number
        name = os.path.relpath(path.absolute(), parent).removesuffix(".json")
        runs.append(Run(name, numbers))
    return runs


def _numbers_in(path: Path) -> Iterator[tuple[Path, Number]]:
    """The numbers of a folder's files, the summary's first, or of a file."""
    if not path.exists():
        raise ValueError(f"no file or folder at {str(path)!r}; give a run's folder or its results")
    is_file = path.is_file()
    files = [path] if is_file else sorted(path.glob("*.json"), key=lambda f: (f.name != SUMMARY, f))
    for file in files:
        numbers = list(_numbers_of_file(file))
        if is_file and not numbers:
            raise ValueError(
                f"{str(file)!r} holds no result of sedd-eval; give a file of its --json, or "
                "a run's folder"
            )
        yield from ((file, number) for number in numbers)


def _numbers_of_file(file: Path) -> Iterator[Number]:
    """The numbers of each result in a file, none where it holds none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return
    for result in content if isinstance(content, list) else [content]:  # of a frontier: rows
        if not isinstance(result, dict):
            return
        if isinstance(result.get("heldout"), dict):  # a summary
            result = result["heldout"]
        for mark, read in READERS.items():
            if mark in result:
                try:
                    numbers = list(read(result))
                except (KeyError, TypeError, AttributeError):  # another file with such a name in it
                    return
                yield from numbers
                break


def _likelihood(result: dict[str, Any]) -> Iterator[Number]:
    """Of the model's bound, or GPT-2, every unit; of its other two numbers what papers print."""
    title = f"{result['data']['source']['corpus']} {result['split']}"
    tokenizer = json.dumps(result["data"].get("tokenizer"), sort_keys=True)
    is_exact = result.get("is_exact", False)
    rows = {"bound": "", "gpt2": "", "normalised": "normalised ", "paper_protocol": "paper's "}
    for row, words in rows.items():
        for unit, name in UNITS.items():
            values = result[unit]
            if values.get(row) is not None and (not words or unit in PRINTED):
                error = None if is_exact else values.get(f"{row}_standard_error")
                documents = values.get(row + OF_DOCUMENTS)
                unit_of = tokenizer if unit.endswith("_per_token") else ""
                text = f"{result['data'].get('sha256')}, {result.get('blocks')} blocks"
                yield Number(title, words + name, values[row], error, documents, unit_of, text)


def _samples(result: dict[str, Any]) -> Iterator[Number]:
    title = "samples"
    if "steps" in result:
        title = f"{result['predictor']}, {result['steps']} steps"
        if result.get("temperature", 1.0) not in (None, 1.0):
            title += f", temperature {result['temperature']:g}"
    values = result.get("generative_perplexity", {})
    for key, name in {"mean_of_exp": "mean of exp", "token_mean": "token mean"}.items():
        if key in values:
            error = values[f"{key}_standard_error"]
            yield Number(title, f"gen. PPL, {name}", values[key], error)
    yield _scalar(title, "entropy, nats", result, "unigram_entropy")
    for key, name in {"repetition": "rep", "distinct": "distinct"}.items():
        for n, value in result[key].items():
            error = result.get(f"{key}_standard_error", {}).get(n)
            yield Number(title, f"{name}-{n}", value, error)
    if "energy_distance" in result:
        yield _scalar(title, "energy distance", result, "energy_distance")


def _mauve(result: dict[str, Any]) -> Iterator[Number]:
    value = result["mauve"]
    error = value["standard_deviation"] / math.sqrt(result["repeats"])
    yield Number(result["form"], "MAUVE", value["mean"], error)


def _choices(result: dict[str, Any]) -> Iterator[Number]:
    kind, colon, _ = result.get("task", "choices").partition(":")  # hellaswag:PATH, or a file
    title = kind if colon else Path(kind).stem
    for name, value in result["accuracy"].items():
        yield Number(title, f"accuracy, {name}", value, result["standard_error"][name])


def _answers(result: dict[str, Any]) -> Iterator[Number]:
    for key in ("nats_per_answer", "nats_per_token", "bits_per_character"):
        title = Path(result.get("pairs", "answers")).stem
        yield _scalar(title, key.replace("_", " "), result, key)


def _information(result: dict[str, Any]) -> Iterator[Number]:
    for key in ("entropy", "divergence", "mutual_information"):
        if key in result:
            name = f"{key.replace('_', ' ')}, nats/token"
            yield _scalar(result["source"], name, result[key], "nats_per_token")


def _scalar(title: str, name: str, result: dict[str, Any], key: str) -> Number:
    return Number(title, name, result[key], result[f"{key}_standard_error"])


# By a key that only results of that kind have, the first that fits.
READERS = {
    "mauve": _mauve,
    "unigram_entropy": _samples,
    "accuracy": _choices,
    "nats_per_answer": _answers,
    "entropy": _information,
    "nats_per_token": _likelihood,
}


def incomparable(runs: Sequence[Run], field: str = "tokenizer") -> list[str]:
    """The columns in which the runs have different tokenizers (or texts, with that field)."""
    kinds: dict[str, set[str]] = {}
    for run in runs:
        for name, number in run.numbers.items():
            kinds.setdefault(name, set()).add(getattr(number, field))
    return [name for name, several in kinds.items() if len(several) > 1]


def check_format(name: str | None, out: Path | None) -> str:
    """The name of a format, where there is none by the file's suffix, or text on a terminal.

    ValueError if unknown.
    """
    if name is None:
        if out is None:
            return "text" if sys.stdout.isatty() else "markdown"
        return {".tex": "latex", ".csv": "csv", ".txt": "text"}.get(out.suffix, "markdown")
    if name not in FORMATS:
        raise ValueError(f"unknown format {name!r}; known: {', '.join(FORMATS)}")
    return name


def results_table(runs: Sequence[Run], form: str, words: Sequence[str] = ()) -> str:
    """The rows in a form of FORMATS; with words, the columns with any of them in their names."""
    every = dict.fromkeys(name for run in runs for name in run.numbers)
    names = [name for name in every if not words or any(word in name for word in words)]
    if not names:
        if not every:
            raise ValueError(
                "no run has results; sedd-report writes its summary.json, and sedd-eval, with "
                "--json=RUN/NAME.json, those of an evaluation"
            )
        raise ValueError(f"no column has {' or '.join(words)}; known: {', '.join(every)}")
    return FORMATS[form](runs, names)


def _groups(runs: Sequence[Run], names: Iterable[str]) -> list[Group]:
    """The runs' names, and a group of columns for each thing that was measured."""

    def cell(run: Run, name: str) -> str:
        return run.numbers[name].cell() if name in run.numbers else ""

    groups: dict[str, list[list[str]]] = {"": [column("", (run.name for run in runs))]}
    for name in names:
        number = next(run.numbers[name] for run in runs if name in run.numbers)
        cells = column(number.name, (cell(run, name) for run in runs))
        groups.setdefault(number.title, []).append(cells)
    return list(groups.items())


def _terminal(runs: Sequence[Run], names: Iterable[str]) -> str:
    """In lines of 79 columns: groups are as wide as a column."""
    groups = [(title, [one]) for title, columns in _groups(runs, names) for one in columns]
    return "\n".join([*aligned(groups), "", *wrapped(LEGEND)]) + "\n"


def _marked_up(runs: Sequence[Run], names: Iterable[str], table, text) -> str:
    return "\n".join([*table(_groups(runs, names)), "", text(LEGEND)]) + "\n"


def _csv(runs: Sequence[Run], names: Sequence[str]) -> str:
    """Each number in three columns: the value, its error, its error over documents; all digits."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    heads = ("{}", "{}, standard error", "{}, standard error over documents")
    writer.writerow(["run", *(head.format(name) for name in names for head in heads)])
    for run in runs:
        numbers = [run.numbers.get(name) for name in names]
        writer.writerow([run.name, *(v for n in numbers for v in (n[2:5] if n else ("",) * 3))])
    return file.getvalue()


FORMATS = {
    "text": _terminal,
    "markdown": lambda runs, names: _marked_up(runs, names, markdown, markdown_text),
    "latex": lambda runs, names: _marked_up(runs, names, latex, latex_text),
    "csv": _csv,
}
