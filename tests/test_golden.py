"""float32 values of this code against float64 values of the original PyTorch code.

Only the rounding of float32 is allowed for: the tolerances are the project's, and the one place
where an entry is not compared with its own size is a difference of two terms
(`golden_set.relative_error`).
"""

import functools

import golden_set
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_set import GRAPHS, SETTINGS, arrays, relative_error, relative_norm

from configs import base
from sedd_jax import state
from sedd_jax.convert.names import from_original, to_original
from sedd_jax.diffusion import predictors, samplers
from sedd_jax.diffusion.graph import lift
from sedd_jax.diffusion.graphs import Absorbing
from sedd_jax.diffusion.losses import dwdse_at
from sedd_jax.diffusion.scores import DenseScores
from sedd_jax.experiment import make_optimizer
from sedd_jax.models.head import make_score_fn
from sedd_jax.models.transformer import Transformer

TOLERANCE = 2e-5  # relative, for everything but the two below
LOG_SCORE_TOLERANCE = 2e-5  # absolute
UPDATE_TOLERANCE = 5e-4  # relative in norm, for what Adam's division by a small root has amplified

# Most of the time goes to compiling networks that run a few times: LLVM need not optimize them.
compiled_quickly = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)

PREDICTORS = {"euler": predictors.euler, "analytic": predictors.tweedie}

both_graphs = pytest.mark.parametrize("name", GRAPHS)
both_predictors = pytest.mark.parametrize("predictor", PREDICTORS)


@pytest.mark.parametrize("file", golden_set.KEYS)
def test_the_set_holds_exactly_the_arrays_that_it_declares(file):
    held = {key: f"{array.dtype}{list(array.shape)}" for key, array in arrays(file).items()}
    assert held == golden_set.KEYS[file]


# Schedules


@pytest.mark.parametrize("slope", [False, True], ids=["sigma", "dsigma_dt"])
@pytest.mark.parametrize("name", golden_set.schedules())
def test_schedule_is_the_originals(name, slope):
    schedule, stored = golden_set.schedules()[name], arrays("noise.npz")
    evaluate = schedule.dsigma_dt if slope else schedule.sigma
    expected = stored[f"{name}/{'rate' if slope else 'total'}_f64"]
    # The stored times are float64. Noise and slope increase with time, so the value lies between
    # those at the two float32 numbers around t, which differ by more than the tolerance where
    # dsigma/dt is large.
    t, near = stored["t"], stored["t"].astype(np.float32)
    below = evaluate(np.where(near > t, np.nextafter(near, np.float32(-1)), near))
    above = evaluate(np.where(near < t, np.nextafter(near, np.float32(2)), near))
    assert relative_error(np.clip(expected, below, above), expected) <= TOLERANCE


# Rates, transitions, scores, score entropy


def graph_arrays(name: str, vocab_size: int):
    """The stored arrays of one graph and size, without the prefix."""
    file, prefix = f"graph_{name}.npz", f"n{vocab_size}/"
    return {
        key.removeprefix(prefix): arrays(file)[key]
        for key in golden_set.KEYS[file]
        if key.startswith(prefix) and not key.endswith(("_f32", "bf16in", "bf16in_dtype"))
    }


