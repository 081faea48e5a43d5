"""The dry run: what is counted, what is sent, what is refused; and the paper's runs, compiled."""

import functools
import importlib.util
import math
import re
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import REPOSITORY, TINY, says

from sedd_jax import experiment
from sedd_jax.configs import openwebtext_small, quickstart
from sedd_jax.diffusion.graphs import Absorbing, Uniform
from sedd_jax.diffusion.schedules import Geometric, LogLinear
from sedd_jax.experiment import evaluated_fraction, network_flops
from sedd_jax.parallel import sharding
from sedd_jax.parallel.devices import device
from sedd_jax.training.dry_run import describe, dry_run, parse_target
from sedd_jax.training.dry_run.collectives import BETWEEN_SLICES, collectives
from sedd_jax.training.dry_run.hlo import parse

VOCAB = 20


def needs(target: str):
    if not parse_target(target).is_installed:
        pytest.skip(f"not installed: {parse_target(target).packages}")


@pytest.fixture
def scaling(monkeypatch):
    """benchmarks/scaling.py, which belongs to no package."""
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    return importlib.import_module("scaling")


def logit_tables(text, vocab_size, hidden_size, positions):
    """The float32 arrays of a program with a number for every token at every position.

    positions is how many one device has at a time; in any layout. A side may be padded, by at
    most 256. The embedding and the head, with hidden_size numbers for every token, are none:
    where positions is hidden_size they look the same, and none is reported.
    """

    def is_table(shape):
        sides = [int(n) for n in shape.split(",")]
        others = [
            math.prod(sides) // side for side in sides if vocab_size <= side <= vocab_size + 256
        ]
        return any(n >= positions and n != hidden_size for n in others)

    shapes = set(re.findall(r"\bf32\[([\d,]+)\]", text))
    return sorted(f"f32[{shape}]" for shape in shapes if is_table(shape))


def meshed(config, data, fsdp, tensor):
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = data, fsdp, tensor
    return config


def program(config, parts=1):
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:parts])
    return experiment.make_experiment(config, VOCAB, mesh)


# --- operations


def test_the_forward_pass_costs_what_the_compiler_says(tiny_config):
    # Unrolled, as the compiler counts a loop's body once; a layer more costs a layer more.
    config = meshed(tiny_config, 1, 1, 1)
    config.model.dropout = 0.0
    config.model.blocks = 1  # the scan is one turn
    config.model.hidden_size = 64  # products outweigh what is not one
    made = program(config)

    def forward(params, tokens, sigma):
        return made.network.apply({"params": params}, tokens, sigma, deterministic=True)

    shapes = (made.shape.params, jnp.zeros((4, 32), jnp.int32), jnp.ones((4, 1)))
    plain = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), shapes)
    said = jax.jit(forward).lower(*plain).compile().cost_analysis()["flops"]
    counted = 4 * network_flops(plain[0], length=32)
    assert counted < said < 1.25 * counted


def test_small_costs_what_the_formula_says():
    config = openwebtext_small.get_config()
    config.train.batch_size = 2
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    counted = experiment.make_experiment(config, 50_257, mesh).flops / (2 * 1024)
    c, blocks, length, vocab = 768, 12, 1024, 50_257
    # The head at the masked tokens: (1 - 1e-3) t of them, t in [1e-3, 1].
    matrices = 12 * c * c * blocks + 0.999 * 0.5005 * vocab * c
    attention = 2 * length * c * blocks
    assert counted == pytest.approx(3 * 2 * (matrices + attention), rel=2e-3)


@pytest.mark.parametrize("schedule", [LogLinear(), Geometric(1e-4, 20.0)])
def test_the_loss_evaluates_scores_at_masked_tokens_and_with_uniform_noise_at_all(schedule):
    t_min = 0.01
    t = t_min + (1.0 - t_min) * np.linspace(0.0, 1.0, 10_001)
    masked = -np.expm1(-np.asarray(schedule.sigma(t), np.float64)).mean()
    fraction = evaluated_fraction(Absorbing(VOCAB), schedule, t_min)
    assert fraction == pytest.approx(masked, abs=1e-4)
    assert evaluated_fraction(Uniform(VOCAB), schedule, t_min) == 1.0


