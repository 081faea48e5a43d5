"""Accuracy on questions with several choices, by the bound on -log p(choice | prompt).

The choice with the smallest bound is the model's: of its total, or per character or byte of the
choice. A bound is an estimate with noise, so a result says how many decisions the noise leaves
open.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from sedd_jax.diffusion.likelihood import Bound
from sedd_jax.evaluation.statistics import mean_and_error
from sedd_jax.evaluation.tables import aligned, column, with_error
from sedd_jax.evaluation.tasks import Question
from sedd_jax.host.console import progress_bar, wrapped
from sedd_jax.inference.bounds import check_noise
from sedd_jax.inference.model import SEDD
from sedd_jax.parallel import processes

# What a choice's bound is divided by; lm-evaluation-harness's acc, acc_norm and acc_bytes.
SIZES = {
    "total": lambda choice: 1,
    "per_character": len,
    "per_byte": lambda choice: len(choice.encode("utf-8")),
}
AT_ONCE = 8  # batches of choices between two looks at the progress and the target


class Pair(NamedTuple):
    """A text that is scored after a prompt, as they fit into the model; int [n] tokens."""

    prompt: np.ndarray
    text: np.ndarray
    is_cut: bool = False  # whether the prompt lost its beginning


def encoded_pair(model: SEDD, prompt: str, text: str) -> Pair:
    """The pair as it is scored, by lm-evaluation-harness's conventions.

    White space that ends the prompt belongs to the text, whose first word it begins; the tokens of
    the text are those that it adds to the prompt's, or, where it changes these, its own; a
    document's end, the tokenizer's separator, stands for an empty prompt. A prompt that is too long
    loses its beginning. ValueError for a text that is too long, or has no token.
    """
    stripped = prompt.rstrip()
    text = prompt[len(stripped) :] + text
    encode, length = model.tokenizer.encode, model.length
    if stripped:
        before, whole = encode(stripped), encode(stripped + text)
        is_prefix = np.array_equal(whole[: len(before)], before)
        after = whole[len(before) :] if is_prefix else encode(text)
    else:
        before, after = np.array(model.tokenizer.separator, np.int32), encode(text)
    if not 1 <= len(after) <= length:
        raise ValueError(f"{len(after)} tokens to score, not 1 to {length}, the model's length")
    excess = max(0, len(before) + len(after) - length)
    return Pair(before[excess:], after, is_cut=excess > 0 and bool(stripped))


def pair_bounds(
    model: SEDD,
    pairs: Sequence[Pair],
    index: Sequence[int],
    *,
    passes: int,
    batch_size: int,
    seed: int,
) -> Bound:
    """The bound on -log p(text | prompt) of each, nats, the tightest that the model has; pairs of
    one index share their noise."""
    bound = model.log_likelihood(
        [pair.text for pair in pairs],
        given=[pair.prompt for pair in pairs],
        index=index,
        passes=passes,
        batch_size=batch_size,
        seed=seed,
    )
    return bound.tightest


def check_scorable(model: SEDD) -> None:
    """ValueError for a model that has no bound given a prompt."""
    if model.objective.is_continuous:
        raise ValueError(
            f"a model of {model.objective.title} bounds whole texts alone, not a text after a "
            "prompt; use a model of another objective"
        )


def evaluate_choices(
    model: SEDD,
    questions: Sequence[Question],
    *,
    passes: int = 16,
    batch_size: int = 16,
    seed: int = 0,
    target_standard_error: float | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """The accuracy on the questions, with its standard errors over them, and a row for each.

    With target_standard_error, of the accuracy, the questions are scored in a random order of the
    seed until the error is that small. ValueError, before any is scored, for a question that the
    model cannot score.
    """
    check_noise(passes, batch_size, seed)
    check_scorable(model)
    target = target_standard_error
    if target is not None and not 0.0 < target < 1.0:
        raise ValueError(
            f"target_standard_error {target} is not between 0 and 1; give that of the accuracy, as "
            "0.01"
        )
    if not questions:
        raise ValueError("there is no question to score; give at least one")
    pairs = [_pairs(model, question) for question in questions]
    order = np.arange(len(questions))
    if target is not None:
        order = np.random.default_rng(seed).permutation(order)
    rows: dict[int, dict[str, Any]] = {}
    error = math.inf
    with progress_bar(
        total=len(order), desc="choices", unit="question", is_shown=processes.shows(progress)
    ) as bar:
        for part in _parts(order, pairs, AT_ONCE * batch_size):
            flat = [pair for number in part for pair in pairs[number]]
            index = [number for number in part for _ in pairs[number]]
            how = {"passes": passes, "batch_size": batch_size, "seed": seed}
            bound = pair_bounds(model, flat, index, **how)
            rows.update(zip(part, decided([questions[number] for number in part], bound)))
            error = largest_error(list(rows.values()))
            bar.update(len(part))
            bar.set_postfix_str(f"accuracy {_accuracy(rows)['total'][0]:.3f}±{error:.3f}")
            if target is not None and error <= target:
                break
    reached = {"target_standard_error": target, "target_reached": target and error <= target}
    return {
        "model": model.objective.title,
        "step": model.step,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(model.params)),
        "is_exact": model.objective.is_causal,
        "questions": len(questions),
        "cut_prompts": sum(any(pair.is_cut for pair in pairs[number]) for number in rows),
        "passes": passes,
        "seed": seed,
        **({} if target is None else reached),
        **_summary(rows),
    }


def _summary(rows: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """What the rows, by the numbers of their questions, say together."""
    accuracy = _accuracy(rows)
    return {
        "scored": len(rows),
        "accuracy": {name: mean for name, (mean, _) in accuracy.items()},
        "standard_error": {name: error for name, (_, error) in accuracy.items()},
        "open": {name: sum(row["is_open"][name] for row in rows.values()) for name in SIZES},
        "chance": float(np.mean([1.0 / len(row["nats"]) for row in rows.values()])),
        "rows": [rows[number] for number in sorted(rows)],
    }


def _pairs(model: SEDD, question: Question) -> list[Pair]:
    try:
        pairs = zip(question.prompts, question.texts, strict=True)
        return [encoded_pair(model, prompt, text) for prompt, text in pairs]
    except ValueError as error:
        raise ValueError(f"{question.where}: {error}; leave the question out") from error


def _parts(order: np.ndarray, pairs: Sequence[Sequence[Pair]], size: int) -> Iterator[list[int]]:
    """The questions in this order, as many at once as have `size` choices."""
    part: list[int] = []
    count = 0
    for number in order:
        part.append(int(number))
        count += len(pairs[number])
        if count >= size:
            yield part
            part, count = [], 0
    if part:
        yield part


def decided(questions: Sequence[Question], bound: Bound) -> list[dict[str, Any]]:
    """A row for each question: bounds, choices, and whether the noise leaves these open.

    bound is that of all choices, those of the first question first. A choice is open if another is
    within two standard errors of it, those of their difference, in which shared noise cancels.
    """
    starts = np.cumsum([0, *(len(question.texts) for question in questions)])
    owner = np.repeat(np.arange(len(questions)), np.diff(starts))
    nats, error = np.float64(bound.total), np.float64(bound.standard_error)
    chosen, is_open = {}, {}
    for name, size in SIZES.items():
        sizes = np.array([size(c) for question in questions for c in question.choices], np.float32)
        each = np.split(nats / sizes, starts[1:-1])
        chosen[name] = np.array([cost.argmin() for cost in each])
        best = (starts[:-1] + chosen[name])[owner]
        scaled = jax.tree.map(lambda values, sizes=sizes: (values.T / sizes).T, bound)
        apart = scaled.minus(jax.tree.map(lambda values, best=best: values[best], scaled))
        is_near = np.asarray(apart.total < 2.0 * apart.standard_error)
        is_open[name] = np.logical_or.reduceat(is_near, starts[:-1])
    return [
        {
            "where": question.where,
            "label": question.label,
            "nats": nats[begin:end].tolist(),
            "standard_error": error[begin:end].tolist(),
            "chosen": {name: int(chosen[name][i]) for name in SIZES},
            "is_open": {name: bool(is_open[name][i]) for name in SIZES},
        }
        for i, (question, begin, end) in enumerate(zip(questions, starts, starts[1:]))
    ]


def _accuracy(rows: dict[int, dict[str, Any]]) -> dict[str, tuple[float, float | None]]:
    """{how: (accuracy, standard error)}."""
    return {
        name: mean_and_error([row["chosen"][name] == row["label"] for row in rows.values()])
        for name in SIZES
    }


def largest_error(rows: Sequence[dict[str, Any]]) -> float:
    """The largest standard error of the accuracies, for a decision to stop.

    Of few questions that were all answered rightly the sample's error is 0; so it is at least that
    of Agresti and Coull 1998, with 2 right and 2 wrong answers added.
    """
    count, errors = len(rows), []
    for name in SIZES:
        right = [row["chosen"][name] == row["label"] for row in rows]
        share = (sum(right) + 2) / (count + 4)
        errors += [math.sqrt(share * (1.0 - share) / (count + 4)), mean_and_error(right)[1] or 0.0]
    return max(errors)


def choices_table(result: dict[str, Any]) -> str:
    """A result of evaluate_choices as text."""
    scored, exact = result["scored"], result["is_exact"]
    kind = "exact likelihood" if exact else f"bound, {result['passes']} passes"
    step = "" if result["step"] is None else f" at step {result['step']}"
    about = (
        f"{result['model']}{step}: {kind}, seed {result['seed']}; {scored} of "
        f"{result['questions']} questions, chance {result['chance']:.3f}"
    )
    if "target_reached" in result:
        reached = "is reached" if result["target_reached"] else "takes more questions"
        about += f"; standard error {result['target_standard_error']:g} {reached}"
    lines = wrapped(about)
    if result["cut_prompts"]:
        lines += wrapped(
            f"{result['cut_prompts']} questions lost the beginning of a prompt, which is longer "
            "than the model"
        )
    accuracy, error = result["accuracy"], result["standard_error"]
    columns = [
        column("", (name.replace("_", " ") for name in SIZES)),
        column("accuracy", (with_error(accuracy[name], error[name], 3) for name in SIZES)),
        column("left open by the noise", (str(result["open"][name]) for name in SIZES)),
    ]
    return "\n".join([*lines, *aligned([("", columns)])[1:]])
