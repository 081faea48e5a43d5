"""The paper's rivals end to end: trained, resumed, spread over devices, scored and sampled."""

import jax
import numpy as np
import pytest
from test_train import assert_bit_equal, restored

import sedd_jax
from sedd_jax import experiment
from sedd_jax.config import with_values
from sedd_jax.configs.rivals import RIVALS
from sedd_jax.data import Blocks
from sedd_jax.parallel import sharding
from sedd_jax.training.train import train

# The paper's own are what the other tests are about.
rivals = pytest.mark.parametrize("name", [n for n in RIVALS if not n.startswith("sedd_")])


def rival(config, name):
    return with_values(config, RIVALS[name])


@rivals
def test_a_rival_resumes_bit_for_bit_and_is_scored_and_sampled(name, tiny_config, tmp_path):
    config = rival(tiny_config, name)
    assert train(config, tmp_path / "whole") == 8
    config.train.steps = 4
    assert train(config, tmp_path / "parts") == 4
    config.train.steps = 8
    assert train(config, tmp_path / "parts") == 8
    (step, ours), (_, theirs) = (restored(tmp_path / run) for run in ("parts", "whole"))
    assert step == 8
    assert_bit_equal(ours, theirs)
    model = sedd_jax.load(tmp_path / "whole")
    blocks = Blocks(np.random.default_rng(0).integers(0, 20, (4, 32)).astype(np.int32))
    bound = model.bound(blocks, passes=2, batch_size=4).per(blocks.count)
    assert np.isfinite(bound.bound) and bound.bound > 0.0
    tokens = model.sample_tokens(2, seed=1)
    assert tokens.shape == (2, 32) and (tokens >= 0).all()
    assert (model.sample_tokens(1, seed=1)[0] == tokens[0]).all()


@pytest.mark.devices(8)
@rivals
def test_eight_devices_give_a_rivals_losses_of_one(name, tiny_config):
    config = rival(tiny_config, name)
    config.model.hidden_size, config.model.heads, config.train.batch_size = 32, 4, 16
    x0 = np.asarray(jax.random.randint(jax.random.key(1), (16, 32), 0, 27))

    def losses(mesh, devices):
        mesh = sharding.make_mesh(mesh, devices)
        made = experiment.make_experiment(config, 27, mesh)
        current, batch, found = made.start(), sharding.put_batch(Blocks(x0), mesh), []
        for _ in range(3):
            current, metrics = made.train_step(current, batch, jax.random.key(7))
            found.append(float(metrics["loss"]))
        return found

    one = losses({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    many = losses({"data": 2, "fsdp": 2, "tensor": 2}, jax.devices())
    np.testing.assert_allclose(many, one, rtol=2e-5)
