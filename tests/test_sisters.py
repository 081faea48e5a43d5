"""MDLM, RADD, GIDD and Duo folders: what they are taken for, and the original networks' answers.

golden_sisters/FAMILY.npz holds what the authors' own code gave in PyTorch on a CPU in float32, for
the numbers of sister_models.parameters at its TIMES and noised tokens: the network's class, filled
by load_state_dict(strict=True), and the functions that make log p(x0 | xt) of its output (MDLM's
_subs_parameterization, RADD's own log_softmax, GIDD's softmax without MASK, Duo's
_process_model_output), and Duo's nll_per_token and _posterior_from_x0 (from t to t / 2). Flash
attention and its rotary embedding stood in by scaled_dot_product_attention and its definition.
"""

import json
import logging
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import sister_models
from conftest import says
from original_models import assert_same
from sister_models import CLEAN, TIMES

import sedd_jax
from sedd_jax import convert
from sedd_jax.convert import sisters
from sedd_jax.convert.original_config import put
from sedd_jax.convert.sisters import FAMILIES, OTHERS
from sedd_jax.data.tokenizers import GPT2, Ids
from sedd_jax.models.head import make_score_fn

GOLDEN = Path(__file__).parent / "golden_sisters"
each = pytest.mark.parametrize("family", sister_models.CONFIGS)
absorbing = pytest.mark.parametrize(
    "family, changes",
    [("mdlm", {}), ("mdlm", {"time_conditioning": True}), ("radd", {}), ("gidd", {})],
    ids=["mdlm", "mdlm_conditioned", "radd", "gidd"],
)


def write(folder: Path, family: str, tensors=None, **changes) -> Path:
    """A folder of the family; changes of its config.json."""
    folder.mkdir(exist_ok=True)
    text = json.dumps(sister_models.config_of(family, **changes))
    (folder / "config.json").write_text(text)
    tensors = sister_models.state_dict(family) if tensors is None else tensors
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    return folder


def load(folder: Path, **how) -> sedd_jax.SEDD:
    return sedd_jax.load(folder, tokenizer=f"ids:{CLEAN}", **how)


def golden(family: str) -> dict[str, np.ndarray]:
    return dict(np.load(GOLDEN / f"{family}.npz"))


def scores_of(model, xt, sigma):
    """(the scores of xt at sigma [B, 1], their table float32 [B, L, D])."""
    score_fn = make_score_fn(model.network, model.params, model.graph)
    with jax.default_matmul_precision("highest"):
        scores = score_fn(jnp.asarray(xt, jnp.int32), jnp.asarray(sigma, jnp.float32))
        return scores, np.asarray(scores.log_score())


def sigma_at_times(family: str) -> np.ndarray:
    """The total noise at TIMES by the family's own schedule, float64 [B, 1]."""
    scale = 1.0 if family == "gidd" else 1.0 - 1e-3
    return -np.log1p(-scale * np.array(TIMES))[:, None]


@absorbing
def test_masked_tokens_have_the_originals_probabilities(family, changes, tmp_path):
    model = load(write(tmp_path, family, **changes))
    _, xt = sister_models.noised(family)
    sigma = sigma_at_times(family)
    _, log_score = scores_of(model, xt, sigma)
    log_p = log_score[..., :CLEAN] + np.log(np.expm1(sigma))[..., None]
    expected = golden(family)["conditioned" if changes else "log_p"]
    is_masked = xt == CLEAN
    assert is_masked.sum() > 15
    np.testing.assert_allclose(log_p[is_masked], expected[is_masked], rtol=0, atol=2e-5)


