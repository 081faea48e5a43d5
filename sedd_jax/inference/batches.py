"""Rows of tokens of any length in batches of few shapes, each of which is compiled once."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from sedd_jax.data import Blocks
from sedd_jax.data.tokenizers import Tokenizer
from sedd_jax.diffusion.samplers import Chain, Known
from sedd_jax.inference.sampling import Rows
from sedd_jax.parallel import sharding

MIN_LENGTH = 16  # tokens of the smallest bucket


class Texts(NamedTuple):
    """Texts that are to be sampled, all of a call or a batch of them."""

    known: Known  # numpy [N, L], L of the longest of the call; 0 and False beyond a text's end
    lengths: np.ndarray  # int [N]
    first: int = 0  # number of the first, which keys its noise
    begin: int = 0  # the first reverse step; at 0 from noise, else from known.tokens, all of them,
    time: float = 1.0  # noised to this time

    def parts(self, batch_size: int) -> Iterator["Texts"]:
        """Batch after batch."""
        for i in range(0, len(self.lengths), batch_size):
            tokens, is_known, lengths = (a[i : i + batch_size] for a in (*self.known, self.lengths))
            yield self._replace(known=Known(tokens, is_known), lengths=lengths, first=i)

    def rows(self, shape: tuple[int, int]) -> Rows:
        """Filled up to the shape of a batch; its tokens are not noised yet."""
        known = Known(*(filled(a[:, : shape[1]], *shape) for a in self.known))
        known.is_known[len(self.lengths) :] = True  # nothing is drawn in what fills a batch up
        lengths = np.pad(self.lengths, (0, shape[0] - len(self.lengths)), mode="edge")
        index = np.arange(self.first, self.first + shape[0], dtype=np.int32)
        return Rows(index, start_of(known.tokens), known, is_token(lengths, shape[1]))

    def tokens(self, xt: np.ndarray) -> np.ndarray:
        """Of the batch xt what is of texts, int32 [N, L], 0 beyond a text's end."""
        count, length = self.known.tokens.shape
        xt = filled(xt[:count, :length], count, length)
        return np.where(is_token(self.lengths, length), xt, 0)


def start_of(tokens: np.ndarray) -> Chain:
    """A chain before its first step, numpy."""
    calls, confidence = np.zeros(len(tokens), np.int32), np.ones(tokens.shape, np.float32)
    return Chain(tokens, calls, confidence)


