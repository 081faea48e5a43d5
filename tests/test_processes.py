"""Several processes on this machine: what they agree on, how they stop, die and come back.

Every process has several simulated CPU devices and finds the others through the loopback address.
SEDD_KILLS=20 pytest -m long tests/test_processes.py kills 20 times.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from conftest import QUICK, REPOSITORY, command_line, says
from test_train import assert_bit_equal, checkpoint_steps, logged_steps, restored

from sedd_jax.parallel import cluster, processes
from sedd_jax.parallel.cluster import Cluster

CHANGES = {
    "model__dropout": 0.1,
    "train__batch_size": 8,
    "train__log_every": 1,
    "train__steps": 100_000,
    "train__eval_every": 100_000,
    "checkpoint__every": 100_000,
}


def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Processes:
    """`python COMMAND ...` as `count` processes of `devices` devices each.

    Every process gets the flags of a cluster. Standard error goes to `name`.0.log and so on,
    standard output to `name`.0.out.
    """

    def __init__(
        self, name, command, count=2, devices=4, each=lambda index: (), cwd=lambda i: None
    ):
        self.address = f"127.0.0.1:{port()}"
        environment = {
            **os.environ,
            "XLA_FLAGS": f"{QUICK} --xla_force_host_platform_device_count={devices}",
            "PYTHONPATH": str(REPOSITORY),
        }
        self.logs = [name.with_name(f"{name.name}.{i}.log") for i in range(count)]
        self.members = []
        for index in range(count):
            arguments = [
                *command,
                f"--coordinator={self.address}",
                f"--process_count={count}",
                f"--process_index={index}",
                "--heartbeat=10",
                *each(index),
            ]
            with self.logs[index].open("w") as log, self.out(index).open("w") as out:
                self.members.append(
                    subprocess.Popen(
                        [sys.executable, *map(str, arguments)],
                        env=environment,
                        stdout=out,
                        stderr=log,
                        cwd=cwd(index),
                    )
                )

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        for member in self.members:
            member.kill()
            member.wait()

    def out(self, index: int):
        """The file of what a process wrote to standard output."""
        return self.logs[index].with_suffix(".out")

    def said(self, index: int) -> str:
        """What a process wrote to standard error, without the lines of its transport."""
        lines = self.logs[index].read_text(errors="replace").splitlines()
        return "\n".join(line for line in lines if "[Gloo]" not in line)

    def wait_until(self, happened, seconds=240):
        end = time.monotonic() + seconds
        while not happened():
            assert time.monotonic() < end, [self.said(i) for i in range(len(self.members))]
            ended = [i for i, member in enumerate(self.members) if member.poll() is not None]
            assert not ended, [self.said(i) for i in ended]
            time.sleep(0.02)

    def finish(self, seconds=240):
        """The exit statuses."""
        return [member.wait(timeout=seconds) for member in self.members]


class Group(Processes):
    """sedd-train."""

    def __init__(self, workdir, count=2, devices=4, flags=(), each=lambda index: (), **changes):
        self.workdir = workdir
        arguments = command_line(workdir, **{**CHANGES, **changes})
        command = ["-m", "sedd_jax", "train", *arguments, *flags]
        super().__init__(workdir, command, count, devices, each)


def run(workdir, **options):
    """The exit statuses of a group that is left alone, and what each wrote."""
    with Group(workdir, **options) as group:
        return group.finish(), [group.said(i) for i in range(len(group.members))]


def start_of(tmp_path_factory, name):
    return tmp_path_factory.mktemp(name) / "run"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of 12 steps by 2 processes that nothing happened to."""
    workdir = start_of(tmp_path_factory, "whole")
    statuses, said = run(workdir, train__steps=12, checkpoint__every=4)
    assert statuses == [0, 0], said
    return workdir


def continued(workdir, whole, **options):
    """Go on to step 12 and compare bit by bit with the run that nothing happened to."""
    statuses, said = run(workdir, train__steps=12, checkpoint__every=4, **options)
    assert statuses == [0, 0], said
    assert restored(workdir)[0] == restored(whole)[0] == 12
    assert_bit_equal(restored(workdir)[1], restored(whole)[1])