def test_uniform_noise_has_duos_scores_steps_and_bound(tmp_path):
    model, answers = load(write(tmp_path, "duo")), golden("duo")
    x0, xt = sister_models.noised("duo")
    sigma = sigma_at_times("duo")
    scores, log_score = scores_of(model, xt, sigma)

    alpha = np.exp(-sigma)[..., None]
    noised = np.log(alpha * np.exp(answers["log_p"].astype(np.float64)) + (1.0 - alpha) / CLEAN)
    at_xt = np.take_along_axis(noised, xt[..., None], axis=-1)
    np.testing.assert_allclose(log_score, noised - at_xt, rtol=0, atol=2e-5)

    t = jnp.array(TIMES)[:, None]
    sigma_t, sigma_s = model.schedule.sigma(t), model.schedule.sigma(t / 2)
    np.testing.assert_allclose(sigma_t, sigma, rtol=1e-6)
    step = model.graph.tweedie(scores, jnp.asarray(xt), sigma_t - sigma_s)
    np.testing.assert_allclose(step.probabilities(), answers["posterior"], rtol=0, atol=2e-6)

    noised = t, jnp.asarray(xt), jnp.asarray(x0), lambda xt, sigma: scores
    entropy = model.graph.score_entropy(scores, sigma_t, *noised[1:3])
    nats = model.schedule.dsigma_dt(t) * entropy.value
    np.testing.assert_allclose(nats, answers["nll"], rtol=2e-4, atol=1e-4)
    loss = model.objective.loss_at(*noised, model.graph, model.schedule)
    np.testing.assert_allclose(loss.nats, answers["nll"].sum(axis=-1), rtol=1e-4)


# What is taken for what


@each
def test_one_line_says_what_a_folder_is_taken_for_and_all_of_the_model_works(
    family, tmp_path, caplog
):
    with caplog.at_level(logging.INFO, logger="sedd_jax"):
        model = load(write(tmp_path / "model", family))
    (line,) = caplog.messages
    file, title = tmp_path / "model/config.json", FAMILIES[family].title
    assert line.startswith(f"{file} is taken for {title}: ")
    noise, tokens = ("uniform", "11 tokens;") if family == "duo" else ("absorbing", "11 tokens and")
    sees = {"gidd": "sees the masked share", "duo": "sees the total noise"}
    for part in (f"{noise} noise", tokens, sees.get(family, "sees no noise level")):
        assert part in line

    assert model.length == sister_models.LENGTH and model.graph.predicts_clean
    assert 10.0 < model.log_likelihood("1 2 3 4 5 6 7 8 9 10", passes=8).total[0] < 100.0
    words = model.infill("3 [MASK:4] 10", steps=4, seed=0)[0].split()
    assert (words[0], words[-1], len(words)) == ("3", "10", 6)
    assert "░" not in model.sample(1, steps=4, seed=0)[0]


def test_a_networks_small_details_are_in_its_config(tmp_path):
    configs = {
        family: convert.read_folder(write(tmp_path / family, family)).config
        for family in sister_models.CONFIGS
    }
    assert {f: c.model.noise_input for f, c in configs.items() if c.model.time_conditioning} == {
        "gidd": "share",
        "duo": "sigma",
    }
    assert {c.objective.name for c in configs.values()} == {"normalised"}
    ends = {family: (c.schedule.eps, c.objective.t_min) for family, c in configs.items()}
    assert ends.pop("gidd") == (1e-4, 1e-4) and set(ends.values()) == {(1e-3, 1e-3)}


GPT2_SIZES = {"small": (768, 12, 12), "medium": (1024, 24, 16)}
PUBLISHED = {  # millions of parameters, by the authors' READMEs and the hub's pages
    ("mdlm", "small", 50258): 169.6,
    ("radd", "small", 50257): 162,
    ("radd", "medium", 50257): 405,
    ("gidd", "small", 50258): 169.6,
    ("gidd", "medium", 50258): 424.5,
    ("duo", "small", 50258): 169.6,
}


@pytest.mark.parametrize("family, size, tokens", PUBLISHED)
def test_published_sizes_have_the_published_number_of_parameters(family, size, tokens, tmp_path):
    hidden_size, blocks, heads = GPT2_SIZES[size]
    names = FAMILIES[family].fields
    theirs = sister_models.config_of(family)
    sizes = {"model.hidden_size": hidden_size, "model.n_blocks": blocks, "model.n_heads": heads}
    sizes |= {"model.cond_dim": 128, "tokens": tokens}
    for field, value in sizes.items():
        put(theirs, names[field], value)
    (tmp_path / "config.json").write_text(json.dumps(theirs))
    name, _, (config, vocab_size, _) = sisters.open_config(tmp_path / "config.json")
    expected = FAMILIES[name].expected_tensors(config, vocab_size)
    millions = sum(math.prod(shape) for shape in expected.values()) / 1e6
    published = PUBLISHED[family, size, tokens]
    assert round(millions, 1 if published % 1 else 0) == published


