"""Numbers of generated text by hand, and MAUVE where mauve-text is installed."""

import math
import sys

import numpy as np
import pytest

from sedd_jax.evaluation.mauve import known_tokens, mauve, mauve_of_repeats
from sedd_jax.evaluation.statistics import (
    distinct,
    distinct_error,
    energy_distance,
    mean_and_error,
    ratio_and_error,
    repetition,
    sample_statistics,
    text_perplexity,
    unigram_entropy,
)


def test_generative_perplexity_is_either_mean_of_hand_numbers():
    nats = np.log(np.array([[2.0, 8.0], [1.0, 1.0]], np.float32))  # geometric means 4 and 1
    perplexity = text_perplexity(nats)
    assert perplexity["mean_of_exp"] == pytest.approx((4 + 1) / 2)
    assert perplexity["token_mean"] == pytest.approx((2 * 8 * 1 * 1) ** (1 / 4))


def test_the_perplexity_of_a_fair_guess_is_the_vocabulary():
    perplexity = text_perplexity(np.full((3, 7), math.log(50257)))
    assert perplexity["mean_of_exp"] == pytest.approx(50257)
    assert perplexity["token_mean"] == pytest.approx(50257)
    assert perplexity["token_mean_standard_error"] == pytest.approx(0.0, abs=1e-6)


def test_the_errors_of_both_perplexities_are_their_spread_over_sets_of_texts():
    draws = np.random.default_rng(0)

    def measured():
        nats = draws.gamma(20.0, 0.1, size=(200, 1)) + draws.normal(size=(200, 30)) * 0.3
        lengths = draws.integers(10, 30, size=200)
        nats[np.arange(30) >= lengths[:, None]] = np.nan
        return text_perplexity(nats)

    sets = [measured() for _ in range(300)]
    for name in ("mean_of_exp", "token_mean"):
        spread = np.std([each[name] for each in sets], ddof=1)
        errors = [each[f"{name}_standard_error"] for each in sets]
        assert np.mean(errors) == pytest.approx(spread, rel=0.12)
    alone = text_perplexity(np.zeros((1, 3)))
    assert alone["mean_of_exp_standard_error"] is alone["token_mean_standard_error"] is None


def test_a_mean_has_the_error_of_hand_numbers():
    assert mean_and_error([1.0, 3.0, 5.0, 7.0]) == pytest.approx((4.0, math.sqrt(20 / 3 / 4)))
    assert mean_and_error([2.0]) == (2.0, None)


def test_unigram_entropy_is_taken_within_each_text():
    entropy = unigram_entropy(np.array([[0, 0, 1, 1], [5, 5, 5, 5]]))
    np.testing.assert_allclose(entropy, [math.log(2), 0.0])
    # Texts that each repeat one token have none, though together they hold two tokens.
    assert unigram_entropy(np.array([[3, 3], [4, 4]])).tolist() == [0.0, 0.0]
    assert unigram_entropy(np.arange(8)[None]) == pytest.approx(math.log(8))


def test_repetition_is_the_share_of_ngrams_that_came_before_in_the_text():
    draws = np.random.default_rng(0)
    tokens = draws.integers(0, 3, size=(6, 40))
    for n in (1, 2, 3, 4):
        expected = []
        for row in tokens.tolist():
            ngrams = [tuple(row[i : i + n]) for i in range(len(row) - n + 1)]
            expected.append(np.mean([gram in ngrams[:i] for i, gram in enumerate(ngrams)]))
        np.testing.assert_allclose(repetition(tokens, n), expected)
    assert repetition(np.array([[0, 1, 0, 1, 0]]), 2)[0] == 2 / 4
    # Two texts that are the same repeat nothing within themselves.
    assert repetition(np.array([[0, 1, 2, 3], [0, 1, 2, 3]]), 2).tolist() == [0.0, 0.0]


def test_statistics_are_means_over_texts_with_their_errors():
    tokens = np.random.default_rng(0).integers(0, 5, size=(7, 12))
    result = sample_statistics(tokens)
    entropy = unigram_entropy(tokens)
    assert result["unigram_entropy"] == pytest.approx(entropy.mean())
    error = entropy.std(ddof=1) / math.sqrt(7)
    assert result["unigram_entropy_standard_error"] == pytest.approx(error)
    assert set(result["repetition"]) == set(result["repetition_standard_error"]) == {"2", "3", "4"}
    assert result["repetition"]["3"] == pytest.approx(repetition(tokens, 3).mean())
    assert result["distinct"] == {str(n): distinct(tokens, n) for n in (1, 2, 3)}
    # Completing the same texts again, with the same result, adds no text and no certainty.
    again = sample_statistics(np.stack([tokens, tokens]))
    assert again["distinct"] == result["distinct"]
    assert again["unigram_entropy_standard_error"] == pytest.approx(error)


