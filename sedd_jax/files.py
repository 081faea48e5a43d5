"""Files and folders that appear whole or not at all, their sha256, and JSON from strangers."""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

MAX_DEPTH = 32  # of JSON: whoever reads or copies it afterwards may do so by recursion


def sha256(path: Path) -> str:
    """The sha256 of a file, in hex, in one pass."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def replacing(path: Path, mode: str = "wb", **options) -> Iterator[IO]:
    """An opened file that takes the place of `path` when it is complete and on disk.

    mode is "wb" or "w"; options are open()'s. A process that is killed leaves what was there.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    # x: a file that is there already is not ours to delete
    out = part.open(mode.replace("w", "x"), **options)
    try:
        with out:
            yield out
            out.flush()
            os.fsync(out.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Replace the file by this text in UTF-8 at once; one that holds it already is left alone."""
    if not path.is_file() or path.read_bytes() != text.encode("utf-8"):
        with replacing(path) as out:
            out.write(text.encode("utf-8"))


def sync_folder(folder: Path) -> None:
    """Wait until the names in the folder are on disk."""
    with contextlib.suppress(OSError):  # some file systems cannot
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


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


def load_json(text: str | bytes, where: str) -> dict[str, Any]:
    """A JSON object; ValueError for a name given twice, NaN, too deep a nesting or another type."""

    def no_duplicates(pairs):
        values = dict(pairs)
        if len(values) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"{shown(twice)} is there twice")
        return values

    def no_constants(word):
        raise ValueError(f"{word} is no number of JSON")

    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        value = json.loads(text, object_pairs_hook=no_duplicates, parse_constant=no_constants)
        inside = [value]
        for _ in range(MAX_DEPTH):
            inside = [child for node in inside for child in _children(node)]
        if inside:
            raise ValueError(f"it is nested over {MAX_DEPTH} deep")
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:120]
        raise ValueError(f"{where} is no JSON: {reason}; get it again") from error
    kind = type(value).__name__
    if kind != "dict":
        raise ValueError(f"{where} holds a {kind}, not an object; get it again")
    return value


def _children(node: Any) -> Iterable[Any]:
    if isinstance(node, dict):
        return node.values()
    return node if isinstance(node, list) else ()


def shown(name: str, most: int = 60) -> str:
    """A name from outside for a message: one line, not too long."""
    plain = name if name.isprintable() else repr(name)
    return plain if len(plain) <= most else plain[: most - 3] + "..."
