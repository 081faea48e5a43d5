"""Tokenizers: text <-> int32 ids. Floor 1: numpy; the `tokenizers` library where a row needs it.

The diffusion's mask id is `vocab_size` and belongs to no tokenizer; `decode` shows it as "░".
A new tokenizer is a subclass of Tokenizer and a row in TOKENIZERS.
"""

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from sedd_jax.data.corpora import SPLITS, Corpus

PIECE = 1 << 20  # characters given to the `tokenizers` library at once, to bound its memory


@dataclass(frozen=True)
class Tokenizer:
    """What every row answers. Its dataclass fields are all that determines the ids."""

    name: ClassVar[str]

    @property
    def vocab_size(self) -> int:
        """Number of clean tokens; ids are 0 .. vocab_size - 1."""
        raise NotImplementedError

    @property
    def separator(self) -> tuple[int, ...]:
        """The ids that end each document when documents are packed."""
        raise NotImplementedError

    @classmethod
    def make(cls, path: str, corpus: Corpus) -> "Tokenizer":
        """Returns the tokenizer of the files at `path`, or fitted on `corpus`."""
        raise NotImplementedError

    def encode(self, text: str) -> np.ndarray:
        """Returns the ids of `text`, int32 [n]; ValueError for a character it cannot hold."""
        raise NotImplementedError

    def decode(self, ids: np.ndarray, mask: str = "░") -> str:
        """Returns the text of `ids` [n]; ids >= vocab_size are shown as `mask`, each in its place.

        Runs between masks are decoded apart, so no character is joined across a mask.
        """
        ids = _check_ids(ids)
        is_masked = ids >= self.vocab_size
        edges = np.flatnonzero(np.diff(is_masked)) + 1
        runs = zip(np.split(ids, edges), np.split(is_masked, edges))
        return "".join(
            mask * len(run) if masked.any() else self._decode_run(run) for run, masked in runs
        )

    def _decode_run(self, ids: np.ndarray) -> str:
        raise NotImplementedError

    @property
    def special(self) -> tuple[int, ...]:
        """The ids that stand for no text."""
        return ()

    def count_characters(self, ids: np.ndarray) -> int:
        """Characters of text in ids [n], special ids left out."""
        ids = _check_ids(ids)
        return len(self.decode(ids[~np.isin(ids, self.special)]))

    def to_dict(self) -> dict[str, Any]:
        """Returns what `tokenizer_from_dict` needs, as JSON-able values; no path is in it."""
        return {"name": self.name, **asdict(self)}

    def fingerprint(self) -> str:
        """Returns the sha256, in hex, of everything that determines the ids."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Characters(Tokenizer):
    """One id per character of a sorted alphabet; documents end in a newline."""

    alphabet: str
    name: ClassVar[str] = "characters"

    @property
    def vocab_size(self) -> int:
        return len(self.alphabet)

    @property
    def separator(self) -> tuple[int, ...]:
        return (self.alphabet.index("\n"),)

    @classmethod
    def make(cls, path: str, corpus: Corpus) -> "Characters":
        """Fits the alphabet on both splits of `corpus`, so that heldout text can be encoded."""
        characters = {"\n"}
        for split in SPLITS:
            for document in corpus.documents(split):
                characters.update(document)
        return cls("".join(sorted(characters)))

    @cached_property
    def _ids(self) -> np.ndarray:
        codes = _code_points(self.alphabet)
        ids = np.full(codes.max() + 2, -1, np.int32)  # the last entry stands for all codes above
        ids[codes] = np.arange(len(codes))
        return ids

    def encode(self, text: str) -> np.ndarray:
        ids = self._ids[np.minimum(_code_points(text), len(self._ids) - 1)]
        outside = np.flatnonzero(ids < 0)
        if len(outside):
            at = int(outside[0])
            raise ValueError(
                f"character {text[at]!r} (U+{ord(text[at]):04X}) at position {at} of "
                f"{_shorten(repr(text))} is outside the alphabet of tokenizer {self.name!r}; "
                "remove it or choose tokenizer 'bytes'"
            )
        return ids

    def _decode_run(self, ids: np.ndarray) -> str:
        return _code_points(self.alphabet)[ids].tobytes().decode("utf-32-le", "surrogatepass")


@dataclass(frozen=True)
class Text8(Characters):
    """The fixed 27 characters of text8: a space and a to z; documents are joined by nothing."""

    alphabet: str = " abcdefghijklmnopqrstuvwxyz"
    name: ClassVar[str] = "text8"

    @property
    def separator(self) -> tuple[int, ...]:
        return ()

    @classmethod
    def make(cls, path: str, corpus: Corpus) -> "Text8":
        return cls()


@dataclass(frozen=True)
class Bytes(Tokenizer):
    """The 256 bytes of UTF-8; documents end in a newline. Broken characters decode to U+FFFD."""

    name: ClassVar[str] = "bytes"
    vocab_size: ClassVar[int] = 256
    separator: ClassVar[tuple[int, ...]] = (10,)

    @classmethod
    def make(cls, path: str, corpus: Corpus) -> "Bytes":
        return cls()

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(_utf8(text), np.uint8).astype(np.int32)

    def _decode_run(self, ids: np.ndarray) -> str:
        return ids.astype(np.uint8).tobytes().decode("utf-8", errors="replace")


@dataclass(frozen=True)
class Subwords(Tokenizer):
    """What gpt2 and bert share: a stored vocabulary and an object of the `tokenizers` library."""

    vocab: tuple[str, ...]  # token i at place i
    last: ClassVar[str]  # the token that ends a document

    @property
    def vocab_size(self) -> int:
        return len(self.vocab)

    @cached_property
    def separator(self) -> tuple[int, ...]:
        return (self.vocab.index(self.last),)

    @property
    def special(self) -> tuple[int, ...]:
        return self.separator

    @cached_property
    def _library(self) -> Any:
        raise NotImplementedError

    def encode(self, text: str) -> np.ndarray:
        return _encode_pieces(self._library, text)


@dataclass(frozen=True)
class GPT2(Subwords):
    """GPT-2's byte-level BPE (Radford et al. 2019); documents end in <|endoftext|>."""

    merges: tuple[str, ...]  # "left right", in order of rank
    name: ClassVar[str] = "gpt2"
    last: ClassVar[str] = "<|endoftext|>"

    @classmethod
    def make(cls, path: str, corpus: Corpus) -> "GPT2":
        """Reads encoder.json (or vocab.json) and vocab.bpe (or merges.txt) in folder `path`."""
        vocab_file = _find(path, "encoder.json", "vocab.json")
        merges_file = _find(path, "vocab.bpe", "merges.txt")
        try:
            ids = json.loads(vocab_file.read_text(encoding="utf-8"))
            vocab = tuple(sorted(ids, key=ids.__getitem__))
            if [ids[token] for token in vocab] != list(range(len(vocab))):
                raise ValueError("its ids are not 0 .. n - 1")
            if cls.last not in ids:
                raise ValueError(f"it lacks {cls.last}")
        except (ValueError, TypeError, AttributeError, OSError) as error:
            raise ValueError(
                f"cannot read {str(vocab_file)!r} as a vocabulary: {error}; download it again"
            ) from error
        lines = merges_file.read_text(encoding="utf-8").split("\n")
        merges = tuple(line for line in lines if line and not line.startswith("#version"))
        tokenizer = cls(vocab, merges)
        try:
            tokenizer.encode("a")  # builds the library's object, so that faults show now
        except Exception as error:  # the Rust library raises plain Exception
            raise ValueError(
                f"{str(merges_file)!r} does not fit the vocabulary: {error}; download both again"
            ) from error
        return tokenizer

    @cached_property
    def _library(self) -> Any:
        from tokenizers import ByteLevelBPETokenizer

        vocab = {token: i for i, token in enumerate(self.vocab)}
        merges = [tuple(line.split(" ")) for line in self.merges]
        return ByteLevelBPETokenizer(vocab, merges, add_prefix_space=False)

    def _decode_run(self, ids: np.ndarray) -> str:
        return self._library.decode(ids.tolist(), skip_special_tokens=False)


