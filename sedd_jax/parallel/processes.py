"""Several processes that act as one: joining, agreeing, stopping.

Every process runs the same program on its own devices. What one of them sees alone (a signal, a
missing file, a config that differs) is shared with all here, so that all go on or all stop at the
same step: a process that stops alone leaves the others waiting in the next collective for ever.
"""

import collections
import faulthandler
import importlib.util
import json
import os
import re
import signal
import socket
import sys
import threading
import time
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sedd_jax.parallel.devices import check_platform, has_tpu

T = TypeVar("T")
ALONE = "to run as one process"

# What jax.distributed reads of a cluster's environment: by the variable that shows the cluster,
# the whole numbers that it needs too.
NUMBERS = {
    "slurm": {
        "SLURM_STEP_NODELIST": ("SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID"),
        "OMPI_MCA_orte_hnp_uri": (
            "OMPI_COMM_WORLD_SIZE",
            "OMPI_COMM_WORLD_RANK",
            "OMPI_COMM_WORLD_LOCAL_RANK",
        ),
    },
    "tpu": {
        "TPU_PROCESS_ADDRESSES": ("TPU_WORKER_ID",),
        "TPU_WORKER_HOSTNAMES": ("TPU_WORKER_ID",),
        "MEGASCALE_COORDINATOR_ADDRESS": ("MEGASCALE_NUM_SLICES", "MEGASCALE_SLICE_ID"),
        "MEGASCALE_NUM_SLICES": ("MEGASCALE_NUM_SLICES", "MEGASCALE_SLICE_ID"),
    },
}
JAX_ADDRESSES = ("JAX_COORDINATOR_ADDRESS", "JAX_COORDINATOR_BIND_ADDRESS")
JAX_NUMBERS = (
    "JAX_COORDINATOR_PORT",
    "JAX_LOCAL_DEVICE_IDS",
    "JAX_PARTITION_INDEX",
    "JAX_SLICE_INDEX",
)


class Cluster(NamedTuple):
    """How to find the other processes. All None: from the environment, if it is a cluster's."""

    coordinator: str | None = None  # HOST:PORT of process 0
    process_count: int | None = None
    process_index: int | None = None
    coordinator_bind: str | None = None  # ADDRESS:PORT process 0 listens on; None: all addresses
    join_timeout: int = 60  # seconds until a missing coordinator or process is an error
    heartbeat: int = 100  # seconds until a dead process ends the others


def check(cluster: Cluster) -> None:
    """ValueError for a cluster that cannot be joined."""
    named = (cluster.coordinator, cluster.process_count, cluster.process_index)
    is_named = [x is not None for x in named]
    if any(is_named) and not all(is_named):
        raise ValueError(
            f"coordinator {cluster.coordinator!r}, process_count {cluster.process_count} and "
            f"process_index {cluster.process_index} go together; give all three, or none to "
            "take them from SLURM's or the TPU's environment"
        )
    if all(is_named) and not 0 <= cluster.process_index < cluster.process_count:
        raise ValueError(
            f"process_index {cluster.process_index} is not in [0, {cluster.process_count}), "
            "the process_count; number the processes from 0"
        )
    addresses = {name: getattr(cluster, name) for name in ("coordinator", "coordinator_bind")}
    addresses |= {name: os.environ.get(name) for name in JAX_ADDRESSES}
    for name, address in addresses.items():
        host, _, port = (address or "").rpartition(":")
        if address is not None and not (host and port.isdecimal() and 0 < int(port) < 2**16):
            raise ValueError(f"{name} {address!r} is not HOST:PORT; for example 10.0.0.2:8476")
    for name in ("join_timeout", "heartbeat"):
        if getattr(cluster, name) < 1:
            raise ValueError(f"{name} {getattr(cluster, name)} is below 1; give seconds")


# The variables with the number of processes and this one's, as Open MPI and MPICH set them.
MPI = (("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"), ("PMI_SIZE", "PMI_RANK"))


