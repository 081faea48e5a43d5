"""What a model writes, measured: generative perplexity, repetition, distance to other texts, MAUVE.

A low generative perplexity alone proves little, since repetition lowers it too: it stands beside
the unigram entropy and the repetition of the same samples, which are of the model's tokens. Every
result says what it was made with: steps and network calls (NFE), predictor, draw, dtype, seed,
scorer.
"""

import dataclasses
import hashlib
import time
from typing import Any, NamedTuple

import numpy as np

from sedd_jax import data
from sedd_jax.evaluation import mauve
from sedd_jax.evaluation.scorer import Scorer, TextScorer
from sedd_jax.evaluation.statistics import (
    MIN_LENGTH,
    energy_distance,
    sample_statistics,
    text_perplexity,
)
from sedd_jax.inference.model import SEDD
from sedd_jax.inference.sampling import Sampling

ENERGY_FEATURES = "last hidden states of the scorer, mean over the tokens of a text"


class References(NamedTuple):
    """Texts, not of the model, that samples of the same length are compared with."""

    source: dict[str, Any]  # which texts: references (how many), split, source, sha256
    features: np.ndarray | None  # Scorer.mean_features, float32 [M, C]; None: the scorer has none
    measures: dict[str, Any]  # what is measured of samples, of these


NO_REFERENCES = {"references": None}  # the source where samples are compared with none


def check_length(length: int | None) -> None:
    """ValueError for samples too short to be measured; None is the model's length."""
    if length is not None and length < MIN_LENGTH:
        raise ValueError(
            f"length {length} is too short for the measures of samples, which count {MIN_LENGTH}-"
            f"grams; give at least {MIN_LENGTH} tokens"
        )


def check_scorable(model: SEDD, scorer: TextScorer, length: int | None) -> None:
    """ValueError for samples that the scorer cannot score or that are too short."""
    length = model.length if length is None else length
    check_length(length)
    longest = scorer.positions
    if longest is not None and _shares_tokens(model, scorer) and length > longest:
        raise ValueError(
            f"length {length} is more than the {longest} positions of scorer "
            f"{scorer.name!r}; give a --length of at most that"
        )


def check_references(count: int, num_samples: int) -> None:
    """ValueError unless an energy distance and its error can be taken between so many texts."""
    for name, value in (("references", count), ("num_samples", num_samples)):
        if value < 3:
            raise ValueError(f"{name} {value} is too few for an energy distance; give at least 3")


def read_references(
    model: SEDD,
    scorer: TextScorer,
    records: data.Records,
    split: str,
    count: int,
    *,
    length: int | None = None,
    batch_size: int,
    progress: bool = False,
) -> References:
    """The first `length` tokens (by default the model's length) of `count` blocks of a split."""
    length = model.length if length is None else length
    check_scorable(model, scorer, length)
    texts, source = _read_texts(records, split, count, length)
    rows, lengths = scorer_rows(model, scorer, texts)
    batching = {"batch_size": batch_size, "progress": progress}
    features = _features(scorer, rows, lengths, **batching)
    return References(source, features, _measures(scorer, texts, rows, lengths, **batching))


def settings(
    model: SEDD,
    scorer: TextScorer,
    references: References | None = None,
    *,
    num_samples: int,
    seed: int = 0,
    length: int | None = None,
    **sampling: Any,
) -> dict[str, Any]:
    """What decides the numbers of generative_perplexity, as they stand in its result."""
    return {
        **made_with(model, scorer, seed, model.chosen(**sampling)),
        "num_samples": num_samples,
        "length": model.length if length is None else length,
        **(NO_REFERENCES if references is None else references.source),
    }


