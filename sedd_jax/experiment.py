"""What a config means over a mesh: graph, schedule, network, loss, optimizer and train step.

Everything is known from shapes alone, and nothing but `Experiment.start` allocates: training runs
an experiment, the dry run compiles the same one for machines that are not there.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from sedd_jax import registry, state
from sedd_jax.config import DTYPES
from sedd_jax.data import Blocks
from sedd_jax.diffusion.draws import check_settings, make_key
from sedd_jax.diffusion.graph import Graph
from sedd_jax.diffusion.losses import TIMES
from sedd_jax.diffusion.objectives import OBJECTIVES, Objective
from sedd_jax.diffusion.schedules import Schedule
from sedd_jax.models.head import make_score_fn
from sedd_jax.models.plaid import Plaid
from sedd_jax.models.transformer import Transformer
from sedd_jax.parallel import sharding
from sedd_jax.parallel.sharding import Placement
from sedd_jax.state import LossFn, TrainState


@dataclasses.dataclass(frozen=True)
class Experiment:
    """The parts of one config over one mesh; without a mesh, on the first device."""

    config: ConfigDict
    mesh: Mesh | None
    graph: Graph
    schedule: Schedule
    objective: Objective
    network: Transformer
    optimizer: optax.GradientTransformation
    loss_fn: LossFn

    @property
    def keys(self) -> dict[str, jax.Array]:
        """The run's keys by use; never drawn from twice."""
        uses = ("init", "train", "evaluate")
        return dict(zip(uses, jax.random.split(make_key(self.config.seed), len(uses))))

    def fresh(self) -> TrainState:
        """The state before the first step; a pure function of the config's seed."""
        params = init_params(self.config, self.network, self.keys["init"])
        return state.init(params, self.optimizer)

    def start(self) -> TrainState:
        """`fresh`, allocated on the mesh."""
        return jax.jit(self.fresh, out_shardings=self.shardings)()

    @functools.cached_property
    def shape(self) -> TrainState:
        """The state as jax.ShapeDtypeStruct, each leaf with its sharding."""
        shape = jax.eval_shape(self.fresh)
        return sharding.with_shardings(shape, sharding.tree_shardings(shape, self.mesh))

    def learning_rate(self, train_state: TrainState) -> float:
        """That of the last update, before the first one that of the first."""
        state = optax.tree_utils.tree_get(train_state.opt_state, "ScaleByScheduleState")
        return float(make_learning_rate(self.config)(max(int(state.count) - 1, 0)))

    @property
    def shardings(self) -> Any:
        """The sharding of each leaf of the state."""
        return jax.tree.map(lambda leaf: leaf.sharding, self.shape)

    @property
    def batch_shape(self) -> Blocks:
        """Shapes and shardings of the global batch of one step."""
        shape = (self.config.train.batch_size, self.config.data.length)
        rows = NamedSharding(self.mesh, sharding.BATCH)
        is_token = None
        if self.config.data.form == "padded":
            is_token = jax.ShapeDtypeStruct(shape, jnp.bool_, sharding=rows)
        return Blocks(jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows), is_token)

    @functools.cached_property
    def evaluated(self) -> float:
        """Expected fraction of positions whose scores the loss evaluates."""
        if not self.objective.has_scores:
            return 1.0
        return evaluated_fraction(self.graph, self.schedule, self.objective.t_min or 0.0)

    @property
    def flops(self) -> int:
        """Operations of the matmuls of one training step, on all devices together.

        The backward pass has two matmuls for each of the forward pass. The head is counted where
        scores are evaluated: with absorbing noise at the masked tokens, about half. What is
        rematerialised, in the blocks or in the head's gradient, is not part of the model's work and
        is not counted: the convention of MFU (Chowdhery et al. 2022, appendix B).
        """
        rows, length = self.config.train.batch_size, self.config.data.length
        head = 2 * length * self.graph.dim * self.config.model.hidden_size
        return 3 * rows * (network_flops(self.shape.params, length) + round(self.evaluated * head))

    @functools.cached_property
    def train_step(self) -> Any:
        """Jitted (state, Blocks, key) -> (state, metrics); the state is donated."""
        train_step = state.make_train_step(
            self.loss_fn,
            self.optimizer,
            decay=self.config.optimizer.ema_decay,
            microbatches=self.config.train.microbatches,
            platform=self.mesh.devices.flat[0].platform,
        )
        return state.on_mesh(train_step, self.shape, self.mesh)

    def lower(self) -> jax.stages.Lowered:
        """The train step, traced and lowered for the mesh's devices."""
        key = jax.eval_shape(lambda: self.keys["train"])
        return self.train_step.lower(self.shape, self.batch_shape, key)


