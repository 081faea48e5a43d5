"""What a user's editor, notebook and type checker see of the package."""

import ast
import dataclasses
import importlib.util
import inspect
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import numpy as np
import pytest

import sedd_jax
from sedd_jax.diffusion import graph, graphs, likelihood, losses, samplers, schedules
from sedd_jax.inference.options import Call, CallOptions, SamplingOptions

ROOT = Path(__file__).parent.parent
PUBLIC_API = ROOT / "tests/typing/public_api.py"


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


def types(kind: type) -> dict:
    return {f.name: get_type_hints(kind)[f.name] for f in dataclasses.fields(kind)}


def test_the_options_of_a_call_are_the_fields_that_it_reads():
    sampling = {name: one | None for name, one in types(sedd_jax.Sampling).items()}
    assert get_type_hints(SamplingOptions) == sampling
    call = types(Call)
    assert call.pop("sampling") is sedd_jax.Sampling
    assert get_type_hints(CallOptions) == sampling | call
    assert not SamplingOptions.__required_keys__ | CallOptions.__required_keys__


@pytest.mark.parametrize("kind", [sedd_jax.Sampling, Call])
def test_each_option_is_documented(kind):
    documented = re.findall(r"^(\w+): ", inspect.getdoc(kind), flags=re.MULTILINE)
    assert documented == [name for name in types(kind) if name != "sampling"]


@pytest.mark.parametrize(
    "method",
    ["sample", "sample_tokens", "infill", "stream", "revise", "stream_revisions", "chosen"],
)
def test_help_shows_the_options(method):
    function = getattr(sedd_jax.SEDD, method)
    shown = inspect.signature(function).parameters
    fields = dataclasses.fields(sedd_jax.Sampling)
    defaults = {field.name: None for field in fields}
    if method != "chosen":
        defaults |= {"batch_size": 16, "seed": 0, "progress": False}
    assert defaults == {name: shown[name].default for name in defaults}
    assert not any(one.kind is inspect.Parameter.VAR_KEYWORD for one in shown.values())
    documentation = inspect.getdoc(function)
    assert all(f"\n{name}: " in documentation for name in defaults)


@pytest.fixture(scope="module")
def model(tiny_run):
    return sedd_jax.load(tiny_run)


def test_on_step_gets_every_step_of_each_batch_and_changes_no_sample(model):
    states = []
    how = {"steps": 3, "seed": 1, "batch_size": 2, "length": 8}
    drawn = model.sample_tokens(3, **how, on_step=states.append)
    assert [state.step for state in states] == [0, 1, 2, 3] * 2
    assert states[0].is_masked.all() and not states[3].is_masked.any()
    np.testing.assert_array_equal(drawn, np.concatenate([s.tokens for s in states[3::4]]))
    np.testing.assert_array_equal(drawn, model.sample_tokens(3, **how))
    seen = []
    texts = model.sample(3, **how, on_step=lambda state: seen.append(state.step))
    assert texts == model.decode(drawn) and seen == [0, 1, 2, 3] * 2


def test_infill_and_revise_take_on_step_too(model):
    states = []
    (text,) = model.infill("if [MASK:4]", steps=2, on_step=states.append)
    assert [state.step for state in states] == [0, 1, 2] and states[-1].texts == [text]
    assert all(state.texts[0].startswith("if ") for state in states)
    states.clear()
    (text,) = model.revise("if a text", steps=4, strength=0.5, on_step=states.append)
    assert [state.step for state in states] == [2, 3, 4] and states[-1].texts == [text]


def test_pyright_accepts_strictly_what_uses_the_whole_api(tmp_path):
    if importlib.util.find_spec("pyright") is None or shutil.which("node") is None:
        pytest.skip("no pyright, or no node to run it; pip install pyright, and install node")
    shutil.copy(PUBLIC_API, tmp_path / "right.py")
    (tmp_path / "wrong.py").write_text(
        "# pyright: strict\nimport sedd_jax\nmodel = sedd_jax.load('a')\n"
        "model.sample(stepz=4)\nmodel.infill('a', seed='b')\nprint(model.bound)\n"
    )
    run = subprocess.run(
        [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, "right.py", "wrong.py"],
        cwd=tmp_path,  # as a user's project, in which the package is one that is installed
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    errors = [line for line in run.stdout.splitlines() if " - error: " in line]
    assert len(errors) == 2 and all("wrong.py" in line for line in errors), run.stdout + run.stderr
    assert 'No parameter named "stepz"' in errors[0] and '"seed"' in errors[1]


def test_the_file_for_type_checkers_uses_every_public_name():
    tree = ast.parse(PUBLIC_API.read_text(encoding="utf-8"))
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    used |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    used |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.keyword)}
    names = {*sedd_jax.__all__}
    for module in (graph, graphs, schedules, samplers, losses, likelihood):
        here = vars(module).items()
        names |= {n for n, v in here if getattr(v, "__module__", None) == module.__name__}
    kinds = [sedd_jax.SEDD, sedd_jax.State, sedd_jax.Bound, sedd_jax.LogRatio, sedd_jax.CorpusBound]
    for kind in (*kinds, graph.Graph, schedules.Schedule, losses.Loss, samplers.Chain):
        names |= {*vars(kind)} | {*getattr(kind, "__annotations__", ())}
    internal = {"of_halves"}  # from the package's own arrays
    public = {name for name in names if not name.startswith("_")}
    assert public - internal - used == set()


def test_an_unknown_option_is_refused_with_those_that_are_known(model):
    with pytest.raises(TypeError, match="unknown option 'stepz'; known: steps, .*, batch_size"):
        model.sample(stepz=4)
    with pytest.raises(TypeError, match="unknown option 'seed'; known: steps, predictor"):
        model.chosen(seed=4)
    with pytest.raises(ValueError, match="seed -1 is not a whole number"):
        model.sample(seed=-1)
    with pytest.raises(TypeError, match="unexpected keyword argument 'keep'"):
        model.log_likelihood_ratio("a", "b", keep=1)
