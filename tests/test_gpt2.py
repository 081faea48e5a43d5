"""GPT-2 against float64 numpy everywhere, and against transformers where that is installed."""

import functools
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from huggingface_hub import constants
from safetensors.numpy import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel

from sedd_jax.convert import weights
from sedd_jax.evaluation.scorer import SCORERS, load_scorer
from sedd_jax.kernels import vocab_reduce
from sedd_jax.kernels.attention import attention
from sedd_jax.models import gpt2

TINY = {"vocab_size": 97, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 4}
SIZE, LENGTH = TINY["n_embd"], 12


@functools.cache
def tiny_tensors():
    """A state dict in Hugging Face's names in which no part of the network is zero."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    def norm(name):
        return {f"{name}.weight": 1 + 0.3 * normal(SIZE), f"{name}.bias": 0.3 * normal(SIZE)}

    def linear(name, fan_in, fan_out):
        return {
            f"{name}.weight": normal(fan_in, fan_out) * fan_in**-0.5,
            f"{name}.bias": 0.3 * normal(fan_out),
        }

    tensors = {
        "wte.weight": normal(TINY["vocab_size"], SIZE) * 0.3,
        "wpe.weight": normal(TINY["n_positions"], SIZE) * 0.3,
        **norm("ln_f"),
    }
    for i in range(TINY["n_layer"]):
        tensors |= norm(f"h.{i}.ln_1") | norm(f"h.{i}.ln_2")
        tensors |= linear(f"h.{i}.attn.c_attn", SIZE, 3 * SIZE)
        tensors |= linear(f"h.{i}.attn.c_proj", SIZE, SIZE)
        tensors |= linear(f"h.{i}.mlp.c_fc", SIZE, 4 * SIZE)
        tensors |= linear(f"h.{i}.mlp.c_proj", 4 * SIZE, SIZE)
    return tensors


def save(folder, tensors=None, **config):
    folder.mkdir(exist_ok=True)
    values = {"model_type": "gpt2", "activation_function": "gelu_new", **TINY, **config}
    (folder / "config.json").write_text(json.dumps(values))
    save_file(tiny_tensors() if tensors is None else tensors, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(tmp_path_factory.mktemp("gpt2") / "tiny")


@pytest.fixture(scope="module")
def scorer(folder):
    return load_scorer(folder)


def draw_tokens(rows, vocab_size=97, length=LENGTH):
    return np.random.default_rng(1).integers(0, vocab_size, (rows, length)).astype(np.int32)


def definition(tensors, row):
    """Last hidden state [L, C] and logits [L, V] of one row in float64, a position at a time."""
    t = {name: value.astype(np.float64) for name, value in tensors.items()}

    def norm(x, name):
        centred = x - x.mean()
        return (
            centred / np.sqrt((centred**2).mean() + 1e-5) * t[f"{name}.weight"] + t[f"{name}.bias"]
        )

    def linear(x, name):
        return x @ t[f"{name}.weight"] + t[f"{name}.bias"]

    def gelu(x):
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    x = [t["wte.weight"][token] + t["wpe.weight"][place] for place, token in enumerate(row)]
    for i in range(TINY["n_layer"]):
        qkv = [np.split(linear(norm(v, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn"), 3) for v in x]
        for place in range(len(row)):
            parts = []
            for head in np.split(np.arange(SIZE), TINY["n_head"]):
                q = qkv[place][0][head]
                seen = range(place + 1)
                weights = np.exp([q @ qkv[m][1][head] / np.sqrt(len(head)) for m in seen])
                weights /= weights.sum()
                parts.append(sum(w * qkv[m][2][head] for w, m in zip(weights, seen, strict=True)))
            x[place] = x[place] + linear(np.concatenate(parts), f"h.{i}.attn.c_proj")
        for place, v in enumerate(x):
            inner = gelu(linear(norm(v, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc"))
            x[place] = v + linear(inner, f"h.{i}.mlp.c_proj")
    hidden = np.stack([norm(v, "ln_f") for v in x])
    return hidden, hidden @ t["wte.weight"].T


def nats_of(logits, row):
    log_total = np.log(np.exp(logits[:-1]).sum(axis=-1))
    return log_total - logits[np.arange(len(row) - 1), row[1:]]


def test_nats_and_features_are_those_of_the_definition(scorer):
    tokens = draw_tokens(3)
    exact = [definition(tiny_tensors(), row) for row in tokens]
    nats = scorer.nats(tokens)
    assert nats.dtype == np.float32 and nats.shape == (3, LENGTH - 1)
    expected = [nats_of(logits, row) for (_, logits), row in zip(exact, tokens, strict=True)]
    np.testing.assert_allclose(nats, expected, atol=2e-5)
    features = scorer.features(tokens)
    assert features.dtype == np.float32
    np.testing.assert_allclose(features, [hidden[-1] for hidden, _ in exact], atol=2e-5)
    means = [hidden.mean(axis=0) for hidden, _ in exact]
    np.testing.assert_allclose(scorer.mean_features(tokens), means, atol=2e-5)


def test_what_comes_after_a_token_does_not_change_it(scorer):
    tokens = draw_tokens(2)
    other = tokens.copy()
    other[:, 7:] = (tokens[:, 7:] + 1) % 97
    before, after = scorer.nats(tokens), scorer.nats(other)
    np.testing.assert_array_equal(before[:, :6], after[:, :6])
    assert (np.abs(before - after)[:, 6:] > 1e-4).all()


@pytest.mark.parametrize("name", ["features", "mean_features"])
def test_features_are_of_the_text_alone_and_padding_changes_nothing(scorer, name):
    tokens, lengths = draw_tokens(3), np.array([5, 12, 1])
    padded = tokens.copy()
    padded[0, 5:] = 96
    padded[2, 1:] = 0
    features_of = getattr(scorer, name)
    for row, length, features in zip(tokens, lengths, features_of(padded, lengths), strict=True):
        alone = features_of(row[None, :length])[0]
        np.testing.assert_allclose(features, alone, atol=1e-5)


def test_numbers_do_not_depend_on_the_batch_and_a_shape_is_traced_once(folder, monkeypatch):
    traces = []
    real = gpt2.token_nats
    monkeypatch.setattr(gpt2, "token_nats", lambda *a: traces.append(1) or real(*a))
    scorer, tokens = load_scorer(folder), draw_tokens(7)
    whole = scorer.nats(tokens, batch_size=7)
    parts = scorer.nats(tokens, batch_size=3)  # three batches, the last filled up
    assert len(traces) == 2
    np.testing.assert_allclose(parts, whole, atol=1e-5)
    np.testing.assert_array_equal(scorer.nats(tokens[:2], batch_size=3), parts[:2])
    assert len(traces) == 2


def test_progress_is_shown_when_asked_for(scorer, capsys, bars):
    scorer.nats(draw_tokens(3), batch_size=3)
    assert capsys.readouterr().err == ""
    for score in (scorer.nats, scorer.features):
        score(draw_tokens(3), batch_size=3, progress=True)
        assert "1/1" in capsys.readouterr().err


def test_no_table_of_logits_exists(scorer):
    tokens = jnp.zeros((2, 16), jnp.int32)
    network = scorer.network.clone(vocab_size=2**20)
    shape = jax.eval_shape(network.init, jax.random.key(0), tokens)["params"]
    run = jax.jit(lambda params, tokens: gpt2.token_nats(network, params, tokens))
    program = run.lower(shape, tokens).as_text()
    # The 2 x 15 positions with a next token, and a tile of the tokens at a time.
    tile = vocab_reduce.TILES["cpu"]
    assert f"30x{tile.tokens}xf32" in program
    assert not re.search(r"(2x15|2x16|30)x1048576xf32", program)


def test_bfloat16_is_close_to_float32_and_leaves_the_parameters_alone(scorer, folder):
    half, tokens = load_scorer(folder, dtype="bfloat16"), draw_tokens(3)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(half.params))
    error = np.abs(half.nats(tokens) - scorer.nats(tokens))
    assert 0 < error.max() < 0.15 and error.mean() < 0.03


def test_causal_attention_is_a_softmax_over_the_positions_so_far():
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 5, 3, 8))
    products = jnp.einsum("blhk,bmhk->bhlm", q, k, precision="highest") / 8**0.5
    seen = jnp.tril(jnp.ones((5, 5), bool))
    weights = jax.nn.softmax(jnp.where(seen, products, -jnp.inf), axis=-1)
    exact = jnp.einsum("bhlm,bmhk->blhk", weights, v, precision="highest")
    np.testing.assert_allclose(attention(q, k, v, is_causal=True), exact, atol=1e-5)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda s: s.nats(draw_tokens(2, length=17)), r"17 tokens in a row are not in \[2, 16\]"),
        (lambda s: s.nats(draw_tokens(2, length=1)), "1 tokens in a row"),
        (lambda s: s.nats(draw_tokens(2) + 97), r"are not in \[0, 97\)"),
        (lambda s: s.features(draw_tokens(2) - 97), r"are not in \[0, 97\)"),
        (lambda s: s.nats(draw_tokens(2)[0]), r"must be integers \[N, L\]"),
        (lambda s: s.nats(draw_tokens(0)), "N at least 1"),
        (lambda s: s.nats(draw_tokens(2) * 1.0), "not float64"),
        (lambda s: s.nats(draw_tokens(2), batch_size=0), "batch_size 0 is below 1"),
        (lambda s: s.features(draw_tokens(2), np.array([3])), "2 integers in"),
        (lambda s: s.features(draw_tokens(2), np.array([0, 3])), r"in \[1, 12\]"),
        (lambda s: s.features(draw_tokens(2), np.array([3, 13])), r"in \[1, 12\]"),
        (lambda s: s.features(draw_tokens(2), np.array([3.0, 4.0])), "not float64"),
    ],
)
def test_wrong_tokens_are_refused_in_one_line(scorer, call, words):
    with pytest.raises(ValueError, match=words) as refused:
        call(scorer)
    assert "\n" not in str(refused.value)


def same_parameters(one, other):
    jax.tree.map(np.testing.assert_array_equal, one.params, other.params)


def test_prefixed_names_buffers_and_a_tied_head_load_alike(scorer, tmp_path):
    tensors = {f"transformer.{name}": value for name, value in tiny_tensors().items()}
    tensors["transformer.h.0.attn.bias"] = np.tril(np.ones((1, 1, 16, 16), np.float32))
    tensors["transformer.h.1.attn.masked_bias"] = np.float32(-1e4).reshape(1)
    tensors["lm_head.weight"] = tiny_tensors()["wte.weight"].copy()
    same_parameters(scorer, load_scorer(save(tmp_path / "prefixed", tensors, n_ctx=16)))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_files_are_widened_to_float32(tmp_path, dtype):
    narrow = {name: value.astype(jnp.dtype(dtype)) for name, value in tiny_tensors().items()}
    wide = {name: value.astype(np.float32) for name, value in narrow.items()}
    found = load_scorer(save(tmp_path / "narrow", narrow))
    same_parameters(load_scorer(save(tmp_path / "wide", wide)), found)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(found.params))


def shard(folder):
    """Splits the folder's model.safetensors into two files and an index."""
    tensors, files = load_file(folder / "model.safetensors"), {}
    (folder / "model.safetensors").unlink()
    for i, names in enumerate(np.array_split(sorted(tensors), 2)):
        file = f"part-{i + 1}.safetensors"  # the index names them, whatever their names
        save_file({name: tensors[name] for name in names}, folder / file)
        files |= dict.fromkeys(map(str, names), file)
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_sharded_weights_load_as_whole_ones(scorer, tmp_path):
    same_parameters(scorer, load_scorer(shard(save(tmp_path / "sharded"))))


