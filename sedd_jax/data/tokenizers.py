"""Tokenizers: text <-> int32 ids.

The diffusion's mask id is `vocab_size` and belongs to no tokenizer; `decode` shows it as "░".
A new tokenizer is a subclass of Tokenizer and a row in TOKENIZERS.
"""

import base64
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self, get_args, get_origin

import numpy as np

from sedd_jax.data import subwords
from sedd_jax.data.corpora import Corpus

PIECE = 1 << 10  # characters given to a library at once: memory, speed (x1.7) and exactness, below
BLANK = "\u2581"  # how SentencePiece writes a space
# A character of UTF-8 (Unicode 16, Table 3-7), or the longest part of one before a fault: what
# decoders replace by one U+FFFD.
CHARACTER = re.compile(
    rb"[\xC2-\xDF][\x80-\xBF]?"
    rb"|\xE0(?:[\xA0-\xBF][\x80-\xBF]?)?"
    rb"|\xED(?:[\x80-\x9F][\x80-\xBF]?)?"
    rb"|[\xE1-\xEF][\x80-\xBF]{0,2}"
    rb"|\xF0(?:[\x90-\xBF][\x80-\xBF]{0,2})?"
    rb"|[\xF1-\xF3][\x80-\xBF]{0,3}"
    rb"|\xF4(?:[\x80-\x8F][\x80-\xBF]{0,2})?"
    rb"|.",
    re.DOTALL,
)


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

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns `encode` of each text."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: np.ndarray, mask: str = "░") -> str:
        """Returns the text of `ids` [n]; ids >= vocab_size are shown as `mask`, each in its place.

        Runs between masks are decoded apart, so no character is joined across a mask.
        """
        ids = _check_ids(ids)
        return "".join(
            mask * len(run) if masked else self._decode_run(run)
            for run, masked in _runs(ids, ids >= self.vocab_size)
        )

    def pieces(self, ids: np.ndarray, mask: str = "░") -> list[str]:
        """Returns the text of each of ids [n], which joined is `decode(ids, mask)`.

        A character that several ids spell belongs to the last of them; the others are "".
        """
        ids = _check_ids(ids)
        pieces: list[str] = []
        for run, masked in _runs(ids, ids >= self.vocab_size):
            pieces += [mask] * len(run) if masked else self._run_pieces(run)
        return pieces

    def _decode_run(self, ids: np.ndarray) -> str:
        raise NotImplementedError

    def _run_pieces(self, ids: np.ndarray) -> list[str]:
        surfaces = self._surfaces
        return _characters([surfaces[i] for i in ids])

    @property
    def _surfaces(self) -> Sequence[bytes]:
        """The UTF-8 of each id, which may be a part of a character's."""
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

    def __getstate__(self) -> dict[str, Any]:
        """Pickles the fields alone: the libraries' objects are built anew where they are needed."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


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
        for split in corpus.streams:
            for document in corpus.plain(split):
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

    def _run_pieces(self, ids: np.ndarray) -> list[str]:
        return list(self._decode_run(ids))


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

    @cached_property
    def _surfaces(self) -> list[bytes]:
        return [bytes([i]) for i in range(256)]


@dataclass(frozen=True)
class Subwords(Tokenizer):
    """What gpt2 and bert share: a stored vocabulary and an object of the `tokenizers` library."""

    vocab: tuple[str, ...]  # token i at place i
    last: ClassVar[str]  # the token that ends a document
    source: ClassVar[subwords.Source]

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
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns the ids of each text; the library encodes their pieces in threads of its own."""
        pieces = [list(_pieces(text)) for text in texts]
        encoded = self._library._tokenizer.encode_batch_fast(
            list(itertools.chain.from_iterable(pieces)), add_special_tokens=False
        )
        rows = (np.asarray(encoding.ids, np.int32) for encoding in encoded)
        return [
            np.concatenate([np.zeros(0, np.int32), *itertools.islice(rows, len(parts))])
            for parts in pieces
        ]

    def _as_published(self, path: str) -> Self:
        """Returns itself; ValueError if `path` meant the published files and these are others."""
        if path in ("", self.source.published) and self.fingerprint() != self.source.fingerprint:
            raise ValueError(
                f"what was downloaded as {self.source.published!r} has fingerprint "
                f"{self.fingerprint()}, not {self.source.fingerprint}; delete it from the cache of "
                f"huggingface_hub, or set {subwords.PATH} to a folder"
            )
        return self