def test_microbatches_do_not_change_the_work(tiny_config):
    whole = program(meshed(tiny_config, 1, 1, 1)).flops
    tiny_config.train.microbatches = 4
    assert program(tiny_config).flops == whole


# --- collectives

TEXT = """HloModule step

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%turn (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %r = f32[8]{0} all-reduce(%x), channel_id=1, replica_groups=%GROUPS%, to_apply=%add
  ROOT %t = (s32[], f32[8]) tuple(%i, %r)
}

%until (p: (s32[], f32[8])) -> pred[] {
  %n = s32[]{:T(128)} constant(12)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %loop = (s32[], f32[8]) while(%start), condition=%until, body=%turn%NOTE%
  %g = (bf16[4,8]{1,0}, bf16[8,8]{1,0}) all-gather-start(%y), channel_id=2, replica_groups={{0,1},{2,3},{4,5},{6,7}}, dimensions={0}
  %h = bf16[8,8]{1,0} all-gather-done(%g)
  ROOT %s = f32[2]{0} reduce-scatter(%x), channel_id=3, replica_groups=[2,4]<=[8], dimensions={0}
}
"""
MESH = {"data": 2, "fsdp": 2, "tensor": 2}


def test_instructions_are_parsed():
    text = """HloModule step, is_scheduled=true

%fused (p: f32[8]) -> f32[8] {
  ROOT %p = f32[8]{0:T(256)S(1)} parameter(0)
}

ENTRY %main.1 (x: f32[8]) -> (f32[8], bf16[2,4]) {
  %x = f32[8]{0} parameter(0), metadata={op_name="x(y)"}
  %fusion.2 = (f32[8]{0:T(256)S(1)}, /*index=1*/bf16[2,4]{1,0:T(8,128)(2,1)}, pred[], token[]) fusion(f32[8]{0:T(256)} %x, /*index=1*/%x), kind=kLoop, calls=%fused, backend_config={"a":"b(c)"}
  ROOT %c = f32[8]{0} conditional(%x), true_computation=%fused, false_computation=%other
}
"""
    program = parse(text)
    assert program.entry == "main.1"
    (p,), (x, fusion, conditional) = program.computations.values()
    assert p.is_root and not x.is_root and (p.opcode, p.arguments) == ("parameter", "0")
    assert (x.name, x.operands, x.attributes) == ("x", [], ', metadata={op_name="x(y)"}')
    assert (fusion.name, fusion.opcode, fusion.operands) == ("fusion.2", "fusion", ["x", "x"])
    assert [(str(a), a.bytes) for a in fusion.arrays] == [
        ("f32[8]", 32),
        ("bf16[2,4]", 16),
        ("pred[]", 1),
        ("token[]", 0),
    ]
    assert fusion.called == ["fused"] and conditional.called == ["fused", "other"]


@pytest.mark.parametrize(
    "groups, axes",
    [
        ("{{0,4},{1,5},{2,6},{3,7}}", ("data",)),
        ("[4,2]<=[8]", ("tensor",)),
        ("[4,2]<=[2,2,2]T(0,2,1)", ("fsdp",)),
        ("[1,8]<=[8]", ("data", "fsdp", "tensor")),
        ("mesh['axis_0'=4,'axis_1'=2] {'axis_1'}", ("tensor",)),
        ("mesh['axis_0'=4,'axis_1'=2] {'axis_0'}", ("data", "fsdp")),
        ("mesh['axis_0'=8] {'axis_0':(2)2}", ("fsdp",)),
        ("mesh['axis_0'=2,'axis_1'=4], device_ids=([4,2]T(1,0)) {'axis_0'}", ("tensor",)),
        ("{{0,1,2,4},{3,5,6,7}}", ("data", "fsdp", "tensor", "4 of 8 devices")),
        ("{}", ("data", "fsdp", "tensor")),
    ],
)
def test_groups_are_named_by_the_axes_they_run_along(groups, axes):
    text = TEXT.replace("%GROUPS%", groups).replace("%NOTE%", "")
    found = {one.kind: one for one in collectives(parse(text), MESH)}
    assert found["all-reduce"].axes == axes


