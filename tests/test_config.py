"""Configs: the shipped ones are sound, every key is read, every bad value is refused."""

import dataclasses
import importlib
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import says

from sedd_jax import config as configuration
from sedd_jax import experiment
from sedd_jax.configs import base
from sedd_jax.data import Blocks
from sedd_jax.diffusion.graphs import Absorbing, Uniform
from sedd_jax.diffusion.objectives import OBJECTIVES
from sedd_jax.diffusion.schedules import SCHEDULES, Geometric, LogLinear
from sedd_jax.experiment import make_experiment
from sedd_jax.models.transformer import Transformer
from sedd_jax.parallel import sharding

ROOT = Path(__file__).parents[1]
NAMES = sorted(path.stem for path in (ROOT / "configs").glob("[!_]*.py"))


def shipped(name):
    return importlib.import_module(f"sedd_jax.configs.{name}").get_config()


@pytest.mark.parametrize("name", NAMES)
def test_every_shipped_config_passes_the_check_and_builds_its_parts(name):
    config = shipped(name)
    configuration.check(config)
    graph = experiment.make_graph(config, 27)
    experiment.make_schedule(config)
    experiment.make_model(config, graph)
    experiment.make_optimizer(config)


PAPERS = ["text8", "openwebtext_small", "openwebtext_medium", "lm1b"]
PAPERS += [f"{name}_uniform" for name in PAPERS]


def test_the_shipped_configs_are_the_ones_the_project_promises():
    assert {"base", "quickstart", *PAPERS} <= set(NAMES)


@pytest.mark.parametrize("name", PAPERS)
def test_the_papers_configs_hold_the_papers_hyperparameters(name):
    config = shipped(name)
    assert config.train.batch_size == 512
    o = config.optimizer
    assert (o.learning_rate, o.b1, o.b2, o.weight_decay) == (3e-4, 0.9, 0.999, 0.0)
    assert (o.warmup_steps, o.clip_norm, o.ema_decay) == (2500, 1.0, 0.9999)
    sizes = (config.model.hidden_size, config.model.blocks, config.model.heads)
    assert sizes == ((1024, 24, 16) if "medium" in name else (768, 12, 12))
    uniform = name.endswith("uniform")
    graph = experiment.make_graph(config, 27)
    assert graph == (Uniform(27) if uniform else Absorbing(27, scale_by_sigma=True))
    schedule = experiment.make_schedule(config)
    assert schedule == (Geometric(1e-5, 20.0) if uniform else LogLinear(1e-3))


def test_every_key_of_the_base_config_has_a_rule_and_every_rule_a_key():
    assert {key for key, _ in configuration.flatten(base.get_config())} == set(configuration.KEYS)


def test_every_key_is_read_somewhere():
    text = "\n".join(path.read_text() for path in (ROOT / "sedd_jax").rglob("*.py"))
    built = {  # sections whose keys are the fields of what they build
        "graph": (Absorbing,),
        "schedule": tuple(SCHEDULES.values()),
        "model": (Transformer,),
        "objective": tuple(OBJECTIVES.values()),
    }
    for key in configuration.KEYS:
        section, _, name = key.rpartition(".")
        if any(name in cls.__dataclass_fields__ for cls in built.get(section, ())):
            continue
        reads = (
            rf"\.{section}\.{name}\b|\b(o|ours|section|sample)\.{name}\b"
            if section
            else rf"config\.{name}\b"
        )
        if section == "mesh":
            reads = r"make_mesh\(config\.mesh\b"
        elif section in ("graph", "schedule", "objective") and name in ("name", "parameters"):
            reads = rf'_build\("{section}", (config\.{section}|section)\b'
        elif key == "sample.parameters":
            reads = r"self\.parameters\b"
        assert re.search(reads, text), f"nothing reads config.{key}"


