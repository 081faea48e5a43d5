"""Drafts noised in part and sampled again: their exact distribution, what stays, what it costs."""

import gzip
import json
import math
import types

import dense
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import says

import sedd_jax
from sedd_jax.cli import sample_command
from sedd_jax.data.tokenizers import Bytes, Characters
from sedd_jax.diffusion.graphs import GRAPHS
from sedd_jax.diffusion.schedules import LogLinear
from sedd_jax.inference import revision, sampling
from sedd_jax.inference.model import SEDD
from sedd_jax.inference.trajectory import Animation

# Two tokens, half dependent: 64 steps then add about 1 to a chi-square of 8 degrees of freedom.
LAW = dense.data_law(3, 2, seed=5)
LAW = (LAW + np.outer(LAW.sum(axis=1), LAW.sum(axis=0))) / 2
TEXTS = ["abc"[i] + "abc"[j] for i, j in dense.sequences(3, 2)]
DRAWN, STEPS = 200_000, 64
graphs = pytest.mark.parametrize("name", GRAPHS)


@pytest.fixture(scope="module")
def model(tiny_run):
    return sedd_jax.load(tiny_run)


@pytest.fixture
def exact(monkeypatch):
    """A SEDD whose network is the exact score of LAW, and its network calls."""
    calls = []

    def make(name):
        graph = GRAPHS[name](3)
        score_fn = dense.exact_score_fn(graph, LAW, one_sigma=True)

        def counted(xt, sigma):
            jax.debug.callback(lambda: calls.append(xt.shape))
            return score_fn(xt, sigma)

        monkeypatch.setattr(sampling, "make_score_fn", lambda *_, **__: counted)
        cpu = types.SimpleNamespace(platform="cpu")
        network = type("Exact", (), {"placement": cpu, "is_unrolled": False})()
        params = {"none": jnp.zeros(())}
        return SEDD(network, params, graph, LogLinear(), Characters("abc"), length=2), calls

    return make


def revised(model, drafts, num_samples, strength):
    options = {"strength": strength, "steps": STEPS, "batch_size": 2**18, "updates": 1}
    *_, last = model.stream_revisions(drafts, num_samples, **options)
    return dense.count(last.tokens, 3)


def exact_law(graph, draft, strength):
    """The sum over x_t of p(x_t | draft) p(x0 | x_t), over all clean x0, by enumeration."""
    time = revision.start_of(strength, sampling.Sampling(steps=STEPS)).time
    sigma = float(LogLinear().sigma(np.float32(time)))
    noised = np.stack([dense.given(graph, x0, sigma) for x0 in dense.sequences(3, 2)])
    joint = LAW.reshape(-1, 1) * noised
    return (joint / joint.sum(axis=0)) @ noised[draft]


def among_others(strength):
    """A strength whose test takes long and says what that of another says."""
    return pytest.param(strength, marks=pytest.mark.long)


@graphs
@pytest.mark.parametrize("strength", [0.25, among_others(0.5), among_others(0.9)])
def test_revisions_of_drafts_from_the_data_distribution_have_it_again(exact, name, strength):
    model, _ = exact(name)
    drafts = 50_000
    drawn = np.random.default_rng(1).choice(9, size=drafts, p=LAW.ravel())
    counts = revised(model, [TEXTS[i] for i in drawn], 1, strength)
    assert dense.p_value(counts, LAW) > dense.P_VALUE
    # The sensitivity: drafts of another distribution do not have it after a weak revision.
    if strength == 0.25:
        counts = revised(model, [TEXTS[i] for i in np.arange(drafts) % 9], 1, strength)
        assert dense.p_value(counts, LAW) < 1e-12


@graphs
@pytest.mark.parametrize(
    "strength", [among_others(0.02), among_others(0.25), 0.5, among_others(0.9), among_others(1.0)]
)
def test_revisions_of_one_draft_have_their_enumerated_distribution(exact, name, strength):
    model, _ = exact(name)
    draft = 5
    law = exact_law(model.graph, draft, strength)
    np.testing.assert_allclose(law.sum(), 1.0)
    counts = revised(model, TEXTS[draft], DRAWN, strength)
    assert dense.p_value(counts, law) > dense.P_VALUE
    if strength <= 0.5:  # the test sees one step more of noise
        other = exact_law(model.graph, draft, strength + 1.5 / STEPS)
        assert dense.p_value(counts, other) < dense.P_VALUE


@graphs
@pytest.mark.parametrize("steps, strength", [(8, 0.5), (8, 0.55), (10, 0.1), (5, 1e-6), (3, 1.0)])
def test_a_revision_costs_the_steps_below_its_strength_and_the_denoiser(
    exact, name, steps, strength
):
    model, calls = exact(name)
    model.revise("ab", strength=strength, steps=steps)
    jax.effects_barrier()
    start = revision.start_of(strength, sampling.Sampling(steps=steps))
    expected = 1 + (0 if strength < 1e-5 else math.ceil(strength * steps))
    assert len(calls) == start.nfe == expected
    calls.clear()
    assert model.revise(["ab", "c"], 2, strength=0.0, steps=steps) == ["ab", "ab", "c", "c"]
    jax.effects_barrier()
    assert not calls


