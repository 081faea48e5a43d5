# pyright: strict
"""Every public function and attribute, as a user's code has them; checked, never run.

tests/test_public_api.py has pyright check it, and that it uses all names of sedd_jax and of the
modules of the mathematics.
"""

from collections.abc import Iterator

import jax
import numpy as np

import sedd_jax
from sedd_jax.data import Blocks
from sedd_jax.diffusion import graphs, likelihood, losses, samplers, schedules
from sedd_jax.diffusion.graph import Graph, GraphByTables, Probe, ScoreEntropy, lift
from sedd_jax.diffusion.scores import DenseScores, ScoreFn, Scores


# jnp.ones and jnp.zeros are not typed strictly themselves.
def ones(*shape: int) -> jax.Array:
    return jax.random.uniform(jax.random.key(0), shape)


def tokens(*shape: int) -> jax.Array:
    return jax.random.randint(jax.random.key(0), shape, 0, 5)


def loads() -> sedd_jax.SEDD:
    sedd_jax.load("owner/name@0123456789", revision=None, dtype="bfloat16", tokenizer="gpt2")
    sedd_jax.load("exported", imports=["exported/imports/power.py"])
    return sedd_jax.load("runs/quickstart", step=100, mesh=None)


@sedd_jax.register("grid", "power")
def power_grid(i: jax.Array, steps: jax.Array, t_min: float, *, power: float = 2.0) -> jax.Array:
    return t_min + (1.0 - t_min) * (1.0 - i / steps) ** power


def samples(model: sedd_jax.SEDD) -> list[str]:
    def on_step(state: sedd_jax.State) -> None:
        print(state.step, state.steps, state.texts)

    options: sedd_jax.SamplingOptions = {"steps": 128, "predictor": "tweedie", "top_p": 0.9}
    call: sedd_jax.CallOptions = {**options, "batch_size": 16, "seed": 1, "progress": True}
    drawn: np.ndarray = model.sample_tokens(4, length=64, on_step=on_step, **call)
    texts = model.sample(4, length=64, on_step=print, steps=64, grid="cosine", greedy=True)
    texts += model.sample(known=(drawn[0], drawn[0] < 3), temperature=0.8, top_k=None)
    texts += model.sample(grid="power", parameters={"power": 2.0})
    texts += model.infill("a [MASK:20]", 2, on_step=on_step, **call)
    texts += model.infill(positions=[0, 9], tokens=[1, 2], length=64, draw="exact", t_min=1e-5)
    texts += model.revise("a draft", 2, strength=0.3, keep=["draft", 0], on_step=on_step, **call)
    sampling: sedd_jax.Sampling = model.chosen(theta=0.5, eta=0.1, kappa=0.9, gamma=0.1)
    calls: int = sampling.nfe
    times: np.ndarray | None = model.times_of(sampling)
    print(sampling.steps, sampling.predictor, sampling.threshold, sampling.normalised, calls, times)
    return texts + model.decode(drawn)


def streams(model: sedd_jax.SEDD) -> sedd_jax.Animation:
    states: Iterator[sedd_jax.State] = model.stream("a [MASK:20]", updates=32, seed=1)
    for state in states:
        rows: list[np.ndarray] = state.rows
        pieces: list[list[str]] = state.pieces
        print(state.tokens.shape, state.is_known, state.is_masked, state.lengths.sum(), state.calls)
        print(state.tokenizer.vocab_size, rows, pieces)
        level: float | None = state.noise_level
        caption: str = state.caption(0)
        print(state.noise.mean(), level, caption)
    for state in model.stream_revisions(["a", "b"], strength=0.5, keep="a", updates=4, steps=8):
        print(state)
    animation = sedd_jax.show(
        model.stream(num_samples=2, length=8), title="a", path="a.html", live=False
    )
    print(animation.html, animation.states, animation.title, animation.save("b.html"))
    return animation


