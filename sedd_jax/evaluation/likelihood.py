"""A split's blocks under SEDD's bound, and under GPT-2 and n-gram models to compare it with.

Every result holds the same units, so that two of them can stand in one table.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import scipy.sparse

from sedd_jax import data
from sedd_jax.console import activity, wrapped
from sedd_jax.diffusion.grids import GRIDS
from sedd_jax.evaluation.scorer import Scorer
from sedd_jax.evaluation.tables import with_error
from sedd_jax.evaluation.values import write_values
from sedd_jax.inference import bounds
from sedd_jax.inference.curve import Curve, prices
from sedd_jax.inference.model import SEDD

ROWS = {
    "bound": "{model}, bound",
    "normalised": "{model}, normalised bound",
    "paper_protocol": "the paper's, no boundary terms",
    "gpt2": "GPT-2",
    "bigram": "interpolated bigram, same text",
    "unigram": "unigram, same text",
}
EXACT = {"bound": "{model}, exact likelihood"}  # of a model whose bound is -log p itself
CALLS = (8, 16, 32, 64, 128)  # network calls a sample whose price is printed


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
    values_file: Path | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """The bound on a split's blocks (the first `blocks`, or all) in every unit.

    train, records and split, adds n-gram models fitted on that. With target_standard_error, nats
    per token, the result says whether it was reached within max_passes. Of absorbing noise it has
    the curve of cross entropy by mask share and, by grid, the price of few network calls in nats
    per token. values_file gets the bound of each document and token: evaluation/values.py.
    ValueError if the records are not the model's kind.
    """
    check_records(model, records)
    heldout = data.read_blocks(records, split, blocks)
    with activity("counting n-grams", progress and train is not None):
        ngrams = {} if train is None else _ngram_nats(*train, heldout)  # refuses before the bound
    total = model.bound(
        heldout,
        passes=passes,
        batch_size=batch_size,
        seed=seed,
        target_standard_error=target_standard_error,
        max_passes=max_passes,
        by_token=values_file is not None,
        progress=progress,
    )
    if values_file is not None:
        write_values(values_file, heldout, total.by_token, records.tokenizer)
    with activity("counting, and pricing few calls", progress):
        sizes = _sizes(records, split, heldout)
        price = price_of_calls(model, total.curve, CALLS)
    values = bounds.in_units({**total.sums, **ngrams}, **sizes)
    target = {}
    if target_standard_error is not None:
        error = values["nats_per_token"]["bound_standard_error"]
        target = {
            "target_standard_error": target_standard_error,
            "target_reached": error <= target_standard_error,
        }
    return {
        "model": model.objective.title,
        "step": model.step,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(model.params)),
        "split": split,
        "blocks": len(heldout.tokens),
        **sizes,
        "passes": total.passes,
        "is_exact": model.objective.is_causal,
        **target,
        "seed": seed,
        "data": _provenance(records, split),
        **values,
        "curve": None if total.curve is None else total.curve.to_dict(),
        "price_of_calls": price,
    }


def price_of_calls(
    model: SEDD, curve: Curve | None, calls: Iterable[int]
) -> dict[str, dict[str, float]] | None:
    """{calls: {grid: nats per token}}: what few network calls cost at most, above the bound."""
    if curve is None:
        return None
    return {
        str(count): prices(curve, count, model.sampling.t_min, model.schedule, GRIDS)
        for count in calls
    }


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

    Each block by itself, no sliding window; its first token is a condition and not scored.
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
    fraction = int(is_scored.sum()) / scored.count
    sizes = {name: round(size * fraction) for name, size in _sizes(records, split, scored).items()}
    total = float(nats[is_scored].sum(dtype=np.float64))
    return {
        "scorer": scorer.name,
        "dtype": np.dtype(scorer.network.dtype).name,
        "split": split,
        "blocks": len(scored.tokens),
        **sizes,
        "data": _provenance(records, split),
        **bounds.in_units({"gpt2": total}, **sizes),
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


def _sizes(records: data.Records, split: str, blocks: data.Blocks) -> dict[str, Any]:
    """{"tokens", "characters", "words"} of the blocks.

    Words are those of the published text, white space between them, and one for the end of each
    document, as word-level tables count; the blocks have them in proportion to their tokens.
    """
    counts = records.counts(split)
    words = counts["words"] + counts["documents"]
    return {
        "tokens": blocks.count,
        "characters": records.tokenizer.count_characters(stream_of(blocks)),
        "words": blocks.count * words / counts["tokens"],
    }


def _provenance(records: data.Records, split: str) -> dict[str, Any]:
    """What was scored, for whoever compares two numbers."""
    keys = ("source", "tokenizer", "length", "form")
    provenance = {key: records.fingerprint[key] for key in keys}
    return {**provenance, "sha256": records.counts(split)["sha256"]}


def likelihood_table(result: dict[str, Any]) -> str:
    """The numbers of a split as aligned text; a bound carries its standard error."""
    bits, nats = result["bits_per_character"], result["nats_per_token"]
    perplexity, per_word = result["perplexity_per_token"], result["perplexity_per_word"]
    source = result["data"]["source"]["corpus"]
    is_exact = result.get("is_exact", False)
    has_levels = "passes" in result and not is_exact
    levels = f"; {result['passes']} noise levels a block" if has_levels else ""
    about = (
        f"{source} {result['split']}: {result['blocks']} blocks, {result['tokens']:,} tokens, "
        f"{result['characters']:,} characters, {result['words']:,.0f} words{levels}"
    )
    lines = [
        *wrapped(about),
        f"{'':33}{'bits/char':>13}{'nats/token':>13}{'PPL/token':>10}{'PPL/word':>11}",
    ]
    for key, name in (ROWS | (EXACT if is_exact else {})).items():
        if bits.get(key) is None:
            continue
        cells = []
        for unit in (bits, nats):
            error = None if is_exact else unit.get(f"{key}_standard_error")
            cells.append(with_error(unit[key], error, 3))
        exponentials = f"{perplexity[key]:>10.2f}{per_word[key]:>11.4g}"
        name = name.format(model=result.get("model"))
        lines.append(f"{name:33}{cells[0]:>13}{cells[1]:>13}{exponentials}")
    if "diffusion" not in bits or is_exact:
        return "\n".join(lines)
    parts = ", ".join(f"{part} {bits[part]:.4f}" for part in ("diffusion", "tail", "prior"))
    lines.append(f"the bound's parts, bits/character: {parts}")
    lines += price_table(result.get("price_of_calls"))
    if not result.get("target_reached", True):
        lines += wrapped(
            f"target {result['target_standard_error']:g} nats/token not reached: "
            f"{nats['bound_standard_error']:.3g} after {result['passes']} noise levels a block; "
            "raise --max_passes"
        )
    return "\n".join(lines)


def price_table(prices: dict[str, dict[str, float]] | None) -> list[str]:
    """What `price_of_calls` returned as lines of aligned text; none of None."""
    if prices is None:
        return []
    lines = [f"{'price of so few network calls':34}" + "".join(f"{calls:>9}" for calls in prices)]
    for grid in next(iter(prices.values())):
        name = f"nats/token, grid {grid}"
        lines.append(f"{name:34}" + "".join(f"{paid[grid]:>9.4f}" for paid in prices.values()))
    return lines


def stream_of(blocks: data.Blocks) -> np.ndarray:
    """The tokens of the blocks one after the other, int32 [tokens], without padding."""
    return blocks.tokens[... if blocks.is_token is None else blocks.is_token].reshape(-1)


def read_parts(records: data.Records, split: str) -> Iterator[data.Blocks]:
    """The split's blocks, 1024 at a time: memory does not hold the corpus."""
    source = records.source(split)
    for start in range(0, len(source), 1024):
        rows = [records.parse(source[i]) for i in range(start, min(start + 1024, len(source)))]
        yield records.blocks(np.stack(rows))


