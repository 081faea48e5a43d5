"""The commands: sedd-prepare, sedd-train, sedd-eval, sedd-sample, sedd-report and sedd-convert.

Each is also `python -m sedd_jax train` and so on. What a user can cause ends in one line on
standard error and exit status 2; training that cannot go on ends in one line and status 3.
"""

import functools
import sys
from collections.abc import Callable

from absl import flags

from sedd_jax.cli import convert, evaluate, prepare, report, sample, train
from sedd_jax.cli.messages import plain_log, say

Argv = list[str] | None


def _guarded(name: str, command: Callable[[str, list[str]], int | None], argv: Argv = None) -> int:
    with plain_log():
        try:
            return command(name, sys.argv[1:] if argv is None else argv) or 0
        except (ValueError, OSError, flags.Error) as error:
            return say(name, error, status=2)
        except KeyboardInterrupt:
            print(f"{name}: interrupted", file=sys.stderr)
            return 130


# Functions of argv, a list of strings, None for sys.argv's; each returns its exit status.
prepare_command = functools.partial(_guarded, "sedd-prepare", prepare.run)
train_command = functools.partial(_guarded, "sedd-train", train.run)
eval_command = functools.partial(_guarded, "sedd-eval", evaluate.run)
sample_command = functools.partial(_guarded, "sedd-sample", sample.run)
report_command = functools.partial(_guarded, "sedd-report", report.run)
convert_command = functools.partial(_guarded, "sedd-convert", convert.run)

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
