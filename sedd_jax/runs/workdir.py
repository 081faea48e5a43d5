"""A run's folder (workdir): the one module that knows what is in it, under which name.

config.json      what the run is; data.json: what its data is; tokenizer.json
imports/         copies of the .py files of config.imports
records/         the packed corpus, unless data.records names another folder
checkpoints/     of Checkpoints; quarantine/ beside it: the damaged ones
metrics.jsonl    a JSON object a line; tensorboard/: the same as events
wandb_run        the id of its run of Weights & Biases, with files in wandb/: if it has one
samples/         STEP.txt, and profile/: where the config asks for them
original.json    the config that an imported run came with
curve.json       cross entropy by mask share, of the last sedd-eval likelihood
summary.json     and picture.png: of sedd-report
in_use           which process trains here, while one does
"""

import contextlib
import json
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from sedd_jax import config as configuration
from sedd_jax import data, experiment, registry
from sedd_jax.data import Tokenizer, tokenizer_from_dict
from sedd_jax.host import imports
from sedd_jax.host.files import appearing, check_new, claimed, load_json, local_path, write_text
from sedd_jax.parallel import processes
from sedd_jax.runs.checkpoint import Checkpoints
from sedd_jax.state import TrainState

log = logging.getLogger(__name__)

CONFIG, DATA, TOKENIZER = "config.json", "data.json", "tokenizer.json"
RECORDS, CHECKPOINTS = "records", "checkpoints"
METRICS, TENSORBOARD, SAMPLES, PROFILE = "metrics.jsonl", "tensorboard", "samples", "profile"
IN_USE, WANDB_RUN = "in_use", "wandb_run"
ORIGINAL, SUMMARY, PICTURE = "original.json", "summary.json", "picture.png"
CURVE = "curve.json"


# --- a run that begins or goes on


def check_workdir(config: ConfigDict, workdir: Path) -> None:
    """ValueError if another config's run, or somebody's files, are in workdir."""
    saved = saved_config(workdir)
    if saved is not None:
        imports.check_copies(workdir, config.imports)
        lines = configuration.differences(saved, config)
        if _has_no_data_yet(workdir):  # any of its tokenizer will do
            lines = [line for line in lines if not line.startswith("data.")]
        if lines:
            more = f" and {len(lines) - 5} more" if len(lines) > 5 else ""
            raise ValueError(
                f"workdir {str(workdir)!r} holds a run of another config "
                f"({'; '.join(lines[:5])}{more}); choose another workdir, or the config that it "
                "began with"
            )
    elif workdir.exists():
        # A start that was interrupted leaves these, and nothing else.
        names = "|".join(map(re.escape, (RECORDS, CONFIG, DATA, TOKENIZER, imports.FOLDER, IN_USE)))
        ours = re.compile(
            rf"({names})(\.part|\.removing|\.\d+\.dead)?|\.({names})\.\S+|\.seen-by-all-\S+"
        )
        if not workdir.is_dir() or not all(ours.fullmatch(p.name) for p in workdir.iterdir()):
            raise ValueError(
                f"workdir {str(workdir)!r} is not empty and holds no run; choose a new folder"
            )


@contextlib.contextmanager
def in_use(workdir: Path) -> Iterator[None]:
    """While entered, the run in workdir is this process's; ValueError if another one trains it.

    The folder is made if it is not there, and removed again if nothing came into it.
    """

    def remove_empty(folders: list[Path]) -> None:
        with contextlib.suppress(OSError):  # it is not empty
            for folder in folders:
                folder.rmdir()

    with contextlib.ExitStack() as stack:
        absent = [folder for folder in (workdir, *workdir.parents) if not folder.exists()]
        stack.callback(remove_empty, absent)
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            stack.enter_context(claimed(workdir / IN_USE, f"trains in {str(workdir)!r}"))
        except OSError as error:
            raise ValueError(
                f"cannot write in workdir {str(workdir)!r}: {error.strerror}; make it writable or "
                "choose another workdir"
            ) from error
        yield