PHASES = {
    # phase: (what the log or the folder shows when it has begun, changes)
    "compile": (lambda group: "compiling the train step" in group.said(0), {}),
    "train": (lambda group: max(logged_steps(group.workdir), default=0) >= 2, {}),
    "evaluate": (
        lambda group: logged_steps(group.workdir).count(3),
        {"train__eval_every": 3, "evaluate__blocks": 4000, "evaluate__batch_size": 8},
    ),
    "sample": (
        lambda group: logged_steps(group.workdir).count(3),
        {"sample__every": 3, "sample__steps": 100_000},
    ),
    "save": (
        lambda group: list((group.workdir / "checkpoints").glob("*orbax-checkpoint-tmp*")),
        {"checkpoint__every": 4},
    ),
}


# One of each is run always; the others take minutes.
long = pytest.mark.long


@pytest.mark.parametrize(
    "phase", [pytest.param(name, marks=() if name == "train" else long) for name in PHASES]
)
def test_a_signal_to_one_process_stops_all_with_one_checkpoint(tmp_path, whole, phase):
    has_begun, changes = PHASES[phase]
    workdir = tmp_path / "run"
    with Group(workdir, flags=["--requeue_status=75"], **changes) as group:
        group.wait_until(lambda: has_begun(group))
        group.members[1].send_signal(signal.SIGTERM)
        assert group.finish() == [75, 75], [group.said(0), group.said(1)]
        step = max(checkpoint_steps(workdir))
        assert f"stopped by a signal at step {step}" in group.said(0)
    assert restored(workdir)[0] == step < 100_000
    if step < 12:
        continued(workdir, whole)


@long
@pytest.mark.parametrize("seed", range(int(os.environ.get("SEDD_KILLS", "1"))))
def test_a_killed_process_ends_the_other_and_the_run_goes_on_bit_equal(tmp_path, whole, seed):
    workdir = tmp_path / "run"
    random = np.random.default_rng(seed)
    with Group(workdir, train__steps=12, checkpoint__every=4) as group:
        if seed % 2 == 0:  # in the steps; otherwise anywhere, joining and compiling included
            group.wait_until(lambda: checkpoint_steps(workdir))
        time.sleep(random.uniform(0, 1 if seed % 2 == 0 else 15))
        victim = group.members[random.integers(2)]
        victim.kill()
        began = time.monotonic()
        statuses = group.finish(seconds=100)
        # It may have come too late for one that was done.
        assert -signal.SIGKILL in statuses or statuses == [0, 0]
        assert time.monotonic() - began < 90  # joining has a minute by itself
    continued(workdir, whole)


@long
@pytest.mark.parametrize("count", [1, 4])
def test_a_run_goes_on_as_another_number_of_processes_on_the_same_examples(tmp_path, whole, count):
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    for step in (8, 12):
        shutil.rmtree(workdir / "checkpoints" / str(step))
    statuses, said = run(
        workdir, count=count, devices=8 // count, train__steps=12, checkpoint__every=4
    )
    assert statuses == [0] * count, said
    assert "resuming at step 4" in said[0]
    losses = [
        [row["nats_per_token"] for row in map(json.loads, file.open()) if row["kind"] == "train"]
        for file in (workdir / "metrics.jsonl", whole / "metrics.jsonl")
    ]
    # The same examples and noise: sums in another order, and no more.
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
    assert len(losses[0]) == 12


def test_only_process_0_writes_what_all_would(whole):
    logs = [whole.with_name(f"run.{i}.log").read_text() for i in range(2)]
    assert "2 processes" in logs[0]
    assert "blocks of 32 tokens" not in logs[1]
    assert len(list((whole / "tensorboard").iterdir())) == 1


@long
def test_a_damaged_checkpoint_is_passed_over_by_all_processes_alike(tmp_path, whole):
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    shutil.rmtree(workdir / "checkpoints/12")
    file = max((workdir / "checkpoints/8/train").rglob("*"), key=lambda p: p.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)
    continued(workdir, whole)
    assert [path.name for path in (workdir / "quarantine").iterdir()] == ["8"]
    assert "resuming at step 4" in workdir.with_name("run.0.log").read_text()