def scores_text(model: sedd_jax.SEDD) -> None:
    bound: sedd_jax.Bound = model.log_likelihood(
        ["a", "b"], given="c", index=[0, 0], passes=16, batch_size=16, seed=0
    )
    print(bound.total, bound.standard_error, bound.variance, bound.by_token, bound.prior)
    print(bound.diffusion_passes, bound.reconstruction_passes, bound.normalised_passes)
    print(bound.diffusion, bound.reconstruction, bound.normalised, bound.normalised_variance)
    print(bound.tightest.total.sum(), bound.minus(bound).total, bound.share, bound.cross_entropy)
    ratio: sedd_jax.LogRatio = model.log_likelihood_ratio("a", "b", given="c", passes=4, seed=1)
    print(ratio.value.mean(), ratio.standard_error, ratio.normalised)
    print(ratio.normalised_standard_error)
    blocks: np.ndarray = np.zeros((4, 64), np.int32)
    corpus: sedd_jax.CorpusBound = model.bound(
        blocks, passes=8, batch_size=2, seed=0, target_standard_error=0.01, by_token=True
    )
    corpus = model.bound(Blocks(blocks, blocks < 3), max_passes=64, progress=True)
    per_token: float = corpus.per(blocks.size).bound
    print(per_token, corpus.bound_standard_error, corpus.diffusion, corpus.tail, corpus.prior)
    print(corpus.normalised, corpus.normalised_standard_error, corpus.paper_protocol, corpus.passes)
    print(corpus.curve, corpus.by_token, corpus.by_block, corpus.sums["bound"])
    print(corpus.paper_protocol_standard_error)


def parts(model: sedd_jax.SEDD) -> sedd_jax.SEDD:
    model.save_pretrained("folder", name="a model", replace=True)
    commit: str = model.push_to_hub("owner/name", private=True, token=None, message="a message")
    xt = tokens(2, model.length)
    table: jax.Array = model.score_fn(xt, ones(2, 1)).log_score()
    print(commit, table, model.network, model.graph, model.schedule, model.tokenizer, model.dtype)
    print(model.sampling, model.objective.title, model.step, model.mesh, model.curve, model.workdir)
    print(model.experiment, model.about, model.original, model.bound_fn, model.put(xt))
    return model.with_params(model.params)


def noises(graph: Graph, schedule: schedules.Schedule) -> jax.Array:
    print(graphs.GRAPHS["absorbing"](vocab_size=5), schedules.SCHEDULES["log_linear"]())
    print(graph.vocab_size, graph.predicts_clean, graph.dim, graph.mask)
    print(graphs.is_of(type(graph), "absorbing"), graphs.is_of(type(graph), ("uniform", "zipf")))
    t = ones(2, 1)
    sigma: jax.Array = schedule.sigma(t)
    slope: jax.Array = schedule.dsigma_dt(t)
    key, x0 = jax.random.key(0), tokens(2, 8)
    xt: jax.Array = graph.perturb(key, x0, sigma)
    noise: jax.Array = graph.limit(key, (2, 8))
    x, score = xt[0, 0], ones(graph.dim)
    rows = [graph.transp_rate(x), graph.transp_transition(x, sigma[0, 0])]
    rows += [graph.staggered_score(score, sigma[0, 0]), graph.reverse_rate(score, x)]
    p = graph.clean_probabilities(score, x, sigma[0, 0])
    by_tables: GraphByTables = graphs.Uniform(5)
    rows += [p, by_tables.ancestral_probabilities(p, x, sigma[0, 0], sigma[0, 0] / 2, ones(1)[0])]
    rows += [graph.euler_probabilities(score, x, sigma[0, 0])]
    rows += [graph.tweedie_probabilities(score, x, sigma[0, 0])]
    print(lift(graph.reverse_rate, ones(2, 8, graph.dim), xt))
    return slope + noise.sum() + graph.prior(sigma).sum() + sum(row.sum() for row in rows)


def table_score_fn(graph: Graph) -> ScoreFn:
    def score_fn(xt: jax.Array, sigma: jax.Array) -> Scores:
        table = ones(*xt.shape, graph.dim) - graph.log_scale(sigma)[..., None]
        return DenseScores(table, xt, graph.vocab_size)

    return score_fn


