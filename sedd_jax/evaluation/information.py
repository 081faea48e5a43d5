"""Entropy, divergence and mutual information of models over texts, with their errors.

The texts stand for the distribution that the measures are of: samples of the model for the model's,
a corpus for the corpus's, as far as the model has learnt its scores.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sedd_jax.data import Blocks
from sedd_jax.diffusion import information
from sedd_jax.diffusion.draws import make_key
from sedd_jax.diffusion.likelihood import check_passes
from sedd_jax.diffusion.scores import NotFiniteError
from sedd_jax.evaluation.statistics import mean_and_error, ratio_and_error
from sedd_jax.evaluation.tables import with_error
from sedd_jax.inference import bounds
from sedd_jax.inference.batches import check_blocks
from sedd_jax.inference.model import SEDD
from sedd_jax.inference.sampling import check_whole
from sedd_jax.models.head import make_score_fn

T_MIN = 1e-3  # of a model whose objective has no such time


def information_measures(
    model: SEDD,
    blocks: Blocks,
    *,
    against: SEDD | None = None,
    first: int | None = None,
    passes: int = 16,
    batch_size: int = 4,
    seed: int = 0,
    progress: bool = False,
) -> dict[str, Any]:
    """Measures of the texts in blocks, by the model's scores, in nats: the entropy, and with

    against: the KL divergence of the model's distribution from that of another model.
    first: the mutual information of a text's first tokens, so many, and the others.

    A measure is {"nats_per_text", "nats_per_token"} and the standard error of each, over texts and
    noise. Each takes passes network calls a text (twice as many for a divergence, three times for
    the mutual information), and the last two tables of batch_size * length * vocabulary numbers;
    all do with uniform noise and a network that predicts clean tokens. ValueError, before any
    work, for a model without scores, two that cannot be compared, or texts that do not fit.
    """
    check(model, against, first, passes)
    check_whole("seed", seed, 0, 2**32 - 1)
    for one in (model, against):
        if one is not None:
            check_blocks(blocks, one.graph.vocab_size, one.length)
    if first is not None:
        _check_first(first, blocks.tokens.shape[1], "the texts' length")
    measures = {"entropy": (model,)}
    if against is not None:
        measures["divergence"] = (model, against)
    if first is not None:
        measures["mutual_information"] = (model,)
    counts = _counts(blocks)
    how = {"passes": passes, "batch_size": batch_size, "seed": seed, "progress": progress}
    results = {}
    for name, models in measures.items():
        nats = _divergences(name, models, blocks, first=first, **how)
        if name == "entropy":
            nats = counts * math.log(model.graph.vocab_size) - nats
        results[name] = _with_errors(nats, counts)
    return {
        "model": model.objective.title,
        "texts": len(counts),
        "tokens": int(counts.sum()),
        "passes": passes,
        "seed": seed,
        "t_min": _t_min(model),
        "first": first,
        **results,
    }


def check(model: SEDD, against: SEDD | None, first: int | None, passes: int) -> None:
    """ValueError for what `information_measures` cannot measure."""
    check_passes(passes)
    for one in (model, against):
        if one is not None and not one.objective.has_scores:
            raise ValueError(
                f"a model of {one.objective.title} has no scores of noised tokens, which "
                "information is measured from; take a model of SEDD, D3PM or normalised scores"
            )
    if against is not None:
        ours, theirs = model.tokenizer, against.tokenizer
        if ours.fingerprint() != theirs.fingerprint():
            raise ValueError(
                f"the two models have tokenizers {ours.name!r} ({ours.fingerprint()[:12]}) and "
                f"{theirs.name!r} ({theirs.fingerprint()[:12]}); compare models of one tokenizer"
            )
        if type(model.graph) is not type(against.graph):
            raise ValueError(
                f"the two models have noise {model.graph} and {against.graph}; compare models of "
                "one graph"
            )
    if first is not None:
        _check_first(first, model.length, "the model's length")
        model.graph.hidden(jnp.zeros((1, 1), jnp.int32), True)


def _check_first(first: int, length: int, of: str) -> None:
    if not isinstance(first, int) or not 1 <= first < length:
        raise ValueError(
            f"first {first} is not in [1, {length}), {of}; choose how many tokens the first part "
            "has"
        )


def _t_min(model: SEDD) -> float:
    return T_MIN if model.objective.t_min is None else model.objective.t_min


def _counts(blocks: Blocks) -> np.ndarray:
    """Tokens of each text, int64 [N]."""
    if blocks.is_token is None:
        return np.full(len(blocks.tokens), blocks.tokens.shape[1])
    return blocks.is_token.sum(axis=1)


def _with_errors(nats: np.ndarray, counts: np.ndarray) -> dict[str, float | None]:
    """The mean of nats [N] over texts and over their tokens, with standard errors over texts."""
    (per_text, text_error), (per_token, token_error) = (
        mean_and_error(nats),
        ratio_and_error(nats, counts),
    )
    return {
        "nats_per_text": per_text,
        "nats_per_text_standard_error": text_error,
        "nats_per_token": per_token,
        "nats_per_token_standard_error": token_error,
    }


@functools.partial(
    jax.jit, static_argnames=("networks", "graphs", "schedule", "measure", "passes", "t_min")
)
def _estimates(
    params, key, blocks, index, first, *, networks, graphs, schedule, measure, passes, t_min
):
    """float32 [B, passes]; see `information.divergence`."""
    graph, is_token = graphs[0], blocks.is_token
    score_fns = [
        make_score_fn(network, p, graph, is_token=is_token)
        for network, p, graph in zip(networks, params, graphs, strict=True)
    ]
    compare = {
        "entropy": lambda: information.from_uniform(*score_fns, graph),
        "divergence": lambda: information.between(*score_fns, graph),
        "mutual_information": lambda: information.from_parts(
            *score_fns, graph, jnp.arange(blocks.tokens.shape[1]) < first
        ),
    }[measure]()
    args = (key, blocks.tokens, index, compare, graph, schedule)
    return information.divergence(*args, passes=passes, t_min=t_min, is_token=is_token)


def _divergences(
    measure: str,
    models: tuple[SEDD, ...],
    blocks: Blocks,
    *,
    first: int | None,
    passes: int,
    batch_size: int,
    seed: int,
    progress: bool,
) -> np.ndarray:
    """The mean over passes of `_estimates` for each text, float64 [N]."""
    model, key = models[0], make_key(seed)

    def of_batch(blocks, index):
        return _estimates(
            tuple(one.params for one in models),
            key,
            blocks,
            index,
            np.int32(first or 0),
            networks=tuple(one.network for one in models),
            graphs=tuple(one.graph for one in models),
            schedule=model.schedule,
            measure=measure,
            passes=passes,
            t_min=_t_min(model),
        )

    how = {"name": measure.replace("_", " "), "progress": progress}
    results = []
    for rows, values in bounds.over_batches(
        of_batch, model.params, blocks, batch_size, model.mesh, **how
    ):
        if not np.isfinite(values).all():
            wrong = ~np.isfinite(values).all(axis=1)
            raise NotFiniteError(f"on text {rows[wrong][0]}")
        results.append(values.astype(np.float64).mean(axis=1))
    return bounds.joined(results, len(blocks.tokens))


NAMES = {
    "entropy": "entropy",
    "divergence": "KL divergence from the other model",
    "mutual_information": "mutual information, first {first} | rest",
}


def describe(result: dict[str, Any]) -> str:
    """The measures as aligned text."""
    size = f"{result['texts']} texts, {result['tokens']:,} tokens"
    lines = [
        f"{result['source']}: {size}; {result['passes']} noise levels a text",
        f"{'':38}{'nats/token':>20}{'nats/text':>20}",
    ]
    for key, name in NAMES.items():
        if key not in result:
            continue
        cells = [
            with_error(result[key][unit], result[key][f"{unit}_standard_error"], 4)
            for unit in ("nats_per_token", "nats_per_text")
        ]
        lines.append(f"{name.format_map(result):38}{cells[0]:>20}{cells[1]:>20}")
    return "\n".join(lines)
