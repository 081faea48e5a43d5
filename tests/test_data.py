"""The data room: real text, real ArrayRecord files, real grain iterators."""

import json
import os
import re
import resource
import signal
import threading
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from sedd_jax.data import (
    CORPORA,
    TOKENIZERS,
    Corpus,
    heldout_blocks,
    make_corpus,
    make_tokenizer,
    open_records,
    parse_template,
    prefix_suffix,
    prepare,
    tokenizer_from_dict,
    train_batches,
)
from sedd_jax.data import records as records_module
from sedd_jax.data import tokenizers as tokenizers_module

REPOSITORY = Path(__file__).resolve().parents[1]
TEST_DATA = Path(os.environ.get("SEDD_TEST_DATA", REPOSITORY / "../shared/data"))
NOWHERE = Corpus({"train": list, "heldout": list})


def real(name: str) -> Path:
    path = TEST_DATA / name
    if not path.exists():
        pytest.skip(f"{path} is absent; set SEDD_TEST_DATA to a folder that holds {name}")
    return path


def corpus_of(train: list[str], heldout: list[str]) -> Corpus:
    return Corpus({"train": lambda: iter(train), "heldout": lambda: iter(heldout)})


def says(*parts: str):
    """A ValueError of one line that holds `parts` in order."""
    return pytest.raises(ValueError, match=r"\A(?=[^\n]*\Z).*" + ".*".join(map(re.escape, parts)))


@pytest.fixture(scope="module")
def pydoc() -> Corpus:
    return make_corpus("pydoc", "", 0.1)


@pytest.fixture(scope="module")
def packed(tmp_path_factory, pydoc):
    """pydoc by characters: about 1300 train blocks of 256."""
    folder = tmp_path_factory.mktemp("records") / "pydoc"
    prepare(pydoc, make_tokenizer("characters", "", pydoc), 256, folder, source={"corpus": "pydoc"})
    return open_records(folder)


@pytest.fixture(scope="module")
def numbered(tmp_path_factory):
    """37 train blocks of 4 bytes, block i being i as text, so that a block names itself."""
    folder = tmp_path_factory.mktemp("records") / "numbered"
    corpus = corpus_of([f"{i:03d}" for i in range(37)], [f"{i:03d}" for i in range(900, 910)])
    prepare(corpus, make_tokenizer("bytes", "", corpus), 4, folder, source={})
    return open_records(folder)


def numbers(blocks: np.ndarray) -> list[int]:
    return [int(bytes(block.astype(np.uint8))) for block in blocks]


# --- corpora


def shared(heldout: list[str], train: list[str], width: int = 50) -> float:
    """The fraction of heldout's windows that train holds too."""
    seen = {t[i : i + width] for t in train for i in range(len(t) - width + 1)}
    hits = [h[i : i + width] in seen for h in heldout for i in range(len(h) - width + 1)]
    return sum(hits) / len(hits)


def test_no_heldout_window_of_pydoc_occurs_in_train_though_the_topics_overlap(pydoc):
    from pydoc_data.topics import topics

    heldout, train = list(pydoc.documents("heldout")), list(pydoc.documents("train"))
    plain = [[" ".join(d.split()) for d in split] for split in (heldout, train)]
    assert shared(*plain) == 0.0
    assert shared(heldout, train) < 0.01  # runs of blanks make raw windows shorter when normalised
    names = [n for n, t in topics.items() if t.strip()[:200] in "\0".join(heldout)]
    rest = [t for n, t in topics.items() if n not in names]
    assert shared(heldout, rest) > 0.3  # the overlap that had to be removed


def test_pydoc_keeps_most_of_its_text_and_repeats_no_long_paragraph(pydoc):
    sizes = {}
    for split in ("train", "heldout"):
        documents = list(pydoc.documents(split))
        assert documents == list(pydoc.documents(split))  # a second pass is the same
        sizes[split] = sum(map(len, documents))
        paragraphs = [" ".join(p.split()) for d in documents for p in d.split("\n\n")]
        long = [p for p in paragraphs if len(p) >= 40]
        assert len(long) == len(set(long))
    assert sizes["train"] > 250_000 and sizes["heldout"] > 10_000


def write(folder: Path, files: dict[str, str | bytes]) -> str:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        data = content if isinstance(content, bytes) else content.encode()
        (folder / name).write_bytes(data)
    return str(folder)