def write_identity(config: ConfigDict, workdir: Path, records: data.Records) -> None:
    """Write what the run is: its data's fingerprint, its tokenizer and, last, its config.

    A resumed run has the same data and tokenizer; its config may differ in MAY_CHANGE's keys.
    ValueError if the tokenizer is another one: a converted run has no data.json that says so.
    """
    saved = workdir / TOKENIZER
    if saved.exists() and _read_tokenizer(saved).fingerprint() != records.tokenizer.fingerprint():
        raise ValueError(
            f"the records in {str(records.folder)!r} were made with another tokenizer than "
            f"the run in {str(workdir)!r}; prepare them with sedd-prepare --tokenizer={saved}"
        )
    if processes.is_first():
        workdir.mkdir(parents=True, exist_ok=True)
        write_text(workdir / DATA, json.dumps(records.fingerprint, indent=1))
        write_text(workdir / TOKENIZER, json.dumps(records.tokenizer.to_dict()))
        imports.write_files(workdir, imports.read_files(config.imports))
        values = dict(configuration.flatten(config))
        for part in registry.defined_elsewhere(values, imports.module_names(config.imports)):
            log.warning(
                "no module of config.imports registers %s: another process cannot open this run; "
                "put it into a .py file and name that",
                part,
            )
        write_text(workdir / CONFIG, configuration.to_json(_with_copied_names(config)))


def _with_copied_names(config: ConfigDict) -> ConfigDict:
    copied = config.copy_and_resolve_references()
    copied.imports = imports.copied_names(config.imports)
    return copied


def saved_config(workdir: Path) -> ConfigDict | None:
    """The config of the run in workdir, not checked; None if there is none."""
    file = Path(workdir) / CONFIG
    if not file.is_file():
        return None
    config = configuration.from_json(file.read_text(encoding="utf-8"), repr(str(file)))
    configuration.check_value("imports", config.imports)
    config.imports = imports.names_in(Path(workdir), config.imports)
    return config


def with_stored_data(config: ConfigDict) -> ConfigDict:
    """The config with the corpus and tokenizer of config.data.records, if that names records.

    They know both; the config that comes with them may be another's default.
    """
    folder = config.data.records and local_path(config.data.records)
    if not folder or not (folder / "fingerprint.json").is_file():
        return config
    records = data.open_records(folder)
    source = records.fingerprint["source"]
    values = {"data.tokenizer": records.tokenizer.name}
    if not data.is_of_kind(records.tokenizer, config.data.tokenizer):
        values["data.tokenizer_path"] = ""
    if data.is_corpus(source.get("corpus", "")):
        values["data.corpus"] = source["corpus"]
        values["data.parameters"] = source.get("parameters", {})
    if 0 < source.get("heldout_fraction", 0) < 1:
        values["data.heldout_fraction"] = source["heldout_fraction"]
    return configuration.with_values(config, values)


def prepare_data(config: ConfigDict, workdir: Path) -> data.Records:
    """The packed corpus, made on first use; ValueError if it does not fit config and run."""
    folder, section = records_folder(config, workdir), config.data
    is_new = not (folder / "fingerprint.json").exists()
    if is_new:
        saved = str(workdir / TOKENIZER) if _has_no_data_yet(workdir) else None
        data.make_records(
            section.corpus,
            folder,
            path=section.path,
            heldout_fraction=section.heldout_fraction,
            tokenizer=saved or section.tokenizer,
            tokenizer_path="" if saved else section.tokenizer_path,
            length=section.length,
            form=section.form,
            splits=(section.train_split, section.heldout_split),
            parameters=dict(section.parameters.items()),
            progress=True,
        )
    records = open_records(config, workdir)
    source = records.fingerprint["source"]
    stored = {"length": records.length, "form": records.fingerprint["form"]}
    if not section.records:  # see with_stored_data
        stored |= {
            "corpus": source.get("corpus"),
            "parameters": source.get("parameters", {}),
            # A corpus with splits of its own has no such fraction.
            "heldout_fraction": source.get("heldout_fraction", section.heldout_fraction),
        }
        if not data.is_of_kind(records.tokenizer, section.tokenizer):
            stored["tokenizer"] = records.tokenizer.name
    values = dict(configuration.flatten(config))
    for field, value in stored.items():
        if value != (requested := values[f"data.{field}"]):
            raise ValueError(
                f"the records in {str(folder)!r} have {field} {value!r}, config.data.{field} is "
                f"{requested!r}; name another folder in config.data.records, or give "
                f"--config.data.{field}={value}"
            )
    if not is_new and section.corpus == "text" and section.path:
        _check_text(records, section.path, section.heldout_fraction)
    for split in (section.train_split, section.heldout_split):
        records.counts(split)
    return records


