"""Records: a corpus as fixed-length blocks of ids in ArrayRecord files, as `prepare` writes them.

A folder of records holds fingerprint.json (what it was made from), tokenizer.json and, for each
split, SPLIT/blocks-*.array_record with one block a record. It is self-contained and never
rewritten.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sedd_jax.data.tokenizers import Tokenizer, tokenizer_from_dict
from sedd_jax.host.console import wrapped
from sedd_jax.host.files import local_path

FORMAT = 2


class Blocks(NamedTuple):
    """Rows of clean tokens. is_token is False at padding, which ends a row; None: no padding."""

    tokens: np.ndarray  # int32 [N, L]
    is_token: np.ndarray | None = None  # bool [N, L]

    @property
    def count(self) -> int:
        """Tokens that are not padding."""
        return self.tokens.size if self.is_token is None else int(self.is_token.sum())


@dataclass(frozen=True)
class Records:
    """An open folder of records."""

    folder: Path
    fingerprint: dict[str, Any]  # the content of fingerprint.json
    tokenizer: Tokenizer

    @property
    def length(self) -> int:
        """Tokens in a block."""
        return self.fingerprint["length"]

    @property
    def scored_split(self) -> str:
        """The split that evaluations take unless another is named: of those held out, the last."""
        splits = self.fingerprint["splits"]
        return next((split for split in ("test", "validation") if split in splits), min(splits))

    def tokens_per_block(self, split: str) -> float:
        """Tokens of a block of this split that are not padding, on average."""
        counts = self.counts(split)
        return (counts["tokens"] - counts["dropped_tokens"]) / counts["blocks"]

    def counts(self, split: str) -> dict[str, Any]:
        """The fingerprint's entry for this split; ValueError if there is no such split."""
        splits = self.fingerprint["splits"]
        if split not in splits:
            raise ValueError(
                f"no split {split!r} in {str(self.folder)!r}; it holds {', '.join(splits)}"
            )
        return splits[split]

    def source(self, split: str) -> Sequence[bytes]:
        """Returns the blocks of a split as an indexable source of bytes."""
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        blocks = self.counts(split)["blocks"]
        files = sorted(str(f) for f in (self.folder / split).glob("blocks-*.array_record"))
        try:
            source = ArrayRecordDataSource(files)
            num_records = len(source)
        except (ValueError, RuntimeError, OSError) as error:
            reason = str(error).split("\n")[0]
            raise ValueError(
                f"cannot read the records of split {split!r} in {str(self.folder)!r}: {reason}; "
                "prepare it again in another folder"
            ) from error
        if num_records != blocks:
            raise ValueError(
                f"{str(self.folder)!r} holds {num_records} blocks in split {split!r}, its "
                f"fingerprint says {blocks}; prepare it again in another folder"
            )
        return source

    def parse(self, record: bytes) -> np.ndarray:
        """Returns the numbers of one record, [L], or [1 + L] with the count of tokens first."""
        return np.frombuffer(record, self.fingerprint["dtype"])

    def blocks(self, rows: np.ndarray) -> Blocks:
        """Returns parsed records [N, L] or [N, 1 + L] as Blocks."""
        if self.fingerprint["form"] == "packed":
            return Blocks(rows.astype(np.int32))
        is_token = np.arange(self.length) < rows[:, :1]
        return Blocks(rows[:, 1:].astype(np.int32), is_token)


def open_records(folder: str | Path) -> Records:
    """Opens a prepared folder; ValueError if it is missing, half-written or not of this format."""
    folder = local_path(folder)
    if not folder.is_dir():
        raise ValueError(
            f"no folder at {str(folder)!r}; prepare records there or name another folder"
        )
    try:
        fingerprint = json.loads((folder / "fingerprint.json").read_text(encoding="utf-8"))
        if fingerprint["format"] != FORMAT:
            raise ValueError(f"its format {fingerprint['format']} is not {FORMAT}")
        tokenizer = tokenizer_from_dict(
            json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        )
        if tokenizer.fingerprint() != fingerprint["tokenizer"]["sha256"]:
            raise ValueError("tokenizer.json is not the tokenizer it was prepared with")
    except FileNotFoundError as error:
        raise ValueError(
            f"{str(folder)!r} holds no whole records, {Path(error.filename).name} is missing; name "
            "the folder of records, or another for new ones"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"cannot open the records in {str(folder)!r}: {error}; prepare them again in another "
            "folder"
        ) from error
    return Records(folder, fingerprint, tokenizer)


def describe(records: Records) -> str:
    """The fingerprint as aligned text."""
    f = records.fingerprint
    source = ", ".join(f"{k} {v}" for k, v in f["source"].items() if k != "files" and v != "")
    lines = [
        *wrapped(
            f"{source}; tokenizer {f['tokenizer']['name']}, {f['tokenizer']['vocab_size']} tokens, "
            f"sha256 {f['tokenizer']['sha256'][:12]}; {f['form']} blocks of {f['length']}"
        ),
        f"{'split':11}{'documents':>12}{'words':>14}{'tokens':>16}{'blocks':>12}  sha256",
    ]
    for split, c in f["splits"].items():
        lines.append(
            f"{split:11}{c['documents']:>12,}{c['words']:>14,}{c['tokens']:>16,}"
            f"{c['blocks']:>12,}  {c['sha256'][:12]}"
        )
    return "\n".join([*lines, f"in {records.folder}"])