def test_subfolders_named_train_and_heldout_are_the_splits_in_path_order(tmp_path):
    rows = "".join(json.dumps({"text": t}) + "\n" for t in ("j1", " ", "j2 é\u2028x"))
    files = {"train/b.txt": "B", "train/a/z.txt": "\ufeffAZ", "train/a/y.jsonl": rows}
    path = write(tmp_path, files | {"heldout/h.txt": "H\r\n", "README.txt": "not read"})
    corpus = make_corpus("text", path, 0.1)
    assert list(corpus.documents("train")) == ["j1", "j2 é\u2028x", "AZ", "B"]
    assert list(corpus.documents("heldout")) == ["H\r\n"]


def test_many_documents_are_split_by_identity_whatever_the_folder_is_called(tmp_path):
    rows = "".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(300))
    splits = []
    for name in ("one", "two"):
        path = write(tmp_path / name, {"x.jsonl": rows, "y.txt": "document y"})
        corpus = make_corpus("text", path, 0.2)
        splits.append([list(corpus.documents(split)) for split in ("train", "heldout")])
    train, heldout = splits[0]
    assert splits[0] == splits[1]
    assert sorted(train + heldout) == sorted([f"document {i}" for i in range(300)] + ["document y"])
    assert 40 <= len(heldout) <= 80  # 60 expected


def test_few_documents_are_cut_after_a_line_near_the_fraction(tmp_path):
    lines = [f"line {i:03d}\n" for i in range(100)]
    files = {"a.txt": "".join(lines[:70]), "b.txt": "".join(lines[70:])}
    path = write(tmp_path, files)
    corpus = make_corpus("text", path, 0.105)
    assert list(corpus.documents("train")) == [files["a.txt"], "".join(lines[70:89])]
    assert list(corpus.documents("heldout")) == ["".join(lines[89:])]
    corpus = make_corpus("text", path, 0.305)  # the cut is in the first of the two
    assert list(corpus.documents("train")) == ["".join(lines[:69])]
    assert list(corpus.documents("heldout")) == [lines[69], files["b.txt"]]
    single = write(tmp_path / "single", {"x.txt": "x" * 1000}) + "/x.txt"
    corpus = make_corpus("text", single, 0.1)
    assert [len(d) for s in ("train", "heldout") for d in corpus.documents(s)] == [900, 100]


def test_a_text_corpus_reads_a_document_only_when_asked_for_it(tmp_path):
    rows = [json.dumps({"text": f"document {i}"}) for i in range(200)] + ["broken"]
    path = write(tmp_path, {"x.jsonl": "\n".join(rows)})
    corpus = make_corpus("text", path, 0.2)  # has not met the broken line yet
    assert len(list(islice(corpus.documents("train"), 100))) == 100
    with says("x.jsonl:201: not JSON"):
        list(corpus.documents("train"))


def test_every_fault_of_a_text_corpus_is_named(tmp_path):
    def make(**files):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        path = write(folder, {name.replace("_", "."): c for name, c in files.items()})
        return make_corpus("text", path, 0.1)

    with says("no file or folder at '/no/such'", "set data.path"):
        make_corpus("text", "/no/such", 0.1)
    with says("no .txt or .jsonl file in"):
        make(a_md="text")
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
    with says("split 'heldout' of", "is empty"):
        make(a_txt="x")
    (tmp_path / "dangling").mkdir()
    (tmp_path / "dangling/a.txt").symlink_to("/no/such")
    with says("cannot read", "a.txt': No such file or directory; repair or remove it"):
        make_corpus("text", str(tmp_path / "dangling"), 0.1)
    with says("unknown corpus 'x'; known: pydoc, text"):
        make_corpus("x", "", 0.1)
    with says("heldout_fraction 1.0 is not between 0 and 1"):
        make_corpus("pydoc", "", 1.0)
    with says("leaves split 'heldout' of 'pydoc' empty"):
        CORPORA["pydoc"]("", 1e-9)
    with says("unknown split 'test'; known: train, heldout"):
        NOWHERE.documents("test")


# --- tokenizers


def some_tokenizer(name: str, corpus: Corpus):
    folder = {"gpt2": "gpt2_bpe", "bert": "bert_vocab"}.get(name)
    return make_tokenizer(name, str(real(folder)) if folder else "", corpus)


