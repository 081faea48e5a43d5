"""One Billion Words with uniform noise (Table 3); the paper has perplexity 40.25."""

from sedd_jax.configs import base, lm1b


def get_config():
    return base.with_uniform_noise(lm1b.get_config())
