"""sedd-eval table."""

import csv
import io
import json

import pytest

from sedd_jax.cli.evaluate import run
from sedd_jax.evaluation.results_table import Number
from sedd_jax.host.console import WIDTH


def likelihood(bound: float, split: str = "test", documents: float | None = 0.04) -> dict:
    values = {"bound": bound, "bound_standard_error": 0.004}
    if documents is not None:
        values["bound_standard_error_over_documents"] = documents
    units = ("bits_per_character", "nats_per_token", "perplexity_per_token", "perplexity_per_word")
    about = {"split": split, "data": {"source": {"corpus": "ptb"}}, "blocks": 4}
    return about | {unit: values for unit in units}


SAMPLES = {
    "predictor": "tweedie",
    "steps": 32,
    "generative_perplexity": {
        "mean_of_exp": 50.0,
        "mean_of_exp_standard_error": 2.0,
        "token_mean": 40.0,
        "token_mean_standard_error": None,
    },
    "unigram_entropy": 5.5,
    "unigram_entropy_standard_error": 0.1,
    "repetition": {"2": 0.1},
    "distinct": {"1": 0.2},  # without an error, as earlier versions wrote it
}


@pytest.fixture
def folders(tmp_path):
    for name in ("small", "medium", "empty"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text('{"seed": 0}')
    (tmp_path / "small/ptb.json").write_text(json.dumps(likelihood(2.5)))
    (tmp_path / "small/frontier.json").write_text(json.dumps([SAMPLES, SAMPLES | {"steps": 64}]))
    (tmp_path / "small/summary.json").write_text(json.dumps({"heldout": likelihood(9.0)}))
    old = likelihood(2.25, documents=None)  # an earlier version's file
    (tmp_path / "medium/ptb.json").write_text(json.dumps(old))
    return tmp_path


def table(capsys, *arguments) -> str:
    assert run("sedd-eval", ["table", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def test_a_row_a_run_and_a_column_a_number_in_markdown(capsys, caplog, folders):
    arguments = [folders / name for name in ("small", "medium", "empty")]
    lines = table(capsys, *arguments, "--columns=nats/token").splitlines()
    assert lines[:5] == [
        "|  | ptb test nats/token |",
        "| --- | ---: |",
        "| small | 2.5000±0.0040 ±docs 0.0400 |",
        "| medium | 2.2500±0.0040 |",
        "| empty |  |",
    ]
    (line,) = caplog.messages
    assert line.startswith("empty has no results; sedd-eval likelihood --workdir=")


def test_numbers_per_token_of_different_tokenizers_do_not_compare(capsys, caplog, folders):
    paths = [folders / name / "ptb.json" for name in ("small", "medium")]
    for path, tokenizer in zip(paths, ("gpt2", "bytes"), strict=True):
        result = json.loads(path.read_text())
        result["data"]["tokenizer"] = {"name": tokenizer}
        path.write_text(json.dumps(result))
    table(capsys, paths[0])
    assert caplog.messages == []
    table(capsys, *paths)
    (line,) = caplog.messages
    assert "do not compare: ptb test nats/token, ptb test PPL/token; bits/char does" in line


def test_numbers_of_different_texts_are_told(capsys, caplog, folders):
    path = folders / "medium/ptb.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "blocks": 5}))
    table(capsys, folders / "small/ptb.json", path, "--columns=bits/char")
    (line,) = caplog.messages
    assert line.startswith("the runs were scored on different texts or blocks in: ptb test bits")


def test_text_fits_a_terminal(capsys, folders):
    lines = table(capsys, folders / "small", folders / "medium", "--format=text").splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert [line.split() for line in lines[:4]] == [
        ["ptb", "test"] * 2,
        ["bits/char", "nats/token"],
        ["small", "2.5000±0.0040", "±docs", "0.0400"] + ["2.5000±0.0040", "±docs", "0.0400"],
        ["medium", "2.2500±0.0040", "2.2500±0.0040"],
    ]


def test_information_is_read(capsys, tmp_path):
    value = {"nats_per_token": 3.25, "nats_per_token_standard_error": 0.04}
    result = {"source": "ptb test", "entropy": value, "divergence": value}
    (tmp_path / "information.json").write_text(json.dumps(result))
    lines = table(capsys, tmp_path / "information.json").splitlines()
    assert "| ptb test entropy, nats/token | ptb test divergence, nats/token |" in lines[0]
    assert "| 3.250±0.040 | 3.250±0.040 |" in lines[2]


def test_each_task_of_a_run_has_columns(capsys, tmp_path):
    for task in ("hellaswag:/data/h.jsonl", "piqa:/data"):
        result = {"task": task, "accuracy": {"total": 0.5}, "standard_error": {"total": 0.01}}
        (tmp_path / f"{task[:5]}.json").write_text(json.dumps(result))
    for pairs in ("some.jsonl", "more.jsonl"):
        result = {"pairs": f"/data/{pairs}"}
        for key in ("nats_per_answer", "nats_per_token", "bits_per_character"):
            result |= {key: 2.0, f"{key}_standard_error": 0.1}
        (tmp_path / f"{pairs}on").write_text(json.dumps(result))
        (tmp_path / f"{pairs}on").rename(tmp_path / pairs.replace("jsonl", "json"))
    head = table(capsys, tmp_path).splitlines()[0]
    assert "| hellaswag accuracy, total | more nats per answer |" in head
    assert "| piqa accuracy, total | some nats per answer |" in head


def test_latex_is_booktabs_and_csv_has_all_digits(capsys, folders):
    text = table(capsys, folders / "small", "--format=latex", "--columns=entropy")
    assert r"\toprule" in text and r"\bottomrule" in text
    titles = r"\multicolumn{1}{c}{tweedie, 32 steps} & \multicolumn{1}{c}{tweedie, 64 steps} \\"
    assert titles in text and r"\cmidrule(lr){2-2} \cmidrule(lr){3-3}" in text
    assert r"small & 5.50$\pm$0.10 & 5.50$\pm$0.10 \\" in text
    out = folders / "out.csv"
    assert table(capsys, folders / "small", folders / "medium/ptb.json", f"--out={out}") == ""
    small, medium = csv.DictReader(io.StringIO(out.read_text()))
    assert (small["run"], medium["run"]) == ("small", "medium/ptb")
    assert small["ptb test nats/token, standard error over documents"] == "0.04"
    assert medium["ptb test nats/token, standard error over documents"] == ""
    assert small["tweedie, 64 steps gen. PPL, mean of exp, standard error"] == "2.0"


def test_what_is_no_result_is_one_line(folders):
    (folders / "small/again.json").write_text(json.dumps(likelihood(3.0)))
    for arguments, words in (
        (["none"], "no file or folder at .*none"),
        (["small/config.json"], "holds no result of sedd-eval"),
        (["small"], "again.json' and .*ptb.json' both have 'ptb test bits/char'; name the file"),
        (["medium", "--format=html"], "unknown format 'html'; known: text, markdown, latex, csv"),
        (["medium", "--columns=MAUVE"], "no column has MAUVE; known: ptb test bits/char"),
        (["empty"], "no run has results; sedd-report writes"),
    ):
        first, *rest = arguments
        with pytest.raises(ValueError, match=words) as error:
            run("sedd-eval", ["table", str(folders / first), *rest])
        assert "\n" not in str(error.value)


def test_a_cell_has_two_digits_of_its_smaller_error():
    assert Number("", "", 12.3456, 0.012, 0.5).cell() == "12.346±0.012 ±docs 0.500"
    assert Number("", "", 3422937.6, 2745.2, None).cell() == "3422938±2745"
    assert Number("", "", 0.51234, None).cell() == "0.5123"
