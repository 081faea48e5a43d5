"""The commands: sedd-prepare, -train, -eval, -sample, -report, -compare and -convert.

Each is also `python -m sedd_jax train` and so on. What a user can cause ends in one line on
standard error and exit status 2; training that cannot go on ends in one line and status 3.
"""

import functools
import sys
from collections.abc import Callable

from absl import flags

from sedd_jax import __version__
from sedd_jax.cli import compare, completion, convert, evaluate, prepare, report, sample, train
from sedd_jax.cli.arguments import did_you_mean
from sedd_jax.cli.messages import SIGPIPE, discard_output, plain_output, reader_is_gone, say

Argv = list[str] | None
LONG = ("sedd-train", "sedd-compare")  # their log lines have the time


def _guarded(name: str, command: Callable[[str, list[str]], int | None], argv: Argv = None) -> int:
    with plain_output(has_times=name in LONG):
        try:
            status = _run(name, command, sys.argv[1:] if argv is None else argv)
            print(end="", flush=True)
            return status
        except (ValueError, OSError, flags.Error) as error:
            is_unread = isinstance(error, BrokenPipeError) and reader_is_gone()
            discard_output()
            return SIGPIPE if is_unread else say(name, error, status=2)
        except KeyboardInterrupt:
            print(f"{name}: interrupted", file=sys.stderr)
            return 130


def _run(name: str, command: Callable[[str, list[str]], int | None], argv: list[str]) -> int:
    if "--version" in argv:
        print(f"{name} {__version__}")
        return 0
    try:
        return command(name, argv) or 0
    except SystemExit as end:
        if end.code:
            raise
        return 0  # argparse has shown its help


# Functions of argv, a list of strings, None for sys.argv's; each returns its exit status.
prepare_command = functools.partial(_guarded, "sedd-prepare", prepare.run)
train_command = functools.partial(_guarded, "sedd-train", train.run)
eval_command = functools.partial(_guarded, "sedd-eval", evaluate.run)
sample_command = functools.partial(_guarded, "sedd-sample", sample.run)
report_command = functools.partial(_guarded, "sedd-report", report.run)
compare_command = functools.partial(_guarded, "sedd-compare", compare.run)
convert_command = functools.partial(_guarded, "sedd-convert", convert.run)

COMMANDS = {
    "prepare": prepare_command,
    "train": train_command,
    "eval": eval_command,
    "sample": sample_command,
    "report": report_command,
    "compare": compare_command,
    "convert": convert_command,
}
COMMANDS["completion"] = functools.partial(
    _guarded, "sedd-completion", functools.partial(completion.run, COMMANDS)
)


def main(argv: Argv = None) -> int:
    """python -m sedd_jax COMMAND ..."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in COMMANDS:
        return COMMANDS[argv[0]](argv[1:])
    return _guarded("sedd_jax", _explain, argv)


def _explain(name: str, argv: list[str]) -> None:
    if not {"-h", "--help"} & set(argv[:1]):
        command = argv[0] if argv else ""
        near = did_you_mean(command, COMMANDS, f"known: {', '.join(COMMANDS)}")
        raise ValueError(f"unknown command {command!r}; {near}")
    print(f"usage: python -m {name} COMMAND ...\n")
    for module in (prepare, train, evaluate, sample, report, compare, convert, completion):
        command, _, about = module.__doc__.splitlines()[0].partition(": ")
        print(f"  {command.removeprefix('sedd-'):<11}{about}")
    print(f"\nThe same as sedd-prepare and so on; python -m {name} COMMAND --help says more")
