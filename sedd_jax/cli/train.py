"""sedd-train: train a model, or compile its step for a machine that is not there."""

import atexit
import inspect
import os
import re
import sys
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags
from ml_collections import ConfigDict, FrozenConfigDict

from sedd_jax.cli.arguments import did_you_mean, joined
from sedd_jax.cli.cluster import CLUSTER, cluster_of, run_on_all
from sedd_jax.cli.compiled import keep_compiled_programs
from sedd_jax.cli.messages import say
from sedd_jax.host.files import local_path

USAGE = """sedd-train --config=quickstart --workdir=DIR [--config.train.steps=100]

To go on with the run in DIR, its config is enough: sedd-train --workdir=DIR.
--config takes the name of one of the package's configs, or a file of yours,
FILE[:ARGUMENT]. --config.KEY=VALUE changes a key, as often as you like.

Compile for a machine without having it, and see what fits:
  --dry_run --target=v5e:4x4   or v4:4x4x4, v5p:4x8x8, v5e:16x16*2 (slices),
                               a100:16, h100:8, cpu:8
  --vocab_size=N               where the tokenizer's is not known from its name

Keep compiled programs for the next time, in ~/.cache/sedd_jax (or
$XDG_CACHE_HOME/sedd_jax):
  --compilation_cache=off      or on; default: on with a GPU or TPU

On several machines, the same command on each:
{cluster}

Exit status: 0 all steps are done; 2 a mistake to correct; 3 it cannot go on;
else run it again.
  --requeue_status=75          the status when a signal stopped it, after a
                               checkpoint; default 0"""

BASE = "sedd_jax.configs.base"
REMEDY = "correct the file, or what --config has after the colon"


class Request(NamedTuple):
    """The command line of sedd-train."""

    config: ConfigDict
    workdir: Path | None
    cluster: Any  # parallel.cluster.Cluster
    requeue_status: int
    compilation_cache: str | None
    target: str | None  # of a dry run; None: no dry run
    vocab_size: int | None


class _WholeNumber(flags.IntegerParser):
    def convert(self, argument):
        try:
            return super().convert(argument)
        except ValueError:
            raise ValueError(f"{argument!r} is not a whole number; write digits") from None


def parse_train(name: str, argv: list[str]) -> Request:
    """--config=FILE[:ARGUMENT], --config.key=value, --workdir=DIR and the flags of `USAGE`."""
    from sedd_jax import config as configuration
    from sedd_jax.cli.keys import with_texts
    from sedd_jax.runs.workdir import run_around, saved_config

    values = flags.FlagValues()
    values.set_gnu_getopt(True)

    def define(flag: str, parser: flags.ArgumentParser, default: Any = None, **options) -> None:
        new = flags.Flag(parser, flags.ArgumentSerializer(), flag, default, "", **options)
        flags.DEFINE_flag(new, values)

    for flag in ("config", "workdir", "target"):
        define(flag, flags.ArgumentParser())
    argv = joined(argv)
    # Their values are parsed later: a module of config.imports may register what they name.
    parameters = r"--config\.(\w+\.parameters\.\w+)="
    named = [match[1] for one in argv if (match := re.match(parameters, one))]
    keys = {key: rule.holds(True) for key, rule in configuration.KEYS.items()}
    keys |= {key: False for key in named if key.rpartition(".")[0] in keys}
    for key, is_boolean in keys.items():
        define(f"config.{key}", flags.ArgumentParser(), boolean=is_boolean)
    for flag, (kind, _) in CLUSTER.items():
        define(flag, flags.ArgumentParser() if kind is str else _WholeNumber())
    define("vocab_size", _WholeNumber())
    define("requeue_status", _WholeNumber(lower_bound=0, upper_bound=255), 0)
    define("compilation_cache", flags.ArgumentParser())
    flags.DEFINE_boolean("dry_run", False, "", flag_values=values)
    try:
        rest = values([name, *argv])[1:]
    except flags.UnrecognizedFlagError as error:
        flag, flags_known = f"--{error.flagname}", [f"--{known}" for known in values]
        near = did_you_mean(flag, flags_known, f"{name} --help lists the flags")
        raise ValueError(f"unknown flag {flag}; {near}") from error
    if rest:
        raise ValueError(f"unknown argument {rest[0]!r}; write --config.key=value")
    if values.dry_run != (values.target is not None):
        raise ValueError(
            "--dry_run and --target go together; for example --dry_run --target=v5e:4x4"
        )
    workdir = local_path(values.workdir) if values.workdir else None
    if values.config:
        config = _read_config(values.config)
    else:
        config = saved_config(workdir) if workdir else None
    has_workdir = workdir is not None or values.dry_run
    for flag, is_there in (("config", config is not None), ("workdir", has_workdir)):
        if not is_there:
            is_empty = flag == "config" and workdir is not None
            why = f", and {str(workdir)!r} holds no run to go on with" if is_empty else ""
            example = f"; for example {name} --config=quickstart --workdir=runs/quickstart"
            remedy = (run_around(workdir) if is_empty else "") or example
            raise ValueError(f"--{flag} is missing{why}{remedy}")
    texts = {k: values[f"config.{k}"].value for k in keys if values[f"config.{k}"].present}
    return Request(
        config=with_texts(config, texts),
        workdir=workdir,
        cluster=cluster_of({flag: values[flag].value for flag in CLUSTER}),
        requeue_status=values.requeue_status,
        compilation_cache=values.compilation_cache,
        target=values.target,
        vocab_size=values.vocab_size,
    )