def kind_of_cluster() -> str | None:
    """The kind of cluster that the environment describes: slurm, tpu, or None for one machine."""
    # Inside srun, that is: a batch script's own shell has the other names, and is one process.
    if "SLURM_STEP_NODELIST" in os.environ and os.environ.get("SLURM_NTASKS", "1") != "1":
        return "slurm"
    if os.environ.get("JAX_PLATFORMS", "tpu").split(",")[0] not in ("", "tpu"):
        return None
    # Kubernetes names a worker's peers; a Cloud TPU machine has chips and its metadata server.
    return "tpu" if "," in _tpu_workers()[1] or _can_use_tpu() else None


def _tpu_workers() -> tuple[str, str]:
    """The variable that names the workers of a TPU slice, as jax looks for it, and its value."""
    names = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")
    name = names[0] if names[0] in os.environ else names[1]
    return name, os.environ.get(name, "")


def _can_use_tpu() -> bool:
    return importlib.util.find_spec("libtpu") is not None and has_tpu()


def check_environment(kind: str | None) -> None:
    """ValueError for a variable that jax.distributed reads and that is missing or no number."""
    needed = [(name, name) for name in JAX_NUMBERS if name in os.environ]
    for shows, numbers in NUMBERS.get(kind, {}).items():
        needed += [(shows, name) for name in numbers if shows in os.environ]
    needed.sort(key=lambda pair: pair[1] not in os.environ)  # what is wrong before what is missing
    for shows, name in needed:
        text = os.environ.get(name)
        form = r"\d+(,\d+)*" if name == "JAX_LOCAL_DEVICE_IDS" else r"\d+"
        if text is None or not re.fullmatch(form, text):
            fault = "is missing" if text is None else f"{text!r} is not a whole number"
            beside = "" if shows == name else f", but {shows} is set, as for several processes"
            raise ValueError(f"{name} {fault}{beside}; correct it, or unset {shows} {ALONE}")
    name, workers = _tpu_workers()
    if kind == "tpu" and "," in workers and not _can_use_tpu():
        raise ValueError(
            f"{name} {workers!r} names several workers, but no TPU and libtpu are here; install "
            f"sedd_jax[tpu] on a TPU machine, or unset {name} {ALONE}"
        )


def join(cluster: Cluster) -> None:
    """Join the other processes, before anything touches a device; nothing on a plain machine.

    The process ends with one line and exit status 2 if it cannot start its devices, and 1 if the
    coordinator, or one of the others, is not there within join_timeout seconds. A process that dies
    later ends the others after `heartbeat` seconds.
    """
    check(cluster)
    kind = None if cluster.coordinator is not None else kind_of_cluster()
    is_alone = cluster.coordinator is None and kind is None
    if is_alone and "JAX_COORDINATOR_ADDRESS" in os.environ:
        raise ValueError(
            "JAX_COORDINATOR_ADDRESS is set, but not how many processes there are; give "
            f"--coordinator, --process_count and --process_index, or unset it {ALONE}"
        )
    check_environment(kind)
    if is_alone:
        for size, index in MPI:
            if os.environ.get(size, "1") != "1":
                raise ValueError(
                    f"{size}={os.environ[size]}: processes that mpirun starts do not join each "
                    "other by themselves; start them with srun, or give each "
                    f"--coordinator=HOST:PORT --process_count=${size} --process_index=${index}"
                )
        return
    if jax.distributed.is_initialized():  # a command before this one, in the same process
        return
    where = (
        f"the coordinator at {cluster.coordinator}"
        if cluster.coordinator
        else f"the {kind} cluster"
    )
    with Watchdog(
        cluster.join_timeout,
        f"cannot join {where} within {cluster.join_timeout} s: it did not answer, or not every "
        "process came; start all processes within that time, check that they reach HOST:PORT, or "
        "raise --join_timeout",
    ):
        try:
            jax.distributed.initialize(
                cluster.coordinator,
                cluster.process_count,
                cluster.process_index,
                # Explicit processes have the devices that they see; SLURM's share a machine's.
                local_device_ids=None if kind else [],
                coordinator_bind_address=cluster.coordinator_bind,
                initialization_timeout=cluster.join_timeout + 60,
                heartbeat_timeout_seconds=cluster.heartbeat,
            )
        except (ValueError, TypeError, LookupError) as error:  # of what it reads about the others
            raise ValueError(
                f"cannot join {where}: {error}; correct its variables in the environment, or give "
                f"--coordinator=localhost:8476 --process_count=1 --process_index=0 {ALONE}"
            ) from error
        except RuntimeError as error:
            if type(error) is not RuntimeError:  # of the join itself
                raise
            if kind == "tpu":  # a notebook on a TPU machine, where jax is in use: alone
                return
            raise ValueError(
                f"cannot join {where}: jax is in use already; start the command as a process of "
                "its own"
            ) from error
        try:
            check_platform()
        except ValueError as error:  # of this process perhaps: a proper exit waits for the others
            print(f"sedd_jax: error: {error}", file=sys.stderr, flush=True)
            os._exit(2)
        # The first collective: the devices find each other here, or not at all.
        gather_text("")
    # jax has installed a handler that only records that the signal came.
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


