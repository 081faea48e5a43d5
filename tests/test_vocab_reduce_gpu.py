"""The head's Triton kernels: interpreted, against the dense definition, and compiled for GPUs."""

import importlib.util
import os
import re
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from sedd_jax.kernels import vocab_reduce_gpu as kernels
from sedd_jax.training.dry_run.targets import parse_target

# No last block is whole: 300 tokens are some and a ragged one, 200 channels two chunks of bfloat16,
# and four of float32 in two groups. Few shapes, because each is compiled for seconds.
SMALL, WIDE, LARGE = SHAPES = [(20, 11, 16), (33, 28, 200), (70, 300, 48)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
COUNTS = {"none": lambda size: 0, "some": lambda size: size // 2 + 1, "all": lambda size: size}


def case(size, vocab, channels, count, dtype=jnp.float32, scale=1.0):
    """Arguments of forward, and d_total and d_pick; some exclude nothing, some their target."""
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(size, channels)) * scale
    weight = rng.normal(size=(vocab, channels)) / np.sqrt(channels)
    bias = rng.normal(size=vocab).astype(np.float32)
    excluded = rng.integers(0, vocab, size).astype(np.int32)
    excluded[:3] = vocab, -1, vocab + 5
    targets = rng.integers(0, vocab, size).astype(np.int32)
    targets[3] = excluded[3]
    targets[0] = vocab - 1
    slopes = rng.normal(size=(2, size)).astype(np.float32)
    arrays = jnp.asarray(hidden, dtype), jnp.asarray(weight, dtype), bias, excluded, targets
    return (*map(jnp.asarray, arrays), jnp.int32(count)), tuple(jnp.asarray(slopes))


def definition(hidden, weight, bias, excluded, targets, count):
    hidden, weight = hidden.astype(jnp.float32), weight.astype(jnp.float32)
    logits = jnp.matmul(hidden, weight.T, precision="highest") + bias
    others = jnp.where(jnp.arange(len(bias)) == excluded[:, None], -jnp.inf, logits)
    pick = jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
    is_asked = jnp.arange(len(hidden)) < count
    total = jax.nn.logsumexp(others, axis=1)
    return jnp.where(is_asked, total, 0.0), jnp.where(is_asked, pick, 0.0)


def gradients(given, slopes):
    """The dense ones, in float32."""

    def cost(hidden, weight, bias):
        total, pick = definition(hidden, weight, bias, *given[3:])
        return (slopes[0] * total + slopes[1] * pick).sum()

    wide = [a.astype(jnp.float32) for a in given[:3]]
    return jax.jit(jax.grad(cost, argnums=(0, 1, 2)))(*wide)


forward = jax.jit(partial(kernels.forward, interpret=True))
backward = jax.jit(partial(kernels.backward, interpret=True))


def check(given, slopes, tolerance):
    total, pick = forward(*given)
    assert total.dtype == pick.dtype == jnp.float32
    for value, exact in zip((total, pick), definition(*given), strict=True):
        assert value.shape == exact.shape
        np.testing.assert_allclose(value, exact, rtol=tolerance, atol=tolerance)
    for value, exact in zip(
        backward(*given, total, *slopes), gradients(given, slopes), strict=True
    ):
        assert value.shape == exact.shape and value.dtype == jnp.float32
        # Of bfloat16, each product is off by 2^-9 of itself and not of a sum that may cancel.
        atol = tolerance * max(1.0, float(jnp.abs(exact).max()))
        np.testing.assert_allclose(value, exact, rtol=tolerance, atol=atol)


@shapes
@pytest.mark.parametrize("count", COUNTS)
def test_float32_values_and_gradients_equal_the_dense_ones(shape, count):
    check(*case(*shape, COUNTS[count](shape[0])), 1e-5)


@shapes
@pytest.mark.parametrize("count", COUNTS)
def test_bfloat16_values_and_gradients_are_the_dense_ones_of_the_rounded_operands(shape, count):
    check(*case(*shape, COUNTS[count](shape[0]), jnp.bfloat16), 1e-2)


def test_bfloat16_products_are_summed_in_float32():
    given, _ = case(*LARGE, 70, jnp.bfloat16)
    for value, exact in zip(forward(*given), definition(*given), strict=True):
        np.testing.assert_allclose(value, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("programs", [1, 4], ids=["one part", "two parts"])
def test_no_value_depends_on_how_the_vocabulary_is_split(monkeypatch, programs):
    """Elsewhere in this file each block of tokens has a program of its own."""
    given, slopes = case(*LARGE, 60)
    total, pick = forward(*given)
    grads = backward(*given, total, *slopes)
    monkeypatch.setattr(kernels, "PROGRAMS", programs)
    others = jax.jit(lambda *args: kernels.forward(*args, interpret=True))(*given)
    others += jax.jit(lambda *args: kernels.backward(*args, interpret=True))(*given, total, *slopes)
    for value, other in zip((total, pick, *grads), others, strict=True):
        np.testing.assert_allclose(value, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("outside", [-1, 28, 1000])
def test_an_excluded_id_outside_the_vocabulary_excludes_nothing(outside):
    given, slopes = case(*WIDE, 33)
    given = (*given[:3], jnp.full(33, outside, jnp.int32), *given[4:])
    total, _ = forward(*given)
    logits = jnp.matmul(given[0], given[1].T, precision="highest") + given[2]
    np.testing.assert_allclose(total, jax.nn.logsumexp(logits, axis=1), rtol=1e-5)
    check(given, slopes, 1e-5)


def test_the_excluded_token_may_be_the_target():
    given, slopes = case(*WIDE, 33)
    check((*given[:3], given[4], *given[4:]), slopes, 1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_ragged_last_block_of_the_vocabulary_adds_nothing(dtype):
    """What lies beyond the arrays is NaN when interpreted: one that gets in shows everywhere.

    With a vocabulary of one block, padded by hand to whole blocks of tokens that have no share.
    """
    given, slopes = case(*SMALL, 20, dtype)
    total, pick = forward(*given)
    grads = backward(*given, total, *slopes)
    assert all(bool(jnp.isfinite(a).all()) for a in (total, pick, *grads))
    weight = jnp.pad(given[1], ((0, 128 - 11), (0, 0)))
    bias = jnp.pad(given[2], (0, 128 - 11), constant_values=-jnp.inf)
    whole = (given[0], weight, bias, *given[3:])
    np.testing.assert_allclose(forward(*whole)[0], total, rtol=1e-6)
    d_hidden, d_weight, d_bias = backward(*whole, total, *slopes)
    for value, padded in zip(grads, (d_hidden, d_weight[:11], d_bias[:11]), strict=True):
        np.testing.assert_allclose(value, padded, rtol=1e-6, atol=1e-6)


def test_rows_from_count_on_are_not_read():
    given, slopes = case(*LARGE, 40)
    total, pick = forward(*given)
    grads = backward(*given, total, *slopes)
    hidden = given[0].at[40:].set(jnp.nan)
    spoilt = (hidden, *given[1:])
    for value, exact in zip(forward(*spoilt), (total, pick), strict=True):
        np.testing.assert_array_equal(value, exact)
    bad = (a.at[40:].set(jnp.nan) for a in (total, *slopes))
    for value, exact in zip(backward(*spoilt, *bad), grads, strict=True):
        np.testing.assert_array_equal(value, exact)
    assert (grads[0][40:] == 0).all()


def test_a_block_of_positions_beyond_count_visits_no_token():
    given, _ = case(*LARGE, 40)
    given, tile = kernels.Given(*given[:5], given[5][None]), kernels.TOTAL["float32"]
    for split, visited in ((0, (0, 3)), (1, (3, 5))):  # 5 blocks of 64 tokens, 3 to a part
        assert kernels._part(given, 39, split, tile, 3) == visited
        first, last = kernels._part(given, 40, split, tile, 3)
        assert first == last


def test_large_logits_stay_finite():
    given, slopes = case(*LARGE, 70, scale=80.0)
    logits = given[0] @ given[1].T
    assert logits.max() > 80 and logits.min() < -80
    total, pick = forward(*given)
    grads = backward(*given, total, *slopes)
    assert all(bool(jnp.isfinite(a).all()) for a in (total, pick, *grads))
    np.testing.assert_allclose(total, definition(*given)[0], rtol=1e-5)
    # A logit of 300 is off by 2e-5, and its share by as much of itself.
    for value, exact in zip(grads, gradients(given, slopes), strict=True):
        np.testing.assert_allclose(value, exact, rtol=1e-3, atol=1e-3 * jnp.abs(exact).max())


def test_a_bias_may_shut_whole_blocks_of_tokens():
    given, slopes = case(*LARGE, 70)
    bias = jnp.where(jnp.arange(300) < 290, -jnp.inf, given[2])
    targets = 290 + given[4] % 10
    given = (*given[:2], bias, given[3], targets, given[5])
    total, _ = forward(*given)
    np.testing.assert_allclose(total, definition(*given)[0], rtol=1e-5)
    assert all(bool(jnp.isfinite(a).all()) for a in backward(*given, total, *slopes))


def test_operands_of_another_or_of_two_dtypes_are_refused():
    given, _ = case(*SMALL, 20)
    with pytest.raises(ValueError, match="hidden is float32 and weight bfloat16; .* bfloat16, flo"):
        kernels.forward(given[0], given[1].astype(jnp.bfloat16), *given[2:])
    with pytest.raises(ValueError, match="hidden is float16"):
        kernels.forward(*(a.astype(jnp.float16) for a in given[:2]), *given[2:])


def test_under_shard_map_each_device_does_its_positions():
    given, slopes = case(40, *SMALL[1:], 0)
    counts = jnp.asarray([20, 7], jnp.int32)  # one for each device
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    rows, whole = P("x"), P()

    def both(hidden, weight, bias, excluded, targets, counts, d_total, d_pick):
        given = hidden, weight, bias, excluded, targets, counts[0]
        total, pick = kernels.forward(*given, interpret=True)
        grads = kernels.backward(*given, total, d_total, d_pick, interpret=True)
        return total, pick, grads[0], *(jax.lax.psum(g, "x") for g in grads[1:])

    sharded = jax.shard_map(
        both,
        mesh=mesh,
        in_specs=(rows, whole, whole, rows, rows, rows, rows, rows),
        out_specs=(rows, rows, rows, whole, whole),
        check_vma=False,
    )
    out = jax.jit(sharded)(*given[:5], counts, *slopes)
    alone = []
    for half, count in enumerate(counts):
        part = slice(20 * half, 20 * half + 20)
        mine = (given[0][part], *given[1:3], given[3][part], given[4][part], count)
        total, pick = forward(*mine)
        alone.append((total, pick, *backward(*mine, total, *(s[part] for s in slopes))))
    first, second = alone
    for value, a, b in zip(out[:3], first[:3], second[:3], strict=True):
        np.testing.assert_allclose(value, jnp.concatenate([a, b]), rtol=1e-6)
    for value, a, b in zip(out[3:], first[3:], second[3:], strict=True):
        np.testing.assert_allclose(value, a + b, rtol=1e-5, atol=1e-6)


# Compiled for a GPU that is not there: 2048 positions of the small model.
SIZE, VOCAB, CHANNELS = 2048, 50257, 768


def compile_for(gpu: str, dtype: str) -> None:
    """Compile both directions for one such GPU; run in a process of its own."""
    devices = parse_target(f"{gpu}:1").topology().devices
    mesh = jax.make_mesh((1,), ("x",), axis_types=(AxisType.Auto,), devices=devices)
    array = partial(jax.ShapeDtypeStruct, sharding=NamedSharding(mesh, P()))
    tokens, real = array((SIZE,), jnp.int32), array((SIZE,), jnp.float32)
    hidden, weight = array((SIZE, CHANNELS), dtype), array((VOCAB, CHANNELS), dtype)
    given = hidden, weight, array((VOCAB,), jnp.float32), tokens, tokens, array((), jnp.int32)
    for function, more in ((kernels.forward, ()), (kernels.backward, (real, real, real))):
        with jax.set_mesh(mesh):  # by which jax 0.12 knows for what GPU the kernel is
            traced = jax.jit(function).trace(*given, *more)
            compiled = traced.lower(lowering_platforms=("cuda",)).compile()
        text, name = compiled.as_text(), function.__name__
        calls = re.findall(r'custom_call_target="([^"]*triton[^"]*)"', text)
        assert len(calls) == (2 if more else 1), (name, calls)
        table = SIZE * VOCAB * 2  # bytes of the logits, were they bfloat16
        assert compiled.memory_analysis().temp_size_in_bytes < table // 4, name
        # The weight is read where it lies: not padded, cast or laid out anew.
        makers = re.findall(rf"= \w+\[{VOCAB},{CHANNELS}\]\S* ([\w-]+)\(", text)
        assert set(makers) <= {"parameter", "get-tuple-element"} and makers, (name, makers)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("gpu", ["a100", "h100"])
def test_the_kernels_compile_for_a_gpu_without_a_table_of_logits(gpu, dtype):
    for module in ("jax_cuda12_plugin", "jax_plugins.xla_cuda12", "nvidia.cuda_nvcc"):
        try:
            found = importlib.util.find_spec(module)
        except ModuleNotFoundError:
            found = None
        if found is None:
            pytest.skip(f"{module} is absent; {parse_target('a100:1').command}")
    done = subprocess.run(
        [sys.executable, __file__, gpu, dtype],
        env=os.environ | parse_target(f"{gpu}:1").environment | {"XLA_FLAGS": ""},
        check=False,  # what it said decides
        stderr=subprocess.PIPE,
        text=True,
        timeout=300,
    )
    if "NotImplementedError: topology not implemented for cuda" in done.stderr:
        pytest.skip(f"jax {jax.__version__} describes no GPU where CUDA is absent")
    assert done.returncode == 0, done.stderr[-3000:]


if __name__ == "__main__":
    compile_for(*sys.argv[1:])
