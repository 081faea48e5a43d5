"""The Colab notebook, run from top to bottom in a real kernel, with a small export for the hub."""

import os
import subprocess
import sys

import pytest
from conftest import REPOSITORY

import sedd_jax

NOTEBOOK = REPOSITORY / "notebooks/sedd_colab.ipynb"


def test_the_notebook_runs_from_top_to_bottom(long_run, scorer_folder, tmp_path):
    pytest.importorskip("nbmake", reason="the notebook is run by nbmake, of the [test] extra")
    pytest.importorskip("matplotlib", reason="its plots need the [plot] extra")
    sedd_jax.load(long_run).save_pretrained(tmp_path / "model")
    notebook = tmp_path / "sedd_colab.ipynb"  # it writes beside itself
    notebook.write_bytes(NOTEBOOK.read_bytes())
    environment = {
        **os.environ,
        "XLA_FLAGS": "",
        "SEDD_MODEL": str(tmp_path / "model"),
        "SEDD_SCORER": str(scorer_folder),
        "SEDD_SAMPLE_STEPS": "8",
        "SEDD_TRAIN_STEPS": "4",
    }
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--nbmake", "--nbmake-timeout=600", str(notebook)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-6000:]
    assert "1 passed" in run.stdout
    page = (tmp_path / "animation.html").read_text(encoding="utf-8")
    assert "<!doctype html>" in page.lower()
    assert (tmp_path / "tiny-converted" / "model.safetensors").is_file()


def test_the_notebook_is_kept_without_outputs():
    import nbformat

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(code) > 10
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
