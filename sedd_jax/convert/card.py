"""The model card of an exported folder: what is known about the model, and nothing else."""

import json
from typing import Any

from ml_collections import ConfigDict

from sedd_jax.data import Tokenizer

PAPER = "https://arxiv.org/abs/2310.16834"


def model_card(
    name: str,
    config: ConfigDict,
    vocab_size: int,
    tokenizer: Tokenizer | None,
    step: int | None,
    parameters: int,
    about: dict[str, Any],
) -> str:
    """README.md with its YAML front matter; about may hold "license" and "numbers"."""
    sizes, corpus = config.model, config.data.corpus
    facts = {
        "parameters": f"{parameters:,}",
        "hidden size, blocks, heads": f"{sizes.hidden_size}, {sizes.blocks}, {sizes.heads}",
        "length": f"{config.data.length} tokens",
        "graph": config.graph.name,
        "schedule": _schedule(config.schedule),
        "corpus": {"text": "a text of its own"}.get(corpus, corpus),
        "tokenizer": f"{_tokenizer(config, tokenizer)}, {vocab_size} tokens",
        "step": "unknown" if step is None else f"{step:,}",
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
        f"model = sedd_jax.load({json.dumps(_plain(name))})",
        "print(model.sample(1, steps=128, seed=0)[0])",
        "```",
        "",
        *_table(("", ""), facts.items()),
    ]
    numbers = about.get("numbers") or []
    if numbers:
        rows = [(row.get("name"), row.get("value"), row.get("how")) for row in numbers]
        lines += ["", "## Numbers", "", *_table(("what", "value", "how it was made"), rows)]
    return "\n".join(lines) + "\n"


def _front_matter(about: dict[str, Any]) -> list[str]:
    license_line = [f"license: {json.dumps(about['license'])}"] if about.get("license") else []
    return [
        "---",
        *license_line,
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


def _plain(text: Any) -> str:
    """One line that a cell of a table can hold."""
    return " ".join(str(text).split()).replace("|", "\\|")


def _table(head: tuple, rows) -> list[str]:
    def line(cells) -> str:
        return "| " + " | ".join(_plain(cell) for cell in cells) + " |"

    return [line(head), "|" + "---|" * len(head), *(line(row) for row in rows)]
