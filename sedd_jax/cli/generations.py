"""sedd-eval generative_perplexity, mauve and frontier: scores of what a model writes."""

import argparse
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sedd_jax.cli.arguments import (
    NEEDS_RECORDS,
    add_json,
    add_records,
    add_samples,
    add_scorer,
    add_steps,
    check_matplotlib,
    check_run,
    check_sampling,
    chosen_records,
    output_file,
    run_records,
    sampling_of,
    say_written,
    show_result,
)
from sedd_jax.cli.cluster import load_model, load_scorer
from sedd_jax.host.files import write_json


def generative_perplexity(parser: argparse.ArgumentParser, argv: list[str]) -> None:
    """Perplexity of the model's samples under GPT-2, with their entropy and repetition."""
    add_scorer(parser)
    add_steps(parser)
    add_samples(parser)
    _add_references(parser)
    add_json(parser)
    options = parser.parse_args(argv)
    _check_samples(options)
    from sedd_jax.evaluation import generations, tables

    model, scorer = _model_and_scorer(options)
    result = generations.generative_perplexity(
        model,
        scorer,
        _references(options, model, scorer),
        **_sampling(options, "num_samples", "length", "steps"),
    )
    show_result(tables.perplexity_table([result]), result, options.json)


def mauve(parser: argparse.ArgumentParser, argv: list[str]) -> None:
    """MAUVE of completions of 100-token texts, 50 tokens given."""
    add = parser.add_argument
    add_scorer(parser)
    add_steps(parser)
    add("--form", default="prefix", help="prefix: the first 50 given; infill: 25 at each end")
    add_records(parser)
    add("--references", type=int, default=1000, help="texts of the split that are completed")
    add("--repeats", type=int, default=5, help="completions of each, every time with other noise")
    add("--buckets", type=int, help="clusters of MAUVE (default: a tenth of the texts)")
    add_json(parser)
    options = parser.parse_args(argv)
    if options.records is None:
        check_run(options.workdir, NEEDS_RECORDS)
    from sedd_jax.evaluation import generations, likelihood, mauve, ngrams, tables

    check_sampling(options)
    if ngrams.order_of(options.scorer) is not None:
        raise ValueError(
            f"scorer {options.scorer!r} has no hidden states, which MAUVE compares; choose a GPT-2"
        )
    protocol = (options.form, options.references, options.repeats)
    mauve.check(*protocol, seed=options.seed, buckets=options.buckets)
    model, scorer = _model_and_scorer(options)
    records, split = chosen_records(options)
    likelihood.check_records(model, records)
    chosen = _sampling(options, "form", "references", "repeats", "buckets", "steps")
    result = generations.conditional_mauve(model, scorer, records, split, **chosen)
    show_result(tables.describe_mauve(result), result, options.json)


def frontier(parser: argparse.ArgumentParser, argv: list[str]) -> None:
    """Generative perplexity against entropy and network calls, at every combination of lists."""
    add = parser.add_argument
    add_scorer(parser)
    steps = "8,16,32,64,128"
    add("--steps", default=steps, help=f"numbers of steps, commas between (default: {steps})")
    add("--predictors", help="names, commas between (default: --predictor)")
    add("--temperatures", help="numbers above 0, commas between")
    add_samples(parser)
    _add_references(parser)
    add("--picture", type=_picture_file, help="also draw the curves to this .png, .pdf or .svg")
    add(
        "--json",
        type=output_file,
        help="also write the rows to this file, one by one; those of the same command that are "
        "there are not made again",
    )
    options = parser.parse_args(argv)
    lists = _lists(options)
    if options.picture:
        check_matplotlib("--picture")
    _check_samples(options, [name for name in lists[1] if name is not None])
    from sedd_jax.evaluation import frontier as frontiers
    from sedd_jax.evaluation import tables
    from sedd_jax.parallel import processes

    rows = frontiers.combinations(*lists)

    finished = processes.on_first_process(
        lambda: frontiers.read_rows(options.json) if options.json else []
    )
    model, scorer = _model_and_scorer(options)
    results = frontiers.frontier(
        model,
        scorer,
        rows,
        _references(options, model, scorer),
        finished=finished,
        save=lambda rows: options.json and processes.is_first() and write_json(options.json, rows),
        **_sampling(options, "num_samples", "length"),
    )
    print(tables.perplexity_table(results))
    if options.picture:
        frontiers.draw_picture(options.picture, results)
    say_written(options.json, options.picture)