@dataclass(frozen=True)
class Bert(Subwords):
    """BERT's lowercase WordPiece; documents end in [SEP]. Text outside the vocabulary is [UNK]."""

    name: ClassVar[str] = "bert"
    last: ClassVar[str] = "[SEP]"

    @classmethod
    def make(cls, path: str, corpus: Corpus) -> "Bert":
        """Reads vocab.txt in folder `path`, a token a line."""
        file = _find(path, "vocab.txt")
        vocab = tuple(file.read_text(encoding="utf-8").removesuffix("\n").split("\n"))
        missing = {"[UNK]", "[SEP]"} - set(vocab)
        if missing or len(set(vocab)) != len(vocab):
            fault = f"no {min(missing)}" if missing else "a token twice"
            raise ValueError(f"{str(file)!r} holds {fault}; give BERT's uncased vocab.txt")
        return cls(vocab)

    @cached_property
    def _library(self) -> Any:
        from tokenizers import BertWordPieceTokenizer

        return BertWordPieceTokenizer({token: i for i, token in enumerate(self.vocab)})

    def decode(self, ids: np.ndarray, mask: str = "░") -> str:
        """Returns words joined by spaces: case, accents and spacing of the text are lost."""
        ids = _check_ids(ids)
        words = [self.vocab[i] if i < self.vocab_size else mask for i in ids]
        return self._library._tokenizer.decoder.decode(words)


