"""The model as one object: compiled once a bucket, honest about what it is given."""

import collections
import dataclasses
import itertools

import dense
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import says

import sedd_jax
from sedd_jax.data import Blocks
from sedd_jax.diffusion import predictors, samplers
from sedd_jax.inference import bounds, sampling


@pytest.fixture(scope="module")
def model(tiny_run):
    return sedd_jax.load(tiny_run)


@pytest.fixture(scope="session")
def compiled():
    """Counts what XLA compiles, by the name of the jitted function."""
    found = collections.Counter()

    def listen(event, seconds, **about):
        if event == "/jax/core/compile/backend_compile_duration":
            found[about.get("fun_name", "?")] += 1

    # For the whole session: jax 0.7.2 cannot take a listener away again.
    jax.monitoring.register_event_duration_secs_listener(listen)
    return found


def test_twenty_mixed_calls_compile_once_a_bucket(tiny_run, compiled, capsys):
    model = sedd_jax.load(tiny_run)  # 32 tokens long, so that its lengths are in two buckets
    given = {"positions": [3, 0], "tokens": [1, 2]}

    def mixed(i):
        model.sample(1, length=3 + i, steps=1 + i, seed=i)  # 1 x 16
        model.sample(3 + i % 2, length=20 + i, steps=2, seed=i)  # 4 x 32
        model.infill("if [MASK:14] then" + "x" * i, 1, steps=2 + i, seed=i)  # 1 x 32
        model.infill(num_samples=2, **given, length=9 + i, steps=3)  # 2 x 16
        model.log_likelihood(
            ["some text" + "!" * i, "longer text " * 2 + "?" * i], seed=i
        )  # 1 x both

    jax.random.key(0)
    for jitted in (sampling.reverse_steps, bounds._block_bounds):
        jitted.clear_cache()  # equal networks share it, whichever test loaded them
    compiled.clear()
    mixed(0)
    first = dict(compiled)
    for i in range(1, 4):
        mixed(i)
    with capsys.disabled():
        print(f"\n20 mixed calls compiled {dict(compiled)}")
    assert first and compiled == first
    assert sampling.reverse_steps._cache_size() == 4
    assert bounds._block_bounds._cache_size() == 2


def test_a_sample_is_the_same_alone_and_among_others(model):
    many = model.sample_tokens(5, steps=6, seed=3, batch_size=2)
    np.testing.assert_array_equal(many, model.sample_tokens(5, steps=6, seed=3, batch_size=8))
    np.testing.assert_array_equal(many[:1], model.sample_tokens(1, steps=6, seed=3))
    assert len(np.unique(many, axis=0)) == 5
    assert not np.array_equal(many, model.sample_tokens(5, steps=6, seed=4))


def test_padding_of_a_bucket_changes_nothing(model):
    """13 tokens in a bucket of 16: the bound, the scores and the law of the samples are theirs."""
    prompt = (np.arange(13) % 7, np.arange(13) % 3 == 0)
    padded = model.log_likelihood(["if a text is"], seed=1, passes=64)
    scores = model.score_fn
    sample = model.sample_tokens(4, known=prompt, steps=4)
    assert sample.shape == (4, 13)
    np.testing.assert_array_equal(sample[:, prompt[1]], np.tile(prompt[0][prompt[1]], (4, 1)))
    ids = model.tokenizer.encode("if a text is")
    exact = model.bound(ids[None], passes=64, seed=1)
    error = np.hypot(padded.standard_error[0], exact.bound_standard_error)
    assert abs(padded.total[0] - exact.bound) < 3 * error
    # At the last step everything is drawn from the law of the scores, so a single token's share is
    # that of the scores without padding, given the same neighbours.
    many = model.sample_tokens(4096, length=1, steps=1, predictor="none", batch_size=4096)
    sigma = model.schedule.sigma(np.full((1, 1), 1e-5, np.float32))
    mask = np.full((1, 1), model.graph.vocab_size, np.int32)
    law = np.exp(scores(mask, sigma).log_score()[0, 0, :-1], dtype=np.float64)
    counts = np.bincount(many[:, 0], minlength=len(law))
    assert dense.p_value(counts, law) > dense.P_VALUE
    # The network sees no padding at all: the scores of the tokens are those without it.
    wide = np.full((1, 16), 5, np.int32)
    wide[0, : len(ids)] = ids
    is_token = np.arange(16)[None] < len(ids)
    from sedd_jax.models.head import make_score_fn

    masked = make_score_fn(model.network, model.params, model.graph, is_token=is_token)
    sigma = np.ones((1, 1), np.float32)
    np.testing.assert_allclose(
        masked(wide, sigma).log_score()[:, : len(ids)],
        scores(ids[None], sigma).log_score(),
        atol=2e-5,
    )


