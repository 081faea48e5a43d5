"""The commands' cache of compiled programs, by processes of their own."""

import os
import subprocess
import sys

import pytest

from sedd_jax.cli import sample_command
from sedd_jax.cli.compiled import delete_oldest

FOLDER = "JAX_COMPILATION_CACHE_DIR"


def sample(run, home, *arguments, **environment):
    """A finished sedd-sample whose programs go below `home`."""
    clean = {name: value for name, value in os.environ.items() if name != FOLDER}
    command = [sys.executable, "-m", "sedd_jax", "sample", f"--workdir={run}", "--steps=3"]
    return subprocess.run(
        [*command, "--num_samples=1", "--seed=5", *arguments],
        env={**clean, "XDG_CACHE_HOME": str(home), **environment},
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )


def programs(home):
    return sorted(home.rglob("*-cache"))


def test_a_program_is_compiled_once(tiny_run, tmp_path):
    on = "--compilation_cache=on"
    first = sample(tiny_run, tmp_path, on)
    kept = programs(tmp_path)
    assert any("reverse_steps" in file.name for file in kept)
    assert all((tmp_path / "sedd_jax") in file.parents for file in kept)
    times = [file.stat().st_mtime_ns for file in kept]
    second = sample(tiny_run, tmp_path, on)
    assert second.stdout == first.stdout
    assert [file.stat().st_mtime_ns for file in programs(tmp_path)] == times

    for file in kept:  # as of a full disk: jax says so, and compiles
        file.write_bytes(file.read_bytes()[:100])
    third = sample(tiny_run, tmp_path, on)
    assert third.stdout == first.stdout
    assert "Error reading persistent compilation cache entry" in third.stderr


@pytest.mark.parametrize(
    ("choice", "environment", "named"),
    [
        (None, {}, False),  # a CPU
        (None, {"JAX_PLATFORMS": "cuda,cpu"}, True),
        (None, {"JAX_PLATFORMS": "cuda", FOLDER: ""}, False),
        ("off", {"JAX_PLATFORMS": "tpu"}, False),
        ("on", {}, True),
        ("on", {"XDG_CACHE_HOME": "/dev/null"}, False),  # a home that takes no file
    ],
)
def test_where_programs_are_kept(tmp_path, choice, environment, named):
    program = (
        "import jax; from sedd_jax.cli.compiled import keep_compiled_programs;"
        f"keep_compiled_programs({choice!r}); c = jax.config;"
        "print(c.jax_enable_compilation_cache and c.jax_compilation_cache_dir)"
    )
    clean = {name: value for name, value in os.environ.items() if name != FOLDER}
    printed = subprocess.run(
        [sys.executable, "-c", program],
        env={**clean, "XDG_CACHE_HOME": str(tmp_path), **environment},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    if named:
        assert printed.startswith(f"{tmp_path}/sedd_jax/compiled-")
        assert os.stat(printed).st_mode & 0o777 == 0o700
    else:
        assert printed in ("None", "", "False") and not list(tmp_path.iterdir())


def test_another_choice_is_refused(capsys, tiny_run):
    assert sample_command([f"--workdir={tiny_run}", "--compilation_cache=yes"]) == 2
    assert "--compilation_cache 'yes' is not one of on, off" in capsys.readouterr().err


def test_the_oldest_programs_are_deleted(tmp_path):
    for age in range(10):
        (file := tmp_path / f"{age}-cache").write_bytes(bytes(100))
        os.utime(file, (1e9 - age, 1e9 - age))
    delete_oldest(tmp_path, limit=1000)
    assert len(programs(tmp_path)) == 10
    delete_oldest(tmp_path, limit=999)
    assert [file.name for file in programs(tmp_path)] == [f"{age}-cache" for age in range(4)]
