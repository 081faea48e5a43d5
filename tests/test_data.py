"""Corpora of one's own, and templates."""

import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from conftest import says

from sedd_jax.data import (
    Corpus,
    corpora,
    make_corpus,
    make_tokenizer,
    parse_template,
    prefix_suffix,
)
from sedd_jax.data.text_files import text

NOWHERE = Corpus({"train": list, "validation": list})


@pytest.fixture(scope="module")
def pydoc() -> Corpus:
    return corpora.pydoc(0.1)


# --- corpora


def text_corpus(path: str, heldout_fraction: float) -> Corpus:
    return text(path, heldout_fraction)


def shared(heldout: list[str], train: list[str], width: int = 50) -> float:
    """The fraction of heldout's windows that train holds too."""
    seen = {t[i : i + width] for t in train for i in range(len(t) - width + 1)}
    hits = [h[i : i + width] in seen for h in heldout for i in range(len(h) - width + 1)]
    return sum(hits) / len(hits)


def test_no_heldout_window_of_pydoc_occurs_in_train_though_the_topics_overlap(pydoc):
    from pydoc_data.topics import topics

    heldout, train = list(pydoc.documents("validation")), list(pydoc.documents("train"))
    plain = [[" ".join(d.split()) for d in split] for split in (heldout, train)]
    assert shared(*plain) == 0.0
    assert shared(heldout, train) < 0.01  # runs of blanks make raw windows shorter when normalised
    names = [n for n, t in topics.items() if t.strip()[:200] in "\0".join(heldout)]
    rest = [t for n, t in topics.items() if n not in names]
    assert shared(heldout, rest) > 0.3  # the overlap that had to be removed


def test_pydoc_keeps_most_of_its_text_and_repeats_no_long_paragraph(pydoc):
    sizes = {}
    for split in ("train", "validation"):
        documents = list(pydoc.documents(split))
        assert documents == list(pydoc.documents(split))  # a second pass is the same
        sizes[split] = sum(map(len, documents))
        paragraphs = [" ".join(p.split()) for d in documents for p in d.split("\n\n")]
        long = [p for p in paragraphs if len(p) >= 40]
        assert len(long) == len(set(long))
    assert sizes["train"] > 250_000 and sizes["validation"] > 10_000


def write(folder: Path, files: dict[str, str | bytes]) -> str:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        data = content if isinstance(content, bytes) else content.encode()
        (folder / name).write_bytes(data)
    return str(folder)


def test_subfolders_named_train_and_validation_are_the_splits_in_path_order(tmp_path):
    rows = "".join(json.dumps({"text": t}) + "\n" for t in ("j1", " ", "j2 é\u2028x"))
    files = {"train/b.txt": "B", "train/a/z.txt": "\ufeffAZ", "train/a/y.jsonl": rows}
    path = write(tmp_path, files | {"validation/h.txt": "H\r\n", "README.txt": "not read"})
    corpus = text_corpus(path, 0.1)
    assert list(corpus.documents("train")) == ["j1", "j2 é\u2028x", "AZ", "B"]
    assert list(corpus.documents("validation")) == ["H\r\n"]


def test_many_documents_are_split_by_identity_whatever_the_folder_is_called(tmp_path):
    rows = "".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(300))
    splits = []
    for name in ("one", "two"):
        path = write(tmp_path / name, {"x.jsonl": rows, "y.txt": "document y"})
        corpus = text_corpus(path, 0.2)
        splits.append([list(corpus.documents(split)) for split in ("train", "validation")])
    train, heldout = splits[0]
    assert splits[0] == splits[1]
    assert sorted(train + heldout) == sorted([f"document {i}" for i in range(300)] + ["document y"])
    assert 40 <= len(heldout) <= 80  # 60 expected


def test_few_documents_are_cut_after_a_line_near_the_fraction(tmp_path):
    lines = [f"line {i:03d}\n" for i in range(100)]
    files = {"a.txt": "".join(lines[:70]), "b.txt": "".join(lines[70:])}
    path = write(tmp_path, files)
    corpus = text_corpus(path, 0.105)
    assert list(corpus.documents("train")) == [files["a.txt"], "".join(lines[70:89])]
    assert list(corpus.documents("validation")) == ["".join(lines[89:])]
    corpus = text_corpus(path, 0.305)  # the cut is in the first of the two
    assert list(corpus.documents("train")) == ["".join(lines[:69])]
    assert list(corpus.documents("validation")) == [lines[69], files["b.txt"]]
    single = write(tmp_path / "single", {"x.txt": "x" * 1000}) + "/x.txt"
    corpus = text_corpus(single, 0.1)
    assert [len(d) for s in ("train", "validation") for d in corpus.documents(s)] == [900, 100]


