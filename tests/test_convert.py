"""Names, configs and hub folders of the original code, to ours and back."""

import hashlib
import json
import tracemalloc
from pathlib import Path

import flax.traverse_util
import golden_set
import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import yaml
from conftest import says
from golden_set import arrays
from huggingface_hub import ModelCard
from original_models import GRAPHS, TOKENIZER, assert_same, config_of, golden, model_of

from sedd_jax import config as configuration
from sedd_jax import convert, experiment
from sedd_jax.convert import card, names, original_config
from sedd_jax.models.head import make_score_fn

EARLIER = Path(__file__).parent / "earlier"  # what earlier versions have written
both_graphs = pytest.mark.parametrize("graph", GRAPHS)


def log_score(config, vocab_size, params, xt, sigma):
    """[B, L, D] of a model, float32."""
    graph = experiment.make_graph(config, vocab_size)
    model = experiment.make_model(config, graph)
    with jax.default_matmul_precision("highest"):
        return jax.jit(lambda p: make_score_fn(model, p, graph)(xt, sigma[:, None]).log_score())(
            params
        )


def safetensors_header(file) -> dict:
    data = file.read_bytes()
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


# Names and shapes


@both_graphs
def test_expected_names_are_the_originals_in_its_order(graph):
    config, vocab_size, _ = original_config.from_original_config(config_of(graph))
    expected = names.expected_tensors(config, vocab_size)
    stored = arrays("model.npz")
    assert list(expected) == list(stored[f"{graph}/param_order"])
    assert {n: stored[f"{graph}/param/{n}"].shape for n in expected} == expected


def test_expected_shapes_are_those_of_the_network():
    config, vocab_size, params = model_of("absorb")
    model = experiment.make_model(config, experiment.make_graph(config, vocab_size))
    shape = jax.eval_shape(lambda: experiment.init_params(config, model, jax.random.key(0)))
    assert jax.tree.map(lambda leaf: leaf.shape, shape) == jax.tree.map(np.shape, params)


@pytest.mark.parametrize("size, tensors, parameters", [("small", 131, 169_627_218)])
def test_published_sizes_have_the_published_counts(size, tensors, parameters):
    from sedd_jax.configs import base

    expected = names.expected_tensors(base.get_config(), 50257)
    assert len(expected) + 1 == tensors
    assert sum(np.prod(shape) for shape in expected.values()) == parameters


