"""One Billion Words with uniform noise (Table 3); the paper has perplexity 40.25."""

from sedd_jax.configs import lm1b


def get_config():
    config = lm1b.get_config()
    config.graph.name = "uniform"
    config.graph.scale_by_sigma = False
    config.schedule.name = "geometric"
    return config
