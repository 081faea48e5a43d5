"""The rule of layers: a module imports from lower layers and from its own folder, never in a cycle.

Importing the package touches no device.
"""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "sedd_jax"
LAYERS = (
    ("host", "diffusion", "kernels", "parallel"),
    ("data", "models", "state"),
    ("registry",),
    ("config",),
    ("experiment",),
    ("runs",),
    ("convert",),
    ("inference",),
    ("training", "evaluation"),
    ("cli",),
    ("__init__", "__main__"),
)
LAYER = {name: number for number, names in enumerate(LAYERS, start=1) for name in names}


def place_of(module: str) -> str:
    """'sedd_jax.models.head' is in 'models'; the package itself is '__init__'."""
    place = ([*module.split("."), "__init__"])[1]
    if not (PACKAGE / place).is_dir() and not (PACKAGE / f"{place}.py").is_file():
        return "__init__"  # a name that the package itself defines, as in `from sedd_jax import x`
    return place


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


def in_package(name: str) -> bool:
    """Whether a name is of a layer: the version and sedd_jax.configs are data, open to all."""
    is_data = name == "sedd_jax.__version__" or name.startswith("sedd_jax.configs")
    return name.split(".")[0] == "sedd_jax" and not is_data


def complaint(place: str, other: str) -> str | None:
    """What is wrong with an import of `other` by `place`, both entries of the package; or None."""
    for name in (place, other):
        if name not in LAYER:
            return f"no layer for sedd_jax/{name}; add it to LAYERS in tests/test_layers.py"
    if place == other:
        return None
    if LAYER[other] > LAYER[place]:
        return f"{place} (layer {LAYER[place]}) imports {other} (layer {LAYER[other]}) above it"
    if LAYER[other] == LAYER[place]:
        return (
            f"{place} and {other} are both in layer {LAYER[place]}, which do not import each other"
        )
    return None


def complaints(sources: dict[str, tuple[str, bool]]) -> list[str]:
    """What is wrong with the imports of modules, {name: (source, is a package)}."""
    wrong, inside = [], {}
    for module, (source, is_package) in sources.items():
        place = place_of(module)
        for name in filter(in_package, imports(source, module, is_package)):
            message = complaint(place, place_of(name))
            if message:
                wrong.append(f"{module}: {message}")
            if place_of(name) == place:
                inside.setdefault(module, set()).add(module_of(name, sources))
        inside.get(module, set()).discard(module)
    try:
        graphlib.TopologicalSorter(inside).prepare()
    except graphlib.CycleError as error:
        wrong.append(f"imports go in a cycle: {' <- '.join(error.args[1])}")
    return wrong


def module_of(name: str, sources: dict) -> str:
    """The module that an imported name is, or is in."""
    while name not in sources and "." in name:
        name = name.rpartition(".")[0]
    return name


def package_sources() -> dict[str, tuple[str, bool]]:
    return {
        module: (path.read_text(encoding="utf-8"), path.name == "__init__.py")
        for module, path in modules().items()
    }


def test_imports_point_down_and_never_in_a_cycle():
    assert complaints(package_sources()) == []


@pytest.mark.parametrize(
    "module, line, words",
    [
        ("diffusion.graphs", "from sedd_jax import config", "config (layer 4) above it"),
        ("data.records", "from sedd_jax.state import TrainState", "both in layer 2"),
        ("training.train", "from sedd_jax.evaluation import report", "both in layer 9"),
        ("diffusion.schedules", "from sedd_jax.diffusion import losses", "in a cycle"),
        ("data.corpora", "from sedd_jax.data.records import Records", "in a cycle"),
    ],
)
def test_a_planted_import_is_refused(module, line, words):
    sources = package_sources()
    source, is_package = sources[f"sedd_jax.{module}"]
    sources[f"sedd_jax.{module}"] = (f"{source}\n\ndef later():\n    {line}\n", is_package)
    (wrong,) = complaints(sources)
    assert words in wrong


@pytest.mark.parametrize("place", ["kernels", "diffusion"])
def test_the_mathematics_imports_jax_only(place):
    allowed = {"jax", "sedd_jax", *sys.stdlib_module_names}
    for module, path in modules().items():
        if place_of(module) == place:
            roots = {name.split(".")[0] for name in uses(module, path)}
            assert roots <= allowed, f"{module} imports {sorted(roots - allowed)}"


def test_configs_import_only_base_and_one_another():
    for path in sorted((ROOT / "configs").glob("*.py")):
        source = path.read_text(encoding="utf-8")
        names = imports(source, f"sedd_jax.configs.{path.stem}", path.name == "__init__.py")
        wrong = [n for n in names if in_package(n)]
        assert not wrong, f"{path.name} imports {wrong}; a config is data: import only base"


def test_an_entry_without_a_layer_is_refused():
    assert "no layer for sedd_jax/gadgets" in complaint("gadgets", "data")


def test_imports_are_found_wherever_they_are():
    source = """
import sedd_jax.inference.model
from sedd_jax.training import train
from . import scores
from ..models.head import HeadScores
def later():
    from sedd_jax.config import check
"""
    assert imports(source, "sedd_jax.diffusion.graphs", False) == {
        "sedd_jax.inference.model",
        "sedd_jax.training.train",
        "sedd_jax.diffusion.scores",
        "sedd_jax.models.head.HeadScores",
        "sedd_jax.config.check",
    }


def test_importing_everything_touches_no_device_and_no_slow_library():
    slow = ("huggingface_hub", "scipy", "tensorboardX", "torch")  # the calls import them
    lines = [
        "import importlib, sys",
        "import jax",
        "from jax._src import xla_bridge",
        *(f"importlib.import_module({m!r})" for m in modules() if not m.endswith("__main__")),
        "assert not xla_bridge._backends, xla_bridge._backends",
        f"assert not set({slow}) & sys.modules.keys(), set({slow}) & sys.modules.keys()",
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
