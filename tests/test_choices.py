"""Questions with several choices: the readers of tasks, and accuracy where it is known."""

import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow
import pytest
from conftest import says
from pyarrow import parquet

from sedd_jax.cli import eval_command
from sedd_jax.data.tokenizers import Bytes
from sedd_jax.diffusion.draws import make_key
from sedd_jax.diffusion.graphs import Absorbing
from sedd_jax.diffusion.likelihood import Bound
from sedd_jax.diffusion.objectives import Autoregressive, Dwdse, Plaid
from sedd_jax.diffusion.schedules import LogLinear
from sedd_jax.evaluation import choices
from sedd_jax.evaluation.answers import evaluate_answers, read_answers
from sedd_jax.evaluation.choices import decided, encoded_pair, evaluate_choices
from sedd_jax.evaluation.tasks import Question, read_questions
from sedd_jax.inference.model import SEDD
from sedd_jax.models.transformer import Transformer

LENGTH = 64
# Probabilities of the bytes: "a" is the likeliest, and a letter before another is likelier.
P = np.full(256, 1e-4)
P[ord("a") : ord("z") + 1] = 0.6 ** np.arange(26) + 1e-3
P[list("é".encode())] = 0.02
P = P / P.sum()


@functools.cache
def independent(objective=Dwdse, length=LENGTH) -> SEDD:
    """A model whose tokens are independent with probabilities P, exactly: all weights are 0 but for
    the head's bias. Its bound is then tight."""
    graph = Absorbing(256)
    sizes = {"hidden_size": 8, "blocks": 1, "heads": 1, "cond_dim": 8, "dropout": 0.0}
    if objective is Autoregressive:
        sizes |= {"is_causal": True, "time_conditioning": False}
    network = Transformer(dim=graph.dim, **sizes)
    inputs = jnp.zeros((1, 8), jnp.int32), jnp.ones((1, 1))
    shapes = jax.eval_shape(lambda: network.init(make_key(0), *inputs, deterministic=True))
    params = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes["params"])
    # As the original, the scores are the head's output over the number of other states.
    params["head_bias"] = jnp.log(256 * jnp.append(P, 1.0).astype(jnp.float32))
    parts = network, params, graph, LogLinear(), Bytes(), length
    return SEDD(*parts, objective=objective())


def nats(text: str) -> float:
    """-log p of a text by P."""
    return -float(np.log(P[np.frombuffer(text.encode(), np.uint8)]).sum())


# Decisions differ by total, per character, and, at an accent, per byte.
QUESTIONS = [
    {"prompt": "one", "choices": ["abc", "xyz"], "label": 0},
    {"prompt": "two", "choices": ["qqq", "aaaaaaaaaaaaaaaa"], "label": 1},
    {"prompt": "three", "choices": ["zebra", "baobab", "abababab"], "label": 2},
    {"prompt": "four", "choices": ["é", "zz"], "label": 0},
    {"prompt": "five", "choices": ["cab", "kiwi"], "label": 1},
    {"prompt": "six", "choices": ["aa", "aaaa"], "label": 1},
    {"prompt": "seven", "choices": ["b", "aaaaaaaa"], "label": 1},
]


def known_decisions(name: str) -> list[int]:
    """The choice of each question by P alone."""
    size = {"total": lambda c: 1, "per_character": len, "per_byte": lambda c: len(c.encode())}[name]
    costs = [[nats(" " + c) / size(c) for c in row["choices"]] for row in QUESTIONS]
    return [int(np.argmin(cost)) for cost in costs]


def written(path, rows=QUESTIONS):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# --- accuracy


