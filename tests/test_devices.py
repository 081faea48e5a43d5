"""The platform that jax is set to use: one line where it is not there."""

import os
import subprocess
import sys

import jax
import pytest
from conftest import says

from sedd_jax.parallel import devices

LOAD = "import sedd_jax\ntry: sedd_jax.load({!r})\nexcept ValueError as e: print('error:', e)"


@pytest.mark.parametrize(
    ("variable", "name", "words"),
    [
        ("JAX_PLATFORMS", "cuda", ("no NVIDIA GPU is visible", "sedd_jax[cuda12]")),
        ("JAX_PLATFORMS", "tpu", ("no TPU is visible", "sedd_jax[tpu]")),
        ("JAX_PLATFORMS", "cpu,tpu", ("no TPU is visible", "sedd_jax[tpu]")),
        ("JAX_PLATFORMS", "gpu", ("cuda of NVIDIA's", "JAX_PLATFORMS")),
        ("JAX_PLATFORMS", "rocm", ("'rocm' is not in the list of known",)),
        ("JAX_PLATFORM_NAME", "quantum", ("quantum",)),
    ],
)
def test_a_platform_that_is_not_here_is_one_line(tiny_run, variable, name, words):
    if devices.has_gpu() or devices.has_tpu():
        pytest.skip("this machine has an accelerator")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_PLATFORM")}
    # Of a default platform: without this, a libtpu that is installed would look for a TPU.
    default = {} if variable == "JAX_PLATFORMS" else {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", LOAD.format(str(tiny_run))],
        env={**environment, **default, variable: name},
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    (line,) = done.stdout.splitlines()
    assert done.stderr == ""
    assert "this machine has cpu" in line and all(part in line for part in words)
    assert name in line


def test_the_platform_of_this_process_is_there():
    devices.check_platform()


def test_jax_own_failure_is_a_line(monkeypatch):
    def fail():
        raise RuntimeError("Unable to initialize backend 'x':\n  no driver (set JAX_PLATFORMS='')")

    monkeypatch.setattr(jax, "devices", fail)
    with says("Unable to initialize backend 'x': no driver; this machine has cpu"):
        devices.check_platform()
