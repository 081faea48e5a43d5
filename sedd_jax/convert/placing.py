"""Folders that appear whole or not at all."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from sedd_jax.convert.weights import sync_folder


@contextlib.contextmanager
def appearing(folder: Path) -> Iterator[Path]:
    """A folder to fill, beside its place; it takes that place when all of it is written.

    What is there already is moved away first and then deleted, so the caller decides before
    whether it may be.
    """
    folder = Path(os.path.abspath(folder))
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield part
        mask = os.umask(0)
        os.umask(mask)
        part.chmod(0o777 & ~mask)  # a temporary folder is its maker's alone
        _replace(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _replace(part: Path, folder: Path) -> None:
    """Give part the folder's name, and delete what had it.

    A process killed between the two renames leaves no `folder`, but beside its place both, whole:
    the old one as .NAME.*.old, the new one as .NAME.*; rename either by hand.
    """
    old = part.with_name(part.name + ".old")
    if folder.exists():
        folder.rename(old)
    try:
        part.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)
    sync_folder(folder.parent)


def check_new(folder: Path) -> None:
    """ValueError unless the folder is absent or empty."""
    if folder.is_symlink() or (folder.exists() and (not folder.is_dir() or any(folder.iterdir()))):
        raise ValueError(f"{str(folder)!r} is there and is not empty; choose a new folder")
