"""The train step: accumulation, the guard, the moving average, and the mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sedd_jax import experiment, state
from sedd_jax.data import Blocks
from sedd_jax.diffusion.losses import Loss, Mean
from sedd_jax.parallel import sharding

BIG = {"model.hidden_size": 32, "model.heads": 4, "train.batch_size": 16}


def parts(config, *, devices=None, mesh=None, loss_fn=None):
    """(train step on the mesh, fresh state, blocks) for the tiny config at 27 characters."""
    for key, value in BIG.items():
        section, name = key.split(".")
        config[section][name] = value
    graph = experiment.make_graph(config, 27)
    mesh = sharding.make_mesh(mesh or {"data": -1, "fsdp": 1, "tensor": 1}, devices)
    model = experiment.make_model(config, graph, mesh)
    optimizer = experiment.make_optimizer(config)
    process = model, graph, experiment.make_schedule(config)
    loss_fn = loss_fn or experiment.make_loss_fn(experiment.make_objective(config), *process)
    step = state.make_train_step(
        loss_fn,
        optimizer,
        decay=0.9,
        microbatches=config.train.microbatches,
    )

    def fresh():
        params = experiment.init_params(config, model, jax.random.key(0))
        # At the start every gate and the head are zero: nothing but the head would be trained.
        params = jax.tree.map(
            lambda p: p + 0.02 * jnp.cos(jnp.arange(p.size) + 1.0).reshape(p.shape), params
        )
        return state.init(params, optimizer)

    shape = jax.eval_shape(fresh)
    begun = jax.jit(fresh, out_shardings=sharding.tree_shardings(shape, mesh))()
    x0 = np.asarray(jax.random.randint(jax.random.key(1), (16, 32), 0, 27))
    return state.on_mesh(step, shape, mesh), begun, sharding.put_batch(Blocks(x0), mesh), mesh


def losses(config, steps=5, **kwargs):
    step, current, x0, _ = parts(config, **kwargs)
    found = []
    for _ in range(steps):
        current, metrics = step(current, x0, jax.random.key(7))
        found.append(float(metrics["loss"]))
    return np.array(found), current


MESHES = [
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"data": 8, "fsdp": 1, "tensor": 1},
    {"data": 1, "fsdp": 8, "tensor": 1},
    {"data": 2, "fsdp": 1, "tensor": 4},
]


@pytest.fixture(scope="module")
def one_device():
    """Losses and last state of 20 steps on one device, by the config's microbatches."""
    return {}


@pytest.mark.devices(8)
@pytest.mark.parametrize(
    "mesh",
    # One axis alone is in the mixed mesh too.
    [pytest.param(mesh, marks=pytest.mark.long if 1 in mesh.values() else ()) for mesh in MESHES],
    ids=str,
)
def test_eight_devices_give_the_losses_of_one_with_the_same_noise(tiny_config, mesh, one_device):
    tiny_config.train.microbatches = 2
    if not one_device:
        one_device["found"] = losses(tiny_config, steps=20, devices=jax.devices()[:1])
    one, state_one = one_device["found"]
    many, state_many = losses(tiny_config, steps=20, mesh=mesh)
    np.testing.assert_allclose(many, one, rtol=1e-5)
    assert np.ptp(one) > 1.0  # the noise differs from step to step
    for a, b in zip(jax.tree.leaves(state_one.params), jax.tree.leaves(state_many.params)):
        np.testing.assert_allclose(a, b, atol=2e-4)


@pytest.mark.devices(8)
def test_parameters_moments_and_average_live_where_the_rules_say(tiny_config):
    step, current, x0, mesh = parts(tiny_config, mesh=MESHES[0])
    current, _ = step(current, x0, jax.random.key(7))
    leaves = jax.tree_util.tree_leaves_with_path(current)
    split = 0
    for path, leaf in leaves:
        spec = sharding.spec_for(sharding.path_name(path), leaf.shape)
        assert leaf.sharding.is_equivalent_to(jax.sharding.NamedSharding(mesh, spec), leaf.ndim), (
            path
        )
        split += any(axis is not None for axis in spec)
    assert split >= 4 * 8  # parameters, average and both moments of every matrix


