"""The fitted grid as a user meets it: from the bound to the run's folder, samples and exports."""

import dataclasses
import json
import os
import stat

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import REPOSITORY, says
from test_cli import fails

import sedd_jax
from sedd_jax.cli import eval_command, prepare_command, report_command, sample_command
from sedd_jax.diffusion import grids
from sedd_jax.diffusion.graphs import Uniform
from sedd_jax.inference import curve as curves
from sedd_jax.inference import sampling
from sedd_jax.inference.curve import Curve, fitted_times

U = np.linspace(0.0, 1.0, 17)


def curve_like(power):
    """A curve that is steep near mask share 1."""
    return Curve(tuple(U), tuple(1.0 + U + 2.0 * U**power), (0.1,) * 17, (9,) * 17)


@pytest.fixture(scope="module")
def run(tiny_run, tmp_path_factory):
    """A copy of the tiny run, whose folder these tests may write in."""
    folder = tmp_path_factory.mktemp("fitted") / "run"
    copied = os.system(f"cp -r {tiny_run} {folder} && rm -f {folder}/curve.json")
    assert copied == 0
    return folder


@pytest.fixture(scope="module")
def model(tiny_run):
    return dataclasses.replace(sedd_jax.load(tiny_run), curve=curve_like(9))


def evaluated(folder, *more):
    return ["likelihood", f"--workdir={folder}", "--blocks=8", "--passes=4", *more]


def test_the_bound_leaves_the_curve_in_the_runs_folder_and_load_reads_it(capsys, run, tmp_path):
    before = sedd_jax.load(run)
    assert before.curve is None
    with says("grid 'fitted' needs the curve", f"run sedd-eval likelihood --workdir={run}, or"):
        before.sample(grid="fitted")
    line = fails(capsys, sample_command, f"--workdir={run}", "--grid=fitted")
    assert f"run sedd-eval likelihood --workdir={run}, or choose uniform or cosine" in line
    assert eval_command(evaluated(run, f"--json={tmp_path / 'result.json'}")) == 0
    out, errors = capsys.readouterr()
    assert errors.splitlines()[-1] == f"written: {run / 'curve.json'}, for --grid=fitted"
    result = json.loads((tmp_path / "result.json").read_text())
    written = json.loads((run / "curve.json").read_text())
    assert result["curve"].items() <= written.items()
    assert (written["step"], written["split"], written["blocks"]) == (8, "validation", 8)
    assert eval_command(evaluated(run, "--passes=2")) == 0  # of fewer copies: not kept
    assert "the one that is there is of more noised copies, 32, not 16" in capsys.readouterr().err
    assert json.loads((run / "curve.json").read_text()) == written
    assert written["data"] == result["data"] and sum(written["copies"]) == 8 * 4
    prices = result["price_of_calls"]
    assert list(prices) == ["8", "16", "32", "64", "128"]
    for calls, paid in prices.items():
        assert list(paid) == ["uniform", "cosine", "fitted"]
        assert 0.0 <= paid["fitted"] <= 1.01 * min(paid.values())
        assert any(f"{paid['fitted']:.4f}" in row for row in out.splitlines()), calls
    loaded = sedd_jax.load(run)
    assert loaded.curve.to_dict() == written
    assert loaded.sample(2, steps=4, grid="fitted") != loaded.sample(2, steps=4)
    assert sample_command([f"--workdir={run}", "--grid=fitted", "--steps=3"]) == 0

    loaded.save_pretrained(tmp_path / "exported")
    exported = sedd_jax.load(tmp_path / "exported")
    assert exported.curve == loaded.curve and exported.curve.about == loaded.curve.about
    how = {"steps": 5, "grid": "fitted", "seed": 3}
    assert exported.sample(2, **how) == loaded.sample(2, **how)


