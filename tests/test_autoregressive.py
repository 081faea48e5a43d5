"""The autoregressive rival: its likelihood, its cache and its sampler, by definition."""

import dataclasses
import functools
import itertools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import command_line, over_eight_devices, says
from scipy.stats import chisquare

from sedd_jax.cli import eval_command, sample_command, train_command
from sedd_jax.data.tokenizers import Ids
from sedd_jax.diffusion import autoregressive
from sedd_jax.diffusion.draws import categorical, make_key
from sedd_jax.diffusion.graphs import Absorbing
from sedd_jax.diffusion.objectives import Autoregressive, Dwdse
from sedd_jax.diffusion.reverse import shaped
from sedd_jax.diffusion.schedules import LogLinear
from sedd_jax.evaluation import generations
from sedd_jax.evaluation.scorer import load_scorer
from sedd_jax.inference import autoregressive as sampling
from sedd_jax.inference.model import SEDD
from sedd_jax.inference.pretrained import load
from sedd_jax.models.head import make_score_fn
from sedd_jax.models.transformer import Transformer

VOCAB, LENGTH = 7, 5


@functools.cache
def a_model(vocab_size=VOCAB, length=LENGTH, spread=0.2, **changes):
    """A tiny model whose every parameter acts."""
    graph = Absorbing(vocab_size)
    sizes = {"hidden_size": 16, "blocks": 2, "heads": 2, "cond_dim": 8, "dropout": 0.1}
    causal = {"is_causal": True, "time_conditioning": False}
    network = Transformer(dim=graph.dim, **sizes, **causal, **changes)

    @jax.jit
    def start(key):
        tokens, sigma = jnp.zeros((1, length), jnp.int32), jnp.zeros((1, 1))
        params = network.init(key, tokens, sigma, deterministic=True)["params"]
        leaves, tree = jax.tree.flatten(params)
        keys = jax.random.split(key, len(leaves))
        moved = [p + spread * jax.random.normal(key, p.shape) for p, key in zip(leaves, keys)]
        return jax.tree.unflatten(tree, moved)

    params = start(make_key(1))
    parts = network, params, graph, LogLinear(), Ids(vocab_size), length
    return SEDD(*parts, objective=Autoregressive())


@functools.cache
def texts(count=4, length=LENGTH):
    return jax.random.randint(make_key(2), (count, length), 0, VOCAB)


@functools.partial(jax.jit, static_argnames=("network", "graph"))
def _log_p(params, x0, is_token, *, network, graph):
    score_fn = make_score_fn(network, params, graph, is_token=is_token)
    return -autoregressive.token_nats(score_fn, x0, graph.mask)


def log_p(model, x0, is_token=None):
    """log p(x_l | those before), float32 [B, L], by the package."""
    return _log_p(model.params, x0, is_token, network=model.network, graph=model.graph)


@functools.partial(jax.jit, static_argnames=("network", "vocab_size"))
def _next_log_probs(params, seen, *, network, vocab_size):
    sigma = jnp.zeros((len(seen), 1))
    out = network.apply({"params": params}, seen, sigma, deterministic=True)
    logits = jnp.einsum("bc,vc->bv", out.hidden[:, -1], out.weight, precision="highest")
    return jax.nn.log_softmax((logits + out.bias)[:, :vocab_size])


def next_log_probs(model, before):
    """log p(. | before [B, l]) by a call with this prefix alone, float32 [B, V]."""
    seen = jnp.pad(before, ((0, 0), (1, 0)), constant_values=model.graph.mask)
    sizes = {"network": model.network, "vocab_size": model.graph.vocab_size}
    return _next_log_probs(model.params, seen, **sizes)


# --- the likelihood


def test_the_likelihood_is_the_product_of_the_conditionals_of_one_prefix_after_the_other():
    model, x0 = a_model(), texts()
    each = [next_log_probs(model, x0[:, :l])[jnp.arange(4), x0[:, l]] for l in range(LENGTH)]
    np.testing.assert_allclose(log_p(model, x0), jnp.stack(each, axis=1), atol=2e-6)

    @jax.jit
    def loss_and_bound(params):
        score_fn = make_score_fn(model.network, params, model.graph)
        parts = autoregressive.loss, autoregressive.exact
        return [part(x0, score_fn, model.graph.mask) for part in parts]

    loss, bound = loss_and_bound(model.params)
    np.testing.assert_allclose(bound.total, -sum(each), rtol=1e-6)
    assert not bound.standard_error.any()
    np.testing.assert_array_equal(loss.nats, bound.total)


