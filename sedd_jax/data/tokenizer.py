"""What a tokenizer is: text <-> int32 ids, and what all of them share.

The diffusion's mask id is `vocab_size` and belongs to no tokenizer; `decode` shows it as "░".
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from sedd_jax.data.corpora import Corpus

PATH = "data.tokenizer_path (in a command --tokenizer_path)"  # the setting, for errors
CONTEXT = 16  # ids; a character is spelled by 4 at most
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

        No character is joined across a mask; a broken one is U+FFFD.
        """
        return self._decode(check_ids(ids).tolist(), mask)

    def pieces(self, ids: np.ndarray, mask: str = "░") -> list[str]:
        """Returns the text of each of ids [n], which joined is `decode(ids, mask)`.

        A character that several ids spell belongs to the last of them; the others are "". One that
        stays broken belongs to the first.
        """
        row = check_ids(ids).tolist()
        text, singles, size = self._decode(row, mask), self._singles, self.vocab_size
        pieces: list[str] = []
        shown = 0  # characters of the text in pieces
        first, skip = 0, 0  # row[first:] is decoded at each id; `skip` of its characters are shown
        for i, token in enumerate(row):
            key = min(token, size), mask
            if key not in singles:
                singles[key] = self._decode([token], mask)
            piece = single = singles[key]
            is_complete = first >= i - 1 and single and "\ufffd" not in single
            if not (is_complete and text.startswith(single, shown)):
                part = self._decode(row[first : i + 1], mask)
                new = part[skip:]
                piece = os.path.commonprefix([new, text[shown : shown + len(new)]])
                is_complete = piece == new and not part.endswith("\ufffd")
                if not is_complete and i - first >= CONTEXT:  # later ids change what these say
                    piece = os.path.commonprefix([self._decode(row[: i + 1], mask), text])[shown:]
                    is_complete = True
            pieces.append(piece)
            shown, skip = shown + len(piece), skip + len(piece)
            if is_complete:  # one id is context enough for the next
                first, skip = i, len(single)
        if pieces:
            pieces[-1] += text[shown:]
        return pieces

    @cached_property
    def _singles(self) -> dict[tuple[int, str], str]:
        """What `pieces` has decoded: (id, mask) -> the text of that id alone."""
        return {}

    def _decode(self, ids: Sequence[int], mask: str) -> str:
        surfaces, size, shown = self._surfaces, self.vocab_size, mask.encode()
        parts = [surfaces[i] if i < size else shown for i in ids]
        return b"".join(parts).decode("utf-8", errors="replace")

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
