"""Eight CPU devices for the mesh tests, and a run small enough to be trained in a test."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"  # before anything imports jax
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

REPOSITORY = Path(__file__).resolve().parents[1]
TEST_DATA = Path(os.environ.get("SEDD_TEST_DATA", REPOSITORY / "../shared/data"))


def real(name: str) -> Path:
    """A file or folder of the real test data; skips where it is absent."""
    path = TEST_DATA / name
    if not path.exists():
        pytest.skip(f"{path} is absent; set SEDD_TEST_DATA to a folder that holds {name}")
    return path


def says(*parts: str):
    """A ValueError of one line that holds `parts` in order."""
    return pytest.raises(ValueError, match=r"\A(?=[^\n]*\Z).*" + ".*".join(map(re.escape, parts)))


def corpus_of(train: list[str], validation: list[str], **source):
    """A corpus of these documents."""
    from sedd_jax.data import Corpus

    return Corpus({"train": lambda: iter(train), "validation": lambda: iter(validation)}, source)


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
