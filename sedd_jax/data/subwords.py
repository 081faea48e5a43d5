"""GPT-2's byte-level BPE and BERT's WordPiece, by the `tokenizers` library.

Their stored state is the library's own JSON. The library is imported by the call that needs it.
"""

import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np

from sedd_jax import hub
from sedd_jax.data.corpora import Corpus
from sedd_jax.data.tokenizer import PATH, Tokenizer, check_ids, cut
from sedd_jax.files import refuse_pointer_file

# What a file may say in place of the library's default without a change of the ids.
EQUIVALENT = {
    "dropout": (0.0,),
    "continuing_subword_prefix": (None,),
    "end_of_word_suffix": (None,),
    "strip_accents": (True,),  # None: as lowercase says, which is True
}
# What changes no ids: offsets, and what becomes of an unknown byte, which no vocabulary here has.
IRRELEVANT = ("vocab", "merges", "trim_offsets", "fuse_unk", "byte_fallback")
FAULTS = (LookupError, ValueError, TypeError, AttributeError, OSError)  # of a file's content


class Source(NamedTuple):
    """How a tokenizer's vocabulary is stored, and where the published one is."""

    published: str  # hub id, owner/name@commit
    fingerprint: str  # of the tokenizer that the published files make
    files: tuple[tuple[str, ...], ...]  # the names each file may have, the hub's last
    needed: tuple[str, ...]  # tokens that the vocabulary must hold


