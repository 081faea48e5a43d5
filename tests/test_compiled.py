"""The commands' cache of compiled programs, by processes of their own."""

import os
import subprocess
import sys

import pytest

from sedd_jax.cli.compiled import FOLDER, delete_oldest


def sample(run, home, *arguments, **environment):
    """A finished sedd-sample; a `home` of None: with none that can be written to."""
    clean = {name: value for name, value in os.environ.items() if name != FOLDER}
    command = [sys.executable, "-m", "sedd_jax", "sample", f"--workdir={run}", "--steps=3"]
    more = ["--num_samples=1", "--seed=5", *arguments]
    return subprocess.run(
        [*command, *more],
        env={**clean, "XDG_CACHE_HOME": str(home), **environment},
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )


def programs(home):
    return sorted(home.rglob("*-cache"))


def test_a_program_is_compiled_once(tiny_run, tmp_path):
    # Programs this small compile faster than those that are worth a file.
    all_of_them = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    first = sample(tiny_run, tmp_path, **all_of_them)
    kept = programs(tmp_path)
    assert any("reverse_steps" in file.name for file in kept)
    assert all((tmp_path / "sedd_jax") in file.parents for file in kept)
    times = [file.stat().st_mtime_ns for file in kept]
    second = sample(tiny_run, tmp_path, **all_of_them)
    assert second.stdout == first.stdout
    assert [file.stat().st_mtime_ns for file in programs(tmp_path)] == times

    for file in kept:  # as of a full disk: jax says so, and compiles
        file.write_bytes(file.read_bytes()[:100])
    third = sample(tiny_run, tmp_path, **all_of_them)
    assert third.stdout == first.stdout
    assert "Error reading persistent compilation cache entry" in third.stderr


@pytest.mark.parametrize(
    ("arguments", "environment"),
    [(["--no_compilation_cache"], {}), ([], {FOLDER: ""})],
    ids=["flag", "environment"],
)
def test_nothing_is_kept_where_that_is_not_wanted(tiny_run, tmp_path, arguments, environment):
    sample(
        tiny_run,
        tmp_path,
        *arguments,
        JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
        **environment,
    )
    assert not programs(tmp_path)


def test_a_home_that_takes_no_file_is_no_hindrance(tiny_run):
    assert sample(tiny_run, "/dev/null").stdout


def test_the_oldest_programs_are_deleted(tmp_path):
    for age in range(10):
        (file := tmp_path / f"{age}-cache").write_bytes(bytes(100))
        os.utime(file, (1e9 - age, 1e9 - age))
    delete_oldest(tmp_path, limit=1000)
    assert len(programs(tmp_path)) == 10
    delete_oldest(tmp_path, limit=999)
    assert [file.name for file in programs(tmp_path)] == [f"{age}-cache" for age in range(4)]
