"""A run at a glance: its bound beside simple models, samples, an infilled template, a picture."""

import json
import re
import time
from pathlib import Path
from typing import Any

import numpy as np

from sedd_jax import data, evaluate
from sedd_jax.api import SEDD
from sedd_jax.train import open_records

ROWS = (
    ("bound", "SEDD, bound"),
    ("normalised", "SEDD, normalised bound"),
    ("paper_protocol", "SEDD, the paper's protocol (no boundary terms)"),
    ("bigram", "interpolated bigram, same text"),
    ("unigram", "unigram, same text"),
)


def evaluate_heldout(
    model: SEDD,
    workdir: Path,
    *,
    blocks: int | None = None,
    passes: int = 16,
    batch_size: int = 32,
    seed: int = 0,
    baselines: bool = False,
    progress: bool = False,
) -> dict[str, Any]:
    """The bound on the run's held-out blocks in every unit; baselines adds the n-gram models."""
    records = open_records(model.config, workdir)
    heldout = data.heldout_blocks(records, limit=blocks)
    total = model.bound(heldout, passes=passes, batch_size=batch_size, seed=seed, progress=progress)
    characters = records.tokenizer.count_characters(heldout.reshape(-1))
    values = evaluate.in_units(total, heldout.size, characters)
    if baselines:
        source = records.source("train")
        bigram = evaluate.Bigram(
            (records.parse(source[i]) for i in range(len(source))), records.tokenizer.vocab_size
        )
        for name, nats in (
            ("unigram", bigram.unigram_nats(heldout)),
            ("bigram", bigram.bigram_nats(heldout)),
        ):
            for unit, value in evaluate.one_in_units(nats, heldout.size, characters).items():
                values[unit][name] = value
    return {
        "step": model.step,
        "blocks": len(heldout),
        "tokens": int(heldout.size),
        "characters": characters,
        "passes": passes,
        "seed": seed,
        "tokenizer": records.fingerprint["tokenizer"]["name"],
        "heldout_sha256": records.fingerprint["splits"]["heldout"]["sha256"],
        **values,
    }


def table(result: dict[str, Any]) -> str:
    """The held-out numbers as aligned text; a bound carries its standard error."""
    bits, nats = result["bits_per_character"], result["nats_per_token"]
    perplexity = result["perplexity_per_token"]
    lines = [
        (
            f"held out: {result['blocks']} blocks, {result['tokens']:,} tokens, "
            f"{result['characters']:,} characters; {result['passes']} noise levels a block"
        ),
        f"{'':48}{'bits/character':>18}{'nats/token':>18}{'perplexity':>12}",
    ]
    for key, name in ROWS:
        if bits.get(key) is None:
            continue
        cells = []
        for unit in (bits, nats):
            error = unit.get(f"{key}_standard_error")
            cells.append(f"{unit[key]:.3f}" + ("" if error is None else f" +- {error:.3f}"))
        lines.append(f"{name:48}{cells[0]:>18}{cells[1]:>18}{perplexity[key]:>12.2f}")
    parts = ", ".join(f"{part} {bits[part]:.4f}" for part in ("diffusion", "tail", "prior"))
    lines.append(f"the bound's parts, bits/character: {parts}")
    return "\n".join(lines)


def word_rate(texts: list[str], vocabulary: set[str]) -> float:
    """Share of the words of three letters or more in texts that are in the vocabulary.

    The first and the last word of a text are left out: a block's edges cut them.
    """
    found = [word for text in texts for word in _words(text)[1:-1]]
    return sum(word in vocabulary for word in found) / max(len(found), 1)


def training_words(records: data.Records) -> set[str]:
    """The words of three letters or more in the training text."""
    source = records.source("train")
    words: set[str] = set()
    for start in range(0, len(source), 1024):  # blocks at a time, not the corpus
        part = [records.parse(source[i]) for i in range(start, min(start + 1024, len(source)))]
        words.update(_words(records.tokenizer.decode(np.concatenate(part)))[1:-1])
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
    drawn = model.sample_tokens(8, seed=0, frames=12)
    samples = model.decode(drawn.tokens)
    result = evaluate_heldout(model, workdir, passes=passes, baselines=True, progress=True)
    metrics = [
        json.loads(line)
        for line in (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    frames = [*model.decode(drawn.frames[:, 0]), samples[0]]
    picture(workdir / "picture.png", metrics, result, frames)
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
        "word_rate": word_rate(samples, training_words(open_records(model.config, workdir))),
        "heldout": result,
    }
    (workdir / "summary.json").write_text(
        json.dumps(summary, indent=1, ensure_ascii=False), encoding="utf-8"
    )
    return summary
