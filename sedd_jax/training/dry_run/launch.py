"""Starts the child process that compiles, and reads its answer."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from sedd_jax import config as configuration
from sedd_jax import data
from sedd_jax.host.console import activity
from sedd_jax.host.files import local_path
from sedd_jax.training.dry_run.collectives import Collective
from sedd_jax.training.dry_run.costs import Cost
from sedd_jax.training.dry_run.estimate import Estimate, Parameter
from sedd_jax.training.dry_run.targets import Target, parse_target

# Of the tokenizers as published; the others depend on the corpus.
VOCAB_SIZES = {"bert": 30_522, "bytes": 256, "gpt2": 50_257, "text8": 27}


def dry_run(
    config: ConfigDict,
    target: str,
    *,
    vocab_size: int | None = None,
    text_file: Path | None = None,
) -> Estimate:
    """Compile the config's train step for a target such as v5e:4x4, a100:16 or cpu:8.

    vocab_size is the tokenizer's; by default the published one's, or that of the records that
    the config names. The compiled program is written to text_file. Takes seconds on the CPU,
    10 s for GPUs, 20 s to minutes for TPUs. ValueError for a config or target that is not
    possible, and for a compiler that is not installed or fails; a program that does not fit is
    an estimate, not an error.
    """
    configuration.check(config)
    machine = parse_target(target)
    vocab_size = _vocab_size(config) if vocab_size is None else vocab_size
    if vocab_size < 2:
        raise ValueError(
            f"vocab_size {vocab_size} is not a vocabulary's size; it must be at least 2"
        )
    if not machine.is_installed:
        raise ValueError(f"the compiler for {target} is not installed; it needs {machine.packages}")
    request = {
        "config": config.to_dict(),
        "vocab_size": vocab_size,
        "target": target,
        "text_file": text_file and str(local_path(text_file)),
    }
    with activity(f"compiling for {target}"):
        answer = _run_child(machine, request)
    parameters = tuple(_from_json(Parameter, row) for row in answer.pop("parameters"))
    costs = tuple(_from_json(Cost, row) for row in answer.pop("costs", ()))
    collectives = tuple(_from_json(Collective, row) for row in answer.pop("collectives", ()))
    return Estimate(
        target=target,
        devices=machine.count,
        vocab_size=vocab_size,
        steps=config.train.steps,
        microbatches=config.train.microbatches,
        remat=config.model.remat,
        parameters=parameters,
        collectives=collectives,
        costs=costs,
        **answer,
    )


def _from_json(dataclass: type, row: dict[str, Any]) -> Any:
    """An instance from its fields; JSON has lists for tuples."""
    return dataclass(**{k: tuple(v) if isinstance(v, list) else v for k, v in row.items()})


def _vocab_size(config: ConfigDict) -> int:
    if config.data.records and local_path(config.data.records).is_dir():
        return data.open_records(config.data.records).tokenizer.vocab_size
    name, path = config.data.tokenizer, config.data.tokenizer_path
    if name == "ids" and path.isdigit():
        return int(path)
    if name in VOCAB_SIZES and not path:
        return VOCAB_SIZES[name]
    raise ValueError(
        f"the vocabulary of tokenizer {name!r} depends on its files or the corpus; give "
        "--vocab_size, or records made by sedd-prepare in --config.data.records"
    )


def _run_child(target: Target, request: dict[str, Any]) -> dict[str, Any]:
    """The child's answer; ValueError in one line if it has none."""
    run = subprocess.run(
        [sys.executable, "-m", f"{__package__}.child"],
        input=json.dumps(request),
        env=os.environ | target.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    try:
        answer = json.loads(run.stdout)
    except json.JSONDecodeError:
        last = next((line for line in reversed(run.stderr.splitlines()) if line.strip()), "")
        raise ValueError(
            f"the compiler for {target.name} ended with status {run.returncode} and no answer: "
            f"{last.strip()[:300]}"
        ) from None
    if "error" in answer:
        raise ValueError(answer["error"])
    return answer
