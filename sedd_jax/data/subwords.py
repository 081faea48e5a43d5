"""Vocabularies of the subword tokenizers: read, downloaded or trained.

sentencepiece is imported by the call that needs it. `path` is data.tokenizer_path everywhere.
"""

import io
import json
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sedd_jax import hub

PATH = "data.tokenizer_path (sedd-prepare: --tokenizer_path)"  # the setting, for errors
LINE = 1000  # characters of a training sentence at most
SENTENCES = 500_000  # drawn from a larger corpus, to bound the trainer's memory and time


@dataclass(frozen=True)
class Source:
    """How a tokenizer's vocabulary is stored, and where the published one is."""

    published: str  # hub id, owner/name@commit
    fingerprint: str  # of the tokenizer that the published files make
    files: tuple[tuple[str, ...], ...]  # the names each file may have, the hub's last
    needed: tuple[str, ...]  # tokens that the vocabulary must hold
    sections: dict[str, dict[str, tuple]] = field(hash=False)  # see _check_sections


GPT2 = Source(
    published="openai-community/gpt2@607a30d783dfa663caf39e06633721c8d4cfcd7e",
    fingerprint="3fdf29b9e9eaea666fda7ec10b50b907abed940b8b24165223c5c0f1e9403774",
    files=(("encoder.json", "vocab.json"), ("vocab.bpe", "merges.txt")),
    needed=("<|endoftext|>",),
    sections={
        "normalizer": {"type": (None,)},
        "pre_tokenizer": {
            "type": ("ByteLevel",),
            "add_prefix_space": (False,),
            "use_regex": (True,),
        },
        "model": {
            "type": ("BPE",),
            "dropout": (None, 0.0),
            "continuing_subword_prefix": ("", None),
            "end_of_word_suffix": ("", None),
            "ignore_merges": (False,),
        },
    },
)

BERT = Source(
    published="google-bert/bert-base-uncased@86b5e0934494bd15c9632b12f734a8a67f723594",
    fingerprint="383dfd746f1a4f5bcca4903226d5fc11a219e93b152f3052da1b329040a75f91",
    files=(("vocab.txt",),),
    needed=("[UNK]", "[SEP]", "[CLS]"),
    sections={
        "normalizer": {
            "type": ("BertNormalizer",),
            "clean_text": (True,),
            "handle_chinese_chars": (True,),
            "strip_accents": (None, True),  # None: as lowercase says
            "lowercase": (True,),
        },
        "pre_tokenizer": {"type": ("BertPreTokenizer",)},
        "model": {
            "type": ("WordPiece",),
            "unk_token": ("[UNK]",),
            "continuing_subword_prefix": ("##",),
            "max_input_chars_per_word": (100,),
        },
    },
)


