"""What a model says of single texts, documents and tokens, and how it compares two."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from conftest import says

import sedd_jax
from sedd_jax import data
from sedd_jax.cli import eval_command
from sedd_jax.diffusion.graphs import Uniform
from sedd_jax.diffusion.objectives import Autoregressive
from sedd_jax.evaluation import information, values


@pytest.fixture(scope="module")
def model(tiny_run):
    return sedd_jax.load(tiny_run)


def test_the_tokens_of_a_text_share_its_bound(model):
    texts = ["if", "a much longer text than that"]
    bound = model.log_likelihood(texts, given="so ", seed=5)
    assert bound.by_token.shape == (2, 32)
    np.testing.assert_allclose(bound.by_token.sum(axis=1), bound.total, rtol=1e-5)
    is_text = np.zeros((2, 32), bool)
    for row, text in zip(is_text, texts, strict=True):
        row[3 : 3 + len(text)] = True  # a byte is a token
    assert (bound.by_token[is_text] != 0).all() and (bound.by_token[~is_text] == 0).all()


def test_texts_of_one_number_share_their_noise(model):
    texts = ["a word here", "a word here", "b word here"]
    same = model.log_likelihood(texts, index=[7, 7, 7], seed=1)
    assert same.total[0] == same.total[1]
    own = model.log_likelihood(texts, seed=1)
    assert own.total[0] != own.total[1]
    # The number alone decides, and not where the text stands.
    np.testing.assert_allclose(
        own.total[2:], model.log_likelihood(texts[2], index=[2], seed=1).total
    )
    with says("index is not 3 whole numbers in [0, 2**31), one for each text"):
        model.log_likelihood(texts, index=[1, 2])
    with says("index is not 3 whole numbers"):
        model.log_likelihood(texts, index=[1, 2, -1])


def test_a_ratio_is_the_difference_of_two_bounds_with_less_noise(model):
    a = ["the first statement is", "if"]
    b = ["the worst statement is", "of the other"]
    ratio = model.log_likelihood_ratio(a, b, given="so ", seed=3)
    ours, theirs = (model.log_likelihood(texts, given="so ", seed=3) for texts in (a, b))
    np.testing.assert_allclose(ratio.value, theirs.total - ours.total, rtol=1e-4, atol=1e-4)
    difference = theirs.normalised - ours.normalised
    difference += theirs.reconstruction - ours.reconstruction + theirs.prior - ours.prior
    np.testing.assert_allclose(ratio.normalised, difference, rtol=1e-4, atol=1e-4)
    apart = np.hypot(ours.standard_error, theirs.standard_error)
    assert 0 < ratio.standard_error[0] < 0.9 * apart[0]
    itself = model.log_likelihood_ratio(a, a, seed=3)
    assert (itself.value == 0).all() and (itself.standard_error == 0).all()
    with says("2 texts are compared with 1; give as many of both"):
        model.log_likelihood_ratio(a, b[:1])
    with says("text 2 has 0 tokens"):
        model.log_likelihood_ratio(a, ["", "b"])


# --- the values of documents and tokens


def test_documents_are_cut_after_each_separator():
    tokens = np.array([[1, 0, 2, 3], [0, 0, 4, 5]], np.int32)
    nats = np.arange(8, dtype=np.float32).reshape(2, 4)
    parts = list(values.documents(data.Blocks(tokens), nats, (0,)))
    assert [(p.block, p.position, p.tokens.tolist(), p.nats.tolist()) for p in parts] == [
        (0, 0, [1, 0], [0, 1]),
        (0, 2, [2, 3, 0], [2, 3, 4]),
        (1, 1, [0], [5]),
        (1, 2, [4, 5], [6, 7]),
    ]
    two = list(values.documents(data.Blocks(tokens), nats, (3, 0)))
    assert [len(p.tokens) for p in two] == [5, 3]
    assert [len(p.tokens) for p in values.documents(data.Blocks(tokens), nats, ())] == [8]
    padded = data.Blocks(tokens, tokens != 0)
    assert [p.nats.tolist() for p in values.documents(padded, nats, (0,))] == [[0, 2, 3], [6, 7]]


def test_the_values_add_up_to_the_bound(tiny_run, tmp_path, capsys):
    run = ["likelihood", f"--workdir={tiny_run}", "--blocks=4", "--passes=2"]
    result = tmp_path / "result.json"
    for form in ("npz", "jsonl"):
        assert (
            eval_command([*run, f"--values={tmp_path / f'values.{form}'}", f"--json={result}"]) == 0
        )
    total = json.loads(result.read_text())["nats_per_token"]["bound"] * 4 * 32
    arrays = np.load(tmp_path / "values.npz")
    assert arrays["nats"].shape == arrays["tokens"].shape == (4, 32) and arrays["is_token"].all()
    assert arrays["nats"].sum() == pytest.approx(total, rel=1e-5)
    lines = [json.loads(line) for line in (tmp_path / "values.jsonl").read_text().splitlines()]
    assert sum(line["nats"] for line in lines) == pytest.approx(total, rel=1e-5)
    assert [i for line in lines for i in line["token_ids"]] == arrays["tokens"].ravel().tolist()
    for line in lines:
        assert sum(line["token_nats"]) == pytest.approx(line["nats"], abs=1e-4)
        assert len(line["token_nats"]) == line["tokens"]
    assert [line["document"] for line in lines] == list(range(len(lines)))
    capsys.readouterr()
    assert eval_command([*run, f"--values={tmp_path / 'values.csv'}"]) == 2
    assert "does not end in .npz or .jsonl" in capsys.readouterr().err
    assert eval_command([*run[:1], "--gpt2=gpt2", "--records=r", "--values=a.npz"]) == 2
    assert "--values is of the bound" in capsys.readouterr().err


def test_rounds_are_averaged_by_token(model):
    tokens = np.zeros((2, 32), np.int32)
    how = {"passes": 2, "target_standard_error": 1e-9, "max_passes": 4, "by_token": True}
    total = model.bound(tokens, **how)
    assert total.passes == 4 and total.by_token.shape == (2, 32)
    assert total.by_token.sum() == pytest.approx(total.bound, rel=1e-5)
    assert model.bound(tokens, passes=2).by_token is None


# --- information


def test_information_of_a_model(tiny_run, tmp_path, capsys):
    file = tmp_path / "result.json"
    run = ["information", f"--workdir={tiny_run}", "--passes=2", f"--json={file}", "--batch_size=3"]
    assert eval_command([*run, "--blocks=8", f"--against={tiny_run}", "--first=8"]) == 0
    result, out = json.loads(file.read_text()), capsys.readouterr().out
    entropy = result["entropy"]
    assert f"{entropy['nats_per_token']:.4f}±" in out
    assert all(len(line) <= 80 for line in out.splitlines())
    assert result["texts"] == 8 and result["tokens"] == 8 * 32
    assert entropy["nats_per_text"] == pytest.approx(32 * entropy["nats_per_token"])
    assert 0 < entropy["nats_per_token"] < np.log(256)
    assert abs(result["divergence"]["nats_per_text"]) < 1e-4  # from itself
    assert result["mutual_information"]["nats_per_text"] > -0.1
    assert eval_command([*run, "--num_samples=5", "--steps=2"]) == 0
    assert json.loads(file.read_text())["source"] == "samples of the model"
    capsys.readouterr()


def test_two_models_differ(model):
    against = model.with_params(jax.tree.map(lambda a: 1.5 * a, model.params))
    blocks = data.Blocks(model.sample_tokens(16, steps=4))
    how = {"passes": 4, "batch_size": 8}
    result = information.information_measures(model, blocks, against=against, **how)
    there = result["divergence"]
    assert there["nats_per_token"] > 5 * there["nats_per_token_standard_error"] > 0
    # Not how the texts are cut into batches.
    how["batch_size"] = 5
    again = information.information_measures(model, blocks, against=against, **how)
    assert again["divergence"] == pytest.approx(there, rel=1e-3)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--passes=3"], "passes 3 must be an even number"),
        (["--first=32"], "first 32 is not in [1, 32)"),
        (["--first=0"], "first 0 is not in [1, 32)"),
        (["--steps=4"], "--steps is for --num_samples"),
        (["--num_samples=4", "--split=validation"], "both there"),
        (["--num_samples=4", "--temperature=0"], "temperature"),
        (["--blocks=0"], "limit 0 is less than 1"),
    ],
)
def test_what_cannot_be_measured(tiny_run, capsys, options, message):
    assert eval_command(["information", f"--workdir={tiny_run}", *options]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_models_that_cannot_be_measured(model):
    blocks = data.Blocks(np.zeros((2, 32), np.int32))
    uniform = dataclasses.replace(model, graph=Uniform(model.graph.vocab_size))
    causal = dataclasses.replace(model, objective=Autoregressive())
    other = dataclasses.replace(model, tokenizer=data.named_tokenizer("ids:103"))
    for one, options, message in (
        (uniform, {"first": 4}, "take a model of absorbing noise"),
        (uniform, {"against": model}, "compare models of one graph"),
        (causal, {}, "a model of autoregressive has no scores"),
        (model, {"against": causal}, "a model of autoregressive has no scores"),
        (model, {"against": other}, "compare models of one tokenizer"),
    ):
        with says(message):
            information.information_measures(one, blocks, **options)


# --- input that no model can score


@pytest.mark.parametrize(
    "score, message",
    [
        (lambda m: m.log_likelihood(np.array([100, 101, 300])), "not all in [0, 103)"),
        (lambda m: m.log_likelihood([1, 2]), "a text is a str, or its tokens as an integer array"),
        (lambda m: m.log_likelihood([np.array([1.5, 2])]), "not float64 (2,)"),
        (lambda m: m.log_likelihood([np.zeros((1, 2), int)]), "not int64 (1, 2)"),
        (lambda m: m.log_likelihood("a", passes=2.0), "passes 2.0 must be an even number"),
        (lambda m: m.log_likelihood_ratio(["a"] * 3, ["b"] * 3, given=["c"] * 2), "2 prompts are"),
        (lambda m: m.bound(np.full((2, 32), 103)), "tokens from 103 to 103 are not all in"),
        (lambda m: m.bound(np.zeros((0, 32), int)), "blocks are an array of tokens [N, L]"),
        (lambda m: m.bound(np.zeros(32, int)), "blocks are an array of tokens [N, L]"),
        (lambda m: m.bound(np.zeros((1, 4))), "blocks are whole numbers, not float64"),
        (lambda m: m.bound(np.zeros((1, 64), int)), "blocks have 64 tokens, more than 32"),
        (
            lambda m: m.bound(data.Blocks(np.zeros((2, 4), int), np.eye(2, 4, 2) > 2)),
            "block 0 is padding alone",
        ),
        (
            lambda m: information.information_measures(
                m, data.Blocks(np.zeros((2, 16), int)), first=20
            ),
            "first 20 is not in [1, 16), the texts' length",
        ),
    ],
)
def test_what_cannot_be_scored_is_refused_at_once(model, score, message):
    with says(message):
        score(model)


def test_tokens_are_scored_as_their_text(model):
    tokens = model.tokenizer.encode("a word")
    a, b = model.log_likelihood(tokens, given="so "), model.log_likelihood("a word", given="so ")
    np.testing.assert_array_equal(a.total, b.total)
    prompt = model.log_likelihood([tokens], given=model.tokenizer.encode("so "))
    np.testing.assert_array_equal(prompt.total, b.total)
