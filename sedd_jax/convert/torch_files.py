"""torch's .pth and .bin files, read and written by a child process.

This process sees only the safetensors and JSON that the child leaves in a folder private to both,
and checks them as it would a stranger's. It needs no torch.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sedd_jax.convert.torch_child import ANSWER, FACTS, TENSORS
from sedd_jax.convert.weights import Tensors, open_tensors, write_tensors
from sedd_jax.files import load_json, sync_folder

MAX_FILE = 32 << 30  # bytes
MAX_PICKLE = 64 << 20  # bytes of the pickle in it, which holds names and places but no numbers
MAX_RECORDS = 100_000
SECONDS = 3600.0
PARTS = ("model", "ema", "exp_avg", "exp_avg_sq")
# What the child may know of this process: where its libraries are, and no secrets.
_ENVIRONMENT = (
    "PATH",
    "LD_LIBRARY_PATH",
    "HOME",
    "TMPDIR",
    "LANG",
    "VIRTUAL_ENV",
    "PYTHONPATH",
    "SYSTEMROOT",
)

Shapes = Mapping[str, tuple[int, ...]]


class TorchFile(NamedTuple):
    """What a file held."""

    tensors: Tensors  # model/<name>, and of a checkpoint ema/<name>, exp_avg/, exp_avg_sq/
    facts: dict[str, Any]  # of a checkpoint: step, count, ema_decay, ema_updates, moments

    def part(self, name: str) -> Tensors:
        """The tensors of "model", "ema", "exp_avg" or "exp_avg_sq" by the original's names."""
        prefix = name + "/"
        names = [key for key in self.tensors if key.startswith(prefix)]
        return self.tensors.renamed({key.removeprefix(prefix): key for key in names})


@contextlib.contextmanager
def read(
    file: Path,
    expected: Shapes,
    *,
    optional: Shapes | None = None,
    parts: Sequence[str] = PARTS,
    max_bytes: int = MAX_FILE,
    seconds: float = SECONDS,
) -> Iterator[TorchFile]:
    """A state dict, or a checkpoint of the original, while the with statement lasts.

    expected is name -> shape in the order of the original's parameters; parts are those of a
    checkpoint that are read, whatever the others hold. ValueError if torch >=
    2.10 is absent, or the file is too large, is not torch's, holds anything but such tensors, or
    takes too long. TMPDIR needs room for a copy of the file.
    """
    file, optional = Path(file), optional or {}
    _check_archive(file, max_bytes)
    with tempfile.TemporaryDirectory(prefix="sedd_jax.") as folder:
        arguments = (str(file.absolute()), folder, ",".join(parts))
        facts = _run("read", *arguments, folder=folder, seconds=seconds)
        parts = parts if facts else PARTS[:1]
        shapes, places = _expected(facts, expected, parts, file)
        in_model = optional if "model" in parts else {}
        wanted = {f"model/{name}": shape for name, shape in in_model.items()}
        tensors = open_tensors(Path(folder) / TENSORS, shapes, optional=wanted)
        there = {new: old for new, old in places.items() if old in tensors}
        there |= {name: name for name in wanted if name in tensors}
        yield TorchFile(tensors.renamed(there), facts)


def write(file: Path, model: Mapping[str, np.ndarray], parts: Mapping, facts: dict) -> None:
    """Write checkpoint.pth with the layout of the original's save_checkpoint.

    model holds the state dict in its order, buffer included; parts the "ema" and, where facts has
    a count above 0, "exp_avg" and "exp_avg_sq", by the original's names in its parameters' order.
    facts: step, count, ema_decay, ema_updates and group, the optimizer's settings.
    """
    tensors = {f"model/{name}": array for name, array in model.items()}
    for part, arrays in parts.items():
        tensors |= {f"{part}/{i}": array for i, array in enumerate(arrays.values())}
    facts = {
        **facts,
        "averages": len(parts["ema"]),
        "model": list(model),
        "shapes": {name: list(array.shape) for name, array in tensors.items()},
    }
    part_file = file.with_name(f".{file.name}.{os.getpid()}.part")
    # Beside the target: there is room for a file of this size, or the target has none either.
    with tempfile.TemporaryDirectory(prefix=".sedd_jax.", dir=file.parent) as folder:
        (Path(folder) / FACTS).write_text(json.dumps(facts), encoding="utf-8")
        write_tensors(Path(folder) / TENSORS, tensors)
        try:
            _run("write", folder, str(part_file.absolute()), folder=folder, seconds=SECONDS)
            part_file.replace(file)
        finally:
            part_file.unlink(missing_ok=True)
    sync_folder(file.parent)


