"""safetensors files, with bounds checks of our own before anything large is allocated.

The format: 8 bytes little endian, the length of a JSON header; the header, which gives dtype, shape
and place of every tensor; their bytes, one after the other. The library checks it too, but hands
over every tensor of whatever names and shapes; here these must be the expected ones before a byte
is read. Tensors are read and written one by one. Imports no jax: the child process uses it.
Source: github.com/huggingface/safetensors, README.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from sedd_jax.files import load_json, replacing, shown

DIGEST = "sedd_jax.sha256"  # in the metadata of our own files
MAX_HEADER = 100_000_000  # bytes, the format's own limit
_PIECE = 1 << 20
_ITEMS = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


class Entry(NamedTuple):
    """Where a tensor is in its file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int  # bytes from the file's start
    end: int


class Tensors(Mapping[str, np.ndarray]):
    """The tensors of a checked file: each is read when it is asked for, and given as float32.

    ValueError, with the tensor's name, if one holds a NaN or an infinity.
    """

    def __init__(self, file: Path, entries: Mapping[str, Entry]):
        self.file, self.entries = file, dict(entries)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def __getitem__(self, name: str) -> np.ndarray:
        entry = self.entries[name]
        array = np.empty(entry.shape, _ITEMS[entry.dtype])
        with self.file.open("rb") as file:
            file.seek(entry.begin)
            if file.readinto(memoryview(array.reshape(-1).view(np.uint8))) != array.nbytes:
                raise ValueError(f"{str(self.file)!r} ends inside {name}; get it again")
        array = array.astype(np.float32, copy=False)
        flat = array.reshape(-1)
        for start in range(0, flat.size, _PIECE):
            if not np.isfinite(flat[start : start + _PIECE]).all():
                raise ValueError(
                    f"{name} in {str(self.file)!r} holds values that are not finite; get it again"
                )
        return array

    def renamed(self, names: Mapping[str, str]) -> "Tensors":
        """Those tensors whose names here are the values, under the keys."""
        return Tensors(self.file, {new: self.entries[old] for new, old in names.items()})


def open_tensors(
    file: Path,
    expected: Mapping[str, tuple[int, ...]],
    *,
    optional: Mapping[str, tuple[int, ...]] | None = None,
) -> Tensors:
    """The tensors of a file that holds exactly `expected` and perhaps `optional`: name -> shape.

    F32 is read as it is, F16 and BF16 are widened, which is exact. If every name begins with
    "module.", as DistributedDataParallel saves them, that is left out. A file written here holds
    the sha256 of its names, shapes and bytes, so every change to them is found; in another's file
    a flipped bit that leaves a finite number cannot be seen. ValueError, before anything large is
    allocated, for whatever is wrong.
    """
    file = Path(file)
    optional = optional or {}
    try:
        # Far more than the expected names need: a longer header cannot be theirs.
        written, metadata = _read_header(file, 2**16 + 1024 * (len(expected) + len(optional)))
        entries = written
        if entries and all(name.startswith("module.") for name in entries):
            entries = {name.removeprefix("module."): entry for name, entry in entries.items()}
        shapes = {name: entry.shape for name, entry in entries.items()}
        compare(shapes, expected, optional, repr(str(file)))
        if DIGEST in metadata:
            _check_digest(file, written, metadata[DIGEST])
    except OSError as error:
        raise ValueError(f"cannot read {str(file)!r}: {error.strerror}; get it again") from error
    return Tensors(file, entries)


def compare(
    found: Mapping[str, tuple[int, ...]],
    expected: Mapping[str, tuple[int, ...]],
    optional: Mapping[str, tuple[int, ...]],
    where: str,
) -> None:
    """ValueError if names or shapes are not the expected ones."""
    rule = "weights and config must be of one SEDD"
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected and name not in optional]
    for fault, wrong in (("lacks", missing), ("has a tensor too many:", extra)):
        if wrong:
            more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            raise ValueError(f"{where} {fault} {shown(wrong[0])}{more}; {rule}")
    for name, shape in {**expected, **optional}.items():
        if name in found and tuple(found[name]) != tuple(shape):
            raise ValueError(
                f"{name} in {where} has shape {list(found[name])}, not {list(shape)}; {rule}"
            )


