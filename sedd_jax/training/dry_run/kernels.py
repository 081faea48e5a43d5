"""The kernels of a compiled program: bytes and operations of each, from the program's text.

A kernel reads each operand once, of one that it slices the slices, and writes its results, of one
that it updates in place the update. Not counted: caches; of TPU programs the padding of tiles, and
the operations inside Mosaic kernels. What a TPU program holds in VMEM moves no bytes.
"""

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Iterator

from sedd_jax.training.dry_run.hlo import COLLECTIVES, Instruction, Program

# No work on the device, or that of an instruction before them; what goes between TPU slices.
FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "domain"),
    *("add-dependency", "opt-barrier", "partition-id", "replica-id", "send", "recv"),
}
COPIES = {"copy", "copy-start", "slice-start"}
SLICES = {"slice", "dynamic-slice", "gather"}
UPDATES = {"dynamic-update-slice", "scatter"}
MATMULS = {"dot", "convolution", "custom-call"}  # those of cuBLAS and cuDNN
# No arithmetic beside what `_operations` counts by itself.
MOVES = {
    *(FREE | COPIES | SLICES | MATMULS),
    *("dynamic-update-slice", "broadcast", "iota", "reshape", "transpose", "concatenate", "pad"),
    *("reverse", "convert", "bitcast-convert", "fusion"),
}
# Several instructions of a vector unit for one element.
SLOW = {
    *("tanh", "exponential", "exponential-minus-one", "log", "log-plus-one", "logistic", "power"),
    *("sine", "cosine", "erf", "sqrt", "rsqrt", "cbrt", "divide", "remainder"),
}
SLOW_INSTRUCTIONS = 8


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel of a program, which may run often."""

    name: str
    kind: str
    shape: str  # of the result, as HLO writes it
    op_names: tuple[str, ...]  # of its operations; where there are none, its loop's and its own
    runs: float  # in one run of the program
    # Of one run of the kernel:
    bytes: int  # read and written; of a collective those that a device sends
    flops: int  # of matmuls, two for a multiplication and an addition
    vector: int  # instructions of the vector units for one element each


def program_kernels(program: Program, fraction: float = 1.0) -> list[Kernel]:
    """The kernels of a parsed program.

    fraction: of the iterations that a loop whose length depends on data could have, as the head's
    over tiles of the positions that are masked. Of a conditional the branch with most bytes counts.
    """
    return list(_kernels(program, program.entry, 1.0, fraction, ""))


def _kernels(
    program: Program, computation: str, runs: float, fraction: float, loop: str
) -> Iterator[Kernel]:
    """loop is the op_name of the loop that the computation is the body of."""
    for one in program.computations[computation]:
        if one.opcode in FREE or one.opcode.endswith(("-done", "-update")):
            continue
        if 'custom_call_target="AllocateBuffer"' in one.attributes:
            continue
        trips, label = 1.0, loop
        if one.opcode == "while":
            label = one.op_name or loop
            trips = program.trip_count(one)
            if trips is None:
                # The last tile there is is half empty on average, and so is the last one run.
                trips = fraction * (program.max_trip_count(one) - 0.5) + 0.5
        elif one.opcode not in ("call", "async-start", "conditional"):
            yield _kernel(program, computation, one, runs, loop)
            continue
        bodies = [
            list(_kernels(program, name, runs * trips, fraction, label)) for name in one.called
        ]
        yield from max(bodies, key=lambda body: sum(kernel.runs * kernel.bytes for kernel in body))


def _kernel(program: Program, computation: str, one: Instruction, runs: float, loop: str) -> Kernel:
    flops, vector = _operations(program, computation, one)
    kind = _kind(program, one, flops)
    names = [one.op_name]
    if one.opcode == "fusion":
        body = [inner for name in one.called for inner in program.computations[name]]
        if kind == "matmul":  # what is fused with it would hide its name
            body = [inner for inner in body if inner.opcode in MATMULS]
            names = []
        names += [inner.op_name for inner in body if inner.opcode != "constant"]
    names = [name for name in names if name] or [f"{loop}/{one.name}"]
    moved = _bytes(program, computation, one)
    return Kernel(one.name, kind, one.shape, tuple(names), runs, moved, flops, vector)


def _kind(program: Program, one: Instruction, flops: int) -> str:
    opcodes = {one.opcode.removesuffix("-start")}
    results = []
    if one.opcode == "fusion":
        body = program.computations[one.called[0]]
        opcodes |= {inner.opcode.removesuffix("-start") for inner in body}
        results = _results(program, one.called[0], program.root(one.called[0]))
    if opcodes & COLLECTIVES:
        return "collective"
    if "fmha" in one.attributes.lower() or "splash" in one.name:
        return "attention"
    if flops:
        return "matmul"
    if one.opcode == "custom-call":
        return "custom call"
    if "kind=kCustom" in one.attributes:
        return "custom fusion"
    # XLA's input fusions: reductions, scatters, and some concatenations and transpositions.
    reduces = any(result.opcode.startswith("reduce") for result in [one, *results])
    if reduces or "kind=kInput" in one.attributes:
        return "reduction"
    return "copy" if one.opcode in COPIES else "elementwise"


# --- bytes


def _bytes(program: Program, computation: str, one: Instruction) -> int:
    operands = program.operands(computation, one)
    kind = one.opcode.removesuffix("-start")
    if kind in COLLECTIVES:
        data = max(sum(o.bytes for o in operands), sum(array.bytes for array in one.results))
        return data * (2 if kind == "all-reduce" else 1)  # a reduce-scatter and an all-gather
    if one.opcode in COPIES and one.opcode != "copy":  # (source, result, flag), in some order
        size = min(array.bytes for array in one.arrays[:2])
        return size * sum(not array.is_on_chip for array in one.arrays[:2])
    if one.opcode != "fusion":
        reads = _reads(one, operands, 1.0, in_place=True)
        written = _update(program, computation, one).memory_bytes
    else:
        fused = one.called[0]
        shares = _needed(program, fused)[1]
        reads = [shares[number] for number in range(len(operands))]
        written = 0
        for result in _results(program, fused, program.root(fused)):
            if _is_in_place(program, fused, result):
                result = _update(program, fused, result)
            written += result.bytes
        written = min(written, one.memory_bytes)
    return written + sum(round(r * o.memory_bytes) for r, o in zip(reads, operands))


def _needed(program: Program, computation: str) -> tuple[dict[str, float], dict[int, float]]:
    """Of each result in a fused computation the share that is needed; and of each parameter.

    From the root back: a slice needs of its operand as many elements as it has, an update in place
    none, everything else the share that is needed of its result.
    """
    root = program.root(computation)
    results = [one.name for one in _results(program, computation, root)]
    needed: dict[str, float] = defaultdict(float)
    needed[root.name] = 1.0
    parameters: dict[int, float] = defaultdict(float)
    for one in reversed(program.computations[computation]):
        share = needed[one.name]
        if one.opcode == "parameter":
            parameters[int(one.arguments)] = share
        operands = program.operands(computation, one)
        if one.opcode in ("fusion", "call"):
            inner = _needed(program, one.called[0])[1]
            reads = [share * inner[number] for number in range(len(operands))]
        else:
            in_place = one.name in results and _is_in_place(program, computation, one)
            reads = _reads(one, operands, share, in_place)
        for operand, read in zip(operands, reads):
            # Different slices of an array add up; those who use the same elements do not.
            before = needed[operand.name]
            after = before + read if one.opcode in SLICES else max(before, read)
            needed[operand.name] = min(1.0, after)
    return needed, parameters


def _reads(
    one: Instruction, operands: list[Instruction], share: float, in_place: bool
) -> list[float]:
    """The share of each operand that is read where that share of the result is needed."""
    reads = [share] * len(operands)
    if one.opcode in SLICES:
        reads[0] = min(1.0, share * one.size / max(1, operands[0].size))
    elif one.opcode == "dynamic-update-slice" and in_place:
        reads[0] = 0.0
    elif one.opcode == "scatter" and in_place:  # what it adds to
        reads[0] = min(1.0, share * operands[-1].size / max(1, operands[0].size))
    return reads


def _results(program: Program, computation: str, one: Instruction) -> list[Instruction]:
    """What an instruction stands for: the parts of a tuple, the operand of a bitcast."""
    if one.opcode not in ("tuple", "bitcast"):
        return [one]
    operands = program.operands(computation, one)
    return [result for part in operands for result in _results(program, computation, part)]


def _is_in_place(program: Program, computation: str, one: Instruction) -> bool:
    """Whether a fusion's result is an update of one of its operands."""
    if one.opcode not in UPDATES:
        return False
    whole = program.operands(computation, one)[0]
    return _results(program, computation, whole)[0].opcode == "parameter"


