"""Peak figures of accelerators, and what a program needs: its matmuls' operations, its memory.

Imports jax only.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """Peak figures of one device as jax counts them: a TPU chip, a GPU."""

    flops: float  # bfloat16 operations a second, dense
    memory: int  # bytes that a program may use
    bandwidth: float  # bytes a second between memory and compute units
    links: float  # bytes a second to its neighbours, all links together, one direction


# TPU: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}; memory is what libtpu's compiler allows,
# a little less than the chip's 32, 16, 95 and 32 GiB.
# NVIDIA: the data sheets of A100, H100 and H200 (SXM unless named); memory is 0.9 of what the
# driver reports, the share that XLA_PYTHON_CLIENT_MEM_FRACTION=0.9 gives a program: by default
# jax takes 0.75.
DEVICES = {
    "TPU v4": Device(275e12, int(30.75 * GIB), 1228e9, 300e9),
    "TPU v5 lite": Device(197e12, int(15.75 * GIB), 819e9, 200e9),
    "TPU v5": Device(459e12, int(95.74 * GIB), 2765e9, 600e9),
    "TPU v6 lite": Device(918e12, int(31.25 * GIB), 1638e9, 400e9),
    "NVIDIA A100-SXM4-40GB": Device(312e12, int(0.9 * 42_298_834_944), 1555e9, 300e9),
    "NVIDIA A100-SXM4-80GB": Device(312e12, int(0.9 * 85_100_068_864), 2039e9, 300e9),
    "NVIDIA A100 80GB PCIe": Device(312e12, int(0.9 * 85_100_068_864), 1935e9, 300e9),
    "NVIDIA H100 80GB HBM3": Device(989e12, int(0.9 * 84_942_979_072), 3352e9, 450e9),
    "NVIDIA H200": Device(989e12, int(0.9 * 150_754_820_096), 4800e9, 450e9),
}


def device(kind: str) -> Device | None:
    """The row of jax.devices()[0].device_kind; None for what is not in the table, as a CPU."""
    return DEVICES.get(kind)


def format_bytes(size: float) -> str:
    """512 B, 1.5 KiB, 20.3 MiB or 4.29 GiB."""
    if size < 1024:
        return f"{size:.0f} B"
    for unit in ("KiB", "MiB"):
        size /= 1024
        if size < 1024:
            return f"{size:.1f} {unit}"
    return f"{size / 1024:,.2f} GiB"


def program_bytes(memory: Any) -> int:
    """Bytes a device holds at once for a compiled program: arguments, results, temporaries, code.

    memory is `compiled.memory_analysis()`. Results that replace donated arguments count once.
    """
    new_results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    arrays = memory.argument_size_in_bytes + new_results + memory.temp_size_in_bytes
    return arrays + memory.generated_code_size_in_bytes


def matmul_flops(fn: Callable, *shapes: Any) -> int:
    """Operations of the matmuls of fn(*shapes), 2 M N K for each, on all devices together.

    shapes are trees of arrays or jax.ShapeDtypeStruct. XLA's own cost_analysis counts the body of
    a loop once, and a network under nn.scan is one loop: the traced program knows its length. Of a
    conditional the branch with the most operations counts. ValueError for a matmul in a loop of
    unknown length, and for a Pallas kernel without a cost estimate.
    """
    return _flops_of(jax.make_jaxpr(fn)(*shapes).jaxpr)


def _flops_of(jaxpr: Any) -> int:
    return sum(_equation_flops(equation) for equation in jaxpr.eqns)


def _equation_flops(equation: Any) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        k = math.prod(shape[axis] for axis in contracted)
        return 2 * k * math.prod(equation.outvars[0].aval.shape)
    if name == "pallas_call":
        if params.get("cost_estimate") is None:
            raise ValueError("a Pallas kernel has no cost_estimate; pass pl.CostEstimate to it")
        return int(params["cost_estimate"].flops)
    inner = [_flops_of(jaxpr) for jaxpr in _jaxprs_in(params)]
    if name == "cond":
        return max(inner)
    if name == "while" and sum(inner):
        raise ValueError(
            "a matrix product is inside a while loop of unknown length; write the loop as a scan"
        )
    times = params["length"] if name == "scan" else 1
    if name == "shard_map":  # its body is what one device computes
        axes = params.get("newly_manual_axes", params.get("manual_axes", ()))  # jax 0.7: the latter
        times = math.prod(params["mesh"].shape[axis] for axis in axes)
    return times * sum(inner)


def _jaxprs_in(params: dict[str, Any]) -> Iterator[Any]:
    """The jaxprs among an equation's parameters, open and closed."""
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            jaxpr = getattr(item, "jaxpr", item)
            if hasattr(jaxpr, "eqns"):
                yield jaxpr
