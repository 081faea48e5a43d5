"""MAUVE of generated against human text, and the conditional protocol of the paper's Table 5.

Features come from our own scorer, so neither torch nor transformers is used; clustering and the
divergence curve are the mauve-text library's (Pillutla et al. 2021), from the extra [eval].
"""

from collections.abc import Callable

import numpy as np

from sedd_jax.evaluation.statistics import check_features

# The paper's section 5.4 completes texts of 100 GPT-2 tokens of which 50 are known.
CONDITIONAL_LENGTH = 100
KNOWN_ENDS = {"prefix": (50, 0), "infill": (25, 25)}  # known tokens at the beginning, at the end

_MAX_SEED = 2**31 - 3  # the library adds 2, and faiss keeps a 32-bit int


def mauve(
    p_features: np.ndarray, q_features: np.ndarray, *, seed: int, buckets: int | None = None
) -> dict[str, float | int]:
    """MAUVE in (0, 1], 1 for equal distributions, of human P [N, C] and generated Q [M, C].

    Features are the scorer's (Scorer.features), of texts of one length in tokens: texts cut
    differently differ for that alone. buckets is the number of k-means clusters, None for the
    library's min(N, M) / 10; published values use that and a few thousand texts. The seed starts
    k-means. frontier_integral, in [0, 1], is 0 for equal distributions.
    """
    p_features, q_features = check_features(p_features, q_features, min_count=2)
    _check_clustering(seed, buckets, len(p_features) + len(q_features))
    out = _compute_mauve()(
        p_features=p_features.astype(np.float32),
        q_features=q_features.astype(np.float32),
        num_buckets="auto" if buckets is None else int(buckets),
        seed=int(seed),
    )
    return {
        "mauve": float(out.mauve),
        "frontier_integral": float(out.frontier_integral),
        "buckets": int(out.num_buckets),
    }


def check(
    form: str, references: int, repeats: int, *, seed: int, buckets: int | None = None
) -> None:
    """ValueError for what known_tokens or mauve_of_repeats would refuse after the sampling."""
    _check_form(form)
    if references < 2:
        raise ValueError(f"{references} references are too few to cluster; give at least 2")
    _check_repeats(repeats)
    _check_clustering(seed, buckets, 2 * references)
    _compute_mauve()


def _check_form(form: str) -> None:
    if form not in KNOWN_ENDS:
        raise ValueError(f"unknown form {form!r}; known: {', '.join(KNOWN_ENDS)}")


def _check_repeats(repeats: int) -> None:
    if repeats < 2:
        raise ValueError(f"{repeats} repeats have no spread; give at least 2")


def _check_clustering(seed: int, buckets: int | None, texts: int) -> None:
    if not 0 <= seed <= _MAX_SEED:
        raise ValueError(f"seed {seed} is not in [0, {_MAX_SEED}]; choose another")
    if buckets is not None and not 2 <= buckets <= texts:
        raise ValueError(f"buckets {buckets} is not in [2, {texts}], the texts; choose another")


def _compute_mauve() -> Callable:
    """The library's function."""
    try:
        from mauve import compute_mauve
    except ImportError as error:
        raise ValueError(
            f'MAUVE needs the library mauve-text ({error}); pip install "sedd_jax[eval]"'
        ) from error
    return compute_mauve


def known_tokens(references: np.ndarray, form: str) -> tuple[np.ndarray, np.ndarray]:
    """What a sampler knows of references int [..., 100]: (tokens int32, is_known bool), as large.

    prefix: the first 50 tokens are known. infill: the first 25 and the last 25. The others are 0
    in tokens, so that nothing of the answer can leak.
    """
    _check_form(form)
    references = np.asarray(references)
    is_integer = np.issubdtype(references.dtype, np.integer)
    if references.shape[-1:] != (CONDITIONAL_LENGTH,) or not is_integer:
        raise ValueError(
            f"a reference must be {CONDITIONAL_LENGTH} integers, not {references.dtype} "
            f"{list(references.shape)}"
        )
    first, last = KNOWN_ENDS[form]
    position = np.arange(CONDITIONAL_LENGTH)
    is_known = (position < first) | (position >= CONDITIONAL_LENGTH - last)
    tokens = np.where(is_known, references, 0).astype(np.int32)
    return tokens, np.broadcast_to(is_known, references.shape)


def mauve_of_repeats(
    reference_features: np.ndarray,
    sample_features: list[np.ndarray],
    *,
    seed: int,
    buckets: int | None = None,
) -> dict[str, float | int | list[float]]:
    """Mean and standard deviation of MAUVE over repeats, each a completion of every reference.

    reference_features [N, C] and each of sample_features [N, C] are of whole texts, known tokens
    included, as in SSD-LM's evaluation. The paper has N = 1000 references and 5 repeats. To score
    the repeats one by one and to average is our convention, since it yields an error; SSD-LM pools
    them into one Q, which is mauve(reference_features, np.concatenate(sample_features), ...).
    The standard deviation is of one repeat, with n - 1; every repeat clusters from the same seed.
    """
    _check_repeats(len(sample_features))
    if any(len(features) != len(reference_features) for features in sample_features):
        raise ValueError(
            f"repeats of {[len(features) for features in sample_features]} texts do not fit "
            f"{len(reference_features)} references; complete every reference once in each"
        )
    scored = [
        mauve(reference_features, features, seed=seed, buckets=buckets)
        for features in sample_features
    ]
    values = [score["mauve"] for score in scored]
    return {
        "mean": float(np.mean(values)),
        "standard_deviation": float(np.std(values, ddof=1)),
        "values": values,
        "buckets": scored[0]["buckets"],
    }