def test_what_will_be_done_is_explained_with_its_price(capsys, tiny_run, run):
    (run / "curve.json").write_text(json.dumps({"step": 8, **curve_like(9).to_dict()}))
    assert sample_command([f"--workdir={run}", "--explain", "--grid=fitted", "--steps=15"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "predictor tweedie, grid fitted, draw exact"
    times = fitted_times(curve_like(9), 15, sedd_jax.load(run).schedule)
    assert lines[1] == (
        f"15 steps and a denoiser: 16 network calls a sample, the denoiser's at t = {times[15]:.3g}"
    )
    assert lines[2] == "the price of Tweedie's steps, by the curve of cross entropy of step 8:"
    assert lines[3].split()[-1] == "16" and lines[-1].split()[-2] == "fitted"
    paid = [float(line.split()[-1]) for line in lines[4:]]
    assert len(paid) == 3 and 0 < paid[2] < min(paid[:2])
    assert sample_command([f"--workdir={run}", "--explain", "--predictor=none"]) == 0
    assert "the denoiser alone: 1 network calls a sample" in capsys.readouterr().out
    (run / "curve.json").unlink()
    assert sample_command([f"--workdir={run}", "--explain"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("no price: the model comes without")


def test_an_exported_model_keeps_no_curve_of_its_evaluation(capsys, run, tmp_path):
    sedd_jax.load(run).save_pretrained(tmp_path / "exported")
    records = (f"--records={run / 'records'}", "--split=validation")
    assert eval_command(evaluated(tmp_path / "exported", *records)) == 0
    assert "curve" not in capsys.readouterr().err
    assert not (tmp_path / "exported/curve.json").exists()
    with says("run sedd-eval likelihood --workdir=RUN, on the run that it is of, and export"):
        sedd_jax.load(tmp_path / "exported").sample(grid="fitted")


def test_the_curve_of_another_text_does_not_replace_that_of_the_runs_own(capsys, run, tmp_path):
    (tmp_path / "own.txt").write_text("a line of another text\n" * 60)
    command = ["--dataset=text", f"--manual_dir={tmp_path / 'own.txt'}", "--heldout_fraction=1"]
    tokenizer = f"--tokenizer={run / 'tokenizer.json'}"
    assert prepare_command([*command, tokenizer, "--length=32", f"--out={tmp_path / 'r'}"]) == 0
    other = f"--records={tmp_path / 'r'}"
    (run / "curve.json").unlink(missing_ok=True)
    assert eval_command(evaluated(run, other, "--passes=2")) == 0
    of_other = (run / "curve.json").read_text()
    assert eval_command(evaluated(run, "--passes=2")) == 0
    own = (run / "curve.json").read_text()
    assert own != of_other
    assert eval_command(evaluated(run, other, "--passes=8")) == 0
    assert (run / "curve.json").read_text() == own
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.endswith("the one that is there is of the run's own text")
    (run / "curve.json").unlink()


def test_the_curve_of_an_older_step_neither_replaces_nor_passes_for_the_newest(capsys, run, caplog):
    (run / "curve.json").unlink(missing_ok=True)
    assert eval_command(evaluated(run, "--passes=2", "--step=4")) == 0
    curves._warn_of_step.cache_clear()
    caplog.clear()
    for _ in range(2):
        sedd_jax.load(run).chosen(grid="fitted")
    (line,) = [line for line in caplog.messages if "curve" in line]
    assert line.startswith("the curve of the fitted grid is of step 4 and the model of step 8;")
    assert eval_command(evaluated(run, "--passes=2")) == 0  # it replaces the older step's
    newest = (run / "curve.json").read_text()
    assert json.loads(newest)["step"] == 8
    assert eval_command(evaluated(run, "--passes=4", "--step=4")) == 0
    assert (run / "curve.json").read_text() == newest
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.endswith("the one that is there is of a later step, 8")
    caplog.clear()
    sedd_jax.load(run).chosen(grid="fitted")
    assert not [line for line in caplog.messages if "curve" in line]
    (run / "curve.json").unlink()


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes in read-only folders")
def test_a_read_only_run_is_evaluated(capsys, run):
    os.chmod(run, stat.S_IRUSR | stat.S_IXUSR)
    try:
        assert eval_command(evaluated(run)) == 0
    finally:
        os.chmod(run, stat.S_IRWXU)
    assert capsys.readouterr().err.splitlines()[-1].endswith("Permission denied")


def test_a_disk_that_takes_no_curve_does_not_fail_the_evaluation(capsys, run, monkeypatch):
    def read_only(*_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("sedd_jax.runs.workdir.write_text", read_only)
    assert eval_command(evaluated(run)) == 0
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.endswith(f"cannot write in {str(run)!r}: Read-only file system")
    assert not (run / "curve.json").exists()


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"share": [2], "nats": [1]}', '{"nats": NaN}'])
def test_a_damaged_curve_is_left_out_with_a_warning(run, caplog, text):
    (run / "curve.json").write_text(text)
    try:
        assert sedd_jax.load(run).curve is None
    finally:
        (run / "curve.json").unlink()
    (warning,) = (r.message for r in caplog.records if r.levelname == "WARNING")
    assert "\n" not in warning and "left out" in warning


def test_another_number_of_steps_or_another_curve_compiles_nothing(model):
    other = dataclasses.replace(model, curve=curve_like(3))
    sampling.reverse_steps.clear_cache()
    drawn = [m.sample(2, steps=s, grid="fitted") for m in (model, other) for s in (1, 4, 9, 1500)]
    assert sampling.reverse_steps._cache_size() == 1
    assert len(set(map(tuple, drawn))) == len(drawn)


def test_samples_over_the_fitted_grid_take_its_times_and_end_at_its_last(model):
    times = fitted_times(model.curve, 6, model.schedule)

    def by_hand(i, steps, t_min):
        return jnp.asarray(times)[i]

    drawn = model.sample(4, steps=6, grid="fitted", seed=1)
    assert drawn == model.sample(4, steps=6, grid=by_hand, t_min=float(times[6]), seed=1)
    chosen = model.chosen(steps=6, grid="fitted", t_min=1e-3)
    assert chosen.t_min == float(times[6]) and chosen.nfe == 7
    assert model.chosen(steps=6).t_min == model.sampling.t_min
    parts = list(model.stream(num_samples=4, steps=6, updates=3, grid="fitted", seed=1))
    assert parts[-1].texts == drawn
    assert model.sample(2, grid="fitted", predictor="none") == model.sample(2, predictor="none")


def test_uniform_noise_refuses_the_grid_and_is_scored_without_a_curve(model):
    uniform = dataclasses.replace(model, graph=Uniform(model.graph.vocab_size), curve=None)
    with says("grid 'fitted' is for absorbing noise", "choose uniform or cosine"):
        uniform.sample(grid="fitted")


def test_an_unknown_grid_is_told_all_of_them_and_the_table_stays_open(model, monkeypatch):
    with says("unknown grid 'best'; known: uniform, cosine, fitted"):
        model.sample(grid="best")
    monkeypatch.setitem(grids.GRIDS, "mine", grids.cosine_grid)
    assert model.sample(2, steps=4, grid="mine") == model.sample(2, steps=4, grid="cosine")


def test_a_config_cannot_ask_for_the_fitted_grid(tiny_config):
    from sedd_jax import config as configuration

    tiny_config.sample.grid = "fitted"
    with says("config.sample.grid 'fitted' is not allowed", "uniform, cosine"):
        configuration.check(tiny_config)


def test_an_earlier_run_and_an_earlier_export_open_without_a_curve(tmp_path):
    import tarfile

    with tarfile.open(REPOSITORY / "tests/earlier/run_absorbing/run.tar.gz") as archive:
        archive.extractall(tmp_path / "run", filter="data")
    model = sedd_jax.load(tmp_path / "run")
    assert model.curve is None
    model.save_pretrained(tmp_path / "export")
    ours = json.loads((tmp_path / "export" / "sedd_jax.json").read_text())
    assert ours.pop("curve") is None
    (tmp_path / "export" / "sedd_jax.json").write_text(json.dumps(ours))
    assert sedd_jax.load(tmp_path / "export").curve is None


def test_a_report_writes_the_curve_too(run):
    pytest.importorskip("matplotlib", reason="the picture needs the [plot] extra")
    assert report_command([f"--workdir={run}", "--passes=2"]) == 0
    heldout = json.loads((run / "summary.json").read_text())["heldout"]
    assert sedd_jax.load(run).curve == Curve.from_dict(heldout["curve"])
    better = json.dumps(json.loads((run / "curve.json").read_text()) | {"passes": 1000})
    (run / "curve.json").write_text(better)
    (run / "picture.png").unlink()
    assert report_command([f"--workdir={run}", "--passes=2"]) == 0
    assert (run / "curve.json").read_text() == better and (run / "picture.png").is_file()