@pytest.mark.parametrize("grid", ["uniform", "cosine"])
@pytest.mark.parametrize("predictor", ["tweedie", "none"])
def test_the_start_is_the_last_time_of_the_grid_that_is_at_least_the_strength(grid, predictor):
    options = sampling.Sampling(steps=16, grid=grid, predictor=predictor)
    times = [float(options.functions().grid(i, 16, options.t_min)) for i in range(17)]
    for strength in (1e-9, 0.01, 0.3, 0.5, 0.77, 0.999, 1.0):
        start = revision.start_of(strength, options)
        assert start.time >= strength
        assert start.step == 16 or times[start.step + 1] < strength
        np.testing.assert_allclose(start.time, times[start.step], atol=1e-7)
        assert start.nfe == (1 if predictor == "none" else 17 - start.step)
    assert revision.start_of(1.0, options)[:2] == (0, 1.0)
    assert revision.start_of(0.0, options) == (17, 0.0, 0)


def test_strength_1_is_the_sampler_and_0_the_draft(model):
    drafts = ["if a text", "is not so"]
    options = {"steps": 6, "seed": 3}
    fresh = model.sample(4, length=9, **options)
    assert model.revise(drafts, 2, strength=1.0, **options) == fresh
    assert model.revise(drafts, 2, strength=0.0, **options) == [d for d in drafts for _ in "12"]
    weak = model.revise(drafts, 2, strength=0.5, **options)
    assert weak != fresh and len(set(weak)) == 4
    assert weak != model.revise(drafts, 2, strength=0.5, steps=6, seed=4)


def test_a_revision_is_the_same_alone_and_among_others_of_any_length(model):
    drafts = ["if", "a longer text is in a bucket of 32", "or", "not one of them"]
    drafts = [draft[: model.length] for draft in drafts]
    sampling.reverse_steps.clear_cache()
    options = {"steps": 8, "seed": 1, "strength": 0.6, "keep": [1]}
    many = model.revise(drafts, 2, **options)
    assert sampling.reverse_steps._cache_size() == 1
    assert [len(text) for text in many] == [len(draft) for draft in drafts for _ in "12"]
    for size in (1, 3):
        assert model.revise(drafts, 2, batch_size=size, **options) == many
    assert model.revise(drafts[:1], 2, **options) == many[:2]
    count = sampling.reverse_steps._cache_size()
    model.revise(drafts[:1], 2, **options | {"strength": 0.2, "steps": 9, "seed": 2})
    assert sampling.reverse_steps._cache_size() == count


def test_the_first_state_is_the_noised_draft_and_what_is_kept_stays(model):
    draft = "The first of the three, the last"[: model.length]
    options = {"strength": 0.5, "keep": ["the", 0], "steps": 16, "updates": 4}
    states = list(model.stream_revisions(draft, 3, **options))
    assert [state.step for state in states] == [8, 10, 12, 14, 16]
    x0 = model.tokenizer.encode(draft)
    is_known = np.array([0, *(draft.index("the") + np.arange(3)), *(24 + np.arange(3))])
    for state in states:
        np.testing.assert_array_equal(np.flatnonzero(state.is_known[0]), is_known)
        assert (state.tokens[:, is_known] == x0[is_known]).all()
    masked = states[0].is_masked
    assert 0 < masked.mean() < 1 and not states[-1].is_masked.any()
    np.testing.assert_array_equal(states[0].tokens[~masked], np.tile(x0, (3, 1))[~masked])
    np.testing.assert_array_equal(  # an absorbing token that is not masked stays
        states[-1].tokens[~masked], states[0].tokens[~masked]
    )
    assert states[-1].texts == model.revise(draft, 3, strength=0.5, keep=["the", 0], steps=16)


def test_kept_text_covers_every_token_that_spells_a_part_of_it():
    text, size = "na\u00efve na\u00efve \u6771\u4eac", 256

    def kept(*keep):
        texts = revision.drafts(text, keep, 1, Bytes(), size)
        return bytes(texts.known.tokens[texts.known.is_known].astype(np.uint8)).decode()

    assert kept() == ""
    assert kept("\u00ef") == "\u00ef\u00ef"
    assert kept("ve \u6771") == "ve \u6771"
    assert kept("na", "\u4eac", 0) == "nana\u4eac"
    ids = revision.drafts("aaab", "aa", 2, Bytes(), size).known.is_known  # they overlap
    np.testing.assert_array_equal(ids, [[True, True, True, False]] * 2)