@dataclass(frozen=True)
class GPT2(Subwords):
    """GPT-2's byte-level BPE (Radford et al. 2019); documents end in <|endoftext|>."""

    merges: tuple[str, ...]  # "left right", in order of rank
    name: ClassVar[str] = "gpt2"
    last: ClassVar[str] = "<|endoftext|>"
    source: ClassVar[subwords.Source] = subwords.GPT2

    @classmethod
    def make(cls, path: str, corpus: Corpus) -> "GPT2":
        """Reads encoder.json or vocab.json and vocab.bpe or merges.txt, or tokenizer.json.

        `path` is their folder, the tokenizer.json itself, a hub id "owner/name@commit", or "" for
        the files that OpenAI published.
        """
        tokenizer = cls(*subwords.read_gpt2(path))._as_published(path)
        try:
            tokenizer.encode("a")  # builds the library's object, so that faults show now
        except ValueError as error:
            raise ValueError(f"{path!r}: {error}") from error
        from tokenizers.pre_tokenizers import ByteLevel

        missing = set(ByteLevel.alphabet()) - set(tokenizer.vocab)
        if missing:  # the library would drop them without a word
            raise ValueError(
                f"the vocabulary at {path!r} lacks {len(missing)} of the 256 bytes, "
                f"{min(missing)!r} first; give a byte-level vocabulary"
            )
        return tokenizer

    @cached_property
    def _library(self) -> Any:
        from tokenizers import ByteLevelBPETokenizer

        vocab = {token: i for i, token in enumerate(self.vocab)}
        merges = [tuple(line.split(" ")) for line in self.merges]
        try:
            return ByteLevelBPETokenizer(vocab, merges, add_prefix_space=False)
        except Exception as error:  # the Rust library raises plain Exception
            reason = " ".join(str(error).split())
            raise ValueError(
                f"the merges do not fit the vocabulary: {reason}; get both again"
            ) from error

    def _decode_run(self, ids: np.ndarray) -> str:
        return self._library.decode(ids.tolist(), skip_special_tokens=False)

    @cached_property
    def _surfaces(self) -> list[bytes]:
        """GPT-2 writes bytes that are no printable character of Latin-1 as U+0100 and up."""
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [byte for byte in range(256) if byte not in printable]
        table = {chr(byte): byte for byte in printable}
        table |= {chr(256 + n): byte for n, byte in enumerate(others)}
        return [
            bytes(table[c] for c in token) if table.keys() >= set(token) else token.encode()
            for token in self.vocab
        ]


@dataclass(frozen=True)
class Bert(Subwords):
    """BERT's lowercase WordPiece; documents end in [SEP]. Text outside the vocabulary is [UNK]."""

    name: ClassVar[str] = "bert"
    last: ClassVar[str] = "[SEP]"
    source: ClassVar[subwords.Source] = subwords.BERT

    @classmethod
    def make(cls, path: str, corpus: Corpus) -> "Bert":
        """Reads vocab.txt, a token a line, or tokenizer.json.

        `path` is its folder, the file itself, a hub id "owner/name@commit", or "" for the
        vocabulary of bert-base-uncased.
        """
        return cls(subwords.read_bert(path))._as_published(path)

    @cached_property
    def _library(self) -> Any:
        from tokenizers import BertWordPieceTokenizer

        return BertWordPieceTokenizer({token: i for i, token in enumerate(self.vocab)})

    def decode(self, ids: np.ndarray, mask: str = "░") -> str:
        """Returns words joined by spaces: case, accents and spacing of the text are lost."""
        ids = _check_ids(ids)
        words = [self.vocab[i] if i < self.vocab_size else mask for i in ids]
        return self._library._tokenizer.decoder.decode(words)

    def pieces(self, ids: np.ndarray, mask: str = "░") -> list[str]:
        ids = _check_ids(ids)
        words = [self.vocab[i] if i < self.vocab_size else mask for i in ids]
        decode = self._library._tokenizer.decoder.decode
        return [decode([word] if i == 0 else ["", word]) for i, word in enumerate(words)]


