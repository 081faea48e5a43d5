"""Tokenizers: published ids, real text there and back, and every place a vocabulary comes from."""

import base64
import hashlib
import io
import json
import os
import pickle
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from conftest import corpus_of, real, says

from sedd_jax.data import (
    TOKENIZERS,
    Corpus,
    make_tokenizer,
    named_tokenizer,
    sentencepiece,
    subwords,
    tokenizer_from_dict,
    tokenizers,
)
from sedd_jax.data import tokenizer as tokenizer_module

PATHS = {"gpt2": "gpt2_bpe", "bert": "bert_vocab"}  # folders of TEST_DATA
COMMIT = "0123456789abcdef0123456789abcdef01234567"
ODD = "\n\n  two  blanks \t tab\r\n naïve 東京 🙂👩‍💻 \0 ▁ ▁▁x ▅ <s></s> <unk> <0x41> \u2028\ufeff e\u0301  "


@cache
def reference() -> Corpus:
    """The language reference that ships inside CPython, every tenth topic held out."""
    from pydoc_data.topics import topics

    texts = [topics[name] for name in sorted(topics)]
    heldout = texts[::10]
    return corpus_of([t for t in texts if t not in heldout], heldout)


def published(name: str):
    return make_tokenizer(name, str(real(PATHS[name])), reference())


@cache
def some_tokenizer(name: str):
    if name in PATHS:
        return published(name)
    if name == "json":
        return tokenizers.LibraryTokenizer(qwen().to_str(), "<|endoftext|>")
    path = {"sentencepiece": "train:1000", "ids": "4096"}.get(name, "")
    return make_tokenizer(name, path, reference())


def library_bpe(*special: str, **options):
    """A byte-level BPE of the reference, as the `tokenizers` library trains it."""
    from tokenizers import ByteLevelBPETokenizer

    library = ByteLevelBPETokenizer(**options)
    library.train_from_iterator(
        reference().documents("train"), 600, special_tokens=list(special), show_progress=False
    )
    return library._tokenizer


