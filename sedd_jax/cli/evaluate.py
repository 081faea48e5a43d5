"""sedd-eval and its evaluations."""

import argparse
import json
import re
from pathlib import Path
from typing import Any

from sedd_jax.cli.arguments import (
    DRAW_HELP,
    GRID_HELP,
    check_matplotlib,
    check_run,
    make_parser,
    run_parser,
)

MODEL = "the run's folder, an exported one, or a hub id, as louaaron/sedd-small"
WITH_RECORDS = "(the last two need --records)"
NEEDS_RECORDS = "give --records, a folder made by sedd-prepare"
EVALUATIONS = {
    "likelihood": "An upper bound on -log p of a split, in every unit.",
    "generative_perplexity": "Perplexity of the model's samples under GPT-2, with their entropy.",
    "mauve": "MAUVE of completions of 100-token texts, 50 tokens given.",
    "pareto": "Generative perplexity against network calls: table and picture.",
}


def run(name: str, argv: list[str]) -> None:
    kinds = {
        "likelihood": _likelihood,
        "generative_perplexity": _generative_perplexity,
        "mauve": _mauve,
        "pareto": _pareto,
    }
    if argv and argv[0] in kinds:
        kinds[argv[0]](f"{name} {argv[0]}", argv[1:])
    elif {"-h", "--help"} & set(argv[:1]):
        print(f"usage: {name} {{{','.join(kinds)}}} --workdir=DIR ...\n")
        for kind, about in EVALUATIONS.items():
            print(f"  {kind:<23}{about}")
        print(f"\nexample: {name} likelihood --workdir=runs/quickstart --json=result.json")
        print(f"{name} likelihood --help lists its arguments")
    else:
        given = argv[0] if argv else ""
        raise ValueError(f"unknown evaluation {given!r}; known: {', '.join(kinds)}")