DISAGREEMENTS = {
    "config": (
        lambda index: [f"--config.train.batch_size={8 << index}"],
        r"processes 0 and 1 disagree on the config: train.batch_size 8 and 16; start all",
    ),
    "workdir": (
        lambda index: [f"--workdir=elsewhere-{index}"],
        (
            r"'elsewhere-1' is not shared: process 1 on .*does not see what process 0 writes "
            r"there; name a folder"
        ),
    ),
    "mesh": (
        lambda index: ["--config.mesh.data=3"],
        r"mesh data=3, fsdp=1, tensor=1 does not multiply to 8 devices; set one size to -1",
    ),
    "tensor": (
        lambda index: ["--config.mesh.tensor=8", "--config.model.heads=8"],
        r"tensor=8 goes over several processes, .* set it to 1, or to a divisor of the devices",
    ),
}


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(name, marks=() if name in ("config", "tensor") else long)
        for name in DISAGREEMENTS
    ],
)
def test_what_only_one_process_can_see_is_an_error_on_every_process(tmp_path, monkeypatch, case):
    each, message = DISAGREEMENTS[case]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    began = time.monotonic()
    with Group(tmp_path / "run", each=each) as group:
        statuses = group.finish()
        said = [group.said(i) for i in range(2)]
    assert statuses == [2, 2], said
    assert time.monotonic() - began < 90  # one minute, and the start of two processes
    for words in said:
        assert re.search(message, words.replace("\n", " ")), words


def test_a_coordinator_that_does_not_answer_is_an_error_in_the_time_that_was_given(tmp_path):
    began = time.monotonic()
    with Group(tmp_path / "run", count=2, flags=["--join_timeout=6"]) as group:
        group.members[0].kill()
        statuses = group.finish()
        said = group.said(1)
    assert statuses[1] == 1
    assert time.monotonic() - began < 60
    assert said.splitlines()[-1].startswith(
        f"sedd_jax: error: cannot join the coordinator at {group.address} within 6 s: it did not"
    )


def test_a_stuck_process_writes_its_stacks_and_ends(tmp_path):
    code = (
        "import time\n"
        "from sedd_jax.training.progress import watchdog\n"
        "with watchdog(1) as stuck:\n"
        "    for _ in range(8):\n"
        "        stuck.alive(); time.sleep(0.25)\n"
        "    print('alive', flush=True)\n"
        "    def stuck_here(): time.sleep(60)\n"
        "    stuck_here()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=50, check=False
    )
    assert (done.returncode, done.stdout) == (1, "alive\n"), done.stderr
    assert "stuck: no step, batch or save was finished in 1 s" in done.stderr
    assert "in stuck_here" in done.stderr


@long
def test_a_stopped_process_ends_the_whole_group(tmp_path):
    """SIGSTOP: a host that is there and does nothing."""
    with Group(tmp_path / "run", train__stuck_seconds=60) as group:
        group.wait_until(lambda: max(logged_steps(tmp_path / "run"), default=0) >= 2)
        group.members[1].send_signal(signal.SIGSTOP)
        assert group.members[0].wait(timeout=120) not in (0, 2, 3)
        group.members[1].send_signal(signal.SIGCONT)
        assert group.members[1].wait(timeout=60) not in (0, 2, 3)


@pytest.mark.parametrize(
    ("job", "message"),
    [
        (Cluster(coordinator="h:1"), ("process_count None", "give all three")),
        (Cluster("h:1", 2, 2), ("process_index 2 is not in [0, 2)",)),
        (Cluster("h", 2, 0), ("coordinator 'h' is not HOST:PORT",)),
        (Cluster("h:70000", 2, 0), ("'h:70000' is not HOST:PORT",)),
        (Cluster(coordinator_bind="all"), ("coordinator_bind 'all' is not HOST:PORT",)),
        (Cluster(join_timeout=0), ("join_timeout 0 is below 1",)),
        (Cluster(heartbeat=-1), ("heartbeat -1 is below 1",)),
    ],
)
def test_a_job_that_cannot_be_joined_is_refused(job, message):
    with says(*message):
        cluster.join(job)


