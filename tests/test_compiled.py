"""The folder in which the commands store what they compiled."""

import os
import subprocess
import sys

PROGRAM = """
import logging, os, sys
logging.basicConfig(format="%(message)s", stream=sys.stdout)
from sedd_jax.cli.compiled import keep_compiled
keep_compiled()
import jax
print(jax.config.jax_compilation_cache_dir)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.jit(lambda x: x + 1)(1.0)
"""


def run(**variables) -> list[str]:
    """What PROGRAM prints with these variables in its environment."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    environment |= {"JAX_PLATFORMS": "cpu", **{k: str(v) for k, v in variables.items()}}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


def test_programs_are_stored_in_the_users_cache_folder(tmp_path):
    (folder,) = run(XDG_CACHE_HOME=tmp_path)
    assert folder.startswith(f"{tmp_path}/sedd_jax/compiled/")
    assert any(name.endswith("-cache") for name in os.listdir(folder))
    (folder,) = run(XDG_CACHE_HOME="relative", HOME=tmp_path / "home")  # which is not to be used
    assert folder.startswith(f"{tmp_path}/home/.cache/sedd_jax/compiled/")


def test_jaxs_own_variables_decide(tmp_path):
    assert run(XDG_CACHE_HOME=tmp_path, JAX_ENABLE_COMPILATION_CACHE="0") == ["None"]
    other = tmp_path / "other"
    assert run(XDG_CACHE_HOME=tmp_path, JAX_COMPILATION_CACHE_DIR=other) == [str(other)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other"]


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path):
    (tmp_path / "file").touch()
    warning, folder = run(XDG_CACHE_HOME=tmp_path / "file")
    assert warning.startswith("what is compiled is not stored for the next time: ")
    assert folder == "None"
