"""Tiny models as the original code keeps them, made from numbers; its own files where there are."""

import json
from pathlib import Path

import flax.traverse_util
import golden_set
import numpy as np
import pytest
from conftest import REPOSITORY

from sedd_jax.convert import names
from sedd_jax.convert.original_config import from_original_config
from sedd_jax.data.tokenizers import Characters

GRAPHS = ("absorb", "uniform")
ALPHABET = "\nabcdefghijklmnopqrstuvwxyz0123456789"
TOKENIZER = Characters("".join(sorted(ALPHABET)))  # as many tokens as the golden models have


def golden(name: str) -> Path:
    """A file or folder of the golden set; one of the larger set, where it is, or else a skip."""
    for folder in (golden_set.FOLDER, REPOSITORY / "../shared/golden"):
        if (folder / name).exists():
            return folder / name
    pytest.skip(f"{name} is not in {golden_set.FOLDER}; set SEDD_GOLDEN to the whole golden set")


def config_of(graph: str) -> dict:
    """The golden model's config.json."""
    return json.loads((golden_set.FOLDER / f"hf_{graph}/config.json").read_text())


def model_of(graph: str, seed: int = 0):
    """(our config, vocab_size, our parameters float32): the golden sizes, random numbers."""
    config, vocab_size, _ = from_original_config(config_of(graph))
    random = np.random.default_rng(seed)
    tensors = {
        name: random.normal(size=shape).astype(np.float32)
        for name, shape in names.expected_tensors(config, vocab_size).items()
    }
    return config, vocab_size, names.from_original(tensors, config.model.heads)


def assert_same(one, other) -> None:
    """Both trees have the same leaves, bit for bit."""
    one, other = (flax.traverse_util.flatten_dict(tree, sep="/") for tree in (one, other))
    assert one.keys() == other.keys()
    for name in one:
        a, b = np.asarray(one[name]), np.asarray(other[name])
        assert (a.dtype, a.shape) == (b.dtype, b.shape), name
        assert a.tobytes() == b.tobytes(), name


def write_safetensors(file: Path, header: dict, data: bytes) -> None:
    """A file of the format, whatever the header says."""
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)
