"""The arguments that commands share, and what is checked of them before any work."""

import argparse
import importlib.util
from pathlib import Path
from typing import NoReturn

GRID_HELP = "times of the steps: uniform or cosine (default: the config's)"
DRAW_HELP = "exact or float32_gumbel, the original's (default: the config's)"


class _Parser(argparse.ArgumentParser):
    """Mistakes in the arguments are errors like any other: one line."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; {self.prog} --help lists the arguments")


def make_parser(name: str, description: str) -> argparse.ArgumentParser:
    return _Parser(prog=name, description=description, allow_abbrev=False)


def run_parser(name: str, description: str, workdir: str) -> argparse.ArgumentParser:
    parser = make_parser(name, description)
    parser.add_argument("--workdir", type=Path, required=True, help=workdir)
    return parser


def check_run(source: Path, remedy: str) -> None:
    """ValueError for a model alone where the command needs its run; what is no model, load refuses."""
    from sedd_jax import hub
    from sedd_jax.convert.folder import PICKLED, WEIGHTS

    if any((source / name).is_file() for name in (WEIGHTS, PICKLED)):
        found = f"{str(source)!r} is an exported model, which has no records of its own"
    elif not source.exists() and hub.parse(str(source)) is not None:
        found = f"no folder at {str(source)!r}, and a model of the hub has no records of its own"
    else:
        return
    raise ValueError(f"{found}; {remedy}, or the folder of a run as --workdir")


def check_matplotlib(what: str) -> None:
    """ValueError without the library that draws, before the work."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError(f'{what} needs the library matplotlib; pip install "sedd_jax[plot]"')