BAD = {
    "seed": -1,
    "data.corpus": "wikipedia",
    "data.path": 3,
    "data.tokenizer": "words",
    "data.length": 0,
    "data.heldout_fraction": 1.0,
    "graph.name": "absorb",
    "graph.scale_by_sigma": 1,
    "schedule.name": "no such",
    "schedule.eps": 0.0,
    "schedule.sigma_min": -1e-3,
    "schedule.sigma_max": 100.0,
    "objective.name": "elbo",
    "objective.t_min": 1.0,
    "objective.times": "grid",
    "model.hidden_size": 0,
    "model.blocks": 2.5,
    "model.heads": 0,
    "model.cond_dim": -8,
    "model.dropout": 1.0,
    "model.dtype": "float16",
    "model.remat": True,
    "optimizer.learning_rate": float("nan"),
    "optimizer.warmup_steps": -1,
    "optimizer.decay_fraction": 1.5,
    "optimizer.b1": 1.0,
    "optimizer.b2": float("nan"),
    "optimizer.eps": 0.0,
    "optimizer.weight_decay": -0.1,
    "optimizer.clip_norm": 0.0,
    "optimizer.ema_decay": 1.5,
    "train.steps": 0,
    "train.batch_size": True,
    "train.microbatches": 0,
    "train.log_every": 0,
    "train.eval_every": -5,
    "train.max_skipped": 0,
    "train.stuck_seconds": -1,
    "train.trackers": 3,
    "checkpoint.every": 0,
    "checkpoint.keep": 0,
    "evaluate.blocks": 0,
    "evaluate.batch_size": 0,
    "evaluate.passes": 3,
    "sample.predictor": "ancestral",
    "sample.steps": 0,
    "sample.t_min": 0.0,
    "sample.draw": "float64",
    "sample.every": -1,
    "sample.count": 0,
    "profile.start": -1,
    "profile.steps": -1,
    "mesh.data": 0,
    "mesh.fsdp": -2,
    "mesh.tensor": 1.0,
}


@pytest.mark.parametrize("key", BAD)
def test_a_bad_value_is_refused_with_the_key_the_value_and_the_rule(key):
    config = base.get_config()
    section, _, name = key.rpartition(".")
    target = config[section] if section else config
    with target.unlocked(), target.ignore_type():
        target[name] = BAD[key]
    with pytest.raises(ValueError, match=re.escape(f"config.{key} {BAD[key]!r}")) as error:
        configuration.check(config)
    assert configuration.KEYS[key].words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "key, value",
    [("optimizer.learning_rate", 10**400), ("seed", 10**400), ("graph.name", [])],
    ids=["rate", "seed", "name"],
)
def test_values_that_json_may_hold_and_python_trips_over_are_refused(key, value):
    values = base.get_config().to_dict()
    section, _, name = key.rpartition(".")
    (values[section] if section else values)[name] = value
    config = configuration.from_json(json.dumps(values))
    with pytest.raises(ValueError, match=rf"config.{key} .{{2,60}} is not allowed; it must be"):
        configuration.check(config)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"graph.name": "uniform"}, "scale_by_sigma True does not fit the uniform graph"),
        ({"train.microbatches": 3}, "batch_size 512 is not divisible by config.train.microbatches"),
        ({"model.heads": 7}, "hidden_size 768 is not divisible by config.model.heads 7"),
        ({"model.heads": 256}, "odd head size"),
        ({"mesh.fsdp": -1}, "-1 more than once"),
        ({"schedule.name": "geometric", "schedule.sigma_min": 30.0}, "sigma_min < sigma_max"),
    ],
)
def test_a_bad_combination_is_refused(changes, message):
    config = base.get_config()
    for key, value in changes.items():
        section, name = key.split(".")
        config[section][name] = value
    with pytest.raises(ValueError, match=message):
        configuration.check(config)


def test_an_unknown_and_a_missing_key_are_refused():
    config = base.get_config()
    config.train.stepz = 3
    with pytest.raises(ValueError, match="unknown config key train.stepz"):
        configuration.check(config)
    config = base.get_config()
    del config.model.dtype
    with pytest.raises(ValueError, match="model.dtype is missing"):
        configuration.check(config)


def test_a_config_survives_json():
    config = shipped("quickstart")
    again = configuration.from_json(configuration.to_json(config))
    assert again.to_dict() == config.to_dict()
    configuration.check(again)


def test_only_what_leaves_the_model_alone_may_differ_on_resume():
    before, now = shipped("quickstart"), shipped("quickstart")
    now.train.steps += 1
    now.mesh.fsdp = 2
    now.sample.steps = 7
    assert configuration.differences(before, now) == []
    now.optimizer.learning_rate = 1.0
    now.seed = 5
    lines = configuration.differences(before, now)
    assert sorted(line.split(":")[0] for line in lines) == ["optimizer.learning_rate", "seed"]


def test_first_moments_in_bfloat16_are_half_as_large_and_step_almost_alike():
    steps = {}
    for dtype in ("float32", "bfloat16"):
        config = base.get_config()
        config.optimizer.mu_dtype = dtype
        optimizer = experiment.make_optimizer(config)
        params = {"w": jnp.linspace(-1.0, 1.0, 64)}
        opt_state, moved = optimizer.init(params), jnp.zeros(64)
        for step in range(20):
            slope = {"w": jax.random.normal(jax.random.key(step), (64,)) + params["w"]}
            updates, opt_state = optimizer.update(slope, opt_state, params)
            moved += updates["w"]
        steps[dtype] = moved
        (adam,) = (s for s in jax.tree.leaves(opt_state, is_leaf=_is_adam) if _is_adam(s))
        assert (adam.mu["w"].dtype, adam.nu["w"].dtype) == (dtype, "float32")
    exact, near = steps["float32"], steps["bfloat16"]
    assert 0.0 < jnp.linalg.norm(near - exact) < 1e-2 * jnp.linalg.norm(exact)