def make_mesh(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The config's mesh over all devices; ValueError if it cannot split the batch or the model."""
    check_settings()
    mesh = sharding.make_mesh(config.mesh, devices)
    for key, axis in (("heads", "tensor"), ("hidden_size", "fsdp")):
        if config.model[key] % mesh.shape[axis]:
            raise ValueError(
                f"config.model.{key} {config.model[key]} is not divisible by the mesh's "
                f"{axis}={mesh.shape[axis]}; change one of them"
            )
    tensor = mesh.shape["tensor"]
    for group in mesh.devices.reshape(-1, tensor):
        if len({device.process_index for device in group}) > 1:
            raise ValueError(
                f"the mesh's tensor={tensor} goes over several processes, of which each loads rows "
                "of its own; set it to 1, or to a divisor of the devices of a process"
            )
    parts = sharding.batch_parts(mesh)
    rows = config.train.batch_size // config.train.microbatches
    if rows % parts:
        raise ValueError(
            f"config.train.batch_size {config.train.batch_size} in {config.train.microbatches} "
            f"microbatches gives {rows} rows, not divisible by the {parts} devices of the mesh's "
            "data and fsdp axes; change one of them"
        )
    return mesh


def make_experiment(config: ConfigDict, vocab_size: int, mesh: Mesh | None) -> Experiment:
    """The experiment of a checked config over its `make_mesh`, for vocab_size clean tokens."""
    graph, schedule = make_graph(config, vocab_size), make_schedule(config)
    objective, network = make_objective(config), make_model(config, graph, mesh)
    loss_fn = make_loss_fn(objective, network, graph, schedule)
    optimizer = make_optimizer(config)
    return Experiment(config, mesh, graph, schedule, objective, network, optimizer, loss_fn)


def network_flops(params: Any, length: int) -> int:
    """Operations of the matmuls, 2 M N K each, of one sequence through the network without head."""
    per_token = per_sequence = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = sharding.path_name(path)
        if re.search(r"(modulation/linear|sigma_[12])/kernel$", name):  # of the noise level
            per_sequence += 2 * leaf.size
        elif name.endswith("/kernel"):
            per_token += 2 * leaf.size
    blocks, _, _, heads, head_size = params["blocks"]["qkv"]["kernel"].shape
    attention = blocks * 4 * length**2 * heads * head_size  # q k^T, and the weights times v
    return per_sequence + length * per_token + attention


def evaluated_fraction(graph: Graph, schedule: Schedule, t_min: float) -> float:
    """Expected fraction of positions whose scores the loss evaluates: with a mask the masked ones,
    since at the others the score entropy is 0 whatever the scores are."""
    if graph.mask is None:
        return 1.0
    t = t_min + (1.0 - t_min) * (jnp.arange(1024) + 0.5) / 1024
    return float(-jnp.expm1(-schedule.sigma(t)).mean())


def make_loss_fn(
    objective: Objective, model: Transformer, graph: Graph, schedule: Schedule
) -> LossFn:
    """(params, key, Blocks) -> the objective's loss, nats per sequence [B]; dropout acts."""

    def loss_fn(params, key, blocks):
        x0, is_token = blocks
        key_noise, key_dropout = jax.random.split(key)
        score_fn = make_score_fn(model, params, graph, dropout_key=key_dropout, is_token=is_token)
        return objective.loss(key_noise, x0, score_fn, graph, schedule, is_token=is_token)

    return loss_fn


def make_graph(config: ConfigDict, vocab_size: int) -> Graph:
    """The graph over the tokenizer's vocabulary; the objective says what logits mean."""
    predicts_clean = OBJECTIVES[config.objective.name].predicts_clean
    return _build("graph", config.graph, vocab_size=vocab_size, predicts_clean=predicts_clean)


def make_objective(config: ConfigDict) -> Objective:
    """What the network is trained for, and how it is scored."""
    section = {**config.objective, "times": TIMES[config.objective.times]}
    return _build("objective", section)


def make_schedule(config: ConfigDict) -> Schedule:
    """The noise schedule; ValueError if it leaves no number of float32 at t = 1, or if a user's own
    has a slope that is not sigma's."""
    schedule, name = _build("schedule", config.schedule), config.schedule.name
    last = float(schedule.sigma(jnp.float32(1.0)))
    if not 0.0 < last <= 80.0:
        raise ValueError(
            f"schedule {name!r} has sigma(1) = {last}, which is not in (0, 80], where float32 has "
            "exp(sigma); leave a share of the tokens clean at t = 1"
        )
    if registry.is_registered("schedule", name):
        _check_slope(schedule, name)
    return schedule


def _check_slope(schedule: Schedule, name: str) -> None:
    """ValueError unless sigma rises, at the rate dsigma_dt within 5 %."""
    t, h = jnp.linspace(0.13, 0.87, 8), 0.004  # apart from where pieces of one may meet
    rise = (schedule.sigma(t + h) - schedule.sigma(t - h)) / (2 * h)
    slope = schedule.dsigma_dt(t)
    is_wrong = ~(jnp.abs(slope - rise) < 0.05 * rise)  # NaN is wrong
    if is_wrong.any():
        i = int(jnp.argmax(is_wrong))
        raise ValueError(
            f"schedule {name!r} has dsigma_dt({t[i]:g}) = {slope[i]:g}, where sigma rises by "
            f"{rise[i]:g} a unit of time; let sigma rise, and return its slope"
        )


def _build(kind: str, section: Mapping[str, Any], **fields: Any) -> Any:
    """The dataclass that section names, with those of its fields that the section holds; of one's
    own, the fields are in its parameters."""
    about, name = registry.KINDS[kind], section["name"]
    names = {field.name for field in dataclasses.fields(about.table[name])} & {*section} - {"name"}
    if registry.is_registered(kind, name):
        names &= {*about.given}
        fields |= dict(section["parameters"].items())
    return about.table[name](**fields, **{name: section[name] for name in names})


def make_model(config: ConfigDict, graph: Graph, mesh: Mesh | None = None) -> Transformer:
    """The network for the graph's states, its activations split as their rows on the mesh."""
    check_settings()
    fields = config.model.to_dict()
    fields |= {key: DTYPES[fields[key]] for key in ("dtype", "residual_dtype")}
    objective = make_objective(config)
    fields["is_causal"] = objective.is_causal
    if objective.is_continuous:
        sizes = {"dim": graph.vocab_size, "embedding_dim": objective.embedding_dim}
        return Plaid(**sizes, placement=Placement(mesh), **fields)
    return Transformer(dim=graph.dim, placement=Placement(mesh), **fields)


def init_params(config: ConfigDict, model: Transformer, key: jax.Array) -> Any:
    """Fresh float32 parameters."""
    model = model.clone(placement=Placement())  # one row is not split
    return model.init(key, *model.example(config.data.length), deterministic=True)["params"]


def make_learning_rate(config: ConfigDict) -> optax.Schedule:
    """A linear warm-up, a constant rate and, at the end, a linear decay."""
    o, steps = config.optimizer, config.train.steps
    decay_steps = max(o.decay_fraction * steps, 1.0)

    def learning_rate(count):
        # count is 0 at the first update, which takes 1/warmup of the rate; the last takes 1/decay.
        warmup = jnp.minimum((count + 1) / max(o.warmup_steps, 1), 1.0)
        decay = jnp.clip((steps - count) / decay_steps, 0.0, 1.0) if o.decay_fraction else 1.0
        return o.learning_rate * jnp.minimum(warmup, decay)

    return learning_rate


def make_optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """AdamW with the rates of `make_learning_rate`, of clipped gradients."""
    o = config.optimizer
    return optax.chain(
        optax.clip_by_global_norm(o.clip_norm),
        optax.adamw(
            make_learning_rate(config),
            b1=o.b1,
            b2=o.b2,
            eps=o.eps,
            weight_decay=o.weight_decay,
            mu_dtype=DTYPES[o.mu_dtype],
        ),
    )


def moments(opt_state: Any) -> optax.ScaleByAdamState:
    """AdamW's count and moments within the state of `make_optimizer`."""
    return optax.tree_utils.tree_get(opt_state, "ScaleByAdamState")


def imported_state(
    config: ConfigDict,
    vocab_size: int,
    *,
    params: Any,
    ema: Any,
    step: int = 0,
    ema_updates: int = 0,
    moments: optax.ScaleByAdamState | None = None,
) -> TrainState:
    """The train state with these trees, numpy float32; without moments AdamW and the warm-up of
    the learning rate begin anew."""
    shape = make_experiment(config, vocab_size, mesh=None).shape
    # The original counts a step whose gradient overflowed, its AdamW does not.
    skipped = max(step - moments.count, 0) if moments and moments.count else 0
    warm_up = 0 if moments is None else step
    if moments is None:
        moments = optax.ScaleByAdamState(0, *(jax.tree.map(np.zeros_like, params),) * 2)
    train_state = TrainState(
        step=step,
        params=params,
        opt_state=optax.tree_utils.tree_set(
            shape.opt_state,
            ScaleByAdamState=moments,
            ScaleByScheduleState=optax.ScaleByScheduleState(warm_up),
        ),
        ema=ema,
        ema_updates=ema_updates,
        skipped=skipped,
        skipped_in_a_row=0,
    )
    return jax.tree.map(lambda leaf, value: jnp.asarray(value, leaf.dtype), shape, train_state)