@pytest.mark.parametrize("size", ["small", "medium"])
def test_published_models_have_the_originals_tensors(size):
    stored = json.loads(golden(f"params_{size}.json").read_text())
    config, vocab_size, _ = original_config.from_original_config(stored["config"])
    frequencies = names.buffer(config.model.hidden_size // config.model.heads)
    ours = names.expected_tensors(config, vocab_size) | {names.BUFFER: frequencies.shape}
    theirs = {row["name"]: tuple(row["shape"]) for row in stored["state_dict"]}
    assert ours == theirs and {row["dtype"] for row in stored["state_dict"]} == {"float32"}


@both_graphs
def test_parameters_survive_the_way_there_and_back(graph):
    _, _, params = model_of(graph)
    assert_same(names.from_original(names.to_original(params), 4), params)


# Configs


@pytest.mark.parametrize("file", ["hf_{}/config.json", "config_{}.yaml"])
@both_graphs
def test_config_comes_back_as_it_was(graph, file):
    from sedd_jax.convert.original_config import read_config

    path = golden_set.FOLDER / file.format(graph)
    theirs = read_config(path)
    assert theirs == (json.loads if path.suffix == ".json" else yaml.safe_load)(path.read_text())
    config, vocab_size, _ = original_config.from_original_config(theirs)
    back = original_config.to_original_config(config, vocab_size, theirs)
    assert json.dumps(back) == json.dumps(theirs)  # 20 and 20.0 differ


def test_config_means_what_the_original_does_by_it():
    theirs = config_of("absorb")
    theirs["training"] |= {"accum": 2, "ema": 0.999, "n_iters": 77}
    theirs["sampling"]["predictor"] = "analytic"
    theirs["optim"] |= {"warmup": 11, "grad_clip": -1, "beta2": 0.99}
    config, vocab_size, _ = original_config.from_original_config(theirs)
    values = dict(configuration.flatten(config))
    wanted = {
        "graph.name": "absorbing",
        "schedule.name": "log_linear",
        "schedule.eps": 1e-3,
        "data.length": 24,
        "data.corpus": "openwebtext",
        "model.hidden_size": 64,
        "model.dtype": "float32",
        "train.microbatches": 2,
        "train.steps": 77,
        "optimizer.ema_decay": 0.999,
        "optimizer.warmup_steps": 11,
        "optimizer.clip_norm": 1e30,
        "optimizer.b2": 0.99,
        "sample.predictor": "tweedie",
    }
    assert {key: values[key] for key in wanted} == wanted and vocab_size == 37
    assert original_config.to_original_config(config, vocab_size)["optim"]["grad_clip"] == -1


@pytest.mark.parametrize("name", ["lm1b", "openwebtext_medium", "quickstart", "text8_uniform"])
def test_our_configs_survive_the_originals_words(name):
    import importlib

    config = importlib.import_module(f"sedd_jax.configs.{name}").get_config()
    theirs = original_config.to_original_config(config, 100)
    again = dict(configuration.flatten(original_config.from_original_config(theirs).config))
    unsaid = ("data.", "objective.", "evaluate.", "model.dtype", "train.eval_every", "checkpoint")
    unsaid += ("optimizer.decay_fraction",)
    for key, value in configuration.flatten(config):
        if not key.startswith(unsaid):
            assert again[key] == value, key
    # What its programs read beyond what ours say.
    needs = "ngpus training.snapshot_freq training.snapshot_sampling data.valid data.cache_dir "
    needs += "eval.batch_size eval.perplexity sampling.noise_removal optim.optimizer tokens"
    for place in needs.split():
        section, _, field = place.rpartition(".")
        assert field in (theirs[section] if section else theirs), place


def test_missing_fields_are_told_in_one_notice():
    theirs = config_of("absorb")
    del theirs["training"]["ema"], theirs["sampling"], theirs["model"]["dropout"]
    config, _, notices = original_config.from_original_config(theirs, "old.json")
    lacks = [notice for notice in notices if "old.json lacks" in notice]
    assert len(lacks) == 1
    for told in ("training.ema 0.9999", "sampling.steps 128", "model.dropout 0.1"):
        assert told in lacks[0]
    assert config.optimizer.ema_decay == 0.9999
    full = original_config.to_original_config(config, 37, theirs)
    assert full["training"]["ema"] == 0.9999 and full["sampling"]["steps"] == 128


@pytest.mark.parametrize(
    "place, value, words",
    [
        ("model.type", "unet", ["model.type 'unet'", "one of ddit"]),
        ("graph.type", "roulette", ["graph.type 'roulette'", "absorb, uniform"]),
        ("graph.type", ["absorb"], ["graph.type ['absorb']", "absorb, uniform"]),
        ("noise.type", "cosine", ["noise.type 'cosine'", "loglinear, geometric"]),
        ("model.n_heads", 5, ["hidden_size 64", "not divisible by model.n_heads 5"]),
        ("model.hidden_size", 64.0, ["hidden_size 64.0", "a whole number"]),
        ("model.hidden_size", 10**9, ["hidden_size 1000000000", "a whole number"]),
        ("model.n_blocks", -3, ["n_blocks -3", "a whole number"]),
        ("model.n_blocks", True, ["n_blocks True", "a whole number"]),
        ("model.n_blocks", None, ["model.n_blocks is missing in config.json"]),
        ("tokens", 10**12, ["tokens 1000000000000", "a whole number"]),
        ("optim.lr", float("nan"), ["optim.lr nan", "a finite number"]),
        ("optim.lr", 10**400, ["optim.lr 1000", "a finite number"]),
        ("data.train", ["text8"], ["data.train ['text8']", "is not text"]),
        ("sampling.noise_removal", "yes", ["noise_removal 'yes'", "one of True, False"]),
        ("model", "tiny", ["model.hidden_size is missing"]),
        ("model.name", 7, ["model.name 7 in config.json is not text"]),
    ],
)
def test_a_config_of_something_else_is_refused(place, value, words):
    theirs = config_of("absorb")
    section, _, field = place.rpartition(".")
    (theirs[section] if section else theirs)[field] = value
    with says(*words):
        original_config.from_original_config(theirs)


@pytest.mark.parametrize(
    "text", ["a: &a [1]\nb: *a", "- 1", "a: !!python/name:os.system", "a: [", "a: 2020-01-01"]
)
def test_yaml_that_is_no_config_is_refused(tmp_path, text):
    from sedd_jax.convert.original_config import read_config

    (tmp_path / "config.yaml").write_text(text)
    with says(str(tmp_path / "config.yaml")):
        read_config(tmp_path / "config.yaml")


# The folder


@pytest.mark.parametrize(
    "graph, vocab_size, digest",  # of the parameters, as version 0.1.0 read them
    [
        ("absorbing", 24, "9d225a27b3360760185f52a1698e168e40327f4492dcacf1347e0a115e1e6584"),
        ("uniform", 300, "17386346548d4494a34f7d2b3cfe344b865418ad358e1a768679a3806b8cd05b"),
    ],
)
def test_a_folder_of_the_version_before_gives_the_same_parameters(graph, vocab_size, digest):
    read = convert.read_folder(EARLIER / f"hub_{graph}")
    actual = hashlib.sha256()
    for name, a in sorted(flax.traverse_util.flatten_dict(read.params, sep="/").items()):
        actual.update(f"{name} {a.dtype} {list(a.shape)}\n".encode() + a.tobytes())
    assert actual.hexdigest() == digest
    assert (read.vocab_size, read.step, read.config.graph.name) == (vocab_size, 8, graph)
    assert read.tokenizer.vocab_size == vocab_size and read.about["weights"] == "ema"


@pytest.fixture(params=GRAPHS)
def exported(request, tmp_path):
    """(folder, our config, vocab_size, params) of an export."""
    config, vocab_size, params = model_of(request.param)
    folder = tmp_path / "hub"
    about = {
        "numbers": [{"name": "a|b", "value": "1.5", "how": "counted\nby hand"}],
        "license": "mit",
    }
    model = convert.Pretrained(
        config=config,
        vocab_size=vocab_size,
        params=params,
        tokenizer=TOKENIZER,
        step=7,
        original=config_of(request.param),
        about=about,
    )
    convert.write_folder(folder, model)
    return folder, config, vocab_size, params


def test_folder_gives_back_what_was_written(exported):
    folder, config, vocab_size, params = exported
    read = convert.read_folder(folder)
    assert_same(read.params, params)
    assert read.config.to_dict() == config.to_dict()
    assert (read.vocab_size, read.step, read.notices) == (vocab_size, 7, ())
    assert read.tokenizer == TOKENIZER
    assert read.about["license"] == "mit"


def test_folder_is_read_without_sedd_jax_json(exported):
    folder, _, vocab_size, params = exported
    (folder / "sedd_jax.json").unlink()
    read = convert.read_folder(folder)
    assert_same(read.params, params)
    assert (read.vocab_size, read.tokenizer, read.step) == (vocab_size, None, None)


def test_what_is_told_holds_and_is_told_once(tmp_path, caplog):
    """A corpus that is not known by name, and a tokenizer, are told by sedd_jax.json."""
    config, vocab_size, params = model_of("absorb")
    config.data.corpus = "pydoc"
    caplog.set_level("INFO")
    convert.write_folder(tmp_path / "a", convert.Pretrained(config, vocab_size, params))
    done = convert.convert(tmp_path / "a", tmp_path / "b")
    (tmp_path / "a/sedd_jax.json").unlink()
    bare = convert.convert(tmp_path / "a", tmp_path / "c", tokenizer=TOKENIZER)
    (notice,) = done.notices
    assert "no tokenizer is known for 37 tokens" in notice and "--tokenizer and --replace" in notice
    assert bare.notices == (
        "data.train 'pydoc' is not a corpus known here; config.data.corpus is text",
    )
    assert not caplog.records


@both_graphs
def test_export_has_the_originals_files(graph, tmp_path):
    source = golden(f"hf_{graph}/model.safetensors").parent
    convert.convert(source, tmp_path / "hub", tokenizer=TOKENIZER)
    theirs, ours = (safetensors_header(f / "model.safetensors") for f in (source, tmp_path / "hub"))
    kept = [
        {n: (e["dtype"], e["shape"]) for n, e in h.items() if n[0] != "_"} for h in (theirs, ours)
    ]
    assert kept[0] == kept[1] and names.BUFFER in kept[0]
    texts = [(f / "config.json").read_text() for f in (source, tmp_path / "hub")]
    assert texts[0].strip() == texts[1].strip()
    tensors = [
        safetensors.numpy.load_file(f / "model.safetensors") for f in (source, tmp_path / "hub")
    ]
    buffers = [t.pop(names.BUFFER) for t in tensors]
    np.testing.assert_allclose(*buffers, rtol=1e-6)
    assert_same(*tensors)


@both_graphs
def test_original_folder_gives_the_originals_log_scores(graph):
    read = convert.read_folder(golden(f"hf_{graph}/model.safetensors").parent)
    with np.load(golden(f"hf_{graph}/model.safetensors").parents[1] / "model.npz") as stored:
        x, sigma = stored[f"{graph}/tokens_x"], stored[f"{graph}/sigma"]
        expected = stored[f"{graph}/log_score_ema_f32"]
    ours = log_score(read.config, read.vocab_size, read.params, x, sigma)
    assert np.abs(ours - expected).max() <= 2e-5


@both_graphs
def test_folder_of_the_golden_parameters_gives_the_originals_log_scores(graph, tmp_path):
    stored = arrays("model.npz")
    (tmp_path / "config.json").write_text(json.dumps(config_of(graph)))
    tensors = {n: stored[f"{graph}/param/{n}"] for n in stored[f"{graph}/param_order"]}
    # As DistributedDataParallel names them, and without the buffer.
    tensors = {f"module.{name}": array for name, array in tensors.items()}
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    read = convert.read_folder(tmp_path)
    x, sigma = stored[f"{graph}/tokens_x"], stored[f"{graph}/sigma"]
    ours = log_score(read.config, read.vocab_size, read.params, x, sigma)
    assert np.abs(ours - stored[f"{graph}/log_score_f64"]).max() <= 2e-5


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_narrow_floats_are_widened_exactly(exported, dtype):
    folder, _, _, params = exported
    # The library writes a transposed view as it lies in memory.
    tensors = {
        n: np.ascontiguousarray(a.astype(dtype)) for n, a in names.to_original(params).items()
    }
    (folder / "sedd_jax.json").unlink()
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    narrow = jax.tree.map(lambda a: a.astype(dtype).astype(np.float32), params)
    assert_same(convert.read_folder(folder).params, narrow)


def test_reading_holds_one_copy_and_the_largest_tensor(exported):
    folder, _, _, params = exported
    convert.read_folder(folder)  # what is imported and cached does not count
    leaves = [leaf.nbytes for leaf in jax.tree.leaves(params)]
    tracemalloc.start()
    convert.read_folder(folder)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < sum(leaves) + 1.3 * max(leaves) + 400_000  # the header, the config


def test_writing_holds_the_largest_tensor_and_no_copy_of_the_others(exported):
    _, _, _, params = exported
    write_again(exported)  # what is imported and cached does not count
    leaves = [leaf.nbytes for leaf in jax.tree.leaves(params)]
    tracemalloc.start()
    write_again(exported)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2.1 * max(leaves) + 100_000 < sum(leaves)  # the header, the card


def test_contradictory_folder_is_refused(exported):
    folder, *_ = exported
    other = {"hidden_size": 32, "n_blocks": 2, "n_heads": 2, "cond_dim": 16, "length": 25}
    for key, value in other.items():
        theirs = json.loads((folder / "config.json").read_text())
        good, theirs["model"][key] = json.dumps(theirs), value
        (folder / "config.json").write_text(json.dumps(theirs))
        with says(str(folder), "by config.json", "by sedd_jax.json", "delete sedd_jax.json"):
            convert.read_folder(folder)
        (folder / "config.json").write_text(good)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"format": 2}, ["format 2, 1 is known"]),
        ({"vocab_size": "37"}, ["vocab_size of", "of a wrong type"]),
        ({"tokenizer": [1]}, ["tokenizer of", "of a wrong type"]),
        ({"config": {"seed": 0, "data": {"lenght": 3}}}, ["unknown config key 'data.lenght'"]),
        ({"config": {"seed": "zero"}}, ["config.seed 'zero' is not allowed"]),
        ({"config": {"graph": {"name": []}}}, ["config.graph.name [] is not allowed"]),
        ({"config": {"seed": 10**400}}, ["config.seed 1000", "is not allowed"]),
        ({"config": {"optimizer": {"learning_rate": 10**400}}}, ["learning_rate 1000"]),
    ],
)
def test_broken_sedd_jax_json_is_refused(exported, change, words):
    folder, *_ = exported
    ours = json.loads((folder / "sedd_jax.json").read_text())
    (folder / "sedd_jax.json").write_text(json.dumps(ours | change))
    with says(*words):
        convert.read_folder(folder)


