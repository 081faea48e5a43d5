"""Compiled programs, kept in the user's cache folder by jax and taken from there the next time."""

import argparse
import os
import platform
import sys
import zlib
from pathlib import Path

FLAG = "--no_compilation_cache"
WORDS = "compile anew; programs are else kept in ~/.cache/sedd_jax (or $XDG_CACHE_HOME/sedd_jax)"
FOLDER = "JAX_COMPILATION_CACHE_DIR"  # jax reads it when it is imported
LIMIT = 2 * 2**30  # bytes of programs; beyond, the oldest are deleted


def add_compilation_cache(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(FLAG, action="store_true", help=WORDS)


def keep_compiled_programs(argv: list[str]) -> None:
    """Names the folder to jax, which this process has not imported yet.

    Not with FLAG, nor for a dry run, which is about compiling. What the environment says already
    holds, "" being no folder.
    """
    if FLAG in argv:
        os.environ[FOLDER] = ""  # of the commands that this one starts too
    if "--dry_run" in argv or FOLDER in os.environ or "jax" in sys.modules:
        return
    try:
        folder = cache_folder()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        delete_oldest(folder)
    except (OSError, RuntimeError):  # no home, or one that is read-only or full: compiled anew
        return
    os.environ[FOLDER] = str(folder)
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")


def cache_folder() -> Path:
    """That of this kind of CPU: machines that share a home may not run each other's programs."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
        features = next(line for line in lines if line.startswith((b"flags", b"Features")))
    except (OSError, StopIteration):  # not Linux
        features = platform.processor().encode()
    return Path(home, "sedd_jax", f"compiled-{platform.machine()}-{zlib.crc32(features):08x}")


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
