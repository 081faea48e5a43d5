"""A split's blocks under SEDD's bound, and under GPT-2 and n-gram models to compare it with.

Every result holds the same units, so that two of them can stand in one table.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sedd_jax import data
from sedd_jax.diffusion.grids import GRIDS
from sedd_jax.diffusion.likelihood import bits_per_character
from sedd_jax.evaluation.ngrams import baseline_nats
from sedd_jax.evaluation.scorer import Scorer
from sedd_jax.evaluation.statistics import ratio_and_error
from sedd_jax.evaluation.tables import Group, aligned, column, of_any_size, with_error
from sedd_jax.evaluation.values import group_starts, write_values
from sedd_jax.host.console import activity, wrapped
from sedd_jax.inference import bounds
from sedd_jax.inference.curve import Curve, prices
from sedd_jax.inference.model import SEDD
from sedd_jax.parallel import processes

FEW_GROUPS = 10  # of documents: an error from fewer is itself known within a quarter at best
ROWS = {
    "bound": "{model}, bound",
    "normalised": "{model}, normalised bound",
    "paper_protocol": "the paper's, no boundary terms",
    "gpt2": "GPT-2",
    "bigram": "interpolated bigram, same text",
    "unigram": "unigram, same text",
}
EXACT = {"bound": "{model}, exact likelihood"}  # of a model whose bound is -log p itself
UNITS = {
    "bits_per_character": "bits/char",
    "nats_per_token": "nats/token",
    "perplexity_per_token": "PPL/token",
    "perplexity_per_word": "PPL/word",
}
OF_DOCUMENTS = "_standard_error_over_documents"  # of a number of this name
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
    Standard errors are over the noise and, as `document_errors`, over documents. ValueError if the
    records are not the model's kind.
    """
    check_records(model, records)
    heldout = data.read_blocks(records, split, blocks)
    with activity("counting n-grams", processes.shows(progress and train is not None)):
        baselines = {} if train is None else baseline_nats(*train, heldout)  # before the bound
    total = model.bound(
        heldout,
        passes=passes,
        batch_size=batch_size,
        seed=seed,
        target_standard_error=target_standard_error,
        max_passes=max_passes,
        by_token=True,
        progress=progress,
    )
    if values_file is not None:
        write_values(values_file, heldout, total.by_token, records.tokenizer)
    with activity("counting, and pricing few calls", processes.shows(progress)):
        sizes = _sizes(records, split, heldout)
        price = price_of_calls(model, total.curve, CALLS)
        sums = {**total.sums, **{name: float(each.sum()) for name, each in baselines.items()}}
        nats = {**_by_token(total, heldout), **baselines}
        groups, values = _with_document_errors(sums, nats, heldout, records, sizes)
    return {
        "model": model.objective.title,
        "step": model.step,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(model.params)),
        "split": split,
        "blocks": len(heldout.tokens),
        "document_groups": groups,
        **sizes,
        "passes": total.passes,
        "is_exact": model.objective.is_causal,
        **_target(target_standard_error, values["nats_per_token"]["bound_standard_error"]),
        "seed": seed,
        "data": _provenance(records, split),
        **values,
        "curve": None if total.curve is None else total.curve.to_dict(),
        "price_of_calls": price,
    }


def _target(target: float | None, error: float) -> dict[str, Any]:
    """What a result says of the standard error that was asked for; nothing where none was."""
    if target is None:
        return {}
    return {"target_standard_error": target, "target_reached": error <= target}


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
    nats = np.where(is_scored, np.float64(nats), 0.0)
    nats = np.pad(nats, ((0, 0), (1, 0)))  # of the first token none
    groups, values = _with_document_errors(
        {"gpt2": float(nats.sum())}, {"gpt2": nats}, scored, records, sizes
    )
    return {
        "scorer": scorer.name,
        "dtype": scorer.dtype,
        "split": split,
        "blocks": len(scored.tokens),
        "document_groups": groups,
        **sizes,
        "data": _provenance(records, split),
        **values,
    }


