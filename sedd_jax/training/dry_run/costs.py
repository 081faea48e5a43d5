"""Where the time of a compiled step will go, by kind of kernel and part of the model: a prediction.

A kernel takes the longest of what its bytes, its matmuls and its other operations take at the rates
that are reached; kernels run one after the other. Not counted: launches, caches, what overlaps (as
a TPU's copies do), and on TPUs the operations outside matmuls and those of Mosaic kernels.
"""

import dataclasses
import re
from collections import defaultdict
from collections.abc import Iterable

from sedd_jax.parallel.devices import Device
from sedd_jax.training.dry_run.kernels import Kernel

# The share of each peak figure that is reached, on an H200 (docs/performance.md): x += 1 at 3.6
# TB/s, bfloat16 matmuls at 747 TFLOP/s, cuDNN's attention at 394, random bits as vector operations
# at the peak. Of links nothing is measured.
ACHIEVABLE = {"memory": 0.75, "matmul": 0.75, "attention": 0.4, "vector": 1.0, "links": 0.75}

# The part of the model that a kernel belongs to: the first row that the name of one of its
# operations matches, as in jit(train_step)/jvp(Transformer)/while/body/closed_call/blocks/qkv/mul.
UPDATE = "optimizer, EMA, guard"
PARTS = (
    ("stacking", r"Transformer\)*/(while/body/(jit\()?dynamic_update|broadcast_in_dim$)"),
    ("stacking", r"^/\w*broadcast"),  # the zeros of what is stacked have no names
    ("GELU", r"/(tanh|erf)$|gelu"),
    ("rotary", r"/blocks(_\d+)?/(concatenate|split|pad|stack|jit\(_flip\)/rev)$|rotary|rotate"),
    ("norms", r"/norm(_\d)?/|LayerNorm"),
    ("MLP", r"/(up|down)/"),
    ("attention", r"/(qkv|out)/|attention|/splash"),
    ("noise level", r"/(modulation|sigma_\d)/"),
    ("dropout and residual", r"/blocks(_\d+)?/"),
    ("stacking", r"Transformer\)*/while/"),
    ("embedding", r"Transformer"),
    ("head and loss", r"jvp\("),
    ("other", ""),
)


@dataclasses.dataclass(frozen=True)
class Cost:
    """The kernels of one kind, part and phase in a step."""

    kind: str
    part: str
    phase: str
    kernels: float
    bytes: float
    flops: float  # of matmuls
    seconds: float


def costs(kernels: Iterable[Kernel], device: Device) -> tuple[Cost, ...]:
    """The kernels by kind, part and phase, the longest first."""
    groups: dict[tuple, list[Kernel]] = defaultdict(list)
    for kernel in kernels:
        groups[kernel.kind, *part_and_phase(kernel)].append(kernel)
    rows = [
        Cost(
            *key,
            kernels=sum(kernel.runs for kernel in same),
            bytes=sum(kernel.runs * kernel.bytes for kernel in same),
            flops=sum(kernel.runs * kernel.flops for kernel in same),
            seconds=sum(seconds(kernel, device) for kernel in same),
        )
        for key, same in groups.items()
    ]
    return tuple(sorted(rows, key=lambda row: -row.seconds))


def seconds(kernel: Kernel, device: Device) -> float:
    """Of all runs of a kernel in a step: the longest of bytes, matmuls and other operations."""
    if kernel.kind == "collective":
        return kernel.runs * kernel.bytes / (ACHIEVABLE["links"] * device.links)
    share = ACHIEVABLE["attention" if kernel.kind == "attention" else "matmul"]
    times = [
        kernel.bytes / (ACHIEVABLE["memory"] * device.bandwidth),
        kernel.flops / (share * device.flops),
    ]
    if device.vector is not None:
        times.append(kernel.vector / (ACHIEVABLE["vector"] * device.vector))
    return kernel.runs * max(times)


def part_and_phase(kernel: Kernel) -> tuple[str, str]:
    """The part of the model that a kernel belongs to; forward, backward or update.

    What is recomputed for the backward pass is of that.
    """
    names = kernel.op_names
    if re.match(r"jit\(train_step\)/(?!.*(jvp\(|Transformer|blocks))", names[0]):
        return UPDATE, "update"  # whatever gradients are computed in it
    part = next(part for part, pattern in PARTS if any(re.search(pattern, name) for name in names))
    is_backward = any(re.search(r"transpose\(jvp|rematted", name) for name in names)
    return part, "backward" if is_backward else "forward"


# --- for a terminal


def describe_costs(rows: Iterable[Cost]) -> list[str]:
    """The tables by kind and by part, at most 80 columns."""
    rows = list(rows)
    lines = [f"{'kind':16}{'kernels':>10}{'GB':>10}{'TFLOP':>10}{'ms':>10}"]
    for kind, same in _grouped(rows, "kind"):
        lines.append(_line(kind, same))
    lines.append(_line("all", rows))
    lines += ["", f"{'part':26}{'forward ms':>14}{'backward ms':>14}{'ms':>12}"]
    for part, same in _grouped(rows, "part"):
        ms = {phase: 0.0 for phase in ("forward", "backward", "update")}
        for row in same:
            ms[row.phase] += 1e3 * row.seconds
        cells = [
            f"{ms[phase]:14.2f}" if ms[phase] else 14 * " " for phase in ("forward", "backward")
        ]
        lines.append(f"{part:26}{''.join(cells)}{sum(ms.values()):12.2f}")
    return lines


def _grouped(rows: list[Cost], field: str) -> list[tuple[str, list[Cost]]]:
    groups: dict[str, list[Cost]] = defaultdict(list)
    for row in rows:
        groups[getattr(row, field)].append(row)
    return sorted(groups.items(), key=lambda item: -sum(row.seconds for row in item[1]))


def _line(name: str, rows: list[Cost]) -> str:
    total = {
        field: sum(getattr(row, field) for row in rows)
        for field in ("kernels", "bytes", "flops", "seconds")
    }
    return (
        f"{name:16}{total['kernels']:10,.0f}{total['bytes'] / 1e9:10,.1f}"
        f"{total['flops'] / 1e12:10,.2f}{1e3 * total['seconds']:10,.2f}"
    )
