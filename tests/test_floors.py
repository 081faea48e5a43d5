"""The house rule: imports point down the floors, and importing the package touches no device."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "sedd_jax"
FLOORS = {
    0: ("draws",),
    1: ("kernels", "diffusion", "data", "devices", "flops", "processes", "sharding"),
    2: ("models", "state"),
    3: ("config", "checkpoint"),
    4: ("convert", "evaluate", "program"),
    5: (
        "train",
        "progress",
        "dry_run",
        "trajectory",
        "api",
        "loading",
        "generations",
        "report",
        "cli",
        "__init__",
        "__main__",
    ),
}
FLOOR = {room: floor for floor, rooms in FLOORS.items() for room in rooms}


def room_of(module: str) -> str:
    """'sedd_jax.models.head' is in the room 'models'; the package itself is '__init__'."""
    room = ([*module.split("."), "__init__"])[1]
    if not (PACKAGE / room).is_dir() and not (PACKAGE / f"{room}.py").is_file():
        return "__init__"  # a name that the package itself defines, as in `from sedd_jax import x`
    return room


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(source: str, module: str, is_package: bool) -> set[str]:
    """Dotted names of everything that the source imports, at the top or inside functions."""
    found = set()
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found |= {f"{base}.{name.name}" for name in node.names}
    return found


def uses(module: str, path: Path) -> set[str]:
    return imports(path.read_text(encoding="utf-8"), module, path.name == "__init__.py")


def complaint(room: str, other: str) -> str | None:
    """What is wrong with an import of one room by another, if anything."""
    for name in (room, other):
        if name not in FLOOR:
            return f"no floor for sedd_jax/{name}; add it to FLOORS in tests/test_floors.py"
    if room == other:
        return None
    if FLOOR[other] > FLOOR[room]:
        return f"{room} (floor {FLOOR[room]}) imports {other} (floor {FLOOR[other]}) above it"
    if FLOOR[other] == FLOOR[room] == 1:
        return f"{room} and {other} are both on floor 1, whose rooms do not import one another"
    return None


@pytest.mark.parametrize("module", modules())
def test_imports_point_down(module):
    room = room_of(module)
    others = {room_of(name) for name in uses(module, modules()[module]) if in_package(name)}
    complaints = [complaint(room, other) for other in {room, *others}]
    assert not any(complaints), f"{module}: {[c for c in complaints if c]}"


def in_package(name: str) -> bool:
    """Whether a name is of a room: sedd_jax.configs is data, open to all."""
    return name.split(".")[0] == "sedd_jax" and not name.startswith("sedd_jax.configs")


def test_no_two_rooms_need_each_other():
    needs = {}
    for module, path in modules().items():
        others = {room_of(name) for name in uses(module, path) if in_package(name)}
        needs.setdefault(room_of(module), set()).update(others - {room_of(module)})
    graphlib.TopologicalSorter(needs).prepare()


@pytest.mark.parametrize("room", ["kernels", "diffusion"])
def test_the_mathematics_imports_jax_only(room):
    allowed = {"jax", "sedd_jax", *sys.stdlib_module_names}
    for module, path in modules().items():
        if room_of(module) == room:
            roots = {name.split(".")[0] for name in uses(module, path)}
            assert roots <= allowed, f"{module} imports {sorted(roots - allowed)}"


def test_configs_import_only_base_and_one_another():
    for path in sorted((ROOT / "configs").glob("*.py")):
        source = path.read_text(encoding="utf-8")
        names = imports(source, f"sedd_jax.configs.{path.stem}", path.name == "__init__.py")
        wrong = [n for n in names if in_package(n)]
        assert not wrong, f"{path.name} imports {wrong}; a config is data: import only base"


@pytest.mark.parametrize(
    "room, other, words",
    [
        ("gadgets", "gadgets", "no floor for sedd_jax/gadgets; add it to FLOORS"),
        ("diffusion", "kernels", "both on floor 1"),
        ("diffusion", "models", "floor 2"),
        ("state", "config", "above it"),
        ("models", "diffusion", None),
        ("cli", "train", None),
    ],
)
def test_the_rule_tells_what_is_wrong(room, other, words):
    said = complaint(room, other)
    assert said is None if words is None else words in said


def test_imports_are_found_wherever_they_are():
    source = """
import sedd_jax.api
from sedd_jax import train
from . import scores
from ..models.head import HeadScores
def later():
    from sedd_jax.config import check
"""
    assert imports(source, "sedd_jax.diffusion.graphs", False) == {
        "sedd_jax.api",
        "sedd_jax.train",
        "sedd_jax.diffusion.scores",
        "sedd_jax.models.head.HeadScores",
        "sedd_jax.config.check",
    }


def test_importing_everything_touches_no_device():
    lines = [
        "import importlib",
        "import jax",
        "from jax._src import xla_bridge",
        *(f"importlib.import_module({m!r})" for m in modules() if not m.endswith("__main__")),
        "assert not xla_bridge._backends, xla_bridge._backends",
        "jax.devices()",
        "assert xla_bridge._backends  # where jax keeps them",
        "print('untouched')",
    ]
    run = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.stdout.endswith("untouched\n"), run.stderr