@functools.lru_cache(1)
def stored_and_computed(name: str, vocab_size: int):
    """What is stored, and {name in the set: (our values, their positive terms or None)}."""
    graph = GRAPHS[name](vocab_size)
    stored = graph_arrays(name, vocab_size)
    x, x0 = jnp.asarray(stored["x"]), jnp.asarray(stored["x0"])  # [B, L]
    sigma = jnp.asarray(stored["sigma"], jnp.float32)[:, None]  # [B, 1]
    raw = jnp.asarray(stored["log_score_raw"], jnp.float32)  # [L, D]
    raw = jnp.broadcast_to(raw, (*x.shape, graph.dim))

    @compiled_quickly
    def compute(raw, sigma, x, x0):
        score, raw_score = jnp.exp(DenseScores(raw, x, vocab_size).log_score()), jnp.exp(raw)

        def value(table):
            return graph.score_entropy(DenseScores(table, x, vocab_size), sigma, x, x0).value

        entropy, pull_back = jax.vjp(value, raw)
        # The score at y = x, 1, is answered as 1, as SEDD's is, whatever the table holds there; no
        # score entropy reads it.
        raw_entropy = entropy
        if isinstance(graph, Absorbing):
            positive = jnp.where((x == graph.mask)[..., None], score, 0.0)
        else:
            positive = score / graph.dim
        growth = jnp.exp(sigma)[..., None]
        return {
            "transp_rate": (lift(graph.transp_rate, x), None),
            "transp_transition": (lift(graph.transp_transition, x, sigma), None),
            "staggered_score": (lift(graph.staggered_score, score, sigma), growth * score),
            "staggered_score_raw": (
                lift(graph.staggered_score, raw_score, sigma),
                growth * raw_score,
            ),
            "reverse_rate": (lift(graph.reverse_rate, score, x), None),
            "reverse_rate_raw": (lift(graph.reverse_rate, raw_score, x), None),
            "score_entropy": (entropy, None),
            "score_entropy_raw": (raw_entropy, None),
            "score_entropy_grad": (pull_back(jnp.ones_like(entropy))[0], positive),
        }

    return stored, jax.tree.map(lambda a: np.asarray(a, np.float64), compute(raw, sigma, x, x0))


FUNCTIONS = (
    "transp_rate",
    "transp_transition",
    "staggered_score",
    "staggered_score_raw",
    "reverse_rate",
    "reverse_rate_raw",
    "score_entropy",
    "score_entropy_raw",
    "score_entropy_grad",
)
SUFFIXES = ("", "_f64", "_at_idx_f64")
GRAPH_VALUES = [
    (name, vocab_size, function)
    for name in GRAPHS
    for vocab_size in SETTINGS["dims"]
    for function in FUNCTIONS
    if any(f"n{vocab_size}/{function}{s}" in golden_set.KEYS[f"graph_{name}.npz"] for s in SUFFIXES)
]


def errors_of(stored, function: str, actual, positive) -> dict[str, float]:
    """Relative errors of one function: of every entry, or of what is stored of a long row."""

    def error(expected, at=None):
        if at is None:
            return relative_error(actual, expected, positive)
        picked = [None if a is None else np.take_along_axis(a, at, -1) for a in (actual, positive)]
        return relative_error(picked[0], expected, picked[1])

    for suffix in ("_stable_f64", "_f64", ""):
        if function + suffix in stored:
            return {"all": error(stored[function + suffix])}
    # A sum is its positive entries minus the others: that of the reverse rates is 0.
    return {
        "at_idx": error(stored[f"{function}_at_idx_f64"], stored["idx"]),
        "min": error(stored[f"{function}_min_f64"][..., None], actual.argmin(-1)[..., None]),
        "max": error(stored[f"{function}_max_f64"][..., None], actual.argmax(-1)[..., None]),
        "sum": relative_error(
            actual.sum(-1), stored[f"{function}_sum_f64"], actual.clip(0.0).sum(-1)
        ),
    }


@pytest.mark.parametrize("name, vocab_size, function", GRAPH_VALUES)
def test_function_of_a_token_is_the_originals(name, vocab_size, function):
    stored, computed = stored_and_computed(name, vocab_size)
    errors = errors_of(stored, function, *computed[function])
    assert all(error <= TOLERANCE for error in errors.values()), errors


# Predictors and the denoiser, from a table of log-scores


def sampler_case(name: str):
    """Graph, score function, tokens int32 [B, L] and the times float64 [steps + 1] of a graph."""
    stored = arrays("sampler.npz")
    graph = GRAPHS[name](SETTINGS["smp"]["n"])
    table = jnp.asarray(stored[f"{name}/log_score"])  # [B, L, D]

    def score_fn(xt, sigma):
        return DenseScores(table, xt, graph.vocab_size)

    return graph, score_fn, jnp.asarray(stored[f"{name}/x"]), stored["timesteps_f64"]


def column(time: float, batch: int) -> jax.Array:
    """The same time for every sequence, float32 [B, 1]."""
    return jnp.full((batch, 1), time, jnp.float32)


def times_of_step(i: int, times: np.ndarray, batch: int) -> tuple[jax.Array, jax.Array]:
    """t and s of step i. The original steps to t - dt, which is rounded to float32 once here."""
    dt = (times[0] - times[-1]) / (len(times) - 1)
    return column(times[i], batch), column(times[i] - dt, batch)