def _read_config(argument: str) -> ConfigDict:
    """What get_config of FILE[:ARGUMENT] returns; ValueError for any mistake in the file."""
    path, colon, text = _find_config(argument).partition(":")
    arguments = [text] if colon else []
    from sedd_jax.host import imports

    # As a module: config.imports may name the same file.
    get_config = getattr(imports.execute(path, "config file", REMEDY), "get_config", None)
    is_function = callable(get_config)
    if not is_function:
        raise ValueError(f"config file {path!r} has no function get_config; write one as in {BASE}")
    try:
        inspect.signature(get_config).bind(*arguments)
    except TypeError as error:
        rule = f"no argument; leave out {text!r}" if colon else "one: --config=FILE:ARGUMENT"
        raise ValueError(f"get_config of config file {path!r} takes {rule}") from error
    with imports.errors_of(path, "config file", REMEDY):
        config = get_config(*arguments)
    if isinstance(config, FrozenConfigDict):
        return ConfigDict(config)
    if isinstance(config, ConfigDict):
        return config
    raise ValueError(
        f"get_config of config file {path!r} returns a value of type {type(config).__name__}; "
        f"return a ConfigDict as in {BASE}"
    )


def _find_config(argument: str) -> str:
    """FILE[:ARGUMENT], where FILE may be the name of a config that the package installs."""
    path, colon, rest = argument.partition(":")
    if (file := local_path(path)).is_file():
        return f"{file}{colon}{rest}"
    shipped = shipped_configs()
    if path in shipped:
        return f"{shipped[path]}{colon}{rest}"
    local_path(argument)  # which has words of its own for an address
    raise ValueError(
        f"no config file {path!r}; give a path, or one of {', '.join(sorted(shipped))}"
    )


def shipped_configs() -> dict[str, Traversable]:
    """The files of the configs that the package installs, by name."""
    files = resources.files("sedd_jax.configs").iterdir()
    return {
        file.name.removesuffix(".py"): file
        for file in files
        if file.name.endswith(".py") and file.name[0] != "_"
    }


def _keys() -> str:
    """Every key of a config with its default, a line each."""
    from sedd_jax.config import flatten
    from sedd_jax.configs.base import get_config

    head = "The keys, with their defaults (sedd_jax.configs.base says what they mean):"
    rows = dict(flatten(get_config())).items()
    return "\n".join([head, *(f"  --config.{key}={value}" for key, value in rows)])


def run(name: str, argv: list[str]) -> int:
    if {"-h", "--help"} & set(argv):
        lines = (f"  {f'--{flag}':<18}  {words}" for flag, (_, words) in CLUSTER.items())
        print("usage:", USAGE.replace("{cluster}", "\n".join(lines)))
        print(f"\n{_keys()}")
        return 0
    request = parse_train(name, argv)
    if request.target is not None:
        return _dry_run(name, request)
    keep_compiled_programs(request.compilation_cache)
    return run_on_all(name, request.cluster, lambda: _train_here(name, request))


def _train_here(name: str, request: Request) -> int:
    from sedd_jax.training.progress import TrainingStopped
    from sedd_jax.training.train import train

    try:
        step = train(request.config, request.workdir)
    except TrainingStopped as error:
        return say(name, error, status=3)
    except KeyboardInterrupt:  # the second signal: jax would wait for the step before it ends
        atexit.register(os._exit, 130)
        atexit.register(sys.stdout.flush)  # called first
        raise
    return 0 if step >= request.config.train.steps else request.requeue_status


def _dry_run(name: str, request: Request) -> int:
    from sedd_jax.runs.workdir import stored_vocab_size
    from sedd_jax.training.dry_run import describe, dry_run

    vocab_size = request.vocab_size
    if vocab_size is None and request.workdir is not None:
        vocab_size = stored_vocab_size(request.workdir)
    estimate = dry_run(request.config, request.target, vocab_size=vocab_size)
    print(describe(estimate))
    return say(name, ValueError(estimate.complaint), status=2) if estimate.complaint else 0
