"""What a damaged or hostile file can do to a reader: nothing but a ValueError of one line."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import time
import tracemalloc
import zipfile

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from conftest import says
from original_models import write_safetensors

from sedd_jax.convert import torch_files, weights
from sedd_jax.convert.weights import BUFFER, DIGEST
from sedd_jax.host.files import load_json

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 9\n"
SHAPES = {"a.weight": (3, 4), "b.weight": (3, 4), "bias": (5,), "nothing": (0, 2)}
VALUES = {
    name: np.random.default_rng(1).normal(size=shape).astype(np.float32)
    for name, shape in SHAPES.items()
}


def parts(file) -> tuple[dict, bytes]:
    data = file.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def opened(file) -> dict:
    """Every tensor, read."""
    return dict(weights.open_tensors(file, SHAPES).items())


@pytest.fixture
def good(tmp_path):
    """A file as it is written here."""
    weights.write_tensors(tmp_path / "good.safetensors", VALUES)
    return tmp_path / "good.safetensors"


def test_what_is_written_is_read_by_the_library_too(good):
    ours, theirs = opened(good), safetensors.numpy.load_file(good)
    for name, value in VALUES.items():
        assert ours[name].tobytes() == theirs[name].tobytes() == value.tobytes()
        assert ours[name].shape == theirs[name].shape == value.shape
    with safetensors.safe_open(good, "numpy") as file:
        assert file.metadata()["format"] == "pt"
    good.with_name("plain").touch()
    assert good.stat().st_mode == good.with_name("plain").stat().st_mode  # others may read it


# Mutations


def flipped(random, data: bytes) -> bytes:
    place = int(random.integers(len(data)))
    return data[:place] + bytes([data[place] ^ 1 << int(random.integers(8))]) + data[place + 1 :]


def truncated(random, data: bytes) -> bytes:
    return data[: int(random.integers(len(data)))]


def lengthened(random, data: bytes) -> bytes:
    return data + random.bytes(int(random.integers(1, 40)))


def length_changed(random, data: bytes) -> bytes:
    odd = [0, 1, 7, 2**16, 2**31, 2**63, 2**64 - 1, len(data), len(data) - 8]
    return odd[int(random.integers(len(odd)))].to_bytes(8, "little") + data[8:]


def header_bytes_replaced(random, data: bytes) -> bytes:
    end = 8 + int.from_bytes(data[:8], "little")
    place = int(random.integers(8, end))
    new = random.choice(list(b'{}[]":,0123456789eE-.\\ nut\x00\xff'))
    return data[:place] + bytes([int(new)]) + data[place + 1 :]


def header_edited(random, data: bytes) -> bytes:
    """A header that is still JSON, with a value of a tensor changed or two tensors exchanged."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    names = [name for name in header if name != "__metadata__"]
    one, other = (str(name) for name in random.choice(names, 2, replace=False))
    odd = [-1, 2**62, 2**70, 1.5, True, None, "12", [], {}, [[1]], [3, 4], [12], "F64", "I8"]
    kind = int(random.integers(6))
    if kind == 0:
        header[one], header[other] = header[other], header[one]
    elif kind == 1:
        header[one]["data_offsets"] = header[other]["data_offsets"]
    elif kind == 2:
        header[one][str(random.choice(list(header[one])))] = odd[int(random.integers(len(odd)))]
    elif kind == 3:
        place = int(random.integers(2))
        header[one]["data_offsets"][place] = odd[int(random.integers(7))]
    elif kind == 4:
        header["../" + one] = header.pop(one)
    else:
        header[one] = odd[int(random.integers(len(odd)))]
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[end:]


MUTATIONS = (
    flipped, truncated, lengthened, length_changed, header_bytes_replaced, header_edited,
)  # fmt: skip
COUNT = 3000


