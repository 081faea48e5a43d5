"""The text of a compiled program as instructions. Imports nothing but the standard library."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
# NAME = SHAPE OPCODE(ARGUMENTS)ATTRIBUTES; shapes have parentheses in their layouts: T(8,128).
_INSTRUCTION = re.compile(
    r"\s+(ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\(([^()]*+(?:\([^()]*+\)[^()]*+)*+)\)(.*)"
)
_CALLED = re.compile(
    r"(?:calls|to_apply|body|true_computation|false_computation|branch_computations"
    r"|called_computations)=(\{[^}]*\}|%?[\w.\-]+)"
)
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")
# Of a TPU's layouts, which have tiles T(8,128): memory spaces inside the chip.
_ON_CHIP = re.compile(r"T\(.*S\([12]\)")
COLLECTIVES = {
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
}


@dataclasses.dataclass(frozen=True)
class Array:
    """A shape as in bf16[768,3072]."""

    dtype: str
    sides: tuple[int, ...]
    is_on_chip: bool = False  # in a TPU's VMEM or SMEM

    @property
    def size(self) -> int:
        return math.prod(self.sides)

    @property
    def bytes(self) -> int:
        bits = re.search(r"\d+", self.dtype)  # of f8e4m3 the first, of a token none
        return self.size * (int(bits[0]) if bits else 8 * (self.dtype == "pred")) // 8

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.sides))}]"


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    is_root: bool
    name: str
    shape: str  # of the result, with its layout; a tuple in parentheses
    opcode: str
    arguments: str  # operands, or the number of a parameter, or the value of a constant
    attributes: str

    @functools.cached_property
    def arrays(self) -> list[Array]:
        """Of the result."""
        return [
            Array(
                dtype,
                tuple(int(side) for side in sides.split(",") if side),
                bool(_ON_CHIP.search(layout)),
            )
            for dtype, sides, layout in _ARRAY.findall(self.shape)
        ]

    @property
    def results(self) -> list[Array]:
        """The arrays but for what a started collective repeats: its operands, and flags."""
        if self.opcode not in ("all-gather-start", "collective-permute-start"):
            return self.arrays
        data = [array for array in self.arrays if array.dtype != "u32" or array.sides]
        return data[len(data) // 2 :]

    @property
    def size(self) -> int:
        """Elements of the result."""
        return sum(array.size for array in self.arrays)

    @property
    def bytes(self) -> int:
        """Of the result."""
        return sum(array.bytes for array in self.arrays)

    @property
    def memory_bytes(self) -> int:
        """Of the result, but for what stays inside the chip."""
        return sum(array.bytes for array in self.arrays if not array.is_on_chip)

    @functools.cached_property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.arguments)

    @property
    def called(self) -> list[str]:
        """The computations that it runs, but for the condition of a loop."""
        return re.findall(r"[\w.\-]+", " ".join(_CALLED.findall(self.attributes)))

    @property
    def op_name(self) -> str:
        """Where in the traced Python program it comes from: "jit(f)/jvp(g)/tanh"; or empty."""
        match = re.search(r'op_name="([^"]*)"', self.attributes)
        return match[1] if match else ""


@dataclasses.dataclass(frozen=True)
class Program:
    """The computations by name."""

    computations: dict[str, list[Instruction]]
    entry: str

    @functools.cached_property
    def by_name(self) -> dict[str, dict[str, Instruction]]:
        """The instructions of each computation."""
        return {name: {one.name: one for one in body} for name, body in self.computations.items()}

    def root(self, computation: str) -> Instruction:
        """Whose result is that of the computation."""
        return next(one for one in self.computations[computation] if one.is_root)

    def operands(self, computation: str, one: Instruction) -> list[Instruction]:
        """The instructions of the computation whose results are the operands of one."""
        names = self.by_name[computation]
        return [names[name] for name in one.operands if name in names]

    def walk(self) -> Iterator[tuple[str, int, bool]]:
        """Every computation that runs, as often as it is called, those of fusions included.

        (name, how often in one run of the program, whether that is known): a loop of unknown
        length counts for one iteration. All branches of a conditional count.
        """
        todo = [(self.entry, 1, True)]
        while todo:
            name, runs, is_exact = todo.pop()
            yield name, runs, is_exact
            for one in self.computations[name]:
                if one.opcode.endswith(("-done", "-update")):  # its start has called already
                    continue
                trips = self.trip_count(one) if one.opcode == "while" else 1
                for inner in one.called:
                    todo.append((inner, runs * (trips or 1), is_exact and trips is not None))

    def trip_count(self, loop: Instruction) -> int | None:
        """Iterations of a loop: the compiler's note, or its condition i < n counted from 0."""
        known = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes)
        if known:
            return int(known[1])
        # TPU programs carry no note. A scan's condition compares its counter with a constant.
        condition = re.search(r"condition=%?([\w.\-]+)", loop.attributes)
        lines = self.computations.get(condition[1], []) if condition else []
        numbers = {one.name: one.arguments for one in lines if one.opcode == "constant"}
        for one in lines:
            if one.is_root and one.opcode == "compare" and "direction=LT" in one.attributes:
                bound = numbers.get(one.operands[1], "")
                return int(bound) if bound.isdigit() else None
        return None

    def max_trip_count(self, loop: Instruction) -> int:
        """The most iterations of a loop whose number depends on data, such as one over tiles.

        As many as there are slices, of the size that its body reads or updates, in an array; of
        several arrays the one with the largest slices. 1 if its body slices none.
        """
        bodies = list(loop.called)
        for name in bodies:
            bodies += [
                inner
                for one in self.computations[name]
                if one.opcode in ("fusion", "call")
                for inner in one.called
            ]
        largest = (0, 1)
        for name in bodies:
            for one in self.computations[name]:
                operands = self.operands(name, one)
                if one.opcode == "dynamic-slice":
                    whole, part = operands[0].size, one
                elif one.opcode == "dynamic-update-slice":
                    whole, part = one.size, operands[1]
                else:
                    continue
                largest = max(largest, (part.size, -(-whole // part.size)))
        return largest[1]


def parse(text: str) -> Program:
    """The program of this text, as of `compiled.as_text()`."""
    computations: dict[str, list[Instruction]] = {}
    entry, body = "", []
    for line in text.splitlines():
        if line.startswith(" "):
            match = _INSTRUCTION.match(line)
            if match:
                body.append(Instruction(bool(match[1]), *match.groups()[1:]))
        elif match := _COMPUTATION.match(line):
            body = computations[match[2]] = []
            entry = match[2] if match[1] else entry
    return Program(computations, entry)