def test_the_weights_are_the_moving_average_of_the_newest_checkpoint(model, tiny_run):
    import orbax.checkpoint as ocp

    assert model.step == 8
    saved = ocp.StandardCheckpointer().restore((tiny_run / "checkpoints/8/ema").absolute())
    for ours, theirs in zip(jax.tree.leaves(model.params), jax.tree.leaves(saved)):
        np.testing.assert_array_equal(ours, theirs)


def test_a_stream_shows_one_sequence_being_denoised_and_ends_with_the_sample(model):
    states = list(model.stream(num_samples=2, steps=16, seed=3, updates=4))
    assert [state.step for state in states] == [0, 4, 8, 12, 16]
    masked = np.array([state.is_masked.sum() for state in states])
    assert masked[0] == 2 * model.length and masked[-1] == 0
    assert all(np.diff(masked) <= 0) and 0 < masked[-2] < masked[0]
    for before, after in itertools.pairwise(states):
        kept = ~before.is_masked  # an absorbing token once revealed stays
        np.testing.assert_array_equal(before.tokens[kept], after.tokens[kept])
    drawn = model.sample_tokens(2, steps=16, seed=3)
    np.testing.assert_array_equal(states[-1].tokens, drawn)
    assert states[-1].texts == model.decode(drawn)
    few = list(model.stream("if [MASK:5]", steps=2, updates=100))
    assert [state.step for state in few] == [0, 1, 2]
    assert all(state.texts[0].startswith("if ") for state in few)


def test_any_positions_can_be_given(model):
    tokens = model.tokenizer.encode("zyx")
    assert len(model.infill(positions=[], tokens=[], length=4, steps=1)[0]) == 4
    for text in model.infill(num_samples=2, positions=[9, 0, 4], tokens=tokens, length=10):
        assert (text[9], text[0], text[4]) == ("z", "y", "x") and len(text) == 10


def test_the_log_likelihood_of_texts_is_a_bound_for_each(model):
    texts = ["if", "a much longer text than that", "or", "if"]
    found = model.log_likelihood(texts, seed=5)
    assert found.total.shape == (4,) and (found.standard_error > 0).all()
    np.testing.assert_allclose(found.total, found.diffusion + found.reconstruction + found.prior)
    assert found.total[1] > found.total[0] and found.total[0] != found.total[3]
    assert (found.normalised <= found.diffusion).all()
    # Not how the texts are cut into batches; nor does a single text need a list.
    again = model.log_likelihood(texts, seed=5, batch_size=1)
    np.testing.assert_allclose(again.total, found.total, rtol=1e-5)
    np.testing.assert_allclose(model.log_likelihood("if", seed=5).total, found.total[:1], rtol=1e-5)


def test_a_text_is_bounded_given_another(model):
    texts, prompts = ["else", "of", "is"], ["if then ", "in front ", ""]
    found = model.log_likelihood(texts, given=prompts, seed=5)
    assert found.total.shape == (3,) and (found.total > 0).all()
    alone = model.log_likelihood(texts, seed=5)
    np.testing.assert_allclose(found.total[2], alone.total[2], rtol=1e-5)  # after nothing
    assert (found.prior == alone.prior).all()  # what is given costs nothing
    assert found.total[0] != alone.total[0]
    both = model.log_likelihood(texts[:2], given="if then ", seed=5)
    np.testing.assert_allclose(both.total[0], found.total[0], rtol=1e-5)


@pytest.mark.devices(8)
def test_a_mesh_shares_the_batch_and_changes_nothing_else(model, tiny_run):
    from sedd_jax.parallel.sharding import make_mesh

    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    spread = sedd_jax.load(tiny_run, mesh=mesh)
    assert len(spread.params["embedding"].sharding.device_set) == 8
    ours, theirs = (m.sample_tokens(3, steps=4, seed=1) for m in (model, spread))
    assert (ours == theirs).mean() > 0.95  # sums in another order may tip a rare draw
    ours, theirs = (m.log_likelihood(["if", "then"]).total for m in (model, spread))
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)


def test_dtype_is_that_of_the_network(tiny_run, model):
    half = sedd_jax.load(tiny_run, dtype="bfloat16")
    assert (
        half.network.dtype == jax.numpy.bfloat16 and half.experiment["model"]["dtype"] == "bfloat16"
    )
    assert half.params["embedding"].dtype == jax.numpy.float32
    found, exact = (m.log_likelihood("some text").total for m in (half, model))
    assert found != exact
    np.testing.assert_allclose(found, exact, rtol=0.05)


