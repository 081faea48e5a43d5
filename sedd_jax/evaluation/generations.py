"""What a model writes, measured: generative perplexity, diversity, MAUVE, quality against calls.

A low generative perplexity alone proves little, since repetition lowers it too: it stands beside
the unigram entropy of the same tokens. Every result says what it was made with: steps and network
calls (NFE), predictor, draw, dtype, seed, scorer.
"""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sedd_jax import data
from sedd_jax.evaluation import mauve
from sedd_jax.evaluation.scorer import Scorer, check_token_rows
from sedd_jax.inference.model import SEDD
from sedd_jax.inference.sampling import Sampling

MIN_REFERENCES = 500  # below, MAUVE says little
MIN_LENGTH = 3  # of samples: their 3-grams are counted


# --- statistics of texts


def text_perplexity(nats: np.ndarray) -> dict[str, float]:
    """Perplexity of texts under another model, from its nats [N, L - 1], NaN beyond a text's end.

    mean_of_exp, the original's protocol, is the mean over texts of exp(mean nats of the text);
    token_mean, that of others, is exp(mean nats over all tokens) and never larger. A text of one
    token has no nats and does not count.
    """
    nats = np.asarray(nats, np.float64)
    if nats.ndim != 2 or np.isnan(nats).all():
        raise ValueError(
            f"nats must be [N, L - 1] and not empty or all NaN, not {list(nats.shape)}; score "
            "longer texts"
        )
    nats = nats[~np.isnan(nats).all(axis=1)]
    return {
        "mean_of_exp": float(np.exp(np.nanmean(nats, axis=1)).mean()),
        "token_mean": float(np.exp(np.nanmean(nats))),
    }


def unigram_entropy(tokens: np.ndarray) -> float:
    """Entropy in nats of the token frequencies within a text, averaged over texts int [N, L].

    At most log L; OpenWebText in rows of 1024 GPT-2 tokens has 5.45.
    """

    def entropy(row):
        _, counts = np.unique(row, return_counts=True)
        frequency = counts / len(row)
        return (frequency * np.log(1.0 / frequency)).sum()

    return float(np.mean([entropy(row) for row in check_token_rows(tokens, min_length=1)]))


def distinct(tokens: np.ndarray, n: int) -> float:
    """Different n-grams over n-grams, in (0, 1], over all texts int [N, L] together.

    An n-gram crosses no boundary of a text. Li et al. 2016. It falls as N L grows, so compare
    only equal amounts of text.
    """
    if n < 1:
        raise ValueError(f"n {n} is below 1; give at least 1")
    tokens = check_token_rows(tokens, min_length=n)
    ngrams = np.lib.stride_tricks.sliding_window_view(tokens, n, axis=1).reshape(-1, n)
    return len(np.unique(ngrams, axis=0)) / len(ngrams)


# --- evaluations of a model


def check_length(length: int | None) -> None:
    """ValueError for samples too short to be measured; None is the model's length."""
    if length is not None and length < MIN_LENGTH:
        raise ValueError(
            f"length {length} is too short for the measures of samples, which count {MIN_LENGTH}-"
            f"grams; give at least {MIN_LENGTH} tokens"
        )


