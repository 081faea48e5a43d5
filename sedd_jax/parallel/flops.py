"""Floating-point operations of matrix products, counted in a traced function. Imports jax only."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax


def matmul_flops(fn: Callable, *shapes: Any) -> int:
    """Operations of the matrix products of fn(*shapes): 2 M N K for each, on all devices together.

    shapes are trees of arrays or jax.ShapeDtypeStruct. A scan counts its body once a turn, a
    conditional its dearest branch (one of them runs). ValueError for a product inside a loop of
    unknown length, or a Pallas kernel without a cost estimate: there is nothing to count.
    """
    return _count(jax.make_jaxpr(fn)(*shapes).jaxpr)


def _count(jaxpr) -> int:
    return sum(_operations(eqn) for eqn in jaxpr.eqns)


def _operations(eqn) -> int:
    name = eqn.primitive.name
    if name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        shape = eqn.invars[0].aval.shape
        each = 2 * math.prod(shape[axis] for axis in contracted)
        return each * math.prod(eqn.outvars[0].aval.shape)
    if name == "pallas_call":
        cost = eqn.params.get("cost_estimate")
        if cost is None:
            raise ValueError("a Pallas kernel has no cost_estimate; pass pl.CostEstimate to it")
        return int(cost.flops)
    inner = [_count(jaxpr) for jaxpr in _inside(eqn.params)]
    if name == "cond":
        return max(inner)
    if name == "while" and sum(inner):
        raise ValueError(
            "a matrix product is inside a while loop of unknown length; write the loop as a scan"
        )
    times = eqn.params["length"] if name == "scan" else 1
    if name == "shard_map":  # its body is one device's part
        older = eqn.params.get("manual_axes", ())  # jax 0.7
        axes = eqn.params.get("newly_manual_axes", older)
        times = math.prod(eqn.params["mesh"].shape[axis] for axis in axes)
    return times * sum(inner)


def _inside(params: dict[str, Any]) -> Iterator[Any]:
    """The jaxprs among an equation's parameters."""
    for value in params.values():
        for one in value if isinstance(value, (tuple, list)) else (value,):
            one = getattr(one, "jaxpr", one)  # of a closed one
            if hasattr(one, "eqns"):
                yield one