def test_states_of_drafts_of_different_lengths_play_as_one_page(model):
    drafts = ["if a", "text is not so short"]
    options = {"steps": 8, "strength": 0.5, "keep": "a", "batch_size": 1, "updates": 2}
    states = list(model.stream_revisions(drafts, **options))
    animation = Animation(states)
    assert [state.step for state in animation.states] == [4, 6, 8]
    last = animation.states[-1]
    assert last.texts == model.revise(drafts, **{k: options[k] for k in ("steps", "keep")})
    assert [len(row) for row in last.rows] == [len(pieces) for pieces in last.pieces] == [4, 20]
    page = animation.html.split('id="states">')[1].split("</script>")[0]
    samples = json.loads(page)["samples"]
    assert [len(s["first"]) for s in samples] == [len(s["known"]) for s in samples] == [4, 20]
    assert not last.tokens[0, 4:].any()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"strength": 1.5}, "strength 1.5 is not in [0, 1]"),
        ({"strength": -0.1}, "strength -0.1 is not in [0, 1]"),
        ({"strength": float("nan")}, "strength nan is not in [0, 1]"),
        ({"drafts": ""}, "draft 0 has 0 tokens, not 1 to 32"),
        ({"drafts": []}, "no drafts; give at least one"),
        ({"drafts": ["if", "x" * 33]}, "draft 1 has 33 tokens, not 1 to 32, the model's length"),
        ({"keep": "else"}, "keep 'else' is not in the drafts; copy the text"),
        ({"keep": ["if", ""]}, "keep '' is not in the drafts"),
        ({"keep": [2]}, "keep 2 is no text and no position in [0, 2) of draft 0"),
        ({"keep": [-1]}, "keep -1 is no text and no position"),
        ({"keep": [True]}, "keep True is no text and no position"),
        ({"num_samples": 0}, "num_samples 0 is not a whole number in"),
        ({"steps": 0}, "steps 0 is not a whole number in"),
        ({"seed": -1}, "seed -1 is not a whole number in"),
        ({"drafts": "\u20ac"}, "is outside the alphabet"),
    ],
)
def test_what_cannot_be_revised_is_refused_at_the_call(model, arguments, words):
    with says(words):
        model.stream_revisions(**{"drafts": "if", **arguments})


def lines(capsys, tiny_run, *arguments):
    run = [f"--workdir={tiny_run}", "--steps=8", "--format=jsonl", *arguments]
    assert sample_command(run) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_the_command_revises_a_file_and_its_own_samples(capsys, tiny_run, tmp_path, model):
    file = tmp_path / "draft.txt"
    file.write_text("if a text\nis not so\n")  # of two lines: one draft
    arguments = [f"--revise={file}", "--num_samples=2", "--seed=3", "--keep=if", "--keep=text"]
    page = tmp_path / "page.html"
    rows = lines(capsys, tiny_run, *arguments, "--strength=0.25", f"--html={page}")
    texts = model.revise(
        "if a text\nis not so", 2, strength=0.25, keep=["if", "text"], steps=8, seed=3
    )
    assert [row["text"] for row in rows] == texts
    assert all(text[:2] == "if" and text[5:9] == "text" for text in texts)
    about = {"strength": 0.25, "nfe": 3, "keep": ["if", "text"], "draft": 0, "index": 1, "seed": 3}
    assert about.items() <= rows[1].items() and 0.25 <= rows[1]["time"] < 0.251
    assert "strength 0.25" in page.read_text()
    samples = tmp_path / "samples.jsonl"
    samples.write_text("".join(json.dumps({"text": t + "\n", "x": 1}) + "\n" for t in ("if", "or")))
    rows = lines(capsys, tiny_run, f"--revise={samples}", "--num_samples=2", "--strength=0")
    assert [row["text"] for row in rows] == ["if\n", "if\n", "or\n", "or\n"]
    assert [(row["draft"], row["nfe"]) for row in rows] == [(0, 0), (0, 0), (1, 0), (1, 0)]


def test_a_file_of_drafts_that_is_cut_off_is_one_line(capsys, tiny_run, tmp_path):
    file = tmp_path / "drafts.jsonl.gz"
    file.write_bytes(gzip.compress(b'{"text": "if"}\n' * 99)[:-9])
    assert sample_command([f"--workdir={tiny_run}", f"--revise={file}"]) == 2
    assert f"cannot read {str(file)!r} to its end" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.devices(8)
def test_a_mesh_shares_the_drafts_and_changes_nothing_else(model, tiny_run):
    from sedd_jax.parallel.sharding import make_mesh

    spread = sedd_jax.load(tiny_run, mesh=make_mesh({"data": 2, "fsdp": 2, "tensor": 2}))
    drafts, options = ["if a text", "is not so short"], {"steps": 4, "seed": 1, "strength": 0.5}
    ours, theirs = (list(m.stream_revisions(drafts, **options)) for m in (model, spread))
    np.testing.assert_array_equal(ours[0].tokens, theirs[0].tokens)  # the noise alone
    assert (ours[-1].tokens == theirs[-1].tokens).mean() > 0.9  # sums in another order