def _by_token(total: bounds.CorpusBound, blocks: data.Blocks) -> dict[str, np.ndarray]:
    """What each token has of each whole number of the bound, nats [N, L].

    What a block's number has more than its bound is spread over its tokens.
    """
    is_token = np.ones(blocks.tokens.shape, bool) if blocks.is_token is None else blocks.is_token
    count = is_token.sum(axis=1)
    by_token = np.float64(total.by_token)
    more = {name: (nats - total.by_block["bound"]) / count for name, nats in total.by_block.items()}
    return {name: np.where(is_token, by_token + each[:, None], 0.0) for name, each in more.items()}


def _with_document_errors(
    sums: Mapping[str, float | None],
    nats: Mapping[str, np.ndarray],
    blocks: data.Blocks,
    records: data.Records,
    sizes: dict[str, Any],
) -> tuple[int, dict[str, dict[str, float | None]]]:
    """(groups of documents, the sums in their units with standard errors over documents).

    nats [N, L] are those of tokens, by the names of some sums. A number is a ratio of two sums over
    groups of documents (values.group_starts), and its error is that of the ratio to first order;
    None for one group. The noise of each document's estimate is in it.
    """
    starts = group_starts(blocks, records.tokenizer.separator)
    stream = stream_of(blocks)
    parts = np.split(stream, starts[1:])
    tokens = np.array([len(part) for part in parts])
    characters = np.array([records.tokenizer.count_characters(part) for part in parts])
    errors, bits_errors = {}, {}
    for name, each in nats.items():
        each = each[... if blocks.is_token is None else blocks.is_token].reshape(-1)
        of_group = np.add.reduceat(each, starts)
        _, error = ratio_and_error(of_group, tokens * (sizes["tokens"] / tokens.sum()))
        errors[name + OF_DOCUMENTS] = None if error is None else error * sizes["tokens"]
        _, bits_errors[name + OF_DOCUMENTS] = ratio_and_error(
            [bits_per_character(one, 1) for one in of_group],
            characters * (sizes["characters"] / characters.sum()),
        )
    values = bounds.in_units({**sums, **errors}, **sizes)
    values["bits_per_character"] |= bits_errors  # documents differ in characters a token as well
    return len(starts), values


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
    """The numbers of a split as aligned text, with their standard errors."""
    bits, nats = result["bits_per_character"], result["nats_per_token"]
    source = result["data"]["source"]["corpus"]
    is_exact = result.get("is_exact", False)
    has_levels = "passes" in result and not is_exact
    levels = f"; {result['passes']} noise levels a block" if has_levels else ""
    about = (
        f"{source} {result['split']}: {result['blocks']} blocks, {result['tokens']:,} tokens, "
        f"{result['characters']:,} characters, {result['words']:,.0f} words{levels}"
    )
    if result.get("document_groups", 0) > 1:
        noise = "± standard error over the noise" if has_levels else "standard error"
        groups = result["document_groups"]
        about += f"; {noise}, ±docs over {groups} groups of documents"
        about += ", so few that it is a rough guess" if groups < FEW_GROUPS else ""
    rows = {
        key: name.format(model=result.get("model"))
        for key, name in (ROWS | (EXACT if is_exact else {})).items()
        if bits.get(key) is not None
    }
    widest = max(map(len, rows.values()), default=0)
    names = ("", [column("", (name.ljust(widest) for name in rows.values()))])
    units = [_unit_columns(title, result[unit], rows, is_exact) for unit, title in UNITS.items()]
    lines = [*wrapped(about), *aligned([names, *units])]
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


def _unit_columns(
    title: str, values: dict[str, float | None], rows: Iterable[str], is_exact: bool
) -> Group:
    """A unit's column of values and, if the result has any, of their errors over documents."""

    def cell(value: float, error: float | None) -> str:
        if title == "PPL/word":
            return of_any_size(value, error)
        return with_error(value, error, 2 if title == "PPL/token" else 3)

    def over_documents(name: str) -> str:
        error = values.get(name + OF_DOCUMENTS)
        return "" if error is None else "±" + cell(error, None)

    errors = [None if is_exact else values.get(f"{name}_standard_error") for name in rows]
    columns = [column("", (cell(values[name], e) for name, e in zip(rows, errors, strict=True)))]
    documents = [over_documents(name) for name in rows]
    return title, [*columns, *([column("±docs", documents)] if any(documents) else [])]


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