SRUN = {"SLURM_STEP_NODELIST": "a[1-2]", "SLURM_NTASKS": "2", "SLURM_PROCID": "1"}


@pytest.mark.parametrize(
    ("environment", "kind"),
    [
        ({}, None),
        (SRUN, "slurm"),
        ({**SRUN, "SLURM_NTASKS": "1"}, None),
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, None),  # a batch script's own shell
        ({"TPU_WORKER_HOSTNAMES": "a,b", "JAX_PLATFORMS": ""}, "tpu"),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "JAX_PLATFORMS": "cpu"}, None),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "JAX_PLATFORMS": ""}, None),
    ],
    ids=str,
)
def test_a_cluster_is_known_by_its_environment(monkeypatch, environment, kind):
    for name in (*SRUN, "TPU_WORKER_HOSTNAMES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cluster.kind_of_cluster() == kind


ALL_OF_SRUN = {**SRUN, "SLURM_JOB_ID": "7", "SLURM_LOCALID": "0"}
WORKERS = {"TPU_WORKER_HOSTNAMES": "a,b", "JAX_PLATFORMS": ""}
CLUSTER_VARIABLES = ("SLURM_", "TPU_", "OMPI_", "MEGASCALE_", "JAX_COORD", "JAX_LOCAL", "JAX_PART")


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        (SRUN, "SLURM_JOB_ID is missing, but SLURM_STEP_NODELIST is set"),
        ({**ALL_OF_SRUN, "SLURM_NTASKS": "two"}, "SLURM_NTASKS 'two' is not a whole number"),
        ({**ALL_OF_SRUN, "SLURM_PROCID": ""}, "SLURM_PROCID '' is not a whole number"),
        ({**ALL_OF_SRUN, "SLURM_PROCID": "7"}, "process_id=7, num_processes=2"),
        ({**ALL_OF_SRUN, "OMPI_MCA_orte_hnp_uri": "1"}, "OMPI_COMM_WORLD_SIZE is missing"),
        ({**ALL_OF_SRUN, "JAX_COORDINATOR_PORT": "x"}, "JAX_COORDINATOR_PORT 'x' is not a"),
        (WORKERS, "TPU_WORKER_ID is missing, but TPU_WORKER_HOSTNAMES is set"),
        ({**WORKERS, "TPU_WORKER_ID": "0"}, "TPU_WORKER_HOSTNAMES 'a,b' names several workers"),
        (
            {"TPU_PROCESS_ADDRESSES": "a:1,b:1", "JAX_PLATFORMS": "tpu"},
            "TPU_WORKER_ID is missing, but TPU_PROCESS_ADDRESSES is set",
        ),
        (
            {**WORKERS, "TPU_WORKER_ID": "0", "MEGASCALE_NUM_SLICES": "2"},
            "MEGASCALE_SLICE_ID is missing",
        ),
        ({"JAX_COORDINATOR_ADDRESS": "a:1"}, "JAX_COORDINATOR_ADDRESS is set, but not how many"),
        ({"JAX_PARTITION_INDEX": "a"}, "JAX_PARTITION_INDEX 'a' is not a whole number"),
        ({"JAX_LOCAL_DEVICE_IDS": "0,"}, "JAX_LOCAL_DEVICE_IDS '0,' is not a whole number"),
    ],
    ids=str,
)
def test_a_cluster_that_is_half_described_is_refused_with_the_variable(
    monkeypatch, environment, words
):
    for name in os.environ:
        if name.startswith(CLUSTER_VARIABLES):
            monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(cluster, "can_use_tpu", lambda: False)
    # jax.distributed refuses to begin where devices are in use, as in this process.
    monkeypatch.setattr(jax._src.xla_bridge, "backends_are_initialized", lambda: False)
    with says(words, "to run as one process"):
        cluster.join(Cluster(join_timeout=5))


def test_one_process_agrees_with_itself():
    assert processes.gather_text("ä") == ["ä"]
    assert processes.on_first_process(lambda: {"step": 3}) == {"step": 3}
    assert processes.first_then_others(lambda: "made") == "made"
    with says("no room"):
        processes.on_all_processes(lambda: (_ for _ in ()).throw(ValueError("no room")))
