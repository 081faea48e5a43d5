"""A run that has diverged: its weights are finite but huge, and its scores are not finite."""

import dataclasses
import json
import shutil
import tarfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import REPOSITORY, says

import sedd_jax
from sedd_jax.cli import eval_command, report_command, sample_command, train_command
from sedd_jax.diffusion import draws, samplers
from sedd_jax.diffusion.graphs import GRAPHS
from sedd_jax.diffusion.likelihood import Bound
from sedd_jax.diffusion.samplers import DRAWS, Known
from sedd_jax.diffusion.schedules import LogLinear
from sedd_jax.diffusion.scores import DenseScores
from sedd_jax.inference import bounds
from sedd_jax.runs import workdir as runs

EARLIER = REPOSITORY / "tests/earlier"
REMEDY = "--step=STEP"


def huge(params):
    return jax.tree.map(lambda array: 1e15 * array, params)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def diverged_run(request, tmp_path_factory):
    top = tmp_path_factory.mktemp("diverged")
    with tarfile.open(EARLIER / "run_absorbing/run.tar.gz") as archive:
        archive.extractall(top / "run", filter="data")
    run = runs.open_workdir(top / "run")
    train_state = runs.read_state(run)
    train_state = dataclasses.replace(
        train_state, params=huge(train_state.params), ema=huge(train_state.ema)
    )
    run.config.model.dtype = request.param
    parts = {"config": run.config, "tokenizer": run.tokenizer, "original": None}
    runs.write_workdir(top / "diverged", train_state=train_state, **parts)
    shutil.copytree(top / "run/records", top / "diverged/records")
    return top / "diverged"


@pytest.fixture(params=["absorbing", "uniform"])
def diverged_model(request):
    model = sedd_jax.load(EARLIER / f"hub_{request.param}")
    return model.with_params(huge(model.params))


@pytest.mark.parametrize("vocab", [7, 15, 2000])
def test_weights_that_are_no_distribution_draw_minus_one(vocab, monkeypatch):
    monkeypatch.setattr(draws, "GROUP", 4)
    rows = np.zeros((6, vocab), np.float32)
    rows[1, 2] = np.nan
    rows[2, vocab - 1] = np.inf
    rows[3] = -np.inf
    rows[4, 1:] = -np.inf
    rows[5] = -3e38  # finite, however small
    drawn = np.asarray(draws.categorical(jax.random.key(0), jnp.asarray(rows)))
    assert (drawn[[1, 2, 3]] == -1).all()
    assert (drawn[[0, 4, 5]] >= 0).all() and drawn[4] == 0


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("exp_of_fault", [-1.0, np.inf], ids=["nan", "inf"])
def test_scores_that_are_not_finite_at_one_step_are_seen_at_the_end(graph, draw, exp_of_fault):
    graph = GRAPHS[graph](5)

    def score_fn(xt, sigma):
        is_first = sigma[0, 0] > LogLinear().sigma(0.9)
        value = jnp.log(jnp.where(is_first, exp_of_fault, 1.0))  # XLA folds a literal NaN away
        table = jnp.zeros((*xt.shape, graph.dim)).at[0, 1].set(value)
        return DenseScores(table, xt, graph.vocab_size)

    known = Known(jnp.full((2, 3), 4), jnp.zeros((2, 3), bool).at[:, 0].set(True))
    sampled = samplers.sample(
        jax.random.key(0), score_fn, graph, LogLinear(), (2, 3),
        steps=4, draw=DRAWS[draw], known=known,
    ).tokens  # fmt: skip
    np.testing.assert_array_equal(np.asarray(sampled) < 0, [[0, 1, 0], [0, 0, 0]])


def test_samples_of_a_diverged_model_are_refused(diverged_model):
    where = "scores are not finite by step"
    with says(where, "of 4", REMEDY):
        diverged_model.sample(1, steps=4)
    with says(where, "of 4", REMEDY):
        diverged_model.infill("a [MASK:4]", steps=4)
    states = diverged_model.stream("a [MASK:4]", steps=4, updates=4)
    assert next(states).step == 0  # noise alone
    with says(where, "of 4", REMEDY):
        list(states)


def test_a_bound_that_is_not_finite_is_refused(diverged_model):
    with says("scores are not finite on text 0", REMEDY):
        diverged_model.log_likelihood(["a", "an a"], passes=2)
    with says("scores are not finite on block 0", REMEDY):
        diverged_model.bound(np.zeros((3, 32), np.int32), passes=2, target_standard_error=0.1)


def test_the_text_whose_bound_is_not_finite_is_named():
    passes = np.array([[1, 2], [1, np.inf], [np.nan, 1]], np.float32)
    index = np.array([5, 7, 9])
    bound = Bound(passes, np.ones((3, 2), np.float32), np.zeros(3, np.float32))
    with says("on text 7"):
        bounds.check_finite(bound, index, "text")
    bounds.check_finite(bound._replace(diffusion_passes=np.ones_like(passes)), index, "text")


@pytest.mark.parametrize(
    "command, arguments",
    [
        (sample_command, "--steps=2"),
        (sample_command, "--steps=2 --num_samples=3 --format=jsonl"),
        (sample_command, "--steps=2 --template=a[MASK:3]"),
        (sample_command, "--steps=2 --draw=float32_gumbel --predictor=euler --prefix=a"),
        (eval_command, "likelihood --passes=2"),
        (eval_command, "generative_perplexity --steps=2 --num_samples=2 --scorer={scorer}"),
        (eval_command, "frontier --steps=2 --num_samples=2 --scorer={scorer}"),
        (report_command, ""),
    ],
)
def test_a_command_ends_with_status_2(command, arguments, diverged_run, scorer_folder, capsys):
    arguments = arguments.format(scorer=scorer_folder).split()
    before = sorted(diverged_run.rglob("*"))
    assert command([*arguments, f"--workdir={diverged_run}"]) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert "the model's scores are not finite" in error.splitlines()[-1]
    assert REMEDY in error.splitlines()[-1]
    assert sorted(diverged_run.rglob("*")) == before


def test_training_goes_on_and_says_it(diverged_run, tmp_path, capsys):
    shutil.copytree(diverged_run, tmp_path / "run")
    keys = ("train.steps=12", "train.eval_every=2", "sample.every=2", "sample.steps=2")
    arguments = [f"--config.{key}" for key in keys]
    assert train_command([f"--workdir={tmp_path / 'run'}", *arguments]) == 0
    error = capsys.readouterr().err
    for step in (10, 12):
        assert f"step {step}: the model's scores are not finite on block 0" in error
    assert "training goes on" in error
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert {row["skipped"] for row in rows if row["kind"] == "train"} >= {4}
    assert not (tmp_path / "run/samples").exists()