def _picture_file(text: str) -> Path:
    file = output_file(text)
    if file.suffix not in (".png", ".pdf", ".svg"):
        raise argparse.ArgumentTypeError(f"{text!r} does not end in .png, .pdf or .svg; name it so")
    return file


def _lists(options: argparse.Namespace) -> tuple[list[int], list[str | None], list[float | None]]:
    """--steps, --predictors and --temperatures; ValueError for what is no list of such values."""
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", options.steps):
        raise ValueError(f"--steps {options.steps!r} is not like 32,64,128; see --help")
    one = {"predictor": options.predictor, "temperature": options.temperature}
    for name, value in one.items():
        if value is not None and getattr(options, f"{name}s") is not None:
            raise ValueError(f"--{name} and --{name}s are both there; leave one out")
    predictors, temperatures = ([value] for value in one.values())
    if options.predictors is not None:
        predictors = options.predictors.split(",")
    if options.temperatures is not None:
        try:
            temperatures = [float(number) for number in options.temperatures.split(",")]
        except ValueError as error:
            raise ValueError(
                f"--temperatures {options.temperatures!r} is not like 0.8,1; see --help"
            ) from error
    return [int(count) for count in options.steps.split(",")], predictors, temperatures


def _model_and_scorer(options: argparse.Namespace) -> tuple:
    return load_model(options), _scorer(options)


def _scorer(options: argparse.Namespace):
    from sedd_jax.evaluation import ngrams

    order = ngrams.order_of(options.scorer)
    if order is None:
        return load_scorer(options.scorer, options.scorer_dtype)
    records, names = run_records(options.workdir)
    return ngrams.load_ngram_scorer(order, records, names.train_split)


def _check_scorer(options: argparse.Namespace) -> None:
    """ValueError, before a model is loaded, for n-grams of a text that is not there."""
    from sedd_jax.evaluation import ngrams

    if ngrams.order_of(options.scorer) is not None:
        check_run(options.workdir, "choose a GPT-2 as --scorer")


def _add_references(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--references",
        type=int,
        help="also measure the energy distance to this many texts of the held-out split",
    )
    add_records(parser)


def _check_samples(options: argparse.Namespace, predictors: Iterable[str] = ()) -> None:
    """ValueError, before a model is loaded, for samples or references that cannot be measured."""
    check_sampling(options, predictors=predictors)
    if options.references is None and (options.records or options.split):
        raise ValueError("--records and --split need --references, how many texts to compare with")
    if options.references is not None and options.records is None:
        check_run(options.workdir, NEEDS_RECORDS)
    _check_scorer(options)
    from sedd_jax.evaluation import generations

    generations.check_length(options.length)
    if options.references is not None:
        generations.check_references(options.references, options.num_samples)


def _references(options: argparse.Namespace, model, scorer):
    """The texts of --references, --records and --split; None without --references."""
    if options.references is None:
        return None
    from sedd_jax.evaluation import generations, likelihood

    records, split = chosen_records(options)
    likelihood.check_records(model, records)
    return generations.read_references(
        model,
        scorer,
        records,
        split,
        options.references,
        length=options.length,
        batch_size=options.batch_size,
        progress=True,
    )


def _sampling(options: argparse.Namespace, *more: str) -> dict[str, Any]:
    """The options that every evaluation of samples takes, and those named besides."""
    names = ("batch_size", "seed", *more)
    named = {name: getattr(options, name) for name in names}
    return {"progress": True, **named, **sampling_of(options)}
