"""A program compiled for machines that are not there: what fits, what is sent, what it costs.

`dry_run` compiles the train step that training would run, in a child process that has the
target's compiler: libtpu for TPU, the CUDA plug-in for GPU, jax's own for CPU. No accelerator is
needed, and nothing is allocated.
"""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from sedd_jax import config as configuration
from sedd_jax import data
from sedd_jax.parallel.devices import GIB, Device, device
from sedd_jax.training.dry_run.hlo import Collective
from sedd_jax.training.dry_run.targets import Target, parse_target

__all__ = ["Collective", "Estimate", "Placed", "describe", "dry_run", "parse_target"]

MFU = 0.4  # the share of the peak at which hours are priced: an assumption, and said to be one
# Of the tokenizers as published; the others depend on the corpus.
VOCAB_SIZES = {"bert": 30_522, "bytes": 256, "gpt2": 50_257, "text8": 27}


@dataclasses.dataclass(frozen=True)
class Placed:
    """One parameter and where it lives."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    spec: str
    bytes: int  # on one device


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What the compiler says of one train step on the target; all bytes are on one device."""

    target: str
    devices: int
    device_kind: str
    mesh: dict[str, int]
    vocab_size: int
    steps: int  # of the config
    microbatches: int
    remat: str
    tokens: int  # a step
    flops: int  # the model's, a step, all devices together
    parameters: tuple[Placed, ...]
    parameter_bytes: int
    ema_bytes: int
    optimizer_bytes: int
    compile_seconds: float
    # None and empty where the compiler gave up for want of memory.
    argument_bytes: int | None = None
    output_bytes: int | None = None
    alias_bytes: int | None = None  # outputs that take the place of arguments
    temporary_bytes: int | None = None
    code_bytes: int | None = None
    collectives: tuple[Collective, ...] = ()
    # What the compiler said when it gave up.
    needed_bytes: int | None = None
    available_bytes: int | None = None

    @property
    def device(self) -> Device | None:
        """Peak figures; None for a CPU."""
        return device(self.device_kind)

    @property
    def total_bytes(self) -> int:
        """What a device must hold at once: state, batch, temporaries and the program."""
        if self.needed_bytes is not None:
            return self.needed_bytes
        own_outputs = self.output_bytes - self.alias_bytes
        return self.argument_bytes + own_outputs + self.temporary_bytes + self.code_bytes

    @property
    def memory_bytes(self) -> int | None:
        """What a program may use of a device; None where that is not known, as of a CPU."""
        known = self.device and self.device.memory
        return self.available_bytes if self.available_bytes is not None else known

    @property
    def fits(self) -> bool | None:
        """Whether the step fits into the memory; None where that is not known."""
        if self.needed_bytes is not None:
            return False
        return None if self.memory_bytes is None else self.total_bytes <= self.memory_bytes

    @property
    def step_seconds(self) -> float | None:
        """Of one step at MFU: an estimate, not a measurement. None for a CPU."""
        if self.device is None:
            return None
        return self.flops / (self.devices * self.device.flops * MFU)

    @property
    def hours(self) -> float | None:
        """Of all the config's steps at MFU, without evaluation and checkpoints."""
        seconds = self.step_seconds
        return None if seconds is None else seconds * self.steps / 3600

    @property
    def complaint(self) -> str:
        """One line that names what to change if the step does not fit; empty if it does."""
        if self.fits is not False:
            return ""
        changes = [f"raise config.train.microbatches above {self.microbatches}"]
        if self.remat != "blocks":
            changes.insert(0, "set config.model.remat to blocks")
        state = self.parameter_bytes + self.ema_bytes + self.optimizer_bytes
        if state > self.memory_bytes / 3 and self.mesh["fsdp"] < self.devices:
            changes.insert(0, f"raise config.mesh.fsdp above {self.mesh['fsdp']}")
        return (
            f"{self.target} does not fit: {_gib(self.total_bytes)} of "
            f"{_gib(self.memory_bytes)} on each device; {', or '.join(changes)}"
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON may hold it, with what follows from it."""
        derived = ("total_bytes", "memory_bytes", "fits", "step_seconds", "hours")
        return dataclasses.asdict(self) | {name: getattr(self, name) for name in derived}


def dry_run(
    config: ConfigDict,
    target: str,
    *,
    vocab_size: int | None = None,
    text_file: Path | None = None,
) -> Estimate:
    """Compile the config's train step for a target such as v5e:4x4, a100:16 or cpu:8.

    vocab_size is the tokenizer's; by default the published one's, or that of the records that
    the config names. text_file is where the compiled program is to be written. Takes seconds on
    the CPU, 10 s for GPUs, 20 s to minutes for TPUs. ValueError for a config or target that
    cannot be, and for a compiler that is not installed or fails; a program that does not fit is
    an answer, not an error.
    """
    configuration.check(config)
    machine = parse_target(target)
    vocab_size = _vocab_size(config) if vocab_size is None else vocab_size
    if vocab_size < 2:
        raise ValueError(f"vocab_size {vocab_size} is no vocabulary; it must be at least 2")
    _check_installed(machine)
    question = {
        "config": config.to_dict(),
        "vocab_size": vocab_size,
        "target": target,
        "text_file": text_file and str(text_file),
    }
    found = _ask(machine, question)
    return Estimate(
        target=target,
        devices=machine.count,
        vocab_size=vocab_size,
        steps=config.train.steps,
        microbatches=config.train.microbatches,
        remat=config.model.remat,
        parameters=tuple(
            Placed(**{**row, "shape": tuple(row["shape"])}) for row in found.pop("parameters")
        ),
        collectives=tuple(
            Collective(**{**row, "axes": tuple(row["axes"]), "shapes": tuple(row["shapes"])})
            for row in found.pop("collectives", ())
        ),
        **found,
    )


def _vocab_size(config: ConfigDict) -> int:
    if config.data.records and Path(config.data.records).is_dir():
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


def _check_installed(target: Target) -> None:
    modules = {"tpu": ("libtpu",), "cuda": ("jax_cuda12_plugin", "nvidia.cuda_nvcc"), "cpu": ()}
    for module in modules[target.platform]:
        try:
            found = importlib.util.find_spec(module)
        except ModuleNotFoundError:  # of the package above it
            found = None
        if found is None:
            raise ValueError(
                f"compiling for {target.name} needs {target.packages}, which is not installed; "
                f"{target.command}"
            )


def _ask(target: Target, question: dict[str, Any]) -> dict[str, Any]:
    """The child's answer; ValueError in one line if it has none."""
    environment = {**os.environ, **target.environment}
    if target.platform == "cpu":
        environment["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {environment['XLA_FLAGS']}"
    run = subprocess.run(
        [sys.executable, "-m", __name__],
        input=json.dumps(question),
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    try:
        found = json.loads(run.stdout)
    except json.JSONDecodeError:
        last = next((line for line in reversed(run.stderr.splitlines()) if line.strip()), "")
        raise ValueError(
            f"the compiler for {target.name} ended with status {run.returncode} and no answer: "
            f"{last.strip()[:300]}"
        ) from None
    if "error" in found:
        raise ValueError(found["error"])
    return found


def describe(estimate: Estimate) -> str:
    """The estimate as text for a terminal."""
    e = estimate
    width = max(len(row.name) for row in e.parameters)
    lines = [
        f"{e.target}: {e.devices} x {e.device_kind}, mesh "
        + ", ".join(f"{axis}={size}" for axis, size in e.mesh.items())
        + f"; compiled in {e.compile_seconds:.1f} s",
        "",
        f"{'parameter':{width}}  {'shape':20}{'dtype':10}{'on a device':>12}  placed",
    ]
    for row in e.parameters:
        shape = "x".join(map(str, row.shape))
        lines.append(
            f"{row.name:{width}}  {shape:20}{row.dtype:10}{_size(row.bytes):>12}  "
            f"{row.spec.removeprefix('PartitionSpec')}"
        )
    state = e.parameter_bytes + e.ema_bytes + e.optimizer_bytes
    lines += [
        "",
        "memory of a device",
        _row("state", state)
        + f"  parameters {_size(e.parameter_bytes)}, average {_size(e.ema_bytes)}, "
        f"optimizer {_size(e.optimizer_bytes)}",
    ]
    if e.needed_bytes is None:
        lines += [
            _row("arguments", e.argument_bytes) + "  the state and the batch, as laid out",
            _row("temporaries", e.temporary_bytes),
            _row("program", e.code_bytes),
        ]
    lines.append(_row("total", e.total_bytes) + ("" if e.needed_bytes is None else "  at least"))
    if e.memory_bytes is not None:
        lines.append(_row("available", e.memory_bytes) + f"  {'fits' if e.fits else 'TOO LITTLE'}")
    lines += [
        "",
        f"a step: {e.tokens:,} tokens, {e.flops / 1e12:,.2f} TFLOP of the model, "
        + f"{e.flops / e.tokens / 1e9:.3f} GFLOP a token, forward and backward",
    ]
    if e.step_seconds is not None:
        lines.append(
            f"estimate at {MFU:.0%} of the peak of {e.device.flops / 1e12:.0f} TFLOP/s: "
            f"{e.step_seconds:.3f} s a step, {e.tokens / e.step_seconds:,.0f} tokens/s, "
            f"{e.hours:,.1f} h for {e.steps:,} steps ({e.hours * e.devices:,.0f} device hours)"
        )
    if e.needed_bytes is None:
        lines += ["", "sent by a device in a step", f"{'':20}{'axes':24}{'count':>8}{'bytes':>12}"]
        for one in e.collectives:
            note = "" if one.is_exact else "  a turn of a loop of unknown length"
            lines.append(
                f"{one.kind:20}{', '.join(one.axes):24}{one.count:>8,}{_size(one.bytes):>12}{note}"
            )
        if not e.collectives:
            lines.append("nothing")
    return "\n".join(lines)


def _row(name: str, size: int) -> str:
    return f"  {name:12}{_size(size):>12}"


def _gib(size: float) -> str:
    return f"{size / GIB:,.2f} GiB"


def _size(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:,.1f} {unit}" if unit != "B" else f"{size:.0f} B"
        size /= 1024
    return f"{size:,.2f} GiB"
