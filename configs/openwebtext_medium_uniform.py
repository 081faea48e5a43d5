"""SEDD medium with uniform noise on OpenWebText: geometric schedule 1e-5..20."""

from sedd_jax.configs import openwebtext_small_uniform


def get_config():
    config = openwebtext_small_uniform.get_config()
    config.model.hidden_size = 1024
    config.model.blocks = 24
    config.model.heads = 16
    return config
