"""SEDD and what it is compared with: the keys in which the methods differ, for any config.

Every method sets the same keys, so none is left as another method's config has it. sedd-compare
trains several of them on the same batches; --config=rivals:METHOD is one at the quickstart's size,
and openwebtext_small_* are some at the paper's.
"""

from sedd_jax.configs import quickstart

_SEDD = {
    "objective.name": "dwdse",
    "graph.name": "absorbing",
    "graph.scale_by_sigma": True,
    "schedule.name": "log_linear",
    "model.time_conditioning": True,
}
_UNIFORM = {"graph.name": "uniform", "graph.scale_by_sigma": False}

RIVALS = {
    # Lou et al. 2024, with the paper's noise schedules
    "sedd_absorbing": _SEDD,
    "sedd_uniform": {**_SEDD, **_UNIFORM, "schedule.name": "geometric"},
    # Scores that sum to what time alone decides: MDLM, MD4; without the noise level: RADD
    "normalised": {**_SEDD, "objective.name": "normalised"},
    "normalised_time_free": {
        **_SEDD,
        "objective.name": "normalised",
        "model.time_conditioning": False,
    },
    "unweighted": {**_SEDD, "objective.name": "unweighted"},
    # Meng et al. 2022, the paper's Appendix D
    "csm": {**_SEDD, "objective.name": "concrete_score_matching"},
    # Austin et al. 2021, mean prediction; the masked share grows linearly, as theirs
    "d3pm_absorb": {**_SEDD, "objective.name": "d3pm"},
    "d3pm_uniform": {**_SEDD, **_UNIFORM, "objective.name": "d3pm"},
    # Gulrajani and Hashimoto 2023: Gaussian noise on embeddings; graph and schedule are not read
    "plaid": {**_SEDD, "objective.name": "plaid"},
    # Left to right, on the same network; MASK begins a text
    "ar": {**_SEDD, "objective.name": "autoregressive", "model.time_conditioning": False},
}


def with_rival(config, method):
    """config, changed in place, as the method has it."""
    if method not in RIVALS:
        raise ValueError(f"unknown method {method!r}; known: {', '.join(RIVALS)}")
    config.update_from_flattened_dict(RIVALS[method])
    return config


def get_config(method="sedd_absorbing"):
    return with_rival(quickstart.get_config(), method)
