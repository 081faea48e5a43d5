"""Our training workdir, as conversion reads and writes it."""

import json
import logging
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sedd_jax import config as configuration
from sedd_jax import experiment, state
from sedd_jax.data import Tokenizer, tokenizer_from_dict
from sedd_jax.files import appearing, check_new, load_json
from sedd_jax.parallel import sharding
from sedd_jax.runs.checkpoint import Checkpoints
from sedd_jax.state import TrainState

log = logging.getLogger(__name__)

CONFIG, TOKENIZER, CHECKPOINTS = "config.json", "tokenizer.json", "checkpoints"
ORIGINAL = "original.json"  # the config that an imported run came with
SUMMARY = "summary.json"  # of sedd-report


class Workdir(NamedTuple):
    """What a run is, without its weights."""

    folder: Path
    config: ConfigDict
    tokenizer: Tokenizer
    original: dict | None


def open_workdir(folder: Path) -> Workdir:
    """A training run's folder; ValueError if it is none."""
    folder = Path(folder)
    missing = [n for n in (CONFIG, TOKENIZER, CHECKPOINTS) if not (folder / n).exists()]
    if missing:
        raise ValueError(
            f"{str(folder)!r} holds no training run: {', '.join(missing)} missing; give the "
            "--workdir of a sedd-train that has saved a checkpoint"
        )
    config = configuration.from_json((folder / CONFIG).read_text(encoding="utf-8"))
    configuration.check(config)
    tokenizer = tokenizer_from_dict(json.loads((folder / TOKENIZER).read_text(encoding="utf-8")))
    file = folder / ORIGINAL
    theirs = load_json(file.read_bytes(), repr(str(file))) if file.exists() else None
    return Workdir(folder, config, tokenizer, theirs)


def read_state(workdir: Workdir) -> TrainState:
    """The newest checkpoint's whole train state, on one device."""
    shape = _placed(_shape(workdir.config, workdir.tokenizer.vocab_size))
    with Checkpoints(workdir.folder / CHECKPOINTS, read_only=True) as checkpoints:
        return checkpoints.restore(checkpoints.needed(), shape)


def read_average(workdir: Workdir, mesh: Mesh | None = None) -> tuple[int, Any]:
    """(step, moving average) of the newest checkpoint, reading nothing else; see `shardings`."""
    shape = _placed(_shape(workdir.config, workdir.tokenizer.vocab_size).ema, mesh)
    with Checkpoints(workdir.folder / CHECKPOINTS, read_only=True) as checkpoints:
        return checkpoints.restore_ema(shape)


def newest_step(workdir: Workdir) -> int | None:
    """The newest checkpoint's step."""
    with Checkpoints(workdir.folder / CHECKPOINTS, read_only=True) as checkpoints:
        return checkpoints.newest()


def _shape(config: ConfigDict, vocab_size: int) -> TrainState:
    model = experiment.make_model(config, experiment.make_graph(config, vocab_size))
    optimizer = experiment.make_optimizer(config)
    key = jax.random.key(0)
    return jax.eval_shape(lambda: state.init(experiment.init_params(config, model, key), optimizer))


def _placed(shape: Any, mesh: Mesh | None = None) -> Any:
    return sharding.with_shardings(shape, shardings(shape, mesh))


def shardings(tree: Any, mesh: Mesh | None) -> Any:
    """Where each leaf goes: as sharding.RULES say, or all to one device where there is no mesh."""
    if mesh is not None:
        return sharding.tree_shardings(tree, mesh)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda leaf: device, tree)


def about(workdir: Workdir) -> dict[str, Any]:
    """What a model card tells of the moving average: its corpus, and the numbers of sedd-report.

    Without the numbers, and with a warning, where summary.json is not as sedd-report writes it.
    """
    found = {"weights": "ema", "corpus": workdir.config.data.corpus, "numbers": []}
    summary = workdir.folder / SUMMARY
    if summary.is_file():
        try:
            found["numbers"] = _numbers(summary)
        except (OSError, ValueError, LookupError, TypeError, OverflowError) as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            log.warning(
                "%s is left out, it is not as sedd-report writes it (%s); run that again",
                repr(str(summary)),
                reason,
            )
    return found


def _numbers(summary: Path) -> list[dict[str, str]]:
    heldout, numbers = load_json(summary.read_bytes(), repr(str(summary)))["heldout"], []
    how = (
        f"upper bound, {heldout['passes']} noise levels a block, {heldout['blocks']} blocks of "
        f"split {heldout['split']!r}, step {heldout['step']}, seed {heldout['seed']}"
    )
    for unit in ("bits_per_character", "nats_per_token"):
        value, error = (heldout[unit][key] for key in ("bound", "bound_standard_error"))
        number = {"name": unit.replace("_", " "), "value": f"{value:.3f} +- {error:.3f}"}
        numbers.append({**number, "how": how})
    return numbers


class Moments(NamedTuple):
    """AdamW's memory: updates made, first and second moments in the tree of the parameters."""

    count: int
    mu: Any
    nu: Any


def moments(opt_state: Any) -> Moments:
    """AdamW's memory in the state of `config.make_optimizer`."""
    nodes = jax.tree.leaves(opt_state, is_leaf=_is_counted)
    (adam,) = (node for node in nodes if isinstance(node, optax.ScaleByAdamState))
    return Moments(int(adam.count), adam.mu, adam.nu)


def new_state(
    config: ConfigDict,
    vocab_size: int,
    *,
    params: Any,
    ema: Any,
    step: int = 0,
    ema_updates: int = 0,
    found: Moments | None = None,
    schedule_count: int = 0,
) -> TrainState:
    """The train state with these trees, numpy float32; without `found`, AdamW begins anew.

    schedule_count is how many updates the learning rate's warm-up has seen.
    """
    if found is None:
        zeros = [jax.tree.map(np.zeros_like, params) for _ in range(2)]
        found = Moments(0, *zeros)

    def place(node):
        if isinstance(node, optax.ScaleByAdamState):
            return optax.ScaleByAdamState(np.int32(found.count), found.mu, found.nu)
        return node._replace(count=np.int32(schedule_count))

    shape = _shape(config, vocab_size)
    train_state = TrainState(
        step=np.int32(step),
        params=params,
        opt_state=jax.tree.map(place, shape.opt_state, is_leaf=_is_counted),
        ema=ema,
        ema_updates=np.int32(ema_updates),
        # The original counts a step whose gradient overflowed, its AdamW does not.
        skipped=np.int32(max(step - found.count, 0) if found.count else 0),
        skipped_in_a_row=np.int32(0),
    )
    return jax.tree.map(jnp.asarray, train_state)


def _is_counted(node: Any) -> bool:
    return isinstance(node, (optax.ScaleByAdamState, optax.ScaleByScheduleState))


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
        (part / CONFIG).write_text(configuration.to_json(config), encoding="utf-8")
        (part / TOKENIZER).write_text(json.dumps(tokenizer.to_dict()), encoding="utf-8")
        if original is not None:
            (part / ORIGINAL).write_text(json.dumps(original, indent=1), encoding="utf-8")
        with Checkpoints(part / CHECKPOINTS) as checkpoints:
            checkpoints.save(int(train_state.step), train_state)
            checkpoints.wait()
