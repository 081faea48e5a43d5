"""Questions with several choices, from one's own lines or from published files.

The prompts are those of lm-evaluation-harness's zero-shot tasks: what a model reads, and what is
scored after it, are the same strings there and here.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sedd_jax.host.files import load_json, local_path, refuse_pointer_file, shown

DELIMITER = " "  # between a prompt and a choice
Row = dict[str, Any]  # a line's object


class Question(NamedTuple):
    """Which of `texts` follows its prompt."""

    prompts: tuple[str, ...]  # one for each choice
    texts: tuple[str, ...]  # what is scored, after the prompt
    choices: tuple[str, ...]  # texts without the delimiter; their lengths normalise
    label: int  # the right one
    where: str  # FILE:LINE


class Task(NamedTuple):
    """How a published task is read: questions of lines, and the files that a folder may hold."""

    question: Callable[[Row], tuple[str | Sequence[str], Sequence[str], int]]
    files: tuple[str, ...]  # the split that is reported, under each of its names
    labels: str = ""  # with this ending in place of .jsonl: a file with a label a line


def read_questions(name: str, delimiter: str = DELIMITER) -> tuple[list[Question], Path]:
    """The questions of "hellaswag:PATH" and the like, PATH a file or folder, or of one's own lines
    {"prompt", "choices", "label"} at a path; and the file that was read.

    delimiter stands between prompt and choice of one's own lines; the published tasks have a space.
    ValueError names the file, the line, what is wrong and the remedy.
    """
    kind, colon, path = name.partition(":")
    task = TASKS.get(kind) if colon else None
    if task is not None:
        if delimiter != DELIMITER:
            raise ValueError(
                f"delimiter {delimiter!r} is for lines of one's own, and {kind} has a space; leave "
                "it out"
            )
        file = _file_of(kind, task, local_path(path))
        make, remedy = task.question, f"give the published file of {kind}"
    else:
        known = f"give a .jsonl file, or one of {', '.join(TASKS)} with its path, as hellaswag:PATH"
        if re.fullmatch(r"\w+", kind) and colon and not Path(name).exists():
            raise ValueError(f"unknown task {kind!r}; {known}")
        file, make, remedy = local_path(name), _own, OWN
        if not file.is_file():
            raise ValueError(f"no file at {name!r}; {known}")
    refuse_pointer_file(file)
    labels = _labels(file, task) if task is not None and task.labels else None
    questions = []
    for number, (line, row) in enumerate(read_rows(file)):
        where = f"{file}:{line}"
        if labels is not None:
            if number >= len(labels):
                raise ValueError(f"{where}: the {len(labels)} labels end before it; {remedy}")
            row = {**row, "label": labels[number]}
        try:
            question = _checked(*make(row), delimiter, where)
            if task is None:
                for prompt, choice in zip(question.prompts, question.choices, strict=True):
                    check_spaces(prompt, choice, delimiter)
        except KeyError as error:
            raise ValueError(f"{where}: no {error.args[0]!r}; {remedy}") from error
        except (ValueError, TypeError, AttributeError, IndexError) as error:
            fault = error if type(error) is ValueError else "not in this form"
            raise ValueError(f"{where}: {fault}; {remedy}") from error
        questions.append(question)
    if not questions:
        raise ValueError(f"{str(file)!r} holds no question; {remedy}")
    if labels is not None and len(labels) > len(questions):
        raise ValueError(f"{len(labels)} labels for {len(questions)} lines of {file}; {remedy}")
    return questions, file


def _file_of(kind: str, task: Task, path: Path) -> Path:
    """The task's file, or the one in a folder under one of its names."""
    if path.is_file():
        return path
    files = sorted(file for name in task.files for file in path.rglob(name))
    names = " or ".join(task.files)
    if not path.is_dir() or not files:
        fault = "holds no" if path.is_dir() else "is no file and no folder with"
        raise ValueError(f"{str(path)!r} {fault} {names}; give {kind}:PATH its path")
    if len(files) > 1:
        raise ValueError(f"{str(path)!r} holds {files[0]} and {files[1]}; give one as {kind}:FILE")
    return files[0]


def read_rows(file: Path) -> Iterator[tuple[int, Row]]:
    """(number, object) of lines of JSON, blank ones left out, or of a .parquet file's rows."""
    if file.suffix == ".parquet":
        yield from enumerate(_table(file), start=1)
        return
    with file.open("rb") as opened:
        for number, line in enumerate(opened, start=1):
            line = line.removeprefix(b"\xef\xbb\xbf").strip()
            if line:
                yield number, load_json(line, f"{file}:{number}")


def _table(file: Path) -> list[Row]:
    """The rows of a .parquet file, as the Hugging Face hub has them."""
    import pyarrow
    from pyarrow import parquet

    try:
        return parquet.read_table(file).to_pylist()
    except pyarrow.ArrowException as error:
        raise ValueError(f"{file}: {str(error).splitlines()[0]}; get it again") from error