@cache
def qwen():
    """A tokenizer with the settings of Qwen's and Llama-3's: NFC, and a Split before the bytes."""
    from tokenizers import Regex, normalizers, pre_tokenizers

    library = library_bpe("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    library.normalizer = normalizers.NFC()
    words = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return library


def words(name: str, text: str = "some words") -> str:
    """A text that a tokenizer gives back as it is."""
    return "7 4095 0" if name == "ids" else text


# --- every tokenizer


@pytest.mark.parametrize("name", sorted(TOKENIZERS))
def test_real_text_survives_the_round_trip(name):
    text = "".join(reference().documents("validation"))
    if name == "text8":
        text = " ".join(re.sub("[^a-z]+", " ", text.lower()).split())
    elif name == "ids":
        text = " ".join(str(ord(c) % 4096) for c in text)
    elif name != "characters":
        text += " naïve 東京 🙂\r\n\n  end "
    tokenizer = some_tokenizer(name)
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32 and ids.min() >= 0 and ids.max() < tokenizer.vocab_size
    decoded = tokenizer.decode(ids)
    if name == "bert":  # lower case, spacing lost, emoji unknown: the letters are what survives
        text, decoded = (re.sub("[^a-z]", "", t.lower()) for t in (text, decoded))
        text, decoded = text.replace("nave", "naive"), decoded.replace("unk", "")
    assert decoded == text


@pytest.mark.parametrize("name", ["bytes", "gpt2", "sentencepiece"])
def test_every_text_survives_the_round_trip(name):
    tokenizer = some_tokenizer(name)
    lines = real("openwebtext_1k/openwebtext-1000.jsonl").read_text(encoding="utf-8").splitlines()
    wikitext = real("wikitext2/wiki.test.raw").read_text(encoding="utf-8")
    texts = [wikitext, *(json.loads(line)["text"] for line in lines[:200])]
    for text in [*texts, ODD, ODD[::-1], " ", "   ", "\n", "\t", "▁", ""]:
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int32 and tokenizer.decode(ids) == text


@pytest.mark.parametrize("name", sorted(TOKENIZERS))
def test_a_tokenizer_rebuilt_from_json_gives_the_same_ids_and_fingerprint(name):
    tokenizer = some_tokenizer(name)
    rebuilt = tokenizer_from_dict(json.loads(json.dumps(tokenizer.to_dict())))
    assert rebuilt == tokenizer and hash(rebuilt) == hash(tokenizer)
    assert rebuilt.fingerprint() == tokenizer.fingerprint()
    assert (rebuilt.vocab_size, rebuilt.separator) == (tokenizer.vocab_size, tokenizer.separator)
    assert rebuilt.encode(words(name)).tolist() == tokenizer.encode(words(name)).tolist()


@pytest.mark.parametrize("name", sorted(TOKENIZERS))
def test_a_pickled_tokenizer_carries_its_fields_alone(name):
    tokenizer = some_tokenizer(name)
    ids = tokenizer.encode(words(name)).tolist()  # its library's object is built by now
    pickled = pickle.dumps(tokenizer)
    again = pickle.loads(pickled)
    assert again == tokenizer and set(vars(again)) == set(tokenizer.to_dict()) - {"name"}
    assert again.encode(words(name)).tolist() == ids and again.decode(ids) == words(name)
    assert len(pickled) <= 1.3 * len(json.dumps(tokenizer.to_dict(), ensure_ascii=False)) + 200


def test_fingerprints_tell_tokenizers_apart():
    other = make_tokenizer("characters", "", corpus_of(["ab"], ["c"]))
    assert other.alphabet == "\nabc" and other.separator == (0,)
    tokenizers = [some_tokenizer(n) for n in ("characters", "text8", "bytes", "sentencepiece")]
    assert len({t.fingerprint() for t in [other, *tokenizers]}) == 5


@pytest.mark.parametrize("name", sorted(TOKENIZERS))
def test_masks_are_shown_where_they_stand(name):
    tokenizer = some_tokenizer(name)
    mask = tokenizer.vocab_size
    some, more = words(name, "some"), words(name, "more")
    ids = [*tokenizer.encode(some), mask, mask, *tokenizer.encode(more)]
    gap = " " if name in ("bert", "ids") else ""
    assert tokenizer.decode(np.array(ids)) == gap.join([some, "░", "░", more])
    assert tokenizer.decode(np.array([mask + 7]), mask="_") == "_"
    assert tokenizer.decode([]) == ""
    with says("ids must be one row of integers >= 0, not array([-1])"):
        tokenizer.decode(np.array([-1]))


def test_a_mask_inside_a_character_leaves_the_rest_readable():
    for name in ("bytes", "sentencepiece"):
        tokenizer = some_tokenizer(name)
        first, second = tokenizer.encode("▅")[:2]  # of three bytes
        (a,), (b,), mask = tokenizer.encode("a"), tokenizer.encode("b"), tokenizer.vocab_size
        assert tokenizer.decode([a, first, mask, second, b]) == "a\ufffd░\ufffdb"
        assert tokenizer.decode([first]) == "\ufffd"


def text_of_every_kind() -> str:
    articles = real("openwebtext_1k/openwebtext-1000.jsonl").read_text(encoding="utf-8")
    return "".join(json.loads(line)["text"] for line in articles.splitlines()[:20]) + ODD


@pytest.mark.parametrize("name", sorted(TOKENIZERS))
def test_the_pieces_joined_are_the_text_of_real_and_of_random_ids(name):
    tokenizer = some_tokenizer(name)
    text = text_of_every_kind()
    if name in ("characters", "text8"):
        text = "".join(c for c in text if c in tokenizer.alphabet)
    elif name == "ids":
        text = " ".join(str(ord(c) % 4096) for c in text)
    real_ids = tokenizer.encode(text)[:20_000]
    generator = np.random.default_rng(0)
    share = generator.random(len(real_ids)) < 0.3
    rows = [
        real_ids,
        np.where(share, tokenizer.vocab_size, real_ids),
        np.where(share, generator.integers(tokenizer.vocab_size, size=len(share)), real_ids),
        generator.integers(tokenizer.vocab_size + 3, size=20_000),
        *(generator.integers(tokenizer.vocab_size + 1, size=n) for n in range(50)),
    ]
    for ids in rows:
        pieces = tokenizer.pieces(ids)
        assert len(pieces) == len(ids) and "".join(pieces) == tokenizer.decode(ids)
    assert "".join(tokenizer.pieces(rows[1], mask="?")) == tokenizer.decode(rows[1], mask="?")
    with says("ids must be one row of integers >= 0"):
        tokenizer.pieces(np.zeros((2, 2), int))


def byte_character(byte: int) -> str:
    """GPT-2 writes bytes that are no printable character of Latin-1 as U+0100 and up."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return chr(byte) if byte in printable else chr(256 + others.index(byte))


@pytest.mark.parametrize("name", ["bytes", "gpt2", "sentencepiece"])
def test_pieces_of_bytes_that_are_hardly_text_join_to_the_text(name):
    tokenizer = some_tokenizer(name)
    byte_ids = {  # the id of each byte
        "bytes": lambda byte: byte,
        "gpt2": lambda byte: tokenizer._library.token_to_id(byte_character(byte)),
        "sentencepiece": lambda byte: tokenizer._library.piece_to_id(f"<0x{byte:02X}>"),
    }[name]
    hard = [0x41, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0xC0, 0xC2, 0xE0, 0xE2, 0xED, 0xEF, 0xF0]
    ids = [*map(byte_ids, [*hard, 0xF3, 0xF4, 0xF5, 0xFF]), tokenizer.vocab_size]
    generator = np.random.default_rng(0)
    for n in range(2000):
        row = generator.choice(ids, size=n % 12)
        assert "".join(tokenizer.pieces(row)) == tokenizer.decode(row), row


def test_a_character_belongs_to_the_last_of_its_ids():
    tokenizer = some_tokenizer("bytes")
    mask = tokenizer.vocab_size
    assert tokenizer.pieces([*"é▅".encode(), 97]) == ["", "é", "", "", "▅", "a"]
    assert tokenizer.pieces([0xE2, 97, 0xE2, 0x96, mask]) == ["\ufffd", "a", "\ufffd", "", "░"]
    # a true U+FFFD in parts is no reason to lose the place
    assert tokenizer.pieces([*"a\ufffdb".encode()] * 2) == ["a", "\ufffd", "", "", "b"] * 2
    gpt2, bert = published("gpt2"), published("bert")
    assert gpt2.pieces(gpt2.encode("A 🦙!")) == ["A", " ", "", "🦙", "!"]
    assert bert.pieces(bert.encode("Élan's end.")) == ["el", "an", " '", " s", " end", "."]


def test_separators_that_are_no_text_count_no_characters():
    tokenizer = tokenizers.GPT2.from_vocabulary(("a", "b", "<|endoftext|>"))
    assert tokenizer.count_characters(np.array([0, 2, 1, 2])) == 2
    characters = tokenizers.Characters("\nab")
    assert characters.count_characters(np.array([1, 0, 2, 0])) == 4
    trained = some_tokenizer("sentencepiece")
    ids = [*trained.encode("a b\n"), *trained.separator, *trained.encode("c")]
    assert trained.count_characters(np.array(ids)) == 5


@pytest.mark.parametrize("name", ["bert", "gpt2", "sentencepiece"])
def test_ids_do_not_depend_on_the_pieces_given_to_the_library(name, monkeypatch):
    tokenizer = some_tokenizer(name)
    text = real("wikitext2/wiki.test.raw").read_text(encoding="utf-8")[:200_000] + ODD
    monkeypatch.setattr(tokenizer_module, "PIECE", 50)
    in_pieces = tokenizer.encode(text)
    # SentencePiece adds up float32 scores: its ids of a long text are another matter (rounding)
    monkeypatch.setattr(tokenizer_module, "PIECE", 5000 if name == "sentencepiece" else 1 << 30)
    np.testing.assert_array_equal(in_pieces, tokenizer.encode(text))


def test_every_fault_of_a_tokenizer_is_named():
    with says("unknown tokenizer 'x'; known: bert, bytes, characters, gpt2, ids, json, sentence"):
        make_tokenizer("x", "", reference())
    with says("character 'É' (U+00C9) at position 3 of 'cafÉ'", "tokenizer 'text8'", "'bytes'"):
        some_tokenizer("text8").encode("cafÉ")
    with says("character '\U0001f642' (U+1F642) at position 0"):
        some_tokenizer("characters").encode("\U0001f642")
    with says("names no tokenizer"):
        tokenizer_from_dict({"alphabet": "a"})
    with says("keys ['letters'] do not fit tokenizer 'characters'"):
        tokenizer_from_dict({"name": "characters", "letters": "a"})


@pytest.mark.parametrize(
    "values, words",
    [
        ({"name": ["gpt2"]}, "unknown tokenizer ['gpt2']; known"),
        ({"name": "characters", "alphabet": 5}, "alphabet 5 does not fit tokenizer 'characters'"),
        ({"name": "characters", "alphabet": None}, "alphabet None does not fit"),
        ({"name": "gpt2", "vocab": 3, "merges": []}, "vocab 3 does not fit tokenizer 'gpt2'"),
        ({"name": "bert", "vocab": ["a", 1]}, "vocab ('a', 1) does not fit tokenizer 'bert'"),
        ({"name": "bert", "vocab": "abc"}, "vocab 'abc' does not fit"),
        ({"name": "ids", "size": True}, "size True does not fit tokenizer 'ids'"),
        ({"name": "sentencepiece", "model": 3}, "model 3 does not fit"),
    ],
)
def test_a_dictionary_with_values_of_other_types_is_refused(values, words):
    with says(words):
        tokenizer_from_dict(values)


def test_merges_that_are_none_are_refused():
    with says("the merges do not fit the vocabulary", "get both again"):
        tokenizer_from_dict({"name": "gpt2", "vocab": ["a"], "merges": ["x"]})


def earlier(tokenizer) -> dict:
    """What to_dict of gpt2 and bert gave before it held the library's JSON."""
    return {"name": tokenizer.name, **subwords._vocabulary(tokenizer)}


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_a_vocabulary_stored_by_the_version_before_gives_the_same_tokenizer(name):
    tokenizer = published(name)
    stored = json.loads(json.dumps(earlier(tokenizer)))
    opened = tokenizer_from_dict(stored)
    assert opened == tokenizer and opened.fingerprint() == tokenizer.fingerprint_of_published
    digest = hashlib.sha256(json.dumps(stored, sort_keys=True).encode()).hexdigest()
    assert digest == tokenizer.fingerprint_of_published  # what the version before recorded
    text = text_of_every_kind()
    assert opened.encode(text).tolist() == tokenizer.encode(text).tolist()
    with says("keys [", "do not fit tokenizer"):
        tokenizer_from_dict({**stored, "library_json": tokenizer.library_json})


def test_a_vocabulary_of_bert_that_lacks_a_needed_token_is_refused():
    with says("the vocabulary is not BERT's: it lacks [UNK]", "get it again"):
        tokenizer_from_dict({"name": "bert", "vocab": ["a"]})


@pytest.mark.parametrize("content", ["?", "[]", '{"version": "1.0", "model": null}'])
def test_a_stored_tokenizer_that_is_none_of_the_library_is_refused(content):
    tokenizer = tokenizers.GPT2(content)
    for use in (
        tokenizer.fingerprint,
        lambda: tokenizer.encode("a"),
        lambda: tokenizer.decode([0]),
    ):
        with says("it is not a tokenizer.json of the `tokenizers` library: ", "; get it again"):
            use()


@pytest.mark.parametrize("name", ["bert", "bytes", "gpt2", "sentencepiece"])
def test_half_a_surrogate_pair_is_refused(name):
    with says("half a surrogate pair at position 1"):
        some_tokenizer(name).encode("a\ud800")


# --- GPT-2 and BERT


def test_published_ids_are_reproduced():
    gpt2, bert = published("gpt2"), published("bert")
    assert gpt2.encode("Hello world").tolist() == [15496, 995]
    assert (gpt2.vocab_size, gpt2.separator) == (50257, (50256,))
    assert bert.encode("Hello, world").tolist() == [7592, 1010, 2088]
    assert bert.encode("Élan 🙂").tolist() == [3449, 2319, 100]  # el ##an [UNK]
    assert bert.decode([101, 7592, 100, 102, 103, 0]) == "[CLS] hello [UNK] [SEP] [MASK] [PAD]"
    assert (bert.vocab_size, bert.separator) == (30522, (102,))
    assert some_tokenizer("text8").encode("az b").tolist() == [1, 26, 0, 2]


def test_wikitext2_has_its_published_number_of_gpt2_tokens():
    text = real("wikitext2/wiki.test.raw").read_text(encoding="utf-8")
    assert len(published("gpt2").encode(text)) == 286221


def write_json(file: Path, name: str, **sections) -> dict:
    """The published vocabulary as a tokenizer.json, written by the `tokenizers` library."""
    import tokenizers

    folder = real(PATHS[name])
    if name == "gpt2":
        library = tokenizers.ByteLevelBPETokenizer(
            str(folder / "encoder.json"), str(folder / "vocab.bpe")
        )
        library.add_special_tokens(["<|endoftext|>"])
    else:
        library = tokenizers.BertWordPieceTokenizer(str(folder / "vocab.txt"))
    document = json.loads(library.to_str())
    for section, content in sections.items():
        document[section] = content(document[section])
    file.write_text(json.dumps(document), encoding="utf-8")
    return document


def cached(cache: Path, name: str, commit: str, **contents: bytes) -> None:
    """The cache of huggingface_hub as a download leaves it: file vocab_json is vocab.json."""
    folder = cache / f"models--{name.replace('/', '--')}"
    (folder / "snapshots" / commit).mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text(commit)
    for file, content in contents.items():
        (folder / "snapshots" / commit / file.replace("_", ".")).write_bytes(content)


@pytest.fixture
def offline(monkeypatch, tmp_path) -> Path:
    """An empty cache of huggingface_hub, and no network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def hub_files(name: str) -> dict[str, bytes]:
    folder = real(PATHS[name])
    if name == "bert":
        return {"vocab_txt": (folder / "vocab.txt").read_bytes()}
    merges = (folder / "vocab.bpe").read_bytes().removesuffix(b"\n")
    return {"vocab_json": (folder / "encoder.json").read_bytes(), "merges_txt": merges}


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_every_way_to_a_vocabulary_gives_the_same_tokenizer(name, tmp_path, offline):
    expected = published(name).fingerprint()
    assert expected == TOKENIZERS[name].fingerprint_of_published
    write_json(tmp_path / "tokenizer.json", name)
    new = tmp_path / "new.json"
    write_json(new, name)
    old = tmp_path / "old.json"  # as first published: no model.type, merges as strings
    write_json(
        old,
        name,
        model=lambda model: {
            key: [" ".join(pair) for pair in value] if key == "merges" else value
            for key, value in model.items()
            if key != "type"
        },
    )
    merges = {"gpt2": [list, str], "bert": [type(None)] * 2}[name]
    for file, kind in zip((new, old), merges):
        pairs = json.loads(file.read_text(encoding="utf-8"))["model"].get("merges", [None])
        assert isinstance(pairs[0], kind)
    owner, commit = TOKENIZERS[name].published.split("@")
    cached(offline, owner, commit, **hub_files(name))
    cached(offline, "some/one", COMMIT, **hub_files(name))
    for path in (str(tmp_path), str(new), str(old), f"some/one@{COMMIT}", f"{owner}@{commit}", ""):
        assert make_tokenizer(name, path, reference()).fingerprint() == expected, path


def test_a_folder_that_is_there_wins_over_a_hub_id(tmp_path, monkeypatch, offline):
    (tmp_path / "some").mkdir()
    (tmp_path / f"some/one@{COMMIT}").mkdir()
    monkeypatch.chdir(tmp_path)
    with says(f"no tokenizer.json and no vocab.txt in 'some/one@{COMMIT}'"):
        make_tokenizer("bert", f"some/one@{COMMIT}", reference())


def test_every_fault_of_a_hub_id_is_named(offline):
    for path in ("some/one", "some/one@main", "some/one@" + COMMIT[:12]):
        with says(
            f"{path!r} is not a folder or file here", "write some/one@ and the commit's 40 hex"
        ):
            make_tokenizer("gpt2", path, reference())
    for path in ("/no/such/folder", "nowhere", f"gpt2@{COMMIT}"):
        with says(
            f"no folder or file at {path!r}; set data.tokenizer_path", "to a tokenizer.json, to its"
        ):
            make_tokenizer("bert", path, reference())
    with says("data.tokenizer_path", f": cannot get 'some/one@{COMMIT}'", "or download its files"):
        make_tokenizer("gpt2", f"some/one@{COMMIT}", reference())
    with says("data.tokenizer_path", ": cannot get 'google-bert/bert-base-uncased@86b5e0934494"):
        make_tokenizer("bert", "", reference())


def test_ids_are_numbers_and_a_name_tells_them():
    tokenizer = named_tokenizer("ids:12")
    assert tokenizer.encode(" 3\n11 0").tolist() == [3, 11, 0] and tokenizer.separator == ()
    for text in ("12", "-1", "x", "3.0"):
        with says(f"{text!r} is not an id in [0, 12)"):
            tokenizer.encode(text)
    for path in ("", "x", "0", "-3"):
        with says(f"{path!r} is not a number of ids"):
            make_tokenizer("ids", path, reference())


def test_a_named_tokenizer_is_one_that_needs_no_corpus(tmp_path):
    characters = some_tokenizer("characters")
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(characters.to_dict()))
    assert named_tokenizer(str(file)) == characters
    assert named_tokenizer("text8").name == "text8"
    for name in ("characters", "sentencepiece:train:1000"):
        with says(f"tokenizer {name.partition(':')[0]!r} is fitted on a corpus"):
            named_tokenizer(name)
    file.write_text("{}")
    with says(
        "tokenizer.json' as a tokenizer: it is not a tokenizer.json of the `tokenizers` library"
    ):
        named_tokenizer(str(file))


def test_a_download_that_is_not_what_was_published_is_refused(offline):
    owner, commit = TOKENIZERS["bert"].published.split("@")
    cached(offline, owner, commit, vocab_txt=b"[UNK]\n[SEP]\n[CLS]\na\n")
    for path in ("", f"{owner}@{commit}"):
        with says(f"downloaded as '{owner}@{commit}' has fingerprint", "not 383dfd", "delete it"):
            make_tokenizer("bert", path, reference())


def test_a_process_that_cannot_reach_the_hub_says_so_in_one_line(tmp_path):
    program = "from sedd_jax.data import make_tokenizer as make; make('gpt2', '', None)"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, check=False, text=True, env=environment)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(
        "ValueError: data.tokenizer_path (in a command --tokenizer_path): cannot get 'openai-community/gpt2@607a30d783dfa663caf39e06"
    )


@pytest.mark.parametrize(
    ("name", "sections"),
    [
        ("gpt2", {"normalizer": lambda _: {"type": "NFC"}}),
        ("gpt2", {"pre_tokenizer": lambda _: None}),
        ("gpt2", {"pre_tokenizer": lambda p: p | {"add_prefix_space": True}}),
        ("gpt2", {"model": lambda m: m | {"ignore_merges": True}}),
        ("bert", {"normalizer": lambda n: n | {"lowercase": False}}),
        ("bert", {"normalizer": lambda n: n | {"strip_accents": False}}),
        ("bert", {"normalizer": lambda _: None}),
    ],
)
def test_a_tokenizer_json_with_other_settings_gives_the_ids_of_the_library(
    name, sections, tmp_path
):
    from tokenizers import Tokenizer as Library

    write_json(tmp_path / "tokenizer.json", name, **sections)
    tokenizer = make_tokenizer(name, str(tmp_path), reference())
    assert (
        tokenizer.name == "json" and tokenizer.end_of_document == TOKENIZERS[name].end_of_document
    )
    library = Library.from_file(str(tmp_path / "tokenizer.json"))
    for text in (text_of_every_kind(), " É e\u0301 " + tokenizer.end_of_document + "\n\nend  "):
        ids = tokenizer.encode(text)
        assert ids.tolist() == library.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids) == library.decode(ids.tolist(), skip_special_tokens=False)
    assert tokenizer.fingerprint() != published(name).fingerprint()


# The end of a text in each family's vocabulary.
FAMILIES = {
    "llama3": (["<|begin_of_text|>", "<|end_of_text|>"], "<|end_of_text|>", {}),
    "neox": (["<|endoftext|>", "<|padding|>"], "<|endoftext|>", {}),
    "roberta": (["<s>", "<pad>", "</s>", "<unk>", "<mask>"], "</s>", {}),
    "prefix": (["<|endoftext|>"], "<|endoftext|>", {"add_prefix_space": True}),
}


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("kind", ["gpt2", "json"])
def test_a_whole_tokenizer_json_decides_over_the_vocabulary_beside_it(family, kind, tmp_path):
    special, end, options = FAMILIES[family]
    library = library_bpe(*special, **options)
    if family == "llama3":
        library.pre_tokenizer = qwen().pre_tokenizer
    elif family == "neox":
        library.add_tokens(["    ", "        "])  # its runs of blanks
    library.model.save(str(tmp_path))  # vocab.json and merges.txt
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = make_tokenizer(kind, str(tmp_path), None)
    size = library.get_vocab_size(with_added_tokens=True)
    assert (tokenizer.vocab_size, tokenizer.separator) == (size, (library.token_to_id(end),))
    text = "the children  漢字 🙂\n    return e\u0301!\n" + text_of_every_kind()
    ids = tokenizer.encode(text)
    assert ids.tolist() == library.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids) == library.decode(ids.tolist(), skip_special_tokens=False)
    reopened = tokenizer_from_dict(json.loads(json.dumps(tokenizer.to_dict())))
    assert reopened == tokenizer and reopened.fingerprint() == tokenizer.fingerprint()


@pytest.mark.parametrize("model", ["unigram", "wordpiece"])
def test_decoders_of_every_kind_show_the_librarys_text(model):
    from tokenizers import SentencePieceUnigramTokenizer

    text = text_of_every_kind()
    library = SentencePieceUnigramTokenizer()
    library.train_from_iterator(
        reference().documents("train"),
        vocab_size=600,
        special_tokens=["<unk>", "</s>"],
        unk_token="<unk>",
        show_progress=False,
    )
    tokenizer = tokenizers.LibraryTokenizer(library.to_str(), "</s>")
    if model == "wordpiece":
        library = published("bert")._library
        tokenizer = tokenizers.LibraryTokenizer(library.to_str(), "[SEP]")
    ids = tokenizer.encode(text)
    assert ids.tolist() == library.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids) == library.decode(ids.tolist(), skip_special_tokens=False)
    mixed = np.random.default_rng(0).integers(tokenizer.vocab_size + 1, size=3000)
    assert "".join(tokenizer.pieces(mixed)) == tokenizer.decode(mixed)
    assert tokenizer.pieces(ids[:200])[0] and max(map(len, tokenizer.pieces(ids))) < 30


def test_special_tokens_count_no_characters_and_the_user_names_the_end(tmp_path):
    library = qwen()
    library.save(str(tmp_path / "tokenizer.json"))
    first = make_tokenizer("json", str(tmp_path), None)
    assert first.special == (0, 1, 2) and first.separator == (0,)
    assert first.count_characters(first.encode("<|im_start|>ab<|im_end|>")) == 2
    config = tmp_path / "tokenizer_config.json"
    for end in ("<|im_end|>", {"content": "<|im_end|>"}):
        config.write_text(json.dumps({"eos_token": end}))
        tokenizer = make_tokenizer("json", str(tmp_path), None)
        assert tokenizer.separator == (2,) and tokenizer.fingerprint() != first.fingerprint()
    config.write_text('{"eos_token": "<end>"}')
    with says("no end-of-text token", "has none of <end>; name one in a tokenizer_config.json"):
        make_tokenizer("json", str(tmp_path), None)
    config.write_text("[]")
    with says("tokenizer_config.json holds a list, not an object"):
        make_tokenizer("json", str(tmp_path), None)
    config.unlink()
    library_bpe().save(str(tmp_path / "tokenizer.json"))
    with says("no end-of-text token", "has none of <|endoftext|>, <|end_of_text|>"):
        make_tokenizer("json", str(tmp_path), None)


def test_a_file_of_the_library_is_named_by_its_path(tmp_path):
    file = tmp_path / "tokenizer.json"
    qwen().save(str(file))
    assert named_tokenizer(str(file)) == make_tokenizer("json", str(tmp_path), None)
    with says("tokenizer 'json' needs data.tokenizer_path", "; set it to a tokenizer.json"):
        make_tokenizer("json", "", None)
    file.unlink()
    with says("no tokenizer.json in"):
        make_tokenizer("json", str(tmp_path), None)


def test_ids_of_a_tokenizer_with_dropout_are_not_drawn():
    document = json.loads(qwen().to_str())
    document["model"]["dropout"] = 0.5
    tokenizer = tokenizers.LibraryTokenizer(json.dumps(document), "<|endoftext|>")
    text = "the expression statement " * 50
    assert tokenizer.encode(text).tolist() == qwen().encode(text).ids


def test_a_file_that_is_named_itself_is_what_is_meant(tmp_path):
    library = library_bpe("<|endoftext|>", add_prefix_space=True)
    library.model.save(str(tmp_path))
    library.save(str(tmp_path / "tokenizer.json"))
    for file in ("vocab.json", "merges.txt"):  # the vocabulary, with GPT-2's settings
        assert make_tokenizer("gpt2", str(tmp_path / file), None).name == "gpt2"
    assert make_tokenizer("gpt2", str(tmp_path / "tokenizer.json"), None).name == "json"
    by_folder = named_tokenizer(str(tmp_path))
    assert (
        by_folder == named_tokenizer(f"json:{tmp_path}") == named_tokenizer("json", str(tmp_path))
    )
    with says("it is not a tokenizer.json of the `tokenizers` library"):
        make_tokenizer("json", str(tmp_path / "vocab.json"), None)
    with says("tokenizer 'bytes' needs no files, but tokenizer_path is", "leave it out"):
        make_tokenizer("bytes", str(tmp_path), None)
    with says("is an address, not a path"):
        make_tokenizer("gpt2", "gs://bucket/folder", None)


def test_a_byte_level_tokenizer_without_all_the_bytes_is_refused(tmp_path):
    document = json.loads(tokenizers.GPT2.from_vocabulary(("a", "<|endoftext|>")).library_json)
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    for kind in ("gpt2", "json"):
        with says("lacks 255 of the 256 bytes, '!' first", "give a byte-level vocabulary"):
            make_tokenizer(kind, str(tmp_path), None)


def test_a_pointer_in_place_of_a_sentencepiece_model_is_named_as_such(tmp_path):
    (tmp_path / "a.model").write_text("version https://git-lfs.github.com/spec/v1\noid x\n")
    with says("a.model' is git-lfs's pointer to the file, not the file; run `git lfs pull`"):
        make_tokenizer("sentencepiece", str(tmp_path), None)


@pytest.mark.parametrize("name", ["vocab.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_pointer_of_git_lfs_is_named_as_such(name, tmp_path):
    library = qwen()
    library.model.save(str(tmp_path))
    if name == "tokenizer_config.json":
        library.save(str(tmp_path / "tokenizer.json"))
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 8\n"
    (tmp_path / name).write_text(pointer)
    with says(f"{name}' is git-lfs's pointer to the file, not the file; run `git lfs pull`"):
        make_tokenizer("gpt2", str(tmp_path), None)


def test_every_fault_of_vocabulary_files_is_named(tmp_path):
    def make(name: str, **files: str):
        for file, content in files.items():
            (tmp_path / file.replace("_", ".")).write_text(content, encoding="utf-8")
        return make_tokenizer(name, str(tmp_path), reference())

    with says(
        "no tokenizer.json and no vocab.json or encoder.json and no merges.txt", "; set data."
    ):
        make("gpt2")
    with says("vocab.json' as a tokenizer: its ids are not 0 .. n - 1"):
        make("gpt2", vocab_json='{"a": 0, "b": 2}', merges_txt="#version: 0.2\n")
    with says("' as a tokenizer: the merges do not fit the vocabulary:", "get both again"):
        make("gpt2", vocab_json='{"a": 0, "<|endoftext|>": 1}', merges_txt="q z\n")
    with says("lacks 255 of the 256 bytes, '!' first"):
        make("gpt2", merges_txt="")
    letters = {byte_character(byte): byte for byte in range(256)}
    with says("no end-of-text token", "has none of <|endoftext|>"):
        make("gpt2", vocab_json=json.dumps(letters))
    with says("no tokenizer.json and no vocab.txt in"):
        make("bert")
    with says("it lacks [SEP]"):
        make("bert", vocab_txt="[UNK]\na\n")
    with says("it holds a token twice"):
        make("bert", vocab_txt="[UNK]\n[SEP]\na\na\n")
    with says("tokenizer.json' as a tokenizer: tokenizer.json is not JSON: Expecting value"):
        make("bert", tokenizer_json="")
    (tmp_path / "tokenizer.json").write_text('{"name": "bytes"}')
    with says("tokenizer.json' as a tokenizer: it is a run's", "give the file itself as tokenizer"):
        make("bert")


# --- SentencePiece


def trained_elsewhere(**options) -> bytes:
    """A model with the library's own defaults: it adds a space in front and squeezes blanks."""
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=(
            line for text in reference().documents("train") for line in text.split("\n")
        ),
        model_writer=model,
        minloglevel=3,
        **{"vocab_size": 500, "num_threads": 1} | options,
    )
    return model.getvalue()