@dataclass(frozen=True)
class SentencePiece(Tokenizer):
    """A SentencePiece model (Kudo and Richardson 2018); documents end in its </s>.

    Pieces are decoded here rather than by the library, which drops a space at the start of each
    run of some models. Models trained here give back every text; others do as they were made to.
    """

    model: str  # base64 of the model's file
    name: ClassVar[str] = "sentencepiece"

    @classmethod
    def make(cls, path: str, corpus: Corpus) -> "SentencePiece":
        """Reads the .model file at `path` or, for "train:N", trains N pieces on split "train"."""
        documents = corpus.plain("train") if path.startswith("train:") else ()
        model = subwords.sentencepiece_model(path, documents)
        tokenizer = cls(base64.b64encode(model).decode("ascii"))
        try:
            tokenizer.encode("a")  # builds the library's object, so that faults show now
        except ValueError as error:
            raise ValueError(f"{path!r}: {error}") from error
        return tokenizer

    @cached_property
    def _library(self) -> Any:
        from sentencepiece import SentencePieceProcessor

        try:
            proto = base64.b64decode(self.model, validate=True)
            library = SentencePieceProcessor(model_proto=proto)
            size = library.get_piece_size()
        except (RuntimeError, ValueError) as error:
            raise ValueError("this is no SentencePiece model; copy it again") from error
        if size == 0:  # what an empty file gives
            raise ValueError("this SentencePiece model is empty; copy it again")
        if library.eos_id() < 0:
            raise ValueError("this SentencePiece model has no </s>; train it with eos_id >= 0")
        return library

    @property
    def vocab_size(self) -> int:
        return self._library.get_piece_size()

    @cached_property
    def separator(self) -> tuple[int, ...]:
        return (self._library.eos_id(),)

    @cached_property
    def special(self) -> tuple[int, ...]:
        return tuple(i for i in range(self.vocab_size) if self._library.is_control(i))

    @cached_property
    def _surfaces(self) -> list[bytes]:
        """The UTF-8 of each piece: one byte of a byte piece, U+FFFD of the unknown piece."""
        library, surfaces = self._library, []
        for i in range(self.vocab_size):
            piece = library.id_to_piece(i)
            if library.is_byte(i):
                surfaces.append(bytes([int(piece[1:-1], 16)]))  # <0x0A>
            elif library.is_unknown(i):
                surfaces.append("\ufffd".encode())
            else:
                surfaces.append(piece.replace(BLANK, " ").encode())
        return surfaces

    @cached_property
    def _adds_space(self) -> bool:
        return self._decode_run(self._library.encode("a")) == " a"

    @cached_property
    def _splits_at_spaces(self) -> bool:
        """Whether text cut before a space has the ids of the whole.

        True if the model leaves spaces as they are and no piece reaches across one.
        """
        text = " a  b "
        return self._decode_run(self._library.encode(text)) == text and not any(
            re.search(rb"[^ ] ", surface) for surface in self._surfaces
        )

    def encode(self, text: str) -> np.ndarray:
        """Returns the ids, int32 [n].

        The library adds up scores of the whole text in float32, so that the cut of a long text
        into pieces would suffer from rounding; it gets PIECE characters at a time.
        """
        if not self._splits_at_spaces:
            _utf8(text)
            return np.asarray(self._library.encode(text), np.int32)
        ids: list[int] = []
        for piece in _pieces(text):
            for i, part in enumerate(piece.split(BLANK)):  # to the library BLANK is a space
                ids += self._blank if i else []
                ids += self._library.encode(part)
        return np.asarray(ids, np.int32)

    @cached_property
    def _blank(self) -> list[int]:
        """The ids of BLANK as a character: its bytes, or the unknown piece where there are none."""
        return [self._library.piece_to_id(f"<0x{byte:02X}>") for byte in BLANK.encode()]

    def decode(self, ids: np.ndarray, mask: str = "░") -> str:
        text = super().decode(ids, mask)
        return text.removeprefix(" ") if self._adds_space else text

    def pieces(self, ids: np.ndarray, mask: str = "░") -> list[str]:
        pieces = super().pieces(ids, mask)
        first = next((i for i, piece in enumerate(pieces) if piece), None)
        if self._adds_space and first is not None:
            pieces[first] = pieces[first].removeprefix(" ")
        return pieces

    def _decode_run(self, ids: np.ndarray) -> str:
        return b"".join([self._surfaces[i] for i in ids]).decode("utf-8", errors="replace")


@dataclass(frozen=True)
class Ids(Tokenizer):
    """Text that is ids already, numbers with white space between; documents are joined by nothing.

    For a model whose own tokenizer is not here, and for sequences that are no text.
    """

    size: int
    name: ClassVar[str] = "ids"

    @classmethod
    def make(cls, path: str, corpus: Corpus) -> "Ids":
        """`path` is the number of ids."""
        if not re.fullmatch(r"[1-9][0-9]{0,8}", path):
            raise ValueError(f"{path!r} is no number of ids; give tokenizer 'ids' one, like 4096")
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
                raise ValueError(f"{_shorten(repr(word))} is no id in [0, {self.size}); mend it")
        return np.array([int(word) for word in words], np.int32)

    def decode(self, ids: np.ndarray, mask: str = "░") -> str:
        return "".join(self.pieces(ids, mask))

    def pieces(self, ids: np.ndarray, mask: str = "░") -> list[str]:
        words = [str(i) if i < self.size else mask for i in _check_ids(ids)]
        return [*words[:1], *(f" {word}" for word in words[1:])]


TOKENIZERS: dict[str, type[Tokenizer]] = {
    "bert": Bert,
    "bytes": Bytes,
    "characters": Characters,
    "gpt2": GPT2,
    "ids": Ids,
    "sentencepiece": SentencePiece,
    "text8": Text8,
}


