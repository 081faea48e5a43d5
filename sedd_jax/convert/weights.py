"""safetensors files: the names and shapes that are expected, our own sha256, one tensor at a time.

The safetensors library reads them and checks that the header fits the file. It would hand over
tensors of whatever names and shapes, so these are compared before a byte of a tensor is read.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import ml_dtypes  # noqa: F401  numpy knows bfloat16 once this is imported
import numpy as np
import safetensors

from sedd_jax.host import hub
from sedd_jax.host.files import load_json, refuse_pointer_file, shown

log = logging.getLogger(__name__)

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"  # of weights in several files: which tensor is in which
PICKLED_INDEX = "pytorch_model.bin.index.json"
DIGEST = "sedd_jax.sha256"  # in the metadata of our own files
DTYPES = ("F32", "F16", "BF16")
# Of the original's state dict; it follows from the sizes, and a file may lack it.
BUFFER = "rotary_emb.inv_freq"
_SHARD = re.compile(r"[\w-][\w.-]{0,200}\.safetensors", re.ASCII)  # beside the index, nowhere else
MAX_INDEX = 1 << 24  # bytes
# What torch.compile, FSDP and activation checkpointing put before a name, or amid it.
_WRAPPED = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_USUAL = "transformer."  # of every GPT-2 with a head: no news

Shapes = Mapping[str, tuple[int, ...]]


class Tensors(Mapping[str, np.ndarray]):
    """The tensors of checked files, each read at its use and widened to float32.

    ValueError, with the tensor's name, if one holds a NaN or an infinity.
    """

    def __init__(self, where: str, stored: Mapping[str, tuple[Path, str]]):
        self.where, self._stored = where, dict(stored)  # name -> its file, its name there

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    def __contains__(self, name: object) -> bool:
        return name in self._stored

    def __getitem__(self, name: str) -> np.ndarray:
        file, stored_name = self._stored[name]
        with _reading(self.where), safetensors.safe_open(file, "numpy") as opened:
            array = opened.get_tensor(stored_name).astype(np.float32, copy=False)
        if not np.isfinite(array).all():
            raise ValueError(
                f"{stored_name} in {self.where} holds values that are not finite; get it again"
            )
        return array


def download(repository: str, revision: str | None, *, optional: Sequence[str] = ()) -> Path:
    """`hub.download` of config.json and the weights: WEIGHTS, else the shards of INDEX, if any."""
    files = ["config.json"]
    folder = hub.download(
        repository, revision, files, optional=[WEIGHTS, INDEX, PICKLED_INDEX, *optional]
    )
    if locate(folder) == folder / INDEX:
        with _reading(repr(str(folder / INDEX))):
            shards = [shard.name for shard in _read_index(folder / INDEX)]
        hub.download(repository, folder.name, shards)  # of the same commit
    return folder


def locate(folder: Path) -> Path | None:
    """The file of `folder` for `open_tensors`: WEIGHTS, else INDEX; None if there is neither.

    ValueError if there is the index of files that torch has pickled, in place of both.
    """
    file = next((folder / name for name in (WEIGHTS, INDEX) if (folder / name).is_file()), None)
    if file is None and (folder / PICKLED_INDEX).is_file():
        raise ValueError(
            f"{str(folder / PICKLED_INDEX)!r} is of weights that torch has pickled in several "
            "files, which are not read; write safetensors of them: in PyTorch, load the model and "
            "call save_pretrained(FOLDER, safe_serialization=True)"
        )
    return file


def open_tensors(
    file: Path,
    expected: Shapes,
    *,
    extra: str = re.escape(BUFFER),
    model: str = "SEDD",
    usual: str = _USUAL,
    where: str = "",
) -> Tensors:
    """The tensors of a file that holds exactly `expected`, name -> shape, and perhaps `extra`.

    file is of safetensors, or the index of such files; extra is a pattern of names whose shapes
    are free; model and where, by default the file, are for messages. F32 is read as it is, F16 and
    BF16 are widened, which is exact. What wrappers put before every name is left out, which the log
    says unless it is `usual`. A file written here holds the sha256 of its names, shapes and bytes,
    so that every change to them is seen; in another's file a flipped bit that leaves a finite
    number cannot be.
    ValueError, before anything large is allocated, for whatever is wrong.
    """
    where = where or repr(str(file))
    with _reading(where), contextlib.ExitStack() as stack:
        shards = _read_index(file) if file.name.endswith(".json") else {file: None}
        opened = {}
        for shard, listed in shards.items():
            if listed is not None and not shard.is_file():
                raise ValueError(f"no {str(shard)!r}, which {where} names; get this file too")
            # Far more than the expected names need: a longer header cannot be theirs.
            _check_header(shard, 2**16 + 1024 * len(expected))
            with _reading(repr(str(shard))):
                opened[shard] = stack.enter_context(safetensors.safe_open(shard, "numpy"))
            if listed is not None and (wrong := listed ^ set(opened[shard].keys())):
                raise ValueError(
                    f"{shown(min(wrong))} is in {str(shard)!r} or in {where}, not in both; get "
                    "both again"
                )
        names = [name for tensors in opened.values() for name in tensors.keys()]  # noqa: SIM118
        bare = _bare_names(names, expected, extra, where)
        stored = {
            bare[name]: (shard, name)
            for shard, tensors in opened.items()
            for name in tensors.keys()  # noqa: SIM118 (no mapping: it has no __iter__)
        }
        _check_tensors(stored, opened, expected, extra, where, model)
        for shard, tensors in opened.items():
            _check_digest(tensors, repr(str(shard)))
    for name, (_, old) in stored.items():  # the first of them stands for all
        if name in expected and old not in (name, usual + name):
            log.info("%s: %s is read as %s, and so on", where, shown(old, 120), name)
            break
    return Tensors(where, stored)


@contextlib.contextmanager
def _reading(where: str) -> Iterator[None]:
    """Faults of the system and of the library as a ValueError that says what was read."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"cannot read {where}: {error.strerror or error}; get it again") from error
    except safetensors.SafetensorError as error:
        raise ValueError(f"{where}: {shown(str(error), 300)}; get it again") from error