def generative_perplexity(
    model: SEDD,
    scorer: TextScorer,
    references: References | None = None,
    *,
    num_samples: int,
    batch_size: int,
    seed: int = 0,
    length: int | None = None,
    progress: bool = False,
    **sampling: Any,
) -> dict[str, Any]:
    """Samples of `length` tokens (the model's, by default), and their numbers under the scorer.

    sampling: steps, predictor, draw, grid and t_min, as SEDD.sample_tokens takes them; what is
    missing or None is model.sampling's. With references, of the same model, scorer and length, also
    their own numbers and, of a scorer with hidden states, the energy distance to them.
    """
    check_scorable(model, scorer, length)
    if references is not None:
        check_references(references.source["references"], num_samples)
    chosen = model.chosen(**sampling)
    result = settings(
        model, scorer, references, num_samples=num_samples, seed=seed, length=length, **sampling
    )
    batching = {"length": length, "batch_size": batch_size, "seed": seed}
    _compile(model, num_samples, **batching, **dataclasses.asdict(chosen))
    began = time.perf_counter()
    tokens, nfe = _draw(model, num_samples, chosen, progress=progress, **batching)
    seconds = time.perf_counter() - began
    rows, lengths = scorer_rows(model, scorer, tokens)
    batching = {"batch_size": batch_size, "progress": progress}
    result |= {
        "nfe": _count(nfe),
        "seconds_a_sample": seconds / num_samples,
        **_measures(scorer, tokens, rows, lengths, **batching),
    }
    if references is not None:
        result["reference_measures"] = references.measures
        if references.features is not None:
            features = _features(scorer, rows, lengths, **batching)
            distance, error = energy_distance(references.features, features)
            result |= {
                "energy_distance": distance,
                "energy_distance_standard_error": error,
                "energy_distance_of": ENERGY_FEATURES,
            }
    return result | {"samples": model.decode(tokens[:4])}


def _draw(
    model: SEDD, num_samples: int, chosen: Sampling, *, progress: bool, **options: Any
) -> tuple[np.ndarray, float]:
    """What SEDD.sample_tokens returns, and NFE, the mean of the samples' network calls."""
    updates = 20 if progress else 1
    options |= dataclasses.asdict(chosen)
    states = model.stream(None, num_samples, updates=updates, progress=progress, **options)
    last = [state for state in states if state.step == state.steps]
    nfe = np.concatenate([state.calls for state in last]).mean()
    return np.concatenate([state.tokens for state in last]), nfe


def _features(
    scorer: TextScorer, rows: np.ndarray, lengths: np.ndarray, **batching: Any
) -> np.ndarray | None:
    """What an energy distance is of, float32 [N, C]; None of a scorer that is no network."""
    return scorer.mean_features(rows, lengths, **batching) if isinstance(scorer, Scorer) else None


def _count(mean: float) -> float:
    """A mean of counts, as an int where it is a whole number."""
    return int(mean) if float(mean).is_integer() else float(mean)


def _measures(
    scorer: TextScorer, tokens: np.ndarray, rows: np.ndarray, lengths: np.ndarray, **batching: Any
) -> dict[str, Any]:
    """Perplexity and statistics of texts: the model's tokens, and the same as `scorer_rows`."""
    nats = scorer.nats(rows, **batching)
    nats[np.arange(nats.shape[1]) >= lengths[:, None] - 1] = np.nan
    return {"generative_perplexity": text_perplexity(nats), **sample_statistics(tokens)}


def _compile(model: SEDD, num_samples: int, *, batch_size: int, **options: Any) -> None:
    """Draws nothing at each batch shape of sample_tokens, so that no compiling is timed."""
    options |= {"batch_size": batch_size}
    next(model.stream(None, min(num_samples, max(batch_size, 1)), **options))
    if last := num_samples % batch_size:
        next(model.stream(None, last, **options))


