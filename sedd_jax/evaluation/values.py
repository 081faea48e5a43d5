"""The bound of each document and each token in a file, for a paper's figures and statistics."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sedd_jax.data import Blocks, Tokenizer
from sedd_jax.host.files import replacing


class Document(NamedTuple):
    """A stretch of a split that ends in the tokenizer's separator, or where the blocks end."""

    block: int  # that it begins in
    position: int  # in that block
    tokens: np.ndarray  # int32 [n]
    nats: np.ndarray  # float32 [n]: the bound on -log p of each, given its block


def documents(
    blocks: Blocks, by_token: np.ndarray, separator: tuple[int, ...]
) -> Iterator[Document]:
    """The documents of the blocks in order, with by_token [N, L].

    Of packed blocks the stream is cut after each separator; a padded block is a document.
    """
    if blocks.is_token is not None:
        for block, (tokens, nats, is_token) in enumerate(
            zip(blocks.tokens, by_token, blocks.is_token, strict=True)
        ):
            yield Document(block, 0, tokens[is_token], nats[is_token])
        return
    stream, nats = blocks.tokens.reshape(-1), by_token.reshape(-1)
    length = blocks.tokens.shape[1]
    start = 0
    for end in [*_ends(stream, separator), len(stream)]:
        if end > start:
            yield Document(*divmod(start, length), stream[start:end], nats[start:end])
            start = end


def group_starts(blocks: Blocks, separator: tuple[int, ...]) -> np.ndarray:
    """Where groups of documents begin in the blocks' tokens one after the other, int64 [G].

    Documents that follow each other are one group until they have the tokens of a block: those of a
    block are scored by the same network calls, and neighbours are often of one page. Where nothing
    separates documents a block is one.
    """
    length = blocks.tokens.shape[1]
    if blocks.is_token is not None:
        ends = np.cumsum(blocks.is_token.sum(axis=1)).tolist()
    else:
        stream = blocks.tokens.reshape(-1)
        ends = _ends(stream, separator) or list(range(length, len(stream) + 1, length))
    count = blocks.count
    starts = [0]
    for end in ends:
        if starts[-1] + length <= end < count:
            starts.append(end)
    return np.array(starts)


def _ends(stream: np.ndarray, separator: tuple[int, ...]) -> list[int]:
    """Where the stream goes on after each separator."""
    count = len(separator)
    if not 0 < count <= len(stream):
        return []
    windows = np.lib.stride_tricks.sliding_window_view(stream, count)
    return (np.flatnonzero((windows == separator).all(axis=1)) + count).tolist()


def write_npz(file: Path, blocks: Blocks, by_token: np.ndarray, tokenizer: Tokenizer) -> None:
    """tokens int32 [N, L], nats float32 [N, L] and is_token bool [N, L], as numpy.load reads."""
    is_token = blocks.is_token
    is_token = np.ones(blocks.tokens.shape, bool) if is_token is None else is_token
    with replacing(file) as output:
        np.savez(output, tokens=blocks.tokens, nats=by_token, is_token=is_token)


def write_json_lines(
    file: Path, blocks: Blocks, by_token: np.ndarray, tokenizer: Tokenizer
) -> None:
    """A JSON object a document: its place, its text, its tokens and the nats of each."""
    with replacing(file, "w", encoding="utf-8") as output:
        for number, document in enumerate(documents(blocks, by_token, tokenizer.separator)):
            line = {
                "document": number,
                "block": document.block,
                "position": document.position,
                "tokens": len(document.tokens),
                "nats": float(document.nats.sum(dtype=np.float64)),
                "text": tokenizer.decode(document.tokens),
                "token_ids": document.tokens.tolist(),
                "token_nats": [round(float(nats), 6) for nats in document.nats],
            }
            output.write(json.dumps(line, ensure_ascii=False) + "\n")


WRITERS = {".npz": write_npz, ".jsonl": write_json_lines}


def write_values(file: Path, blocks: Blocks, by_token: np.ndarray, tokenizer: Tokenizer) -> None:
    """The bound of each token, by_token [N, L], in the form that the file's name ends in."""
    WRITERS[file.suffix](file, blocks, by_token, tokenizer)


def check_file(file: Path) -> None:
    """ValueError for an unknown suffix."""
    if file.suffix not in WRITERS:
        known = " or ".join(WRITERS)
        raise ValueError(f"values file {str(file)!r} does not end in {known}; give such a name")
