"""What a dry run returns, and its text for a terminal."""

import dataclasses
from typing import Any

from sedd_jax.parallel.devices import Device, device, format_bytes
from sedd_jax.training.dry_run.collectives import Collective
from sedd_jax.training.dry_run.costs import Cost, describe_costs

MFU = 0.4  # the share of peak FLOP/s that hours assume


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One parameter and its sharding."""

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
    flops: int  # of the model's matmuls, a step, all devices together
    parameters: tuple[Parameter, ...]
    parameter_bytes: int
    ema_bytes: int
    optimizer_bytes: int
    compile_seconds: float
    total_bytes: int  # at once: state, batch, temporaries, program; at least, if not compiled
    # None and empty where the compiler gave up for lack of memory.
    argument_bytes: int | None = None
    temporary_bytes: int | None = None
    code_bytes: int | None = None
    collectives: tuple[Collective, ...] = ()
    costs: tuple[Cost, ...] = ()  # of one device, in a step; empty for a CPU, too
    available_bytes: int | None = None  # as the compiler that gave up reports it

    @property
    def is_compiled(self) -> bool:
        """False where the compiler gave up for lack of memory."""
        return self.argument_bytes is not None

    @property
    def device(self) -> Device | None:
        """Peak figures; None for a CPU."""
        return device(self.device_kind)

    @property
    def state_bytes(self) -> int:
        """Of the parameters, their moving average and the optimizer."""
        return self.parameter_bytes + self.ema_bytes + self.optimizer_bytes

    @property
    def memory_bytes(self) -> int | None:
        """What a program may use of a device; None where that is not known, as of a CPU."""
        if self.available_bytes is not None:
            return self.available_bytes
        return self.device and self.device.memory

    @property
    def fits(self) -> bool | None:
        """Whether the step fits into the memory; None where that is not known."""
        if not self.is_compiled:
            return False
        return None if self.memory_bytes is None else self.total_bytes <= self.memory_bytes

    @property
    def step_seconds(self) -> float | None:
        """Of one step at MFU: an estimate, not a measurement. None for a CPU."""
        if self.device is None:
            return None
        return self.flops / (self.devices * self.device.flops * MFU)

    @property
    def predicted_seconds(self) -> float | None:
        """Of one step, kernel after kernel, from `costs`: a prediction, not a measurement."""
        return sum(one.seconds for one in self.costs) if self.costs else None

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
        if self.state_bytes > self.memory_bytes / 3 and self.mesh["fsdp"] < self.devices:
            changes.insert(0, f"raise config.mesh.fsdp above {self.mesh['fsdp']}")
        return (
            f"{self.target} does not fit: {format_bytes(self.total_bytes)} of "
            f"{format_bytes(self.memory_bytes)} on each device; {', or '.join(changes)}"
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON may hold it, with the derived values."""
        derived = ("memory_bytes", "fits", "step_seconds", "hours", "predicted_seconds")
        return dataclasses.asdict(self) | {name: getattr(self, name) for name in derived}


def describe(estimate: Estimate) -> str:
    """The estimate as text for a terminal."""
    e = estimate
    mesh = ", ".join(f"{axis}={size}" for axis, size in e.mesh.items())
    lines = [
        f"{e.target}: {e.devices} x {e.device_kind}, mesh {mesh}; compiled in "
        + f"{e.compile_seconds:.1f} s",
        *_parameter_lines(e),
        *_memory_lines(e),
        "",
        f"a step: {e.tokens:,} tokens, {e.flops / 1e12:,.2f} TFLOP of the model, "
        + f"{e.flops / e.tokens / 1e9:.3f} GFLOP a token, forward and backward",
    ]
    if e.step_seconds is not None:
        lines.append(
            f"if it runs at {MFU:.0%} of the peak of {e.device.flops / 1e12:.0f} TFLOP/s: "
            f"{e.step_seconds:.3f} s a step, {e.tokens / e.step_seconds:,.0f} tokens/s, "
            f"{e.hours:,.1f} h for {e.steps:,} steps ({e.hours * e.devices:,.0f} device hours)"
        )
    lines += _cost_lines(e) if e.costs else []
    return "\n".join(lines + (_collective_lines(e) if e.is_compiled else []))


def _parameter_lines(e: Estimate) -> list[str]:
    width = max(len(row.name) for row in e.parameters)
    lines = ["", f"{'parameter':{width}}  {'shape':20}{'dtype':10}{'on a device':>12}  sharding"]
    for row in e.parameters:
        shape = "x".join(map(str, row.shape))
        lines.append(
            f"{row.name:{width}}  {shape:20}{row.dtype:10}{format_bytes(row.bytes):>12}  "
            f"{row.spec.removeprefix('PartitionSpec')}"
        )
    return lines


def _memory_lines(e: Estimate) -> list[str]:
    state = (
        f"parameters {format_bytes(e.parameter_bytes)}, average {format_bytes(e.ema_bytes)}, "
        f"optimizer {format_bytes(e.optimizer_bytes)}"
    )
    rows = [("state", e.state_bytes, state)]
    if e.is_compiled:
        rows += [
            ("arguments", e.argument_bytes, "the state and the batch, as laid out"),
            ("temporaries", e.temporary_bytes, ""),
            ("program", e.code_bytes, ""),
        ]
    rows.append(("total", e.total_bytes, "" if e.is_compiled else "at least"))
    if e.memory_bytes is not None:
        rows.append(("available", e.memory_bytes, "fits" if e.fits else "TOO LITTLE"))
    lines = [f"  {name:12}{format_bytes(size):>12}  {note}".rstrip() for name, size, note in rows]
    return ["", "memory of a device", *lines]


def _cost_lines(e: Estimate) -> list[str]:
    seconds = e.predicted_seconds
    rate = e.flops / (e.devices * e.device.flops * seconds)
    return [
        "",
        "where the time will go: predicted from the program, not measured",
        *describe_costs(e.costs),
        f"so a step in {1e3 * seconds:,.1f} ms, {e.tokens / seconds:,.0f} tokens/s, "
        + f"{rate:.0%} of the peak",
    ]


def _collective_lines(e: Estimate) -> list[str]:
    lines = ["", "sent by a device in a step", f"{'':20}{'axes':24}{'count':>8}{'bytes':>12}"]
    for one in e.collectives:
        note = "" if one.is_exact else "  an iteration of a loop of unknown length"
        axes, size = ", ".join(one.axes), format_bytes(one.bytes)
        lines.append(f"{one.kind:20}{axes:24}{one.count:>8,}{size:>12}{note}")
    return lines if e.collectives else [*lines, "nothing"]