@pytest.mark.parametrize("objective", [Dwdse, Autoregressive])
def test_decisions_are_those_of_the_known_probabilities(objective, tmp_path):
    questions, _ = read_questions(str(written(tmp_path / "own.jsonl")))
    result = evaluate_choices(independent(objective), questions, passes=64, seed=3)
    for row, question in zip(result["rows"], QUESTIONS, strict=True):
        exact = np.array([nats(" " + choice) for choice in question["choices"]])
        error = np.array(row["standard_error"])
        assert (abs(row["nats"] - exact) < 4.0 * error + 1e-5 * exact).all()  # the bound is tight
        assert (error < 0.6).all() and error.any() == (objective is Dwdse)
    labels = [question["label"] for question in QUESTIONS]
    for name in choices.SIZES:
        known = known_decisions(name)
        assert [row["chosen"][name] for row in result["rows"]] == known
        right = np.array(known) == labels
        assert result["accuracy"][name] == pytest.approx(right.mean())
        assert result["standard_error"][name] == pytest.approx(right.std(ddof=1) / 7**0.5)
    assert len(set(result["accuracy"].values())) == 3  # the three rules differ on these
    assert result["open"] == {"total": 0, "per_character": 0, "per_byte": 0}
    assert result["chance"] == pytest.approx((6 / 2 + 1 / 3) / 7)
    assert result["is_exact"] == (objective is Autoregressive)


def bound_of(values) -> Bound:
    """From its estimates by pass, [choices, passes]."""
    values = np.array(values, np.float32)
    return Bound(values, np.zeros((len(values), 2), np.float32), np.zeros(len(values), np.float32))


def test_a_decision_is_open_within_two_standard_errors_of_the_difference():
    question = Question(("",) * 3, ("aa", "b", "c"), ("aa", "b", "c"), 0, "x:1")
    up, other = np.tile([1.0, -1.0], 8), np.repeat([1.0, -1.0], 8)
    rows = []
    for second in (10.5 + up, 10.5 - up, 12.5 - up):
        bound = bound_of([10.0 + up, second, 30.0 + other])
        assert bound.standard_error[0] > 0.2
        rows += decided([question], bound)
    np.testing.assert_allclose(rows[0]["nats"], [10.0, 10.5, 30.0], rtol=1e-6)
    assert all(row["chosen"] == {n: 0 for n in choices.SIZES} for row in rows)
    assert [row["is_open"]["total"] for row in rows] == [False, True, False]
    # Half of the first's noise is per character, and the second is 5.5 away.
    assert not any(row["is_open"]["per_character"] for row in rows)
    [tie] = decided([question], bound_of([[10.0], [10.0], [20.0]]))
    assert tie["chosen"]["total"] == 0 and not tie["is_open"]["total"]


def test_the_choices_of_a_question_share_their_noise(tmp_path):
    rows = [{"prompt": "x", "choices": ["abc", "abd"], "label": 0}] * 2
    questions, _ = read_questions(str(written(tmp_path / "own.jsonl", rows)))
    first, second = evaluate_choices(independent(), questions, passes=64)["rows"]
    known = nats("d") - nats("c")
    apart = first["nats"][1] - first["nats"][0]
    assert abs(apart - known) < 0.5 * np.hypot(*first["standard_error"])
    assert first["nats"] != second["nats"]  # as another question's noise


def test_a_target_stops_early_at_random_questions_and_not_because_few_were_all_right(tmp_path):
    # The first half is answered rightly and the second wrongly.
    right, wrong = ({"prompt": "x", "choices": ["aa", "zz"], "label": n} for n in (0, 1))
    path = written(tmp_path / "many.jsonl", [right] * 400 + [wrong] * 400)
    questions, _ = read_questions(str(path))
    how = {"batch_size": 8, "seed": 1}
    result = evaluate_choices(
        independent(Autoregressive), questions, target_standard_error=0.04, **how
    )
    assert result["target_reached"] and 140 <= result["scored"] <= 180  # 0.5 / sqrt(n) <= 0.04
    assert abs(result["accuracy"]["total"] - 0.5) < 0.12
    assert result["standard_error"]["total"] <= 0.04
    whole = evaluate_choices(
        independent(Autoregressive), questions[:400], target_standard_error=0.02, **how
    )
    assert whole["accuracy"]["total"] == 1.0 and 60 < whole["scored"] < 400
    few = evaluate_choices(
        independent(Autoregressive), questions[:8], target_standard_error=0.04, **how
    )
    assert not few["target_reached"] and few["scored"] == 8


# --- what is scored


def text_of(tokens) -> bytes:
    return bytes(tokens.tolist())


def test_white_space_at_the_end_of_a_prompt_is_scored_with_the_text():
    pair = encoded_pair(independent(), "ab \n", "cd")
    assert text_of(pair.prompt) == b"ab" and text_of(pair.text) == b" \ncd"


