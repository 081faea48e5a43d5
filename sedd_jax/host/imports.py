"""The modules of config.imports: what runs them, whose may run, and the copies that a folder holds.

A module is a name that Python finds, or the path of a .py file, of which a run and an exported
model hold a copy. Running it registers parts of a user's own: see registry.py.
"""

import contextlib
import hashlib
import importlib
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType

from sedd_jax.host.files import local_path, user_cache

FOLDER = "imports"  # of a run and of an exported model: the copies of its .py files


def import_modules(names: Iterable[str], *, read_in: Path | None = None) -> None:
    """Run the modules: names that Python finds, and paths of .py files, each once in a process.

    read_in is the folder of a run or an exported model that names them, None if the user does.
    Code that only a folder names runs if the user has named the same before on this machine: its
    content for a file. ValueError, one line, for a module that is missing, raises or may not run.
    """
    for name in names:
        path = local_path(name) if name.endswith(".py") else None
        code = b"module " + name.encode() if path is None else _read(path, read_in)
        is_there = (name if path is None else _module_name(path, code)) in sys.modules
        digest = hashlib.sha256(code).hexdigest()
        if read_in is not None and not is_there and not _is_remembered(digest):
            remedy = "if you trust it" if path is None else f"read {name!r} and, if you trust it,"
            raise ValueError(
                f"{str(read_in)!r} needs the code of {Path(name).name!r}, which you have not named "
                f"on this machine; {remedy} add --imports={name} (in Python imports=({name!r},))"
            )
        if not is_there:
            _import(name) if path is None else execute(path, "imports:", code=code)
        if read_in is None:
            _remember(digest)


def _read(path: Path, read_in: Path | None) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        remedy = "give the path of a .py file"
        if read_in is not None:
            remedy = "give the file by --imports=FILE (in Python imports=(FILE,))"
        raise ValueError(
            f"imports: cannot read {str(path)!r}: {error.strerror}; {remedy}"
        ) from error


def _module_name(path: Path, code: bytes) -> str:
    """Of the same text, wherever it lies: a run's copy is the module that was copied."""
    return f"{path.stem}_{hashlib.sha256(code).hexdigest()[:12]}"


def module_names(names: Iterable[str]) -> list[str]:
    """What the modules are called in sys.modules."""
    paths = {name: local_path(name) for name in names if name.endswith(".py")}
    return [
        _module_name(paths[name], _read(paths[name], None)) if name in paths else name
        for name in names
    ]


def execute(
    path: Path | str, title: str, remedy: str = "correct the file", code: bytes | None = None
) -> ModuleType:
    """The module in a file, run; ValueError, with the line, for whatever it raises.

    code is the file's text, if it has been read. It is compiled here: Python's importer would take
    a __pycache__ beside the file, which may hold another program than the text that was looked at.
    """
    path = Path(path)
    code = path.read_bytes() if code is None else code
    name = _module_name(path, code)
    module = ModuleType(name)
    module.__file__ = str(path)
    earlier = sys.modules.get(name)
    sys.modules[name] = module  # where dataclasses look
    try:
        with errors_of(str(path), title, remedy):
            exec(compile(code, str(path), "exec"), module.__dict__)  # noqa: S102
    except ValueError:
        sys.modules.pop(name)
        if earlier is not None:
            sys.modules[name] = earlier
        raise
    return module


@contextlib.contextmanager
def errors_of(path: str, title: str, remedy: str) -> Iterator[None]:
    """Inside, whatever the code of the file raises is a ValueError of one line, with its line."""
    try:
        yield
    except (Exception, SystemExit) as error:
        reason, frames = " ".join(str(error).split()), traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == path]
        if isinstance(error, SyntaxError) and error.filename == path:
            reason, lines = error.msg, [error.lineno]
        where = f", line {lines[-1]}" if lines and lines[-1] else ""
        raise ValueError(
            f"{title} {path!r}{where}: {type(error).__name__}: {reason}; {remedy}"
        ) from error


def _import(name: str) -> None:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise ValueError(f"imports: module {name!r} raises {error}; install it") from error
        raise ValueError(
            f"imports: Python finds no module {name!r}; install it, or give the path of a .py file"
        ) from error
    except (Exception, SystemExit) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"imports: module {name!r} raises {type(error).__name__}: {reason}; correct it"
        ) from error


def _memory() -> Path:
    """Where the digests of the code that the user has named are: an empty file each."""
    return user_cache() / "imports"


def _remember(digest: str) -> None:
    with contextlib.suppress(OSError):  # without it, the code must be named each time
        _memory().mkdir(parents=True, exist_ok=True)
        (_memory() / digest).touch()


def _is_remembered(digest: str) -> bool:
    return (_memory() / digest).is_file()


# --- copies


def copied_names(names: Iterable[str]) -> tuple[str, ...]:
    """The names as a folder with copies says them: a file's without its path."""
    return tuple(Path(name).name if name.endswith(".py") else name for name in names)


def names_in(folder: Path, names: Iterable[str]) -> tuple[str, ...]:
    """The names with the paths of the copies in folder."""
    return tuple(
        str(folder / FOLDER / Path(name).name) if name.endswith(".py") else name for name in names
    )


def read_files(names: Iterable[str]) -> dict[str, bytes]:
    """The text of each .py file, by its name without path."""
    return {
        Path(name).name: _read(local_path(name), None) for name in names if name.endswith(".py")
    }


def check_copies(folder: Path, names: Iterable[str]) -> None:
    """ValueError if a file differs from its copy in the folder of a run."""
    for name, code in read_files(names).items():
        copy = folder / FOLDER / name
        if copy.is_file() and copy.read_bytes() != code:
            raise ValueError(
                f"the run in {str(folder)!r} began with another {name!r}, {str(copy)!r}; name that "
                "one in config.imports, or begin in a new workdir"
            )


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write them as the copies in folder; those that are there already stay."""
    for name, code in files.items():
        (folder / FOLDER).mkdir(exist_ok=True)
        copy = folder / FOLDER / name
        if not (copy.is_file() and copy.read_bytes() == code):
            copy.write_bytes(code)
