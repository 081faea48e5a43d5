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

from sedd_jax.diffusion.losses import Loss
from sedd_jax.kernels.cpu import as_bits, from_bits
from sedd_jax.parallel import sharding

# Numbers of a leaf that a CPU changes at a time: parameters, average, moments and gradient of them
# stay in its cache, 5 MiB in float32. The compiler of jax 0.7.2 copies them and is faster without.
TILE = 2**18 if jax.__version_info__ >= (0, 8) else None

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
    clip_norm: float | None = None,
    decay: float = 0.9999,
    microbatches: int = 1,
    tile: int | None = None,
):
    """One update: (state, batch, key) -> (state, metrics).

    batch is a pytree of [B, ...]; B must be divisible by microbatches, whose gradients are
    averaged. key is the run's: every step and microbatch folds its number into it. A step whose
    loss or gradient is not finite changes nothing but the counters.

    clip_norm is the largest global norm of a gradient. Where tile is a number, as many numbers of a
    leaf are changed at a time: for a CPU, which else goes over all of them for each of parameters,
    average and moments, with copies. The optimizer must treat each number of a leaf for itself.
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

        clip = 1.0 if clip_norm is None else jnp.minimum(1.0, clip_norm / grad_norm)
        ema_updates = state.ema_updates + 1
        keep = ema_decay(ema_updates, decay)

        def change(grads, params, ema, opt_state):
            updates, opt_state_after = optimizer.update(clip * grads, opt_state, params)
            moved = optax.apply_updates(params, updates)
            averaged = ema - (1.0 - keep) * (ema - moved)
            return moved, averaged, opt_state_after

        params, ema, opt_state = _leaf_by_leaf(change, is_finite, grads, state, tile)
        skip = jnp.where(is_finite, 0, 1)
        state = TrainState(
            step=state.step + 1,
            params=params,
            opt_state=opt_state,
            ema=ema,
            ema_updates=jnp.where(is_finite, ema_updates, state.ema_updates),
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


def _leaf_by_leaf(change: Callable, is_wanted: jax.Array, grads: Any, state: TrainState, tile):
    """(params, ema, opt_state) of change(grads, params, ema, opt_state), called for each leaf with
    the optimizer's state for it; what they were if it is not wanted."""
    tree = jax.tree.structure(grads)
    shapes = [leaf.shape for leaf in jax.tree.leaves(grads)]

    def is_moment(node):  # a tree of arrays like the parameters, and no counter
        leaves, structure = jax.tree.flatten(node)
        return structure == tree and [leaf.shape for leaf in leaves] == shapes

    nodes, opt_tree = jax.tree.flatten(state.opt_state, is_leaf=is_moment)
    moments = [node for node in nodes if is_moment(node)]
    counters = [node for node in nodes if not is_moment(node)]

    def opt_state_of(moments, counters):
        moments, counters = iter(moments), iter(counters)
        return opt_tree.unflatten(next(moments if is_moment(n) else counters) for n in nodes)

    def of_leaf(kept, grad):
        """(arrays like the kept ones, counters) after the change of one leaf, or of a part of it."""
        params, ema, *found = kept
        params, ema, opt_state = change(grad, params, ema, opt_state_of(found, counters))
        found = opt_tree.flatten_up_to(opt_state)
        arrays = [a for a, node in zip(found, nodes, strict=True) if is_moment(node)]
        others = [a for a, node in zip(found, nodes, strict=True) if not is_moment(node)]
        return [params, ema, *arrays], others

    def guard(new, old):
        return jax.tree.map(lambda n, o: jnp.where(is_wanted, n, o), new, old)

    columns = []
    kept = (state.params, state.ema, *moments)
    for grad, *arrays in zip(*map(jax.tree.leaves, (grads, *kept)), strict=True):
        if tile is None or grad.size < 2 * tile:
            columns.append(guard(of_leaf(arrays, grad)[0], arrays))
        else:
            columns.append(_in_tiles(lambda *a: of_leaf(*a)[0], is_wanted, arrays, grad, tile))
    nothing = [a.reshape(-1)[:0] for a in (grad, *arrays)]
    counters = guard(of_leaf(nothing[1:], nothing[0])[1], counters)
    params, ema, *moments = (tree.unflatten(column) for column in zip(*columns, strict=True))
    return params, ema, opt_state_of(moments, counters)


def _in_tiles(fn: Callable, is_wanted: jax.Array, arrays: list, grad: jax.Array, tile: int):
    """The arrays as fn(arrays, grad) gives them, changed in place; as they are if not wanted."""
    shape, (whole, rest) = grad.shape, divmod(grad.size, tile)
    grad, *arrays = (as_bits(a).reshape(-1) for a in (grad, *arrays))

    def change(kept, start, length):
        parts = [jax.lax.dynamic_slice(a, (start,), (length,)) for a in (grad, *kept)]
        # A branch is computed apart. Without it each array's new values would be computed from the
        # old ones of all, each time anew, and all that is written be copied first.
        parts = jax.lax.cond(
            is_wanted,
            lambda grad, *parts: fn([from_bits(a) for a in parts], grad),
            lambda grad, *parts: [from_bits(a) for a in parts],
            *parts,
        )
        pairs = zip(kept, parts, strict=True)
        return [jax.lax.dynamic_update_slice(a, as_bits(n), (start,)) for a, n in pairs]

    arrays = jax.lax.fori_loop(0, whole, lambda i, kept: change(kept, i * tile, tile), arrays)
    arrays = change(arrays, whole * tile, rest)
    return [from_bits(a).reshape(shape) for a in arrays]


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