def test_training_twice_gives_the_same_model_and_says_nothing(capfd):
    twice = [make_tokenizer("sentencepiece", "train:400", reference()) for _ in range(2)]
    assert twice[0].fingerprint() == twice[1].fingerprint()
    assert twice[0].vocab_size == 400 and twice[0].special == twice[0].separator == (1,)
    assert capfd.readouterr() == ("", "")
    other = make_tokenizer("sentencepiece", "train:401", reference())
    assert other.fingerprint() != twice[0].fingerprint()


def test_a_document_of_one_long_line_is_cut_and_not_dropped():
    words = " ".join(" ".join(reference().documents("train")).split())
    assert len(words) > 300_000
    for text in (words, "word\0" + words.replace(" ", "\t"), "字" * 5000 + words):
        trained = make_tokenizer("sentencepiece", "train:600", corpus_of([text], []))
        assert len(trained.encode("expression statement")) < 10  # it learned of words


def test_a_sentence_is_cut_before_a_space_and_keeps_every_character():
    documents = ["one\ntwo\tthree", "word " * 700, "x" * 2500, "字" * 1500 + " end"]
    sentences = list(sentencepiece._sentences(documents))
    assert sentences[:3] == ["one", "two", "three"]
    assert "".join(sentences[3:]) == "".join(documents[1:])
    assert max(map(len, sentences)) == 1000 and sentences[4].startswith(" word")


