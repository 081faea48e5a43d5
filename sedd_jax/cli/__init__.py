"""The commands: sedd-prepare, sedd-train, sedd-eval, sedd-sample, sedd-report and sedd-convert.

Each is also `python -m sedd_jax train` and so on. What a user can cause ends in one line on
standard error and exit status 2; training that cannot go on ends in one line and status 3.
"""

import sys
from collections.abc import Callable

from absl import flags

from sedd_jax.cli import convert, evaluate, prepare, report, sample, train
from sedd_jax.cli.messages import log_plainly, say

Argv = list[str] | None


def train_command(argv: Argv = None) -> int:
    """sedd-train --config=configs/quickstart.py --workdir=DIR [--config.train.steps=100 ...]"""
    return _guarded("sedd-train", train.run, argv)


def prepare_command(argv: Argv = None) -> int:
    """sedd-prepare --dataset=wikitext2 --tokenizer=gpt2 --length=1024 --out=DIR: records."""
    return _guarded("sedd-prepare", prepare.run, argv)


def eval_command(argv: Argv = None) -> int:
    """sedd-eval likelihood|generative_perplexity|mauve|pareto --workdir=DIR ..."""
    return _guarded("sedd-eval", evaluate.run, argv)


def sample_command(argv: Argv = None) -> int:
    """sedd-sample --workdir=DIR [--template "... [MASK:20] ..."]: text from a run."""
    return _guarded("sedd-sample", sample.run, argv)


def report_command(argv: Argv = None) -> int:
    """sedd-report --workdir=DIR: table, samples, picture.png and summary.json of a run."""
    return _guarded("sedd-report", report.run, argv)


def convert_command(argv: Argv = None) -> int:
    """sedd-convert --from=SOURCE --to=TARGET [--form=hub|original|workdir]: checkpoints."""
    return _guarded("sedd-convert", convert.run, argv)


COMMANDS = {
    "prepare": prepare_command,
    "train": train_command,
    "eval": eval_command,
    "sample": sample_command,
    "report": report_command,
    "convert": convert_command,
}


def main(argv: Argv = None) -> int:
    """python -m sedd_jax COMMAND ..."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] not in COMMANDS:
        given = argv[0] if argv else ""
        print(f"sedd_jax: unknown command {given!r}; known: {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    return COMMANDS[argv[0]](argv[1:])


def _guarded(name: str, command: Callable[[str, list[str]], int | None], argv: Argv) -> int:
    log_plainly()
    try:
        return command(name, sys.argv[1:] if argv is None else argv) or 0
    except (ValueError, OSError, flags.Error) as error:
        return say(name, error, status=2)
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130
