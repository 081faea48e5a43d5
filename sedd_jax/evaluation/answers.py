"""The bound on -log p(answer | prompt) over lines of prompts and answers, in every unit."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sedd_jax.diffusion.likelihood import bits_per_character, perplexity, perplexity_error
from sedd_jax.evaluation.choices import AT_ONCE, check_scorable, encoded_pair, pair_bounds
from sedd_jax.evaluation.statistics import mean_and_error, ratio_and_error
from sedd_jax.evaluation.tables import of_any_size, with_error
from sedd_jax.evaluation.tasks import DELIMITER, check_spaces, check_text, read_rows
from sedd_jax.host.console import progress_bar
from sedd_jax.inference.bounds import check_noise
from sedd_jax.inference.model import SEDD
from sedd_jax.parallel import processes

REMEDY = 'write {"prompt": "...", "answer": "..."} a line'


class Answer(NamedTuple):
    """A text after a prompt."""

    prompt: str
    answer: str
    where: str  # FILE:LINE


def read_answers(file: Path) -> list[Answer]:
    """The lines {"prompt", "answer"} of a file; ValueError with the line for others."""
    if not file.is_file():
        raise ValueError(f"no file at {str(file)!r}; {REMEDY} of a .jsonl file")
    answers = []
    for line, row in read_rows(file):
        where = f"{file}:{line}"
        for name in ("prompt", "answer"):
            if name not in row:
                raise ValueError(f"{where}: no {name!r}; {REMEDY}")
            try:
                check_text(name, row[name])
            except ValueError as error:
                raise ValueError(f"{where}: {error}; {REMEDY}") from error
        if not row["answer"]:
            raise ValueError(f"{where}: the answer is empty; {REMEDY}")
        answers.append(Answer(row["prompt"], row["answer"], where))
    if not answers:
        raise ValueError(f"{str(file)!r} holds no line; {REMEDY}")
    return answers


def evaluate_answers(
    model: SEDD,
    answers: list[Answer],
    *,
    delimiter: str = DELIMITER,
    passes: int = 16,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool = False,
) -> dict[str, Any]:
    """The bound on each answer given its prompt and their means, with standard errors over answers.

    Characters are the answer's, without the delimiter before it, which is scored with it.
    ValueError, before any is scored, for an answer that the model cannot score.
    """
    check_noise(passes, batch_size, seed)
    check_scorable(model)
    if not answers:
        raise ValueError("there is no answer to score; give at least one")
    pairs = []
    for prompt, answer, where in answers:
        try:
            check_spaces(prompt, answer, delimiter)
            pairs.append(encoded_pair(model, prompt, delimiter + answer))
        except ValueError as error:
            raise ValueError(f"{where}: {error}; or leave the line out") from error
    rows: list[dict[str, Any]] = []
    how = {"passes": passes, "batch_size": batch_size, "seed": seed}
    with progress_bar(
        total=len(pairs), desc="answers", unit="answer", is_shown=processes.shows(progress)
    ) as bar:
        for start in range(0, len(pairs), AT_ONCE * batch_size):
            part = pairs[start : start + AT_ONCE * batch_size]
            index = range(start, start + len(part))
            bound = pair_bounds(model, part, index, **how)
            for i, pair, nats, error in zip(index, part, bound.total, bound.standard_error):
                row = {"where": answers[i].where, "tokens": len(pair.text)}
                row |= {"characters": len(answers[i].answer), "nats": float(nats)}
                rows.append({**row, "standard_error": float(error), "is_cut": pair.is_cut})
            bar.update(len(part))
    return {
        "model": model.objective.title,
        "step": model.step,
        "is_exact": model.objective.is_causal,
        "passes": passes,
        "seed": seed,
        "delimiter": delimiter,
        **_means(rows),
        "rows": rows,
    }


def _means(rows: list[dict[str, Any]]) -> dict[str, Any]:
    nats, tokens, characters, errors = (
        np.array([row[name] for row in rows])
        for name in ("nats", "tokens", "characters", "standard_error")
    )
    values = {
        "nats_per_answer": mean_and_error(nats),
        "nats_per_token": ratio_and_error(nats, tokens),
        "bits_per_character": ratio_and_error(
            [bits_per_character(one, 1) for one in nats], characters
        ),
    }
    return {
        "answers": len(rows),
        "tokens": int(tokens.sum()),
        "cut_prompts": sum(row["is_cut"] for row in rows),
        "perplexity_per_token": perplexity(values["nats_per_token"][0]),
        **{name: value for name, (value, _) in values.items()},
        **{f"{name}_standard_error": error for name, (_, error) in values.items()},
        "perplexity_per_token_standard_error": perplexity_error(*values["nats_per_token"]),
        # Of nats_per_answer, from the noise drawn alone: part of its standard error.
        "noise_standard_error": float(np.sqrt((errors**2).sum()) / len(rows)),
    }


def answers_table(result: dict[str, Any]) -> str:
    """A result of evaluate_answers as text."""
    kind = "exact likelihood" if result["is_exact"] else f"bound, {result['passes']} passes"
    size = f"{result['answers']} answers, {result['tokens']:,} tokens"
    lines = [f"{result['model']}: {kind}, seed {result['seed']}; {size}"]
    if result["cut_prompts"]:
        lines.append(f"{result['cut_prompts']} prompts lost their beginning: too long")
    for name in ("nats_per_answer", "nats_per_token", "bits_per_character"):
        value = with_error(result[name], result[f"{name}_standard_error"], 3)
        lines.append(f"{name.replace('_', ' '):24}{value:>20}")
    perplexities = [result[f"perplexity_per_token{end}"] for end in ("", "_standard_error")]
    lines.append(f"{'perplexity per token':24}{of_any_size(*perplexities):>20}")
    if not result["is_exact"]:
        noise = result["noise_standard_error"]
        lines.append(f"of nats per answer's error, the noise drawn alone: {noise:.3f}")
    return "\n".join(lines)
