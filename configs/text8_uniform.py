"""text8 with uniform noise (Table 2); the paper has 1.47 bits per character."""

from sedd_jax.configs import base, text8


def get_config():
    return base.with_uniform_noise(text8.get_config())