def test_the_tokenizer_is_read_where_its_files_are(scorer, tmp_path):
    assert scorer.tokenizer is None
    tensors = {**tiny_tensors(), "wte.weight": np.ones((300, SIZE), np.float32)}
    folder = save(tmp_path / "with", tensors, vocab_size=300)
    tokens = [*sorted(ByteLevel.alphabet()), "ab", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\na b\n")
    ids = load_scorer(folder).tokenizer.encode("abb")
    np.testing.assert_array_equal(ids, [256, tokens.index("b")])
    whole = load_scorer(folder).tokenizer
    for name in ("vocab.json", "merges.txt"):
        (folder / name).unlink()
    assert load_scorer(folder).tokenizer is None
    (folder / "tokenizer.json").write_text(whole.library_json)
    assert load_scorer(folder).tokenizer.fingerprint() == whole.fingerprint()
    np.testing.assert_array_equal(load_scorer(folder).tokenizer.encode("abb"), ids)

    save(folder, {**tensors, "wte.weight": np.ones((257, SIZE), np.float32)}, vocab_size=257)
    with pytest.raises(ValueError, match="258 tokens, more than the model's vocab_size 257"):
        load_scorer(folder)


def change_config(**values):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | values))

    return change


def change_tensors(edit):
    def change(folder):
        tensors = dict(tiny_tensors())
        edit(tensors)
        save_file(tensors, folder / "model.safetensors")

    return change


