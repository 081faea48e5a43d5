"""The text of a compiled program as instructions. Imports nothing but the standard library."""

import dataclasses
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
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Array:
    """A shape as in bf16[768,3072]."""

    dtype: str
    sides: tuple[int, ...]

    @property
    def bytes(self) -> int:
        bits = re.search(r"\d+", self.dtype)  # of f8e4m3 the first, of a token none
        return math.prod(self.sides) * (int(bits[0]) if bits else 8 * (self.dtype == "pred")) // 8

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

    @property
    def arrays(self) -> list[Array]:
        """Of the result."""
        return [
            Array(dtype, tuple(int(side) for side in sides.split(",") if side))
            for dtype, sides in _ARRAY.findall(self.shape)
        ]

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.arguments)

    @property
    def called(self) -> list[str]:
        """The computations that it runs, but for the condition of a loop."""
        return re.findall(r"[\w.\-]+", " ".join(_CALLED.findall(self.attributes)))


@dataclasses.dataclass(frozen=True)
class Program:
    """The computations by name."""

    computations: dict[str, list[Instruction]]
    entry: str

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