def test_a_large_corpus_is_drawn_from_evenly_and_the_same_each_time():
    drawn = sentencepiece._draw(map(str, range(10_000)), 1000)
    assert drawn == sentencepiece._draw(map(str, range(10_000)), 1000)
    numbers = [int(line) for line in drawn]
    assert len(set(numbers)) == 1000 and 4700 < np.mean(numbers) < 5300
    assert sentencepiece._draw("abc", 5) == ["a", "b", "c"]


def test_a_model_file_gives_the_trained_tokenizer(tmp_path):
    trained = some_tokenizer("sentencepiece")
    (tmp_path / "a.model").write_bytes(base64.b64decode(trained.model))
    for path in (tmp_path, tmp_path / "a.model"):
        again = make_tokenizer("sentencepiece", str(path), None)  # no corpus is needed
        assert again.fingerprint() == trained.fingerprint()


@pytest.mark.parametrize("byte_fallback", [False, True])
def test_a_model_trained_elsewhere_gives_the_ids_and_text_of_the_library(tmp_path, byte_fallback):
    from sentencepiece import SentencePieceProcessor

    model = trained_elsewhere(byte_fallback=byte_fallback)
    (tmp_path / "a.model").write_bytes(model)
    tokenizer = make_tokenizer("sentencepiece", str(tmp_path), None)
    library = SentencePieceProcessor(model_proto=model)
    text = "  Some  words\nof the expression 東京 " * 200
    ids = tokenizer.encode(text)
    assert ids.tolist() == library.encode(text)
    assert tokenizer.decode(ids) == library.decode(ids.tolist()).replace(" ⁇ ", "\ufffd")
    assert tokenizer.special == (1, 2) and tokenizer.separator == (2,)
    shown = tokenizer.decode([*tokenizer.encode("a word"), 2, tokenizer.vocab_size, 0])
    assert shown == "a word</s>░\ufffd"
    assert tokenizer.count_characters(np.array([1, *tokenizer.encode("a word"), 2])) == 6


