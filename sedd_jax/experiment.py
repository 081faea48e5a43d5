"""The compiled part of an experiment: what a config means on a mesh, from shapes alone.

Nothing here allocates: training calls what it finds here, the dry run compiles it for machines that
are not there.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from sedd_jax import config as configuration
from sedd_jax import state
from sedd_jax.data import Blocks
from sedd_jax.diffusion.graphs import GRAPHS, Graph
from sedd_jax.diffusion.losses import OBJECTIVES, TIMES
from sedd_jax.diffusion.schedules import SCHEDULES, Schedule
from sedd_jax.models.head import make_score_fn
from sedd_jax.models.transformer import Transformer
from sedd_jax.parallel import sharding
from sedd_jax.parallel.devices import matmul_flops
from sedd_jax.parallel.sharding import Placement
from sedd_jax.state import LossFn


@dataclasses.dataclass(frozen=True)
class Program:
    """The parts of one config over one mesh; shapes and shardings of the state included."""

    config: ConfigDict
    mesh: Mesh
    graph: Graph
    schedule: Schedule
    network: Transformer
    optimizer: optax.GradientTransformation
    shape: state.TrainState  # of jax.ShapeDtypeStruct, each with its sharding
    train_step: Any  # jitted (state, Blocks, key) -> (state, metrics); the state is donated

    def fresh(self) -> state.TrainState:
        """The state before the first step; a pure function of the config's seed."""
        return _fresh(self.config, self.network, self.optimizer)

    @property
    def keys(self) -> dict[str, jax.Array]:
        """The run's keys by use; never drawn from twice."""
        return _keys(self.config)

    def start(self) -> state.TrainState:
        """`fresh`, placed on the mesh."""
        return jax.jit(self.fresh, out_shardings=self.shardings)()

    @property
    def shardings(self) -> Any:
        """Where each leaf of the state lives."""
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
        """Operations of the matrix products of one training step, on all devices together.

        The backward pass has two products for each of the forward pass. The head is counted where
        scores are asked for: with absorbing noise at the masked tokens, about half. What
        rematerialisation, or the head's gradient, makes again is no part of the model's work, and
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
        asked = self.graph.asked(self.schedule, self.config.objective.t_min)
        return 3 * (blocks + round(asked * table))

    def compile(self) -> jax.stages.Compiled:
        """The train step's executable, (state, Blocks, key) -> (state, metrics)."""
        return self.lower().compile()

    def lower(self) -> jax.stages.Lowered:
        """The train step, traced and lowered for the mesh's devices."""
        key = jax.eval_shape(lambda: self.keys["train"])
        return self.train_step.lower(self.shape, self.batch_shape, key)


def make_program(config: ConfigDict, vocab_size: int, mesh: Mesh) -> Program:
    """The program of a checked config for vocab_size clean tokens; ValueError if it does not fit the
    mesh."""
    configuration.check_mesh(config, mesh)
    graph = make_graph(config, vocab_size)
    schedule = make_schedule(config)
    network = make_model(config, graph, mesh)
    optimizer = make_optimizer(config)
    shape = jax.eval_shape(lambda: _fresh(config, network, optimizer))
    shape = sharding.with_shardings(shape, sharding.tree_shardings(shape, mesh))
    train_step = state.on_mesh(
        state.make_train_step(
            make_loss_fn(config, network, graph, schedule),
            optimizer,
            clip_norm=config.optimizer.clip_norm,
            decay=config.optimizer.ema_decay,
            microbatches=config.train.microbatches,
            tile=state.TILE if network.placement.is_one_cpu else None,
        ),
        shape,
        mesh,
    )
    return Program(config, mesh, graph, schedule, network, optimizer, shape, train_step)


def _keys(config: ConfigDict) -> dict[str, jax.Array]:
    uses = ("init", "train", "evaluate")
    return dict(zip(uses, jax.random.split(jax.random.key(config.seed), len(uses))))


def _fresh(
    config: ConfigDict, network: Transformer, optimizer: optax.GradientTransformation
) -> state.TrainState:
    params = init_params(config, network, _keys(config)["init"])
    return state.init(params, optimizer)


def make_graph(config: ConfigDict, vocab_size: int) -> Graph:
    """The graph over the tokenizer's vocabulary."""
    return configuration.named(GRAPHS, config.graph, vocab_size=vocab_size)


def make_schedule(config: ConfigDict) -> Schedule:
    """The noise schedule."""
    return configuration.named(SCHEDULES, config.schedule)


def make_model(config: ConfigDict, graph: Graph, mesh: Mesh | None = None) -> Transformer:
    """The network for the graph's states, its activations kept with their rows on the mesh."""
    fields = {**config.model.to_dict(), "dtype": configuration.DTYPES[config.model.dtype]}
    if mesh is not None:
        fields["placement"] = Placement(mesh)
    return Transformer(dim=graph.dim, **fields)


def init_params(config: ConfigDict, model: Transformer, key: jax.Array) -> Any:
    """Fresh float32 parameters."""
    tokens = jnp.zeros((1, config.data.length), jnp.int32)
    model = model.clone(placement=Placement())  # one row is not split
    return model.init(key, tokens, jnp.zeros((1, 1)), deterministic=True)["params"]


def make_optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """AdamW with a linear warm-up to a constant learning rate; the train step clips."""
    o = config.optimizer

    def learning_rate(count):  # count is 0 at the first update, which takes 1/warmup of the rate
        return o.learning_rate * jnp.minimum((count + 1) / max(o.warmup_steps, 1), 1.0)

    return optax.chain(
        optax.identity(),  # where stored states have the clip, which holds nothing
        optax.adamw(
            learning_rate,
            b1=o.b1,
            b2=o.b2,
            eps=o.eps,
            weight_decay=o.weight_decay,
            mu_dtype=configuration.DTYPES[o.mu_dtype],
        ),
    )


def make_loss_fn(
    config: ConfigDict, model: Transformer, graph: Graph, schedule: Schedule
) -> LossFn:
    """(params, key, Blocks) -> nats per sequence, [B]; dropout acts."""
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
