"""torch's .pth and .bin files, read and written by a child process, `torch_child`.

This process sees only the safetensors and the JSON that the child leaves, and checks them as it
would a stranger's. It needs no torch.
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

from sedd_jax.convert.weights import Shapes, Tensors, open_tensors, write_tensors
from sedd_jax.files import load_json, sync_folder

MAX_FILE = 32 << 30  # bytes
MAX_PICKLE = 64 << 20  # bytes of the pickle in it, which holds names and offsets but no numbers
MAX_RECORDS = 100_000
SECONDS = 3600.0
PARTS = ("model", "ema", "exp_avg", "exp_avg_sq")
TENSORS = "tensors.safetensors"
CHILD = Path(__file__).with_name("torch_child.py")
# What the child may know of this process: where its libraries are, and no secrets.
_ENVIRONMENT = (
    "PATH", "LD_LIBRARY_PATH", "HOME", "TMPDIR", "LANG", "VIRTUAL_ENV", "PYTHONPATH", "SYSTEMROOT",
)  # fmt: skip


class TorchFile(NamedTuple):
    """What a file held."""

    tensors: Tensors  # model/<name>, and of a checkpoint ema/<i>, exp_avg/<i>, exp_avg_sq/<i>
    facts: dict[str, Any]  # of a checkpoint: step, count, ema_decay, ema_updates, moments
    order: tuple[str, ...]  # the parameters' names, of which <i> is the number

    def part(self, name: str) -> Tensors:
        """The tensors of one of PARTS by the original's names."""
        if name != "model":
            stored = {parameter: f"{name}/{i}" for i, parameter in enumerate(self.order)}
        else:
            stored = {
                key.removeprefix("model/"): key for key in self.tensors if key[:6] == "model/"
            }
        return self.tensors.renamed(stored)


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

    expected is name -> shape in the order of the original's parameters, optional what the state
    dict may hold beside them; parts are those of a checkpoint that are read, whatever the others
    hold. ValueError if torch >= 2.10 is absent, or the file is too large, is not torch's, holds
    anything but such tensors, or takes too long. TMPDIR must hold a copy of the file.
    """
    _check_archive(file, max_bytes)
    with tempfile.TemporaryDirectory(prefix="sedd_jax.") as folder:
        tensors = Path(folder) / TENSORS
        facts = _run(seconds, work="read", file=file, tensors=tensors, parts=list(parts))
        if not facts:
            parts = ("model",)
        elif not facts["moments"]:
            parts = [part for part in parts if part in ("model", "ema")]
        for what, part in (("averages", "ema"), ("moments", "exp_avg")):
            if part in parts and facts[what] != len(expected):
                raise ValueError(
                    f"{str(file)!r} has {what} of {facts[what]} parameters, its config gives "
                    f"{len(expected)}; both must be of one run"
                )
        shapes = {
            f"{part}/{name if part == 'model' else i}": shape
            for part in parts
            for i, (name, shape) in enumerate(expected.items())
        }
        extra = {f"model/{name}": shape for name, shape in (optional or {}).items()}
        yield TorchFile(open_tensors(tensors, shapes, optional=extra), facts, tuple(expected))


def write(file: Path, model: Mapping[str, np.ndarray], parts: Mapping, facts: dict) -> None:
    """Write checkpoint.pth with the layout of the original's save_checkpoint.

    model holds the state dict in its order, buffer included; parts the "ema" and, where facts has
    a count above 0, "exp_avg" and "exp_avg_sq", by the original's names in its parameters' order.
    facts: step, count, ema_decay, ema_updates and optimizer, the arguments of torch's AdamW.
    """
    tensors = {f"model/{name}": array for name, array in model.items()}
    for part, arrays in parts.items():
        tensors |= {f"{part}/{i}": array for i, array in enumerate(arrays.values())}
    facts = {**facts, "averages": len(parts["ema"]), "model": list(model)}
    # Beside the target, whose disk must hold a file of this size anyway.
    with tempfile.TemporaryDirectory(prefix=".sedd_jax.", dir=file.parent) as folder:
        stored, written = Path(folder) / TENSORS, Path(folder) / file.name
        write_tensors(stored, tensors)
        _run(SECONDS, work="write", file=written, tensors=stored, facts=facts)
        written.replace(file)
    sync_folder(file.parent)


def _check_archive(file: Path, max_bytes: int) -> None:
    """ValueError unless it is an archive as torch.save writes: uncompressed, a small pickle."""
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


def _run(seconds: float, *, work: str, file: Path, **request: Any) -> dict[str, Any]:
    """The child's facts; ValueError with its error, or that it ended without an answer."""
    request |= {"work": work, "file": os.path.abspath(file)}
    try:
        # -P: no module is taken from the script's folder, whose names.py is none of torch's.
        ended = subprocess.run(
            [sys.executable, "-P", str(CHILD)],
            input=json.dumps(request, default=str),
            env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ValueError(
            f"torch took over {seconds:g} s to {work} {str(file)!r}; give it a faster disk, or "
            "another file"
        ) from error
    lines = ended.stdout.split("\n")[:-1]
    if ended.returncode or not lines:
        last = " ".join(" ".join(ended.stderr.split("\n")[-2:]).split())[:200]
        raise ValueError(
            f"the process that was to {work} {str(file)!r} ended with status {ended.returncode}: "
            f"{last or 'no word'}; is there memory for the file?"
        )
    answer = load_json(lines[-1], "the child's answer")
    if "error" in answer:
        raise ValueError(str(answer["error"]))
    return answer["facts"]
