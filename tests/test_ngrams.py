"""N-gram models against counting by hand, and as a scorer of samples."""

import collections
import json
import math

import jax
import numpy as np
import pytest
from conftest import says

from sedd_jax import data
from sedd_jax.cli import eval_command, prepare_command
from sedd_jax.cli.arguments import run_records
from sedd_jax.evaluation import ngrams
from sedd_jax.evaluation.ngrams import NGrams
from sedd_jax.inference.pretrained import load


def evaluate(kind, *arguments):
    return eval_command([kind, *(f"--{argument}" for argument in arguments)])


def draw_blocks(shape, symbols, seed=0):
    return np.asarray(jax.random.randint(jax.random.key(seed), shape, 0, symbols)).astype(np.int32)


def model_of(blocks, vocab_size, order):
    return NGrams(lambda: iter(np.array_split(blocks, 3)), vocab_size, order)


def test_the_unigram_and_bigram_are_the_counted_ones():
    model = NGrams(lambda: [np.array([[0, 1, 0, 1, 2]], np.int32)], 4)
    unigram = np.array([3, 3, 2, 1]) / 9
    text = np.array([[1, 0, 3]], np.int32)
    np.testing.assert_allclose(model.nats(text, 1), -np.log(unigram[[[1, 0, 3]]]))
    # After 1 came 0 once and 2 once; after 0 came 1 twice.
    after_1 = (1 + 2 * unigram[0]) / (2 + 2)
    after_0 = (0 + 1 * unigram[3]) / (2 + 1)
    np.testing.assert_allclose(model.nats(text), -np.log([[unigram[1], after_1, after_0]]))


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_every_order_is_witten_and_bells_rule(order):
    """Against the rule written down with dictionaries; a text with what never came."""
    blocks = np.concatenate([draw_blocks((9, 12), 3), np.full((1, 12), 3)])
    model = model_of(blocks, 5, order)
    counts = collections.Counter(
        tuple(row[i : i + n])
        for row in blocks.tolist()
        for n in range(1, order + 1)
        for i in range(len(row) - n + 1)
    )

    def probability(y, before):
        if not before:
            return (counts[(y,)] + 1) / (blocks.size + 5)
        after = [counts[(*before, other)] for other in range(5)]
        kinds = sum(count > 0 for count in after)
        lower = probability(y, before[1:])
        return (after[y] + kinds * lower) / (sum(after) + kinds) if kinds else lower

    text = draw_blocks((6, 15), 5, seed=1)
    expected = [
        [probability(y, tuple(row[max(0, i - order + 1) : i])) for i, y in enumerate(row)]
        for row in text.tolist()
    ]
    np.testing.assert_allclose(np.exp(-model.nats(text)), expected, rtol=1e-12)
    np.testing.assert_array_equal(
        model.nats(text, 1), model_of(blocks, 5, 1).nats(text)
    )  # the lower orders of one that was fitted with more


def test_the_parts_make_no_difference():
    blocks = draw_blocks((900, 32), 7)
    whole, text = NGrams(lambda: [blocks], 7, 4), draw_blocks((5, 9), 7, seed=1)
    np.testing.assert_array_equal(model_of(blocks, 7, 4).nats(text), whole.nats(text))


def test_every_context_has_a_distribution():
    model = model_of(draw_blocks((6, 20), 6), 7, 3)  # token 6 never came
    for first in range(7):
        for second in range(7):
            texts = np.array([[first, second, last] for last in range(7)], np.int32)
            assert np.exp(-model.nats(texts)[:, 2]).sum() == pytest.approx(1.0)


def test_samples_are_scored_by_the_runs_own_text(capsys, tiny_run, tmp_path):
    file = tmp_path / "result.json"
    command = [f"workdir={tiny_run}", "scorer=ngram:3", "steps=4", "num_samples=5", f"json={file}"]
    assert evaluate("generative_perplexity", *command, "references=6") == 0
    result, out = json.loads(file.read_text()), capsys.readouterr().out
    assert result["scorer"].startswith("3-gram of train ") and result["scorer"] in out
    assert "energy_distance" not in result and result["references"] == 6
    assert "compared with 6 texts of" in out

    records, names = run_records(tiny_run)
    model = load(tiny_run)
    tokens = model.sample_tokens(5, steps=4, seed=0)
    blocks = np.concatenate([part.tokens for part in ngrams.read_parts(records, names.train_split)])
    nats = NGrams(lambda: [blocks], model.tokenizer.vocab_size, 3).nats(tokens)[:, 1:]
    expected = np.exp(nats.mean(axis=1)).mean()
    assert result["generative_perplexity"]["mean_of_exp"] == pytest.approx(expected)
    held_out = result["reference_measures"]["generative_perplexity"]["token_mean"]
    assert 1.0 < held_out < math.inf


def test_a_frontier_by_ngrams_is_gone_on_with(capsys, tiny_run, tmp_path):
    file = tmp_path / "rows.json"
    command = [f"workdir={tiny_run}", "scorer=ngram", "num_samples=4", f"json={file}"]
    assert evaluate("frontier", *command, "steps=2") == 0
    assert evaluate("frontier", *command, "steps=2,4") == 0
    first, second = json.loads(file.read_text())
    assert (first["steps"], second["steps"]) == (2, 4)
    assert first["scorer_sha256"] == second["scorer_sha256"]
    assert "1 of 2 rows are there already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "scorer", "words"),
    [
        ("frontier", "ngram:1", "'ngram:1' is not ngram:N with N in [2, 10]"),
        ("frontier", "ngram:x", "'ngram:x' is not ngram:N"),
        ("generative_perplexity", "ngram:", "'ngram:' is not ngram:N"),
        ("mauve", "ngram", "'ngram' has no hidden states, which MAUVE compares"),
    ],
)
def test_a_scorer_that_cannot_be_is_refused(capsys, tiny_run, kind, scorer, words):
    assert evaluate(kind, f"workdir={tiny_run}", f"scorer={scorer}", "steps=2") == 2
    assert words in capsys.readouterr().err


def test_an_exported_model_has_no_text_to_count(capsys, tiny_run, tmp_path):
    folder = tmp_path / "exported"
    load(tiny_run).save_pretrained(folder)
    assert evaluate("generative_perplexity", f"workdir={folder}", "scorer=ngram", "steps=2") == 2
    error = capsys.readouterr().err
    assert "has no records of its own; choose a GPT-2 as --scorer" in error


def test_padded_records_are_refused(tmp_path):
    lines = "".join('{"text": "one two"}\n' for _ in range(40))
    (tmp_path / "text.jsonl").write_text(lines)
    command = ["--dataset=text", f"--manual_dir={tmp_path / 'text.jsonl'}", "--form=padded"]
    shape = ["--tokenizer=bytes", "--length=16", "--heldout_fraction=0.1"]
    assert prepare_command([*command, *shape, f"--out={tmp_path / 'records'}"]) == 0
    records = data.open_records(tmp_path / "records")
    with says("need packed records", "leave --baselines out"):
        ngrams.baseline_nats(records, "train", data.read_blocks(records, "train", 2))
    with says("need packed records", "choose a GPT-2"):
        ngrams.load_ngram_scorer(3, records, "train")
