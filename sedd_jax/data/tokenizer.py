"""What a tokenizer is: text <-> int32 ids, and what all of them share.

The diffusion's mask id is `vocab_size` and belongs to no tokenizer; `decode` shows it as "░".
"""

import codecs
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

import numpy as np

from sedd_jax.data.corpora import Corpus

PATH = "data.tokenizer_path (sedd-prepare: --tokenizer_path)"  # the setting, for errors
PIECE = 1 << 10  # characters encoded at once: memory, speed (x1.7) and exactness, see `cut`


@dataclass(frozen=True)
class Tokenizer:
    """The interface. Its dataclass fields are all that determines the ids."""

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
        """Returns the text of `ids` [n]; ids >= vocab_size are shown as `mask`.

        Runs between masks are decoded apart, so no character is joined across a mask.
        """
        ids = check_ids(ids)
        return "".join(
            mask * len(run) if masked else self._decode_run(run)
            for run, masked in _runs(ids, ids >= self.vocab_size)
        )

    def pieces(self, ids: np.ndarray, mask: str = "░") -> list[str]:
        """Returns the text of each of ids [n], which joined is `decode(ids, mask)`.

        A character that several ids spell belongs to the last of them; the others are "".
        """
        ids = check_ids(ids)
        pieces: list[str] = []
        for run, masked in _runs(ids, ids >= self.vocab_size):
            pieces += [mask] * len(run) if masked else self._run_pieces(run)
        return pieces

    def _decode_run(self, ids: np.ndarray) -> str:
        raise NotImplementedError

    def _run_pieces(self, ids: np.ndarray) -> list[str]:
        surfaces = self._surfaces
        return _split_characters([surfaces[i] for i in ids])

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
        ids = check_ids(ids)
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


def check_ids(ids: Any) -> np.ndarray:
    ids = np.asarray(ids)
    if ids.size == 0:
        ids = ids.astype(np.int64)  # an empty list is float64 to numpy
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer) or (ids < 0).any():
        raise ValueError(f"ids must be one row of integers >= 0, not {shorten(repr(ids))}")
    return ids.astype(np.int64)


def _runs(ids: np.ndarray, is_masked: np.ndarray) -> Iterator[tuple[np.ndarray, bool]]:
    """Yields the longest runs of ids that are all masked or all clean, and which of the two."""
    edges = np.flatnonzero(np.diff(is_masked)) + 1
    for run, masked in zip(np.split(ids, edges), np.split(is_masked, edges)):
        yield run, bool(masked.any())


def _split_characters(surfaces: Iterable[bytes]) -> list[str]:
    """The characters that end in each of these parts of UTF-8; U+FFFD where it is broken."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    pieces: list[str] = []
    last = 0  # the part that the bytes pending in the decoder end in
    for i, part in enumerate(surfaces):
        pieces.append("")
        if part.isascii() and not decoder.getstate()[0]:
            pieces[i] = part.decode()
            continue
        for byte in part:
            is_pending = decoder.getstate()[0] != b""
            text = decoder.decode(bytes([byte]))
            if is_pending and text and (len(text) > 1 or decoder.getstate()[0]):
                pieces[last] += text[0]  # U+FFFD: this byte does not go on what was pending
                text = text[1:]
            pieces[i] += text
            last = i
    if pieces:
        pieces[last] += decoder.decode(b"", final=True)
    return pieces


def to_utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"half a surrogate pair at position {error.start} of {shorten(repr(text))}; remove it"
        ) from error


def cut(text: str) -> Iterator[str]:
    """Yields `text` in pieces of about PIECE characters.

    A piece ends between a printed character and a space or newline. There both GPT-2's and BERT's
    pre-tokenizers end a word anyway, so the ids are those of the whole text.
    """
    to_utf8(text)
    boundary = re.compile(r"(?<=\S)(?=[ \n])")
    start = 0
    while start < len(text):
        match = boundary.search(text, start + PIECE)
        stop = match.start() if match else len(text)
        yield text[start:stop]
        start = stop


def shorten(text: str, limit: int = 60) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 3] + "..."
