"""The commands: sedd-train, sedd-eval, sedd-sample and sedd-report.

Each is also `python -m sedd_jax train` and so on. What a user can cause ends in one line on
standard error and exit status 2; training that cannot go on ends in one line and status 1.
"""

import argparse
import difflib
import json
import logging
import sys
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import NoReturn

from absl import flags
from ml_collections import ConfigDict, config_flags

Argv = list[str] | None


def train_command(argv: Argv = None) -> int:
    """sedd-train --config=configs/quickstart.py --workdir=DIR [--config.train.steps=100 ...]"""
    return _guarded("sedd-train", _train, argv)


def eval_command(argv: Argv = None) -> int:
    """sedd-eval --workdir=DIR: the bound on the run's held-out text."""
    return _guarded("sedd-eval", _eval, argv)


def sample_command(argv: Argv = None) -> int:
    """sedd-sample --workdir=DIR [--template "... [MASK:20] ..."]: text from a run."""
    return _guarded("sedd-sample", _sample, argv)


def report_command(argv: Argv = None) -> int:
    """sedd-report --workdir=DIR: table, samples, picture.png and summary.json of a run."""
    return _guarded("sedd-report", _report, argv)


COMMANDS = {
    "train": train_command,
    "eval": eval_command,
    "sample": sample_command,
    "report": report_command,
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
    _log_plainly()
    try:
        return command(name, sys.argv[1:] if argv is None else argv) or 0
    except (ValueError, OSError, flags.Error) as error:
        return _say(name, error, status=2)
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130


def _say(name: str, error: Exception, status: int) -> int:
    print(f"{name}: error: {' '.join(str(error).split())}", file=sys.stderr)
    return status


def _log_plainly() -> None:
    """The package's own messages as plain lines on standard error."""
    logger = logging.getLogger("sedd_jax")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)


def parse_config(name: str, argv: list[str]) -> tuple[ConfigDict, Path]:
    """(config, workdir) from --config=FILE[:ARGUMENT], --config.key=value and --workdir=DIR."""
    from sedd_jax.config import RULES

    argv = [_find_config(argument) for argument in argv]
    for argument in argv:
        if argument.startswith("--config."):
            key = argument[len("--config.") :].split("=")[0]
            if key not in RULES:
                near = difflib.get_close_matches(key, RULES, n=3) or list(RULES)
                raise ValueError(f"unknown config key {key}; did you mean {', '.join(near)}?")
    values = flags.FlagValues()
    config_flags.DEFINE_config_file(
        "config", None, "the experiment", flag_values=values, sys_argv=[name, *argv]
    )
    flags.DEFINE_string("workdir", None, "the run's folder", flag_values=values)
    rest = values([name, *argv])[1:]
    if rest:
        raise ValueError(f"unknown argument {rest[0]!r}; write --config.key=value")
    for flag in ("config", "workdir"):
        if not values[flag].value:
            raise ValueError(
                f"--{flag} is missing; for example {name} --config=configs/quickstart.py "
                "--workdir=runs/quickstart"
            )
    return values.config, Path(values.workdir)


def _find_config(argument: str) -> str:
    """--config=quickstart names a config that is installed with the package."""
    if not argument.startswith("--config="):
        return argument
    path, colon, rest = argument[len("--config=") :].partition(":")
    if Path(path).is_file():
        return argument
    shipped = resources.files("sedd_jax.configs") / f"{path}.py"
    if shipped.is_file():
        return f"--config={shipped}{colon}{rest}"
    known = sorted(
        Path(file.name).stem
        for file in resources.files("sedd_jax.configs").iterdir()
        if file.name.endswith(".py") and not file.name.startswith("_")
    )
    raise ValueError(f"no config file {path!r}; give a path, or one of {', '.join(known)}")


def _train(name: str, argv: list[str]) -> int:
    if {"-h", "--help"} & set(argv):
        print(f"usage: {train_command.__doc__}\nEvery key is in configs/base.py.")
        return 0
    config, workdir = parse_config(name, argv)
    from sedd_jax.progress import TrainingStopped
    from sedd_jax.train import train

    try:
        train(config, workdir)
    except TrainingStopped as error:
        return _say(name, error, status=1)
    return 0


