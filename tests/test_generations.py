"""What a model writes, measured through the commands: a tiny run and a tiny random GPT-2."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from sedd_jax.cli import eval_command, prepare_command
from sedd_jax.evaluation import generations
from sedd_jax.evaluation.scorer import load_scorer
from sedd_jax.inference import sampling
from sedd_jax.inference.pretrained import load


def evaluate(kind, *arguments):
    return eval_command([kind, *(f"--{argument}" for argument in arguments)])


def test_generative_perplexity_says_what_it_was_made_with(
    capsys, tiny_run, scorer_folder, tmp_path
):
    file = tmp_path / "result.json"
    arguments = [f"workdir={tiny_run}", f"scorer={scorer_folder}", "steps=4", "num_samples=5"]
    more = ["batch_size=4", "length=20", "seed=3", f"json={file}"]
    assert evaluate("generative_perplexity", *arguments, *more) == 0
    result = json.loads(file.read_text())
    assert result["nfe"] == 5 and result["draw"] == "exact" and result["seed"] == 3
    assert result["dtype"] == result["scorer_dtype"] == "float32"
    assert result["scorer"] == str(scorer_folder)
    assert f"{result['generative_perplexity']['mean_of_exp']:.2f}" in capsys.readouterr().out
    # By hand: the same tokens, decoded, encoded in the scorer's tokens and scored one by one.
    model, scorer = load(tiny_run), load_scorer(str(scorer_folder))
    tokens = model.sample_tokens(5, length=20, batch_size=4, seed=3, steps=4)
    assert len(np.unique(tokens, axis=0)) == 5
    nats = [scorer.nats(scorer.tokenizer.encode(t)[None])[0] for t in model.decode(tokens)]
    means = [row.mean(dtype=np.float64) for row in nats]
    perplexity = result["generative_perplexity"]
    assert perplexity["mean_of_exp"] == pytest.approx(np.exp(means).mean(), rel=1e-4)
    assert perplexity["token_mean"] == pytest.approx(np.exp(np.concatenate(nats).mean()), rel=1e-4)


def test_the_seconds_of_a_sample_hold_no_compilation(tiny_run, scorer_folder, monkeypatch):
    model, scorer = load(tiny_run), load_scorer(str(scorer_folder))
    compiled = []
    sampling.reverse_steps.clear_cache()  # equal networks share it, whichever test loaded them

    def perf_counter():
        compiled.append(sampling.reverse_steps._cache_size())
        return 0.0

    monkeypatch.setattr(generations, "time", SimpleNamespace(perf_counter=perf_counter))
    options = {"num_samples": 5, "batch_size": 4, "length": 20}
    generations.generative_perplexity(model, scorer, steps=4, **options)
    assert compiled == [2, 2]  # a batch of four, a batch of one


def test_pareto_has_a_line_a_number_of_steps_and_a_picture(
    capsys, tiny_run, scorer_folder, tmp_path
):
    pytest.importorskip("matplotlib", reason="the picture needs the [plot] extra")
    file, picture = tmp_path / "pareto.json", tmp_path / "pareto.png"
    arguments = [f"workdir={tiny_run}", f"scorer={scorer_folder}", "steps=2,4,8", "num_samples=4"]
    assert evaluate("pareto", *arguments, f"json={file}", f"picture={picture}") == 0
    assert [row["nfe"] for row in json.loads(file.read_text())] == [3, 5, 9]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert len(capsys.readouterr().out.splitlines()) == 3 + 3


@pytest.mark.parametrize("form", ["prefix", "infill"])
def test_mauve_completes_references_that_it_was_given_half_of(
    capsys, long_run, scorer_folder, tmp_path, form
):
    pytest.importorskip("mauve", reason="MAUVE needs the [eval] extra")
    file = tmp_path / "mauve.json"
    arguments = [f"workdir={long_run}", f"scorer={scorer_folder}", "steps=2", "references=12"]
    more = ["repeats=2", "buckets=3", f"form={form}", f"json={file}"]
    assert evaluate("mauve", *arguments, *more) == 0
    result = json.loads(file.read_text())
    assert 0 < result["mauve"]["mean"] <= 1 and len(result["mauve"]["values"]) == 2
    assert result["nfe"] == 3 and result["form"] == form
    out = capsys.readouterr().out
    assert "MAUVE 0." in out and "2 repeats of 12 references, 3 clusters" in out
    assert result["mauve"]["buckets"] == 3
    assert "not comparable with the paper's 1000 references" in out
    assert "not comparable" not in generations.describe_mauve({**result, "references": 500})


def test_completions_keep_what_was_given(long_run):
    model = load(long_run)
    reference = np.arange(200).reshape(2, 100) % model.tokenizer.vocab_size
    known = generations.mauve.known_tokens(reference, "infill")
    tokens = model.sample_tokens(2, known=known, steps=2)
    np.testing.assert_array_equal(tokens[known[1]], reference[known[1]])
    assert known[1].sum() == 100


def test_gpt2_is_scored_on_records_of_its_own_tokenizer(capsys, scorer_folder, tiny_run, tmp_path):
    flags = ["--dataset=pydoc", "--heldout_fraction=0.1", "--length=32"]
    own = [*flags, "--tokenizer=gpt2", f"--tokenizer_path={scorer_folder}"]
    assert prepare_command([*own, f"--out={tmp_path / 'gpt2'}"]) == 0
    assert prepare_command([*flags, "--tokenizer=bytes", f"--out={tmp_path / 'bytes'}"]) == 0
    file = tmp_path / "result.json"
    scorer = [f"gpt2={scorer_folder}", "split=validation", "blocks=6", f"json={file}"]
    assert evaluate("likelihood", *scorer, f"records={tmp_path / 'gpt2'}") == 0
    result = json.loads(file.read_text())
    assert result["tokens"] == 6 * 31  # the first of a block is given
    nats = result["nats_per_token"]["gpt2"]
    assert result["perplexity_per_token"]["gpt2"] == pytest.approx(np.exp(nats))
    assert "GPT-2" in capsys.readouterr().out
    assert evaluate("likelihood", *scorer, f"records={tmp_path / 'bytes'}") == 2
    assert "prepare them with --tokenizer=gpt2" in capsys.readouterr().err
    # Nor does a model take records of another tokenizer.
    run = [f"workdir={tiny_run}", f"records={tmp_path / 'bytes'}", "split=validation"]
    assert evaluate("likelihood", *run) == 2
    assert "were made with tokenizer 'bytes'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("likelihood", [], "give --workdir, or --gpt2 with --records"),
        ("likelihood", ["gpt2=gpt2"], "--gpt2 needs --records"),
        ("pareto", ["workdir={run}", "steps=2,x"], "--steps '2,x' is not like 32,64,128"),
        ("generative_perplexity", ["workdir={run}", "scorer=gpt3"], "no scorer 'gpt3'"),
        ("mauve", ["workdir={run}", "scorer={scorer}"], "MAUVE's texts have 100"),
        (
            "generative_perplexity",
            ["workdir={run}", "scorer={scorer}", "length=33", "steps=2"],
            "length 33 is not a whole number in [1, 32]",
        ),
    ],
)
def test_mistakes_of_an_evaluation_are_one_line(
    capsys, tiny_run, scorer_folder, kind, arguments, message
):
    if kind == "mauve":
        pytest.importorskip("mauve", reason="MAUVE needs the [eval] extra")
    places = {"run": tiny_run, "scorer": scorer_folder}
    assert evaluate(kind, *(argument.format(**places) for argument in arguments)) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
