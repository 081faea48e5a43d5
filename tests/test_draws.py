"""Draws by groups of tokens against the law itself."""

import re

import dense
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import REPOSITORY, says

from sedd_jax import experiment
from sedd_jax.diffusion import draws

# Of groups of 4: fewer tokens than two groups; a last group of one, of three, and a whole one.
VOCABS = (7, 9, 15, 16)


@pytest.fixture
def groups_of_4(monkeypatch):
    monkeypatch.setattr(draws, "GROUP", 4)


@pytest.mark.parametrize("vocab", VOCABS)
def test_tokens_are_drawn_in_proportion_whatever_their_group(vocab, groups_of_4):
    rng = np.random.default_rng(vocab)
    laws = rng.normal(scale=2.0, size=(3, vocab)).astype(np.float32)
    laws[0, [0, vocab - 1]] = -np.inf  # the ends of the first and the last group
    laws[1, 4:8] = -np.inf  # a whole group, where there are two
    laws[2] += 300.0  # exp would overflow
    many = 100_000
    drawn = jax.jit(draws.categorical)(
        jax.random.key(0), jnp.broadcast_to(laws[:, None], (3, many, vocab))
    )
    assert drawn.shape == (3, many) and drawn.dtype == jnp.int32
    for law, tokens in zip(laws, np.asarray(drawn), strict=True):
        assert tokens.min() >= 0 and tokens.max() < vocab
        weights = np.exp(law.astype(np.float64) - law.max())
        assert dense.p_value(np.bincount(tokens, minlength=vocab), weights) > dense.P_VALUE


def test_draws_of_one_key_are_independent_of_each_other(groups_of_4):
    law = jnp.where(jnp.arange(13) % 6 == 0, 0.0, -jnp.inf)  # 0, 6 and 12: a group each
    drawn = jax.jit(draws.categorical)(jax.random.key(1), jnp.tile(law, (100_000, 2, 1))) // 6
    for pair in (drawn, jnp.stack([drawn[:-1, 0], drawn[1:, 1]], axis=1)):
        assert dense.p_value(dense.count(pair, 3), np.full(9, 1 / 9)) > dense.P_VALUE


def test_a_vocabulary_of_gpt2_is_drawn_by_groups_with_noise_for_few_of_its_tokens():
    vocab = 50_257
    law = jnp.where(jnp.arange(vocab) % 5_000 == 7, 0.0, -jnp.inf)  # 11 tokens
    graph = str(jax.make_jaxpr(draws.categorical)(jax.random.key(0), law))
    noise = re.findall(r"random_bits\[bit_width=32 shape=\(2, (\d+)\)", graph)
    assert sorted(map(int, noise)) == [-(-vocab // draws.GROUP), draws.GROUP]
    drawn = jax.jit(draws.categorical)(jax.random.key(0), jnp.tile(law, (2_000, 1)))
    counts = np.bincount((drawn - 7) // 5_000, minlength=11)
    assert ((drawn - 7) % 5_000 == 0).all()
    assert dense.p_value(counts, np.full(11, 1 / 11)) > dense.P_VALUE


def test_rare_tokens_beside_a_dominant_one_are_drawn_at_their_rate(monkeypatch):
    """In the group of the dominant token, and each in a group of its own: 15 draws are expected.
    Noise of 23 bits makes 2.4 and misses 3 standard deviations (test_samplers)."""
    monkeypatch.setattr(draws, "GROUP", 32)
    rare, group, rounds, rows = 4e-8, 32, 1_500, 4_096
    ids = jnp.arange(group * (1 + group))
    is_rare = (ids < group) | (ids % group == 5)
    law = jnp.where(ids == 0, 0.0, jnp.where(is_rare, jnp.log(rare), -jnp.inf))

    @jax.jit
    def run(key):
        def one(i):
            drawn = draws.categorical(jax.random.fold_in(key, i), jnp.tile(law, (rows, 1)))
            return (drawn != 0).sum()

        return jax.lax.map(one, jnp.arange(rounds)).sum()

    expected = rare * (int(is_rare.sum()) - 1) * rows * rounds
    assert expected > 15
    assert abs(int(run(jax.random.key(2))) - expected) < 3 * expected**0.5


@pytest.mark.parametrize("generator", ["rbg", "unsafe_rbg"])
def test_the_generator_is_threefry_whatever_jax_is_set_to(generator):
    expected = jax.random.key_data(jax.random.split(draws.make_key(7)))
    with jax.default_prng_impl(generator):
        key = draws.make_key(7)
        assert jax.random.key_impl(key) == "threefry2x32"
        assert (jax.random.key_data(jax.random.split(key)) == expected).all()


def test_no_other_line_of_the_package_makes_a_key_of_a_seed():
    lines = [
        f"{path}: {line}"
        for path in (REPOSITORY / "sedd_jax").rglob("*.py")
        for line in path.read_text().splitlines()
        if re.search(r"random\.(key|PRNGKey|seed)\(", line)
    ]
    assert len(lines) == 1 and "draws.py" in lines[0]


@pytest.mark.parametrize(
    "name, value",
    [
        ("jax_threefry_partitionable", False),
        ("jax_random_seed_offset", 3),
        ("jax_enable_x64", True),
        ("jax_numpy_rank_promotion", "raise"),
        ("jax_numpy_dtype_promotion", "strict"),
    ],
)
def test_a_setting_of_jax_that_would_change_the_noise_is_refused(tiny_config, name, value):
    before = getattr(jax.config, name)
    jax.config.update(name, value)
    try:
        for action in (
            lambda: draws.make_key(0),
            lambda: experiment.make_mesh(tiny_config),
            lambda: experiment.make_model(tiny_config, None),
        ):
            with says(f"{name.upper()} is {value!r}", "unset it", f"{draws.SETTINGS[name][0]!r})"):
                action()
    finally:
        jax.config.update(name, before)