@pytest.mark.parametrize("name", sorted(TOKENIZERS))
def test_real_text_survives_the_round_trip(name, pydoc):
    text = "".join(pydoc.documents("heldout"))
    if name == "text8":
        text = " ".join(re.sub("[^a-z]+", " ", text.lower()).split())
    elif name != "characters":
        text += " naïve 東京 🙂\r\n\n  end "
    tokenizer = some_tokenizer(name, pydoc)
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32 and ids.min() >= 0 and ids.max() < tokenizer.vocab_size
    decoded = tokenizer.decode(ids)
    if name == "bert":  # lower case, spacing lost, emoji unknown: the letters are what survives
        text, decoded = (re.sub("[^a-z]", "", t.lower()) for t in (text, decoded))
        text, decoded = text.replace("nave", "naive"), decoded.replace("unk", "")
    assert decoded == text


@pytest.mark.parametrize("name", sorted(TOKENIZERS))
def test_a_tokenizer_rebuilt_from_json_gives_the_same_ids_and_fingerprint(name, pydoc):
    tokenizer = some_tokenizer(name, pydoc)
    rebuilt = tokenizer_from_dict(json.loads(json.dumps(tokenizer.to_dict())))
    assert rebuilt == tokenizer and hash(rebuilt) == hash(tokenizer)
    assert rebuilt.fingerprint() == tokenizer.fingerprint()
    assert (rebuilt.vocab_size, rebuilt.separator) == (tokenizer.vocab_size, tokenizer.separator)
    assert rebuilt.encode("some words").tolist() == tokenizer.encode("some words").tolist()


def test_fingerprints_tell_tokenizers_apart(pydoc):
    other = make_tokenizer("characters", "", corpus_of(["ab"], ["c"]))
    assert other.alphabet == "\nabc" and other.separator == (0,)
    tokenizers = [make_tokenizer(n, "", pydoc) for n in ("characters", "text8", "bytes")]
    assert len({t.fingerprint() for t in [other, *tokenizers]}) == 4


def test_published_ids_are_reproduced(pydoc):
    gpt2, bert = some_tokenizer("gpt2", pydoc), some_tokenizer("bert", pydoc)
    assert gpt2.encode("Hello world").tolist() == [15496, 995]
    assert (gpt2.vocab_size, gpt2.separator) == (50257, (50256,))
    assert bert.encode("Hello, world").tolist() == [7592, 1010, 2088]
    assert (bert.vocab_size, bert.separator) == (30522, (102,))
    assert make_tokenizer("text8", "", pydoc).encode("az b").tolist() == [1, 26, 0, 2]


def test_wikitext2_has_its_published_number_of_gpt2_tokens_encoded_in_pieces(pydoc, monkeypatch):
    gpt2, bert = some_tokenizer("gpt2", pydoc), some_tokenizer("bert", pydoc)
    text = real("wikitext2/wiki.test.raw").read_text(encoding="utf-8")
    monkeypatch.setattr(tokenizers_module, "PIECE", 1000)
    prose = real("ptb/ptb.valid.txt").read_text().replace("\n ", "\n") * 2
    in_pieces = [t.encode(prose) for t in (gpt2, bert)]
    monkeypatch.setattr(tokenizers_module, "PIECE", 1 << 30)
    for tokenizer, ids in zip((gpt2, bert), in_pieces):
        np.testing.assert_array_equal(ids, tokenizer.encode(prose))
    assert len(gpt2.encode(text)) == 286221


@pytest.mark.parametrize("name", sorted(TOKENIZERS))
def test_masks_are_shown_where_they_stand(name, pydoc):
    tokenizer = some_tokenizer(name, pydoc)
    mask = tokenizer.vocab_size
    ids = [*tokenizer.encode("some"), mask, mask, *tokenizer.encode("more")]
    gap = " " if name == "bert" else ""
    assert tokenizer.decode(np.array(ids)) == gap.join(["some", "░", "░", "more"])
    assert tokenizer.decode(np.array([mask + 7]), mask="_") == "_"
    assert tokenizer.decode([]) == ""
    with says("ids must be one row of integers >= 0, not array([-1])"):
        tokenizer.decode(np.array([-1]))


def test_a_mask_inside_a_character_leaves_the_rest_readable(pydoc):
    first, second = make_tokenizer("bytes", "", pydoc).encode("é")
    decode = make_tokenizer("bytes", "", pydoc).decode
    assert decode([97, first, 256, second, 98]) == "a\ufffd░\ufffdb"


