"""The experiment, from the config to the last checkpoint."""

import contextlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from sedd_jax import __version__, data, registry
from sedd_jax import config as configuration
from sedd_jax.configs.base import get_config as get_base_config
from sedd_jax.experiment import Experiment, make_experiment, make_mesh
from sedd_jax.host.console import activity
from sedd_jax.host.files import local_path
from sedd_jax.inference import bounds
from sedd_jax.inference.model import SEDD
from sedd_jax.inference.sampling import Sampling
from sedd_jax.parallel import processes, sharding
from sedd_jax.parallel.devices import check_platform, device, format_bytes, program_bytes
from sedd_jax.runs import workdir as runs
from sedd_jax.runs.checkpoint import Checkpoints
from sedd_jax.state import TrainState
from sedd_jax.training.progress import Profile, Progress, Signals, watchdog
from sedd_jax.training.trackers import check_trackers

log = logging.getLogger(__name__)


def train(config: ConfigDict, workdir: str | Path) -> int:
    """Train until config.train.steps, resuming from workdir's newest checkpoint if there is one.

    Returns the step reached, below config.train.steps if a process had a signal (see Signals),
    after which a checkpoint is written; a second signal ends at once. ValueError, on every process,
    before any work for what the config, the corpus or the workdir cannot give; TrainingStopped for
    a loss or gradient that is not finite config.train.max_skipped times in a row.
    """
    workdir = local_path(workdir)
    with contextlib.ExitStack() as stack:
        experiment, records = set_up(config, workdir, stack)
        mesh, key, steps = experiment.mesh, experiment.keys["train"], config.train.steps
        heldout = data.read_blocks(records, config.data.heldout_split, config.evaluate.blocks)
        signals = stack.enter_context(Signals())
        any_signal = processes.StopAgreement(lambda: signals.received, mesh)
        stuck = stack.enter_context(watchdog(config.train.stuck_seconds))

        def must_stop() -> bool:
            stuck.alive()
            return any_signal()

        folder = workdir / runs.CHECKPOINTS
        checkpoints = stack.enter_context(Checkpoints(folder, keep=config.checkpoint.keep))
        with activity("preparing the state", processes.is_first()):
            train_state = restore_or_start(experiment, checkpoints)
        step = int(train_state.step)
        progress = stack.enter_context(make_progress(experiment, records, workdir, step))
        log_start(experiment, records, step)
        if step < steps and processes.is_first():
            _tell_what_has_no_effect(config)
        evaluate = make_evaluate(experiment, heldout, progress, must_stop)
        draw_texts = make_draw_texts(experiment, records.tokenizer, progress, must_stop)
        profile = Profile(workdir / runs.PROFILE, config.profile.start, config.profile.steps)
        stack.enter_context(profile)
        batches = stack.enter_context(contextlib.closing(train_batches(experiment, records, step)))
        if step < steps:  # a run that is done compiles nothing
            train_step = compile_step(experiment, progress)

        def is_due(every: int) -> bool:
            return every > 0 and (step % every == 0 or step == steps)

        while step < steps and not must_stop():
            profile.before(step)
            with progress.clock("input"):
                batch = sharding.put_batch(next(batches), mesh)
            train_state, metrics = train_step(train_state, batch, key)
            step += 1
            progress.collect(metrics)
            if is_due(config.train.log_every):
                progress.train(step, experiment.learning_rate(train_state))
            if is_due(config.checkpoint.every):
                with progress.clock("checkpoint"):
                    checkpoints.save(step, train_state)  # copied; written in the background
            with progress.scores_may_diverge(step):
                if is_due(config.train.eval_every):
                    evaluate(step, train_state.ema)
                if is_due(config.sample.every):
                    draw_texts(step, train_state.ema)
        progress.settle()
        with progress.clock("checkpoint"):
            checkpoints.save(step, train_state)
            checkpoints.wait()
    if step < steps:
        log.info("stopped by a signal at step %d; run the same command to go on", step)
    return step


def set_up(
    config: ConfigDict, workdir: Path, stack: contextlib.ExitStack
) -> tuple[Experiment, data.Records]:
    """The experiment and its packed corpus; the same on every process, or an error on each.

    Nothing is written before workdir is this run's alone, which it is until the stack is closed.
    """
    check_platform()
    processes.check_same("config", dict(configuration.flatten(config)))
    processes.check_same("versions", {"sedd_jax": __version__, "jax": jax.__version__})
    configuration.check(config)
    check_trackers(config.train.trackers)
    config = runs.with_stored_data(config)
    mesh = make_mesh(config)
    processes.on_all_processes(lambda: runs.check_workdir(config, workdir))

    def claim() -> None:
        stack.enter_context(runs.in_use(workdir))
        runs.check_workdir(config, workdir)  # again: another run may have begun and ended here

    processes.on_all_processes(lambda: claim() if processes.is_first() else None)
    processes.check_shared(workdir)
    records = processes.first_then_others(lambda: runs.prepare_data(config, workdir))
    processes.on_all_processes(lambda: runs.write_identity(config, workdir, records))
    return make_experiment(config, records.tokenizer.vocab_size, mesh), records


def restore_or_start(experiment: Experiment, checkpoints: Checkpoints) -> TrainState:
    """The newest checkpoint's state, or the one before the first step."""
    step = checkpoints.newest()
    return experiment.start() if step is None else checkpoints.restore(step, experiment.shape)