def conditional_mauve(
    model: SEDD,
    scorer: Scorer,
    records: data.Records,
    split: str,
    *,
    form: str,
    references: int = 1000,
    repeats: int = 5,
    batch_size: int,
    seed: int = 0,
    buckets: int | None = None,
    progress: bool = False,
    **sampling: Any,
) -> dict[str, Any]:
    """The paper's Table 5: MAUVE of completions against the texts that they complete.

    References are the first 100 tokens of the split's blocks; see mauve.known_tokens for which of
    them the sampler knows. `repeats` completions of each are scored apart. Entropy and repetition
    are of whole texts, known tokens included, as the features are.
    """
    chosen = model.chosen(**sampling)
    mauve.check(form, references, repeats, seed=seed, buckets=buckets)
    _shares_tokens(model, scorer)  # refuses before the sampling
    if min(records.length, model.length) < mauve.CONDITIONAL_LENGTH:
        raise ValueError(
            f"records of {records.length} and a model of {model.length} tokens: MAUVE's texts "
            f"have {mauve.CONDITIONAL_LENGTH}; use longer blocks"
        )
    texts, source = _read_texts(records, split, references, mauve.CONDITIONAL_LENGTH)
    batching = {"batch_size": batch_size, "progress": progress}

    def features(tokens):
        rows, lengths = scorer_rows(model, scorer, tokens)
        return scorer.features(rows, lengths, **batching)

    def complete(repeat):
        # seed + repeat would give the repeats of one seed to the next as well.
        child = int(np.random.SeedSequence([seed, repeat]).generate_state(1)[0])
        known = mauve.known_tokens(texts, form)
        return _draw(model, references, chosen, known=known, seed=child, **batching)

    completed, nfe = zip(*(complete(repeat) for repeat in range(repeats)), strict=True)
    scored = [features(tokens) for tokens in completed]
    return {
        **made_with(model, scorer, seed, chosen),
        "nfe": _count(np.mean(nfe)),
        "form": form,
        "repeats": repeats,
        **source,
        "mauve": mauve.mauve_of_repeats(features(texts), scored, seed=seed, buckets=buckets),
        **sample_statistics(np.stack(completed)),
        "reference_measures": sample_statistics(texts),
    }


def _read_texts(
    records: data.Records, split: str, count: int, length: int
) -> tuple[np.ndarray, dict[str, Any]]:
    """The first `length` tokens of `count` blocks, int32 [count, length], and which they are."""
    if records.length < length:
        raise ValueError(
            f"length {length} of the samples is more than the {records.length} tokens of a block "
            f"of {str(records.folder)!r}; lower --length or prepare longer blocks"
        )
    blocks = data.read_blocks(records, split, count)
    is_long = slice(None) if blocks.is_token is None else blocks.is_token[:, length - 1]
    texts = blocks.tokens[is_long, :length]
    if len(texts) < count:
        raise ValueError(
            f"split {split!r} of {str(records.folder)!r} has {len(texts)} texts of {length} "
            f"tokens, not {count}; lower --references"
        )
    return texts, {
        "references": count,
        "split": split,
        "source": records.fingerprint["source"],
        "sha256": records.counts(split)["sha256"],
    }


def made_with(model: SEDD, scorer: TextScorer, seed: int, sampling: Sampling) -> dict[str, Any]:
    """What must stand beside a number of generated text."""
    times = model.times_of(sampling)  # of the grid "fitted", which a curve decides
    return {
        "step": model.step,
        **dataclasses.asdict(sampling),
        "times_sha256": None if times is None else hashlib.sha256(times.tobytes()).hexdigest(),
        "seed": seed,
        "dtype": model.dtype,
        "statistics_of": f"the model's tokens ({model.tokenizer.name})",
        "scorer": scorer.name,
        "scorer_dtype": scorer.dtype,
    }


def _shares_tokens(model: SEDD, scorer: TextScorer) -> bool:
    """Whether the model's tokens are the scorer's; ValueError if theirs cannot be made of them."""
    theirs, ours = scorer.tokenizer, model.tokenizer
    if theirs is not None:
        return theirs.fingerprint() == ours.fingerprint()
    if ours.name != "gpt2":
        raise ValueError(
            f"scorer {scorer.name!r} comes without a tokenizer, and the model's is {ours.name!r}; "
            "put tokenizer.json, or vocab.json and merges.txt, into the scorer's folder"
        )
    return True


def scorer_rows(
    model: SEDD, scorer: TextScorer, tokens: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The same texts in the scorer's tokens: int32 [N, L], lengths [N]; the padding is 0.

    The ids themselves where both have GPT-2's tokenizer, else the decoded text encoded again.
    """
    if _shares_tokens(model, scorer):
        return tokens, np.full(len(tokens), tokens.shape[1])
    theirs = scorer.tokenizer
    encoded = [theirs.encode(text)[: scorer.positions] for text in model.decode(tokens)]
    lengths = np.array([len(row) for row in encoded])
    rows = np.zeros((len(encoded), max(2, lengths.max())), np.int32)
    for row, ids in zip(rows, encoded, strict=True):
        row[: len(ids)] = ids
    return rows, lengths
