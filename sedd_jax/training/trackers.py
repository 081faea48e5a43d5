"""Where the metrics and samples of a training go: the run's folder, TensorBoard, Weights & Biases.

A tracker of another kind is a class like these: its arguments are those of `open_trackers`, and
`TRACKERS["name"] = Class` before training lets config.train.trackers name it.
"""

import html
import importlib
import importlib.util
import json
import logging
import math
import os
import secrets
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from sedd_jax.host.files import write_text
from sedd_jax.runs import workdir as runs

log = logging.getLogger(__name__)


class Tracker(Protocol):
    """What a training writes to, on process 0; steps are counted from 1 and rise."""

    def scalars(self, step: int, kind: str, values: dict[str, float]) -> None:
        """`values` by name, of which some may be NaN; kind is "train" or "heldout"."""

    def text(self, step: int, name: str, text: str) -> None:
        """Plain text, in which no character is markup."""

    def close(self) -> None:
        """Called once, at the end."""


class RunFolder:
    """metrics.jsonl, and texts as NAME/STEP.txt; rows of later steps than `step` are dropped."""

    def __init__(self, workdir: Path, step: int, config: dict[str, Any]):
        self._workdir = workdir
        file = workdir / runs.METRICS
        rows = runs.read_metrics(workdir, last_step=step)
        write_text(file, "".join(json.dumps(row) + "\n" for row in rows))
        self._lines = file.open("a", encoding="utf-8")

    def scalars(self, step: int, kind: str, values: dict[str, float]) -> None:
        # JSON has no NaN: a window in which every step was skipped has null.
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._lines.write(json.dumps({"kind": kind, "step": step} | finite) + "\n")
        self._lines.flush()

    def text(self, step: int, name: str, text: str) -> None:
        folder = self._workdir / name
        folder.mkdir(exist_ok=True)
        write_text(folder / f"{step}.txt", text + "\n")

    def close(self) -> None:
        self._lines.close()


class TensorBoard:
    """Events in WORKDIR/tensorboard."""

    def __init__(self, workdir: Path, step: int, config: dict[str, Any]):
        # A viewer drops what earlier processes have written from this step on.
        writer = _without_torch("tensorboardX").SummaryWriter
        self._events = writer(str(workdir / runs.TENSORBOARD), purge_step=step + 1)

    def scalars(self, step: int, kind: str, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._events.add_scalar(f"{kind}/{name}", value, step)

    def text(self, step: int, name: str, text: str) -> None:
        # Indented, the viewer's Markdown shows a text as it is.
        self._events.add_text(name, textwrap.indent(text, "    ", lambda line: True), step)

    def close(self) -> None:
        self._events.close()


def _without_torch(module: str) -> ModuleType:
    """A module, imported as where torch is not installed: it would import torch for tensors that
    nothing here gives it, which takes a second and brings a second CUDA beside JAX's."""
    is_imported = sys.modules.setdefault("torch", None) is not None
    try:
        return importlib.import_module(module)
    finally:
        if not is_imported:
            del sys.modules["torch"]


class WeightsAndBiases:
    """A run of Weights & Biases with the config; a resumed training goes on with the same one.

    wandb's own variables say the rest: WANDB_PROJECT (sedd_jax, if unset), WANDB_ENTITY,
    WANDB_NAME (the folder's name), WANDB_MODE=offline.
    """

    REMEDY = 'pip install "sedd_jax[wandb]", or take wandb out of config.train.trackers'

    def __init__(self, workdir: Path, step: int, config: dict[str, Any]):
        import wandb

        file = workdir / runs.WANDB_RUN
        if not file.is_file():
            write_text(file, os.environ.get("WANDB_RUN_ID") or secrets.token_hex(8))
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "sedd_jax"),
                name=os.environ.get("WANDB_NAME", workdir.absolute().name),
                id=file.read_text(encoding="utf-8").strip(),
                resume="allow",
                dir=str(workdir),
                config=config,
                settings=wandb.Settings(silent=True),
            )
        except wandb.errors.Error as error:
            reason = " ".join(str(error).split()).rstrip(".")
            raise ValueError(
                f"W&B begins no run: {reason}; run `wandb login`, set WANDB_MODE=offline, or take "
                "wandb out of config.train.trackers"
            ) from error
        if not self._run.offline:
            log.info("W&B: %s", self._run.url)
        # Their own step may not fall, which after a kill it does: the newest checkpoint is older.
        for kind in ("train", "heldout", "samples"):
            self._run.define_metric(f"{kind}/*", step_metric="step")

    def scalars(self, step: int, kind: str, values: dict[str, float]) -> None:
        self._run.log({"step": step} | {f"{kind}/{name}": v for name, v in values.items()})

    def text(self, step: int, name: str, text: str) -> None:
        import wandb

        page = wandb.Html(f"<pre>{html.escape(text)}</pre>", inject=False)
        self._run.log({"step": step, f"{name}/text": page})

    def close(self) -> None:
        self._run.finish()


TRACKERS: dict[str, Callable[[Path, int, dict[str, Any]], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
}


def check_trackers(names: str) -> list[str]:
    """The names of a list "tensorboard,wandb"; ValueError for what cannot be opened."""
    listed = [name.strip() for name in names.split(",") if name.strip()]
    for name in listed:
        if name not in TRACKERS:
            raise ValueError(
                f"config.train.trackers names {name!r}; known: {', '.join(TRACKERS)}, and what a "
                "module of yours adds to sedd_jax.training.trackers.TRACKERS"
            )
        if TRACKERS[name] is WeightsAndBiases and importlib.util.find_spec("wandb") is None:
            raise ValueError(
                f"config.train.trackers names wandb, which is not installed; "
                f"{WeightsAndBiases.REMEDY}"
            )
    return listed


def open_trackers(names: str, workdir: Path, step: int, config: dict[str, Any]) -> list[Tracker]:
    """The run's folder and those of the names, which go on after `step`.

    config is flat, {"train.steps": 100}. What a tracker has of later steps, which a kill undid,
    will be written again.
    """
    classes = [RunFolder, *(TRACKERS[name] for name in check_trackers(names))]
    return [each(workdir, step, config) for each in classes]
