"""The experiment, told from the config to the last checkpoint.

A run's folder (workdir) holds config.json, tokenizer.json, data.json (what the data is), records/ (the packed corpus, unless
data.records names another place), checkpoints/, metrics.jsonl, tensorboard/, and samples/ and profile/
where they were asked for.
"""

import contextlib
import logging
from collections.abc import Callable
from pathlib import Path

import jax
from ml_collections import ConfigDict

from sedd_jax import __version__, data
from sedd_jax import config as configuration
from sedd_jax.experiment import make_program
from sedd_jax.inference import bounds
from sedd_jax.inference.model import SEDD
from sedd_jax.inference.sampling import Sampling
from sedd_jax.parallel import processes, sharding
from sedd_jax.runs import workdir as runs
from sedd_jax.runs.checkpoint import Checkpoints
from sedd_jax.training.progress import Profile, Report, Signals, Watchdog

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
    processes.on_all_processes(lambda: runs.check_workdir(config, workdir))
    processes.check_shared(workdir)
    records = processes.first_then_others(lambda: runs.prepare_data(config, workdir))
    processes.on_all_processes(lambda: runs.claim_workdir(config, workdir, records))

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
        sampling=Sampling.of(config.sample),
        t_min=config.objective.t_min,
        mesh=mesh,
    )

    with contextlib.ExitStack() as stack:
        signals = stack.enter_context(Signals())
        votes = processes.StopAgreement(lambda: signals.asked, mesh)
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
                    total = bounds.corpus_bound(
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
                    sampled = model.with_params(train_state.ema)
                    texts = draw_texts(sampled, config.sample.count, config.seed, must_stop)
                if texts is not None:
                    report.samples(step, texts)
        with report.clock("checkpoint"):
            checkpoints.save(step, train_state)
            checkpoints.wait()
    if step < config.train.steps:
        log.info("stopped by a signal at step %d; run the same command to go on", step)
    return step


def draw_texts(
    model: SEDD, count: int, seed: int, must_stop: Callable[[], bool]
) -> list[str] | None:
    """`count` samples as text; None if must_stop() became true before the end."""
    state = None
    for state in model.stream(num_samples=count, batch_size=count, seed=seed):
        if must_stop():
            return None
    return state.texts