@pytest.mark.parametrize(
    "about, words",
    [
        ({"license": ["mit"]}, ["about.license is left out", "not text"]),
        ({"weights": 1}, ["about.weights is left out", "not text"]),
        ({"numbers": {"a": 1}}, ["about.numbers is left out", "name, value, how"]),
        ({"numbers": ["a"]}, ["about.numbers is left out", "name, value, how"]),
        ({"numbers": [{"name": "a", "value": 1, "how": "b"}]}, ["about.numbers is left out"]),
    ],
)
def test_odd_facts_do_not_stop_loading_and_are_left_out_of_the_card(exported, caplog, about, words):
    folder, _, _, params = exported
    ours = json.loads((folder / "sedd_jax.json").read_text())
    (folder / "sedd_jax.json").write_text(json.dumps(ours | {"about": about}))
    read = convert.read_folder(folder)
    assert_same(read.params, params)
    assert not caplog.records
    write_again(exported, about=read.about)
    (warning,) = [record.getMessage() for record in caplog.records]
    assert all(word in warning for word in words)
    text = (folder / "README.md").read_text()
    assert "license" not in text and "| weights |" not in text and "Numbers" not in text


def test_newer_config_keys_are_taken_from_base_and_told(exported):
    folder, config, *_ = exported
    ours = json.loads((folder / "sedd_jax.json").read_text())
    del ours["config"]["sample"]["draw"]
    (folder / "sedd_jax.json").write_text(json.dumps(ours))
    read = convert.read_folder(folder)
    assert read.config.sample.draw == config.sample.draw
    assert len(read.notices) == 1 and "sample.draw 'exact'" in read.notices[0]


