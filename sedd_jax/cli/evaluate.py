"""sedd-eval: score a model: likelihood, generative perplexity, MAUVE and more."""

import argparse
import functools
import logging
import textwrap
from typing import Any

from sedd_jax.cli import generations, information
from sedd_jax.cli.arguments import (
    NEEDS_RECORDS,
    add_json,
    add_model,
    add_records,
    check_run,
    chosen_records,
    did_you_mean,
    make_parser,
    name_or_path,
    output_file,
    path,
    run_records,
    say_written,
    show_result,
)
from sedd_jax.cli.choices import answers, choices, harness
from sedd_jax.cli.cluster import load_model, load_scorer, run_joined
from sedd_jax.host.console import WIDTH

log = logging.getLogger(__name__)

# Flags of `likelihood` that GPT-2, whose likelihood is exact, has no use for.
OF_BOUND = (
    *("step", "tokenizer", "passes", "target_standard_error", "max_passes", "seed"),
    *("baselines", "values"),
)


def run(name: str, argv: list[str]) -> int:
    if argv and argv[0] in EVALUATIONS:
        evaluate = EVALUATIONS[argv[0]]
        parser = make_parser(f"{name} {argv[0]}", evaluate.__doc__)
        if evaluate is _table:  # of files: nothing for devices and other processes
            evaluate(parser, argv[1:])
            return 0
        return run_joined(name, parser, argv[1:], functools.partial(evaluate, parser))
    if {"-h", "--help"} & set(argv[:1]):
        print(f"usage: {name} EVALUATION --workdir=DIR ...\n")
        for kind, evaluate in EVALUATIONS.items():
            first, *rest = textwrap.wrap(evaluate.__doc__, WIDTH - 25)
            print(f"  {kind:<23}{first}", *(f"{'':25}{line}" for line in rest), sep="\n")
        print(f"\nexample: {name} likelihood --workdir=runs/quickstart --json=result.json")
        print(f"{name} likelihood --help lists its arguments")
        return 0
    kind = argv[0] if argv else ""
    near = did_you_mean(kind, EVALUATIONS, f"known: {', '.join(EVALUATIONS)}")
    raise ValueError(f"unknown evaluation {kind!r}; {near}")


def _likelihood(parser: argparse.ArgumentParser, argv: list[str]) -> None:
    """An upper bound on -log p of a split, in every unit."""
    add = parser.add_argument
    add_model(parser, required=False)
    add(
        "--gpt2",
        type=name_or_path,
        help="score with this GPT-2 instead: gpt2, gpt2-medium, a folder, a hub id",
    )
    add_records(parser)
    add("--blocks", type=int, help="score this many blocks (default: all)")
    add(
        "--passes",
        type=int,
        default=16,
        help="noise levels a block in a round, even; 16 or more: they are stratified within a "
        "round, so more of them do better than more rounds",
    )
    add(
        "--target_standard_error",
        type=float,
        help="go through the blocks again, round by round, until the bound's error is this, nats "
        "per token",
    )
    add("--max_passes", type=int, default=1024, help="the most noise levels a block for that")
    add("--batch_size", type=int, default=32, help="blocks a network call")
    add("--seed", type=int, default=0, help="of the noise")
    add("--baselines", action="store_true", help="add n-gram models of the run's training text")
    add(
        "--values",
        type=output_file,
        help="also write the bound of each document and token here: FILE.jsonl or FILE.npz",
    )
    add_json(parser)
    options = parser.parse_args(argv)
    if (options.workdir is None) == (options.gpt2 is None):
        raise ValueError("give --workdir, or --gpt2 with --records")
    if options.gpt2 is not None and options.records is None:
        raise ValueError("--gpt2 needs --records: a folder made by sedd-prepare")
    if options.gpt2 is not None:
        for flag in OF_BOUND:
            if getattr(options, flag) != parser.get_default(flag):
                raise ValueError(f"--{flag} is of the bound of --workdir; leave it out with --gpt2")
    if options.values is not None:
        from sedd_jax.evaluation.values import check_file

        check_file(options.values)
    if options.workdir is not None and (options.records is None or options.baselines):
        check_run(
            options.workdir, NEEDS_RECORDS if options.records is None else "leave --baselines out"
        )
    from sedd_jax.evaluation.likelihood import likelihood_table
    from sedd_jax.parallel import processes
    from sedd_jax.runs.workdir import keep_curve, missing_files

    result = _bound(options) if options.gpt2 is None else _gpt2(options)
    show_result(likelihood_table(result), result, options.json)
    say_written(options.values)
    is_of_run = result.get("curve") is not None and not missing_files(options.workdir)
    if is_of_run and processes.is_first():
        keep_curve(options.workdir, result)


def _bound(options: argparse.Namespace) -> dict[str, Any]:
    from sedd_jax.evaluation.likelihood import evaluate_split

    model = load_model(options)
    records, split = chosen_records(options)
    train = None
    if options.baselines:
        run, names = run_records(options.workdir)
        train = (run, names.train_split)
    keys = ("blocks", "passes", "batch_size", "seed", "target_standard_error", "max_passes")
    chosen = {key: getattr(options, key) for key in keys}
    chosen |= {"train": train, "values_file": options.values}
    return evaluate_split(model, records, split, progress=True, **chosen)


def _gpt2(options: argparse.Namespace) -> dict[str, Any]:
    from sedd_jax.evaluation.likelihood import evaluate_gpt2

    scorer = load_scorer(options.gpt2)
    chosen = {"blocks": options.blocks, "batch_size": options.batch_size}
    return evaluate_gpt2(scorer, *chosen_records(options), progress=True, **chosen)


def _table(parser: argparse.ArgumentParser, argv: list[str]) -> None:
    """The results of several runs as one table in Markdown, LaTeX or CSV, with errors."""
    add = parser.add_argument
    add(
        "runs",
        nargs="+",
        type=path,
        metavar="RUN",
        help="a run's folder, with results that sedd-eval --json or sedd-report wrote there, or a "
        "file of them; a row each",
    )
    add(
        "--format",
        help="text, markdown, latex (booktabs) or csv (default: as --out ends; else text on a "
        "terminal, and markdown)",
    )
    add("--out", type=output_file, help="write the table to this file instead of printing it")
    add("--columns", default="", help="words, commas between: columns that have any in their names")
    options = parser.parse_args(argv)
    from sedd_jax.evaluation import results_table

    form = results_table.check_format(options.format, options.out)
    runs = results_table.read_runs(options.runs)
    words = [word for word in options.columns.split(",") if word]
    text = results_table.results_table(runs, form, words)
    for run, source in zip(runs, options.runs, strict=True):
        if not run.numbers:
            log.warning(
                "%s has no results; sedd-eval likelihood --workdir=%s --json=%s makes some",
                *(run.name, source, source / "likelihood.json"),
            )
    if columns := results_table.incomparable(runs):
        log.warning(
            "the runs have different tokenizers, so these do not compare: %s; bits/char does",
            ", ".join(columns),
        )
    if columns := results_table.incomparable(runs, "text"):
        log.warning("the runs were scored on different texts or blocks in: %s", ", ".join(columns))
    if options.out is None:
        print(text, end="")
    else:
        options.out.write_text(text, encoding="utf-8")
        say_written(options.out)


# What --help says of each is its docstring.
EVALUATIONS = {
    "likelihood": _likelihood,
    "generative_perplexity": generations.generative_perplexity,
    "mauve": generations.mauve,
    "frontier": generations.frontier,
    "information": information.run,
    "choices": choices,
    "answers": answers,
    "harness": harness,
    "table": _table,
}