def generative_perplexity(
    model: SEDD,
    scorer: Scorer,
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
    missing or None is model.sampling's.
    """
    length = model.length if length is None else length
    check_length(length)
    if _shares_tokens(model, scorer) and length > scorer.network.positions:
        raise ValueError(
            f"length {length} is more than the {scorer.network.positions} positions of scorer "
            f"{scorer.name!r}; give a --length of at most that"
        )
    chosen = model.chosen(**sampling)
    sampling = dataclasses.asdict(chosen)
    batching = {"length": length, "batch_size": batch_size, "seed": seed}
    _compile(model, num_samples, **batching, **sampling)
    began = time.perf_counter()
    tokens = model.sample_tokens(num_samples, progress=progress, **batching, **sampling)
    seconds = time.perf_counter() - began
    rows, lengths = scorer_rows(model, scorer, tokens)
    nats = scorer.nats(rows, batch_size=batch_size, progress=progress)
    nats[np.arange(nats.shape[1]) >= lengths[:, None] - 1] = np.nan
    return {
        **made_with(model, scorer, seed, chosen),
        "num_samples": num_samples,
        "length": tokens.shape[1],
        "seconds_a_sample": seconds / num_samples,
        "generative_perplexity": text_perplexity(nats),
        "unigram_entropy": unigram_entropy(tokens),
        "distinct": {str(n): distinct(tokens, n) for n in (1, 2, 3)},
        "samples": model.decode(tokens[:4]),
    }


def _compile(model: SEDD, num_samples: int, *, batch_size: int, **options: Any) -> None:
    """Samples one step at each batch shape of sample_tokens, so that no compiling is timed."""
    options |= {"batch_size": batch_size, "steps": 1}
    model.sample_tokens(min(num_samples, max(batch_size, 1)), **options)
    if last := num_samples % batch_size:
        model.sample_tokens(last, **options)


def pareto(
    model: SEDD, scorer: Scorer, steps: Sequence[int], **options: Any
) -> list[dict[str, Any]]:
    """generative_perplexity at each number of steps; the paper's Figures 1 and 2."""
    options.pop("steps", None)
    return [generative_perplexity(model, scorer, steps=count, **options) for count in steps]


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
    them the sampler knows. `repeats` completions of each are scored apart.
    """
    chosen = model.chosen(**sampling)
    sampling = dataclasses.asdict(chosen)
    mauve.check(form, references, repeats, seed=seed, buckets=buckets)
    _shares_tokens(model, scorer)  # refuses before the sampling
    texts = _read_references(records, split, references, model.length)
    batching = {"batch_size": batch_size, "progress": progress}

    def features(tokens):
        rows, lengths = scorer_rows(model, scorer, tokens)
        return scorer.features(rows, lengths, **batching)

    def complete(repeat):
        # seed + repeat would give the repeats of one seed to the next as well.
        child = int(np.random.SeedSequence([seed, repeat]).generate_state(1)[0])
        known = mauve.known_tokens(texts, form)
        return model.sample_tokens(references, known=known, seed=child, **batching, **sampling)

    completed = [features(complete(repeat)) for repeat in range(repeats)]
    return {
        **made_with(model, scorer, seed, chosen),
        "form": form,
        "references": references,
        "repeats": repeats,
        "split": split,
        "source": records.fingerprint["source"],
        "sha256": records.counts(split)["sha256"],
        "mauve": mauve.mauve_of_repeats(features(texts), completed, seed=seed, buckets=buckets),
    }


def _read_references(
    records: data.Records, split: str, count: int, model_length: int
) -> np.ndarray:
    """The first 100 tokens of `count` blocks, int32 [count, 100]."""
    length = mauve.CONDITIONAL_LENGTH
    if min(records.length, model_length) < length:
        raise ValueError(
            f"records of {records.length} and a model of {model_length} tokens: MAUVE's texts "
            f"have {length}; use longer blocks"
        )
    blocks = data.read_blocks(records, split, count)
    is_long = slice(None) if blocks.is_token is None else blocks.is_token[:, length - 1]
    texts = blocks.tokens[is_long, :length]
    if len(texts) < count:
        raise ValueError(
            f"split {split!r} of {str(records.folder)!r} has {len(texts)} texts of {length} "
            f"tokens, not {count}; lower --references"
        )
    return texts


def made_with(model: SEDD, scorer: Scorer, seed: int, sampling: Sampling) -> dict[str, Any]:
    """What must stand beside a number of generated text."""
    return {
        "step": model.step,
        **dataclasses.asdict(sampling),
        "nfe": sampling.nfe,
        "seed": seed,
        "dtype": model.dtype,
        "scorer": scorer.name,
        "scorer_dtype": np.dtype(scorer.network.dtype).name,
    }


def _shares_tokens(model: SEDD, scorer: Scorer) -> bool:
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


def scorer_rows(model: SEDD, scorer: Scorer, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same texts in the scorer's tokens: int32 [N, L], lengths [N]; the padding is 0.

    The ids themselves where both have GPT-2's tokenizer, else the decoded text encoded again.
    """
    if _shares_tokens(model, scorer):
        return tokens, np.full(len(tokens), tokens.shape[1])
    theirs = scorer.tokenizer
    encoded = [theirs.encode(text)[: scorer.network.positions] for text in model.decode(tokens)]
    lengths = np.array([len(row) for row in encoded])
    rows = np.zeros((len(encoded), max(2, lengths.max())), np.int32)
    for row, ids in zip(rows, encoded, strict=True):
        row[: len(ids)] = ids
    return rows, lengths


# --- what the commands print and draw


def perplexity_table(results: list[dict[str, Any]]) -> str:
    """Results of generative_perplexity as aligned text, a line each."""
    first = results[0]
    lines = [
        (
            f"{first['num_samples']} samples of {first['length']} tokens, {first['predictor']}, "
            f"draw {first['draw']}, model {first['dtype']}, seed {first['seed']}; scorer "
            f"{first['scorer']} in {first['scorer_dtype']}"
        ),
        f"{'':14}{'gen. perplexity':>31}{'entropy':>10}{'distinct n-grams':>24}{'seconds':>10}",
        (
            f"{'steps':>7}{'NFE':>7}{'mean of exp':>16}{'token mean':>15}{'(nats)':>10}"
            f"{'1':>8}{'2':>8}{'3':>8}{'a sample':>10}"
        ),
    ]
    for r in results:
        perplexity = r["generative_perplexity"]
        lines.append(
            f"{r['steps']:>7}{r['nfe']:>7}{perplexity['mean_of_exp']:>16.2f}"
            f"{perplexity['token_mean']:>15.2f}{r['unigram_entropy']:>10.3f}"
            + "".join(f"{r['distinct'][n]:>8.3f}" for n in ("1", "2", "3"))
            + f"{r['seconds_a_sample']:>10.3g}"
        )
    return "\n".join(lines)


def describe_mauve(result: dict[str, Any]) -> str:
    """The result of conditional_mauve as text; a warning where it has too few references."""
    value, references = result["mauve"], result["references"]
    lines = [
        (
            f"MAUVE {value['mean']:.3f} +- {value['standard_deviation']:.3f} (standard deviation "
            f"of {result['repeats']} repeats of {references} references, {value['buckets']} "
            "clusters), "
            f"{result['form']}, {result['nfe']} network calls, {result['predictor']}, draw "
            f"{result['draw']}, seed {result['seed']}; features of {result['scorer']} in "
            f"{result['scorer_dtype']}"
        )
    ]
    if references < MIN_REFERENCES:
        lines.append(
            "not comparable with the paper's 1000 references, 5 repeats: below "
            f"{MIN_REFERENCES} references there are so few clusters that MAUVE is near 1 for any "
            "text; raise --references"
        )
    return "\n".join(lines)


def pareto_picture(path: Path, results: list[dict[str, Any]]) -> None:
    """Generative perplexity and entropy against network calls, as PNG; needs matplotlib."""
    from matplotlib.figure import Figure  # not pyplot, which would open a window

    calls = [r["nfe"] for r in results]
    figure = Figure(figsize=(7, 7), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    for key, style in (("mean_of_exp", "o-"), ("token_mean", "s--")):
        values = [r["generative_perplexity"][key] for r in results]
        upper.plot(calls, values, style, label=key.replace("_", " "))
    upper.set(yscale="log", ylabel=f"generative perplexity\n({Path(results[0]['scorer']).name})")
    upper.legend(frameon=False)
    lower.plot(calls, [r["unigram_entropy"] for r in results], "o-", color="#555555")
    lower.set(xscale="log", xlabel="network calls", ylabel="unigram entropy (nats)")
    lower.set_xticks(calls, [str(c) for c in calls])
    lower.minorticks_off()
    for axes in (upper, lower):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