def test_the_energy_distance_is_its_formula_and_the_error_that_of_leaving_each_text_out():
    draws = np.random.default_rng(0)
    p, q = draws.normal(size=(6, 3)), draws.normal(size=(5, 3)) + 0.7

    def distance(a, b):
        return np.linalg.norm(a - b)

    def formula(p, q):
        between = np.mean([distance(a, b) for a in p for b in q])
        within = [
            np.mean([distance(x[i], x[j]) for i in range(len(x)) for j in range(len(x)) if i != j])
            for x in (p, q)
        ]
        return 2 * between - within[0] - within[1]

    without_p = np.array([formula(np.delete(p, i, axis=0), q) for i in range(6)])
    without_q = np.array([formula(p, np.delete(q, i, axis=0)) for i in range(5)])
    variance = 5 / 6 * ((without_p - without_p.mean()) ** 2).sum()
    variance += 4 / 5 * ((without_q - without_q.mean()) ** 2).sum()
    assert energy_distance(p, q) == pytest.approx((formula(p, q), math.sqrt(variance)))


def test_the_energy_distance_is_zero_on_average_for_one_distribution_and_grows_with_a_shift():
    draws = np.random.default_rng(0)

    def measured(shift):
        pairs = [
            energy_distance(draws.normal(size=(30, 4)), draws.normal(size=(25, 4)) + shift)
            for _ in range(200)
        ]
        values, errors = np.array(pairs).T
        return values.mean(), values.std(ddof=1), errors.mean()

    results = {shift: measured(shift) for shift in (0.0, 0.3, 1.0)}
    mean, spread, error = results[0.0]
    assert abs(mean) < 3.0 * spread / math.sqrt(200)
    assert error > spread  # on the safe side where the distributions are the same
    for smaller, larger in ((0.0, 0.3), (0.3, 1.0)):
        assert results[larger][0] > results[smaller][0] + 0.05
    _, spread, error = results[1.0]
    assert error == pytest.approx(spread, rel=0.15)


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
        (lambda: repetition(np.zeros((2, 3), int), 4), r"L at least 4, not int64 \[2, 3\]"),
        (lambda: energy_distance(np.zeros((2, 2)), np.zeros((5, 2))), "N at least 3, not .2, 2. "),
        (lambda: energy_distance(np.zeros((3, 2)), np.zeros((5, 3))), "with one scorer"),
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


def test_the_error_of_distinct_is_the_jackknife_over_texts():
    tokens = np.random.default_rng(0).integers(0, 9, (12, 8))
    without = np.array([distinct(np.delete(tokens, i, axis=0), 2) for i in range(12)])
    expected = np.sqrt(11 / 12 * ((without - without.mean()) ** 2).sum())
    assert distinct_error(tokens, 2) == pytest.approx(expected)
    assert distinct_error(tokens[:1], 2) is None


def test_the_interval_of_a_perplexity_over_documents_covers():
    """95 of 100 corpora whose documents differ in rate and length, and a bootstrap agrees."""
    rng = np.random.default_rng(0)
    corpora, documents = 2000, 60
    tokens = rng.integers(20, 200, (corpora, documents))
    rate = rng.gamma(16.0, 2.0 / 16.0, (corpora, documents))  # nats per token, mean 2
    errors = []
    covered = 0
    for nats, count in zip(rate * tokens, tokens, strict=True):
        ratio, error = ratio_and_error(nats, count)
        perplexity = np.exp(ratio)
        errors.append(perplexity * error)
        covered += abs(perplexity - np.exp(2.0)) < 1.96 * errors[-1]
    assert 0.92 < covered / corpora < 0.97
    picks = rng.integers(0, documents, (4000, documents))
    drawn = np.exp(nats[picks].sum(axis=1) / count[picks].sum(axis=1))
    assert errors[-1] == pytest.approx(drawn.std(), rel=0.1)