@dataclasses.dataclass(frozen=True)
class Pairs(Bytes):
    """Bytes, but "th" is one token, and a space and the letter after it are one of 128 and more."""

    def encode(self, text):
        parts = re.findall(r"th| \w|.", text)
        return np.array([1 if p == "th" else ord(p[-1]) + 128 * (len(p) == 2) for p in parts])


def test_a_texts_tokens_are_those_that_it_adds_to_the_prompt():
    model = dataclasses.replace(independent(), tokenizer=Pairs())
    joined = encoded_pair(model, "at", " hat")
    assert joined.prompt.tolist() == [97, 116] and joined.text.tolist() == [128 + 104, 97, 116]
    moved = encoded_pair(model, "at ", "hat")
    assert all(np.array_equal(a, b) for a, b in zip(moved, joined, strict=True))
    # Where "t" would become "th", the prompt keeps its tokens and the text has those of its own.
    changed = encoded_pair(model, "at", "hat")
    assert changed.prompt.tolist() == [97, 116] and changed.text.tolist() == [104, 97, 116]


def test_an_empty_prompt_is_the_end_of_a_document():
    pair = encoded_pair(independent(), "", " cd")
    assert text_of(pair.prompt) == b"\n" and text_of(pair.text) == b" cd"


def test_a_long_prompt_loses_its_beginning():
    pair = encoded_pair(independent(), "é" * 40 + "!", "c" * 20)
    assert text_of(pair.prompt) == ("é" * 40 + "!").encode()[-44:] and pair.is_cut
    assert not encoded_pair(independent(), "x" * 44, "c" * 20).is_cut
    question = Question(("x" * 50, "y"), ("c" * 20, "d"), ("c" * 20, "d"), 0, "x:1")
    assert evaluate_choices(independent(Autoregressive), [question])["cut_prompts"] == 1


def test_a_choice_that_does_not_fit_is_refused_with_its_line():
    question = Question(("x", "x"), ("c" * 65, "d"), ("c" * 65, "d"), 0, "own.jsonl:7")
    with says("own.jsonl:7: 65 tokens to score, not 1 to 64, the model's length; leave the"):
        evaluate_choices(independent(), [question])


@pytest.mark.parametrize("target", [0.0, 1.0, float("nan")])
def test_a_target_that_cannot_be_is_refused(target):
    with says("target_standard_error", "is not between 0 and 1; give that of the accuracy"):
        evaluate_choices(independent(), [], target_standard_error=target)


def test_a_plaid_model_is_refused():
    with says("a model of PLAID bounds whole texts alone", "; use a model of another objective"):
        evaluate_choices(dataclasses.replace(independent(), objective=Plaid()), [])


# --- readers

HELLASWAG = {
    "ind": 24,
    "activity_label": "Roof shingle removal",
    "ctx_a": "A man is sitting on a roof. [header] Tools [title] Get a bar.",
    "ctx_b": "he",
    "ctx": "unused",
    "endings": ["is ripping tiles off. [step] Up", "uses  wrap", "[substeps] starts"],
    "label": 2,
}
ARC = {
    "id": "M_1",
    "question": {
        "stem": "Which is hot?",
        "choices": [{"text": "ice", "label": "1"}, {"text": "fire", "label": "2"}],
    },
    "answerKey": "2",
}
ARC_HUB = {
    "id": "M_1",
    "question": "Which is hot?",
    "choices": {"text": ["ice", "fire"], "label": ["A", "B"]},
    "answerKey": "B",
}
PIQA = {"goal": "How do I sleep?", "sol1": "In a bed.", "sol2": "In a tree."}
WINOGRANDE = {
    "sentence": "Sarah beat Maria because _ was the better surgeon.",
    "option1": "Sarah",
    "option2": "Maria",
    "answer": "1",
}
BOOLQ = {
    "question": "is ice cold",
    "title": "Ice",
    "passage": "Ice is frozen water.",
    "answer": True,
}
FORMATS = [
    (
        "hellaswag",
        HELLASWAG,
        "Roof shingle removal: A man is sitting on a roof. Tools. Get a bar. He",
        [" is ripping tiles off. Up", " uses wrap", "  starts"],
        2,
    ),
    ("arc_easy", ARC, "Question: Which is hot?\nAnswer:", [" ice", " fire"], 1),
    ("arc_challenge", ARC_HUB, "Question: Which is hot?\nAnswer:", [" ice", " fire"], 1),
    (
        "piqa",
        {**PIQA, "label": 1},
        "Question: How do I sleep?\nAnswer:",
        [" In a bed.", " In a tree."],
        1,
    ),
    (
        "boolq",
        BOOLQ,
        "Ice -- Ice is frozen water.\nQuestion: is ice cold?\nAnswer:",
        [" no", " yes"],
        1,
    ),
    (
        "boolq",
        {"question": "is ice hot", "passage": "Ice -- Ice is water.", "label": False},
        "Ice -- Ice is water.\nQuestion: is ice hot?\nAnswer:",
        [" no", " yes"],
        0,
    ),
]


