"""Several processes that act as one: joining, agreeing, stopping. Imports jax only.

Every process runs the same program on its own devices. What one of them sees alone (a signal, a
missing file, a config that differs) is shared with all here, so that all go on or all stop at the
same step: a process that stops alone leaves the others waiting in the next collective for ever.
"""

import collections
import faulthandler
import importlib.util
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

T = TypeVar("T")


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
    for name in ("coordinator", "coordinator_bind"):
        address = getattr(cluster, name)
        host, _, port = (address or "").rpartition(":")
        if address is not None and not (host and port.isdecimal() and 0 < int(port) < 2**16):
            raise ValueError(f"{name} {address!r} is no HOST:PORT; for example 10.0.0.2:8476")
    for name in ("join_timeout", "heartbeat"):
        if getattr(cluster, name) < 1:
            raise ValueError(f"{name} {getattr(cluster, name)} is below 1; give seconds")


def kind_of_cluster() -> str | None:
    """The kind of cluster that the environment describes: slurm, tpu, or None for one machine."""
    environment = os.environ
    # Inside srun, that is: a batch script's own shell has the other names, and is one process.
    if "SLURM_STEP_NODELIST" in environment and int(environment.get("SLURM_NTASKS", "1")) > 1:
        return "slurm"
    if environment.get("JAX_PLATFORMS", "tpu").split(",")[0] in ("", "tpu"):
        # Kubernetes names a worker's peers; a Cloud TPU machine has the chips' device files.
        if "," in environment.get("TPU_WORKER_HOSTNAMES", ""):
            return "tpu"
        if os.path.exists("/dev/accel0") or os.path.exists("/dev/vfio/0"):
            return "tpu" if importlib.util.find_spec("libtpu") else None
    return None


def join(cluster: Cluster) -> None:
    """Join the other processes, before anything touches a device; nothing on a plain machine.

    The process ends with one line and exit status 1 if the coordinator, or one of the others, is
    not there within join_timeout seconds. A process that dies later ends the others after
    `heartbeat` seconds.
    """
    check(cluster)
    kind = None if cluster.coordinator is not None else kind_of_cluster()
    if cluster.coordinator is None and kind is None:
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
                print(f"sedd_jax: error: {self.message}", file=self._stderr, flush=True)
                if self.with_stacks:
                    faulthandler.dump_traceback(file=self._stderr)
                os._exit(1)

    def __exit__(self, *exception) -> None:
        self._done.set()
        faulthandler.cancel_dump_traceback_later()


def is_alone() -> bool:
    """Whether there is one process."""
    return jax.process_count() == 1


def is_first() -> bool:
    """Whether this is the process that writes what all would."""
    return jax.process_index() == 0


def gather_text(text: str) -> list[str]:
    """Every process's text, in order. A collective: all processes must call it."""
    mine = text.encode("utf-8")
    sizes = multihost_utils.process_allgather(np.int32(len(mine)))
    padded = np.zeros(max(1, int(sizes.max())), np.uint8)
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
                "processes with the same command and versions"
            )


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
    """A tree of arrays over the mesh as whole numpy arrays, on every process."""
    return multihost_utils.process_allgather(tree, tiled=True)


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
