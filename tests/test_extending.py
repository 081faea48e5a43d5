"""Parts of a user's own: the code of docs/extend.md, run as a user would, and what is refused."""

import contextlib
import dataclasses
import importlib.util
import json
import os
import py_compile
import re
import shutil
import subprocess
import sys
from pathlib import Path

import dense
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_graphs
import test_schedules
from conftest import QUICK, REPOSITORY, TINY, says

import sedd_jax
from sedd_jax import config as configuration
from sedd_jax import experiment, registry
from sedd_jax.cli.compare import _runs
from sedd_jax.cli.keys import values_of
from sedd_jax.cli.train import parse_train
from sedd_jax.configs import base, quickstart
from sedd_jax.configs.rivals import RIVALS
from sedd_jax.data import make_corpus
from sedd_jax.diffusion import samplers
from sedd_jax.diffusion.draws import categorical
from sedd_jax.diffusion.graph import Graph, GraphByTables, lift
from sedd_jax.diffusion.graphs import GRAPHS, Uniform, is_of
from sedd_jax.diffusion.predictors import PREDICTORS, trait
from sedd_jax.diffusion.schedules import LogLinear
from sedd_jax.diffusion.scores import DenseScores
from sedd_jax.experiment import evaluated_fraction
from sedd_jax.host import imports
from sedd_jax.inference import sampling
from sedd_jax.inference.sampling import Sampling
from sedd_jax.training.train import train

PAGE = (REPOSITORY / "docs" / "extend.md").read_text(encoding="utf-8")
BLOCKS = dict(re.findall(r"```python\n# (\w+\.py)\n(.*?)```", PAGE, re.DOTALL))
ALL = ["cosine.py", "zipf.py", "sampler.py", "squares.py", "halved.py"]
POWER, SHARE = 0.5, 0.8


def forget() -> None:
    """What another process does not know of this one: its modules, and what they registered."""
    for kind, about in registry.KINDS.items():
        for name in [name for name in about.table if registry.is_registered(kind, name)]:
            del about.table[name]
    for name in [name for name in sys.modules if re.search(r"_[0-9a-f]{12}$", name)]:
        del sys.modules[name]
    RIVALS.pop("weighted", None)