def tweedie_positive(graph, score, x, delta_sigma):
    """exp(delta_sigma) score, the positive term of the staggered score, times the transition."""
    stays = lift(graph.transp_transition, x, delta_sigma)
    return jnp.exp(delta_sigma)[..., None] * score * stays  # [B, L, D]


STEPS = [
    (name, noise, predictor, int(i))
    for name in GRAPHS
    for noise in golden_set.found("sampler.npz", rf"{name}/([^/]+)/euler/.*")
    for predictor in PREDICTORS
    for i in golden_set.found("sampler.npz", rf"{name}/{noise}/{predictor}/i(\d+)/probs_f64")
]


@pytest.mark.parametrize("name, noise, predictor, i", STEPS)
def test_probabilities_of_a_predictor_are_the_originals(name, noise, predictor, i):
    graph, score_fn, x, times = sampler_case(name)
    schedule = golden_set.schedules()[noise]
    t, s = times_of_step(i, times, len(x))
    law = PREDICTORS[predictor](x, predictors.Step(t, s, score_fn, graph, schedule))
    expected = arrays("sampler.npz")[f"{name}/{noise}/{predictor}/i{i}/probs_f64"]
    if predictor == "euler":
        # The entry at x is 1 minus the probability of leaving.
        positive = np.where(jax.nn.one_hot(x, graph.dim) == 1.0, 1.0, expected)
    else:
        delta_sigma = schedule.sigma(t) - schedule.sigma(s)
        score = jnp.exp(score_fn(x, None).log_score())
        positive = tweedie_positive(graph, score, x, delta_sigma)
    assert relative_error(law.probabilities(), expected, positive) <= TOLERANCE


DENOISERS = [
    (name, noise, moment)
    for name in GRAPHS
    for noise in golden_set.found("sampler.npz", rf"{name}/([^/]+)/denoiser/.*")
    for moment in golden_set.found("sampler.npz", rf"{name}/{noise}/denoiser/(\w+)/probs_f64")
]