def test_missing_weights_are_named(exported):
    folder, *_ = exported
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    with says("no model.safetensors, model.safetensors.index.json or pytorch_model.bin in"):
        convert.read_folder(folder)
    with says(f"no config.json in {str(folder / 'nowhere')!r}"):
        convert.read_folder(folder / "nowhere")


def test_another_rotary_embedding_is_refused(exported):
    folder, *_ = exported
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    tensors[names.BUFFER] = tensors[names.BUFFER] * 0.5
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    with says("model.safetensors' has rotary_emb.inv_freq of another base than 10000"):
        convert.read_folder(folder)


def write_again(exported, name=None, **changes):
    folder, *model = exported
    again = convert.Pretrained(*model, step=8)._replace(**changes)
    convert.write_folder(folder, again, name=name, replace=True)


def test_an_export_is_replaced_and_nothing_else_is(exported):
    folder, *model = exported
    with says(str(folder), "holds an exported model", "new folder", "--replace"):
        convert.write_folder(folder, convert.Pretrained(*model, step=9))
    write_again(exported)
    assert convert.read_folder(folder).step == 8
    assert {p.name for p in folder.parent.iterdir()} == {"hub"}
    (folder / "notes.txt").write_text("mine")
    with says(str(folder), "is there and is not empty", "choose a new folder"):
        write_again(exported)
    assert (folder / "notes.txt").read_text() == "mine"