@pytest.mark.parametrize(
    "predictor, first, second",
    [
        ("two_stage", {"theta": 0.5, "temperature": 0.8}, {"theta": 0.3, "temperature": 1.2}),
        ("theta_trapezoidal", {"theta": 0.5}, {"theta": 0.4}),
        ("remdm_confidence", {"top_p": 0.9, "top_k": 5}, {"top_p": 0.5, "top_k": 3}),
        ("entropy_bounded", {"gamma": 0.1}, {"gamma": 30.0}),
        ("path_planning", {}, {"steps": 3}),
    ],
)
def test_a_predictor_is_compiled_once_whatever_its_numbers(model, predictor, first, second, capsys):
    sampling.reverse_steps.clear_cache()
    options = {"length": 16, "steps": 4, "predictor": predictor}
    texts = [model.sample_tokens(4, **options | more) for more in (first, second)]
    with capsys.disabled():
        print(f"\n{predictor}: {sampling.reverse_steps._cache_size()} executable for 2 calls")
    assert sampling.reverse_steps._cache_size() == 1
    assert all((text < model.graph.vocab_size).all() for text in texts)
    assert not np.array_equal(*texts)


@pytest.mark.devices(8)
def test_a_shaped_second_order_sampler_runs_on_a_mesh(model, tiny_run):
    from sedd_jax.parallel.sharding import make_mesh

    spread = sedd_jax.load(tiny_run, mesh=make_mesh({"data": 2, "fsdp": 2, "tensor": 2}))
    options = {"length": 16, "steps": 4, "predictor": "two_stage", "temperature": 0.8}
    ours, theirs = (m.sample_tokens(4, **options) for m in (model, spread))
    assert (ours == theirs).mean() > 0.9  # sums in another order may tip a rare draw


