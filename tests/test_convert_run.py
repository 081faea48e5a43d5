"""A run of the original goes on in our training, and ours in the original's."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import yaml
from conftest import says
from golden_set import relative_norm
from original_models import GRAPHS, TOKENIZER, assert_same, config_of, golden, model_of

from sedd_jax import config as configuration
from sedd_jax import convert, experiment, state
from sedd_jax.cli import convert_command, train_command
from sedd_jax.convert import names, original_run
from sedd_jax.convert.card import facts_of_run
from sedd_jax.data import make_tokenizer
from sedd_jax.diffusion.losses import Loss
from sedd_jax.runs import workdir

torch = pytest.importorskip("torch", minversion="2.10", reason="torch >= 2.10 is not installed")
both_graphs = pytest.mark.parametrize("graph", GRAPHS)


UNITS = ("bits_per_character", "nats_per_token")
STEP = 2  # in the middle of the warm-up of 3 steps


def random_state(graph: str, step: int = STEP):
    """(config, train state) in the middle of training, every tree with numbers of its own."""
    config, vocab_size, params = model_of(graph)
    config.data.tokenizer = TOKENIZER.name
    ema, mu, nu = (model_of(graph, seed)[2] for seed in (1, 2, 3))
    nu = jax.tree.map(np.square, nu)
    found = optax.ScaleByAdamState(step - 1, mu, nu)  # one step was skipped
    train_state = experiment.imported_state(
        config,
        vocab_size,
        params=params,
        ema=ema,
        step=step,
        ema_updates=step - 1,
        moments=found,
    )
    return config, train_state


def ours(folder, graph):
    """Our workdir in that state."""
    config, train_state = random_state(graph)
    workdir.write_workdir(
        folder, config=config, tokenizer=TOKENIZER, train_state=train_state, original=None
    )
    return train_state


def read(folder):
    return workdir.read_state(workdir.open_workdir(folder))


def import_run(source, target, **options):
    return convert.convert(source, target, form="workdir", tokenizer=TOKENIZER, **options)


def loaded(folder):
    return torch.load(folder / "checkpoints-meta/checkpoint.pth", weights_only=True)


def the_originals_run(folder, graph):
    """A run folder with the golden checkpoint."""
    for name, place in (
        (f"config_{graph}.yaml", ".hydra/config.yaml"),
        (f"checkpoint_{graph}.pth", "checkpoints-meta/checkpoint.pth"),
    ):
        (folder / place).parent.mkdir(parents=True)
        shutil.copyfile(golden(name), folder / place)
    return folder


@pytest.fixture(scope="module", params=GRAPHS)
def carried(request, tmp_path_factory):
    """A folder with "one", a workdir, "theirs", its export, and "two", that imported again."""
    folder = tmp_path_factory.mktemp(request.param)
    ours(folder / "one", request.param)
    assert original_run.export_run(folder / "one", folder / "theirs") == STEP
    import_run(folder / "theirs", folder / "two")
    return folder


def test_state_survives_the_way_there_and_back(carried):
    before, after = read(carried / "one"), read(carried / "two")
    for one, other in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)
    one, two = ((carried / name / "config.json").read_text() for name in ("one", "two"))
    changed = configuration.differences(configuration.from_json(one), configuration.from_json(two))
    assert not changed


@both_graphs
def test_imported_state_is_the_originals_leaf_by_leaf(tmp_path, graph):
    source = the_originals_run(tmp_path / "theirs", graph)
    assert import_run(source, tmp_path / "ours").notices == ()
    ours = read(tmp_path / "ours")
    theirs = torch.load(golden(f"checkpoint_{graph}.pth"), weights_only=False)
    order = [name for name in theirs["model"] if name != names.BUFFER]

    def same(tree, tensors):
        assert_same(names.to_original(tree), {n: t.numpy() for n, t in zip(order, tensors)})

    same(ours.params, [theirs["model"][name] for name in order])
    same(ours.ema, theirs["ema"]["shadow_params"])
    found = experiment.moments(ours.opt_state)
    rows = [theirs["optimizer"]["state"][i] for i in range(len(order))]
    same(found.mu, [row["exp_avg"] for row in rows])
    same(found.nu, [row["exp_avg_sq"] for row in rows])
    assert found.count == int(rows[0]["step"]) == int(ours.step) == theirs["step"] == 3
    assert (ours.ema_updates, ours.skipped) == (theirs["ema"]["num_updates"], 0)
    assert not (tmp_path / "ours/data.json").exists()


def test_raw_weights_and_average_are_those_of_the_checkpoint(tmp_path):
    graph = "absorb"
    source = the_originals_run(tmp_path / "theirs", graph)
    for weights, file in (("ema", f"hf_{graph}/model.safetensors"), ("raw", None)):
        done = convert.convert(source, tmp_path / weights, weights=weights)
        assert (done.step, done.tensors) == (3, 41)
        params = convert.read_folder(tmp_path / weights).params
        if file:
            assert_same(params, convert.read_folder(golden(file).parent).params)
        else:
            stored = torch.load(golden(f"checkpoint_{graph}.pth"), weights_only=False)["model"]
            theirs = {name: t.numpy() for name, t in stored.items() if name != names.BUFFER}
            assert_same(names.to_original(params), theirs)
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    torch.save(stored, pickled / "pytorch_model.bin")
    shutil.copyfile(tmp_path / "raw/config.json", pickled / "config.json")
    assert_same(convert.read_folder(pickled).params, params)


def test_a_step_after_import_is_torchs_step(carried):
    """Gradient, clip, AdamW with the moments, warm-up and average: one step from random moments."""
    config, before = workdir.open_workdir(carried / "two").config, read(carried / "two")
    o = config.optimizer

    random = np.random.default_rng(4)
    gradient = jax.tree.map(lambda p: random.normal(size=p.shape).astype(np.float32), before.params)

    def loss_fn(params, key, batch):  # its gradient is `gradient`, whatever the parameters
        products = jax.tree.map(lambda p, g: jnp.sum(p * g), params, gradient)
        return Loss(jnp.broadcast_to(sum(jax.tree.leaves(products)), batch.shape), {})

    optimizer = experiment.make_optimizer(config)
    train_step = state.make_train_step(loss_fn, optimizer, decay=o.ema_decay)
    after, _ = jax.jit(train_step)(before, jnp.zeros(2), jax.random.key(0))

    checkpoint = loaded(carried / "theirs")
    order = [name for name in checkpoint["model"] if name != names.BUFFER]
    parameters = [torch.nn.Parameter(checkpoint["model"][name].clone()) for name in order]
    empty = torch.nn.Parameter(torch.tensor(0.0))  # the noise's
    torchs = torch.optim.AdamW([*parameters, empty], lr=1.0)
    torchs.load_state_dict(checkpoint["optimizer"])
    theirs = names.to_original(gradient)
    for name, parameter in zip(order, parameters, strict=True):
        parameter.grad = torch.from_numpy(np.ascontiguousarray(theirs[name]))
    step = checkpoint["step"] + 1
    for group in torchs.param_groups:
        group["lr"] = o.learning_rate * min(step / o.warmup_steps, 1.0)
    torch.nn.utils.clip_grad_norm_(parameters, max_norm=o.clip_norm)
    torchs.step()
    updates = checkpoint["ema"]["num_updates"] + 1
    keep = min(checkpoint["ema"]["decay"], (1 + updates) / (10 + updates))

    assert (after.step, after.ema_updates, step) == (3, updates, 3)
    moved, averaged = names.to_original(after.params), names.to_original(after.ema)
    for i, name in enumerate(order):
        raw, shadow = checkpoint["model"][name].numpy(), checkpoint["ema"]["shadow_params"][i]
        end = parameters[i].detach().numpy()
        shadow = shadow.numpy()
        average = keep * shadow + (1 - keep) * end
        for value, start, expected in ((moved[name], raw, end), (averaged[name], shadow, average)):
            assert relative_norm(value - start, expected - start) <= 5e-4, name


def test_export_has_the_layout_of_the_originals_checkpoint(carried):
    config = yaml.safe_load((carried / "theirs/.hydra/config.yaml").read_text())
    graph, exported = config["graph"]["type"], loaded(carried / "theirs")
    stored = torch.load(golden(f"checkpoint_{graph}.pth"), weights_only=False)

    def layout(value):
        if isinstance(value, torch.Tensor):
            return value.dtype, tuple(value.shape)
        if isinstance(value, dict):
            return type(value), [(key, layout(v)) for key, v in value.items()]
        if isinstance(value, (list, tuple)):
            return type(value), [layout(v) for v in value]
        return (float,) if isinstance(value, float) else (int,)  # np.float64 is a float

    for part in ("model", "ema", "step"):
        assert layout(exported[part]) == layout(stored[part]), part
    ours_, theirs = (c["optimizer"] for c in (exported, stored))
    assert layout(ours_["state"]) == layout(theirs["state"])
    assert list(ours_["param_groups"][0]) == list(theirs["param_groups"][0])
    assert ours_["param_groups"][0]["params"] == theirs["param_groups"][0]["params"]
    settings = config_of(graph)
    assert config["model"] == {**settings["model"], "name": "sedd_jax"}
    assert config["work_dir"] == str(carried / "theirs")
    assert {s: set(v) for s, v in config.items() if isinstance(v, dict)} == {
        s: set(v) for s, v in settings.items() if isinstance(v, dict)
    }


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """An export of the absorbing workdir "one", in "theirs"; tests may write beside them."""
    folder = tmp_path_factory.mktemp("absorbing")
    ours(folder / "one", "absorb")
    original_run.export_run(folder / "one", folder / "theirs")
    return folder / "theirs"


def test_a_fresh_optimizer_keeps_the_step_and_begins_the_moments(theirs, tmp_path):
    notices = import_run(theirs, tmp_path / "two", optimizer=False).notices
    assert any("begin again" in notice for notice in notices)
    after = read(tmp_path / "two")
    found = experiment.moments(after.opt_state)
    assert (after.step, found.count, after.skipped) == (STEP, 0, 0)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves((found.mu, found.nu)))
    assert_same(after.ema, random_state("absorb")[1].ema)


def test_what_is_not_wanted_of_a_checkpoint_may_be_odd(theirs, tmp_path):
    """Step counts that differ, or moments of some parameters, matter to the optimizer alone."""
    odd = tmp_path / "odd"
    shutil.copytree(theirs, odd)
    checkpoint = loaded(theirs)
    state = checkpoint["optimizer"]["state"]
    state[0]["step"] += 1
    file = odd / "checkpoints-meta/checkpoint.pth"
    torch.save(checkpoint, file)
    with says("from 1 to 2 steps", "add --fresh_optimizer"):
        import_run(odd, tmp_path / "two")
    import_run(odd, tmp_path / "two", optimizer=False)
    assert read(tmp_path / "two").step == STEP
    del state[0]
    torch.save(checkpoint, file)
    with says("exp_avg of 39 parameters, its config gives 40: both must be of one run"):
        import_run(odd, tmp_path / "three")
    convert.convert(odd, tmp_path / "hub", weights="raw")
    params = convert.read_folder(tmp_path / "hub").params
    assert_same(params, random_state("absorb")[1].params)


def test_a_target_that_is_there_is_refused_before_weights_are_read(theirs, tmp_path, monkeypatch):
    monkeypatch.setattr(workdir, "read_average", lambda *_: pytest.fail("read"))
    monkeypatch.setattr("sedd_jax.convert.folder.read_folder", lambda folder: pytest.fail("read"))
    (tmp_path / "notes.txt").write_text("mine")
    with says("is there and is not empty"):
        convert.convert(theirs.parent / "one", tmp_path, replace=True)
    with says("is there and is not empty"):
        convert.convert(golden("hf_absorb/config.json").parent, tmp_path, form="workdir")


def test_tokenizer_and_changes_are_refused_before_weights_are_read(theirs, tmp_path, monkeypatch):
    monkeypatch.setattr(original_run.torch_files, "read", lambda *_: pytest.fail("read"))
    monkeypatch.setattr(convert.weights, "open_tensors", lambda *_: pytest.fail("read"))
    bytes_ = make_tokenizer("bytes", "", None)
    for source in (theirs, golden("hf_absorb/model.safetensors").parent):

        def converted(tokenizer=TOKENIZER, source=source, **changes):
            changes = {key.replace("__", "."): value for key, value in changes.items()}
            target = tmp_path / "two"
            convert.convert(source, target, form="workdir", tokenizer=tokenizer, changes=changes)

        with says("a workdir needs the model's tokenizer"):
            converted(tokenizer=None)
        with says("tokenizer 'bytes' has 256 tokens, the model in", "37"):
            converted(tokenizer=bytes_)
        with says("config.train.batch_size 4 is not divisible by config.train.microbatches 3"):
            converted(train__microbatches=3)
        for key in ("blocks", "hidden_size", "cond_dim"):
            with says(f"config.model.{key} 8 cannot be set: the weights in", "leave it out"):
                converted(**{f"model__{key}": 8})
        with says("tokenizer 'bytes' has 256 tokens, the model in", "37"):
            convert.convert(source, tmp_path / "two", tokenizer=bytes_)
    assert not list(tmp_path.iterdir())


def test_a_pth_file_is_named_whatever_is_wrong_with_it(tmp_path):
    bad = tmp_path / "bad.pth"
    bad.write_bytes(b"no archive")
    with says("bad.pth' is not an archive as torch.save has written"):
        convert.convert(bad, tmp_path / "out")
    torch.save({"w": torch.zeros(2)}, bad)
    with says(".hydra/config.yaml' for", "bad.pth'; give the folder of a run"):
        convert.convert(bad, tmp_path / "out")
    run = the_originals_run(tmp_path / "run", "absorb")
    file = run / "checkpoints-meta/checkpoint.pth"
    state = torch.load(file, weights_only=False)  # our own
    torch.save(state["model"], file)
    with says("checkpoint.pth' holds parameters only; give a checkpoint of a run"):
        convert.convert(run, tmp_path / "out", weights="raw")
    torch.save({**state, "step": -1}, file)
    with says("step in", "checkpoint.pth' -1 of the checkpoint is not in [0,"):
        convert.convert(run, tmp_path / "out")
    wrapped = {f"module._orig_mod.{name}": value for name, value in state["model"].items()}
    torch.save({**state, "model": wrapped}, file)
    convert.convert(run, tmp_path / "wrapped", weights="raw")
    torch.save(state, file)
    convert.convert(run, tmp_path / "plain", weights="raw")
    one, two = (convert.read_folder(tmp_path / name).params for name in ("wrapped", "plain"))
    assert_same(one, two)


@pytest.mark.parametrize(
    "text",
    ["", '{"heldout": {"passes"', "[]", "{}", '{"heldout": 3}', "\xff", "good, but a null"],
)
def test_a_summary_that_is_odd_leaves_the_numbers_out(theirs, tmp_path, caplog, text):
    good = {key: {"bound": 1.5, "bound_standard_error": 0.25} for key in UNITS}
    good |= {"passes": 2, "blocks": 3, "split": "test", "step": 4, "seed": 5}
    run = workdir.open_workdir(theirs.parent / "one")._replace(folder=tmp_path)
    (tmp_path / "summary.json").write_text(json.dumps({"heldout": good}))
    told = facts_of_run(run)
    assert [row["value"] for row in told["numbers"]] == ["1.500 +- 0.250"] * 2
    if "null" in text:
        good["nats_per_token"]["bound"] = None
        text = json.dumps({"heldout": good})
    (tmp_path / "summary.json").write_text(text, encoding="latin-1")
    assert facts_of_run(run) == {**told, "numbers": []}
    (warning,) = [record.getMessage() for record in caplog.records]
    assert "summary.json' is left out" in warning and "\n" not in warning


def test_a_run_before_its_first_step_has_no_moments(tmp_path):
    config, train_state = random_state("absorb")
    start = experiment.imported_state(config, 37, params=train_state.params, ema=train_state.ema)
    workdir.write_workdir(
        tmp_path / "one", config=config, tokenizer=TOKENIZER, train_state=start, original=None
    )
    original_run.export_run(tmp_path / "one", tmp_path / "theirs")
    checkpoint = loaded(tmp_path / "theirs")
    assert (checkpoint["step"], checkpoint["optimizer"]["state"]) == (0, {})
    import_run(tmp_path / "theirs", tmp_path / "two")
    assert read(tmp_path / "two").step == 0


def test_what_cannot_be_converted_is_said(theirs, tmp_path):
    one, two = theirs.parent / "one", tmp_path / "two"

    def converted(**options):
        return convert.convert(theirs, two, **{"form": "workdir", **options})

    with says("no", ".hydra/config.yaml", "give the folder of a run of the original code"):
        original_run.read_run(one, "ema")
    with says("is there and is not empty"):
        original_run.export_run(one, theirs)
    with says("tokenizer 'bytes' has 256 tokens, the model in", "37"):
        converted(tokenizer=make_tokenizer("bytes", "", None))
    with says("unknown config key data.recods"):
        converted(tokenizer=TOKENIZER, changes={"data.recods": "x"})
    with says("a workdir needs the model's tokenizer"):
        converted()
    with says("is a run of the original", "needs no conversion to form 'original'"):
        converted(form="original")
    with says("unknown form 'hug'; known: hub, original, workdir"):
        converted(form="hug")
    with says("config.seed can be set with --form=workdir only"):
        converted(form="hub", changes={"seed": 1})
    for options, word in (
        ({"weights": "raw"}, "--weights=raw"),
        ({"form": "hub", "optimizer": False}, "--fresh_optimizer"),
    ):
        with says(f"{word} is for a run", "leave it out"):
            converted(**options)
    with says("--tokenizer is for --form=hub or workdir", "leave it out"):
        convert.convert(one, two, form="original", tokenizer=TOKENIZER)
    with says("--weights=raw is for a run or a workdir"):
        convert.convert(golden("hf_absorb/config.json").parent, two, weights="raw")
    with says("is not a .pth file of a run, and no folder with"):
        convert.convert(tmp_path / "nowhere", two)
    config, train_state = random_state("absorb")
    config.schedule.eps = 0.01
    workdir.write_workdir(
        tmp_path / "eps", config=config, tokenizer=TOKENIZER, train_state=train_state, original=None
    )
    with says("cannot go on with schedule.eps 0.01: the original's is 0.001"):
        original_run.export_run(tmp_path / "eps", two)
    config.schedule.eps, config.optimizer.decay_fraction = 1e-3, 0.5
    workdir.write_workdir(
        tmp_path / "decay",
        config=config,
        tokenizer=TOKENIZER,
        train_state=train_state,
        original=None,
    )
    with says("cannot go on with optimizer.decay_fraction 0.5: the original's is 0.0"):
        original_run.export_run(tmp_path / "decay", two)
    assert not two.exists()


def test_a_snapshot_is_read_where_its_file_is_named(theirs, tmp_path):
    snapshot = theirs / "checkpoints/checkpoint_1.pth"
    snapshot.parent.mkdir()
    shutil.copyfile(theirs / "checkpoints-meta/checkpoint.pth", snapshot)
    done = convert.convert(snapshot, tmp_path / "hub")
    assert (done.read, done.wrote, done.step) == ("run of the original", "hub folder", STEP)
    assert_same(convert.read_folder(tmp_path / "hub").params, random_state("absorb")[1].ema)


def test_commands_carry_a_run_there_and_back_and_train_on(tiny_run, tmp_path, capsys):
    theirs, back = tmp_path / "theirs", tmp_path / "back"
    assert convert_command([f"--from={tiny_run}", f"--to={theirs}", "--form=original"]) == 0
    told = capsys.readouterr().out
    assert "run of the original" in told and "step       8" in told
    assert f"python train.py +load_dir={theirs}" in told
    options = [
        f"--from={theirs}",
        f"--to={back}",
        "--form=workdir",
        f"--tokenizer={tiny_run / 'tokenizer.json'}",
        "--config.data.corpus=pydoc",
        f"--config.data.records={tiny_run / 'records'}",
        "--config.data.heldout_fraction=0.1",
        "--config.model.dtype=float32",
        "--config.train.steps=9",
        "--config.evaluate.blocks=4",
        "--config.evaluate.batch_size=4",
        "--config.evaluate.passes=2",
    ]
    assert convert_command(options) == 0
    next_command = capsys.readouterr().out.split("next")[-1].split()
    assert next_command[0] == "sedd-train"
    before, ours = (read(folder) for folder in (tiny_run, back))
    for one, other in zip(jax.tree.leaves(before), jax.tree.leaves(ours), strict=True):
        np.testing.assert_array_equal(one, other)
    assert train_command(next_command[1:]) == 0
    assert read(back).step == 9
    # A hub folder begins a new run at step 0.
    assert convert_command([f"--from={back}", f"--to={tmp_path / 'hub'}"]) == 0
    done = convert.convert(tmp_path / "hub", tmp_path / "fresh", form="workdir")
    assert done.step == 0 and "step 0" in done.notices[-1]
    assert_same(read(tmp_path / "fresh").params, read(back).ema)
    # Records of another text are made with the tokenizer that the model has.
    (tmp_path / "new.txt").write_text("another text, a line of it\n" * 50)
    config = workdir.saved_config(tmp_path / "fresh")
    config.data.corpus, config.data.path = "text", str(tmp_path / "new.txt")
    config.data.records, config.data.length = "", 16
    records = workdir.prepare_data(config, tmp_path / "fresh")
    assert records.tokenizer.to_dict() == json.loads((tiny_run / "tokenizer.json").read_text())
    # So it goes on with a text of the user's, and then with no other.
    fresh = f"--workdir={tmp_path / 'fresh'}"
    own = ["--config.data.corpus=text", f"--config.data.path={tmp_path / 'new.txt'}"]
    short = ["--config.train.steps=1", "--config.data.length=16", "--config.data.records="]
    assert train_command([fresh, *own, *short]) == 0
    assert workdir.saved_config(tmp_path / "fresh").data.corpus == "text"
    assert train_command([fresh, "--config.data.corpus=pydoc", "--config.train.steps=2"]) == 2
    assert "data.corpus: 'text' -> 'pydoc'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, words",
    [
        (["--to=x"], "--from"),
        (["--from=nowhere", "--to=x"], "is not a .pth file of a run"),
        (["--from=nowhere", "--to=x", "--what=1"], "unknown flag --what; sedd-convert --help"),
        (["--from=nowhere", "--to=x", "--tokenizer=characters"], "is fitted on a corpus"),
        (["--from=nowhere", "--to=x", "--tokenizer_path=y"], "needs --tokenizer"),
        (["--config.model.dtype=[1]"], "config.model.dtype '[1]' is not allowed"),
        ([f"--config.optimizer.learning_rate={'9' * 400}"], "config.optimizer.learning_rate '999"),
        ([f"--config.seed={'9' * 5000}"], "config.seed '999"),
        ([f"--config.seed={'[' * 99999}"], "config.seed '[[["),
    ],
)
def test_mistakes_in_the_command_are_one_line(options, words, capsys, tmp_path):
    if options[0].startswith("--config."):
        source = golden("hf_absorb/config.json").parent
        place = [f"--from={source}", f"--to={tmp_path / 'x'}", "--form=workdir"]
        options = [*place, "--tokenizer=ids:37", *options]
    assert convert_command(options) == 2
    error = capsys.readouterr().err
    assert error.startswith("sedd-convert: error: ") and words in error
    assert error.count("\n") == 1