TOKENIZERS: dict[str, type[Tokenizer]] = {
    "bert": Bert,
    "bytes": Bytes,
    "characters": Characters,
    "gpt2": GPT2,
    "text8": Text8,
}


def make_tokenizer(name: str, path: str, corpus: Corpus) -> Tokenizer:
    """Returns tokenizer `name`: from the files at `path` (gpt2, bert) or fitted on `corpus`."""
    return _lookup(name).make(path, corpus)


def tokenizer_from_dict(d: dict[str, Any]) -> Tokenizer:
    """Rebuilds the tokenizer whose `to_dict` gave `d`."""
    if not isinstance(d, dict) or "name" not in d:
        raise ValueError(f"{_shorten(repr(d))} names no tokenizer; give what to_dict returned")
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in d.items() if k != "name"}
    try:
        return _lookup(d["name"])(**fields)
    except TypeError as error:
        raise ValueError(
            f"keys {sorted(fields)} do not fit tokenizer {d['name']!r}; give what to_dict returned"
        ) from error


def _lookup(name: str) -> type[Tokenizer]:
    if name not in TOKENIZERS:
        raise ValueError(f"unknown tokenizer {name!r}; known: {', '.join(sorted(TOKENIZERS))}")
    return TOKENIZERS[name]


def _find(path: str, *names: str) -> Path:
    for name in names:
        if (Path(path) / name).is_file():
            return Path(path) / name
    raise ValueError(
        f"no {' or '.join(names)} in {str(path)!r}; set data.tokenizer_path to its folder"
    )


def _check_ids(ids: Any) -> np.ndarray:
    ids = np.asarray(ids)
    if ids.size == 0:
        ids = ids.astype(np.int64)  # an empty list is float64 to numpy
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer) or (ids < 0).any():
        raise ValueError(f"ids must be one row of integers >= 0, not {_shorten(repr(ids))}")
    return ids.astype(np.int64)


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


def _utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"half a surrogate pair at position {error.start} of {_shorten(repr(text))}; remove it"
        ) from error


def _encode_pieces(library: Any, text: str) -> np.ndarray:
    """Encodes piece by piece: the library takes hundreds of bytes for each character it holds.

    A piece ends after a newline that stands alone between printed characters, where both GPT-2's
    and BERT's pre-tokenizers end a word anyway, so the ids are those of the whole text.
    """
    _utf8(text)
    rows, start = [np.zeros(0, np.int32)], 0
    lone_newline = re.compile(r"(?<=\S)\n(?=\S)")
    while start < len(text):
        found = lone_newline.search(text, start + PIECE)
        stop = found.end() if found else len(text)
        encoded = library.encode(text[start:stop], add_special_tokens=False)
        rows.append(np.asarray(encoded.ids, np.int32))
        start = stop
    return np.concatenate(rows)


def _shorten(text: str, most: int = 60) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 3] + "..."
