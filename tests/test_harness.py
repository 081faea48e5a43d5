"""lm-evaluation-harness with our models: its own runner, and the same numbers as sedd-eval choices.

Skipped where lm_eval is not installed: pip install "sedd_jax[eval]".
"""

import dataclasses
import json
import subprocess
import sys
from importlib import resources

import numpy as np
import pytest
from conftest import says, start
from test_choices import (
    ARC_HUB,
    HELLASWAG,
    LENGTH,
    PIQA,
    QUESTIONS,
    WINOGRANDE,
    independent,
    known_decisions,
    nats,
    text_of,
    written,
)

from sedd_jax.cli import eval_command
from sedd_jax.data.tokenizers import Ids
from sedd_jax.diffusion.objectives import Autoregressive, Dwdse
from sedd_jax.evaluation.choices import evaluate_choices
from sedd_jax.evaluation.tasks import read_questions

pytest.importorskip("lm_eval", reason='lm_eval is not installed: pip install "sedd_jax[eval]"')

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM
from lm_eval.tasks import TaskManager

from sedd_jax.evaluation.harness import SeddLM, windows


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """Everything is local, and datasets' cache is the test's."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)


def task(folder, name, file, text):
    """A task's YAML in the folder, on the lines of a file."""
    folder.mkdir(exist_ok=True)
    source = "dataset_path: json\ndataset_name: null\ndataset_kwargs:\n  data_files:\n"
    (folder / f"{name}.yaml").write_text(
        f"task: {name}\n{source}    validation: {file}\nvalidation_split: validation\n"
        f"training_split: null\ntest_split: null\n{text}"
    )


def harness(model, folder, *names, **options):
    """What the harness's own runner says of tasks of the folder."""
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    how = {"bootstrap_iters": 0, "task_manager": manager, **options}
    return simple_evaluate(model=model, tasks=list(names), **how)


METRICS = "".join(
    f"  - metric: {name}\n    aggregation: mean\n    higher_is_better: true\n"
    for name in ("acc", "acc_norm", "acc_bytes")
)
CHOICES = (
    'output_type: multiple_choice\ndoc_to_text: "{{prompt}}"\ndoc_to_choice: choices\n'
    f"doc_to_target: label\nmetric_list:\n{METRICS}"
)


@pytest.mark.parametrize("objective", [Dwdse, Autoregressive])
def test_the_harness_and_our_command_agree_on_a_task_whose_answer_is_known(objective, tmp_path):
    file = written(tmp_path / "own.jsonl")
    task(tmp_path / "tasks", "own", file, CHOICES)
    model = independent(objective)
    how = {"passes": 64, "seed": 3, "batch_size": 16}
    theirs = harness(SeddLM(model, **how), tmp_path / "tasks", "own")
    ours = evaluate_choices(model, read_questions(str(file))[0], **how)
    labels = [question["label"] for question in QUESTIONS]
    for name, metric in zip(ours["accuracy"], ("acc", "acc_norm", "acc_bytes"), strict=True):
        known = np.mean(np.array(known_decisions(name)) == labels)
        assert theirs["results"]["own"][f"{metric},none"] == pytest.approx(known)
        assert ours["accuracy"][name] == pytest.approx(known)
    for row, sample in zip(ours["rows"], theirs["samples"]["own"], strict=True):
        found = [-each[0] for each in sample["filtered_resps"]]
        np.testing.assert_allclose(found, row["nats"], rtol=1e-6)
    assert theirs["config"]["model_num_parameters"] > 0
    exact = objective is Autoregressive
    assert theirs["config"]["likelihood"] == ("exact" if exact else "bound, 64 passes")


PUBLISHED = {
    "hellaswag": ("hellaswag/hellaswag.yaml", {**HELLASWAG, "label": "2"}),
    "arc_easy": ("arc/arc_easy.yaml", ARC_HUB),
    "piqa": ("piqa/piqa.yaml", {**PIQA, "label": 1}),
    "winogrande": ("winogrande/default.yaml", WINOGRANDE),
    "boolq": (
        "super_glue/boolq/default.yaml",
        {"question": "is ice hot", "passage": "Ice -- Ice is water.", "idx": 0, "label": 0},
    ),
}


