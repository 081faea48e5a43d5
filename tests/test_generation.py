"""Numbers of generated text by hand, and MAUVE where mauve-text is installed."""

import math
import sys

import numpy as np
import pytest

from sedd_jax.evaluation.generations import distinct, text_perplexity, unigram_entropy
from sedd_jax.evaluation.mauve import known_tokens, mauve, mauve_of_repeats


def test_generative_perplexity_is_either_mean_of_hand_numbers():
    nats = np.log(np.array([[2.0, 8.0], [1.0, 1.0]], np.float32))  # geometric means 4 and 1
    perplexity = text_perplexity(nats)
    assert perplexity["mean_of_exp"] == pytest.approx((4 + 1) / 2)
    assert perplexity["token_mean"] == pytest.approx((2 * 8 * 1 * 1) ** (1 / 4))


def test_the_perplexity_of_a_fair_guess_is_the_vocabulary():
    perplexity = text_perplexity(np.full((3, 7), math.log(50257)))
    assert perplexity == pytest.approx({"mean_of_exp": 50257, "token_mean": 50257})


def test_unigram_entropy_is_taken_within_each_text():
    assert unigram_entropy(np.array([[0, 0, 1, 1], [5, 5, 5, 5]])) == pytest.approx(math.log(2) / 2)
    # Texts that each repeat one token have none, though together they hold two tokens.
    assert unigram_entropy(np.array([[3, 3], [4, 4]])) == 0.0
    assert unigram_entropy(np.arange(8)[None]) == pytest.approx(math.log(8))


def test_distinct_counts_over_all_texts_and_crosses_no_boundary():
    tokens = np.array([[0, 1, 0, 1], [0, 1, 2, 2]])
    assert distinct(tokens, 1) == 3 / 8
    assert distinct(tokens, 2) == 4 / 6  # 01, 10, 12, 22; no 1 -> 0 from row to row
    assert distinct(np.array([[0, 1], [2, 3]]), 2) == 1.0
    assert distinct(tokens, 4) == 1.0


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: text_perplexity(np.zeros(3)), r"nats must be \[N, L - 1\]"),
        (lambda: text_perplexity(np.zeros((2, 0))), "not empty"),
        (lambda: unigram_entropy(np.zeros((2, 0), int)), "L at least 1"),
        (lambda: unigram_entropy(np.zeros((2, 3))), r"must be integers \[N, L\] .*, not float64"),
        (lambda: distinct(np.zeros((2, 3), int), 4), r"L at least 4, not int64 \[2, 3\]"),
        (lambda: distinct(np.zeros((2, 3), int), 0), "n 0 is below 1"),
        (lambda: known_tokens(np.zeros(100, int), "suffix"), "known: prefix, infill"),
        (lambda: known_tokens(np.zeros(99, int), "prefix"), "must be 100 integers"),
        (lambda: mauve(np.zeros((1, 2)), np.zeros((5, 2)), seed=0), "p_features must be finite"),
        (lambda: mauve(np.zeros((5, 2)), np.full((5, 2), np.nan), seed=0), "10 infinite or NaN"),
        (lambda: mauve(np.zeros((5, 2)), np.zeros((5, 3)), seed=0), "with one scorer"),
        (lambda: mauve(np.zeros((5, 2)), np.zeros((5, 2)), seed=-1), "seed -1 is not in"),
        (lambda: mauve(np.eye(5), np.eye(5), seed=0, buckets=11), r"buckets 11 is not in \[2, 10"),
        (lambda: mauve_of_repeats(np.eye(5), [np.eye(5)], seed=0), "1 repeats have no spread"),
        (lambda: mauve_of_repeats(np.eye(5), [np.eye(5)[:4]] * 2, seed=0), "5 references"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(call, words):
    with pytest.raises(ValueError, match=words) as refused:
        call()
    assert "\n" not in str(refused.value)


def test_half_of_a_reference_is_known_and_the_answer_is_hidden():
    reference = np.arange(1000, 1100)
    tokens, is_known = known_tokens(reference, "prefix")
    assert is_known[:50].all() and not is_known[50:].any()
    np.testing.assert_array_equal(tokens[:50], reference[:50])
    assert tokens.dtype == np.int32 and is_known.dtype == bool
    tokens, is_known = known_tokens(reference, "infill")
    assert is_known[:25].all() and is_known[75:].all() and not is_known[25:75].any()
    np.testing.assert_array_equal(tokens[is_known], reference[is_known])
    assert not tokens[~is_known].any()
    pair = known_tokens(np.stack([reference, reference[::-1]]), "infill")
    np.testing.assert_array_equal(pair[0][0], tokens)
    np.testing.assert_array_equal(pair[1], np.stack([is_known, is_known]))


def test_mauve_without_its_library_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "mauve", None)  # what import finds is "not there"
    with pytest.raises(ValueError, match=r'pip install "sedd_jax\[eval\]"'):
        mauve(np.eye(5), np.eye(5), seed=0)


@pytest.fixture
def needs_mauve():
    pytest.importorskip("mauve", reason="mauve-text is not installed (the extra [eval])")


def cloud(seed, centre=0.0, count=400):
    return np.random.default_rng(seed).normal(size=(count, 8)).astype(np.float32) + centre


def apart():
    """A centre whose cloud no cluster shares with one around zero, lengths normalised away."""
    return 20.0 * np.eye(8, dtype=np.float32)[0]


@pytest.mark.usefixtures("needs_mauve")
def test_mauve_is_one_for_the_same_texts_and_near_zero_for_disjoint_ones():
    same = mauve(cloud(0), cloud(0), seed=1)
    assert same["mauve"] == pytest.approx(1.0) and same["frontier_integral"] < 1e-6
    assert same["buckets"] == 40
    alike = mauve(cloud(0), cloud(1), seed=1)["mauve"]
    other = mauve(cloud(0, apart()), cloud(1, -apart()), seed=1)
    assert alike > 0.85 and other["mauve"] < 0.01
    assert other["frontier_integral"] == pytest.approx(1.0, abs=0.01)


@pytest.mark.usefixtures("needs_mauve")
def test_mauve_repeats_with_its_seed_and_keeps_the_buckets_it_is_given():
    first = mauve(cloud(0), cloud(1, 0.5), seed=1, buckets=12)
    assert first == mauve(cloud(0), cloud(1, 0.5), seed=1, buckets=12)
    assert first["buckets"] == 12
    assert first["mauve"] != mauve(cloud(0), cloud(1, 0.5), seed=2, buckets=12)["mauve"]


@pytest.mark.usefixtures("needs_mauve")
def test_repeats_are_summed_up_by_mean_and_standard_deviation():
    repeats = [cloud(seed, 0.3) for seed in (1, 2, 3)]
    score = mauve_of_repeats(cloud(0), repeats, seed=4)
    values = [mauve(cloud(0), features, seed=4)["mauve"] for features in repeats]
    assert score["values"] == values and len(set(values)) == 3
    assert score["mean"] == pytest.approx(sum(values) / 3)
    variance = sum((value - score["mean"]) ** 2 for value in values) / 2
    assert score["standard_deviation"] == pytest.approx(math.sqrt(variance))
