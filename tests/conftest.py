"""Eight CPU devices for the mesh tests, and a run small enough to be trained in a test."""

import os
import subprocess
import sys

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"  # before anything imports jax
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

# A model and a corpus for seconds, as differences from configs/quickstart.py.
TINY = {
    "data.length": 32,
    "model.hidden_size": 16,
    "model.blocks": 2,
    "model.heads": 2,
    "model.cond_dim": 8,
    "model.dropout": 0.1,
    "optimizer.warmup_steps": 5,
    "train.steps": 8,
    "train.batch_size": 8,
    "train.log_every": 2,
    "train.eval_every": 1000,
    "checkpoint.every": 4,
    "evaluate.blocks": 4,
    "evaluate.batch_size": 4,
    "evaluate.passes": 2,
}


@pytest.fixture
def tiny_config():
    from sedd_jax.configs import quickstart

    config = quickstart.get_config()
    for key, value in TINY.items():
        section, name = key.split(".")
        config[section][name] = value
    return config


def command_line(workdir, **changes):
    """The arguments of a tiny sedd-train; changes as train__steps=9."""
    keys = {**TINY, **{key.replace("__", "."): value for key, value in changes.items()}}
    flags = [f"--config.{key}={value}" for key, value in keys.items()]
    return ["--config=quickstart", f"--workdir={workdir}", *flags]


def start(name, *arguments, **options):
    """A command as a process of its own, on one CPU device."""
    environment = {**os.environ, "XLA_FLAGS": ""}
    return subprocess.Popen(
        [sys.executable, "-m", "sedd_jax", name, *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """The folder of a finished tiny run."""
    from sedd_jax.cli import train_command

    workdir = tmp_path_factory.mktemp("runs") / "tiny"
    assert train_command(command_line(workdir, train__eval_every=4)) == 0
    return workdir