def test_collectives_are_counted_by_the_turns_of_their_loop_and_their_bytes():
    text = TEXT.replace("%GROUPS%", "[1,8]<=[8]").replace("%NOTE%", "")
    found = {
        one.kind: (one.count, one.bytes, one.is_exact) for one in collectives(parse(text), MESH)
    }
    assert found == {
        "all-reduce": (12, 12 * 8 * 4, True),
        "all-gather": (1, 8 * 8 * 2, True),
        "reduce-scatter": (1, 4 * 2 * 4, True),
    }
    noted = text.replace("body=%turn", 'body=%turn, backend_config={"known_trip_count":{"n":"5"}}')
    assert {one.count for one in collectives(parse(noted), MESH)} == {5, 1}
    unknown = text.replace("direction=LT", "direction=NE")
    assert [
        one.is_exact for one in collectives(parse(unknown), MESH) if one.kind == "all-reduce"
    ] == [False]


def test_a_table_of_the_vocabulary_is_found_in_any_layout():
    text = "f32[4,8,100] bf16[4,8,100] f32[101,32] f32[32,128] f32[4,100] f32[8,8,64]"
    assert logit_tables(text, 100, 16, 32) == [
        "f32[101,32]",
        "f32[32,128]",
        "f32[4,8,100]",
    ]


def test_the_embedding_is_no_table_of_logits():
    assert logit_tables("f32[100,64] f32[64,4,100]", 100, 64, 32) == ["f32[64,4,100]"]


# --- a dry run on CPU


@functools.cache
def compiled(sizes, microbatches):
    """(config, program, executable) on eight devices."""
    config = quickstart.get_config()
    for key, value in {**TINY, "model.heads": 8, "model.hidden_size": 32}.items():
        section, name = key.split(".")
        config[section][name] = value
    config.train.batch_size, config.train.microbatches = 16, microbatches
    made = program(meshed(config, *sizes), parts=8)
    return config, made, made.lower().compile()


@pytest.mark.parametrize(
    "sizes, microbatches, expected",
    [
        ((8, 1, 1), 2, {("all-reduce", ("data",))}),
        ((1, 1, 8), 1, {("all-reduce", ("tensor",))}),
        (
            (2, 4, 1),
            1,
            {
                ("all-reduce", ("data",)),
                ("all-reduce", ("fsdp",)),
                ("all-reduce", ("data", "fsdp")),
                ("all-gather", ("fsdp",)),
            },
        ),
    ],
)
def test_only_the_expected_collectives(sizes, microbatches, expected):
    _, made, executable = compiled(sizes, microbatches)
    found = collectives(parse(executable.as_text()), made.mesh.shape)
    assert {(one.kind, one.axes) for one in found} == expected
    # No device is sent the rows of another: what is gathered is no array of the batch's 16 rows.
    gathered = {shape for one in found for shape in one.shapes if one.kind == "all-gather"}
    assert not any(re.match(r"\w+\[16,32[,\]]", shape) for shape in gathered), gathered


def test_memory_is_what_jax_reports_and_the_table_is_complete():
    config, made, executable = compiled((2, 4, 1), 1)
    estimate = dry_run(config, "cpu:8", vocab_size=VOCAB)
    memory = executable.memory_analysis()
    assert estimate.argument_bytes == memory.argument_size_in_bytes
    assert estimate.temporary_bytes == memory.temp_size_in_bytes
    leaves = jax.tree.leaves(made.shape.params)
    assert estimate.parameter_bytes == sum(
        4 * int(np.prod(leaf.sharding.shard_shape(leaf.shape))) for leaf in leaves
    )
    assert estimate.parameter_bytes == sum(row.bytes for row in estimate.parameters)
    assert estimate.ema_bytes == estimate.parameter_bytes
    assert estimate.flops == made.flops
    assert (estimate.fits, estimate.complaint, estimate.step_seconds) == (None, "", None)
    shown = describe(estimate)
    for row in estimate.parameters:
        assert row.name in shown
    assert "cpu:8: 8 x cpu, mesh data=2, fsdp=4, tensor=1" in shown
    assert f"{estimate.tokens:,} tokens" in shown


# --- what is refused


