"""Numbers of generated text: its perplexity under a scorer, and how varied it is.

A low generative perplexity alone proves little, since repetition lowers it too: it is reported
beside the unigram entropy of the same tokens.
"""

import numpy as np


def generative_perplexity(nats: np.ndarray) -> dict[str, float]:
    """Perplexity of texts under another model, from its nats [N, L - 1], NaN beyond a text's end.

    mean_of_exp, the original's protocol, is the mean over texts of exp(mean nats of the text);
    token_mean, that of others, is exp(mean nats over all tokens) and never larger.
    """
    nats = np.asarray(nats, np.float64)
    if nats.ndim != 2 or not nats.size:
        raise ValueError(f"nats must be [N, L - 1] and not empty, not {list(nats.shape)}")
    return {
        "mean_of_exp": float(np.exp(np.nanmean(nats, axis=1)).mean()),
        "token_mean": float(np.exp(np.nanmean(nats))),
    }


def unigram_entropy(tokens: np.ndarray) -> float:
    """Entropy in nats of the token frequencies within a text, averaged over texts int [N, L].

    At most log L; OpenWebText in rows of 1024 GPT-2 tokens has 5.45.
    """
    tokens = _check(tokens, 1)

    def entropy(row):
        _, counts = np.unique(row, return_counts=True)
        share = counts / len(row)
        return (share * np.log(1.0 / share)).sum()

    return float(np.mean([entropy(row) for row in tokens]))


def distinct(tokens: np.ndarray, n: int) -> float:
    """Different n-grams over n-grams, in (0, 1], over all texts int [N, L] together.

    An n-gram crosses no boundary of a text. Li et al. 2016. It falls as N L grows, so compare
    only equal amounts of text.
    """
    if n < 1:
        raise ValueError(f"n {n} is below 1; give at least 1")
    tokens = _check(tokens, n)
    grams = np.lib.stride_tricks.sliding_window_view(tokens, n, axis=1).reshape(-1, n)
    return len(np.unique(grams, axis=0)) / len(grams)


def _check(tokens, least):
    tokens = np.asarray(tokens)
    if tokens.ndim != 2 or not len(tokens) or tokens.shape[1] < least:
        raise ValueError(
            f"tokens must be [N, L] with N at least 1 and L at least {least}, not "
            f"{list(tokens.shape)}"
        )
    if not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(f"tokens must be integers, not {tokens.dtype}")
    return tokens