def test_every_fault_of_a_tokenizer_is_named(tmp_path, pydoc):
    with says("unknown tokenizer 'x'; known: bert, bytes, characters, gpt2, text8"):
        make_tokenizer("x", "", pydoc)
    with says("character 'É' (U+00C9) at position 3 of 'cafÉ'", "tokenizer 'text8'", "'bytes'"):
        make_tokenizer("text8", "", pydoc).encode("cafÉ")
    with says("character '\U0001f642' (U+1F642) at position 0"):
        make_tokenizer("characters", "", pydoc).encode("\U0001f642")
    for tokenizer in (make_tokenizer("bytes", "", pydoc), some_tokenizer("gpt2", pydoc)):
        with says("half a surrogate pair at position 1"):
            tokenizer.encode("a\ud800")
    with says("no encoder.json or vocab.json in", "set data.tokenizer_path"):
        make_tokenizer("gpt2", str(tmp_path), pydoc)
    write(tmp_path, {"vocab.json": '{"a": 0, "b": 2}', "merges.txt": "#version: 0.2\n"})
    with says("vocab.json' as a vocabulary: its ids are not 0 .. n - 1"):
        make_tokenizer("gpt2", str(tmp_path), pydoc)
    write(tmp_path, {"vocab.json": '{"a": 0}'})
    with says("it lacks <|endoftext|>"):
        make_tokenizer("gpt2", str(tmp_path), pydoc)
    write(tmp_path, {"vocab.json": '{"a": 0, "<|endoftext|>": 1}', "merges.txt": "q z\n"})
    with says("merges.txt' does not fit the vocabulary:", "download both again"):
        make_tokenizer("gpt2", str(tmp_path), pydoc)
    with says("no vocab.txt in"):
        make_tokenizer("bert", str(tmp_path), pydoc)
    write(tmp_path, {"vocab.txt": "[UNK]\na\n"})
    with says("holds no [SEP]"):
        make_tokenizer("bert", str(tmp_path), pydoc)
    with says("names no tokenizer"):
        tokenizer_from_dict({"alphabet": "a"})
    with says("keys ['letters'] do not fit tokenizer 'characters'"):
        tokenizer_from_dict({"name": "characters", "letters": "a"})


# --- records


def read(records, split: str) -> np.ndarray:
    return np.stack([records.parse(record) for record in records.source(split)])


@pytest.mark.parametrize("name", ["bytes", "text8", "gpt2"])
def test_blocks_concatenate_to_the_encoded_stream(name, tmp_path, monkeypatch):
    monkeypatch.setattr(records_module, "SHARD", 2)  # so that blocks cross files
    words = ["many words in a row", "z", "", "one more document " * 9, "end"]
    corpus = corpus_of(words, ["held out words " * 4])
    tokenizer = some_tokenizer(name, corpus)
    fingerprint = prepare(corpus, tokenizer, 4, tmp_path / "r", source={"corpus": "toy"})
    records = open_records(tmp_path / "r")
    assert records.fingerprint == fingerprint and records.length == 4
    for split in ("train", "heldout"):
        parts = [[*tokenizer.encode(d), *tokenizer.separator] for d in corpus.documents(split)]
        stream = [token for part in parts for token in part]
        counts = fingerprint["splits"][split]
        blocks = read(records, split)
        assert blocks.ravel().tolist() == stream[: len(stream) // 4 * 4]
        assert counts["tokens"] == len(stream) and counts["dropped_tokens"] == len(stream) % 4
        assert counts["blocks"] == len(blocks) and counts["documents"] == len(parts)
    assert len(list((tmp_path / "r/train").iterdir())) == -(-len(read(records, "train")) // 2) > 1


def test_characters_are_those_of_the_packed_blocks_without_separators(tmp_path, numbered):
    assert numbered.fingerprint["splits"]["train"]["characters"] == 37 * 3
    corpus = corpus_of(["abc", "de", "fgh"], ["abcdefg" * 2])  # h and its newline are dropped
    prepare(corpus, make_tokenizer("characters", "", corpus), 9, tmp_path / "r", source={})
    fingerprint = prepare(corpus, make_tokenizer("text8", "", corpus), 3, tmp_path / "t", source={})
    counts = open_records(tmp_path / "r")
    assert counts.fingerprint["splits"]["train"]["characters"] == 7
    assert fingerprint["splits"]["heldout"]["characters"] == 12


def test_a_vocabulary_past_16_bits_is_stored_in_32(tmp_path, pydoc):
    alphabet = "".join(chr(c) for c in range(0x20, 0x20 + 70_000) if not 0xD800 <= c < 0xE000)
    corpus = corpus_of([alphabet], [alphabet[::-1]])
    tokenizer = make_tokenizer("characters", "", corpus)
    fingerprint = prepare(corpus, tokenizer, 100, tmp_path / "r", source={})
    assert fingerprint["dtype"] == "<u4" and tokenizer.vocab_size > 65535
    assert tokenizer.decode(heldout_blocks(open_records(tmp_path / "r"))[0]) == alphabet[::-1][:100]


def test_a_prepared_folder_is_reused_unread_and_never_replaced(tmp_path, pydoc, packed):
    unreadable = Corpus({"train": lambda: 1 / 0, "heldout": lambda: 1 / 0})
    same = (packed.tokenizer, 256, packed.folder)
    assert prepare(unreadable, *same, source={"corpus": "pydoc"}) == packed.fingerprint
    with says("was prepared with source {'corpus': 'pydoc'}, not {'corpus': 'x'}; delete"):
        prepare(pydoc, *same, source={"corpus": "x"})
    with says("was prepared with length 256, not 128;"):
        prepare(pydoc, packed.tokenizer, 128, packed.folder, source={"corpus": "pydoc"})
    with says("was prepared with tokenizer", "'characters'", "not", "'bytes'"):
        prepare(pydoc, TOKENIZERS["bytes"](), 256, packed.folder, source={"corpus": "pydoc"})
    assert open_records(packed.folder).fingerprint == packed.fingerprint


def test_records_prepared_twice_are_the_same_bytes(tmp_path, pydoc, packed):
    again = prepare(pydoc, packed.tokenizer, 256, tmp_path / "r", source={"corpus": "pydoc"})
    assert again == packed.fingerprint
    for file in packed.folder.rglob("*.array_record"):
        other = tmp_path / "r" / file.relative_to(packed.folder)
        assert other.read_bytes() == file.read_bytes()


def test_a_failure_midway_leaves_nothing_behind(tmp_path, pydoc):
    def fails_late():
        yield from ["words"] * 1000
        raise KeyboardInterrupt

    corpus = Corpus({"train": lambda: ["words"] * 1000, "heldout": fails_late})
    tokenizer = make_tokenizer("bytes", "", corpus)
    with pytest.raises(KeyboardInterrupt):
        prepare(corpus, tokenizer, 16, tmp_path / "r", source={})
    assert list(tmp_path.iterdir()) == []
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))  # stands for a full disk
    try:
        with pytest.raises((RuntimeError, OSError), match="File too large"):
            prepare(pydoc, tokenizer, 256, tmp_path / "r", source={})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []


