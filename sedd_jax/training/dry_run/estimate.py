"""What a dry run returns, and its text for a terminal."""

import dataclasses
import math
import re
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
        f"{e.target}: {e.devices} x {e.device_kind}, mesh {mesh};",
        f"compiled in {e.compile_seconds:.1f} s",
        *_parameter_lines(e),
        *_memory_lines(e),
        "",
        f"a step: {e.tokens:,} tokens, {_operations(e.flops)} of the model, "
        + f"{_operations(e.flops / e.tokens)} a token,",
        "forward and backward",
    ]
    if e.step_seconds is not None:
        peak = f"{e.device.flops / 1e12:.0f} TFLOP/s"
        lines += [f"if it runs at {MFU:.0%} of the peak of {peak}:", _pace(e, e.step_seconds)]
    lines += _cost_lines(e) if e.costs else []
    return "\n".join(lines + (_collective_lines(e) if e.is_compiled else []))


def _operations(flops: float) -> str:
    power = min(4, max(0, int(math.log10(flops)) // 3)) if flops else 0
    return f"{flops / 1000**power:,.2f} {('', 'K', 'M', 'G', 'T')[power]}FLOP"


def _pace(e: Estimate, seconds: float) -> str:
    """What a step of so many seconds makes of all the config's steps."""
    hours = seconds * e.steps / 3600
    return (
        f"{1e3 * seconds:,.1f} ms a step, {e.tokens / seconds:,.0f} tok/s; "
        f"{e.steps:,} steps: {hours:,.1f} h, {hours * e.devices:,.0f} device-hours"
    )


def _parameter_lines(e: Estimate) -> list[str]:
    """A row a parameter; sharding has the mesh axis of each dimension, "-" of one that is whole."""
    shapes = ["x".join(map(str, row.shape)) for row in e.parameters]
    width, shape_width = max(len(row.name) for row in e.parameters), max(map(len, shapes))
    dtypes = ", ".join(dict.fromkeys(row.dtype for row in e.parameters))
    head = f"{'parameter':{width}}  {'shape':{shape_width}}{'on a device':>13}  sharding"
    lines = ["", f"the parameters are {dtypes}", head]
    for row, shape in zip(e.parameters, shapes, strict=True):
        axes = re.findall(r"\w+", row.spec)[1:]  # after the class's name
        axes = ",".join("-" if axis == "None" else axis for axis in axes)
        size = format_bytes(row.bytes)
        lines.append(f"{row.name:{width}}  {shape:{shape_width}}{size:>13}  {axes}".rstrip())
    return lines


def _memory_lines(e: Estimate) -> list[str]:
    state = (
        f"weights {format_bytes(e.parameter_bytes)}, EMA {format_bytes(e.ema_bytes)}, "
        f"moments {format_bytes(e.optimizer_bytes)}"
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
        f"so at {rate:.0%} of the peak:",
        _pace(e, seconds),
    ]


def _collective_lines(e: Estimate) -> list[str]:
    lines = ["", "sent by a device in a step", f"{'':20}{'axes':24}{'count':>8}{'bytes':>12}"]
    for one in e.collectives:
        note = "" if one.is_exact else "  an iteration of a loop of unknown length"
        axes, size = ", ".join(one.axes), format_bytes(one.bytes)
        lines.append(f"{one.kind:20}{axes:24}{one.count:>8,}{size:>12}{note}")
    return lines if e.collectives else [*lines, "nothing"]
