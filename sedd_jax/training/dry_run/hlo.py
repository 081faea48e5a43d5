"""The collectives of a compiled program, read from its text. Imports numpy only."""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

import numpy as np

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
BETWEEN_SLICES = "between slices"
_KIND = re.compile(rf" ({'|'.join(sorted(KINDS, key=len, reverse=True))})(-start)?\(")
_COMPUTATION = re.compile(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|branch_computations|called_computations)=(\{[^}]*\}|%?[\w.\-]+)"
)
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')
_ARRAY = re.compile(r"\b([a-z]+[0-9]*[a-z0-9]*)\[([0-9,]*)\]")
_BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "token": 0, "s2": 2, "u2": 2}


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


def collectives(text: str, mesh: Mapping[str, int]) -> tuple[Collective, ...]:
    """What the program of this text (`compiled.as_text()`) sends over a mesh, largest first.

    mesh names the sizes of the axes, in order; the program's devices are the mesh's, row by row.
    """
    bodies, entry = _computations(text)
    instructions: dict[tuple, Collective] = {}
    for name, runs, is_exact in _walk(bodies, entry):
        scatters = _reduce_scatters(name, bodies)
        for number, line in enumerate(bodies[name]):
            one = _collective(line, mesh, scatters)
            if one is None:
                continue
            # One collective that is overlapped with several fusions is written in each of them.
            channel = re.search(r"channel_id=(\d+)", line)
            key = (channel[1], one.kind) if channel else (name, number)
            if key not in instructions or instructions[key].count < runs:
                instructions[key] = dataclasses.replace(
                    one, count=runs, bytes=runs * one.bytes, is_exact=is_exact
                )
    totals: dict[tuple, Collective] = {}
    for one in instructions.values():
        group = (one.kind, one.axes)
        totals[group] = _sum(totals[group], one) if group in totals else one
    return tuple(sorted(totals.values(), key=lambda one: -one.bytes))


def _sum(a: Collective, b: Collective) -> Collective:
    return Collective(
        kind=a.kind,
        axes=a.axes,
        count=a.count + b.count,
        bytes=a.bytes + b.bytes,
        shapes=tuple(sorted({*a.shapes, *b.shapes})),
        is_exact=a.is_exact and b.is_exact,
    )


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """({name: lines}, the name of the entry)."""
    bodies: dict[str, list[str]] = {}
    entry = current = ""
    for line in text.splitlines():
        if line[:1] in ("%", "E"):
            match = _COMPUTATION.match(line)
            if match:
                current = match[1]
                bodies[current] = []
                if line.startswith("ENTRY"):
                    entry = current
        elif current and line.startswith(" "):
            bodies[current].append(line)
    return bodies, entry


def _walk(bodies: dict[str, list[str]], entry: str) -> Iterator[tuple[str, int, bool]]:
    """Every computation that runs: (name, how often in a step, whether that is known)."""
    todo = [(entry, 1, True)]
    while todo:
        name, runs, is_exact = todo.pop()
        yield name, runs, is_exact
        for line in bodies[name]:
            if "-done(" in line or "-update(" in line:
                continue
            trips = _trips(line, bodies) if " while(" in line else 1
            for called in _CALLED.findall(line):
                for inner in re.findall(r"[\w.\-]+", called):
                    if inner in bodies:
                        todo.append((inner, runs * (trips or 1), is_exact and trips is not None))


def _trips(line: str, bodies: dict[str, list[str]]) -> int | None:
    """Iterations of a loop: from the compiler's note, or its condition i < n counted from 0."""
    known = _TRIPS.search(line)
    if known:
        return int(known[1])
    # TPU programs carry no note. A scan's condition compares its counter with a constant.
    condition = re.search(r"condition=%?([\w.\-]+)", line)
    lines = bodies.get(condition[1], []) if condition else []
    constants = {}
    for one in lines:
        constants |= re.findall(r"%?([\w.\-]+) = s32\[\]\S* constant\((\d+)\)", one)
    for one in lines:
        match = re.search(r"ROOT .* compare\(%?[\w.\-]+, %?([\w.\-]+)\), direction=LT", one)
        if match and match[1] in constants:
            return int(constants[match[1]])
    return None


def _reduce_scatters(name: str, bodies: dict[str, list[str]]) -> bool:
    """Whether a computation is a reduce-scatter, which TPU programs write as a fusion of two."""
    return name.startswith("all-reduce-scatter") and any(
        " dynamic-slice(" in line for line in bodies[name]
    )


def _collective(line: str, mesh: Mapping[str, int], scatters: bool) -> Collective | None:
    sent = re.search(r'_xla_megascale_transfer_type="([A-Z_]+)"', line)
    if sent and " send(" in line:
        # Between TPU slices hosts do it, over the data centre's network.
        dtype, shape = _ARRAY.findall(line.split(" = ", 1)[1])[0]
        kind = sent[1].lower().replace("_", "-")
        shapes = (f"{dtype}[{shape}]",)
        return Collective(kind, (BETWEEN_SLICES,), 1, _bytes(dtype, shape), shapes)
    match = _KIND.search(line)
    if match is None or " = " not in line[: match.start() + 1]:
        return None
    kind, started = match[1], match[2]
    shown = _ARRAY.findall(line[: match.start()].split(" = ", 1)[1])
    if started and kind in ("all-gather", "collective-permute"):
        # (operands, results, flags): the results are the second of what is no flag.
        data = [one for one in shown if one[0] != "u32" or one[1]]
        shown = data[len(data) // 2 :]
    groups = _groups(line, math.prod(mesh.values()))
    size = sum(_bytes(dtype, shape) for dtype, shape in shown)
    if kind == "reduce-scatter":
        size *= len(groups[0])
    if kind == "all-reduce" and scatters:
        kind = "reduce-scatter"
    names = tuple(sorted({f"{dtype}[{shape}]" for dtype, shape in shown}))
    axes = _axes(groups, mesh, whole=kind == "collective-permute")
    return Collective(kind, axes, 1, size, names)


def _bytes(dtype: str, shape: str) -> int:
    bits = _BITS.get(dtype)
    if bits is None:
        digits = re.search(r"\d+", dtype)
        bits = 8 if dtype.startswith("f8") else int(digits[0]) if digits else 8
    return math.prod(int(n) for n in shape.split(",") if n) * bits // 8


def _groups(line: str, devices: int) -> list[list[int]]:
    """The devices that talk to one another, group by group; all, if none are named."""
    # A mesh that the compiler made: mesh['a'=2,'b'=4], device_ids=([2,4]T(1,0)) {'a'}.
    match = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}", line
    )
    if match:
        sizes = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", match[1])}
        ids = _iota(match[2], devices).reshape(list(sizes.values()))
        return _along(ids, list(sizes), re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", match[3]))
    # An iota: [4,2]<=[2,2,2]T(0,2,1).
    match = re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", line)
    if match:
        shape = [int(n) for n in match[1].split(",")]
        return _iota(match[2], devices).reshape(shape).tolist()
    match = re.search(r"replica_groups=\{(\{.*?\})\}", line)
    if match:
        return [[int(n) for n in one.split(",")] for one in re.findall(r"\{([\d,]+)\}", match[1])]
    match = re.search(r"source_target_pairs=\{(\{.*?\})\}", line)
    if match:
        pairs = re.findall(r"\{(\d+),(\d+)\}", match[1])
        return [[int(a), int(b)] for a, b in pairs]
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
