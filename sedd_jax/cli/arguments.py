"""The arguments that commands share, and what is checked of them before any work."""

import argparse
import atexit
import difflib
import importlib.util
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

from sedd_jax.host.files import local_path, write_json

log = logging.getLogger(__name__)

NEEDS_RECORDS = "give --records, a folder made by sedd-prepare"
MODEL = "the run's folder, an exported one, or a hub id, owner/name or owner/name@commit"


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Says every default that is one, unless the text does."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        has_default = action.default not in (None, "", False) and "default" not in action.help
        return super()._get_help_string(action) if has_default else action.help


class _Parser(argparse.ArgumentParser):
    """Mistakes in the arguments are errors like any other: one line."""

    takes_some = False  # of the flags; others know the rest
    add_last: Callable[[argparse.ArgumentParser], None] | None = None  # arguments after all others

    def parse_args(self, *args, **kwargs):
        if self.add_last is not None:
            self.add_last(self)
        return super().parse_args(*args, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; {self.prog} --help lists the arguments")

    def parse_known_args(self, args=None, namespace=None):
        """As argparse does, --config.KEY being known; a misspelt flag is refused first."""
        flags, is_value = self._option_string_actions, False
        for argument in () if self.takes_some else args or ():
            flag = argument.partition("=")[0]
            is_known = flag in flags or flag.startswith("--config.")
            if re.fullmatch(r"--[\w.-]+", flag) and not is_known and not is_value:
                near = did_you_mean(flag, flags, f"{self.prog} --help lists the flags")
                raise ValueError(f"unknown flag {flag}; {near}")
            is_value = argument in flags and flags[argument].nargs != 0
        return super().parse_known_args(args, namespace)


def make_parser(name: str, description: str) -> argparse.ArgumentParser:
    return _Parser(
        prog=name, description=description, allow_abbrev=False, formatter_class=_Formatter
    )


def did_you_mean(name: str, known: Iterable[str], otherwise: str) -> str:
    """A question with the known names that are like this one, or what to say if there are none."""
    plain = {one.lstrip("-"): one for one in known}  # else all flags would be like each other
    near = difflib.get_close_matches(name.lstrip("-"), plain, n=3)
    return f"did you mean {', '.join(plain[one] for one in near)}?" if near else otherwise


def path(text: str) -> Path:
    """An argparse type: files.local_path, whose words argparse passes on from this error alone."""
    try:
        return local_path(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def name_or_path(text: str) -> str:
    """An argparse type for what may also be a name or a hub id; "" is none of them."""
    return text and str(path(text))


def joined(argv: list[str]) -> list[str]:
    """--config.KEY VALUE as one argument, --config.KEY=VALUE, which the parsers of keys take."""
    arguments: list[str] = []
    for argument in argv:
        takes_it = arguments and re.fullmatch(r"--?config\.[^=]+", arguments[-1])
        if takes_it and not re.match(r"--|-[^\d.]", argument):  # -1 is a value
            arguments[-1] += f"={argument}"
        else:
            arguments.append(argument)
    return arguments


def add_imports(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--imports",
        type=_imported,
        help="modules, names or .py files with commas, that register parts of your own",
    )


def _imported(text: str) -> tuple[str, ...]:
    """An argparse type that runs the modules: the other arguments may name what they register."""
    from sedd_jax.host.imports import import_modules

    names = tuple(filter(None, text.split(",")))
    try:
        import_modules(names)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return names


def add_tokenizer(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--tokenizer",
        help="the model's, where its folder holds none: gpt2, json, ..., or a tokenizer.json",
    )
    add("--tokenizer_path", type=name_or_path, default="", help="its files, as for sedd-prepare")


class _Once(argparse.Action):
    """Stores the value of a flag that has two names."""

    def __call__(self, parser, namespace, values, option_string=None):
        if (earlier := getattr(namespace, self.dest)) not in (None, values):
            names = " and ".join(self.option_strings)
            parser.error(f"{names} say {str(earlier)!r} and {str(values)!r}; give one")
        setattr(namespace, self.dest, values)


def add_model(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """What names a model: --workdir or --model, --imports, --step and --tokenizer."""
    how = {"type": path, "action": _Once, "metavar": "MODEL", "help": MODEL}
    parser.add_argument("--workdir", "--model", required=required, **how)
    add_imports(parser)
    parser.add_argument("--step", type=int, help="a run's checkpoint (default: the newest)")
    add_tokenizer(parser)


def named_tokenizer(options: argparse.Namespace):
    """The tokenizer of --tokenizer and --tokenizer_path; None without them."""
    from sedd_jax import data

    name, path = options.tokenizer, options.tokenizer_path
    if name is None and path:
        raise ValueError("--tokenizer_path needs --tokenizer, the kind of its files")
    return None if name is None else data.named_tokenizer(name, path)


def add_steps(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, help="reverse steps (default: the config's)")


def _parameters(text: str) -> dict[str, Any]:
    """An argparse type, read as --config.sample.parameters is."""
    from sedd_jax.cli.keys import parse

    try:
        return parse("sample.parameters", text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


# Options of sampling but for steps: None where the model's config decides, or the default.
SAMPLING = {
    "predictor": (
        str,
        "tweedie, euler, two_stage and more, see docs/samplers.md (default: the config's)",
    ),
    "draw": (str, "exact or float32_gumbel, the original's (default: the config's)"),
    "grid": (
        str,
        "times of the steps: uniform, cosine, or fitted to the run's curve (default: the config's)",
    ),
    "theta": (float, "two_stage, theta_trapezoidal: where a step is cut (default 0.5)"),
    "eta": (float, "remdm_cap, _rescale, _loop: how much is masked again (default 0.02)"),
    "kappa": (float, "psi: how much is not noised again (default 0.95)"),
    "gamma": (float, "entropy_bounded: nats that are drawn together (default 0.1)"),
    "threshold": (float, "confidence: the probability that is drawn at once (default 0.9)"),
    "temperature": (float, "of the clean tokens; below 1 texts vary less than the model says"),
    "top_p": (float, "draw from the likeliest tokens that have this probability together"),
    "top_k": (int, "draw from so many of the likeliest tokens"),
    "parameters": (_parameters, "of a predictor or grid of your own, as JSON: '{\"power\": 3}'"),
}
SWITCHES = {
    "normalised": "euler, tweedie on absorbing noise: time alone decides when a token is revealed",
    "greedy": "the denoiser, after the last step, takes the likeliest tokens (--top_k=1: all do)",
}


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """The flags of SAMPLING and SWITCHES."""
    for name, (kind, words) in SAMPLING.items():
        parser.add_argument(f"--{name}", type=kind, help=words)
    for name, words in SWITCHES.items():
        parser.add_argument(f"--{name}", action="store_true", default=None, help=words)


def sampling_of(options: argparse.Namespace, *more: str) -> dict[str, Any]:
    """The values of add_sampling's flags, and of the named others, that were given."""
    values = {name: getattr(options, name) for name in (*SAMPLING, *SWITCHES, *more)}
    return {name: value for name, value in values.items() if value is not None}


def check_sampling(options: argparse.Namespace, *more: str, predictors: Iterable[str] = ()) -> None:
    """ValueError, before a model is loaded, for options that no model can be sampled with.

    predictors are those of a list, which may be the model's own too.
    """
    from sedd_jax.inference.pretrained import import_own
    from sedd_jax.inference.sampling import TABLES, Sampling

    named = sampling_of(options, *more)
    names = [(kind, named[kind]) for kind in TABLES if kind in named]
    names += [("predictor", name) for name in predictors]
    if any(name not in TABLES[kind] for kind, name in names):
        import_own(options.workdir)  # which may register it
    Sampling().replaced(**named)


def add_scorer(parser: argparse.ArgumentParser) -> None:
    """The model, the scorer and how the texts that it scores are sampled."""
    add = parser.add_argument
    add_model(parser)
    add(
        "--scorer",
        type=name_or_path,
        default="gpt2-large",
        help="gpt2 .. gpt2-xl, a folder, a hub id@commit; or ngram:N, the N-grams of the run's own "
        "training text (ngram: 5)",
    )
    add("--scorer_dtype", default="float32", help="float32 or bfloat16")
    add_sampling(parser)
    add("--batch_size", type=int, default=16, help="texts at once")
    add("--seed", type=int, default=0, help="of the samples")


def add_samples(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num_samples", type=int, default=256, help="texts of the model")
    parser.add_argument("--length", type=int, help="tokens of a sample (default: the model's)")


def add_records(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--records", type=path, help="records of sedd-prepare (default: the run's own; else needed)"
    )
    add(
        "--split",
        help="of the records (default: the run's heldout_split; of --records: test, or validation)",
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=output_file, help="also write the numbers to this file")


def output_file(text: str) -> Path:
    """An argparse type, a file to write, new or old: what prevents that is seen before the work.

    All of several processes do the same, so the others than the first write to a file of that name
    that is thrown away.
    """
    from sedd_jax.parallel import processes

    file = path(text)
    if not processes.is_first():
        folder = tempfile.mkdtemp()
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        return Path(folder, file.name)
    folder = file.absolute().parent
    if file.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a folder; give a file")
    if not folder.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is in no folder; make it or give another path")
    if not os.access(file if file.exists() else folder, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written; give another path")
    return file


def new_file(text: str) -> Path:
    """An argparse type, an output_file that is not there yet."""
    from sedd_jax.parallel import processes

    if processes.is_first() and path(text).exists():
        raise argparse.ArgumentTypeError(f"{text!r} exists already; move it or give a new path")
    return output_file(text)


def check_run(source: Path, remedy: str) -> None:
    """ValueError for a model alone where the command needs its run; load refuses other things."""
    from sedd_jax.convert.folder import INDEX, PICKLED, WEIGHTS
    from sedd_jax.convert.weights import PICKLED_INDEX
    from sedd_jax.host import hub

    if any((source / name).is_file() for name in (WEIGHTS, INDEX, PICKLED, PICKLED_INDEX)):
        fault = f"{str(source)!r} is an exported model, which has no records of its own"
    elif not source.exists() and hub.parse(str(source)) is not None:
        fault = f"no folder at {str(source)!r}, and a model of the hub has no records of its own"
    else:
        return
    raise ValueError(f"{fault}; {remedy}, or the folder of a run as --workdir")


def check_matplotlib(what: str) -> None:
    """ValueError without the library that draws, before the work."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError(f'{what} needs the library matplotlib; pip install "sedd_jax[plot]"')


def run_records(workdir: Path) -> tuple:
    """(the records of the run in workdir, its config.data, which names their splits)."""
    from sedd_jax.runs.workdir import open_records, saved_config

    config = saved_config(workdir)
    return open_records(config, workdir), config.data


def chosen_records(options: argparse.Namespace) -> tuple:
    """(records, split) that --records and --split name, else those of the run in --workdir."""
    from sedd_jax import data

    if options.records is not None:
        records = data.open_records(options.records)
        return records, options.split or records.scored_split
    records, names = run_records(options.workdir)
    return records, options.split or names.heldout_split


def show_result(text: str, result: Any, file: Path | None) -> None:
    """Prints the text; writes the result as JSON where there is a file, on process 0."""
    from sedd_jax.parallel import processes

    print(text)
    if file is not None and processes.is_first():
        write_json(file, result)
    say_written(file)


def say_written(*files: Path | None) -> None:
    """A line for each file that was named and is there now, on process 0."""
    from sedd_jax.parallel import processes

    for file in filter(None, files):
        if processes.is_first():
            log.info("written: %s", file)