def test_the_likelihoods_of_all_texts_sum_to_one():
    model = a_model(vocab_size=3, length=3)
    everything = jnp.array(list(itertools.product(range(3), repeat=3)))
    p = np.exp(np.float64(log_p(model, everything)).sum(axis=1))
    assert p.sum() == pytest.approx(1.0, abs=1e-5)
    assert p.std() > 0.3 * p.mean()


def test_a_text_given_another_has_the_quotient_of_their_likelihoods():
    model = a_model()
    found = model.log_likelihood(["3 0", "5"], given="1 2").total
    whole = model.log_likelihood(["1 2 3 0", "1 2 5"]).total
    np.testing.assert_allclose(found, whole - model.log_likelihood("1 2").total, rtol=1e-5)


def test_no_probability_depends_on_the_token_itself_or_on_later_ones():
    model, x0 = a_model(), texts()
    for l in range(LENGTH):
        other = x0.at[:, l].set((x0[:, l] + 1) % VOCAB)
        is_changed = np.array(log_p(model, other) != log_p(model, x0)).any(axis=0)
        assert not is_changed[:l].any()
        assert is_changed[l:].all()


def test_gradients_reach_all_earlier_positions_and_none_later():
    model, x0 = a_model(), jnp.arange(LENGTH)[None]  # each position has a token of its own

    @jax.jit
    @jax.jacrev
    def slopes(embedding):
        params = model.params | {"embedding": embedding}
        score_fn = make_score_fn(model.network, params, model.graph)
        return autoregressive.token_nats(score_fn, x0, model.graph.mask)[0]

    reached = (slopes(model.params["embedding"]) != 0.0).any(axis=-1)  # [L, D]
    for l in range(LENGTH):
        assert np.flatnonzero(reached[l]).tolist() == [*range(l), VOCAB]  # MASK begins a text


def test_padding_changes_no_loss_and_gets_none():
    model, x0 = a_model(), texts()
    lengths = jnp.array([5, 4, 1, 3])
    is_token = jnp.arange(LENGTH) < lengths[:, None]

    def nats(x0, is_token):
        score_fn = make_score_fn(model.network, model.params, model.graph, is_token=is_token)
        return autoregressive.loss(x0, score_fn, model.graph.mask, is_token=is_token).nats

    nats = jax.jit(nats)
    padded = nats(x0, is_token)
    np.testing.assert_allclose(padded, nats(jnp.where(is_token, x0, 3), is_token), rtol=1e-6)
    for row, n in enumerate(lengths.tolist()):
        alone = -sum(next_log_probs(model, x0[:, :l])[row, x0[row, l]] for l in range(n))
        assert float(padded[row]) == pytest.approx(float(alone), rel=1e-5)


def test_an_untimed_network_does_not_see_the_noise_level():
    model, x0 = a_model(), texts()
    out = [
        model.network.apply(
            {"params": model.params}, x0, sigma * jnp.ones((4, 1)), deterministic=True
        )
        for sigma in (0.0, 3.0)
    ]
    np.testing.assert_array_equal(out[0].hidden, out[1].hidden)


# --- the cache


@pytest.mark.parametrize("is_unrolled", [False, True])
def test_distributions_by_the_cache_are_those_of_the_whole_row(is_unrolled, monkeypatch):
    monkeypatch.setattr(Transformer, "is_unrolled", is_unrolled)
    model, x0 = a_model(), texts()
    variables, zeros = {"params": model.params}, jnp.zeros((4, 1))
    seen = autoregressive.shifted(x0, model.graph.mask)

    @functools.partial(jax.jit, static_argnames="mutable")
    def call(variables, tokens, mutable=("cache",), **how):
        run = functools.partial(model.network.apply, deterministic=True, mutable=mutable)
        return run(variables, tokens, zeros, **how)

    whole, _ = call(variables, seen, mutable=())
    for prefix in (0, 1, 4):
        # What comes after the prefix must not matter.
        filled, cache = call(variables, jnp.where(jnp.arange(LENGTH) < prefix, seen, 6))
        np.testing.assert_allclose(filled.hidden[:, :prefix], whole.hidden[:, :prefix], atol=1e-5)
        for l in range(prefix, LENGTH):
            one, cache = call(variables | cache, seen[:, l : l + 1], position=jnp.int32(l))
            np.testing.assert_allclose(one.hidden[:, 0], whole.hidden[:, l], atol=1e-5)


# --- the sampler


