"""Tokenizers of the `tokenizers` library: that of any tokenizer.json, GPT-2's and BERT's.

Their stored state is the library's own JSON. The library is imported by the call that needs it.
"""

import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from sedd_jax.data.corpora import Corpus
from sedd_jax.data.tokenizer import PATH, Tokenizer, cut, shorten, to_utf8
from sedd_jax.host import hub
from sedd_jax.host.files import load_json, local_path, refuse_pointer_file

WHOLE, CONFIG = "tokenizer.json", "tokenizer_config.json"
# Tokens that end a text, most specific first; CONFIG's eos_token goes before them.
ENDS = ("<|endoftext|>", "<|end_of_text|>", "<｜end▁of▁sentence｜>", "<eos>", "</s>", "[SEP]")
# Settings that change no ids: offsets, and what becomes of bytes that every vocabulary here has.
IRRELEVANT = ("vocab", "merges", "trim_offsets", "fuse_unk", "byte_fallback")


@dataclass(frozen=True)
class LibraryTokenizer(Tokenizer):
    """Any tokenizer.json (Llama's, Qwen's, NeoX's, RoBERTa's), with the ids the library gives.

    As in the library, special tokens written out in a text are those tokens. Documents end in
    the eos_token of a tokenizer_config.json beside it, or in the first of ENDS.
    """

    library_json: str  # of a tokenizer.json, or of the library's Tokenizer.to_str
    end_of_document: str = ENDS[0]
    name: ClassVar[str] = "json"
    published: ClassVar[str] = ""  # hub id, owner/name@commit
    files: ClassVar[tuple[tuple[str, ...], ...]] = ()  # of a vocabulary: the names each may have

    @classmethod
    def make(cls, path: str, corpus: Corpus | None) -> "LibraryTokenizer":
        """Reads a tokenizer.json or, where there is none beside them, the vocabulary's files.

        path is a folder, one of its files, a hub id "owner/name@commit", or "" for what is
        published. GPT-2 and BERT give a LibraryTokenizer where a tokenizer.json has settings of
        its own, or another token ends a document.
        """
        from tokenizers.pre_tokenizers import ByteLevel

        files = cls._locate(path or cls.published)
        try:
            for file in files:
                refuse_pointer_file(file)
            tokenizer = cls._read(files)
            tokens = {*tokenizer._tokens}
            end = _end_of_document(files[0].parent, cls.end_of_document, tokens)
            missing = set(ByteLevel.alphabet()) - tokens
            if missing and "ByteLevel" in str(tokenizer._library.decoder):
                raise ValueError(  # the library would drop them without a word
                    f"it lacks {len(missing)} of the 256 bytes, {min(missing)!r} first; give a "
                    "byte-level vocabulary"
                )
        except (ValueError, OSError) as error:
            raise ValueError(f"cannot read {str(files[0])!r} as a tokenizer: {error}") from error
        if end == tokenizer.end_of_document:
            return tokenizer
        return LibraryTokenizer(tokenizer.library_json, end)

    @classmethod
    def _read(cls, files: list[Path]) -> "LibraryTokenizer":
        document = load_json(files[0].read_bytes(), files[0].name)
        if "name" in document:
            raise ValueError("it is a run's; give the file itself as tokenizer")
        return LibraryTokenizer(json.dumps(document))

    @classmethod
    def _locate(cls, path: str) -> list[Path]:
        """Returns the tokenizer.json at `path` or, where there is none, the vocabulary's files."""
        if not path:
            raise ValueError(
                f"tokenizer {cls.name!r} needs {PATH}; set it to a {WHOLE} or to its folder"
            )
        folder, is_vocabulary = local_path(path), False
        if folder.is_file():
            is_vocabulary = any(folder.name in names for names in cls.files)
            if not is_vocabulary:
                return [folder]
            folder = folder.parent
        elif not folder.is_dir():
            folder = cls._download(path)
        if not is_vocabulary and (folder / WHOLE).is_file():
            return [folder / WHOLE]
        present = [[folder / n for n in names if (folder / n).is_file()] for names in cls.files]
        if present and all(present):
            return [files[0] for files in present]
        missing = [" or ".join(n) for n, files in zip(cls.files, present) if not files]
        raise ValueError(
            f"no {' and no '.join([WHOLE, *missing])} in {path!r}; set {PATH} to their folder"
        )

    @classmethod
    def _download(cls, name: str) -> Path:
        """Returns the folder of hub id `name` with its files, from the hub or the hub's cache."""
        parsed = hub.parse(name)
        if parsed is None:
            raise ValueError(
                f"no folder or file at {name!r}; set {PATH} to a {WHOLE}, to its folder or to a "
                "hub id owner/name@commit"
            )
        repository, revision = parsed
        if revision is None or not hub.COMMIT.fullmatch(revision):
            raise ValueError(
                f"{name!r} is not a folder or file here, and as a hub id it pins no commit; write "
                f"{repository}@ and the commit's 40 hex digits"
            )
        files = [names[0] for names in cls.files]
        try:
            if name == cls.published:  # known to be all, so a cache that has it needs no network
                return hub.download(repository, revision, files)
            return hub.download(repository, revision, [], optional=[WHOLE, CONFIG, *files])
        except ValueError as error:
            raise ValueError(f"{PATH}: {error}") from error

    @cached_property
    def _library(self) -> Any:
        from tokenizers import Tokenizer as Library

        try:
            library = Library.from_str(self.library_json)
        except Exception as error:  # the Rust library raises plain Exception
            raise ValueError(
                f"it is not a {WHOLE} of the `tokenizers` library: {_reason(error)}; get it again "
                "or give another"
            ) from error
        library.no_truncation()
        library.no_padding()
        if hasattr(library.model, "dropout"):
            library.model.dropout = None  # it would draw other ids at each call
        return library

    @cached_property
    def _document(self) -> dict[str, Any]:
        """The library's JSON with all settings, those with default values too."""
        return json.loads(self._library.to_str())

    @cached_property
    def _tokens(self) -> list[str]:
        """The token of each id; "" where the file leaves out an id."""
        ids = self._library.get_vocab(with_added_tokens=True)
        tokens = [""] * (max(ids.values(), default=-1) + 1)
        for token, i in ids.items():
            tokens[i] = token
        return tokens

    def with_special(self, tokens: Sequence[str]) -> "LibraryTokenizer":
        """Returns the tokenizer with special tokens that have the ids after its own."""
        library = type(self._library).from_str(self.library_json)
        library.add_special_tokens(list(tokens))
        return LibraryTokenizer(library.to_str(), self.end_of_document)

    @property
    def vocab_size(self) -> int:
        return len(self._tokens)

    @cached_property
    def separator(self) -> tuple[int, ...]:
        end = self._library.token_to_id(self.end_of_document)
        if end is None:
            raise ValueError(
                f"the vocabulary lacks {self.end_of_document!r}, which ends documents; get the "
                "tokenizer again"
            )
        return (end,)

    @cached_property
    def special(self) -> tuple[int, ...]:
        added = self._library.get_added_tokens_decoder().items()
        return tuple(sorted({*self.separator, *(i for i, token in added if token.special)}))

    def encode(self, text: str) -> np.ndarray:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns the ids of each text; the library encodes their pieces in threads of its own."""
        pieces = [self._cut(text) for text in texts]
        try:
            encoded = self._library.encode_batch_fast(
                list(itertools.chain.from_iterable(pieces)), add_special_tokens=False
            )
        except Exception as error:  # the Rust library raises plain Exception
            raise ValueError(
                f"tokenizer {self.name!r} cannot encode the text: {_reason(error)}; give it an "
                "unknown token, or choose tokenizer 'gpt2'"
            ) from error
        rows = (np.asarray(encoding.ids, np.int32) for encoding in encoded)
        return [
            np.concatenate([np.zeros(0, np.int32), *itertools.islice(rows, len(parts))])
            for parts in pieces
        ]

    def _cut(self, text: str) -> list[str]:
        to_utf8(text)
        return [text]  # where such a tokenizer may be cut is not known

    def _decode(self, ids: Sequence[int], mask: str) -> str:
        tokens, size = self._tokens, self.vocab_size
        words = [tokens[i] if i < size else mask for i in ids]
        decoder = self._library.decoder
        return " ".join(words) if decoder is None else decoder.decode(words)


@dataclass(frozen=True)
class Subwords(LibraryTokenizer):
    """A published tokenizer, which its vocabulary determines however that is stored."""

    fingerprint_of_published: ClassVar[str] = ""
    added_tokens: ClassVar[tuple[str, ...]] = ()  # of its tokenizer.json; also a vocabulary

    @classmethod
    def make(cls, path: str, corpus: Corpus | None) -> LibraryTokenizer:
        tokenizer = super().make(path, corpus)
        if path in ("", cls.published):
            fingerprint = tokenizer.fingerprint()
            if fingerprint != cls.fingerprint_of_published:
                raise ValueError(
                    f"what was downloaded as {cls.published!r} has fingerprint {fingerprint}, not "
                    f"{cls.fingerprint_of_published}; delete it from the cache of "
                    f"huggingface_hub, or set {PATH} to a folder"
                )
        return tokenizer

    @classmethod
    def from_vocabulary(cls, vocab: Sequence[str]) -> Self:
        """Returns the tokenizer in which token i of `vocab` has id i."""
        raise NotImplementedError

    @classmethod
    def _read(cls, files: list[Path]) -> LibraryTokenizer:
        """The files' tokenizer: a cls if a tokenizer.json adds no settings to the vocabulary."""
        if len(files) == len(cls.files) and files[-1].suffix != ".json":
            return cls._read_vocabulary(files)
        whole = super()._read(files)
        added = {token["content"] for token in whole._document["added_tokens"]}
        standard = cls.from_vocabulary(cls.added_tokens)
        if (
            added <= {*cls.added_tokens}
            and "" not in whole._tokens
            and _settings(whole) == _settings(standard)
        ):
            return cls.from_vocabulary(**_vocabulary(whole))
        return whole

    @classmethod
    def _read_vocabulary(cls, files: list[Path]) -> Self:
        raise NotImplementedError

    def fingerprint(self) -> str:
        """Returns the sha256, in hex, of name, vocabulary and merges.

        Not of the library's JSON, whose text differs between versions of the library.
        """
        identity = {"name": self.name, **_vocabulary(self)}
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    @property
    def special(self) -> tuple[int, ...]:
        return self.separator  # BERT's [UNK] stands for text

    def _cut(self, text: str) -> list[str]:
        return list(cut(text))


