"""Statistics of a set of texts, in numpy: perplexity, entropy, repetition, distance to other texts.

A mean over texts comes with its standard error, which is None for a single text. Token rows may be
of any tokenizer; a caller says which, since every number here depends on it.
"""

from typing import Any

import numpy as np

from sedd_jax.evaluation.scorer import check_token_rows

REPETITION_N, DISTINCT_N = (2, 3, 4), (1, 2, 3)
MIN_LENGTH = max(REPETITION_N + DISTINCT_N)  # of texts: their n-grams are counted


def mean_and_error(values: np.ndarray) -> tuple[float, float | None]:
    """The mean of values [N] and its standard error, with N - 1."""
    values = np.asarray(values, np.float64)
    count = len(values)
    error = float(values.std(ddof=1) / np.sqrt(count)) if count > 1 else None
    return float(values.mean()), error


def ratio_and_error(sums: np.ndarray, counts: np.ndarray) -> tuple[float, float | None]:
    """sum(sums) / sum(counts), of texts [N], and its standard error over texts to first order."""
    sums, counts = np.asarray(sums, np.float64), np.asarray(counts, np.float64)
    ratio = float(sums.sum() / counts.sum())
    return ratio, mean_and_error((sums - ratio * counts) / counts.mean())[1]


def text_perplexity(nats: np.ndarray) -> dict[str, float | None]:
    """Perplexity of texts under another model, from its nats [N, L - 1], NaN beyond a text's end.

    mean_of_exp, the original's protocol, is the mean over texts of exp(mean nats of the text);
    token_mean, that of others, is exp(mean nats over all tokens) and never larger where the texts
    are equally long. A text of one token has no nats and does not count. The standard error of
    token_mean is that of a ratio of two means, the nats of a text and its tokens, to first order.
    """
    nats = np.asarray(nats, np.float64)
    if nats.ndim != 2 or np.isnan(nats).all():
        raise ValueError(
            f"nats must be [N, L - 1] and not empty or all NaN, not {list(nats.shape)}; score "
            "longer texts"
        )
    nats = nats[~np.isnan(nats).all(axis=1)]
    mean, error = mean_and_error(np.exp(np.nanmean(nats, axis=1)))
    totals, counts = np.nansum(nats, axis=1), (~np.isnan(nats)).sum(axis=1)
    nats_per_token, ratio_error = ratio_and_error(totals, counts)
    token_mean = float(np.exp(nats_per_token))
    return {
        "mean_of_exp": mean,
        "mean_of_exp_standard_error": error,
        "token_mean": token_mean,
        "token_mean_standard_error": None if error is None else token_mean * ratio_error,
    }


def unigram_entropy(tokens: np.ndarray) -> np.ndarray:
    """Entropy in nats of the token frequencies within each text int [N, L], float64 [N].

    At most log L; its mean over OpenWebText in rows of 1024 GPT-2 tokens is 5.45.
    """

    def entropy(row):
        _, counts = np.unique(row, return_counts=True)
        frequency = counts / len(row)
        return (frequency * np.log(1.0 / frequency)).sum()

    return np.array([entropy(row) for row in check_token_rows(tokens, min_length=1)])


def repetition(tokens: np.ndarray, n: int) -> np.ndarray:
    """Share of the n-grams of each text int [N, L] that came before in that text, float64 [N].

    1 - different n-grams / n-grams: seq-rep-n of Welleck et al. 2020 (arXiv 1908.04319).
    """
    ngrams = _ngrams(tokens, n)
    return np.array([1.0 - len(np.unique(row, axis=0)) / len(row) for row in ngrams])


def distinct(tokens: np.ndarray, n: int) -> float:
    """Different n-grams over n-grams, in (0, 1], over all texts int [N, L] together.

    An n-gram crosses no boundary of a text. Li et al. 2016. It falls as N L grows, so compare
    only equal amounts of text.
    """
    ngrams = _ngrams(tokens, n).reshape(-1, n)
    return len(np.unique(ngrams, axis=0)) / len(ngrams)


def distinct_error(tokens: np.ndarray, n: int) -> float | None:
    """The jackknife's standard error of `distinct` over the texts int [N, L]; None for one text.

    A bootstrap would draw texts twice, which repeats their n-grams and biases the count.
    """
    ngrams = _ngrams(tokens, n)
    texts, each = ngrams.shape[:2]
    if texts == 1:
        return None
    _, kind = np.unique(ngrams.reshape(-1, n), axis=0, return_inverse=True)
    kinds_of = [np.unique(row) for row in kind.reshape(texts, each)]
    appears_in = np.bincount(np.concatenate(kinds_of))  # texts that have each kind
    lost = np.array([(appears_in[row] == 1).sum() for row in kinds_of])
    without = (len(appears_in) - lost) / ((texts - 1) * each)
    return float(np.sqrt((texts - 1) / texts * ((without - without.mean()) ** 2).sum()))


