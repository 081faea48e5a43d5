"""The model card of an exported folder: what is known about the model, and nothing else."""

import json
import math
from typing import Any

import yaml
from ml_collections import ConfigDict

from sedd_jax.data import Tokenizer

PAPER = "https://arxiv.org/abs/2310.16834"
_NUMBER = ("name", "value", "how")
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
    """README.md with its YAML front matter; name is what sedd_jax.load is to be given.

    about, which `check_about` has passed, may hold "license", "corpus", "weights" and "numbers".
    """
    sizes, corpus = config.model, about.get("corpus") or config.data.corpus
    weights = about.get("weights")
    facts = {
        "parameters": f"{parameters:,}",
        "hidden size, blocks, heads": f"{sizes.hidden_size}, {sizes.blocks}, {sizes.heads}",
        "length": f"{config.data.length} tokens",
        "graph": config.graph.name,
        "schedule": _schedule(config.schedule),
        "trained on": {"text": "a text of its own"}.get(corpus, corpus),
        "tokenizer": f"{_tokenizer(config, tokenizer)}, {vocab_size} tokens",
        "step": "unknown" if step is None else f"{step:,}",
        **({"weights": _WEIGHTS.get(weights, weights)} if weights else {}),
    }
    lines = [
        *_front_matter(about),
        f"# {_plain(name)}",
        "",
        f"A Score Entropy Discrete Diffusion (SEDD) language model ([paper]({PAPER})).",
        "The original PyTorch code's `SEDD.from_pretrained` reads this folder too.",
        "",
        "```python",
        "import sedd_jax",
        "",
        f"model = sedd_jax.load({json.dumps(name)})",
        "print(model.sample(1, steps=128, seed=0)[0])",
        "```",
        "",
        *_table(("", ""), facts.items()),
    ]
    numbers = about.get("numbers") or []
    if numbers:
        rows = [tuple(row[key] for key in _NUMBER) for row in numbers]
        lines += ["", "## Numbers", "", *_table(("what", "value", "how it was made"), rows)]
    return "\n".join(lines) + "\n"


def check_about(about: dict[str, Any], where: str) -> None:
    """ValueError unless what the card shows is text, and "numbers" a list of rows of it."""

    def is_number(row: Any) -> bool:
        return isinstance(row, dict) and all(isinstance(row.get(key), str) for key in _NUMBER)

    for key in ("license", "corpus", "weights"):
        if about.get(key) is not None and not isinstance(about[key], str):
            raise ValueError(f"about.{key} in {where} is no text; mend it, or leave it out")
    numbers = about.get("numbers")
    if numbers is not None and not (isinstance(numbers, list) and all(map(is_number, numbers))):
        raise ValueError(
            f"about.numbers in {where} is no list of objects with the texts {', '.join(_NUMBER)}; "
            "mend it, or leave it out"
        )


def _front_matter(about: dict[str, Any]) -> list[str]:
    return [
        "---",
        *([f"license: {_yaml(about['license'])}"] if about.get("license") else []),
        "library_name: sedd_jax",
        "pipeline_tag: text-generation",
        "tags:",
        "- sedd",
        "- discrete-diffusion",
        "- jax",
        "---",
        "",
    ]


def _schedule(schedule: ConfigDict) -> str:
    if schedule.name == "geometric":
        return f"geometric, {schedule.sigma_min:g} to {schedule.sigma_max:g}"
    return f"{schedule.name}, eps {schedule.eps:g}"


def _tokenizer(config: ConfigDict, tokenizer: Tokenizer | None) -> str:
    return config.data.tokenizer if tokenizer is None else tokenizer.name


def _yaml(text: str) -> str:
    """The text in double quotes, in one line of ASCII: no text ends or adds to the front matter."""
    return yaml.safe_dump(text, default_style='"', width=math.inf).strip()


def _plain(text: Any) -> str:
    """One line that a cell of a table can hold, and UTF-8 as well."""
    line = " ".join(str(text).split()).replace("|", "\\|")
    return line.encode("utf-8", "replace").decode()


def _table(head: tuple, rows) -> list[str]:
    def line(cells) -> str:
        return "| " + " | ".join(_plain(cell) for cell in cells) + " |"

    return [line(head), "|" + "---|" * len(head), *(line(row) for row in rows)]