def test_microbatches_average_their_gradients_and_draw_their_own_noise(tiny_config):
    seen = []

    def loss_fn(params, key, x0):
        seen.append(x0.shape)
        noise = jax.random.normal(key, (x0.shape[0],))
        return Loss(jnp.sum(x0, axis=-1) * params["w"] + params["w"] * noise, {})

    optimizer = optax.sgd(1.0)
    x0 = jnp.arange(8.0).reshape(8, 1)
    key = jax.random.key(3)

    def noise(microbatches):
        key_step = jax.random.fold_in(key, 0)
        rows = 8 // microbatches
        drawn = [
            jax.random.normal(jax.random.fold_in(key_step, i), (rows,)) for i in range(microbatches)
        ]
        if microbatches > 1:
            assert not np.allclose(drawn[0], drawn[1])
        return float(jnp.mean(jnp.stack(drawn)))

    for microbatches in (1, 2, 4):
        seen.clear()
        step = state.make_train_step(loss_fn, optimizer, microbatches=microbatches)
        begun = state.init({"w": jnp.ones(())}, optimizer)
        after, metrics = step(begun, x0, key)
        expected = float(x0.mean()) + noise(microbatches)  # of the gradient, and of the loss at 1
        assert seen[0] == (8 // microbatches, 1)
        np.testing.assert_allclose(1.0 - after.params["w"], expected, rtol=1e-5)
        np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)


def test_metrics_are_the_means_over_what_all_microbatches_count():
    def loss_fn(params, key, x0):
        return Loss(params["w"] * x0[:, 0], {"share": Mean(x0.sum(), (x0 > 0).sum())})

    x0 = jnp.array([[4.0], [0.0], [2.0], [0.0], [3.0], [1.0]])  # of two, the rows 0, 2, 4 are one
    begun = state.init({"w": jnp.ones(())}, optax.sgd(1.0))
    for microbatches in (1, 2, 3):
        step = state.make_train_step(loss_fn, optax.sgd(1.0), microbatches=microbatches)
        _, metrics = step(begun, x0, jax.random.key(0))
        np.testing.assert_allclose(metrics["share"], 10.0 / 4, rtol=1e-6)


def test_every_step_draws_new_noise_from_the_same_key():
    step = state.make_train_step(
        lambda params, key, x0: Loss(params["w"] * jax.random.normal(key, (4,)), {}),
        optax.sgd(0.0),
    )
    current = state.init({"w": jnp.ones(())}, optax.sgd(0.0))
    first, metrics_1 = step(current, jnp.zeros((4, 1)), jax.random.key(0))
    _, metrics_2 = step(first, jnp.zeros((4, 1)), jax.random.key(0))
    assert metrics_1["loss"] != metrics_2["loss"]


@pytest.mark.parametrize("mu_dtype", [None, jnp.bfloat16])
def test_a_step_is_optaxs_clip_adamw_and_the_average(mu_dtype):
    params = {"many": jnp.linspace(-1.0, 1.0, 40).reshape(4, 10), "few": jnp.ones(3)}
    slopes = jax.tree.map(lambda p: 3.0 * jnp.cos(7.0 * p), params)

    def loss_fn(params, key, scale):
        products = jax.tree.map(lambda p, s: (p * s).sum(), params, slopes)
        return Loss(scale[:, 0] * sum(jax.tree.leaves(products)), {})

    adamw = optax.adamw(0.1, weight_decay=0.2, mu_dtype=mu_dtype)
    optimizer = optax.chain(optax.clip_by_global_norm(1.5), adamw)
    step = jax.jit(state.make_train_step(loss_fn, optimizer, decay=0.9))
    current = state.init(params, optimizer)
    theirs, their_state, average = params, optimizer.init(params), params
    for number in range(1, 4):
        scale = jnp.full((2, 1), float(number - 2))  # the second gradient is 0
        current, metrics = step(current, scale, jax.random.key(0))
        grads = jax.tree.map(lambda s, scale=scale: s * scale[0, 0], slopes)
        updates, their_state = optimizer.update(grads, their_state, theirs)
        theirs = optax.apply_updates(theirs, updates)
        keep = (1 + number) / (10 + number)
        average = jax.tree.map(lambda a, p, k=keep: k * a + (1 - k) * p, average, theirs)
        norm = np.sqrt(sum((np.asarray(g) ** 2).sum() for g in jax.tree.leaves(grads)))
        np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-6)
    found = (current.params, current.ema, current.opt_state)
    expected = (theirs, average, their_state)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    tolerance = 1e-6 if mu_dtype is None else 1e-2
    for ours, right in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert ours.dtype == right.dtype
        np.testing.assert_allclose(
            np.asarray(ours, np.float32), np.asarray(right, np.float32), atol=tolerance
        )