def test_every_fault_of_a_sentencepiece_model_is_named(tmp_path):
    def make(path: object, corpus: Corpus | None = None):
        return make_tokenizer("sentencepiece", str(path), corpus or reference())

    with says("vocabulary of 100000 is too large for this corpus, which gives ", " at most;"):
        make("train:100000")
    with says("vocabulary of 100 is too small for this corpus, whose characters take ", "; change"):
        make("train:100")
    with says("cannot be trained on a corpus without text"):
        make("train:300", corpus_of([], []))
    for path in ("train:", "train:0", "train:-1", "train:8k"):
        with says(f"{path!r} names no vocabulary size; write train:8000"):
            make(path)
    with says("needs data.tokenizer_path", "; set it to a .model file or to train:8000"):
        make("")
    with says("cannot read '/no/such.model': No such file or directory; set data.tokenizer_path"):
        make("/no/such.model")
    with says("0 .model files in"):
        make(tmp_path)
    file = tmp_path / "a.model"
    model = base64.b64decode(some_tokenizer("sentencepiece").model)
    for content in (b"no model", model[: len(model) // 2]):
        file.write_bytes(content)
        with says("a.model': this is not a SentencePiece .model file; copy it again"):
            make(file)
    file.write_bytes(b"")
    with says("a.model': this SentencePiece model is empty; copy it again"):
        make(file)
    file.write_bytes(trained_elsewhere(eos_id=-1))
    with says("a.model': this SentencePiece model has no </s>; train it with eos_id >= 0"):
        make(file)
    (tmp_path / "b.model").write_bytes(model)
    with says("2 .model files in"):
        make(tmp_path)
    with says("this is not a SentencePiece .model file"):
        tokenizer_from_dict({"name": "sentencepiece", "model": "?"}).encode("a")
