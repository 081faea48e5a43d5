"""What a compiled program sends between devices, by the axes of a mesh."""

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from sedd_jax.training.dry_run.hlo import COLLECTIVES, Instruction, Program

BETWEEN_SLICES = "between slices"


@dataclasses.dataclass(frozen=True)
class Collective:
    """Collectives of one kind over the same mesh axes in one step."""

    kind: str
    # Of the mesh; and "256 of 512 devices" where a group fills only a part, as in one of two
    # slices; or "between slices".
    axes: tuple[str, ...]
    count: int  # executed in a step
    bytes: int  # of their results on one device, in a step; a reduce-scatter's operands
    shapes: tuple[str, ...]  # bf16[768,3072] and so on, the different ones
    is_exact: bool = True  # False: in a loop of unknown length, counted for one iteration


def collectives(program: Program, mesh: Mapping[str, int]) -> tuple[Collective, ...]:
    """What a parsed program sends over a mesh, largest first.

    mesh names the sizes of the axes, in order; the program's devices are the mesh's, row by row.
    """
    instructions: dict[tuple, Collective] = {}
    for name, runs, is_exact in program.walk():
        body = program.computations[name]
        # TPU programs write a reduce-scatter as a fusion of two.
        scatters = name.startswith("all-reduce-scatter") and any(
            one.opcode == "dynamic-slice" for one in body
        )
        for instruction in body:
            one = _collective(instruction, mesh, scatters)
            if one is None:
                continue
            # One collective that is overlapped with several fusions is written in each of them.
            channel = re.search(r"channel_id=(\d+)", instruction.attributes)
            key = (channel[1], one.kind) if channel else (name, instruction.name)
            if key not in instructions or instructions[key].count < runs:
                instructions[key] = dataclasses.replace(
                    one, count=runs, bytes=runs * one.bytes, is_exact=is_exact
                )
    groups: dict[tuple, list[Collective]] = defaultdict(list)
    for one in instructions.values():
        groups[one.kind, one.axes].append(one)
    return tuple(sorted(map(_sum, groups.values()), key=lambda one: -one.bytes))


def _sum(same: Sequence[Collective]) -> Collective:
    return Collective(
        kind=same[0].kind,
        axes=same[0].axes,
        count=sum(one.count for one in same),
        bytes=sum(one.bytes for one in same),
        shapes=tuple(sorted({shape for one in same for shape in one.shapes})),
        is_exact=all(one.is_exact for one in same),
    )


def _collective(one: Instruction, mesh: Mapping[str, int], scatters: bool) -> Collective | None:
    sent = re.search(r'_xla_megascale_transfer_type="([A-Z_]+)"', one.attributes)
    if sent and one.opcode == "send":
        # Between TPU slices hosts do it, over the data centre's network.
        kind, array = sent[1].lower().replace("_", "-"), one.arrays[0]
        return Collective(kind, (BETWEEN_SLICES,), 1, array.bytes, (str(array),))
    kind, arrays = one.opcode.removesuffix("-start"), one.results
    if kind not in COLLECTIVES:
        return None
    groups = _groups(one.attributes, math.prod(mesh.values()))
    size = sum(array.bytes for array in arrays)
    if kind == "reduce-scatter":
        size *= len(groups[0])
    if kind == "all-reduce" and scatters:
        kind = "reduce-scatter"
    axes = _axes(groups, mesh, whole=kind == "collective-permute")
    return Collective(kind, axes, 1, size, tuple(sorted(set(map(str, arrays)))))


def _groups(attributes: str, devices: int) -> list[list[int]]:
    """The devices that talk to one another, group by group; all, if none are named."""
    # A mesh that the compiler made: mesh['a'=2,'b'=4], device_ids=([2,4]T(1,0)) {'a'}.
    match = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}", attributes
    )
    if match:
        sizes = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", match[1])}
        ids = _iota(match[2], devices).reshape(list(sizes.values()))
        return _along(ids, list(sizes), re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", match[3]))
    # An iota: [4,2]<=[2,2,2]T(0,2,1).
    match = re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", attributes)
    if match:
        shape = [int(n) for n in match[1].split(",")]
        return _iota(match[2], devices).reshape(shape).tolist()
    match = re.search(r"(?:replica_groups|source_target_pairs)=\{(\{.*?\})\}", attributes)
    if match:
        return [[int(n) for n in one.split(",")] for one in re.findall(r"\{([\d,]+)\}", match[1])]
    return [list(range(devices))]


def _iota(text: str | None, devices: int) -> np.ndarray:
    """[2,2,2]T(0,2,1): the numbers from 0, reshaped and transposed; flat."""
    match = re.search(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text or "")
    if match is None:
        return np.arange(devices)
    ids = np.arange(devices).reshape([int(n) for n in match[1].split(",")])
    return (ids.transpose([int(n) for n in match[2].split(",")]) if match[2] else ids).reshape(-1)


def _along(ids: np.ndarray, names: list[str], chosen: list[tuple]) -> list[list[int]]:
    """Groups of ids along the chosen axes, each whole or ('a', before, size): a part of it."""
    parts = {name: (int(before or 1), int(part or 0)) for name, before, part in chosen}
    shape: list[int] = []
    for name, size in zip(names, ids.shape):
        before, part = parts.get(name, (1, 1))
        part = part or size
        shape += [before, part, size // before // part]
    fixed = [axis for axis in range(len(shape)) if axis % 3 != 1]
    grouped = ids.reshape(shape).transpose(fixed + list(range(1, len(shape), 3)))
    return grouped.reshape(-1, math.prod(shape[1::3])).tolist()


def _axes(groups: list[list[int]], mesh: Mapping[str, int], whole: bool) -> tuple[str, ...]:
    """The mesh axes along which the groups run; pairs of a permutation fill no axis."""
    sizes = tuple(mesh.values())
    varying: set[str] = set()
    for group in groups:
        coordinates = np.unravel_index(group, sizes)
        varying |= {axis for axis, row in zip(mesh, coordinates) if np.ptp(row)}
    axes = tuple(axis for axis in mesh if axis in varying)
    size, part = math.prod(mesh[axis] for axis in axes), len(groups[0])
    return axes if whole or part == size else (*axes, f"{part} of {size} devices")