def by_whole_rows(model, seed, count, length, known=None, shape=None):
    """Samples without a cache, each position by a call with what is before it."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(make_key(seed), jnp.arange(count))
    tokens = np.zeros((count, 0), np.int32)
    for l in range(length):
        log_weights = next_log_probs(model, tokens)
        if shape is not None:
            log_weights = jax.vmap(shape)(log_weights)
        # The head keys a draw by its position in the rows that it sees: 0, of one.
        at = jax.vmap(lambda key, l=l: jax.random.fold_in(jax.random.fold_in(key, l), 0))(keys)
        drawn = np.array(jax.vmap(categorical)(at, log_weights))
        if known is not None:
            drawn = np.where(known[1][:, l], known[0][:, l], drawn)
        tokens = np.concatenate([tokens, drawn[:, None]], axis=1)
    return tokens


def prefixes(tokens, lengths):
    """(tokens, is_known) with so many tokens of each row known."""
    return np.asarray(tokens), np.arange(np.shape(tokens)[1]) < np.reshape(lengths, (-1, 1))


def test_samples_by_the_cache_are_those_of_whole_rows_with_the_same_noise():
    model = a_model()
    np.testing.assert_array_equal(
        model.sample_tokens(4, seed=3), by_whole_rows(model, 3, 4, LENGTH)
    )
    known = prefixes(texts(), [0, 1, 4, 5])
    drawn = model.sample_tokens(4, known=known, seed=3)
    np.testing.assert_array_equal(drawn, by_whole_rows(model, 3, 4, LENGTH, known))
    np.testing.assert_array_equal(drawn[known[1]], known[0][known[1]])


def test_samples_of_a_shaped_distribution_are_those_of_whole_rows():
    model = a_model()
    for options in ({"temperature": 0.5}, {"top_p": 0.6}, {"top_k": 2}):
        expected = by_whole_rows(model, 3, 4, LENGTH, shape=shaped(**options))
        np.testing.assert_array_equal(model.sample_tokens(4, seed=3, **options), expected)
    greedy = model.sample_tokens(4, seed=3, greedy=True)
    for l in range(LENGTH):
        np.testing.assert_array_equal(
            greedy[:, l], next_log_probs(model, greedy[:, :l]).argmax(axis=-1)
        )


def test_the_distribution_of_samples_is_the_models():
    model = a_model(vocab_size=3, length=3)
    everything = np.array(list(itertools.product(range(3), repeat=3)))
    p = np.exp(np.float64(log_p(model, everything)).sum(axis=1))
    draws = 40_000
    drawn = model.sample_tokens(draws, batch_size=8192, seed=5)
    counts = np.bincount(drawn @ [9, 3, 1], minlength=27)
    assert chisquare(counts, draws * p / p.sum()).pvalue > 1e-3
    # The test can fail: the distribution of another temperature is told apart.
    other = np.bincount(
        model.sample_tokens(draws, batch_size=8192, seed=5, temperature=0.9) @ [9, 3, 1],
        minlength=27,
    )
    assert chisquare(other, draws * p / p.sum()).pvalue < 1e-6


def test_a_sample_depends_on_its_number_alone():
    model = a_model()
    whole = model.sample_tokens(5, seed=7)
    np.testing.assert_array_equal(model.sample_tokens(5, seed=7, batch_size=2), whole)
    np.testing.assert_array_equal(model.sample_tokens(1, seed=7), whole[:1])
    assert (model.sample_tokens(5, seed=8) != whole).any()
    # A longer text begins with the shorter one.
    np.testing.assert_array_equal(model.sample_tokens(5, seed=7, length=4), whole[:, :4])


def test_the_states_on_the_way_end_with_the_sample_and_count_the_calls():
    model, known = a_model(), prefixes(texts(3), [0, 2, 4])
    states = list(model.stream(num_samples=3, known=known, updates=3, seed=1))
    assert [state.step for state in states] == [0, 2, 4, 5]
    assert {state.steps for state in states} == {LENGTH}
    assert [state.calls.tolist() for state in states] == [
        [0, 0, 0],
        [2, 0, 0],
        [4, 2, 0],
        [5, 3, 1],
    ]
    for state in states:
        is_there = known[1] | (np.arange(LENGTH) < state.step)
        np.testing.assert_array_equal(state.is_masked, ~is_there)
    final = model.sample_tokens(3, known=known, seed=1)
    np.testing.assert_array_equal(states[-1].tokens, final)


def test_other_numbers_prompts_and_seeds_compile_nothing_again():
    model = a_model()
    model.sample_tokens(4, temperature=0.7, top_p=0.9, known=prefixes(texts(), [1, 2, 0, 1]))
    before = sampling.write._cache_size(), sampling.prefill._cache_size()
    model.sample_tokens(
        4, temperature=0.3, top_p=0.5, known=prefixes(texts(), [3, 2, 2, 4]), seed=9, length=None
    )
    model.sample_tokens(4, temperature=2.0, top_p=1.0)
    assert (sampling.write._cache_size(), sampling.prefill._cache_size()) == before


def test_what_an_autoregressive_model_cannot_do_is_refused_and_says_what_can():
    model = a_model()
    for options in ({"steps": 8}, {"predictor": "euler"}, {"grid": "cosine"}, {"t_min": 1e-3}):
        (name, value) = *options, *options.values()
        with says(name, repr(value), "left to right", "leave it at", "absorbing or uniform"):
            model.sample_tokens(**options)
    with says("normalised", "absorbing or uniform"):
        model.sample_tokens(normalised=True)
    with says("position 3 after a free one", "prefix", "absorbing or uniform model to infill"):
        model.infill(positions=[0, 3], tokens=[1, 2])
    with says("cannot revise", "absorbing or uniform"):
        model.revise("1 2 3")
    with says("predictor 'left_to_right'", "take tweedie"):
        diffusion = dataclasses.replace(model, objective=Dwdse())
        diffusion.sample_tokens(predictor="left_to_right")
    # What it says of itself may be said to it.
    model.sample_tokens(**dataclasses.asdict(model.chosen(temperature=0.5)))


def test_a_prompt_is_completed():
    model = a_model()
    (text,) = model.infill("1 2 3[MASK:2]", seed=4)
    assert text.startswith("1 2 3 ") and len(text.split()) == 5


def test_scores_that_are_not_finite_are_an_error():
    model = a_model()
    params = model.params | {"head_bias": model.params["head_bias"].at[2].set(jnp.nan)}
    with pytest.raises(ValueError, match="not finite by step"):
        model.with_params(params).sample_tokens(2)


@pytest.mark.devices(8)
def test_a_mesh_draws_and_scores_as_one_device():
    model = a_model()
    spread = over_eight_devices(model)
    how = {"known": prefixes(texts(), [0, 1, 4, 5]), "seed": 3}
    expected = model.sample_tokens(4, **how)
    np.testing.assert_array_equal(spread.sample_tokens(4, **how), expected)
    np.testing.assert_allclose(spread.bound(expected).bound, model.bound(expected).bound, rtol=1e-5)


@pytest.mark.long
def test_bfloat16_draws_and_scores():
    model = a_model(dtype=jnp.bfloat16)
    tokens = model.sample_tokens(4, known=prefixes(texts(), 2))
    assert ((tokens >= 0) & (tokens < VOCAB)).all()
    exact = a_model().bound(tokens).bound
    assert model.bound(tokens).bound == pytest.approx(exact, rel=0.02)


# --- the commands


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A tiny run that has sampled while it was trained."""
    workdir = tmp_path_factory.mktemp("runs") / "ar"
    named = {"objective.name": "autoregressive", "sample.every": 8, "sample.count": 2}
    assert train_command(command_line(workdir, **named)) == 0
    return workdir


