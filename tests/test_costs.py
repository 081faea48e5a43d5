"""The cost model of a compiled program: bytes and operations known by hand, loops, parts, times."""

import functools
import re
import sys

import jax
import jax.numpy as jnp
import pytest
from conftest import TINY
from test_dry_run import needs

from sedd_jax import experiment
from sedd_jax.configs import quickstart
from sedd_jax.parallel import sharding
from sedd_jax.parallel.devices import DEVICES
from sedd_jax.training.dry_run import __main__, describe, dry_run
from sedd_jax.training.dry_run.costs import (
    PARTS,
    UPDATE,
    costs,
    describe_costs,
    part_and_phase,
    seconds,
)
from sedd_jax.training.dry_run.hlo import parse
from sedd_jax.training.dry_run.kernels import Kernel, program_kernels

X = jnp.ones((32, 64))
BYTES = 32 * 64 * 4


def compiled(function, *arguments, fraction=1.0):
    """The kernels of a function compiled for a CPU, by name."""
    text = jax.jit(function).lower(*arguments).compile().as_text()
    return {kernel.name: kernel for kernel in program_kernels(parse(text), fraction)}


def written(body, computations=""):
    """The kernels of a program of which these are the lines of the entry, by name."""
    text = f"HloModule m\n\n{computations}\nENTRY %main (p: f32[8]) -> f32[8] {{\n{body}\n}}\n"
    return {kernel.name: kernel for kernel in program_kernels(parse(text))}


def kernel(**fields):
    blank = {
        "name": "k",
        "kind": "elementwise",
        "shape": "f32[8]",
        "op_names": ("jit(train_step)/add",),
        "runs": 1.0,
        "bytes": 0,
        "flops": 0,
        "vector": 0,
    }
    return Kernel(**(blank | fields))


# --- compiled programs


def test_an_addition_reads_two_arrays_and_writes_one():
    (add,) = compiled(lambda x, y: x + y, X, X).values()
    assert (add.kind, add.bytes, add.flops, add.vector) == ("elementwise", 3 * BYTES, 0, 32 * 64)


def test_a_reduction_reads_more_than_it_writes():
    (sums,) = compiled(lambda x: x.sum(axis=0), X).values()
    assert (sums.kind, sums.vector) == ("reduction", 32 * 64)
    assert sums.bytes == BYTES + 4 + 64 * 4  # the number that it starts from, too


def test_a_matmul_has_two_operations_for_each_multiplication():
    y = jnp.ones((16, 64))
    (matmul,) = compiled(lambda x, y: x @ y.T, X, y).values()
    assert (matmul.kind, matmul.flops) == ("matmul", 2 * 32 * 64 * 16)
    assert matmul.bytes == BYTES + 16 * 64 * 4 + 32 * 16 * 4


def test_a_scan_runs_as_often_as_it_says_and_writes_a_row_at_a_time():
    def stack(x):
        return jax.lax.scan(lambda c, _: (jnp.tanh(c), c + 1.0), x, length=7)[1]

    # All but what is before the loop.
    runs = [one for one in compiled(stack, X).values() if one.runs != 1]
    assert {one.runs for one in runs} == {7.0}
    (update,) = [one for one in runs if "[7,32,64]" in one.shape and one.bytes < 7 * BYTES]
    assert BYTES <= update.bytes - BYTES <= BYTES + 64  # a row is read, written, and where to


