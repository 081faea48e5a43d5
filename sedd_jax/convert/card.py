"""The model card of an exported folder: what is known about the model, and nothing else."""

import json
import logging
from collections.abc import Iterable
from typing import Any

from ml_collections import ConfigDict

from sedd_jax.config import Constraint
from sedd_jax.convert.original_config import TEXT
from sedd_jax.data import Tokenizer
from sedd_jax.diffusion.objectives import OBJECTIVES
from sedd_jax.host.files import load_json
from sedd_jax.runs.workdir import SUMMARY, Workdir

log = logging.getLogger(__name__)

PAPER = "https://arxiv.org/abs/2310.16834"
_NUMBER = ("name", "value", "how")
_ABOUT = {
    **dict.fromkeys(("license", "corpus", "weights"), TEXT),
    "numbers": Constraint(
        lambda rows: isinstance(rows, list) and all(map(_is_number, rows)),
        f"list of objects with the texts {', '.join(_NUMBER)}",
    ),
}
_WEIGHTS = {"ema": "moving average (EMA)", "raw": "raw, without the moving average"}


def model_card(
    name: str,
    config: ConfigDict,
    vocab_size: int,
    tokenizer: Tokenizer | None,
    step: int | None,
    parameters: int,
    about: dict[str, Any],
) -> str:
    """README.md with its YAML front matter; name is the argument of sedd_jax.load.

    about may hold the texts "license", "corpus" and "weights", and "numbers", a list of
    {"name", "value", "how"}, all texts; what is not so is left out, with a warning.
    """
    about = _checked(about)
    sizes, schedule, weights = config.model, config.schedule, about.get("weights")
    corpus = about.get("corpus") or config.data.corpus
    noise = f"{schedule.name}, eps {schedule.eps:g}"
    if schedule.name == "geometric":
        noise = f"geometric, {schedule.sigma_min:g} to {schedule.sigma_max:g}"
    elif schedule.name != "log_linear":  # one of the user's own
        values = dict(schedule.get("parameters", {}).items())
        noise = ", ".join([schedule.name, *(f"{name} {value}" for name, value in values.items())])
    token_kind = config.data.tokenizer if tokenizer is None else tokenizer.name
    facts = {
        "parameters": f"{parameters:,}",
        "hidden size, blocks, heads": f"{sizes.hidden_size}, {sizes.blocks}, {sizes.heads}",
        "length": f"{config.data.length} tokens",
        "objective": config.objective.name,
        "graph": config.graph.name,
        "schedule": noise,
        "trained on": {"text": "a text of its own"}.get(corpus, corpus),
        "tokenizer": f"{token_kind}, {vocab_size} tokens",
        "step": "unknown" if step is None else f"{step:,}",
        **({"weights": _WEIGHTS.get(weights, weights)} if weights else {}),
    }
    lines = [
        f"# {_plain(name)}",
        "",
        *_introduction(config.objective.name),
        "",
        "```python",
        "import sedd_jax",
        "",
        f"model = sedd_jax.load({json.dumps(name)})",
        "print(model.sample(1, seed=0)[0])",
        "```",
        "",
        *_table(("", ""), facts.items()),
    ]
    if about.get("numbers"):
        rows = [tuple(row[key] for key in _NUMBER) for row in about["numbers"]]
        lines += ["", "## Numbers", "", *_table(("what", "value", "how it was made"), rows)]
    from huggingface_hub import ModelCard, ModelCardData

    front = ModelCardData(
        license=about.get("license") or None,
        library_name="sedd_jax",
        pipeline_tag="text-generation",
        tags=["sedd", "discrete-diffusion", "jax"],
    )
    text = "\n".join(lines)
    return str(ModelCard(f"---\n{front.to_yaml()}\n---\n\n{text}\n"))


def _introduction(objective: str) -> list[str]:
    if objective == "dwdse":
        return [
            f"A Score Entropy Discrete Diffusion (SEDD) language model ([paper]({PAPER})).",
            "The original PyTorch code's `SEDD.from_pretrained` reads this folder too.",
        ]
    title = OBJECTIVES[objective].title
    return [f"A language model of the network of SEDD ([paper]({PAPER})), its objective: {title}."]


def _checked(about: dict[str, Any]) -> dict[str, Any]:
    """The entries of about that are of their type; a warning for each other."""
    checked = {key: about[key] for key in _ABOUT if _ABOUT[key].holds(about.get(key))}
    for key, rule in _ABOUT.items():
        if key not in checked and about.get(key) is not None:
            log.warning("about.%s is left out of the card: it is not %s", key, rule.words)
    return checked


def _is_number(row: Any) -> bool:
    return isinstance(row, dict) and all(isinstance(row.get(key), str) for key in _NUMBER)


def _plain(text: Any) -> str:
    """One line that a cell of a table can hold, and UTF-8 as well."""
    line = " ".join(str(text).split()).replace("|", "\\|")
    return line.encode("utf-8", "replace").decode()


def _table(head: tuple, rows: Iterable) -> list[str]:
    lines = ["| " + " | ".join(map(_plain, cells)) + " |" for cells in (head, *rows)]
    return [lines[0], "|" + "---|" * len(head), *lines[1:]]


def facts_of_run(run: Workdir) -> dict[str, Any]:
    """What a model card says of the moving average: its corpus, and the numbers of sedd-report.

    Without the numbers, and with a warning, where summary.json is not as sedd-report writes it.
    """
    facts = {"weights": "ema", "corpus": run.config.data.corpus, "numbers": []}
    summary = run.folder / SUMMARY
    try:
        if summary.is_file():
            heldout = load_json(summary.read_bytes(), repr(str(summary)))["heldout"]
            facts["numbers"] = _numbers(heldout)
    except (OSError, ValueError, LookupError, TypeError, OverflowError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        log.warning(
            "%r is left out, it is not as sedd-report writes it (%s); run that again",
            str(summary),
            reason,
        )
    return facts


def _numbers(heldout: dict[str, Any]) -> list[dict[str, str]]:
    how = (
        f"upper bound, {heldout['passes']} noise levels a block, {heldout['blocks']} blocks of "
        f"split {heldout['split']!r}, step {heldout['step']}, seed {heldout['seed']}"
    )
    numbers = []
    for unit in ("bits_per_character", "nats_per_token"):
        value, error = (heldout[unit][key] for key in ("bound", "bound_standard_error"))
        number = {"name": unit.replace("_", " "), "value": f"{value:.3f} +- {error:.3f}"}
        numbers.append({**number, "how": how})
    return numbers
