"""load: from a run, an exported folder, the hub; what it refuses; nothing is half loaded."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import REPOSITORY, says
from local_hub import NOWHERE, OWNER
from original_models import TOKENIZER, golden

import sedd_jax
from sedd_jax import experiment
from sedd_jax.data.tokenizers import Ids
from sedd_jax.inference import pretrained


@pytest.fixture(scope="module")
def model(tiny_run):
    return sedd_jax.load(tiny_run)


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def assert_same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one.params, other.params)
    assert (one.experiment, one.sampling) == (other.experiment, other.sampling)
    assert (one.tokenizer, one.step) == (other.tokenizer, other.step)
    assert one.sample(2, steps=2, seed=1) == other.sample(2, steps=2, seed=1)


def test_an_exported_model_is_the_same_model(model, folder, tmp_path):
    again = sedd_jax.load(folder)
    assert_same(model, again)
    again.save_pretrained(tmp_path / "again")
    for file in folder.iterdir():
        found = (tmp_path / "again" / file.name).read_bytes()
        if file.name == "README.md":
            found = found.replace(b"again", b"model")
        assert found == file.read_bytes()


def test_a_model_goes_to_the_hub_and_comes_back(
    model, server, alone, caplog, tmp_path, monkeypatch
):
    (tmp_path / "me/tiny2").mkdir(parents=True)  # nearly the name on the hub
    monkeypatch.chdir(tmp_path)
    url = model.push_to_hub("me/tiny", token=OWNER)
    assert url.startswith(f"{server.url}/me/tiny/commit/")
    files = server.repositories["me/tiny"]["commits"]["main"]
    assert sorted(files) == ["README.md", "config.json", "model.safetensors", "sedd_jax.json"]
    assert 'sedd_jax.load("me/tiny")' in files["README.md"].decode()
    commit = url.rsplit("/", 1)[1]
    with caplog.at_level("INFO", logger="sedd_jax"):
        assert_same(model, sedd_jax.load("me/tiny"))
    assert f"me/tiny is at commit {commit}" in caplog.text
    assert_same(model, sedd_jax.load(f"me/tiny@{commit}"))
    alone(NOWHERE)  # what is in the cache needs no network
    assert_same(model, sedd_jax.load("me/tiny", revision=commit))


def test_a_folder_of_the_original_code_is_loaded_and_scored():
    path = golden("hf_absorb/model.safetensors").parent
    with says("names no tokenizer for its 37 tokens", "ids:37"):
        sedd_jax.load(path)
    model = sedd_jax.load(path, tokenizer="ids:37")
    assert isinstance(model.tokenizer, Ids) and model.graph.dim == 38
    numbers = model.infill("3 14 [MASK:2] 36", steps=4)[0].split()
    assert (numbers[0], numbers[1], numbers[4]) == ("3", "14", "36")
    given = sedd_jax.load(path, tokenizer=TOKENIZER)
    assert given.sample(1, steps=4) == given.decode(model.sample_tokens(1, steps=4))
    assert "training" in model.original  # its config.json, kept for the way back


def test_without_a_network_the_error_says_how_to_name_the_tokenizer(monkeypatch, alone):
    alone(NOWHERE)
    monkeypatch.setattr(pretrained, "GPT2_TOKENS", 37)
    path = golden("hf_absorb/model.safetensors").parent
    with says("holds no tokenizer; give --tokenizer=gpt2 --tokenizer_path=FOLDER", "cannot get"):
        sedd_jax.load(path)


def test_the_pth_run_of_the_original_is_pointed_to_its_command(tmp_path):
    (tmp_path / ".hydra").mkdir()
    with says("is a run of the original code", "sedd-convert --from="):
        sedd_jax.load(tmp_path)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"revision": "main"}, "revision 'main' is for hub ids"),
        ({"dtype": "int8"}, "unknown dtype 'int8'; known: float32, bfloat16"),
        ({"tokenizer": "morse"}, "unknown tokenizer 'morse'; known: bert"),
        ({"tokenizer": "ids:7"}, "tokenizer 'ids' has 7 tokens, the model in"),
        ({"tokenizer": "ids:x"}, "'x' is not a number of ids"),
    ],
)
def test_options_that_do_not_fit_are_one_line(folder, options, words):
    with says(words):
        sedd_jax.load(folder, **options)


def test_a_source_that_is_nothing_says_what_was_looked_for(tmp_path, alone):
    for source, words in (
        ("runs/nowhere", "no folder at 'runs/nowhere', and as a hub id"),
        ("x" * 300, "xxx...' is too long for a path: a name may have 255 bytes"),
        (tmp_path / "none", "and it is not a hub id owner/name; give the workdir of a sedd-train"),
        (tmp_path, "holds no model: it is not a .pth file of a run, and no folder with"),
        ("a/b@main", "no folder at 'a/b@main', and as a hub id"),
    ):
        with says(words):
            sedd_jax.load(source)
    with says("names a revision and revision 'x' another"):
        sedd_jax.load("a/b@main", revision="x")


def test_a_damaged_folder_loads_nothing(folder):
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for damaged in (whole[:-5], whole[:200], b"", whole[:-9] + b"x" + whole[-8:]):
        weights.write_bytes(damaged)
        with says("model.safetensors"):
            sedd_jax.load(folder)
    weights.write_bytes(whole)
    extra = json.loads((folder / "sedd_jax.json").read_text())
    extra["vocab_size"] += 1
    (folder / "sedd_jax.json").write_text(json.dumps(extra))
    with says("vocab_size"):
        sedd_jax.load(folder)


def test_weights_in_shards_are_loaded_from_a_folder_and_from_the_hub(model, folder, server, alone):
    from safetensors.numpy import load_file, save_file

    whole = folder / "model.safetensors"
    tensors = load_file(whole)
    whole.unlink()
    held = {name: f"s-{i % 2}.safetensors" for i, name in enumerate(tensors)}
    for file in set(held.values()):
        save_file({n: tensors[n] for n in held if held[n] == file}, folder / file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": held}))
    assert_same(model, sedd_jax.load(folder))
    commit = server.add("me/shards", {f.name: f.read_bytes() for f in folder.iterdir()})
    assert_same(model, sedd_jax.load("me/shards"))
    alone(NOWHERE)
    assert_same(model, sedd_jax.load(f"me/shards@{commit}"))
    (folder / "s-1.safetensors").unlink()
    with says("no '", "s-1.safetensors', which"):
        sedd_jax.load(folder)


def test_a_pointer_of_git_lfs_is_named_in_every_file(folder):
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 9\n"
    for name in ("model.safetensors", "config.json", "sedd_jax.json"):
        content = (folder / name).read_bytes()
        (folder / name).write_text(pointer)
        with says(f"{name}' is git-lfs's pointer to the file", "git lfs pull"):
            sedd_jax.load(folder)
        (folder / name).write_bytes(content)


def test_an_address_is_no_folder(folder):
    for source in ("gs://bucket/run", "s3://bucket/model"):
        with says(repr(source), "is an address, not a path; mount"):
            sedd_jax.load(source)


def test_the_package_is_imported_quickly_and_touches_no_device():
    """Importing it loads none of its dependencies: its time is the interpreter's."""
    code = (
        "import sys; before = set(sys.modules); import sedd_jax; "
        "heavy = {'jax', 'flax', 'numpy', 'orbax', 'torch', 'tensorflow', 'grain'}; "
        "print(sorted(heavy & (set(sys.modules) - before)))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "[]"


@pytest.mark.long
def test_a_model_of_sedd_smalls_size_is_loaded_and_sampled_within_3_gib(tmp_path):
    from sedd_jax import convert
    from sedd_jax.configs import openwebtext_small

    config = openwebtext_small.get_config()
    graph = experiment.make_graph(config, 50257)
    network = experiment.make_model(config, graph)
    params = experiment.init_params(config, network, jax.random.key(0))
    model = convert.Pretrained(config, 50257, jax.device_get(params))
    convert.write_folder(tmp_path / "small", model)
    code = (
        "import re, sedd_jax; "
        f"model = sedd_jax.load({str(tmp_path / 'small')!r}, tokenizer='ids:50257', "
        "dtype='float32'); "
        "assert model.sample_tokens(1, steps=2).shape == (1, 1024); "
        # Not ru_maxrss, which the process that started this one had a part in.
        "print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 3 * 2**20, f"{int(run.stdout) / 2**20:.2f} GiB"


def test_a_folder_inside_of_a_run_names_the_run(tiny_run):
    (checkpoint,) = (tiny_run / "checkpoints").glob("8")
    with says(
        "holds no model", f"it is a folder of the run {str(tiny_run)!r}: name that and step 8"
    ):
        sedd_jax.load(checkpoint)
    with says("holds no model", f"of the run {str(tiny_run)!r}: name that"):
        sedd_jax.load(tiny_run / "checkpoints")


def test_a_misspelt_folder_that_the_hub_does_not_have_is_asked_about(
    tiny_run, tmp_path, monkeypatch
):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/quickstart").symlink_to(tiny_run)
    monkeypatch.chdir(tmp_path)
    with says("no folder at 'runs/quikstart'; did you mean 'runs/quickstart'?"):
        sedd_jax.load("runs/quikstart")