@dataclass(frozen=True)
class Subwords(Tokenizer):
    """A tokenizer of the `tokenizers` library.

    `make` reads the files at `path`: their folder, a tokenizer.json, a hub id
    "owner/name@commit", or "" for the published ones.
    """

    library_json: str  # Tokenizer.to_str of the library
    end_of_document: ClassVar[str]
    source: ClassVar[Source]

    @classmethod
    def make(cls, path: str, corpus: Corpus) -> Self:
        files = _locate(path, cls.source)
        for file in files:
            refuse_pointer_file(file)
        try:
            vocabulary = cls._read(files)
            for token in cls.source.needed:
                if token not in vocabulary["vocab"]:
                    raise ValueError(f"it lacks {token}")
        except FAULTS as error:
            raise ValueError(
                f"cannot read {str(files[0])!r} as a vocabulary: {_fault(error)}; download it again"
            ) from error
        try:
            tokenizer = cls.from_vocabulary(**vocabulary)
        except ValueError as error:
            raise ValueError(f"{path!r}: {error}") from error
        expected, fingerprint = cls.source.fingerprint, tokenizer.fingerprint()
        if path in ("", cls.source.published) and fingerprint != expected:
            raise ValueError(
                f"what was downloaded as {cls.source.published!r} has fingerprint {fingerprint}, "
                f"not {expected}; delete it from the cache of huggingface_hub, or set {PATH} to a "
                "folder"
            )
        return tokenizer

    @classmethod
    def from_vocabulary(cls, vocab: Sequence[str]) -> Self:
        """Returns the tokenizer in which token i of `vocab` has id i."""
        raise NotImplementedError

    @classmethod
    def _read(cls, files: list[Path]) -> dict[str, tuple[str, ...]]:
        """Returns the arguments of `from_vocabulary`; one of FAULTS if the content does not fit."""
        raise NotImplementedError

    @classmethod
    def _parse(cls, text: str) -> dict[str, tuple[str, ...]]:
        """Returns the arguments of `from_vocabulary` of the library's JSON.

        One of FAULTS if a setting would give other ids than that constructor. Absent settings
        have their defaults: published files are older than some of them.
        """
        document = json.loads(text)
        expected = json.loads(cls.from_vocabulary(cls.source.needed).library_json)
        for section in ("normalizer", "pre_tokenizer", "model"):
            content = document.get(section) or {"type": None}
            for key, value in (expected[section] or {"type": None}).items():
                other = content.get(key, value)
                if key not in IRRELEVANT and other not in (value, *EQUIVALENT.get(key, ())):
                    raise ValueError(f"its {section}.{key} is {other!r}, not {value!r}")
        model = document["model"]
        ids = dict(model["vocab"])
        for token in document.get("added_tokens") or ():
            if not token.get("special"):
                raise ValueError(f"it matches {token['content']!r} ahead of the vocabulary")
            if ids.setdefault(token["content"], token["id"]) != token["id"]:
                raise ValueError(f"it gives {token['content']!r} two ids")
        vocabulary = {"vocab": _in_order(ids)}
        if "merges" in expected["model"]:  # older files hold "left right" in place of a pair
            merges = (pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"])
            vocabulary["merges"] = tuple(merges)
        return vocabulary

    @cached_property
    def _vocabulary(self) -> dict[str, tuple[str, ...]]:
        try:
            return self._parse(self.library_json)
        except FAULTS as error:
            raise ValueError(
                f"the stored tokenizer {self.name!r} cannot be read: {_fault(error)}; copy it again"
            ) from error

    @property
    def _tokens(self) -> tuple[str, ...]:
        return self._vocabulary["vocab"]

    @cached_property
    def _library(self) -> Any:
        from tokenizers import Tokenizer as Library

        assert self._vocabulary  # its errors are better than the library's
        library = Library.from_str(self.library_json)
        library.no_truncation()
        library.no_padding()
        return library

    def fingerprint(self) -> str:
        """Returns the sha256, in hex, of name, vocabulary and merges.

        Not of the library's JSON, whose other settings have been checked and whose text differs
        between versions of the library.
        """
        identity = {"name": self.name, **self._vocabulary}
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    @property
    def vocab_size(self) -> int:
        return len(self._tokens)

    @cached_property
    def separator(self) -> tuple[int, ...]:
        return (self._tokens.index(self.end_of_document),)

    @property
    def special(self) -> tuple[int, ...]:
        return self.separator

    def encode(self, text: str) -> np.ndarray:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns the ids of each text; the library encodes their pieces in threads of its own."""
        pieces = [list(cut(text)) for text in texts]
        encoded = self._library.encode_batch_fast(
            list(itertools.chain.from_iterable(pieces)), add_special_tokens=False
        )
        rows = (np.asarray(encoding.ids, np.int32) for encoding in encoded)
        return [
            np.concatenate([np.zeros(0, np.int32), *itertools.islice(rows, len(parts))])
            for parts in pieces
        ]


@dataclass(frozen=True)
class GPT2(Subwords):
    """GPT-2's byte-level BPE (Radford et al. 2019); documents end in <|endoftext|>.

    Its files: encoder.json or vocab.json and vocab.bpe or merges.txt, or tokenizer.json.
    """

    name: ClassVar[str] = "gpt2"
    end_of_document: ClassVar[str] = "<|endoftext|>"
    source: ClassVar[Source] = Source(
        published="openai-community/gpt2@607a30d783dfa663caf39e06633721c8d4cfcd7e",
        fingerprint="3fdf29b9e9eaea666fda7ec10b50b907abed940b8b24165223c5c0f1e9403774",
        files=(("encoder.json", "vocab.json"), ("vocab.bpe", "merges.txt")),
        needed=("<|endoftext|>",),
    )

    @classmethod
    def make(cls, path: str, corpus: Corpus) -> Self:
        from tokenizers.pre_tokenizers import ByteLevel

        tokenizer = super().make(path, corpus)
        missing = set(ByteLevel.alphabet()) - set(tokenizer._tokens)
        if missing:  # the library would drop them without a word
            raise ValueError(
                f"the vocabulary at {path!r} lacks {len(missing)} of the 256 bytes, "
                f"{min(missing)!r} first; give a byte-level vocabulary"
            )
        return tokenizer

    @classmethod
    def from_vocabulary(cls, vocab: Sequence[str], merges: Sequence[str] = ()) -> Self:
        """`merges` are "left right", in order of rank."""
        from tokenizers import ByteLevelBPETokenizer

        ids = {token: i for i, token in enumerate(vocab)}
        pairs = [tuple(line.split(" ")) for line in merges]
        try:
            return cls(ByteLevelBPETokenizer(ids, pairs, add_prefix_space=False).to_str())
        except Exception as error:  # the Rust library raises plain Exception
            reason = " ".join(str(error).split())
            raise ValueError(
                f"the merges do not fit the vocabulary: {reason}; get both again"
            ) from error

    @classmethod
    def _read(cls, files: list[Path]) -> dict[str, tuple[str, ...]]:
        texts = [file.read_text(encoding="utf-8") for file in files]
        if len(files) == 1:
            return cls._parse(texts[0])
        merges = (line for line in texts[1].split("\n") if not line.startswith("#version"))
        return {"vocab": _in_order(json.loads(texts[0])), "merges": tuple(filter(None, merges))}

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
            for token in self._tokens
        ]


@dataclass(frozen=True)
class Bert(Subwords):
    """BERT's lowercase WordPiece; documents end in [SEP]. Text outside the vocabulary is [UNK].

    Its file: vocab.txt, a token a line, or tokenizer.json.
    """

    name: ClassVar[str] = "bert"
    end_of_document: ClassVar[str] = "[SEP]"
    source: ClassVar[Source] = Source(
        published="google-bert/bert-base-uncased@86b5e0934494bd15c9632b12f734a8a67f723594",
        fingerprint="383dfd746f1a4f5bcca4903226d5fc11a219e93b152f3052da1b329040a75f91",
        files=(("vocab.txt",),),
        needed=("[UNK]", "[SEP]", "[CLS]"),
    )

    @classmethod
    def from_vocabulary(cls, vocab: Sequence[str]) -> Self:
        from tokenizers import BertWordPieceTokenizer

        try:
            return cls(BertWordPieceTokenizer({t: i for i, t in enumerate(vocab)}).to_str())
        except TypeError as error:
            raise ValueError(f"the vocabulary is not BERT's: {error}; get it again") from error

    @classmethod
    def _read(cls, files: list[Path]) -> dict[str, tuple[str, ...]]:
        text = files[0].read_text(encoding="utf-8")
        if files[0].suffix == ".json":
            return cls._parse(text)
        tokens = tuple(text.removesuffix("\n").split("\n"))
        if len(set(tokens)) != len(tokens):
            raise ValueError("it holds a token twice")
        return {"vocab": tokens}

    def decode(self, ids: np.ndarray, mask: str = "░") -> str:
        """Returns words joined by spaces: case, accents and spacing of the text are lost."""
        return self._library.decoder.decode(self._words(ids, mask))

    def pieces(self, ids: np.ndarray, mask: str = "░") -> list[str]:
        decode = self._library.decoder.decode
        words = self._words(ids, mask)
        return [decode([word] if i == 0 else ["", word]) for i, word in enumerate(words)]

    def _words(self, ids: np.ndarray, mask: str) -> list[str]:
        tokens = self._tokens
        return [tokens[i] if i < len(tokens) else mask for i in check_ids(ids)]


def _in_order(ids: dict[str, int]) -> tuple[str, ...]:
    tokens = tuple(sorted(ids, key=ids.__getitem__))
    if [ids[token] for token in tokens] != list(range(len(tokens))):
        raise ValueError("its ids are not 0 .. n - 1")
    return tokens


def _fault(error: Exception) -> str:
    return f"it has no {error}" if isinstance(error, LookupError) else str(error)


def _locate(path: str, source: Source) -> list[Path]:
    """Returns the files of source.files at `path`, or one tokenizer.json in their place."""
    folder = Path(path)
    if path and folder.is_file():
        return [folder]
    if not path or not folder.is_dir():
        return _download(path or source.published, source)
    files = []
    for names in source.files:
        present = [folder / name for name in names if (folder / name).is_file()]
        if not present and (folder / "tokenizer.json").is_file():
            return [folder / "tokenizer.json"]
        if not present:
            raise ValueError(
                f"no {' or '.join(names)} in {path!r}, and no tokenizer.json; "
                f"set {PATH} to their folder"
            )
        files.append(present[0])
    return files


def _download(name: str, source: Source) -> list[Path]:
    """Returns the files of hub id `name`, from the hub or the cache it keeps."""
    parsed = hub.parse(name)
    if parsed is None:
        raise ValueError(
            f"no folder or file at {name!r}; set {PATH} to one, or to a hub id owner/name@commit"
        )
    repository, revision = parsed
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
