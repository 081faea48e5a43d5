"""sedd-eval choices and harness."""

import argparse
import importlib.util

from sedd_jax.cli.arguments import (
    MODEL,
    add_json,
    add_step,
    add_tokenizer,
    add_workdir,
    named_tokenizer,
    show_result,
)
from sedd_jax.files import sha256


def choices(parser: argparse.ArgumentParser, argv: list[str]) -> None:
    """Accuracy on questions with several choices, by the bound on each."""
    add = parser.add_argument
    add_workdir(parser, MODEL)
    add_step(parser)
    add_tokenizer(parser)
    add(
        "--task",
        required=True,
        help='a .jsonl file of lines {"prompt": "...", "choices": ["...", "..."], "label": 0}, or '
        "hellaswag:PATH, arc_easy:, arc_challenge:, piqa:, winogrande:, boolq: the published file "
        "or its folder",
    )
    add("--delimiter", default=" ", help="between prompt and choice of one's own lines")
    add("--limit", type=int, help="the first so many questions (default: all)")
    add("--passes", type=int, default=16, help="noise levels a choice, even")
    add(
        "--target_standard_error",
        type=float,
        help="take the questions in random order and stop when the accuracy's standard error is "
        "this, as 0.01",
    )
    add("--batch_size", type=int, default=16, help="choices a network call")
    add("--seed", type=int, default=0, help="of the noise")
    add_json(parser)
    options = parser.parse_args(argv)
    from sedd_jax.evaluation.tasks import read_questions

    questions, file = read_questions(options.task, options.delimiter)
    if options.limit is not None and options.limit < 1:
        raise ValueError(f"--limit={options.limit} is below 1; give a number of questions")
    from sedd_jax.evaluation.choices import choices_table, evaluate_choices
    from sedd_jax.inference.pretrained import load

    model = load(options.workdir, step=options.step, tokenizer=named_tokenizer(options))
    names = ("passes", "batch_size", "seed", "target_standard_error")
    chosen = {name: getattr(options, name) for name in names}
    result = evaluate_choices(model, questions[: options.limit], progress=True, **chosen)
    about = {"task": options.task, "delimiter": options.delimiter, "sha256": sha256(file)}
    show_result(choices_table(result), {**about, **result}, options.json)


def harness(parser: argparse.ArgumentParser, argv: list[str]) -> None:
    """Tasks of lm-evaluation-harness, with its arguments: --model_args workdir=DIR --tasks NAME."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError(f'{parser.prog} needs lm-evaluation-harness; pip install "sedd_jax[eval]"')
    from sedd_jax.evaluation.harness import run_command

    run_command(argv)