# --- n-gram models


def _ngram_nats(records: data.Records, split: str, heldout: data.Blocks) -> dict[str, float]:
    """-log p of the held-out blocks under n-gram models of the split, nats."""
    if heldout.is_token is not None:
        raise ValueError("n-gram models need packed records; leave --baselines out")
    parts = (part.tokens for part in read_parts(records, split))
    bigram = Bigram(parts, records.tokenizer.vocab_size)
    return {
        "unigram": bigram.unigram_nats(heldout.tokens),
        "bigram": bigram.bigram_nats(heldout.tokens),
    }


class Bigram:
    """Unigram and interpolated bigram models of blocks, int [..., L] a part, fitted by counting.

    The unigram adds one to every count. The bigram mixes in the unigram by Witten and Bell's rule
    (1991): p(y | x) = (count(x, y) + kinds(x) unigram(y)) / (count(x) + kinds(x)), kinds(x) the
    number of different tokens seen after x.
    """

    def __init__(self, parts: Iterable[np.ndarray], vocab_size: int):
        singles = np.ones(vocab_size)
        shape = vocab_size, vocab_size
        self.counts = scipy.sparse.csr_array(shape, dtype=np.int64)  # of (x, y): y came after x
        for part in parts:
            singles += np.bincount(part.ravel(), minlength=vocab_size)
            x, y = part[..., :-1].ravel(), part[..., 1:].ravel()
            self.counts += scipy.sparse.csr_array((np.ones_like(x, np.int64), (x, y)), shape)
        self.unigram = singles / singles.sum()
        self.totals = self.counts.sum(axis=1)
        self.kinds = np.diff(self.counts.indptr)

    def unigram_nats(self, blocks: np.ndarray) -> float:
        """-log p of int32 [N, L] under the unigram, summed."""
        return float(-np.log(self.unigram[blocks]).sum())

    def bigram_nats(self, blocks: np.ndarray) -> float:
        """-log p of int32 [N, L] under the bigram, summed; a block starts with the unigram."""
        x, y = blocks[:, :-1], blocks[:, 1:]
        count = np.asarray(self.counts[x.ravel(), y.ravel()]).reshape(x.shape)
        kinds = np.maximum(self.kinds[x], 1)  # a token that never came first: the unigram
        probability = (count + kinds * self.unigram[y]) / (self.totals[x] + kinds)
        return float(-np.log(self.unigram[blocks[:, 0]]).sum() - np.log(probability).sum())
