"""The train state and the one train step.

The step is a pure function (state, batch, key) -> (state, metrics), jitted over a mesh by
`on_mesh`. It knows neither objective nor network: `loss_fn(params, key, batch)` returns a `Loss`.
"""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from sedd_jax.diffusion.losses import Loss
from sedd_jax.kernels.cpu import update_if
from sedd_jax.parallel import sharding

LossFn = Callable[[Any, jax.Array, Any], Loss]


@flax.struct.dataclass
class TrainState:
    """Everything that training carries from step to step."""

    step: jax.Array  # int32: steps taken, skipped ones included; the position in the data
    params: Any  # float32
    opt_state: Any
    ema: Any  # float32, the tree of params
    ema_updates: jax.Array  # int32: steps that changed the parameters
    skipped: jax.Array  # int32: steps skipped because something was not finite
    skipped_in_a_row: jax.Array  # int32


def init(params, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step; the moving average starts at the parameters."""

    def zero():  # a buffer for each counter: a donated state may not hold one twice
        return jnp.zeros((), jnp.int32)

    return TrainState(
        step=zero(),
        params=params,
        opt_state=optimizer.init(params),
        ema=jax.tree.map(jnp.copy, params),
        ema_updates=zero(),
        skipped=zero(),
        skipped_in_a_row=zero(),
    )


def ema_decay(updates: jax.Array, decay: float) -> jax.Array:
    """min(decay, (1 + n) / (10 + n)) at the n-th update, counted from 1, as the original's."""
    n = updates.astype(jnp.float32)
    return jnp.minimum(decay, (1.0 + n) / (10.0 + n))


def make_train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    decay: float = 0.9999,
    microbatches: int = 1,
    platform: str = "",
):
    """One update: (state, batch, key) -> (state, metrics).

    batch is a pytree of [B, ...]; B must be divisible by microbatches, whose gradients are
    averaged. key is the run's: every step and microbatch folds its number into it. A step whose
    loss or gradient is not finite changes nothing but the counters. decay is the moving average's.
    platform is the devices', for the form of the update that is fast there.
    metrics are `loss`, the mean nats of a sequence; `grad_norm`, before the optimizer clips it;
    `skipped` and `skipped_in_a_row`; and those of the loss.
    """

    def train_step(state: TrainState, batch, key: jax.Array):
        key = jax.random.fold_in(key, state.step)
        loss, grads, metrics = _gradients(loss_fn, state.params, key, batch, microbatches)
        grad_norm = optax.tree.norm(grads)
        is_finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)

        def update(state: TrainState) -> TrainState:
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            ema_updates = state.ema_updates + 1
            weight = 1.0 - ema_decay(ema_updates, decay)
            ema = jax.tree.map(lambda ema, p: ema - weight * (ema - p), state.ema, params)
            return state.replace(
                params=params, opt_state=opt_state, ema=ema, ema_updates=ema_updates
            )

        state = update_if(is_finite, update, state, platform)
        is_skipped = (~is_finite).astype(jnp.int32)
        state = state.replace(
            step=state.step + 1,
            skipped=state.skipped + is_skipped,
            skipped_in_a_row=(state.skipped_in_a_row + 1) * is_skipped,
        )
        return state, {
            "loss": loss,
            "grad_norm": grad_norm,
            "skipped": state.skipped,
            "skipped_in_a_row": state.skipped_in_a_row,
            **metrics,
        }

    return train_step


def _gradients(loss_fn: LossFn, params: Any, key: jax.Array, batch: Any, microbatches: int):
    """(mean loss, its gradient, the loss's metrics), a microbatch after the other."""

    def mean_loss(params, key, batch):
        loss = loss_fn(params, key, batch)
        return loss.nats.mean(), loss.metrics

    def of_microbatch(index, batch):
        value_and_grad = jax.value_and_grad(mean_loss, has_aux=True)
        (loss, metrics), grads = value_and_grad(params, jax.random.fold_in(key, index), batch)
        return (loss, grads), metrics

    if microbatches == 1:  # without a second buffer of the gradient's size
        (loss, grads), metrics = of_microbatch(0, batch)
    else:

        def split(a):
            # Microbatch i has the rows i, i + A, ...: each device keeps the rows that it holds.
            return a.reshape(-1, microbatches, *a.shape[1:]).swapaxes(0, 1)

        def accumulate(total, index_and_batch):
            of_one, metrics = of_microbatch(*index_and_batch)
            return jax.tree.map(lambda t, a: t + a / microbatches, total, of_one), metrics

        zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
        parts = (jnp.arange(microbatches), jax.tree.map(split, batch))
        (loss, grads), metrics = jax.lax.scan(accumulate, zeros, parts)
    return loss, grads, {name: mean.value() for name, mean in metrics.items()}


def on_mesh(train_step, state_shape: TrainState, mesh: Mesh):
    """train_step jitted over the mesh with the state placed by sharding.RULES and donated."""
    state_shardings = sharding.tree_shardings(state_shape, mesh)
    batch_sharding = NamedSharding(mesh, sharding.BATCH)
    return jax.jit(
        train_step,
        in_shardings=(state_shardings, batch_sharding, None),
        out_shardings=(state_shardings, None),
        donate_argnums=0,
    )
