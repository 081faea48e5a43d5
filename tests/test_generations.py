"""What a model writes, measured through the commands: a tiny run and a tiny random GPT-2."""

import json
import re
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from sedd_jax import data
from sedd_jax.cli import eval_command, prepare_command
from sedd_jax.evaluation import frontier, generations, tables
from sedd_jax.evaluation.scorer import load_scorer
from sedd_jax.evaluation.statistics import energy_distance, sample_statistics
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
    statistics = sample_statistics(tokens)
    assert {name: result[name] for name in statistics} == statistics
    assert result["statistics_of"].startswith("the model's tokens (")
    assert result["references"] is None and "energy_distance" not in result


def test_samples_are_compared_with_texts_of_the_heldout_split(
    capsys, tiny_run, scorer_folder, tmp_path
):
    file = tmp_path / "result.json"
    arguments = [f"workdir={tiny_run}", f"scorer={scorer_folder}", "steps=2", "num_samples=4"]
    more = ["references=5", "length=20", f"json={file}"]
    assert evaluate("generative_perplexity", *arguments, *more) == 0
    result = json.loads(file.read_text())
    model, scorer = load(tiny_run), load_scorer(str(scorer_folder))
    records, split = data.open_records(tiny_run / "records"), result["split"]
    texts = data.read_blocks(records, split, 5).tokens[:, :20]
    measured = result["reference_measures"]
    assert measured["unigram_entropy"] == sample_statistics(texts)["unigram_entropy"]

    def features(tokens):
        ids = [scorer.tokenizer.encode(text) for text in model.decode(tokens)]
        return np.concatenate([scorer.mean_features(row[None]) for row in ids])

    distance, error = energy_distance(
        features(texts), features(model.sample_tokens(4, length=20, steps=2))
    )
    assert result["energy_distance"] == pytest.approx(distance, rel=1e-3)
    assert result["energy_distance_standard_error"] == pytest.approx(error, rel=1e-3)
    assert (result["references"], result["energy_distance_of"]) == (5, generations.ENERGY_FEATURES)
    assert result["sha256"] == records.counts(split)["sha256"]
    out = capsys.readouterr().out.splitlines()
    assert out[-1].split()[0] == f"({split})" and f"to 5 texts of {split}" in " ".join(out[:4])
    assert evaluate("generative_perplexity", *arguments, "references=5", "num_samples=2") == 2
    assert "num_samples 2 is too few" in capsys.readouterr().err
    assert evaluate("generative_perplexity", *arguments, "references=999999") == 2
    assert "lower --references" in capsys.readouterr().err
    with pytest.raises(ValueError, match="length 33 of the samples is more than the 32 tokens"):
        generations._read_texts(records, split, 3, 33)


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


@pytest.fixture
def sampled(monkeypatch):
    """The (predictor, steps) of each row that is sampled."""
    calls = []
    measure = generations.generative_perplexity

    def spy(model, scorer, references, **options):
        calls.append((options["predictor"], options["steps"]))
        return measure(model, scorer, references, **options)

    monkeypatch.setattr(generations, "generative_perplexity", spy)
    return calls