@dataclass(frozen=True)
class GPT2(Subwords):
    """GPT-2's byte-level BPE (Radford et al. 2019); documents end in <|endoftext|>.

    As in the original, <|endoftext|> written out in a text is characters like any others.
    """

    name: ClassVar[str] = "gpt2"
    published: ClassVar[str] = "openai-community/gpt2@607a30d783dfa663caf39e06633721c8d4cfcd7e"
    fingerprint_of_published: ClassVar[str] = (
        "3fdf29b9e9eaea666fda7ec10b50b907abed940b8b24165223c5c0f1e9403774"
    )
    files: ClassVar[tuple[tuple[str, ...], ...]] = (
        ("vocab.json", "encoder.json"),
        ("merges.txt", "vocab.bpe"),
    )
    added_tokens: ClassVar[tuple[str, ...]] = ("<|endoftext|>",)

    @classmethod
    def from_vocabulary(cls, vocab: Sequence[str], merges: Sequence[str] = ()) -> Self:
        """Each of `merges` is two tokens with a space between; the first are merged first."""
        from tokenizers import ByteLevelBPETokenizer

        ids = {token: i for i, token in enumerate(vocab)}
        pairs = [tuple(line.split(" ")) for line in merges]
        try:
            return cls(ByteLevelBPETokenizer(ids, pairs, add_prefix_space=False).to_str())
        except Exception as error:  # the Rust library raises plain Exception
            raise ValueError(
                f"the merges do not fit the vocabulary: {_reason(error)}; get both again"
            ) from error

    @classmethod
    def _read_vocabulary(cls, files: list[Path]) -> Self:
        ids = load_json(files[0].read_bytes(), files[0].name)
        tokens = {i: token for token, i in ids.items() if type(i) is int}
        vocab = [tokens[i] for i in range(len(ids)) if i in tokens]
        if len(vocab) != len(ids):
            raise ValueError("its ids are not 0 .. n - 1; get it again")
        lines = files[1].read_text(encoding="utf-8").split("\n")
        merges = [line for line in lines if line and not line.startswith("#version")]
        return cls.from_vocabulary(vocab, merges)