class Watchdog:
    """While entered, ends the process if nothing calls `alive` for that many seconds; 0: never.

    Writes the message to standard error, and the stacks of all threads if with_stacks, and exits
    with status 1. From a thread, because nothing else acts: jax does not return from a join that
    fails, but aborts with a stack trace, and a host that is stuck (a lost file system, a collective
    that a peer never joined) is alive to all others.
    """

    GRACE = 30  # seconds until faulthandler acts, which needs no interpreter, if the thread cannot

    def __init__(self, seconds: float, message: str, *, with_stacks: bool = False):
        self.seconds, self.message, self.with_stacks = seconds, message, with_stacks
        self._stderr = sys.__stderr__  # a notebook's or a test's has no file descriptor
        self._done = threading.Event()

    def __enter__(self) -> Self:
        if self.seconds:
            self.alive()
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def alive(self) -> None:
        """Whoever calls this is not stuck."""
        if self.seconds:
            self._end = time.monotonic() + self.seconds
            faulthandler.dump_traceback_later(
                self.seconds + self.GRACE, exit=True, file=self._stderr
            )

    def _watch(self) -> None:
        while not self._done.wait(max(0.01, self._end - time.monotonic())):
            if time.monotonic() >= self._end:
                clear = "\r\x1b[K" if self._stderr.isatty() else ""  # of a progress bar
                print(f"{clear}sedd_jax: error: {self.message}", file=self._stderr, flush=True)
                if self.with_stacks:
                    faulthandler.dump_traceback(file=self._stderr)
                os._exit(1)

    def __exit__(self, *exception) -> None:
        self._done.set()
        faulthandler.cancel_dump_traceback_later()


def is_alone() -> bool:
    """Whether there is one process. Where none was joined no device is started to ask."""
    return not jax.distributed.is_initialized() or jax.process_count() == 1


def is_first() -> bool:
    """Whether this is the process that writes what all would; as `is_alone`."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def shows(progress: bool) -> bool:
    """Whether this process shows the bar that progress asks for: of several the first does."""
    return progress and is_first()


def is_shared(mesh: Mesh) -> bool:
    """Whether the mesh is of all of several processes; ValueError if it is of some, or another."""
    indices = {device.process_index for device in mesh.devices.flat}
    if indices == {jax.process_index()}:
        return False
    if indices != set(range(jax.process_count())):
        raise ValueError(
            f"the mesh has devices of the processes {', '.join(map(str, sorted(indices)))} of "
            f"{jax.process_count()}; give one of all processes' devices, or of this process's own"
        )
    return True


def gather_text(text: str) -> list[str]:
    """Every process's text, in order. A collective: all processes must call it."""
    mine = text.encode("utf-8")
    sizes = multihost_utils.process_allgather(np.int32(len(mine)))
    # To a power of two: each length of array is compiled once.
    padded = np.zeros(1 << max(0, int(sizes.max()) - 1).bit_length(), np.uint8)
    padded[: len(mine)] = np.frombuffer(mine, np.uint8)
    rows = multihost_utils.process_allgather(padded)
    return [bytes(row[:size]).decode("utf-8") for row, size in zip(rows, sizes)]


def first_then_others(action: Callable[[], T]) -> T:
    """action() on process 0, then on the others; errors as in `on_all_processes`."""
    first = is_first()
    result = on_all_processes(lambda: action() if first else None)
    return on_all_processes(lambda: result if first else action())