def test_published_tasks_score_the_same_texts_after_the_same_prompts_as_the_harness(tmp_path):
    files = {}
    for name, (yaml, row) in PUBLISHED.items():
        files[name] = written(tmp_path / f"{name}.jsonl", [row])
        include = resources.files("lm_eval") / "tasks" / yaml
        task(tmp_path / "tasks", f"our_{name}", files[name], f"include: {include}\n")
    names = [f"our_{name}" for name in PUBLISHED]
    model = independent(Autoregressive)
    theirs = harness(SeddLM(model), tmp_path / "tasks", *names)
    for name in PUBLISHED:
        [question], _ = read_questions(f"{name}:{files[name]}")
        [sample] = theirs["samples"][f"our_{name}"]
        asked = [tuple(each) for each in sample["arguments"]]
        assert list(zip(question.prompts, question.texts, strict=True)) == asked
        accuracy = evaluate_choices(model, [question])["accuracy"]
        metrics = theirs["results"][f"our_{name}"]
        assert metrics["acc,none"] == accuracy["total"]
        if "acc_norm,none" in metrics:
            assert metrics["acc_norm,none"] == accuracy["per_character"]


# --- each of the three requests


def request(kind, *arguments, number=0, index=0):
    return Instance(kind, {}, arguments, index, metadata=("task", number, 1))


def test_documents_of_any_length_are_scored_token_by_token_once():
    texts = ["a", "b" * 16, "abc" * 12, "z" * 17]  # 1 + 2 + 3 + 2 parts
    lm = SeddLM(independent(Autoregressive, 16), batch_size=4)
    requests = [request("loglikelihood_rolling", text, number=i) for i, text in enumerate(texts)]
    found = lm.loglikelihood_rolling(requests, disable_tqdm=True)
    np.testing.assert_allclose(found, [-nats(text) for text in texts], rtol=1e-5)
    assert lm.loglikelihood_rolling([], disable_tqdm=True) == []


def test_windows_of_a_tokenizer_without_a_separator():
    model = dataclasses.replace(independent(), tokenizer=Ids(256))
    pairs = windows(model, " ".join(map(str, range(130))))
    parts = [(pair.prompt.tolist(), pair.text.tolist()) for pair in pairs]
    first, second = list(range(64)), list(range(64, 127))
    assert parts == [([], first), ([63], second), (list(range(66, 127)), [127, 128, 129])]


@pytest.mark.parametrize("size", [1, 63, 64, 65, 126, 127, 150, 300])
def test_windows_follow_a_token_and_the_last_one_all_that_fits(size):
    text = "".join(chr(97 + i % 26) for i in range(size))
    pairs = windows(independent(), text)
    assert "".join(text_of(pair.text).decode() for pair in pairs) == text
    done = "\n"
    for number, pair in enumerate(pairs):
        prompt, part = text_of(pair.prompt).decode(), text_of(pair.text).decode()
        assert done.endswith(prompt) and 1 <= len(prompt + part) <= LENGTH
        is_last = number == len(pairs) - 1
        assert len(prompt) == (min(len(done), LENGTH - len(part)) if is_last else 1)
        done += part


@pytest.mark.parametrize("objective", [Dwdse, Autoregressive])
def test_texts_end_before_a_stop_string_and_are_of_the_likeliest_tokens(objective):
    lm = SeddLM(independent(objective, 16), **({"steps": 8} if objective is Dwdse else {}))
    greedy = [
        ("ab", {"until": ["\n"], "max_gen_toks": 5}, "aaaaa"),
        ("x" * 100, {"until": ["aaa"], "max_gen_toks": 7}, ""),
        ("", {"until": [], "max_gen_toks": 3}, "aaa"),
        ("ab", {"until": "b"}, "a" * 8),  # 256 are more than the model has: half of it
    ]
    requests = [request("generate_until", *each[:2], number=i) for i, each in enumerate(greedy)]
    texts = lm.generate_until(requests, disable_tqdm=True)
    assert texts == [each[2] for each in greedy]


def test_a_request_that_is_repeated_is_drawn_anew():
    lm = SeddLM(independent(Autoregressive, 16), batch_size=2)
    how = {"until": ["\n"], "do_sample": True, "max_gen_toks": 12}
    texts = lm.generate_until([request("generate_until", "ab", how)] * 4, disable_tqdm=True)
    assert len(set(texts)) == 4 and len(set("".join(texts))) > 3


