"""The experiment, told from the config to the last checkpoint.

A run's folder (workdir) holds config.json, tokenizer.json, data.json (what the data is), records/ (the packed corpus, unless
data.records names another place), checkpoints/, metrics.jsonl, tensorboard/, and samples/ and profile/
where they were asked for.
"""

import contextlib
import json
import logging
import re
from collections.abc import Callable
from pathlib import Path

import jax
from ml_collections import ConfigDict

from sedd_jax import __version__, data, evaluate, processes, sharding
from sedd_jax import config as configuration
from sedd_jax.api import SEDD
from sedd_jax.checkpoint import Checkpoints
from sedd_jax.program import make_program
from sedd_jax.progress import Profile, Report, Signals, Watchdog, write_text

log = logging.getLogger(__name__)


def train(config: ConfigDict, workdir: str | Path) -> int:
    """Train until config.train.steps, resuming from workdir's newest checkpoint if there is one.

    Returns the step reached: fewer than asked for if SIGINT or SIGTERM came to any process, after
    which a checkpoint is written; a second signal ends at once. ValueError, on every process, before
    any work for what the config, the corpus or the workdir cannot give; TrainingStopped for loss or
    gradient that is not finite config.train.max_skipped times in a row.
    """
    processes.check_same("config", dict(configuration.flatten(config)))
    processes.check_same("versions", {"sedd_jax": __version__, "jax": jax.__version__})
    configuration.check(config)
    workdir = Path(workdir)
    mesh = sharding.make_mesh(config.mesh)
    configuration.check_mesh(config, mesh)
    processes.together(lambda: check_workdir(config, workdir))
    processes.check_shared(workdir)
    records = processes.leader_first(lambda: prepare_data(config, workdir))
    processes.together(lambda: claim_workdir(config, workdir, records))

    program = make_program(config, records.tokenizer.vocab_size, mesh)
    key_train = program.keys["train"]
    heldout = data.read_blocks(records, config.data.heldout_split, config.evaluate.blocks)
    model = SEDD(
        network=program.network,
        params=program.shape.ema,
        graph=program.graph,
        schedule=program.schedule,
        tokenizer=records.tokenizer,
        length=config.data.length,
        config=config,
        step=None,
        mesh=mesh,
    )

    with contextlib.ExitStack() as stack:
        signals = stack.enter_context(Signals())
        votes = processes.Votes(lambda: signals.asked, mesh)
        watchdog = stack.enter_context(Watchdog(config.train.stuck_seconds))
        checkpoints = stack.enter_context(
            Checkpoints(workdir / "checkpoints", keep=config.checkpoint.keep)
        )

        def must_stop() -> bool:
            watchdog.alive()
            return votes()

        found = checkpoints.newest()
        if found is None:
            train_state = program.start()
        else:
            train_state = checkpoints.restore(found, program.shape)
        step = int(train_state.step)
        report = stack.enter_context(Report(program, records, workdir, step))
        report.began(found)
        if step < config.train.steps:  # a run that is done compiles nothing
            with report.clock("compile"):
                train_step = program.compile()
            report.compiled(train_step)
        batches = data.train_batches(
            records,
            seed=config.seed,
            batch_size=config.train.batch_size,
            start_step=step,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            split=config.data.train_split,
            windows=config.data.windows,
        )
        stack.callback(batches.close)
        profile = stack.enter_context(Profile(config.profile, workdir))

        def every(steps: int) -> bool:
            return step % steps == 0 or step == config.train.steps

        while step < config.train.steps and not must_stop():
            profile.before(step)
            with report.clock("input"):
                batch = sharding.put_batch(next(batches), mesh)
            train_state, metrics = train_step(train_state, batch, key_train)
            step += 1
            report.collect(metrics)
            if every(config.train.log_every):
                report.train(step)
            if every(config.checkpoint.every):
                with report.clock("checkpoint"):
                    checkpoints.save(step, train_state)  # copied; written in the background
            if every(config.train.eval_every):
                with report.clock("evaluate"):
                    total = evaluate.corpus_bound(
                        model.bound_fn,
                        train_state.ema,
                        program.keys["evaluate"],
                        heldout,
                        passes=config.evaluate.passes,
                        batch_size=config.evaluate.batch_size,
                        t_min=config.objective.t_min,
                        mesh=mesh,
                        should_stop=must_stop,
                    )
                if total is not None:
                    report.heldout(step, total.per(heldout.count))
            if config.sample.every and every(config.sample.every):
                with report.clock("sample"):
                    texts = draw_texts(model.with_params(train_state.ema), must_stop)
                if texts is not None:
                    report.samples(step, texts)
        with report.clock("checkpoint"):
            checkpoints.save(step, train_state)
            checkpoints.wait()
    if step < config.train.steps:
        log.info("stopped by a signal at step %d; run the same command to go on", step)
    return step


def draw_texts(model: SEDD, must_stop: Callable[[], bool]) -> list[str] | None:
    """config.sample.count samples as text; None if must_stop() turned true before the end."""
    wanted = model.config.sample
    state = None
    for state in model.stream(
        num_samples=wanted.count,
        batch_size=wanted.count,
        steps=wanted.steps,
        predictor=wanted.predictor,
        draw=wanted.draw,
        grid=wanted.grid,
        t_min=wanted.t_min,
        seed=model.config.seed,
    ):
        if must_stop():
            return None
    return state.texts


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
            r"records|\.records\.\w+|\.seen-by-all-\S+|(config|tokenizer|data)\.json(\.part)?"
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
