"""Records and batches: real text, real ArrayRecord files, real grain iterators and processes."""

import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from conftest import corpus_of, real, says

from sedd_jax.cli import prepare_command
from sedd_jax.data import (
    TOKENIZERS,
    Corpus,
    make_corpus,
    make_tokenizer,
    open_records,
    read_blocks,
    train_batches,
)
from sedd_jax.data import prepare as prepare_function
from sedd_jax.data.tokenizers import tokenizer_from_dict

prepare_module = sys.modules["sedd_jax.data.prepare"]  # the package exports its function


def make(corpus, tokenizer, length, folder, **options):
    prepare_function(corpus, tokenizer, length, folder, **options)
    return open_records(folder)


@pytest.fixture(scope="module")
def pydoc(tmp_path_factory) -> Corpus:
    return make_corpus("pydoc", "", 0.1, data_dir=tmp_path_factory.mktemp("documents"))


@pytest.fixture(scope="module")
def packed(tmp_path_factory, pydoc):
    """pydoc by characters: about 1300 train blocks of 256."""
    folder = tmp_path_factory.mktemp("records") / "pydoc"
    return make(pydoc, make_tokenizer("characters", "", pydoc), 256, folder)


@pytest.fixture(scope="module")
def numbered(tmp_path_factory):
    """37 train blocks of 4 bytes, block i being i as text, so that a block names itself."""
    folder = tmp_path_factory.mktemp("records") / "numbered"
    corpus = corpus_of([f"{i:03d}" for i in range(37)], [f"{i:03d}" for i in range(900, 910)])
    return make(corpus, make_tokenizer("bytes", "", corpus), 4, folder)


def numbers(blocks: np.ndarray) -> list[int]:
    return [int(bytes(block.astype(np.uint8))) for block in blocks]