@pytest.mark.parametrize("name, noise, moment", DENOISERS)
def test_probabilities_of_the_denoiser_are_the_originals(name, noise, moment):
    graph, score_fn, x, times = sampler_case(name)
    schedule = golden_set.schedules()[noise]
    t = column({"eps": times[-1], "mid": times[len(times) // 2]}[moment], len(x))
    law = samplers.denoise(x, t, score_fn, graph, schedule)
    expected = arrays("sampler.npz")[f"{name}/{noise}/denoiser/{moment}/probs_f64"]
    score = jnp.exp(score_fn(x, None).log_score())
    positive = tweedie_positive(graph, score, x, schedule.sigma(t))
    positive = positive[..., : expected.shape[-1]]
    assert relative_error(law.probabilities(), expected, positive) <= TOLERANCE


# The network


@functools.cache
def network(name: str):
    """Graph, model and parameters of a graph's network."""
    stored, sizes = arrays("model.npz"), SETTINGS["model"]
    graph = GRAPHS[name](SETTINGS["tokens"])
    model = Transformer(
        dim=graph.dim,
        hidden_size=sizes["hidden_size"],
        blocks=sizes["n_blocks"],
        heads=sizes["n_heads"],
        cond_dim=sizes["cond_dim"],
        dropout=sizes["dropout"],
    )
    tensors = {key: stored[f"{name}/param/{key}"] for key in stored[f"{name}/param_order"]}
    params = jax.tree.map(jnp.asarray, from_original(tensors, sizes["n_heads"]))
    return graph, model, params


@functools.cache
def compiled_log_score(name: str):
    """The network of a graph as (tokens [B, L], sigma [B, 1]) -> log-scores [B, L, D]."""
    graph, model, params = network(name)
    compiled = compiled_quickly(
        lambda p, x, sigma: make_score_fn(model, p, graph)(x, sigma).log_score()
    )
    return functools.partial(compiled, params)


@pytest.mark.parametrize("noise", ["", "2"], ids=["sigma", "sigma2"])
@both_graphs
def test_log_score_of_the_network_is_the_originals(name, noise):
    stored = arrays("model.npz")
    x, sigma = stored[f"{name}/tokens_x"], stored[f"{name}/sigma{noise}"][:, None]
    log_score = compiled_log_score(name)(x, sigma)
    expected = stored[f"{name}/log_score{'_sigma2' if noise else ''}_f64"]
    assert np.max(np.abs(log_score - expected)) <= LOG_SCORE_TOLERANCE


@both_graphs
def test_sum_and_pick_of_the_head_are_those_of_its_own_table(name):
    graph, model, params = network(name)
    stored = arrays("model.npz")
    x, x0 = stored[f"{name}/tokens_x"], stored[f"{name}/tokens_x0"]

    @compiled_quickly
    def answers(params):
        head = make_score_fn(model, params, graph)(x, stored[f"{name}/sigma"][:, None])
        table = DenseScores(head.log_score(), x, graph.vocab_size)
        return head.total_and_pick(x0), table.total_and_pick(x0)

    for ours, expected in zip(*answers(params), strict=True):
        assert np.max(np.abs(ours - expected)) <= LOG_SCORE_TOLERANCE


@functools.cache
def losses_and_gradients(name: str):
    """Losses [B] of the stored batch and the gradients of their mean, by the original's names."""
    graph, model, params = network(name)
    stored = arrays("model.npz")
    x, x0 = stored[f"{name}/tokens_x"], stored[f"{name}/tokens_x0"]  # [B, L]
    sigma, slope = (stored[f"{name}/{key}"][:, None] for key in ("sigma", "dsigma"))

    def loss(params):
        scores = make_score_fn(model, params, graph)(x, sigma)
        losses = jnp.sum(slope * graph.score_entropy(scores, sigma, x, x0).value, axis=-1)
        return losses.mean(), losses

    gradients, losses = compiled_quickly(jax.grad(loss, has_aux=True))(params)
    return losses, to_original(gradients)


@both_graphs
def test_loss_of_the_network_is_the_originals(name):
    losses, _ = losses_and_gradients(name)
    expected = arrays("model.npz")[f"{name}/loss_per_seq_f64"]
    assert relative_error(losses, expected) <= TOLERANCE


@both_graphs
def test_gradient_of_every_parameter_is_the_originals(name):
    stored = arrays("model.npz")
    _, gradients = losses_and_gradients(name)
    errors = {
        key: relative_norm(gradients[key], stored[f"{name}/grad_f64/{key}"])
        for key in stored[f"{name}/param_order"]
    }
    assert gradients.keys() == errors.keys()
    assert {key: error for key, error in errors.items() if not error <= TOLERANCE} == {}


# Training


@functools.cache
def train_steps(name: str):
    """Metrics, parameters and moving averages after each stored step, by the original's names."""
    graph, model, params = network(name)
    schedule = golden_set.model_schedule(name)
    stored = arrays("ema_optim.npz")
    numbers = golden_set.found("ema_optim.npz", rf"{name}/step(\d+)/lr")
    rates = [float(stored[f"{name}/step{number}/lr"]) for number in numbers]

    config = base.get_config()  # the original's optimizer, but for the warm-up of the set
    config.optimizer.learning_rate = max(rates)
    config.optimizer.warmup_steps = round(max(rates) / rates[0])
    optimizer = make_optimizer(config)

    def loss_fn(params, key, batch):
        del key  # times and noise are the stored ones
        score_fn = make_score_fn(model, params, graph)
        return dwdse_at(batch["t"][:, None], batch["x"], batch["x0"], score_fn, graph, schedule)

    train_step = compiled_quickly(
        state.make_train_step(
            loss_fn,
            optimizer,
            decay=config.optimizer.ema_decay,
        )
    )
    train_state, key, steps = state.init(params, optimizer), jax.random.key(0), {}
    for number in numbers:
        batch = {part: stored[f"{name}/step{number}/{part}"] for part in ("x0", "t", "x")}
        train_state, metrics = train_step(train_state, batch, key)
        values = {"param": train_state.params, "ema": train_state.ema}
        steps[number] = metrics, {kind: to_original(tree) for kind, tree in values.items()}
    return steps


STORED_STEPS = [
    (name, step)
    for name in GRAPHS
    for step in golden_set.found("ema_optim.npz", rf"{name}/step(\d+)/lr")
]


@pytest.mark.parametrize("name, step", STORED_STEPS)
def test_loss_and_gradient_norm_of_a_training_step_are_the_originals(name, step):
    metrics, _ = train_steps(name)[step]
    stored, prefix = arrays("ema_optim.npz"), f"{name}/step{step}"
    errors = {
        "loss": relative_error(metrics["loss"], stored[f"{prefix}/loss_f64"]),
        "norm": relative_error(metrics["grad_norm"], stored[f"{prefix}/grad_norm_preclip_f64"]),
    }
    assert all(error <= TOLERANCE for error in errors.values()), errors


@pytest.mark.parametrize("name, step", STORED_STEPS)
def test_decay_of_the_moving_average_is_the_originals(name, step):
    expected = arrays("ema_optim.npz")[f"{name}/step{step}/ema_decay"]
    decay = state.ema_decay(jnp.asarray(int(step)), base.get_config().optimizer.ema_decay)
    assert relative_error(decay, expected) <= TOLERANCE


def change(tensors, name: str, key: str):
    """What the steps have added to a tensor."""
    return np.asarray(tensors[key], np.float64) - arrays("model.npz")[f"{name}/param/{key}"]


both_kinds = pytest.mark.parametrize("kind", ["param", "ema"])


@both_kinds
@pytest.mark.parametrize("name, step", STORED_STEPS)
def test_every_tensor_moves_as_far_as_the_originals(name, step, kind):
    values, stored = train_steps(name)[step][1][kind], arrays("ema_optim.npz")
    names = list(stored[f"{name}/param_order"])
    lengths = np.array([np.linalg.norm(change(values, name, key)) for key in names])
    expected = stored[f"{name}/step{step}/{kind}_delta_norms_f64"]
    errors = dict(zip(names, np.abs(lengths - expected) / expected, strict=True))
    assert {key: error for key, error in errors.items() if not error <= UPDATE_TOLERANCE} == {}


# Not after the first step: it moves a layer norm's weight by under 1000 float32 spacings, and
# parameter and average are rounded once each.
@both_kinds
@both_graphs
def test_tensors_move_where_the_originals_do(name, kind):
    step, (_, values) = list(train_steps(name).items())[-1]
    stored, prefix = arrays("ema_optim.npz"), f"{name}/step{step}/{kind}_f64/"
    keys = golden_set.found("ema_optim.npz", rf"{prefix}(.*)")
    errors = {
        key: relative_norm(
            change(values[kind], name, key), change({key: stored[prefix + key]}, name, key)
        )
        for key in keys
    }
    assert errors
    assert {key: error for key, error in errors.items() if not error <= UPDATE_TOLERANCE} == {}


# Sampling from end to end


@both_predictors
@both_graphs
def test_sampler_with_the_originals_noise_draws_the_originals_tokens(name, predictor):
    graph, schedule = network(name)[0], golden_set.model_schedule(name)
    stored = arrays("sampler.npz")
    uniforms = stored[f"e2e/{name}/u"]  # [steps + 1, B, L, D]
    expected = stored[f"e2e/{name}/{predictor}/x_steps"]  # int32 [steps + 1, B, L]
    times = np.linspace(1.0, stored["timesteps_f64"][-1], len(uniforms))
    log_score = compiled_log_score(name)

    def score_fn(xt, sigma):
        return DenseScores(log_score(xt, sigma), xt, graph.vocab_size)

    x = jnp.asarray(stored[f"e2e/{name}/x_T"])
    for i, u in enumerate(uniforms):
        if i < len(uniforms) - 1:
            t, s = times_of_step(i, times, len(x))
            law = PREDICTORS[predictor](x, predictors.Step(t, s, score_fn, graph, schedule))
        else:
            law = samplers.denoise(x, column(times[i], len(x)), score_fn, graph, schedule)
        probabilities = law.probabilities()
        x = samplers.gumbel_argmax(u[..., : probabilities.shape[-1]], probabilities)
        np.testing.assert_array_equal(x, expected[i], err_msg=f"step {i}")
    np.testing.assert_array_equal(x, stored[f"e2e/{name}/{predictor}/final"])