def shape(
    lengths: np.ndarray, batch_size: int, max_length: int, mesh: Mesh | None
) -> tuple[int, int]:
    """[B, L] of a batch that holds rows of these lengths, powers of two.

    B is at most batch_size, and divisible over the mesh; L is at most max_length.
    """
    parts = 1 if mesh is None else sharding.batch_parts(mesh)
    rows = -(-min(_power_of_two(len(lengths)), batch_size) // parts) * parts
    return rows, min(max(MIN_LENGTH, _power_of_two(int(lengths.max()))), max_length)


class TextRows(NamedTuple):
    """The tokens of N texts, those of what is given before them included."""

    tokens: list[np.ndarray]  # int32 [n] each
    starts: np.ndarray | None = None  # int [N]: where the texts begin; None: nothing is given


def by_bucket(
    rows: TextRows,
    index: np.ndarray,
    batch_size: int,
    max_length: int,
    mesh: Mesh | None,
) -> Iterator[tuple[np.ndarray, tuple[Blocks, np.ndarray, np.ndarray | None]]]:
    """Batches of texts of about one length: (their numbers, (blocks, index of all its rows,
    is_scored)), the last bool [B, L], False at what is given; None if nothing is.

    index, int32 [N], keys the texts' noise. A batch is filled up to its shape with its last row.
    """
    lengths = np.array([len(row) for row in rows.tokens])
    buckets = np.array([shape(one, 1, max_length, None)[1] for one in lengths[:, None]])
    for bucket in np.unique(buckets):
        members = np.flatnonzero(buckets == bucket)
        for start in range(0, len(members), batch_size):
            part = members[start : start + batch_size]
            count, length = shape(lengths[part], batch_size, max_length, mesh)
            numbers = np.pad(part, (0, count - len(part)), mode="edge")
            tokens = np.concatenate([filled(rows.tokens[n][None], 1, length) for n in numbers])
            blocks = Blocks(tokens, is_token(lengths[numbers], length))
            is_scored = None
            if rows.starts is not None:
                is_scored = blocks.is_token & ~is_token(rows.starts[numbers], length)
            yield part, (blocks, index[numbers], is_scored)


def filled(a: np.ndarray, rows: int, length: int) -> np.ndarray:
    """a [N, L] with zeros added up to [rows, length]."""
    return np.pad(a, ((0, rows - a.shape[0]), (0, length - a.shape[1])))


def is_token(lengths: Sequence[int], length: int) -> np.ndarray:
    """bool [B, length], False at the padding after each row's length."""
    return np.arange(length) < np.reshape(lengths, (-1, 1))


Text = str | np.ndarray  # or its tokens, int [n]


def listed(texts: Text | Sequence[Text]) -> list[Text]:
    """The texts as a list; one by itself, str or [n], is one of them."""
    is_one = isinstance(texts, str) or (isinstance(texts, np.ndarray) and texts.ndim < 2)
    return [texts] if is_one or not isinstance(texts, Iterable) else list(texts)


def tokens_of(text: Text, tokenizer: Tokenizer) -> np.ndarray:
    """int32 [n]; ValueError for what is neither a text nor tokens of the tokenizer."""
    if isinstance(text, str):
        return np.asarray(tokenizer.encode(text), np.int32)
    is_row = isinstance(text, np.ndarray) and text.ndim == 1
    if not is_row or not np.issubdtype(text.dtype, np.integer):
        what = f"{text.dtype} {text.shape}" if isinstance(text, np.ndarray) else type(text).__name__
        raise ValueError(f"a text is a str, or its tokens as an integer array [n], not {what}")
    check_ids(text, tokenizer.vocab_size)
    return text.astype(np.int32)


def check_ids(tokens: np.ndarray, vocab_size: int) -> None:
    """ValueError for tokens, int of any shape, that are none of the vocabulary."""
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < vocab_size:
        raise ValueError(
            f"tokens from {tokens.min()} to {tokens.max()} are not all in [0, {vocab_size}), the "
            "clean tokens of the model; use its own tokenizer"
        )


def check_blocks(blocks: Blocks, vocab_size: int, max_length: int) -> None:
    """ValueError for blocks that a model of that vocabulary and length cannot score."""
    tokens, is_token = blocks
    if not isinstance(tokens, np.ndarray) or tokens.ndim != 2 or 0 in tokens.shape:
        what = getattr(tokens, "shape", type(tokens).__name__)
        raise ValueError(f"blocks are an array of tokens [N, L], N and L at least 1, not {what}")
    if not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(f"blocks are whole numbers, not {tokens.dtype}; give the tokens' ids")
    if tokens.shape[1] > max_length:
        raise ValueError(
            f"blocks have {tokens.shape[1]} tokens, more than {max_length}, the model's length; "
            "cut them"
        )
    if is_token is not None and not is_token.any(axis=1).all():
        empty = int(np.flatnonzero(~is_token.any(axis=1))[0])
        raise ValueError(f"block {empty} is padding alone; leave it out")
    check_ids(tokens if is_token is None else tokens[is_token], vocab_size)


def encoded(
    name: str, texts: Text | Sequence[Text], tokenizer: Tokenizer, max_length: int, remedy: str
) -> list[np.ndarray]:
    """The tokens of each text; ValueError, which calls it `name`, for an empty or too long one."""
    rows = [tokens_of(text, tokenizer) for text in listed(texts)]
    if not rows:
        raise ValueError(f"no {name}s; give at least one")
    for number, row in enumerate(rows):
        if not 1 <= len(row) <= max_length:
            raise ValueError(
                f"{name} {number} has {len(row)} tokens, not 1 to {max_length}, the model's "
                f"length; {remedy if row.size else 'give text'}"
            )
    return rows


def prompts_of(given: Text | Sequence[Text], count: int) -> list[Text]:
    """What is given before each of count texts: a text for all, or one for each."""
    prompts = listed(given)
    is_one_for_all = isinstance(given, str | np.ndarray) and len(prompts) == 1
    prompts = prompts * count if is_one_for_all else prompts
    if len(prompts) != count:
        raise ValueError(
            f"{len(prompts)} prompts are given for {count} texts; give one for all, or one each"
        )
    return prompts


def texts_after(
    given: Text | Sequence[Text] | None,
    texts: Text | Sequence[Text],
    tokenizer: Tokenizer,
    max_length: int,
) -> TextRows:
    """The texts, each after what is given before it, which is encoded by itself."""
    remedy = "cut it, or prepare records and use bound"
    rows = encoded("text", texts, tokenizer, max_length, remedy)
    if given is None:
        return TextRows(rows)
    tokens = [tokens_of(prompt, tokenizer) for prompt in prompts_of(given, len(rows))]
    for number, (prompt, row) in enumerate(zip(tokens, rows, strict=True)):
        if len(prompt) + len(row) > max_length:
            raise ValueError(
                f"text {number} has {len(row)} tokens after {len(prompt)} that are given, more "
                f"than {max_length}, the model's length; cut what is given"
            )
    whole = [np.concatenate(pair) for pair in zip(tokens, rows, strict=True)]
    return TextRows(whole, np.array([len(prompt) for prompt in tokens]))


def check_index(index: Sequence[int] | None, count: int) -> np.ndarray:
    """The numbers that key the noise of count texts, int32 [N]: their own by default."""
    if index is None:
        return np.arange(count, dtype=np.int32)
    numbers = np.asarray(index)
    is_whole = numbers.shape == (count,) and np.issubdtype(numbers.dtype, np.integer)
    if not is_whole or (count and not 0 <= numbers.min() <= numbers.max() < 2**31):
        raise ValueError(f"index is not {count} whole numbers in [0, 2**31), one for each text")
    return numbers.astype(np.int32)


def _power_of_two(low: int) -> int:
    """The smallest power of two that is at least low."""
    return 1 << (low - 1).bit_length()
