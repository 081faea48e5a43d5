"""Eight CPU devices for the mesh tests, and a run small enough to be trained in a test.

SEDD_TEST_PLATFORM=gpu (or cuda, tpu) leaves the tests the accelerator that is there: what needs
more devices or another platform is skipped.
"""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from local_hub import alone, server  # noqa: F401 (fixtures)

PLATFORM = {"cuda": "gpu"}.get(name := os.environ.get("SEDD_TEST_PLATFORM", "cpu"), name)
# Pallas kernels are interpreted where there is no device to compile them for.
INTERPRET = PLATFORM == "cpu"
# The tests compile more than they compute: LLVM's level 1 takes a fifth off their time, level 0
# makes the programs that draw 200,000 samples too slow.
CPU_FLAGS = {"--xla_force_host_platform_device_count": 8, "--xla_backend_optimization_level": 1}
# XLA_FLAGS of commands as processes of their own, which compute next to nothing.
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
# Before anything imports jax:
if PLATFORM == "cpu":
    os.environ["JAX_PLATFORMS"] = "cpu"
    flags = os.environ.get("XLA_FLAGS", "")
    added = [f"{flag}={value}" for flag, value in CPU_FLAGS.items() if flag not in flags]
    os.environ["XLA_FLAGS"] = " ".join([flags, *added])
else:
    os.environ["JAX_PLATFORMS"] = {"gpu": "cuda"}.get(PLATFORM, PLATFORM) + ",cpu"
    # The processes of pytest -n share the device.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

# No test reads what another compiled, nor writes into the user's folder.
os.environ["JAX_COMPILATION_CACHE_DIR"] = ""

# A background job of a script (nohup ... &, cron, a CI's) inherits that SIGINT and SIGHUP are
# ignored, and so would every process that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_configure(config):
    config.addinivalue_line("markers", "devices(count): needs so many devices")
    config.addinivalue_line("markers", "platforms(*names, reason): runs on these alone")


def pytest_sessionstart():
    if PLATFORM != "cpu":
        import jax

        try:
            backend = jax.default_backend()
        except RuntimeError as error:
            raise pytest.UsageError(f"SEDD_TEST_PLATFORM={PLATFORM}: {error}") from None
        if backend != PLATFORM:
            message = f"SEDD_TEST_PLATFORM={PLATFORM}, but jax runs on {backend}"
            raise pytest.UsageError(f"{message}; install jax for it")


@pytest.fixture(autouse=True, scope="module")
def programs_are_dropped():
    """Drops what a module's tests compiled.

    A compiled program keeps memory mappings for as long as jax's caches hold it, and a process that
    has used up the kernel's number of them (vm.max_map_count, 65,530) dies of SIGSEGV in the next
    compilation: after some 1,500 tests.
    """
    yield
    if jax := sys.modules.get("jax"):
        jax.clear_caches()


def pytest_runtest_setup(item):
    for marker in item.iter_markers("platforms"):
        if PLATFORM not in marker.args:
            pytest.skip(f"on {' and '.join(marker.args)} only: {marker.kwargs['reason']}")
    for marker in item.iter_markers("devices"):
        import jax

        if (count := jax.device_count()) < marker.args[0]:
            pytest.skip(f"needs {marker.args[0]} devices, and there are {count}")


REPOSITORY = Path(__file__).resolve().parents[1]
TEST_DATA = Path(os.environ.get("SEDD_TEST_DATA", REPOSITORY / "../shared/data"))


@pytest.fixture
def bars(monkeypatch):
    """Progress is drawn as on a terminal, though standard error is none."""
    monkeypatch.setattr("sedd_jax.host.console.has_lines", lambda: False)


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


def over_eight_devices(model):
    """The same model, its batch and its weights over a mesh of 2 x 2 x 2 devices."""
    import dataclasses

    import jax

    from sedd_jax.parallel import sharding

    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    return dataclasses.replace(
        model,
        network=model.network.clone(placement=sharding.Placement(mesh)),
        params=jax.device_put(model.params, sharding.tree_shardings(model.params, mesh)),
        mesh=mesh,
    )


# A model and a corpus for seconds, as differences from configs/quickstart.py.
TINY = {
    "data.tokenizer": "characters",
    "data.tokenizer_path": "",
    "data.windows": "aligned",
    "data.length": 32,
    "model.hidden_size": 16,
    "model.blocks": 2,
    "model.heads": 2,
    "model.cond_dim": 8,
    "model.dropout": 0.1,
    "optimizer.learning_rate": 3e-3,
    "optimizer.warmup_steps": 5,
    "optimizer.decay_fraction": 0.0,
    "optimizer.b2": 0.99,
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
    environment = {**os.environ, "XLA_FLAGS": QUICK}
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


@pytest.fixture(scope="session")
def scorer_folder(tmp_path_factory):
    """A GPT-2 of random weights, one block, 32 channels, byte tokens, 160 positions."""
    import numpy as np
    from safetensors.numpy import save_file
    from tokenizers.pre_tokenizers import ByteLevel

    folder = tmp_path_factory.mktemp("scorer")
    vocab = [*sorted(ByteLevel.alphabet()), "<|endoftext|>"]
    c, v, rng = 32, len(vocab), np.random.default_rng(0)
    config = {"model_type": "gpt2", "vocab_size": v, "n_positions": 160, "n_embd": c}
    config |= {"n_layer": 1, "n_head": 2, "activation_function": "gelu_new"}
    shapes = {"wte.weight": (v, c), "wpe.weight": (160, c), "ln_f.weight": (c,), "ln_f.bias": (c,)}
    block = {"ln_1.weight": (c,), "ln_1.bias": (c,), "ln_2.weight": (c,), "ln_2.bias": (c,)}
    for name, ins, outs in (
        ("attn.c_attn", c, 3 * c),
        ("attn.c_proj", c, c),
        ("mlp.c_fc", c, 4 * c),
        ("mlp.c_proj", 4 * c, c),
    ):
        block |= {f"{name}.weight": (ins, outs), f"{name}.bias": (outs,)}
    shapes |= {f"h.0.{name}": shape for name, shape in block.items()}
    tensors = {n: rng.normal(size=s).astype(np.float32) * 0.3 for n, s in shapes.items()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocab)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return folder


@pytest.fixture(scope="session")
def long_run(tmp_path_factory):
    """A tiny run of rows of 128 characters, long enough for MAUVE's texts."""
    from sedd_jax.cli import train_command

    workdir = tmp_path_factory.mktemp("runs") / "long"
    assert train_command(command_line(workdir, data__length=128, train__steps=2)) == 0
    return workdir