@pytest.mark.parametrize("task, row, prompt, texts, label", FORMATS)
def test_published_lines_are_read_as_the_zero_shot_tasks(tmp_path, task, row, prompt, texts, label):
    file = written(tmp_path / "some.jsonl", [row])
    [question], read = read_questions(f"{task}:{file}")
    assert read == file and question.where == f"{file}:1"
    assert question.prompts == (prompt,) * len(texts)
    assert list(question.texts) == texts and question.label == label
    assert [" " + choice for choice in question.choices] == texts


def test_a_parquet_file_of_the_hub_is_read_as_its_rows(tmp_path):
    file = tmp_path / "test-00000-of-00001.parquet"
    table = {name: [value, value] for name, value in ARC_HUB.items()} | {"answerKey": ["A", "C"]}
    parquet.write_table(pyarrow.table(table), file)
    with says(f"{file}:2: answerKey 'C' is none of ['A', 'B']"):
        read_questions(f"arc_easy:{file}")
    parquet.write_table(pyarrow.table(table).slice(0, 1), file)
    [question], _ = read_questions(f"arc_easy:{file}")
    assert question.texts == (" ice", " fire") and question.label == 0
    file.write_bytes(b"PAR1 and no more")
    with says(f"{file}: ", "get it again"):
        read_questions(f"arc_easy:{file}")


def test_winogrande_scores_what_follows_after_each_option(tmp_path):
    written(tmp_path / "dev.jsonl", [WINOGRANDE])
    [question], _ = read_questions(f"winogrande:{tmp_path}")
    assert question.prompts == ("Sarah beat Maria because Sarah", "Sarah beat Maria because Maria")
    assert question.texts == (" was the better surgeon.",) * 2 and question.label == 0


def test_piqas_labels_are_in_a_file_beside(tmp_path):
    folder = tmp_path / "physicaliqa-train-dev"
    folder.mkdir()
    written(folder / "dev.jsonl", [PIQA, PIQA])
    (folder / "dev-labels.lst").write_text("1\n0\n")
    questions, file = read_questions(f"piqa:{tmp_path}")
    assert [question.label for question in questions] == [1, 0] and file == folder / "dev.jsonl"
    (folder / "dev-labels.lst").write_text("1\n")
    with says("dev.jsonl:2: the 1 labels end before it"):
        read_questions(f"piqa:{tmp_path}")
    (folder / "dev-labels.lst").write_text("1\n0\n1\n")
    with says("3 labels for 2 lines of", "dev.jsonl"):
        read_questions(f"piqa:{tmp_path}")
    (folder / "dev-labels.lst").write_text("1\nx\n")
    with says("dev-labels.lst:2: 'x' is not a label"):
        read_questions(f"piqa:{tmp_path}")


def test_a_prompt_for_each_choice_and_no_delimiter(tmp_path):
    row = {"prompt": ["a ", "b "], "choices": ["c", "d"], "label": 1}
    file = written(tmp_path / "own.jsonl", [row])
    [question], _ = read_questions(str(file), delimiter="")
    assert question.prompts == ("a ", "b ") and question.texts == ("c", "d")


OWN = {"prompt": "a", "choices": ["b", "c"], "label": 0}


