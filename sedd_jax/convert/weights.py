"""safetensors files: the names and shapes that are expected, our own sha256, one tensor at a time.

The safetensors library reads them and checks that the header fits the file. It would hand over
tensors of whatever names and shapes, so these are compared before a byte of a tensor is read.
Imports no jax: the child process that reads torch's files uses it.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  numpy knows bfloat16 once this is imported
import numpy as np
import safetensors

from sedd_jax.files import load_json, replacing, shown

DIGEST = "sedd_jax.sha256"  # in the metadata of our own files
DTYPES = ("F32", "F16", "BF16")
_PIECE = 1 << 20  # values that are checked at once

Shapes = Mapping[str, tuple[int, ...]]


class Tensors(Mapping[str, np.ndarray]):
    """The tensors of a checked file, each read at its use and widened to float32.

    ValueError, with the tensor's name, if one holds a NaN or an infinity.
    """

    def __init__(self, file: Path, stored: Mapping[str, str]):
        self.file, self.stored = file, dict(stored)  # stored: its name in the file, by name

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)

    def __contains__(self, name: object) -> bool:
        return name in self.stored

    def __getitem__(self, name: str) -> np.ndarray:
        with safetensors.safe_open(self.file, "numpy") as opened:
            array = opened.get_tensor(self.stored[name]).astype(np.float32, copy=False)
        flat = array.reshape(-1)
        for start in range(0, flat.size, _PIECE):
            if not np.isfinite(flat[start : start + _PIECE]).all():
                raise ValueError(
                    f"{name} in {str(self.file)!r} holds values that are not finite; get it again"
                )
        return array

    def renamed(self, names: Mapping[str, str]) -> "Tensors":
        """Those tensors whose names here are the values, under the keys."""
        return Tensors(self.file, {new: self.stored[old] for new, old in names.items()})


def open_tensors(file: Path, expected: Shapes, *, optional: Shapes | None = None) -> Tensors:
    """The tensors of a file that holds exactly `expected` and perhaps `optional`: name -> shape.

    F32 is read as it is, F16 and BF16 are widened, which is exact. A prefix "module." of every
    name, as DistributedDataParallel saves them, is left out. A file written here holds the sha256
    of its names, shapes and bytes, so that every change to them is seen; in another's file a
    flipped bit that leaves a finite number cannot be. ValueError, before anything large is
    allocated, for whatever is wrong.
    """
    file, optional = Path(file), optional or {}
    where = repr(str(file))
    try:
        # Far more than the expected names need: a longer header cannot be theirs.
        _check_header(file, 2**16 + 1024 * (len(expected) + len(optional)))
        with safetensors.safe_open(file, "numpy") as opened:
            names = opened.offset_keys()
            is_wrapped = all(name.startswith("module.") for name in names)
            stored = {name.removeprefix("module.") if is_wrapped else name: name for name in names}
            slices = {name: opened.get_slice(old) for name, old in stored.items()}
            compare({n: s.get_shape() for n, s in slices.items()}, expected, optional, where)
            for name, tensor in slices.items():
                if tensor.get_dtype() not in DTYPES:
                    raise ValueError(
                        f"{name} in {where} is stored as {tensor.get_dtype()}; known: "
                        f"{', '.join(DTYPES)}"
                    )
            _check_digest(opened, where)
    except OSError as error:
        raise ValueError(f"cannot read {where}: {error.strerror or error}; get it again") from error
    except safetensors.SafetensorError as error:
        raise ValueError(f"{where}: {shown(str(error), 300)}; get it again") from error
    return Tensors(file, stored)


def _check_header(file: Path, max_bytes: int) -> None:
    """ValueError for what the library lets pass: a huge header, a name twice, an unknown field."""
    where = repr(str(file))
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if length > max_bytes:
            raise ValueError(
                f"{where}: a header of {length} bytes, at most {max_bytes} are allowed; get it "
                "again"
            )
        header = load_json(opened.read(length), f"the header of {where}")
    for name, entry in header.items():
        fields = set(entry) if isinstance(entry, dict) else None
        if name != "__metadata__" and fields != {"dtype", "shape", "data_offsets"}:
            raise ValueError(
                f"{shown(name)} in {where} has no dtype, shape and data_offsets alone; get it again"
            )


def compare(
    actual: Shapes, expected: Shapes, optional: Shapes, where: str, *, model: str = "SEDD"
) -> None:
    """ValueError if names or shapes are not the expected ones of a `model`."""
    rule = f"weights and config must be of one {model}"
    missing = [name for name in expected if name not in actual]
    extra = [name for name in actual if name not in expected and name not in optional]
    for fault, wrong in (("lacks", missing), ("has a tensor too many:", extra)):
        if wrong:
            more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            raise ValueError(f"{where} {fault} {shown(wrong[0])}{more}; {rule}")
    for name, shape in {**expected, **optional}.items():
        if name in actual and tuple(actual[name]) != tuple(shape):
            raise ValueError(
                f"{name} in {where} has shape {shown(str(list(actual[name])))}, not "
                f"{list(shape)}; {rule}"
            )


def write_tensors(file: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write float32 tensors by name, with the sha256 that `open_tensors` checks.

    They are taken one by one, in the order of their names: the library's writer needs all of them
    contiguous in memory at once, a second copy of a model whose layers are transposed views, and
    the sha256 before the first. The file appears whole or not at all.
    """
    file, order = Path(file), sorted(tensors)
    header: dict[str, Any] = {"__metadata__": {"format": "pt", DIGEST: "0" * 64}}
    end = 0
    for name in order:
        shape = tuple(tensors[name].shape)
        begin, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with replacing(file) as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            array = np.ascontiguousarray(tensors[name], "<f4")
            _add(digest, name, array.reshape(tensors[name].shape))
            out.write(array.data)
        out.seek(8 + text.index(b"0" * 64))
        out.write(digest.hexdigest().encode())


def _add(digest: Any, name: str, array: np.ndarray) -> None:
    """Add a float32 tensor to the sha256: its name and shape on a line, then its bytes."""
    digest.update(f"{name} F32 {list(array.shape)}\n".encode())
    digest.update(array.data)


def _check_digest(opened: Any, where: str) -> None:
    """ValueError if a file of ours is not as it was written; reads it once."""
    expected = (opened.metadata() or {}).get(DIGEST)
    if expected is None:
        return
    digest = hashlib.sha256()
    for name in opened.offset_keys():
        _add(digest, name, opened.get_tensor(name))
    if digest.hexdigest() != expected:
        raise ValueError(
            f"{where} has sha256 {digest.hexdigest()}, its header says {shown(expected, 70)}: it "
            "was damaged after it was written; get it again"
        )
