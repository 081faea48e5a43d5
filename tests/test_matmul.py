"""Matmuls: their precision, a layer's gradients on a CPU, and what is saved for them."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sedd_jax.diffusion.graphs import Absorbing, Uniform
from sedd_jax.kernels.cpu import add_bias, as_bits, from_bits, linear, save, transposed
from sedd_jax.kernels.matmul import CPU_SUMS_IN_FLOAT32, einsum
from sedd_jax.models.gpt2 import GPT2, token_nats
from sedd_jax.models.head import make_score_fn
from sedd_jax.models.transformer import Transformer

dtypes = pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])


@dtypes
def test_an_einsum_is_summed_and_returned_in_float32(dtype):
    a, b = (jax.random.normal(jax.random.key(i), (40, 40)).astype(dtype) for i in range(2))
    exact = np.asarray(a, np.float64) @ np.asarray(b, np.float64)
    found = einsum("mk,kn->mn", a, b)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(transposed(a), np.asarray(a).T)


@dtypes
@pytest.mark.parametrize(
    "x_shape, kernel_shape, axes",
    [
        ((2, 5, 8), (8, 3, 2, 4), 1),  # as q, k and v
        ((2, 5, 2, 4), (2, 4, 7), 2),  # as the way out of attention
        ((3, 16), (16, 4), 1),  # the gradient transposes the other one
    ],
)
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_layer_and_its_gradients_are_lax_dot_generals(
    dtype, x_shape, kernel_shape, axes, has_bias
):
    x = jax.random.normal(jax.random.key(0), x_shape).astype(dtype)
    kernel = jax.random.normal(jax.random.key(1), kernel_shape).astype(dtype).astype(jnp.float32)
    bias = jax.random.normal(jax.random.key(2), kernel_shape[axes:]) if has_bias else None

    def answers(x, is_one_cpu):
        def cost(x, kernel, bias):
            out = linear(x, kernel, axes, is_one_cpu=is_one_cpu)
            if has_bias:
                out = add_bias(out.reshape(-1, bias.size), bias.ravel(), is_one_cpu=is_one_cpu)
            weighted = jnp.sin(jnp.arange(out.size)).reshape(out.shape) * out.astype(jnp.float32)
            return weighted.sum(), out

        return jax.grad(cost, argnums=(0, 1, 2), has_aux=True)(x, kernel, bias)

    slopes, value = answers(x, is_one_cpu=True)
    exact_slopes, exact = answers(x.astype(jnp.float32), is_one_cpu=False)
    assert (value.dtype, slopes[0].dtype, slopes[1].dtype) == (dtype, dtype, jnp.float32)
    tolerance = 1e-6 if dtype == jnp.float32 else 1e-2
    pairs = zip(
        jax.tree.leaves((value, slopes)), jax.tree.leaves((exact, exact_slopes)), strict=True
    )
    for ours, right in pairs:
        error = np.linalg.norm(np.asarray(ours, np.float32) - right)
        assert error < tolerance * np.linalg.norm(right)


@pytest.mark.parametrize("is_one_cpu", [True, False])
def test_one_cpu_takes_flat_matmuls(is_one_cpu):
    def layer(x, kernel):
        return linear(x, kernel, 1, is_one_cpu=is_one_cpu)

    program = str(jax.make_jaxpr(layer)(jnp.zeros((2, 3, 4)), jnp.zeros((4, 5))))
    assert ("6,4" in program) == (is_one_cpu and CPU_SUMS_IN_FLOAT32)


@dtypes
def test_transposed_is_the_transpose_of_the_last_two_axes(dtype):
    a = jax.random.normal(jax.random.key(0), (3, 4, 5)).astype(dtype)
    found = jax.jit(transposed)(a)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, a.swapaxes(1, 2))


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_what_is_saved_by_name_is_all_that_the_gradient_needs_and_bits_on_a_cpu(platform):
    policy = jax.checkpoint_policies.save_only_these_names("branch")

    def fn(x, scale):
        branch = jnp.exp(x.astype(jnp.float32)).astype(jnp.bfloat16)
        return jnp.tanh(save(branch, "branch", platform).astype(jnp.float32)) ** 3 * scale

    def plain(x, scale):
        branch = jnp.exp(x.astype(jnp.float32)).astype(jnp.bfloat16)
        return jnp.tanh(branch.astype(jnp.float32)) ** 3 * scale

    x = jax.random.normal(jax.random.key(0), (4, 3)).astype(jnp.bfloat16)
    scale = jnp.linspace(1.0, 2.0, 3)

    def answers(fn):
        value, pull = jax.vjp(fn, x, scale)
        return value, pull(jnp.ones_like(value))

    saving = jax.checkpoint(fn, policy=policy)
    jax.tree.map(np.testing.assert_array_equal, answers(saving), answers(plain))
    saved = jax.eval_shape(lambda *a: jax.vjp(saving, *a)[1], x, scale)
    bits = {"cpu": "uint16", "gpu": "bfloat16"}[platform]
    found = sorted((leaf.shape, leaf.dtype.name) for leaf in jax.tree.leaves(saved))
    assert found == sorted([((4, 3), bits), ((4, 3), "bfloat16"), ((3,), "float32")])
    np.testing.assert_array_equal(from_bits(as_bits(x, platform)), x)


# A GPU multiplies float32 in TF32, 10 bits, and a TPU in bfloat16, unless each matmul forbids it.
DOT = re.compile(r"stablehlo\.(?:dot_general|convolution).*: \(tensor<[\dx]*f32>.*")


def float32_matmuls(fn, *arguments) -> list[str]:
    """Those of fn as it is lowered for an NVIDIA GPU; no GPU is needed."""
    lowered = jax.jit(fn).trace(*arguments).lower(lowering_platforms=("cuda",))
    return DOT.findall(lowered.as_text())


def in_less_precision(matmuls: list[str]) -> list[str]:
    return [matmul for matmul in matmuls if "precision = [HIGHEST, HIGHEST]" not in matmul]


def test_a_matmul_without_a_precision_is_noticed():
    (matmul,) = float32_matmuls(jnp.matmul, jnp.ones((2, 3)), jnp.ones((3, 4)))
    assert in_less_precision([matmul]) == [matmul]


@dtypes
@pytest.mark.parametrize("graph", [Absorbing(11), Uniform(11)], ids=["absorbing", "uniform"])
def test_every_float32_matmul_of_the_network_is_in_full_precision_on_a_gpu(
    graph, dtype, monkeypatch
):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    model = Transformer(
        dim=graph.dim,
        hidden_size=16,
        blocks=2,
        heads=2,
        cond_dim=8,
        dropout=0.1,
        dtype=dtype,
        attention="xla",  # of float32 the only one; cuDNN's cannot be traced without cuDNN
    )
    xt, sigma = jnp.zeros((2, 8), jnp.int32), jnp.ones((2, 1))
    keys = jax.random.split(jax.random.key(0), 2)
    params = jax.eval_shape(lambda: model.init(keys[0], xt, sigma, deterministic=True)["params"])

    def loss(params):
        score_fn = make_score_fn(model, params, graph, dropout_key=keys[0], is_token=xt >= 0)
        scores = score_fn(xt, sigma)
        return graph.score_entropy(scores, sigma, xt, xt).value.sum()

    def answers(params):
        scores = make_score_fn(model, params, graph)(xt, sigma)
        return scores.draw(keys), scores.log_score(), scores.log_sum(), scores.total()

    for fn in (jax.grad(loss), answers):
        matmuls = float32_matmuls(fn, params)
        assert len(matmuls) >= 5 and in_less_precision(matmuls) == []


def test_every_float32_matmul_of_the_scorer_is_in_full_precision_on_a_gpu(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    network = GPT2(vocab_size=11, positions=8, hidden_size=16, blocks=1, heads=2)
    tokens = jnp.zeros((2, 8), jnp.int32)
    params = jax.eval_shape(lambda: network.init(jax.random.key(0), tokens)["params"])
    matmuls = float32_matmuls(lambda params: token_nats(network, params, tokens), params)
    assert len(matmuls) >= 7 and in_less_precision(matmuls) == []
