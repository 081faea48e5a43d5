"""MDLM, RADD, GIDD and Duo folders: what they are taken for, and the original networks' answers.

golden_sisters/FAMILY.npz holds what the authors' own code gave in PyTorch on a CPU in float32, for
the numbers of sister_models.parameters at its TIMES and noised tokens: the network's class, filled
by load_state_dict(strict=True), and the functions that make log p(x0 | xt) of its output (MDLM's
_subs_parameterization, RADD's own log_softmax, GIDD's softmax without MASK, Duo's
_process_model_output), and Duo's nll_per_token and _posterior_from_x0 (from t to t / 2). Flash
attention and its rotary embedding stood in by scaled_dot_product_attention and its definition.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import sister_models
from sister_models import CLEAN, TIMES

import sedd_jax
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

    entropy = model.graph.score_entropy(scores, sigma_t, jnp.asarray(xt), jnp.asarray(x0))
    nats = model.schedule.dsigma_dt(t) * entropy.value
    np.testing.assert_allclose(nats, answers["nll"], rtol=2e-4, atol=1e-4)
