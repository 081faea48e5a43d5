"""SentencePiece: a model read from a file, or trained on a corpus.

The library is imported by the call that needs it.
"""

import base64
import io
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from sedd_jax.data.corpora import Corpus
from sedd_jax.data.tokenizer import PATH, Tokenizer, cut, to_utf8
from sedd_jax.host.console import activity
from sedd_jax.host.files import local_path, refuse_pointer_file

BLANK = "\u2581"  # how SentencePiece writes a space
LINE = 1000  # characters of a training sentence at most
SENTENCES = 500_000  # drawn from a larger corpus, to bound the trainer's memory and time


@dataclass(frozen=True)
class SentencePiece(Tokenizer):
    """A SentencePiece model (Kudo and Richardson 2018); documents end in its </s>.

    Pieces are decoded here rather than by the library, which drops a space at the start of each
    run of some models. Models trained here give back every text; others do as they were made to.
    """

    model: str = field(repr=False)  # base64 of the model's file
    name: ClassVar[str] = "sentencepiece"

    @classmethod
    def make(cls, path: str, corpus: Corpus) -> "SentencePiece":
        """Reads the .model file at `path` or, for "train:N", trains N pieces on split "train"."""
        documents = corpus.plain("train") if path.startswith("train:") else ()
        model = _read_model(path, documents)
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
            raise ValueError("this is not a SentencePiece .model file; copy it again") from error
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
        return super()._decode(self._library.encode("a"), "") == " a"

    @cached_property
    def _splits_at_spaces(self) -> bool:
        """Whether text cut before a space has the ids of the whole.

        True if the model leaves spaces as they are and no piece reaches across one.
        """
        text = " a  b "
        return super()._decode(self._library.encode(text), "") == text and not any(
            re.search(rb"[^ ] ", surface) for surface in self._surfaces
        )

    def encode(self, text: str) -> np.ndarray:
        """Returns the ids, int32 [n].

        The library adds up scores of the whole text in float32, so that the cut of a long text
        into pieces would suffer from rounding; it gets PIECE characters at a time.
        """
        if not self._splits_at_spaces:
            to_utf8(text)
            return np.asarray(self._library.encode(text), np.int32)
        ids: list[int] = []
        for piece in cut(text):
            for i, part in enumerate(piece.split(BLANK)):  # to the library BLANK is a space
                ids += self._blank if i else []
                ids += self._library.encode(part)
        return np.asarray(ids, np.int32)

    @cached_property
    def _blank(self) -> list[int]:
        """The ids of BLANK as a character: its bytes, or the unknown piece where there are none."""
        return [self._library.piece_to_id(f"<0x{byte:02X}>") for byte in BLANK.encode()]

    def _decode(self, ids: Sequence[int], mask: str) -> str:
        text = super()._decode(ids, mask)
        return text.removeprefix(" ") if self._adds_space else text


def _read_model(path: str, documents: Iterable[str]) -> bytes:
    """Returns the SentencePiece model at `path`: a .model file, a folder with one, or "train:N".

    "train:N" trains N pieces on `documents`. ValueError names the fault.
    """
    if path.startswith("train:"):
        if not re.fullmatch(r"train:[1-9][0-9]{0,8}", path):
            raise ValueError(f"{path!r} names no vocabulary size; write train:8000")
        return _train(int(path.removeprefix("train:")), documents)
    if not path:
        raise ValueError(
            f"tokenizer 'sentencepiece' needs {PATH}; set it to a .model file or to train:8000"
        )
    file = local_path(path)
    if file.is_dir():
        files = sorted(file.glob("*.model"))
        if len(files) != 1:
            raise ValueError(f"{len(files)} .model files in {path!r}; name one in {PATH}")
        file = files[0]
    try:
        refuse_pointer_file(file)
        return file.read_bytes()
    except OSError as error:
        raise ValueError(
            f"cannot read {str(file)!r}: {error.strerror}; set {PATH} to a .model "
            "file or to train:8000"
        ) from error


@activity("training SentencePiece")
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
        if highest := re.search(r"too high .* <= (\d+)", reason):
            bound = f"is too large for this corpus, which gives {highest[1]} at most"
        elif lowest := re.search(r"\d+ vs (\d+)", reason):
            bound = f"is too small for this corpus, whose characters take {lowest[1]}"
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
        elif (index := generator.randrange(seen + 1)) < count:
            drawn[index] = sentence
    return drawn
