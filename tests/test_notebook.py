"""The notebooks, run from top to bottom in a real kernel, with a small export for the hub."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import QUICK, REPOSITORY

import sedd_jax

FOLDER = REPOSITORY / "notebooks"
NOTEBOOKS = sorted(path.name for path in FOLDER.glob("*.ipynb"))


def run(name: str, folder: Path, **settings: str) -> None:
    """Runs a copy in `folder`, beside which it writes."""
    pytest.importorskip("nbmake", reason="the notebook is run by nbmake, of the [test] extra")
    pytest.importorskip("matplotlib", reason="its plots need the [plot] extra")
    notebook = folder / name
    notebook.write_bytes((FOLDER / name).read_bytes())
    few = {"SEDD_SAMPLE_STEPS": "8", "SEDD_TRAIN_STEPS": "4"}
    made = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--nbmake", "--nbmake-timeout=600", str(notebook)],
        cwd=folder,
        env={**os.environ, "XLA_FLAGS": QUICK, **few, **settings},
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stdout[-6000:]
    assert "1 passed" in made.stdout


def test_the_notebook_runs_from_top_to_bottom(long_run, scorer_folder, tmp_path):
    sedd_jax.load(long_run).save_pretrained(tmp_path / "model")
    settings = {"SEDD_MODEL": str(tmp_path / "model"), "SEDD_SCORER": str(scorer_folder)}
    run("sedd_colab.ipynb", tmp_path, **settings)
    page = (tmp_path / "animation.html").read_text(encoding="utf-8")
    assert "<!doctype html>" in page.lower()
    assert (tmp_path / "tiny-converted" / "model.safetensors").is_file()


@pytest.mark.parametrize("name", [name for name in NOTEBOOKS if name != "sedd_colab.ipynb"])
def test_the_other_notebooks_run_from_top_to_bottom(name, tmp_path):
    run(name, tmp_path)


def cells(name: str) -> list[dict]:
    return json.loads((FOLDER / name).read_text(encoding="utf-8"))["cells"]


def test_the_notebooks_begin_with_the_same_installation():
    first = [next(c for c in cells(name) if c["cell_type"] == "code") for name in NOTEBOOKS]
    assert len({"".join(cell["source"]) for cell in first}) == 1


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_notebook_is_kept_without_outputs(name):
    import nbformat

    notebook = nbformat.read(FOLDER / name, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(code) > 6
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