@pytest.mark.parametrize(
    "text, count, shape, slices",
    [
        ("cpu:8", 8, "8", 1),
        ("v5e:4x4", 16, "4x4", 1),
        ("v5e:16x16*2", 512, "16x16", 2),
        ("v5p:16x16x24", 6144, "16x16x24", 1),
        ("v4:2x2x4", 16, "2x2x4", 1),
        ("v6e:1x1", 1, "1x1", 1),
        ("a100:16", 16, "1x2x8", 1),
        ("h100:4", 4, "1x1x4", 1),
        ("h200:8", 8, "1x1x8", 1),
    ],
)
def test_targets_are_parsed(text, count, shape, slices):
    target = parse_target(text)
    assert (target.count, target.shape, target.slices) == (count, shape, slices)


@pytest.mark.parametrize(
    "text, words",
    [
        ("tpu", "unknown target 'tpu'; give one of cpu, a100, h100, h200, v4, v5e"),
        ("v5e", "unknown target 'v5e'"),
        ("v9:4x4", "unknown target 'v9:4x4'"),
        ("v5e:4x5", "v5e has no slice '4x5'; give one of 1x1, 2x2"),
        ("v5e:32x32", "v5e has no slice"),
        ("v5e:4x4x4", "v5e has no slice"),
        ("v5e:4x4*0", "v5e has no slice"),
        ("v5p:4x4", "v5p has no slice '4x4'"),
        ("v5p:8x4x4", "A <= B <= C"),
        ("v4:16x16x20", "at most 4096 chips"),
        ("v5p:4x4x6", "multiple of 4"),
        ("a100:12", "12 GPUs are not a whole number of nodes of 8"),
        ("a100:0", "is not a number of devices"),
        ("cpu:", "is not a number of devices"),
        ("cpu:9999", "at most 512"),
    ],
)
def test_what_is_no_machine_is_refused(text, words):
    with says(words):
        parse_target(text)


def test_a_mesh_or_batch_that_does_not_divide_is_refused(tiny_config):
    with says("mesh data=3, fsdp=1, tensor=1 does not multiply to 8 devices"):
        dry_run(meshed(tiny_config, 3, 1, 1), "cpu:8", vocab_size=VOCAB)
    tiny_config.train.batch_size = 12
    with says("12 rows, not divisible by the 8 devices"):
        dry_run(meshed(tiny_config, -1, 1, 1), "cpu:8", vocab_size=VOCAB)


def test_a_vocabulary_that_is_not_known_is_asked_for(tiny_config):
    with says("tokenizer 'characters' depends on", "--vocab_size"):
        dry_run(tiny_config, "cpu:8")
    with says("vocab_size 1 is not a vocabulary's size"):
        dry_run(tiny_config, "cpu:8", vocab_size=1)


@pytest.mark.parametrize("target, name", [("v5e:4x4", "libtpu"), ("a100:8", "jax-cuda12-plugin")])
def test_a_compiler_that_is_not_installed_is_named(tiny_config, monkeypatch, target, name):
    find = importlib.util.find_spec
    hidden = ("libtpu", "jax_cuda12_plugin", "nvidia.cuda_nvcc")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda module: None if module in hidden else find(module)
    )
    with says(f"the compiler for {target} is not installed; it needs", name, "pip install"):
        dry_run(tiny_config, target, vocab_size=VOCAB)


def test_a_compiler_that_dies_is_one_line(tiny_config, monkeypatch):
    def died(*_, **__):
        return subprocess.CompletedProcess([], -6, stdout="", stderr="F0000 check failed\n\n")

    monkeypatch.setattr(subprocess, "run", died)
    with says("the compiler for cpu:8 ended with status -6 and no answer: F0000 check failed"):
        dry_run(tiny_config, "cpu:8", vocab_size=VOCAB)


def test_peaks_are_found_by_the_name_that_jax_gives():
    assert device("cpu") is None
    assert device("TPU v5 lite").flops == 197e12
    assert device("NVIDIA A100-SXM4-80GB").memory < 80e9


# --- compiled for machines that are not here


def test_a_tiny_model_compiles_for_tpu(tiny_config):
    needs("v5e:4x4")
    tiny_config.train.batch_size = 16
    estimate = dry_run(meshed(tiny_config, -1, 1, 1), "v5e:4x4", vocab_size=VOCAB)
    assert estimate.device_kind == "TPU v5 lite" and estimate.fits
    assert {(one.kind, one.axes) for one in estimate.collectives} == {("all-reduce", ("data",))}
    assert all(one.is_exact for one in estimate.collectives)


