"""SEDD small with uniform noise on OpenWebText: geometric schedule 1e-5..20."""

from sedd_jax.configs import openwebtext_small


def get_config():
    config = openwebtext_small.get_config()
    config.graph.name = "uniform"
    config.graph.scale_by_sigma = False
    config.schedule.name = "geometric"
    return config
