"""The corpus bound and the models it is held against, by hand and by brute force."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sedd_jax.data import Blocks
from sedd_jax.diffusion.graphs import GRAPHS
from sedd_jax.diffusion.likelihood import bound
from sedd_jax.diffusion.schedules import LogLinear
from sedd_jax.diffusion.scores import DenseScores
from sedd_jax.evaluation.report import word_rate
from sedd_jax.evaluation.values import group_starts
from sedd_jax.inference import bounds
from sedd_jax.parallel import sharding


def test_rounds_go_on_until_the_error_is_small_enough():
    def one_round(r):
        return bounds.CorpusBound(100.0 + r, 6.0, 90.0, 4.0, 6.0, 80.0, 3.0, 91.0, passes=8)

    total = bounds.bound_until(one_round, target=3.1, max_rounds=100, tokens=1)
    assert (total.passes, total.bound, total.normalised) == (4 * 8, 101.5, 80.0)
    assert total.bound_standard_error == pytest.approx(3.0)
    assert total.normalised_standard_error == pytest.approx(1.5)
    assert bounds.bound_until(one_round, target=0.1, max_rounds=3, tokens=1).passes == 3 * 8
    assert bounds.bound_until(one_round, target=9.0, max_rounds=3, tokens=1).passes == 8
    assert bounds.bound_until(one_round, target=0.31, max_rounds=100, tokens=10).passes == 4 * 8


def bound_fn_of(make_score_fn, graph, schedule):
    """The bound function of a toy, make_score_fn(params) -> score_fn."""

    @functools.partial(jax.jit, static_argnames="passes")
    def bound_fn(params, key, blocks, index, *, passes):
        score_fn, x0 = make_score_fn(params), blocks.tokens
        return bound(key, x0, index, score_fn, graph, schedule, passes=passes, t_min=1e-3)

    return bound_fn


@pytest.mark.parametrize("name", GRAPHS)
def test_the_corpus_bound_does_not_depend_on_the_batch_size(name):
    graph, schedule = GRAPHS[name](5), LogLinear()
    blocks = Blocks(np.asarray(jax.random.randint(jax.random.key(0), (11, 6), 0, 5)))

    def make_score_fn(bias):
        def score_fn(xt, sigma):
            table = bias + jnp.zeros((*xt.shape, graph.dim)) - graph.log_scale(sigma)[..., None]
            return DenseScores(table, xt, 5)

        return score_fn

    bias = jnp.linspace(-0.5, 0.5, graph.dim)
    bound_fn = bound_fn_of(make_score_fn, graph, schedule)
    totals = [
        bounds.corpus_bound(
            bound_fn, bias, jax.random.key(1), blocks, passes=4, batch_size=size, t_min=1e-3
        )
        for size in (1, 4, 11, 32)
    ]
    for total in totals[1:]:
        for field, value in total.sums.items():
            if value is None:
                assert totals[0].sums[field] is None
            else:
                assert value == pytest.approx(totals[0].sums[field], rel=1e-5), field
    total = totals[0]
    assert total.bound == pytest.approx(total.diffusion + total.tail + total.prior)
    assert total.paper_protocol == pytest.approx(total.diffusion / (1 - 1e-3))
    if total.normalised is not None:
        assert total.normalised < total.bound


@pytest.mark.devices(8)
def test_the_corpus_bound_over_a_mesh_is_that_of_one_device():
    graph, schedule = GRAPHS["absorbing"](5), LogLinear()
    blocks = Blocks(np.asarray(jax.random.randint(jax.random.key(0), (11, 6), 0, 5)))

    def make_score_fn(bias):
        return lambda xt, sigma: DenseScores(bias + jnp.zeros((*xt.shape, graph.dim)), xt, 5)

    bound_fn = bound_fn_of(make_score_fn, graph, schedule)
    mesh = sharding.make_mesh({"data": 4, "fsdp": 2, "tensor": 1})
    one, many = (
        bounds.corpus_bound(
            bound_fn, 0.5, jax.random.key(1), blocks, passes=2, batch_size=3, t_min=1e-3, mesh=mesh
        )
        for mesh in (None, mesh)
    )
    assert many.sums == pytest.approx(one.sums, rel=1e-5)
    assert many.curve.copies == one.curve.copies
    assert many.curve.nats == pytest.approx(one.curve.nats, rel=1e-5)


def test_the_corpus_bound_stops_when_asked():
    calls = []

    def bound_fn(*arguments):
        calls.append(arguments)
        raise AssertionError("asked to stop before the first call")

    stopped = bounds.corpus_bound(
        bound_fn,
        None,
        None,
        Blocks(np.zeros((4, 4), int)),
        passes=2,
        batch_size=2,
        t_min=0.1,
        should_stop=lambda: True,
    )
    assert stopped is None and not calls


def test_units_are_converted_by_their_definitions():
    total = bounds.CorpusBound(100.0, 1.0, 90.0, 4.0, 6.0, None, None, 91.0, passes=8)
    sizes = {"tokens": 50, "characters": 200, "words": 40}
    units = bounds.in_units(total.sums, **sizes)
    assert units["nats_per_token"]["bound"] == 2.0
    assert units["bits_per_character"]["bound"] == pytest.approx(0.5 / math.log(2.0))
    assert units["bits_per_character"]["bound_standard_error"] == pytest.approx(
        1 / 200 / math.log(2.0)
    )
    assert units["perplexity_per_token"]["bound"] == pytest.approx(math.exp(2.0))
    assert units["perplexity_per_word"]["bound"] == pytest.approx(math.exp(2.5))
    assert units["nats_per_token"]["normalised"] is None
    assert units["perplexity_per_token"]["bound_standard_error"] == pytest.approx(
        math.exp(2.0) * 1 / 50
    )
    assert units["perplexity_per_word"]["bound_standard_error"] == pytest.approx(
        math.exp(2.5) * 1 / 40
    )
    wholes = {"bound", "normalised", "paper_protocol"}
    errors = {f"{name}_standard_error" for name in wholes}
    assert set(units["perplexity_per_token"]) == wholes | errors
    other = bounds.in_units({"gpt2": 100.0}, **sizes)
    assert other == {unit: {"gpt2": values["bound"]} for unit, values in units.items()}


def test_the_word_rate_counts_whole_inner_words_of_three_letters():
    texts = ["cut the list of xyz cut", "no words"]
    assert word_rate(texts, {"the", "list"}) == pytest.approx(2 / 3)
    assert word_rate([], {"the"}) == 0.0


def test_groups_of_documents_have_the_tokens_of_a_block():
    tokens = np.array([[1, 0, 1, 1], [1, 0, 1, 0], [0, 1, 1, 1], [1, 1, 1, 1]], np.int32)
    # Documents end before 2, 6, 8 and 9; the last goes on.
    assert group_starts(Blocks(tokens), (0,)).tolist() == [0, 6]
    assert group_starts(Blocks(tokens), ()).tolist() == [0, 4, 8, 12]
    is_token = np.array([[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]], bool)
    assert group_starts(Blocks(tokens, is_token), (0,)).tolist() == [0, 5, 9]
