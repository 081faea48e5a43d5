"""Files and folders that appear whole or not at all, who works in one, and JSON from strangers."""

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

log = logging.getLogger(__name__)

HEARTBEAT, PATIENCE = 5.0, 20.0  # seconds between signs of life; without one before it is dead
MOMENT = 10.0  # seconds, more than the removal of a file takes
# Of gs://bucket/run; Path() makes one slash of two.
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
MAX_NAME, MAX_PATH = 255, 4095  # bytes, of what Linux's file systems and macOS's allow
MAX_DEPTH = 32  # of JSON: whoever reads or copies it afterwards may do so by recursion


def is_address(path: str | os.PathLike) -> bool:
    """Whether this is gs://bucket/run or the like, which is not a local path."""
    return bool(_ADDRESS.match(os.fspath(path)))


def user_cache() -> Path:
    """The package's folder in the user's cache: $XDG_CACHE_HOME/sedd_jax or ~/.cache/sedd_jax."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache) / "sedd_jax"


def local_path(path: str | os.PathLike) -> Path:
    """A path that a user wrote, with ~ expanded; ValueError if it cannot be a file's or folder's.

    Orbax could write to a bucket, but records are memory-mapped and folders renamed into place,
    which a bucket has not: an address such as gs://bucket/run is refused, never taken for "gs:".
    """
    text = os.fspath(path)
    if not text.strip() or "\0" in text:
        raise ValueError(f"{text!r} is not a path; name a file or a folder")
    if is_address(text):
        raise ValueError(
            f"{text!r} is an address, not a path; mount the bucket or share (gs:// with gcsfuse, "
            "s3:// with mountpoint-s3) or copy the files, and give the path of the local folder"
        )
    try:
        path = Path(text).expanduser()
        sizes = [len(os.fsencode(part)) for part in path.parts]
    except RuntimeError as error:
        raise ValueError(f"{text!r} names no user's home folder; write the whole path") from error
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{text!r} cannot be a path under the encoding {error.encoding}; rename it, or set "
            "LANG to a UTF-8 locale"
        ) from error
    if max(sizes, default=0) > MAX_NAME or sum(sizes) + len(sizes) > MAX_PATH:
        raise ValueError(
            f"{shown(text)!r} is too long for a path: a name may have {MAX_NAME} bytes, all of it "
            f"{MAX_PATH}; give a shorter one"
        )
    return path


def refuse_pointer(content: bytes | str, where: str) -> None:
    """ValueError if git holds this in place of a large file: git-lfs's pointer to it.

    content is the file's, or its first bytes. For every file of a stranger, before its format.
    """
    head = content[:64] if isinstance(content, bytes) else content[:64].encode("utf-8", "replace")
    if head.startswith(b"version https://git-lfs.github.com/spec/"):
        raise ValueError(
            f"{where} is git-lfs's pointer to the file, not the file; run `git lfs pull` in its "
            "repository, or download it again"
        )


def refuse_pointer_file(file: Path) -> None:
    """`refuse_pointer` of what the file begins with; OSError if it cannot be read."""
    with file.open("rb") as opened:
        refuse_pointer(opened.read(64), repr(str(file)))


def sha256(path: Path) -> str:
    """The sha256 of a file, in hex, in one pass."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def replacing(path: Path, mode: str = "wb", **options) -> Iterator[IO]:
    """An opened file that takes the place of `path` when it is complete and on disk.

    mode is "wb" or "w"; options are open()'s. A process that is killed leaves what was there.
    """
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
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
    """Replace the file by this text in UTF-8 at once; one that holds it already is left alone.

    What is no plain file, as /dev/stdout or a link, is written into.
    """
    if path.is_symlink() or (path.exists() and not path.is_file()):
        path.write_text(text, encoding="utf-8")
    elif not path.is_file() or path.read_bytes() != text.encode("utf-8"):
        with replacing(path) as out:
            out.write(text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """`write_text` of a value as JSON for people: indented, all letters as they are."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False))


def sync_folder(folder: Path) -> None:
    """Wait until the names in the folder are on disk."""
    with contextlib.suppress(OSError):  # some file systems cannot
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Wait until all that is in the folder is on disk, and its names."""
    for path in (*folder.rglob("*"), folder):
        if path.is_dir():
            sync_folder(path)
        elif path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


@contextlib.contextmanager
def appearing(folder: Path) -> Iterator[Path]:
    """A folder to fill, beside its place; it takes that place when all of it is written.

    What is there already is moved away first and then deleted, so the caller decides before
    whether it may be.
    """
    folder = Path(os.path.abspath(folder))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES):
            raise
        raise ValueError(
            f"cannot write in {str(folder.parent)!r}: {error.strerror}; make it writable or name "
            "another folder"
        ) from error
    try:
        yield part
        mask = os.umask(0)
        os.umask(mask)
        part.chmod(0o777 & ~mask)  # a temporary folder is its maker's alone
        sync_tree(part)
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