@pytest.mark.parametrize("with_digest", [True, False], ids=["ours", "another's"])
def test_no_mutation_crashes_the_reader_or_passes_for_other_values(tmp_path, good, with_digest):
    header, data = parts(good)
    if not with_digest:
        del header["__metadata__"]
        write_safetensors(good, header, data)
    whole, random = good.read_bytes(), np.random.default_rng(0)
    file, outcomes = tmp_path / "mutated.safetensors", {"right": 0, "refused": 0, "finite": 0}
    tracemalloc.start()
    for i in range(COUNT):
        mutate = MUTATIONS[i % len(MUTATIONS)]
        file.write_bytes(mutate(random, whole))
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        try:
            found = opened(file)
        except ValueError as error:
            assert str(error) and "\n" not in str(error)
            outcomes["refused"] += 1
        else:
            same = all(found[name].tobytes() == VALUES[name].tobytes() for name in VALUES)
            # Without a sha256 a changed bit, or two tensors exchanged, can give other numbers.
            assert same or not with_digest, mutate.__name__
            assert all(np.isfinite(value).all() for value in found.values())
            outcomes["right" if same else "finite"] += 1
        # Python's own objects for the header, and a piece of the file to be hashed.
        assert tracemalloc.get_traced_memory()[1] - before < 200_000
    tracemalloc.stop()
    assert sum(outcomes.values()) == COUNT and outcomes["refused"] > 0.6 * COUNT, outcomes


def test_every_flipped_bit_of_our_data_is_refused(good):
    whole = good.read_bytes()
    start = len(whole) - 4 * 29
    for place in range(start, len(whole), 5):
        for bit in range(8):
            good.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
            with says("has sha256", "it was damaged after it was written"):
                opened(good)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused_by_name(tmp_path, value):
    broken = {**VALUES, "bias": np.full(5, value, np.float32)}
    weights.write_tensors(tmp_path / "file", broken)
    with says("bias in", "holds values that are not finite"):
        opened(tmp_path / "file")


