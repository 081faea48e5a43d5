"""torch's .pth and .bin files, read and written by a child process, `torch_child`.

This process sees only the safetensors and JSON that the child leaves, and checks them as it
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
from typing import Any

import numpy as np

from sedd_jax.convert.weights import Shapes, Tensors, open_tensors, write_tensors
from sedd_jax.host.files import load_json, refuse_pointer_file

MAX_FILE = 32 << 30  # bytes
MAX_PICKLE = 64 << 20  # bytes of the pickle in it, which holds names and offsets but no numbers
MAX_RECORDS = 100_000
SECONDS = 3600.0
PARTS = ("model", "ema", "exp_avg", "exp_avg_sq")
CHILD = Path(__file__).with_name("torch_child.py")
# What the child may know of this process: where its libraries are, and no secrets.
_ENVIRONMENT = (
    "PATH", "LD_LIBRARY_PATH", "HOME", "TMPDIR", "LANG", "VIRTUAL_ENV", "PYTHONPATH", "SYSTEMROOT",
)  # fmt: skip


@contextlib.contextmanager
def read(
    file: Path,
    expected: Shapes,
    parts: Sequence[str] = PARTS,
    *,
    seconds: float = SECONDS,
    **model: str,
) -> Iterator[tuple[dict[str, Tensors], dict[str, Any]]]:
    """(tensors by part, facts) of a checkpoint of the original, while the with statement lasts.

    expected is name -> shape in the order of the original's parameters; parts are those that are
    read, whatever the others hold. The facts are step, ema_decay, ema_updates and counts, of
    AdamW's updates: without any, there are no moments. A state dict alone has the part "model" and
    no facts. model says what the file is of, as for `open_tensors`. ValueError if torch >= 2.10 is
    absent, or the file is too large, is not torch's, holds anything but such tensors, or takes too
    long. TMPDIR must hold a copy of the file.
    """
    check_archive(file)
    with tempfile.TemporaryDirectory(prefix="sedd_jax.") as folder:
        request = {"names": list(expected), "parts": list(parts)}
        facts = _run("read", file, folder, seconds, **request)
        if not facts:
            parts = ("model",)
        elif not facts["counts"]:
            parts = [part for part in parts if part in ("model", "ema")]
        where = repr(str(file))
        yield (
            {
                part: open_tensors(
                    Path(folder) / f"{part}.safetensors", expected, where=where, **model
                )
                for part in parts
            },
            facts,
        )


def write(file: Path, parts: Mapping[str, Mapping[str, np.ndarray]], facts: dict) -> None:
    """Write checkpoint.pth with the layout of the original's save_checkpoint.

    parts: the "model", a state dict in its order; the "ema", in its parameters' order; and
    "exp_avg" and "exp_avg_sq" where facts["counts"] holds AdamW's updates. facts: step, counts,
    ema_decay, ema_updates and optimizer, the arguments of torch's AdamW.
    """
    facts = {**facts, "model": list(parts["model"])}
    # Beside the target, whose disk must hold a file of this size anyway.
    with tempfile.TemporaryDirectory(prefix=".sedd_jax.", dir=file.parent) as folder:
        for part, tensors in parts.items():
            write_tensors(Path(folder) / f"{part}.safetensors", tensors)
        written = Path(folder) / file.name
        _run("write", written, folder, SECONDS, names=list(parts["ema"]), facts=facts)
        written.replace(file)


def check_archive(file: Path) -> None:
    """ValueError unless it is an archive as torch.save writes: uncompressed, a small pickle."""
    where = repr(str(file))
    try:
        size = file.stat().st_size
        if size > MAX_FILE:
            raise ValueError(f"{where} has {size} bytes, over the limit of {MAX_FILE}")
        refuse_pointer_file(file)
        with zipfile.ZipFile(file) as archive:
            records = archive.infolist()
    except OSError as error:
        raise ValueError(f"cannot read {where}: {error.strerror}; give a .pth file") from error
    except (zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{where} is not an archive as torch.save has written since torch 1.6; load and save "
            "it again with the original's torch"
        ) from error
    pickles = [r.file_size for r in records if r.filename.endswith("data.pkl")]
    if (
        len(records) > MAX_RECORDS
        or len(pickles) != 1
        or pickles[0] > MAX_PICKLE
        or any(r.compress_type != zipfile.ZIP_STORED for r in records)
        or sum(r.file_size for r in records) > size
    ):
        raise ValueError(
            f"{where} is not an archive as torch.save writes: it has {len(records)} records, which "
            "must be uncompressed with one small pickle; give a checkpoint of the original code"
        )


def _run(work: str, file: Path, folder: str, seconds: float, **request: Any) -> dict[str, Any]:
    """The child's facts; ValueError with its error, or that it ended without an answer."""
    request |= {"work": work, "file": os.path.abspath(file), "folder": folder}
    try:
        # -P: no module is taken from the script's folder, whose names.py is none of torch's.
        ended = subprocess.run(
            [sys.executable, "-P", str(CHILD)],
            input=json.dumps(request),
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
        raise ValueError(answer["error"])
    return answer["facts"]