def make_progress(
    experiment: Experiment, records: data.Records, workdir: Path, step: int
) -> Progress:
    """The metrics of a run that is at this step."""
    config, mesh = experiment.config, experiment.mesh
    tokens = records.tokens_per_block(config.data.train_split)
    peak = device(mesh.devices.flat[0].device_kind)
    return Progress(
        workdir,
        step,
        steps=config.train.steps,
        tokens_per_sequence=tokens,
        tokens_per_step=tokens * config.train.batch_size,
        peak_share_per_step=peak and experiment.flops / (peak.flops * mesh.size),
        max_skipped=config.train.max_skipped,
        trackers=config.train.trackers,
        config=dict(configuration.flatten(config)),
    )


def log_start(experiment: Experiment, records: data.Records, step: int) -> None:
    """Say what is trained, and from which step."""
    parameters = sum(leaf.size for leaf in jax.tree.leaves(experiment.shape.params))
    mesh = ", ".join(f"{axis}={size}" for axis, size in experiment.mesh.shape.items() if size > 1)
    log.info(
        "%s parameters, %s blocks of %d tokens%s%s",
        f"{parameters:,}",
        f"{records.counts(experiment.config.data.train_split)['blocks']:,}",
        records.length,
        f", mesh {mesh}" if mesh else "",
        "" if processes.is_alone() else f", {jax.process_count()} processes",
    )
    if step >= (steps := experiment.config.train.steps):
        log.info("all %d steps are done; --config.train.steps=N, above that, goes on", steps)
    else:
        log.info(f"resuming at step {step}" if step else "starting; compiling the train step")


def compile_step(experiment: Experiment, progress: Progress) -> jax.stages.Compiled:
    """The train step's executable; says what compiling took and what the step needs."""
    with progress.clock("compile"):
        compiled = experiment.lower().compile()
    memory = compiled.memory_analysis()
    need = "" if memory is None else f", {format_bytes(program_bytes(memory))} a device"
    log.info("compiled in %.1f s%s", progress.clock.seconds["compile"], need)
    return compiled


def train_batches(experiment: Experiment, records: data.Records, start_step: int):
    """This process's rows of the batches from a step on; close() it."""
    config = experiment.config
    return data.train_batches(
        records,
        seed=config.seed,
        batch_size=config.train.batch_size,
        start_step=start_step,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        split=config.data.train_split,
        windows=config.data.windows,
    )


def make_evaluate(
    experiment: Experiment,
    heldout: data.Blocks,
    progress: Progress,
    must_stop: Callable[[], bool],
) -> Callable[[int, Any], None]:
    """(step, params) -> None: logs the bound on the held-out blocks, unless must_stop() turns true
    before the end."""
    section, objective = experiment.config.evaluate, experiment.objective
    process = experiment.graph, experiment.schedule, objective
    bound_fn = bounds.make_bound_fn(experiment.network, *process)
    key = experiment.keys["evaluate"]

    def evaluate(step: int, params: Any) -> None:
        with progress.clock("evaluate"):
            total = bounds.corpus_bound(
                bound_fn,
                params,
                key,
                heldout,
                passes=section.passes,
                batch_size=section.batch_size,
                t_min=objective.t_min,
                mesh=experiment.mesh,
                should_stop=must_stop,
            )
        if total is not None:
            progress.heldout(step, total.per(heldout.count))

    return evaluate


def make_draw_texts(
    experiment: Experiment,
    tokenizer: data.Tokenizer,
    progress: Progress,
    must_stop: Callable[[], bool],
) -> Callable[[int, Any], None]:
    """(step, params) -> None: logs config.sample.count texts, unless must_stop() turns true before
    the end."""
    config, count = experiment.config, experiment.config.sample.count
    model = SEDD(
        network=experiment.network,
        params=None,  # each call brings its own
        graph=experiment.graph,
        schedule=experiment.schedule,
        objective=experiment.objective,
        tokenizer=tokenizer,
        length=config.data.length,
        sampling=Sampling.of(config.sample),
        mesh=experiment.mesh,
    )

    def draw_texts(step: int, params: Any) -> None:
        with progress.clock("sample"):
            states = model.with_params(params).stream(
                num_samples=count, batch_size=count, seed=config.seed
            )
            for state in states:
                if must_stop():
                    return
            texts = state.texts
        progress.samples(step, texts)

    return draw_texts


def _tell_what_has_no_effect(config: ConfigDict) -> None:
    """Warns of values that are allowed and can hardly be meant."""
    optimizer, steps = config.optimizer, config.train.steps
    if optimizer.warmup_steps >= steps:
        log.warning(
            "optimizer.warmup_steps %d is not below train.steps %d: the learning rate rises to the "
            "end and never stays at %g; lower it for so short a run",
            *(optimizer.warmup_steps, steps, optimizer.learning_rate),
        )
    schedule, usual = config.schedule, get_base_config().schedule
    if registry.is_registered("schedule", schedule.name):
        for key in ("eps", "sigma_min", "sigma_max"):
            if schedule[key] != usual[key]:
                log.warning(
                    "schedule.%s %g is of sedd_jax's own schedules; %r has its numbers in "
                    "schedule.parameters",
                    *(key, schedule[key], schedule.name),
                )