def _check_text(records: data.Records, path: str, heldout_fraction: float) -> None:
    """ValueError if the records are of another text than lies at path; it may be gone."""
    if not local_path(path).exists():
        return
    source, reason = records.fingerprint["source"], ""
    try:
        now = data.text_source(path, heldout_fraction)
        # Of a version that took splits by other rules, the files cannot be compared.
        is_same = source["version"] != now["version"] or source["files"] == now["files"]
    except ValueError as error:
        is_same, reason = False, f" ({error})"
    if not is_same:
        raise ValueError(
            f"the records in {str(records.folder)!r} are not of the text that is at {path!r} "
            f"now{reason}; name another folder in config.data.records, put the old text back, or "
            "leave config.data.path empty to use the records as they are"
        )


def _has_no_data_yet(workdir: Path) -> bool:
    """Whether a converted run is there that has not trained: it has a tokenizer alone."""
    return (workdir / TOKENIZER).is_file() and not (workdir / DATA).is_file()


def records_folder(config: ConfigDict, workdir: Path) -> Path:
    """Where the run's packed corpus is."""
    return local_path(config.data.records or workdir / RECORDS)


def open_records(config: ConfigDict, workdir: Path) -> data.Records:
    """The run's packed corpus; ValueError if it is not the one that the run began with."""
    records = data.open_records(records_folder(config, workdir))
    saved = workdir / DATA
    if saved.exists() and json.loads(saved.read_text(encoding="utf-8")) != records.fingerprint:
        raise ValueError(
            f"the records in {str(records.folder)!r} are not those that {str(saved)!r} describes: "
            "the text, the tokenizer or Python's version has changed; put the old ones back, or "
            "begin in a new workdir"
        )
    return records


def read_metrics(workdir: Path, last_step: int | None = None) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl, up to last_step; a line torn by a kill is left out."""
    rows, file = [], workdir / METRICS
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if last_step is None or row["step"] <= last_step:
            rows.append(row)
    return rows


# --- a run that is read


class Workdir(NamedTuple):
    """What a run is, without its weights."""

    folder: Path
    config: ConfigDict
    tokenizer: Tokenizer
    original: dict | None  # the config that an imported run came with


def missing_files(folder: Path) -> list[str]:
    """Which of the files that make a folder a training run it lacks."""
    return [n for n in (CONFIG, TOKENIZER, CHECKPOINTS) if not (folder / n).exists()]


def run_around(folder: Path) -> str:
    """What to say of a folder inside of a run, as of one of its checkpoints; "" of another."""
    for parent in list(folder.absolute().parents)[:2]:
        if not missing_files(parent):
            step = f" and step {folder.name}" if folder.name.isdecimal() else ""
            return f"; it is a folder of the run {str(parent)!r}: name that{step}"
    return ""


def open_workdir(folder: Path) -> Workdir:
    """A training run's folder; ValueError if it is none, or holds code that may not run: see
    `imports.import_modules`."""
    folder = Path(folder)
    missing = missing_files(folder)
    if missing:
        raise ValueError(
            f"{str(folder)!r} holds no training run: {', '.join(missing)} missing; give the "
            "--workdir of a sedd-train that has saved a checkpoint"
        )
    config = saved_config(folder)
    imports.import_modules(config.imports, read_in=folder)
    configuration.check(config)
    file = folder / ORIGINAL
    original = load_json(file.read_bytes(), repr(str(file))) if file.exists() else None
    return Workdir(folder, config, _read_tokenizer(folder / TOKENIZER), original)


def keep_curve(folder: Path, result: Mapping[str, Any]) -> None:
    """Write the curve in a result of `evaluation.likelihood.evaluate_split`, with what was scored,
    into a run's folder, unless a better one is there; a line of log says what became of it."""
    about = {key: result[key] for key in ("step", "split", "blocks", "passes", "seed", "data")}
    try:
        if (reason := _why_no_better(folder, about)) is None:
            write_text(folder / CURVE, json.dumps({**about, **result["curve"]}))
            log.info("written: %s, for --grid=fitted", folder / CURVE)
    except OSError as error:
        reason = f"cannot write in {str(folder)!r}: {error.strerror}"
    if reason is not None:
        log.info("the curve of cross entropy is not saved for --grid=fitted: %s", reason)