def test_names_and_shapes_are_those_written_out_here(tmp_path):
    for family in sister_models.CONFIGS:
        model = convert.open_folder(write(tmp_path / family, family))
        sizes = model.config, model.vocab_size
        assert FAMILIES[family].expected_tensors(*sizes) == sister_models.shapes(family)


# What is refused, in one line


def without(family, name):
    tensors = sister_models.state_dict(family)
    del tensors[sister_models.PREFIX[family] + name]
    return tensors


@each
def test_a_missing_tensor_one_too_many_and_a_wrong_shape_are_each_one_line(family, tmp_path):
    prefix, title = sister_models.PREFIX[family], FAMILIES[family].title
    rule = f"weights and config must be of one {title}"
    name = "blocks.1.norm2.bias" if family == "radd" else "blocks.1.adaLN_modulation.weight"
    write(tmp_path, family, without(family, name))
    with says(f"lacks {name}; {rule}"):
        convert.read_folder(tmp_path)
    whole = sister_models.state_dict(family)
    write(tmp_path, family, {**whole, f"{prefix}blocks.0.attn_qkv.bias": np.zeros(48, np.float32)})
    with says(f"has a tensor too many: blocks.0.attn_qkv.bias; {rule}"):
        convert.read_folder(tmp_path)
    head = f"{prefix}output_layer.linear.weight"
    write(tmp_path, family, {**whole, head: np.zeros((15, 16), np.float32)})
    with says("output_layer.linear.weight in", "has shape [15, 16], not [1", "16]", rule):
        convert.read_folder(tmp_path)


@pytest.mark.parametrize(
    "family, changes, words",
    [
        ("gidd", {"p_uniform": 0.1}, ["p_uniform 0.1 of GIDD in", "two rates", "p_uniform 0"]),
        ("gidd", {"p_uniform": None}, ["model_type 'dit'", "known: mdlm, duo, dit"]),
        ("gidd", {"t_eps": 2}, ["schedule.eps 2", "inside (0, 1)"]),
        ("duo", {"causal": True}, ["causal True of Duo in", "no diffusion model"]),
        ("mdlm", {"vocab_size": 30522}, ["vocab_size 30522 of MDLM", "BERT", "GPT-2"]),
        ("mdlm", {"hidden_dim": None}, ["hidden_dim of MDLM is missing in", "get it again"]),
        ("mdlm", {"n_heads": 3}, ["hidden_dim 16 in", "not divisible by n_heads 3; get it again"]),
        ("mdlm", {"n_blocks": 10**9}, ["n_blocks 1000000000 in", "a whole number"]),
        ("mdlm", {"vocab_size": "many"}, ["vocab_size 'many' in", "a whole number"]),
        ("mdlm", {"model_type": "llada"}, ["model_type 'llada' in", "known: mdlm, duo, dit"]),
        ("mdlm", {"model_type": ["mdlm"]}, ["model_type ['mdlm'] in", "known: mdlm, duo"]),
        ("radd", {"noise": {"type": "geometric"}}, ["noise.type 'geometric' of RADD", "loglinear"]),
        ("radd", {"noise": []}, ["noise.type None of RADD", "loglinear"]),
        *(("mdlm", {"model_type": kind}, [f"'{kind}' in", OTHERS[kind]]) for kind in OTHERS),
    ],
)
def test_a_model_that_is_not_read_is_refused_with_the_reason(family, changes, words, tmp_path):
    with says(*words):
        convert.open_folder(write(tmp_path, family, **changes))