def _ngrams(tokens: np.ndarray, n: int) -> np.ndarray:
    """The n-grams of each text int [N, L], [N, L - n + 1, n]."""
    if n < 1:
        raise ValueError(f"n {n} is below 1; give at least 1")
    tokens = check_token_rows(tokens, min_length=n)
    return np.lib.stride_tricks.sliding_window_view(tokens, n, axis=1)


def sample_statistics(tokens: np.ndarray) -> dict[str, Any]:
    """What stands beside each number of a set of texts int [N, L]; L at least MIN_LENGTH.

    Or of R sets [R, N, L] of the same N texts, completed R times: errors are over the N, each the
    mean of its R completions, and distinct is the mean of R sets, comparable with one of N texts.
    """
    tokens = np.asarray(tokens)
    sets = tokens.reshape(-1, *tokens.shape[-2:])

    def per_text(fn, *arguments):
        return mean_and_error(np.mean([fn(rows, *arguments) for rows in sets], axis=0))

    entropy, entropy_error = per_text(unigram_entropy)
    repeated = {str(n): per_text(repetition, n) for n in REPETITION_N}
    return {
        "unigram_entropy": entropy,
        "unigram_entropy_standard_error": entropy_error,
        "repetition": {n: mean for n, (mean, _) in repeated.items()},
        "repetition_standard_error": {n: error for n, (_, error) in repeated.items()},
        "distinct": {
            str(n): float(np.mean([distinct(rows, n) for rows in sets])) for n in DISTINCT_N
        },
        "distinct_standard_error": {str(n): _mean_error(sets, n) for n in DISTINCT_N},
    }


def _mean_error(sets: np.ndarray, n: int) -> float | None:
    """The mean over sets of texts of the error of `distinct`, not below that of their mean."""
    errors = [distinct_error(rows, n) for rows in sets]
    return None if errors[0] is None else float(np.mean(errors))


def energy_distance(p_features: np.ndarray, q_features: np.ndarray) -> tuple[float, float]:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'| of X from P [N, C], Y from Q [M, C], and its error.

    In the features' unit; 0 if and only if P = Q (Székely and Rizzo 2013). The estimate averages
    over pairs of different texts, a U-statistic: unbiased, so below 0 at times where P is Q. The
    standard error is the jackknife's over both sets (Arvesen 1969), on the safe side where P is Q;
    it takes the texts for independent. N and M are at least 3.
    """
    from scipy.spatial.distance import cdist

    p, q = check_features(p_features, q_features, min_count=3)
    cross, within_p, within_q = cdist(p, q), cdist(p, p), cdist(q, q)
    mean_p, mean_q = _pair_mean(within_p), _pair_mean(within_q)
    value = 2.0 * cross.mean() - mean_p - mean_q
    variance = 0.0
    # The estimate without each text of one set in turn.
    for distances, within, mean_other in ((cross, within_p, mean_q), (cross.T, within_q, mean_p)):
        count, others = distances.shape
        cross_mean = (distances.sum() - distances.sum(axis=1)) / ((count - 1) * others)
        pairs = (count - 1) * (count - 2)
        within_mean = (within.sum() - 2.0 * within.sum(axis=1)) / pairs
        without = 2.0 * cross_mean - within_mean - mean_other
        variance += (count - 1) / count * ((without - without.mean()) ** 2).sum()
    return float(value), float(np.sqrt(variance))


def _pair_mean(distances: np.ndarray) -> float:
    """The mean over pairs i != j of distances [N, N], whose diagonal is 0."""
    count = len(distances)
    return distances.sum() / (count * (count - 1))


def check_features(
    p_features: np.ndarray, q_features: np.ndarray, *, min_count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Both as arrays; ValueError unless they are finite [N, C], [M, C] of one C, N, M enough."""
    p_features, q_features = np.asarray(p_features), np.asarray(q_features)
    for name, features in (("p_features", p_features), ("q_features", q_features)):
        if features.ndim != 2 or len(features) < min_count or not np.isfinite(features).all():
            raise ValueError(
                f"{name} must be finite [N, C] with N at least {min_count}, not "
                f"{list(features.shape)} with {int((~np.isfinite(features)).sum())} infinite or NaN"
            )
    if p_features.shape[1] != q_features.shape[1]:
        raise ValueError(
            f"p_features have {p_features.shape[1]} channels and q_features "
            f"{q_features.shape[1]}; score both texts with one scorer"
        )
    return p_features, q_features
