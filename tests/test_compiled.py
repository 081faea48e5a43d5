"""The commands' cache of compiled programs, by processes of their own."""

import os
import subprocess
import sys

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


def test_a_cpus_programs_are_kept_where_that_is_asked_for(tiny_run, tmp_path):
    sample(tiny_run, tmp_path)
    sample(tiny_run, tmp_path, "--compilation_cache=off")
    sample(tiny_run, tmp_path, "--compilation_cache=on", **{FOLDER: ""})
    assert not programs(tmp_path)


def test_a_home_that_takes_no_file_is_no_hindrance(tiny_run):
    assert sample(tiny_run, "/dev/null", "--compilation_cache=on").stdout


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