@pytest.mark.parametrize(
    "task, row, words",
    [
        ("", {**OWN, "label": 2}, "label 2 is not a whole number from 0 to 1; write {"),
        ("", {**OWN, "label": True}, "label True is not a whole number"),
        ("", {**OWN, "label": "0"}, "label '0' is not a whole number"),
        ("", {**OWN, "choices": ["b"]}, "choices must be a list of at least 2 texts"),
        ("", {**OWN, "choices": "bc"}, "choices must be a list"),
        ("", {**OWN, "choices": ["b", ""]}, "choice 1 is empty"),
        ("", {**OWN, "choices": ["b", 1]}, "choice 1 is not a text"),
        ("", {**OWN, "choices": ["b", "\ud800"]}, "choice '\\ud800' is not a text"),
        ("", {**OWN, "prompt": 1}, "prompt must be a text, or a list of 2, one for each choice"),
        ("", {**OWN, "prompt": ["a"]}, "prompt must be a text, or a list of 2"),
        ("", {"prompt": "a", "choices": ["b", "c"]}, "no 'label'; write {"),
        ("", {**OWN, "prompt": "a "}, "ends in white space, and ' ' is put after it"),
        ("", {**OWN, "choices": [" b", "c"]}, "' b' begins with white space"),
        ("hellaswag:", OWN, "no 'activity_label'; give the published file of hellaswag"),
        ("hellaswag:", {**HELLASWAG, "label": ""}, "label '' is not a number; a test split has"),
        ("hellaswag:", {**HELLASWAG, "ctx_a": 3, "ctx_b": None}, "not in this form; give the"),
        ("arc_easy:", {**ARC, "answerKey": "3"}, "answerKey '3' is none of ['1', '2']"),
        ("winogrande:", {**WINOGRANDE, "sentence": "no gap"}, "sentence has no _ where"),
        ("winogrande:", {**WINOGRANDE, "answer": ""}, "label '' is not a number; a test split"),
        ("piqa:", PIQA, "no 'label'; give the published file of piqa"),
    ],
)
def test_a_wrong_line_is_refused_with_its_file_and_number(tmp_path, task, row, words):
    good = {"": OWN, "hellaswag:": HELLASWAG, "arc_easy:": ARC, "winogrande:": WINOGRANDE}
    good["piqa:"] = {**PIQA, "label": 0}
    file = written(tmp_path / "some.jsonl", [good[task], row])
    with says(f"{file}:2: ", words):
        read_questions(f"{task}{file}")


def test_what_is_no_file_of_a_task_is_refused(tmp_path):
    with says("unknown task 'helaswag'; give a .jsonl file, or one of hellaswag, arc_easy"):
        read_questions(f"helaswag:{tmp_path}")
    with says("no file at", "gone.jsonl", "give a .jsonl file, or one of"):
        read_questions(str(tmp_path / "gone.jsonl"))
    with says("holds no dev.jsonl or valid.jsonl; give piqa:PATH"):
        read_questions(f"piqa:{tmp_path}")
    with says("is no file and no folder with hellaswag_val.jsonl"):
        read_questions(f"hellaswag:{tmp_path / 'gone'}")
    (tmp_path / "empty.jsonl").write_text("\n")
    with says("empty.jsonl' holds no question; write {"):
        read_questions(str(tmp_path / "empty.jsonl"))
    (tmp_path / "broken.jsonl").write_text('{"prompt"\n')
    with says("broken.jsonl:1 is not JSON"):
        read_questions(str(tmp_path / "broken.jsonl"))
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        written(tmp_path / name / "dev.jsonl", [WINOGRANDE])
    with says("holds", "a/dev.jsonl and", "b/dev.jsonl; give one as winogrande:FILE"):
        read_questions(f"winogrande:{tmp_path}")
    with says("delimiter '' is for lines of one's own, and winogrande has a space"):
        read_questions(f"winogrande:{tmp_path / 'a'}", delimiter="")


# --- the command