def _output(text: str) -> Path:
    """An argparse type, a file to write, new or old: its folder is to be seen before the work."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a folder; give a file")
    if not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is in no folder; make it or give another path")
    return path


def _write_json(path: Path | None, result: Any) -> None:
    if path is not None:
        path.write_text(json.dumps(result, indent=1, ensure_ascii=False), encoding="utf-8")


def _add_records(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--records", type=Path, help="records of sedd-prepare (default: the run's own)")
    add("--split", help="of the records (default: the run's heldout_split, test with --records)")


def _records(options: argparse.Namespace) -> tuple:
    """(records, split) that --records and --split name."""
    from sedd_jax import data
    from sedd_jax.runs.workdir import open_records, open_workdir

    if options.records is not None:
        return data.open_records(options.records), options.split or "test"
    config = open_workdir(options.workdir).config
    return open_records(config, options.workdir), options.split or config.data.heldout_split


def _likelihood(name: str, argv: list[str]) -> None:
    parser = make_parser(name, EVALUATIONS["likelihood"])
    add = parser.add_argument
    add("--workdir", type=Path, help=f"{MODEL} {WITH_RECORDS}")
    add("--gpt2", help="score with this GPT-2 instead: gpt2, gpt2-medium, a folder, a hub id")
    _add_records(parser)
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
    add("--seed", type=int, default=0)
    add("--baselines", action="store_true", help="add n-gram models of the run's training text")
    add("--json", type=_output, help="also write the numbers to this file")
    options = parser.parse_args(argv)
    if (options.workdir is None) == (options.gpt2 is None):
        raise ValueError("give --workdir, or --gpt2 with --records")
    if options.gpt2 is not None and options.records is None:
        raise ValueError("--gpt2 needs --records: a folder made by sedd-prepare")
    if options.workdir is not None and options.records is None:
        check_run(options.workdir, NEEDS_RECORDS)
    elif options.workdir is not None and options.baselines:
        check_run(options.workdir, "leave --baselines out")
    from sedd_jax import data
    from sedd_jax.evaluation import report
    from sedd_jax.inference.pretrained import load
    from sedd_jax.runs.workdir import open_records, open_workdir

    if options.gpt2 is not None:
        from sedd_jax.evaluation.scorer import load_scorer

        result = report.evaluate_gpt2(
            load_scorer(options.gpt2),
            data.open_records(options.records),
            options.split or "test",
            blocks=options.blocks,
            batch_size=options.batch_size,
            progress=True,
        )
    else:
        model = load(options.workdir)
        records, split = _records(options)
        train = None
        if options.baselines:
            config = open_workdir(options.workdir).config
            own = records if options.records is None else open_records(config, options.workdir)
            train = (own, config.data.train_split)
        result = report.evaluate_split(
            model,
            records,
            split,
            blocks=options.blocks,
            passes=options.passes,
            batch_size=options.batch_size,
            seed=options.seed,
            target_standard_error=options.target_standard_error,
            max_passes=options.max_passes,
            train=train,
            progress=True,
        )
    print(report.table(result))
    _write_json(options.json, result)


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--scorer", default="gpt2-large", help="gpt2 .. gpt2-xl, a folder, or a hub id@commit")
    add("--scorer_dtype", default="float32", help="float32 or bfloat16")
    add("--predictor", help="tweedie, euler or none (default: the config's)")
    add("--draw", help=DRAW_HELP)
    add("--grid", help=GRID_HELP)
    add("--batch_size", type=int, default=16, help="texts at once")
    add("--seed", type=int, default=0)
    add("--json", type=_output, help="also write the numbers to this file")


def _add_samples(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num_samples", type=int, default=256)
    parser.add_argument("--length", type=int, help="tokens of a sample (default: the model's)")


def _chosen(options: argparse.Namespace, *more: str) -> dict[str, Any]:
    """The options that every evaluation of samples takes, and those named besides."""
    names = ("batch_size", "seed", "predictor", "draw", "grid", *more)
    return {"progress": True, **{name: getattr(options, name) for name in names}}


def _model_and_scorer(options: argparse.Namespace):
    from sedd_jax.evaluation.scorer import load_scorer
    from sedd_jax.inference.pretrained import load

    model = load(options.workdir)
    return model, load_scorer(options.scorer, dtype=options.scorer_dtype)


def _generative_perplexity(name: str, argv: list[str]) -> None:
    parser = run_parser(name, EVALUATIONS["generative_perplexity"], MODEL)
    _add_sampling(parser)
    _add_samples(parser)
    parser.add_argument("--steps", type=int, help="reverse steps (default: the config's)")
    options = parser.parse_args(argv)
    from sedd_jax.evaluation import generations

    result = generations.generative_perplexity(
        *_model_and_scorer(options), **_chosen(options, "num_samples", "length", "steps")
    )
    print(generations.table([result]))
    _write_json(options.json, result)


def _mauve(name: str, argv: list[str]) -> None:
    parser = run_parser(name, EVALUATIONS["mauve"], f"{MODEL} {WITH_RECORDS}")
    _add_sampling(parser)
    add = parser.add_argument
    add("--steps", type=int, help="reverse steps (default: the config's)")
    add("--form", default="prefix", help="prefix: the first 50 given; infill: 25 at each end")
    _add_records(parser)
    add("--references", type=int, default=1000)
    add("--repeats", type=int, default=5)
    add("--buckets", type=int, help="clusters of MAUVE (default: a tenth of the texts)")
    options = parser.parse_args(argv)
    if options.records is None:
        check_run(options.workdir, NEEDS_RECORDS)
    from sedd_jax.evaluation import generations, mauve, report

    mauve.check(
        options.form,
        options.references,
        options.repeats,
        seed=options.seed,
        buckets=options.buckets,
    )
    model, scorer = _model_and_scorer(options)
    records, split = _records(options)
    report.check_records(model, records)
    result = generations.conditional_mauve(
        model,
        scorer,
        records,
        split,
        **_chosen(options, "form", "references", "repeats", "buckets", "steps"),
    )
    print(generations.mauve_table(result))
    _write_json(options.json, result)


def _pareto(name: str, argv: list[str]) -> None:
    parser = run_parser(name, EVALUATIONS["pareto"], MODEL)
    _add_sampling(parser)
    add = parser.add_argument
    add("--steps", default="32,64,128,256,512,1024,2048", help="numbers of steps, commas between")
    _add_samples(parser)
    add("--picture", type=_output, help="also draw the curve to this PNG file")
    options = parser.parse_args(argv)
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", options.steps):
        raise ValueError(f"--steps {options.steps!r} is not like 32,64,128")
    if options.picture:
        check_matplotlib("--picture")
    from sedd_jax.evaluation import generations

    results = generations.pareto(
        *_model_and_scorer(options),
        [int(count) for count in options.steps.split(",")],
        **_chosen(options, "num_samples", "length"),
    )
    print(generations.table(results))
    _write_json(options.json, results)
    if options.picture:
        generations.pareto_picture(options.picture, results)
