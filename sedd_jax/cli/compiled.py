"""Compiled programs, kept in the user's cache folder by jax and taken from there the next time."""

import argparse
import importlib.util
import os
import platform
import zlib
from pathlib import Path

from sedd_jax.host.files import user_cache

CHOICES = ("on", "off")
WORDS = (
    "on or off: keep compiled programs in ~/.cache/sedd_jax (or $XDG_CACHE_HOME/sedd_jax) for the "
    "next time (default: on with a GPU or TPU)"
)
SECONDS = 0.5  # of compiling, from which on a program is worth a file
LIMIT = 2 * 2**30  # bytes of programs; beyond, the oldest are deleted


def add_compilation_cache(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--compilation_cache", help=WORDS)


def keep_compiled_programs(choice: str | None) -> None:
    """Names the folder to jax, unless the environment has named one (JAX_COMPILATION_CACHE_DIR).

    choice is one of CHOICES. None is on where there is an accelerator: on a CPU, XLA refuses to
    load its own programs with an error line for each on some of Intel's (jax-ml/jax issue 38445),
    and has crashed on macOS.
    """
    if choice not in (None, *CHOICES):
        raise ValueError(f"--compilation_cache {choice!r} is not one of {', '.join(CHOICES)}")
    import jax

    if choice == "off":
        jax.config.update("jax_enable_compilation_cache", False)
        return
    is_named = jax.config.jax_compilation_cache_dir is not None
    if is_named or (choice is None and not _has_accelerator()):
        return
    folder = cache_folder()
    if not folder.is_absolute():  # there is no home
        return
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        delete_oldest(folder)
    except OSError:  # a home that is read-only or full: compiled anew
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", SECONDS)


def _has_accelerator() -> bool:
    """Whether jax will find a GPU or TPU, from what is installed: no device is started."""
    import jax

    from sedd_jax.parallel.devices import can_use_tpu, has_gpu

    if platforms := jax.config.jax_platforms:
        return platforms.split(",")[0] != "cpu"
    plugins = map(importlib.util.find_spec, ("jax_cuda12_plugin", "jax_cuda13_plugin"))
    return can_use_tpu() or (has_gpu() and any(plugins))


def cache_folder() -> Path:
    """That of this kind of CPU: machines that share a home may not run each other's programs."""
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
        features = next(line for line in lines if line.startswith((b"flags", b"Features")))
    except (OSError, StopIteration):  # not Linux
        features = platform.processor().encode()
    return user_cache() / f"compiled-{platform.machine()}-{zlib.crc32(features):08x}"


def delete_oldest(folder: Path, limit: int = LIMIT) -> None:
    """Deletes the oldest programs, where all take more than `limit` bytes, to half of that."""
    files = sorted(
        (entry.stat().st_mtime, entry.stat().st_size, entry.path)
        for entry in os.scandir(folder)
        if entry.is_file()
    )
    total = sum(size for _, size, _ in files)
    if total <= limit:
        return
    for _, size, file in files:
        if total <= limit // 2:
            return
        Path(file).unlink(missing_ok=True)  # another command may do the same
        total -= size