def _why_no_better(folder: Path, about: Mapping[str, Any]) -> str | None:
    """Why the curve of this evaluation is no better than the one in the folder; None if it is."""
    before, own = _json_in(folder / CURVE), _json_in(folder / DATA)
    step = before.get("step")
    if not isinstance(step, int) or not {*about} <= {*before} or step < about["step"]:
        return None
    if step > about["step"]:
        return f"the one that is there is of a later step, {step}"
    own_texts = [split["sha256"] for split in own.get("splits", {}).values()]
    is_own, was_own = (each["data"]["sha256"] in own_texts for each in (about, before))
    if was_own and not is_own:
        return "the one that is there is of the run's own text"
    copies, now = (each["blocks"] * each["passes"] for each in (before, about))
    if all(before[key] == about[key] for key in ("data", "split")) and copies > now:
        return f"the one that is there is of more noised copies, {copies}, not {now}"
    return None


def read_curve(workdir: Workdir) -> dict[str, Any] | None:
    """What `keep_curve` wrote, not checked; None without it, and with a warning if no JSON."""
    file = workdir.folder / CURVE
    try:
        return load_json(file.read_bytes(), repr(str(file))) if file.is_file() else None
    except (OSError, ValueError) as error:
        log.warning("%s; it is left out: run sedd-eval likelihood again", error)
        return None


def _json_in(file: Path) -> dict[str, Any]:
    """What the file holds; nothing where it is absent or damaged."""
    with contextlib.suppress(OSError, ValueError):
        return load_json(file.read_bytes(), repr(str(file)))
    return {}


def _read_tokenizer(file: Path) -> Tokenizer:
    return tokenizer_from_dict(json.loads(file.read_text(encoding="utf-8")))


def stored_vocab_size(folder: Path) -> int | None:
    """The clean tokens of the run that is there; None where there is none."""
    file = folder / TOKENIZER
    return _read_tokenizer(file).vocab_size if file.is_file() else None


def read_state(workdir: Workdir) -> TrainState:
    """The newest checkpoint's whole train state, on one device."""
    with _checkpoints(workdir) as checkpoints:
        return checkpoints.restore(checkpoints.needed(), _shape(workdir))


def read_average(workdir: Workdir, step: int | None = None) -> tuple[int, Any]:
    """(step, moving average as numpy arrays) of the newest or that checkpoint, reading nothing
    else."""
    on_host = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), _shape(workdir).ema)
    with _checkpoints(workdir) as checkpoints:
        return checkpoints.restore_ema(on_host, step)


def _checkpoints(workdir: Workdir) -> Checkpoints:
    return Checkpoints(workdir.folder / CHECKPOINTS, read_only=True)


def _shape(workdir: Workdir) -> TrainState:
    return experiment.make_experiment(workdir.config, workdir.tokenizer.vocab_size, None).shape


# --- a run that is written whole


def write_workdir(
    folder: Path,
    *,
    config: ConfigDict,
    tokenizer: Tokenizer,
    train_state: TrainState,
    original: dict | None,
) -> None:
    """A run's folder that sedd-train resumes from; ValueError if it is there and not empty.

    No data.json: training writes it when it has the data.
    """
    folder = Path(folder)
    check_new(folder)
    with appearing(folder) as part:
        imports.write_files(part, imports.read_files(config.imports))
        text = configuration.to_json(_with_copied_names(config))
        (part / CONFIG).write_text(text, encoding="utf-8")
        (part / TOKENIZER).write_text(json.dumps(tokenizer.to_dict()), encoding="utf-8")
        if original is not None:
            (part / ORIGINAL).write_text(json.dumps(original, indent=1), encoding="utf-8")
        with Checkpoints(part / CHECKPOINTS) as checkpoints:
            checkpoints.save(int(train_state.step), train_state)
            checkpoints.wait()