@pytest.mark.parametrize("fault", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_only_the_counters(fault):
    # 1e25 is finite, the norm of a gradient of 1e25 is not.
    slope = {"loss": jnp.nan, "gradient": 1e25}[fault]

    def loss_fn(params, key, x0):
        return Loss(jnp.where(x0[:, 0] < 0, slope, 2.0) * params["w"].sum(), {})

    optimizer = optax.adam(0.1)
    step = jax.jit(state.make_train_step(loss_fn, optimizer, decay=0.5))
    good, bad = jnp.ones((4, 1)), -jnp.ones((4, 1))
    key = jax.random.key(0)
    before, _ = step(state.init({"w": jnp.ones(2)}, optimizer), good, key)
    after, metrics = step(before, bad, key)
    assert not (np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"]))
    for kept in ("params", "opt_state", "ema", "ema_updates"):
        same = jax.tree.map(np.array_equal, getattr(before, kept), getattr(after, kept))
        assert all(jax.tree.leaves(same)), kept
    assert (int(after.step), int(after.skipped), int(after.skipped_in_a_row)) == (2, 1, 1)
    again, _ = step(after, bad, key)
    assert int(again.skipped_in_a_row) == 2
    fine, metrics = step(again, good, key)
    assert (int(fine.skipped), int(fine.skipped_in_a_row)) == (2, 0)
    assert np.isfinite(metrics["loss"])
    assert not np.array_equal(fine.params["w"], after.params["w"])
    assert int(fine.ema_updates) == 2


def test_the_average_follows_the_originals_warm_up():
    n = np.array([1, 2, 5, 100, 10**6])
    expected = np.minimum(0.9999, (1 + n) / (10 + n))
    np.testing.assert_allclose(state.ema_decay(jnp.asarray(n), 0.9999), expected, rtol=1e-6)


def test_the_average_is_the_weighted_mean_of_the_parameters():
    step = state.make_train_step(
        lambda p, key, x: Loss(-p["w"] * x[:, 0], {}), optax.sgd(1.0), decay=0.9999
    )
    current = state.init({"w": jnp.zeros(())}, optax.sgd(1.0))
    average = 0.0
    for n in range(1, 6):
        current, _ = step(current, jnp.ones((2, 1)), jax.random.key(0))  # w = n after step n
        keep = min(0.9999, (1 + n) / (10 + n))
        average = keep * average + (1 - keep) * n
    np.testing.assert_allclose(current.ema["w"], average, rtol=1e-5)


@pytest.mark.devices(8)
def test_a_mesh_that_does_not_fit_the_devices_is_refused():
    with pytest.raises(ValueError, match="data=3, fsdp=1, tensor=1 does not multiply to 8"):
        sharding.make_mesh({"data": 3, "fsdp": 1, "tensor": 1})
    with pytest.raises(ValueError, match="does not multiply to 8"):
        sharding.make_mesh({"data": -1, "fsdp": 3, "tensor": 1})
    assert dict(sharding.make_mesh({"data": -1, "fsdp": 2, "tensor": 2}).shape)["data"] == 2


@pytest.mark.platforms("cpu", reason="the devices' platform is looked at")
@pytest.mark.parametrize("count", [1, pytest.param(2, marks=pytest.mark.devices(2))])
def test_arrays_are_on_one_cpu_where_the_mesh_has_one(count):
    mesh = sharding.make_mesh({"data": count, "fsdp": 1, "tensor": 1}, jax.devices()[:count])
    assert sharding.Placement(mesh).is_one_cpu == (count == 1)


@pytest.mark.devices(8)
def test_a_parameter_without_a_rule_or_that_does_not_divide_is_refused():
    leaf = jax.ShapeDtypeStruct((3,), jnp.float32)
    mesh = sharding.make_mesh({"data": 1, "fsdp": 8, "tensor": 1})
    with pytest.raises(ValueError, match="no sharding rule for params/new/gate"):
        sharding.tree_shardings({"params": {"new": {"gate": leaf}}}, mesh)
    with pytest.raises(ValueError, match="12 is not divisible by the mesh's fsdp=8"):
        sharding.tree_shardings({"embedding": jax.ShapeDtypeStruct((27, 12), jnp.float32)}, mesh)