def test_a_single_continuation_is_greedy_where_the_likeliest_text_is_it():
    lm = SeddLM(independent(Autoregressive, 16))
    texts = ["aa", "ab", "aaa", "b"]
    requests = [request("loglikelihood", "xy", text, number=i) for i, text in enumerate(texts)]
    choices = [request("loglikelihood", "xy", text, number=4) for text in ("aa", "bb")]
    found = lm.loglikelihood([*requests, *choices], disable_tqdm=True)
    assert [is_greedy for _, is_greedy in found] == [True, False, True, False, False, False]
    np.testing.assert_allclose(found[1][0], -nats("ab"), rtol=1e-5)


def test_a_cache_answers_instead_of_the_model(tmp_path):
    lm = SeddLM(independent(Autoregressive, 16))
    arguments = {
        "loglikelihood": [("x", text) for text in "abcd"],
        "loglikelihood_rolling": [(text,) for text in "abcd"],
        "generate_until": [(text, {"until": ["b"], "max_gen_toks": 4}) for text in "abcd"],
    }
    requests = {kind: [request(kind, *each) for each in rows] for kind, rows in arguments.items()}
    cached = CachingLM(lm, str(tmp_path / "cache.db"))
    first = {kind: getattr(lm, kind)(some, disable_tqdm=True) for kind, some in requests.items()}
    lm.model = None  # what comes now was saved by the calls above
    assert {kind: getattr(cached, kind)(some) for kind, some in requests.items()} == first


# --- what is refused, and the command line


def test_what_the_harness_may_not_ask_is_refused(tmp_path):
    with says("give a model, or workdir"):
        SeddLM()
    with says("passes 3 must be an even number"):
        SeddLM(independent(), passes=3)
    with says("unknown predictor 'eulr'"):
        SeddLM(independent(), predictor="eulr")
    with says("unknown option 'stepz'; known: steps"):
        SeddLM(independent(), stepz=4)
    assert SeddLM(independent(), batch_size="auto:4").batch_size == 16
    with says("document 4 of task: 65 tokens to score, not 1 to 64, the model's length"):
        SeddLM(independent()).loglikelihood([request("loglikelihood", "", "a" * 65, number=4)])


def test_without_the_library_there_is_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert eval_command(["harness", "--tasks", "own"]) == 2
    assert 'needs lm-evaluation-harness; pip install "sedd_jax[eval]"' in capsys.readouterr().err
    assert eval_command(["harness", "--help"]) == 0
    assert 'pip install "sedd_jax[eval]"' in capsys.readouterr().out
    code = """
import sys
sys.modules["lm_eval"] = None
from sedd_jax.evaluation.harness import SeddLM
try:
    SeddLM(workdir="gone")
except ValueError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("SeddLM needs lm_eval (")
    assert done.stdout.endswith('); pip install "sedd_jax[eval]"\n')


def test_the_package_does_not_import_the_library():
    names = "sedd_jax, sedd_jax.cli, sedd_jax.evaluation.choices, sedd_jax.evaluation.tasks"
    code = f"import sys, {names}; print('lm_eval' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.long
def test_the_harness_is_run_from_our_command_line(tiny_run, tmp_path):
    rows = [{"prompt": "if", "choices": ["then", "zz"], "label": i % 3 // 2} for i in range(6)]
    file = written(tmp_path / "own.jsonl", rows)
    task(tmp_path / "tasks", "own", file, CHOICES)
    arguments = ("--tasks", "own", "--include_path", tmp_path / "tasks", "--batch_size", "4")
    child = start("eval", "harness", "--model_args", f"workdir={tiny_run},passes=4", *arguments)
    out, err = child.communicate(timeout=200)
    assert child.returncode == 0, err
    out_file = tmp_path / "ours.json"
    command = [f"--workdir={tiny_run}", f"--task={file}", "--passes=4", "--batch_size=4"]
    assert eval_command(["choices", *command, f"--json={out_file}"]) == 0
    accuracy = json.loads(out_file.read_text())["accuracy"]
    cells = [[cell.strip() for cell in line.split("|")] for line in out.splitlines()]
    printed = {row[5]: float(row[7]) for row in cells if len(row) > 7 and row[5][:3] == "acc"}
    keys = {"acc": "total", "acc_norm": "per_character", "acc_bytes": "per_byte"}
    assert printed == {name: pytest.approx(accuracy[key], abs=1e-4) for name, key in keys.items()}
    assert 0.0 < accuracy["total"] < 1.0