def entry(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


BY_THE_LIBRARY = ["file': Error while deserializing header", "get it again"]


@pytest.mark.parametrize(
    "header, words",
    [
        ({"w": entry([2], 0, 8)}, []),
        ({"w": entry([2**40], 0, 2**42)}, BY_THE_LIBRARY),
        ({"w": entry([2**62, 2**62], 0, 8)}, BY_THE_LIBRARY),
        ({"w": entry([2], 4, 12)}, BY_THE_LIBRARY),
        ({"w": entry([1], 0, 4)}, BY_THE_LIBRARY),
        ({"w": entry([1], 0, 4), "v": entry([2], 0, 8)}, BY_THE_LIBRARY),
        ({"w": entry([1], 4, 8)}, BY_THE_LIBRARY),
        ({"w": entry([2], 0, 8, "I32")}, ["stored as I32; known: F32, F16, BF16"]),
        ({"w": entry([2], 0, 8), "__metadata__": {"a": 1}}, BY_THE_LIBRARY),
        ({"w": {**entry([2], 0, 8), "more": 1}}, ["no dtype, shape and data_offsets alone"]),
        ({"w": [entry([2], 0, 8)]}, ["no dtype, shape and data_offsets alone"]),
        ({"v": entry([2], 0, 8)}, ["lacks w"]),
        ({"w": entry([1], 0, 4), "v": entry([1], 4, 8)}, ["a tensor too many: v"]),
        ({"w": entry([1, 2], 0, 8)}, ["has shape [1, 2], not [2]"]),
        ({"w": entry([1] * 99 + [2], 0, 8)}, ["w in", "has shape [1, 1, 1"]),
        ({"../../etc/passwd": entry([2], 0, 8)}, ["lacks w"]),
        ({"w": entry([2], 0, 8), "/tmp/x\n": entry([0], 8, 8)}, ["too many: '/tmp/x\\n'"]),
    ],
)
def test_headers_are_checked_before_a_byte_of_data_is_read(tmp_path, header, words):
    write_safetensors(tmp_path / "file", header, np.float32([1, 2]).tobytes())
    if not words:
        assert weights.open_tensors(tmp_path / "file", {"w": (2,)})["w"].tolist() == [1, 2]
        return
    with says(*words):
        weights.open_tensors(tmp_path / "file", {"w": (2,)})
    assert {p.name for p in tmp_path.iterdir()} == {"file"}


def test_a_name_that_is_there_twice_is_refused(tmp_path):
    text = ", ".join(f'"w": {json.dumps(entry(shape, 0, 8))}' for shape in ([2], [1, 2])).encode()
    text = b"{" + text + b"}"
    data = np.float32([1, 2]).tobytes()
    (tmp_path / "file").write_bytes(len(text).to_bytes(8, "little") + text + data)
    with says("the header of", "w is there twice"):
        weights.open_tensors(tmp_path / "file", {"w": (2,)})


@pytest.mark.parametrize(
    "text, words",
    [
        (b'{"w": 1, "w": 2}', ["w is there twice"]),
        (b'{"w": NaN}', ["NaN is not a number"]),
        (b"[" * 50_000, ["is not JSON"]),
        (b'{"a":' * 40 + b"1" + b"}" * 40, ["is nested over 32 deep"]),
        (b"\xff\xfe", ["is not JSON"]),
        (b"[]", ["holds a list"]),
        (b'{"w": ' + b"9" * 5000 + b"}", ["is not JSON"]),
    ],
)
def test_text_that_is_no_json_object_is_refused(text, words):
    with says("the file", *words):
        load_json(text, "the file")


def test_a_header_larger_than_its_tensors_need_is_refused(tmp_path):
    (tmp_path / "file").write_bytes((2**20).to_bytes(8, "little") + b" " * 2**20)
    with says("a header of 1048576 bytes", "at most 66560 are allowed"):
        weights.open_tensors(tmp_path / "file", {"w": (2,)})
    with says("cannot read", "No such file"):
        weights.open_tensors(tmp_path / "nowhere", {"w": (2,)})


def save(file, values):
    safetensors.numpy.save_file(values, file)
    return file


PARTS = {"a.1.weight": (2,), "a.2.weight": (2,), "b.bias": (3,)}


@pytest.mark.parametrize(
    "rename",
    [
        *(
            lambda name, prefix=prefix: prefix + name
            for prefix in (
                "_orig_mod.", "module.", "model.", "backbone.", "score_model.", "net.a.",
                "module._orig_mod.", "_orig_mod.module.model.", "_fsdp_wrapped_module.",
            )
        ),
        lambda name: name.replace("a.", "a._orig_mod."),  # each block compiled by itself
        lambda name: "module." + name.replace("1.", "1._checkpoint_wrapped_module."),
    ],
)  # fmt: skip
def test_what_wrappers_put_before_names_is_left_out_and_told(tmp_path, caplog, rename):
    values = {name: np.full(shape, i, np.float32) for i, (name, shape) in enumerate(PARTS.items())}
    names = {rename(name): value for name, value in values.items()}
    names[rename("x").removesuffix("x") + BUFFER] = np.ones(2, np.float32)
    with caplog.at_level("INFO", logger="sedd_jax"):
        tensors = weights.open_tensors(save(tmp_path / "x.safetensors", names), PARTS)
    assert set(tensors) == {*PARTS, BUFFER}
    for name, value in values.items():
        np.testing.assert_array_equal(tensors[name], value)
    (line,) = caplog.messages
    assert f"{rename('a.1.weight')} is read as a.1.weight" in line and "\n" not in line
    caplog.clear()
    plain = {f"transformer.{name}": value for name, value in values.items()}
    weights.open_tensors(save(tmp_path / "x.safetensors", plain), PARTS)
    assert not caplog.messages  # every GPT-2's


def test_names_of_something_else_are_shown(tmp_path):
    other = {f"encoder.layer.{n}": np.zeros(1, np.float32) for n in range(5)}
    file = save(tmp_path / "x.safetensors", other)
    with says(
        "lacks a.1.weight and 2 more", "has encoder.layer.0, encoder.layer.1", "2 and 2 more"
    ):
        weights.open_tensors(file, PARTS)
    twice = {p + n: np.zeros(s, np.float32) for n, s in PARTS.items() for p in ("", "_orig_mod.")}
    with says("tensor a.1.weight is in", "twice"):
        weights.open_tensors(save(file, twice), PARTS)
    save(file, {f"{p}.{n}": np.zeros(s, np.float32) for n, s in PARTS.items() for p in "xy"})
    with says("lacks a.1.weight", "and has x.a.1.weight"):
        weights.open_tensors(file, PARTS)


def in_shards(folder, names=("one.safetensors", "two.safetensors")):
    """PARTS in two files; the index."""
    values = {name: np.ones(shape, np.float32) for name, shape in PARTS.items()}
    held = dict(zip(values, (names[0], names[0], names[1])))
    for file in names:
        save(folder / file, {name: values[name] for name in held if held[name] == file})
    index = folder / weights.INDEX
    index.write_text(json.dumps({"weight_map": held}))
    return index


def test_shards_are_the_files_that_the_index_names(tmp_path):
    index = in_shards(tmp_path)
    save(tmp_path / "model-00001-of-00001.safetensors", {"x": np.ones(1)})  # it does not
    assert dict(weights.open_tensors(index, PARTS)).keys() == PARTS.keys()
    (tmp_path / "two.safetensors").write_text(POINTER)
    with says("two.safetensors' is git-lfs's pointer"):
        weights.open_tensors(index, PARTS)
    save(tmp_path / "two.safetensors", {"b.scale": np.ones(3, np.float32)})
    with says("b.bias is in", "two.safetensors' or in", "index.json', not in both"):
        weights.open_tensors(index, PARTS)
    (tmp_path / "two.safetensors").unlink()
    with says("no '", "two.safetensors', which", "index.json' names; get this file"):
        weights.open_tensors(index, PARTS)


@pytest.mark.parametrize(
    "content, words",
    [
        ('{"weight_map": {"a": "../two.safetensors"}}', ["names '../two.safetensors'"]),
        ('{"weight_map": {"a": "/etc/x.safetensors"}}', ["names '/etc/x.safetensors'"]),
        ('{"weight_map": {"a": "sub/x.safetensors"}}', ["names 'sub/x.safetensors'"]),
        ('{"weight_map": {"a": "c\\\\x.safetensors"}}', ["no safetensors file beside it"]),
        ('{"weight_map": {"a": "x.bin"}}', ["names 'x.bin', no safetensors file beside it"]),
        ('{"weight_map": {"a": 3}}', ["names 3, no safetensors file"]),
        ('{"weight_map": ["one.safetensors"]}', ["has no weight_map"]),
        ('{"metadata": {}}', ["has no weight_map"]),
        ("[", ["is not JSON"]),
        ("version https://git-lfs.github.com/spec/v1\n", ["git-lfs's pointer", "git lfs pull"]),
    ],
)
def test_an_index_that_is_odd_is_refused(tmp_path, content, words):
    index = in_shards(tmp_path)
    index.write_text(content)
    with says("model.safetensors.index.json'", *words):
        weights.open_tensors(index, PARTS)


def test_the_digest_is_of_names_shapes_and_bytes(good):
    import hashlib

    header, data = parts(good)
    digest = header["__metadata__"][DIGEST]
    told = hashlib.sha256()
    for name in sorted(VALUES):
        told.update(f"{name} F32 {list(SHAPES[name])}\n".encode() + VALUES[name].tobytes())
    assert digest == told.hexdigest() and len(data) == 4 * 29


# torch's files


class Payload:
    """Runs a command when it is unpickled by a reader that lets it."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.fixture
def torch():
    return pytest.importorskip("torch", minversion="2.10", reason="torch >= 2.10 is not installed")


def read(file, **options):
    with torch_files.read(file, {"w": (2,)}, **options) as (tensors, _):
        return {f"{part}/{n}": a for part in tensors for n, a in tensors[part].items()}


def test_a_state_dict_is_read_from_a_pth_file(tmp_path, torch):
    for name in ("w", "module.w"):
        torch.save({name: torch.tensor([1.0, 2.0]).bfloat16()}, tmp_path / "x.pth")
        assert read(tmp_path / "x.pth")["model/w"].tolist() == [1.0, 2.0]


def test_a_payload_is_refused_and_named_and_not_run(tmp_path, torch):
    trace = tmp_path / "ran"
    torch.save({"w": Payload(f"touch {trace}")}, tmp_path / "evil.pth")
    with says("evil.pth", f"wants the global {os.system.__module__}.system", "it was not run"):
        read(tmp_path / "evil.pth")
    with (tmp_path / "bare.pth").open("wb") as file:
        pickle.dump({"w": Payload(f"touch {trace}")}, file)
    with says("bare.pth", "not an archive as torch.save has written"):
        read(tmp_path / "bare.pth")
    assert not trace.exists()


@pytest.mark.parametrize(
    "state, words",
    [
        ([1, 2], ["holds a list that is not as the original saves it"]),
        ({"w": 3}, ["'w' in", "x.pth' is int, no tensor"]),
        ({"../w": "zeros"}, ["x.pth' lacks w, and has ../w"]),
        ({"w": "integers"}, ["'w' in", "is torch.int64, no tensor in memory of float32"]),
        ({"w": "huge"}, ["larger than it is"]),
        ({"w": "zeros", "/etc/x": "zeros"}, ["x.pth' has a tensor too many: /etc/x"]),
        ({"w": "nan"}, ["w in", "x.pth' holds values that are not finite"]),
        ({"state_dict": {"w": "zeros"}, "epoch": 3}, ["'state_dict' in", "x.pth' is dict"]),
        ({"model": {}, "ema": 3}, ["not as the original saves it"]),
        ({"model": {}, "ema": {}, "optimizer": {}, "step": 1}, ["not as the original saves it"]),
    ],
)
def test_a_pth_file_of_something_else_is_refused(tmp_path, torch, state, words):
    tensors = {
        "zeros": torch.zeros(2),
        "integers": torch.zeros(2, dtype=torch.int64),
        "huge": torch.zeros(1).expand(2**50),
        "nan": torch.tensor([0.0, float("nan")]),
    }
    if isinstance(state, dict):
        state = {k: tensors.get(v, v) if isinstance(v, str) else v for k, v in state.items()}
    torch.save(state, tmp_path / "x.pth")
    with says(*words):
        read(tmp_path / "x.pth")
    assert {p.name for p in tmp_path.iterdir()} == {"x.pth"}


def test_archives_that_torch_does_not_write_are_refused(tmp_path, monkeypatch):
    for name, compression, body in (
        ("bomb.pth", zipfile.ZIP_DEFLATED, b"\0" * 2**20),
        ("two.pth", zipfile.ZIP_STORED, None),
    ):
        with zipfile.ZipFile(tmp_path / name, "w", compression) as archive:
            archive.writestr("a/data.pkl", body or b"x")
            if body is None:
                archive.writestr("b/data.pkl", b"x")
        with says(name, "not an archive as torch.save writes"):
            read(tmp_path / name)
    (tmp_path / "pointer.pth").write_text(POINTER)
    with says("pointer.pth' is git-lfs's pointer to the file", "git lfs pull"):
        read(tmp_path / "pointer.pth")
    (tmp_path / "text.pth").write_text("hello")
    with says("text.pth", "not an archive as torch.save has written"):
        read(tmp_path / "text.pth")
    with says("over the limit of 4"):
        monkeypatch.setattr(torch_files, "MAX_FILE", 4)
        read(tmp_path / "text.pth")
    with says("cannot read", "nowhere.pth"):
        read(tmp_path / "nowhere.pth")


CHILD = """
import json, sys
from pathlib import Path
from sedd_jax.convert import torch_child
for folder in sorted(Path(sys.argv[1]).iterdir()):
    request = {"work": "read", "file": str(folder / "x.pth"), "folder": str(folder), "names": ["w"]}
    request["parts"] = ["model"]
    (folder / "answer.json").write_text(json.dumps(torch_child.answer(request)))
"""


def test_mutated_pth_files_end_in_one_error(tmp_path, torch):
    """What the archive's check lets through goes to torch, here in one child for all."""
    torch.save({"w": torch.tensor([1.0, 2.0])}, tmp_path / "x.pth")
    whole, random = (tmp_path / "x.pth").read_bytes(), np.random.default_rng(3)
    outcomes, folders = {"archive": 0, "torch": 0, "tensors": 0, "read": 0}, tmp_path / "folders"
    for i in range(120):
        folder = folders / f"{i:03}"
        folder.mkdir(parents=True)
        mutated = (flipped, flipped, truncated, lengthened)[i % 4](random, whole)
        (folder / "x.pth").write_bytes(mutated)
        try:
            torch_files.check_archive(folder / "x.pth")
        except ValueError as error:
            assert "x.pth" in str(error) and "\n" not in str(error)
            outcomes["archive"] += 1
            shutil.rmtree(folder)
    command = [sys.executable, "-c", CHILD, str(folders)]
    told = subprocess.run(command, capture_output=True, check=False)
    assert told.returncode == 0, told.stderr[-500:]
    for folder in folders.iterdir():
        answer = json.loads((folder / "answer.json").read_text())
        if "error" in answer:
            assert "\n" not in answer["error"]
            outcomes["torch"] += 1
            continue
        try:
            found = weights.open_tensors(folder / "model.safetensors", {"w": (2,)})
            assert np.isfinite(found["w"]).all()
            outcomes["read"] += 1
        except ValueError as error:
            assert "\n" not in str(error)
            outcomes["tensors"] += 1
    assert outcomes["archive"] >= 30 and outcomes["torch"] >= 5, outcomes
    assert sum(outcomes.values()) == 120, outcomes


def test_the_child_is_told_no_secrets(tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text("import os; __version__ = ' '.join(sorted(os.environ))")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("HF_TOKEN", "secret")
    with zipfile.ZipFile(tmp_path / "x.pth", "w") as archive:
        archive.writestr("x/data.pkl", b"x")
    with pytest.raises(ValueError, match="need torch >= 2.10, which reads them safely") as error:
        read(tmp_path / "x.pth")
    told = str(error.value)
    assert "PATH" in told and "HF_TOKEN" not in told and "JAX_PLATFORMS" not in told


@pytest.mark.parametrize(
    "source, words",
    [
        ("raise ImportError('none')", ["need torch", "pip install 'sedd_jax[torch]'"]),
        (
            "__version__ = '2.6.0+cpu'",
            ["need torch >= 2.10", "2.6.0+cpu is installed", "pip install"],
        ),
        ("import os; os.kill(os.getpid(), 9)", ["ended with status -9", "memory"]),
        ("import time; time.sleep(60)", ["torch took over 2 s"]),
    ],
)
def test_a_child_that_cannot_work_is_one_error(tmp_path, monkeypatch, source, words):
    (tmp_path / "torch.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with zipfile.ZipFile(tmp_path / "x.pth", "w") as archive:
        archive.writestr("x/data.pkl", b"x")
    began = time.monotonic()
    with says(*words):
        read(tmp_path / "x.pth", seconds=2 if "sleep" in source else 60)
    assert time.monotonic() - began < 60


def test_torch_is_not_imported_here():
    code = "import sys, sedd_jax.convert; print('torch' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "False"