@pytest.mark.parametrize("family", ["mdlm", "gidd"])
def test_a_rotary_embedding_of_another_base_is_refused(family, tmp_path):
    tensors = sister_models.state_dict(family)
    prefix = sister_models.PREFIX[family]
    if family == "gidd":  # twice the speed
        for name in ("cos", "sin"):
            table = tensors[f"rotary_emb.{name}_cached"]
            tensors[f"rotary_emb.{name}_cached"] = np.repeat(table[:, ::2], 2, axis=1)
        tensors["rotary_emb.cos_cached"][:, 1] = tensors["rotary_emb.cos_cached"][:, 2]
        tensors["rotary_emb.sin_cached"][:, 1] = tensors["rotary_emb.sin_cached"][:, 2]
    else:
        tensors[f"{prefix}rotary_emb.inv_freq"] = np.array([1.0, 0.1, 0.03, 0.01], np.float32)
    with says("has rotary_emb.inv_freq of another base than 10000"):
        convert.read_folder(write(tmp_path, family, tensors))


def test_tables_of_a_rotary_embedding_must_be_tables(tmp_path):
    tensors = sister_models.state_dict("gidd")
    tensors["rotary_emb.cos_cached"] = np.zeros((2, 3), np.float32)
    with says("rotary_emb.cos_cached in", "has shape [2, 3], which is no table"):
        convert.read_folder(write(tmp_path, "gidd", tensors))


# Other ways in and out


def assert_same_model(one: sedd_jax.SEDD, other: sedd_jax.SEDD) -> None:
    assert_same(one.params, other.params)
    for key in ("model", "graph", "schedule", "objective"):
        assert one.experiment[key] == other.experiment[key]
    assert (one.graph, one.length) == (other.graph, other.length)


@each
def test_a_converted_folder_is_the_same_model(family, tmp_path):
    source = write(tmp_path / "theirs", family)
    done = convert.convert(source, tmp_path / "ours", tokenizer=Ids(CLEAN))
    assert (done.read, done.wrote) == (f"{FAMILIES[family].title} folder", "hub folder")
    assert any("is taken for" in notice for notice in done.notices)
    assert_same_model(load(source), sedd_jax.load(tmp_path / "ours"))
    with says("of which no run of the original is made"):
        convert.convert(source, tmp_path / "run", form="original")


def test_training_goes_on_from_a_sisters_weights(tmp_path):
    source = write(tmp_path / "theirs", "gidd")
    convert.convert(source, tmp_path / "run", form="workdir", tokenizer=Ids(CLEAN))
    assert_same_model(load(source), sedd_jax.load(tmp_path / "run"))


def test_weights_that_torch_has_pickled_are_read(tmp_path):
    torch = pytest.importorskip("torch")
    source = write(tmp_path, "radd")
    params = convert.read_folder(source).params
    (source / "model.safetensors").unlink()
    tensors = sister_models.state_dict("radd").items()
    torch.save({n: torch.from_numpy(a) for n, a in tensors}, source / "pytorch_model.bin")
    assert_same(convert.read_folder(source).params, params)


def test_a_hub_id_is_loaded_by_its_name(server, tmp_path):
    folder = write(tmp_path, "mdlm")
    server.add("group/mdlm", {file.name: file.read_bytes() for file in folder.iterdir()})
    model = sedd_jax.load("group/mdlm", tokenizer=f"ids:{CLEAN}")
    assert_same_model(model, load(folder))


@pytest.mark.parametrize("family", ["duo", "gidd"])
def test_a_vocabulary_may_have_padding_after_the_tokenizers_own(family, tmp_path):
    vocab = ("<|endoftext|>", *"abcdefghi")
    assert len(vocab) == CLEAN - 1
    tokenizer = GPT2.from_vocabulary(vocab)
    with pytest.raises(ValueError, match="has 10 tokens, the model in .* 11"):
        sedd_jax.load(write(tmp_path / "mdlm", "mdlm"), tokenizer=tokenizer)
    model = sedd_jax.load(write(tmp_path / "padded", family), tokenizer=tokenizer)
    assert model.tokenizer.vocab_size == CLEAN and model.tokenizer.special == (0, CLEAN - 1)
    assert model.tokenizer.encode("abca").tolist() == [1, 2, 3, 1]
    assert model.tokenizer.decode([1, CLEAN - 1, 2]) == "a[PAD]b"
    assert convert.fitted(Ids(CLEAN), convert.open_folder(tmp_path / "padded")) == Ids(CLEAN)