def _check_archive(file: Path, max_bytes: int) -> None:
    """ValueError unless the file is an archive as torch.save writes: uncompressed, a small pickle."""
    where = repr(str(file))
    try:
        size = file.stat().st_size
        if size > max_bytes:
            raise ValueError(f"{where} has {size} bytes, over the limit of {max_bytes}")
        with zipfile.ZipFile(file) as archive:
            records = archive.infolist()
    except OSError as error:
        raise ValueError(f"cannot read {where}: {error.strerror}; give a .pth file") from error
    except (zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{where} is no archive as torch.save has written since torch 1.6; load and save it "
            "again with the original's torch"
        ) from error
    pickles = [r for r in records if r.filename.endswith("data.pkl")]
    plain = all(r.compress_type == zipfile.ZIP_STORED for r in records)
    if (
        len(records) > MAX_RECORDS
        or len(pickles) != 1
        or pickles[0].file_size > MAX_PICKLE
        or not plain
        or sum(r.file_size for r in records) > size
    ):
        raise ValueError(
            f"{where} is no archive as torch.save writes: {len(records)} records, {len(pickles)} "
            f"pickles{'' if plain else ', compressed'}; give a checkpoint of the original code"
        )


def _run(work: str, *arguments: str, folder: str, seconds: float) -> dict[str, Any]:
    """The child's facts; ValueError with what it said, or that it ended without a word."""
    package = str(Path(__file__).resolve().parents[2])
    paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    # -P: no module is taken from the current folder, which may be where the file came with.
    command = [sys.executable, "-P", "-m", "sedd_jax.convert.torch_child", work, *arguments]
    try:
        ended = subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ValueError(
            f"torch took over {seconds:g} s to {work} {arguments[work == 'write']!r}; give it a "
            "faster disk, or another file"
        ) from error
    answer = Path(folder) / ANSWER
    if ended.returncode or not answer.is_file():
        last = ended.stderr.decode(errors="replace").split("\n")[-2:]
        raise ValueError(
            f"the process that was to {work} {arguments[work == 'write']!r} ended with status "
            f"{ended.returncode}: {' '.join(' '.join(last).split())[:200] or 'no word'}; is there "
            "memory for the file?"
        )
    found = load_json(answer.read_bytes(), "the child's answer")
    if "error" in found:
        raise ValueError(str(found["error"]))
    return found["facts"]


def _expected(
    facts: dict, expected: Shapes, parts: Sequence[str], file: Path
) -> tuple[dict, dict[str, str]]:
    """(shapes by the child's names, child's names by ours)."""
    shapes = {f"model/{name}": shape for name, shape in expected.items() if "model" in parts}
    places = {name: name for name in shapes}
    listed = [part for part in parts if part == "ema" or (part != "model" and facts["moments"])]
    if ("ema" in listed and facts["averages"] != len(expected)) or (
        facts and facts["moments"] not in (0, len(expected))
    ):
        raise ValueError(
            f"{str(file)!r} has moving averages of {facts['averages']} and moments of "
            f"{facts['moments']} parameters, its config gives {len(expected)}; both must be of one "
            "run"
        )
    for part in listed:
        for i, (name, shape) in enumerate(expected.items()):
            shapes[f"{part}/{i}"] = shape
            places[f"{part}/{name}"] = f"{part}/{i}"
    return shapes, places
