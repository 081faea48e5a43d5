"""A run's folder (workdir): what is in it, whose it is, and its packed corpus.

It holds config.json, tokenizer.json, data.json (what the data is), records/ (the packed corpus,
unless data.records names another folder), checkpoints/, metrics.jsonl, tensorboard/, and samples/
and profile/ where they were requested.
"""

import json
import logging
import re
from pathlib import Path

import jax
from ml_collections import ConfigDict

from sedd_jax import config as configuration
from sedd_jax import data
from sedd_jax.files import write_text

log = logging.getLogger(__name__)


def check_workdir(config: ConfigDict, workdir: Path) -> None:
    """ValueError if another config's run, or somebody's files, are in workdir."""
    saved = workdir / "config.json"
    if saved.exists():
        lines = configuration.differences(configuration.from_json(saved.read_text()), config)
        if lines:
            raise ValueError(
                f"workdir {str(workdir)!r} holds a run of another config ({_first(lines)}); "
                "choose another workdir, or the config that it began with"
            )
    elif workdir.exists():
        # A start that was interrupted leaves these, and nothing else.
        ours = re.compile(
            r"records|\.records\.\w+|\.seen-by-all-\S+"
            r"|(config|tokenizer|data)\.json(\.part)?|\.(config|tokenizer|data)\.json\.\d+\.part"
        )
        if not workdir.is_dir() or not all(ours.fullmatch(p.name) for p in workdir.iterdir()):
            raise ValueError(
                f"workdir {str(workdir)!r} is not empty and holds no run; choose a new folder"
            )


def claim_workdir(config: ConfigDict, workdir: Path, records: data.Records) -> None:
    """Write what the run is: its data's fingerprint, its tokenizer and, last, its config.

    A resumed run has the same data and tokenizer; its config may differ in MAY_CHANGE's keys.
    ValueError if the tokenizer is another one: a converted run has no data.json to tell.
    """
    saved = workdir / "tokenizer.json"
    if saved.exists():
        before = data.tokenizer_from_dict(json.loads(saved.read_text(encoding="utf-8")))
        if before.fingerprint() != records.tokenizer.fingerprint():
            raise ValueError(
                f"the records in {str(records.folder)!r} were made with another tokenizer than "
                f"the run in {str(workdir)!r}; prepare them with "
                f"sedd-prepare --tokenizer={saved}"
            )
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        write_text(workdir / "data.json", json.dumps(records.fingerprint, indent=1))
        write_text(workdir / "tokenizer.json", json.dumps(records.tokenizer.to_dict()))
        write_text(workdir / "config.json", configuration.to_json(config))


def _first(lines: list[str], most: int = 5) -> str:
    rest = f" and {len(lines) - most} more" if len(lines) > most else ""
    return "; ".join(lines[:most]) + rest


def records_folder(config: ConfigDict, workdir: Path) -> Path:
    """Where the run's packed corpus is."""
    return Path(config.data.records or workdir / "records")


def prepare_data(config: ConfigDict, workdir: Path) -> data.Records:
    """The packed corpus, made on first use; ValueError if it does not fit the config and the run."""
    folder, wanted = records_folder(config, workdir), config.data
    were_there = (folder / "fingerprint.json").exists()
    if not were_there:
        log.info("preparing corpus %s in blocks of %d tokens", wanted.corpus, wanted.length)
        data.make_records(
            wanted.corpus,
            folder,
            path=wanted.path,
            heldout_fraction=wanted.heldout_fraction,
            tokenizer=wanted.tokenizer,
            tokenizer_path=wanted.tokenizer_path,
            length=wanted.length,
            form=wanted.form,
            progress=wanted.corpus != "pydoc",
        )
    records = open_records(config, workdir)
    source = records.fingerprint["source"]
    for field, found, asked in (
        ("corpus", source.get("corpus"), wanted.corpus),
        # A corpus with splits of its own has no such fraction.
        (
            "heldout_fraction",
            source.get("heldout_fraction", wanted.heldout_fraction),
            wanted.heldout_fraction,
        ),
        ("tokenizer", records.tokenizer.name, wanted.tokenizer),
        ("length", records.length, wanted.length),
        ("form", records.fingerprint["form"], wanted.form),
    ):
        if found != asked:
            raise ValueError(
                f"the records in {str(folder)!r} have {field} {found!r}, config.data.{field} is "
                f"{asked!r}; name another folder in config.data.records or change the config"
            )
    if were_there and wanted.corpus == "text" and wanted.path and Path(wanted.path).exists():
        now = data.text_source(wanted.path, wanted.heldout_fraction)
        if source["files"] != now["files"]:
            raise ValueError(
                f"the records in {str(folder)!r} are not of the text that is at {wanted.path!r} "
                "now; name another folder in config.data.records, or put the old text back"
            )
    for split in (wanted.train_split, wanted.heldout_split):
        records.counts(split)
    return records


def open_records(config: ConfigDict, workdir: Path) -> data.Records:
    """The run's packed corpus; ValueError if it is not the one that the run began with."""
    records = data.open_records(records_folder(config, workdir))
    began = workdir / "data.json"
    if began.exists() and json.loads(began.read_text(encoding="utf-8")) != records.fingerprint:
        raise ValueError(
            f"the records in {str(records.folder)!r} are not those that {str(began)!r} describes: "
            "the text, the tokenizer or Python's version has changed; put the old ones back, or "
            "begin in a new workdir"
        )
    return records