def test_the_command_prints_a_table_and_writes_rows(tiny_run, tmp_path, capsys):
    file = written(tmp_path / "own.jsonl", [{**OWN, "prompt": "if"}] * 3)
    out = tmp_path / "result.json"
    command = ["choices", f"--workdir={tiny_run}", f"--task={file}", "--passes=2"]
    assert eval_command([*command, "--limit=2", f"--json={out}", "--seed=1"]) == 0
    shown = capsys.readouterr()
    assert "SEDD at step 8: bound, 2 passes, seed 1; 2 of 2 questions, chance 0.500" in shown.out
    assert "per character" in shown.out
    result = json.loads(out.read_text())
    assert len(result["rows"]) == 2 and result["task"] == str(file)
    assert set(result["rows"][0]) >= {"where", "label", "nats", "standard_error", "chosen"}

    file.write_text('{"prompt": "a"}\n')
    gone = [f"--workdir={tmp_path / 'gone'}", f"--task={file}"]
    assert (
        eval_command(["choices", *gone]) == 2
    )  # the line is refused before the model is looked for
    assert f"{file}:1: no 'choices'; write {{" in capsys.readouterr().err
    assert eval_command([*command, "--limit=0"]) == 2


# --- prompts and answers


@pytest.mark.parametrize("objective", [Dwdse, Autoregressive])
def test_the_bound_on_answers_is_that_of_the_probabilities(tmp_path, objective):
    texts = ["abc", "zebra", "é", "kiwi and so on"]
    rows = [{"prompt": f"{n} prompt", "answer": text} for n, text in enumerate(texts)]
    answers = read_answers(written(tmp_path / "pairs.jsonl", rows))
    result = evaluate_answers(independent(objective), answers, passes=64, batch_size=3)
    exact = np.array([nats(" " + text) for text in texts])
    scored = np.array([row["nats"] for row in result["rows"]])
    errors = np.array([row["standard_error"] for row in result["rows"]])
    # The ends of the bound and float32 are the rest.
    assert (np.abs(scored - exact) < 4 * errors + 0.02 * exact).all()
    assert objective is Dwdse or (errors == 0).all()
    tokens = np.array([1 + len(text.encode()) for text in texts])
    assert [row["tokens"] for row in result["rows"]] == tokens.tolist()
    assert result["nats_per_token"] == pytest.approx(scored.sum() / tokens.sum())
    ends = ("", "_standard_error")
    nats_per_token, error = (result[f"nats_per_token{end}"] for end in ends)
    ppl, ppl_error = (result[f"perplexity_per_token{end}"] for end in ends)
    assert ppl == pytest.approx(np.exp(nats_per_token))
    assert ppl_error == pytest.approx(
        (np.exp(nats_per_token + 1e-6) - ppl) / 1e-6 * error, rel=1e-4
    )
    assert result["nats_per_answer"] == pytest.approx(scored.mean())
    assert result["nats_per_answer_standard_error"] == pytest.approx(scored.std(ddof=1) / 2)
    characters = sum(map(len, texts))
    assert result["bits_per_character"] == pytest.approx(scored.sum() / characters / np.log(2))
    assert result["noise_standard_error"] == pytest.approx(np.sqrt((errors**2).sum()) / 4)


def test_the_answers_command(tiny_run, tmp_path, capsys):
    file, result = tmp_path / "pairs.jsonl", tmp_path / "result.json"
    run = ["answers", f"--workdir={tiny_run}", f"--pairs={file}", "--passes=2", "--delimiter="]
    written(file, [{"prompt": "if ", "answer": "then"}, {"prompt": "", "answer": "or"}])
    assert eval_command([*run, f"--json={result}"]) == 0
    out, values = capsys.readouterr().out, json.loads(result.read_text())
    assert f"{values['nats_per_answer']:.3f}" in out and "2 answers, 7 tokens" in out
    for rows, message in (
        ([{"prompt": "a"}], "no 'answer'"),
        ([{"prompt": "a", "answer": 3}], "answer 3 is not a text"),
        ([{"prompt": "a", "answer": ""}], "the answer is empty"),
        ([{"prompt": "a", "answer": "x" * 40}], "40 tokens to score, not 1 to 32"),
        ([], "holds no line"),
    ):
        written(file, rows)
        assert eval_command(run) == 2
        (line,) = [one for one in capsys.readouterr().err.splitlines() if "error" in one]
        assert message in line and (not rows or f"{file}:1" in line)


def test_nothing_to_score_is_refused():
    with says("no question to score"):
        evaluate_choices(independent(), [])
    with says("no answer to score"):
        evaluate_answers(independent(), [])