def another_machine(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
    forget()


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    forget()
    yield
    forget()


@pytest.fixture
def files(tmp_path):
    """The page's modules, by name."""
    for name, code in BLOCKS.items():
        (tmp_path / name).write_text(code, encoding="utf-8")
    return {name: str(tmp_path / name) for name in BLOCKS}


def commands(cache, *lines):
    """The commands one after the other, in a process of their own on one device."""
    code = "import sys; from sedd_jax import cli\n" + "".join(
        f"sys.argv = {['sedd', *arguments]}; assert not cli.{name}_command()\n"
        for name, arguments in lines
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cache.parent,
        env={**os.environ, "XLA_FLAGS": QUICK, "XDG_CACHE_HOME": str(cache)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with every part of the page: trained for 2 steps, its modules then gone."""
    folder = tmp_path_factory.mktemp("extending")
    for name, code in BLOCKS.items():
        (folder / name).write_text(code, encoding="utf-8")
    keys = {
        **TINY,
        "imports": ",".join(str(folder / name) for name in ALL),
        "data.corpus": "squares",
        "data.parameters.count": 300,
        "data.tokenizer": "characters",
        "data.length": 16,
        "graph.name": "zipf",
        "graph.scale_by_sigma": False,
        "graph.parameters.power": POWER,
        "schedule.name": "cosine",
        "schedule.parameters.eps": 0.01,
        "objective.name": "weighted",
        "sample.predictor": "warm",
        "sample.grid": "power",
        "sample.steps": 4,
        "sample.parameters": json.dumps({"share": SHARE, "power": 3}),
        "model.blocks": 1,
        "train.steps": 2,
    }
    flags = [f"--config.{key}={value}" for key, value in keys.items()]
    commands(folder / "cache", ("train", ["--config=quickstart", f"--workdir={folder}/r", *flags]))
    for name in BLOCKS:
        (folder / name).unlink()
    return folder / "r"


@pytest.fixture
def cache_of_run(run, monkeypatch):
    """The machine on which the run's code has been named."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(run.parent / "cache"))


def test_the_page_has_a_module_for_each_part():
    assert list(BLOCKS) == ALL


def test_the_run_loads_with_its_own_parts_and_so_does_its_export(
    run, cache_of_run, tmp_path, monkeypatch
):
    saved = json.loads((run / "config.json").read_text())
    assert saved["imports"] == ALL and saved["schedule"]["parameters"] == {"eps": 0.01}
    assert {file.name for file in (run / "imports").iterdir()} == {*ALL}
    model = sedd_jax.load(run)
    assert type(model.schedule).__name__ == "Cosine" and model.schedule.eps == 0.01
    assert type(model.graph).__name__ == "Zipf" and model.graph.power == POWER
    assert model.objective.factor == 0.5
    predictor, (grid,) = (
        model.sampling.functions().predictor,
        jax.tree_util.tree_leaves([model.sampling.functions().grid.func]),
    )
    assert (predictor.func.__name__, predictor.keywords) == ("warm", {"share": SHARE})
    assert (grid.func.__name__, grid.keywords) == ("power_grid", {"power": 3})
    assert model.chosen(predictor="tweedie").parameters == {"power": 3}  # it takes no share

    folder = tmp_path / "export"
    model.save_pretrained(folder)
    assert (folder / "imports" / "cosine.py").read_text() == BLOCKS["cosine.py"]
    assert str(run.parent) not in (folder / "sedd_jax.json").read_text()
    forget()
    exported = sedd_jax.load(folder)  # its code is named already
    assert exported.sampling == model.sampling and exported.graph.power == POWER

    another_machine(monkeypatch, tmp_path)
    for source in (folder, run):
        with says("'cosine.py'", f"--imports={source}/imports/cosine.py"):
            sedd_jax.load(source)
    assert not registry.is_registered("schedule", "cosine")
    named = [str(folder / "imports" / name) for name in ALL]
    assert sedd_jax.load(folder, imports=named).schedule.eps == 0.01
    forget()
    assert sedd_jax.load(run).schedule.eps == 0.01  # named once


def test_a_fresh_process_goes_on_with_the_run_samples_and_scores(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    done = commands(
        run.parent / "cache",
        ("train", [f"--workdir={copy}", "--config.train.steps=3"]),
        ("sample", [f"--workdir={copy}", "--num_samples=1", "--predictor=warm", "--grid=power"]),
        ("eval", ["likelihood", f"--workdir={copy}", "--passes=2", "--blocks=4"]),
    )
    assert "resuming at step 2" in done.stderr and "nats" in done.stdout


def test_a_module_that_has_changed_does_not_go_on_with_the_run(run, files, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    with open(files["cosine.py"], "a", encoding="utf-8") as file:
        file.write("\nprint()\n")
    names = ",".join(files[name] for name in ALL)
    request = parse_train("sedd-train", [f"--workdir={copy}", f"--config.imports={names}"])
    with says("began with another 'cosine.py'", str(copy / "imports" / "cosine.py")):
        train(request.config, request.workdir)


# --- the graph and the schedule, by the definitions


@pytest.fixture
def zipf(files, monkeypatch):
    imports.import_modules([files["zipf.py"]])

    def rate(dim):
        weights = (1.0 + np.arange(dim)) ** -1.0
        return np.outer(weights / weights.sum(), np.ones(dim)) - np.eye(dim)

    monkeypatch.setitem(dense.RATES, "zipf", rate)
    return GRAPHS["zipf"]


def test_the_graph_passes_the_checks_of_the_built_in_ones(zipf):
    test_graphs.test_rates_are_the_rows_of_the_rate_matrix("zipf", 4)
    test_graphs.test_transition_is_the_exponential_of_the_rates("zipf", 4, 0.7)
    test_graphs.test_transitions_compose("zipf", 4)
    test_graphs.test_perturb_draws_from_the_transition("zipf", 1.0)
    test_graphs.test_limit_is_where_the_forward_process_ends("zipf")
    test_graphs.test_reverse_rate_is_the_score_times_the_forward_rate("zipf", 4, 0.7)
    test_graphs.test_staggered_score_is_the_earlier_law_over_the_present_one("zipf", 4, 2.0, 1.5)
    test_graphs.test_score_entropy_is_definition_3_1("zipf", 4, 0.7, 1.0)


def test_the_reverse_steps_of_the_graph_are_bayes(zipf):
    graph, law = zipf(4), dense.data_law(4, 1)
    exact = dense.bayes(graph, law, 1.2, 0.5).T
    scores = DenseScores(
        jnp.asarray(test_graphs.log_ratios(graph, 1.2, law))[:, None], jnp.arange(4)[:, None], 4
    )
    sigma_t, sigma_s = jnp.full((4, 1), 1.2), jnp.full((4, 1), 0.7)
    steps = (
        graph.tweedie(scores, scores.xt, sigma_t - sigma_s),
        graph.ancestral(scores, scores.xt, sigma_t, sigma_s),
    )
    for step in steps:
        np.testing.assert_allclose(step.probabilities()[:, 0], exact, rtol=2e-4)


def test_with_power_0_the_graph_by_tables_is_uniform(zipf):
    ours, theirs = zipf(5, power=0.0), Uniform(5)
    key = jax.random.split(jax.random.key(0), 3)
    xt, x0 = (jax.random.randint(k, (3, 4), 0, 5) for k in key[:2])
    scores = DenseScores(0.3 * jax.random.normal(key[2], (3, 4, 5)), xt, 5)
    sigma_t, sigma_s = jnp.full((3, 1), 1.2), jnp.full((3, 1), 0.7)
    clean = [graph.scores_of_clean(scores, xt, sigma_t) for graph in (ours, theirs)]
    np.testing.assert_allclose(clean[0].log_score(), clean[1].log_score(), rtol=1e-4, atol=1e-5)
    for question in (
        lambda graph: graph.prior(sigma_t),
        lambda graph: graph.score_entropy(scores, sigma_t, xt, x0).value,
        lambda graph: graph.squared_error(scores, sigma_t, xt, x0),
        lambda graph: graph.posterior_kl(clean[1], xt, x0, sigma_t, sigma_s),
        lambda graph: graph.divergence_from_uniform(scores, sigma_t, xt),
        lambda graph: graph.ancestral(clean[1], xt, sigma_t, sigma_s, kappa=0.7).probabilities(),
    ):
        values = jax.jit(lambda question=question: (question(ours), question(theirs)))()
        np.testing.assert_allclose(*values, rtol=1e-3, atol=1e-5)


def test_the_graph_draws_with_all_the_digits_of_its_noise(zipf):
    # Moves of 1e-7 each: jax's own draw makes half of them.
    graph, key, x0 = zipf(1024, power=0.0), jax.random.key(0), jnp.zeros((1, 50), jnp.int32)
    log_p = jnp.log(lift(graph.transition, x0, jnp.full((1, 1), 1e-4)))
    drawn = graph.perturb(key, x0, jnp.full((1, 1), 1e-4))
    assert (drawn == categorical(key, log_p)).all()
    limit = jnp.log(jnp.broadcast_to(graph.base_probabilities(), (2, 30, 1024)))
    assert (graph.limit(key, (2, 30)) == categorical(key, limit)).all()


def test_a_graph_without_a_reverse_step_is_refused():
    @dataclasses.dataclass(frozen=True)
    class Half(Uniform):
        ancestral_probabilities = GraphByTables.ancestral_probabilities

    assert {"ancestral", "posterior_kl"} <= Graph.__abstractmethods__
    with says("graph 'half' is not a dataclass, a subclass", "with all its abstract methods"):
        sedd_jax.register("graph", "half")(Half)


def test_predictors_that_need_more_of_a_graph_are_refused(zipf):
    others = ", ".join(one for one in PREDICTORS if trait(PREDICTORS[one], "graph") is None)
    for name in ("two_stage", "entropy_bounded", "first_hitting"):
        with says(f"predictor {name!r} is for", "Zipf", f"there are {others}"):
            Sampling().replaced(predictor=name).checked_for(zipf(4))
    config = quickstart.get_config()
    config.graph.update(name="zipf", scale_by_sigma=False)
    config.sample.predictor = "two_stage"
    with says("config.sample.predictor 'two_stage' does not fit the zipf graph"):
        configuration.check(config)


def test_a_graph_with_a_mask_of_its_own_is_absorbing(zipf):
    @dataclasses.dataclass(frozen=True)
    class Masked(zipf):
        mask = property(lambda self: self.vocab_size)

    kind = trait(PREDICTORS["first_hitting"], "graph")
    assert is_of(Masked, kind) and not is_of(zipf, kind)
    assert evaluated_fraction(Masked(4), LogLinear(), 0.0) == pytest.approx(0.5, abs=1e-3)
    assert evaluated_fraction(zipf(4), LogLinear(), 0.0) == 1.0


def test_the_prior_of_the_graph_is_the_largest_over_the_clean_tokens(zipf):
    graph = zipf(4)
    p, base_law = dense.transition(graph, 0.9), dense.transition(graph, 60.0)[:, :1]
    np.testing.assert_allclose(
        graph.prior(jnp.float32(0.9)), (p * np.log(p / base_law)).sum(axis=0).max(), rtol=1e-5
    )


def test_the_schedule_passes_the_checks_of_the_built_in_ones(files, monkeypatch):
    def cosine(t, eps=1e-3):
        return -np.log1p(-(1 - eps) * np.sin(np.pi * t / 2) ** 2)

    imports.import_modules([files["cosine.py"]])
    monkeypatch.setitem(test_schedules.FLOAT64, "cosine", cosine)
    test_schedules.test_sigma_equals_float64_at_every_time("cosine")
    test_schedules.test_dsigma_dt_is_the_derivative_of_sigma("cosine")
    test_schedules.test_dsigma_dt_is_the_float64_slope("cosine")
    test_schedules.test_sigma_rises("cosine")


@pytest.mark.parametrize(
    "sigma, slope, words",
    [
        (lambda t: t, lambda t: 0.0 * t, "dsigma_dt(0.13) = 0, where sigma"),
        (lambda t: t, lambda t: jnp.where(t > 0.5, 2.0, 1.0), "dsigma_dt(0.552857) = 2, where"),
        (lambda t: t, lambda t: t * jnp.nan, "dsigma_dt(0.13) = nan, where"),
        (lambda t: t * (1.5 - t), lambda t: 1.5 - 2 * t, "dsigma_dt(0.764286) = -0.0"),
        (lambda t: 20.0 * t**3, lambda t: 60.0 * t**2, None),
        (
            lambda t: jnp.where(t < 0.5, t, 4.0 * t - 1.5),
            lambda t: jnp.where(t < 0.5, 1.0, 4.0),
            None,
        ),
    ],
)
def test_a_slope_that_is_not_sigmas_is_refused(sigma, slope, words):
    @sedd_jax.register("schedule", "bent")
    @dataclasses.dataclass(frozen=True)
    class Bent:
        def sigma(self, t):
            return sigma(t)

        def dsigma_dt(self, t):
            return slope(t)

    config = quickstart.get_config()
    config.schedule.name = "bent"
    with says(f"schedule 'bent' has {words}") if words else contextlib.nullcontext():
        experiment.make_schedule(config)


def test_a_predictor_that_returns_no_distribution_is_refused():
    process = (None, Uniform(3), LogLinear(), (1, 2))
    with pytest.raises(ValueError, match="returns an array, no Distribution"):
        samplers.sample(jax.random.key(0), *process, steps=2, predictor=lambda xt, step: xt)


def test_the_corpus_says_its_name_and_parameters(files):
    imports.import_modules([files["squares.py"]])
    corpus = make_corpus("squares", heldout_fraction=0.2, parameters={"count": 10})
    assert list(corpus.documents("validation")) == ["0 times 0 is 0.", "1 times 1 is 1."]
    assert len([*corpus.documents("train")]) == 8
    expected = {"corpus": "squares", "heldout_fraction": 0.2, "parameters": {"count": 10}}
    assert corpus.source == expected


def test_keys_of_a_conversion_name_parts_and_parameters(files):
    texts = {
        "data.parameters.count": "10",
        "data.corpus": "squares",
        "imports": files["squares.py"],
    }
    values = {"imports": (files["squares.py"],), "data.corpus": "squares"}
    assert values_of(texts) == values | {"data.parameters": {"count": 10}}


def test_a_comparison_takes_the_rival(files, tmp_path):
    from argparse import Namespace

    options = Namespace(
        config="quickstart", out=tmp_path / "out", methods="sedd_absorbing,weighted", seeds=1,
        passes=2, blocks=None, num_samples=2,
    )  # fmt: skip
    _, runs = _runs("sedd-compare", options, [f"--config.imports={files['halved.py']}"])
    assert [run.config.objective.name for run in runs] == ["dwdse", "weighted"]


# --- one file that is config and module


def test_a_config_file_may_register_and_name_itself(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        BLOCKS["cosine.py"]
        + "\nfrom sedd_jax.configs import quickstart\n\ndef get_config():\n"
        + "    config = quickstart.get_config()\n    config.imports = (__file__,)\n"
        + "    config.schedule.name = 'cosine'\n    config.schedule.parameters.eps = 0.02\n"
        + "    return config\n"
    )
    arguments = [f"--config={file}", f"--workdir={tmp_path}/run"]
    assert parse_train("sedd-train", arguments).config.schedule.parameters.eps == 0.02
    more = [*arguments, "--config.schedule.parameters.eps=0.5"]
    assert parse_train("sedd-train", more).config.schedule.parameters.eps == 0.5


# --- what is refused


@pytest.mark.parametrize(
    "flags, words",
    [
        (["schedule.name=cosine"], ["'cosine'", "config.imports"]),
        (["imports=absent.py"], ["cannot read", "absent.py"]),
        (["imports=no_such_module"], ["no module 'no_such_module'", ".py file"]),
        (["imports=json.absent"], ["no module 'json.absent'"]),
        (["imports={cosine}", "schedule.name=cosin"], ["'cosin'", "config.imports", "(cosine)"]),
        (
            ["imports={cosine}", "schedule.name=cosine", "schedule.parameters.epz=1"],
            ["'epz'", "config.schedule.parameters", "known: eps"],
        ),
        (
            ["imports={cosine}", "schedule.name=cosine", "schedule.parameters.eps=small"],
            ["config.schedule.parameters.eps 'small'", "a finite number", "0.001"],
        ),
        (["schedule.parameters.eps=0.1"], ["'eps'", "schedule 'log_linear' has none"]),
        (
            ["imports={cosine}", "schedule.name=cosine", "schedule.eps=0.1"],
            ["config.schedule.eps", "'cosine'", "config.schedule.parameters.eps"],
        ),
        (['sample.parameters={{"x": 1}}'], ["'x'", "'tweedie'", "'uniform'", "none"]),
        (["imports={cosine},{other}"], ["two files called 'cosine.py'"]),
    ],
)
def test_one_line_says_what_is_wrong(files, tmp_path, flags, words):
    other = tmp_path / "other" / "cosine.py"
    other.parent.mkdir()
    other.write_text(BLOCKS["cosine.py"])
    names = {"cosine": files["cosine.py"], "other": other}
    arguments = [f"--config.{flag.format(**names)}" for flag in flags]
    with says(*words):
        parse_train("sedd-train", ["--config=quickstart", f"--workdir={tmp_path}/run", *arguments])


@pytest.mark.parametrize(
    "code, words",
    [
        ("1 / 0", ["line 3", "ZeroDivisionError"]),
        ("import absent_library", ["line 3", "absent_library"]),
        ("def f(:", ["line 3", "SyntaxError"]),
        ("raise SystemExit('no')", ["SystemExit: no"]),
        ("sedd_jax.register('schedul', 'x')", ["unknown kind 'schedul'", "schedule, graph"]),
        ("sedd_jax.register('grid', 'a-b')", ["'a-b'", "letters"]),
        ("sedd_jax.register('grid', 'uniform')(print)", ["'uniform' is one of sedd_jax's"]),
        ("sedd_jax.register('grid', 'fitted')(print)", ["'fitted' is one of sedd_jax's"]),
        ("sedd_jax.register('corpus', 'text8')(print)", ["'text8' is one of sedd_jax's"]),
        ("@sedd_jax.register('schedule', 'x')\nclass A: pass", ["sigma(t)", "A"]),
        ("@sedd_jax.register('graph', 'x')\nclass A: pass", ["subclass", "Graph"]),
        ("sedd_jax.register('graph', 'x')(sedd_jax.diffusion.graph.Graph)", ["abstract"]),
        ("@sedd_jax.register('grid', 'x')\ndef f(i): pass", ["(i, steps, t_min)"]),
        (
            "@sedd_jax.register('grid', 'x')\ndef f(i, steps, t_min, *, power): pass",
            ["'power' has no default"],
        ),
    ],
)
def test_one_line_says_what_is_wrong_in_the_module(tmp_path, code, words):
    file = tmp_path / "mine.py"
    file.write_text(f"import sedd_jax\nimport sedd_jax.diffusion.graph\n{code}\n")
    with says("mine.py", *words):
        imports.import_modules([str(file)])
    assert not [name for name in sys.modules if name.startswith("mine_")]


def test_a_name_belongs_to_the_module_that_registered_it(files, tmp_path):
    imports.import_modules([files["cosine.py"]])
    imports.import_modules([files["cosine.py"]])  # the same once more
    other = tmp_path / "other.py"
    other.write_text(BLOCKS["cosine.py"])
    imports.import_modules([str(other)])  # the same text
    changed = tmp_path / "changed.py"
    changed.write_text(BLOCKS["cosine.py"].replace("eps: float = 1e-3", "eps: float = 2e-3"))
    assert changed.read_text() != other.read_text()
    with says("changed.py", "'cosine' is registered already", "other_"):
        imports.import_modules([str(changed)])


def test_a_cell_of_a_notebook_may_run_again():
    for eps in (0.1, 0.2):

        @sedd_jax.register("schedule", "cell")
        @dataclasses.dataclass(frozen=True)
        class Cell:
            eps: float = 0.0

            def sigma(self, t):
                return t

            def dsigma_dt(self, t):
                return 1.0

        Cell.mark = eps
    assert registry.KINDS["schedule"].table["cell"].mark == 0.2


def test_a_part_that_no_named_module_registers_is_noticed(files):
    values = {**dict(configuration.flatten(base.get_config())), "schedule.name": "cosine"}
    imports.import_modules([files["cosine.py"]])
    assert registry.defined_elsewhere(values, imports.module_names([files["cosine.py"]])) == []
    for others in ([], [files["zipf.py"]], ["json"]):
        elsewhere = registry.defined_elsewhere(values, imports.module_names(others))
        assert elsewhere == ["schedule 'cosine'"]


def test_a_name_of_sampling_is_reserved():
    assert {*sampling.PREDICTORS} == {*registry.KINDS["predictor"].built_in}
    assert {*sampling.GRIDS} == {*registry.KINDS["grid"].built_in}


def test_a_module_that_only_a_folder_names_is_not_imported(run, tmp_path, monkeypatch):
    """Neither a file nor a module of the environment."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "planted.py").write_text("open('ran', 'w')")
    monkeypatch.chdir(tmp_path)
    for names in (["planted"], ["../../planted.py"]):
        copy = shutil.copytree(run, tmp_path / f"run_{len(names[0])}")
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps({**config, "imports": names}))
        (copy / "imports" / "planted.py").write_text("open('ran', 'w')")
        with says("planted", "not named on this machine", "--imports="):
            sedd_jax.load(copy)
    assert not (tmp_path / "ran").exists()


def test_what_runs_is_the_text_that_was_read_not_the_cache_beside_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("other.py").write_text("open('ran', 'w')")
    Path("read.py").write_text("seen = 1\n")
    cache = importlib.util.cache_from_source("read.py")
    unchecked = py_compile.PycInvalidationMode.UNCHECKED_HASH
    py_compile.compile("other.py", cache, invalidation_mode=unchecked)
    imports.import_modules(["read.py"])
    (name,) = imports.module_names(["read.py"])
    assert sys.modules[name].seen == 1 and not Path("ran").exists()


def test_a_config_without_the_new_keys_is_as_before():
    config = quickstart.get_config()
    older = {k: v for k, v in json.loads(configuration.to_json(config)).items() if k != "imports"}
    for section in older.values():
        if isinstance(section, dict):
            section.pop("parameters", None)
    assert configuration.from_json(json.dumps(older)).to_dict() == config.to_dict()
    assert base.get_config().imports == ()
