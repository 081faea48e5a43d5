"""sedd-eval choices, answers and harness."""

import argparse
import importlib.util

from sedd_jax.cli.arguments import add_json, add_model, path, show_result
from sedd_jax.cli.cluster import load_model
from sedd_jax.host.files import sha256

NOISE = ("passes", "batch_size", "seed")


def _add_noise(parser: argparse.ArgumentParser, one: str, several: str) -> None:
    """The flags of NOISE; what is scored is called `one` and `several`."""
    add = parser.add_argument
    add("--passes", type=int, default=16, help=f"noise levels {one}, even")
    add("--batch_size", type=int, default=16, help=f"{several} a network call")
    add("--seed", type=int, default=0, help="of the noise")


def choices(parser: argparse.ArgumentParser, argv: list[str]) -> None:
    """Accuracy on questions with several choices, by the bound on each."""
    add = parser.add_argument
    add_model(parser)
    add(
        "--task",
        required=True,
        help='a .jsonl file of lines {"prompt": "...", "choices": ["...", "..."], "label": 0}, or '
        "hellaswag:PATH, arc_easy:, arc_challenge:, piqa:, winogrande:, boolq: the published file "
        "or its folder",
    )
    add(
        "--delimiter",
        default=" ",
        help="between prompt and choice of one's own lines (default: a space)",
    )
    add("--limit", type=int, help="the first so many questions (default: all)")
    _add_noise(parser, "a choice", "choices")
    add(
        "--target_standard_error",
        type=float,
        help="take the questions in random order and stop when the accuracy's standard error is "
        "this, as 0.01",
    )
    add_json(parser)
    options = parser.parse_args(argv)
    from sedd_jax.evaluation.tasks import read_questions

    questions, file = read_questions(options.task, options.delimiter)
    about = {"task": options.task, "delimiter": options.delimiter, "sha256": sha256(file)}
    if options.limit is not None and options.limit < 1:
        raise ValueError(f"--limit={options.limit} is below 1; give a number of questions")
    from sedd_jax.evaluation.choices import choices_table, evaluate_choices

    model = load_model(options)
    chosen = {name: getattr(options, name) for name in (*NOISE, "target_standard_error")}
    result = evaluate_choices(model, questions[: options.limit], progress=True, **chosen)
    show_result(choices_table(result), {**about, **result}, options.json)


def answers(parser: argparse.ArgumentParser, argv: list[str]) -> None:
    """The bound on -log p(answer | prompt) of lines of prompts and answers."""
    add = parser.add_argument
    add_model(parser)
    add(
        "--pairs",
        type=path,
        required=True,
        help='a .jsonl file of lines {"prompt": "...", "answer": "..."}',
    )
    add("--delimiter", default=" ", help="between prompt and answer")
    _add_noise(parser, "an answer", "answers")
    add_json(parser)
    options = parser.parse_args(argv)
    from sedd_jax.evaluation.answers import answers_table, evaluate_answers, read_answers

    pairs = read_answers(options.pairs)
    about = {"pairs": str(options.pairs), "sha256": sha256(options.pairs)}

    model = load_model(options)
    chosen = {name: getattr(options, name) for name in NOISE}
    chosen["delimiter"] = options.delimiter
    result = evaluate_answers(model, pairs, progress=True, **chosen)
    show_result(answers_table(result), {**about, **result}, options.json)


def harness(parser: argparse.ArgumentParser, argv: list[str]) -> None:
    """Tasks of lm-evaluation-harness, with its arguments: --model_args workdir=DIR --tasks NAME."""
    if importlib.util.find_spec("lm_eval") is None:
        if {"-h", "--help"} & {*argv}:
            parser.epilog = 'Its other arguments: pip install "sedd_jax[eval]", and --help again.'
            return parser.print_help()
        raise ValueError(f'{parser.prog} needs lm-evaluation-harness; pip install "sedd_jax[eval]"')
    from sedd_jax.evaluation.harness import run_command
    from sedd_jax.parallel import processes

    if not processes.is_alone():
        raise ValueError(
            f"{parser.prog} runs as one process; start it so, or score with sedd-eval choices"
        )
    run_command(argv)