def test_every_fault_of_a_records_folder_is_named(tmp_path, pydoc):
    corpus = corpus_of(["many words"], ["few"])
    tokenizer = make_tokenizer("bytes", "", corpus)
    with says(
        "corpus has 4 tokens in split 'heldout', fewer than one block of length 5; give more"
    ):
        prepare(corpus, tokenizer, 5, tmp_path / "r", source={})
    with says("data.length 0 is less than 1"):
        prepare(corpus, tokenizer, 0, tmp_path / "r", source={})
    assert list(tmp_path.iterdir()) == []
    with says("no folder at", "prepare records there"):
        open_records(tmp_path / "r")
    (tmp_path / "half/train").mkdir(parents=True)
    for attempt in (open_records, lambda f: prepare(corpus, tokenizer, 2, f, source={})):
        with says("is no complete folder of records, fingerprint.json is missing; delete"):
            attempt(tmp_path / "half")
    folder = tmp_path / "empty"
    folder.mkdir()  # an empty folder is as good as none
    prepare(corpus, tokenizer, 2, folder, source={})
    shard = folder / "train/blocks-00000.array_record"
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with says("cannot read the records of split 'train'", "prepare it again"):
        open_records(folder).source("train")
    shard.write_bytes((folder / "heldout/blocks-00000.array_record").read_bytes())
    with says("holds 2 blocks in split 'train', its fingerprint says 5; delete"):
        open_records(folder).source("train")
    shard.unlink()
    with says("cannot read the records of split 'train'"):
        open_records(folder).source("train")
    with says("unknown split 'test'; known: train, heldout"):
        open_records(folder).source("test")
    (folder / "tokenizer.json").write_text(json.dumps({"name": "text8"}))
    with says("tokenizer.json is not the tokenizer it was prepared with"):
        open_records(folder)
    (folder / "fingerprint.json").write_text('{"format": 2}')
    with says("its format 2 is not 1; delete"):
        open_records(folder)


# --- batches


def take(records, count: int, **keywords) -> list[np.ndarray]:
    iterator = train_batches(records, **{"seed": 0, "batch_size": 8} | keywords)
    batches = list(islice(iterator, count))
    iterator.close()
    return batches