def _is_adam(node):
    return isinstance(node, optax.ScaleByAdamState)


def test_a_run_from_before_the_moments_had_a_dtype_goes_on():
    config = shipped("quickstart")
    older = config.to_dict()
    del older["optimizer"]["mu_dtype"], older["model"]["residual_dtype"]
    del older["model"]["attention"]
    config.optimizer.decay_fraction = 0.0  # what such a run did
    del older["optimizer"]["decay_fraction"]
    again = configuration.from_json(json.dumps(older))
    assert configuration.differences(again, config) == []


@pytest.mark.parametrize("key", configuration.RETIRED)
def test_a_retired_key_is_dropped_from_a_saved_config_and_unknown_elsewhere(key):
    config = shipped("quickstart")
    older = config.to_dict()
    section, _, name = key.rpartition(".")
    older[section][name] = "auto"
    assert configuration.from_json(json.dumps(older)).to_dict() == config.to_dict()
    with pytest.raises(ValueError, match=f"unknown config key {re.escape(key)}"):
        configuration.with_values(config, {key: "auto"})


def test_the_learning_rate_warms_up_linearly_and_reaches_its_value_at_the_last_warm_up_step():
    config = base.get_config()
    config.optimizer.warmup_steps = 4
    config.optimizer.clip_norm = 1e9
    optimizer = experiment.make_optimizer(config)
    params = {"w": jnp.zeros(())}
    opt_state, rates = optimizer.init(params), []
    for _ in range(6):  # with a constant gradient AdamW moves by exactly the learning rate
        updates, opt_state = optimizer.update({"w": jnp.ones(())}, opt_state, params)
        rates.append(-float(updates["w"]))
    expected = 3e-4 * np.array([1, 2, 3, 4, 4, 4]) / 4
    np.testing.assert_allclose(rates, expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("fraction", "quarters"),
    [
        (0.0, [2, 4, 4, 4, 4, 4, 4, 4]),
        (0.5, [2, 4, 4, 4, 4, 3, 2, 1]),
        (1.0, [2, 3.5, 3, 2.5, 2, 1.5, 1, 0.5]),
    ],
)
def test_the_learning_rate_falls_linearly_over_the_last_share_of_the_steps(fraction, quarters):
    config = base.get_config()
    config.optimizer.warmup_steps, config.train.steps = 2, 8
    config.optimizer.decay_fraction = fraction
    rate = experiment.make_learning_rate(config)
    # The last two are of a count beyond train.steps, which only a run that goes on can reach.
    expected = [*quarters, *([0, 0] if fraction else [4, 4])]
    rates = [float(rate(jnp.int32(count))) for count in range(10)]
    # With all steps a decay, the first rate is the warm-up's, since it is the smaller one.
    np.testing.assert_allclose(rates, 3e-4 * np.array(expected) / 4, rtol=1e-6)


def test_the_train_step_clips_the_global_norm(tiny_config):
    tiny_config.optimizer.clip_norm = 0.01
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    run = make_experiment(tiny_config, 27, mesh)
    x0 = np.arange(8 * 32, dtype=np.int32).reshape(8, 32) % 27
    batch = sharding.put_whole(Blocks(x0), mesh)
    after, metrics = run.train_step(run.start(), batch, run.keys["train"])
    first_moments = jax.tree.leaves(after.opt_state[1][0].mu)
    norm = np.sqrt(sum((np.asarray(m) ** 2).sum() for m in first_moments))
    assert metrics["grad_norm"] > 0.02
    np.testing.assert_allclose(norm, (1.0 - tiny_config.optimizer.b1) * 0.01, rtol=1e-5)


def test_a_schedule_of_ones_own_without_an_end_is_refused(monkeypatch, tiny_config):
    @dataclasses.dataclass(frozen=True)
    class Endless:
        def sigma(self, t):
            return -jnp.log1p(-(jnp.sin(jnp.pi * t / 2) ** 2))  # no token is clean at t = 1

    monkeypatch.setitem(SCHEDULES, "endless", Endless)
    tiny_config.schedule.name = "endless"
    with says("'endless'", "sigma(1)", "clean"):
        experiment.make_schedule(tiny_config)
