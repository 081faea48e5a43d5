"""The paper's rivals end to end: trained, resumed, spread over devices, scored and sampled."""

import jax
import numpy as np
import pytest
from test_train import assert_bit_equal

from sedd_jax import experiment
from sedd_jax.config import with_values
from sedd_jax.configs.rivals import RIVALS
from sedd_jax.data import Blocks
from sedd_jax.data.tokenizers import Characters
from sedd_jax.inference.model import SEDD
from sedd_jax.parallel import sharding
from sedd_jax.runs.checkpoint import Checkpoints
from sedd_jax.training.dry_run import dry_run

LETTERS = "abcdefghijklmnopqrstuvwxyz "
# The paper's own are what the other tests are about.
NAMES = [name for name in RIVALS if not name.startswith("sedd_")]


def chosen(*names):
    """All rivals, those that are not named with -m long: they differ in the loss alone, and
    test_objectives.py has that."""
    return [n if n in names else pytest.param(n, marks=pytest.mark.long) for n in NAMES]


KEY = jax.random.key(7)


def prepared(config, name, mesh=None, devices=None):
    """(experiment, a batch on its devices) of a rival."""
    config = with_values(config, RIVALS[name])
    mesh = sharding.make_mesh(mesh or {"data": 1, "fsdp": 1, "tensor": 1}, devices)
    made = experiment.make_experiment(config, len(LETTERS), mesh)
    rows = config.train.batch_size, config.data.length
    x0 = np.asarray(jax.random.randint(jax.random.key(1), rows, 0, len(LETTERS)))
    return made, sharding.put_batch(Blocks(x0), mesh)


def after(made, batch, state, steps):
    """The state after steps, and their losses."""
    losses = []
    for _ in range(steps):
        state, metrics = made.train_step(state, batch, KEY)
        losses.append(float(metrics["loss"]))
    return state, losses


@pytest.mark.parametrize("name", chosen("d3pm_absorb", "ar", "plaid"))
def test_a_rival_resumes_bit_for_bit_and_is_scored_and_sampled(name, tiny_config, tmp_path):
    made, batch = prepared(tiny_config, name, devices=jax.devices()[:1])
    whole, losses = after(made, batch, made.start(), 6)
    assert np.isfinite(losses).all() and int(whole.skipped) == 0
    part, _ = after(made, batch, made.start(), 3)
    with Checkpoints(tmp_path / "checkpoints", keep=1) as checkpoints:
        checkpoints.save(3, part)
        checkpoints.wait()
        part = checkpoints.restore(3, made.shape)
    assert_bit_equal(*(jax.device_get(state) for state in (after(made, batch, part, 3)[0], whole)))

    process = {"graph": made.graph, "schedule": made.schedule, "objective": made.objective}
    length = made.config.data.length
    model = SEDD(made.network, whole.ema, tokenizer=Characters(LETTERS), length=length, **process)
    bound = model.bound(np.asarray(batch.tokens), passes=2, batch_size=8).per(batch.tokens.size)
    assert np.isfinite(bound.bound) and bound.bound > 0.5 * np.log(len(LETTERS))
    how = {} if getattr(made.objective, "is_causal", False) else {"steps": 4}
    tokens = model.sample_tokens(2, seed=1, **how)
    assert tokens.shape == (2, length)
    assert 0 <= tokens.min() and tokens.max() < len(LETTERS)


@pytest.mark.parametrize("name", chosen("plaid"))
def test_a_rival_has_a_dry_run(name, tiny_config):
    estimate = dry_run(with_values(tiny_config, RIVALS[name]), "cpu:8", vocab_size=len(LETTERS))
    made, _ = prepared(tiny_config, name, devices=jax.devices()[:1])
    assert estimate.is_compiled and estimate.flops == made.flops
    names = {row.name for row in estimate.parameters}
    assert len(names) == len(jax.tree.leaves(made.shape.params))


@pytest.mark.devices(8)
@pytest.mark.parametrize("name", chosen("ar"))
def test_eight_devices_give_a_rivals_losses_of_one(name, tiny_config):
    tiny_config.train.batch_size = 16
    meshes = [({"data": 1, "fsdp": 1, "tensor": 1}, 1), ({"data": 2, "fsdp": 2, "tensor": 2}, 8)]
    one, many = (
        after(made, batch, made.start(), 3)[1]
        for made, batch in (
            prepared(tiny_config, name, mesh, jax.devices()[:n]) for mesh, n in meshes
        )
    )
    np.testing.assert_allclose(many, one, rtol=2e-5)