def _read_index(index: Path) -> dict[Path, set[str]]:
    """The names of the tensors in each file that the index names, which may not be there."""
    where = repr(str(index))
    if index.stat().st_size > MAX_INDEX:
        raise ValueError(f"{where} has over {MAX_INDEX} bytes; get it again")
    files = load_json(index.read_bytes(), where).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise ValueError(f"{where} has no weight_map, from tensors to files; get it again")
    shards: dict[Path, set[str]] = {}
    for tensor, name in files.items():
        if not isinstance(name, str) or not _SHARD.fullmatch(name):
            raise ValueError(
                f"{where} names {shown(repr(name))}, no safetensors file beside it; get it again"
            )
        shards.setdefault(index.with_name(name), set()).add(tensor)
    return shards


def _bare_names(names: Sequence[str], expected: Shapes, extra: str, where: str) -> dict[str, str]:
    """Each of a file's names without what wrappers of the model put before it."""
    plain = {name: _WRAPPED.sub("", name) for name in names}
    extras = {name: re.search(rf"(?:^|\.)({extra})\Z", plain[name]) for name in names}
    inner = [plain[name] for name in names if not extras[name]]
    prefix = _common_prefix(inner).removesuffix(_common_prefix(expected))
    if not any(name.removeprefix(prefix) in expected for name in inner):
        prefix = ""  # another model's names: a message shows them as they are
    bare = {n: extras[n][1] if extras[n] else plain[n].removeprefix(prefix) for n in names}
    if len(set(bare.values())) != len(bare):
        twice = next(name for name in names if list(bare.values()).count(bare[name]) > 1)
        raise ValueError(f"tensor {shown(bare[twice])} is in {where} twice; get it again")
    return bare


def _common_prefix(names: Iterable[str]) -> str:
    """The longest "a.b." that begins every name."""
    prefix = os.path.commonprefix(list(names))
    return prefix[: prefix.rfind(".") + 1]


def _check_tensors(stored, opened, expected, extra, where, model) -> None:
    """ValueError unless the names, shapes and dtypes are those that are expected."""
    slices = {
        name: opened[shard].get_slice(stored_name)
        for name, (shard, stored_name) in stored.items()
        if not re.fullmatch(extra, name)
    }
    shapes = {name: tensor.get_shape() for name, tensor in slices.items()}
    compare(shapes, expected, where, model=model)
    for name, tensor in slices.items():
        if (dtype := tensor.get_dtype()) not in DTYPES:
            raise ValueError(f"{name} in {where} is stored as {dtype}; known: {', '.join(DTYPES)}")


def _check_digest(tensors, where: str) -> None:
    """ValueError if the file says what its sha256 is and that is not so."""
    written = (tensors.metadata() or {}).get(DIGEST)
    if written is None:
        return
    # The file's own order: by name, as all of ours are float32.
    actual = _digest((name, tensors.get_tensor(name)) for name in tensors.offset_keys())
    if actual != written:
        raise ValueError(
            f"{where} has sha256 {actual}, its header says {shown(written, 70)}: it was damaged "
            "after it was written; get it again"
        )


def _check_header(file: Path, max_bytes: int) -> None:
    """ValueError for what the library lets pass: a huge header, a name twice, an unknown field."""
    where = repr(str(file))
    refuse_pointer_file(file)
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
    missing = [name for name in expected if name not in actual]
    unknown = [name for name in actual if name not in expected]
    if missing:
        others = f", and has {_some(unknown, 3)}" if unknown else ""
        raise ValueError(f"{where} lacks {_some(missing, 1)}{others}; {rule}")
    if unknown:
        raise ValueError(f"{where} has a tensor too many: {_some(unknown, 1)}; {rule}")
    for name, shape in expected.items():
        if tuple(actual[name]) != tuple(shape):
            raise ValueError(
                f"{name} in {where} has shape {shown(str(list(actual[name])))}, not "
                f"{list(shape)}; {rule}"
            )


def _some(names: Sequence[str], count: int) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(map(shown, names[:count])) + more


def write_tensors(file: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write float32 tensors by name, with the sha256 that `open_tensors` checks.

    One at a time, where the library's writer would copy all of them, most of which are transposed
    views. The caller writes it into a temporary folder, so that it appears whole.
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


def _digest(tensors: Iterable[tuple[str, np.ndarray]]) -> str:
    """The sha256 of float32 tensors: of each its name and shape on a line, then its bytes."""
    digest = hashlib.sha256()
    for name, array in tensors:
        digest.update(f"{name} F32 {list(array.shape)}\n".encode())
        digest.update(array.data)
    return digest.hexdigest()
