"""What a config means over a mesh: graph, schedule, network, loss, optimizer and train step.

Everything is known from shapes alone, and nothing but `Experiment.start` allocates: training runs
an experiment, the dry run compiles the same one for machines that are not there.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from sedd_jax import state
from sedd_jax.config import DTYPES
from sedd_jax.data import Blocks
from sedd_jax.diffusion.graphs import GRAPHS, Graph, lift
from sedd_jax.diffusion.losses import OBJECTIVES, TIMES
from sedd_jax.diffusion.schedules import SCHEDULES, Schedule
from sedd_jax.diffusion.scores import DenseScores
from sedd_jax.models.head import make_score_fn
from sedd_jax.models.transformer import Transformer
from sedd_jax.parallel import sharding
from sedd_jax.parallel.devices import matmul_flops
from sedd_jax.parallel.sharding import Placement
from sedd_jax.state import LossFn, TrainState


@dataclasses.dataclass(frozen=True)
class Experiment:
    """The parts of one config over one mesh; shapes and shardings of the state included."""

    config: ConfigDict
    mesh: Mesh
    graph: Graph
    schedule: Schedule
    network: Transformer
    optimizer: optax.GradientTransformation
    loss_fn: LossFn
    shape: TrainState  # of jax.ShapeDtypeStruct, each with its sharding
    train_step: Any  # jitted (state, Blocks, key) -> (state, metrics); the state is donated

    @property
    def keys(self) -> dict[str, jax.Array]:
        """The run's keys by use; never drawn from twice."""
        return _keys(self.config)

    def fresh(self) -> TrainState:
        """The state before the first step; a pure function of the config's seed."""
        return _fresh(self.config, self.network, self.optimizer)

    def start(self) -> TrainState:
        """`fresh`, allocated on the mesh."""
        return jax.jit(self.fresh, out_shardings=self.shardings)()

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
    def flops(self) -> int:
        """Operations of the matmuls of one training step, on all devices together.

        The backward pass has two matmuls for each of the forward pass. The head is counted where
        scores are evaluated: with absorbing noise at the masked tokens, about half. What is
        rematerialised, in the blocks or in the head's gradient, is no part of the model's work, and
        is not counted: the convention of MFU (Chowdhery et al. 2022, appendix B).
        """
        # Counted in plain JAX, whatever kernels the devices take.
        network = self.network.clone(placement=Placement(), attention="xla")

        def hidden(params, tokens, sigma):
            return network.apply({"params": params}, tokens, sigma, deterministic=True)

        rows, length = self.batch_shape.tokens.shape
        tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32)
        sigma = jax.ShapeDtypeStruct((rows, 1), jnp.float32)
        blocks = matmul_flops(hidden, self.shape.params, tokens, sigma)
        table = 2 * rows * length * self.graph.dim * self.config.model.hidden_size
        evaluated = evaluated_fraction(self.graph, self.schedule, self.config.objective.t_min)
        return 3 * (blocks + round(evaluated * table))

    def lower(self) -> jax.stages.Lowered:
        """The train step, traced and lowered for the mesh's devices."""
        key = jax.eval_shape(lambda: self.keys["train"])
        return self.train_step.lower(self.shape, self.batch_shape, key)

    def compile(self) -> jax.stages.Compiled:
        """The train step's executable, (state, Blocks, key) -> (state, metrics)."""
        return self.lower().compile()