@pytest.mark.parametrize(
    "target, kernel", [("v5e:4x4", "tpu_custom_call"), ("a100:8", "__cudnn$fmha")]
)
def test_attention_is_the_devices_kernel_and_keeps_no_square(tiny_config, target, kernel, tmp_path):
    needs(target)
    config = meshed(tiny_config, -1, 1, 1)
    config.train.batch_size, config.data.length, config.evaluate.batch_size = 16, 256, 16
    config.model.hidden_size, config.model.dtype = 128, "bfloat16"
    for name in ("auto", "xla"):
        config.model.attention = name
        dry_run(config, target, vocab_size=VOCAB, text_file=tmp_path / name)
        text = (tmp_path / name).read_text()
        assert (kernel in text) == (name == "auto")
        assert ("256,256]" in text) == (name == "xla")


def test_fsdp_stays_inside_a_slice_and_gradients_cross():
    needs("v5e:2x2*2")
    config = meshed(quickstart.get_config(), 2, 4, 1)
    for key, value in TINY.items():
        section, name = key.split(".")
        config[section][name] = value
    estimate = dry_run(config, "v5e:2x2*2", vocab_size=VOCAB)
    axes = {one.axes for one in estimate.collectives}
    assert (BETWEEN_SLICES,) in axes and ("fsdp",) in axes
    with says("mesh data=1 does not divide over 2 TPU slices"):
        dry_run(meshed(config, 1, 8, 1), "v5e:2x2*2", vocab_size=VOCAB)


def test_what_does_not_fit_says_how_much_and_what_to_change():
    needs("v5e:1x1")
    config = meshed(openwebtext_small.get_config(), 1, 1, 1)
    config.model.blocks = 1
    estimate = dry_run(config, "v5e:1x1")
    assert estimate.fits is False and estimate.total_bytes > estimate.memory_bytes > 15e9
    assert re.fullmatch(
        r"v5e:1x1 does not fit: [\d.,]+ GiB of 15.75 GiB on each device; "
        r"set config.model.remat to blocks, or raise config.train.microbatches above 1",
        estimate.complaint,
    )


# Of a training step on meshes of data and fsdp alone. libtpu writes gathers that overlap with
# products as permutations around the ring.
EXPECTED = {
    ("all-reduce", "data"),
    ("all-reduce", "data, fsdp"),
    ("all-reduce", "fsdp"),
    ("all-gather", "fsdp"),
    ("reduce-scatter", "fsdp"),
    ("collective-permute", "fsdp"),
}

# An all-reduce over slices is a reduce-scatter and an all-gather in each, and the hosts between.
WITHIN_SLICES = {("all-gather", "data"), ("reduce-scatter", "data"), ("all-gather", "data, fsdp")}


@pytest.mark.long
@pytest.mark.parametrize("size", ["small", "medium"])
@pytest.mark.parametrize(
    "target", ["v5e:4x4", "v5e:16x16", "v5p:4x8x8", "v5e:16x16*2", "a100:8", "a100:16"]
)
def test_the_papers_runs_compile_fit_and_send_what_is_expected(size, target, scaling, tmp_path):
    needs(target)
    rows = [row for row in scaling.ROWS if row[0].startswith(f"openwebtext_{size}")]
    config = scaling.config_of(*next(row for row in rows if row[1] == target))
    estimate = dry_run(config, target, text_file=tmp_path / "program.txt")
    assert estimate.fits, describe(estimate)
    text = (tmp_path / "program.txt").read_text()
    rows = config.train.batch_size // config.train.microbatches
    positions = rows // (estimate.mesh["data"] * estimate.mesh["fsdp"]) * config.data.length
    assert logit_tables(text, estimate.vocab_size, config.model.hidden_size, positions) == []
    # Within one of several slices a group fills only a part of data; hosts do the rest.
    sent = {
        (one.kind, ", ".join(axis for axis in one.axes if " of " not in axis))
        for one in estimate.collectives
        if one.axes != (BETWEEN_SLICES,)
    }
    expected = EXPECTED | (WITHIN_SLICES if "*" in target else set())
    assert sent <= expected, sent - expected