@pytest.mark.parametrize("fraction, runs", [(1.0, 8.0), (0.5, 4.25)])
def test_a_loop_over_tiles_that_depends_on_data_runs_the_expected_share(fraction, runs):
    def loop(x, n):
        def body(i, x):
            tile = jax.lax.dynamic_slice_in_dim(x, 4 * i, 4)
            return jax.lax.dynamic_update_slice_in_dim(x, jnp.tanh(tile), 4 * i, 0)

        return jax.lax.fori_loop(0, n, body, x)

    tanh = next(
        one for name, one in compiled(loop, X, 3, fraction=fraction).items() if "tanh" in name
    )
    # In place: 4 of the 32 rows are read and written, and the number of the tile is read.
    assert (tanh.runs, tanh.bytes) == (runs, 2 * BYTES // 8 + 4)


@functools.cache
def training_step():
    """(experiment, kernels) of a tiny model's step; the head's loops run over all positions."""
    config = quickstart.get_config()
    for key, value in TINY.items():
        section, name = key.split(".")
        config[section][name] = value
    config.graph.name = "uniform"
    config.train.batch_size = 8
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    program = experiment.make_experiment(config, 20, mesh)
    return program, program_kernels(parse(program.lower().compile().as_text()))


def test_the_matmuls_of_a_training_step_are_those_of_the_formula():
    program, kernels = training_step()
    flops = sum(one.runs * one.flops for one in kernels)
    assert program.flops < flops < 1.1 * program.flops  # what is recomputed comes to it


# --- written ones

SLICING = """
%slicing (p0: f32[12,1024], p1: s32[]) -> f32[1024] {
  %p0 = f32[12,1024]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %flat = f32[12288]{0} bitcast(%p0)
  %s = f32[1024]{0} dynamic-slice(%flat, %p1), dynamic_slice_sizes={1024}
  ROOT %n = f32[1024]{0} negate(%s), metadata={op_name="jit(f)/neg"}
}
"""
UPDATING = """
%updating (p0: f32[12,1024], p1: f32[1,1024], p2: s32[]) -> (f32[12,1024], f32[]) {
  %p0 = f32[12,1024]{1,0} parameter(0)
  %p1 = f32[1,1024]{1,0} parameter(1)
  %p2 = s32[] parameter(2)
  %zero = s32[] constant(0)
  %u = f32[12,1024]{1,0} dynamic-update-slice(%p0, %p1, %p2, %zero)
  %one = f32[] constant(1)
  ROOT %t = (f32[12,1024]{1,0}, f32[]) tuple(%u, %one)
}
"""


def test_a_fusion_that_slices_reads_the_slice_through_a_bitcast_too():
    run = written(
        "  %x = f32[12,1024]{1,0} parameter(0)\n  %i = s32[] parameter(1)\n"
        "  ROOT %f = f32[1024]{0} fusion(%x, %i), kind=kLoop, calls=%slicing",
        SLICING,
    )
    assert run["f"].bytes == 2 * 1024 * 4 + 4
    assert run["f"].vector == 1024


def test_a_fusion_inside_a_fusion_slices_too():
    outer = SLICING + (
        "\n%outer (a: f32[12,1024], b: s32[]) -> f32[1024] {\n"
        "  %a = f32[12,1024]{1,0} parameter(0)\n  %b = s32[] parameter(1)\n"
        "  %g = f32[1024]{0} fusion(%a, %b), kind=kLoop, calls=%slicing\n"
        "  ROOT %m = f32[1024]{0} multiply(%g, %g)\n}\n"
    )
    run = written(
        "  %x = f32[12,1024]{1,0} parameter(0)\n  %i = s32[] parameter(1)\n"
        "  ROOT %f = f32[1024]{0} fusion(%x, %i), kind=kLoop, calls=%outer",
        outer,
    )
    assert (run["f"].bytes, run["f"].vector) == (2 * 1024 * 4 + 4, 2 * 1024)


def test_an_update_in_place_moves_the_update_and_a_tuple_all_its_parts():
    run = written(
        "  %x = f32[12,1024]{1,0} parameter(0)\n  %y = f32[1,1024]{1,0} parameter(1)\n"
        "  %i = s32[] parameter(2)\n"
        "  ROOT %f = (f32[12,1024]{1,0}, f32[]) fusion(%x, %y, %i), kind=kLoop, calls=%updating",
        UPDATING,
    )
    assert run["f"].bytes == 2 * 1024 * 4 + 4 + 4


def test_an_update_of_what_the_fusion_itself_made_writes_everything():
    made = UPDATING.replace("parameter(0)", "broadcast(%one)")
    made = made.replace("  %one = f32[] constant(1)\n", "").replace(
        "  %p0 =", "  %one = f32[] constant(1)\n  %p0 ="
    )
    made = made.replace("parameter(1)", "parameter(0)").replace("parameter(2)", "parameter(1)")
    run = written(
        "  %y = f32[1,1024]{1,0} parameter(1)\n  %i = s32[] parameter(2)\n"
        "  ROOT %f = (f32[12,1024]{1,0}, f32[]) fusion(%y, %i), kind=kLoop, calls=%updating",
        made,
    )
    assert run["f"].bytes == 1024 * 4 + 4 + 12 * 1024 * 4 + 4


def test_a_copy_reads_and_writes_and_names_cost_nothing():
    run = written(
        "  %x = bf16[8,8]{1,0} parameter(0)\n  %c = bf16[8,8]{0,1} copy(%x)\n"
        "  %b = bf16[64]{0} bitcast(%c)\n  ROOT %t = (bf16[64]{0}, bf16[8,8]{1,0}) tuple(%b, %x)"
    )
    assert [(one.kind, one.bytes) for one in run.values()] == [("copy", 2 * 64 * 2)]


def test_of_a_conditional_the_branch_that_moves_most_counts():
    branches = """
%small (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %little = f32[8]{0} negate(%p)
}

%large (q: f32[8]) -> f32[8] {
  %q = f32[8]{0} parameter(0)
  %much = f32[8]{0} negate(%q)
  ROOT %more = f32[8]{0} negate(%much)
}
"""
    run = written(
        "  %x = f32[8]{0} parameter(0)\n  %i = pred[] parameter(1)\n"
        "  ROOT %c = f32[8]{0} conditional(%i, %x, %x), true_computation=%small, "
        "false_computation=%large",
        branches,
    )
    assert list(run) == ["much", "more"]


def test_a_started_collective_counts_once_and_sends_its_results():
    run = written(
        "  %x = bf16[4,8]{1,0} parameter(0)\n"
        "  %s = (bf16[4,8]{1,0}, bf16[8,8]{1,0}) all-gather-start(%x), dimensions={0}\n"
        "  %g = bf16[8,8]{1,0} all-gather-done(%s)\n"
        "  ROOT %r = bf16[8,8]{1,0} all-reduce(%g), to_apply=%add"
    )
    assert {name: (one.kind, one.bytes) for name, one in run.items()} == {
        "s": ("collective", 8 * 8 * 2),
        "r": ("collective", 2 * 8 * 8 * 2),  # a reduce-scatter and an all-gather
    }


def test_a_triton_call_counts_its_operands_and_results():
    run = written(
        "  %x = bf16[4,8]{1,0} parameter(0)\n"
        "  ROOT %k = (bf16[4,8]{1,0}, f32[4]{0}) custom-call(%x), "
        'custom_call_target="__gpu$xla.gpu.triton"'
    )
    assert (run["k"].kind, run["k"].bytes) == ("custom call", 2 * 64 + 16)


def test_what_a_tpu_holds_on_the_chip_moves_no_bytes():
    run = written(
        "  %x = f32[8,128]{1,0:T(8,128)} parameter(0)\n"
        "  %s = (f32[8,128]{1,0:T(8,128)S(1)}, f32[8,128]{1,0:T(8,128)}, u32[]{:S(2)}) "
        "copy-start(%x)\n"
        "  %v = f32[8,128]{1,0:T(8,128)S(1)} copy-done(%s)\n"
        "  ROOT %n = f32[8,128]{1,0:T(8,128)} negate(%v)"
    )
    assert [(one.kind, one.bytes) for one in run.values()] == [
        ("copy", 4096),
        ("elementwise", 4096),
    ]


@pytest.mark.parametrize(
    "line, flops",
    [
        (
            (
                "f32[8,16,4]{2,1,0} dot(%x, %y), lhs_batch_dims={0}, lhs_contracting_dims={2}, "
                "rhs_batch_dims={0}, rhs_contracting_dims={1}"
            ),
            2 * 8 * 16 * 32 * 4,
        ),
        (
            (
                'f32[8,16,4]{2,1,0} custom-call(%x, %y), custom_call_target="__cublas$gemm", '
                'backend_config={"gemm_backend_config":{"dot_dimension_numbers":'
                '{"lhs_contracting_dimensions":["2"],"rhs_contracting_dimensions":["1"]}}}'
            ),
            2 * 8 * 16 * 32 * 4,
        ),
        (
            (
                "f32[8,16,4]{2,1,0} custom-call(%x, %y), "
                'custom_call_target="__cudnn$fmhaSoftmaxBackward", backend_config={'
                '"intermediate_tensor_shape": {"element_type": "BF16", "dimensions": ["8", "16"]}}'
            ),
            5 * 2 * 8 * 16 * 4,
        ),
    ],
)
def test_the_operations_of_matmuls_as_gpu_programs_write_them(line, flops):
    run = written(
        "  %x = bf16[8,16,32]{2,1,0} parameter(0)\n  %y = bf16[8,32,4]{2,1,0} parameter(1)\n"
        f"  ROOT %d = {line}"
    )
    assert run["d"].flops == flops


def test_a_tpus_convolution_is_the_matmul_that_it_stands_for():
    run = written(
        "  %x = bf16[8,1024,768]{2,1,0} parameter(0)\n  %w = bf16[768,3,12,64]{3,2,1,0} "
        "parameter(1)\n  ROOT %c = bf16[8,1024,3,12,64]{4,1,3,0,2} convolution(%x, %w), "
        "window={size=3x1x12 pad=2_2x0_0x11_11 rhs_reversal=1x0x1}, dim_labels=1bf02_i02o1->1b02f"
    )
    assert run["c"].flops == 2 * 8 * 1024 * 768 * 3 * 12 * 64


# --- parts and times


@pytest.mark.parametrize(
    "name, expected",
    [
        ("jvp(Transformer)/while/body/closed_call/blocks/norm_1/mul", ("norms", "forward")),
        (
            (
                "transpose(jvp(Transformer))/while/body/closed_call/checkpoint/"
                "rematted_computation/blocks/tanh"
            ),
            ("GELU", "backward"),
        ),
        ("jvp(Transformer)/while/body/closed_call/blocks/concatenate", ("rotary", "forward")),
        (
            "jvp(Transformer)/while/body/jit(dynamic_update_index_in_dim)/dynamic_update_slice",
            ("stacking", "forward"),
        ),
        ("jvp(Transformer)/while/body/closed_call/blocks/Dropout_0/mul", None),
        (
            "transpose(jvp(Transformer))/while/body/closed_call/checkpoint/blocks/up/dot_general",
            ("MLP", "backward"),
        ),
        ("jvp(Transformer)/while/body/blocks/dot_product_attention_fwd", ("attention", "forward")),
        ("transpose(jvp())/while/body/closed_call/while/body/add", ("head and loss", "backward")),
        ("jvp(Transformer)/gather", ("embedding", "forward")),
        ("jit(_where)/select_n", ("optimizer, EMA, guard", "update")),
    ],
)
def test_a_kernel_belongs_to_a_part_of_the_model(name, expected):
    found = part_and_phase(kernel(op_names=(f"jit(train_step)/{name}",)))
    assert found == (expected or ("dropout and residual", "forward"))


def test_the_parts_that_are_named_are_in_the_programs_that_training_compiles():
    found = {part_and_phase(one)[0] for one in training_step()[1]}
    assert {UPDATE, *dict(PARTS)} - found <= {"stacking"}  # of which unrolled blocks have none


def test_a_kernel_takes_as_long_as_the_slowest_of_its_bytes_and_operations():
    h200 = DEVICES["NVIDIA H200"]
    assert seconds(kernel(bytes=36 * 10**11), h200) == pytest.approx(1.0)
    assert seconds(kernel(bytes=36 * 10**11, runs=3.0), h200) == pytest.approx(3.0)
    assert seconds(kernel(vector=10**15), h200) == pytest.approx(10**15 / 33.5e12)
    matmul = {"kind": "matmul", "flops": 10**15, "bytes": 36 * 10**9}
    assert seconds(kernel(**matmul), h200) == pytest.approx(10**15 / (0.75 * 989e12))
    sent = kernel(kind="collective", bytes=10**11)
    assert seconds(sent, h200) == pytest.approx(10**11 / (0.75 * 450e9))
    assert seconds(kernel(vector=10**15), DEVICES["TPU v5 lite"]) == 0.0


def test_the_tables_sum_to_the_step_and_fit_a_terminal():
    h200 = DEVICES["NVIDIA H200"]
    all_kernels = [
        kernel(bytes=36 * 10**8, runs=2.0),
        kernel(kind="matmul", flops=10**12, op_names=("jit(train_step)/jvp(T)/up/dot",)),
        kernel(kind="matmul", flops=10**12, op_names=("jit(train_step)/transpose(jvp(T))/up/d",)),
    ]
    rows = costs(all_kernels, h200)
    assert sum(row.seconds for row in rows) == pytest.approx(
        sum(seconds(one, h200) for one in all_kernels)
    )
    lines = describe_costs(rows)
    assert max(map(len, lines)) < 80
    assert re.search(r"^all +4 +7\.2 +2\.00 +4\.70$", "\n".join(lines), re.MULTILINE)
    assert re.search(r"^MLP +1\.35 +1\.35 +2\.70$", "\n".join(lines), re.MULTILINE)


def test_the_command_lists_the_longest_kernels_and_those_alike_as_one(
    tmp_path, capsys, monkeypatch
):
    body = "  %x = f32[8]{0} parameter(0)\n  %n.1 = f32[8]{0} negate(%x)\n"
    body += "  %n.2 = f32[8]{0} negate(%n.1)\n  ROOT %e = f32[8]{0} exponential(%n.2)"
    (tmp_path / "p.hlo").write_text(
        f"HloModule m\n\nENTRY %main (x: f32[8]) -> f32[8] {{\n{body}\n}}\n"
    )
    monkeypatch.setattr(sys, "argv", ["dry_run", str(tmp_path / "p.hlo"), "--rows=1"])
    assert __main__.main() == 0
    *_, row = capsys.readouterr().out.splitlines()
    assert row.split() == [
        "0.00",
        "0.00",
        "2",
        "n",
        "(elementwise,",
        "other,",
        "forward)",
        "f32[8]",
    ]


def test_the_dry_run_of_a_gpu_says_where_the_time_will_go():
    needs("h100:1")
    config = quickstart.get_config()
    estimate = dry_run(config, "h100:1", vocab_size=100)
    assert {"matmul", "elementwise", "reduction"} <= {row.kind for row in estimate.costs}
    assert estimate.to_dict()["predicted_seconds"] == sum(row.seconds for row in estimate.costs)
    assert "where the time will go: predicted from the program, not measured" in describe(estimate)
