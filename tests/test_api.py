"""The model as one object: compiled once, honest about what it is given."""

import jax
import numpy as np
import pytest

import sedd_jax
from sedd_jax.diffusion import samplers


@pytest.fixture(scope="module")
def model(tiny_run):
    return sedd_jax.load(tiny_run)


def test_another_prompt_seed_or_number_of_steps_does_not_recompile(model, monkeypatch):
    traces = []
    real = samplers.sample
    monkeypatch.setattr(samplers, "sample", lambda *a, **k: traces.append(1) or real(*a, **k))
    first = model.infill("if [MASK:7]", 2, steps=3, seed=0)
    assert traces == [1]
    again = model.infill("or [MASK:7]", 2, steps=5, seed=1)
    assert traces == [1]
    assert first != again


def test_the_weights_are_the_moving_average_of_the_newest_checkpoint(model, tiny_run):
    import orbax.checkpoint as ocp

    assert model.step == 8
    saved = ocp.StandardCheckpointer().restore((tiny_run / "checkpoints/8/ema").absolute())
    for ours, theirs in zip(jax.tree.leaves(model.params), jax.tree.leaves(saved)):
        np.testing.assert_array_equal(ours, theirs)


def test_frames_show_one_sequence_being_denoised(model):
    drawn = model.sample_tokens(2, steps=16, seed=3, frames=4)
    masked = (np.asarray(drawn.frames) == model.graph.vocab_size).sum(axis=(1, 2))
    assert masked[0] == 2 * model.length
    assert all(np.diff(masked) <= 0) and 0 < masked[-1] < masked[0]
    revealed = np.asarray(drawn.frames[-1]) != model.graph.vocab_size
    same = np.asarray(drawn.frames[-1]) == np.asarray(drawn.tokens)
    assert same[revealed].all()  # an absorbing token once revealed stays


def test_known_tokens_outside_the_vocabulary_or_too_many_are_refused(model):
    is_known = np.ones(4, bool)
    for bad in (-1, model.graph.vocab_size):
        with pytest.raises(ValueError, match=r"known tokens must be in \[0, "):
            model.sample_tokens(1, known=(np.array([0, 1, bad, 2]), is_known))
    long = model.length + 1
    with pytest.raises(ValueError, match=f"{long} positions are more than the model's length"):
        model.sample_tokens(1, known=(np.zeros(long, int), np.ones(long, bool)))


def test_the_bound_is_finite_positive_and_repeats_with_its_seed(model):
    blocks = np.arange(3 * model.length).reshape(3, -1) % model.graph.vocab_size
    first = model.bound(blocks, passes=2, seed=5)
    assert first == model.bound(blocks, passes=2, seed=5)
    assert first.bound != model.bound(blocks, passes=2, seed=6).bound
    assert 0 < first.bound < np.inf and first.bound_standard_error > 0