def batches(graph: Graph, schedule: schedules.Schedule) -> None:
    key, x0, sigma = jax.random.key(0), tokens(2, 8), ones(2, 1)
    xt, scores = graph.hidden(x0, x0 < 3), table_score_fn(graph)(x0, sigma)
    probe: Probe = graph.probe(key, x0, ones(2, 1) / 2, x0 < 3, schedule, 1e-3)
    entropy: ScoreEntropy = graph.score_entropy(scores, sigma, xt, x0)
    print(probe.xt, probe.sigma, probe.scale, probe.weight, probe.mean_weight)
    print(entropy.value, entropy.normalised, entropy.log_z)
    print(
        graph.squared_error(scores, sigma, xt, x0), graph.posterior_kl(scores, xt, x0, sigma, sigma)
    )
    print(graph.score_divergence(scores, scores, sigma, xt))
    print(graph.divergence_from_uniform(scores, sigma, xt))
    print(graph.scores_of_clean(scores, xt, sigma).vocab_size)
    for step in (
        graph.euler(scores, xt, sigma),
        graph.tweedie(scores, xt, sigma),
        graph.ancestral(scores, xt, sigma, sigma, kappa=0.9, shape=None),
        graph.denoise(scores, xt, sigma, shape=None),
    ):
        print(step.probabilities(), step.log_probability(x0), step.draw(jax.random.split(key, 2)))


def mathematics() -> None:
    key, x0 = jax.random.key(0), tokens(2, 8)
    schedule: schedules.Schedule = schedules.LogLinear(eps=1e-3)
    graph: Graph = graphs.Absorbing(vocab_size=5, scale_by_sigma=True)
    batches(graph, schedule)
    print(
        graphs.Absorbing(5).mask,
        noises(graphs.Uniform(5), schedules.Geometric(sigma_min=1e-5, sigma_max=20.0)),
    )
    score_fn = table_score_fn(graph)
    process = score_fn, graph, schedule

    loss: losses.Loss = losses.dwdse(
        key, x0, *process, t_min=1e-3, times=losses.TIMES["stratified"], is_token=x0 < 3
    )
    print(loss.nats.mean(), {name: mean.value() for name, mean in loss.metrics.items()})
    t, xt = losses.independent_times(key, 2, 1e-3)[:, None], x0
    t = losses.stratified_times(key, 2, 1e-3)[:, None]
    for loss_at in (
        losses.dwdse_at,
        losses.normalised_at,
        losses.unweighted_at,
        losses.concrete_score_matching_at,
    ):
        print(loss_at(t, xt, x0, *process, is_token=None).nats)
        print(losses.at_random_times(loss_at, key, x0, *process).nats)
    print(losses.d3pm_at(t, xt, x0, *process, discrete_steps=100).nats)
    print(losses.d3pm_token_nats(t, xt, x0, *process, discrete_steps=100))
    print(losses.Mean(ones(2), ones(2)).value())

    index = tokens(2)
    bound: likelihood.Bound = likelihood.bound(
        key, x0, index, *process, passes=4, reconstruction_passes=2, t_min=1e-3, is_token=None
    )
    steps = likelihood.discrete_bound(key, x0, index, *process, passes=4, discrete_steps=100)
    nats = float(bound.total.sum() + steps.total.sum())
    print(likelihood.perplexity(nats / x0.size), likelihood.bits_per_character(nats, 16))
    print(likelihood.perplexity_error(nats / x0.size, 0.1))
    print(likelihood.stratified(key, index, 4), likelihood.pairs_variance(ones(2, 4)))
    print(likelihood.control_variate(ones(2), ones(2), ones(2)))
    print(likelihood.controlled(ones(2), ones(2), ones(2), ones(2)))
    likelihood.check_passes(4, "passes")
    examples = likelihood.Examples(x0, index, x0 < 3)
    print(examples.noised(key, graph, t), examples.probed(key, index / 2, graph, schedule, 1e-3))

    known = samplers.Known(x0, x0 < 3)
    chain: samplers.Chain = samplers.sample(key, *process, (2, 8), steps=16, known=known)
    print(known.clamp(chain.tokens), chain.calls, chain.confidence, samplers.Chain.of(x0))
    keys = jax.random.split(key, 2)
    last = samplers.denoise(chain.tokens, t, *process)
    print(samplers.draw_exact(keys, last), samplers.draw_float32_gumbel(keys, last))
    print(samplers.gumbel_argmax(ones(2, 8, 5), last.probabilities()))
    print(samplers.DRAWS["exact"](keys, last))
