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


@pytest.fixture
def device_time(measure):
    return importlib.import_module("device_time")


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


@pytest.mark.long
def test_whole_samples_are_drawn_without_compiling_again(tmp_path):
    results, printed = run(tmp_path, "sample", "--repeats=2", "--steps=3", "--dtype=bfloat16")
    (ours,) = results["sides"]
    assert results["steps"] == 3 and len(ours["seconds"]) == 2 and ours["dtype"] == "bfloat16"
    assert ours["compiles"] == [0, 0]
    assert ours["steps_per_second"] > 0.0 and ours["mfu"] > 0.0
    assert "ours bf16" in printed and "steps/s" in printed


@pytest.mark.long
def test_the_peak_of_memory_holds_the_state(tmp_path):
    results, printed = run(tmp_path, "memory", "--steps=1")
    train, sample = results["sides"]
    assert (train["kind"], sample["kind"]) == ("train", "sample")
    assert min(train["first_bytes"], train["later_bytes"]) > train["state_bytes"] > 0
    assert min(sample["first_bytes"], sample["later_bytes"]) > 0
    assert "ours f32" in printed and "state" in printed


OTHERS = "elementwise, reductions"
RECORDED = {  # names of kernels in a profile of an H200
    "loop_add_convert_fusion_3": OTHERS,
    "input_convert_reduce_fusion.12": OTHERS,
    "input_concatenate_fusion": OTHERS,
    "dynamic_update_slice_fusion.4": OTHERS,
    "loop_broadcast_fusion": OTHERS,
    "wrapped_convert": OTHERS,
    "memcpy128": "copies",
    "MemcpyD2D": "copies",
    "wrapped_transpose.2": "copies",
    "gemm_fusion_dot_7": "matmuls",
    "nvjet_tst_256x128_64x4_2x1_v_bz_coopA_NNT": "matmuls",
    "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64": "matmuls",
    "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_7": "attention",
    "void cudnn::fusion::compute_dot_do_o_specialized<true>": "attention",
    "dot.3": "matmuls",  # of a CPU
    "ynn_fusion.1": "matmuls",
}


@pytest.mark.parametrize("name, kind", RECORDED.items())
def test_a_kernel_is_what_its_name_says(device_time, name, kind):
    assert device_time.kind_of(name) == kind


def test_time_in_which_no_kernel_runs_is_idle(device_time):
    ms = 1_000_000
    events = [  # two streams overlap from 2 to 3 ms; nothing runs from 5 to 9 ms
        ("gemm_1", 0 * ms, 3 * ms),
        ("memcpy128", 2 * ms, 5 * ms),
        ("gemm_1", 9 * ms, 10 * ms),
    ]
    found = device_time.summary(events, calls=2)
    assert (found["idle_ms"], found["span_ms"], found["kernels"]) == (2.0, 5.0, 1.5)
    assert found["kinds"]["matmuls"] == {"ms": 2.0, "kernels": 1.0}
    assert found["kinds"]["copies"] == {"ms": 1.5, "kernels": 0.5}
    assert [kernel["name"] for kernel in found["longest"]] == ["gemm_1", "memcpy128"]
    with pytest.raises(ValueError, match="no kernels"):
        device_time.summary([], calls=1)


def test_the_original_samples_without_torchscript_and_trains_with_it(measure):
    side = measure.Side("original", "original", "x", "float32", environment=(("A", "1"),))
    assert side.doing("train") == side
    assert dict(side.doing("sample").environment) == {"A": "1", "PYTORCH_JIT": "0"}
    ours = measure.Side("ours", "ours", "x", "float32")
    assert ours.doing("sample") == ours


@pytest.mark.long
def test_a_row_that_fails_ends_nothing_and_every_row_is_kept(measure, monkeypatch, tmp_path):
    """The original's folder is empty, so each row of it fails."""
    device, file = importlib.import_module("device"), tmp_path / "device.json"
    plan = device.Plan(16, 2, (1, 4), (1, 2), 2, 0.01)
    monkeypatch.setitem(device.PLANS, "tiny", plan)
    monkeypatch.setitem(measure.SIZES, "tiny", measure.Size(**SMALLEST))
    options = ["--size=tiny", "--no-compile", f"--against={tmp_path}", f"--json={file}"]
    monkeypatch.setattr(sys, "argv", ["device.py", *options, "--dtype=float32"])
    device.main()
    rows = json.loads(file.read_text())["rows"]
    found = [(row["side"], row["kind"], row["batch_size"], row["profiled"]) for row in rows]
    ours, original = "ours f32", "original f32"
    assert found == [
        (ours, "train", 2, False),
        (ours, "train", 2, True),
        (original, "train", 2, False),
        (ours, "sample", 1, False),
        (ours, "sample", 1, True),
        (ours, "sample", 2, False),
        (original, "sample", 1, False),
        (original, "sample", 2, False),
        (ours, "train", 1, False),
        (ours, "train", 4, False),
        (original, "train", 1, False),
        (original, "train", 4, False),
    ]
    for row in rows:
        assert ("skipped" in row) == (row["side"] == original), row
        if row["profiled"]:
            assert row["kernels"] > 0 and 0.0 <= row["idle_ms"] < row["span_ms"]
            assert row["kinds"]["matmuls"]["ms"] > 0.0
