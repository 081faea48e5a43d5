"""A run's report: summary.json, and a picture of its training and of one sample's denoising."""

import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sedd_jax import data
from sedd_jax.diffusion.likelihood import check_passes
from sedd_jax.evaluation.likelihood import evaluate_split, stream_of
from sedd_jax.evaluation.ngrams import read_parts
from sedd_jax.host.files import write_json
from sedd_jax.inference.frames import COLUMNS, Frame, columns_of
from sedd_jax.inference.model import SEDD
from sedd_jax.inference.trajectory import Animation
from sedd_jax.runs import workdir as runs

# Of the held-out result's bits per character, what the summary begins with.
_HEADLINE = (
    "bound",
    "bound_standard_error",
    "normalised",
    "normalised_standard_error",
    "paper_protocol",
    "unigram",
    "bigram",
)

MOST_TOKENS = 20_000_000  # of training text that are counted and read for known words

PANELS, MAX_LINES = 6, 12  # states of a sample in the picture, and lines of each
COLORS = {"": "#111111", "masked": "#b5b5b5", "new": "#c0392b", "known": "#1c6e8c"}


def make_report(
    model: SEDD,
    records: data.Records,
    *,
    train_split: str,
    heldout_split: str,
    template: str | None,
    passes: int,
    began: float | None,
) -> tuple[dict[str, Any], list[Frame]]:
    """The summary of the model of a run, and frames of one sample from noise to the last step.

    records are the run's. template is infilled three times, None not at all; began is the Unix
    time that `seconds` counts from, None leaves it out. The table has n-gram models too if the
    records are packed and have at most MOST_TOKENS of training text.
    """
    check_passes(passes)
    infilled = [] if template is None else model.infill(template, 3, seed=0, progress=True)
    states = list(model.stream(num_samples=8, seed=0, updates=PANELS - 1, progress=True))
    samples = states[-1].texts
    is_small = records.counts(train_split)["tokens"] <= MOST_TOKENS
    has_ngrams = records.fingerprint["form"] == "packed" and is_small
    train = (records, train_split) if has_ngrams else None
    heldout = evaluate_split(
        model, records, heldout_split, passes=passes, train=train, progress=True
    )
    per_character = heldout["bits_per_character"]
    summary = {
        "bits_per_character": {name: per_character.get(name) for name in _HEADLINE},
        "seconds": None if began is None else round(time.time() - began, 1),
        "samples": samples,
        "infill": infilled,
        "word_rate": word_rate(samples, vocabulary(records, train_split)),
        "heldout": heldout,
    }
    return summary, Animation(states).frames()


def write_report(workdir: Path, summary: dict[str, Any], frames: Sequence[Frame]) -> None:
    """Writes what `make_report` returned as summary.json, curve.json and picture.png of the run in
    workdir."""
    write_json(workdir / runs.SUMMARY, summary)
    if summary["heldout"]["curve"] is not None:
        runs.keep_curve(workdir, summary["heldout"])
    metrics = runs.read_metrics(workdir)
    draw_picture(workdir / runs.PICTURE, metrics, summary["heldout"], frames)


def word_rate(texts: list[str], known_words: set[str]) -> float:
    """Fraction of the words of three letters or more in texts that are known.

    The first and the last word of a text are left out: a block's edges cut them.
    """
    words = [word for text in texts for word in _words(text)[1:-1]]
    return sum(word in known_words for word in words) / max(len(words), 1)


def vocabulary(records: data.Records, split: str) -> set[str]:
    """The words of three letters or more in the text of a split, or its first MOST_TOKENS."""
    words: set[str] = set()
    count = 0
    for part in read_parts(records, split):
        words.update(_words(records.tokenizer.decode(stream_of(part)))[1:-1])
        count += part.tokens.size
        if count >= MOST_TOKENS:
            break
    return words


def _words(text: str) -> list[str]:
    return re.findall(r"[A-Za-z]{3,}", text)


def draw_picture(
    path: Path, metrics: list[dict[str, Any]], result: dict[str, Any], frames: Sequence[Frame]
) -> None:
    """Loss curve and one sample's denoising, as PNG; needs matplotlib (the [plot] extra)."""
    from matplotlib.figure import Figure  # not pyplot, which would open a window

    figure = Figure(figsize=(13, 9), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[3, 2])
    _draw_curve(above.subplots(), metrics, result)
    below.suptitle("one sample, from noise to text (red: new)", fontsize=10)
    _draw_denoising(below.subplots(2, 3).ravel(), frames)
    figure.savefig(path, dpi=110)


