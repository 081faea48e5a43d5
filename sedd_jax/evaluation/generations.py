"""What a model writes, measured: generative perplexity, diversity, MAUVE, quality against calls.

Every result says what it was made with: steps and network calls (NFE), predictor, draw, dtype,
seed, scorer.
"""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sedd_jax import data
from sedd_jax.evaluation import generation, mauve
from sedd_jax.evaluation.scorer import Scorer
from sedd_jax.inference.model import SEDD

FEW = 500  # references; below, MAUVE says little


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
    missing is the config's.
    """
    sampling = with_defaults(model, sampling)
    drawn = {"length": length, "batch_size": batch_size, "seed": seed}
    _compile(model, num_samples, **drawn, **sampling)
    began = time.perf_counter()
    tokens = model.sample_tokens(num_samples, progress=progress, **drawn, **sampling)
    seconds = time.perf_counter() - began
    rows, lengths = scorer_rows(model, scorer, tokens)
    nats = scorer.nats(rows, batch_size=batch_size, progress=progress)
    nats[np.arange(nats.shape[1]) >= lengths[:, None] - 1] = np.nan
    return {
        **made_with(model, scorer, seed, sampling),
        "num_samples": num_samples,
        "length": tokens.shape[1],
        "seconds_a_sample": seconds / num_samples,
        "generative_perplexity": generation.generative_perplexity(nats),
        "unigram_entropy": generation.unigram_entropy(tokens),
        "distinct": {str(n): generation.distinct(tokens, n) for n in (1, 2, 3)},
        "samples": model.decode(tokens[:4]),
    }


def _compile(model: SEDD, num_samples: int, *, batch_size: int, **options: Any) -> None:
    """One step at each shape of batch that sample_tokens will meet, so that no time counts XLA's."""
    options |= {"batch_size": batch_size, "steps": 1}
    model.sample_tokens(min(num_samples, max(batch_size, 1)), **options)
    if last := num_samples % batch_size:
        model.sample_tokens(last, **options)


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

    References are the first 100 tokens of the split's blocks; see mauve.known_tokens for what is
    given of them. `repeats` completions of each are scored apart.
    """
    sampling = with_defaults(model, sampling)
    mauve.check(form, references, repeats, seed=seed, buckets=buckets)
    long = mauve.CONDITIONAL_LENGTH
    if min(records.length, model.length) < long:
        raise ValueError(
            f"records of {records.length} and a model of {model.length} tokens: MAUVE's texts "
            f"have {long}; use longer blocks"
        )
    blocks = data.read_blocks(records, split, references)
    whole = slice(None) if blocks.is_token is None else blocks.is_token[:, long - 1]
    texts = blocks.tokens[whole, :long]
    if len(texts) < references:
        raise ValueError(
            f"split {split!r} of {str(records.folder)!r} has {len(texts)} texts of {long} tokens, "
            f"not {references}; lower --references"
        )
    pairs = [mauve.known_tokens(text, form) for text in texts]
    known = tuple(np.stack(part) for part in zip(*pairs, strict=True))
    features = []
    for repeat in range(repeats):
        tokens = model.sample_tokens(
            references,
            known=known,
            batch_size=batch_size,
            seed=_child(seed, repeat),
            progress=progress,
            **sampling,
        )
        features.append(_features(model, scorer, tokens, batch_size, progress))
    of_references = _features(model, scorer, texts, batch_size, progress)
    return {
        **made_with(model, scorer, seed, sampling),
        "form": form,
        "references": references,
        "repeats": repeats,
        "split": split,
        "source": records.fingerprint["source"],
        "sha256": records.counts(split)["sha256"],
        "mauve": mauve.mauve_of_repeats(of_references, features, seed=seed, buckets=buckets),
    }


def pareto(
    model: SEDD, scorer: Scorer, steps: Sequence[int], **options: Any
) -> list[dict[str, Any]]:
    """generative_perplexity at each number of steps; the paper's Figures 1 and 2."""
    options.pop("steps", None)
    return [generative_perplexity(model, scorer, steps=count, **options) for count in steps]