@contextlib.contextmanager
def claimed(file: Path, work: str, *, wait: bool = False) -> Iterator[None]:
    """While entered, `file` names this process as the one that does the work ("trains in '/run'").

    ValueError that says who does, if another process does; with wait, enters when that one is
    done. Needs no lock of the file system, which NFS, Lustre and mounted buckets may lack: the
    holder's process is looked up if it runs on this machine; on others it is alive as long as the
    file's time of change moves, HEARTBEAT seconds apart. A dead process's claim is taken over.
    """
    mine = {**_machine(), "pid": os.getpid(), "started": _start_time(os.getpid()), "work": work}
    descriptor, announced = None, False
    while descriptor is None:
        try:
            descriptor = os.open(file, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
        except FileExistsError:
            holder = _living_holder(file)
            if holder and not wait:
                raise ValueError(
                    f"{holder} {work} already; wait until it ends, end it, or name another folder"
                ) from None
            if holder and not announced:
                log.info("waiting for %s, which %s too", holder, work)
                announced = True
            time.sleep(0.2 if holder else 0.0)
    done = threading.Event()

    def beat():
        while not done.wait(HEARTBEAT):
            with contextlib.suppress(OSError):  # of a network file system, for a moment
                os.utime(descriptor)

    try:
        os.write(descriptor, json.dumps(mine).encode("utf-8"))
        threading.Thread(target=beat, daemon=True).start()
        yield
    finally:
        done.set()
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(descriptor), file.stat()):  # not one that took it over
                file.unlink()
        os.close(descriptor)


def _living_holder(file: Path) -> str | None:
    """Who holds the claim, for a message; None if it is free, and a dead holder's is removed."""
    try:
        for _ in range(20):  # a second: between its creation and the writing the file is empty
            seen = file.stat()
            if text := file.read_text(encoding="utf-8"):
                break
            time.sleep(0.05)
    except FileNotFoundError:
        return None
    try:
        holder = json.loads(text)
        name = f"process {holder['pid']} on {holder['host']}"
        is_here = all(holder[key] == value for key, value in _machine().items())
        is_alive = is_here and _start_time(holder["pid"]) == holder["started"] is not None
    except (ValueError, LookupError, TypeError):  # it is being written, or was when the disk filled
        name, is_here, is_alive = "another process", False, False
    if not is_here:
        is_alive = _beats(file, seen, name)
    if is_alive:
        return name
    # Two may see a dead holder: the second must not remove the claim of who came after the first.
    with _alone(file.with_name(f"{file.name}.removing")), contextlib.suppress(FileNotFoundError):
        if _identity(file.stat()) == _identity(seen):
            file.unlink()
    return None


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """While entered, for a moment, no other process is. A lock that is the same for MOMENT seconds
    is of a process that was killed in it, and is removed."""
    seen, end = None, 0.0
    while True:
        try:
            os.close(os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
            break
        except FileExistsError:
            with contextlib.suppress(FileNotFoundError):
                now = _identity(lock.stat())
                if now != seen:
                    seen, end = now, time.monotonic() + MOMENT
                elif time.monotonic() > end:
                    lock.unlink()
            time.sleep(0.01)
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)


def _identity(status: os.stat_result) -> tuple[int, ...]:
    """Of a file: an inode's number is used again, so its time counts too."""
    return status.st_dev, status.st_ino, status.st_mtime_ns


def _beats(file: Path, seen: os.stat_result, name: str) -> bool:
    """Whether the claim's time of change moves, or the file goes, within PATIENCE seconds."""
    log.info("%s is claimed by %s; watching for a sign of life for %.0f s", file, name, PATIENCE)
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        time.sleep(0.2)
        try:
            if file.stat().st_mtime_ns != seen.st_mtime_ns:
                return True
        except FileNotFoundError:
            return False
    return False


def _machine() -> dict[str, str]:
    """What tells this machine, boot and container, in which process numbers mean something."""
    facts = {"host": socket.gethostname(), "boot": "", "processes": ""}
    with contextlib.suppress(OSError):
        facts["boot"] = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        facts["processes"] = os.readlink("/proc/self/ns/pid")
    return facts


def _start_time(pid: int) -> str | None:
    """When a process of this machine started, for its number may be another's now; None: gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        state, *fields = stat.rpartition(")")[2].split()
        return None if state in "ZX" else fields[18]
    except OSError:
        if Path("/proc/self/stat").exists():
            return None
    try:
        os.kill(pid, 0)  # a system without /proc
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "unknown"


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
        raise ValueError(f"{word} is not a number in JSON")

    refuse_pointer(text, where)
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
        raise ValueError(f"{where} is not JSON: {reason}; get it again") from error
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