def _draw_curve(axes, metrics: list[dict[str, Any]], result: dict[str, Any]) -> None:
    """Training loss and held-out bound by step, beside the n-gram models, bits per character.

    Bars are standard errors. Each line is named at its right end.
    """
    bits = result["bits_per_character"]
    bits_per_nat = result["tokens"] / result["characters"] / np.log(2.0)  # of nats per token
    ends = []  # (height, name, colour) of each line's right end
    heights = []  # that the axis shows
    for kind, name, label, color, style in (
        ("train", "nats_per_token", "training loss", "#7f9fc4", {"linewidth": 1.2}),
        ("heldout", "bound", "held-out bound", "#1f4e8c", {"marker": "o", "capsize": 3}),
    ):
        rows = list({row["step"]: row for row in metrics if row["kind"] == kind}.values())
        # A window in which every step was skipped has None: a gap in the curve.
        values = bits_per_nat * np.array([row[name] for row in rows], float)
        errors = bits_per_nat * np.array([row.get(f"{name}_standard_error") or 0 for row in rows])
        axes.errorbar([row["step"] for row in rows], values, errors, color=color, **style)
        finite = values[np.isfinite(values)]
        if finite.size:
            ends.append((finite[-1], label, color))
            heights += [finite.min(), np.quantile(finite, 0.9)]  # the loss begins far above
    if "bound" in bits:  # of all blocks, where training scores some
        error = bits["bound_standard_error"] or 0.0
        style = {"fmt": "D", "mfc": "white", "capsize": 3, "color": "#1f4e8c"}
        axes.errorbar([result["step"]], [bits["bound"]], [error], **style)
        spread = f"±{error:.3f}" if error else ""
        label = f"held out, all blocks: {bits['bound']:.3f}{spread}"
        ends.append((bits["bound"], label, "#1f4e8c"))
    for name, color in (("unigram", "#8a8a8a"), ("bigram", "#c26a12")):
        if name in bits:
            axes.axhline(bits[name], color=color, linestyle="--", linewidth=1)
            ends.append((bits[name], f"{name}: {bits[name]:.3f}", color))
    heights += [height for height, *_ in ends]
    if heights:
        margin = 0.06 * (max(heights) - min(heights)) or 0.1
        axes.set_ylim(min(heights) - margin, max(heights) + margin)
    axes.set(xlabel="step", ylabel="bits per character")
    axes.margins(x=0.02)
    axes.spines[["top", "right"]].set_visible(False)
    _name_lines(axes, ends)


def _name_lines(axes, ends: list[tuple[float, str, str]]) -> None:
    """Writes (height, name, colour) right of the axes, no two names over each other."""
    low, high = axes.get_ylim()
    gap = 0.055 * (high - low)  # the height of a name
    previous = -np.inf
    for height, name, color in sorted(ends):
        previous = max(height, previous + gap)
        axes.annotate(
            name,
            (1.0, height),
            (1.03, previous),
            xycoords=axes.get_yaxis_transform(),
            textcoords=axes.get_yaxis_transform(),
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.6, "relpos": (0, 0.5)},
            annotation_clip=False,
            color=color,
            va="center",
        )


def _draw_denoising(panels, frames: Sequence[Frame]) -> None:
    """A panel a frame, from noise to text, with what it shows in its title."""
    rows = min(max(len(frame.lines) for frame in frames), MAX_LINES)
    for axes in panels:
        axes.set(xlim=(-1, COLUMNS), ylim=(rows - 0.4, -0.8), xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    for axes, frame in zip(panels, frames, strict=False):
        axes.set_title(frame.caption, fontsize=9, loc="left", color="#555555")
        for y, line in enumerate(frame.lines[:rows]):
            x = 0
            for cell in line:
                glyph = "·" if cell.kind == "masked" else cell.character
                style = {"color": COLORS[cell.kind], "family": "monospace", "fontsize": 7}
                axes.text(x, y, glyph, ha="center", va="center", **style)
                x += columns_of(cell.character)
