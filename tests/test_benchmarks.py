"""The speed and memory benchmarks run and tell what they promise; no time is compared with another.

The original is no part of the repository, so its side is not run here.
"""

import importlib
import json
import subprocess
import sys

import pytest
from conftest import REPOSITORY

SMALLEST = {
    "vocab_size": 11,
    "hidden_size": 16,
    "blocks": 2,
    "heads": 2,
    "cond_dim": 8,
    "length": 16,
    "batch_size": 4,
    "sample_length": 16,
    "sample_batch_size": 2,
}


def run(folder, what: str, *options: str) -> tuple[dict, str]:
    """What compare.py keeps in --json, and what it prints."""
    file = folder / "found.json"
    size = [f"--{name}={value}" for name, value in SMALLEST.items()]
    size += ["--ceiling_seconds=0.01", f"--what={what}"]
    done = subprocess.run(
        [sys.executable, "benchmarks/compare.py", *size, f"--json={file}", *options],
        cwd=REPOSITORY,
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(file.read_text()), done.stdout


@pytest.fixture
def measure(monkeypatch):
    """benchmarks/measure.py, which is no package's."""
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    return importlib.import_module("measure")


def parameters(size) -> int:
    """Of the absorbing graph's network, whose states are the clean tokens and MASK."""
    h, c, states = size.hidden_size, size.cond_dim, size.vocab_size + 1
    block = 12 * h * h + 7 * h + 6 * h * (c + 1)  # matrices; biases and norms; modulation
    noise = 257 * c + (c + 1) * c
    return size.blocks * block + noise + h + 2 * h * (c + 1) + (2 * h + 1) * states


def training_flops(size) -> int:
    """Of one step's matmuls, every logit of every position included."""
    h, c, states = size.hidden_size, size.cond_dim, size.vocab_size + 1
    a_token = size.blocks * (12 * h * h + 2 * size.length * h) + h * states
    a_row = 256 * c + c * c + (6 * size.blocks + 2) * h * c
    return 3 * 2 * size.batch_size * (size.length * a_token + a_row)


def test_named_sizes_have_the_parameters_that_they_say(measure):
    sizes = measure.SIZES
    assert 4.05e6 < parameters(sizes["tiny"]) < 4.15e6
    assert parameters(sizes["small"]) == 169_627_218
    assert 4.2e8 < parameters(sizes["medium"]) < 4.3e8


def test_table_puts_numbers_under_their_heads(measure):
    rows = [{"side": "ours", "s": "1.5"}, {"side": "original", "s": "2", "more": "x"}]
    assert measure.table(rows).split("\n") == [
        "| side     |   s | more |",
        "| -------- | --: | ---: |",
        "| ours     | 1.5 |      |",
        "| original |   2 |    x |",
    ]


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """One comparison of steps, for the tests that read it."""
    options = ("--repeats=2", "--seconds=0.01", "--set=model.remat=blocks")
    return run(tmp_path_factory.mktemp("steps"), "step", *options)


def test_a_step_is_measured_with_config_keys_of_ours(measure, steps):
    results, printed = steps
    (ours,) = results["sides"]
    assert ours["name"] == "ours f32" and len(ours["seconds"]) == 2
    assert ours["to_ours"]["median"] == 1.0 and ours["count"] >= 1
    for key in ("tokens_per_second", "flops_per_second", "mfu", "first_seconds"):
        assert ours[key] > 0.0, key
    assert 0.0 < ours["loss"] < 1000.0  # nats per sequence of 16 tokens
    assert set(results["matmul_rates"]["ours"]) == {"float32", "bfloat16"}
    assert ours["parameters"] == parameters(measure.Size(**results["size"]))
    # 16 bytes a parameter, and the counters
    assert 0 <= ours["state_bytes"] - 16 * ours["parameters"] < 64
    assert "ours f32" in printed and "tokens/s" in printed


def test_flops_of_a_step_are_those_of_the_formula(measure, steps):
    results, _ = steps
    (ours,) = results["sides"]
    counted = ours["flops_per_second"] * ours["spread"]["median"]
    # The trace has no logits of MASK, 1 of 12 states.
    assert training_flops(measure.Size(**results["size"])) == pytest.approx(counted, rel=0.1)


def test_whole_samples_are_drawn_without_compiling_again(tmp_path):
    results, printed = run(tmp_path, "sample", "--repeats=2", "--steps=3", "--dtype=bfloat16")
    (ours,) = results["sides"]
    assert results["steps"] == 3 and len(ours["seconds"]) == 2 and ours["dtype"] == "bfloat16"
    assert ours["compiles"] == [0, 0]
    assert ours["steps_per_second"] > 0.0 and ours["mfu"] > 0.0
    assert "ours bf16" in printed and "steps/s" in printed


def test_the_peak_of_memory_holds_the_state(tmp_path):
    results, printed = run(tmp_path, "memory", "--steps=1")
    train, sample = results["sides"]
    assert (train["kind"], sample["kind"]) == ("train", "sample")
    assert min(train["first_bytes"], train["later_bytes"]) > train["state_bytes"] > 0
    assert min(sample["first_bytes"], sample["later_bytes"]) > 0
    assert "ours f32" in printed and "state" in printed