@pytest.mark.parametrize("predictor", ["two_stage", "entropy_bounded", "first_hitting"])
def test_padding_changes_no_sample(model, predictor):
    """A length of 13 is filled up to 16: no predictor counts or draws the rest."""
    options = {"steps": 30, "predictor": predictor, "seed": 3}
    (state,) = list(model.stream(None, 2, length=13, updates=1, **options))[-1:]
    assert state.tokens.shape == (2, 13) and (state.tokens < model.graph.vocab_size).all()
    most = {"two_stage": 61, "entropy_bounded": 13, "first_hitting": 13}[predictor]
    assert (state.calls <= most).all() and (
        predictor == "entropy_bounded" or state.calls[0] == most
    )


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m: m.sample(0), "num_samples 0 is not a whole number in [1,"),
        (lambda m: m.sample(1, batch_size=0), "batch_size 0 is not a whole number in"),
        (lambda m: m.sample(1, length=33), "length 33 is not a whole number in [1, 32]"),
        (lambda m: m.sample(1, steps=0), "steps 0 is not a whole number in [1,"),
        (lambda m: m.sample(1, steps=2.5), "steps 2.5 is not a whole number in [1,"),
        (lambda m: m.sample(1, seed=-1), "seed -1 is not a whole number in [0,"),
        (lambda m: m.sample(1, t_min=0.0), "t_min 0.0 is not inside (0, 1)"),
        (lambda m: m.sample(1, predictor="best"), "unknown predictor 'best'; known: euler"),
        (lambda m: m.sample(1, draw="best"), "unknown draw 'best'; known: exact"),
        (lambda m: m.infill("if [MASK:99]"), "takes 102 positions, more than length 32"),
        (lambda m: m.infill("if \u20ac[MASK:9]"), "is outside the alphabet"),
        (lambda m: m.infill(), "give a template, or positions and tokens"),
        (lambda m: m.infill("[MASK:3]", length=5), "leave both out"),
        (lambda m: m.infill(positions=[1, 2], tokens=[1]), "positions (2,) and tokens (1,)"),
        (lambda m: m.infill(positions=[1, 1], tokens=[1, 2]), "a position is there twice"),
        (lambda m: m.infill(positions=[32], tokens=[1]), "position 32 is not in [0, 32)"),
        (
            lambda m: m.infill(positions=[1], tokens=[m.graph.vocab_size]),
            "known tokens must be in [0, ",
        ),
        (lambda m: m.infill(positions=[1], tokens=[-1]), "known tokens must be in [0, "),
        (
            lambda m: m.infill(positions=[1.0], tokens=[1]),
            "positions of dtype float64 are not whole",
        ),
        (lambda m: m.infill(positions=[1], tokens=[1.7]), "tokens of dtype float64 are not whole"),
        (lambda m: m.infill(positions=[True], tokens=[1]), "positions of dtype bool are not whole"),
        (lambda m: m.infill(positions=[], tokens=[], length=0), "length 0 is not a whole number"),
        (
            lambda m: m.sample(2, known=(np.zeros((3, 4), int), np.zeros(4, bool))),
            "known has tokens (3, 4) and is_known (4,); give [L] for all",
        ),
        (
            lambda m: m.sample(2, known=(np.zeros(0, int), np.zeros(0, bool))),
            "0 positions are not in [1, 32]",
        ),
        (lambda m: m.sample(known=(np.zeros(4, int),)), "known is not a pair (tokens, is_known)"),
        (lambda m: m.sample(predictor=["euler"]), "unknown predictor ['euler']; known: euler"),
        (lambda m: m.sample(greedy="no"), "greedy 'no' is not True or False"),
        (lambda m: m.sample(normalised="false"), "normalised 'false' is not True or False"),
        (lambda m: m.revise("if", keep=5), "keep 5 is no text and no position in [0, 2)"),
        (lambda m: m.bound(np.zeros((1, 4), int), batch_size=2.5), "batch_size 2.5 is not a whole"),
        (lambda m: m.bound(np.zeros((1, 4), int), passes=np.int64(3)), "passes 3 must be an even"),
        (
            lambda m: dataclasses.replace(m, experiment={}).save_pretrained("exported"),
            "a model that was built by hand has no config to export",
        ),
        (lambda m: m.stream(steps=0), "steps 0 is not a whole number in"),
        (lambda m: m.stream(updates=0), "updates 0 is not a whole number in"),
        (lambda m: m.log_likelihood([]), "no texts; give at least one"),
        (
            lambda m: m.log_likelihood([""]),
            "text 0 has 0 tokens, not 1 to 32",
        ),
        (lambda m: m.log_likelihood(None), "a text is a str, or its tokens as an integer array"),
        (lambda m: m.log_likelihood(["if", "x" * 33]), "text 1 has 33 tokens, not 1 to 32"),
        (lambda m: m.log_likelihood("if", passes=3), "passes 3 must be an even number"),
        (
            lambda m: m.log_likelihood("if", given=["a", "b"]),
            "2 prompts are given for 1 texts; give one for all, or one each",
        ),
        (
            lambda m: m.log_likelihood("if", given="x" * 31),
            "text 0 has 2 tokens after 31 that are given, more than 32",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused_in_one_line(model, call, words):
    with says(words):
        call(model)


def test_an_option_that_the_predictor_does_not_read_is_said_once(model, caplog):
    sampling._warn_of_unread.cache_clear()
    for _ in range(2):
        chosen = model.chosen(predictor="tweedie", eta=0.3)
    assert caplog.messages == [
        "eta has no effect on predictor 'tweedie'; it is of remdm_cap, remdm_rescale, remdm_loop"
    ]
    caplog.clear()
    model.chosen(**dataclasses.asdict(model.sampling))  # nothing is other than the model's own
    model.chosen(predictor="psi", kappa=0.3)
    model.chosen(predictor=predictors.tweedie, eta=0.4)  # of one's own: it may read any
    assert chosen.eta == 0.3 and not caplog.messages


def test_known_tokens_may_not_be_longer_than_the_model(model):
    long = model.length + 1
    with says(f"{long} positions are not in [1, {model.length}], the model's length"):
        model.sample_tokens(1, known=(np.zeros(long, int), np.ones(long, bool)))


def test_the_bound_is_finite_positive_and_repeats_with_its_seed(model):
    blocks = np.arange(3 * model.length).reshape(3, -1) % model.graph.vocab_size
    first = model.bound(blocks, passes=2, seed=5)
    assert isinstance(first, bounds.CorpusBound)
    again = model.bound(Blocks(jnp.asarray(blocks)), passes=np.int64(2), seed=5)
    assert jax.tree.all(jax.tree.map(np.array_equal, first, again))
    assert first.bound != model.bound(blocks, passes=2, seed=6).bound
    assert 0 < first.bound < np.inf and first.bound_standard_error > 0


def test_a_predictor_of_ones_own_is_a_function_or_a_name_in_the_table(model, monkeypatch):
    def early(xt, step):
        return predictors.tweedie(xt, step._replace(s=step.s / 4))

    def draw(predictor):
        return model.sample(4, length=16, steps=3, predictor=predictor)

    monkeypatch.setitem(predictors.PREDICTORS, "mine", predictors.tweedie)
    assert draw("mine") == draw("tweedie") == draw(predictors.tweedie)
    monkeypatch.setitem(predictors.PREDICTORS, "mine", early)  # what was compiled is not used again
    assert draw("mine") == draw(early) != draw("tweedie")


def test_the_sampler_is_the_one_of_the_paper(model):
    """sample_tokens is samplers.sample with the model's score function, and nothing else."""
    drawn = samplers.sample(
        jax.random.key(2),
        model.score_fn,
        model.graph,
        model.schedule,
        (2, model.length),
        steps=8,
        index=np.arange(2),
    ).tokens
    np.testing.assert_array_equal(model.sample_tokens(2, steps=8, seed=2), drawn)