def write_tensors(file: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write float32 tensors by name, with the sha256 that `open_tensors` checks.

    They are taken one by one, in the order of their names. The file appears whole or not at all.
    """
    file, order = Path(file), sorted(tensors)
    header: dict[str, Any] = {"__metadata__": {"format": "pt", DIGEST: "0" * 64}}
    place = 0
    for name in order:
        shape = tuple(tensors[name].shape)
        end = place + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with replacing(file) as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            array = np.ascontiguousarray(tensors[name], "<f4").reshape(-1)
            digest.update(_line(name, "F32", tensors[name].shape))
            data = memoryview(array.view(np.uint8))
            digest.update(data)
            out.write(data)
        out.seek(8 + text.index(b"0" * 64))
        out.write(digest.hexdigest().encode())


def _read_header(file: Path, most: int) -> tuple[dict[str, Entry], dict[str, str]]:
    """(tensors by name, metadata), each tensor's place checked against the file's size."""
    where = repr(str(file))
    with file.open("rb") as opened:
        size = os.fstat(opened.fileno()).st_size
        length = int.from_bytes(opened.read(8), "little")
        most = min(most, MAX_HEADER, size - 8)
        if size < 8 or length > most:
            raise ValueError(
                f"{where}: a header of {length} bytes in a file of {size}, at most "
                f"{max(most, 0)} are allowed; get it again"
            )
        text = opened.read(length)
    if len(text) != length:
        raise ValueError(f"{where} ends inside its header; get it again")
    header = load_json(text, f"the header of {where}")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError(f"__metadata__ of {where} is not text by name; get it again")
    start = 8 + length
    entries = {name: _entry(name, value, start, size, where) for name, value in header.items()}
    place = start
    for name, entry in sorted(entries.items(), key=lambda item: item[1][2:]):
        if entry.begin != place:
            kind = "overlap" if entry.begin < place else "leave a gap"
            raise ValueError(f"tensors of {where} {kind} before {shown(name)}; get it again")
        place = entry.end
    if place != size:
        raise ValueError(f"{where} has {size - place} bytes after its last tensor; get it again")
    return entries, metadata


def _entry(name: str, value: Any, start: int, size: int, where: str) -> Entry:
    fault = f"{shown(name)} in {where}"
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{fault} has no dtype, shape and data_offsets; get it again")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _ITEMS:
        kind = shown(str(dtype))
        raise ValueError(f"{fault} is stored as {kind}; known: {', '.join(_ITEMS)}")
    for key, numbers in (("shape", shape), ("data_offsets", offsets)):
        # type, because True is an int to isinstance
        if not isinstance(numbers, list) or not all(type(n) is int and n >= 0 for n in numbers):
            raise ValueError(f"{key} of {fault} is no list of whole numbers; get it again")
    if len(shape) > 8 or len(offsets) != 2 or not offsets[0] <= offsets[1] <= size - start:
        raise ValueError(f"{fault} lies outside the file of {size} bytes; get it again")
    needed = math.prod(shape) * np.dtype(_ITEMS[dtype]).itemsize
    if offsets[1] - offsets[0] != needed:
        raise ValueError(
            f"{fault} has {offsets[1] - offsets[0]} bytes, its shape needs {_count(needed)}; get "
            "it again"
        )
    return Entry(dtype, tuple(shape), start + offsets[0], start + offsets[1])


def _count(number: int) -> str:
    return str(number) if number < 10**18 else "more than 10^18"


def _line(name: str, dtype: str, shape: tuple[int, ...]) -> bytes:
    return f"{name} {dtype} {list(shape)}\n".encode()


def _check_digest(file: Path, entries: Mapping[str, Entry], wanted: str) -> None:
    """ValueError if the file is not as it was written; reads it once, a piece at a time."""
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        for name, entry in sorted(entries.items(), key=lambda item: item[1][2:]):
            digest.update(_line(name, entry.dtype, entry.shape))
            opened.seek(entry.begin)
            left = entry.end - entry.begin
            while left and (piece := opened.read(min(left, _PIECE))):
                digest.update(piece)
                left -= len(piece)
    if digest.hexdigest() != wanted:
        raise ValueError(
            f"{str(file)!r} has sha256 {digest.hexdigest()}, its header says {shown(wanted, 70)}: "
            "it was damaged after it was written; get it again"
        )