def test_a_text_corpus_reads_a_document_only_when_asked_for_it(tmp_path):
    rows = [json.dumps({"text": f"document {i}"}) for i in range(200)] + ["broken"]
    path = write(tmp_path, {"x.jsonl": "\n".join(rows)})
    corpus = text_corpus(path, 0.2)  # has not met the broken line yet
    assert len(list(islice(corpus.documents("train"), 100))) == 100
    with says("x.jsonl:201: not JSON"):
        list(corpus.documents("train"))


def test_every_fault_of_a_text_corpus_is_named(tmp_path):
    def make(**files):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        path = write(folder, {name.replace("_", "."): c for name, c in files.items()})
        return text_corpus(path, 0.1)

    with says("no file or folder at '/no/such'", "set data.path"):
        text_corpus("/no/such", 0.1)
    with says("no text in", "but a.pdf; set data.path", ".txt, "):
        make(a_pdf="%PDF-1.4\n\0")
    with says("hold no text"):
        make(a_txt=" \n", b_jsonl="\n")
    with says("a.txt: invalid UTF-8 at byte 2;"):
        make(a_txt=b"ab\xff")
    with says("a.jsonl: invalid UTF-8 at byte 25;"):
        make(a_jsonl=b'{"text": "ok"}\n{"text": "\xff"}')
    with says("a.jsonl:2: not JSON;"):
        make(a_jsonl='{"text": "ok"}\n{"text"\n')
    with says('a.jsonl:1: no string under "text"'):
        make(a_jsonl='{"txt": "ok"}\n')
    with says("a.jsonl:1: half a surrogate pair at character 1;"):
        make(a_jsonl='{"text": "a\\ud800"}\n')
    with says("split 'validation' of", "is empty"):
        make(a_txt="x")
    (tmp_path / "dangling").mkdir()
    (tmp_path / "dangling/a.txt").symlink_to("/no/such")
    with says("cannot read", "a.txt': it is a link to nothing"):
        text_corpus(str(tmp_path / "dangling"), 0.1)
    with says("unknown corpus 'x'; known: pydoc, text"):
        make_corpus("x", "", 0.1, data_dir=tmp_path)
    with says("leaves split 'validation' of 'pydoc' empty"):
        corpora.pydoc(1e-9)
    with says("unknown split 'test'; known: train, validation"):
        NOWHERE.documents("test")


# --- templates


def shown(tokens: np.ndarray, is_known: np.ndarray) -> str:
    assert tokens.dtype == np.int32 and is_known.dtype == bool
    assert (tokens[~is_known] == 0).all()
    return "".join(chr(t) if k else "?" for t, k in zip(tokens, is_known))


def test_a_template_is_its_text_with_free_positions_in_place(pydoc):
    tokenizer = make_tokenizer("bytes", "", pydoc)
    assert shown(*parse_template("Hi [MASK:3], [MASK]!", tokenizer, 10)) == "Hi ???, ?!"
    assert shown(*parse_template("[MASK:2][MASK]", tokenizer, 3)) == "???"
    assert shown(*parse_template("[[MASK]] [MAS", tokenizer, 99)) == "[?] [MAS"
    assert shown(*prefix_suffix("ab", "c", tokenizer, 6)) == "ab???c"
    assert shown(*prefix_suffix("", "", tokenizer, 2)) == "??"


def test_every_fault_of_a_template_is_named(pydoc):
    tokenizer = make_tokenizer("text8", "", pydoc)
    with says('template "" is empty'):
        parse_template("", tokenizer, 9)
    for mask in ("[MASK:0]", "[MASK:abc]", "[MASK:]", "[MASK:-1]", "[MASK:3", "[MASK:٣]"):
        with says(f"{mask!r} at position 2 names no number of free positions"):
            parse_template("a " + mask, tokenizer, 9)
    for mask in ("[mask:3]", "[MASKED]", "[Mask]", "[MASK 3]", "[ MASK:3 ]", "[MASK：3]", "[mask"):
        for template in ("a " + mask, "a " + mask + "[MASK]"):
            with says("at position 2 names no number of free positions; write [MASK:3]"):
                parse_template(template, tokenizer, 9)
    for template in ("abc", "(MASK:3)", "<mask>", "[MAS]"):
        with says(f"template {template!r} has no free position; write [MASK:20]"):
            parse_template(template, make_tokenizer("bytes", "", pydoc), 99)
    with says("template '[MASK:999999999]' takes 999999999 positions, more than length 8"):
        parse_template("[MASK:999999999]", tokenizer, 8)
    with says("template 'abcd[MASK:5]' takes 9 positions, more than length 8"):
        parse_template("abcd[MASK:5]", tokenizer, 8)
    with says("character 'B' (U+0042) at position 1 of 'aB'"):
        parse_template("[MASK]aB", tokenizer, 8)
    with says("prefix and suffix take 4 positions, more than length 3"):
        prefix_suffix("ab", "cd", tokenizer, 3)


def test_an_empty_path_is_not_the_current_folder():
    with pytest.raises(ValueError, match=r"data.path \(sedd-prepare: --manual_dir\) is empty"):
        text_corpus("", 0.1)
