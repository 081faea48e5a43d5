"""The speed and memory benchmarks run and tell what they promise; no time is compared with another.

The original is no part of the repository, so its side is not run here.
"""

import importlib.util
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


def run(folder, script: str, *options: str) -> tuple[dict, str]:
    """What the script keeps in --json, and what it prints."""
    file = folder / "found.json"
    size = [f"--{name}={value}" for name, value in SMALLEST.items()]
    if script != "memory":
        options += ("--ceiling_seconds=0.01",)
    done = subprocess.run(
        [sys.executable, f"benchmarks/{script}.py", *size, f"--json={file}", *options],
        cwd=REPOSITORY,
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(file.read_text()), done.stdout


def measure():
    """benchmarks/measure.py, which is no package's."""
    spec = importlib.util.spec_from_file_location("measure", REPOSITORY / "benchmarks/measure.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["measure"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_named_sizes_have_the_parameters_that_they_say():
    sizes = measure().SIZES
    assert 4.05e6 < sizes["tiny"].parameters < 4.15e6
    assert sizes["small"].parameters == 169_627_218
    assert 4.2e8 < sizes["medium"].parameters < 4.3e8


def test_table_puts_numbers_under_their_heads():
    rows = [{"side": "ours", "s": "1.5"}, {"side": "original", "s": "2", "more": "x"}]
    assert measure().table(rows).split("\n") == [
        "side        s  more",
        "--------  ---  ----",
        "ours      1.5",
        "original    2     x",
    ]


@pytest.fixture(scope="module")
def step_time(tmp_path_factory):
    """One run of step_time.py, for the tests that read it."""
    options = ("--repeats=2", "--turn=0.01", "--set=model.remat=blocks")
    return run(tmp_path_factory.mktemp("step_time"), "step_time", *options)


def test_step_time_measures_a_step_with_config_keys_of_ours(step_time):
    found, told = step_time
    (ours,) = found["sides"]
    assert ours["name"] == "ours f32" and len(ours["seconds"]) == 2
    assert ours["to_ours"]["median"] == 1.0 and ours["steps_a_turn"] >= 1
    for key in ("tokens_a_second", "flops_a_second", "mfu", "of_floor", "first_seconds"):
        assert ours[key] > 0.0, key
    assert 0.0 < ours["loss"] < 1000.0  # nats per sequence of 16 tokens
    assert set(found["ceilings"]["jax"]) == {"matmul float32", "matmul bfloat16", "traffic"}
    # 16 bytes a parameter, and the counters
    assert 0 <= ours["state_bytes"] - 16 * found["size"]["parameters"] < 64
    assert "ours f32" in told and "tokens/s" in told


def test_arithmetic_of_a_step_is_what_its_trace_counts(step_time):
    found, _ = step_time
    size = measure().Size(**{k: v for k, v in found["size"].items() if k != "parameters"})
    # The trace has no logits of MASK, 1 of 12 states; a step may leave more of them out.
    assert size.training_flops(4, 16) == pytest.approx(found["sides"][0]["traced_flops"], rel=0.1)


def test_sample_time_draws_whole_samples_without_compiling_again(tmp_path):
    found, told = run(tmp_path, "sample_time", "--repeats=2", "--steps=3", "--dtype=bfloat16")
    (ours,) = found["sides"]
    assert found["steps"] == 3 and len(ours["seconds"]) == 2 and ours["dtype"] == "bfloat16"
    assert ours["compiles"] == [0, 0]
    assert ours["steps_a_second"] > 0.0 and ours["mfu"] > 0.0
    assert "ours bf16" in told and "steps/s" in told


def test_memory_tells_a_peak_that_holds_the_state(tmp_path):
    found, told = run(tmp_path, "memory", "--steps=1")
    (ours,) = found["sides"]
    assert found["what"] == "train"
    assert min(ours["first_bytes"], ours["later_bytes"]) > ours["state_bytes"] > 0
    assert "ours f32" in told and "state" in told
