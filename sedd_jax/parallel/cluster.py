"""Joining the other processes of a cluster: named by flags, or found in the environment."""

import os
import re
import signal
import sys
from typing import NamedTuple

import jax

from sedd_jax.parallel.devices import can_use_tpu, check_platform
from sedd_jax.parallel.processes import Watchdog, gather_text

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
    return "tpu" if "," in _tpu_workers()[1] or can_use_tpu() else None


def _tpu_workers() -> tuple[str, str]:
    """The variable that names the workers of a TPU slice, as jax looks for it, and its value."""
    names = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")
    name = names[0] if names[0] in os.environ else names[1]
    return name, os.environ.get(name, "")


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
    if kind == "tpu" and "," in workers and not can_use_tpu():
        raise ValueError(
            f"{name} {workers!r} names several workers, but no TPU and libtpu are here; install "
            f"sedd_jax[tpu] on a TPU machine, or unset {name} {ALONE}"
        )


def _check_mpi() -> None:
    for size, index in MPI:
        if os.environ.get(size, "1") != "1":
            raise ValueError(
                f"{size}={os.environ[size]}: processes that mpirun starts do not join each other "
                "by themselves; start them with srun, or give each --coordinator=HOST:PORT "
                f"--process_count=${size} --process_index=${index}"
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
        _check_mpi()
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
        if not _initialize(cluster, kind, where):
            return
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


def _initialize(cluster: Cluster, kind: str | None, where: str) -> bool:
    """Joins jax's coordination service; False where jax is in use, in a notebook on a TPU."""
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
        if kind == "tpu":
            return False
        raise ValueError(
            f"cannot join {where}: jax is in use already; start the command as a process of its own"
        ) from error
    return True