def test_an_export_that_fails_leaves_the_old_one(exported):
    folder, *_, params = exported
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(TypeError):  # what JSON cannot hold
        write_again(exported, about={"numbers": [], "who": object()})
    fewer = {**params, "embedding": params["embedding"][:-1]}
    with says("vocab_embed.embedding in the parameter tree has shape"):
        write_again(exported, params=fewer)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert {p.name for p in folder.parent.iterdir()} == {"hub"}


def test_card_says_what_is_known(exported):
    folder, config, *_ = exported
    text = (folder / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["license"] == "mit" and front["library_name"] == "sedd_jax"
    assert front["pipeline_tag"] == "text-generation"
    for told in (
        '\nmodel = sedd_jax.load("hub")\n',
        "\n# hub\n",
        config.graph.name,
        "openwebtext",
        "characters, 37 tokens",
    ):
        assert told in text
    assert "| a\\|b | 1.5 | counted by hand |" in text
    plain = card.model_card("hub", config, 37, None, None, 5, {})
    assert "license" not in plain and "Numbers" not in plain and "unknown" in plain
    assert "| weights |" not in plain and "| trained on | openwebtext |" in plain


def test_card_says_the_name_that_is_given_and_which_weights_and_text(exported):
    folder, *_ = exported
    write_again(exported, name="me/my-model", about={"weights": "ema", "corpus": "text"})
    text = (folder / "README.md").read_text()
    for told in (
        '\nmodel = sedd_jax.load("me/my-model")\n',
        "\n# me/my-model\n",
        "| weights | moving average (EMA) |",
        "| trained on | a text of its own |",
    ):
        assert told in text


@pytest.mark.parametrize("text", ["mit\n---\ntags: [x]", 'a" b: c', "yes", "# no", "\ud800\x7f🙂"])
def test_no_license_ends_or_adds_to_the_front_matter(text):
    config, *_ = model_of("absorb")
    front = ModelCard(card.model_card("hub", config, 37, None, None, 5, {"license": text})).data
    assert front.license == text and front.tags == ["sedd", "discrete-diffusion", "jax"]