@dataclass(frozen=True)
class Bert(Subwords):
    """BERT's lowercase WordPiece; documents end in [SEP]. Text outside the vocabulary is [UNK].

    Decoded, words are joined by spaces: case, accents and spacing of the text are lost.
    """

    end_of_document: str = "[SEP]"
    name: ClassVar[str] = "bert"
    published: ClassVar[str] = (
        "google-bert/bert-base-uncased@86b5e0934494bd15c9632b12f734a8a67f723594"
    )
    fingerprint_of_published: ClassVar[str] = (
        "383dfd746f1a4f5bcca4903226d5fc11a219e93b152f3052da1b329040a75f91"
    )
    files: ClassVar[tuple[tuple[str, ...], ...]] = (("vocab.txt",),)
    added_tokens: ClassVar[tuple[str, ...]] = ("[UNK]", "[SEP]", "[CLS]", "[PAD]", "[MASK]")

    @classmethod
    def from_vocabulary(cls, vocab: Sequence[str]) -> Self:
        from tokenizers import BertWordPieceTokenizer

        for token in ("[UNK]", "[SEP]", "[CLS]"):
            if token not in vocab:
                raise ValueError(f"the vocabulary is not BERT's: it lacks {token}; get it again")
        return cls(BertWordPieceTokenizer({t: i for i, t in enumerate(vocab)}).to_str())

    @classmethod
    def _read_vocabulary(cls, files: list[Path]) -> Self:
        tokens = files[0].read_text(encoding="utf-8").removesuffix("\n").split("\n")
        if len({*tokens}) != len(tokens):
            raise ValueError("it holds a token twice; get it again")
        return cls.from_vocabulary(tokens)