def test_training_samples_and_the_evaluation_says_that_it_is_exact(run, capsys):
    assert (run / "samples" / "8.txt").read_text().strip()
    assert eval_command(["likelihood", f"--workdir={run}", "--blocks=4"]) == 0
    table = capsys.readouterr().out
    assert "autoregressive, exact likelihood" in table
    assert "noise levels" not in table and "tail" not in table
    assert not re.search(r"\d±", table) and " ±" in table  # no error but that over documents


def test_a_command_completes_a_prefix_and_refuses_a_suffix_and_a_draft(run, capsys, tmp_path):
    assert sample_command([f"--workdir={run}", "--prefix=The ", "--format=jsonl"]) == 0
    sample = json.loads(capsys.readouterr().out)
    assert sample["text"].startswith("The ") and len(sample["tokens"]) == 32
    assert sample["nfe"] == 28 and sample["predictor"] == "left_to_right"
    assert sample_command([f"--workdir={run}", "--explain"]) == 0
    assert "at most 32 a sample" in capsys.readouterr().out
    (tmp_path / "draft.txt").write_text("A draft")
    refused = {
        "suffix=end": "prefix",
        f"revise={tmp_path / 'draft.txt'}": "revise",
        "steps=8": "32",
    }
    for flag, word in refused.items():
        assert sample_command([f"--workdir={run}", f"--{flag}"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "left to right" in line and word in line


def test_generative_perplexity_of_its_samples(run, scorer_folder):
    model, scorer = load(run), load_scorer(str(scorer_folder))
    how = {"num_samples": 3, "batch_size": 2, "temperature": 0.8}
    result = generations.generative_perplexity(model, scorer, **how)
    assert result["nfe"] == 32 and result["predictor"] == "left_to_right"
    assert result["samples"] == model.sample(3, batch_size=2, temperature=0.8)