def read_gpt2(path: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns vocabulary and merges ("left right", by rank) at `path`; ValueError names a fault."""
    files = _locate(path, GPT2)
    try:
        if len(files) == 1:
            model, ids = _read_json(files[0], GPT2)
            pairs = model["merges"]
            merges = tuple(pair if isinstance(pair, str) else " ".join(pair) for pair in pairs)
        else:
            ids = json.loads(files[0].read_text(encoding="utf-8"))
            lines = files[1].read_text(encoding="utf-8").split("\n")
            merges = tuple(line for line in lines if line and not line.startswith("#version"))
        return _in_order(ids, GPT2), merges
    except (LookupError, ValueError, TypeError, AttributeError, OSError) as error:
        raise _unreadable(files[0], error) from error


def read_bert(path: str) -> tuple[str, ...]:
    """Returns the vocabulary at `path`, token i at place i; ValueError names the fault."""
    (file,) = _locate(path, BERT)
    try:
        if file.suffix == ".json":
            return _in_order(_read_json(file, BERT)[1], BERT)
        tokens = file.read_text(encoding="utf-8").removesuffix("\n").split("\n")
        if len(set(tokens)) != len(tokens):
            raise ValueError("it holds a token twice")
        return _in_order({token: i for i, token in enumerate(tokens)}, BERT)
    except (LookupError, ValueError, TypeError, AttributeError, OSError) as error:
        raise _unreadable(file, error) from error


def _unreadable(file: Path, error: Exception) -> ValueError:
    fault = f"it has no {error}" if isinstance(error, LookupError) else error
    return ValueError(f"cannot read {str(file)!r} as a vocabulary: {fault}; download it again")


def _in_order(ids: dict[str, int], source: Source) -> tuple[str, ...]:
    vocab = tuple(sorted(ids, key=ids.__getitem__))
    if [ids[token] for token in vocab] != list(range(len(vocab))):
        raise ValueError("its ids are not 0 .. n - 1")
    for token in source.needed:
        if token not in ids:
            raise ValueError(f"it lacks {token}")
    return vocab


def _locate(path: str, source: Source) -> list[Path]:
    """Returns the files of source.files at `path`, or one tokenizer.json in their place."""
    place = Path(path)
    if path and place.is_file():
        return [place]
    if not path or not place.is_dir():
        return _download(path or source.published, source)
    found = []
    for names in source.files:
        present = [place / name for name in names if (place / name).is_file()]
        if not present and (place / "tokenizer.json").is_file():
            return [place / "tokenizer.json"]
        if not present:
            raise ValueError(
                f"no {' or '.join(names)} in {path!r}, and no tokenizer.json; "
                f"set {PATH} to their folder"
            )
        found.append(present[0])
    return found


def _download(name: str, source: Source) -> list[Path]:
    """Returns the files of hub id `name`, from the hub or the cache it keeps."""
    found = hub.parse(name)
    if found is None:
        raise ValueError(
            f"no folder or file at {name!r}; set {PATH} to one, or to a hub id owner/name@commit"
        )
    repository, revision = found
    if revision is None or not hub.COMMIT.fullmatch(revision):
        raise ValueError(
            f"{name!r} is no folder or file here, and as a hub id it pins no commit; write "
            f"{repository}@ and the commit's 40 hex digits"
        )
    files = [names[-1] for names in source.files]
    try:
        folder = hub.download(repository, revision, files)
    except ValueError as error:
        raise ValueError(f"{PATH}: {error}") from error
    return [folder / file for file in files]


def _read_json(file: Path, source: Source) -> tuple[dict[str, Any], dict[str, int]]:
    """Returns the section `model` of a tokenizer.json and its ids, those of added tokens too."""
    document = json.loads(file.read_text(encoding="utf-8"))
    _check_sections(document, source)
    ids = dict(document["model"]["vocab"])
    for token in document.get("added_tokens") or ():
        if not token.get("special"):
            raise ValueError(f"it matches {token['content']!r} ahead of the vocabulary")
        if ids.setdefault(token["content"], token["id"]) != token["id"]:
            raise ValueError(f"it gives {token['content']!r} two ids")
    return document["model"], ids


def _check_sections(document: dict[str, Any], source: Source) -> None:
    """Raises where tokenizer.json asks for what would change the ids.

    source.sections: the values that a key may have, the first being meant where it is absent (the
    published files are older than the key model.type).
    """
    for section, keys in source.sections.items():
        content = document.get(section) or {"type": None}
        for key, allowed in keys.items():
            value = content.get(key, allowed[0])
            if value not in allowed:
                raise ValueError(f"its {section}.{key} is {value!r}, not {allowed[0]!r}")


def sentencepiece_model(path: str, documents: Iterable[str]) -> bytes:
    """Returns the SentencePiece model at `path`: a .model file, a folder with one, or "train:N".

    "train:N" trains N pieces on `documents`. ValueError names the fault.
    """
    if path.startswith("train:"):
        if not re.fullmatch(r"train:[1-9][0-9]{0,8}", path):
            raise ValueError(f"{path!r} names no vocabulary size; write train:8000")
        return _train(int(path.removeprefix("train:")), documents)
    if not path:
        raise ValueError(f"{PATH} is empty; set it to a .model file or to train:8000")
    file = Path(path)
    if file.is_dir():
        files = sorted(file.glob("*.model"))
        if len(files) != 1:
            raise ValueError(f"{len(files)} .model files in {path!r}; name one in {PATH}")
        file = files[0]
    try:
        return file.read_bytes()
    except OSError as error:
        raise ValueError(
            f"cannot read {str(file)!r}: {error.strerror}; set {PATH} to a .model "
            "file or to train:8000"
        ) from error


def _train(size: int, documents: Iterable[str]) -> bytes:
    """Trains a unigram model whose decoding gives back every text; the same for the same text."""
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=iter(_draw(_sentences(documents), SENTENCES)),
            model_writer=model,
            model_type="unigram",
            vocab_size=size,
            max_sentence_length=4 * LINE,  # bytes
            num_threads=1,  # the order of sums decides the last digits of the scores
            byte_fallback=True,  # what the pieces lack is spelled in bytes
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,  # runs of blanks: code, verse, tables
            user_defined_symbols=["\n"],
            unk_id=0,
            eos_id=1,
            bos_id=-1,
            pad_id=-1,
            minloglevel=3,
        )
    except RuntimeError as error:
        reason = str(error).strip().split("\n")[0]
        if most := re.search(r"too high .* <= (\d+)", reason):
            bound = f"is too large for this corpus, which gives {most[1]} at most"
        elif least := re.search(r"\d+ vs (\d+)", reason):
            bound = f"is too small for this corpus, whose characters take {least[1]}"
        elif "sentences_.empty()" in reason:
            bound = "cannot be trained on a corpus without text"
        else:
            bound = f"cannot be trained: {reason}"
        raise ValueError(
            f"a sentencepiece vocabulary of {size} {bound}; change N in {PATH} = train:N, or "
            "the corpus"
        ) from error
    return model.getvalue()


def _sentences(documents: Iterable[str]) -> Iterator[str]:
    """Yields each document in lines of at most LINE characters, cut before a space if there is one.

    The trainer drops sentences that hold the characters it reserves (tab, null, U+2581, U+2585),
    so they end lines too; all four are encoded in bytes.
    """
    reserved = "\\n\\t\\0\u2581\u2585"
    line = re.compile(rf"[^{reserved}]{{1,{LINE}}}(?=[ {reserved}]|\Z)|[^{reserved}]{{{LINE}}}")
    for document in documents:
        yield from line.findall(document)


def _draw(sentences: Iterable[str], count: int) -> list[str]:
    """Returns `count` of `sentences`, all equally likely, the same ones at each call."""
    drawn: list[str] = []
    generator = random.Random(0)
    for seen, sentence in enumerate(sentences):
        if seen < count:
            drawn.append(sentence)
        elif (place := generator.randrange(seen + 1)) < count:
            drawn[place] = sentence
    return drawn