def _labels(file: Path, task: Task) -> list[int] | None:
    """The labels in the file beside; None where there is none, and the lines have them."""
    beside = file.with_name(file.name.removesuffix(".jsonl") + task.labels)
    if not beside.is_file():
        return None
    words = beside.read_text("utf-8", errors="replace").split()
    for number, word in enumerate(words, start=1):
        if not re.fullmatch(r"[0-9]", word):
            raise ValueError(f"{beside}:{number}: {word[:20]!r} is not a label; get the file again")
    return [int(word) for word in words]


def _checked(
    prompts: str | Sequence[str], choices: Sequence[str], label: int, delimiter: str, where: str
) -> Question:
    """ValueError with the fault alone; prompts is one for all choices, or one for each."""
    if not isinstance(choices, list | tuple) or len(choices) < 2:
        raise ValueError("choices must be a list of at least 2 texts")
    prompts = [prompts] * len(choices) if isinstance(prompts, str) else prompts
    if not isinstance(prompts, list | tuple) or len(prompts) != len(choices):
        raise ValueError(f"prompt must be a text, or a list of {len(choices)}, one for each choice")
    for kind, texts in (("prompt", prompts), ("choice", choices)):
        for text in texts:
            check_text(kind, text)
    if not all(choices):
        raise ValueError(f"choice {choices.index('')} is empty")
    if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < len(choices):
        raise ValueError(f"label {label!r} is not a whole number from 0 to {len(choices) - 1}")
    texts = [delimiter + choice for choice in choices]
    return Question(tuple(prompts), tuple(texts), tuple(choices), label, where)


def check_text(kind: str, text: Any) -> None:
    """ValueError, which calls it `kind`, for what is no text."""
    if not isinstance(text, str) or re.search("[\ud800-\udfff]", text):
        raise ValueError(f"{kind} {shown(repr(text))} is not a text")


# --- one's own lines

OWN = 'write {"prompt": "...", "choices": ["...", "..."], "label": 0} a line'


def _own(row: Row) -> tuple:
    return row["prompt"], row["choices"], row["label"]


def check_spaces(prompt: str, text: str, delimiter: str) -> None:
    """ValueError for white space on both sides of a delimiter that is white space."""
    if not delimiter.isspace():
        return
    if prompt[-1:].isspace():
        raise ValueError(
            f"the prompt ends in white space, and {delimiter!r} is put after it: strip it, or give "
            "--delimiter="
        )
    if text[:1].isspace():
        raise ValueError(
            f"{shown(repr(text))} begins with white space, and {delimiter!r} is put before it: "
            "strip it, or give --delimiter="
        )


# --- published tasks


def hellaswag_text(text: str) -> str:
    """WikiHow's titles and headers, as [header], taken out."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def _hellaswag(row: Row) -> tuple:
    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    endings = [hellaswag_text(ending) for ending in row["endings"]]
    return hellaswag_text(context), endings, _whole(row["label"])


def _arc(row: Row) -> tuple:
    """AI2's own lines, or those of the Hugging Face hub."""
    question = row["question"]
    if isinstance(question, str):
        stem, choices, names = question, row["choices"]["text"], row["choices"]["label"]
    else:
        stem = question["stem"]
        choices = [choice["text"] for choice in question["choices"]]
        names = [choice["label"] for choice in question["choices"]]
    if row["answerKey"] not in names:
        raise ValueError(f"answerKey {row['answerKey']!r} is none of {names}")
    return f"Question: {stem}\nAnswer:", choices, names.index(row["answerKey"])


def _piqa(row: Row) -> tuple:
    return f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]], _whole(row["label"])


def _winogrande(row: Row) -> tuple:
    """What follows the gap is scored after each option in it: Trinh and Le 2018's partial scoring
    (arXiv 1806.02847)."""
    before, gap, after = row["sentence"].partition("_")
    if not gap:
        raise ValueError("sentence has no _ where the options go")
    prompts = [before + row["option1"], before + row["option2"]]
    return prompts, [after.strip()] * 2, _whole(row["answer"]) - 1


def _boolq(row: Row) -> tuple:
    """SuperGLUE's lines, whose passages begin with the title, or those of BoolQ, which has it
    beside."""
    title = f"{row['title']} -- " if "title" in row else ""
    answer = row["answer"] if "answer" in row else row["label"]
    prompt = f"{title}{row['passage']}\nQuestion: {row['question']}?\nAnswer:"
    return prompt, ["no", "yes"], int(answer)


def _whole(label: str | int) -> int:
    if not re.fullmatch(r"[0-9]", str(label)):
        raise ValueError(f"label {label!r} is not a number; a test split has none")
    return int(label)


TASKS: dict[str, Task] = {
    "hellaswag": Task(_hellaswag, ("hellaswag_val.jsonl",)),
    "arc_easy": Task(_arc, ("ARC-Easy-Test.jsonl",)),
    "arc_challenge": Task(_arc, ("ARC-Challenge-Test.jsonl",)),
    "piqa": Task(_piqa, ("dev.jsonl", "valid.jsonl"), labels="-labels.lst"),
    "winogrande": Task(_winogrande, ("dev.jsonl",)),
    "boolq": Task(_boolq, ("dev.jsonl", "val.jsonl")),
}