def test_frontier_has_a_row_for_each_combination_and_makes_none_twice(
    capsys, tiny_run, scorer_folder, tmp_path, sampled
):
    pytest.importorskip("matplotlib", reason="the picture needs the [plot] extra")
    file, picture = tmp_path / "rows.json", tmp_path / "frontier.png"
    command = [f"workdir={tiny_run}", f"scorer={scorer_folder}", "num_samples=4", f"json={file}"]
    small = [*command, "predictors=tweedie,euler", "steps=2,4"]
    assert evaluate("frontier", *small, f"picture={picture}") == 0
    rows = json.loads(file.read_text())
    expected = [("tweedie", 2), ("tweedie", 4), ("euler", 2), ("euler", 4)]
    assert [(row["predictor"], row["steps"]) for row in rows] == sampled == expected
    assert [row["nfe"] for row in rows] == [3, 5, 3, 5]
    assert {(row["seed"], row["dtype"], row["draw"]) for row in rows} == {(0, "float32", "exact")}
    assert picture.read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out.splitlines()
    names = [line.split()[0] for line in out if line.split()[:1] in (["tweedie"], ["euler"])]
    assert names == (["tweedie"] * 2 + ["euler"] * 2) * (len(names) // 4) and names
    # Longer lists add their rows, in order, and draw nothing again.
    sampled.clear()
    larger = [*command, "predictors=none,tweedie,euler", "steps=2,3,4"]
    assert evaluate("frontier", *larger) == 0
    assert sampled == [("none", 2), ("tweedie", 3), ("euler", 3)]
    more = json.loads(file.read_text())
    assert [row["steps"] for row in more] == [2, 2, 3, 4, 2, 3, 4] and more[0]["nfe"] == 1
    assert [row for row in more if row in rows] == rows
    # Fewer rows, other settings or another file would lose what is there.
    before = file.read_bytes()
    capsys.readouterr()
    assert evaluate("frontier", *small) == 2
    assert "a finished row, none, 2 steps, is none of the rows to make" in capsys.readouterr().err
    assert evaluate("frontier", *larger, "seed=1") == 2
    assert "has seed 0, not 1; give another file" in capsys.readouterr().err
    assert file.read_bytes() == before
    file.write_text("{}")
    assert evaluate("frontier", *small) == 2
    assert "holds no rows of a frontier" in capsys.readouterr().err
    assert len(sampled) == 3 and file.read_text() == "{}"


def test_a_frontier_that_is_stopped_leaves_its_finished_rows(
    capsys, tiny_run, scorer_folder, tmp_path, monkeypatch, sampled
):
    file = tmp_path / "rows.json"
    command = [f"workdir={tiny_run}", f"scorer={scorer_folder}", "num_samples=4", f"json={file}"]
    command += ["predictors=euler,tweedie", "steps=2"]
    score = generations.text_perplexity

    def stop(nats):
        if len(sampled) == 2:
            raise KeyboardInterrupt
        return score(nats)

    monkeypatch.setattr(generations, "text_perplexity", stop)
    assert evaluate("frontier", *command) == 130
    finished = json.loads(file.read_text())
    assert [row["predictor"] for row in finished] == ["euler"]
    sampled += [None]  # from here on nothing stops
    assert evaluate("frontier", *command) == 0
    rows = json.loads(file.read_text())
    assert rows[0] == finished[0] and rows[1]["predictor"] == "tweedie"
    assert sampled[-1] == ("tweedie", 2) and "1 of 2 rows are there" in capsys.readouterr().err


def test_rows_of_other_weights_are_not_taken_for_finished(tiny_run, scorer_folder, sampled):
    model, scorer = load(tiny_run), load_scorer(str(scorer_folder))
    options = frontier.combinations([2], ["euler"])
    shared = {"num_samples": 4, "batch_size": 16}
    rows = frontier.frontier(model, scorer, options, **shared)
    assert frontier.frontier(model, scorer, options, finished=rows, **shared) == rows
    other = model.with_params(jax.tree.map(lambda leaf: leaf * 1.5, model.params))
    with pytest.raises(ValueError, match="has model_sha256 .* give another file"):
        frontier.frontier(other, scorer, options, finished=rows, **shared)
    assert len(sampled) == 1


def test_rows_from_before_an_option_had_its_default(tiny_run, scorer_folder, sampled):
    model, scorer = load(tiny_run), load_scorer(str(scorer_folder))
    options = frontier.combinations([2], ["euler"])
    shared = {"num_samples": 4, "batch_size": 16}
    rows = frontier.frontier(model, scorer, options, **shared)
    old = [{name: value for name, value in row.items() if name != "parameters"} for row in rows]
    assert frontier.frontier(model, scorer, options, finished=old, **shared) == old
    assert len(sampled) == 1


def test_network_calls_are_the_mean_over_samples_where_they_are_counted():
    def nfe(*calls):
        states = [
            SimpleNamespace(step=2, steps=2, tokens=np.zeros((2, 4), int), calls=each)
            for each in calls
        ]
        model = SimpleNamespace(stream=lambda *arguments, **options: iter(states))
        return generations._draw(model, 4, sampling.Sampling(steps=6), progress=False)[1]

    assert nfe(np.array([3, 4]), np.array([3, 3])) == 3.25


def test_combinations_pass_on_only_what_is_named(monkeypatch):
    assert frontier.combinations([4]) == [{"steps": 4}]
    monkeypatch.setitem(sampling.TABLES["predictor"], "new", lambda *arguments: None)
    rows = frontier.combinations([2, 4, 2], ["new", "none", "new"], [0.5, 1.0])
    assert rows == [
        {"predictor": predictor, "temperature": temperature, "steps": steps}
        for predictor, counts in (("new", (2, 4)), ("none", (2,)))
        for temperature in (0.5, 1.0)
        for steps in counts
    ]
    with pytest.raises(ValueError, match="steps is empty"):
        frontier.combinations([])


def test_a_table_shows_temperatures_options_and_errors(tiny_run, scorer_folder, tmp_path):
    model, scorer = load(tiny_run), load_scorer(str(scorer_folder))
    row = generations.generative_perplexity(
        model, scorer, num_samples=4, batch_size=16, steps=2, t_min=1e-4
    )
    table = tables.perplexity_table([row])
    assert "draw exact, grid uniform, t_min 0.0001, model float32" in " ".join(table.split())
    error = row["unigram_entropy_standard_error"]
    assert f"{row['unigram_entropy']:.3f}±{error:.3f}" in table and "temp." not in table
    rows = [{**row, "temperature": 0.5}, {**row, "temperature": 0.75, "nfe": 3.25}]
    parts = re.findall(r"(?m)^ +predictor.*\n.*\n.*$", tables.perplexity_table(rows))
    assert len(parts) == 4  # of at most 80 columns
    for part in parts:
        names, _, last = lines = part.splitlines()
        assert names.split()[:4] == ["predictor", "temp.", "steps", "NFE"]
        assert last.split()[:4] == ["tweedie", "0.75", "2", "3.25"]
        assert len({len(line) for line in lines}) == 1 and len(names) <= 80
    # A single sample has no error.
    alone = generations.generative_perplexity(model, scorer, num_samples=1, batch_size=4, steps=2)
    assert "±" not in tables.perplexity_table([alone])
    pytest.importorskip("matplotlib", reason="the picture needs the [plot] extra")
    frontier.draw_picture(tmp_path / "a.png", [*rows, alone])
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_ticks_of_network_calls_do_not_touch():
    assert frontier._spaced([1, 5, 9, 17, 32, 33, 65, 129]) == [1, 5, 9, 17, 33, 65, 129]
    assert frontier._spaced([33]) == [33] and frontier._spaced([32, 33]) == [32, 33]


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
    words = " ".join(out.split())
    assert "MAUVE 0." in words and "2 repeats of 12 references, 3 clusters" in words
    assert result["mauve"]["buckets"] == 3
    assert "not comparable with the paper's 1000 references" in words
    assert "not comparable" not in tables.describe_mauve({**result, "references": 500})
    lines = [line.split() for line in out.splitlines() if "±" in line]  # the table is in parts
    for name, measures in ("completions", result), ("references", result["reference_measures"]):
        numbers = [cell for first, *cells in lines if first == name for cell in cells]
        entropy = f"{measures['unigram_entropy']:.3f}±"
        assert any(number.startswith(entropy) for number in numbers)


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
        ("frontier", ["workdir={run}", "steps=2,x"], "--steps '2,x' is not like 32,64,128"),
        ("frontier", ["workdir={run}", "scorer={scorer}", "length=33"], "length 33 is not"),
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