def with_defaults(model: SEDD, sampling: dict[str, Any]) -> dict[str, Any]:
    """Sampling options, those that are None or missing as model.sampling has them."""
    chosen = {key: value for key, value in sampling.items() if value is not None}
    return {**dataclasses.asdict(model.sampling), **chosen}


def made_with(model: SEDD, scorer: Scorer, seed: int, sampling: dict[str, Any]) -> dict[str, Any]:
    """What must stand beside a number of generated text."""
    return {
        "step": model.step,
        **sampling,
        # The denoiser is the last call, and the only one without a predictor.
        "nfe": 1 if sampling["predictor"] == "none" else sampling["steps"] + 1,
        "seed": seed,
        "dtype": model.dtype,
        "scorer": scorer.name,
        "scorer_dtype": scorer.network.dtype.__name__,
    }


def _child(seed: int, index: int) -> int:
    """A seed for part `index`; seed + index would give parts of another seed twice."""
    return int(np.random.SeedSequence([seed, index]).generate_state(1)[0])


def scorer_rows(model: SEDD, scorer: Scorer, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same texts in the scorer's tokens: int32 [N, L], lengths [N]; the rest of a row is 0.

    The ids themselves where both have GPT-2's tokenizer, else the decoded text encoded again.
    """
    theirs = scorer.tokenizer
    same = theirs is not None and theirs.fingerprint() == model.tokenizer.fingerprint()
    if same or (theirs is None and model.tokenizer.name == "gpt2"):
        return tokens, np.full(len(tokens), tokens.shape[1])
    if theirs is None:
        raise ValueError(
            f"scorer {scorer.name!r} comes without a tokenizer, and the model's is "
            f"{model.tokenizer.name!r}; put vocab.json and merges.txt into the scorer's folder"
        )
    encoded = [theirs.encode(text)[: scorer.network.positions] for text in model.decode(tokens)]
    lengths = np.array([len(row) for row in encoded])
    rows = np.zeros((len(encoded), lengths.max()), np.int32)
    for row, ids in zip(rows, encoded, strict=True):
        row[: len(ids)] = ids
    return rows, lengths


def _features(model, scorer, tokens, batch_size, progress) -> np.ndarray:
    rows, lengths = scorer_rows(model, scorer, tokens)
    return scorer.features(rows, lengths, batch_size=batch_size, progress=progress)


def table(results: list[dict[str, Any]]) -> str:
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
        perplexity, distinct = r["generative_perplexity"], r["distinct"]
        lines.append(
            f"{r['steps']:>7}{r['nfe']:>7}{perplexity['mean_of_exp']:>16.2f}"
            f"{perplexity['token_mean']:>15.2f}{r['unigram_entropy']:>10.3f}"
            + "".join(f"{distinct[n]:>8.3f}" for n in ("1", "2", "3"))
            + f"{r['seconds_a_sample']:>10.3g}"
        )
    return "\n".join(lines)


def mauve_table(result: dict[str, Any]) -> str:
    """The result of conditional_mauve as text; a warning where it has too few references."""
    value, references = result["mauve"], result["references"]
    lines = [
        (
            f"MAUVE {value['mean']:.3f} +- {value['standard_deviation']:.3f} (standard deviation of "
            f"{result['repeats']} repeats of {references} references, {value['buckets']} clusters), "
            f"{result['form']}, {result['nfe']} network calls, {result['predictor']}, draw "
            f"{result['draw']}, seed {result['seed']}; features of {result['scorer']} in "
            f"{result['scorer_dtype']}"
        )
    ]
    if references < FEW:
        lines.append(
            f"not comparable with the paper's 1000 references, 5 repeats: below {FEW} references "
            "there are so few clusters that MAUVE is near 1 for any text; raise --references"
        )
    return "\n".join(lines)


def pareto_picture(path: Path, results: list[dict[str, Any]]) -> None:
    """Generative perplexity and entropy against network calls, as PNG; needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    calls = [r["nfe"] for r in results]
    figure, (upper, lower) = plt.subplots(
        2, 1, figsize=(7, 7), sharex=True, height_ratios=[2, 1], constrained_layout=True
    )
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
    plt.close(figure)