def _update(program: Program, computation: str, one: Instruction) -> Instruction:
    """What an update in place writes; of everything else the result."""
    if one.opcode not in UPDATES:
        return one
    return program.operands(computation, one)[1 if one.opcode == "dynamic-update-slice" else -1]


# --- operations


def _operations(program: Program, computation: str, one: Instruction) -> tuple[int, int]:
    """(operations of matmuls, instructions of the vector units)."""
    operands = program.operands(computation, one)
    if one.opcode in MATMULS:
        flops = _matmul_flops(one, operands)
        # The vector units do float32's, a multiplication and an addition at once.
        return flops, flops // 2 if flops and operands[0].arrays[0].dtype == "f32" else 0
    if one.opcode == "fusion":
        needed = _needed(program, one.called[0])[0]
        flops, vector = 0, 0.0
        for inner in program.computations[one.called[0]]:
            below = _operations(program, one.called[0], inner)
            flops, vector = flops + below[0], vector + needed[inner.name] * below[1]
        return flops, round(vector)
    if one.opcode in MOVES:
        return 0, 0
    if one.opcode in ("reduce", "reduce-window"):
        return 0, sum(operand.size for operand in operands[: len(one.arrays)])
    return 0, one.arrays[0].size * (SLOW_INSTRUCTIONS if one.opcode in SLOW else 1)


def _matmul_flops(one: Instruction, operands: list[Instruction]) -> int:
    """2 M N K of a matmul; of cuDNN's attention two of them forward, five backward."""
    scores = re.search(
        r'"intermediate_tensor_shape": ?\{[^}]*"dimensions": ?\[([^\]]*)\]', one.attributes
    )
    if scores:
        count = 5 if "Backward" in one.attributes else 2
        sides = [int(side) for side in re.findall(r"\d+", scores[1])]
        return count * 2 * math.prod(sides) * one.arrays[0].sides[-1]
    if one.opcode == "convolution":
        # So are matmuls written for TPUs, in many layouts: (M K)(K N)(M N) = (M N K)^2.
        return 2 * math.isqrt(operands[0].size * operands[1].size * one.size)
    contracted = re.search(r'lhs_contracting_dim(?:s=\{|ensions": ?\[)([\d,"]*)', one.attributes)
    if contracted is None:
        return 0
    sides = operands[0].arrays[0].sides
    inner = math.prod(sides[int(side)] for side in re.findall(r"\d+", contracted[1]))
    return 2 * one.arrays[0].size * inner