def make_tokenizer(name: str, path: str, corpus: Corpus) -> Tokenizer:
    """Returns tokenizer `name`: from the files at `path`, or fitted on `corpus`; see its `make`."""
    return _lookup(name).make(path, corpus)


def named_tokenizer(name: str) -> Tokenizer:
    """Returns the tokenizer of "gpt2", "gpt2:FOLDER", "ids:4096", or of a run's tokenizer.json."""
    file = Path(name)
    if file.is_file():
        try:
            return tokenizer_from_dict(json.loads(file.read_text(encoding="utf-8")))
        except ValueError as error:
            raise ValueError(f"{name!r} is no tokenizer.json of a run: {error}") from error
    kind, _, path = name.partition(":")
    if kind == "characters" or path.startswith("train:"):
        raise ValueError(
            f"tokenizer {name!r} is fitted on a corpus, which is not here; name the tokenizer.json "
            "of a run"
        )
    return _lookup(kind).make(path, Corpus({}))


def tokenizer_from_dict(d: dict[str, Any]) -> Tokenizer:
    """Rebuilds the tokenizer whose `to_dict` gave `d`."""
    if not isinstance(d, dict) or "name" not in d:
        raise ValueError(f"{_shorten(repr(d))} names no tokenizer; give what to_dict returned")
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in d.items() if k != "name"}
    cls = _lookup(d["name"])
    kinds = {field.name: field.type for field in fields(cls)}
    for key in values.keys() & kinds.keys():
        if not _is_of(values[key], kinds[key]):
            raise ValueError(
                f"{key} {_shorten(repr(values[key]))} does not fit tokenizer {d['name']!r}; give "
                "what to_dict returned"
            )
    try:
        return cls(**values)
    except TypeError as error:
        raise ValueError(
            f"keys {_shorten(repr(sorted(values)))} do not fit tokenizer {d['name']!r}; give what "
            "to_dict returned"
        ) from error


def _is_of(value: Any, kind: Any) -> bool:
    """Whether a value is a str, an int, or a tuple[str, ...], as the field's type says."""
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(type(v) is get_args(kind)[0] for v in value)
    return type(value) is kind


def _lookup(name: Any) -> type[Tokenizer]:
    if not isinstance(name, str) or name not in TOKENIZERS:
        raise ValueError(
            f"unknown tokenizer {_shorten(repr(name))}; known: {', '.join(sorted(TOKENIZERS))}"
        )
    return TOKENIZERS[name]


def _check_ids(ids: Any) -> np.ndarray:
    ids = np.asarray(ids)
    if ids.size == 0:
        ids = ids.astype(np.int64)  # an empty list is float64 to numpy
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer) or (ids < 0).any():
        raise ValueError(f"ids must be one row of integers >= 0, not {_shorten(repr(ids))}")
    return ids.astype(np.int64)


def _runs(ids: np.ndarray, is_masked: np.ndarray) -> Iterator[tuple[np.ndarray, bool]]:
    """Yields the longest runs of ids that are all masked or all clean, and which of the two."""
    edges = np.flatnonzero(np.diff(is_masked)) + 1
    for run, masked in zip(np.split(ids, edges), np.split(is_masked, edges)):
        yield run, bool(masked.any())


def _characters(surfaces: Iterable[bytes]) -> list[str]:
    """The characters that end in each of these parts of UTF-8; U+FFFD where it is broken."""
    pieces: list[str] = []
    for is_ascii, run in itertools.groupby(surfaces, lambda part: part > b"" and part.isascii()):
        if is_ascii:  # no part of a longer character
            pieces += [part.decode() for part in run]
            continue
        parts = list(run)
        ends = np.cumsum([len(part) for part in parts])
        own = [""] * len(parts)
        for character in CHARACTER.finditer(b"".join(parts)):
            last = int(np.searchsorted(ends, character.end() - 1, side="right"))
            own[last] += character.group().decode("utf-8", errors="replace")
        pieces += own
    return pieces


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


def _utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"half a surrogate pair at position {error.start} of {_shorten(repr(text))}; remove it"
        ) from error


def _pieces(text: str) -> Iterator[str]:
    """Yields `text` in pieces of about PIECE characters.

    A piece ends between a printed character and a space or newline. There both GPT-2's and BERT's
    pre-tokenizers end a word anyway, so the ids are those of the whole text.
    """
    _utf8(text)
    boundary = re.compile(r"(?<=\S)(?=[ \n])")
    start = 0
    while start < len(text):
        found = boundary.search(text, start + PIECE)
        stop = found.start() if found else len(text)
        yield text[start:stop]
        start = stop


def _shorten(text: str, most: int = 60) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 3] + "..."
