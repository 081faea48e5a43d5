"""What a user's editor, notebook and type checker see of the package."""

import ast
import subprocess
import sys
from pathlib import Path

import sedd_jax

ROOT = Path(__file__).parent.parent


def test_dir_shows_the_public_names_and_imports_nothing_heavy():
    lines = [
        "import sys, sedd_jax",
        "public = [name for name in dir(sedd_jax) if not name.startswith('_')]",
        "heavy = {'jax', 'numpy', 'flax'} & {*sys.modules}",
        "print(*public, *heavy)",
    ]
    shown = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True
    )
    assert shown.stdout.split() == sorted(sedd_jax.__all__)
    assert {"load", "SEDD", "show", "State", "Bound", "Sampling"} <= {*sedd_jax.__all__}


def test_type_checkers_see_the_names_that_come_at_run_time():
    tree = ast.parse((ROOT / "sedd_jax/__init__.py").read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    static = {line.names[0].asname: line.module for line in block.body}
    assert static == {name: f"sedd_jax.{home}" for name, home in sedd_jax._HOMES.items()}
    for name, home in static.items():
        assert getattr(sedd_jax, name).__module__ == home
    assert (ROOT / "sedd_jax/py.typed").is_file()
