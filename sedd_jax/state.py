"""The train state and the one train step.

The step is a pure function (state, batch, key) -> (state, metrics), jitted over a mesh by
`on_mesh`. It knows neither objective nor network: `loss_fn(params, key, batch)` gives the objective's
`Loss`: nats per sequence, [B], and what is only looked at.
"""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from sedd_jax import sharding
from sedd_jax.diffusion.losses import Loss

LossFn = Callable[[Any, jax.Array, Any], Loss]


@flax.struct.dataclass
class TrainState:
    """Everything that training carries from step to step."""

    step: jax.Array  # int32: steps taken, skipped ones included; the place in the data
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
):
    """One update: (state, batch, key) -> (state, metrics).

    batch is a pytree of [B, ...]; B must be divisible by microbatches, whose gradients are
    averaged. key is the run's: every step and microbatch folds its number into it. A step whose
    loss or gradient is not finite changes nothing but the counters.
    """

    def of_part(params, key, part):
        """((loss, log_z), gradient) of one microbatch."""

        def mean(params):
            found = loss_fn(params, key, part)
            return found.nats.mean(), found.log_z

        return jax.value_and_grad(mean, has_aux=True)(params)

    def gradients(params, key, batch):
        if microbatches == 1:  # no second buffer of the gradient's size
            (loss, log_z), grads = of_part(params, jax.random.fold_in(key, 0), batch)
            return loss, grads, log_z

        def split(a):
            # Microbatch i takes the rows i, i + A, ...: each device keeps the rows it holds.
            return a.reshape(-1, microbatches, *a.shape[1:]).swapaxes(0, 1)

        def accumulate(total, index_and_part):
            index, part = index_and_part
            (loss, log_z), grads = of_part(params, jax.random.fold_in(key, index), part)
            total = jax.tree.map(lambda t, g: t + g / microbatches, total, (loss, grads))
            return total, log_z

        zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
        parts = (jnp.arange(microbatches), jax.tree.map(split, batch))
        (loss, grads), log_z = jax.lax.scan(accumulate, zeros, parts)
        return loss, grads, None if log_z is None else log_z.mean()

    def train_step(state: TrainState, batch, key: jax.Array):
        loss, grads, log_z = gradients(state.params, jax.random.fold_in(key, state.step), batch)
        grad_norm = jnp.sqrt(sum(jnp.sum(g * g) for g in jax.tree.leaves(grads)))
        is_finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)

        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema_updates = state.ema_updates + 1
        keep = ema_decay(ema_updates, decay)
        ema = jax.tree.map(lambda e, p: e - (1.0 - keep) * (e - p), state.ema, params)

        def guard(new, old):
            return jax.tree.map(lambda n, o: jnp.where(is_finite, n, o), new, old)

        skip = jnp.where(is_finite, 0, 1)
        state = TrainState(
            step=state.step + 1,
            params=guard(params, state.params),
            opt_state=guard(opt_state, state.opt_state),
            ema=guard(ema, state.ema),
            ema_updates=guard(ema_updates, state.ema_updates),
            skipped=state.skipped + skip,
            skipped_in_a_row=(state.skipped_in_a_row + 1) * skip,
        )
        metrics = {
            "loss": loss,
            "grad_norm": grad_norm,
            "skipped": state.skipped,
            "skipped_in_a_row": state.skipped_in_a_row,
        }
        if log_z is not None:
            metrics["log_z"] = log_z
        return state, metrics

    return train_step


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
