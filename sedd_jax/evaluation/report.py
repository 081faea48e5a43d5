"""A run at a glance: its bound beside simple models, samples, an infilled template, a picture."""

import json
import re
import time
from pathlib import Path
from typing import Any

import numpy as np

from sedd_jax import data
from sedd_jax.evaluation import ngrams
from sedd_jax.evaluation.scorer import Scorer
from sedd_jax.files import write_text
from sedd_jax.inference import bounds
from sedd_jax.inference.model import SEDD
from sedd_jax.runs import workdir as runs

ROWS = (
    ("bound", "SEDD, bound"),
    ("normalised", "SEDD, normalised bound"),
    ("paper_protocol", "SEDD, the paper's protocol (no boundary terms)"),
    ("gpt2", "GPT-2"),
    ("bigram", "interpolated bigram, same text"),
    ("unigram", "unigram, same text"),
)


def evaluate_split(
    model: SEDD,
    records: data.Records,
    split: str,
    *,
    blocks: int | None = None,
    passes: int = 16,
    batch_size: int = 32,
    seed: int = 0,
    target_standard_error: float | None = None,
    max_passes: int = 1024,
    train: tuple[data.Records, str] | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """The bound on a split's blocks (the first `blocks`, or all) in every unit.

    train, records and split, adds n-gram models fitted on that. With target_standard_error, nats
    per token, the result says whether it was reached within max_passes. ValueError if the records
    are not the model's kind.
    """
    check_records(model, records)
    heldout = data.read_blocks(records, split, blocks)
    ngrams = {} if train is None else _ngrams(*train, heldout)  # refuses what it cannot do at once
    total = model.bound(
        heldout,
        passes=passes,
        batch_size=batch_size,
        seed=seed,
        target_standard_error=target_standard_error,
        max_passes=max_passes,
        progress=progress,
    )
    sizes = sizes_of(records, split, heldout)
    values = bounds.in_units(total, **sizes)
    for name, nats in ngrams.items():
        for unit, value in bounds.one_in_units(nats, **sizes).items():
            values[unit][name] = value
    target = {}
    if target_standard_error is not None:
        error = values["nats_per_token"]["bound_standard_error"]
        target = {
            "target_standard_error": target_standard_error,
            "target_reached": error <= target_standard_error,
        }
    return {
        "step": model.step,
        "split": split,
        "blocks": len(heldout.tokens),
        **sizes,
        "passes": total.passes,
        **target,
        "seed": seed,
        "data": data_of(records, split),
        **values,
    }


def evaluate_heldout(
    model: SEDD, workdir: Path, *, baselines: bool = False, **options: Any
) -> dict[str, Any]:
    """evaluate_split on the run's own held-out text; baselines adds the n-gram models."""
    config = runs.open_workdir(workdir).config
    records = runs.open_records(config, workdir)
    train = (records, config.data.train_split) if baselines else None
    return evaluate_split(model, records, config.data.heldout_split, train=train, **options)


def evaluate_gpt2(
    scorer: Scorer,
    records: data.Records,
    split: str,
    *,
    blocks: int | None = None,
    batch_size: int = 8,
    progress: bool = False,
) -> dict[str, Any]:
    """-log p of a split under GPT-2, in the units of evaluate_split: Table 1's baseline rows.

    Each block by itself, no sliding window; its first token is given and not scored.
    """
    tokenizer = records.tokenizer
    if tokenizer.name != "gpt2" or (
        scorer.tokenizer is not None and scorer.tokenizer.fingerprint() != tokenizer.fingerprint()
    ):
        raise ValueError(
            f"the records in {str(records.folder)!r} were made with tokenizer {tokenizer.name!r} "
            f"({tokenizer.fingerprint()[:12]}), not with that of {scorer.name!r}; prepare them "
            "with --tokenizer=gpt2"
        )
    scored = data.read_blocks(records, split, blocks)
    nats = scorer.nats(scored.tokens, batch_size=batch_size, progress=progress)
    is_scored = np.ones(nats.shape, bool) if scored.is_token is None else scored.is_token[:, 1:]
    share = int(is_scored.sum()) / scored.count
    sizes = sizes_of(records, split, scored)
    sizes = {name: round(size * share) for name, size in sizes.items()}
    units = bounds.one_in_units(float(nats[is_scored].sum(dtype=np.float64)), **sizes)
    return {
        "scorer": scorer.name,
        "dtype": scorer.network.dtype.__name__,
        "split": split,
        "blocks": len(scored.tokens),
        **sizes,
        "data": data_of(records, split),
        **{unit: {"gpt2": value} for unit, value in units.items()},
    }


def check_records(model: SEDD, records: data.Records) -> None:
    """ValueError unless the model can score these records."""
    ours, theirs = model.tokenizer, records.tokenizer
    if ours.fingerprint() != theirs.fingerprint():
        raise ValueError(
            f"the records in {str(records.folder)!r} were made with tokenizer {theirs.name!r} "
            f"({theirs.vocab_size} tokens, {theirs.fingerprint()[:12]}), the model was trained "
            f"with {ours.name!r} ({ours.vocab_size} tokens, {ours.fingerprint()[:12]}); prepare "
            "the corpus with the model's tokenizer"
        )
    if records.length > model.length:
        raise ValueError(
            f"the records in {str(records.folder)!r} have blocks of {records.length} tokens, more "
            f"than the model's {model.length}; prepare them with --length={model.length}"
        )


def sizes_of(records: data.Records, split: str, blocks: data.Blocks) -> dict[str, Any]:
    """{"tokens", "characters", "words"} of the blocks.

    Words are those of the published text, white space between them, and one for the end of each
    document, as word-level tables count; of the blocks, the share that their tokens are.
    """
    counts = records.counts(split)
    words = counts["words"] + counts["documents"]
    real = blocks.tokens[... if blocks.is_token is None else blocks.is_token]
    return {
        "tokens": blocks.count,
        "characters": records.tokenizer.count_characters(real.reshape(-1)),
        "words": blocks.count * words / counts["tokens"],
    }


def data_of(records: data.Records, split: str) -> dict[str, Any]:
    """What was scored, for whoever compares two numbers."""
    fingerprint = records.fingerprint
    return {
        "source": fingerprint["source"],
        "tokenizer": fingerprint["tokenizer"],
        "length": fingerprint["length"],
        "form": fingerprint["form"],
        "sha256": records.counts(split)["sha256"],
    }


def _ngrams(records: data.Records, split: str, heldout: data.Blocks) -> dict[str, float]:
    """-log p of the held-out blocks under n-gram models of the split, nats."""
    source = records.source(split)
    if heldout.is_token is not None:
        raise ValueError("n-gram models need packed records; leave --baselines out")
    parsed = (records.parse(source[i]) for i in range(len(source)))
    bigram = ngrams.Bigram(parsed, records.tokenizer.vocab_size)
    return {
        "unigram": bigram.unigram_nats(heldout.tokens),
        "bigram": bigram.bigram_nats(heldout.tokens),
    }


def table(result: dict[str, Any]) -> str:
    """The held-out numbers as aligned text; a bound carries its standard error."""
    bits, nats = result["bits_per_character"], result["nats_per_token"]
    perplexity, per_word = result["perplexity_per_token"], result["perplexity_per_word"]
    source = result["data"]["source"]["corpus"]
    noise = f"; {result['passes']} noise levels a block" if "passes" in result else ""
    lines = [
        (
            f"{source} {result['split']}: {result['blocks']} blocks, {result['tokens']:,} tokens, "
            f"{result['characters']:,} characters, {result['words']:,.0f} words{noise}"
        ),
        f"{'':48}{'bits/character':>18}{'nats/token':>18}{'PPL/token':>12}{'PPL/word':>12}",
    ]
    for key, name in ROWS:
        if bits.get(key) is None:
            continue
        cells = []
        for unit in (bits, nats):
            error = unit.get(f"{key}_standard_error")
            cells.append(f"{unit[key]:.3f}" + ("" if error is None else f" +- {error:.3f}"))
        exponentials = f"{perplexity[key]:>12.2f}{per_word[key]:>12.4g}"
        lines.append(f"{name:48}{cells[0]:>18}{cells[1]:>18}{exponentials}")
    if "diffusion" not in bits:
        return "\n".join(lines)
    parts = ", ".join(f"{part} {bits[part]:.4f}" for part in ("diffusion", "tail", "prior"))
    lines.append(f"the bound's parts, bits/character: {parts}")
    if not result.get("target_reached", True):
        lines.append(
            f"target {result['target_standard_error']:g} nats/token not reached: "
            f"{nats['bound_standard_error']:.3g} after {result['passes']} noise levels a block; "
            "raise --max_passes"
        )
    return "\n".join(lines)


def word_rate(texts: list[str], vocabulary: set[str]) -> float:
    """Share of the words of three letters or more in texts that are in the vocabulary.

    The first and the last word of a text are left out: a block's edges cut them.
    """
    found = [word for text in texts for word in _words(text)[1:-1]]
    return sum(word in vocabulary for word in found) / max(len(found), 1)


def words_of(records: data.Records, split: str) -> set[str]:
    """The words of three letters or more in the text of a split."""
    source = records.source(split)
    words: set[str] = set()
    for start in range(0, len(source), 1024):  # blocks at a time, not the corpus
        rows = [records.parse(source[i]) for i in range(start, min(start + 1024, len(source)))]
        blocks = records.blocks(np.stack(rows))
        kept = blocks.tokens[... if blocks.is_token is None else blocks.is_token]
        words.update(_words(records.tokenizer.decode(kept.reshape(-1)))[1:-1])
    return words


def _words(text: str) -> list[str]:
    return re.findall(r"[A-Za-z]{3,}", text)


def picture(
    path: Path, metrics: list[dict[str, Any]], result: dict[str, Any], frames: list[str]
) -> None:
    """Loss curve and one sample's denoising, as PNG; needs matplotlib (the [plot] extra)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    bits = result["bits_per_character"]
    per_character = result["tokens"] / result["characters"] / np.log(2.0)
    figure, (curve, film) = plt.subplots(
        2, 1, figsize=(13, 9), height_ratios=[3, 2.2], constrained_layout=True
    )
    for kind, name, style in (
        ("train", "nats_per_token", {"color": "#9db7d5", "label": "training loss"}),
        ("heldout", "bound", {"color": "#1f4e8c", "marker": "o", "label": "held-out bound"}),
    ):
        rows = {row["step"]: row[name] for row in metrics if row["kind"] == kind}
        # A window in which every step was skipped has None: a gap in the curve.
        values = np.array(list(rows.values()), float)
        curve.plot(list(rows), values * per_character, **style)
    for name, color in (("unigram", "#bbbbbb"), ("bigram", "#d9822b")):
        if name in bits:
            curve.axhline(bits[name], color=color, linestyle="--", label=f"{name}, held out")
    curve.set(xlabel="step", ylabel="bits per character", ylim=(0, None))
    curve.legend(frameon=False)
    curve.spines[["top", "right"]].set_visible(False)

    width = max(map(len, frames))
    for y, text in enumerate(frames):
        before = (frames[y - 1] if y else "").ljust(width)
        for x, letter in enumerate(text):
            color = "#cccccc" if letter == "░" else "#111111" if letter == before[x] else "#c0392b"
            shown = "·" if letter == "░" else letter if letter.isprintable() else "↵"
            film.text(x, y, shown, color=color, family="monospace", fontsize=8, ha="center")
    film.set(xlim=(-1, width), ylim=(len(frames) - 0.3, -0.8), xticks=[], yticks=[])
    film.set_ylabel("noise to text")
    film.set_title("one sample, from noise to text (red: just changed)", fontsize=10)
    film.spines[:].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def report(
    model: SEDD, workdir: Path, *, template: str | None, passes: int, began: float | None
) -> dict[str, Any]:
    """Write summary.json and picture.png into workdir and return the summary.

    template is infilled three times, None not at all; began is the Unix time that `seconds` counts
    from, None leaves it out.
    """
    infill = [] if template is None else model.infill(template, 3, seed=0)
    states = list(model.stream(num_samples=8, seed=0, updates=12))
    samples = states[-1].texts
    result = evaluate_heldout(model, workdir, passes=passes, baselines=True, progress=True)
    metrics = runs.read_metrics(workdir)
    config = runs.open_workdir(workdir).config
    records = runs.open_records(config, workdir)
    vocabulary = words_of(records, config.data.train_split)
    picture(workdir / runs.PICTURE, metrics, result, [state.texts[0] for state in states])
    summary = {
        "bits_per_character": {
            name: result["bits_per_character"][name]
            for name in (
                "bound",
                "bound_standard_error",
                "normalised",
                "normalised_standard_error",
                "paper_protocol",
                "unigram",
                "bigram",
            )
        },
        "seconds": None if began is None else round(time.time() - began, 1),
        "samples": samples,
        "infill": infill,
        "word_rate": word_rate(samples, vocabulary),
        "heldout": result,
    }
    write_text(workdir / runs.SUMMARY, json.dumps(summary, indent=1, ensure_ascii=False))
    return summary