def _vocabulary(tokenizer: LibraryTokenizer) -> dict[str, Sequence[str]]:
    """The arguments of `from_vocabulary`; older versions of the library join merges' pairs."""
    vocabulary = {"vocab": tokenizer._tokens}
    if "merges" in tokenizer._document["model"]:
        merges = tokenizer._document["model"]["merges"]
        vocabulary["merges"] = [p if isinstance(p, str) else " ".join(p) for p in merges]
    return vocabulary


def _settings(tokenizer: LibraryTokenizer) -> dict[str, dict[str, Any]]:
    """What decides the ids besides the vocabulary; null and "" mean the same there."""
    parts = {
        name: tokenizer._document[name] or {} for name in ("normalizer", "pre_tokenizer", "model")
    }
    return {
        name: {k: v for k, v in part.items() if k not in IRRELEVANT and v not in (None, "")}
        for name, part in parts.items()
    }


def _end_of_document(folder: Path, usual: str, tokens: set[str]) -> str:
    """The token that ends a document: as CONFIG says, or the first of `usual` and ENDS."""
    file, end = folder / CONFIG, None
    if file.is_file():
        refuse_pointer_file(file)
        end = load_json(file.read_bytes(), CONFIG).get("eos_token")
        end = end.get("content") if isinstance(end, dict) else end
    ends = (str(end),) if end else (usual, *ENDS)
    for token in ends:
        if token in tokens:
            return token
    raise ValueError(
        f"no end-of-text token: the vocabulary has none of {', '.join(dict.fromkeys(ends))}; name "
        f'one in a {CONFIG} beside it: {{"eos_token": "..."}}'
    )


def _reason(error: Exception) -> str:
    return shorten(str(error), 200)