def make_mesh(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The config's mesh over all devices; ValueError if it cannot split the batch or the heads."""
    mesh = sharding.make_mesh(config.mesh, devices)
    if config.model.heads % mesh.shape["tensor"]:
        raise ValueError(
            f"config.model.heads {config.model.heads} is not divisible by the mesh's "
            f"tensor={mesh.shape['tensor']}; change one of them"
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


def make_experiment(config: ConfigDict, vocab_size: int, mesh: Mesh) -> Experiment:
    """The experiment of a checked config over its `make_mesh`, for vocab_size clean tokens."""
    graph = make_graph(config, vocab_size)
    schedule = make_schedule(config)
    network = make_model(config, graph, mesh)
    optimizer = make_optimizer(config)
    loss_fn = make_loss_fn(config, network, graph, schedule)
    shape = jax.eval_shape(lambda: _fresh(config, network, optimizer))
    shape = sharding.with_shardings(shape, sharding.tree_shardings(shape, mesh))
    train_step = state.on_mesh(
        state.make_train_step(
            loss_fn,
            optimizer,
            decay=config.optimizer.ema_decay,
            microbatches=config.train.microbatches,
        ),
        shape,
        mesh,
    )
    return Experiment(config, mesh, graph, schedule, network, optimizer, loss_fn, shape, train_step)


def evaluated_fraction(graph: Graph, schedule: Schedule, t_min: float) -> float:
    """Expected fraction of positions whose scores the loss evaluates.

    At the others the score entropy is 0 whatever the scores are. Computed for a vocabulary of two
    tokens: the fraction does not depend on their number.
    """
    graph = dataclasses.replace(graph, vocab_size=2)
    sigma = schedule.sigma(t_min + (1.0 - t_min) * (jnp.arange(1024)[:, None] + 0.5) / 1024)
    xt = jnp.broadcast_to(jnp.arange(graph.dim), (len(sigma), graph.dim))  # every state at each t
    x0 = jnp.zeros_like(xt)
    probability = lift(lambda x, sigma: graph.transp_transition(x, sigma)[0], xt, sigma)
    scores = DenseScores(jnp.ones((*xt.shape, graph.dim)), xt, graph.vocab_size)
    is_zero = graph.score_entropy(scores, sigma, xt, x0).value == 0.0
    return 1.0 - float((probability * is_zero).sum(axis=-1).mean())


def make_loss_fn(
    config: ConfigDict, model: Transformer, graph: Graph, schedule: Schedule
) -> LossFn:
    """(params, key, Blocks) -> the objective's loss, nats per sequence [B]; dropout acts."""
    objective, times = OBJECTIVES[config.objective.name], TIMES[config.objective.times]

    def loss_fn(params, key, blocks):
        x0, is_token = blocks
        key_noise, key_dropout = jax.random.split(key)
        score_fn = make_score_fn(model, params, graph, dropout_key=key_dropout, is_token=is_token)
        return objective(
            key_noise,
            x0,
            score_fn,
            graph,
            schedule,
            t_min=config.objective.t_min,
            times=times,
            is_token=is_token,
        )

    return loss_fn


def make_graph(config: ConfigDict, vocab_size: int) -> Graph:
    """The graph over the tokenizer's vocabulary."""
    return _build(GRAPHS, config.graph, vocab_size=vocab_size)


def make_schedule(config: ConfigDict) -> Schedule:
    """The noise schedule."""
    return _build(SCHEDULES, config.schedule)


def _build(table: Mapping[str, type], section: ConfigDict, **fields: Any) -> Any:
    """The dataclass that section names, with those of its fields that the section holds."""
    cls = table[section.name]
    names = {field.name for field in dataclasses.fields(cls)} & set(section) - {"name"}
    return cls(**fields, **{name: section[name] for name in names})


def make_model(config: ConfigDict, graph: Graph, mesh: Mesh | None = None) -> Transformer:
    """The network for the graph's states, its activations split as their rows on the mesh."""
    fields = {**config.model.to_dict(), "dtype": DTYPES[config.model.dtype]}
    if mesh is not None:
        fields["placement"] = Placement(mesh)
    return Transformer(dim=graph.dim, **fields)


def init_params(config: ConfigDict, model: Transformer, key: jax.Array) -> Any:
    """Fresh float32 parameters."""
    tokens = jnp.zeros((1, config.data.length), jnp.int32)
    model = model.clone(placement=Placement())  # one row is not split
    return model.init(key, tokens, jnp.zeros((1, 1)), deterministic=True)["params"]


def make_optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """AdamW with a linear warm-up to a constant learning rate, of clipped gradients."""
    o = config.optimizer

    def learning_rate(count):  # count is 0 at the first update, which takes 1/warmup of the rate
        return o.learning_rate * jnp.minimum((count + 1) / max(o.warmup_steps, 1), 1.0)

    return optax.chain(
        optax.clip_by_global_norm(o.clip_norm),
        optax.adamw(
            learning_rate,
            b1=o.b1,
            b2=o.b2,
            eps=o.eps,
            weight_decay=o.weight_decay,
            mu_dtype=DTYPES[o.mu_dtype],
        ),
    )


def _keys(config: ConfigDict) -> dict[str, jax.Array]:
    uses = ("init", "train", "evaluate")
    return dict(zip(uses, jax.random.split(jax.random.key(config.seed), len(uses))))


def _fresh(
    config: ConfigDict, network: Transformer, optimizer: optax.GradientTransformation
) -> TrainState:
    params = init_params(config, network, _keys(config)["init"])
    return state.init(params, optimizer)


def state_shape(config: ConfigDict, vocab_size: int) -> TrainState:
    """Shapes and dtypes of the train state, for whoever reads a run on any devices."""
    network = make_model(config, make_graph(config, vocab_size))
    return jax.eval_shape(lambda: _fresh(config, network, make_optimizer(config)))


class Moments(NamedTuple):
    """AdamW's state: updates made, first and second moments in the tree of the parameters."""

    count: int
    mu: Any
    nu: Any


def moments(opt_state: Any) -> Moments:
    """AdamW's state within that of `make_optimizer`."""
    adam = optax.tree_utils.tree_get(opt_state, "ScaleByAdamState")
    return Moments(int(adam.count), adam.mu, adam.nu)


def imported_state(
    config: ConfigDict,
    vocab_size: int,
    *,
    params: Any,
    ema: Any,
    step: int = 0,
    ema_updates: int = 0,
    moments: Moments | None = None,
    schedule_count: int = 0,
) -> TrainState:
    """The train state with these trees, numpy float32; without moments AdamW begins anew.

    schedule_count is the number of updates that the learning rate's warm-up has seen.
    """
    if moments is None:
        moments = Moments(0, *(jax.tree.map(np.zeros_like, params) for _ in range(2)))
    shape = state_shape(config, vocab_size)
    train_state = TrainState(
        step=step,
        params=params,
        opt_state=optax.tree_utils.tree_set(
            shape.opt_state,
            ScaleByAdamState=optax.ScaleByAdamState(*moments),
            ScaleByScheduleState=optax.ScaleByScheduleState(schedule_count),
        ),
        ema=ema,
        ema_updates=ema_updates,
        # The original counts a step whose gradient overflowed, its AdamW does not.
        skipped=max(step - moments.count, 0) if moments.count else 0,
        skipped_in_a_row=0,
    )
    return jax.tree.map(lambda leaf, value: jnp.asarray(value, leaf.dtype), shape, train_state)