class _Parser(argparse.ArgumentParser):
    """Mistakes in the arguments are errors like any other: one line."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; {self.prog} --help lists the arguments")


def _parser(name: str, description: str) -> argparse.ArgumentParser:
    parser = _Parser(prog=name, description=description, allow_abbrev=False)
    parser.add_argument("--workdir", type=Path, required=True, help="the run's folder")
    return parser


def _eval(name: str, argv: list[str]) -> None:
    parser = _parser(name, "The likelihood bound on the run's held-out text.")
    parser.add_argument("--blocks", type=int, help="score this many blocks (default: all)")
    parser.add_argument("--passes", type=int, default=16, help="noise levels a block, even")
    parser.add_argument("--batch_size", type=int, default=32, help="blocks a network call")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--baselines", action="store_true", help="add unigram and bigram models of the same text"
    )
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    options = parser.parse_args(argv)
    from sedd_jax.api import load
    from sedd_jax.report import evaluate_heldout, table

    result = evaluate_heldout(
        load(options.workdir),
        options.workdir,
        blocks=options.blocks,
        passes=options.passes,
        batch_size=options.batch_size,
        seed=options.seed,
        baselines=options.baselines,
        progress=True,
    )
    print(table(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1), encoding="utf-8")


def _sample(name: str, argv: list[str]) -> None:
    parser = _parser(name, "Text from a trained model.")
    parser.add_argument("--template", help='text with free places, "Hi, my name is [MASK:20]."')
    parser.add_argument("--prefix", default="", help="text that every sample begins with")
    parser.add_argument("--suffix", default="", help="text that every sample ends with")
    parser.add_argument("--steps", type=int, help="reverse steps (default: the config's)")
    parser.add_argument("--predictor", help="tweedie, euler or none (default: the config's)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num_samples", type=int, default=1)
    options = parser.parse_args(argv)
    if options.template is not None and (options.prefix or options.suffix):
        raise ValueError("--template cannot go with --prefix or --suffix; write them into it")
    from sedd_jax import data
    from sedd_jax.api import load

    model = load(options.workdir)
    known = None
    if options.template is not None:
        known = data.parse_template(options.template, model.tokenizer, model.length)
    elif options.prefix or options.suffix:
        known = data.prefix_suffix(options.prefix, options.suffix, model.tokenizer, model.length)
    ours = model.config.sample
    samples = model.sample_tokens(
        options.num_samples,
        steps=ours.steps if options.steps is None else options.steps,
        predictor=options.predictor or ours.predictor,
        draw=ours.draw,
        t_min=ours.t_min,
        seed=options.seed,
        known=known,
    )
    _show(model.decode(samples.tokens))


def _show(texts: list[str]) -> None:
    for number, text in enumerate(texts, start=1):
        print(f"--- {number} " + "-" * 60)
        print(text)


def _report(name: str, argv: list[str]) -> None:
    parser = _parser(name, "A run's table, samples, picture.png and summary.json.")
    parser.add_argument("--template", help='text to infill, "The [MASK:24] statement."')
    parser.add_argument("--passes", type=int, default=16, help="noise levels a block, even")
    parser.add_argument("--began", type=float, help="Unix time that `seconds` counts from")
    options = parser.parse_args(argv)
    from sedd_jax.api import load
    from sedd_jax.report import report, table

    summary = report(
        load(options.workdir),
        options.workdir,
        template=options.template,
        passes=options.passes,
        began=options.began,
    )
    print(table(summary["heldout"]))
    print(f"\nwords of the samples that occur in the training text: {summary['word_rate']:.0%}")
    print("\nsamples")
    _show(summary["samples"][:4])
    if options.template is not None:
        print(f"\n{options.template}")
        _show(summary["infill"])
    print(f"\nwritten: {options.workdir / 'summary.json'}, {options.workdir / 'picture.png'}")