def whole_files(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


# --- records


def small_gpt2():
    """All 256 bytes, "th" and the end of a document."""
    from tokenizers.pre_tokenizers import ByteLevel

    vocab = (*sorted(ByteLevel.alphabet()), "th", "<|endoftext|>")
    return tokenizer_from_dict({"name": "gpt2", "vocab": vocab, "merges": ("t h",)})


@pytest.mark.parametrize("name", ["bytes", "text8", "gpt2"])
def test_blocks_concatenate_to_the_encoded_stream(name, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_module, "SHARD", 2)  # so that blocks cross files
    monkeypatch.setattr(prepare_module, "PART", 20)  # and documents parts
    words = ["many words in a row", "z", "", "one more document " * 9, "end"]
    corpus = corpus_of(words, ["held out words " * 4], corpus="toy")
    tokenizer = small_gpt2() if name == "gpt2" else make_tokenizer(name, "", corpus)
    records = make(corpus, tokenizer, 4, tmp_path / "r")
    assert records.length == 4
    assert records.fingerprint["source"] == {"corpus": "toy", "detokenizer": ""}
    for split in ("train", "validation"):
        parts = [[*tokenizer.encode(d), *tokenizer.separator] for d in corpus.documents(split)]
        stream = [token for part in parts for token in part]
        counts = records.counts(split)
        blocks = read_blocks(records, split).tokens
        assert blocks.ravel().tolist() == stream[: len(stream) // 4 * 4]
        assert counts["tokens"] == len(stream) and counts["dropped_tokens"] == len(stream) % 4
        assert counts["blocks"] == len(blocks) and counts["documents"] == len(parts)
        assert counts["words"] == sum(len(d.split()) for d in corpus.documents(split))
    files = list((tmp_path / "r/train").iterdir())
    assert len(files) == -(-records.counts("train")["blocks"] // 2) > 1


def test_what_is_dropped_is_counted_without_separators(tmp_path, numbered):
    assert numbered.counts("train")["characters"] == 37 * 3
    corpus = corpus_of(["abc", "de", "fgh"], ["abcdefg" * 2])  # h and its newline are dropped
    by_characters = make(corpus, make_tokenizer("characters", "", corpus), 9, tmp_path / "r")
    counts = by_characters.counts("train")
    assert (counts["characters"], counts["dropped_characters"]) == (8, 1)
    assert (counts["tokens"], counts["dropped_tokens"]) == (11, 2)
    by_text8 = make(corpus, make_tokenizer("text8", "", corpus), 3, tmp_path / "t")
    assert by_text8.counts("validation")["dropped_characters"] == 2
    # Two whole documents and part of a third in the tail: their separators are no text.
    corpus = corpus_of(["abcdef", "gh", "ij"], ["abcdefg" * 2])
    counts = make(corpus, make_tokenizer("bytes", "", corpus), 5, tmp_path / "u").counts("train")
    assert (counts["dropped_tokens"], counts["dropped_characters"]) == (3, 2)


def test_the_detokenizer_acts_before_the_tokenizer_and_words_are_those_published(tmp_path):
    lines = ["it was n't N or $ N million", "the dow 's N stocks"] * 20
    streams = {"train": lambda: iter(lines), "validation": lambda: iter(lines)}
    corpus = Corpus(streams, {"corpus": "toy"}, "ptb")
    tokenizer = make_tokenizer("characters", "", corpus)
    assert "N" not in tokenizer.alphabet and "1" in tokenizer.alphabet
    records = make(corpus, tokenizer, 16, tmp_path / "r")
    assert records.fingerprint["source"]["detokenizer"] == "ptb"
    text = tokenizer.decode(read_blocks(records, "train").tokens.ravel())
    assert text.startswith("it wasn't 1 or $1 million\nthe dow's 1 stocks\n")
    assert records.counts("train")["words"] == sum(len(line.split()) for line in lines)


def test_a_vocabulary_past_16_bits_is_stored_in_32(tmp_path):
    alphabet = "".join(chr(c) for c in range(0x20, 0x20 + 70_000) if not 0xD800 <= c < 0xE000)
    corpus = corpus_of([alphabet], [alphabet[::-1]])
    tokenizer = make_tokenizer("characters", "", corpus)
    records = make(corpus, tokenizer, 100, tmp_path / "r")
    assert records.fingerprint["dtype"] == "<u4" and tokenizer.vocab_size > 65535
    assert tokenizer.decode(read_blocks(records, "validation").tokens[0]) == alphabet[::-1][:100]


def test_a_prepared_folder_is_reused_unread_and_never_replaced(tmp_path, pydoc, packed):
    unreadable = Corpus({"train": lambda: 1 / 0, "validation": lambda: 1 / 0}, pydoc.source)
    same = (packed.tokenizer, 256, packed.folder)
    assert prepare_function(unreadable, *same) == packed.fingerprint
    with says("was prepared with source {'corpus': 'pydoc'", "not {'corpus': 'x'"):
        prepare_function(corpus_of([], [], corpus="x"), *same)
    with says("was prepared with length 256, not 128;"):
        prepare_function(pydoc, packed.tokenizer, 128, packed.folder)
    with says("was prepared with form 'packed', not 'padded'; choose"):
        prepare_function(pydoc, *same, form="padded")
    with says("was prepared with tokenizer", "'characters'", "not", "'bytes'"):
        prepare_function(pydoc, TOKENIZERS["bytes"](), 256, packed.folder)
    assert open_records(packed.folder).fingerprint == packed.fingerprint


@pytest.mark.parametrize("workers", [1, 3])
def test_records_prepared_again_by_any_number_of_threads_are_the_same_bytes(
    tmp_path, pydoc, packed, monkeypatch, workers
):
    monkeypatch.setattr(prepare_module, "PART", 1 << 14)  # so that there is work for all
    tokenizer, folder = packed.tokenizer, tmp_path / "r"
    again = prepare_function(pydoc, tokenizer, 256, folder, workers=workers)
    assert list(tmp_path.iterdir()) == [folder]
    for split, counts in again["splits"].items():
        expected = packed.counts(split)
        assert {k: v for k, v in counts.items() if k != "text_sha256"} == {
            k: v for k, v in expected.items() if k != "text_sha256"
        }  # that is hashed by parts, which are others here
    for file in packed.folder.rglob("*.array_record"):
        assert (folder / file.relative_to(packed.folder)).read_bytes() == file.read_bytes()


def slow(documents: list[str], stop_at: int, fault: Exception):
    def stream():
        for i, document in enumerate(documents):
            if i == stop_at:
                raise fault
            yield document

    return stream


def test_what_a_stopped_preparation_finished_is_not_encoded_again(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_module, "PART", 100)
    documents = [f"document {i} " * 5 for i in range(60)]
    whole = corpus_of(documents, ["validation"])
    tokenizer = make_tokenizer("bytes", "", whole)
    fails = Corpus({"train": slow(documents, 40, KeyboardInterrupt()), "validation": list})
    with pytest.raises(KeyboardInterrupt):
        prepare_function(fails, tokenizer, 8, tmp_path / "r")
    assert [p.name for p in tmp_path.iterdir()] == [".r.parts"]
    encoded = []
    encode = type(tokenizer).encode
    monkeypatch.setattr(
        type(tokenizer), "encode", lambda self, text: encoded.append(text) or encode(self, text)
    )
    resumed = prepare_function(whole, tokenizer, 8, tmp_path / "r")
    assert 20 <= len(encoded) < 25  # the rest, and the part that was not full
    assert resumed == prepare_function(whole, tokenizer, 8, tmp_path / "anew")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["anew", "r"]
    # A text that changed meanwhile is not taken from the old parts.
    with pytest.raises(KeyboardInterrupt):
        prepare_function(fails, tokenizer, 8, tmp_path / "s")
    other = corpus_of([d.upper() for d in documents], ["validation"])
    changed = make(other, tokenizer, 8, tmp_path / "s")
    assert tokenizer.decode(read_blocks(changed, "train").tokens[0]) == "DOCUMENT"


def test_a_full_disk_is_one_line_and_what_is_finished_is_kept(tmp_path, pydoc, monkeypatch):
    monkeypatch.setattr(prepare_module, "PART", 1 << 14)
    tokenizer = make_tokenizer("bytes", "", pydoc)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    room = 1 << 17  # enough for every part, not for the blocks of all: stands for a full disk
    for size, kept in ((4096, False), (room, True)):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))
        try:
            with pytest.raises(OSError, match=r"\Acannot write in [^\n]*: [^\n]*make room there"):
                prepare_function(pydoc, tokenizer, 256, tmp_path / "r")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        assert not (tmp_path / "r").exists()
        assert (tmp_path / ".r.parts").exists() == kept
    signal.signal(signal.SIGXFSZ, handler)
    assert prepare_function(pydoc, tokenizer, 256, tmp_path / "r")["length"] == 256
    assert [p.name for p in tmp_path.iterdir()] == ["r"]


PREPARE = """
import sys
from sedd_jax.cli import prepare_command
if __name__ == "__main__":
    sys.exit(prepare_command(sys.argv[1:]))
"""


def command(folder: Path, text: Path, **options) -> list[str]:
    flags = {
        "dataset": "text",
        "manual_dir": text,
        "tokenizer": "bytes",
        "length": 64,
        "out": folder,
        **options,
    }
    return [f"--{key}={value}" for key, value in flags.items()]


@pytest.fixture(scope="module")
def prose(tmp_path_factory) -> Path:
    """Five million characters in 250 files."""
    folder = tmp_path_factory.mktemp("prose")
    for i in range(250):
        (folder / f"{i:03d}.txt").write_text(f"line {i} of many words\n" * 900)
    return folder


def test_a_preparation_killed_at_any_moment_ends_as_one_that_was_not(tmp_path, prose):
    expected = tmp_path / "expected"
    assert prepare_command(command(expected, prose)) == 0
    arguments = command(tmp_path / "r", prose, workers=2)
    for delay in (0.6, 1.0, 1.4, 1.8):  # seconds: importing, documents, parts, blocks
        process = subprocess.Popen(
            [sys.executable, "-c", PREPARE, *arguments],
            start_new_session=True,
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        time.sleep(delay)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            assert not (tmp_path / "r").exists() or open_records(tmp_path / "r")
        process.wait()
    assert prepare_command(arguments) == 0
    assert whole_files(tmp_path / "r") == whole_files(expected)


def test_two_processes_that_prepare_one_folder_both_end_with_it(tmp_path, prose):
    arguments = [sys.executable, "-c", PREPARE, *command(tmp_path / "r", prose)]
    pair = [subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in pair:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    assert open_records(tmp_path / "r").counts("train")["documents"] > 200
    assert {p.name for p in tmp_path.iterdir()} == {"r"}


def test_every_fault_of_a_records_folder_is_named(tmp_path, pydoc):
    corpus = corpus_of(["many words"], ["few"])
    tokenizer = make_tokenizer("bytes", "", corpus)
    with says(
        "corpus has 4 tokens in split 'validation', fewer than one block of length 5; give more"
    ):
        prepare_function(corpus, tokenizer, 5, tmp_path / "r")
    assert not (tmp_path / "r").exists()
    with says("data.length 0 is less than 1"):
        prepare_function(corpus, tokenizer, 0, tmp_path / "r")
    with says("unknown form 'ragged'; known: packed, padded"):
        prepare_function(corpus, tokenizer, 2, tmp_path / "r", form="ragged")
    with says("workers 0 is less than 1"):
        prepare_function(corpus, tokenizer, 2, tmp_path / "r", workers=0)
    with says("no folder at", "prepare records there"):
        open_records(tmp_path / "r")
    (tmp_path / "half/train").mkdir(parents=True)
    for attempt in (open_records, lambda f: prepare_function(corpus, tokenizer, 2, f)):
        with says("holds no whole records, fingerprint.json is missing; name"):
            attempt(tmp_path / "half")
    folder = tmp_path / "empty"
    folder.mkdir()  # an empty folder is as good as none
    prepare_function(corpus, tokenizer, 2, folder)
    shard = folder / "train/blocks-00000.array_record"
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with says("cannot read the records of split 'train'", "prepare it again"):
        open_records(folder).source("train")
    shard.write_bytes((folder / "validation/blocks-00000.array_record").read_bytes())
    with says("holds 2 blocks in split 'train', its fingerprint says 5; prepare"):
        open_records(folder).source("train")
    shard.unlink()
    with says("cannot read the records of split 'train'"):
        open_records(folder).source("train")
    with says("no split 'test' in", "it holds train, validation"):
        open_records(folder).source("test")
    (folder / "tokenizer.json").write_text(json.dumps({"name": "text8"}))
    with says("tokenizer.json is not the tokenizer it was prepared with"):
        open_records(folder)
    (folder / "fingerprint.json").write_text('{"format": 1}')
    with says("its format 1 is not 2; prepare"):
        open_records(folder)


@pytest.mark.parametrize("name", ["bytes", "characters"])
def test_records_of_version_0_1_0_open_with_the_same_blocks(name):
    records = open_records(Path(__file__).parent / f"earlier/records_{name}")
    assert records.tokenizer.name == name
    for split in ("train", "validation"):
        blocks = read_blocks(records, split).tokens
        digest = hashlib.sha256(blocks.astype(records.fingerprint["dtype"]).tobytes()).hexdigest()
        assert digest == records.counts(split)["sha256"]
        assert records.tokenizer.encode(records.tokenizer.decode(blocks[0])).tolist() == list(
            blocks[0]
        )


# --- the published corpora


def gpt2_flags() -> dict[str, object]:
    return {"tokenizer": "gpt2", "tokenizer_path": real("gpt2_bpe")}


def published(name: str, folder: Path, tmp_path: Path, **options):
    arguments = {"dataset": name, "out": folder, "data_dir": tmp_path / "documents", **options}
    assert prepare_command([f"--{key}={value}" for key, value in arguments.items()]) == 0
    return open_records(folder)


def test_wikitext2_has_its_published_tokens_and_one_fingerprint_for_any_workers(tmp_path, capsys):
    options = {**gpt2_flags(), "manual_dir": real("wikitext2"), "length": 128}
    one, many, again = (
        published("wikitext2", tmp_path / str(i), tmp_path, workers=workers, **options)
        for i, workers in enumerate((1, 8, 1))
    )
    assert one.fingerprint == many.fingerprint == again.fingerprint
    assert whole_files(one.folder) == whole_files(many.folder)
    assert list(one.fingerprint["splits"]) == ["validation", "test"]  # there is no train here
    assert one.counts("test")["documents"] == 4358
    assert one.counts("test")["words"] == 241_211
    out = capsys.readouterr().out
    assert "wikitext2" in out and one.counts("test")["sha256"][:12] in out
    whole = {**options, "documents": "whole", "detokenizer": "none"}
    stream = published("wikitext2", tmp_path / "whole", tmp_path, **whole)
    assert stream.counts("test")["tokens"] == 286_221 + 1  # and the end of the text


def test_ptb_and_lambada_have_their_published_sizes(tmp_path):
    options = {"tokenizer": "bytes", "length": 64}
    ptb = published("ptb", tmp_path / "ptb", tmp_path, manual_dir=real("ptb"), **options)
    counts = {s: c["words"] + c["documents"] for s, c in ptb.fingerprint["splits"].items()}
    assert counts == {"train": 929_589, "validation": 73_760, "test": 82_430}
    lambada = published(
        "lambada", tmp_path / "lambada", tmp_path, manual_dir=real("lambada"), **options
    )
    assert lambada.counts("test")["documents"] == 5153
    first = bytes(read_blocks(lambada, "test", 1).tokens[0].astype(np.uint8)).decode()
    assert first.startswith("\nIn my palm is a clear stone")


def test_lm1b_is_prepared_wrapped_and_padded(tmp_path):
    options = {
        "manual_dir": real("lm1b"),
        "tokenizer": "bert",
        "tokenizer_path": real("bert_vocab"),
    }
    wrapped = published("lm1b", tmp_path / "wrapped", tmp_path, length=1024, **options)
    padded = published("lm1b", tmp_path / "padded", tmp_path, length=128, form="padded", **options)
    counts = padded.counts("test")
    assert counts["blocks"] == counts["documents"] == wrapped.counts("test")["documents"] == 12_216
    assert counts["tokens"] == wrapped.counts("test")["tokens"]
    rows = read_blocks(padded, "test", 50)
    for row, is_token in zip(*rows, strict=True):
        assert row[is_token][-1] == padded.tokenizer.separator[0] or is_token.all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": "wikitext"}, "unknown corpus 'wikitext'; known: pydoc, text"),
        ({"tokenizer": "words"}, "unknown tokenizer 'words'; known: bert, bytes"),
        ({"length": 0}, "data.length 0 is less than 1"),
        ({"length": "x"}, "invalid int value"),
        ({"form": "ragged"}, "unknown form 'ragged'"),
        ({"manual_dir": "/none"}, "no file or folder at '/none'"),
        ({"documents": "lines"}, "documents 'lines' is not for corpus 'text'"),
        ({"detokenizer": "moses"}, "unknown detokenizer 'moses'; known: published, none"),
        ({"heldout_fraction": 1.5}, "heldout_fraction 1.5 is not between 0 and 1"),
        ({"dataset": "ptb", "manual_dir": "/none"}, "no folder at '/none'"),
    ],
)
def test_a_mistake_in_the_arguments_of_preparing_is_one_line(
    capsys, tmp_path, prose, options, message
):
    assert prepare_command(command(tmp_path / "r", prose, **options)) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("sedd-prepare: error: ") and message in lines[-1]
    assert not (tmp_path / "r").exists()


def test_invalid_text_is_named_before_anything_is_taken_for_whole(capsys, tmp_path, prose):
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(30):
        (folder / f"{i:02d}.txt").write_text(f"document {i}\n" * 9)
    (folder / "17.txt").write_bytes(b"caf\xe9 au lait")
    assert prepare_command(command(tmp_path / "r", folder)) == 2
    assert "17.txt: invalid UTF-8 at byte 3" in capsys.readouterr().err
    assert {p.name for p in tmp_path.iterdir()} == {"text"}
    (folder / "17.txt").write_text("coffee")
    assert prepare_command(command(tmp_path / "r", folder)) == 0
    (folder / "18.txt").write_text("tea")  # the folder exists and is of another text
    assert prepare_command(command(tmp_path / "r", folder)) == 2
    assert "was prepared with source" in capsys.readouterr().err


# --- batches


def take(records, count: int, **keywords) -> list[np.ndarray]:
    iterator = train_batches(records, **{"seed": 0, "batch_size": 8} | keywords)
    batches = list(islice(iterator, count))
    iterator.close()
    assert all(batch.is_token is None for batch in batches)
    return [batch.tokens for batch in batches]


def test_batches_are_decoded_blocks_of_the_corpus(packed):
    batch = take(packed, 1)[0]
    assert batch.dtype == np.int32 and batch.shape == (8, 256)
    blocks = {row.tobytes() for row in read_blocks(packed, "train").tokens}
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


def test_blocks_of_a_split_are_read_in_order(numbered):
    assert numbers(read_blocks(numbered, "validation").tokens) == list(range(900, 910))
    assert numbers(read_blocks(numbered, "validation", 3).tokens) == [900, 901, 902]
    all_of_them = read_blocks(numbered, "validation", 99).tokens
    assert all_of_them.dtype == np.int32 and len(all_of_them) == 10
    with says("limit 0 is less than 1"):
        read_blocks(numbered, "validation", 0)


def test_random_windows_start_everywhere_and_follow_the_stream(tmp_path):
    text = "".join(chr(97 + i % 23) + chr(65 + i % 19) for i in range(40))  # no pair twice
    corpus = corpus_of([text], ["validation"])
    records = make(corpus, make_tokenizer("bytes", "", corpus), 8, tmp_path / "r")
    drawn = [
        bytes(row.astype(np.uint8)).decode()
        for row in np.concatenate(take(records, 900, windows="random"))
    ]
    starts = np.array([text.index(window) for window in drawn])
    assert all(len(window) == 8 for window in drawn)
    # 10 blocks of 8: a window starts in any of the first nine, all places equally often.
    counts = np.bincount(starts, minlength=72)
    assert len(counts) == 72
    assert scipy.stats.chisquare(counts).pvalue > 1e-4
    np.testing.assert_array_equal(
        take(records, 9, windows="random")[5:], take(records, 4, windows="random", start_step=5)
    )
    with says("unknown windows 'sliding'; known: aligned, random"):
        take(records, 1, windows="sliding")
    short = corpus_of(["one block"], ["one block"])
    single = make(short, make_tokenizer("bytes", "", short), 8, tmp_path / "s")
    with says("random windows need packed records of at least 2 blocks", "use aligned"):
        take(single, 1, windows="random")


def test_padded_batches_say_what_is_padding(tmp_path):
    corpus = corpus_of(["abc", "", "abcdefgh"], ["x"])
    folder = tmp_path / "r"
    records = make(corpus, make_tokenizer("bytes", "", corpus), 5, folder, form="padded")
    rows = read_blocks(records, "train")
    texts = ["".join(map(chr, row[real])) for row, real in zip(*rows, strict=True)]
    assert texts == ["abc\n", "\n", "abcde"]
    assert (rows.tokens[~rows.is_token] == 0).all()
    assert rows.count == 10 and records.tokens_per_block("train") == pytest.approx(10 / 3)
    counts = records.counts("train")
    assert (counts["tokens"], counts["dropped_tokens"]) == (14, 4)  # fgh and its newline
    assert (counts["characters"], counts["dropped_characters"]) == (11, 3)
    iterator = train_batches(records, seed=0, batch_size=3)
    batch = next(iterator)
    iterator.close()
    assert sorted(batch.is_token.sum(axis=1)) == [1, 4, 5]
    with says("random windows need packed records"):
        train_batches(records, seed=0, batch_size=1, windows="random")


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"process_count": 3}, "batch_size 8 is not divisible by process_count 3"),
        ({"batch_size": 0}, "batch_size 0 is not in [1, inf)"),
        ({"process_count": 0}, "process_count 0 is not in [1, inf)"),
        ({"start_step": -1}, "start_step -1 is not in [0, inf)"),
        ({"process_index": 2, "process_count": 2}, "process_index 2 is not in [0, 2)"),
        ({"seed": 2**32}, "seed 4294967296 is not in [0, 4294967296)"),
    ],
)
def test_impossible_batches_are_refused(numbered, keywords, message):
    with says(message):
        train_batches(numbered, **{"seed": 0, "batch_size": 8} | keywords)
