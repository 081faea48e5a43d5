"""The tokenizers by name, and those of characters, bytes and numbers.

A new tokenizer is a subclass of Tokenizer and an entry of TOKENIZERS.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from sedd_jax.data.corpora import Corpus
from sedd_jax.data.sentencepiece import SentencePiece
from sedd_jax.data.subwords import GPT2, Bert, LibraryTokenizer, Subwords
from sedd_jax.data.tokenizer import Tokenizer, check_ids, shorten, to_utf8
from sedd_jax.host.files import load_json, local_path, refuse_pointer_file


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
        """Fits the alphabet on every split of `corpus`, so that heldout text can be encoded."""
        characters = {"\n"}
        for _, document in corpus.pairs():
            characters.update(corpus.detokenize(document))
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
                f"{shorten(repr(text))} is outside the alphabet of tokenizer {self.name!r}; "
                "remove it or choose tokenizer 'bytes'"
            )
        return ids

    def _decode(self, ids: Sequence[int], mask: str) -> str:
        return "".join(self.pieces(np.array(ids, np.int64), mask))

    def pieces(self, ids: np.ndarray, mask: str = "░") -> list[str]:
        size = len(self.alphabet)
        return [self.alphabet[i] if i < size else mask for i in check_ids(ids).tolist()]


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
        return np.frombuffer(to_utf8(text), np.uint8).astype(np.int32)

    @cached_property
    def _surfaces(self) -> list[bytes]:
        return [bytes([i]) for i in range(256)]


@dataclass(frozen=True)
class Ids(Tokenizer):
    """Text that is ids already, numbers with white space between; documents are joined by nothing.

    For a model whose own tokenizer is not here, and for sequences that are not text.
    """

    size: int
    name: ClassVar[str] = "ids"

    @classmethod
    def make(cls, path: str, corpus: Corpus) -> "Ids":
        """`path` is the number of ids."""
        if not re.fullmatch(r"[1-9][0-9]{0,8}", path):
            raise ValueError(
                f"{path!r} is not a number of ids; give tokenizer 'ids' one, like 4096"
            )
        return cls(int(path))

    @property
    def vocab_size(self) -> int:
        return self.size

    @property
    def separator(self) -> tuple[int, ...]:
        return ()

    def encode(self, text: str) -> np.ndarray:
        words = text.split()
        for word in words:
            if not (re.fullmatch(r"[0-9]{1,9}", word) and int(word) < self.size):
                raise ValueError(
                    f"{shorten(repr(word))} is not an id in [0, {self.size}); choose others"
                )
        return np.array([int(word) for word in words], np.int32)

    def _decode(self, ids: Sequence[int], mask: str) -> str:
        return " ".join(str(i) if i < self.size else mask for i in ids)


TOKENIZERS: dict[str, type[Tokenizer]] = {
    "bert": Bert,
    "bytes": Bytes,
    "characters": Characters,
    "gpt2": GPT2,
    "ids": Ids,
    "json": LibraryTokenizer,
    "sentencepiece": SentencePiece,
    "text8": Text8,
}


def make_tokenizer(name: str, path: str, corpus: Corpus | None) -> Tokenizer:
    """Returns tokenizer `name`: from the files at `path`, or fitted on `corpus`; see its `make`.

    Or, if that is not a name of TOKENIZERS, that of the file or folder `name`: a tokenizer.json of
    a run or of the `tokenizers` library.
    """
    cls = TOKENIZERS.get(name)
    if cls is not None and not (path and cls in (Bytes, Characters, Text8)):
        return cls.make(path, corpus)
    file = local_path(name)
    file = file / "tokenizer.json" if file.is_dir() else file
    if cls is None and not file.is_file():
        raise ValueError(_unknown(name))
    if path:
        raise ValueError(
            f"tokenizer {name!r} needs no files, but tokenizer_path is {path!r}; leave it out "
            "(--config.data.tokenizer_path= empties a config's), or choose tokenizer 'json' for a "
            "tokenizer.json there"
        )
    refuse_pointer_file(file)
    stored = load_json(file.read_bytes(), repr(str(file)))
    if "name" not in stored:
        return LibraryTokenizer.make(str(file), None)
    try:
        return tokenizer_from_dict(stored)
    except ValueError as error:
        raise ValueError(f"{name!r} is not a tokenizer.json of a run: {error}") from error


def is_of_kind(tokenizer: Tokenizer, name: str) -> bool:
    """Whether `make_tokenizer` with this name may have given the tokenizer.

    For gpt2 and bert that is also the library's, where their files have settings of their own.
    """
    is_library = tokenizer.name == LibraryTokenizer.name
    return tokenizer.name == name or (is_library and issubclass(TOKENIZERS[name], LibraryTokenizer))


def named_tokenizer(name: str, path: str = "") -> Tokenizer:
    """Returns the tokenizer of "gpt2", "gpt2:FOLDER", "ids:4096", or of a tokenizer.json.

    path, if it is not in the name, is that of `make_tokenizer`.
    """
    kind, _, rest = name.partition(":")
    if kind in TOKENIZERS and not path:
        name, path = kind, rest
    if name == "characters" or path.startswith("train:"):
        raise ValueError(
            f"tokenizer {kind!r} is fitted on a corpus, which is not here; name the tokenizer.json "
            "of a run"
        )
    return make_tokenizer(name, path, None)


def tokenizer_from_dict(d: dict[str, Any]) -> Tokenizer:
    """Rebuilds the tokenizer whose `to_dict` gave `d`."""
    if not isinstance(d, dict) or "name" not in d:
        raise ValueError(f"{shorten(repr(d))} names no tokenizer; give what to_dict returned")
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in d.items() if k != "name"}
    if d["name"] not in list(TOKENIZERS):  # a list: it may be of any type
        raise ValueError(_unknown(d["name"]))
    cls = TOKENIZERS[d["name"]]
    if issubclass(cls, Subwords) and "vocab" in values:  # stored before the library's JSON was
        create, kinds = cls.from_vocabulary, {"vocab": tuple, "merges": tuple}
    else:
        create, kinds = cls, {field.name: field.type for field in fields(cls)}
    for key in values.keys() & kinds.keys():
        value, kind = values[key], kinds[key]
        if type(value) is not kind or (kind is tuple and not all(type(v) is str for v in value)):
            raise ValueError(
                f"{key} {shorten(repr(value))} does not fit tokenizer {d['name']!r}; give "
                "what to_dict returned"
            )
    try:
        return create(**values)
    except TypeError as error:
        raise ValueError(
            f"keys {shorten(repr(sorted(values)))} do not fit tokenizer {d['name']!r}; give what "
            "to_dict returned"
        ) from error


def _unknown(name: Any) -> str:
    known = ", ".join(sorted(TOKENIZERS))
    return f"unknown tokenizer {shorten(repr(name))}; known: {known}, or a tokenizer.json"


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
