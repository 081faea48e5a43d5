"""safetensors files: the names and shapes that are expected, our own sha256, one tensor at a time.

The safetensors library reads them and checks that the header fits the file. It would hand over
tensors of whatever names and shapes, so these are compared before a byte of a tensor is read.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import ml_dtypes  # noqa: F401  numpy knows bfloat16 once this is imported
import numpy as np
import safetensors

from sedd_jax.files import load_json, shown

DIGEST = "sedd_jax.sha256"  # in the metadata of our own files
DTYPES = ("F32", "F16", "BF16")
# Of the original's state dict; it follows from the sizes, and a file may lack it.
BUFFER = "rotary_emb.inv_freq"

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
        if not np.isfinite(array).all():
            raise ValueError(
                f"{self.stored[name]} in {str(self.file)!r} holds values that are not finite; "
                "get it again"
            )
        return array

    def part(self, name: str) -> "Tensors":
        """Those tensors whose name begins with "name/", without it."""
        prefix = f"{name}/"
        stored = {n.removeprefix(prefix): self.stored[n] for n in self if n.startswith(prefix)}
        return Tensors(self.file, stored)


def open_tensors(file: Path, expected: Shapes) -> Tensors:
    """The tensors of a file that holds exactly `expected`, name -> shape, and perhaps BUFFER.

    F32 is read as it is, F16 and BF16 are widened, which is exact. A prefix "module." of every
    name, as DistributedDataParallel saves them, is left out. A file written here holds the sha256
    of its names, shapes and bytes, so that every change to them is seen; in another's file a
    flipped bit that leaves a finite number cannot be. ValueError, before anything large is
    allocated, for whatever is wrong.
    """
    file = Path(file)
    where = repr(str(file))
    try:
        # Far more than the expected names need: a longer header cannot be theirs.
        _check_header(file, 2**16 + 1024 * len(expected))
        with safetensors.safe_open(file, "numpy") as opened:
            names = opened.offset_keys()
            is_wrapped = all(name.startswith("module.") for name in names)
            stored = {name.removeprefix("module.") if is_wrapped else name: name for name in names}
            slices = {name: opened.get_slice(old) for name, old in stored.items()}
            shapes = {name: tensor.get_shape() for name, tensor in slices.items()}
            shapes = {name: shapes[name] for name in shapes if not name.endswith(BUFFER)}
            compare(shapes, expected, where)
            for name, tensor in slices.items():
                if tensor.get_dtype() not in DTYPES:
                    raise ValueError(
                        f"{name} in {where} is stored as {tensor.get_dtype()}; known: "
                        f"{', '.join(DTYPES)}"
                    )
            # The file's own order: by name, as all of ours are float32.
            arrays = ((name, opened.get_tensor(name)) for name in names)
            written = (opened.metadata() or {}).get(DIGEST)
            if written is not None and (actual := _digest(arrays)) != written:
                raise ValueError(
                    f"{where} has sha256 {actual}, its header says {shown(written, 70)}: it was "
                    "damaged after it was written; get it again"
                )
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


def compare(actual: Shapes, expected: Shapes, where: str, *, model: str = "SEDD") -> None:
    """ValueError if names or shapes are not the expected ones of a `model`."""
    rule = f"weights and config must be of one {model}"
    for fault, wrong in (
        ("lacks", [name for name in expected if name not in actual]),
        ("has a tensor too many:", [name for name in actual if name not in expected]),
    ):
        if wrong:
            more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            raise ValueError(f"{where} {fault} {shown(wrong[0])}{more}; {rule}")
    for name, shape in expected.items():
        if tuple(actual[name]) != tuple(shape):
            raise ValueError(
                f"{name} in {where} has shape {shown(str(list(actual[name])))}, not "
                f"{list(shape)}; {rule}"
            )


def write_tensors(file: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write float32 tensors by name, with the sha256 that `open_tensors` checks.

    One at a time, where the library's writer would copy all of them, most of which are transposed
    views. The file is on disk when this returns; the caller writes it into a temporary folder, so
    that it appears whole.
    """

    def arrays() -> Iterator[tuple[str, np.ndarray]]:
        return (
            (name, np.asarray(tensors[name], np.float32, order="C")) for name in sorted(tensors)
        )

    header, end = {"__metadata__": {"format": "pt", DIGEST: _digest(arrays())}}, 0
    for name in sorted(tensors):
        begin, end = end, end + 4 * tensors[name].size
        shape = list(tensors[name].shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the data
    with open(file, "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        out.writelines(array.data for _, array in arrays())
        out.flush()
        os.fsync(out.fileno())


def _digest(tensors: Iterable[tuple[str, np.ndarray]]) -> str:
    """The sha256 of float32 tensors: of each its name and shape on a line, then its bytes."""
    digest = hashlib.sha256()
    for name, array in tensors:
        digest.update(f"{name} F32 {list(array.shape)}\n".encode())
        digest.update(array.data)
    return digest.hexdigest()