def truncate(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def truncate_header(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])


def lose_a_shard(folder):
    (shard(folder) / "part-2.safetensors").unlink()


def repeat_a_tensor(folder):
    shard(folder)
    file = folder / "part-2.safetensors"
    first = load_file(folder / "part-1.safetensors")
    name = min(first)
    save_file({**load_file(file), name: first[name]}, file)


WEIGHT = "h.1.attn.c_attn.weight"


@pytest.mark.parametrize(
    "change, words",
    [
        (change_tensors(lambda t: t.pop(WEIGHT)), f"lacks {WEIGHT};"),
        (change_tensors(lambda t: t.update(new=np.ones(1))), "a tensor too many: new;"),
        (
            change_tensors(lambda t: t.update({"h.2.ln_1.bias": np.ones(32, np.float32)})),
            "a tensor too many: h.2.ln_1.bias;",
        ),
        (
            # torch's order of a linear layer's axes
            change_tensors(lambda t: t.update({WEIGHT: np.ascontiguousarray(t[WEIGHT].T)})),
            re.escape(f"{WEIGHT} in ") + r".* has shape \[96, 32\], not \[32, 96\]",
        ),
        (
            change_tensors(lambda t: t.update({WEIGHT: t[WEIGHT].astype(np.float64)})),
            "stored as F64; known: F32, F16, BF16",
        ),
        (
            change_tensors(lambda t: t.update({"lm_head.weight": t["wte.weight"] + 1})),
            "lm_head.weight in .* differs from wte.weight",
        ),
        (
            change_tensors(lambda t: t.update({"lm_head.weight": t["wpe.weight"]})),
            "lm_head.weight in .* differs from wte.weight",
        ),
        (
            change_tensors(lambda t: t.update({f"transformer.{WEIGHT}": t[WEIGHT]})),
            f"a tensor too many: transformer.{WEIGHT};",
        ),
        (truncate, "model.safetensors': Error while deserializing header"),
        (truncate_header, "the header of .*model.safetensors' is not JSON"),
        (lose_a_shard, "no '.*part-2.safetensors', which '.*index.json' names"),
        (repeat_a_tensor, "h.0.attn.c_attn.bias is in '.*part-2.* or in '.*index.json', not in bo"),
        (lambda f: (f / "model.safetensors").unlink(), "no model.safetensors or .*index.json in"),
        (lambda f: (f / "config.json").unlink(), "no config.json in"),
        (lambda f: (f / "config.json").write_text("{"), "config.json' is not JSON: Expecting"),
        (lambda f: (f / "config.json").write_text("3"), "config.json' holds a int, not an"),
        (change_config(model_type="llama"), "model_type 'llama' in .* is not 'gpt2'"),
        (change_config(model_type=None), "model_type None in .* is not 'gpt2'"),
        (change_config(n_layer=3), "lacks h.2.attn.c_attn.bias and 11 more"),
        (change_config(n_layer=0), "n_layer 0 in .* is not above 0, as in a GPT-2"),
        (change_config(n_head=5), "n_embd 32 in .* is not divisible by n_head 5"),
        (change_config(n_embd="32"), "n_embd '32' in"),
        (change_config(n_ctx=8), "n_ctx 8 in .* is not 16"),
        (change_config(n_inner=64), "n_inner 64 in"),
        (change_config(activation_function="gelu"), "activation_function 'gelu' in"),
        (change_config(layer_norm_epsilon=1e-6), "layer_norm_epsilon 1e-06 in"),
        (change_config(scale_attn_weights=False), "scale_attn_weights False in"),
        (change_config(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx"),
        (change_config(reorder_and_upcast_attn=True), "reorder_and_upcast_attn True in"),
        (change_config(add_cross_attention=True), "add_cross_attention True in"),
        (change_config(tie_word_embeddings=False), "tie_word_embeddings False in"),
    ],
)
def test_files_that_are_no_whole_gpt2_are_refused_in_one_line(tmp_path, change, words):
    folder = save(tmp_path / "changed")
    change(folder)
    with pytest.raises(ValueError, match=words) as refused:
        load_scorer(folder)
    assert "\n" not in str(refused.value)


def test_every_tensor_is_checked_before_one_is_read(tmp_path, folder, monkeypatch):
    wrong = save(tmp_path / "wrong", {**tiny_tensors(), "new": np.ones(1, np.float32)})
    read = classmethod(lambda *_: pytest.fail("a tensor was read"))
    monkeypatch.setattr(weights.Tensors, "__getitem__", read)
    with pytest.raises(ValueError, match="too many"):
        load_scorer(wrong)
    with pytest.raises(pytest.fail.Exception, match="a tensor was read"):
        load_scorer(folder)


def test_an_unknown_name_or_dtype_lists_what_is_known(folder):
    for name in ("gpt3", "owner/name", "owner/name@", "/nowhere/at/all@main", "-/-@main"):
        with pytest.raises(ValueError, match="gpt2, gpt2-medium, gpt2-large, gpt2-xl"):
            load_scorer(name)
    with pytest.raises(ValueError, match="unknown dtype 'float16'; known: float32, bfloat16"):
        load_scorer(folder, dtype="float16")


def test_short_names_are_pinned_to_a_commit():
    for short, pinned in SCORERS.items():
        assert re.fullmatch(rf"openai-community/{short}@[0-9a-f]{{40}}", pinned)
    assert len(set(SCORERS.values())) == len(SCORERS)


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """Hugging Face's cache in an empty folder, and no network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def put_in_cache(cache, owner_and_name, commit, folder):
    place = cache / f"models--{owner_and_name.replace('/', '--')}"
    shutil.copytree(folder, place / "snapshots" / commit)
    (place / "refs").mkdir()
    (place / "refs/main").write_text(commit)


def test_hub_ids_are_found_in_the_cache_without_a_network(offline, scorer, folder):
    commit = "0123456789abcdef0123456789abcdef01234567"
    put_in_cache(offline, "someone/tiny", commit, folder)
    for revision in (commit, "main"):
        found = load_scorer(f"someone/tiny@{revision}")
        same_parameters(scorer, found)
        assert found.name == f"someone/tiny@{commit}"


def test_a_short_name_is_its_pinned_commit_even_beside_a_folder_of_that_name(
    offline, scorer, folder, tmp_path, monkeypatch
):
    (tmp_path / "gpt2").mkdir()
    monkeypatch.chdir(tmp_path)
    commit = SCORERS["gpt2"].split("@")[1]
    put_in_cache(offline, "openai-community/gpt2", commit, folder)
    found = load_scorer("gpt2")
    assert found.name == SCORERS["gpt2"]
    same_parameters(scorer, found)


@pytest.mark.parametrize("name", ["gpt2-large", "someone/tiny@main"])
def test_what_the_hub_does_not_give_is_said_in_one_line(offline, name):
    with pytest.raises(
        ValueError, match="cannot get .* from the hub: .* give their folder"
    ) as refused:
        load_scorer(name)
    assert "\n" not in str(refused.value)
    assert SCORERS.get(name, name) in str(refused.value)


# hidden size, heads, blocks, vocabulary, tokens in a row. "small" and "large" are GPT-2's widths
# and heads; with all their blocks and tokens they take minutes and gigabytes.
LAYOUTS = [
    pytest.param(32, 4, 2, 97, 12, id="tiny"),
    pytest.param(768, 12, 2, 1000, 32, id="small, two blocks"),
    pytest.param(1280, 20, 2, 1000, 32, id="large, two blocks"),
    pytest.param(768, 12, 12, 50257, 64, id="small", marks=pytest.mark.long),
    pytest.param(1280, 20, 36, 50257, 64, id="large", marks=pytest.mark.long),
]


@pytest.mark.parametrize("size, heads, blocks, vocab_size, length", LAYOUTS)
def test_a_model_saved_by_transformers_scores_as_it_does_there(
    tmp_path, size, heads, blocks, vocab_size, length
):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.GPT2Config(
        vocab_size=vocab_size,
        n_positions=64,
        n_embd=size,
        n_layer=blocks,
        n_head=heads,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        # So that every part matters: biases away from zero, the weights of norms around one, and
        # the embedding wide enough to tell tokens apart.
        for parameter in theirs.parameters():
            parameter.add_((0.3 if parameter.ndim == 1 else 0.03) * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "model")
    tokens = draw_tokens(2, vocab_size, length)
    with torch.no_grad():
        out = theirs(torch.from_numpy(tokens).long(), output_hidden_states=True)
        log_p = torch.log_softmax(out.logits[:, :-1], dim=-1)
        targets = torch.from_numpy(tokens[:, 1:]).long()[..., None]
        nats = -log_p.gather(-1, targets)[..., 0].numpy()
    logits, hidden = out.logits.numpy(), out.hidden_states[-1].numpy()
    del theirs, out, log_p

    scorer = load_scorer(tmp_path / "model")
    ours = jax.jit(scorer.network.apply)({"params": scorer.params}, tokens)
    our_logits = np.asarray(ours) @ np.asarray(scorer.params["embedding"]).T
    errors = {
        "hidden": np.abs(ours - hidden).max(),
        "logits": np.abs(our_logits - logits).max(),
        "nats": np.abs(scorer.nats(tokens) - nats).max(),
        "features": np.abs(scorer.features(tokens) - hidden[:, -1]).max(),
    }
    print({name: float(error) for name, error in errors.items()}, float(np.abs(logits).max()))
    assert nats.std() > 0.1 and np.abs(hidden).max() > 1
    assert max(errors.values()) < 1e-4, errors