def on_all_processes(action: Callable[[], T]) -> T:
    """action() on every process. A ValueError or OSError of one is raised on all of them."""
    error, result = None, None
    try:
        result = action()
    except (ValueError, OSError) as raised:
        error = raised
    messages = gather_text("" if error is None else str(error) or type(error).__name__)
    if error is not None:
        raise error
    for index, message in enumerate(messages):
        if message:
            raise ValueError(f"process {index}: {message}")
    return result


def on_first_process(action: Callable[[], T]) -> T:
    """action() on process 0 alone; every process returns its result, which JSON must hold."""
    result = on_all_processes(lambda: action() if is_first() else None)
    return json.loads(gather_text(json.dumps(result))[0])


def check_same(what: str, values: Mapping[str, Any]) -> None:
    """ValueError on every process if one has other values than process 0."""
    first, *others = (json.loads(t) for t in gather_text(json.dumps(dict(values), default=str)))
    for index, other in enumerate(others, start=1):
        different = [k for k in {**first, **other} if first.get(k) != other.get(k)]
        if different:
            lines = [f"{k} {first.get(k)!r} and {other.get(k)!r}" for k in different[:5]]
            raise ValueError(
                f"processes 0 and {index} disagree on the {what}: {'; '.join(lines)}; start all "
                "processes with the same command, versions and files"
            )


def check_equal(what: str, tree: Any) -> None:
    """ValueError on every process if one has other numpy arrays in its tree than process 0."""

    def facts(leaf: np.ndarray) -> str:
        return f"{leaf.dtype} {leaf.shape}, sum {zlib.crc32(leaf.reshape(-1).view(np.uint8)):08x}"

    leaves = jax.tree_util.tree_leaves_with_path(tree)
    named = {jax.tree_util.keystr(path): np.ascontiguousarray(leaf) for path, leaf in leaves}
    check_same(what, {name: facts(leaf) for name, leaf in named.items()})


def check_shared(folder: Path, seconds: float = 30.0) -> None:
    """ValueError on every process if one does not see what process 0 writes into folder."""
    if is_alone():
        return
    name = on_first_process(lambda: f".seen-by-all-{os.getpid()}-{time.time_ns()}")

    def write():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()

    def look():
        end = time.monotonic() + seconds  # a network file system may show a file late
        while not (folder / name).exists():
            if time.monotonic() > end:
                raise ValueError(
                    f"{str(folder)!r} is not shared: process {jax.process_index()} on "
                    f"{socket.gethostname()} does not see what process 0 writes there; name a "
                    "folder that all machines mount"
                )
            time.sleep(0.1)

    on_first_process(write)
    try:
        on_all_processes(look)
    finally:
        on_first_process(lambda: (folder / name).unlink())


def fetch(tree: Any) -> Any:
    """A tree of arrays as whole numpy arrays, on every process of those over several processes."""

    def whole(a):
        if isinstance(a, jax.Array) and not (a.is_fully_addressable or a.is_fully_replicated):
            return multihost_utils.process_allgather(a, tiled=True)
        return np.asarray(a)

    return jax.tree.map(whole, tree)


class StopAgreement:
    """Whether is_requested() on any process: the same answer at the same call on every process.

    A call starts a reduction over the devices and reads that of two calls before, which the devices
    have finished by then: no call waits.
    """

    DELAY = 2

    def __init__(self, is_requested: Callable[[], bool], mesh: Mesh):
        self._is_requested, self._stop = is_requested, False
        self._single = is_alone()
        self._rows = NamedSharding(mesh, P(mesh.axis_names))
        self._count = mesh.size
        self._any = jax.jit(jnp.any, out_shardings=NamedSharding(mesh, P()))
        self._pending: collections.deque[jax.Array] = collections.deque()

    def __call__(self) -> bool:
        if self._single:
            return self._is_requested()
        if not self._stop:
            flag = np.array([self._is_requested()])
            flags = jax.make_array_from_callback((self._count,), self._rows, lambda _: flag)
            self._pending.append(self._any(flags))
            if len(self._pending) > self.DELAY:
                self._stop = bool(self._pending.popleft())
        return self._stop
