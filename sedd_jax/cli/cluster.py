"""The commands on several processes: their flags, how they start and end, what they load."""

import argparse
import contextlib
import logging
import os
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from sedd_jax.cli.arguments import make_parser, named_tokenizer
from sedd_jax.cli.compiled import add_compilation_cache, keep_compiled_programs
from sedd_jax.cli.messages import SIGPIPE, libraries_on_stderr, message_of, reader_is_gone
from sedd_jax.host.console import activity

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from sedd_jax.evaluation.scorer import Scorer
    from sedd_jax.inference.model import SEDD
    from sedd_jax.parallel.cluster import Cluster

# Fields of parallel.cluster.Cluster: type, and what --help says.
CLUSTER = {
    "coordinator": (str, "HOST:PORT of process 0 (not needed in srun, on TPU pods)"),
    "process_count": (int, "how many processes there are, each with the same command"),
    "process_index": (int, "this one's number, from 0; process 0 prints and writes"),
    "coordinator_bind": (str, "ADDRESS:PORT where process 0 listens (default: anywhere)"),
    "join_timeout": (int, "seconds until a missing process is an error (default: 60)"),
    "heartbeat": (int, "seconds until a lost machine ends all (default: 100)"),
}


def add_cluster(parser: argparse.ArgumentParser) -> None:
    """The flags of CLUSTER, None where they are left out."""
    group = parser.add_argument_group("several processes, one result")
    for name, (kind, words) in CLUSTER.items():
        group.add_argument(f"--{name}", type=kind, help=words)


def cluster_of(values: Mapping[str, Any]) -> "Cluster":
    """The Cluster of those of its fields that are not None."""
    from sedd_jax.parallel.cluster import Cluster

    return Cluster(**{name: values[name] for name in CLUSTER if values[name] is not None})


def run_joined(
    name: str, parser: argparse.ArgumentParser, argv: list[str], action: Callable[[list[str]], Any]
) -> int:
    """action(argv without these flags) on each of the processes that those of CLUSTER name, if any.

    parser, with which action parses, gets the flags too, for its help. See `run_on_all`.
    """
    parser.add_last = _add_shared
    if {"-h", "--help"} & set(argv):
        action(argv)
    flags_alone = make_parser(parser.prog, "")
    flags_alone.takes_some = True
    _add_shared(flags_alone)
    options, rest = flags_alone.parse_known_args(argv)
    keep_compiled_programs(options.compilation_cache)

    def same_action() -> None:
        import jax

        from sedd_jax import __version__
        from sedd_jax.parallel import processes

        if not processes.is_alone():
            command = {f"argument {i}": text for i, text in enumerate(rest, start=1)}
            versions = {"sedd_jax": __version__, "jax": jax.__version__}
            processes.check_same("command", {**versions, **command})
        action(rest)

    return run_on_all(name, cluster_of(vars(options)), same_action, with_signals=True)


def _add_shared(parser: argparse.ArgumentParser) -> None:
    add_compilation_cache(parser)
    add_cluster(parser)


def run_on_all(
    name: str, cluster: "Cluster", action: Callable[[], int | None], *, with_signals: bool = False
) -> int:
    """The status that action() returns, here and on the processes that join by cluster, if any.

    Of several, process 0 alone writes to standard output and says more than warnings, and all end
    when one has an error or dies, each with a line that says so: see `SharedEnd`.
    """
    from sedd_jax.parallel import processes
    from sedd_jax.parallel.cluster import join
    from sedd_jax.parallel.ending import SharedEnd

    with contextlib.ExitStack() as stack:
        out = stack.enter_context(libraries_on_stderr())
        with activity("joining the other processes", cluster.coordinator is not None):
            join(cluster)
        if processes.is_alone():
            stack.close()
            return action() or 0
        if not processes.is_first():
            out = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            logging.getLogger("sedd_jax").setLevel(logging.WARNING)
        stack.enter_context(contextlib.redirect_stdout(out))
        host = (cluster.coordinator or "").rpartition(":")[0].strip("[]")
        end = stack.enter_context(SharedEnd(name, host, with_signals=with_signals))
        try:
            status = action() or 0
            processes.gather_text("")  # nobody leaves before process 0 has written
            return status
        except (ValueError, flags.Error) as error:
            end.fail(message_of(error), status=2)
        except BrokenPipeError as error:
            is_unread = processes.is_first() and reader_is_gone()
            words = "nobody reads standard output any more" if is_unread else message_of(error)
            end.fail(words, status=SIGPIPE if is_unread else 1)
        except OSError as error:  # as of a shared disk: another try may do
            end.fail(message_of(error), status=1)
        except Exception as error:  # noqa: BLE001 (passed on to all processes)
            end.fail(message_of(error), status=1, details=traceback.format_exc())


def load_model(options: argparse.Namespace) -> "SEDD":
    """The model of --workdir, with --step and --tokenizer, over all processes."""
    return load_over_all(options.workdir, step=options.step, tokenizer=named_tokenizer(options))


def load_over_all(source: str | Path, **options: Any) -> "SEDD":
    """inference.pretrained.load, over all processes."""
    from sedd_jax.inference.pretrained import load

    return load(source, mesh=_mesh(), **options)


def load_scorer(name: str, dtype: str = "float32") -> "Scorer":
    """The GPT-2 of that name, over all processes."""
    from sedd_jax.evaluation import scorer

    return scorer.load_scorer(name, dtype=dtype, mesh=_mesh())


def _mesh() -> "Mesh | None":
    """Of several processes, all devices: each has the whole weights and a part of every batch."""
    from sedd_jax.parallel import processes, sharding

    if processes.is_alone():
        return None
    return sharding.make_mesh({"data": -1, "fsdp": 1, "tensor": 1})
