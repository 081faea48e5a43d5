"""Several processes that act as one: agreeing and stopping (cluster.py: how they join).

Every process runs the same program on its own devices. What one of them sees alone (a signal, a
missing file, a config that differs) is shared with all here, so that all go on or all stop at the
same step: a process that stops alone leaves the others waiting in the next collective for ever.
"""

import collections
import faulthandler
import json
import os
import socket
import sys
import threading
import time
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

T = TypeVar("T")


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


def once(mesh: Mesh | None, action: Callable[[], T]) -> T:
    """action() here; over a mesh of several processes `on_first_process`."""
    return on_first_process(action) if mesh is not None and is_shared(mesh) else action()


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
