"""sedd-train, and its dry run."""

import atexit
import difflib
import logging
import os
import sys
import traceback
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags
from ml_collections import ConfigDict, config_flags

from sedd_jax.cli.messages import say

USAGE = """sedd-train --config=configs/quickstart.py --workdir=DIR [--config.train.steps=100 ...]

To go on with the run in DIR, its own config is enough: sedd-train --workdir=DIR.
Every key is in configs/base.py.

Compile for a machine without having it, and see what fits:
  --dry_run --target=v5e:4x4   or v4:4x4x4, v5p:4x8x8, v5e:16x16*2 (slices), a100:16, h100:8, cpu:8
  --vocab_size=N               where the tokenizer's is not known from its name

On several machines, the same command on each; SLURM (in srun) and TPU pods are recognised:
  --coordinator=HOST:PORT --process_count=N --process_index=I   elsewhere
  --coordinator_bind=ADDRESS:PORT   where process 0 listens; default: on all its addresses
  --join_timeout=60            seconds until a missing process is an error
  --heartbeat=100              seconds until a dead process ends the others

Exit status: 0 all steps are done; 2 a mistake to mend; 3 training cannot go on; else run it again.
  --requeue_status=75          the status when a signal stopped it, after a checkpoint; default 0"""


class Request(NamedTuple):
    """The command line of sedd-train."""

    config: ConfigDict
    workdir: Path | None
    cluster: Any  # processes.Cluster
    requeue_status: int
    target: str | None  # of a dry run; None: no dry run
    vocab_size: int | None


def parse_train(name: str, argv: list[str]) -> Request:
    """--config=FILE[:ARGUMENT], --config.key=value, --workdir=DIR and the flags of `USAGE`."""
    from sedd_jax.config import KEYS
    from sedd_jax.parallel.processes import Cluster
    from sedd_jax.runs.workdir import saved_config

    # First what names the config, which then defines a flag for each of its keys.
    first = flags.FlagValues()
    first.set_gnu_getopt(True)
    for flag in ("config", "workdir"):
        flags.DEFINE_string(flag, None, "", flag_values=first)
    others = first([name, *argv], known_only=True)
    for key in (other[len("--config.") :] for other in others if other.startswith("--config.")):
        if (key := key.split("=")[0]) not in KEYS:
            near = difflib.get_close_matches(key, KEYS, n=3) or list(KEYS)
            raise ValueError(f"unknown config key {key}; did you mean {', '.join(near)}?")
    workdir = Path(first.workdir) if first.workdir else None
    config = first.config and _find_config(first.config)
    saved = saved_config(workdir) if workdir and not config else None

    values = flags.FlagValues()
    about = {"flag_values": values, "sys_argv": others}
    if saved is None:
        config_flags.DEFINE_config_file("config", config, "the experiment", **about)
    else:
        config_flags.DEFINE_config_dict("config", saved, **about)
    for flag, default in Cluster._field_defaults.items():
        define = flags.DEFINE_string if "coordinator" in flag else flags.DEFINE_integer
        define(flag, default, "", flag_values=values)
    flags.DEFINE_integer("requeue_status", 0, "", 0, 255, flag_values=values)
    flags.DEFINE_boolean("dry_run", False, "", flag_values=values)
    flags.DEFINE_string("target", None, "", flag_values=values)
    flags.DEFINE_integer("vocab_size", None, "", flag_values=values)
    rest = values(others)[1:]
    if rest:
        raise ValueError(f"unknown argument {rest[0]!r}; write --config.key=value")
    if values.dry_run != (values.target is not None):
        raise ValueError(
            "--dry_run and --target go together; for example --dry_run --target=v5e:4x4"
        )
    for flag, value in (("config", config or saved), ("workdir", workdir or values.dry_run)):
        if not value:
            raise ValueError(
                f"--{flag} is missing; for example {name} --config=configs/quickstart.py "
                "--workdir=runs/quickstart"
            )
    return Request(
        config=values.config,
        workdir=workdir,
        cluster=Cluster(**{field: values[field].value for field in Cluster._fields}),
        requeue_status=values.requeue_status,
        target=values.target,
        vocab_size=values.vocab_size,
    )


def _find_config(argument: str) -> str:
    """FILE[:ARGUMENT], where FILE may be the name of a config that the package installs."""
    path, colon, rest = argument.partition(":")
    if Path(path).is_file():
        return argument
    files = resources.files("sedd_jax.configs").iterdir()
    shipped = {file.name.removesuffix(".py"): file for file in files if file.name[0] != "_"}
    if path in shipped:
        return f"{shipped[path]}{colon}{rest}"
    raise ValueError(
        f"no config file {path!r}; give a path, or one of {', '.join(sorted(shipped))}"
    )


def run(name: str, argv: list[str]) -> int:
    if {"-h", "--help"} & set(argv):
        print(f"usage: {USAGE}")
        return 0
    request = parse_train(name, argv)
    if request.target is not None:
        return _dry_run(name, request)
    from sedd_jax.parallel import processes

    processes.join(request.cluster)
    try:
        return _train_here(name, request)
    except Exception as error:
        if processes.is_alone() or isinstance(error, ValueError):  # which all processes raise
            raise
        # The others wait for this one in a collective: it must be gone for them to notice.
        traceback.print_exc()
        say(name, error, status=1)
        sys.stderr.flush()
        os._exit(1)


def _train_here(name: str, request: Request) -> int:
    from sedd_jax.parallel import processes
    from sedd_jax.training.progress import TrainingStopped
    from sedd_jax.training.train import train

    if not processes.is_first():  # one writes what all would
        logging.getLogger("sedd_jax").setLevel(logging.WARNING)
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
    from sedd_jax.training.dry_run import describe, dry_run

    estimate = dry_run(request.config, request.target, vocab_size=request.vocab_size)
    print(describe(estimate))
    return say(name, ValueError(estimate.complaint), status=2) if estimate.complaint else 0