def test_batches_are_decoded_blocks_of_the_corpus(packed):
    batch = take(packed, 1)[0]
    assert batch.dtype == np.int32 and batch.shape == (8, 256)
    blocks = {row.tobytes() for row in read(packed, "train")}
    assert all(row.tobytes() in blocks for row in batch)


def test_restarting_at_a_step_equals_continuing(packed):
    np.testing.assert_array_equal(take(packed, 10)[7:], take(packed, 3, start_step=7))


def test_a_late_start_reads_no_earlier_record(numbered, monkeypatch):
    read_by = []
    parse = type(numbered).parse
    monkeypatch.setattr(type(numbered), "parse", lambda s, r: read_by.append(1) or parse(s, r))
    take(numbered, 1, start_step=10_000)
    assert 8 <= len(read_by) <= 8 * 20  # the batch and what was prefetched


@pytest.mark.parametrize("count", [2, 4])
def test_slices_of_processes_concatenate_to_the_batch_of_one(packed, count):
    slices = [
        take(packed, 5, start_step=3, process_index=i, process_count=count) for i in range(count)
    ]
    whole = take(packed, 5, start_step=3)
    np.testing.assert_array_equal(np.concatenate(slices, axis=1), whole)


def test_an_epoch_holds_each_block_once_and_the_next_is_shuffled_anew(numbered):
    order = numbers(np.concatenate(take(numbered, 37 * 3, batch_size=1)))
    epochs = [order[37 * i : 37 * (i + 1)] for i in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(37))
    assert len({tuple(epoch) for epoch in [*epochs, list(range(37))]}) == 4
    other = numbers(np.concatenate(take(numbered, 37, batch_size=1, seed=1)))
    assert sorted(other) == list(range(37)) and other not in epochs


def test_a_corpus_smaller_than_a_batch_is_repeated(numbered):
    batch = numbers(take(numbered, 1, batch_size=100)[0])
    assert {batch.count(i) for i in range(37)} == {2, 3}


def test_closing_the_iterator_ends_its_threads(numbered):
    before = set(threading.enumerate())
    iterator = train_batches(numbered, seed=0, batch_size=8)
    next(iterator)
    started = set(threading.enumerate()) - before
    assert started  # it does prefetch
    iterator.close()
    for thread in started:
        thread.join(timeout=10)
    assert not any(thread.is_alive() for thread in started)


def test_heldout_blocks_are_the_first_in_order(numbered):
    assert numbers(heldout_blocks(numbered)) == list(range(900, 910))
    assert numbers(heldout_blocks(numbered, 3)) == [900, 901, 902]
    assert (
        heldout_blocks(numbered, 99).dtype == np.int32 and len(heldout_blocks(numbered, 99)) == 10
    )
    with says("limit 0 is less than 1"):
        heldout_blocks(numbered, 0)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"process_count": 3}, "batch_size 8 is not divisible by process_count 3"),
        ({"batch_size": 0}, "batch_size 0 is less than 1"),
        ({"process_count": 0}, "process_count 0 is less than 1"),
        ({"start_step": -1}, "start_step -1 is less than 0"),
        ({"process_index": 2, "process_count": 2}, "process_index 2 is not in [0, 2)"),
        ({"seed": 2**32}, "seed 4294967296 is not in [0, 2**32)"),
    ],
)
def test_impossible_batches_are_refused(numbered, keywords, message):
    with says(message):
        train_batches(numbered, **{"seed": 0, "batch_size": 8} | keywords)


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
    with says("template takes 999999999 positions, more than length 8"):
        parse_template("[MASK:999999999]", tokenizer, 8)
    with says("template takes 9 positions, more than length 8"):
        parse_template("abcd[MASK:5]", tokenizer, 8)
    with says("character 'B' (U+0042) at position 1 of 'aB'"):
        parse_template("[MASK]aB", tokenizer, 8)
    with says("prefix and suffix take 4 positions, more than length 3"):
        prefix_suffix("ab", "cd", tokenizer, 3)


def test_an_empty_path_is_not_the_current_folder():
    with pytest.raises(ValueError, match="data.path is empty"):
        make_corpus("text", "", 0.1)


def test_separators_that_are_no_text_count_no_characters():
    tokenizer = tokenizers_module.GPT2(("a", "b", "<|endoftext|>"), ())
    assert tokenizer.count_characters(np.array([0, 2, 1, 2])) == 2
    characters = tokenizers_module.Characters("\nab")
    assert characters.count_characters(np.array([1, 0, 2, 0])) == 4
